"""
The choice of the product alpha * a @ b.T of packed matrices: which one a GPU runs.

Only Blackwell has FP4 units. Elsewhere the product runs in a wider format that holds MXFP4's
values: FP8, BF16 or FP32. FP8 has two formats: E4M3, with 4 bits of exponent and 3 of mantissa, and
E5M2. A block's scale is a power of two and fits into the exponent: 2**s * E2M1 is a value of E4M3
for 15 consecutive s, and of E5M2 for 29. So an FP8 product has MXFP4's exact operands as long as
blocks that share an FP8 scale are not further apart than that.

    gemm        the product                                         runs on     usual on
    "own"       gemm_sm90.cu; 128 values of a row share a scale     Hopper      Hopper
                on the left, and 32 rows of them on the right
                (kernels/fp8_tiles.cuh)
                gemm_sm100.cu or gemm_sm120.cu, on FP4 units        Blackwell
    "fp8"       torch._scaled_mm in FP8; all values of a row        from Ada    Ada, Blackwell
                share a scale
    "bf16"      torch.mm in BF16                                    from Ampere Ampere
    "fp32"      gemm_fp32.cu, ours, without tensor cores            any GPU     before Ampere
    "library"   torch's NVFP4 product, on FP4 units                 Blackwell

"auto" means the usual one. The others are there to be compared with it; and so that a GPU can run
what an older one runs. Neither product on FP4 units has run on the hardware.

Our products for Hopper and Blackwell read the operands of a gradient in a layout of their own, the
operand format, in which the quantisers write them. So nothing is rearranged in between.
"""
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .check import check
from .reference import pow2

GEMMS = ("auto", "fp8", "bf16", "fp32", "own", "library")
HOPPER = (9, 0)
BLACKWELL_KERNELS = {10: "gemm_sm100", 12: "gemm_sm120"}    # by the major number
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
    window: str = ""                    # an entry of window.WINDOWS; "": none, or not measured

    def format_for(self, tensor):
        """Returns the format of a gradient's operands that lie on the tensor's device."""
        return self.operand_format if tensor.is_cuda else "packed"


def select_backend(capability, gemm="auto"):
    """Returns the Backend for a GPU's compute capability, such as (9, 0); None is for no GPU.

    gemm chooses among the products of a GPU: the table above. The CPU has one product. Raises
    ValueError when the GPU does not have the product.
    """
    check(gemm in GEMMS, f"gemm {gemm!r} is not one of {', '.join(GEMMS)}")
    if capability is None:
        return Backend("cpu.cpp (compiled, byte-equal to reference.py)")
    if gemm == "auto":
        gemm = usual_gemm(capability)
    check_gemm_runs(capability, gemm)

    if gemm == "fp8":
        return gpu_backend(capability, "exact FP4 products on FP8 tensor cores (the library's)",
                           gemm=gemm_on_fp8, window="fp8")
    if gemm == "bf16":
        return gpu_backend(capability, "exact FP4 products on BF16 tensor cores (the library's)",
                           gemm=gemm_on_bf16)
    if gemm == "library":
        return gpu_backend(capability, "products on FP4 tensor cores (the library's)",
                           gemm=gemm_on_nvfp4)
    if gemm == "fp32":
        untested = "" if capability == HOPPER else f", {UNTESTED}"
        return gpu_backend(capability, f"exact FP4 products in FP32 (gemm_fp32.cu{untested})",
                           sources=("gemm_fp32.cu",), flags=("-DGEMM_FP32",))
    if capability == HOPPER:
        return gpu_backend(capability, "exact FP4 products on FP8 tensor cores (gemm_sm90.cu)",
                           "fp8", sources=("gemm_sm90.cu",), flags=("-DGEMM_SM90",),
                           window="own")
    kernel = BLACKWELL_KERNELS[capability[0]]
    return gpu_backend(capability, f"products on FP4 tensor cores ({kernel}.cu, {UNTESTED})",
                       "mxf4", sources=(f"{kernel}.cu", "scale_tiles.cu"),
                       flags=(f"-DGEMM_MXF4={kernel}",))


def usual_gemm(capability):
    """The product that a GPU runs unless another one is asked for."""
    if capability == HOPPER:
        return "own"
    if capability >= (8, 9):
        return "fp8"
    if capability >= (8, 0):
        return "bf16"
    return "fp32"


def check_gemm_runs(capability, gemm):
    """Raises ValueError unless a GPU of this compute capability has the product."""
    is_blackwell = capability[0] in BLACKWELL_KERNELS
    needed, runs = {
        "fp8": ("8.9 (Ada) or more", capability >= (8, 9)),
        "bf16": ("8.0 (Ampere) or more", capability >= (8, 0)),
        "fp32": ("any", True),
        "own": ("9.0 (Hopper), 10.x or 12.x (Blackwell)", capability == HOPPER or is_blackwell),
        "library": ("10.x or 12.x (Blackwell)", is_blackwell),
    }[gemm]
    major, minor = capability
    check(runs, f"gemm {gemm!r} needs a GPU of compute capability {needed}, and this one has "
                f"{major}.{minor}: choose auto, which means {usual_gemm(capability)!r} here")


def gpu_backend(capability, products, operand_format="packed", sources=(), flags=(), gemm=None,
                window=""):
    major, minor = capability
    # The suffix a allows the instructions that only this architecture has, as Hopper's wgmma: the
    # products use them that have an operand format of their own.
    suffix = "" if operand_format == "packed" else "a"
    description = f"quantize.cu and {products} on the GPU, cpu.cpp on the CPU"
    return Backend(description, operand_format, sources, flags, f"{major}{minor}{suffix}",
                   gemm=gemm, window=window)


# ---- products of the library, with the arguments of the op "gemm" (ops.py)

def gemm_on_fp8(a, a_scales, b, b_scales, alpha, dtype):
    """alpha * a @ b.T on FP8 tensor cores: the scale of a row, which holds alpha, comes after."""
    check_dtype(dtype)
    columns = b.shape[0]
    a, a_scales = torch.ops.fp4.packed_to_fp8(a, a_scales, alpha)
    b, b_scales = torch.ops.fp4.packed_to_fp8(*with_rows_by_16(b, b_scales), 1.0)
    b_scales = b_scales.view(1, -1)
    if dtype == torch.bfloat16:
        out = torch._scaled_mm(a, b.T, a_scales, b_scales, out_dtype=dtype, use_fast_accum=False)
    else:
        # On all GPUs but Hopper the library stores only BF16 when it scales the rows. So it does
        # not scale them.
        one = torch.ones((), device=a.device)
        out = torch._scaled_mm(a, b.T, one, one, out_dtype=dtype, use_fast_accum=False)
        out.mul_(a_scales).mul_(b_scales)
    return out[:, :columns].contiguous()


def gemm_on_bf16(a, a_scales, b, b_scales, alpha, dtype):
    """alpha * a @ b.T on BF16 tensor cores; BF16 holds MXFP4's values."""
    check_dtype(dtype)
    a = torch.ops.fp4.dequantize(a, a_scales, torch.bfloat16)
    b = torch.ops.fp4.dequantize(b, b_scales, torch.bfloat16)
    return (alpha * torch.mm(a, b.T, out_dtype=torch.float32)).to(dtype)


def check_dtype(dtype):
    """Refuses what the compiled products refuse, with their kind of error."""
    if dtype not in (torch.float32, torch.bfloat16):
        raise RuntimeError(f"dtype must be float32 or bfloat16, got {dtype}")


def with_rows_by_16(codes, scales):
    """Adds rows of zeros to a packed right operand: the library wants a multiple of 16."""
    rows_to_add = -codes.shape[0] % 16
    if not rows_to_add:
        return codes, scales
    return F.pad(codes, (0, 0, 0, rows_to_add)), F.pad(scales, (0, 0, 0, rows_to_add))


def gemm_on_nvfp4(a, a_scales, b, b_scales, alpha, dtype):
    """alpha * a @ b.T on Blackwell's FP4 units, through the library.

    It is here to be compared with gemm_sm100.cu and gemm_sm120.cu. torch multiplies NVFP4, whose
    codes are MXFP4's, but with a scale in E4M3 for each 16 of them and one float32 for the tensor.
    """
    check_dtype(dtype)
    columns = b.shape[0]
    b, b_scales = with_rows_by_16(b, b_scales)
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
    return out[:, :columns].contiguous()


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
