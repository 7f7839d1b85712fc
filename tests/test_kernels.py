"""The compiled ops give the bytes of fp4/reference.py, on ugly shapes and ugly values."""
import pytest, torch
import fp4
from fp4 import product, reference
from fp4.nvfp4 import swizzle
from test_blackwell import unswizzle

HOW = fp4.build()
ops = torch.ops.fp4
pytestmark = pytest.mark.skipif(HOW.startswith("reference"), reason="no compiler on this machine")

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
HOW_BACKWARD = [(stochastic, *turns) for stochastic in (False, True) for turns in (("before", "before"), ("after", "none"), ("none", "after"))]        # of x, of x.T
SHAPES = [(1, 32), (3, 96), (33, 160), (64, 32), (31, 1024), (100, 544)]
VALUES = {
    "normal":       lambda x: x,
    "rows scaled":  lambda x: x * torch.exp(4 * torch.randn(x.shape[0], 1)),
    "tiny":         lambda x: x * 1e-30,
    "subnormal":    lambda x: x * 1e-42,
    "huge":         lambda x: x * 1e38,
    "3e38":         lambda x: torch.full_like(x, 3e38),
    "zero":         lambda x: x * 0,                            # with negative zeros
    "a zero block": lambda x: torch.cat((x[:, :0], torch.zeros_like(x[:, :32]), x[:, 32:]), 1),
    "constant":     lambda x: torch.full_like(x, 0.3),
    "ties":         lambda x: torch.round(4 * x) / 4,
    "NaN":          lambda x: x.index_put((torch.tensor(0), torch.tensor(5)), torch.tensor(float("nan"))),
    "Inf":          lambda x: x.index_put((torch.tensor(0), torch.tensor(5)), torch.tensor(float("inf"))),
}


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan():
    """or 255; what a kernel leaves out shows"""
    torch.use_deterministic_algorithms(True, warn_only=True)    # of this, only what it does to torch.empty is meant
    assert torch.empty(8).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def same(got, want):
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        bits = {2: torch.int16, 4: torch.int32}.get(a.element_size(), torch.uint8)
        if a.is_floating_point():                               # any NaN equals any other, -0 does not equal 0
            assert torch.equal(a.isnan(), b.isnan())
            a, b = a.nan_to_num(0.).view(bits), b.nan_to_num(0.).view(bits)
        differ = (a != b).nonzero()
        assert len(differ) == 0, f"{len(differ)} of {a.numel()} differ, first at {differ[0].tolist()}"


@pytest.fixture(params=[(s, v, d) for s in SHAPES for v in VALUES for d in (torch.float32, torch.bfloat16)],
                ids=lambda p: f"{p[0][0]}x{p[0][1]}-{p[1]}-{str(p[2])[6:]}")
def x(request):
    (M, K), value, dtype = request.param
    torch.manual_seed(M * K)
    return VALUES[value](torch.randn(M, K)).to(dtype)


@pytest.mark.parametrize("device", DEVICES)
def test_each_op_gives_the_bytes_of_the_definition(x, device):
    def check(name, *args):
        got = getattr(ops, name)(*(a.to(device) if isinstance(a, torch.Tensor) else a for a in args))
        want = getattr(reference, name)(*args)
        same([t.cpu() for t in got] if isinstance(got, tuple | list) else [got.cpu()], want if isinstance(want, tuple) else [want])
    for scale in ("floor", "nearest"): check("quantize_forward", x, scale)
    codes, scales, mask = reference.quantize_forward(x, "floor")
    signs, seeds = reference.draw(x, x, 3)
    for how in HOW_BACKWARD:
        check("quantize_backward", x, signs, seeds[:2], *how, "packed")
        check("requantize", codes, scales, signs, seeds[2:], *how[:2], "packed")
    for dtype in (torch.float32, torch.bfloat16):
        check("dequantize", codes, scales, dtype)
        check("unrotate", x, mask, dtype)


def tiles_of(codes, scales, right=False):
    """the definition of tiles.cuh: packed -> FP8 tiles and their scales, and how many blocks fell out of the window"""
    (M, K), pad = (codes.shape[0], 2 * codes.shape[1]), torch.nn.functional.pad
    x = pad(reference.dequantize(codes, scales, torch.float64), (0, -K % 128, 0, -M % 128)).unflatten(-1, (-1, 4, 32))
    e = pad(scales.int(), (0, -K % 128 // 32, 0, -M % 128)).unflatten(-1, (-1, 4)) - 127        # [M, K/128, 4]
    counts = x.abs().amax(-1).gt(0) & x.isfinite().all(-1)
    largest = torch.where(counts, e, -999).amax(-1)                                             # of 128 neighbours
    if right: largest = largest.unflatten(0, (-1, 32)).amax(1).repeat_interleave(32, 0)         # ... in 32 rows
    s, octaves, dtype = (13, 29, torch.float8_e5m2) if right else (6, 15, torch.float8_e4m3fn)
    top = largest.clamp_min(-112)
    fp8 = (x / reference.pow2(top - s).double()[..., None, None]).float().to(dtype).flatten(-2).view(torch.uint8)
    chunks = fp8.unflatten(0, (-1, 128)).transpose(1, 2).unflatten(-1, (8, 16))                 # [M/128, K/128, 128, 8, 16]
    where = (torch.arange(128)[:, None] & 7) ^ torch.arange(8)
    swizzled = chunks.gather(3, where[..., None].expand(chunks.shape))
    top = top.unflatten(0, (-1, 128)).transpose(1, 2)[..., ::32 if right else 1]
    return swizzled.flatten(2), reference.pow2(top - s).contiguous(), int((counts & (e <= largest[..., None] - octaves)).sum())


def same_tiles(got, want, right=False):
    "equal values, -0 equals 0; any NaN is a NaN"
    want = tiles_of(*want, right)
    a, b = (t.cpu().view(torch.float8_e5m2 if right else torch.float8_e4m3fn).float() + 0. for t in (got[0], want[0]))
    same([a, got[1].cpu()], [b, want[1]])


def same_scale_tiles(got, want, right=False, zeros=127):
    "packed, but for the scales: those are in tiles, and beyond the matrix those of zeros"
    (codes, tiles), (want_codes, scales) = got, want
    same([codes.cpu(), unswizzle(tiles.cpu(), *scales.shape)], [want_codes, scales])
    padding = swizzle(torch.ones_like(scales)) == 0
    assert tiles.numel() == padding.numel() and (tiles.cpu()[padding] == zeros).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("format, same_operand", [("fp8", same_tiles), ("mxf4", same_scale_tiles)])
def test_operands_and_scales_in_tiles_are_the_packed_ones_exactly(x, format, same_operand):
    packed = reference.quantize_forward(x, "floor")[:2]
    signs, seeds = reference.draw(x, x, 3)
    on_gpu = lambda *tensors: [t.cuda() for t in tensors]
    for how in HOW_BACKWARD:
        got, want = ops.quantize_backward(*on_gpu(x, signs, seeds[:2]), *how, format), reference.quantize_backward(x, signs, seeds[:2], *how)
        same_operand(got[:2], want[:2])
        same_operand(got[2:], want[2:])
        same_operand(ops.requantize(*on_gpu(*packed, signs, seeds[2:]), *how[:2], format), reference.requantize(*packed, signs, seeds[2:], *how[:2]), True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("format", ["packed", "fp8"])
def test_tiles_that_a_block_of_threads_takes_one_after_the_other(format, stochastic):
    """of a matrix so wide that a column of six tiles has two blocks; the shapes above have a block a tile"""
    M, K, how = 700, 128 * torch.cuda.get_device_properties().multi_processor_count - 32, (stochastic, "before", "before")
    x = torch.randn(M, K, generator=torch.Generator().manual_seed(0)).bfloat16()
    x[M // 2, 5] = torch.nan
    packed, (signs, seeds) = reference.quantize_forward(x, "floor")[:2], reference.draw(x, x, 3)
    got = ops.quantize_backward(*(t.cuda() for t in (x, signs, seeds[:2])), *how, format)
    want = reference.quantize_backward(x, signs, seeds[:2], *how)
    turned = ops.requantize(*(t.cuda() for t in (*packed, signs, seeds[2:])), *how[:2], format)
    for i, right, a, b in ((0, False, got, want), (2, False, got, want), (0, True, turned, reference.requantize(*packed, signs, seeds[2:], *how[:2]))):
        if format == "packed": same([t.cpu() for t in a[i:i + 2]], b[i:i + 2])
        else: same_tiles(a[i:i + 2], b[i:i + 2], right)


PRODUCTS = [(1, 32, 32), (33, 64, 96), (100, 160, 1024), (3, 64, 4096), (300, 416, 32), (513, 672, 544), (160, 96, 40000)]

@pytest.mark.parametrize("M, N, K", PRODUCTS)
@pytest.mark.parametrize("dtype, ulp", [(torch.float32, 2 ** -23), (torch.bfloat16, 2 ** -8)])
@pytest.mark.parametrize("device", DEVICES)
def test_a_product_is_within_the_error_of_an_fp32_sum_and_one_rounding(M, N, K, dtype, ulp, device):
    torch.manual_seed(K)
    a, b = (reference.quantize_forward(torch.randn(rows, K), "floor")[:2] for rows in (M, N))
    got = ops.gemm(*(t.to(device) for t in (*a, *b)), 16 / 9, dtype).cpu().double()
    exact = reference.gemm(*a, *b, 16 / 9, torch.float32).double()
    size = 16 / 9 * reference.dequantize(*a, torch.float64).abs() @ reference.dequantize(*b, torch.float64).abs().T
    assert (got - exact).abs().le(K * 2 ** -24 * size + ulp * exact.abs()).all()


@pytest.mark.parametrize("M, N, K", PRODUCTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", DEVICES)
def test_quantising_and_multiplying_in_one_gives_what_both_give_apart(M, N, K, dtype, device):
    torch.manual_seed(K)
    x, w = torch.randn(M, K, device=device, dtype=dtype), ops.quantize_forward(torch.randn(N, K, device=device), "floor")[:2]
    x[0, 5] = float("nan")
    packed = ops.quantize_forward(x, "nearest")
    same(ops.quantize_gemm(x, "nearest", *w), [ops.gemm(*packed[:2], *w, 1.0, dtype), *packed])


@pytest.mark.parametrize("M, N, K", PRODUCTS)
@pytest.mark.parametrize("dtype, ulp", [(torch.float32, 2 ** -23), (torch.bfloat16, 2 ** -8)])
@pytest.mark.parametrize("device", DEVICES)
def test_a_gradients_product_is_masked_and_rotated_back(M, N, K, dtype, ulp, device):
    torch.manual_seed(K)
    (a, b), mask = (reference.quantize_forward(torch.randn(rows, K), "floor")[:2] for rows in (M, N)), torch.randint(-2 ** 31, 2 ** 31, (M, N // 32)).int()
    operands = [t.to(device) for t in (*a, *b)]
    if device == "cuda" and product.FORMAT == "fp8": operands = [t.cuda() for t in (*tiles_of(*a)[:2], *tiles_of(*b, True)[:2])]
    if device == "cuda" and product.FORMAT == "mxf4": operands = [t.cuda() for t in (a[0], swizzle(a[1]), b[0], swizzle(b[1]))]
    got = ops.gemm_unrotate(*operands, mask.to(device), 16 / 9, dtype).cpu().double()
    exact = reference.unrotate(reference.gemm(*a, *b, 16 / 9, torch.float32), mask, torch.float32).double()
    size = 16 / 9 * reference.dequantize(*a, torch.float64).abs() @ reference.dequantize(*b, torch.float64).abs().T
    size = size.unflatten(-1, (-1, 32)).sum(-1, True).expand(M, N // 32, 32).flatten(-2) * 32 ** -.5
    assert (got - exact).abs().le((K + 8) * 2 ** -24 * size + ulp * exact.abs()).all()
    assert not torch.allclose(got, reference.unrotate(reference.gemm(*a, *b, 16 / 9, torch.float32), ~mask, torch.float32).double(), atol=.1 * exact.std())


@pytest.mark.parametrize("device", DEVICES)
def test_a_nan_scale_makes_the_row_of_the_product_nan_and_no_other(device):
    a, b = (reference.quantize_forward(torch.randn(rows, 256), "floor")[:2] for rows in (200, 64))
    a[1][7, 3] = 255
    got = ops.gemm(*(t.to(device) for t in (*a, *b)), 1.0, torch.float32).cpu()
    assert got[7].isnan().all() and got.isnan().sum() == 64


@pytest.mark.parametrize("right, octaves", [(False, 15), (True, 29)])
def test_the_windows_of_the_fp8_tiles_hold_15_and_29_octaves(right, octaves):
    torch.manual_seed(0)
    codes = torch.randint(0, 256, (50, 512), dtype=torch.uint8)
    lost = lambda octaves: tiles_of(codes, torch.randint(40, 40 + octaves, (50, 32)).to(torch.uint8), right)[2]
    assert lost(octaves) == 0 and lost(octaves + 1) > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_folding_into_fp8_changes_no_value_within_15_octaves():
    torch.manual_seed(0)
    for K in (1024, 8192):
        codes = torch.randint(0, 256, (50, K // 2), dtype=torch.uint8)
        scales = torch.randint(16, 190, (50, 1)) + torch.randint(0, 15, (50, K // 32))
        scales[:, 3], codes[:, 48:64] = 254, 0                  # a zero block's scale does not count
        codes[:, 64], scales[:, 4] = 7, scales.amin(1)          # nothing is lost at the lower end
        codes, scales = codes.cuda(), scales.to(torch.uint8).cuda()
        fp8, rows = ops.fold(codes, scales, 1.0)
        assert torch.equal(fp8.double() * rows.double(), ops.dequantize(codes, scales, torch.float32).double())


def test_an_op_takes_no_matrix_it_would_misread():
    x = torch.randn(64, 64)
    with pytest.raises(RuntimeError, match="contiguous"): ops.quantize_forward(x.T, "floor")
    with pytest.raises(RuntimeError, match="seeds must have 2"): ops.quantize_backward(x, torch.zeros(1).long(), torch.zeros(3).long(), False, "before", "before", "packed")
    with pytest.raises(RuntimeError, match="tiles are for a GPU"): ops.quantize_backward(x, torch.zeros(1).long(), torch.zeros(2).long(), False, "before", "before", "mxf4")
    with pytest.raises(RuntimeError, match="format must be"): ops.quantize_backward(x, torch.zeros(1).long(), torch.zeros(2).long(), False, "before", "before", "bf16")
    with pytest.raises(RuntimeError, match="turn must be"): ops.quantize_backward(x, torch.zeros(1).long(), torch.zeros(2).long(), False, "before", "up", "packed")
    with pytest.raises(RuntimeError, match="mask"): ops.unrotate(x, torch.zeros(64, 3, dtype=torch.int32), torch.float32)
