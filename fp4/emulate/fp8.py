"""
y = x w.T with all three matrix products in FP8: what FP4 has to be compared with.

FP8 is two formats. E4M3 has 3 bits of mantissa and ends at 448; E5M2 has 2 and ends at 57344. The
gradient, which spans more orders of magnitude, gets the wider one:

    y  = x  w.T        E4M3 x E4M3, fast accumulation
    dx = dy w          E5M2 x E4M3, accumulation in full
    dw = dy.T x        E5M2 x E4M3, accumulation in full, FP32 out

Each tensor has one scale, taken from its own largest value at that moment (Transformer Engine calls
it "current scaling", torchao "tensorwise"). Such a scale comes out of every product, whichever axis
is summed over, so x, w and dy are quantised once each, and the backward products read transposed
copies of the same FP8 values. A scale for each row would cost as many bytes, but those of x and w
would stand inside the sums of the backward pass.

FP8 x and FP8 w are saved for backward. The weight stays float32 and is quantised at each call.

This is plain PyTorch, so that torch.compile fuses the quantisation into what comes before it, and
the transposition into one kernel. Only the product is an op of its own, because the device picks
its implementation: torch._scaled_mm (capability 8.9 and above), or the same numbers multiplied in
a wider dtype. Compiled code equals eager code except for the order of the product's sum.
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F

E4M3 = torch.float8_e4m3fn
E5M2 = torch.float8_e5m2


class Scaled(NamedTuple):
    """An FP8 matrix; values * scale is approximately the original."""
    values: torch.Tensor
    scale: torch.Tensor             # a float32 scalar


def quantize(x, dtype, largest=None):
    """Rounds x to FP8 under one scale. A NaN or Inf anywhere makes all of it NaN.

    largest     the largest magnitude of what x is a part of; None: of x
    """
    if largest is None:
        largest = x.abs().amax()
    largest = largest.float().clamp_min(1e-30)
    max_value = torch.finfo(dtype).max
    values = (x.float() * (max_value / largest)).to(dtype)
    return Scaled(values, largest / max_value)


# ---- the product, an op with two implementations

def matmul_by_casting(a, a_scale, b, b_scale, dtype, fast_accum):
    """Returns a @ b.T for FP8 a [M, K] and b [N, K], on any device.

    The sum runs in float32, or on a GPU as that of a matmul in dtype.
    """
    on_cpu = a.device.type == "cpu"
    wide = torch.float32 if on_cpu else dtype
    product = a.to(wide) @ b.to(wide).T
    return (product.float() * (a_scale * b_scale)).to(dtype)


def matmul_on_tensor_cores(a, a_scale, b, b_scale, dtype, fast_accum):
    if torch.cuda.get_device_capability(a.device) < (8, 9):
        return matmul_by_casting(a, a_scale, b, b_scale, dtype, fast_accum)
    return torch._scaled_mm(a, b.T, a_scale, b_scale, out_dtype=dtype, use_fast_accum=fast_accum)


def matmul_shape(a, a_scale, b, b_scale, dtype, fast_accum):
    return a.new_empty(a.shape[0], b.shape[0], dtype=dtype)


lib = torch.library.Library("fp4", "FRAGMENT")
lib.define("mm_fp8(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, ScalarType dtype, "
           "bool fast_accum) -> Tensor")
lib.impl("mm_fp8", matmul_by_casting, "CompositeExplicitAutograd")
lib.impl("mm_fp8", matmul_on_tensor_cores, "CUDA")
torch.library.register_fake("fp4::mm_fp8", matmul_shape, lib=lib)


def matmul(a, b, dtype, fast_accum):
    """Returns a @ b.T in dtype, for two Scaled. Both lie along the axis that is summed over."""
    return torch.ops.fp4.mm_fp8(a.values, a.scale, b.values, b.scale, dtype, fast_accum)


def transpose(a): return Scaled(a.values.T.contiguous(), a.scale)


# ---- the method "fp8" of emulate.METHODS

def forward(x, w, recipe):
    """Computes y = x w.T; returns it and FP8 x and w for the backward pass. w may be FP8 already.

    The tensor cores want M, which dw sums over, to be a multiple of 16: rows of zeros are added.
    """
    padded = F.pad(x, (0, 0, 0, -len(x) % 16))
    x_fp8 = quantize(padded, E4M3)
    w_fp8 = w if isinstance(w, Scaled) else quantize(w, E4M3)
    y = matmul(x_fp8, w_fp8, x.dtype, fast_accum=True)
    return y[:len(x)], (*x_fp8, *w_fp8)


def backward(dy, saved, recipe):
    """Computes dx = dy w in dy's dtype, and dw = dy.T x in float32."""
    x_values, x_scale, w_values, w_scale = saved
    x_fp8 = Scaled(x_values, x_scale)
    w_fp8 = Scaled(w_values, w_scale)
    padded = F.pad(dy, (0, 0, 0, len(x_values) - len(dy)))
    dy_fp8 = quantize(padded, E5M2)
    dx = matmul(dy_fp8, transpose(w_fp8), dy.dtype, fast_accum=False)
    dw = matmul(transpose(dy_fp8), transpose(x_fp8), torch.float32, fast_accum=False)
    return dx[:len(dy)], dw
