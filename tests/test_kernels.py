"""The compiled ops give the bytes of fp4/reference.py, on ugly shapes and ugly values."""
import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import fp4
from fp4 import ops, reference, toolchain
from fp4.backend import swizzle_scales
from fp4.ops import Packed
from operands import (
    ALPHA, DEVICES, HOW_BACKWARD, at_every_size, at_the_edge_of_a_scale, error_of_a_sum,
    every_bfloat16_and_the_neighbours_of_midpoints, every_scale_byte, random_at_sizes,
    random_packed, same, same_scale_tiles, same_tiles, tiles_of)
from test_reference import philox_of_a_seed

BACKEND = fp4.build()
pytestmark = pytest.mark.skipif(not BACKEND.is_compiled, reason="no compiler on this machine")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

SHAPES = [(1, 32), (3, 96), (33, 160), (64, 32), (31, 1024), (100, 544)]


def with_first_block_zero(x):
    return torch.cat((torch.zeros_like(x[:, :32]), x[:, 32:]), 1)


def with_element(x, value):
    return x.index_put((torch.tensor(0), torch.tensor(5)), torch.tensor(value))


VALUES = {
    "normal":       lambda x: x,
    "rows scaled":  lambda x: x * torch.exp(4 * torch.randn(x.shape[0], 1)),
    "tiny":         lambda x: x * 1e-30,
    "subnormal":    lambda x: x * 1e-42,
    "huge":         lambda x: x * 1e38,
    "3e38":         lambda x: torch.full_like(x, 3e38),
    "zero":         lambda x: x * 0,                            # with negative zeros
    "a zero block": with_first_block_zero,
    "constant":     lambda x: torch.full_like(x, 0.3),
    "ties":         lambda x: torch.round(4 * x) / 4,
    "NaN":          lambda x: with_element(x, float("nan")),
    "Inf":          lambda x: with_element(x, float("inf")),
}


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan():
    """Fills new memory with NaN, or 255, so that what a kernel leaves out shows."""
    # Of this setting, only what it does to torch.empty is meant.
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(8).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def name_of(parameters):
    (M, K), value, dtype = parameters
    return f"{M}x{K}-{value}-{str(dtype)[6:]}"


@pytest.fixture(ids=name_of, params=[
    (shape, value, dtype) for shape in SHAPES for value in VALUES
    for dtype in (torch.float32, torch.bfloat16)])
def x(request):
    (M, K), value, dtype = request.param
    torch.manual_seed(M * K)
    return VALUES[value](torch.randn(M, K)).to(dtype)


def flat(result):
    """Returns the tensors of a result, which may be in tuples in a tuple, in a list."""
    if isinstance(result, torch.Tensor):
        return [result]
    return [tensor for part in result for tensor in flat(part)]


def to_device(device, *tensors):
    """Moves tensors; a Packed stays a Packed."""
    return [Packed(*to_device(device, *t)) if isinstance(t, Packed) else t.to(device)
            for t in tensors]


@pytest.mark.parametrize("device", DEVICES)
def test_each_op_gives_the_bytes_of_the_definition(x, device):
    def check(name, tensors, *settings):
        got = getattr(ops, name)(*to_device(device, *tensors), *settings)
        want = getattr(reference, name)(*flat(tensors), *settings)
        same(to_device("cpu", *flat(got)), flat(want))

    for scale in ops.SCALES:
        check("quantize_forward", [x], scale)
    *packed, mask = reference.quantize_forward(x, "floor")
    packed = Packed(*packed)
    signs, seeds = reference.draw(x, x, 3)
    for stochastic, order, order_t in HOW_BACKWARD:
        check("quantize_backward", [x, signs, seeds[:2]], stochastic, order, order_t, "packed")
        check("requantize_transposed", [packed, signs, seeds[2:]], stochastic, order, "packed")
    for dtype in (torch.float32, torch.bfloat16):
        check("dequantize", [packed], dtype)
        check("unrotate", [x, mask], dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_scale_byte_is_unpacked_requantised_and_multiplied_as_the_definition_says(
        dtype, device):
    packed = every_scale_byte()
    on_device, = to_device(device, packed)
    same([ops.dequantize(on_device, dtype).cpu()], [reference.dequantize(*packed, dtype)])
    signs, seeds = reference.draw(packed.codes, packed.codes, 1)
    for stochastic, order, _ in HOW_BACKWARD:
        got = ops.requantize_transposed(
            *to_device(device, packed, signs, seeds), stochastic, order, "packed")
        same(to_device("cpu", *got), reference.requantize_transposed(
            *packed, signs, seeds, stochastic, order))
    for byte in (*range(253), 255):             # 6 * 2**126 is beyond float32.
        # A sum of 32 products is exact, and those of a left and a right scale are near 1.
        a = Packed(packed.codes[:32, 16 * byte:16 * byte + 16].contiguous(),
                   packed.scales[:32, byte:byte + 1].contiguous())
        b = Packed(packed.codes[:40, :16].contiguous(),
                   torch.full((40, 1), min(max(254 - byte, 2), 252), dtype=torch.uint8))
        if device == "cpu":             # A wider format of a GPU has a window of exponents.
            same([ops.gemm(a, b, 1.0, dtype)], [reference.gemm(*a, *b, 1.0, dtype)])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_of_every_size_are_quantised_as_the_definition_says(dtype, device):
    x = at_every_size().to(dtype)
    signs, seeds = reference.draw(x, x, 2)
    found = set()
    for matrix in (x, x.T.contiguous()[:, :288]):       # whole blocks of a size, and mixed ones
        matrix = matrix.contiguous()
        for scale in ops.SCALES:
            packed, mask = ops.quantize_forward(matrix.to(device), scale)
            want = reference.quantize_forward(matrix, scale)
            same(to_device("cpu", *packed, mask), want)
        for stochastic, order, order_t in HOW_BACKWARD:
            got = ops.quantize_backward(*to_device(device, matrix, signs, seeds),
                                        stochastic, order, order_t, "packed")
            want = reference.quantize_backward(matrix, signs, seeds, stochastic, order, order_t)
            same(to_device("cpu", *flat(got)), want)
            found |= set(want[1].flatten().tolist())
    assert {0, 255} <= found and len(found) > 240


@pytest.mark.parametrize("device", DEVICES)
def test_a_scale_at_the_edge_of_a_power_of_two_is_the_definitions(device):
    x = at_the_edge_of_a_scale()
    for scale, part in (("floor", slice(1, None, 2)), ("nearest", slice(0, None, 2))):
        packed, mask = ops.quantize_forward(x.to(device), scale)
        want = reference.quantize_forward(x, scale)
        same(to_device("cpu", *packed, mask), want)
        assert .2 < (want[1][part] == want[1][part].max()).float().mean() < .8


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("order", ["before", "none"])
def test_every_noise_byte_meets_every_share_of_a_gap_as_in_the_definition(order, device):
    """Values on, and hardly beside, the multiples of 1/256 of a gap, where the byte decides."""
    u = torch.arange(6 * 512) / 512                     # the grid's gaps are .5, 1 and 2
    u = torch.cat((u, torch.nextafter(u, u - 1), torch.nextafter(u, u + 1)))
    x = torch.zeros(24, 9216)
    x[:, :] = (u / .75).repeat(24, 1).view(24, -1)
    x[::2] *= -1
    x[:, ::32] = 7.9                            # so that 2**0 is the scale of every block
    if order == "before":
        x = reference.hadamard(reference.blocks(x)).flatten(-2)
    signs = torch.zeros(1, dtype=torch.int64)
    seeds = torch.tensor([3, 4])
    got = ops.quantize_backward(*to_device(device, x, signs, seeds), True, order, order, "packed")
    want = reference.quantize_backward(x, signs, seeds, True, order, order)
    same(to_device("cpu", *flat(got)), want)
    assert (want[1] == 127).float().mean() > .9


# ---- the arithmetic that all kernels share, called one function at a time

ARITHMETIC = """
#include "mxfp4.cuh"
using namespace mxfp4;

extern "C" {

void nearest(const float* u, int64_t n, int32_t* code) {
  for (int64_t i = 0; i < n; i++)
    code[i] = round_nearest(u[i]) | sign_bit(u[i]);
}

void stochastic(const float* u, const int32_t* noise, int64_t n, int32_t* code) {
  for (int64_t i = 0; i < n; i++)
    code[i] = round_stochastic(u[i], noise[i]) | sign_bit(u[i]);
}

void philox_words(int64_t seed, int64_t call, uint32_t* words) {
  uint32_t four[4];
  philox(seed, call, four);
  memcpy(words, four, sizeof(four));
}

void quest_exponents(const float* scale, int64_t n, bool nearest, int32_t* e) {
  for (int64_t i = 0; i < n; i++)
    e[i] = quest_exponent(scale[i], nearest);
}

void to_bfloat16(const float* x, int64_t n, uint16_t* bits) {
  for (int64_t i = 0; i < n; i++) {
    bfloat16 rounded;
    store_float(rounded, x[i]);
    bits[i] = rounded.bits;
  }
}

void values_of_bytes(float* scales, float* codes) {
  for (int i = 0; i < 256; i++) {
    scales[i] = e8m0_value(uint8_t(i));
    codes[i] = e2m1_value(i & 15);
  }
}

}
"""
needs_gpp = pytest.mark.skipif(not shutil.which("g++"), reason="no g++")


@pytest.fixture(scope="session")
def arithmetic(tmp_path_factory):
    """The functions of mxfp4.cuh, compiled as the kernels of the CPU are, called with tensors."""
    folder = tmp_path_factory.mktemp("arithmetic")
    (folder / "arithmetic.cpp").write_text(ARITHMETIC)
    kernels = Path(ops.__file__).parent / "kernels"
    subprocess.run(["g++", "-std=c++17", *toolchain.CXX_FLAGS, "-shared", "-fPIC", f"-I{kernels}",
                    folder / "arithmetic.cpp", "-o", folder / "arithmetic.so"], check=True)
    library = ctypes.CDLL(folder / "arithmetic.so")

    def call(name, *arguments):
        as_c = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor)
                else ctypes.c_bool(a) if isinstance(a, bool) else ctypes.c_int64(a)
                for a in arguments]
        getattr(library, name)(*as_c)

    return call


@needs_gpp
def test_the_kernels_arithmetic_rounds_to_nearest_as_the_definition_does(arithmetic):
    u = every_bfloat16_and_the_neighbours_of_midpoints()
    code = torch.zeros(len(u), dtype=torch.int32)
    arithmetic("nearest", u, len(u), code)
    assert torch.equal(code, reference.round_nearest(u).int())


@needs_gpp
def test_the_kernels_arithmetic_rounds_stochastically_as_the_definition_does(arithmetic):
    u = every_bfloat16_and_the_neighbours_of_midpoints()
    u = u[u.abs() < 6]
    for byte in (*range(0, 256, 15), 1, 127, 128, 254):
        noise = torch.full((len(u),), byte, dtype=torch.int32)
        code = torch.zeros(len(u), dtype=torch.int32)
        arithmetic("stochastic", u, noise, len(u), code)
        assert torch.equal(code, reference.round_stochastic(u, noise).int())


@needs_gpp
@pytest.mark.parametrize("seed", [0, -1, 2 ** 32, 0x299F31D0A4093822])
@pytest.mark.parametrize("number", [0, 5, 2 ** 32 + 7, 2 ** 63 - 1])
def test_a_call_of_the_kernels_philox_has_all_64_bits_of_its_number(arithmetic, seed, number):
    words = torch.zeros(4, dtype=torch.int32)
    arithmetic("philox_words", seed, number, words)
    assert [word % 2 ** 32 for word in words.tolist()] == philox_of_a_seed(seed, number)


@needs_gpp
def test_the_kernels_arithmetic_has_the_scales_and_the_codes_of_the_definition(arithmetic):
    scales = torch.zeros(256)
    codes = torch.zeros(256)
    arithmetic("values_of_bytes", scales, codes)
    assert scales[:255].tolist() == [2. ** (byte - 127) for byte in range(255)]
    assert scales[255].isnan()
    magnitudes = [*reference.E2M1, *(-m for m in reference.E2M1)]
    assert codes.tolist() == magnitudes * 16 and torch.signbit(codes[8])


@needs_gpp
def test_the_kernels_arithmetic_rounds_a_scale_down_or_to_the_nearest_power_of_two(arithmetic):
    """The middle is the square root of 2, in the logarithm."""
    root = torch.tensor(2.).sqrt()
    mantissas = torch.stack([torch.tensor(1.), torch.nextafter(root, root - 1), root,
                             torch.nextafter(root, root + 1), torch.tensor(1.9999999)])
    exponents = torch.arange(-27, 128)
    scales = (mantissas * exponents.float().exp2()[:, None]).contiguous()
    for nearest, rounds_up in ((False, [0] * 5), (True, [0, 0, 0, 1, 1])):
        e = torch.zeros(scales.shape, dtype=torch.int32)
        arithmetic("quest_exponents", scales, scales.numel(), nearest, e)
        want = (exponents[:, None] + torch.tensor(rounds_up)).clamp(max=127)
        assert torch.equal(e.long(), want)


@needs_gpp
def test_the_kernels_arithmetic_rounds_to_bfloat16_as_torch_does(arithmetic):
    g = torch.Generator().manual_seed(0)
    x = torch.randint(-2 ** 31, 2 ** 31, (1 << 18,), generator=g).int()
    x[: 1 << 16] = (x[: 1 << 16] & -65536) | 0x8000             # ties
    x = torch.cat((x.view(torch.float32), torch.tensor([torch.inf, -torch.inf, 3.4e38, -0., 0.])))
    bits = torch.zeros(len(x), dtype=torch.int16)
    arithmetic("to_bfloat16", x, len(x), bits)
    same([bits.view(torch.bfloat16)], [x.bfloat16()])


@needs_gpu
@pytest.mark.parametrize("operand_format, same_operand", [
    ("fp8", same_tiles), ("mxf4", same_scale_tiles)])
def test_operands_and_scales_in_tiles_are_the_packed_ones_exactly(x, operand_format, same_operand):
    packed = Packed(*reference.quantize_forward(x, "floor")[:2])
    signs, seeds = reference.draw(x, x, 3)
    for stochastic, order, order_t in HOW_BACKWARD:
        got, got_t = ops.quantize_backward(*to_device("cuda", x, signs, seeds[:2]),
                                           stochastic, order, order_t, operand_format)
        want = reference.quantize_backward(x, signs, seeds[:2], stochastic, order, order_t)
        same_operand(got, want[:2])
        same_operand(got_t, want[2:])
        got = ops.requantize_transposed(*to_device("cuda", packed, signs, seeds[2:]),
                                        stochastic, order, operand_format)
        want = reference.requantize_transposed(*packed, signs, seeds[2:], stochastic, order)
        same_operand(got, want, True)


@needs_gpu
@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("operand_format", ["packed", "fp8"])
def test_tiles_that_a_block_of_threads_takes_one_after_the_other(operand_format, stochastic):
    """The matrix is so wide that a column of six tiles has two blocks of threads.

    The shapes above have a block of threads for each tile.
    """
    M = 700
    K = 128 * torch.cuda.get_device_properties().multi_processor_count - 32
    x = torch.randn(M, K, generator=torch.Generator().manual_seed(0)).bfloat16()
    x[M // 2, 5] = torch.nan
    packed = Packed(*reference.quantize_forward(x, "floor")[:2])
    signs, seeds = reference.draw(x, x, 3)
    got, got_t = ops.quantize_backward(*to_device("cuda", x, signs, seeds[:2]),
                                       stochastic, "before", "before", operand_format)
    want = reference.quantize_backward(x, signs, seeds[:2], stochastic, "before", "before")
    got_again = ops.requantize_transposed(*to_device("cuda", packed, signs, seeds[2:]),
                                          stochastic, "before", operand_format)
    want_again = reference.requantize_transposed(*packed, signs, seeds[2:], stochastic, "before")
    for is_right, a, b in ((False, got, want[:2]), (False, got_t, want[2:]),
                           (True, got_again, want_again)):
        if operand_format == "packed":
            same(to_device("cpu", *a), b)
        else:
            same_tiles(a, b, is_right)


PRODUCTS = [(1, 32, 32), (33, 64, 96), (100, 160, 1024), (3, 64, 4096), (300, 416, 32),
            (513, 672, 544), (160, 96, 40000)]
DTYPES_AND_ULPS = [(torch.float32, 2 ** -23), (torch.bfloat16, 2 ** -8)]


def is_product(got, a, b, ulp):
    exact = reference.gemm(*a, *b, ALPHA, torch.float64)
    return (got.double() - exact).abs().le(error_of_a_sum(a, b) + ulp * exact.abs()).all()


@pytest.mark.parametrize("M, N, K", PRODUCTS)
@pytest.mark.parametrize("dtype, ulp", DTYPES_AND_ULPS)
@pytest.mark.parametrize("device", DEVICES)
def test_a_product_is_within_the_error_of_an_fp32_sum_and_one_rounding(M, N, K, dtype, ulp, device):
    torch.manual_seed(K)
    a = random_packed(M, K)
    b = random_packed(N, K)
    got = ops.gemm(*to_device(device, a, b), ALPHA, dtype).cpu()
    assert got.dtype == dtype and is_product(got, a, b, ulp)
    if device == "cpu":                         # Sums of such terms are exact in float32.
        assert torch.equal(got, reference.gemm(*a, *b, ALPHA, dtype))
        a = random_at_sizes(min(M, 33), K, octaves=20)
        b = random_at_sizes(min(N, 64), K, octaves=20)
        assert is_product(ops.gemm(a, b, ALPHA, dtype), a, b, ulp)


def without_a_term(a, b):
    """The product, whose sums each lack a term: of their own, one of ordinary size."""
    product = reference.gemm(*a, *b, ALPHA, torch.float64)
    a = reference.dequantize(*a, torch.float64)
    b = reference.dequantize(*b, torch.float64)
    for n in range(product.shape[1]):
        terms = ALPHA * a * b[n]
        size = torch.where(terms == 0, torch.inf, terms.abs())
        median = size.argsort(1)[:, size.isfinite().sum(1).min() // 2]
        product[:, n] -= terms.gather(1, median[:, None])[:, 0]
    return product


def summed_in_bf16(a, b):
    """The product, whose sums are rounded to BF16 after each block."""
    product = torch.zeros(len(a.codes), len(b.codes))
    for block in range(a.scales.shape[1]):
        codes = slice(16 * block, 16 * block + 16)
        scales = slice(block, block + 1)
        terms = reference.gemm(a.codes[:, codes], a.scales[:, scales], b.codes[:, codes],
                               b.scales[:, scales], ALPHA, torch.float32)
        product = (product + terms).bfloat16().float()
    return product


@pytest.mark.parametrize("wrong, octaves", [
    (without_a_term, 1), (summed_in_bf16, 1), (summed_in_bf16, 20)])
@pytest.mark.parametrize("K", [96, 1024, 8192])
def test_a_sum_that_lacks_a_term_or_is_kept_in_bf16_is_beyond_that_error(wrong, octaves, K):
    torch.manual_seed(K)
    a = random_at_sizes(4, K, octaves)
    b = random_at_sizes(8, K, octaves)
    exact = reference.gemm(*a, *b, ALPHA, torch.float64)
    error = (wrong(a, b).double() - exact).abs()
    is_noticed = error > error_of_a_sum(a, b) + 2 ** -23 * exact.abs()
    assert is_noticed.double().mean() > .8


@pytest.mark.parametrize("M, N, K", PRODUCTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", DEVICES)
def test_quantising_and_multiplying_in_one_gives_what_both_give_apart(M, N, K, dtype, device):
    torch.manual_seed(K)
    x = torch.randn(M, K, device=device, dtype=dtype)
    w, _ = ops.quantize_forward(torch.randn(N, K, device=device), "floor")
    x[0, 5] = float("nan")
    xq, mask = ops.quantize_forward(x, "nearest")
    y = ops.gemm(xq, w, 1.0, dtype)
    same(flat(ops.quantize_gemm(x, "nearest", w)), [y, *xq, mask])


def operands_of_the_backend(a, b, device):
    """Brings the packed operands of a gradient's product to a device, in its backend's format."""
    if device == "cuda" and BACKEND.operand_format == "fp8":
        a = Packed(*tiles_of(*a)[:2])
        b = Packed(*tiles_of(*b, True)[:2])
    if device == "cuda" and BACKEND.operand_format == "mxf4":
        a = Packed(a.codes, swizzle_scales(a.scales))
        b = Packed(b.codes, swizzle_scales(b.scales))
    return to_device(device, a, b)


@pytest.mark.parametrize("M, N, K", PRODUCTS)
@pytest.mark.parametrize("dtype, ulp", DTYPES_AND_ULPS)
@pytest.mark.parametrize("device", DEVICES)
def test_a_gradients_product_is_masked_and_rotated_back(M, N, K, dtype, ulp, device):
    torch.manual_seed(K)
    a = random_packed(M, K)
    b = random_packed(N, K)
    mask = torch.randint(-2 ** 31, 2 ** 31, (M, N // 32)).int()
    operands = operands_of_the_backend(a, b, device)
    got = ops.gemm_unrotate(*operands, mask.to(device), ALPHA, dtype).cpu().double()

    product = reference.gemm(*a, *b, ALPHA, torch.float32)
    exact = reference.unrotate(product, mask, torch.float32).double()
    # The rotation mixes the errors of 32 sums, and adds five roundings of its own.
    error = (error_of_a_sum(a, b) + 5 * 2 ** -24 * product.abs()).unflatten(-1, (-1, 32))
    error = error.norm(dim=-1, keepdim=True).expand(M, N // 32, 32).flatten(-2)
    assert (got - exact).abs().le(error + ulp * exact.abs()).all()
    if device == "cpu":
        assert torch.equal(got, reference.unrotate(product, mask, dtype).double())

    other_mask = reference.unrotate(product, ~mask, torch.float32).double()
    assert not torch.allclose(got, other_mask, atol=.1 * exact.std())


# ---- the product of few rows

def first_rows(packed, rows):
    return Packed(*(tensor[:rows].contiguous() for tensor in packed))


@pytest.mark.parametrize("M, N, K", [
    (1, 1, 32), (1, 130, 4096), (8, 7, 160), (2, 33, 1056), (5, 18, 2080), (3, 0, 64), (0, 3, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", DEVICES)
def test_the_product_of_few_rows_has_the_bits_of_the_definition(M, N, K, dtype, device):
    torch.manual_seed(K)
    x = random_at_sizes(M, K, octaves=20)
    w = random_at_sizes(N, K, octaves=20)
    got = ops.matvec(*to_device(device, x, w), dtype).cpu()
    same([got], [reference.matvec(*x, *w, dtype)])
    if M and N:                                 # Another NaN is in no other row and column.
        x.scales[M - 1, 0] = w.scales[N // 2, -1] = 255
        got = ops.matvec(*to_device(device, x, w), dtype).cpu()
        same([got], [reference.matvec(*x, *w, dtype)])
        assert got.isnan().sum() == M + N - 1


@pytest.mark.parametrize("device", DEVICES)
def test_few_rows_of_every_scale_byte_are_multiplied_as_the_definition_says(device):
    w = every_scale_byte()
    x = first_rows(Packed(w.codes, w.scales.flip(1).contiguous()), 8)
    for block in range(256):                    # one by one, because some of them are NaN
        pair = [Packed(packed.codes[:, 16 * block:16 * block + 16].contiguous(),
                       packed.scales[:, block:block + 1].contiguous()) for packed in (x, w)]
        got = ops.matvec(*to_device(device, *pair), torch.float32).cpu()
        same([got], [reference.matvec(*pair[0], *pair[1], torch.float32)])


def test_the_product_of_few_rows_takes_no_operand_it_would_misread():
    x = random_packed(9, 64)
    w = random_packed(5, 64)
    with pytest.raises(RuntimeError, match="at most 8 rows, got 9"):
        ops.matvec(x, w, torch.float32)
    x = first_rows(x, ops.MATVEC_ROWS)
    with pytest.raises(RuntimeError, match="inner dimensions differ: 64 and 96"):
        ops.matvec(x, random_packed(5, 96), torch.float32)
    with pytest.raises(RuntimeError, match="dtype must be float32 or bfloat16"):
        ops.matvec(x, w, torch.float16)
    with pytest.raises(RuntimeError, match="do not match"):
        ops.matvec(x, Packed(w.codes, w.scales[:4]), torch.float32)


# ---- NaN, windows, and what is refused

@pytest.mark.parametrize("device", DEVICES)
def test_a_nan_scale_makes_the_row_of_the_product_nan_and_no_other(device):
    a = random_packed(200, 256)
    b = random_packed(64, 256)
    a.scales[7, 3] = 255
    got = ops.gemm(*to_device(device, a, b), 1.0, torch.float32).cpu()
    assert got[7].isnan().all()
    assert got.isnan().sum() == 64


@pytest.mark.parametrize("right, octaves", [(False, 15), (True, 29)])
def test_the_windows_of_the_fp8_tiles_hold_15_and_29_octaves(right, octaves):
    torch.manual_seed(0)
    codes = torch.randint(0, 256, (50, 512), dtype=torch.uint8)

    def lost(octaves):
        scales = torch.randint(40, 40 + octaves, (50, 32)).to(torch.uint8)
        return tiles_of(codes, scales, right)[2]

    assert lost(octaves) == 0
    assert lost(octaves + 1) > 0


@needs_gpu
def test_folding_into_fp8_changes_no_value_within_15_octaves():
    torch.manual_seed(0)
    for K in (1024, 8192):
        codes = torch.randint(0, 256, (50, K // 2), dtype=torch.uint8)
        scales = torch.randint(16, 190, (50, 1)) + torch.randint(0, 15, (50, K // 32))
        scales[:, 3] = 254                      # a zero block's scale does not count
        codes[:, 48:64] = 0
        codes[:, 64] = 7                        # nothing is lost at the lower end
        scales[:, 4] = scales.amin(1)
        packed = Packed(codes.cuda(), scales.to(torch.uint8).cuda())
        fp8, row_scales = torch.ops.fp4.packed_to_fp8(*packed, 1.0)
        values = ops.dequantize(packed, torch.float32)
        assert torch.equal(fp8.double() * row_scales.double(), values.double())


@pytest.mark.parametrize("seeds, sign_order_t, operand_format, words", [
    (3, "before", "packed", "seeds must have 2"),
    (2, "before", "mxf4", "tiles are for a GPU"),
])
def test_quantize_backward_takes_no_argument_it_would_misread(
        seeds, sign_order_t, operand_format, words):
    signs = torch.zeros(1, dtype=torch.int64)
    seeds = torch.zeros(seeds, dtype=torch.int64)
    with pytest.raises(RuntimeError, match=words):
        ops.quantize_backward(torch.randn(64, 64), signs, seeds, False, "before", sign_order_t,
                              operand_format)


def test_an_op_takes_no_matrix_it_would_misread():
    x = torch.randn(64, 64)
    with pytest.raises(RuntimeError, match="contiguous"):
        ops.quantize_forward(x.T, "floor")
    with pytest.raises(RuntimeError, match="mask"):
        ops.unrotate(x, torch.zeros(64, 3, dtype=torch.int32), torch.float32)
    a = random_packed(64, 32)
    b = random_packed(96, 32)
    with pytest.raises(RuntimeError, match="mask"):
        ops.gemm_unrotate(a, b, torch.zeros(64, 2, dtype=torch.int32), 1.0, torch.float32)


@pytest.mark.parametrize("M, K", [(0, 64), (64, 0)])
def test_an_empty_matrix_is_quantised_to_an_empty_one(M, K):
    x = torch.empty(M, K)
    signs = torch.zeros(1, dtype=torch.int64)
    seeds = torch.zeros(2, dtype=torch.int64)
    packed, mask = ops.quantize_forward(x, "floor")
    same([*packed, mask], reference.quantize_forward(x, "floor"))
    got = ops.quantize_backward(x, signs, seeds, False, "before", "before", "packed")
    for quantized, shape in zip(got, [(M, K), (K, M)]):
        assert quantized.codes.shape == (shape[0], shape[1] // 2)
    transposed = ops.requantize_transposed(packed, signs, seeds[:1], False, "before", "packed")
    assert transposed.codes.shape == (K, M // 2)
    assert torch.equal(ops.gemm(packed, packed, 1.0, torch.float32), torch.zeros(M, M))


@pytest.mark.parametrize("device", DEVICES)
def test_an_op_makes_no_output_of_a_dtype_it_would_misread(device):
    packed, = to_device(device, random_packed(32, 64))
    d = torch.randn(32, 64, device=device)
    mask = torch.zeros(32, 2, dtype=torch.int32, device=device)
    calls = [
        lambda: ops.dequantize(packed, torch.float16),
        lambda: ops.unrotate(d, mask, torch.float16),
        lambda: ops.gemm(packed, packed, 1.0, torch.float16),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match="dtype must be float32 or bfloat16"):
            call()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("M, N, K", [(0, 64, 1024), (1, 40, 4096), (3, 8, 2048)])
def test_a_product_without_rows_or_with_part_of_a_block_of_columns_is_whole(M, N, K, device):
    a = random_packed(M, K)
    b = random_packed(N, K)
    got = ops.gemm(*to_device(device, a, b), 1.0, torch.float32).cpu()
    exact = reference.gemm(*a, *b, 1.0, torch.float32)
    assert got.shape == (M, N)
    assert torch.allclose(got, exact, rtol=1e-3, atol=1e-3 * float(exact.abs().max() if M else 1))
