"""The quantisers of the recipes that columns describe: their definition, and the kernels, which are
compiled for one GemmSpec each."""
import pytest
import torch

from fp4 import reference
from fp4.emulate import columns, quantizers
from fp4.recipes import GemmSpec
from operands import at_the_edge_of_a_scale, same, ugly_values

WORDS = torch.tensor([0x5DA94F3671C8E2B5, -0x123456789ABCDEF1, 77, 2 ** 63 - 3])
SIGNS = WORDS[:2]
SEED = WORDS[3:]


def define(x, spec, transposed=False, dtype=torch.float32, factor=None, square=False):
    "-> values, factor, mask"
    return columns.quantize_by_definition(
        x, factor, SIGNS, SEED, transposed, dtype, spec, square)


# ---- the definition

@pytest.mark.parametrize("rule", ["floor", "nearest"])
def test_quests_values_and_masks_are_those_of_the_reference_bit_for_bit(rule):
    for x in (ugly_values(40, 96), at_the_edge_of_a_scale()):
        codes, scales, mask = reference.quantize_forward(x, rule)
        values, factor, got_mask = define(x, GemmSpec("mxfp4", rule, 32, "none"))
        same([values + 0.], [reference.dequantize(codes, scales, torch.float32) + 0.])
        assert torch.equal(got_mask, mask) and factor.tolist() == [[1]]


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("order", ["before", "after", "none"])
def test_absmax34s_values_are_those_of_the_reference_bit_for_bit(rounding, order):
    "both ways; after and before the rotation; NaN where it has NaN"
    spec = GemmSpec("mxfp4", "absmax34", 0 if order == "none" else 32, order, rounding)
    x = ugly_values(40, 96)
    packed = reference.quantize_backward(
        x, SIGNS[:1], SEED.repeat(2), rounding == "stochastic", order, order)
    for transposed in (False, True):
        codes, scales = packed[2 * transposed:][:2]
        values, factor, mask = define(x, spec, transposed)
        same([values + 0.], [reference.dequantize(codes, scales, torch.float32) + 0.])
        assert factor == torch.tensor(4 / 3) and mask.numel() == 0


@pytest.mark.parametrize("n", [16, 32, 64, 128])
def test_a_rotation_multiplies_by_the_hadamard_matrix_and_undoes_itself(n):
    torch.manual_seed(0)
    v = torch.randn(3, 2 * n)
    H = torch.ones(1, 1).double()
    while len(H) < n:
        H = torch.kron(torch.tensor([[1., 1], [1, -1]]).double(), H)
    sign = [1 - 2 * (int(word) >> i & 1) for word in SIGNS for i in range(64)][:n]
    expected = (v.double().view(-1, n) * torch.tensor(sign) @ H * n ** -.5).view(3, -1)
    rotated = columns.rotate(v, n, SIGNS)
    assert (rotated - expected).abs().max() <= 1e-6
    assert (columns.rotate(rotated, n, SIGNS, signs_after=True) - v).abs().max() <= 1e-6
    if n == 32:
        same([columns.rotate(v, n)], [reference.hadamard(reference.blocks(v)).flatten(-2)])


def test_a_sum_adds_neighbours_first_and_skips_what_is_missing():
    big = 2. ** 24
    for terms, expected in (([big, 1, 1, 1], big + 2), ([1, 1, big, 1], big + 2),
                            ([1, 1, 1, big, 1], big + 4), ([1.], 1)):
        assert quantizers.total(torch.tensor(terms)).tolist() == [expected]
    v = torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
    same([quantizers.total(v)], [reference.total(v)])
