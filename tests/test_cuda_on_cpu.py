"""
The CUDA kernels, run on a CPU, give what the definition does before a GPU has seen them.

models/cuda_on_cpu.h stands in for CUDA, models/sm90_on_cpu.h for the instructions of Hopper. What
only a GPU shows is in test_kernels.py and test_gpu.py.
"""
import ctypes
import fcntl
import functools
import itertools
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from fp4 import reference
from fp4.ops import SIGN_ORDERS
from test_kernels import HOW_BACKWARD, same, same_scale_tiles, same_tiles

TESTS = Path(__file__).resolve().parent
MODELS = TESTS / "models"
KERNELS = TESTS.parent / "fp4" / "kernels"
SOURCES = ["quantize.cu", "elementwise.cu", "fp8_tiles.cu", "gemm_fp32.cu", "gemm_sm90.cu"]
REPLACED_HEADERS = ["ptx/tma.cuh", "ptx/wgmma.cuh"]             # by models/sm90_on_cpu.h

PACKED, MXF4, FP8_LEFT, FP8_RIGHT = range(4)                    # OperandFormat in ops.h


def find_toolkit():
    folders = ["/usr/local/cuda"]
    nvcc = shutil.which("nvcc")
    if nvcc:
        folders.append(os.path.dirname(os.path.dirname(nvcc)))
    return next((d for d in folders if os.path.exists(f"{d}/include/cuda_fp8.h")), None)


TOOLKIT = find_toolkit()
needs_toolkit = pytest.mark.skipif(not TOOLKIT or not shutil.which("g++"),
                                   reason="no CUDA toolkit, whose headers this needs")
pytestmark = [pytest.mark.slow, needs_toolkit]


# ---- compilation

class Mistake(NamedTuple):
    file: str
    right: str                                  # what stands there, once in the file
    wrong: str


def translate(text):
    """Turns CUDA C++ into C++."""
    text = re.sub(r"extern __shared__ __align__\(\d+\) uint8_t memory\[\];",
                  "uint8_t* memory = dynamic_shared;", text)
    # kernel<T><<<grid, ...>>>(arguments);
    launch = r"(\w*kernel(?:<(?:[^<>]|<[^<>]*>)*>)?)<<<(.*?)>>>\((.*?)\);"
    return re.sub(launch, r"launch(\2, [=] { \1(\3); });", text, flags=re.S)


def write_translation(folder, mistake=None):
    """Writes the translated kernels, with one place changed if there is a mistake to plant."""
    paths = [*KERNELS.rglob("*.cu"), *KERNELS.rglob("*.cuh"), KERNELS / "ops.h"]
    for path in paths:
        name = path.relative_to(KERNELS).as_posix()
        text = path.read_text()
        if mistake and name == mistake.file:
            count = text.count(mistake.right)
            assert count == 1, f"{name} has {count} times {mistake.right}"
            text = text.replace(mistake.right, mistake.wrong)
        copy = folder / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(translate(text))
    for name in REPLACED_HEADERS:
        (folder / name).write_text('#include "sm90_on_cpu.h"\n')


def start_compiler(*arguments):
    # Each library has variables of its own (no unique symbols), and the fibers' longjmp from one
    # stack to another is no error (no _FORTIFY_SOURCE).
    flags = ["-O1", "-std=c++20", "-ffp-contract=off", "-w", "-Wno-psabi", "-fPIC",
             "-fno-gnu-unique", "-U_FORTIFY_SOURCE", "-I", f"{TOOLKIT}/include"]
    return subprocess.Popen(["g++", *flags, *map(str, arguments)])


def wait_for(*compilers):
    for compiler in compilers:
        assert compiler.wait() == 0


def compile_object(folder, base, source):
    """Starts to compile a translated source; base has the precompiled header."""
    return start_compiler("-I", folder, "-I", base, "-I", MODELS, "-include", "cuda_on_cpu.h",
                          "-x", "c++", "-c", folder / source, "-o", folder / f"{source}.o")


def link(folder, objects):
    wait_for(start_compiler("-shared", "-o", folder / "kernels.so", *objects))


def build_base(folder):
    """Compiles the unmodified kernels."""
    write_translation(folder)
    wait_for(start_compiler("-I", MODELS, "-x", "c++-header", MODELS / "cuda_on_cpu.h",
                            "-o", folder / "cuda_on_cpu.h.gch"))
    calls = start_compiler("-I", folder, "-I", MODELS, "-c", MODELS / "kernels_on_cpu.cpp",
                           "-o", folder / "calls.o")
    wait_for(calls, *(compile_object(folder, folder, source) for source in SOURCES))
    link(folder, [folder / "calls.o", *(folder / f"{source}.o" for source in SOURCES)])


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """The folder of the unmodified kernels, compiled once for all processes of a test run."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    folder = root / "cuda_on_cpu"
    with open(root / "cuda_on_cpu.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "kernels.so").exists():
            folder.mkdir(exist_ok=True)
            build_base(folder)
    yield folder
    (folder / "cuda_on_cpu.h.gch").unlink(missing_ok=True)      # 80 MB; it only saves time


@pytest.fixture(scope="session")
def kernels(base):
    return ctypes.CDLL(base / "kernels.so")


def kernels_with(mistake, source, base, folder):
    """Compiles one source again. It is linked first, so that its inline functions win."""
    write_translation(folder, mistake)
    wait_for(compile_object(folder, base, source))
    others = [base / f"{other}.o" for other in SOURCES if other != source]
    link(folder, [folder / f"{source}.o", base / "calls.o", *others])
    return ctypes.CDLL(folder / "kernels.so")


# ---- calls

def call(function, *args):
    function(*map(as_c, args))


def as_c(value):
    if value is None:
        return ctypes.c_void_p()
    if isinstance(value, torch.Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, bool):
        return ctypes.c_bool(value)
    if isinstance(value, float):
        return ctypes.c_float(value)
    return ctypes.c_int64(value)


def empty_operand(M, K, operand_format):
    """The tensors of an operand, filled with what no kernel should leave there."""
    m = ceil_div(M, 128)
    k = ceil_div(K, 128)
    if operand_format == PACKED:
        return full_of_77(M, K // 2), full_of_77(M, K // 32)
    if operand_format == MXF4:
        return full_of_77(M, K // 2), full_of_77(m * k * 512)
    scales_per_tile = 4 if operand_format == FP8_RIGHT else 128
    return full_of_77(m, k, 128 * 128), torch.full((m, k, scales_per_tile), 77.)


def ceil_div(n, size): return -(-n // size)


def full_of_77(*shape): return torch.full(shape, 77, dtype=torch.uint8)


def is_operand(got, packed, operand_format, zeros=127):
    """Says whether an operand is the packed one in its format.

    zeros: the scale of a block of zeros.
    """
    try:
        if operand_format == PACKED:
            same(got, packed)
        elif operand_format == MXF4:
            same_scale_tiles(got, packed, zeros=zeros)
        else:
            same_tiles(got, packed, operand_format == FP8_RIGHT)
    except AssertionError:
        return False
    return True


# ---- the quantisers

@functools.cache
def ugly_values(M, K, dtype):
    """Blocks of all sizes, ties, zeros, NaN and Inf."""
    g = torch.Generator().manual_seed(M)
    sizes = torch.randint(-30, 30, (M, K // 32), generator=g).float().exp2()
    x = torch.randn(M, K, generator=g) * sizes.repeat_interleave(32, 1)
    x[1, :32] = torch.arange(32) / 4
    x[2, -32:] = 0
    x[3, :32] = 1e-40
    x[4, :32] = 3e38
    x[5, :32] = 2. ** -120
    x[M // 2, 3] = torch.nan
    x[M - 1, K - 1] = torch.inf
    return x.to(dtype)


@functools.cache
def draw(M, K, dtype):
    x = ugly_values(M, K, dtype)
    torch.manual_seed(M)
    return reference.draw(x, x, 3)


@functools.cache
def expected_forward(M, K, dtype, scale):
    return reference.quantize_forward(ugly_values(M, K, dtype), scale)


@functools.cache
def expected_backward(M, K, dtype, settings):
    signs, seeds = draw(M, K, dtype)
    return reference.quantize_backward(ugly_values(M, K, dtype), signs, seeds[:2], *settings)


@functools.cache
def expected_transposed(M, K, dtype, settings):
    signs, seeds = draw(M, K, dtype)
    codes, scales, _ = expected_forward(M, K, dtype, "floor")
    return reference.requantize_transposed(codes, scales, signs, seeds[2:], *settings[:2])


def forward_is_right(kernels, M, K, dtype, scale, operand_format):
    want = expected_forward(M, K, dtype, scale)
    got = [torch.zeros_like(t) for t in want]
    codes, scales, _ = got
    values, tile_scales = empty_operand(M, K, operand_format)
    call(kernels.quantize_forward, ugly_values(M, K, dtype), dtype == torch.bfloat16, M, K,
         scale == "nearest", *got, operand_format, values, tile_scales)
    operand = {PACKED: (codes, scales), MXF4: (codes, tile_scales),
               FP8_LEFT: (values, tile_scales)}[operand_format]
    zeros = reference.quantize_forward(torch.zeros(1, 32), scale)[1].item()
    equal = all(map(torch.equal, got, want))
    return equal and is_operand(operand, want[:2], operand_format, zeros)


def backward_is_right(kernels, M, K, dtype, settings, operand_format):
    signs, seeds = draw(M, K, dtype)
    stochastic, sign_order, sign_order_t = settings
    rows = empty_operand(M, K, operand_format)
    columns = empty_operand(K, ceil_div(M, 32) * 32, operand_format)
    call(kernels.quantize_backward, ugly_values(M, K, dtype), dtype == torch.bfloat16, M, K,
         signs, seeds, stochastic, SIGN_ORDERS.index(sign_order), SIGN_ORDERS.index(sign_order_t),
         operand_format, *rows, *columns)
    want = expected_backward(M, K, dtype, settings)
    return (is_operand(rows, want[:2], operand_format)
            and is_operand(columns, want[2:], operand_format))


def transposed_is_right(kernels, M, K, dtype, settings, operand_format):
    signs, seeds = draw(M, K, dtype)
    codes, scales, _ = expected_forward(M, K, dtype, "floor")
    columns = empty_operand(K, ceil_div(M, 32) * 32, operand_format)
    call(kernels.requantize_transposed, codes, scales, M, K, signs, seeds[2:].clone(), settings[0],
         SIGN_ORDERS.index(settings[1]), operand_format, *columns)
    return is_operand(columns, expected_transposed(M, K, dtype, settings), operand_format)


def wrong_calls(kernels, M, K, dtype):
    """Yields the calls that do not give the definition's bytes."""
    for scale, operand_format in itertools.product(("floor", "nearest"), (PACKED, MXF4, FP8_LEFT)):
        if not forward_is_right(kernels, M, K, dtype, scale, operand_format):
            yield "forward", scale, operand_format
    for settings, operand_format in itertools.product(HOW_BACKWARD, (PACKED, MXF4, FP8_LEFT)):
        if not backward_is_right(kernels, M, K, dtype, settings, operand_format):
            yield "backward", *settings, operand_format
        right_format = FP8_RIGHT if operand_format == FP8_LEFT else operand_format
        if not transposed_is_right(kernels, M, K, dtype, settings, right_format):
            yield "transposed", *settings[:2], right_format


@pytest.mark.parametrize("M, K, dtype", [
    (33, 160, torch.bfloat16),
    (130, 96, torch.float32),
    (260, 544, torch.bfloat16),                 # Here a block takes three tiles.
])
def test_the_quantisers_kernels_give_the_definitions_bytes(kernels, M, K, dtype):
    assert list(wrong_calls(kernels, M, K, dtype)) == []


@pytest.mark.parametrize("M, K, mistake", [
    (33, 160, Mistake("round.cuh", "1.5f * unit", "unit")),
    (33, 160, Mistake("quantize_backward.cuh", "NEXT_ROW], signs[i]);", "NEXT_ROW], 0);")),
    (33, 160, Mistake("quantize_backward.cuh", "params.row_order, shared.row_signs.after",
                      "params.column_order, shared.row_signs.after")),
    (33, 160, Mistake("mxfp4.cuh", "sum > top[w] ? sum : top[w]", "sum < top[w] ? sum : top[w]")),
    (33, 160, Mistake("fp8_tiles.cuh", "(tile_row & 7)", "(tile_row & 3)")),
    (260, 544, Mistake("quantize_backward.cuh", "tiles[stage ^ 1], M", "tiles[stage], M")),
])
def test_a_mistake_in_a_kernel_is_found(base, tmp_path, M, K, mistake):
    kernels = kernels_with(mistake, "quantize.cu", base, tmp_path)
    assert any(wrong_calls(kernels, M, K, torch.bfloat16))


# ---- the other kernels

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("M, K", [(33, 160), (130, 96)])
def test_the_plain_kernels_give_the_definitions_bytes(kernels, M, K, dtype):
    is_bf16 = dtype == torch.bfloat16
    codes, scales, mask = expected_forward(M, K, torch.float32, "floor")
    out = torch.zeros(M, K, dtype=dtype)
    call(kernels.dequantize, codes, scales, M, K, out, is_bf16)
    want = reference.dequantize(codes, scales, dtype)
    assert torch.equal(out.nan_to_num(9.), want.nan_to_num(9.))

    d = torch.randn(M, K).to(dtype)
    call(kernels.unrotate, d, is_bf16, mask, M, K, out, is_bf16)
    assert torch.equal(out, reference.unrotate(d, mask, dtype))

    for right in (False, True):
        tiles = empty_operand(M, K, FP8_RIGHT if right else FP8_LEFT)
        call(kernels.to_fp8_tiles, codes, scales, M, K, right, *tiles)
        same_tiles(tiles, (codes, scales), right)

    a, b = (reference.quantize_forward(torch.randn(rows, K), "floor")[:2] for rows in (M, 70))
    product = torch.zeros(M, 70, dtype=dtype)
    call(kernels.multiply_fp32, *a, *b, M, 70, K, 16 / 9, product, is_bf16)
    exact = reference.gemm(*a, *b, 16 / 9, torch.float32).double()
    bound = 1e-5 * exact.abs().max() + ulp(dtype) * exact.abs()
    assert (product.double() - exact).abs().le(bound).all()


def ulp(dtype): return 2 ** (-8 if dtype == torch.bfloat16 else -23)


# ---- Hopper's product

def fp8_tiles(kernels, packed, K, operand_format):
    codes, scales = packed
    tiles = empty_operand(len(codes), K, operand_format)
    call(kernels.to_fp8_tiles, codes, scales, len(codes), K, operand_format == FP8_RIGHT, *tiles)
    return tiles


def product_is_right(kernels, M, N, K, dtype, masked, splits):
    """Compares Hopper's product with the definition's FP32 sum."""
    torch.manual_seed(K)
    # Columns that are rotated together have the same size.
    sizes = torch.randint(-6, 6, (N // 32, 1)).float().exp2().repeat_interleave(32, 0)
    a = reference.quantize_forward(torch.randn(M, K), "floor")[:2]
    b = reference.quantize_forward(torch.randn(N, K) * sizes, "floor")[:2]
    mask = torch.randint(-2 ** 31, 2 ** 31, (M, N // 32)).int() if masked else None
    out = torch.full((M + 1, N), 77., dtype=dtype)
    partial = torch.zeros(splits, ceil_div(M, 16) * 16, N)
    call(kernels.multiply_sm90, *fp8_tiles(kernels, a, K, FP8_LEFT),
         *fp8_tiles(kernels, b, K, FP8_RIGHT), M, N, K, 16 / 9, mask, partial, splits, out,
         dtype == torch.bfloat16)

    exact = reference.gemm(*a, *b, 16 / 9, torch.float32)
    if masked:
        exact = reference.unrotate(exact, mask, torch.float32)
    exact = exact.double()
    largest = (exact / sizes.T).abs().max()
    bound = 1e-5 * sizes.T * largest + ulp(dtype) * exact.abs()
    return (out[:M] - exact).abs().le(bound).all() and (out[M] == 77).all()


@pytest.mark.parametrize("M, N, K, dtype, masked, splits", [
    (300, 416, 160, torch.bfloat16, True, 1),
    (40, 544, 1024, torch.float32, True, 2),
    (130, 96, 32, torch.bfloat16, False, 1),
    # This has more tiles than there are clusters. In the others one cluster has nothing to do.
    (270, 1120, 288, torch.float32, True, 1),
])
def test_hoppers_product_is_the_exact_one_rounded_once(kernels, M, N, K, dtype, masked, splits):
    assert product_is_right(kernels, M, N, K, dtype, masked, splits)


@pytest.mark.parametrize("mistake", [
    Mistake("gemm_sm90.cu", "2 * tile.n + rank", "2 * tile.n"),
    Mistake("gemm_sm90.cu", "b_scales[stage][j % 4]", "b_scales[stage][0]"),
    Mistake("gemm_sm90_epilogue.cuh", "wait_for_reads<2>", "wait_for_reads<3>"),
    Mistake("gemm_sm90_epilogue.cuh", "_for_reads<BUFFERS<T> - 1>", "_for_reads<BUFFERS<T>>"),
])
def test_a_mistake_in_hoppers_product_is_found(base, tmp_path, mistake):
    kernels = kernels_with(mistake, "gemm_sm90.cu", base, tmp_path)
    results = [product_is_right(kernels, 40, 416, 160, dtype, True, 1)
               for dtype in (torch.bfloat16, torch.float32)]
    assert not all(results)
