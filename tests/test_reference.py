"""Facts about the format and the two quantisers of fp4/reference.py, the definition."""
from pathlib import Path

import numpy as np
import pytest
import torch

import fp4
from fp4 import ops, reference

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


@pytest.mark.parametrize("case", CASES)
def test_the_mean_of_stochastic_rounding_agrees_with_the_published_one(case, monkeypatch):
    monkeypatch.setattr(reference, "hadamard", not_rotated)
    x = torch.tensor(GOLDEN[f"{case}.x"])
    mean = 0
    for seed in range(64):
        codes, scales = reference.absmax(x, NO_SIGNS, torch.tensor(seed), True, "none")
        mean = mean + reference.dequantize(codes, scales, torch.float32) * (4 / 3) / 64
    widest_gap = 8 / 3                          # of the grid
    step = reference.pow2(scales.int() - 127).repeat_interleave(32, 1) * widest_gap
    error = (mean - torch.tensor(GOLDEN[f"{case}.sr_norot_mean"])).abs() / step
    assert error.max() <= 6 * (.5 / 64 ** .5 + .5 / 512 ** .5)
    assert error.mean() <= .05


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


def test_philox_gives_the_published_vectors():
    words = reference.philox(torch.tensor(0), 1)[0].tolist()
    # Random123's kat_vectors, counter and key 0
    assert words == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


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
