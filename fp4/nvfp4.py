"""
alpha * a @ b.T on Blackwell through the library, for comparison with gemm_sm100.cu and gemm_sm120.cu: torch multiplies NVFP4, whose
codes are MXFP4's, with a scale in E4M3 for each 16 of them and one float32 a tensor. E4M3 holds 18 powers of two, 2^-9 .. 2^8, so
an MXFP4 scale written twice is two NVFP4 scales, the tensor's largest taken out: exactly, for blocks at most 17 octaves below it.
Smaller ones become zero.
"""
import torch
import torch.nn.functional as F
from .reference import pow2


def convert(codes, scales, alpha):
    """scales uint8 [rows, K/32] -> E4M3 [rows, K/16], and alpha times the tensor's scale: float32 []"""
    zero = (codes.unflatten(1, (-1, 16)) & 0x77 == 0).all(-1)              # such a block's scale says nothing
    top = torch.where(zero | (scales == 255), 0, scales).amax().int()
    s = torch.where(scales == 255, torch.nan, pow2((scales.int() - top + 8).clamp(-127, 8)))
    return s.to(torch.float8_e4m3fn).repeat_interleave(2, 1), (alpha * pow2(top - 127) * 2 ** -8).float()


def swizzle(scales):
    """[rows, blocks] -> the tiles of 128 x 4 that scale_tiles.cuh describes, padded with zeros"""
    bytes = F.pad(scales.view(torch.uint8), (0, -scales.shape[1] % 4, 0, -scales.shape[0] % 128))
    tiles = bytes.unflatten(0, (-1, 4, 32)).unflatten(-1, (-1, 4))         # tile, word, line | tile, byte
    return tiles.permute(0, 3, 2, 1, 4).flatten().view(scales.dtype)


def gemm(a, a_scales, b, b_scales, alpha, dtype):
    N = b.shape[0]
    b, b_scales = (F.pad(t, (0, 0, 0, -N % 16)) for t in (b, b_scales))    # the library wants 16 columns
    (a_scales, a_scale), (b_scales, b_scale) = convert(a, a_scales, alpha), convert(b, b_scales, 1.0)
    two = [F.ScalingType.BlockWise1x16, F.ScalingType.TensorWise]
    order = [F.SwizzleType.SWIZZLE_32_4_4, F.SwizzleType.NO_SWIZZLE]
    a, b = a.view(torch.float4_e2m1fn_x2), b.view(torch.float4_e2m1fn_x2)
    return F.scaled_mm(a, b.T, [swizzle(a_scales), a_scale], two, [swizzle(b_scales), b_scale], two, order, order, output_dtype=dtype)[:, :N]
