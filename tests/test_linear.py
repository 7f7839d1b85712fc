"""Facts about Algorithm 1 and its gradients."""
import types
import pytest, torch
import fp4
from fp4 import linear, reference

ops = torch.ops.fp4
ON_KERNELS = [name for name, row in fp4.RECIPES.items() if row.kernels]


def layer_and_input(n_in=96, n_out=64, tokens=40, **how):
    torch.manual_seed(0)
    layer = fp4.Linear(n_in, n_out, **{"precision": "fp4", **how})
    return layer, torch.randn(tokens, n_in, requires_grad=True), torch.randn(tokens, n_out)


def gradients(layer, x, dy, f=None):
    x.grad = layer.weight.grad = None
    (layer if f is None else f)(x).backward(dy)
    return x.grad, layer.weight.grad


def test_gradients_are_autograds_when_the_quantiser_is_the_identity(monkeypatch):
    "so transposes, rotations, signs, 3/4 and 16/9 are all undone"
    H = lambda x: reference.hadamard(x.unflatten(-1, (-1, 32))).flatten(-2)
    flip = lambda x, signs: x * (1 - 2 * (signs >> torch.arange(x.shape[-1]) % 32 & 1))
    pad = lambda x: torch.nn.functional.pad(x, (0, -x.shape[1] % 32))
    Q = lambda x, signs: .75 * H(flip(pad(x), signs))
    none = torch.zeros(())
    monkeypatch.setattr(linear, "ops", types.SimpleNamespace(
        quantize_forward=lambda x, scale: (H(x), none, torch.ones_like(x)), draw=ops.draw,
        quantize_gemm=lambda x, scale, w, s: (H(x) @ w.T, H(x), none, torch.ones_like(x)),
        quantize_backward=lambda x, signs, seeds, *how: (Q(x, signs), none, Q(x.T, signs), none),
        requantize=lambda x, s, signs, seed, *how: (Q(x.T, signs), none),
        gemm_unrotate=lambda a, sa, b, sb, mask, alpha, dtype: H(alpha * a @ b.T * mask)))
    layer, x, dy = layer_and_input()
    layer, x, dy = layer.double(), x.detach().double().requires_grad_(), dy.double()
    dx, dw = gradients(layer, x, dy)
    assert torch.allclose(dx, dy @ layer.weight, atol=1e-10) and torch.allclose(dw, dy.T @ x, atol=1e-10)


@pytest.mark.parametrize("precision, axes", [*((name, {}) for name in ON_KERNELS), ("fp4", dict(rotation="32:none:32")), ("fp4-sr", dict(rotation="32:32:none"))])
@pytest.mark.parametrize("tokens", [1, 40, 64])
def test_the_layer_is_the_algorithm_of_the_paper_written_out(precision, axes, tokens):
    layer, x, dy = layer_and_input(tokens=tokens, precision=precision, **axes)
    row = layer.recipe
    torch.manual_seed(7)
    dx, dw = gradients(layer, x, dy)
    torch.manual_seed(7)
    Q = lambda x, turn, seed: reference.dequantize(*reference.absmax(x, signs, seed, row.stochastic, turn), torch.float64)
    (xc, xs, xm), (wc, ws, wm) = (reference.quantize_forward(t.detach(), row.scale) for t in (x, layer.weight))
    X, W = reference.dequantize(xc, xs, torch.float32), reference.dequantize(wc, ws, torch.float32)
    if row.backward:
        signs, seeds = reference.draw(x, x, 4)
        up = lambda t: torch.nn.functional.pad(t, (0, -t.shape[1] % 32))
        dgrad, wgrad = row.turns
        dX = 16 / 9 * Q(dy, dgrad, seeds[0]) @ Q(W.T, dgrad, seeds[2]).T
        dW = 16 / 9 * Q(up(dy.T), wgrad, seeds[1]) @ Q(up(X.T), wgrad, seeds[3]).T
    else:
        dX, dW = dy.double() @ W.double(), dy.T.double() @ X.double()
    want = reference.unrotate(dX.float(), xm, torch.float32), reference.unrotate(dW.float(), wm, torch.float32)
    assert torch.allclose(layer(x), (X.double() @ W.double().T).float(), atol=1e-5)
    for got, expected in zip((dx, dw), want):
        assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_clipped_values_get_no_gradient_in_the_rotated_basis():
    layer, x, dy = layer_and_input()
    mask = reference.unbits(reference.quantize_forward(x.detach(), "floor")[2]).flatten(-2).bool()
    dx, _ = gradients(layer, x, dy)
    rotated = lambda d: reference.hadamard(reference.blocks(d)).flatten(-2)
    assert .02 < (~mask).float().mean() < .2                    # about 7 % of a Gaussian
    assert rotated(dx)[~mask].abs().max() <= 1e-5 * dx.abs().max()
    swapped = rotated(rotated(dx) + 1) * mask                   # un-rotating first, then masking, would not do that
    assert rotated(swapped)[~mask].abs().max() > .1


def bits_gained(rounding, signs="before"):
    "good bits of the mean gradient after 1, 4, ... 1024 backward passes, against the exact product"
    layer, x, dy = layer_and_input(rounding=rounding, signs=signs)
    X, W = (ops.dequantize(*ops.quantize_forward(t.detach(), "floor")[:2], torch.float32) for t in (x, layer.weight))
    exact = (dy @ W).double()
    total, bits = 0, []
    packed = ops.quantize_forward(layer.weight.detach(), "floor")
    for n in range(1, 1025):
        s, seeds = ops.draw(dy, dy, 4)
        sr = rounding == "stochastic"
        g, w = ops.quantize_backward(dy, s, seeds[:2], sr, signs, signs, "packed")[:2], ops.requantize(*packed[:2], s, seeds[2:3], sr, signs, "packed")
        total = total + ops.gemm(*g, *w, 16 / 9, torch.float32).double()
        if n in (1, 4, 16, 64, 256, 1024):
            bits.append(-torch.log2((total / n - exact).norm() / exact.norm()).item())
    return [b - a for a, b in zip(bits, bits[1:])]


def test_the_mean_of_stochastic_rounding_gains_a_bit_for_four_times_the_draws_up_to_1024():
    assert min(bits_gained("stochastic")) >= .85


def test_rounding_to_nearest_does_not_which_is_the_control():
    gains = bits_gained("nearest")
    assert gains[-1] <= .5 and min(gains) < .85


def test_with_the_signs_on_the_wrong_side_every_backward_pass_makes_the_same_error():
    (layer, x, dy), (wrong, _, _) = layer_and_input(), layer_and_input(signs="after")
    assert torch.equal(gradients(wrong, x, dy)[0], gradients(wrong, x, dy)[0])
    assert not torch.equal(gradients(layer, x, dy)[0], gradients(layer, x, dy)[0])
    assert max(bits_gained("nearest", signs="after")) <= .01


@pytest.mark.parametrize("precision", fp4.RECIPES)
def test_compiled_gradients_equal_eager_ones_for_the_same_seed(precision):
    torch.compiler.reset()                                      # torch keeps 8 compiled versions of one function
    layer, x, dy = layer_and_input(precision=precision)
    torch.manual_seed(3); eager = gradients(layer, x, dy)
    torch.manual_seed(3); compiled = gradients(layer, x, dy, torch.compile(layer, fullgraph=True))
    for a, b in zip(compiled, eager): assert torch.equal(a, b)


def test_layers_compiled_together_draw_their_own_signs_in_the_order_of_eager():
    torch.manual_seed(0)
    layers, dy = torch.nn.ModuleList(fp4.Linear(64, 64, "fp4") for _ in range(3)), torch.randn(40, 64)
    def f(x): return layers[2](layers[0](x)) + layers[1](x)     # layers 1 and 2 get the same gradient
    x, grads = torch.randn(40, 64, requires_grad=True), []
    for run in (f, torch.compile(f, fullgraph=True)):
        torch.manual_seed(3)
        x.grad = None
        layers.zero_grad()
        run(x).backward(dy)
        grads.append([x.grad, *(layer.weight.grad for layer in layers)])
    for a, b in zip(*grads): assert torch.equal(a, b)


def test_a_compiled_model_saves_no_input_that_it_can_compute_again_and_has_the_same_gradients():
    def saved_and_gradients(recompute):
        torch.compiler.reset()
        torch.manual_seed(0)
        layer, sizes = fp4.Linear(96, 64, "fp4", recompute=recompute), []
        a, b, dy = torch.randn(40, 96).requires_grad_(), torch.randn(40, 96).requires_grad_(), torch.randn(40, 64)
        run = torch.compile(lambda a, b: layer(torch.nn.functional.silu(a) * b), fullgraph=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append((t.dtype, t.shape)) or t, lambda t: t):
            y = run(a, b)
        y.backward(dy)
        return sizes, [y, a.grad, b.grad, layer.weight.grad]
    (kept, before), (fewer, after) = saved_and_gradients(False), saved_and_gradients(True)
    x_codes, x_itself = (torch.uint8, (40, 48)), (torch.float32, (40, 96))
    assert x_codes in kept and x_codes not in fewer
    assert kept.count(x_itself) == fewer.count(x_itself) == 2           # a and b
    for x, y in zip(before, after): assert torch.equal(x, y)


def test_a_weight_is_quantised_once_per_optimizer_step_not_per_microbatch(monkeypatch):
    layer, x, dy = layer_and_input()
    optimizer = torch.optim.SGD(layer.parameters(), lr=.1)
    calls = []
    def counted(op): return lambda t, *how: calls.append(tuple(t.shape)) or op(t, *how)
    proxy = types.SimpleNamespace(**{n: getattr(ops, n) for n in ("draw", "quantize_backward", "requantize", "gemm_unrotate")},
                                  **{n: counted(getattr(ops, n)) for n in ("quantize_forward", "quantize_gemm")})
    monkeypatch.setattr(linear, "ops", proxy)
    fp4.quantize_weights_after(optimizer, layer)
    for _ in range(3):
        for _ in range(4): layer(x).backward(dy)
        optimizer.step(); optimizer.zero_grad()
    assert calls.count((64, 96)) == 1 + 3 and calls.count((40, 96)) == 12


def test_a_weight_changed_by_hand_is_quantised_again():
    layer, x, _ = layer_and_input()
    fp4.quantize_weights_after(torch.optim.SGD(layer.parameters(), lr=.1), layer)
    before = layer(x)
    with torch.no_grad(): layer.weight.mul_(2)
    assert torch.equal(layer(x), 2 * before)


def test_activations_are_saved_packed():
    layer, x, _ = layer_and_input(1024, 32, tokens=512)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append((t.numel() * t.element_size(), t.shape)) or t, lambda t: t):
        layer(x)
    saved = sum(n for n, shape in sizes if shape[0] == 512)
    assert saved <= 512 * 1024 * 5.25 / 8, sizes                # 4.25 bits a value and one mask bit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_in_the_input_reaches_output_and_gradient(dtype):
    layer, x, dy = layer_and_input()
    with torch.no_grad(): x[3, 40] = float("nan")
    y = layer(x.to(dtype))
    assert y.dtype == dtype and y[3].isnan().all() and y.isfinite().sum() == 39 * 64
    y.backward(torch.where(y.isnan(), y, dy.to(dtype)))
    assert x.grad[3].isnan().all() and layer.weight.grad.isnan().any()


def test_features_that_are_no_multiple_of_32_and_unknown_rows_are_refused_by_name():
    with pytest.raises(ValueError, match="in-features must be a multiple of 32, got 100"): fp4.Linear(100, 64, "fp4")
    with pytest.raises(ValueError, match="out-features must be a multiple of 32, got 70"): fp4.Linear(64, 70, "fp4")
    with pytest.raises(ValueError, match="precision 'fp5' is not one of bf16, fp4"): fp4.Linear(64, 64, "fp5")
    with pytest.raises(ValueError, match="scale 'ceil' is not one of floor, nearest"): fp4.Linear(64, 64, "fp4", scale="ceil")
    fp4.Linear(100, 70, "bf16")
