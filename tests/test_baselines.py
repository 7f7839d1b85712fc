"""Every row of the table of precisions against the method written out: float64, and rounding by
searching the list of a format's values."""
import functools
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import fp4
import fp4.emulate
from fp4 import ops, reference
from fp4.emulate import baselines, columns, matmul

ROWS = fp4.RECIPES


# ---- what test_recipes.py shares

def make_data(tokens=40, n_in=96, n_out=64):
    "-> x, w, dy"
    torch.manual_seed(0)
    x = torch.randn(tokens, n_in)
    w = torch.randn(n_out, n_in) * .3
    return x, w, torch.randn(tokens, n_out) * 1e-3


def run_passes(recipe, x, w, dy):
    "-> y, dx, dw, by the emulation"
    x = x.clone().requires_grad_()
    w = w.clone().requires_grad_()
    y = fp4.emulate.Matmul.apply(x, w, recipe)
    y.backward(dy)
    return y.detach(), x.grad, w.grad


# ---- random numbers: the code and the methods below read the same ones, in the same order

STREAM = (torch.randint(256, (2 ** 19,), generator=torch.Generator().manual_seed(11)) + .5) / 256


class Draws:
    def __init__(self):
        self.used = 0

    def take(self, *shape):
        n = math.prod(shape)
        start = self.used
        self.used += n
        return STREAM[start:self.used].double().view(shape)

    def signs(self):
        return torch.where(self.take(128) < .5, -1., 1.).double()


class KernelDraws(Draws):
    "a word of signs, and a seed for each operand: dy, dy.T, w and x; a byte of noise is its middle"
    SIGNS = torch.tensor([0x5DA94F36])
    SEEDS = torch.tensor([3, 5, 7, 11])

    def __init__(self):
        self.seeds = iter(self.SEEDS[[0, 2, 1, 3]])         # the order in which a method uses them

    def signs(self):
        return 1 - 2 * reference.unbits(self.SIGNS)[0].double()

    def take(self, *shape):
        noise = reference.noise(next(self.seeds), math.prod(shape))
        return ((noise + .5) / 256).double().view(shape)


class WordDraws(KernelDraws):
    "of the rows that columns describe: two words of signs, and a seed for each noise in turn"
    WORDS = torch.randint(-2 ** 63, 2 ** 63 - 1, (6,), generator=torch.Generator().manual_seed(9))

    def __init__(self):
        self.seeds = iter(self.WORDS[2:])

    def signs(self):
        return torch.tensor([1. - 2 * (int(word) >> i & 1) for word in self.WORDS[:2]
                             for i in range(64)]).double()


def draws_of(row): return Draws() if row.method else WordDraws()


@pytest.fixture
def known_draws(monkeypatch):
    def words(dy, x, n): return WordDraws.WORDS[:n].clone()
    def uniform(dy, x, n): return STREAM[:n].clone()
    def draw(dy, x, n): return KernelDraws.SIGNS, KernelDraws.SEEDS

    monkeypatch.setattr(matmul, "words", words)
    monkeypatch.setattr(baselines, "uniform", uniform)
    monkeypatch.setattr(ops, "draw", draw)


# ---- formats

def grid_values(mantissa, min_exponent, top):
    subnormal = [m * 2. ** (min_exponent - mantissa) for m in range(2 ** mantissa)]
    normal = []
    for e in range(min_exponent, 17):
        for m in range(2 ** mantissa, 2 ** (mantissa + 1)):
            value = m * 2. ** (e - mantissa)
            if value <= top:
                normal.append(value)
    return torch.tensor(subnormal + normal, dtype=torch.float64)


E2M1 = torch.tensor([0, .5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
E4M3 = grid_values(3, -6, 448)
E5M2 = grid_values(2, -14, 57344)
INT4 = torch.arange(8.).double()
POWERS_OF_TWO = torch.tensor([0., 1, 2, 4, 8, 16, 32, 64]).double()


def to_grid(u, grid, noise=None):
    """To nearest, ties to the value whose place in the list is even. With noise, numbers of [0, 1),
    up where noise reaches what is missing to the next value."""
    size = u.abs().clamp_max(grid[-1])
    above = torch.searchsorted(grid, size.contiguous()).clamp(1, len(grid) - 1)
    low = grid[above - 1]
    high = grid[above]
    p = (size - low) / (high - low)
    if noise is None:
        goes_up = (p > .5) | ((p == .5) & (above % 2 == 0))
    else:
        goes_up = p + noise >= 1
    return torch.where(goes_up, high, low) * u.sign()


def to_blocks(v, n): return v.unflatten(-1, (-1, n))
def block_max(v, n): return to_blocks(v, n).abs().amax(-1, True)
def pad(v, n): return F.pad(v, (0, -v.shape[-1] % n))
def floor_log2(x): return x.log2().floor()


def hadamard(v, n, signs=None):
    "signs first"
    H = torch.ones(1, 1, dtype=torch.float64)
    while len(H) < n:
        H = torch.cat((torch.cat((H, H), 1), torch.cat((H, -H), 1)))
    blocks = to_blocks(pad(v, n), n)
    if signs is not None:
        blocks = blocks * signs[:n]
    return (blocks @ H * n ** -.5).flatten(-2)


def hadamard_undone(v, n, signs=None):
    v = hadamard(v, n)
    return v if signs is None else (to_blocks(v, n) * signs[:n]).flatten(-2)


def rotate(v, n, signs=None): return hadamard(v, n, signs) if n else v


def quest_scale(blocks):
    return .487079760 * blocks.std(-1, keepdim=True, correction=0) + 1e-8


def best_exponent(blocks):
    "the exponent with the least squared error, of all that come into question"
    tried = [floor_log2(block_max(blocks, 32).squeeze(-1)) + i for i in range(-8, 3)]
    errors = [(to_grid(blocks / 2 ** e, E2M1) * 2 ** e - blocks).square().sum(-1, True)
              for e in tried]
    return torch.cat(tried, -1).gather(-1, torch.cat(errors, -1).argmin(-1, True))


EXPONENTS = {
    "floor": lambda b: floor_log2(quest_scale(b)),
    "nearest": lambda b: quest_scale(b).log2().round(),
    "absmax": lambda b: floor_log2(b.abs().amax(-1, True)) - 2,
    "mse": best_exponent,
}


# A quantiser takes a matrix, which it rotates by n after multiplying it with signs, and noise where
# it rounds at random.

def mx(v, rule, n=32, signs=None, multiplier=1.):
    "-> values, mask; without the factor 3/4"
    blocks = to_blocks(pad(rotate(v, n, signs), 32), 32)
    scale = 2 ** EXPONENTS[rule](blocks * multiplier)
    values = to_grid(blocks / scale, E2M1) * scale
    return values.flatten(-2), (blocks / scale).abs().flatten(-2) < 6


def absmax34(v, n=32, signs=None, draws=None, factor=1., eden=False):
    rotated = pad(rotate(v, n, signs), 32)
    noise = None if draws is None else to_blocks(draws.take(*rotated.shape), 32)
    blocks = to_blocks(rotated, 32)
    scale = 2 ** EXPONENTS["absmax"](blocks)
    values = (to_grid(.75 * blocks / scale, E2M1, noise) * scale * 4 / 3 * factor).flatten(-2)
    if eden:
        values *= rotated.square().sum(1, True) / (rotated * values).sum(1, True)
    return values


def eden_quest(v, n=32, signs=None):
    "-> values, mask: QuEST, and a factor for each row"
    values, mask = mx(v, "floor", n, signs)
    rotated = pad(rotate(v, n, signs), 32)
    return values * rotated.square().sum(1, True) / (rotated * values).sum(1, True), mask


def pma(v, n=32, signs=None): return absmax34(v, n, signs, factor=1.009276)


def mxfp8(v, n=0, signs=None):
    v = pad(rotate(v, n, signs), 32)
    scale = 2 ** (floor_log2(block_max(v, 32)) - 8)
    return (to_grid(to_blocks(v, 32) / scale, E4M3) * scale).flatten(-2)


def int4(v, n=0, signs=None, draws=None):
    v = pad(rotate(v, n, signs), 32)
    noise = None if draws is None else to_blocks(draws.take(*v.shape), 32)
    scale = block_max(v, 32) / 7
    return (to_grid(to_blocks(v, 32) / scale, INT4, noise) * scale).flatten(-2)


def reduce_square(v, reduce):
    "what reduce makes of each 16 rows, repeated for each of them"
    reduced = reduce(v.unflatten(0, (-1, 16)))
    return reduced.expand(-1, 16, -1, -1).flatten(0, 1)


def times_inverse(x, scale):
    "x / scale, as float32 has it: times the inverse, both rounded"
    return (x.float() * (1 / scale.float())).double()


def nvfp4(v, n=0, signs=None, top=6, cap=448, ratios=(1,), square=False, noise=None, eden=False):
    rows = len(v)
    v = pad(rotate(v, n, signs), 16)
    if square:
        v = F.pad(v, (0, 0, 0, -rows % 16))
    tensor_scale = v.abs().max() / (cap * top)
    x = to_blocks(v, 16)
    largest = block_max(v, 16)
    if square:
        largest = reduce_square(largest, lambda t: t.amax(1, True))
    result = least_error = None
    for ratio in ratios:
        scale = to_grid(largest / (top / ratio * tensor_scale), E4M3)
        scale = torch.where(scale == 0, 1., scale)
        q = to_grid(times_inverse(x, scale * tensor_scale), E2M1, None if eden else noise)
        if eden:
            vv = (x * x).sum(-1, True)
            vq = (x * q * scale * tensor_scale).sum(-1, True)
            correction = torch.where(vq == 0, 1., vv / vq)
            scale = to_grid(scale * correction, E4M3, noise[..., :1])
        values = q * scale * tensor_scale
        error = (values - x).square().sum(-1, True)
        if square:
            error = reduce_square(error, lambda t: t.sum(1, True))
        if result is None:
            result = values
            least_error = error
        else:
            result = torch.where(error < least_error, values, result)
    return result.flatten(-2)[:rows]


def take_noise(v, n, draws):
    "noise for v, padded to whole rotations and to 32, in blocks of 16"
    drawn = draws.take(len(v), pad(v, max(n, 32)).shape[1])
    return to_blocks(drawn[:, :pad(v, max(n, 16)).shape[1]], 16)


def nvfp4_sr(v, n, signs, draws):
    return nvfp4(v, n, signs, top=6 * 16 / 17, noise=take_noise(v, n, draws))


def ms_eden(v, n, signs, draws):
    noise = take_noise(v, n, draws)
    return nvfp4(v, n, signs, 6 * 16 / 17 / .93, 256, noise=noise, eden=True)


def four_six(v, **changes): return nvfp4(v, cap=256, ratios=(1, 1.5), **changes)


def fp8(v, grid):
    scale = v.abs().max() / grid[-1]
    return to_grid(v / scale, grid) * scale


def per_tensor(v, scale, grid=E2M1, noise=None):
    return to_grid(v / scale, grid, noise) * scale


def jetfire_tiles(v):
    rows, columns = v.shape
    padded = F.pad(v, (0, -columns % 32, 0, -rows % 32))
    tiles = to_blocks(padded, 32).unflatten(0, (-1, 32))
    scale = tiles.abs().amax((1, 3), True) / 6
    values = to_grid(tiles / scale, E2M1) * scale
    return values.flatten(0, 1).flatten(-2)[:rows, :columns]


def sawb(v):
    step = 2 / 15 * (12.1 * v.square().mean().sqrt() - 12.2 * v.abs().mean())
    return (v / step).clamp(-8, 7).round() * step


def luq(v, draws):
    return per_tensor(v, v.abs().max() / 64, POWERS_OF_TWO, draws.take(*v.shape))


def e2m1_tensor(v): return per_tensor(v, v.abs().max() / 6)
def halo(v): return per_tensor(v, v.abs().max() / 8)


# ---- the methods: x, w, dy and draws -> y, dx, dw

def bf16(x, w, dy, draws): return x @ w.T, dy @ w, dy.T @ x


def quartet(x, w, dy, draws, forward, dgrad, wgrad, n=32, signs=None, rhs=()):
    """forward gives values and mask, or values alone; the others quantise the operands of the
    backward products. n and signs are those of the forward rotation. rhs is three quantisers of the
    right operands, if these are others."""
    forward_rhs, dgrad_rhs, wgrad_rhs = rhs or (forward, dgrad, wgrad)
    xq, x_mask = forward(x)
    wq, w_mask = forward_rhs(w)
    dx = dgrad(dy) @ dgrad_rhs(wq.T).T
    dw = wgrad(dy.T) @ wgrad_rhs(xq.T).T
    if n:
        dx = hadamard_undone(dx[:, :xq.shape[1]] * x_mask, n, signs)
        dw = hadamard_undone(dw * w_mask, n, signs)
    else:
        dx = dx * x_mask
        dw = dw * w_mask
    columns = x.shape[1]
    return xq @ wq.T, dx[:, :columns], dw[:, :columns]


def quest(v): return mx(v, "floor")
def unquantized(v, n=0, signs=None): return v


def fp4_(x, w, dy, draws):
    Q = functools.partial(absmax34, signs=draws.signs())
    return quartet(x, w, dy, draws, quest, Q, Q)


def fp4_sr(x, w, dy, draws):
    Q = functools.partial(absmax34, signs=draws.signs(), draws=draws)
    return quartet(x, w, dy, draws, quest, Q, Q)


def fp4_fwd(x, w, dy, draws):
    return quartet(x, w, dy, draws, quest, unquantized, unquantized)


def fp4_bwd(x, w, dy, draws):
    signs = draws.signs()
    dx = absmax34(dy, signs=signs) @ absmax34(w.T, signs=signs).T
    dw = absmax34(dy.T, signs=signs) @ absmax34(x.T, signs=signs).T
    return x @ w.T, dx, dw


def fp4_original(x, w, dy, draws):
    draws.signs()                               # behind the rotation they have no effect
    Q = functools.partial(absmax34, draws=draws)
    return quartet(x, w, dy, draws, quest, Q, Q)


def fp4_pma(x, w, dy, draws):
    Q = functools.partial(pma, signs=draws.signs())
    return quartet(x, w, dy, draws, quest, Q, Q)


def tensorwise_fp8(x, w, dy, draws):
    xq = fp8(x, E4M3)
    wq = fp8(w, E4M3)
    g = fp8(dy, E5M2)
    return xq @ wq.T, g @ wq, g.T @ xq


def all_mxfp8(x, w, dy, draws):
    dx = mxfp8(dy) @ mxfp8(w.T).T
    dw = mxfp8(dy.T) @ mxfp8(x.T).T
    return mxfp8(x) @ mxfp8(w).T, dx, dw


def nvidia(x, w, dy, draws, quantize=nvfp4):
    signs = draws.signs()
    wq = quantize(w, square=True)
    dx = nvfp4_sr(dy, 0, None, draws) @ wq
    dw = nvfp4_sr(dy.T, 16, signs, draws) @ nvfp4(x.T, 16, signs).T
    return quantize(x) @ wq.T, dx, dw


def four_over_six(x, w, dy, draws): return nvidia(x, w, dy, draws, four_six)


def quantized_again(x, w, dy, draws, Q, G):
    "forward by Q; a gradient's operands, and what forward used, by G"
    xq = Q(x)
    wq = Q(w)
    dx = G(dy) @ G(wq.T).T
    return xq @ wq.T, dx, G(dy.T) @ G(xq.T).T


def tetrajet2(x, w, dy, draws):
    signs = draws.signs()
    return quantized_again(x, w, dy, draws, nvfp4, lambda v: nvfp4_sr(v, 32, signs, draws))


def quartet2(x, w, dy, draws):
    signs = draws.signs()
    return quantized_again(x, w, dy, draws, four_six, lambda v: ms_eden(v, 128, signs, draws))


def luq_method(x, w, dy, draws, Q):
    xq = Q(x)
    wq = Q(w)
    g = luq(dy, draws)                                      # once, for both products
    return xq @ wq.T, g @ wq, g.T @ xq


def luq_int4(x, w, dy, draws): return luq_method(x, w, dy, draws, sawb)
def luq_fp4(x, w, dy, draws): return luq_method(x, w, dy, draws, e2m1_tensor)


def jetfire(x, w, dy, draws):
    xq = jetfire_tiles(x)
    wq = jetfire_tiles(w)
    g = jetfire_tiles(dy)
    return jetfire_tiles(xq @ wq.T), jetfire_tiles(g @ wq), g.T @ xq


def halo2(x, w, dy, draws):
    y = halo(hadamard(x, 64)) @ halo(hadamard(w, 64)).T     # 64 divides the 320 in-features
    rotated_dx = halo(hadamard(dy.T, 8).T) @ halo(w)        # and 8 the 264 tokens
    return y, hadamard(rotated_dx.T, 8).T, halo(dy.T) @ halo(x.T).T


def lss(x, w, dy, draws):
    def quantize(v):
        v = hadamard(v, 32)
        step = .354 * v.square().mean().sqrt()
        return to_grid(v / step, INT4) * step, v.abs() < 7 * step

    tokens = len(dy)
    xq, x_mask = quantize(x)
    wq, w_mask = quantize(w)
    step = dy.abs().max() / 7
    high = per_tensor(dy, step, INT4)
    low = per_tensor(dy - high, step / 14, INT4, draws.take(*dy.shape))
    halves = torch.cat((high, low))

    def sampled(weight):
        p = (tokens * weight / weight.sum()).clamp_max(1)
        is_kept = draws.take(2 * tokens) < p
        assert .3 < is_kept.double().mean() < .7
        rows = halves * torch.where(is_kept, 1 / p, 0)[:, None]
        return rows[:tokens] + rows[tokens:]

    size = halves.norm(dim=1)
    dx = sampled(size) @ wq
    dw = sampled(size * xq.norm(dim=1).repeat(2)).T @ xq
    return xq @ wq.T, hadamard(dx * x_mask, 32), hadamard(dw * w_mask, 32)


STATEMENT = {
    "bf16": bf16,
    "fp4": fp4_,
    "fp4-sr": fp4_sr,
    "fp4-fwd": fp4_fwd,
    "fp4-bwd": fp4_bwd,
    "fp4-original": fp4_original,
    "fp4-pma": fp4_pma,
    "fp8": tensorwise_fp8,
    "mxfp8": all_mxfp8,
    "nvfp4": nvidia,
    "four-over-six": four_over_six,
    "tetrajet2": tetrajet2,
    "quartet2": quartet2,
    "luq-int4": luq_int4,
    "luq-fp4": luq_fp4,
    "jetfire-fp4": jetfire,
    "halo-fp4": halo2,
    "lss-int4": lss,
}


# ---- every row is its statement

def wide_data(few_bits=True):
    """Returns x, w and dy: more than two rotations of 128 along each axis, none of them a whole
    number of rotations, some large channels, and tokens whose gradients differ in size.

    Numbers of few bits, divided by a power of two, are never so close to the middle between two
    values that float32 and float64 round them differently, whatever the order of a sum. Divided by
    another scale, many of them would be such ties, and numbers of all bits are not.
    """
    torch.manual_seed(0)
    x = torch.randn(264, 320)
    x[:, ::37] *= 8
    w = torch.randn(288, 320) * .3
    dy = torch.randn(264, 288)
    if few_bits:
        x = (x * 8).round() / 8
        w = (w * 64).round() / 64
        dy = (dy * 16).round() / 16
    return x, w, dy * 2 ** (torch.randn(264, 1).round() - 10)


def has_few_bits(row):
    "whether numbers of few bits suit it: all its scales are powers of two"
    return not row.method and all(spec is None or spec.format[:2] == "mx" for spec in row[:3])


def layer_passes(row, x, w, dy):
    "-> y, dx, dw of an fp4.Linear, which runs on the kernels where the row has them"
    layer = fp4.Linear(w.shape[1], w.shape[0], row)
    with torch.no_grad():
        layer.weight.copy_(w)
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(dy)
    return y.detach(), x.grad, layer.weight.grad


def stated(method, x, w, dy, draws):
    return method(x.double(), w.double(), dy.double(), draws)


def distance(results, expected):
    return max(((r - e).norm() / e.norm()).item() for r, e in zip(results, expected))


def share_apart(results, expected):
    "the share of elements that differ by more than the rounding of a float32 sum"
    return max(((r - e).abs() > 2e-5 * e.abs().max()).double().mean().item()
               for r, e in zip(results, expected))


def is_stated(results, expected, share=.01):
    """A value in 100,000 lies so close to the middle of two that float32 and float64 round it
    differently; it changes one row of a product."""
    return share_apart(results, expected) <= share and distance(results, expected) <= 5e-3


@pytest.mark.parametrize("name", STATEMENT)
def test_a_row_is_the_method_written_out(name, known_draws):
    data = wide_data(has_few_bits(ROWS[name]))
    expected = stated(STATEMENT[name], *data, draws_of(ROWS[name]))
    assert is_stated(run_passes(ROWS[name], *data), expected)


def test_no_two_rows_are_the_same_method():
    data = wide_data()
    results = [stated(method, *data, draws_of(ROWS[name])) for name, method in STATEMENT.items()]
    distances = [distance(a, b) for a, b in itertools.combinations(results, 2)]
    assert len(distances) == 153 and min(distances) > 1e-2


@pytest.mark.parametrize("name", ["bf16", "fp4", "fp4-sr", "fp4-fwd", "fp4-original"])
def test_a_layer_on_the_kernels_is_the_method_written_out(name, known_draws):
    results = layer_passes(ROWS[name], *wide_data())
    assert is_stated(results, stated(STATEMENT[name], *wide_data(), KernelDraws()))


# Under a scale that is no power of two, float32 and float64 see different ties, and numbers of
# bfloat16 have many. Jetfire quantises products, which bfloat16 has rounded.
BFLOAT16_DISTANCE = {"nvfp4": .7e-2, "four-over-six": .9e-2, "tetrajet2": 1e-2, "quartet2": 2e-2,
                     "jetfire-fp4": 4e-2}


@pytest.mark.parametrize("name", STATEMENT)
def test_a_row_in_bfloat16_is_the_method_written_out_up_to_the_rounding_of_results(
        name, known_draws):
    x, w, dy = wide_data(has_few_bits(ROWS[name]))
    x = x.bfloat16()
    dy = dy.bfloat16()
    results = run_passes(ROWS[name], x, w, dy)
    assert [r.dtype for r in results] == [torch.bfloat16, torch.bfloat16, torch.float32]
    expected = stated(STATEMENT[name], x, w, dy, draws_of(ROWS[name]))
    assert distance(results, expected) <= BFLOAT16_DISTANCE.get(name, 4.5e-3)
    dw_distance = distance(results[2:], expected[2:])
    if has_few_bits(ROWS[name]):
        assert dw_distance <= 2e-3                      # rounded once: twice would be 2.4e-3
    wgrad = ROWS[name].wgrad
    if name == "fp8" or (wgrad is not None and wgrad.is_packed):
        assert dw_distance <= 1e-6                      # and not at all


def test_every_row_has_a_statement():
    assert list(STATEMENT) == list(ROWS)


# ---- a row whose axes are changed

def mxfp4_rule(rule):
    if rule in ("absmax34", "pma"):
        quantize = absmax34 if rule == "absmax34" else pma
        return lambda v, n=32, signs=None: (quantize(v, n, signs), 1.)
    def clipping(v, n=32, signs=None):
        values, mask = mx(v, rule, n, signs)
        return values, 1. if rule == "absmax" else mask
    return clipping


def changed_fp4(forward=quest, dgrad=absmax34, wgrad=absmax34, n=(32, 32, 32), rounding="nearest",
                forward_is_random=False, is_random=True, rhs=(None, None, None)):
    """rhs is three quantisers of the right operands, None where it is that of the left one."""
    def method(x, w, dy, draws):
        signs = draws.signs()
        extra = {"nearest": {}, "sr": dict(draws=draws), "eden": dict(eden=True)}[rounding]
        forward_signs = dict(signs=signs) if forward_is_random else {}
        backward_signs = signs if is_random else None

        def in_forward(quantize): return lambda v: quantize(v, n=n[0], **forward_signs)
        def in_backward(quantize, n):
            return lambda v: quantize(v, n, backward_signs if n else None, **extra)

        def quantisers(forward, dgrad, wgrad):
            return in_forward(forward), in_backward(dgrad, n[1]), in_backward(wgrad, n[2])

        left = (forward, dgrad, wgrad)
        right = [theirs or ours for theirs, ours in zip(rhs, left)]
        return quartet(x, w, dy, draws, *quantisers(*left), n[0],
                       signs if forward_is_random else None, quantisers(*right))
    return method


def unmasked(quantize):
    return lambda v, n=0, signs=None: (quantize(v, n, signs), 1.)


def values_of(rule): return lambda v, n, signs: mxfp4_rule(rule)(v, n, signs)[0]


def rotated_mxfp8(x, w, dy, draws):
    "the operands of a gradient are the unquantised ones, in the basis of the forward rotation"
    y = mxfp8(x, 64) @ mxfp8(w, 64).T
    dx = mxfp8(dy, 64) @ mxfp8(hadamard(w, 64).T, 64).T
    dw = mxfp8(dy.T, 64) @ mxfp8(hadamard(x, 64).T, 64).T
    return y, hadamard(dx, 64), hadamard(dw, 64)


def unrotated_mixture(x, w, dy, draws):
    """Of the unquantised operands, dgrad multiplies dy in mxfp8 and w.T in mxfp4, wgrad dy.T in
    mxfp4 and x.T in mxfp8."""
    def mxfp4(v): return mx(v, "absmax", 0)[0]
    y = mxfp8(x) @ mxfp8(w).T
    return y, mxfp8(dy) @ mxfp4(w.T).T, mxfp4(dy.T) @ mxfp8(x.T).T


def square_46_weight(x, w, dy, draws):
    """NVIDIA's row, but the scale of the weight in squares is Four Over Six."""
    signs = draws.signs()
    xq = nvfp4(x)
    wq = four_six(w, square=True)
    dx = nvfp4_sr(dy, 0, None, draws) @ wq
    return xq @ wq.T, dx, nvfp4_sr(dy.T, 16, signs, draws) @ nvfp4(x.T, 16, signs).T


def split_means(forward=True, dgrad=True, wgrad=True):
    def method(x, w, dy, draws):
        signs = draws.signs()
        m, d_of_dgrad, d_of_wgrad = (
            is_split * v.mean(0, keepdim=True)
            for is_split, v in ((forward, x), (dgrad, dy), (wgrad, dy)))
        rotated_m = hadamard(m, 32)
        xq, x_mask = quest(x - m)
        wq, w_mask = quest(w)
        y = xq @ wq.T + rotated_m @ wq.T
        dx = absmax34(dy - d_of_dgrad, 32, signs) @ absmax34(wq.T, 32, signs).T + d_of_dgrad @ wq
        dw = (absmax34((dy - d_of_wgrad).T, 32, signs) @ absmax34(xq.T, 32, signs).T
              + d_of_wgrad.T @ xq.sum(0, keepdim=True) + dy.sum(0, keepdim=True).T @ rotated_m)
        return y, hadamard(dx * x_mask, 32), hadamard(dw * w_mask, 32)
    return method


quest_ = mxfp4_rule("floor")
mxfp8_ = unmasked(mxfp8)
CHANGED = [
    *(("fp4", dict(scale=rule), changed_fp4(mxfp4_rule(rule)))
      for rule in ("nearest", "absmax34", "absmax", "pma", "mse")),
    ("fp4", dict(scale="quest-nearest:pma:mse"),
     changed_fp4(mxfp4_rule("nearest"), values_of("pma"), values_of("mse"))),
    ("fp4", dict(rotation="none"), changed_fp4(quest_, n=(0, 0, 0))),
    *(("fp4", dict(rotation=str(n)), changed_fp4(quest_, n=(n, n, n))) for n in (16, 64, 128)),
    ("fp4", dict(rotation="128:16:64"), changed_fp4(quest_, n=(128, 16, 64))),
    ("fp4", dict(signs="none"), changed_fp4(quest_, is_random=False)),
    ("fp4", dict(signs="after", rotation="64"),
     changed_fp4(quest_, n=(64, 64, 64), is_random=False)),
    ("fp4", dict(signs="before:before:none"),
     changed_fp4(quest_, wgrad=lambda v, n, signs: absmax34(v, n), forward_is_random=True)),
    ("fp4", dict(rounding="sr"), changed_fp4(quest_, rounding="sr")),
    ("fp4", dict(rounding="eden"), changed_fp4(quest_, rounding="eden")),
    ("fp4-fwd", dict(format="nvfp4"), changed_fp4(unmasked(nvfp4), unquantized, unquantized)),
    ("fp4-bwd", dict(format="nvfp4", rounding="sr"),
     changed_fp4(unmasked(unquantized), nvfp4_sr, nvfp4_sr, n=(0, 32, 32), rounding="sr")),
    ("fp4", dict(format="int4"), changed_fp4(unmasked(int4), int4, int4)),
    ("fp4", dict(format="int4", rounding="sr"),
     changed_fp4(unmasked(int4), int4, int4, rounding="sr")),
    ("fp4", dict(format="mxfp8"), changed_fp4(unmasked(mxfp8), mxfp8, mxfp8)),
    ("mxfp8", dict(rotation="64"), rotated_mxfp8),
    ("fp4", dict(scale="mse/floor"),
     changed_fp4(mxfp4_rule("mse"), rhs=(quest_, None, None))),
    ("fp4", dict(scale="floor/absmax:absmax34/pma:mse/absmax34"),
     changed_fp4(quest_, absmax34, values_of("mse"),
                 rhs=(mxfp4_rule("absmax"), pma, absmax34))),
    ("fp4", dict(scale="absmax/nearest", rotation="none:32:32"),
     changed_fp4(mxfp4_rule("absmax"), n=(0, 32, 32), rhs=(mxfp4_rule("nearest"), None, None))),
    ("fp4", dict(format="mxfp8/mxfp4:mxfp4:mxfp4"),
     changed_fp4(mxfp8_, rhs=(quest_, None, None))),
    ("fp4", dict(format="mxfp4/mxfp8", scale="nearest/absmax"),
     changed_fp4(mxfp4_rule("nearest"), rhs=(mxfp8_, mxfp8, mxfp8))),
    ("mxfp8", dict(format="mxfp8:mxfp8/mxfp4:mxfp4/mxfp8"), unrotated_mixture),
    ("fp4", dict(rounding="eden:nearest:nearest"), changed_fp4(eden_quest)),
    ("fp4-fwd", dict(rounding="eden:nearest:nearest", rotation="none"),
     changed_fp4(eden_quest, unquantized, unquantized, n=(0, 0, 0))),
    ("fp4", dict(mean_split="on"), split_means()),
    ("fp4", dict(mean_split="on:off:off"), split_means(True, False, False)),
    ("fp4", dict(mean_split="off:on:off"), split_means(False, True, False)),
    ("fp4", dict(mean_split="off:off:on"), split_means(False, False, True)),
    ("fp4", dict(multiplier="0.84"), changed_fp4(functools.partial(mx, rule="floor",
                                                                   multiplier=.84))),
    ("fp4", dict(multiplier="1/1.2", scale="floor/nearest"),
     changed_fp4(quest_, rhs=(functools.partial(mx, rule="nearest", multiplier=1.2), None, None))),
    ("nvfp4", dict(scale="absmax/four-six"), square_46_weight),
]


@pytest.mark.parametrize("precision, axes, method", [
    pytest.param(*case, id=f"{case[0]}-{'-'.join(map('-'.join, case[1].items()))}")
    for case in CHANGED])
def test_an_axis_changes_a_row_as_it_says(precision, axes, method, known_draws):
    row = fp4.recipe(precision, **axes)
    data = wide_data(has_few_bits(row))
    results = run_passes(row, *data)
    expected = stated(method, *data, WordDraws())
    # Of this row's w one value is rounded differently. It changes a column of dx in the rotated
    # basis, and 32 columns outside of it.
    has_tie = precision == "fp4-fwd" and axes == {"format": "nvfp4"}
    assert is_stated(results, expected, share=.1 if has_tie else .01)
    unchanged = stated(STATEMENT[precision], *data, WordDraws())
    assert distance(unchanged, expected) > 1e-2             # it does change the row


@pytest.mark.parametrize("axes, method", [
    (dict(scale="nearest"), changed_fp4(mxfp4_rule("nearest"))),
    (dict(rounding="sr", rotation="32:none:32"),
     changed_fp4(quest_, n=(32, 0, 32), rounding="sr")),
    (dict(rotation="32:32:none"), changed_fp4(quest_, n=(32, 32, 0))),
    (dict(signs="after"), changed_fp4(quest_, is_random=False)),
], ids=["scale", "rounding", "rotation", "signs"])
def test_an_axis_that_the_kernels_know_changes_a_layer_as_it_says(axes, method, known_draws):
    row = fp4.recipe("fp4", **axes)
    assert row.has_kernels
    expected = stated(method, *wide_data(), KernelDraws())
    assert is_stated(layer_passes(row, *wide_data()), expected)
    assert distance(stated(fp4_, *wide_data(), KernelDraws()), expected) > 1e-2


# ---- what is random

# What new signs change and what new noise changes, of dx and dw. Signs behind the rotation change
# nothing. Nothing changes y.
RANDOM = {
    "bf16": ("", ""),
    "fp4": ("dx dw", ""),
    "fp4-sr": ("dx dw", "dx dw"),
    "fp4-fwd": ("", ""),
    "fp4-bwd": ("dx dw", ""),
    "fp4-original": ("", "dx dw"),
    "fp4-pma": ("dx dw", ""),
    "fp8": ("", ""),
    "mxfp8": ("", ""),
    "nvfp4": ("dw", "dx dw"),
    "four-over-six": ("dw", "dx dw"),
    "tetrajet2": ("dx dw", "dx dw"),
    "quartet2": ("dx dw", "dx dw"),
    "luq-int4": ("", "dx dw"),
    "luq-fp4": ("", "dx dw"),
    "jetfire-fp4": ("", ""),
    "halo-fp4": ("", ""),
    "lss-int4": ("", "dx dw"),
}


def test_a_new_draw_of_signs_changes_the_basis_and_one_of_noise_the_rounding(monkeypatch):
    signs = noise = 0
    data = make_data()

    def numbers(n, seed):
        return torch.rand(n, generator=torch.Generator().manual_seed(seed))

    def words(dy, x, n):
        return torch.cat((integers(2, signs), integers(n - 2, noise)))

    def integers(n, seed):
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(2 ** 63 - 1, (n,), generator=generator)

    def only_noise(dy, x, n):
        return numbers(n, noise)

    def draw(dy, x, n):
        return KernelDraws.SIGNS + 77777 * signs, KernelDraws.SEEDS + noise

    monkeypatch.setattr(matmul, "words", words)
    monkeypatch.setattr(baselines, "uniform", only_noise)
    monkeypatch.setattr(ops, "draw", draw)
    changed = {}
    for name, row in ROWS.items():
        signs = noise = 0
        first = layer_passes(row, *data)
        assert not names_of_changes(first, layer_passes(row, *data))
        signs = 1
        by_signs = names_of_changes(first, layer_passes(row, *data))
        signs = 0
        noise = 1
        changed[name] = (by_signs, names_of_changes(first, layer_passes(row, *data)))
    assert changed == RANDOM


def names_of_changes(before, after):
    names = [name for name, b, a in zip(("y", "dx", "dw"), before, after) if not torch.equal(a, b)]
    return " ".join(names)


@pytest.mark.parametrize("name", ROWS)
def test_two_calls_draw_anew_and_the_seed_of_torch_repeats_them(name):
    data = make_data()
    torch.manual_seed(5)
    first = layer_passes(ROWS[name], *data)
    second = layer_passes(ROWS[name], *data)
    by_signs, by_noise = RANDOM[name]
    assert set(names_of_changes(first, second).split()) == {*by_signs.split(), *by_noise.split()}
    torch.manual_seed(5)
    assert not names_of_changes(first, layer_passes(ROWS[name], *data))


def test_each_sign_is_plus_in_about_half_of_the_calls_and_no_two_are_the_same():
    spec = fp4.RECIPES["fp4-bwd"].dgrad
    v = torch.zeros(1, 32)
    torch.manual_seed(0)
    words = [matmul.quantize_operands(v, v, [matmul.Operand(v, spec)])[1] for _ in range(200)]
    signs = torch.stack([columns.sign_values(word, 128).float() for word in words])
    assert signs.shape == (200, 128) and signs.abs().eq(1).all()
    assert signs.mean(0).abs().max() <= .35                     # 5 standard deviations
    agreement = signs.T @ signs / 200 - torch.eye(128)
    assert agreement.abs().max() <= .4
