"""
y = x w.T with all three matrix products in FP8: what FP4 has to be compared with.

    y  = x  w.T        E4M3 x E4M3, fast accumulation                E4M3: 3 mantissa bits, largest value 448
    dx = dy w          E5M2 x E4M3, accumulation in full             E5M2: 2 mantissa bits, largest value 57344
    dw = dy.T x        E5M2 x E4M3, accumulation in full, FP32 out

One scale a tensor, from its own largest value at the moment (Transformer Engine's "current scaling", torchao's
"tensorwise"): such a scale comes out of every product, whichever axis is summed over, so that x, w and dy are
quantised once each and the backward products read transposed copies of the same FP8 values. Scales a row cost as many
bytes, but those of x and w would stand inside the backward sums. Saved for backward: FP8 x and FP8 w. The weight
stays float32 and is quantised at each call.

Written in plain PyTorch, so that torch.compile fuses quantisation into what comes before and the transposition into
one kernel; only the product is an op of its own, because the device picks it: torch._scaled_mm (capability 8.9 and
above), or the same numbers multiplied in the wider dtype. Compiled equals eager but for the order of the product's
sum.
"""
import torch
import torch.nn.functional as F

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def quantize(x, dtype):
    """FP8 x, and the float32 scalar that it has to be multiplied by; a NaN or Inf anywhere makes all of it NaN"""
    largest, top = x.abs().amax().float().clamp_min(1e-30), torch.finfo(dtype).max
    return (x.float() * (top / largest)).to(dtype), largest / top


def by_casting(a, a_scale, b, b_scale, dtype, fast):
    """FP8 a [M, K], b [N, K] -> a @ b.T, on any device; the sum is float32's, or bfloat16's matmul"""
    wide = torch.float32 if dtype == torch.float32 or a.device.type == "cpu" else dtype
    return ((a.to(wide) @ b.to(wide).T).float() * (a_scale * b_scale)).to(dtype)


def on_tensor_cores(a, a_scale, b, b_scale, dtype, fast):
    if torch.cuda.get_device_capability(a.device) < (8, 9):
        return by_casting(a, a_scale, b, b_scale, dtype, fast)
    return torch._scaled_mm(a, b.T, a_scale, b_scale, out_dtype=dtype, use_fast_accum=fast)


lib = torch.library.Library("fp4", "FRAGMENT")
lib.define("mm_fp8(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, ScalarType dtype, bool fast) -> Tensor")
lib.impl("mm_fp8", by_casting, "CompositeExplicitAutograd")
lib.impl("mm_fp8", on_tensor_cores, "CUDA")
torch.library.register_fake("fp4::mm_fp8", lambda a, a_scale, b, b_scale, dtype, fast:
                            a.new_empty(a.shape[0], b.shape[0], dtype=dtype), lib=lib)
mm = torch.ops.fp4.mm_fp8


def forward(x, w, recipe):
    """the tensor cores want M, which dw sums over, to be a multiple of 16: zeros are added"""
    x8, w8 = quantize(F.pad(x, (0, 0, 0, -len(x) % 16)), E4M3), quantize(w, E4M3)
    return mm(*x8, *w8, x.dtype, True)[:len(x)], (*x8, *w8)


def backward(dy, saved, recipe):
    x8, x_scale, w8, w_scale = saved
    dy8, dy_scale = quantize(F.pad(dy, (0, 0, 0, len(x8) - len(dy))), E5M2)
    dx = mm(dy8, dy_scale, w8.T.contiguous(), w_scale, dy.dtype, False)         # both operands lie along the sum
    return dx[:len(dy)], mm(dy8.T.contiguous(), dy_scale, x8.T.contiguous(), x_scale, torch.float32, False)
