"""
The methods that Quartet was compared with (arXiv 2505.14669, Table 3), and FP8. The paper's ports are not published:
below, each says what was taken from the original and what was chosen here. All are emulated: values times factors, as
in emulated.py. Each is forward(x, w, recipe) -> y, saved and backward(dy, saved, recipe) -> dx, dw.
"""
import torch
import torch.nn.functional as F
from . import fp8
from .emulated import METHODS, cast, product, rotate, uniform
from .formats import E2M1, INT4, Grid, block, to_grid, total, unblock


def per_tensor(v, grid, scale, dtype, noise=None):
    """v ~= values * scale, the values in dtype, exactly"""
    scale = torch.where(scale == 0, 1., scale)
    return to_grid(v.float() / scale, grid, noise).to(dtype), scale.view(1, 1)

def largest(v): return v.abs().amax().float()
def mean(v): return v.double().mean().float()                               # float64 as in formats.total
def norm(v): return v.double().square().sum(1).sqrt().float()              # of each row


# ---- LUQ (Chmiel et al., 2112.10769). Taken: forward operands INT4 with one SAWB step a tensor, to nearest,
# straight-through; the output gradient once, in powers of two (seven magnitudes, 1 .. 64 alpha, the largest 64 alpha,
# as their corrected code has it), with stochastic underflow and logarithmic stochastic rounding, both of which are
# to_grid on a grid without mantissa. Left out: SMP, the average of several draws. Chosen for luq-fp4: E2M1 scaled to
# the tensor's largest value.

def sawb(v, method, dtype):
    if method == "luq-fp4": return per_tensor(v, E2M1, largest(v) / 6, dtype)
    size = v.float().abs()
    clip = 12.1 * mean(size.square()).sqrt() - 12.2 * mean(size)
    step = torch.where(clip <= 0, largest(v), clip) * 2 / 15                    # <= 0: all values are of one size
    step = torch.where(step == 0, 1., step)
    return (v.float() / step).clamp(-8, 7).round().to(dtype), step.view(1, 1)

def luq_forward(x, w, recipe):
    xq, wq = (sawb(v, recipe.method, x.dtype) for v in (x, w))
    return product(xq[0], wq[0], xq[1] * wq[1], x.dtype), (*xq, *wq)

def luq_backward(dy, saved, recipe):
    x, xf, w, wf = saved
    g, gf = per_tensor(dy, Grid(0, 0, 64), largest(dy) / 64, dy.dtype, uniform(dy, x, dy.numel()).view_as(dy))
    return product(g, w.T, gf * wf, dy.dtype), product(g.T, x.T, gf * xf, torch.float32)


# ---- Jetfire (Xi et al., 2403.12422), after the emulation of its INT8 in IST-DASLab/HALO. Taken: one absmax scale a
# 32 x 32 tile, everything to nearest, y and dx quantised as well (the data flow between layers is in low precision).
# Chosen: E2M1 instead of INT8.

def tiles(v, dtype):
    b = block(F.pad(v.float(), (0, -v.shape[1] % 32)), 32, True)
    s = b.abs().amax(-1, True).clamp_min(1e-5) / 6
    return cast(unblock(to_grid(b / s, E2M1) * s, len(v), 32, True)[:, :v.shape[1]], dtype)

def jetfire_forward(x, w, recipe):
    xq, wq = tiles(x, x.dtype), tiles(w, x.dtype)
    return tiles(xq @ wq.T, x.dtype), (xq, wq)

def jetfire_backward(dy, saved, recipe):
    x, w = saved
    g = tiles(dy, dy.dtype)
    return tiles(g @ w, dy.dtype), product(g.T, x.T, 1., torch.float32)


# ---- HALO-2 (Ashkboos et al., 2501.02625). Taken: one scale a tensor, 3/4 of absmax / 6 as in its code, to nearest;
# Hadamard rotations of both forward operands along K and of dy along the tokens for dx, none for dw; x and w saved
# unquantised. Chosen: E2M1 for its FP6; rotations over the largest power of two that divides the axis, at most 1024,
# instead of the whole axis.

def halo(v, dtype): return per_tensor(v, E2M1, largest(v) / 6 * .75, dtype)
def width(n): return min(n & -n, 1024)

def halo_forward(x, w, recipe):
    n = width(x.shape[1])
    (a, af), (b, bf) = (halo(rotate(v, n), x.dtype) for v in (x, w))
    return product(a, b, af * bf, x.dtype), (x, w)

def halo_backward(dy, saved, recipe):
    x, w = saved
    n = width(len(dy))
    (g, gf), (w, wf) = halo(rotate(dy.T, n).T, dy.dtype), halo(w, dy.dtype)
    dx = cast(rotate(product(g, w.T, gf * wf, dy.dtype).T, n).T, dy.dtype)
    (g, gf), (x, xf) = halo(dy, dy.dtype), halo(x, dy.dtype)
    return dx, product(g.T, x.T, gf * xf, torch.float32)


# ---- LSS (Xi et al., 2306.11987). Taken: forward, a block Hadamard of 32 and symmetric INT4 with one step a tensor,
# what clips gets no gradient; backward, dy split into two INT4 matrices (high, and the residual rounded
# stochastically), of whose 2 M rows about half are kept, with probability p ~ |dy row| |x row| for dw and |dy row|
# for dx, and divided by p. Chosen: the step is not learned but the error-minimising one of a Gaussian, 0.354 of its
# standard deviation; rows are kept independently of each other, with probability min(1, M |row| / sum); no time is
# saved, as the rows left out are multiplied by zero.

def lss_quantize(v, dtype): return per_tensor(v, INT4, .354 * mean(v.square()).sqrt(), dtype)

def lss_forward(x, w, recipe):
    turned = [rotate(F.pad(v, (0, -v.shape[1] % 32)), 32) for v in (x, w)]
    (xq, xf), (wq, wf) = (lss_quantize(v, x.dtype) for v in turned)
    masks = [v.abs() < 7 * f for v, f in zip(turned, (xf, wf))]
    return product(xq, wq, xf * wf, x.dtype), (xq, xf, wq, wf, *masks, w)

def lss_backward(dy, saved, recipe):
    x, xf, w, wf, x_mask, w_mask, original = saved
    M, N = dy.shape
    noise, for_dx, for_dw = uniform(dy, x, M * N + 4 * M).split((M * N, 2 * M, 2 * M))
    high, hf = per_tensor(dy, INT4, largest(dy) / 7, torch.float32)
    low, lf = per_tensor(dy.float() - high * hf, INT4, hf.squeeze() / 14, torch.float32, noise.view(M, N))
    split = torch.cat((high * hf, low * lf))                                    # [2 M, N]; the sum of both halves is dy
    def sampled(weight, u):
        p = (M * weight / total(weight)).clamp_max(1)
        return (split * torch.where(u < p, 1 / p, 0.)[:, None]).to(dy.dtype)
    both = sampled(norm(split), for_dx)
    dx = product(both[:M] + both[M:], w.T, wf, dy.dtype)
    both = sampled(norm(split) * norm(x).repeat(2), for_dw)
    dw = product((both[:M] + both[M:]).T, x.T, xf, torch.float32)
    return [cast(rotate(d * mask, 32)[:, :original.shape[1]], d.dtype) for d, mask in ((dx, x_mask), (dw, w_mask))]


METHODS.update({
    "fp8": (fp8.forward, fp8.backward),
    "luq-int4": (luq_forward, luq_backward), "luq-fp4": (luq_forward, luq_backward),
    "jetfire-fp4": (jetfire_forward, jetfire_backward), "halo-fp4": (halo_forward, halo_backward),
    "lss-int4": (lss_forward, lss_backward)})
