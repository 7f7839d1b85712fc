"""
The choice of the product alpha * a @ b.T of packed matrices: which one a GPU runs.

Only Blackwell has FP4 units. Elsewhere the product runs in a wider format that holds MXFP4's
values: FP8, BF16 or FP32. FP8 has two formats: E4M3, with 4 bits of exponent and 3 of mantissa, and
E5M2. A block's scale is a power of two and fits into the exponent: 2**s * E2M1 is a value of E4M3
for 15 consecutive s, and of E5M2 for 29. So an FP8 product has MXFP4's exact operands as long as
blocks that share an FP8 scale are not further apart than that.

    Hopper          gemm_sm90.cu, ours; 128 values of a row share a scale on the left, and 32 rows
                    of them on the right (kernels/fp8_tiles.cuh)
    Ada             torch._scaled_mm in FP8; all values of a row share a scale
    Ampere          torch.mm in BF16
    before Ampere   gemm_fp32.cu, ours
    Blackwell       as Ada by default; its FP4 units can be reached in two ways, by gemm_sm100.cu or
                    gemm_sm120.cu ("own") and by torch's NVFP4 product ("library"). Neither has run
                    on the hardware. quartet.py's --gemm chooses

Our products read the operands of a gradient in a layout of their own, the operand format, in which
the quantisers write them. So nothing is rearranged in between.
"""
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .check import check
from .reference import pow2

GEMMS = ("fp8", "own", "library")
UNTESTED = "which has not been run on this hardware by its authors"


@dataclass(frozen=True)
class Backend:
    """What computes the ops on this machine."""
    description: str                    # one line for the user
    operand_format: str = "packed"      # of a gradient's operands on the GPU: packed | fp8 | mxf4
    sources: tuple = ()                 # files of kernels/ for this product, beside the common ones
    flags: tuple = ()                   # tell bind.cpp about this product
    target: str = ""                    # architecture to compile for, such as 90a
    is_compiled: bool = True            # False: reference.py runs
    gemm: Callable | None = None        # the op "gemm" on a GPU that has no compiled one

    def format_for(self, tensor):
        """Returns the format of a gradient's operands that lie on the tensor's device."""
        return self.operand_format if tensor.is_cuda else "packed"


def select_backend(capability, gemm="fp8"):
    """Returns the Backend for a GPU's compute capability, such as (9, 0); None is for no GPU.

    gemm matters on Blackwell alone: "fp8", "own" or "library".
    """
    check(gemm in GEMMS, f"gemm {gemm!r} is not one of {', '.join(GEMMS)}")
    if capability is None:
        return Backend("cpu.cpp (compiled, byte-equal to reference.py)")
    if capability < (8, 0):
        return gpu_backend(capability, f"FP4 products in FP32 (gemm_fp32.cu, {UNTESTED})",
                           sources=("gemm_fp32.cu",), flags=("-DGEMM_FP32",))
    if capability == (9, 0):
        return gpu_backend(capability, "exact FP4 products on FP8 tensor cores (gemm_sm90.cu)",
                           "fp8", sources=("gemm_sm90.cu",), flags=("-DGEMM_SM90",))

    blackwell_kernel = {10: "gemm_sm100", 12: "gemm_sm120"}.get(capability[0])
    if blackwell_kernel and gemm == "own":
        source = f"{blackwell_kernel}.cu"
        return gpu_backend(capability, f"products on FP4 tensor cores ({source}, {UNTESTED})",
                           "mxf4", sources=(source, "scale_tiles.cu"),
                           flags=(f"-DGEMM_MXF4={blackwell_kernel}",))
    if blackwell_kernel and gemm == "library":
        return gpu_backend(capability, "products on FP4 tensor cores (the library's)",
                           gemm=gemm_on_nvfp4)
    if capability >= (8, 9):
        return gpu_backend(capability, "exact FP4 products on FP8 tensor cores", gemm=gemm_on_fp8)
    return gpu_backend(capability, "exact FP4 products on BF16 tensor cores", gemm=gemm_on_bf16)


def gpu_backend(capability, products, operand_format="packed", sources=(), flags=(), gemm=None):
    major, minor = capability
    # The suffix a allows the instructions that only this architecture has, as Hopper's wgmma.
    suffix = "a" if sources and capability >= (9, 0) else ""
    description = f"quantize.cu and {products} on the GPU, cpu.cpp on the CPU"
    return Backend(description, operand_format, sources, flags, f"{major}{minor}{suffix}",
                   gemm=gemm)


# ---- products of the library, with the arguments of the op "gemm" (ops.py)

def gemm_on_fp8(a, a_scales, b, b_scales, alpha, dtype):
    """alpha * a @ b.T on FP8 tensor cores: the scale of a row, which holds alpha, comes after."""
    a, a_row_scales = torch.ops.fp4.packed_to_fp8(a, a_scales, alpha)
    b, b_row_scales = torch.ops.fp4.packed_to_fp8(b, b_scales, 1.0)
    return torch._scaled_mm(a, b.T, a_row_scales, b_row_scales.view(1, -1), out_dtype=dtype,
                            use_fast_accum=False)


def gemm_on_bf16(a, a_scales, b, b_scales, alpha, dtype):
    """alpha * a @ b.T on BF16 tensor cores; BF16 holds MXFP4's values."""
    a = torch.ops.fp4.dequantize(a, a_scales, torch.bfloat16)
    b = torch.ops.fp4.dequantize(b, b_scales, torch.bfloat16)
    return (alpha * torch.mm(a, b.T, out_dtype=torch.float32)).to(dtype)


def gemm_on_nvfp4(a, a_scales, b, b_scales, alpha, dtype):
    """alpha * a @ b.T on Blackwell's FP4 units, through the library.

    It is here to be compared with gemm_sm100.cu and gemm_sm120.cu. torch multiplies NVFP4, whose
    codes are MXFP4's, but with a scale in E4M3 for each 16 of them and one float32 for the tensor.
    """
    columns = b.shape[0]
    rows_to_add = -columns % 16                     # the library wants 16 columns
    b = F.pad(b, (0, 0, 0, rows_to_add))
    b_scales = F.pad(b_scales, (0, 0, 0, rows_to_add))

    a_scales, a_scale = nvfp4_scales(a, a_scales, alpha)
    b_scales, b_scale = nvfp4_scales(b, b_scales, 1.0)
    a = a.view(torch.float4_e2m1fn_x2)
    b = b.view(torch.float4_e2m1fn_x2)
    recipe = [F.ScalingType.BlockWise1x16, F.ScalingType.TensorWise]
    swizzles = [F.SwizzleType.SWIZZLE_32_4_4, F.SwizzleType.NO_SWIZZLE]
    out = F.scaled_mm(a, b.T,
                      [swizzle_scales(a_scales), a_scale], recipe,
                      [swizzle_scales(b_scales), b_scale], recipe,
                      swizzles, swizzles, output_dtype=dtype)
    return out[:, :columns]


def nvfp4_scales(codes, scales, alpha):
    """Converts MXFP4's scales uint8 [rows, K/32] to NVFP4's: E4M3 [rows, K/16], float32 [].

    E4M3 holds 18 powers of two, 2**-9 to 2**8. So an MXFP4 scale, written twice, is two NVFP4
    scales once the largest of the tensor is taken out: exactly, for blocks at most 17 octaves below
    it. Smaller blocks become zero. The float32 is the tensor's largest scale times alpha.
    """
    is_zero = (codes.unflatten(1, (-1, 16)) & 0x77 == 0).all(-1)    # its scale says nothing
    is_nan = scales == 255
    largest = torch.where(is_zero | is_nan, 0, scales).amax().int()
    exponents = (scales.int() - largest + 8).clamp(-127, 8)
    block_scales = torch.where(is_nan, torch.nan, pow2(exponents))
    block_scales = block_scales.to(torch.float8_e4m3fn).repeat_interleave(2, 1)
    return block_scales, (alpha * pow2(largest - 127) * 2 ** -8).float()


def swizzle_scales(scales):
    """Rearranges scales [rows, blocks] as Blackwell reads them, padded with zeros.

    The tiles of 128 rows and 4 blocks are described in kernels/scale_tiles.cuh.
    """
    padded = F.pad(scales.view(torch.uint8), (0, -scales.shape[1] % 4, 0, -scales.shape[0] % 128))
    # [tile row, word, line | tile column, byte]
    tiles = padded.unflatten(0, (-1, 4, 32)).unflatten(-1, (-1, 4))
    return tiles.permute(0, 3, 2, 1, 4).flatten().view(scales.dtype)
