"""Facts about --precision fp8: fp4/fp8.py."""
import pytest, torch
import fp4


def layer_and_input(n_in=96, n_out=48, tokens=40, dtype=torch.float32):
    torch.manual_seed(0)
    layer = fp4.Linear(n_in, n_out, "fp8")
    return layer, torch.randn(tokens, n_in, dtype=dtype, requires_grad=True), torch.randn(tokens, n_out, dtype=dtype)


def passes(layer, x, dy, f=None):
    x.grad = layer.weight.grad = None
    y = (layer if f is None else f)(x)
    y.backward(dy)
    return y.detach(), x.grad, layer.weight.grad


def rounded(x, mantissa, emin, top):
    "x as FP8 holds it with one scale, by a search in float64 over all of the format's values"
    values = [m * 2. ** (e - mantissa) for e in range(emin, 17) for m in range(2 ** mantissa, 2 ** (mantissa + 1))]
    values = torch.tensor([m * 2. ** (emin - mantissa) for m in range(2 ** mantissa)] + [v for v in values if v <= top], dtype=torch.float64)
    x = x.detach().double()
    scale = x.abs().max() / top
    return values[((x.abs() / scale)[..., None] - values).abs().argmin(-1)] * x.sign() * scale


E4M3, E5M2 = (3, -6, 448.), (2, -14, 57344.)


@pytest.mark.parametrize("tokens", [1, 40, 64])
def test_the_layer_is_three_products_of_values_rounded_to_fp8(tokens):
    layer, x, dy = layer_and_input(tokens=tokens)
    X, W, D = rounded(x, *E4M3), rounded(layer.weight, *E4M3), rounded(dy, *E5M2)
    for got, want in zip(passes(layer, x, dy), (X @ W.T, D @ W, D.T @ X)):
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    wrong = rounded(dy, *E4M3) @ W                              # gradients in E4M3 would be told apart
    assert (x.grad - wrong).abs().max() > 1e-3 * wrong.abs().max()


@pytest.mark.parametrize("dtype, tokens", [(torch.float32, 40), (torch.bfloat16, 64)])
def test_compiled_equals_eager(dtype, tokens):
    layer, x, dy = layer_and_input(tokens=tokens, dtype=dtype)
    eager, compiled = passes(layer, x, dy), passes(layer, x, dy, torch.compile(layer, fullgraph=True))
    assert [t.dtype for t in eager] == [dtype, dtype, torch.float32]
    for a, b in zip(compiled, eager): assert (a - b).abs().max() <= 1e-6 * b.abs().max()


def test_activations_and_weight_are_saved_in_eight_bits():
    layer, x, _ = layer_and_input(256, 64, tokens=512)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel() * t.element_size()) or t, lambda t: t):
        layer(x)
    assert sum(sizes) == 512 * 256 + 64 * 256 + 2 * 4           # and two scales


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_reaches_output_and_gradients(bad):
    layer, x, dy = layer_and_input()
    assert all(t.isfinite().all() for t in passes(layer, x, dy))
    with torch.no_grad(): x[3, 40] = bad
    y, dx, dw = passes(layer, x, dy)
    assert y.isnan().all() and dw.isnan().all() and dx.isfinite().all()         # one scale a tensor: it is everywhere
    with torch.no_grad(): x[3, 40] = 0
    dy[5, 7] = bad
    y, dx, dw = passes(layer, x, dy)
    assert y.isfinite().all() and dx.isnan().all() and dw.isnan().all()


def test_zeros_stay_zeros_and_tiny_gradients_are_kept():
    layer, x, dy = layer_and_input()
    y, dx, dw = passes(layer, torch.zeros_like(x, requires_grad=True), dy)
    assert not y.any() and not dw.any()
    full, tiny = passes(layer, x, dy)[1:], passes(layer, x, dy * 2. ** -40)[1:]
    for a, b in zip(full, tiny): assert torch.equal(a * 2. ** -40, b)           # the scale follows the tensor


def test_features_that_are_no_multiple_of_16_are_refused_by_name():
    with pytest.raises(ValueError, match="fp8: in-features must be a multiple of 16, got 100"): fp4.Linear(100, 64, "fp8")
    with pytest.raises(ValueError, match="fp8: out-features must be a multiple of 16, got 70"): fp4.Linear(64, 70, "fp8")
    with pytest.raises(ValueError, match="fp8 is a method of its own and has no rounding to change"): fp4.Linear(64, 64, "fp8", rounding="sr")


@pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="no GPU with FP8")
@pytest.mark.parametrize("dtype, tokens", [(torch.float32, 40), (torch.bfloat16, 128)])
def test_the_tensor_cores_and_casting_agree(dtype, tokens):
    layer, x, dy = layer_and_input(512, 256, tokens, dtype)
    on_cpu = [t.clone() for t in passes(layer, x, dy)]
    layer, x, dy = layer.cuda(), x.detach().cuda().requires_grad_(), dy.cuda()
    for run in (layer, torch.compile(layer, fullgraph=True)):
        for got, want in zip(passes(layer, x, dy, run), on_cpu):
            assert (got.cpu().float() - want.float()).norm() <= 6e-3 * want.float().norm()
