"""
Quantisers of the emulated recipes: v [R, K] float32 -> values, factor, mask, with v ~= values * factor.

    format   elements   a block's scale                    blocks along K
    mxfp4    E2M1       a power of two (E8M0)              32
    mxfp8    E4M3       a power of two (E8M0)              32
    int4     -7 .. 7    float32                            32
    nvfp4    E2M1       E4M3, and a float32 a tensor       16

What a format holds beside its blocks (a float32 scale a tensor, the 4/3 that Quartet's 3/4 needs) is the factor [1,
1] or [R, 1]: it comes out of the product, so that the values stay exact in bfloat16. The mask says what did not clip,
where the scale rule clips on purpose; None: gradients go straight through. A NaN or Inf makes its block NaN.

noise, one number of [0, 1) a value, rounds stochastically; without it, to nearest, ties to even. Written for
torch.compile: exponents by bit operations, sums whose order cannot be seen, so that compiled and eager code round
alike.
"""
from typing import NamedTuple
import torch
import torch.nn.functional as F
from .reference import SPREAD


class Grid(NamedTuple):
    mantissa: int       # bits
    emin: int           # the exponent below which steps stay as they are
    top: float          # the largest value

E2M1, E4M3, INT4 = Grid(1, 0, 6), Grid(3, -6, 448), Grid(2, 2, 7)
BLOCK = {"mxfp4": 32, "mxfp8": 32, "int4": 32, "nvfp4": 16}
PMA = 1.009276          # 1 / (1 - 0.0092): what to nearest under AbsMax 3/4 takes from a Gaussian (Quartet's code)


def floor_log2(x): return (x.view(torch.int32) >> 23 & 255) - 127      # of x >= 0; below 2**-126: -127
def pow2(e): return (e.clamp(-126, 127) + 127 << 23).view(torch.float32)

def to_grid(u, grid, noise=None):
    """u rounded to the grid, saturating"""
    step = pow2(floor_log2(u.abs()).clamp_min(grid.emin) - grid.mantissa)
    n = u.abs() / step
    n = n.round() if noise is None else (n + noise).floor()
    return (n * step).clamp_max(grid.top) * torch.where(u < 0, -1., 1.)

def total(v):
    """sum over the last axis, [..., 1], in float64: rounded to float32, its order cannot be seen"""
    return v.double().sum(-1, True).float()

def block(v, n, square):
    """[R, K] -> [R, K/n, n], or tiles [R/n, K/n, n * n] of n rows (missing ones are zero)"""
    if not square: return v.unflatten(-1, (-1, n))
    v = F.pad(v, (0, 0, 0, -len(v) % n))
    return v.unflatten(-1, (-1, n)).unflatten(0, (-1, n)).transpose(1, 2).flatten(-2)

def unblock(v, R, n, square):
    if square: v = v.unflatten(-1, (n, n)).transpose(1, 2).flatten(0, 1)[:R]
    return v.flatten(-2)

def eden(v, q):
    """S = <v, v> / <v, q> in two parts: times S, what was rounded to nearest behind a random rotation is unbiased"""
    return total(v * v), total(v * q)

def ratio(vv, vq): return torch.where(vq == 0, 1., vv / vq)


# ---- power-of-two scales: the exponent of each block, and what the block is multiplied by so that nothing clips

def quest(v):
    """QuEST: the error-minimising scale of a Gaussian with the block's standard deviation"""
    n = v.shape[-1]
    return ((total(v * v) / n - (total(v) / n).square()).clamp_min(0)).sqrt() * SPREAD + 1e-8

def mse(v):
    """of three exponents the one with the least squared error"""
    e = floor_log2(v.abs().amax(-1, True)) - 2
    s = [pow2(e + i) for i in (-1, 0, 1)]
    error = torch.cat([total((to_grid(v / si, E2M1) * si - v).square()) for si in s], -1)
    return e - 1 + error.argmin(-1, True).int()

def absmax(v): return floor_log2(v.abs().amax(-1, True)) - 2

SCALES = {
    "mxfp4": {
        "floor":    lambda v: floor_log2(quest(v)),
        "nearest":  lambda v: floor_log2(quest(v) * 2 ** .5),
        "absmax34": absmax,         # and a factor 3/4: nothing clips
        "absmax":   absmax,         # OCP Microscaling v1.0: what lies above 6 after scaling clips
        "pma":      absmax,         # absmax34, and its mean shrinkage undone
        "mse":      mse,
    },
    "nvfp4": {"absmax": None, "four-six": None},
    "mxfp8": {"absmax": lambda v: absmax(v) - 6},
    "int4": {"absmax": None},
}
MASKED = "floor", "nearest", "mse"              # these clip on purpose: what clipped gets no gradient


def mx(v, how, noise, square):
    """MXFP4, MXFP8 and INT4. Their scales have no room for EDEN's correction: it becomes one factor a row"""
    grid, R = {"mxfp4": E2M1, "mxfp8": E4M3, "int4": INT4}[how.format], len(v)
    v, noise = block(v, 32, square), None if noise is None else block(noise, 32, square)
    top, gain = v.abs().amax(-1, True), .75 if how.scale in ("absmax34", "pma") else 1.
    s = top / grid.top if how.format == "int4" else pow2(SCALES[how.format][how.scale](v))
    s = torch.where(top.isfinite(), torch.where(top == 0, 1., s), torch.nan)
    u = v / s * gain
    q = to_grid(u, grid, None if how.rounding == "eden" else noise) * s
    mask = unblock(u.abs() < grid.top, R, 32, square) if how.scale in MASKED else None
    factor = v.new_full((1, 1), (PMA if how.scale == "pma" else 1) / gain)
    if how.rounding == "eden":
        factor = ratio(*(part.sum(1) for part in eden(v, q)))
    return unblock(q, R, 32, square), factor, mask


def nvfp4(v, how, noise, square):
    """NVFP4. Scale "four-six" tries two scales a block (its largest value becomes 6, or 4) and keeps the better;
    rounding "stochastic" leaves room for scales that round down; "eden" is MS-EDEN (2601.22813, Algorithm 1): to
    nearest, then the correction goes into the block's scale, which is rounded stochastically"""
    R, to = len(v), {"nearest": 6, "stochastic": 6 * 16 / 17, "eden": 6 * 16 / 17 / .93}[how.rounding]
    cap = 448 if how.scale == "absmax" and how.rounding != "eden" else 256      # 256 leaves room for 6/4, and for S
    v, noise = block(v, 16, square), None if noise is None else block(noise, 16, square)
    top = v.abs().amax(-1, True)
    t = top.amax() / (cap * to)
    t = torch.where(t.isfinite(), torch.where(t == 0, 1., t), torch.nan)
    def scaled(to, noise):
        b = to_grid(top / (to * t), E4M3)
        b = torch.where(b == 0, 1., b)
        return b, to_grid(v / (b * t), E2M1, None if how.rounding == "eden" else noise)
    b, q = scaled(to, noise)
    if how.scale == "four-six":
        b4, q4 = scaled(to * 4 / 6, None if noise is None else noise.flip(-1))   # as if it was drawn again
        better = total((q4 * b4 * t - v).square()) < total((q * b * t - v).square())
        b, q = torch.where(better, b4, b), torch.where(better, q4, q)
    if how.rounding == "eden":
        b = to_grid(b * ratio(*eden(v, q * b * t)), E4M3, noise[..., :1])
    return unblock(q * b, R, 16, square), t.view(1, 1), None


def quantize(v, how, noise=None, square=False):
    """v [R, K] float32, K a multiple of the block -> values, factor, mask; how: a Product of recipes.py"""
    return (nvfp4 if how.format == "nvfp4" else mx)(v, how, noise, square)
