"""The compiled ops give the bytes of fp4/reference.py, on ugly shapes and ugly values."""
import pytest
import torch
import torch.nn.functional as F

import fp4
from fp4 import ops, reference
from fp4.backend import swizzle_scales
from fp4.ops import Packed
from test_blackwell import unswizzle

BACKEND = fp4.build()
pytestmark = pytest.mark.skipif(not BACKEND.is_compiled, reason="no compiler on this machine")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
# stochastic, and the sign orders of x and of x.T
SIGN_ORDERS = [("before", "before"), ("after", "none"), ("none", "after")]
HOW_BACKWARD = [(stochastic, *orders) for stochastic in (False, True) for orders in SIGN_ORDERS]
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


def same(got, want):
    """Asserts equal bytes, but for NaN: any NaN equals any other. -0 does not equal 0."""
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        bits = {2: torch.int16, 4: torch.int32}.get(a.element_size(), torch.uint8)
        if a.is_floating_point():
            assert torch.equal(a.isnan(), b.isnan())
            a = a.nan_to_num(0.).view(bits)
            b = b.nan_to_num(0.).view(bits)
        differ = (a != b).nonzero()
        assert len(differ) == 0, \
            f"{len(differ)} of {a.numel()} differ, first at {differ[0].tolist()}"


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


def tiles_of(codes, scales, right=False):
    """The definition of kernels/fp8_tiles.cuh: packed -> FP8 tiles and their scales.

    Also returns how many blocks fell out of the window of exponents that FP8 holds.
    """
    M = codes.shape[0]
    K = 2 * codes.shape[1]
    x = F.pad(reference.dequantize(codes, scales, torch.float64), (0, -K % 128, 0, -M % 128))
    x = x.unflatten(-1, (-1, 4, 32))
    e = F.pad(scales.int(), (0, -K % 128 // 32, 0, -M % 128)).unflatten(-1, (-1, 4)) - 127
    counts = x.abs().amax(-1).gt(0) & x.isfinite().all(-1)      # [M, K/128, 4], as e
    largest = torch.where(counts, e, -999).amax(-1)             # of 128 neighbours
    if right:                                                   # ... in 32 rows
        largest = largest.unflatten(0, (-1, 32)).amax(1).repeat_interleave(32, 0)
    if right:
        s, octaves, dtype = (13, 29, torch.float8_e5m2)
    else:
        s, octaves, dtype = (6, 15, torch.float8_e4m3fn)
    lost = int((counts & (e <= largest[..., None] - octaves)).sum())

    top = largest.clamp_min(-112)
    fp8 = (x / reference.pow2(top - s).double()[..., None, None]).float().to(dtype)
    fp8 = fp8.flatten(-2).view(torch.uint8)
    # [M/128, K/128, 128, 8, 16]
    chunks = fp8.unflatten(0, (-1, 128)).transpose(1, 2).unflatten(-1, (8, 16))
    chunk_of = (torch.arange(128)[:, None] & 7) ^ torch.arange(8)
    swizzled = chunks.gather(3, chunk_of[..., None].expand(chunks.shape))
    rows_per_scale = 32 if right else 1
    top = top.unflatten(0, (-1, 128)).transpose(1, 2)[..., ::rows_per_scale]
    return swizzled.flatten(2), reference.pow2(top - s).contiguous(), lost


def same_tiles(got, want, right=False):
    """Asserts equal values: here -0 equals 0, and any NaN is a NaN."""
    want = tiles_of(*want, right)
    dtype = torch.float8_e5m2 if right else torch.float8_e4m3fn
    a = got[0].cpu().view(dtype).float() + 0.
    b = want[0].cpu().view(dtype).float() + 0.
    same([a, got[1].cpu()], [b, want[1]])


def same_scale_tiles(got, want, right=False, zeros=127):
    """Asserts equal bytes of packed codes, and of scales that are in tiles.

    Beyond the matrix the scales are those of zeros.
    """
    codes, tiles = got
    want_codes, scales = want
    same([codes.cpu(), unswizzle(tiles.cpu(), *scales.shape)], [want_codes, scales])
    padding = swizzle_scales(torch.ones_like(scales)) == 0
    assert tiles.numel() == padding.numel()
    assert (tiles.cpu()[padding] == zeros).all()


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


def random_packed(rows, K):
    return Packed(*reference.quantize_forward(torch.randn(rows, K), "floor")[:2])


def product_of_magnitudes(a, b):
    """Returns 16/9 * |a| @ |b|.T, which the error of a sum is proportional to."""
    a = reference.dequantize(*a, torch.float64)
    b = reference.dequantize(*b, torch.float64)
    return 16 / 9 * a.abs() @ b.abs().T


@pytest.mark.parametrize("M, N, K", PRODUCTS)
@pytest.mark.parametrize("dtype, ulp", DTYPES_AND_ULPS)
@pytest.mark.parametrize("device", DEVICES)
def test_a_product_is_within_the_error_of_an_fp32_sum_and_one_rounding(M, N, K, dtype, ulp, device):
    torch.manual_seed(K)
    a = random_packed(M, K)
    b = random_packed(N, K)
    got = ops.gemm(*to_device(device, a, b), 16 / 9, dtype).cpu().double()
    exact = reference.gemm(*a, *b, 16 / 9, torch.float32).double()
    size = product_of_magnitudes(a, b)
    assert (got - exact).abs().le(K * 2 ** -24 * size + ulp * exact.abs()).all()


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
    got = ops.gemm_unrotate(*operands, mask.to(device), 16 / 9, dtype).cpu().double()

    product = reference.gemm(*a, *b, 16 / 9, torch.float32)
    exact = reference.unrotate(product, mask, torch.float32).double()
    size = product_of_magnitudes(a, b)
    size = size.unflatten(-1, (-1, 32)).sum(-1, True).expand(M, N // 32, 32).flatten(-2)
    size = size * 32 ** -.5
    assert (got - exact).abs().le((K + 8) * 2 ** -24 * size + ulp * exact.abs()).all()

    other_mask = reference.unrotate(product, ~mask, torch.float32).double()
    assert not torch.allclose(got, other_mask, atol=.1 * exact.std())


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
