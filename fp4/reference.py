"""
THE DEFINITION: MXFP4 and Quartet's quantisers in plain PyTorch. Every kernel in this folder must
give the same bytes; this file is slow on purpose and the oracle of every test.

A matrix [M, K] packed as MXFP4 (OCP Microscaling v1.0) is two byte tensors; 32 neighbours along
the last axis, the one a product sums over, are a block and share one power-of-two scale:

    x[m, k]  ~=  E2M1[codes[m, k]] * 2**(scales[m, k // 32] - 127)
    codes   uint8 [M, K/2]    two a byte, the low nibble is the even k; bit 3 of a code is the sign
    scales  uint8 [M, K/32]   255 is NaN: a NaN or Inf in a block makes the whole block NaN

The order of every sum is fixed (a butterfly, as 32 lanes of a GPU would do it), so the tests ask
for ==, never for "close". A fused multiply-add anywhere would break that.
"""
import torch
import torch.nn.functional as F

E2M1 = (0., .5, 1., 1.5, 2., 3., 4., 6.)      # the magnitudes of codes 0..7
H = 32 ** -.5                                 # the entries of the normalised Hadamard matrix are +-H
SPREAD = 2.92247856 / 6                       # QuEST: scale / std with the least squared error on a Gaussian
U32 = 0xFFFFFFFF

# ---- blocks of 32: [..., K] -> [..., K/32, 32]
def butterfly(v, op):
    """five stages, stride 1, 2, 4, 8, 16: (a, b) -> op(a, b)"""
    for h in (1, 2, 4, 8, 16):
        a, b = v.unflatten(-1, (-1, 2, h)).unbind(-2)
        v = torch.stack(op(a, b), -2).flatten(-3)
    return v

def hadamard(v): return butterfly(v, lambda a, b: (a + b, a - b)) * H
def total(v):    return butterfly(v, lambda a, b: (a + b, a + b))[..., :1]

def blocks(x):
    check(x.dim() == 2 and x.dtype in (torch.float32, torch.bfloat16),
          f"x must be a float32 or bfloat16 matrix, got {x.dtype} {list(x.shape)}")
    check(x.shape[1] % 32 == 0, f"the last dimension must be a multiple of 32, got {x.shape[1]}")
    return x.float().unflatten(-1, (-1, 32))

def check(ok, sentence):
    if not ok: raise ValueError("fp4: " + sentence)

# ---- scales, and rounding u = v / scale to a code
def floor_log2(x): return torch.frexp(x).exponent - 1
def pow2(e):
    """2.0**e in float32, exactly, for integers e in [-127, 127]: the exponent field of a float64"""
    return ((e.long() + 1023) << 52).view(torch.float64).float()

def round_nearest(u):
    """saturates at 6; ties go to the even code, as cvt.rn.satfinite.e2m1x2 does"""
    down, up = (.25, 1.25, 2.5, 5.), (.75, 1.75, 3.5)           # a tie goes to 0, 2, 4, 6; to 2, 4, 6
    return sum((u.abs() > m).int() for m in down) + sum((u.abs() >= m).int() for m in up) + 8 * torch.signbit(u)

def round_stochastic(u, noise):
    """up with probability (|u| - lo) / (hi - lo); |u| < 6. noise is [0, 256): the probability comes in
    steps of 1/256, so that the mean of many draws is off by at most 1/512 of a grid step"""
    a, grid = u.abs(), torch.tensor(E2M1, device=u.device)
    lo = sum((a >= m).int() for m in E2M1[1:7])
    p = (a - grid[lo]) / (grid[lo + 1] - grid[lo])
    return lo + (p >= (255.5 - noise) / 256) + 8 * torch.signbit(u)

def philox(seed, n):
    """[n, 4] words: Philox4x32-10 (Salmon et al., SC'11), key = the 64-bit seed, counter = 0 .. n-1"""
    i = torch.arange(n, device=seed.device)
    c, k0, k1 = [i & U32, i >> 32, 0 * i, 0 * i], seed & U32, seed >> 32 & U32
    for _ in range(10):
        p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(p1 >> 32 ^ c[1] ^ k0) & U32, p1 & U32, (p0 >> 32 ^ c[3] ^ k1) & U32, p0 & U32]
        k0, k1 = k0 + 0x9E3779B9 & U32, k1 + 0xBB67AE85 & U32
    return torch.stack(c, -1)

def noise(seed, n):
    """n bytes: element i gets byte i % 16 (little-endian) of Philox call i // 16"""
    shifts = torch.arange(0, 32, 8, device=seed.device)
    return (philox(seed, (n + 15) // 16)[..., None] >> shifts & 255).flatten()[:n]

# ---- packing
def pack(code, e, finite):
    """codes and exponents of blocks -> codes [M, K/2], scales [M, K/32]"""
    code = torch.where(finite, code, 0).flatten(-2).to(torch.uint8)
    scales = torch.where(finite, e + 127, 255).squeeze(-1).to(torch.uint8)
    return code[:, 0::2] | code[:, 1::2] << 4, scales

def dequantize(codes, scales, dtype):
    """codes [M, K/2], scales [M, K/32] -> [M, K]; exact in float32 and in bfloat16, but for underflow"""
    check(codes.dtype == scales.dtype == torch.uint8 and codes.shape == (scales.shape[0], 16 * scales.shape[1]),
          f"codes [M, K/2] and scales [M, K/32] do not match: {list(codes.shape)}, {list(scales.shape)}")
    q = torch.stack((codes & 15, codes >> 4), -1).flatten(-2).long()
    v = torch.tensor(E2M1, device=q.device)[q & 7] * (1 - 2 * (q >> 3))
    s = torch.where(scales == 255, torch.nan, pow2(scales.int().clamp_max(254) - 127))
    return (v.unflatten(-1, (-1, 32)) * s[..., None]).flatten(-2).to(dtype)

def bits(mask):
    """bool [..., 32] -> int32 [...]: bit i is element i"""
    return (mask.long() << torch.arange(32, device=mask.device)).sum(-1).to(torch.int32)

def unbits(words): return words.long()[..., None] >> torch.arange(32, device=words.device) & 1

# ---- the ops; schemas in __init__.py
def quantize_forward(x, scale):
    """QuEST (paper section 4.3): x [M, K] rotated -> codes, scales, and mask int32 [M, K/32], one bit a
    value: did not clip. The power-of-two scale is the one below ("floor") or nearest to the best ("nearest")"""
    check(scale in ("floor", "nearest"), f"scale must be floor or nearest, got {scale}")
    v = hadamard(blocks(x))
    variance = (total(v * v) / 32 - (total(v) / 32).square()).clamp_min(0)      # rounding can leave it below 0; NaN stays
    t = variance.sqrt() * SPREAD + 1e-8
    e = floor_log2(t)
    if scale == "nearest":
        e = e + (torch.frexp(t).mantissa > .5 ** .5)
    e, finite = e.clamp(-127, 127), t.isfinite()
    u = v * pow2(-e)
    return *pack(round_nearest(u), e, finite), bits((u.abs() < 6) & finite)

def absmax(x, signs, seed, stochastic, turn):
    """the backward quantiser: room for the largest value, and 3/4 so that it never clips"""
    v, xi = blocks(x), 1 - 2 * (signs >> torch.arange(32, device=x.device) & 1)        # bit i set: negate element i
    v = hadamard(v * xi) if turn == "before" else hadamard(v) * xi if turn == "after" else v
    largest = v.abs().amax(-1, True)
    e = torch.where(largest == 0, 0, (floor_log2(largest) - 2).clamp(-127, 127))
    u = v * (.75 * pow2(-e))
    code = round_stochastic(u, noise(seed, u.numel()).view_as(u)) if stochastic else round_nearest(u)
    return pack(torch.where(largest == 0, 0, code), e, largest.isfinite())

def quantize_backward(x, signs, seeds, stochastic, turn, turn_t, format="packed"):
    """x [M, K] -> packed [M, K], and packed x.T [K, M] with M padded with zeros to a multiple of 32. signs int64 [1]: 32 sign
    bits; seeds int64 [2], turn, turn_t: of the one and of the other; "before" or "after": signs, and a rotation; "none": neither"""
    check(format == "packed", f"format {format} is for the kernels of a GPU")
    xt = F.pad(x, (0, 0, 0, -x.shape[0] % 32)).T
    return *absmax(x, signs, seeds[0], stochastic, turn), *absmax(xt, signs, seeds[1], stochastic, turn_t)

def requantize(codes, scales, signs, seed, stochastic, turn, format="packed"):
    """packed [M, K] -> packed transpose [K, M], as quantize_backward makes it; seed int64 [1]"""
    check(format == "packed", f"format {format} is for the kernels of a GPU")
    x = dequantize(codes, scales, torch.float32)
    return absmax(F.pad(x, (0, 0, 0, -x.shape[0] % 32)).T, signs, seed, stochastic, turn)

def gemm(a, a_scales, b, b_scales, alpha, dtype):
    """packed [M, K], [N, K] -> alpha * a @ b.T [M, N]; float64 makes every product and sum exact enough"""
    check(a.shape[1] == b.shape[1], f"the products' inner dimensions differ: {2 * a.shape[1]} and {2 * b.shape[1]}")
    a, b = dequantize(a, a_scales, torch.float64), dequantize(b, b_scales, torch.float64)
    return (alpha * (a @ b.T)).float().to(dtype)

def unrotate(d, mask, dtype):
    """d [M, K] in the rotated basis, mask int32 [M, K/32] -> [M, K]: clipped values get no gradient, then
    the (symmetric) rotation is undone. A product, not a selection: NaN * 0 is NaN and stays visible"""
    return hadamard(blocks(d) * unbits(mask)).flatten(-2).to(dtype)

def draw(dy, x, n):
    """fresh random signs int64 [1] and n seeds int64 [n] from torch's generator of dy's device; x is not read"""
    return tuple(torch.randint(-2 ** 63, 2 ** 63 - 1, (m,), device=dy.device) for m in (1, n))
