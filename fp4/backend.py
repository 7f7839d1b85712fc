"""
Which product alpha * a @ b.T of packed matrices a GPU runs.

Without FP4 units: in a wider format that holds every MXFP4 value. A product in the FP8 of Hopper and Ada has MXFP4's exact
operands, because a block scale is a power of two and fits into the exponent: 2^s * E2M1 is E4M3 for 15 consecutive s
(fold.cu). Hopper has a product of its own, gemm_sm90.cu; elsewhere the library's FP8 or BF16 product does it, and before Ampere
gemm_plain.cu.

A product of our own takes a gradient's operands as the quantisers write them for it, in its FORMAT: nothing is rearranged between.

Blackwell has FP4 units, and two ways to them: gemm_sm100.cu or gemm_sm120.cu ("own"), and the library's NVFP4 product
(nvfp4.py). Neither has run on the hardware, so that "fp8" remains the default there; quartet.py's --gemm sets GEMM.
"""
import torch
from . import nvfp4

ops = torch.ops.fp4
GEMM = "fp8"                    # on Blackwell: fp8 | own | library
FORMAT = "packed"               # of a gradient's operands: packed | fp8 for gemm_sm90.cu | mxf4 for the two of Blackwell


def own(capability):
    """the files of a product of our own, and what bind.cpp is told of it; nothing: a library multiplies"""
    if capability < (8, 0): return ["gemm_plain.cu"], ["-DGEMM_PLAIN"]
    if capability == (9, 0): return ["gemm_sm90.cu"], ["-DGEMM_SM90"]
    name = {10: "gemm_sm100", 12: "gemm_sm120"}.get(capability[0])
    return ([name + ".cu", "swizzle.cu"], [f"-DGEMM_MXF4={name}"]) if name and GEMM == "own" else ([], [])


def choose(capability, lib):
    """register the product for a GPU; returns what to call it"""
    global FORMAT
    files, _ = own(capability)
    FORMAT = {"gemm_sm90.cu": "fp8", "gemm_sm100.cu": "mxf4", "gemm_sm120.cu": "mxf4"}.get(files[0] if files else "", "packed")
    if capability < (8, 0): return "FP4 products in FP32 (gemm_plain.cu, which has not been run on this hardware by its authors)"
    if FORMAT == "fp8": return "exact FP4 products on FP8 tensor cores (gemm_sm90.cu)"
    if files: return f"products on FP4 tensor cores ({files[0]}, which has not been run on this hardware by its authors)"
    four, eight = capability[0] in (10, 12) and GEMM == "library", capability >= (8, 9)
    lib.impl("gemm", nvfp4.gemm if four else gemm_fp8 if eight else gemm_bf16, "CUDA")
    return "products on FP4 tensor cores (the library's)" if four else f"exact FP4 products on {'FP8' if eight else 'BF16'} tensor cores"


def operands(x): return FORMAT if x.is_cuda else "packed"


def gemm_fp8(a, a_scales, b, b_scales, alpha, dtype):
    a, a_rows = ops.fold(a, a_scales, alpha)
    b, b_rows = ops.fold(b, b_scales, 1.0)
    return torch._scaled_mm(a, b.T, a_rows, b_rows.view(1, -1), out_dtype=dtype, use_fast_accum=False)


def gemm_bf16(a, a_scales, b, b_scales, alpha, dtype):
    a, b = ops.dequantize(a, a_scales, torch.bfloat16), ops.dequantize(b, b_scales, torch.bfloat16)
    return (alpha * torch.mm(a, b.T, out_dtype=torch.float32)).to(dtype)
