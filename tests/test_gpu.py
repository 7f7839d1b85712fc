"""What only a GPU can get wrong: streams, graphs, devices, launches; and what falls out of FP8's window in a real run."""
import ctypes, os, shutil, subprocess, types
import pytest, torch
import fp4, quartet
from data import tokens
from fp4 import linear, reference
from test_kernels import tiles_of

ops = torch.ops.fp4
ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")
fp4.build()
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def quantised(x): return ops.quantize_backward(x, *ops.draw(x, x, 2), False, "after", "after", "packed")


@gpu
def test_an_op_runs_on_the_current_stream():
    x, side = torch.zeros(4096, 4096, device="cuda"), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)                           # the other stream would be long done
        x += torch.randn(4096, 4096, generator=torch.Generator().manual_seed(0)).cuda()
        got = ops.quantize_forward(x, "floor")
    side.synchronize()
    for a, b in zip(got, ops.quantize_forward(x, "floor")): assert torch.equal(a, b)
    assert got[0].any()


@gpu
def test_two_tensors_of_one_shape_do_not_meet():
    x, y = (torch.randn(1000, 544, device="cuda") for _ in range(2))
    alone, pair = ops.quantize_forward(x, "floor"), [ops.quantize_forward(t, "floor") for t in (x, y, x)]
    for a, b, c in zip(alone, *pair[::2]): assert torch.equal(a, b) and torch.equal(a, c)
    assert not torch.equal(pair[0][0], pair[1][0])


@gpu
def test_a_layer_can_be_captured_in_a_cuda_graph_and_draws_fresh_signs_at_each_replay():
    layer = fp4.Linear(256, 384, "fp4").cuda()
    layer.quantize_weight()
    x, dy = torch.randn(200, 256, device="cuda", requires_grad=True), torch.randn(200, 384, device="cuda")
    def step(): return layer(x), *torch.autograd.grad(layer(x), (x, layer.weight), dy)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side): step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph): y, dx, dw = step()
    seen = []
    for _ in range(3):
        graph.replay()
        seen.append([t.clone() for t in (y, dx, dw)])
    assert torch.equal(seen[0][0], layer(x)) and torch.equal(seen[0][0], seen[2][0])
    assert not torch.equal(seen[0][1], seen[1][1]) and not torch.equal(seen[1][2], seen[2][2])
    exact = dy @ layer.weight
    for _, dx, _ in seen: assert torch.nn.functional.cosine_similarity(dx.flatten(), exact.flatten(), 0) > .9


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
@pytest.mark.parametrize("tokens", [1, 200])
@pytest.mark.parametrize("precision, rotation", [("fp4", "32"), ("fp4-sr", "32"), ("fp4", "32:none:32")])
def test_a_layer_is_the_one_of_the_definition_with_the_same_draws(precision, rotation, tokens, device):
    layer, F32 = fp4.Linear(96, 160, precision, rotation=rotation).to(device), torch.float32
    x, dy = torch.randn(tokens, 96, device=device, requires_grad=True), torch.randn(tokens, 160, device=device)
    torch.manual_seed(1)
    got = layer(x), *torch.autograd.grad(layer(x), (x, layer.weight), dy)
    torch.manual_seed(1)
    (signs, seeds), sr, (dgrad, wgrad) = [t.cpu() for t in reference.draw(dy, x, 4)], layer.recipe.stochastic, layer.recipe.turns
    xq, wq = (reference.quantize_forward(t.detach().cpu(), "floor") for t in (x, layer.weight))
    g = reference.quantize_backward(dy.cpu(), signs, seeds[:2], sr, dgrad, wgrad)
    w, xt = reference.requantize(*wq[:2], signs, seeds[2:3], sr, dgrad), reference.requantize(*xq[:2], signs, seeds[3:], sr, wgrad)
    want = (reference.gemm(*xq[:2], *wq[:2], 1.0, F32), reference.unrotate(reference.gemm(*g[:2], *w, 16 / 9, F32), xq[2], F32),
            reference.unrotate(reference.gemm(*g[2:], *xt, 16 / 9, F32), wq[2], F32))
    for a, b in zip(got, want): assert a.shape == b.shape and (a.cpu() - b).norm() <= 1e-4 * b.norm()


@gpu
@pytest.mark.parametrize("dtype, ulp", [(torch.float32, 2 ** -23), (torch.bfloat16, 2 ** -8)])
def test_the_product_for_gpus_before_ampere_is_within_the_error_of_an_fp32_sum(tmp_path_factory, dtype, ulp):
    if not shutil.which("nvcc"): pytest.skip("no nvcc")
    path = tmp_path_factory.getbasetemp() / "plain.so"
    if not path.exists():
        subprocess.run(["nvcc", "-O3", "-std=c++17", "-arch=native", "-shared", "-Xcompiler", "-fPIC", "-o", path, "fp4/gemm_plain.cu"], cwd=ROOT, check=True)
    class Values(ctypes.Structure): _fields_ = [("data", ctypes.c_void_p), ("bf16", ctypes.c_bool)]
    plain = getattr(ctypes.CDLL(path), "_Z10gemm_plainPKhS0_S0_S0_lllf6ValuesPv")
    for M, N, K in ((1, 32, 32), (33, 64, 96), (100, 160, 1024), (300, 72, 544)):
        torch.manual_seed(K)
        a, b = (reference.quantize_forward(torch.randn(rows, K), "floor")[:2] for rows in (M, N))
        b[1][5, 0] = 255                                        # NaN
        out, operands = torch.full((M, N), 77., device="cuda", dtype=dtype), [t.cuda() for t in (*a, *b)]
        plain(*[ctypes.c_void_p(t.data_ptr()) for t in operands], *map(ctypes.c_int64, (M, N, K)), ctypes.c_float(16 / 9),
              Values(out.data_ptr(), dtype == torch.bfloat16), None)
        got, exact = out.cpu().double(), reference.gemm(*a, *b, 16 / 9, torch.float32).double()
        size = 16 / 9 * reference.dequantize(*a, torch.float64).abs() @ reference.dequantize(*b, torch.float64).abs().T
        assert got[:, 5].isnan().all() and torch.equal(got.isnan(), exact.isnan())
        assert ((got - exact).abs().le(K * 2 ** -24 * size + ulp * exact.abs()) | exact.isnan()).all()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
def test_no_tokens_at_all_give_no_outputs_and_a_gradient_of_zeros(device):
    layer, x = fp4.Linear(96, 160, "fp4").to(device), torch.randn(0, 96, device=device, requires_grad=True)
    dx, dw = torch.autograd.grad(layer(x), (x, layer.weight), torch.randn(0, 160, device=device))
    assert layer(x).shape == (0, 160) and dx.shape == (0, 96) and dw.shape == (160, 96) and not dw.any()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no second GPU")
def test_an_op_runs_on_the_device_of_its_tensors_and_refuses_two_devices():
    x = torch.randn(100, 544)
    for a, b in zip(ops.quantize_forward(x.to("cuda:0"), "floor"), ops.quantize_forward(x.to("cuda:1"), "floor")):
        assert b.device.index == 1 and torch.equal(a.cpu(), b.cpu())
    codes, scales, _ = ops.quantize_forward(x.to("cuda:0"), "floor")
    with pytest.raises(RuntimeError, match="another device"): ops.dequantize(codes, scales.to("cuda:1"), torch.float32)


@gpu
def test_a_kernel_that_cannot_start_is_an_error_not_a_wrong_result():
    x = torch.zeros(32, 128 * 65536, device="cuda", dtype=torch.bfloat16)      # one tile more than CUDA takes in y
    with pytest.raises(RuntimeError, match="a kernel did not start"): quantised(x)
    ops.quantize_forward(torch.randn(64, 64, device="cuda"), "floor")          # and the error is over


@pytest.mark.parametrize("device", ["cpu"] + ["cuda"] * torch.cuda.is_available())
def test_no_block_of_a_real_training_run_falls_out_of_the_window(device, monkeypatch):
    "every operand of every product of a step, after a few steps on source code"
    cfg = quartet.complete(quartet.Config(size="tiny", data="stdlib", device=device, steps=25, batch=4))
    shards, _, vocab, _ = quartet.corpus(cfg)
    model = quartet.build_model(cfg, vocab)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    fp4.quantize_weights_after(optimizer, model)
    counted = []
    def count(kind, packed, right=False): counted.append((kind, tiles_of(*(t.cpu() for t in packed), right)[2], packed[1].numel()))
    def forward(x, scale, w, w_scales):
        y, codes, scales, mask = ops.quantize_gemm(x, scale, w, w_scales)
        count("forward", (codes, scales)), count("forward", (w, w_scales), True)
        return y, codes, scales, mask
    def backward(dy, *how):
        packed = ops.quantize_backward(dy, *how[:-1], "packed")
        count("backward", packed[:2]), count("backward", packed[2:])
        return ops.quantize_backward(dy, *how)
    def requantize(codes, scales, *how):
        packed = ops.requantize(codes, scales, *how[:-1], "packed")
        count("requantize", packed, True)
        return ops.requantize(codes, scales, *how)
    watched = dict(quantize_gemm=forward, quantize_backward=backward, requantize=requantize)
    spy = types.SimpleNamespace(**watched, **{n: getattr(ops, n) for n in ("quantize_forward", "draw", "gemm_unrotate", "unrotate", "dequantize")})
    for step in range(25):
        if step == 24: monkeypatch.setattr(linear, "ops", spy)
        x, y = quartet.to_device(tokens.batch(shards, step, 4, cfg.seq, 0, vocab), device)
        model(x, y).backward()
        optimizer.step(), optimizer.zero_grad()
    assert {kind for kind, _, _ in counted} == {"forward", "backward", "requantize"}
    assert sum(n for _, _, n in counted) > 100_000 and sum(n for _, n, _ in counted) == 0, counted
