"""
Kernels run on a CPU (cuda_on_cpu.h), Hopper's product with its instructions modelled (sm90_on_cpu.h): they give what the
definition does before a GPU has seen them. What only a GPU shows is in test_kernels.py and test_gpu.py.
"""
import ctypes, glob, itertools, os, re, shutil, subprocess
import pytest, torch
from fp4 import reference
from test_kernels import HOW_BACKWARD, same, same_scale_tiles, same_tiles

FP4 = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "fp4")
TOOLKIT = next((d for d in ("/usr/local/cuda", os.path.dirname(os.path.dirname(shutil.which("nvcc") or ""))) if os.path.exists(f"{d}/include/cuda_fp8.h")), None)
pytestmark = pytest.mark.skipif(not TOOLKIT or not shutil.which("g++"), reason="no CUDA toolkit, whose headers this needs")
PACKED, MXF4, LEFT, RIGHT = range(4)                           # Format in ops.h
TURNS = "before", "after", "none"                               # Turn in ops.h

CALLS = '''
extern "C" {
void forward(void* x, bool bf16, int64_t M, int64_t K, bool nearest, uint8_t* codes, uint8_t* scales, int32_t* mask, int format, void* values, void* tile_scales) {
  if (format) quantize_forward_operand({x, bf16}, M, K, nearest, codes, scales, mask, Format(format), values, tile_scales, nullptr);
  else cuda.quantize_forward({x, bf16}, M, K, nearest, codes, scales, mask, nullptr);
}
void backward(void* x, bool bf16, int64_t M, int64_t K, const int64_t* signs, const int64_t* seeds, bool stochastic, int turn, int turn_t, int format,
              void* a, void* a_scales, void* t, void* t_scales) {
  cuda.quantize_backward({x, bf16}, M, K, {signs, Turn(turn), Turn(turn_t), stochastic, Format(format)}, seeds, a, a_scales, t, t_scales, nullptr);
}
void packed(const uint8_t* codes, const uint8_t* scales, int64_t M, int64_t K, const int64_t* signs, const int64_t* seed, bool stochastic, int turn,
            int format, void* t, void* t_scales) {
  cuda.requantize(codes, scales, M, K, {signs, Turn::none, Turn(turn), stochastic, Format(format)}, seed, t, t_scales, nullptr);
}
void values(const uint8_t* codes, const uint8_t* scales, int64_t M, int64_t K, void* x, bool bf16) { cuda.dequantize(codes, scales, M, K, {x, bf16}, nullptr); }
void back(void* d, bool bf16, const int32_t* mask, int64_t M, int64_t K, void* x, bool to_bf16) { cuda.unrotate({d, bf16}, mask, M, K, {x, to_bf16}, nullptr); }
void folded(const uint8_t* codes, const uint8_t* scales, int64_t M, int64_t K, bool right, void* values, float* tile_scales) {
  fold_tiles(codes, scales, M, K, right, values, tile_scales, nullptr);
}
void plain(const uint8_t* a, const uint8_t* as, const uint8_t* b, const uint8_t* bs, int64_t M, int64_t N, int64_t K, float alpha, void* out, bool bf16) {
  gemm_plain(a, as, b, bs, M, N, K, alpha, {out, bf16}, nullptr);
}
}
'''


def translated(text):
    """CUDA C++ -> C++"""
    text = re.sub(r"extern __shared__ __align__\(\d+\) uint8_t memory\[\];", "uint8_t* memory = dynamic_shared;", text)
    kernel = r"(\(right \? [^()]*\)|\w*kernel(?:<(?:[^<>]|<[^<>]*>)*>)?)<<<(.*?)>>>\((.*?)\);"         # f<T><<<grid, ...>>>(arguments);
    return re.sub(kernel, r"launch(\2, [=] { (\1)(\3); });", text, flags=re.S)


HOPPER = '''
extern "C" void hopper(const uint8_t* a, const float* as, const uint8_t* b, const float* bs, int64_t M, int64_t N, int64_t K, float alpha, const int32_t* mask,
                       float* partial, int64_t splits, void* out, bool bf16) {
  cluster_size = 2;
  gemm_sm90(a, as, b, bs, M, N, K, alpha, mask, partial, int(splits), {out, bf16}, nullptr);
  cluster_size = 1;
}
'''


def library(folder, mistake=None):
    for path in glob.glob(os.path.join(FP4, "*.cu*")) + [os.path.join(FP4, "ops.h")]:
        name, text = os.path.basename(path), open(path).read()
        if mistake and name == mistake[0]:
            assert text.count(mistake[1]) == 1, f"{name} has {text.count(mistake[1])} times {mistake[1]}"
            text = text.replace(*mistake[1:])
        (folder / name).write_text(translated(text))
    for name in ("tma.cuh", "wgmma.cuh"): (folder / name).write_text('#include "sm90_on_cpu.h"\n')
    files = []
    for name in ("quantize", "unrotate", "fold", "gemm_plain", "gemm_sm90"):
        files.append(folder / f"{name}.cpp")
        files[-1].write_text(f'#include "cuda_on_cpu.h"\n#include "{name}.cu"\n' + CALLS * (name == "quantize") + HOPPER * (name == "gemm_sm90"))
    subprocess.run(["g++", "-O1", "-std=c++20", "-ffp-contract=off", "-w", "-shared", "-fPIC", "-pthread", "-I", folder, "-I", os.path.dirname(__file__),
                    "-I", f"{TOOLKIT}/include", "-o", folder / "kernels.so", *files], check=True)
    return ctypes.CDLL(folder / "kernels.so")


@pytest.fixture(scope="module")
def kernels(tmp_path_factory): return library(tmp_path_factory.mktemp("on_cpu"))


def call(f, *args):
    wrap = {torch.Tensor: lambda t: ctypes.c_void_p(t.data_ptr()), bool: ctypes.c_bool, float: ctypes.c_float, type(None): ctypes.c_void_p}
    f(*[wrap.get(type(a), ctypes.c_int64)(a) for a in args])


def empty(M, K, format):
    full, m, k = lambda *shape: torch.full(shape, 77, dtype=torch.uint8), -(-M // 128), -(-K // 128)
    if format == PACKED: return full(M, K // 2), full(M, K // 32)
    if format == MXF4: return full(M, K // 2), full(m * k * 512)
    return full(m, k, 128 * 128), torch.full((m, k, 4 if format == RIGHT else 128), 77.)


def same_operand(got, packed, format, zeros=127):
    """is an operand the packed one, in its format? zeros: the scale of a block of zeros"""
    try:
        if format == PACKED: same(got, packed)
        elif format == MXF4: same_scale_tiles(got, packed, zeros=zeros)
        else: same_tiles(got, packed, format == RIGHT)
    except AssertionError: return False
    return True


def tensor(M, K, dtype):
    """blocks of all sizes, ties, zeros, NaN and Inf"""
    g = torch.Generator().manual_seed(M)
    x = torch.randn(M, K, generator=g) * torch.randint(-30, 30, (M, K // 32), generator=g).float().exp2().repeat_interleave(32, 1)
    x[1, :32], x[2, -32:], x[3, :32], x[4, :32], x[5, :32] = torch.arange(32) / 4, 0, 1e-40, 3e38, 2. ** -120
    x[M // 2, 3], x[M - 1, K - 1] = torch.nan, torch.inf
    return x.to(dtype)


def wrong(kernels, M, K, dtype):
    """which calls did not give the definition's bytes"""
    x, bf16, found = tensor(M, K, dtype), dtype == torch.bfloat16, []
    for scale, format in itertools.product(("floor", "nearest"), (PACKED, MXF4, LEFT)):
        codes, scales, mask = reference.quantize_forward(x, scale)
        got, more = (torch.zeros_like(codes), torch.zeros_like(scales), torch.zeros_like(mask)), empty(M, K, format)
        call(kernels.forward, x, bf16, M, K, scale == "nearest", *got, format, *more)
        operand, zeros = {PACKED: got[:2], MXF4: (got[0], more[1]), LEFT: more}[format], reference.quantize_forward(torch.zeros(1, 32), scale)[1].item()
        if not (all(map(torch.equal, got, (codes, scales, mask))) and same_operand(operand, (codes, scales), format, zeros)): found.append(("forward", scale, format))
    signs, seeds = reference.draw(x, x, 3)
    codes, scales, _ = reference.quantize_forward(x, "floor")
    for how, fp8 in itertools.product(HOW_BACKWARD, (PACKED, MXF4, LEFT)):
        stochastic, turn, turn_t = how[0], *map(TURNS.index, how[1:])
        rows, columns, turned = empty(M, K, fp8), empty(K, -(-M // 32) * 32, fp8), empty(K, -(-M // 32) * 32, right := RIGHT if fp8 == LEFT else fp8)
        call(kernels.backward, x, bf16, M, K, signs, seeds, stochastic, turn, turn_t, fp8, *rows, *columns)
        call(kernels.packed, codes, scales, M, K, signs, seeds[2:].clone(), stochastic, turn, right, *turned)
        want = reference.quantize_backward(x, signs, seeds[:2], *how)
        if not (same_operand(rows, want[:2], fp8) and same_operand(columns, want[2:], fp8)): found.append(("backward", *how, fp8))
        if not same_operand(turned, reference.requantize(codes, scales, signs, seeds[2:], *how[:2]), right): found.append(("packed", *how[:2], right))
    return found


@pytest.mark.parametrize("M, K, dtype", [(33, 160, torch.bfloat16), (130, 96, torch.float32), (260, 544, torch.bfloat16)])       # there a block takes three tiles
def test_the_quantisers_kernels_give_the_definitions_bytes(kernels, M, K, dtype): assert wrong(kernels, M, K, dtype) == []


@pytest.mark.parametrize("M, K", [(33, 160), (130, 96)])
def test_the_plain_kernels_give_the_definitions_bytes(kernels, M, K):
    x = tensor(M, K, torch.float32)
    codes, scales, mask = reference.quantize_forward(x, "floor")
    for dtype in (torch.float32, torch.bfloat16):
        out, bf16 = torch.zeros(M, K, dtype=dtype), dtype == torch.bfloat16
        call(kernels.values, codes, scales, M, K, out, bf16)
        assert torch.equal(out.nan_to_num(9.), reference.dequantize(codes, scales, dtype).nan_to_num(9.))
        d = torch.randn(M, K).to(dtype)
        call(kernels.back, d, bf16, mask, M, K, out, bf16)
        assert torch.equal(out, reference.unrotate(d, mask, dtype))
        for right in (False, True):
            tiles = empty(M, K, RIGHT if right else LEFT)
            call(kernels.folded, codes, scales, M, K, right, *tiles)
            same_tiles(tiles, (codes, scales), right)
        a, b = (reference.quantize_forward(torch.randn(rows, K), "floor")[:2] for rows in (M, 70))
        product = torch.zeros(M, 70, dtype=dtype)
        call(kernels.plain, *a, *b, M, 70, K, 16 / 9, product, bf16)
        exact = reference.gemm(*a, *b, 16 / 9, torch.float32).double()
        assert (product.double() - exact).abs().le(1e-5 * exact.abs().max() + 2 ** (-8 if bf16 else -23) * exact.abs()).all()


def product_is_right(kernels, M, N, K, dtype, masked, splits):
    """Hopper's, against the definition's FP32 sum"""
    torch.manual_seed(K)
    sizes = torch.randint(-6, 6, (N // 32, 1)).float().exp2().repeat_interleave(32, 0)         # of columns that are rotated together
    a, b = (reference.quantize_forward(x, "floor")[:2] for x in (torch.randn(M, K), torch.randn(N, K) * sizes))
    bf16 = dtype == torch.bfloat16
    tiles = [empty(rows, K, format) for rows, format in ((M, LEFT), (N, RIGHT))]
    for packed, rows, (values, scales), right in ((a, M, tiles[0], False), (b, N, tiles[1], True)): call(kernels.folded, *packed, rows, K, right, values, scales)
    mask = torch.randint(-2 ** 31, 2 ** 31, (M, N // 32)).int() if masked else None
    out, partial = torch.full((M + 1, N), 77., dtype=dtype), torch.zeros(splits, -(-M // 16) * 16, N)
    call(kernels.hopper, *tiles[0], *tiles[1], M, N, K, 16 / 9, mask, partial, splits, out, bf16)
    exact = reference.gemm(*a, *b, 16 / 9, torch.float32)
    exact = (reference.unrotate(exact, mask, torch.float32) if masked else exact).double()
    return (out[:M] - exact).abs().le(1e-5 * sizes.T * (exact / sizes.T).abs().max() + 2 ** (-8 if bf16 else -23) * exact.abs()).all() and (out[M] == 77).all()


@pytest.mark.parametrize("M, N, K, dtype, masked, splits", [
    (300, 416, 160, torch.bfloat16, True, 1), (40, 544, 1024, torch.float32, True, 2), (130, 96, 32, torch.bfloat16, False, 1),
    (270, 1120, 288, torch.float32, True, 1)])                  # more tiles than clusters; in the others one cluster waits
def test_hoppers_product_is_the_exact_one_rounded_once(kernels, M, N, K, dtype, masked, splits):
    assert product_is_right(kernels, M, N, K, dtype, masked, splits)


@pytest.mark.parametrize("M, K, mistake", [
    (33, 160, ("round.cuh", "1.5f * unit", "unit")),
    (33, 160, ("quantize.cu", "s.of_columns.before[i]);", "0);")),
    (33, 160, ("quantize.cu", "how.rows, s.of_rows.after", "how.columns, s.of_rows.after")),
    (33, 160, ("mxfp4.cuh", "sum > top[w] ? sum : top[w]", "sum < top[w] ? sum : top[w]")),
    (33, 160, ("tiles.cuh", "(line & 7)", "(line & 3)")),
    (260, 544, ("quantize.cu", "tiles[now ^ 1], M", "tiles[now], M")),
])
def test_a_mistake_in_a_kernel_is_found(tmp_path, M, K, mistake): assert wrong(library(tmp_path, mistake), M, K, torch.bfloat16)


@pytest.mark.parametrize("mistake", [("gemm_sm90.cu", "2 * w.n + rank", "2 * w.n"), ("gemm_sm90.cu", "b_scales[now][j % 4]", "b_scales[now][0]"),
                                     ("gemm_sm90.cu", "wait_for_reads<2>", "wait_for_reads<3>"), ("gemm_sm90.cu", "wait_for_reads<PLACES - 1>", "wait_for_reads<PLACES>")])
def test_a_mistake_in_hoppers_product_is_found(tmp_path, mistake):
    kernels = library(tmp_path, mistake)
    assert not all(product_is_right(kernels, 40, 416, 160, dtype, True, 1) for dtype in (torch.bfloat16, torch.float32))
