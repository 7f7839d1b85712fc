"""
Tests of Blackwell's GEMMs, fp4/kernels/gemm_sm120.cu and gemm_sm100.cu.

On a Blackwell GPU their instructions run. On another GPU a model of the instructions runs instead
(-DFP4_MODEL: models/mma_mxf4_model.cuh, models/tcgen05_model.cuh), and everything else is the code
that ships. Without a GPU there remain the layouts, the fragments, compilation, and what the
disassembler shows.
"""
import ctypes
import functools
import glob
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fp4 import backend, reference
from fp4.backend import swizzle_scales
from operands import unswizzle

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
has_nvcc = pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc")


def needs_nvcc(test):
    """Marks a test that compiles CUDA, which takes long."""
    return pytest.mark.slow(has_nvcc(test))


needs_gpp = pytest.mark.skipif(not shutil.which("g++"), reason="no g++")


def run(*command, **options):
    process = subprocess.run(command, capture_output=True, text=True, **options)
    output = process.stdout[-3000:] + process.stderr[-3000:]
    assert process.returncode == 0, f"{' '.join(command)}\n{output}"
    return process.stdout + process.stderr


def nvcc(*arguments, root=ROOT):
    return run("nvcc", "-O3", "-std=c++17", "-Werror", "all-warnings", *arguments, cwd=root)


def gencode(target): return f"-gencode=arch=compute_{target},code=sm_{target}"


def ceil_div(n, size): return -(-n // size)


# ---- the layout of scales

ODD = [(1, 1), (3, 5), (127, 4), (128, 3), (129, 9), (300, 34)]


@pytest.mark.parametrize("rows, blocks", ODD)
def test_unswizzling_swizzled_scales_gives_them_back(rows, blocks):
    s = torch.randint(1, 256, (rows, blocks), dtype=torch.uint8)
    assert torch.equal(unswizzle(swizzle_scales(s), rows, blocks), s)
    padding = swizzle_scales(s) == 0
    assert (~padding).sum() == rows * blocks


LAYOUT = '''
#include "scale_tiles.cuh"

extern "C" int64_t index(int64_t row, int64_t block, int64_t blocks) {
  return mxfp4::scale_tile_index(row, block, blocks);
}

extern "C" int64_t size(int64_t rows, int64_t blocks) {
  return mxfp4::scale_tiles_bytes(rows, blocks);
}
'''


@pytest.fixture(scope="session")
def layout(tmp_path_factory):
    """The functions of scale_tiles.cuh, called through ctypes."""
    folder = tmp_path_factory.mktemp("layout")
    source = folder / "layout.cpp"
    source.write_text(LAYOUT)
    kernels = os.path.join(ROOT, "fp4", "kernels")
    run("g++", "-O2", "-shared", "-fPIC", "-I", kernels,
        "-o", str(folder / "layout.so"), str(source))
    library = ctypes.CDLL(str(folder / "layout.so"))
    library.index.argtypes = [ctypes.c_int64] * 3
    library.size.argtypes = [ctypes.c_int64] * 2
    library.index.restype = ctypes.c_int64
    library.size.restype = ctypes.c_int64
    return library


@needs_gpp
@pytest.mark.parametrize("rows, blocks", ODD)
def test_the_kernels_place_of_a_scale_is_the_one_of_the_permutation(layout, rows, blocks):
    s = torch.randint(1, 256, (rows, blocks), dtype=torch.uint8)
    tiles = torch.zeros(layout.size(rows, blocks), dtype=torch.uint8)
    index = [[layout.index(r, c, blocks) for c in range(blocks)] for r in range(rows)]
    tiles[torch.tensor(index)] = s
    assert torch.equal(tiles, swizzle_scales(s))


@needs_gpp
@pytest.mark.parametrize("rows, blocks", ODD)
def test_the_quantisers_threads_write_every_byte_of_the_tiles_once(layout, rows, blocks):
    """In quantize.cu a CUDA block has a tile of 128 rows x 4 blocks (half of it in the forward
    pass) and a thread has one scale, as fp8_tiles.cuh says of its lines and parts."""
    m = ceil_div(rows, 128)
    k = ceil_div(blocks, 4)
    backward = [(128 * i + t // 4, 4 * j + t % 4)
                for i in range(m) for j in range(k) for t in range(512)]
    forward = [(i // k * 64 + t // 4, i % k * 4 + t % 4)
               for i in range(2 * m * k) for t in range(256)]
    every_byte = list(range(layout.size(rows, blocks)))
    for scales in (backward, forward):
        assert sorted(layout.index(r, c, blocks) for r, c in scales) == every_byte


# ---- copies of the sources with a mistake

def mutant(folder, file, old, new):
    """Copies the sources, with one mistake, into a folder."""
    for name in ("fp4/kernels", "tests/models"):
        shutil.copytree(os.path.join(ROOT, name), folder / name)
    text = (folder / file).read_text()
    assert text.count(old) == 1, f"{file} has {text.count(old)} times {old}"
    (folder / file).write_text(text.replace(old, new))
    return folder


# ---- fragments and conversions

def fragments(folder, root=ROOT):
    run("g++", "-std=c++17", "-O1", "tests/models/warp.cpp", "-o", str(folder / "warp"), cwd=root)
    return subprocess.run([folder / "warp"], capture_output=True, text=True)


@needs_gpp
def test_two_models_of_the_fragments_agree(tmp_path):
    process = fragments(tmp_path)
    assert process.returncode == 0
    assert process.stdout.endswith(" 0 different\n"), process.stdout


@needs_gpp
@pytest.mark.parametrize("old, new", [
    ("row % 8 * 4 + thread_a * 2 + row / 8", "row % 8 * 4 + thread_a + row / 8 * 2"),
    ("(i < 2 ? 0 : 1) + (k < 32 ? 0 : 2)", "(i < 2 ? 0 : 2) + (k < 32 ? 0 : 1)"),
    ("8 * (byte_b + half)", "8 * byte_b"),
    ("column * 4 + k % 32 / 8", "column + k % 32 / 8 * 8"),
])
def test_a_wrong_table_would_be_noticed(tmp_path, old, new):
    folder = mutant(tmp_path, "tests/models/mma_mxf4_model.cuh", old, new)
    process = fragments(tmp_path, folder)
    assert process.returncode == 1
    assert not process.stdout.endswith(" 0 different\n"), process.stdout


EVERY_BF16 = torch.arange(65536).to(torch.int16).view(torch.bfloat16).float()

CONVERT = '''
#include <cuda_fp4.h>
#include <cstdio>

int main() {
  for (unsigned i = 0; i < 65536; i++) {
    const unsigned bits = i << 16;
    const float x = reinterpret_cast<const float&>(bits);
    putchar(__nv_cvt_float_to_fp4(x, __NV_E2M1, cudaRoundNearest));
  }
}
'''


@needs_nvcc
def test_the_hardwares_conversion_rounds_every_bf16_as_the_definition_does(tmp_path):
    """NVIDIA's own header models cvt.rn.satfinite.e2m1x2 on a CPU."""
    (tmp_path / "convert.cpp").write_text(CONVERT)
    run("nvcc", "-o", str(tmp_path / "convert"), str(tmp_path / "convert.cpp"))
    process = subprocess.run([tmp_path / "convert"], capture_output=True, check=True)
    codes = torch.frombuffer(bytearray(process.stdout), dtype=torch.uint8)
    numbers = ~EVERY_BF16.isnan()                # a NaN never gets here: its block has no codes
    assert torch.equal(codes[numbers].int(), reference.round_nearest(EVERY_BF16[numbers]))


# ---- the library's route

def nvfp4_values(codes, scales, alpha):
    """Dequantises an MXFP4 matrix by way of NVFP4's scales."""
    scales, tensor_scale = backend.nvfp4_scales(codes, scales, alpha)
    rows, row_bytes = codes.shape
    scales_of_one = torch.full((rows, row_bytes // 16), 127, dtype=torch.uint8)
    values = reference.dequantize(codes, scales_of_one, torch.float64).unflatten(1, (-1, 16))
    return (values * scales.double()[..., None] * tensor_scale.double()).flatten(1)


@pytest.mark.parametrize("octaves, exact", [(18, True), (19, False)])
def test_an_mxfp4_matrix_is_an_nvfp4_matrix_over_18_octaves(octaves, exact):
    codes = torch.randint(0, 256, (70, 96), dtype=torch.uint8)
    scales = torch.randint(60, 60 + octaves, (70, 6), dtype=torch.uint8)
    # A NaN, the scale of a block of zeros, and both ends of the range.
    scales[0] = torch.tensor([255, 254, 60, 60, 60, 59 + octaves], dtype=torch.uint8)
    codes[0, :32] = 0x80
    expected = reference.dequantize(codes, scales, torch.float64)
    result = nvfp4_values(codes, scales, 0.5)
    assert torch.equal(result.nan_to_num(3.), (.5 * expected).nan_to_num(3.)) == exact
    assert torch.equal(result.isnan(), expected.isnan())


@pytest.mark.parametrize("M, N, K", [(1, 1, 32), (33, 40, 96), (256, 128, 64)])
def test_the_library_takes_the_shapes_of_the_operands(M, N, K):
    def operand(rows):
        codes = torch.empty(rows, K // 2, dtype=torch.uint8, device="meta")
        return codes, torch.empty(rows, K // 32, dtype=torch.uint8, device="meta")

    out = backend.gemm_on_nvfp4(*operand(M), *operand(N), 1.0, torch.bfloat16)
    assert out.shape == (M, N)


# ---- compilation

@needs_gpp
@pytest.mark.parametrize("flags", [
    ["-DGEMM_SM90"],
    ["-DGEMM_FP32"],
    ["-DGEMM_MXF4=gemm_sm100"],
    ["-DGEMM_MXF4=gemm_sm120"],
    [],
])
def test_the_bindings_compile_for_every_kind_of_gpu(flags):
    from torch.utils.cpp_extension import include_paths
    includes = [f"-I{path}" for path in include_paths()]
    run("g++", "-std=c++17", "-fsyntax-only", "-DUSE_CUDA", *flags, *includes,
        "fp4/kernels/bind.cpp", cwd=ROOT)


def disassembler():
    """Finds nvdisasm: on the PATH, in the CUDA toolkit, or where pip puts nvidia-cuda-nvdisasm,
    which `make test` installs."""
    folders = [os.environ["PATH"], os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin"]
    for path in sys.path:
        folders += glob.glob(os.path.join(path, "nvidia/*/bin"))
    return shutil.which("nvdisasm", path=os.pathsep.join(folders))


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """A function (file, target) -> the cubin's path, and what ptxas says of each __global__
    function. It compiles everything once a session."""
    folder = tmp_path_factory.mktemp("cubins")

    @functools.cache
    def compile_kernel(file, target):
        cubin = str(folder / f"{file}.{target}")
        output = nvcc("-fmad=false", "-Xptxas", "-v", gencode(target), "-cubin",
                      f"fp4/kernels/{file}.cu", "-o", cubin)
        entries = re.findall(r"Compiling entry function '(\w+)'(.*?Used [^\n]*)", output, re.S)
        return cubin, dict(entries)

    return compile_kernel


# file, target | threads of a CUDA block, and blocks meant to share a multiprocessor |
# how often, at least, each kernel contains an instruction
HOPPER_CODE = {"QGMMA.64x128x32.F32.E4M3.E5M2": 8, "UBLKCP": 1, "UBLKCP.S.G.MULTICAST": 1,
               "UTMALDG.2D": 1, "USETMAXREG": 2}
SM120_CODE = {"OMMA.SF.16864.F32.E2M1.E2M1.E8": 64}
SM100_CODE = {"UTCOMMA": 1, "UTCCP.T.S.4x32dp128bit": 1}
PRODUCTS = [
    ("gemm_sm90", "90a", 384, 1, HOPPER_CODE),
    ("gemm_sm120", "120a", 256, 1, {**SM120_CODE, "LDSM.16.M88.4": 16, "LDGSTS": 3}),
    ("gemm_sm120", "121a", 256, 1, SM120_CODE),
    ("gemm_sm100", "100a", 128, 1,
     {**SM100_CODE, "UTCBAR": 2, "LDTM.x16": 1, "UTMALDG.2D": 2, "UBLKCP": 1}),
    ("gemm_sm100", "103a", 128, 1, SM100_CODE),
]
# name, how many kernels have it, threads of a CUDA block; two blocks share a multiprocessor
QUANTISERS = [
    (r"forward_kernel.*OperandFormat[01]E", 4, 256),
    (r"backward_kernel.*OperandFormat0E", 12, 512),
]


def kernels_that_share():
    for file, target, threads, blocks, _ in PRODUCTS:
        yield pytest.param(file, target, "gemm_kernel", 2, threads, blocks)     # BF16 and FP32 out
    for target in ("100a", "120a"):
        for name, count, threads in QUANTISERS:
            yield "quantize", target, name, count, threads, 2


@needs_nvcc
@pytest.mark.parametrize("file, target, name, count, threads, blocks", list(kernels_that_share()))
def test_the_kernels_meant_to_share_a_multiprocessor_fit_and_spill_nothing(
        compiled, file, target, name, count, threads, blocks):
    """This is about registers; shared memory has a static_assert where it is chosen."""
    _, entries = compiled(file, target)
    reports = [text for function, text in entries.items() if re.search(name, function)]
    assert len(reports) == count
    for text in reports:
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in text
        registers = int(re.search(r"Used (\d+) registers", text)[1])
        registers = ceil_div(registers, 8) * 8            # they are given out by eights
        assert registers * threads * blocks <= 65536


def instructions(cubin, name):
    """Returns the disassembly of each function with that name."""
    tool = disassembler()
    if not tool:
        pytest.skip("no nvdisasm (pip install nvidia-cuda-nvdisasm)")
    section = r"\.section\s+\.text\.(\w+),(.*?)(?=\.section|\Z)"
    sections = re.findall(section, run(tool, cubin), re.S)
    return [text for function, text in sections if re.search(name, function)]


@needs_nvcc
@pytest.mark.parametrize("file, target, least", [
    (file, target, least) for file, target, _, _, least in PRODUCTS])
def test_the_products_are_made_of_the_instructions_meant_and_use_no_local_memory(
        compiled, file, target, least):
    cubin, _ = compiled(file, target)
    listings = instructions(cubin, "gemm_kernel")
    assert len(listings) == 2
    for listing in listings:
        for name, n in least.items():
            assert len(re.findall(r"\s" + re.escape(name), listing)) >= n, name
        # Neither local memory nor another instruction of the tensor cores is used.
        assert not re.search(r"\s(LDL|STL|HMMA|QMMA|IMMA)", listing)


@needs_nvcc
@pytest.mark.parametrize("target", ["100a", "120a"])
def test_blackwells_quantisers_round_by_its_conversion_and_use_no_local_memory(compiled, target):
    cubin, _ = compiled("quantize", target)
    # The formats packed and mxf4; FP8 tiles are Hopper's.
    listings = instructions(cubin, "ward_kernel.*OperandFormat[01]E")
    assert len(listings) == 16
    assert not any(re.search(r"\s(LDL|STL)", listing) for listing in listings)
    # A conversion is of two values. Stochastic rounding has none, a thread with one block of 32 has
    # 16, one with a block of a row and a block of a column 32.
    conversion = r"\sF2FP\.SATFINITE\.E2M1\.F32"
    conversions = [len(re.findall(conversion, listing)) for listing in listings]
    assert sorted(conversions) == [0] * 6 + [16] * 6 + [32] * 4


@needs_nvcc
@pytest.mark.parametrize("kernel, target", [
    ("gemm_sm120", "90a"), ("gemm_sm120", "100a"), ("gemm_sm100", "90a"), ("gemm_sm100", "120a")])
def test_a_kernel_does_not_compile_for_a_gpu_without_its_instruction(kernel, target):
    with pytest.raises(AssertionError, match="not supported|feature"):
        nvcc(gencode(target), "-cubin", f"fp4/kernels/{kernel}.cu", "-o", os.devnull)


# ---- what is said of them

def test_the_predictions_in_the_readme_are_those_of_the_command():
    output = run(sys.executable, "-m", "tools.blackwell_report", "--predict", cwd=ROOT)
    assert output.startswith("predicted, not measured")
    with open(os.path.join(ROOT, "fp4", "README.md")) as file:
        readme = file.read()
    assert f"<!-- predicted -->\n{output}<!-- /predicted -->\n" in readme


# ---- on a GPU

def kernels_for_this_gpu():
    """Returns the target to compile for, and {GEMM that can run here: its flags}."""
    if not (torch.cuda.is_available() and shutil.which("nvcc")):
        return "", {}
    major, minor = torch.cuda.get_device_capability()
    suffix = "a" if major >= 9 else ""
    model = ["-DFP4_MODEL", "-Itests/models"]
    kernels = {
        8: {"gemm_sm120": model},
        9: {"gemm_sm120": model, "gemm_sm100": model},
        10: {"gemm_sm100": []},
        12: {"gemm_sm120": []},
    }
    return f"{major}{minor}{suffix}", kernels.get(major, {})


TARGET, KERNELS = kernels_for_this_gpu()
on_gpu = pytest.mark.skipif(
    not KERNELS, reason="no GPU, or none that runs these kernels or their model")
each_kernel = pytest.mark.parametrize("kernel", KERNELS or ["gemm_sm120", "gemm_sm100"])
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def compile_gemm(kernel, out, root=ROOT, shared=True):
    kind = ["-shared", "-Xcompiler", "-fPIC"] if shared else []
    nvcc(gencode(TARGET), f"-DGEMM={kernel}", *KERNELS[kernel], "tests/models/blackwell.cu",
         f"fp4/kernels/{kernel}.cu", "fp4/kernels/scale_tiles.cu", *kind, "-o", str(out), root=root)
    return str(out)


def as_c_argument(x):
    if isinstance(x, torch.Tensor):
        return ctypes.c_void_p(x.data_ptr())
    if isinstance(x, bool):
        return ctypes.c_bool(x)
    if isinstance(x, float):
        return ctypes.c_float(x)
    return ctypes.c_int64(x)


class Library:
    """The functions of models/blackwell.cu."""

    def __init__(self, path):
        self.library = ctypes.CDLL(path)
        for function in (self.library.gemm, self.library.swizzle, self.library.convert):
            function.restype = ctypes.c_char_p

    def call(self, name, *arguments):
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        message = getattr(self.library, name)(*map(as_c_argument, arguments), stream).decode()
        assert message == "no error", message

    def swizzle(self, scales):
        rows, blocks = scales.shape
        size = ceil_div(rows, 128) * ceil_div(blocks, 4) * 512
        tiles = torch.full((size,), 77, dtype=torch.uint8, device="cuda")
        self.call("swizzle", scales, rows, blocks, tiles)
        return tiles

    def gemm(self, a, a_scales, b, b_scales, alpha, dtype):
        """Multiplies with the padding of the scales poisoned (255 is NaN). Nothing beside the
        result may change."""
        M = a.shape[0]
        N = b.shape[0]
        K = 2 * a.shape[1]
        tiles = []
        for scales in (a_scales, b_scales):
            padding = swizzle_scales(torch.ones_like(scales)) == 0
            tiles.append(torch.where(padding, 255, self.swizzle(scales)))
        out = torch.full((M * N + 64,), 12345.0, dtype=dtype, device="cuda")
        self.call("gemm", a, tiles[0], b, tiles[1], M, N, K, alpha, out[32:],
                  dtype == torch.bfloat16)
        torch.cuda.synchronize()
        assert (out[:32] == out[0]).all()
        assert (out[-32:] == out[0]).all()
        assert out[0] == torch.tensor(12345.0, dtype=dtype)
        return out[32:-32].view(M, N)


@pytest.fixture(scope="session")
def libraries(tmp_path_factory):
    """{kernel: Library}"""
    folder = tmp_path_factory.mktemp("blackwell")

    def load(kernel):
        return Library(compile_gemm(kernel, folder / f"{kernel}.so"))

    with ThreadPoolExecutor() as pool:
        return dict(zip(KERNELS, pool.map(load, KERNELS)))


def packed(rows, K, low, high):
    """Returns random codes, and scale bytes low .. high."""
    codes = torch.randint(0, 256, (rows, K // 2), dtype=torch.uint8, device="cuda")
    scales = torch.randint(low, high + 1, (rows, K // 32), device="cuda").to(torch.uint8)
    return codes, scales


SHAPES = [(1, 1, 32), (1, 96, 64), (40, 1, 96), (33, 64, 160), (128, 256, 256), (257, 129, 672),
          (130, 300, 1376), (300, 520, 1024)]
ALPHA = torch.tensor(16 / 9).item()                       # a float32


@on_gpu
@each_kernel
@each_dtype
@pytest.mark.parametrize("M, N, K", SHAPES)
def test_a_product_whose_sums_are_exact_equals_the_definition(libraries, kernel, M, N, K, dtype):
    torch.manual_seed(K)
    # With these scales the sums stay below 2^24 times the smallest product.
    a = packed(M, K, 126, 128)
    b = packed(N, K, 125, 127)
    result = libraries[kernel].gemm(*a, *b, ALPHA, dtype)
    assert torch.equal(result, reference.gemm(*a, *b, ALPHA, dtype))


def largest_error(library, M, N, K, dtype):
    """Returns the largest error of a product whose scales span 40 octaves, as a share of what its
    sums may lose: each instruction truncates to FP32, twice at most by half a block, and the result
    is rounded once."""
    a = packed(M, K, 107, 147)
    b = packed(N, K, 90, 130)
    result = library.gemm(*a, *b, ALPHA, dtype).double()
    exact = reference.gemm(*a, *b, ALPHA, torch.float64)
    a_size = reference.dequantize(*a, torch.float64).abs()
    b_size = reference.dequantize(*b, torch.float64).abs()
    size = ALPHA * a_size @ b_size.T
    ulp = 2 ** -24 if dtype == torch.float32 else 2 ** -8
    allowed = (K // 64 + 2) * 2 ** -23 * size + ulp * exact.abs()
    share = (result - exact).abs() / allowed
    return torch.where(share.isnan(), torch.inf, share).max().item()


@on_gpu
@each_kernel
@each_dtype
@pytest.mark.parametrize("M, N, K", SHAPES)
def test_a_product_is_within_the_error_of_its_truncated_sums(libraries, kernel, M, N, K, dtype):
    torch.manual_seed(K)
    assert largest_error(libraries[kernel], M, N, K, dtype) <= 1


@on_gpu
@each_kernel
def test_the_scales_at_both_ends_are_powers_of_two(libraries, kernel):
    a = packed(50, 96, 127, 127)
    b = packed(70, 96, 127, 127)
    expected = reference.gemm(*a, *b, 1.0, torch.float32)
    a[1].fill_(0)                                         # 2^-127
    b[1].fill_(254)                                       # 2^127
    assert torch.equal(libraries[kernel].gemm(*a, *b, 1.0, torch.float32), expected)
    assert torch.equal(libraries[kernel].gemm(*b, *a, 1.0, torch.float32), expected.T)


@on_gpu
@each_kernel
def test_a_nan_scale_makes_its_row_nan_and_nothing_else(libraries, kernel):
    a = packed(150, 160, 126, 128)
    b = packed(70, 160, 126, 128)
    expected = reference.gemm(*a, *b, 1.0, torch.float32)
    a[1][140, 4] = 255
    b[1][3, 0] = 255
    expected[140] = torch.nan
    expected[:, 3] = torch.nan
    result = libraries[kernel].gemm(*a, *b, 1.0, torch.float32)
    assert torch.equal(result.isnan(), expected.isnan())
    assert torch.equal(result.nan_to_num(0.), expected.nan_to_num(0.))


@on_gpu
@each_kernel
def test_a_product_runs_on_the_stream_given(libraries, kernel):
    a = packed(64, 4096, 126, 128)
    b = packed(64, 4096, 126, 128)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(10 ** 8)                # the operands come late, on this stream only
        late = [t.clone() for t in (*a, *b)]
        result = libraries[kernel].gemm(*late, 1.0, torch.float32)
    assert torch.equal(result, reference.gemm(*a, *b, 1.0, torch.float32))


@on_gpu
@pytest.mark.parametrize("rows, blocks", ODD)
def test_the_swizzle_kernel_makes_the_tiles(libraries, rows, blocks):
    s = torch.randint(1, 256, (rows, blocks), dtype=torch.uint8, device="cuda")
    assert torch.equal(next(iter(libraries.values())).swizzle(s), swizzle_scales(s))


RUN_WITH_PRODUCT = '''
import dataclasses
import sys

import fp4
import fp4.backend
import pytest

CAPABILITY = {"gemm_sm100": (10, 0), "gemm_sm120": (12, 0)}
own = fp4.backend.select_backend(CAPABILITY["@kernel"], "own")
own = dataclasses.replace(own, target="@target")
fp4.backend.select_backend = lambda capability, gemm="auto": own
failed = pytest.main(["-q", "-x", "tests/test_kernels.py", "tests/test_gpu.py",
                      "-k", "cuda and not run_falls_out"])
assert fp4.build().operand_format == "mxf4"
sys.exit(failed)
'''


@on_gpu
@each_kernel
def test_every_op_and_a_layer_use_the_product_as_they_use_hoppers(tmp_path, kernel):
    """Runs test_kernels.py and test_gpu.py on this GPU, in a copy of the sources that is built with
    this GEMM."""
    ignore = shutil.ignore_patterns("build", "__pycache__")
    for folder in ("fp4", "data", "tools", "tests"):
        shutil.copytree(os.path.join(ROOT, folder), tmp_path / folder, ignore=ignore)
    for file in ("model.py", "quartet.py"):
        shutil.copy(os.path.join(ROOT, file), tmp_path / file)
    script = RUN_WITH_PRODUCT.replace("@kernel", kernel).replace("@target", TARGET)
    (tmp_path / "run.py").write_text(script)
    flags = " ".join(flag.replace("-I", f"-I{tmp_path}/") for flag in KERNELS[kernel])
    output = run(sys.executable, "run.py", cwd=tmp_path,
                 env={**os.environ, "NVCC_APPEND_FLAGS": flags})
    assert "passed" in output


SM120 = "fp4/kernels/gemm_sm120.cu"
SM100 = "fp4/kernels/gemm_sm100.cu"
MUTANTS = [
    # The second 64 of K would take the scales of the first.
    ("gemm_sm120", SM120,
     """2 * half, i % 2,                           // byte_a, thread_a
                 2 * half, j % 4);""",
     """0, i % 2,
                 0, j % 4);"""),
    # Rows 16 .. 31 of each 32 would take the scales of the rows 0 .. 15.
    ("gemm_sm120", SM120, "2 * half, i % 2, ", "2 * half, 0, "),
    ("gemm_sm120", SM120, "(8 * q + g) * 16", "(4 * g + q) * 16"),
    ("gemm_sm120", SM120, "  words[0] &= mask;\n  words[1] &= mask;\n", ""),
    ("gemm_sm120", SM120,
     """lane / 16 * 8,
                                             2 * half + lane / 8 % 2""",
     """lane / 8 % 2 * 8,
                                             2 * half + lane / 16"""),
    ("gemm_sm120", SM120, "i < (BM + BN) * CHUNKS;", "i < (BM + BN) * CHUNKS - 4;"),
    ("gemm_sm100", SM100, "scale_byte = i % 2 * 2;", "scale_byte = 0;"),
    ("gemm_sm100", SM100, "8 * half + 4 * (row - 1)", "8 * half"),
    ("gemm_sm100", SM100, "step == tile.steps - 1 && tile.K % 64", "false"),
    ("gemm_sm100", SM100, "step > 0 || i > 0);", "true);"),
    ("gemm_sm100", SM100, "stage + B_CODES + 32 * i", "stage + B_CODES"),
    ("gemm_sm100", "fp4/kernels/ptx/tcgen05.cuh",
     "shared_descriptor(address, 1024, 2)", "shared_descriptor(address, 512, 2)"),
]


@pytest.mark.parametrize("i", range(len(MUTANTS)))
def test_the_list_of_mistakes_is_up_to_date(tmp_path, i):
    mutant(tmp_path, *MUTANTS[i][1:])


@on_gpu
def test_a_mistake_in_a_kernel_would_be_noticed(tmp_path):
    mutants = [m for m in MUTANTS if m[0] in KERNELS]

    def compile_mutant(i):
        kernel, *mistake = mutants[i]
        return compile_gemm(kernel, tmp_path / f"{i}.so", mutant(tmp_path / str(i), *mistake))

    with ThreadPoolExecutor() as pool:
        paths = list(pool.map(compile_mutant, range(len(mutants))))
    for path, (_, file, old, new) in zip(paths, mutants):
        torch.manual_seed(0)
        a = packed(300, 1376, 126, 128)
        b = packed(200, 1376, 126, 128)
        result = Library(path).gemm(*a, *b, 1.0, torch.float32)
        correct = reference.gemm(*a, *b, 1.0, torch.float32)
        assert not torch.equal(result, correct), f"{file}: {old} -> {new}"


@on_gpu
@each_kernel
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_compute_sanitizer_finds_nothing(tmp_path_factory, kernel, tool):
    if not shutil.which("compute-sanitizer"):
        pytest.skip("no compute-sanitizer")
    program = tmp_path_factory.getbasetemp() / f"{kernel}-program"
    if not program.exists():
        compile_gemm(kernel, program, shared=False)
    output = run("compute-sanitizer", "--tool", tool, "--error-exitcode", "3", str(program))
    assert "differ" in output


HAS_CONVERSION = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (10, 0)


@on_gpu
@pytest.mark.skipif(not HAS_CONVERSION, reason="only Blackwell has the conversion")
def test_the_conversion_instruction_rounds_every_bf16_as_the_definition_does(libraries):
    pairs = torch.zeros(65536, dtype=torch.uint8, device="cuda")
    next(iter(libraries.values())).call("convert", pairs)
    pairs = pairs.cpu()
    numbers = ~EVERY_BF16.isnan()
    values = EVERY_BF16[numbers]
    assert torch.equal((pairs & 15)[numbers].int(), reference.round_nearest(values))
    assert torch.equal((pairs >> 4)[numbers].int(), reference.round_nearest(-values))
