"""
alpha * a @ b.T of packed matrices on a GPU without FP4 units: in a wider format that holds every MXFP4 value. A product in
the FP8 of Hopper and Ada has MXFP4's exact operands, because a block scale is a power of two and fits into the exponent:
2^s * E2M1 is E4M3 for 15 consecutive s (fold.cu). Hopper has a product of its own, gemm_sm90.cu; elsewhere the library's
FP8 or BF16 product does it.
"""
import torch

ops = torch.ops.fp4
TILES = False                   # gemm_sm90.cu multiplies: a gradient's operands are FP8 tiles


def choose(capability, lib):
    """register the product for a GPU; returns what to call it"""
    global TILES
    TILES = capability == (9, 0)
    if TILES: return "exact FP4 products on FP8 tensor cores (gemm_sm90.cu)"
    fp8 = capability >= (8, 9)
    lib.impl("gemm", gemm_fp8 if fp8 else gemm_bf16, "CUDA")
    return f"exact FP4 products on {'FP8' if fp8 else 'BF16'} tensor cores"


def tiles(x): return TILES and x.is_cuda


def gemm_fp8(a, a_scales, b, b_scales, alpha, dtype):
    a, a_rows = ops.fold(a, a_scales, alpha)
    b, b_rows = ops.fold(b, b_scales, 1.0)
    return torch._scaled_mm(a, b.T, a_rows, b_rows.view(1, -1), out_dtype=dtype, use_fast_accum=False)


def gemm_bf16(a, a_scales, b, b_scales, alpha, dtype):
    a, b = ops.dequantize(a, a_scales, torch.bfloat16), ops.dequantize(b, b_scales, torch.bfloat16)
    return (alpha * torch.mm(a, b.T, out_dtype=torch.float32)).to(dtype)
