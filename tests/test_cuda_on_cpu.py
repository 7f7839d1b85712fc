"""
The CUDA kernels, run on a CPU, give what the definition does before a GPU has seen them.

models/cuda_on_cpu.h stands in for CUDA, models/sm90_on_cpu.h for the instructions of Hopper. What
only a GPU shows is in test_kernels.py and test_gpu.py.
"""
import ctypes
import fcntl
import functools
import hashlib
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
from fp4.backend import swizzle_scales
from fp4.build import column_flags
from fp4.emulate import columns
from fp4.ops import SIGN_ORDERS, Packed
from fp4.recipes import GemmSpec
import operands
from operands import (
    ALPHA, HOW_BACKWARD, at_every_size, error_of_a_sum,
    every_bfloat16_and_the_neighbours_of_midpoints, every_scale_byte, random_at_sizes,
    random_packed, same, same_scale_tiles, same_tiles)
import test_columns

TESTS = Path(__file__).resolve().parent
MODELS = TESTS / "models"
KERNELS = TESTS.parent / "fp4" / "kernels"
SOURCES = ["quantize.cu", "elementwise.cu", "matvec.cu", "fp8_tiles.cu", "scale_tiles.cu",
           "gemm_fp32.cu", "gemm_sm90.cu", "kernels_on_cpu.cpp"]
OBJECTS = TESTS.parent / "fp4" / "build" / "cuda_on_cpu"        # what earlier runs have compiled
# Headers of single instructions, and the models that take their place.
REPLACED_HEADERS = {"ptx/tma.cuh": "sm90_on_cpu.h", "ptx/wgmma.cuh": "sm90_on_cpu.h",
                    "ptx/mma_fp8.cuh": "mma_fp8_on_cpu.h"}

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
    paths = [*KERNELS.rglob("*.cu"), *KERNELS.rglob("*.cuh"), KERNELS / "ops.h",
             KERNELS / "columns.h"]
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
    for name, model in REPLACED_HEADERS.items():
        (folder / name).write_text(f'#include "{model}"\n')
    for name in ("cuda_on_cpu.h", *set(REPLACED_HEADERS.values()), "kernels_on_cpu.cpp",
                 "columns_on_cpu.cpp"):
        shutil.copy(MODELS / name, folder)


# Each library has variables of its own (no unique symbols), and the fibers' longjmp from one stack
# to another is no error (no _FORTIFY_SOURCE).
FLAGS = ["-O1", "-std=c++20", "-ffp-contract=off", "-w", "-Wno-psabi", "-fPIC",
         "-fno-gnu-unique", "-U_FORTIFY_SOURCE", "-I", f"{TOOLKIT}/include"]


def start_compiler(*arguments):
    return subprocess.Popen(["g++", *FLAGS, *map(str, arguments)])


def wait_for(*compilers):
    for compiler in compilers:
        assert compiler.wait() == 0


def texts_of(folder, name):
    """The text of a source, in the folder or one of our models, and of all that it includes."""
    texts = {}
    names = [name, "cuda_on_cpu.h"]
    while names:
        name = names.pop()
        path = next((p for p in (folder / name, MODELS / name) if p.is_file()), None)
        if path and name not in texts:
            texts[name] = path.read_text()
            for included in re.findall(r'#include "(.*?)"', texts[name]):
                names += [included, os.path.normpath(os.path.join(name, "..", included))]
    return texts


def object_of(folder, source, flags):
    """Where the object of a translated source lies, by what it is made of.

    Where another run has made it, it is not made again.
    """
    made_of = (FLAGS, flags, sorted(texts_of(folder, source).items()))
    digest = hashlib.sha256(repr(made_of).encode()).hexdigest()[:16]
    return OBJECTS / f"{os.path.basename(source)}-{digest}.o"


def compile_missing(folder, sources, flags=()):
    """Compiles translated sources to their objects, with more flags, and returns these."""
    objects = [object_of(folder, source, flags) for source in sources]
    missing = [pair for pair in zip(sources, objects) if not pair[1].exists()]
    OBJECTS.mkdir(parents=True, exist_ok=True)
    if len(missing) > 1:                        # For a single one it does not pay.
        wait_for(start_compiler(*flags, "-I", MODELS, "-x", "c++-header", MODELS / "cuda_on_cpu.h",
                                "-o", folder / "cuda_on_cpu.h.gch"))
    compilers = [
        start_compiler(*flags, "-I", folder, "-I", MODELS, "-include", folder / "cuda_on_cpu.h",
                       "-x", "c++", "-c", folder / source, "-o", folder / f"{source}.o")
        for source, _ in missing]
    wait_for(*compilers)
    for source, path in missing:
        shutil.move(folder / f"{source}.o", f"{path}.{os.getpid()}")
        os.replace(f"{path}.{os.getpid()}", path)
    (folder / "cuda_on_cpu.h.gch").unlink(missing_ok=True)      # 80 MB
    return objects


def link(folder, objects):
    wait_for(start_compiler("-shared", "-o", folder / "kernels.so", *objects))
    return ctypes.CDLL(folder / "kernels.so")


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """The objects of the unmodified kernels, compiled once for all processes of a test run."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    with open(root / "cuda_on_cpu.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        folder = tmp_path_factory.mktemp("cuda_on_cpu")
        write_translation(folder)
        return dict(zip(SOURCES, compile_missing(folder, SOURCES)))


@pytest.fixture(scope="session")
def kernels(base, tmp_path_factory):
    return link(tmp_path_factory.mktemp("kernels"), base.values())


def kernels_with(mistake, source, base, folder):
    """Compiles one source again. It is linked first, so that its inline functions win."""
    write_translation(folder, mistake)
    changed = compile_missing(folder, [source])
    return link(folder, [*changed, *(base[other] for other in SOURCES if other != source)])


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

EVERY_SIZE = (300, 64)


@functools.cache
def ugly_values(M, K, dtype):
    """Those of operands.py; or, in 300 rows, a row of each size."""
    return (at_every_size() if (M, K) == EVERY_SIZE else operands.ugly_values(M, K)).to(dtype)


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
    (*EVERY_SIZE, torch.float32),
    (*EVERY_SIZE, torch.bfloat16),
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


def code_bytes(code):
    return (code[0::2] | code[1::2] << 4).to(torch.uint8)


@pytest.mark.parametrize("clips, stochastic", [(True, False), (False, False), (False, True)])
def test_a_gpus_way_of_rounding_gives_the_codes_of_the_definition(kernels, clips, stochastic):
    u = every_bfloat16_and_the_neighbours_of_midpoints()
    if not clips:
        u = u[u.abs() < 6]
    u = u[:len(u) // 32 * 32].contiguous()
    for seed in range(20 if stochastic else 1):
        seed = torch.tensor([seed])
        got = torch.zeros(len(u) // 2, dtype=torch.uint8)
        call(kernels.round_blocks, u, len(u) // 32, clips, seed if stochastic else None, got)
        want = reference.round_nearest(u)
        if stochastic:
            want = reference.round_stochastic(u, reference.noise(seed, len(u)))
        assert torch.equal(got, code_bytes(want))


def test_every_scale_byte_is_requantised_as_the_definition_says(kernels):
    packed = every_scale_byte()
    M, K = len(packed.codes), 2 * packed.codes.shape[1]
    signs, seeds = reference.draw(packed.codes, packed.codes, 1)
    for stochastic, order, operand_format in itertools.product(
            (False, True), ("before", "none"), (PACKED, MXF4, FP8_RIGHT)):
        columns = empty_operand(K, M, operand_format)
        call(kernels.requantize_transposed, *packed, M, K, signs, seeds, stochastic,
             SIGN_ORDERS.index(order), operand_format, *columns)
        want = reference.requantize_transposed(*packed, signs, seeds, stochastic, order)
        assert is_operand(columns, want, operand_format)


# ---- the quantisers of a GemmSpec

COLUMN_SOURCES = ["quantize_columns.cu", "columns_on_cpu.cpp"]


def column_kernels(folder, spec, square, mistake=None):
    write_translation(folder, mistake)
    flags = column_flags(spec, square)
    return link(folder, compile_missing(folder, COLUMN_SOURCES, flags))


class ColumnOps(NamedTuple):
    """Has the ops of columns.Ops, on simulated kernels."""
    kernels: ctypes.CDLL
    spec: GemmSpec

    def quantize(self, x, x_scales, factor, signs, seed, transposed, dtype, operand_format=0):
        arguments = (self.spec, x, x_scales, transposed, dtype)
        results = columns.quantized_shapes(*arguments, operand_format)
        values, scales, out_factor, mask = (torch.full_like(t, 77) for t in results)
        rows, padded = columns.quantized_shapes(*arguments, PACKED)[0].shape
        k = x.shape[0 if transposed else 1]
        if dtype == torch.uint8:
            padded *= 2
        scratch = torch.full((2 * rows * padded // 32,), 3e38)
        by_row = factor is not None and factor.numel() > 1
        call(self.kernels.quantize, x, x.dtype == torch.bfloat16, x_scales, transposed, rows, k,
             padded, factor, by_row, signs, seed, values, dtype == torch.bfloat16,
             scales if dtype == torch.uint8 else None, operand_format, out_factor, mask, scratch)
        return values, scales, out_factor, mask

    def unrotate(self, product, left, right, mask, signs, dtype):
        out = torch.full_like(product, 77, dtype=dtype)
        call(self.kernels.unrotate, product, product.dtype == torch.bfloat16, *product.shape,
             left, left.numel() > 1, right, right.numel() > 1, mask, signs, out,
             dtype == torch.bfloat16)
        return out


@test_columns.each_quantiser
def test_the_kernels_of_a_gemm_spec_give_the_definitions_bytes(tmp_path, spec, square):
    ops = ColumnOps(column_kernels(tmp_path, spec, square), spec)
    test_columns.check_quantize(ops, spec, square)
    test_columns.check_unrotate(ops, spec)


@pytest.mark.parametrize("spec", [
    pytest.param(spec, id=name) for name, (spec, _) in test_columns.TABLE.items()
    if spec.is_packed])
def test_the_kernels_of_a_gemm_spec_write_fp8_tiles_of_what_is_packed(tmp_path, spec):
    ops = ColumnOps(column_kernels(tmp_path, spec, False), spec)
    for x, scales, factor, transposed, _ in test_columns.packed_cases(((37, 208), (136, 48))):
        for operand_format in (FP8_LEFT, FP8_RIGHT)[:2 if transposed else 1]:
            arguments = (x, scales, factor, test_columns.SIGNS, test_columns.SEED, transposed,
                         torch.uint8)
            *packed, want_factor, want_mask = ops.quantize(*arguments)
            *tiles, got_factor, got_mask = ops.quantize(*arguments, operand_format)
            assert is_operand(tiles, packed, operand_format)
            same([got_factor, got_mask], [want_factor, want_mask])


# ---- the FP8 formats

def untiled(values, rows, right):
    """The values of FP8 tiles [m, k, 128 * 128], without their scales, as a matrix."""
    dtype = torch.float8_e5m2 if right else torch.float8_e4m3fn
    m, k, _ = values.shape
    tiles = values.view(m, k, 128, 8, 16)
    row = torch.arange(128)
    chunks = [tiles[:, :, row, chunk ^ row % 8] for chunk in range(8)]
    matrix = torch.cat(chunks, -1).transpose(1, 2).reshape(128 * m, 128 * k)
    return matrix.view(dtype).double()[:rows]


def pairs_of_exponents(octaves, step):
    """Packed [rows, 128]: in each row two blocks have codes, `distance` octaves apart.

    No quantiser makes the scales 253 and 254, of which 6 is beyond float32.
    """
    pairs = [(largest, largest - distance) for largest in (*range(0, 253, step), 252)
             for distance in range(octaves + 1) if largest >= distance]
    codes = torch.randint(0, 256, (len(pairs), 64), dtype=torch.uint8)
    codes[:, 0] = codes[:, 16] = 0x71           # 6 and .5, which need the window's both ends
    codes[:, 32:] = 0x80                        # Zeros, whose scales are to say nothing.
    scales = torch.full((len(pairs), 4), 254, dtype=torch.uint8)
    scales[:, :2] = torch.tensor(pairs)
    return Packed(codes, scales)


@pytest.mark.parametrize("right, octaves, step", [(False, 15, 1), (True, 29, 25)])
def test_fp8_tiles_hold_blocks_of_15_or_29_octaves_exactly_and_no_more(
        kernels, right, octaves, step):
    torch.manual_seed(0)
    packed = pairs_of_exponents(octaves, step)
    largest, other = (packed.scales[:, i].long() - 127 for i in range(2))
    # The scale of the tile must be a normal number, so that the window ends at -112 - 14.
    fits = other >= largest.clamp_min(-112) - (octaves - 1)
    assert fits.any() and not fits.all()
    if right:                                   # 32 rows share a scale.
        packed = Packed(*(t.repeat_interleave(32, 0) for t in packed))
        fits = fits.repeat_interleave(32)
    rows = len(packed.codes)
    tiles = empty_operand(rows, 128, FP8_RIGHT if right else FP8_LEFT)
    call(kernels.to_fp8_tiles, *packed, rows, 128, right, *tiles)
    scale = tiles[1].flatten()
    scale = (scale.repeat_interleave(32) if right else scale)[:rows, None]
    got = untiled(tiles[0], rows, right) * scale.double()
    exact = reference.dequantize(*packed, torch.float64)
    assert torch.equal((got == exact).all(1), fits)


def test_a_row_of_fp8_holds_its_blocks_of_15_octaves_exactly_and_alpha(kernels):
    torch.manual_seed(0)
    # The blocks of the largest and of another scale. In a long row a thread has two blocks.
    for K, largest, other in ((128, 0, 1), (4800, 0, 149), (4800, 149, 0), (4800, 100, 1)):
        pairs = pairs_of_exponents(14, 1 if K == 128 else 20)
        codes = torch.zeros(len(pairs.codes), K // 32, 16, dtype=torch.uint8)
        scales = torch.full((len(pairs.codes), K // 32), 254, dtype=torch.uint8)
        codes[:, largest], codes[:, other] = pairs.codes[:, :16], pairs.codes[:, 16:32]
        scales[:, largest], scales[:, other] = pairs.scales[:, 0], pairs.scales[:, 1]
        packed = Packed(codes.flatten(1), scales)
        is_normal = packed.scales[:, largest] >= 127 - 112
        packed = Packed(packed.codes[is_normal].contiguous(), packed.scales[is_normal].contiguous())
        rows = len(packed.codes)
        fp8 = full_of_77(rows, K)
        row_scales = torch.full((rows, 1), 77.)
        call(kernels.to_fp8_rows, *packed, rows, K, .75, fp8, row_scales)
        got = fp8.view(torch.float8_e4m3fn).double() * row_scales.double()
        assert torch.equal(got, .75 * reference.dequantize(*packed, torch.float64))


@pytest.mark.parametrize("rows, blocks", [(1, 1), (129, 9), (300, 34)])
def test_plain_scales_are_rearranged_into_the_tiles_of_blackwell(kernels, rows, blocks):
    scales = torch.randint(0, 256, (rows, blocks), dtype=torch.uint8)
    tiles = full_of_77(ceil_div(rows, 128) * ceil_div(blocks, 4) * 512)
    call(kernels.swizzle, scales, rows, blocks, tiles)
    assert torch.equal(tiles, swizzle_scales(scales))


# ---- the other kernels

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("M, K", [(33, 160), (130, 96), (64, 8192)])
def test_the_plain_kernels_give_the_definitions_bytes(kernels, M, K, dtype):
    is_bf16 = dtype == torch.bfloat16
    if K == 8192:
        codes, scales = every_scale_byte()
        mask = torch.randint(-2 ** 31, 2 ** 31, (M, K // 32)).int()
    else:
        codes, scales, mask = expected_forward(M, K, torch.float32, "floor")
    out = torch.zeros(M, K, dtype=dtype)
    call(kernels.dequantize, codes, scales, M, K, out, is_bf16)
    same([out], [reference.dequantize(codes, scales, dtype)])

    d = torch.randn(M, K)
    d[3, 40] = torch.nan
    mask = mask.clone()                 # Other tests read it, too.
    mask[3, 1] = 0
    for d_dtype in (torch.float32, torch.bfloat16):
        d = d.to(d_dtype)
        call(kernels.unrotate, d, d_dtype == torch.bfloat16, mask, M, K, out, is_bf16)
        same([out], [reference.unrotate(d, mask, dtype)])

    scales = torch.where((scales == 253) | (scales == 254), 0, scales)      # 6 of these overflows.
    for right in (False, True):
        tiles = empty_operand(M, K, FP8_RIGHT if right else FP8_LEFT)
        call(kernels.to_fp8_tiles, codes, scales, M, K, right, *tiles)
        same_tiles(tiles, (codes, scales), right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("M, N, K", [(33, 70, 160), (130, 70, 96), (20, 150, 1024)])
def test_the_product_in_fp32_is_exact_where_its_sums_are_and_elsewhere_a_sum_of_fp32(
        kernels, M, N, K, dtype):
    torch.manual_seed(K)

    def product(a, b):
        out = torch.zeros(M, N, dtype=dtype)
        call(kernels.multiply_fp32, *a, *b, M, N, K, ALPHA, out, dtype == torch.bfloat16)
        return out

    a, b = random_packed(M, K), random_packed(N, K)
    assert torch.equal(product(a, b), reference.gemm(*a, *b, ALPHA, dtype))
    a, b = random_at_sizes(M, K, octaves=20), random_at_sizes(N, K, octaves=20)
    exact = reference.gemm(*a, *b, ALPHA, torch.float64)
    error = (product(a, b).double() - exact).abs()
    assert error.le(error_of_a_sum(a, b) + ulp(dtype) * exact.abs()).all()


MATVEC_SHAPES = [(1, 4, 32), (8, 7, 160), (2, 33, 1056), (3, 5, 4096), (7, 1, 96), (5, 18, 2080)]


def matvec_is_right(kernels, M, N, K, dtype):
    torch.manual_seed(K)
    x = Packed(*(tensor[:M].contiguous() for tensor in random_at_sizes(8, K, octaves=20)))
    w = random_at_sizes(N, K, octaves=20)
    w.scales[N // 2, 0] = 255                   # NaN
    y = torch.full((M + 1, N), 77., dtype=dtype)
    call(kernels.matvec, *x, *w, M, N, K, y, dtype == torch.bfloat16)
    same([y[:M]], [reference.matvec(*x, *w, dtype)])
    assert y[:M, N // 2].isnan().all() and not y[:M].isnan().all() or N == 1
    return y[M].eq(77).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("M, N, K", MATVEC_SHAPES)
def test_the_product_of_few_rows_has_the_bits_of_the_definition(kernels, M, N, K, dtype):
    assert matvec_is_right(kernels, M, N, K, dtype)


@pytest.mark.parametrize("right, wrong", [
    ("0x03020100u, 0x0C080604u", "0x03020100u, 0x0C080605u"),
    ("0xF4F8FAFCu", "0xF4F8FAFBu"),
    ("(four_codes >> 1) & 0x4444u", "(four_codes >> 1) & 0x0444u"),
    ("eight_codes[i] >> 16", "eight_codes[i] >> 12"),
    (".25f * float(sum)", ".5f * float(sum)"),
    ("block = lane; block < blocks", "block = lane; block < blocks - 1"),
    ("stride = 1; stride < 32; stride *= 2", "stride = 16; stride > 0; stride /= 2"),
    ("first + min(r, rows - 1)", "first + r * 0"),
    ("x_scale[m] * w_scale[r]", "x_scale[m] * w_scale[0]"),
    ("lane == 0 && r < rows", "lane == 0"),
    ("if (rows > M) {", "if (rows > M + 1) {"),
])
def test_a_mistake_in_the_product_of_few_rows_is_found(base, tmp_path, right, wrong):
    kernels = kernels_with(Mistake("matvec.cu", right, wrong), "matvec.cu", base, tmp_path)

    def is_right(M, N, K):
        try:
            return matvec_is_right(kernels, M, N, K, torch.float32)
        except AssertionError:
            return False

    # One of them has memory behind its last row, which nothing may write to.
    assert not all(is_right(*shape) for shape in MATVEC_SHAPES)


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
