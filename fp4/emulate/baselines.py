"""
The methods that Quartet was compared with (arXiv 2505.14669, Table 3), and the registration of FP8.

The paper's own ports of them are not published. Each section below says what was taken from the
original and what was chosen here. All are emulated, as in matmul.py: values of a coarse grid, held
in the dtype of the activations, times factors that come after the product.

A method is a pair of functions:

    forward(x, w, recipe) -> y, saved              x [M, K], w [N, K]; saved: a tuple of tensors
    backward(dy, saved, recipe) -> dx, dw          dy [M, N]; dx in dy's dtype, dw in float32
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F

from . import fp8
from .matmul import METHODS, cast, lib, scaled_matmul
from .quantizers import E2M1, INT4, Grid, block_max, join_blocks, split_blocks, to_grid

# Random numbers of [0, 1): an op for the reasons that fp4::words of matmul.py is one.
lib.define("uniform(Tensor dy, Tensor x, int n) -> Tensor", tags=torch.Tag.nondeterministic_seeded)

def draw_uniform(dy, x, n): return torch.rand(n, device=dy.device)
def uniform_shape(dy, x, n): return dy.new_empty(n, dtype=torch.float32)

lib.impl("uniform", draw_uniform, "CompositeExplicitAutograd")
torch.library.register_fake("fp4::uniform", uniform_shape, lib=lib)
uniform = torch.ops.fp4.uniform


class Scaled(NamedTuple):
    """A matrix on a grid; values * scale is approximately the original."""
    values: torch.Tensor
    scale: torch.Tensor             # float32 [1, 1]


def quantize_tensor(v, grid, scale, dtype, noise=None):
    """Rounds v / scale to the grid. dtype holds the values of a grid exactly."""
    scale = nonzero(scale)
    return Scaled(to_grid(v.float() / scale, grid, noise).to(dtype), scale.view(1, 1))


def nonzero(scale): return torch.where(scale == 0, 1., scale)
def absmax(v): return v.abs().amax().float()

# These sum in float64 and round to float32, where the order in which a compiler adds cannot be seen
# any more.
def total(v): return v.double().sum().float()
def mean(v): return v.double().mean().float()
def row_norms(v): return v.double().square().sum(1).sqrt().float()


def hadamard_matrix(n, device):
    """Returns the orthogonal Hadamard matrix [n, n] for a power of two n, at most 2**16.

    Entry (i, j) is negative where i & j has an odd number of ones. A product with it is what
    torch.compile and a GPU do fast, for any n; columns.rotate has a butterfly instead, whose order
    of sums is fixed.
    """
    i = torch.arange(n, device=device)
    parity = i[:, None] & i
    for shift in (8, 4, 2, 1):
        parity = parity ^ (parity >> shift)
    return (1 - 2 * (parity & 1)) * n ** -.5


def rotate(v, n):
    """Multiplies each n neighbours along the last axis of v by the Hadamard matrix."""
    return (v.float().unflatten(-1, (-1, n)) @ hadamard_matrix(n, v.device)).flatten(-2)


# ---- LUQ: logarithmic unbiased quantisation (Chmiel et al., 2112.10769)
#
# Taken from the paper: both forward operands are INT4 to nearest, with one SAWB step a tensor, and
# gradients pass straight through. The gradient of the output is quantised once, to powers of two:
# seven magnitudes, alpha .. 64 alpha, of which the largest is the tensor's largest value, as in the
# authors' corrected code. Its stochastic underflow and its logarithmic stochastic rounding are both
# what to_grid does on a grid without mantissa.
# Left out: SMP, the average of several draws.
# Chosen here: luq-fp4 has E2M1, scaled to the tensor's largest value, in place of INT4.

POWERS_OF_TWO = Grid(mantissa_bits=0, min_exponent=0, max_value=64)


def sawb_step(v):
    """Returns SAWB's step: its clipping value is a fit to the mean of squares and of magnitudes."""
    size = v.float().abs()
    clip = 12.1 * mean(size.square()).sqrt() - 12.2 * mean(size)
    clip = torch.where(clip <= 0, absmax(v), clip)      # <= 0: all values are of one size
    return nonzero(clip * 2 / 15)


def luq_quantize(v, method, dtype):
    if method == "luq-fp4":
        return quantize_tensor(v, E2M1, absmax(v) / 6, dtype)
    step = sawb_step(v)
    values = (v.float() / step).clamp(-8, 7).round()
    return Scaled(values.to(dtype), step.view(1, 1))


def luq_forward(x, w, recipe):
    xq = luq_quantize(x, recipe.method, x.dtype)
    wq = luq_quantize(w, recipe.method, x.dtype)
    y = scaled_matmul(xq.values, wq.values, xq.scale * wq.scale, x.dtype)
    return y, (*xq, *wq)


def luq_backward(dy, saved, recipe):
    x, x_scale, w, w_scale = saved
    noise = uniform(dy, x, dy.numel()).view_as(dy)
    g = quantize_tensor(dy, POWERS_OF_TWO, absmax(dy) / 64, dy.dtype, noise)
    dx = scaled_matmul(g.values, w.T, g.scale * w_scale, dy.dtype)
    dw = scaled_matmul(g.values.T, x.T, g.scale * x_scale, torch.float32)
    return dx, dw


# ---- Jetfire (Xi et al., 2403.12422)
#
# Taken from the emulation of its INT8 in IST-DASLab/HALO: each 32 x 32 tile has one absmax scale,
# everything is rounded to nearest, and y and dx are quantised as well, because Jetfire's data flow
# between layers is in low precision.
# Chosen here: E2M1 in place of INT8.

TILE = 32


def quantize_tiles(v, dtype):
    rows, columns = v.shape
    padded = F.pad(v.float(), (0, -columns % TILE))
    tiles = split_blocks(padded, TILE, square=True)
    scale = block_max(tiles).clamp_min(1e-5) / 6
    quantized = join_blocks(to_grid(tiles / scale, E2M1) * scale, rows, TILE, square=True)
    return cast(quantized[:, :columns], dtype)


def jetfire_forward(x, w, recipe):
    xq = quantize_tiles(x, x.dtype)
    wq = quantize_tiles(w, x.dtype)
    return quantize_tiles(xq @ wq.T, x.dtype), (xq, wq)


def jetfire_backward(dy, saved, recipe):
    x, w = saved
    g = quantize_tiles(dy, dy.dtype)
    dx = quantize_tiles(g @ w, dy.dtype)
    dw = scaled_matmul(g.T, x.T, 1., torch.float32)
    return dx, dw


# ---- HALO-2 (Ashkboos et al., 2501.02625)
#
# Taken from the paper and its code: one scale a tensor, 3/4 of absmax / 6, to nearest. Both
# forward operands are rotated along K, dy is rotated along the tokens for dx, and nothing is
# rotated for dw. x and w are saved unquantised. Chosen here: E2M1 in place of its FP6. A rotation
# spans the largest power of two that divides the axis, at most 1024, in place of the whole axis.

def halo_quantize(v, dtype): return quantize_tensor(v, E2M1, absmax(v) / 6 * .75, dtype)
def halo_rotation(n): return min(n & -n, 1024)


def halo_forward(x, w, recipe):
    n = halo_rotation(x.shape[1])
    xq = halo_quantize(rotate(x, n), x.dtype)
    wq = halo_quantize(rotate(w, n), x.dtype)
    y = scaled_matmul(xq.values, wq.values, xq.scale * wq.scale, x.dtype)
    return y, (x, w)


def halo_backward(dy, saved, recipe):
    x, w = saved
    n = halo_rotation(len(dy))
    g = halo_quantize(rotate(dy.T, n).T, dy.dtype)
    wq = halo_quantize(w, dy.dtype)
    dx = scaled_matmul(g.values, wq.values.T, g.scale * wq.scale, dy.dtype)
    dx = cast(rotate(dx.T, n).T, dy.dtype)

    g = halo_quantize(dy, dy.dtype)
    xq = halo_quantize(x, dy.dtype)
    dw = scaled_matmul(g.values.T, xq.values.T, g.scale * xq.scale, torch.float32)
    return dx, dw


# ---- LSS: learned step size and sampled rows (Xi et al., 2306.11987)
#
# Taken from the paper, forward: a Hadamard matrix over blocks of 32, and symmetric INT4 with one
# step a tensor; what clips gets no gradient. Backward: dy is split into two INT4 matrices, the
# high half and its residual, which is rounded stochastically. Of their 2 M rows about half are
# kept, each with a probability p that is proportional to |dy row| |x row| for dw and to |dy row|
# for dx, and divided by p, which keeps the mean. Chosen here: the step is not learned; it is the
# one with the least squared error for a Gaussian, 0.354 of its standard deviation. Rows are kept
# independently of each other, with probability min(1, M |row| / sum of |row|). Nothing is saved by
# that: a row that is not kept is multiplied by 0.

LSS_ROTATION = 32


class LssSaved(NamedTuple):
    x: torch.Tensor
    x_scale: torch.Tensor
    w: torch.Tensor
    w_scale: torch.Tensor
    x_mask: torch.Tensor            # bool, what did not clip
    w_mask: torch.Tensor
    unquantized_w: torch.Tensor     # for its shape


def lss_rotate(v):
    return rotate(F.pad(v, (0, -v.shape[1] % LSS_ROTATION)), LSS_ROTATION)


def lss_quantize(v, dtype):
    """Returns v quantised, and the mask of what did not clip."""
    quantized = quantize_tensor(v, INT4, .354 * mean(v.square()).sqrt(), dtype)
    return quantized, v.abs() < 7 * quantized.scale


def lss_forward(x, w, recipe):
    xq, x_mask = lss_quantize(lss_rotate(x), x.dtype)
    wq, w_mask = lss_quantize(lss_rotate(w), x.dtype)
    y = scaled_matmul(xq.values, wq.values, xq.scale * wq.scale, x.dtype)
    return y, LssSaved(*xq, *wq, x_mask, w_mask, w)


def lss_split(dy, noise):
    """Returns the high half of dy above the low one, [2 M, N]; their sum is dy, on average."""
    high = quantize_tensor(dy, INT4, absmax(dy) / 7, torch.float32)
    high_part = high.values * high.scale
    residual = dy.float() - high_part
    low = quantize_tensor(residual, INT4, high.scale.squeeze() / 14, torch.float32, noise)
    return torch.cat((high_part, low.values * low.scale))


def lss_sample(halves, weight, u, dtype):
    """Keeps about half of the rows and adds the two halves.

    weight [2 M] says how probable it is that a row is kept; u [2 M] are random numbers of [0, 1).
    """
    M = len(halves) // 2
    p = (M * weight / total(weight)).clamp_max(1)
    kept = (halves * torch.where(u < p, 1 / p, 0.)[:, None]).to(dtype)
    return kept[:M] + kept[M:]


def lss_unrotate(grad, mask, columns):
    return cast(rotate(grad * mask, LSS_ROTATION)[:, :columns], grad.dtype)


def lss_backward(dy, saved, recipe):
    saved = LssSaved(*saved)
    M, N = dy.shape
    draws = uniform(dy, saved.x, M * N + 4 * M)
    noise, u_dx, u_dw = draws.split((M * N, 2 * M, 2 * M))
    halves = lss_split(dy, noise.view(M, N))
    columns = saved.unquantized_w.shape[1]

    weight = row_norms(halves)
    sampled = lss_sample(halves, weight, u_dx, dy.dtype)
    dx = scaled_matmul(sampled, saved.w.T, saved.w_scale, dy.dtype)

    weight = weight * row_norms(saved.x).repeat(2)
    sampled = lss_sample(halves, weight, u_dw, dy.dtype)
    dw = scaled_matmul(sampled.T, saved.x.T, saved.x_scale, torch.float32)
    return lss_unrotate(dx, saved.x_mask, columns), lss_unrotate(dw, saved.w_mask, columns)


METHODS.update({
    "fp8": (fp8.forward, fp8.backward),
    "luq-int4": (luq_forward, luq_backward),
    "luq-fp4": (luq_forward, luq_backward),
    "jetfire-fp4": (jetfire_forward, jetfire_backward),
    "halo-fp4": (halo_forward, halo_backward),
    "lss-int4": (lss_forward, lss_backward),
})
