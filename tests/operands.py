"""What the tests of the kernels share: operands, and comparisons of bytes and of products.

Nothing is compiled here, so that the kernels of a GPU can be tested without those of the CPU.
"""
import torch
import torch.nn.functional as F

from fp4 import reference
from fp4.backend import swizzle_scales
from fp4.ops import Packed

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
# stochastic, and the sign orders of x and of x.T
SIGN_ORDERS = [("before", "before"), ("after", "none"), ("none", "after")]
HOW_BACKWARD = [(stochastic, *orders) for stochastic in (False, True) for orders in SIGN_ORDERS]


# ---- operands

def every_scale_byte():
    """Packed [64, 8192]: block column j has the scale byte j, so a transposed block has one, too.

    In the last rows the bytes are mixed, so that a transposed block has many.
    """
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (64, 4096), generator=g).to(torch.uint8)
    scales = torch.arange(256).repeat(64, 1).to(torch.uint8)
    scales[32:] = torch.randint(0, 256, (32, 256), generator=g).to(torch.uint8)
    return Packed(codes, scales)


def ugly_values(rows, columns):
    """Blocks of all sizes, ties, zeros, NaN and Inf, in float32; in few rows only the sizes."""
    g = torch.Generator().manual_seed(rows)
    sizes = torch.randint(-30, 30, (rows, columns // 32), generator=g).float().exp2()
    x = torch.randn(rows, columns, generator=g) * sizes.repeat_interleave(32, 1)
    if rows > 5:
        x[1, :32] = torch.arange(32) / 4
        x[2, -32:] = 0
        x[3, :32] = 1e-40
        x[4, :32] = 3e38
        x[5, :32] = 2. ** -120
        x[rows // 2, 3] = torch.nan
        x[rows - 1, columns - 1] = torch.inf
    return x


def at_every_size():
    """A matrix [300, 64] whose row r has the size 2**(r - 150): subnormal numbers to infinity."""
    g = torch.Generator().manual_seed(0)
    size = torch.arange(-150, 150).double().exp2()[:, None]
    return (torch.randn(300, 64, generator=g).double() * size).float()


def at_the_edge_of_a_scale():
    """Blocks [64 * 41, 32] whose QuEST scale is 1 or sqrt(2), or up to 20 roundings beside it.

    There the last bit of a sum decides about the power of two.
    """
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    v = reference.hadamard(x)
    best = v.double().std(-1, correction=0, keepdim=True) * reference.QUEST_SCALE_PER_STD
    best[::2] /= 2 ** .5
    step = 1 + torch.arange(-20, 21).double()[:, None, None] * 2 ** -24
    return (x / best * step).float().flatten(0, 1)


def every_bfloat16_and_the_neighbours_of_midpoints():
    """Finite numbers: each BF16, and float32 around the ties, the grid and 6."""
    u = torch.arange(65536).to(torch.int16).view(torch.bfloat16).float()
    points = torch.cat((torch.arange(0, 29) / 4, torch.arange(0, 6 * 512) / 512))
    points = torch.cat((points, -points))
    around = [torch.nextafter(points, torch.full_like(points, to)) for to in (-9., 9.)]
    u = torch.cat((u, points, *around))
    return u[u.isfinite()].contiguous()


def random_packed(rows, K):
    return Packed(*reference.quantize_forward(torch.randn(rows, K), "floor")[:2])


def random_at_sizes(rows, K, octaves, generator=None):
    """Random codes, with scales that span so many octaves."""
    codes = torch.randint(0, 256, (rows, K // 2), dtype=torch.uint8, generator=generator)
    scales = torch.randint(120, 120 + octaves, (rows, K // 32), generator=generator)
    return Packed(codes, scales.to(torch.uint8))


# ---- comparisons

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


def unswizzle(tiles, rows, blocks):
    """The scales [rows, blocks] of tiles as Blackwell reads them."""
    s = tiles.view(-(-rows // 128), -(-blocks // 4), 32, 4, 4).permute(0, 3, 2, 1, 4)
    return s.flatten(0, 2).flatten(1)[:rows, :blocks]


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


ALPHA = torch.tensor(16 / 9).item()             # a float32


def norm_of_terms(a, b):
    """The root of the sum of the squares of a product's terms, ALPHA included."""
    a = reference.dequantize(*a, torch.float64)
    b = reference.dequantize(*b, torch.float64)
    return ALPHA * (a.square() @ b.square().T).sqrt()


def error_of_a_sum(a, b):
    """What a sum of float32 may be off by, whatever its order.

    The partial sums of terms of either sign grow like sqrt(k), and each is off by up to 2**-24 of
    itself, in either direction. So the error is about sqrt(K) 2**-24 times the norm of the terms:
    at most 1.31 times, where 2112 sums of K = 32 to 40,000 products, of 20 octaves, were taken one
    term after the other, and at most .53 times in torch's order.
    """
    K = 2 * a.codes.shape[1]
    return 3 * K ** .5 * 2 ** -24 * norm_of_terms(a, b)
