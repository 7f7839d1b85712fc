"""
alpha * a @ b.T of packed matrices on a GPU without FP4 units: in a wider format that holds every MXFP4 value. A product in
the FP8 of Hopper and Ada has MXFP4's exact operands, because a block scale is a power of two and fits into the exponent
(2^s * E2M1 is E4M3 for 15 consecutive s; a row's largest exponent goes into its FP32 scale: fold.cu). A block more than
14 octaves below its row's largest rounds. On Hopper, gradients have a product of their own: gemm_sm90.cu.
"""
import torch

ops = torch.ops.fp4
TILES = False                   # gemm_sm90.cu is loaded: a gradient's operands are FP8 tiles


def choose(capability, lib):
    """register the product for a GPU; returns what to call it"""
    global TILES
    TILES = capability == (9, 0)
    fp8 = capability >= (8, 9)
    lib.impl("gemm", gemm_fp8 if fp8 else gemm_bf16, "CUDA")
    return f"exact FP4 products on {'FP8' if fp8 else 'BF16'} tensor cores{' (gradients: gemm_sm90.cu)' * TILES}"


def tiles(x): return TILES and x.is_cuda


def gemm_fp8(a, a_scales, b, b_scales, alpha, dtype):
    a, a_rows = ops.fold(a, a_scales, alpha)
    b, b_rows = ops.fold(b, b_scales, 1.0)
    return torch._scaled_mm(a, b.T, a_rows, b_rows.view(1, -1), out_dtype=dtype, use_fast_accum=False)


def gemm_bf16(a, a_scales, b, b_scales, alpha, dtype):
    a, b = ops.dequantize(a, a_scales, torch.bfloat16), ops.dequantize(b, b_scales, torch.bfloat16)
    return (alpha * torch.mm(a, b.T, out_dtype=torch.float32)).to(dtype)
