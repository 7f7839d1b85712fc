"""Facts about --precision fp8: fp4/emulate/fp8.py."""
import pytest
import torch

import fp4
from fp4.emulate import fp8

HAS_FP8_GPU = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)

# mantissa bits, smallest exponent, largest value
E4M3 = (3, -6, 448.)
E5M2 = (2, -14, 57344.)


def layer_and_input(n_in=96, n_out=48, tokens=40, dtype=torch.float32):
    "-> layer, x, dy"
    torch.manual_seed(0)
    layer = fp4.Linear(n_in, n_out, fp4.recipe("fp8"))
    x = torch.randn(tokens, n_in, dtype=dtype, requires_grad=True)
    return layer, x, torch.randn(tokens, n_out, dtype=dtype)


def run_passes(layer, x, dy, forward=None):
    "-> y, dx, dw"
    x.grad = None
    layer.weight.grad = None
    y = layer(x) if forward is None else forward(x)
    y.backward(dy)
    return y.detach(), x.grad, layer.weight.grad


def all_values(mantissa, min_exponent, top):
    "of the format, from 0 on"
    values = [m * 2. ** (min_exponent - mantissa) for m in range(2 ** mantissa)]
    for e in range(min_exponent, 17):
        for m in range(2 ** mantissa, 2 ** (mantissa + 1)):
            value = m * 2. ** (e - mantissa)
            if value <= top:
                values.append(value)
    return torch.tensor(values, dtype=torch.float64)


def rounded(x, mantissa, min_exponent, top):
    "x as FP8 holds it with one scale, by a search in float64 over all of the format's values"
    values = all_values(mantissa, min_exponent, top)
    x = x.detach().double()
    scale = x.abs().max() / top
    nearest = ((x.abs() / scale)[..., None] - values).abs().argmin(-1)
    return values[nearest] * x.sign() * scale


@pytest.mark.parametrize("tokens", [1, 40, 64])
def test_the_layer_is_three_products_of_values_rounded_to_fp8(tokens):
    layer, x, dy = layer_and_input(tokens=tokens)
    X = rounded(x, *E4M3)
    W = rounded(layer.weight, *E4M3)
    D = rounded(dy, *E5M2)
    for result, expected in zip(run_passes(layer, x, dy), (X @ W.T, D @ W, D.T @ X)):
        assert (result - expected).abs().max() <= 1e-5 * expected.abs().max()
    wrong = rounded(dy, *E4M3) @ W                  # gradients in E4M3 would be told apart
    assert (x.grad - wrong).abs().max() > 1e-3 * wrong.abs().max()


@pytest.mark.parametrize("dtype, number_format", [(fp8.E4M3, E4M3), (fp8.E5M2, E5M2)])
def test_every_value_of_a_format_stays_and_the_middle_of_two_becomes_the_even_one(
        dtype, number_format):
    values = all_values(*number_format).float()
    assert len(values) == (127 if dtype == fp8.E4M3 else 124)
    middles = (values[1:] + values[:-1]) / 2
    even = torch.where(torch.arange(len(middles)) % 2 == 0, values[:-1], values[1:])
    for sign, octave in ((1, 0), (-1, 0), (1, -30), (-1, 7)):
        factor = sign * 2. ** octave
        values_8, scale = fp8.quantize(torch.cat((values, middles)) * factor, dtype)
        assert scale == 2. ** octave and values_8.dtype == dtype
        assert torch.equal(values_8.float() * sign, torch.cat((values, even)))


@pytest.mark.parametrize("dtype, tokens", [(torch.float32, 40), (torch.bfloat16, 64)])
def test_compiled_equals_eager(dtype, tokens):
    layer, x, dy = layer_and_input(tokens=tokens, dtype=dtype)
    eager = run_passes(layer, x, dy)
    compiled = run_passes(layer, x, dy, torch.compile(layer, fullgraph=True))
    assert [t.dtype for t in eager] == [dtype, dtype, torch.float32]
    for c, e in zip(compiled, eager):
        assert (c - e).abs().max() <= 1e-6 * e.abs().max()


def test_activations_and_weight_are_saved_in_eight_bits():
    layer, x, _ = layer_and_input(256, 64, tokens=512)
    sizes = []

    def measure(tensor):
        sizes.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(measure, lambda tensor: tensor):
        layer(x)
    assert sum(sizes) == 512 * 256 + 64 * 256 + 2 * 4           # and two scales


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_reaches_output_and_gradients(bad):
    layer, x, dy = layer_and_input()
    assert all(t.isfinite().all() for t in run_passes(layer, x, dy))
    with torch.no_grad():
        x[3, 40] = bad
    y, dx, dw = run_passes(layer, x, dy)
    # one scale a tensor: it is everywhere
    assert y.isnan().all() and dw.isnan().all() and dx.isfinite().all()
    with torch.no_grad():
        x[3, 40] = 0
    dy[5, 7] = bad
    y, dx, dw = run_passes(layer, x, dy)
    assert y.isfinite().all() and dx.isnan().all() and dw.isnan().all()


def test_zeros_stay_zeros_and_tiny_gradients_are_kept():
    layer, x, dy = layer_and_input()
    y, dx, dw = run_passes(layer, torch.zeros_like(x, requires_grad=True), dy)
    assert not y.any() and not dw.any()
    full = run_passes(layer, x, dy)[1:]
    tiny = run_passes(layer, x, dy * 2. ** -40)[1:]
    for f, t in zip(full, tiny):
        assert torch.equal(f * 2. ** -40, t)        # the scale follows the tensor


def test_features_that_are_no_multiple_of_16_are_refused_by_name():
    with pytest.raises(ValueError, match="in-features must be a multiple of 16, got 100"):
        fp4.Linear(100, 64, fp4.recipe("fp8"))
    with pytest.raises(ValueError, match="out-features must be a multiple of 16, got 70"):
        fp4.Linear(64, 70, fp4.recipe("fp8"))
    words = "fp8 is a method of its own and has no rounding to change"
    with pytest.raises(ValueError, match=words):
        fp4.recipe("fp8", rounding="sr")


@pytest.mark.skipif(not HAS_FP8_GPU, reason="no GPU with FP8")
@pytest.mark.parametrize("dtype, tokens", [(torch.float32, 40), (torch.bfloat16, 128)])
def test_the_tensor_cores_and_casting_agree(dtype, tokens):
    layer, x, dy = layer_and_input(512, 256, tokens, dtype)
    on_cpu = [t.clone() for t in run_passes(layer, x, dy)]
    layer = layer.cuda()
    x = x.detach().cuda().requires_grad_()
    dy = dy.cuda()
    for forward in (layer, torch.compile(layer, fullgraph=True)):
        for result, expected in zip(run_passes(layer, x, dy, forward), on_cpu):
            difference = (result.cpu().float() - expected.float()).norm()
            assert difference <= 6e-3 * expected.float().norm()
