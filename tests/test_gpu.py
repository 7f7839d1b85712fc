"""What only a GPU can get wrong: streams, graphs, devices, launches."""
import functools
import os
import subprocess
import sys

import pytest
import torch
from torch.nn.functional import cosine_similarity

import fp4
from fp4 import ops, reference
from fp4.backend import select_backend
from tools import run

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")
FP32 = torch.float32
fp4.build()
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])


def layer_of(in_features, out_features, precision="fp4", **axes):
    return fp4.Linear(in_features, out_features, fp4.recipe(precision, **axes))


def quantised(x):
    "codes, scales and mask of the forward pass"
    packed, mask = ops.quantize_forward(x, "floor")
    return *packed, mask


@gpu
def test_an_op_runs_on_the_current_stream():
    x = torch.zeros(4096, 4096, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    noise = torch.randn(4096, 4096, generator=torch.Generator().manual_seed(0))
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)       # The other stream would be long done.
        x += noise.cuda()
        got = quantised(x)
    side.synchronize()
    for a, b in zip(got, quantised(x)):
        assert torch.equal(a, b)
    assert got[0].any()


@gpu
def test_two_tensors_of_one_shape_do_not_meet():
    x, y = (torch.randn(1000, 544, device="cuda") for _ in range(2))
    alone = quantised(x)
    first, other, second = [quantised(t) for t in (x, y, x)]
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
    first, second = (quantised(x.to(f"cuda:{i}")) for i in (0, 1))
    for a, b in zip(first, second):
        assert b.device.index == 1 and torch.equal(a.cpu(), b.cpu())
    codes, scales, _ = first
    with pytest.raises(RuntimeError, match="another device"):
        ops.dequantize((codes, scales.to("cuda:1")), FP32)


@gpu
def test_a_kernel_that_cannot_start_is_an_error_not_a_wrong_result():
    # This is one tile more than CUDA takes in the y direction of a grid.
    x = torch.zeros(32, 128 * 65536, device="cuda", dtype=torch.bfloat16)
    signs, seeds = ops.draw(x, x, 2)
    with pytest.raises(RuntimeError, match="a kernel did not start"):
        ops.quantize_backward(x, signs, seeds, False, "after", "after", "packed")
    quantised(torch.randn(64, 64, device="cuda"))       # The error is over.


# ---- the products of other GPUs, on this one

# What stands in the log of a run with --gemm.
PRODUCTS = {"fp8": "exact FP4 products on FP8 tensor cores (the library's)",
            "bf16": "exact FP4 products on BF16 tensor cores (the library's)",
            "fp32": "exact FP4 products in FP32 (gemm_fp32.cu"}
LOSS_TOLERANCE = 1e-3
NORM_TOLERANCE = 0.06


def skip_if_missing(gemm):
    try:
        return select_backend(torch.cuda.get_device_capability(), gemm)
    except ValueError as error:
        pytest.skip(str(error))


def run_python(*arguments):
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.fixture(scope="session")
def five_steps(tmp_path_factory):
    """a function: --gemm -> the text of the log, losses and norms of five steps of the tiny model

    A process can load one product. The learning rate is so small that steps do not amplify what
    differs."""
    def train(gemm):
        out = tmp_path_factory.mktemp("run")
        run_python("quartet.py", "--size", "tiny", "--data", "stdlib", "--device", "cuda",
                   "--steps", "5", "--lr", "1e-5", "--no_compile", "--sample_tokens", "1",
                   "--gemm", gemm, "--out", str(out), "--name", "five")
        text = (out / "five" / "log.csv").read_text()
        rows = run.parse_log(text).history
        return text, *(torch.tensor([getattr(row, name) for row in rows], dtype=torch.float64)
                       for name in ("loss", "norm"))
    return functools.cache(train)


@gpu
@pytest.mark.slow
@pytest.mark.parametrize("gemm", PRODUCTS)
def test_five_steps_with_the_product_of_another_card_are_those_of_the_usual_one(gemm, five_steps):
    """Two products of the same operands differ by the rounding of their sums. The coarsest unit is
    Hopper's: it drops what is 13 binary places below the largest. Random errors of 2^-13 of a
    product's root mean square, put into every product on a CPU, changed the losses of five steps by
    up to 3e-4 and the norms by up to 2.4e-2; those of a float32 sum, 2^-23, by 3e-4 and 1e-2, since
    BF16 rounds what comes out. The tolerances are about three times that. Gradients without their
    16/9 change the norms by 0.4.
    """
    skip_if_missing(gemm)
    text, loss, norm = five_steps(gemm)
    usual_text, usual_loss, usual_norm = five_steps("auto")
    assert PRODUCTS[gemm] in next(line for line in text.splitlines() if line.startswith("# fp4 "))
    assert len(loss) == len(usual_loss) == 5 and usual_text.count("\n# fp4 ") == 1
    assert ((loss - usual_loss).abs() <= LOSS_TOLERANCE * usual_loss).all()
    assert ((norm - usual_norm).abs() <= NORM_TOLERANCE * usual_norm).all()


TESTS_WITH_PRODUCT = """
import sys

import pytest
import torch

import fp4.backend

chosen = fp4.backend.select_backend(torch.cuda.get_device_capability(), sys.argv[1])
fp4.backend.select_backend = lambda capability, gemm="auto": chosen
failed = pytest.main(["-q", "-x", "-p", "no:cacheprovider", "tests/test_kernels.py",
                      "tests/test_gpu.py", "-k", "cuda"])
assert fp4.build() == chosen
sys.exit(failed)
"""


@gpu
@pytest.mark.slow
@pytest.mark.parametrize("gemm", PRODUCTS)
def test_every_op_and_a_layer_are_those_of_the_definition_with_the_product_of_another_card(gemm):
    """The tests of the ops and of a layer above, in a process whose kernels have this product."""
    skip_if_missing(gemm)
    run_python("-c", TESTS_WITH_PRODUCT, gemm)
