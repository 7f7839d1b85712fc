"""
THE DEFINITION of MXFP4 and of Quartet's two quantisers, in plain PyTorch. The kernels' quantisers
must give the same bytes, and their products the same numbers up to the rounding of a sum (and, in
FP8, of blocks far smaller than their neighbours).
This file is slow on purpose: it is the oracle of every test.

MXFP4 (OCP Microscaling v1.0) holds a number in 4 bits. Such a code is named E2M1: a sign, 2 bits
of exponent and 1 of mantissa, which make the magnitudes 0, .5, 1, 1.5, 2, 3, 4 and 6. That is a
small range, so 32 neighbours, a block, share a scale of one byte. The scale is named E8M0: 8 bits
of exponent and no mantissa, a power of two. Together they cost 4.25 bits a number. An example:

    numbers of a block      .031    -.11    .2      with the scale 2**-5 = .03125
    divided by the scale    .99     -3.52   6.4
    rounded to the grid     1       -4      6       6.4 lies beyond the grid: it is clipped
    what they stand for     .03125  -.125   .1875

A matrix [M, K] is packed in two tensors. Blocks lie along the last axis, because that is the axis
a product sums over: a sum of 32 terms then has one scale for its left and one for its right side.

    x[m, k]  ~=  E2M1[codes[m, k]] * 2**(scales[m, k // 32] - 127)
    codes   uint8 [M, K/2]    two in a byte, the even k in the low half; bit 3 of a code is the sign
    scales  uint8 [M, K/32]   255 is NaN: a NaN or an Inf in a block makes the whole block NaN

To quantise is to choose a scale for each block and then to round. Both quantisers first rotate
each block, which spreads a single large number over all 32. Then they differ in the scale:

    QuEST     forward    a multiple of the block's standard deviation, for the least error; what
                         lies beyond +-6 after scaling is clipped, as 6.4 is above
    absmax    backward   from the largest number, which scaling brings into [4, 8), and a factor 3/4
                         brings into [3, 6): nothing is clipped. Above, 6.4 becomes 4.8, rounded 4,
                         and stands for 4 / (3/4) * 2**-5 = .1667

In the quantisers the order of every sum is fixed (a butterfly, as 32 lanes of a GPU would add), so
that tests ask for ==, never for "close". A fused multiply-add anywhere would break that.
"""
import torch
import torch.nn.functional as F

from .check import check

E2M1 = (0., .5, 1., 1.5, 2., 3., 4., 6.)    # the magnitudes of codes 0 to 7
HADAMARD_NORM = 32 ** -.5                   # the entries of the Hadamard matrix are +- this
# A Gaussian is quantised with the least squared error when 6 stands for 2.922 standard deviations.
QUEST_SCALE_PER_STD = 2.92247856 / 6
U32 = 0xFFFFFFFF                            # the low 32 bits of an integer


# ---- blocks of 32: [M, K] -> [M, K/32, 32]

def blocks(x):
    """Cuts a matrix [M, K] into blocks, [M, K/32, 32] in float32."""
    check(x.dim() == 2 and x.dtype in (torch.float32, torch.bfloat16),
          f"x must be a float32 or bfloat16 matrix, got {x.dtype} {list(x.shape)}")
    check(x.shape[1] % 32 == 0, f"the last dimension must be a multiple of 32, got {x.shape[1]}")
    return x.float().unflatten(-1, (-1, 32))


def butterfly(v, combine):
    """Replaces each pair (a, b) of a block by combine(a, b), five times.

    First the pairs are neighbours, then 2, 4, 8 and 16 apart: each element meets all 32 in the end.
    A longer block takes more such rounds, and a shorter one fewer.
    """
    stride = 1
    while stride < v.shape[-1]:
        a, b = v.unflatten(-1, (-1, 2, stride)).unbind(-2)
        v = torch.stack(combine(a, b), -2).flatten(-3)
        stride *= 2
    return v


def hadamard(v):
    """Rotates each block: multiplies it by the Hadamard matrix, which is its own inverse."""
    return butterfly(v, lambda a, b: (a + b, a - b)) * HADAMARD_NORM


def total(v):
    """Sums each block, [..., 32] -> [..., 1]."""
    return butterfly(v, lambda a, b: (a + b, a + b))[..., :1]


# ---- powers of two

def floor_log2(x): return torch.frexp(x).exponent - 1


def pow2(e):
    """Returns 2.0**e in float32, exactly, for integers e in [-127, 127].

    It writes e into the exponent bits of a float64, since in float32 2**-127 is a subnormal number.
    """
    return ((e.long() + 1023) << 52).view(torch.float64).float()


# ---- rounding u = v / scale to a code

def round_nearest(u):
    """Rounds to the nearest E2M1 code; what lies beyond 6 becomes 6.

    The code of a magnitude is the number of midpoints, between neighbours of the grid, that lie
    below it. A tie, a magnitude on a midpoint, goes to the even one of its two codes, as in the GPU
    instruction cvt.rn.satfinite.e2m1x2.
    """
    magnitude = u.abs()
    code = 8 * torch.signbit(u)
    # Between codes 0 and 1, 2 and 3, 4 and 5, 6 and 7: the even code is the lower one.
    for midpoint in (.25, 1.25, 2.5, 5.):
        code = code + (magnitude > midpoint)
    # Between codes 1 and 2, 3 and 4, 5 and 6: the even code is the upper one.
    for midpoint in (.75, 1.75, 3.5):
        code = code + (magnitude >= midpoint)
    return code


def round_stochastic(u, noise):
    """Rounds |u| < 6 up or down at random, so that the mean of many draws is u.

    Between two grid points lo < hi it goes up with probability p = (|u| - lo) / (hi - lo). noise is
    a random byte for each element, and the largest of its 256 values make an element go up: 256 p
    of them, to the nearest whole number, which is what 255.5 does below. So p comes in steps of
    1/256, the mean of many draws is off by at most 1/512 of a grid step, and p = 0 never goes up.
    """
    magnitude = u.abs()
    grid = torch.tensor(E2M1, device=u.device)
    low = sum((magnitude >= point).int() for point in E2M1[1:7])
    p = (magnitude - grid[low]) / (grid[low + 1] - grid[low])
    return low + (p >= (255.5 - noise) / 256) + 8 * torch.signbit(u)


def philox(seed, n):
    """Returns n x 4 random words of 32 bits: Philox4x32-10 (Salmon et al., SC'11).

    Philox has no state to carry along. It scrambles a counter, here 0 to n - 1, under a key, here
    the 64-bit seed, so that any thread of any device can compute the words of its own elements.
    A 32 x 32-bit product has a high and a low half; ten rounds mix them into one another.
    """
    counter = torch.arange(n, device=seed.device)
    zero = torch.zeros_like(counter)
    words = [counter & U32, counter >> 32, zero, zero]
    key = [seed & U32, (seed >> 32) & U32]
    for _ in range(10):
        first = words[0] * 0xD2511F53
        second = words[2] * 0xCD9E8D57
        words = [((second >> 32) ^ words[1] ^ key[0]) & U32, second & U32,
                 ((first >> 32) ^ words[3] ^ key[1]) & U32, first & U32]
        key = [(key[0] + 0x9E3779B9) & U32, (key[1] + 0xBB67AE85) & U32]
    return torch.stack(words, -1)


def noise(seed, n):
    """Returns n random bytes: element i gets byte i % 16 (little-endian) of Philox call i // 16."""
    shifts = torch.arange(0, 32, 8, device=seed.device)
    words = philox(seed, (n + 15) // 16)
    return ((words[..., None] >> shifts) & 255).flatten()[:n]


# ---- packing

def pack(code, e, finite):
    """Packs codes [M, K/32, 32] and exponents [M, K/32, 1] into codes [M, K/2], scales [M, K/32].

    A block that is not finite gets the scale NaN and zero codes.
    """
    code = torch.where(finite, code, 0).flatten(-2).to(torch.uint8)
    scales = torch.where(finite, e + 127, 255).squeeze(-1).to(torch.uint8)
    return code[:, 0::2] | (code[:, 1::2] << 4), scales


def e2m1(codes):
    """Returns what codes [M, K/2] stand for without their scales, [M, K/32, 32] in float32."""
    code = torch.stack((codes & 15, codes >> 4), -1).flatten(-2).long()
    sign = 1 - 2 * (code >> 3)
    values = torch.tensor(E2M1, device=codes.device)[code & 7] * sign
    return values.unflatten(-1, (-1, 32))


def e8m0(scales):
    """Returns the powers of two that scale bytes stand for, in float32."""
    return torch.where(scales == 255, torch.nan, pow2(scales.int().clamp_max(254) - 127))


def dequantize(codes, scales, dtype):
    """Unpacks codes [M, K/2] and scales [M, K/32] to values [M, K].

    The values are exact in float32 and in bfloat16, apart from underflow.
    """
    matching = codes.shape == (scales.shape[0], 16 * scales.shape[1])
    check(codes.dtype == scales.dtype == torch.uint8 and matching,
          "codes [M, K/2] and scales [M, K/32] do not match: "
          f"{list(codes.shape)}, {list(scales.shape)}")
    return (e2m1(codes) * e8m0(scales)[..., None]).flatten(-2).to(dtype)


def bits(mask):
    """Packs bool [..., 32] into int32 [...]: bit i is element i."""
    return (mask.long() << torch.arange(32, device=mask.device)).sum(-1).to(torch.int32)


def unbits(words):
    """Unpacks the 32 low bits of integers [...] to 0 and 1, [..., 32]."""
    return (words.long()[..., None] >> torch.arange(32, device=words.device)) & 1


# ---- the ops: ops.py has their schemas

def quantize_forward(x, scale):
    """Rotates x [M, K], then quantises it with the least error: QuEST (section 4.3 of the paper).

    A rotated block looks like a Gaussian, whose best scale is a fixed multiple of its standard
    deviation. But a scale must be a power of two: scale "floor" takes the one below the best, and
    "nearest" the one whose logarithm is nearest.

    Returns codes, scales, and a mask int32 [M, K/32], a bit per value: 1 inside the grid, 0 where
    the value reached its end or was clipped.
    """
    check(scale in ("floor", "nearest"), f"scale must be floor or nearest, got {scale}")
    v = hadamard(blocks(x))
    mean = total(v) / 32
    variance = total(v * v) / 32 - mean.square()
    variance = variance.clamp_min(0)        # rounding can leave it below 0; a NaN stays
    # torch's root of a float32 may be off by its last bit, on a CPU with MKL.
    std = variance.double().sqrt().float()
    best = std * QUEST_SCALE_PER_STD + 1e-8         # so that a block of zeros has a scale
    e = floor_log2(best)
    if scale == "nearest":
        e = e + (torch.frexp(best).mantissa > .5 ** .5)
    e = e.clamp(-127, 127)
    finite = best.isfinite()
    u = v * pow2(-e)
    return *pack(round_nearest(u), e, finite), bits((u.abs() < 6) & finite)


def absmax(x, signs, seed, stochastic, sign_order):
    """Rotates x [M, K], then quantises it without clipping; for the backward pass.

    Clipping would bias the gradient. The scale of a block is 2**(floor(log2 m) - 2), where m is its
    largest magnitude. m divided by this scale lies in [4, 8). Multiplied by 3/4 as well it lies in
    [3, 6), below the end of the grid. The packed values are therefore 3/4 of the rotated x, and a
    product of two such operands has to be multiplied by 16/9.

    signs       int64 [1]: bit i, if set, negates element i of every block
    seed        int64 [] or [1]: of the noise, if stochastic
    sign_order  "before": signs, then the rotation. "after": the rotation, then signs, which change
                no magnitude, so that the rotation is not random. "none": no signs and no rotation
    """
    v = blocks(x)
    sign = 1 - 2 * unbits(signs)
    if sign_order == "before":
        v = hadamard(v * sign)
    elif sign_order == "after":
        v = hadamard(v) * sign
    largest = v.abs().amax(-1, True)
    e = torch.where(largest == 0, 0, (floor_log2(largest) - 2).clamp(-127, 127))
    u = v * (.75 * pow2(-e))
    if stochastic:
        code = round_stochastic(u, noise(seed, u.numel()).view_as(u))
    else:
        code = round_nearest(u)
    return pack(torch.where(largest == 0, 0, code), e, largest.isfinite())


def transpose_padded(x): return F.pad(x, (0, 0, 0, -x.shape[0] % 32)).T


def quantize_backward(
        x, signs, seeds, stochastic, sign_order, sign_order_t, operand_format="packed"):
    """Quantises x [M, K] along K, and x.T [K, M] along M, which zeros pad to a multiple of 32.

    A gradient dy is needed both ways, because its two products sum over different axes. seeds int64
    [2] and the two sign orders are those of x and of x.T.
    """
    check(operand_format == "packed", f"format {operand_format} is for the kernels of a GPU")
    plain = absmax(x, signs, seeds[0], stochastic, sign_order)
    transposed = absmax(transpose_padded(x), signs, seeds[1], stochastic, sign_order_t)
    return *plain, *transposed


def requantize_transposed(
        codes, scales, signs, seed, stochastic, sign_order, operand_format="packed"):
    """Quantises the transpose [K, M] of a packed matrix [M, K] anew; seed is int64 [1]."""
    check(operand_format == "packed", f"format {operand_format} is for the kernels of a GPU")
    x = dequantize(codes, scales, torch.float32)
    return absmax(transpose_padded(x), signs, seed, stochastic, sign_order)


def gemm(a, a_scales, b, b_scales, alpha, dtype):
    """Returns alpha * a @ b.T, [M, N], of packed a [M, K] and b [N, K].

    In float64 every product is exact, and the error of a sum is far below float32's rounding.
    """
    check(a.shape[1] == b.shape[1], "the products' inner dimensions differ: "
          f"{2 * a.shape[1]} and {2 * b.shape[1]}")
    a = dequantize(a, a_scales, torch.float64)
    b = dequantize(b, b_scales, torch.float64)
    return (alpha * (a @ b.T)).float().to(dtype)


def matvec(x, x_scales, w, w_scales, dtype):
    """Returns x @ w.T, [M, N], of packed x [M, K] and w [N, K] for few rows M, summed in float32.

    Without their scales, the products of a block are multiples of 1/4, and their sum is exact. Of
    32 lanes, lane i adds up blocks i, i + 32, i + 64, ...; then the lanes are added as in total.
    """
    terms = torch.einsum("mbi,nbi->mnb", e2m1(x), e2m1(w))
    terms = terms * e8m0(x_scales)[:, None] * e8m0(w_scales)
    rounds = F.pad(terms, (0, -terms.shape[-1] % 32)).unflatten(-1, (-1, 32)).unbind(-2)
    return total(sum(rounds, torch.zeros(32, device=x.device)))[..., 0].to(dtype)


def unrotate(d, mask, dtype):
    """Masks a gradient d [M, K] in the rotated basis, then undoes the rotation.

    The forward pass clipped values of the rotated block, so their gradient is set to zero before
    the block is rotated back. The mask, int32 [M, K/32], is a factor and not a selection, because
    NaN * 0 is NaN and stays visible. The rotation is its own inverse.
    """
    return hadamard(blocks(d) * unbits(mask)).flatten(-2).to(dtype)


def draw(dy, x, n):
    """Draws random signs int64 [1] and n seeds int64 [n] from torch's generator of dy's device.

    x is not read: ops.py says what it is for.
    """
    signs = torch.randint(-2 ** 63, 2 ** 63 - 1, (1,), device=dy.device)
    seeds = torch.randint(-2 ** 63, 2 ** 63 - 1, (n,), device=dy.device)
    return signs, seeds
