"""Facts about the format and the two quantisers of fp4/reference.py, the definition."""
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import fp4
from fp4 import ops, reference
from operands import error_of_a_sum, random_at_sizes

fp4.build()                     # the large statistics run on the byte-equal kernels
GOLDEN = np.load(Path(__file__).resolve().parent / "golden.npz")
CASES = sorted({key.split(".")[0] for key in GOLDEN.files})
NO_SIGNS = torch.zeros(1, dtype=torch.int64)


def decoded(x, scale="floor"):
    codes, scales, mask = reference.quantize_forward(x, scale)
    y = reference.dequantize(codes, scales, torch.float32)
    return y, reference.unbits(mask).flatten(-2).bool()


def near_tie(u):
    """Is u = v / scale a midpoint, where the authors' Triton code rounds to zero and we to even?"""
    return sum((u.abs() == m) for m in (.25, .75, 1.25, 1.75, 2.5, 3.5, 5.)).bool()


def published_hadamard(v):
    """The rotation of the published code, whose matrix is in BF16."""
    return reference.butterfly(v, lambda a, b: (a + b, a - b)) * 0.1767578125


def not_rotated(v):
    return v


@pytest.fixture(params=[True, False], ids=["rotated", "norot"])
def rotated(request, monkeypatch):
    rotation = published_hadamard if request.param else not_rotated
    monkeypatch.setattr(reference, "hadamard", rotation)
    return request.param


@pytest.mark.parametrize("case", CASES)
def test_the_forward_quantiser_and_its_mask_equal_the_published_one_bit_for_bit_but_for_ties(
        case, rotated):
    x = torch.tensor(GOLDEN[f"{case}.x"])
    tag = "" if rotated else "_norot"
    y, mask = decoded(x)
    scales = reference.quantize_forward(x, "floor")[1]
    scale = reference.pow2(scales.int() - 127)[..., None]
    u = reference.hadamard(reference.blocks(x)) / scale
    differ = y.bfloat16().float() != torch.tensor(GOLDEN[f"{case}.quest{tag}"])
    assert torch.equal(mask, torch.tensor(GOLDEN[f"{case}.quest{tag}_mask"]))
    assert not (differ & ~near_tie(u).flatten(-2)).any()
    assert not (rotated and differ.any())       # after a rotation there are no ties at all


@pytest.mark.parametrize("case", CASES)
def test_the_backward_quantiser_equals_the_published_one_bit_for_bit_but_for_ties(case, rotated):
    x = torch.tensor(GOLDEN[f"{case}.x"])
    tag = "" if rotated else "_norot"
    codes, scales = reference.absmax(x, NO_SIGNS, None, False, "before")
    y = reference.dequantize(codes, scales, torch.float32) * (4 / 3)
    scale = reference.pow2(scales.int() - 127)[..., None]
    u = reference.hadamard(reference.blocks(x)) * .75 / scale
    differ = y.bfloat16().float() != torch.tensor(GOLDEN[f"{case}.rtn{tag}"])
    assert not (differ & ~near_tie(u).flatten(-2)).any()
    assert not (rotated and differ.any())


def test_with_the_rotation_in_float32_a_few_values_differ_from_the_published_ones():
    """The numbers are those of fp4/README.md."""
    forward, masks, backward, n_values = 0, 0, 0, 0
    for case in CASES:
        x = torch.tensor(GOLDEN[f"{case}.x"])
        y, mask = decoded(x)
        codes, scales = reference.absmax(x, NO_SIGNS, None, False, "before")
        z = reference.dequantize(codes, scales, torch.float32) * (4 / 3)
        forward += int((y.bfloat16().float() != torch.tensor(GOLDEN[f"{case}.quest"])).sum())
        masks += int((mask != torch.tensor(GOLDEN[f"{case}.quest_mask"])).sum())
        backward += int((z.bfloat16().float() != torch.tensor(GOLDEN[f"{case}.rtn"])).sum())
        n_values += x.numel()
    assert (forward, backward, masks, n_values) == (15, 29, 4, 88_064)


DRAWS = 64                      # ours; the published means are of 512


def share_of_the_gap(u):
    """Where |u| lies between its two neighbours of the grid, and the gap between these."""
    grid = torch.tensor([0, .5, 1, 1.5, 2, 3, 4, 6])
    magnitude = u.abs()
    low = torch.searchsorted(grid, magnitude, right=True) - 1
    gap = grid[low + 1] - grid[low]
    return (magnitude - grid[low]) / gap, gap


def errors_of_the_mean(case):
    """The mean of our draws minus the published mean, and its expected standard deviation.

    Both are in units of each value's own gap. An error is positive where our magnitudes are larger.
    """
    x = torch.tensor(GOLDEN[f"{case}.x"])
    mean = 0
    for seed in range(DRAWS):
        codes, scales = reference.absmax(x, NO_SIGNS, torch.tensor(seed), True, "none")
        values = reference.dequantize(codes, scales, torch.float32) * (4 / 3)
        mean = mean + values / DRAWS
    scale = reference.pow2(scales.int() - 127).repeat_interleave(32, 1)
    p, gap = share_of_the_gap(x * .75 / scale)
    error = (mean - torch.tensor(GOLDEN[f"{case}.sr_norot_mean"])) * torch.sign(x)
    deviation = (p * (1 - p) * (1 / DRAWS + 1 / 512)).sqrt()
    return error / (scale * gap * (4 / 3)), deviation


def means_agree(case):
    error, deviation = errors_of_the_mean(case)
    varies = deviation > .02                    # Elsewhere a mean of so few draws is not Gaussian.
    z = error[varies] / deviation[varies]
    # Where a value lies on the grid nothing is random: only float32 and BF16 round there.
    is_exact = (error[deviation == 0].abs() <= 2e-3).all()
    is_near = (error.abs() <= 6 * deviation + 5 / DRAWS).all() and (z.abs() <= 7).all()
    has_no_bias = error.sum().abs() <= 5 * deviation.square().sum().sqrt()
    has_this_spread = len(z) < 1000 or abs(z.square().mean() - 1) <= .15
    return bool(is_exact and is_near and has_no_bias and has_this_spread)


@pytest.mark.parametrize("case", CASES)
def test_the_mean_of_stochastic_rounding_agrees_with_the_published_one(case):
    assert means_agree(case)


def rounds_up_with(change):
    """Stochastic rounding that goes up with the probability change(p)."""
    def rounding(u, noise):
        grid = torch.tensor(reference.E2M1)
        low = torch.searchsorted(grid, u.abs(), right=True) - 1
        p, _ = share_of_the_gap(u)
        return low + (change(p) >= (255.5 - noise) / 256) + 8 * torch.signbit(u)
    return rounding


@pytest.mark.parametrize("change, agrees", [
    (lambda p: p, True),
    (lambda p: .98 * p, False),
    (lambda p: p + .02 * (p > 0), False),
    (lambda p: (p > .5).float(), False),
    (lambda p: p + .2 * (p - .5) * (p > 0), False),
], ids=["p", "98 % of p", "p + 2 %", "to nearest", "steeper"])
def test_those_means_tell_another_probability(change, agrees, monkeypatch):
    monkeypatch.setattr(reference, "round_stochastic", rounds_up_with(change))
    assert means_agree("normal") == agrees


def test_every_code_decodes_as_the_standard_lists_it():
    byte = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 16).contiguous()
    ones = torch.full((256, 1), 127, dtype=torch.uint8)
    y = reference.dequantize(byte, ones, torch.float32)
    table = [0, .5, 1, 1.5, 2, 3, 4, 6]
    table = torch.tensor(table + [-v for v in table])
    assert torch.equal(y[:, 0], table[torch.arange(256) % 16])
    assert torch.equal(y[:, 1], table[torch.arange(256) // 16])
    assert torch.equal(y[:, :2].repeat(1, 16), y)


def test_scale_bytes_are_powers_of_two_and_255_is_nan():
    codes = torch.full((256, 16), 0x22, dtype=torch.uint8)      # all ones
    scales = torch.arange(256, dtype=torch.uint8)[:, None]
    y = reference.dequantize(codes, scales, torch.float32)[:, 0]
    assert y[:255].tolist() == [2.0 ** e for e in range(-127, 128)]
    assert y[255].isnan()


def test_rounding_to_nearest_agrees_with_a_search_in_float64_and_ties_go_to_the_even_code():
    ties = torch.tensor([.25, .75, 1.25, 1.75, 2.5, 3.5, 5, -.25, -.75])
    u = torch.cat((torch.linspace(-7, 7, 4001), ties))
    grid = torch.tensor(reference.E2M1, dtype=torch.float64)
    distance = (u.double().abs()[:, None] - grid).abs()
    nearest = distance == distance.min(-1, True).values
    even = nearest & (torch.arange(8) % 2 == 0)
    is_tie = nearest.sum(-1) > 1
    want = torch.where(is_tie, even.int().argmax(-1), nearest.int().argmax(-1))
    code = reference.round_nearest(u)
    assert torch.equal(code & 7, want.int())
    assert torch.equal(code >> 3, torch.signbit(u).int())


@pytest.mark.parametrize("low, high", list(itertools.pairwise(reference.E2M1)))
def test_as_many_of_the_256_noise_bytes_go_up_as_the_value_is_beyond_the_lower_point(low, high):
    """Exhaustively: for each gap of the grid, 2048 values in it, all 256 bytes and both signs.

    The values lie half way between the multiples of 1/2048, so that 256 p is never half way between
    two whole numbers, and the errors of the means of all bytes add up to 0.
    """
    p = (2 * torch.arange(2048) + 1) / 4096
    u = low + p * (high - low)
    byte = torch.arange(256)[:, None]
    for sign in (1, -1):
        code = reference.round_stochastic(sign * u.expand(256, -1), byte)
        assert (code >> 3 == (sign < 0)).all()
        goes_up = code & 7 == reference.E2M1.index(high)
        assert (goes_up | (code & 7 == reference.E2M1.index(low))).all()
        assert (goes_up[1:] >= goes_up[:-1]).all()              # The largest bytes go up.
        share = goes_up.double().mean(0)
        assert torch.equal(256 * share, (256 * p.double()).round())
        assert (share - p).abs().max() <= 1 / 512
        assert (share - p).mean() == 0


def test_a_value_on_the_grid_is_rounded_stochastically_to_itself_by_every_byte():
    u = torch.tensor(reference.E2M1[:7]).expand(256, -1)
    assert torch.equal(reference.round_stochastic(u, torch.arange(256)[:, None]),
                       torch.arange(7).expand(256, -1))


def sylvester(size):
    """The Hadamard matrix of +-1, from its definition."""
    return np.array([[1]]) if size == 1 else np.kron([[1, 1], [1, -1]], sylvester(size // 2))


def test_the_rotation_is_the_product_with_sylvesters_matrix_which_is_its_own_inverse():
    v = torch.randn(50, 3, 32)
    rotation = torch.tensor(sylvester(32) / 32 ** .5)
    assert torch.allclose(reference.hadamard(v).double(), v.double() @ rotation, atol=1e-5)
    assert torch.allclose(reference.hadamard(reference.hadamard(v)), v, atol=1e-5)


@pytest.mark.parametrize("sign_order", ["before", "after", "none"])
def test_bit_i_of_the_signs_negates_element_i_of_every_block_at_its_place_in_the_order(sign_order):
    signs = 0x5A0F3C69
    x = torch.randn(300, 288)
    flips = torch.tensor([-1. if signs >> i & 1 else 1. for i in range(32)])
    v = x.unflatten(1, (-1, 32))
    if sign_order == "before":
        v = reference.hadamard(v * flips)
    if sign_order == "after":
        v = reference.hadamard(v) * flips
    codes, scales = reference.absmax(x, torch.tensor([signs]), None, False, sign_order)
    e = torch.tensor([[math.frexp(block.abs().max())[1] - 3 for block in row] for row in v])
    assert torch.equal(scales.int() - 127, e)
    u = .75 * v / 2. ** e[..., None]
    got = reference.dequantize(codes, torch.full_like(scales, 127), torch.float32).view_as(u)
    assert u.abs().max() < 6
    assert ((got - u).abs() <= share_of_the_gap(u)[1] / 2 * (1 + 1e-6)).all()


IMPLEMENTATIONS = pytest.mark.parametrize("implementation, floor, nearest, before, no_rotation", [
    (reference, "floor", "nearest", "before", "none"), (torch.ops.fp4, 0, 1, 0, 2),
], ids=["definition", "kernels"])


def bf16_at_every_size():
    """BF16 values, a block for each power of two, from the smallest to the largest."""
    x = torch.randn(261, 32, generator=torch.Generator().manual_seed(0)).clamp(-.9, .9)
    x[:, 7] = 1.5
    x[::2, 7] = -1.5
    size = torch.arange(-133, 128).double().exp2()[:, None]
    return (x.double() * size).bfloat16()


@IMPLEMENTATIONS
def test_the_backward_scale_of_a_block_of_any_size_is_the_one_found_by_hand(
        implementation, floor, nearest, before, no_rotation):
    """Without a rotation, so that all is exact: the factor 3/4 fits into float32 as well."""
    x = bf16_at_every_size()
    seeds = torch.zeros(2, dtype=torch.int64)
    codes, scales, _, _ = implementation.quantize_backward(
        x, NO_SIGNS, seeds, False, no_rotation, no_rotation,
        *(() if implementation is reference else (0,)))
    largest = x.double().abs().amax(1)
    e = torch.tensor([max(math.frexp(m)[1] - 3, -127) for m in largest.tolist()])
    assert torch.equal(scales[:, 0].int(), e + 127)
    assert set(range(253)) == set(scales.flatten().tolist())        # all that 3/4 leaves room for
    u = .75 * x.double() / e.double().exp2()[:, None]
    got = reference.dequantize(codes, torch.full_like(scales, 127), torch.float64)
    assert torch.equal(got.abs(), nearest_on_the_grid(u))
    assert torch.equal(torch.signbit(got), torch.signbit(x))      # of zeros as well


def nearest_on_the_grid(u):
    """The nearest magnitude of E2M1, found by a search; of two, the one whose code is even."""
    grid = torch.tensor(reference.E2M1, dtype=torch.float64)
    preference = torch.tensor([0, 1] * 4) * 1e-9
    return grid[((u.abs()[..., None] - grid).abs() + preference).argmin(-1)]


@IMPLEMENTATIONS
def test_a_block_times_a_power_of_two_has_the_same_codes_and_the_scale_times_it(
        implementation, floor, nearest, before, no_rotation):
    x = torch.randn(1, 32, generator=torch.Generator().manual_seed(1))
    backward = torch.arange(-100, 120)
    seeds = torch.zeros(2, dtype=torch.int64)
    rest = () if implementation is reference else (0,)
    codes, scales, _, _ = implementation.quantize_backward(
        x * backward.float().exp2()[:, None], NO_SIGNS, seeds, False, before, before, *rest)
    assert (codes == codes[100]).all()
    assert torch.equal(scales[:, 0].int(), scales[100, 0] + backward)

    forward = torch.arange(10, 60)              # Below, the 1e-8 counts; above, squares overflow.
    for scale in (floor, nearest):
        codes, scales, mask = implementation.quantize_forward(
            x * forward.float().exp2()[:, None], scale)
        assert (codes == codes[0]).all() and (mask == mask[0]).all()
        assert torch.equal(scales[:, 0].int(), scales[0, 0] + forward - 10)


@IMPLEMENTATIONS
def test_a_block_whose_squares_overflow_is_nan_and_one_far_below_1e_8_is_zeros(
        implementation, floor, nearest, before, no_rotation):
    x = torch.randn(1, 32).expand(2, -1) * torch.tensor([[2. ** 70], [2. ** -60]])
    codes, scales, mask = implementation.quantize_forward(x.contiguous(), floor)
    assert scales.tolist() == [[255], [127 - 27]]               # 2**-27 is the power below 1e-8
    assert not (codes & 0x77).any()
    assert mask.tolist() == [[0], [-1]]


@IMPLEMENTATIONS
def test_a_constant_rotated_block_is_finite_although_rounding_makes_its_variance_negative(
        implementation, floor, nearest, before, no_rotation):
    """A block whose only number is its first is rotated to a constant; here, but for 1e-7."""
    torch.manual_seed(0)
    x = torch.randn(4096, 32) * 1e-7
    x[:, 0] += torch.rand(4096) + 1
    v = reference.hadamard(x)
    variance = reference.total(v * v) / 32 - (reference.total(v) / 32).square()
    is_negative = variance[:, 0] < 0
    assert is_negative.sum() > 500              # So there is something to get wrong.
    for scale in (floor, nearest):
        codes, scales, mask = implementation.quantize_forward(x, scale)
        assert (scales[is_negative] == 127 - 27).all()          # of 1e-8 = 1.34 * 2**-27
        assert (codes[is_negative] == 0x77).all() and (mask[is_negative] == 0).all()
        assert (scales < 255).all()


def block_with_peak(peak):
    """A block whose largest is this after the rotation, and whose scale is 1 ("floor").

    Three numbers a, b and c, none of them the first, become +-a +-b +-c, divided by sqrt(32).
    """
    x = torch.zeros(1, 32)
    x[0, 1] = x[0, 2] = 11.25
    x[0, 4] = torch.tensor(peak) / reference.HADAMARD_NORM - 22.5
    return x


@IMPLEMENTATIONS
def test_the_mask_has_what_lies_below_6_before_it_is_rounded(
        implementation, floor, nearest, before, no_rotation):
    for peak in (5.01, 5.9999990, 6.0000007, 6.5):      # 6 itself is no multiple of 32 ** -.5.
        x = block_with_peak(peak)
        u = reference.hadamard(x)[0]
        assert abs(u.max() - peak) < 1e-6 and (u.max() < 6) == (peak < 6) and u.max() != 6
        codes, scales, mask = implementation.quantize_forward(x, floor)
        assert scales.tolist() == [[127]]
        is_peak = u.abs() == u.max()
        assert is_peak.sum() == 8               # four of each sign
        assert torch.equal(reference.unbits(mask)[0, 0].bool(), ~is_peak | (peak < 6))
        values = reference.dequantize(codes, scales, torch.float32)[0]
        assert (values[is_peak] == 6 * u[is_peak].sign()).all()         # All of these round to 6.


def test_what_reaches_6_exactly_is_not_in_the_mask(monkeypatch):
    monkeypatch.setattr(reference, "hadamard", not_rotated)
    u = torch.tensor([6., -6, 5.9999995, -5.9999995, 5, 6.0000005, -7, 0, *[-.3, .3] * 12])
    for exponent in (-10, 0, 10):
        codes, scales, mask = reference.quantize_forward(u[None] * 2. ** exponent, "floor")
        assert scales.tolist() == [[127 + exponent]]
        assert reference.unbits(mask)[0, 0].tolist() == [0, 0, 1, 1, 1, 0, 0, 1, *[1] * 24]


@IMPLEMENTATIONS
def test_what_was_clipped_gets_no_gradient_before_the_rotation_is_undone_and_nan_stays(
        implementation, floor, nearest, before, no_rotation):
    d = torch.randn(40, 96)
    mask = torch.randint(-2 ** 31, 2 ** 31, (40, 3), dtype=torch.int64).int()
    kept = torch.tensor([[word >> i & 1 for word in row for i in range(32)]
                         for row in mask.tolist()]).double()
    rotation = torch.tensor(np.kron(np.eye(3), sylvester(32) / 32 ** .5))
    got = implementation.unrotate(d, mask, torch.float32)
    assert torch.allclose(got.double(), (d.double() * kept) @ rotation, atol=1e-5)
    d[3, 40] = torch.nan
    mask[3, 1] = 0                              # NaN * 0 is NaN
    got = implementation.unrotate(d, mask, torch.float32)
    assert got[3, 32:64].isnan().all() and got.isnan().sum() == 32


def test_one_block_by_hand():
    """x has one 8 and 31 zeros.

    H spreads it: v = 8/sqrt(32) = 1.41421 with the signs of row 0, which are all +. The standard
    deviation is 0, so t = 1e-8 and s = 2**floor(log2 1e-8) = 2**-27: everything saturates at 6 and
    is masked. AbsMax: floor(log2 1.414) - 2 = -2, u = 3/4 * 1.41421 * 4 = 4.24, which rounds to 4,
    code 6. It decodes to 4 * 2**-2 = 1, which stands for 3/4 * 1.414 = 1.06.
    """
    x = torch.zeros(1, 32)
    x[0, 0] = 8
    codes, scales, mask = reference.quantize_forward(x, "floor")
    assert codes.tolist() == [[0x77] * 16]
    assert scales.tolist() == [[100]]
    assert mask.tolist() == [[0]]
    codes, scales = reference.absmax(x, NO_SIGNS, None, False, "before")
    assert codes.tolist() == [[0x66] * 16]
    assert scales.tolist() == [[125]]


# ---- the noise

def philox4x32_10(counter, key):
    """Philox4x32-10 in Python's integers, as Salmon et al. (SC'11) write it."""
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * counter[0], 2 ** 32)
        high1, low1 = divmod(0xCD9E8D57 * counter[2], 2 ** 32)
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
        key = [(key[0] + 0x9E3779B9) % 2 ** 32, (key[1] + 0xBB67AE85) % 2 ** 32]
    return counter


def philox_of_a_seed(seed, call):
    key = [seed % 2 ** 32, (seed >> 32) % 2 ** 32]
    return philox4x32_10([call % 2 ** 32, call >> 32, 0, 0], key)


ONES = 2 ** 32 - 1


@pytest.mark.parametrize("counter, key, words", [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([ONES] * 4, [ONES] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0],
     [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
], ids=["zeros", "ones", "pi"])
def test_the_philox_of_these_tests_gives_the_published_vectors(counter, key, words):
    """They are Random123's kat_vectors."""
    assert philox4x32_10(counter, key) == words


@pytest.mark.parametrize("seed", [0, 1, 2 ** 32, 2 ** 63 - 1, -1, -2 ** 63, 0x299F31D0A4093822])
def test_element_i_gets_byte_i_mod_16_of_call_i_div_16_of_philox(seed):
    words = [philox_of_a_seed(seed, call) for call in range(41)]
    assert reference.philox(torch.tensor(seed), 41).tolist() == words
    stream = b"".join(word.to_bytes(4, "little") for call in words for word in call)
    assert bytes(reference.noise(torch.tensor(seed), 650).tolist()) == stream[:650]


def is_noise(noise, n=1 << 16):
    """Are the bytes of noise(seed, n) uniform, and those of neighbours and of seeds unrelated?"""
    draws = [noise(torch.tensor(seed), n).double() - 127.5 for seed in (5, 6, 5 + 2 ** 32)]
    first = draws[0]
    pairs = [(first[lag:], first[:-lag]) for lag in (1, 2, 3, 4, 8, 16, 32, 256, 4096)]
    pairs += [(first, other) for other in draws[1:]]
    counts = torch.bincount((first + 127.5).long(), minlength=256).double()
    expected = n / 256
    # chi squared with 255 degrees of freedom
    is_uniform = abs(((counts - expected).square() / expected).sum() - 255) <= 5 * 510 ** .5
    mean_square = (256 ** 2 - 1) / 12
    unrelated = all(abs((a * b).mean()) <= 5 * mean_square / len(a) ** .5 for a, b in pairs)
    return bool(is_uniform and unrelated)


@pytest.mark.parametrize("noise, expected", [
    (reference.noise, True),
    (lambda seed, n: reference.noise(seed, n // 2).repeat_interleave(2), False),
    (lambda seed, n: reference.noise(seed, n // 32).repeat(32), False),
    (lambda seed, n: reference.noise(seed & 0xFFFFFFFF, n), False),
    (lambda seed, n: reference.noise(seed, n) & 254, False),
], ids=["ours", "shared by neighbours", "shared by blocks", "half the seed", "a bit lost"])
def test_neighbours_and_seeds_have_noise_of_their_own(noise, expected):
    assert is_noise(noise) == expected


@pytest.mark.parametrize("draw", [reference.draw, ops.draw], ids=["definition", "op"])
def test_each_bit_of_the_signs_and_the_seeds_is_drawn_and_no_two_draws_agree(draw):
    torch.manual_seed(0)
    x = torch.zeros(1, 32)
    draws = [draw(x, x, 4) for _ in range(64)]
    signs = [signs.item() for signs, _ in draws]
    seeds = torch.stack([seeds for _, seeds in draws])
    assert all(0 < sum(word >> bit & 1 for word in signs) < 64 for bit in range(32))
    for place in range(4):
        words = seeds[:, place].tolist()
        assert all(0 < sum(word >> bit & 1 for word in words) < 64 for bit in range(64))
    assert len(set(seeds.flatten().tolist())) == 256
    assert len({word & 0xFFFFFFFF for word in signs}) == 64
    assert not set(signs) & set(seeds.flatten().tolist())
    # The bits are fair, too: of 64 draws and 32 bits half are set, within five deviations.
    ones = sum(bin(word & 0xFFFFFFFF).count("1") for word in signs)
    assert abs(ones - 1024) <= 5 * 512 ** .5


def octave_error(quantise):
    """The relative mean squared error on N(0, sigma), averaged over one octave of sigma."""
    generator = torch.Generator().manual_seed(0)
    total = 0
    for i in range(16):
        x = torch.randn(512, 512, generator=generator) * 2 ** ((i + .5) / 16)
        v = reference.hadamard(reference.blocks(x)).flatten(-2)
        total += ((quantise(x, i) - v).square().mean() / v.square().mean()).item() / 16
    return total


@pytest.mark.parametrize("scale, expected", [("floor", 2.235e-2), ("nearest", 1.338e-2)])
def test_the_forward_quantisers_error_is_the_one_of_the_table(scale, expected):
    def quantise(x, i):
        packed, _ = ops.quantize_forward(x, scale)
        return ops.dequantize(packed, torch.float32)

    error = octave_error(quantise)
    assert abs(error / expected - 1) <= .01, error


@pytest.mark.parametrize("stochastic, expected", [(False, 1.366e-2), (True, 2.778e-2)])
def test_the_backward_quantisers_error_is_the_one_of_the_table(stochastic, expected):
    def quantise(x, i):
        packed, _ = ops.quantize_backward(
            x, NO_SIGNS, torch.tensor([i, 0]), stochastic, "before", "before", "packed")
        return ops.dequantize(packed, torch.float32) * (4 / 3)

    error = octave_error(quantise)
    assert abs(error / expected - 1) <= .01, error


def test_the_wrong_side_signs_randomise_nothing():
    """Signs after the Hadamard only flip the signs of codes; before it they change the rounding."""
    x = torch.randn(8, 96)
    other = torch.tensor([0x5A5A1234])

    def magnitude(signs, sign_order):
        return reference.absmax(x, signs, None, False, sign_order)[0] & 0x77

    assert torch.equal(magnitude(NO_SIGNS, "after"), magnitude(other, "after"))
    assert not torch.equal(magnitude(NO_SIGNS, "before"), magnitude(other, "before"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_what_is_not_finite_reaches_every_output(bad):
    x = torch.randn(40, 64)
    x[3:5, 5:7] = bad                           # 3e38 twice overflows in the rotation
    codes, scales, mask = reference.quantize_forward(x, "floor")
    y = reference.dequantize(codes, scales, torch.float32)
    assert y[3:5, :32].isnan().all()
    assert y.isfinite().sum() == 40 * 64 - 64
    w, w_scales, _ = reference.quantize_forward(torch.randn(32, 64), "floor")
    product = reference.gemm(codes, scales, w, w_scales, 1.0, torch.bfloat16)
    assert product[3:5].isnan().all()
    assert product.isfinite().sum() == 38 * 32
    seeds = torch.zeros(2, dtype=torch.int64)
    c, s, ct, st = reference.quantize_backward(x, NO_SIGNS, seeds, False, "before", "before")
    assert reference.dequantize(c, s, torch.float32)[3:5, :32].isnan().all()
    assert reference.dequantize(ct, st, torch.float32)[5:7, :32].isnan().all()


@pytest.mark.parametrize("M, N, K", [(1, 3, 32), (3, 5, 1024), (2, 4, 2112), (8, 2, 96)])
def test_the_product_of_few_rows_is_that_of_its_sums_written_out(M, N, K):
    x = random_at_sizes(M, K, octaves=20)
    w = random_at_sizes(N, K, octaves=20)
    x_values, w_values = (reference.dequantize(*packed, torch.float64).view(-1, K // 32, 32)
                          for packed in (x, w))
    got = reference.matvec(*x, *w, torch.float32)
    for m, n in itertools.product(range(M), range(N)):
        lanes = [np.float32(0)] * 32
        for block in range(K // 32):            # The sum of a block is exact in float64.
            term = (x_values[m, block] * w_values[n, block]).sum().item()
            assert np.float32(term) == term
            lanes[block % 32] += np.float32(term)
        while len(lanes) > 1:                   # neighbours first
            lanes = [a + b for a, b in zip(lanes[0::2], lanes[1::2])]
        assert got[m, n].item() == lanes[0]
    rounded = reference.matvec(*x, *w, torch.bfloat16)
    assert torch.equal(rounded, got.bfloat16())
    exact = reference.gemm(*x, *w, 1.0, torch.float64)
    assert ((got - exact).abs() <= error_of_a_sum(x, w)).all()


def dequantize_with_three_scales(implementation, floor):
    codes = torch.zeros(4, 32, dtype=torch.uint8)
    scales = torch.zeros(4, 3, dtype=torch.uint8)
    implementation.dequantize(codes, scales, torch.float32)


def multiply_64_with_32(implementation, floor):
    a, a_scales, _ = implementation.quantize_forward(torch.randn(4, 64), floor)
    b, b_scales, _ = implementation.quantize_forward(torch.randn(4, 32), floor)
    implementation.gemm(a, a_scales, b, b_scales, 1.0, torch.float32)


@pytest.mark.parametrize("call, words", [
    (lambda o, floor: o.quantize_forward(torch.randn(4, 48), floor), "multiple of 32, got 48"),
    (lambda o, floor: o.quantize_forward(torch.randn(64), floor), "matrix"),
    (lambda o, floor: o.quantize_forward(torch.randn(4, 64).double(), floor),
     "float32 or bfloat16"),
    (dequantize_with_three_scales, "do not match"),
    (multiply_64_with_32, "inner dimensions differ: 64 and 32"),
])
def test_the_definition_and_the_kernels_refuse_the_same_arguments_with_a_sentence(call, words):
    for implementation, floor in ((reference, "floor"), (torch.ops.fp4, 0)):
        with pytest.raises((ValueError, RuntimeError), match=words):
            call(implementation, floor)
