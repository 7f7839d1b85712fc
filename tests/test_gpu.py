"""What only a GPU can get wrong: streams, graphs, devices, launches; and what falls out of FP8's
window in a real run."""
import ctypes
import os
import shutil
import subprocess

import pytest
import torch
from torch.nn.functional import cosine_similarity

import fp4
import quartet
from data import tokens
from fp4 import linear, reference
from fp4 import ops as wrapped
from test_kernels import tiles_of

ops = torch.ops.fp4
ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")
FP32 = torch.float32
fp4.build()
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])


def layer_of(in_features, out_features, precision="fp4", **axes):
    return fp4.Linear(in_features, out_features, fp4.recipe(precision, **axes))


def quantised(x):
    signs, seeds = ops.draw(x, x, 2)
    return ops.quantize_backward(x, signs, seeds, False, "after", "after", "packed")


@gpu
def test_an_op_runs_on_the_current_stream():
    x = torch.zeros(4096, 4096, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    noise = torch.randn(4096, 4096, generator=torch.Generator().manual_seed(0))
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)       # The other stream would be long done.
        x += noise.cuda()
        got = ops.quantize_forward(x, "floor")
    side.synchronize()
    for a, b in zip(got, ops.quantize_forward(x, "floor")):
        assert torch.equal(a, b)
    assert got[0].any()


@gpu
def test_two_tensors_of_one_shape_do_not_meet():
    x, y = (torch.randn(1000, 544, device="cuda") for _ in range(2))
    alone = ops.quantize_forward(x, "floor")
    first, other, second = [ops.quantize_forward(t, "floor") for t in (x, y, x)]
    for a, b, c in zip(alone, first, second):
        assert torch.equal(a, b) and torch.equal(a, c)
    assert not torch.equal(first[0], other[0])


@gpu
def test_a_layer_can_be_captured_in_a_cuda_graph_and_draws_fresh_signs_at_each_replay():
    layer = layer_of(256, 384).cuda()
    layer.quantize_weight()
    x = torch.randn(200, 256, device="cuda", requires_grad=True)
    dy = torch.randn(200, 384, device="cuda")

    def step():
        return layer(x), *torch.autograd.grad(layer(x), (x, layer.weight), dy)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, dx, dw = step()
    seen = []
    for _ in range(3):
        graph.replay()
        seen.append([t.clone() for t in (y, dx, dw)])
    assert torch.equal(seen[0][0], layer(x)) and torch.equal(seen[0][0], seen[2][0])
    assert not torch.equal(seen[0][1], seen[1][1]) and not torch.equal(seen[1][2], seen[2][2])
    exact = dy @ layer.weight
    for _, dx, _ in seen:
        assert cosine_similarity(dx.flatten(), exact.flatten(), 0) > .9


def layer_by_the_definition(layer, x, dy, signs, seeds):
    """y, dx and dw of reference.py, on the CPU"""
    stochastic = layer.recipe.stochastic
    dgrad, wgrad = layer.recipe.sign_orders
    *xq, x_mask = reference.quantize_forward(x.detach().cpu(), "floor")
    *wq, w_mask = reference.quantize_forward(layer.weight.detach().cpu(), "floor")
    g = reference.quantize_backward(dy.cpu(), signs, seeds[:2], stochastic, dgrad, wgrad)
    wt = reference.requantize_transposed(*wq, signs, seeds[2:3], stochastic, dgrad)
    xt = reference.requantize_transposed(*xq, signs, seeds[3:], stochastic, wgrad)
    y = reference.gemm(*xq, *wq, 1.0, FP32)
    dx = reference.unrotate(reference.gemm(*g[:2], *wt, 16 / 9, FP32), x_mask, FP32)
    dw = reference.unrotate(reference.gemm(*g[2:], *xt, 16 / 9, FP32), w_mask, FP32)
    return y, dx, dw


@each_device
@pytest.mark.parametrize("n_tokens", [1, 200])
@pytest.mark.parametrize("precision, rotation", [("fp4", "32"), ("fp4-sr", "32"),
                                                 ("fp4", "32:none:32")])
def test_a_layer_is_the_one_of_the_definition_with_the_same_draws(
        precision, rotation, n_tokens, device):
    layer = layer_of(96, 160, precision, rotation=rotation).to(device)
    x = torch.randn(n_tokens, 96, device=device, requires_grad=True)
    dy = torch.randn(n_tokens, 160, device=device)
    torch.manual_seed(1)
    got = layer(x), *torch.autograd.grad(layer(x), (x, layer.weight), dy)
    torch.manual_seed(1)
    signs, seeds = (t.cpu() for t in reference.draw(dy, x, 4))
    expected = layer_by_the_definition(layer, x, dy, signs, seeds)
    for a, b in zip(got, expected):
        assert a.shape == b.shape and (a.cpu() - b).norm() <= 1e-4 * b.norm()


class FloatMatrix(ctypes.Structure):
    """the struct of ops.h"""
    _fields_ = [("data", ctypes.c_void_p), ("is_bf16", ctypes.c_bool)]


@pytest.fixture(scope="session")
def gemm_fp32(tmp_path_factory):
    """the product for GPUs before Ampere, compiled for this one"""
    if not shutil.which("nvcc"):
        pytest.skip("no nvcc")
    path = tmp_path_factory.mktemp("gemm") / "gemm_fp32.so"
    subprocess.run(["nvcc", "-O3", "-std=c++17", "-arch=native", "-shared", "-Xcompiler", "-fPIC",
                    "-o", path, "fp4/kernels/gemm_fp32.cu"], cwd=ROOT, check=True)
    symbols = subprocess.run(["nm", "-D", path], capture_output=True, text=True).stdout.split()
    name = next(symbol for symbol in symbols if symbol.startswith("_Z9gemm_fp32"))
    return getattr(ctypes.CDLL(path), name)


@gpu
@pytest.mark.parametrize("dtype, ulp", [(FP32, 2 ** -23), (torch.bfloat16, 2 ** -8)])
def test_the_product_for_gpus_before_ampere_is_within_the_error_of_an_fp32_sum(
        gemm_fp32, dtype, ulp):
    for M, N, K in ((1, 32, 32), (33, 64, 96), (100, 160, 1024), (300, 72, 544)):
        torch.manual_seed(K)
        a, b = (reference.quantize_forward(torch.randn(rows, K), "floor")[:2] for rows in (M, N))
        b[1][5, 0] = 255                                        # NaN
        out = torch.full((M, N), 77., device="cuda", dtype=dtype)
        operands = [t.cuda() for t in (*a, *b)]
        gemm_fp32(*[ctypes.c_void_p(t.data_ptr()) for t in operands],
                  *map(ctypes.c_int64, (M, N, K)), ctypes.c_float(16 / 9),
                  FloatMatrix(out.data_ptr(), dtype == torch.bfloat16), None)
        got = out.cpu().double()
        exact = reference.gemm(*a, *b, 16 / 9, FP32).double()
        size_a, size_b = (reference.dequantize(*v, torch.float64).abs() for v in (a, b))
        size = 16 / 9 * size_a @ size_b.T
        assert got[:, 5].isnan().all() and torch.equal(got.isnan(), exact.isnan())
        is_close = (got - exact).abs().le(K * 2 ** -24 * size + ulp * exact.abs())
        assert (is_close | exact.isnan()).all()


@each_device
def test_no_tokens_at_all_give_no_outputs_and_a_gradient_of_zeros(device):
    layer = layer_of(96, 160).to(device)
    x = torch.randn(0, 96, device=device, requires_grad=True)
    dy = torch.randn(0, 160, device=device)
    dx, dw = torch.autograd.grad(layer(x), (x, layer.weight), dy)
    assert layer(x).shape == (0, 160) and dx.shape == (0, 96)
    assert dw.shape == (160, 96) and not dw.any()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no second GPU")
def test_an_op_runs_on_the_device_of_its_tensors_and_refuses_two_devices():
    x = torch.randn(100, 544)
    first, second = (ops.quantize_forward(x.to(f"cuda:{i}"), "floor") for i in (0, 1))
    for a, b in zip(first, second):
        assert b.device.index == 1 and torch.equal(a.cpu(), b.cpu())
    codes, scales, _ = first
    with pytest.raises(RuntimeError, match="another device"):
        ops.dequantize(codes, scales.to("cuda:1"), FP32)


@gpu
def test_a_kernel_that_cannot_start_is_an_error_not_a_wrong_result():
    # This is one tile more than CUDA takes in the y direction of a grid.
    x = torch.zeros(32, 128 * 65536, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="a kernel did not start"):
        quantised(x)
    ops.quantize_forward(torch.randn(64, 64, device="cuda"), "floor")      # The error is over.


class Counting:
    """fp4.ops, but what is quantised is also counted: how many blocks, and how many of them are
    beyond the window of the FP8 tiles"""

    def __init__(self):
        self.counts = []                # (kind, blocks beyond the window, blocks)

    def __getattr__(self, name):
        return getattr(wrapped, name)

    def count(self, kind, packed, is_right=False):
        codes, scales = (t.cpu() for t in packed)
        beyond = tiles_of(codes, scales, is_right)[2]
        self.counts.append((kind, beyond, scales.numel()))

    def quantize_gemm(self, x, scale, w):
        y, xq, mask = wrapped.quantize_gemm(x, scale, w)
        self.count("forward", xq)
        self.count("forward", w, True)
        return y, xq, mask

    def quantize_backward(self, dy, *args):
        for packed in wrapped.quantize_backward(dy, *args[:-1], "packed"):
            self.count("backward", packed)
        return wrapped.quantize_backward(dy, *args)

    def requantize_transposed(self, v, *args):
        packed = wrapped.requantize_transposed(v, *args[:-1], "packed")
        self.count("requantize", packed, True)
        return wrapped.requantize_transposed(v, *args)


@each_device
def test_no_block_of_a_real_training_run_falls_out_of_the_window(device, monkeypatch):
    "every operand of every product of a step, after a few steps on source code"
    argv = ["--size", "tiny", "--data", "stdlib", "--device", device, "--steps", "25",
            "--batch", "4", "--no_compile"]
    cfg = quartet.resolve(quartet.parse(argv))
    data = quartet.open_dataset(cfg)
    model = quartet.build_model(cfg, data.vocab_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    fp4.quantize_weights(model)
    counting = Counting()
    for step in range(25):
        if step == 24:
            monkeypatch.setattr(linear, "ops", counting)
        batch = tokens.batch(data.train, step, 4, cfg.seq, 0, data.vocab_size)
        x, y = quartet.to_device(batch, device)
        model(x, y).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step < 24:
            fp4.quantize_weights(model)
    counts = counting.counts
    assert {kind for kind, _, _ in counts} == {"forward", "backward", "requantize"}
    assert sum(n for _, _, n in counts) > 100_000 and sum(n for _, n, _ in counts) == 0, counts
