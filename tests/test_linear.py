"""Facts about Algorithm 1 and its gradients."""
import types

import pytest
import torch
import torch.nn.functional as F

import fp4
from fp4 import linear, ops, reference, stored_weight
from fp4.ops import Packed

fp4.build()
ON_KERNELS = [name for name, row in fp4.RECIPES.items() if row.has_kernels]


def layer_and_input(in_features=96, out_features=64, tokens=40, precision="fp4", **axes):
    torch.manual_seed(0)
    layer = fp4.Linear(in_features, out_features, fp4.recipe(precision, **axes))
    x = torch.randn(tokens, in_features, requires_grad=True)
    return layer, x, torch.randn(tokens, out_features)


def gradients(layer, x, dy, forward=None):
    x.grad = None
    layer.weight.grad = None
    run = layer if forward is None else forward
    run(x).backward(dy)
    return x.grad, layer.weight.grad


def rotate(d):
    return reference.hadamard(d.unflatten(-1, (-1, 32))).flatten(-2)


def pad_columns(t): return F.pad(t, (0, -t.shape[1] % 32))


def test_gradients_are_autograds_when_the_quantiser_is_the_identity(monkeypatch):
    """So transposes, rotations, signs, 3/4 and 16/9 are all undone."""
    none = torch.zeros(())

    def flip(x, signs):
        return x * (1 - 2 * ((signs >> (torch.arange(x.shape[-1]) % 32)) & 1))

    def three_quarters(x, signs):
        return Packed(.75 * rotate(flip(pad_columns(x), signs)), none)

    def quantize_forward(x, scale):
        return Packed(rotate(x), none), torch.ones_like(x)

    def quantize_gemm(x, scale, w):
        return rotate(x) @ w.codes.T, Packed(rotate(x), none), torch.ones_like(x)

    def quantize_backward(x, signs, seeds, *settings):
        return three_quarters(x, signs), three_quarters(x.T, signs)

    def requantize_transposed(packed, signs, seed, *settings):
        return three_quarters(packed.codes.T, signs)

    def gemm_unrotate(a, b, mask, alpha, dtype):
        return rotate(alpha * a.codes @ b.codes.T * mask)

    identity = types.SimpleNamespace(
        draw=ops.draw, quantize_forward=quantize_forward, quantize_gemm=quantize_gemm,
        quantize_backward=quantize_backward, requantize_transposed=requantize_transposed,
        gemm_unrotate=gemm_unrotate)
    monkeypatch.setattr(linear, "ops", identity)
    monkeypatch.setattr(stored_weight, "ops", identity)
    layer, x, dy = layer_and_input()
    layer = layer.double()
    x = x.detach().double().requires_grad_()
    dy = dy.double()
    dx, dw = gradients(layer, x, dy)
    assert torch.allclose(dx, dy @ layer.weight, atol=1e-10)
    assert torch.allclose(dw, dy.T @ x, atol=1e-10)


def written_out(layer, x, dy):
    """Returns y, dx and dw of the layer, by the definition alone, in float64."""
    row = layer.recipe
    x_codes, x_scales, x_mask = reference.quantize_forward(x.detach(), row.forward_scale)
    w_codes, w_scales, w_mask = reference.quantize_forward(
        layer.weight.detach(), row.forward_scale)
    xq = reference.dequantize(x_codes, x_scales, torch.float32)
    wq = reference.dequantize(w_codes, w_scales, torch.float32)
    if row.quantizes_backward:
        signs, seeds = reference.draw(x, x, 4)
        dgrad, wgrad = row.sign_orders

        def quantise(t, sign_order, seed):
            packed = reference.absmax(pad_columns(t), signs, seed, row.stochastic, sign_order)
            return reference.dequantize(*packed, torch.float64)

        dx = 16 / 9 * quantise(dy, dgrad, seeds[0]) @ quantise(wq.T, dgrad, seeds[2]).T
        dw = 16 / 9 * quantise(dy.T, wgrad, seeds[1]) @ quantise(xq.T, wgrad, seeds[3]).T
    else:
        dx = dy.double() @ wq.double()
        dw = dy.T.double() @ xq.double()
    y = (xq.double() @ wq.double().T).float()
    return (y, reference.unrotate(dx.float(), x_mask, torch.float32),
            reference.unrotate(dw.float(), w_mask, torch.float32))


@pytest.mark.parametrize("precision, axes", [
    *((name, {}) for name in ON_KERNELS),
    ("fp4", dict(rotation="32:none:32")),
    ("fp4-sr", dict(rotation="32:32:none")),
    ("fp4", dict(scale="nearest")),
])
@pytest.mark.parametrize("tokens, in_features, out_features", [
    (1, 96, 64), (40, 96, 64), (64, 96, 64), (272, 352, 288)])
def test_the_layer_is_the_algorithm_of_the_paper_written_out(
        precision, axes, tokens, in_features, out_features):
    layer, x, dy = layer_and_input(in_features, out_features, tokens, precision, **axes)
    torch.manual_seed(7)
    got = gradients(layer, x, dy)
    torch.manual_seed(7)
    y, *want = written_out(layer, x, dy)
    assert torch.allclose(layer(x), y, atol=1e-5)
    for gradient, expected in zip(got, want):
        assert (gradient - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("precision", ["fp4", "fp4-sr"])
def test_a_backward_pass_draws_once_and_each_draw_is_another_gradient(precision):
    layer, x, dy = layer_and_input(precision=precision)
    torch.manual_seed(7)
    ops.draw(dy, x, 4)
    state = torch.get_rng_state()
    torch.manual_seed(7)
    first = gradients(layer, x, dy)
    assert torch.equal(torch.get_rng_state(), state)
    first = [gradient.clone() for gradient in first]
    for gradient, other in zip(first, gradients(layer, x, dy)):
        assert 0 < (gradient - other).norm() < .5 * gradient.norm()


@pytest.mark.parametrize("precision", ON_KERNELS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_in_a_gradient_reaches_both_gradients(precision, bad):
    layer, x, dy = layer_and_input(precision=precision)
    dy[5, 7] = bad
    dx, dw = gradients(layer, x, dy)
    assert not dx[5].isfinite().any() and dx[:5].isfinite().all() and dx[6:].isfinite().all()
    assert not dw[7].isfinite().any() and dw[:7].isfinite().all() and dw[8:].isfinite().all()


def test_clipped_values_get_no_gradient_in_the_rotated_basis():
    layer, x, dy = layer_and_input()
    mask = reference.quantize_forward(x.detach(), "floor")[2]
    mask = reference.unbits(mask).flatten(-2).bool()
    dx, _ = gradients(layer, x, dy)
    assert .02 < (~mask).float().mean() < .2            # about 7 % of a Gaussian
    assert rotate(dx)[~mask].abs().max() <= 1e-5 * dx.abs().max()
    # un-rotating first and then masking would not do that
    swapped = rotate(rotate(dx) + 1) * mask
    assert rotate(swapped)[~mask].abs().max() > .1


def bits_gained(rounding, signs="before"):
    """Bits of the mean gradient that are right after 1, 4, ... 1024 backward passes, as gains."""
    layer, x, dy = layer_and_input(rounding=rounding, signs=signs)
    wq, _ = ops.quantize_forward(layer.weight.detach(), "floor")
    exact = (dy @ ops.dequantize(wq, torch.float32)).double()
    stochastic = rounding == "stochastic"
    total = 0
    bits = []
    for n in range(1, 1025):
        s, seeds = ops.draw(dy, dy, 4)
        g, _ = ops.quantize_backward(dy, s, seeds[:2], stochastic, signs, signs, "packed")
        w = ops.requantize_transposed(wq, s, seeds[2:3], stochastic, signs, "packed")
        total = total + ops.gemm(g, w, 16 / 9, torch.float32).double()
        if n in (1, 4, 16, 64, 256, 1024):
            bits.append(-torch.log2((total / n - exact).norm() / exact.norm()).item())
    return [b - a for a, b in zip(bits, bits[1:])]


def test_the_mean_of_stochastic_rounding_gains_a_bit_for_four_times_the_draws_up_to_1024():
    assert min(bits_gained("stochastic")) >= .85


def test_rounding_to_nearest_does_not_which_is_the_control():
    gains = bits_gained("nearest")
    assert gains[-1] <= .5
    assert min(gains) < .85


def test_with_the_signs_on_the_wrong_side_every_backward_pass_makes_the_same_error():
    layer, x, dy = layer_and_input()
    wrong, _, _ = layer_and_input(signs="after")
    assert torch.equal(gradients(wrong, x, dy)[0], gradients(wrong, x, dy)[0])
    assert not torch.equal(gradients(layer, x, dy)[0], gradients(layer, x, dy)[0])
    assert max(bits_gained("nearest", signs="after")) <= .01


@pytest.mark.parametrize("precision", fp4.RECIPES)
def test_compiled_gradients_equal_eager_ones_for_the_same_seed(precision):
    torch.compiler.reset()                      # torch keeps 8 compiled versions of one function
    layer, x, dy = layer_and_input(precision=precision)
    torch.manual_seed(3)
    eager = gradients(layer, x, dy)
    torch.manual_seed(3)
    compiled = gradients(layer, x, dy, torch.compile(layer, fullgraph=True))
    for a, b in zip(compiled, eager):
        assert torch.equal(a, b)


def test_layers_compiled_together_draw_their_own_signs_in_the_order_of_eager():
    torch.manual_seed(0)
    layers = torch.nn.ModuleList(fp4.Linear(64, 64, fp4.recipe("fp4")) for _ in range(3))
    dy = torch.randn(40, 64)
    x = torch.randn(40, 64, requires_grad=True)
    grads = []

    def model(x):
        return layers[2](layers[0](x)) + layers[1](x)       # layers 1 and 2 get the same gradient

    for run in (model, torch.compile(model, fullgraph=True)):
        torch.manual_seed(3)
        x.grad = None
        layers.zero_grad()
        run(x).backward(dy)
        grads.append([x.grad, *(layer.weight.grad for layer in layers)])
    for a, b in zip(*grads):
        assert torch.equal(a, b)


def watch_saved(record):
    """Calls record with every tensor that autograd saves."""
    def pack(t):
        record(t)
        return t

    def unpack(t):
        return t

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def test_a_compiled_model_saves_no_input_that_it_can_compute_again_and_has_the_same_gradients():
    def saved_and_gradients(recompute):
        torch.compiler.reset()
        torch.manual_seed(0)
        layer = fp4.Linear(96, 64, fp4.recipe("fp4"), recompute=recompute)
        a = torch.randn(40, 96).requires_grad_()
        b = torch.randn(40, 96).requires_grad_()
        dy = torch.randn(40, 64)
        sizes = []
        run = torch.compile(lambda a, b: layer(F.silu(a) * b), fullgraph=True)
        with watch_saved(lambda t: sizes.append((t.dtype, t.shape))):
            y = run(a, b)
        y.backward(dy)
        return sizes, [y, a.grad, b.grad, layer.weight.grad]

    kept, before = saved_and_gradients(False)
    fewer, after = saved_and_gradients(True)
    x_codes = (torch.uint8, (40, 48))
    x_itself = (torch.float32, (40, 96))
    assert x_codes in kept
    assert x_codes not in fewer
    assert kept.count(x_itself) == fewer.count(x_itself) == 2       # a and b
    for x, y in zip(before, after):
        assert torch.equal(x, y)


def test_a_weight_is_quantised_once_per_optimizer_step_not_per_microbatch(monkeypatch):
    layer, x, dy = layer_and_input()
    optimizer = torch.optim.SGD(layer.parameters(), lr=.1)
    calls = []
    original = fp4.ops

    def counted(op):
        def call(t, *arguments):
            calls.append(tuple(t.shape))
            return op(t, *arguments)
        return call

    not_counted = ("draw", "quantize_backward", "requantize_transposed", "gemm_unrotate")
    counting = types.SimpleNamespace(
        **{name: getattr(original, name) for name in not_counted},
        quantize_forward=counted(original.quantize_forward),
        quantize_gemm=counted(original.quantize_gemm))
    monkeypatch.setattr(linear, "ops", counting)
    monkeypatch.setattr(stored_weight, "ops", counting)
    fp4.quantize_weights(layer)
    for _ in range(3):
        for _ in range(4):
            layer(x).backward(dy)
        optimizer.step()
        optimizer.zero_grad()
        fp4.quantize_weights(layer)
    assert calls.count((64, 96)) == 1 + 3
    assert calls.count((40, 96)) == 12


def test_a_weight_changed_by_hand_is_quantised_again():
    layer, x, _ = layer_and_input()
    fp4.quantize_weights(layer)
    before = layer(x)
    with torch.no_grad():
        layer.weight.mul_(2)
    assert torch.equal(layer(x), 2 * before)


def test_activations_are_saved_packed():
    layer, x, _ = layer_and_input(1024, 32, tokens=512)
    sizes = []
    with watch_saved(lambda t: sizes.append((t.numel() * t.element_size(), t.shape))):
        layer(x)
    saved = sum(n for n, shape in sizes if shape[0] == 512)
    assert saved <= 512 * 1024 * 5.25 / 8, sizes        # 4.25 bits a value and one mask bit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_in_the_input_reaches_output_and_gradient(dtype):
    layer, x, dy = layer_and_input()
    with torch.no_grad():
        x[3, 40] = float("nan")
    y = layer(x.to(dtype))
    assert y.dtype == dtype
    assert y[3].isnan().all()
    assert y.isfinite().sum() == 39 * 64
    y.backward(torch.where(y.isnan(), y, dy.to(dtype)))
    assert x.grad[3].isnan().all()
    assert layer.weight.grad.isnan().any()


def test_features_that_are_no_multiple_of_32_and_unknown_rows_are_refused_by_name():
    quartet = fp4.recipe("fp4")
    with pytest.raises(ValueError, match="in-features must be a multiple of 32, got 100"):
        fp4.Linear(100, 64, quartet)
    with pytest.raises(ValueError, match="out-features must be a multiple of 32, got 70"):
        fp4.Linear(64, 70, quartet)
    with pytest.raises(ValueError, match="precision 'fp5' is not one of bf16, fp4"):
        fp4.recipe("fp5")
    with pytest.raises(ValueError, match="scale 'ceil' is not one of floor, nearest"):
        fp4.recipe("fp4", scale="ceil")
    fp4.Linear(100, 70, fp4.recipe("bf16"))
