"""
Blackwell's products, fp4/gemm_sm120.cu and gemm_sm100.cu. On a Blackwell GPU their instructions run; on another GPU a model of
them does (-DFP4_MODEL: mma_mxf4_model.cuh, tcgen05_model.cuh) and everything else is the code that ships; without a GPU remain
the layouts, the fragments, compilation and what the disassembler shows.
"""
import ctypes, functools, glob, os, re, shutil, subprocess, sys, types
from concurrent.futures import ThreadPoolExecutor
import pytest, torch
from fp4 import nvfp4, product, reference
from fp4.nvfp4 import swizzle

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")
TARGETS = {"gemm_sm120": ("120a", "121a"), "gemm_sm100": ("100a", "103a")}
needs_nvcc = pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc")
needs_gpp = pytest.mark.skipif(not shutil.which("g++"), reason="no g++")


def run(*command, **how):
    done = subprocess.run(command, capture_output=True, text=True, **how)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout + done.stderr


def nvcc(*arguments, root=ROOT):
    return run("nvcc", "-O3", "-std=c++17", "-Werror", "all-warnings", *arguments, cwd=root)


def gencode(target): return f"-gencode=arch=compute_{target},code=sm_{target}"


# ---- the layout of scales

def unswizzle(tiles, rows, blocks):
    s = tiles.view(-(-rows // 128), -(-blocks // 4), 32, 4, 4).permute(0, 3, 2, 1, 4)
    return s.flatten(0, 2).flatten(1)[:rows, :blocks]


ODD = [(1, 1), (3, 5), (127, 4), (128, 3), (129, 9), (300, 34)]


@pytest.mark.parametrize("rows, blocks", ODD)
def test_unswizzling_swizzled_scales_gives_them_back(rows, blocks):
    s = torch.randint(1, 256, (rows, blocks), dtype=torch.uint8)
    assert torch.equal(unswizzle(swizzle(s), rows, blocks), s)
    assert (swizzle(s) > 0).sum() == rows * blocks                         # all else is padding


@pytest.fixture(scope="session")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layout")
    (folder / "layout.cpp").write_text('''#include "scale_tiles.cuh"
        extern "C" int64_t place(int64_t r, int64_t c, int64_t blocks) { return mxfp4::tiled(r, c, blocks); }
        extern "C" int64_t size(int64_t rows, int64_t blocks) { return mxfp4::tiled_bytes(rows, blocks); }''')
    run("g++", "-O2", "-shared", "-fPIC", "-I", os.path.join(ROOT, "fp4"), "-o", str(folder / "layout.so"), str(folder / "layout.cpp"))
    library = ctypes.CDLL(str(folder / "layout.so"))
    library.place.restype = library.size.restype = ctypes.c_int64
    library.place.argtypes, library.size.argtypes = [ctypes.c_int64] * 3, [ctypes.c_int64] * 2
    return library


@needs_gpp
@pytest.mark.parametrize("rows, blocks", ODD)
def test_the_kernels_place_of_a_scale_is_the_one_of_the_permutation(places, rows, blocks):
    s = torch.randint(1, 256, (rows, blocks), dtype=torch.uint8)
    tiles = torch.zeros(places.size(rows, blocks), dtype=torch.uint8)
    at = torch.tensor([[places.place(r, c, blocks) for c in range(blocks)] for r in range(rows)])
    tiles[at] = s
    assert torch.equal(tiles, swizzle(s))


@needs_gpp
@pytest.mark.parametrize("rows, blocks", ODD)
def test_the_quantisers_threads_write_every_byte_of_the_tiles_once(places, rows, blocks):
    """quantize.cu: a CUDA block has a tile of 128 rows x 4 blocks (forward: half of it), a thread a scale, as tiles.cuh says of its lines and parts"""
    m, k = -(-rows // 128), -(-blocks // 4)
    backward = [(128 * i + t // 4, 4 * j + t % 4) for i in range(m) for j in range(k) for t in range(512)]
    forward = [(i // k * 64 + t // 4, i % k * 4 + t % 4) for i in range(2 * m * k) for t in range(256)]
    for threads in (backward, forward):
        assert sorted(places.place(r, c, blocks) for r, c in threads) == list(range(places.size(rows, blocks)))


# ---- fragments and conversions

def fragments(folder, root=ROOT):
    run("g++", "-std=c++20", "-O2", "-pthread", "tests/warp.cpp", "-o", str(folder / "warp"), cwd=root)
    return subprocess.run([folder / "warp"], capture_output=True, text=True)


@needs_gpp
def test_two_models_of_the_fragments_agree(tmp_path):
    done = fragments(tmp_path)
    assert done.returncode == 0 and done.stdout.endswith(" 0 different\n"), done.stdout


@needs_gpp
@pytest.mark.parametrize("old, new", [
    ("row % 8 * 4 + thread_a * 2 + row / 8", "row % 8 * 4 + thread_a + row / 8 * 2"),
    ("(i < 2 ? 0 : 1) + (k < 32 ? 0 : 2)", "(i < 2 ? 0 : 2) + (k < 32 ? 0 : 1)"),
    ("8 * (byte_b + half)", "8 * byte_b"),
    ("column * 4 + k % 32 / 8", "column + k % 32 / 8 * 8"),
])
def test_a_wrong_table_would_be_noticed(tmp_path, old, new):
    done = fragments(tmp_path, mutant(tmp_path, "tests/mma_mxf4_model.cuh", old, new))
    assert done.returncode == 1 and not done.stdout.endswith(" 0 different\n"), done.stdout


EVERY_BF16 = torch.arange(65536).to(torch.int16).view(torch.bfloat16).float()


@needs_nvcc
def test_the_hardwares_conversion_rounds_every_bf16_as_the_definition_does(tmp_path):
    """cvt.rn.satfinite.e2m1x2 as NVIDIA's own header models it on a CPU"""
    (tmp_path / "convert.cu").write_text('''#include <cuda_fp4.h>
        #include <cstdio>
        int main() {
          for (unsigned i = 0; i < 65536; i++) {
            const unsigned bits = i << 16;
            putchar(__nv_cvt_float_to_fp4(reinterpret_cast<const float&>(bits), __NV_E2M1, cudaRoundNearest));
          }
        }''')
    run("nvcc", "-o", str(tmp_path / "convert"), str(tmp_path / "convert.cu"))
    codes = torch.frombuffer(bytearray(subprocess.run([tmp_path / "convert"], capture_output=True, check=True).stdout), dtype=torch.uint8)
    numbers = ~EVERY_BF16.isnan()                                          # a NaN never gets here: its block has no codes
    assert torch.equal(codes[numbers].int(), reference.round_nearest(EVERY_BF16[numbers]))


# ---- the library's route

def nvfp4_values(codes, scales, alpha):
    scales, tensor = nvfp4.convert(codes, scales, alpha)
    ones = reference.dequantize(codes, torch.full((codes.shape[0], codes.shape[1] // 16), 127, dtype=torch.uint8), torch.float64)
    return (ones.unflatten(1, (-1, 16)) * scales.double()[..., None] * tensor.double()).flatten(1)


@pytest.mark.parametrize("octaves, exact", [(18, True), (19, False)])
def test_an_mxfp4_matrix_is_an_nvfp4_matrix_over_18_octaves(octaves, exact):
    codes = torch.randint(0, 256, (70, 96), dtype=torch.uint8)
    scales = torch.randint(60, 60 + octaves, (70, 6), dtype=torch.uint8)
    scales[0], codes[0, :32] = torch.tensor([255, 254, 60, 60, 60, 59 + octaves], dtype=torch.uint8), 0x80     # NaN; a zero block's scale
    want = reference.dequantize(codes, scales, torch.float64)
    got = nvfp4_values(codes, scales, 0.5)
    assert torch.equal(got.nan_to_num(3.), (.5 * want).nan_to_num(3.)) == exact
    assert torch.equal(got.isnan(), want.isnan())


@pytest.mark.parametrize("M, N, K", [(1, 1, 32), (33, 40, 96), (256, 128, 64)])
def test_the_library_takes_the_shapes_of_the_operands(M, N, K):
    operand = lambda rows: (torch.empty(rows, K // 2, dtype=torch.uint8, device="meta"), torch.empty(rows, K // 32, dtype=torch.uint8, device="meta"))
    assert nvfp4.gemm(*operand(M), *operand(N), 1.0, torch.bfloat16).shape == (M, N)


# ---- compilation

@needs_gpp
@pytest.mark.parametrize("flags", [["-DGEMM_SM90"], ["-DGEMM_PLAIN"], ["-DGEMM_MXF4=gemm_sm100"], ["-DGEMM_MXF4=gemm_sm120"], []])
def test_the_bindings_compile_for_every_kind_of_gpu(flags):
    from torch.utils.cpp_extension import include_paths
    run("g++", "-std=c++17", "-fsyntax-only", "-DUSE_CUDA", *flags, *(f"-I{path}" for path in include_paths()), "fp4/bind.cpp", cwd=ROOT)


@pytest.mark.parametrize("capability, gemm, files, name", [
    ((7, 5), "fp8", ["gemm_plain.cu"], None), ((9, 0), "fp8", ["gemm_sm90.cu"], None), ((9, 0), "own", ["gemm_sm90.cu"], None), ((8, 0), "own", [], "gemm_bf16"), ((8, 9), "own", [], "gemm_fp8"),
    ((10, 3), "fp8", [], "gemm_fp8"), ((10, 0), "own", ["gemm_sm100.cu", "swizzle.cu"], None), ((12, 1), "own", ["gemm_sm120.cu", "swizzle.cu"], None),
    ((12, 0), "library", [], "gemm"), ((10, 0), "library", [], "gemm")])
def test_each_gpu_has_its_product(capability, gemm, files, name, monkeypatch):
    registered = []
    monkeypatch.setattr(product, "GEMM", gemm)
    monkeypatch.setattr(product, "FORMAT", "packed")
    said = product.choose(capability, types.SimpleNamespace(impl=lambda op, f, device: registered.append((op, f.__name__, device))))
    assert product.own(capability)[0] == files and registered == [("gemm", name, "CUDA")] * bool(name)
    assert product.FORMAT == ("packed" if not files or capability < (8, 0) else "fp8" if capability == (9, 0) else "mxf4")
    assert ("FP4 tensor cores" in said) == (gemm != "fp8" and capability[0] >= 10)


def disassembler():
    """on the PATH, in the CUDA toolkit, or where pip install nvidia-cuda-nvdisasm puts it: make test does"""
    places = [os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin", *(p for at in sys.path for p in glob.glob(os.path.join(at, "nvidia/*/bin")))]
    return shutil.which("nvdisasm", path=os.pathsep.join([os.environ["PATH"], *places]))


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """(file, target) -> the cubin, and of each __global__ function what ptxas says; once a session"""
    folder = tmp_path_factory.mktemp("cubins")
    @functools.cache
    def compiled(file, target):
        cubin = str(folder / f"{file}.{target}")
        said = nvcc("-fmad=false", "-Xptxas", "-v", gencode(target), "-cubin", f"fp4/{file}.cu", "-o", cubin)
        return cubin, dict(re.findall(r"Compiling entry function '(\w+)'(.*?Used [^\n]*)", said, re.S))
    return compiled


# file, target | a CUDA block's threads, and blocks meant to share a multiprocessor | in each kernel at least so many instructions
PRODUCTS = [
    ("gemm_sm90", "90a", 384, 1, {"QGMMA.64x128x32.F32.E4M3.E5M2": 8, "UBLKCP": 1, "UBLKCP.S.G.MULTICAST": 1, "UTMALDG.2D": 1, "USETMAXREG": 2}),
    ("gemm_sm120", "120a", 256, 1, {"OMMA.SF.16864.F32.E2M1.E2M1.E8": 64, "LDSM.16.M88.4": 16, "LDGSTS": 3}),
    ("gemm_sm120", "121a", 256, 1, {"OMMA.SF.16864.F32.E2M1.E2M1.E8": 64}),
    ("gemm_sm100", "100a", 128, 1, {"UTCOMMA": 1, "UTCCP.T.S.4x32dp128bit": 1, "UTCBAR": 2, "LDTM.x16": 1, "UTMALDG.2D": 2, "UBLKCP": 1}),
    ("gemm_sm100", "103a", 128, 1, {"UTCOMMA": 1, "UTCCP.T.S.4x32dp128bit": 1}),
]


@needs_nvcc
@pytest.mark.parametrize("file, target, name, kernels, threads, blocks", [
    *((file, target, "gemm_kernel", 2, threads, blocks) for file, target, threads, blocks, _ in PRODUCTS),                 # BF16 and FP32 out
    *(("quantize", target, name, kernels, threads, 2) for target in ("100a", "120a") for name, kernels, threads in ((r"forward_kernel.*Format[01]E", 4, 256), (r"backward_kernel.*Format0E", 12, 512))),
])
def test_the_kernels_meant_to_share_a_multiprocessor_fit_and_spill_nothing(compiled, file, target, name, kernels, threads, blocks):
    """registers; shared memory has a static_assert where it is chosen"""
    said = [text for function, text in compiled(file, target)[1].items() if re.search(name, function)]
    assert len(said) == kernels
    for text in said:
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in text
        registers = -(-int(re.search(r"Used (\d+) registers", text)[1]) // 8) * 8                       # they are given out by eights
        assert registers * threads * blocks <= 65536


def instructions(cubin, name):
    """the disassembly of each function with that name"""
    tool = disassembler()
    if not tool: pytest.skip("no nvdisasm (pip install nvidia-cuda-nvdisasm)")
    return [text for function, text in re.findall(r"\.section\s+\.text\.(\w+),(.*?)(?=\.section|\Z)", run(tool, cubin), re.S) if re.search(name, function)]


@needs_nvcc
@pytest.mark.parametrize("file, target, _, __, least", PRODUCTS)
def test_the_products_are_made_of_the_instructions_meant_and_use_no_local_memory(compiled, file, target, _, __, least):
    codes = instructions(compiled(file, target)[0], "gemm_kernel")
    assert len(codes) == 2
    for code in codes:
        for name, n in least.items(): assert len(re.findall(r"\s" + re.escape(name), code)) >= n, name
        assert not re.search(r"\s(LDL|STL|HMMA|QMMA|IMMA)", code)         # nor another tensor core instruction


@needs_nvcc
@pytest.mark.parametrize("target", ["100a", "120a"])
def test_blackwells_quantisers_round_by_its_conversion_and_use_no_local_memory(compiled, target):
    codes = instructions(compiled("quantize", target)[0], "ward_kernel.*Format[01]E")      # packed and mxf4; FP8 tiles are Hopper's
    assert len(codes) == 16 and not any(re.search(r"\s(LDL|STL)", code) for code in codes)
    conversions = [len(re.findall(r"\sF2FP\.SATFINITE\.E2M1\.F32", code)) for code in codes]         # of two values
    assert sorted(conversions) == [0] * 6 + [16] * 6 + [32] * 4            # stochastic; one block of 32 a thread; one of a row and one of a column


@needs_nvcc
def test_a_kernel_does_not_compile_for_a_gpu_without_its_instruction(tmp_path):
    for kernel, target in (("gemm_sm120", "90a"), ("gemm_sm120", "100a"), ("gemm_sm100", "90a"), ("gemm_sm100", "120a")):
        with pytest.raises(AssertionError, match="not supported|feature"):
            nvcc(gencode(target), "-cubin", f"fp4/{kernel}.cu", "-o", os.devnull)


# ---- what is said of them

def test_the_predictions_in_the_readme_are_those_of_the_command():
    said = run(sys.executable, "tests/blackwell_report.py", "--predict", cwd=ROOT)
    assert said.startswith("predicted, not measured") and f"<!-- predicted -->\n{said}<!-- /predicted -->\n" in open(os.path.join(ROOT, "README.md")).read()


# ---- on a GPU

def kernels():
    """what can run here: the target to compile for, and each product with its flags"""
    if not (torch.cuda.is_available() and shutil.which("nvcc")): return "", {}
    major, minor = torch.cuda.get_device_capability()
    model = ["-DFP4_MODEL", "-Itests"]
    return f"{major}{minor}" + "a" * (major >= 9), {
        8: {"gemm_sm120": model}, 9: {"gemm_sm120": model, "gemm_sm100": model}, 10: {"gemm_sm100": []}, 12: {"gemm_sm120": []},
    }.get(major, {})


TARGET, KERNELS = kernels()
on_gpu = pytest.mark.skipif(not KERNELS, reason="no GPU, or none that runs these kernels or their model")
each_kernel = pytest.mark.parametrize("kernel", KERNELS or ["gemm_sm120", "gemm_sm100"])


def build(kernel, out, root=ROOT, shared=True):
    nvcc(gencode(TARGET), f"-DGEMM={kernel}", *KERNELS[kernel], "tests/blackwell.cu", f"fp4/{kernel}.cu", "fp4/swizzle.cu",
         *["-shared", "-Xcompiler", "-fPIC"] * shared, "-o", str(out), root=root)
    return str(out)


def mutant(folder, file, old, new):
    """a copy of the sources with one mistake"""
    for name in ("fp4", "tests"):
        os.makedirs(folder / name)
        for path in glob.glob(os.path.join(ROOT, name, "*.c*")) + glob.glob(os.path.join(ROOT, name, "*.h")):
            shutil.copy(path, folder / name)
    text = (folder / file).read_text()
    assert text.count(old) == 1, f"{file} has {text.count(old)} times {old}"
    (folder / file).write_text(text.replace(old, new))
    return folder


class Library:
    def __init__(self, path):
        self.library = ctypes.CDLL(path)
        for f in (self.library.gemm, self.library.swizzle, self.library.convert): f.restype = ctypes.c_char_p

    def call(self, name, *arguments):
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        wrap = lambda x: (ctypes.c_void_p(x.data_ptr()) if isinstance(x, torch.Tensor) else ctypes.c_bool(x) if isinstance(x, bool)
                          else ctypes.c_float(x) if isinstance(x, float) else ctypes.c_int64(x))
        said = getattr(self.library, name)(*map(wrap, arguments), stream).decode()
        assert said == "no error", said

    def swizzle(self, scales):
        rows, blocks = scales.shape
        tiles = torch.full((-(-rows // 128) * -(-blocks // 4) * 512,), 77, dtype=torch.uint8, device="cuda")
        self.call("swizzle", scales, rows, blocks, tiles)
        return tiles

    def gemm(self, a, a_scales, b, b_scales, alpha, dtype, poison=255):
        """the product; the padding of the scales is poisoned, and nothing beside the result may change"""
        M, N, K = a.shape[0], b.shape[0], 2 * a.shape[1]
        tiles = []
        for scales in (a_scales, b_scales):
            padding = swizzle(torch.ones_like(scales)) == 0
            tiles.append(torch.where(padding, poison, self.swizzle(scales)))
        out = torch.full((M * N + 64,), 12345.0, dtype=dtype, device="cuda")
        self.call("gemm", a, tiles[0], b, tiles[1], M, N, K, alpha, out[32:], dtype == torch.bfloat16)
        torch.cuda.synchronize()
        assert (out[:32] == out[0]).all() and (out[-32:] == out[0]).all() and out[0] == torch.tensor(12345.0, dtype=dtype)
        return out[32:-32].view(M, N)


@pytest.fixture(scope="session")
def libraries(tmp_path_factory):
    folder = tmp_path_factory.mktemp("blackwell")
    with ThreadPoolExecutor() as pool:
        return dict(zip(KERNELS, pool.map(lambda k: Library(build(k, folder / f"{k}.so")), KERNELS)))


def packed(rows, K, low, high):
    """random codes, and scale bytes low .. high"""
    return (torch.randint(0, 256, (rows, K // 2), dtype=torch.uint8, device="cuda"),
            torch.randint(low, high + 1, (rows, K // 32), device="cuda").to(torch.uint8))


SHAPES = [(1, 1, 32), (1, 96, 64), (40, 1, 96), (33, 64, 160), (128, 256, 256), (257, 129, 672), (130, 300, 1376), (300, 520, 1024)]
ALPHA = torch.tensor(16 / 9).item()                                        # a float32


@on_gpu
@each_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("M, N, K", SHAPES)
def test_a_product_whose_sums_are_exact_equals_the_definition(libraries, kernel, M, N, K, dtype):
    torch.manual_seed(K)
    a, b = packed(M, K, 126, 128), packed(N, K, 125, 127)                  # sums below 2^24 times the smallest product
    got = libraries[kernel].gemm(*a, *b, ALPHA, dtype)
    assert torch.equal(got, reference.gemm(*a, *b, ALPHA, dtype))


def wide(library, M, N, K, dtype):
    """the largest error of a product with scales over 40 octaves, as a share of what its sums may lose: each instruction truncates
    to FP32, twice at most by half a block, and the result is rounded once"""
    a, b = packed(M, K, 107, 147), packed(N, K, 90, 130)
    got = library.gemm(*a, *b, ALPHA, dtype).double()
    exact = reference.gemm(*a, *b, ALPHA, torch.float64)
    size = ALPHA * reference.dequantize(*a, torch.float64).abs() @ reference.dequantize(*b, torch.float64).abs().T
    ulp = 2 ** -24 if dtype == torch.float32 else 2 ** -8
    share = (got - exact).abs() / ((K // 64 + 2) * 2 ** -23 * size + ulp * exact.abs())
    return torch.where(share.isnan(), torch.inf, share).max().item()


@on_gpu
@each_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("M, N, K", SHAPES)
def test_a_product_is_within_the_error_of_its_truncated_sums(libraries, kernel, M, N, K, dtype):
    torch.manual_seed(K)
    assert wide(libraries[kernel], M, N, K, dtype) <= 1


@on_gpu
@each_kernel
def test_the_scales_at_both_ends_are_powers_of_two(libraries, kernel):
    a, b = packed(50, 96, 127, 127), packed(70, 96, 127, 127)
    want = reference.gemm(*a, *b, 1.0, torch.float32)
    a[1].fill_(0), b[1].fill_(254)                                         # 2^-127 and 2^127
    assert torch.equal(libraries[kernel].gemm(*a, *b, 1.0, torch.float32), want)
    assert torch.equal(libraries[kernel].gemm(*b, *a, 1.0, torch.float32), want.T)


@on_gpu
@each_kernel
def test_a_nan_scale_makes_its_row_nan_and_nothing_else(libraries, kernel):
    a, b = packed(150, 160, 126, 128), packed(70, 160, 126, 128)
    want = reference.gemm(*a, *b, 1.0, torch.float32)
    a[1][140, 4] = b[1][3, 0] = 255
    want[140], want[:, 3] = torch.nan, torch.nan
    got = libraries[kernel].gemm(*a, *b, 1.0, torch.float32)
    assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.nan_to_num(0.), want.nan_to_num(0.))


@on_gpu
@each_kernel
def test_a_product_runs_on_the_stream_given(libraries, kernel):
    a, b = packed(64, 4096, 126, 128), packed(64, 4096, 126, 128)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(10 ** 8)                                         # the operands come late, on this stream only
        late = [t.clone() for t in (*a, *b)]
        got = libraries[kernel].gemm(*late, 1.0, torch.float32)
    assert torch.equal(got, reference.gemm(*a, *b, 1.0, torch.float32))


@on_gpu
@pytest.mark.parametrize("rows, blocks", ODD)
def test_the_swizzle_kernel_makes_the_tiles(libraries, rows, blocks):
    s = torch.randint(1, 256, (rows, blocks), dtype=torch.uint8, device="cuda")
    assert torch.equal(next(iter(libraries.values())).swizzle(s), swizzle(s))


@on_gpu
@each_kernel
def test_every_op_and_a_layer_use_the_product_as_they_use_hoppers(tmp_path, kernel):
    """test_kernels.py and test_gpu.py on this GPU, in a copy of the sources that is built with this product"""
    for path in ("fp4", "data", "scaling", "tests", "model.py", "quartet.py"):
        copy = shutil.copytree if os.path.isdir(os.path.join(ROOT, path)) else shutil.copy
        copy(os.path.join(ROOT, path), tmp_path / path, **dict(ignore=shutil.ignore_patterns("build", "__pycache__")) if copy is shutil.copytree else {})
    (tmp_path / "run.py").write_text(f'''import sys, pytest
from fp4 import product
product.own = lambda capability: (["{kernel}.cu", "swizzle.cu"], ["-DGEMM_MXF4={kernel}"])
failed = pytest.main(["-q", "-x", "tests/test_kernels.py", "tests/test_gpu.py", "-k", "cuda and not run_falls_out"])
assert product.FORMAT == "mxf4"
sys.exit(failed)''')
    flags = " ".join(flag.replace("-I", f"-I{tmp_path}/") for flag in KERNELS[kernel])
    said = run(sys.executable, "run.py", cwd=tmp_path, env={**os.environ, "NVCC_APPEND_FLAGS": flags})
    assert "passed" in said


MUTANTS = [
    ("gemm_sm120", "fp4/gemm_sm120.cu", "sb[j / 4], 2 * half, i % 2, 2 * half, j % 4", "sb[j / 4], 0, i % 2, 0, j % 4"),
    ("gemm_sm120", "fp4/gemm_sm120.cu", "2 * half, i % 2, 2 * half, j % 4", "2 * half, 0, 2 * half, j % 4"),
    ("gemm_sm120", "fp4/gemm_sm120.cu", "(8 * q + g) * 16", "(4 * g + q) * 16"),
    ("gemm_sm120", "fp4/gemm_sm120.cu", "r[0] &= mask, r[1] &= mask;", ""),
    ("gemm_sm120", "fp4/gemm_sm120.cu", "lane / 16 * 8, 2 * half + lane / 8 % 2", "lane / 8 % 2 * 8, 2 * half + lane / 16"),
    ("gemm_sm120", "fp4/gemm_sm120.cu", "i < (BM + BN) * 4;", "i < (BM + BN) * 4 - 4;"),
    ("gemm_sm100", "fp4/gemm_sm100.cu", "tc::instruction(BM, columns, i % 2 * 2)", "tc::instruction(BM, columns, 0)"),
    ("gemm_sm100", "fp4/gemm_sm100.cu", "8 * half + 4 * (t - 1)", "8 * half"),
    ("gemm_sm100", "fp4/gemm_sm100.cu", "step == steps - 1 && K % 64", "false"),
    ("gemm_sm100", "fp4/gemm_sm100.cu", "step || i)", "true)"),
    ("gemm_sm100", "fp4/gemm_sm100.cu", "from + B + 32 * i", "from + B"),
    ("gemm_sm100", "fp4/tcgen05.cuh", "uint64_t(1024 >> 4)", "uint64_t(512 >> 4)"),
]


@pytest.mark.parametrize("i", range(len(MUTANTS)))
def test_the_list_of_mistakes_is_up_to_date(tmp_path, i):
    mutant(tmp_path, *MUTANTS[i][1:])


@on_gpu
def test_a_mistake_in_a_kernel_would_be_noticed(tmp_path):
    mutants = [m for m in MUTANTS if m[0] in KERNELS]
    with ThreadPoolExecutor() as pool:
        built = list(pool.map(lambda i: build(mutants[i][0], tmp_path / f"{i}.so", mutant(tmp_path / str(i), *mutants[i][1:])), range(len(mutants))))
    for path, (_, file, old, new) in zip(built, mutants):
        torch.manual_seed(0)
        a, b = packed(300, 1376, 126, 128), packed(200, 1376, 126, 128)
        got = Library(path).gemm(*a, *b, 1.0, torch.float32)
        assert not torch.equal(got, reference.gemm(*a, *b, 1.0, torch.float32)), f"{file}: {old} -> {new}"


@on_gpu
@each_kernel
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_compute_sanitizer_finds_nothing(tmp_path_factory, kernel, tool):
    if not shutil.which("compute-sanitizer"): pytest.skip("no compute-sanitizer")
    program = tmp_path_factory.getbasetemp() / f"{kernel}-program"
    if not program.exists(): build(kernel, program, shared=False)
    said = run("compute-sanitizer", "--tool", tool, "--error-exitcode", "3", str(program))
    assert "differ" in said


@on_gpu
@pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability() < (10, 0), reason="only Blackwell has the conversion")
def test_the_conversion_instruction_rounds_every_bf16_as_the_definition_does(libraries):
    pairs = torch.zeros(65536, dtype=torch.uint8, device="cuda")
    next(iter(libraries.values())).call("convert", pairs)
    pairs, numbers = pairs.cpu(), ~EVERY_BF16.isnan()
    assert torch.equal((pairs & 15)[numbers].int(), reference.round_nearest(EVERY_BF16[numbers]))
    assert torch.equal((pairs >> 4)[numbers].int(), reference.round_nearest(-EVERY_BF16[numbers]))
