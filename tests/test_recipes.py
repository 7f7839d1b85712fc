"""Facts about the table of precisions, its axes, and the emulated rows."""
import os
import re
import subprocess
import sys

import pytest
import torch

import fp4
import fp4.emulate
import quartet
from fp4 import reference
from fp4.emulate import baselines, columns, matmul, quantizers
from fp4.recipes import SCALE_RULES, GemmSpec
from model import Llama, ModelConfig
from test_baselines import (
    E2M1, E4M3, INT4, POWERS_OF_TWO, layer_passes, make_data, mx, run_passes, to_grid)
from tools import quant_error
from tools.run import label

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
EMULATED = [name for name, row in fp4.RECIPES.items() if row.is_quantized and not row.has_kernels]
EMULATED_COLUMNS = [name for name in EMULATED if not fp4.RECIPES[name].method]


# ---- the table

def test_every_scale_rule_of_the_table_has_an_entry_among_the_functions_in_the_same_order():
    assert list(quantizers.SCALE_FUNCTIONS) == list(SCALE_RULES)
    for name, functions in quantizers.SCALE_FUNCTIONS.items():
        assert tuple(functions) == SCALE_RULES[name]


def test_which_rows_have_kernels():
    assert {name for name, row in fp4.RECIPES.items() if row.has_kernels} == {
        "fp4", "fp4-sr", "fp4-fwd", "fp4-original"}
    for axes in (dict(scale="nearest"), dict(multiplier="1"), dict(rounding="sr"),
                 dict(signs="after"),
                 dict(rotation="32:none:32"), dict(rotation="32:none:none", rounding="sr")):
        assert fp4.recipe("fp4", **axes).has_kernels, axes
    for axes in (dict(scale="mse"), dict(rounding="eden"), dict(signs="none"),
                 dict(rotation="64"), dict(rotation="32:32:64"), dict(rotation="none"),
                 dict(format="int4"), dict(dgrad="off"), dict(wgrad="off"), dict(forward="off"),
                 dict(rounding="nearest:sr:nearest"), dict(scale="floor:pma:pma"),
                 dict(scale="floor/nearest"), dict(scale="floor:absmax34/pma:absmax34"),
                 dict(multiplier="0.84"), dict(multiplier="1/0.84"),
                 dict(mean_split="on:off:off"), dict(mean_split="off:off:on"),
                 dict(format="mxfp4:mxfp4:mxfp4/mxfp8")):
        assert not fp4.recipe("fp4", **axes).has_kernels, axes


SIGNS = ("before:before:after", "after:before:before")
ROTATIONS = ("16", "128:32:64")
ROTATED_CASES = [dict(signs=signs, rotation=rotation, rounding=rounding)
                 for signs in SIGNS for rotation in ROTATIONS for rounding in ("nearest", "sr")]


@pytest.mark.parametrize("name, axes", [
    *((name, {}) for name in EMULATED_COLUMNS),
    *(("fp4", axes) for axes in ROTATED_CASES),
    ("fp4", dict(rounding="eden:nearest:nearest")),
    *((name, dict(mean_split="on")) for name in ("fp4", "fp4-fwd", "fp4-bwd", "nvfp4", "mxfp8")),
    *(("fp4", dict(mean_split=split, rotation="64")) for split in (
        "on:off:off", "off:on:off", "off:off:on")),
    ("fp4", dict(mean_split="on", signs="before:before:before", rounding="eden:nearest:nearest")),
    ("fp4", dict(scale="mse/absmax")), ("fp4", dict(format="mxfp8/mxfp4", rotation="64")),
])
def test_gradients_are_autograds_when_the_quantiser_is_the_identity(name, axes, monkeypatch):
    "so rotations, signs, paddings and factors are all undone"
    def identity(v, spec, noise, square):
        return v / 3, v.new_full((1, 1), 3.), torch.ones_like(v, dtype=torch.bool)

    monkeypatch.setattr(columns, "quantize", identity)
    monkeypatch.setattr(columns, "ops", {})                 # nothing is compiled
    monkeypatch.setattr(GemmSpec, "is_packed", False)
    x, w, dy = make_data()
    results = run_passes(fp4.recipe(name, **axes), x, w, dy)
    for result, expected in zip(results, (x @ w.T, dy @ w, dy.T @ x)):
        assert (result - expected).abs().max() <= 1e-5 * expected.abs().max()


# ---- biased or not: the mean of 1024 gradients

def exact_gradients(name, x, w, dy, saved):
    "dx and dw of the row's forward pass, without quantisation in the backward pass"
    row = fp4.RECIPES[name]
    if not row.method:
        return matmul.backward(dy, saved, row._replace(dgrad=None, wgrad=None))
    if name == "fp8":
        x8, x_scale, w8, w_scale = saved
        return dy @ (w8.float() * w_scale), dy.T @ (x8.float() * x_scale)
    if "luq" in name or "lss" in name:
        xq, x_scale, wq, w_scale = saved[:4]
        dx = dy @ (wq * w_scale)
        dw = dy.T @ (xq * x_scale)
        if "luq" in name:
            return dx, dw
        x_mask, w_mask = saved[4:6]
        return baselines.rotate(dx * x_mask, 32), baselines.rotate(dw * w_mask, 32)
    if "jetfire" in name:
        xq, wq = saved
        return dy @ wq, dy.T @ xq
    return dy @ w, dy.T @ x


@torch.inference_mode()
def ladder(name):
    "bits gained by four times the draws, up to 1024, in dx and in dw"
    x, w, dy = make_data(tokens=32, n_in=64, n_out=64)
    row = fp4.RECIPES[name]
    forward, backward = matmul.METHODS[row.method]
    _, saved = forward(x, w, row)
    exact = exact_gradients(name, x, w, dy, saved)
    torch.manual_seed(1)
    sums = [torch.zeros_like(e, dtype=torch.float64) for e in exact]
    bits = []
    is_random = True
    for n in range(1, 1025):
        if is_random:
            state = torch.get_rng_state()
            gradients = backward(dy, saved, row)
            # what draws no number gives the same gradients 1024 times
            is_random = not torch.equal(state, torch.get_rng_state())
        for so_far, gradient in zip(sums, gradients):
            so_far += gradient
        if n in (1, 4, 16, 64, 256, 1024):
            errors = [(s / n - e).norm() / e.norm() for s, e in zip(sums, exact)]
            bits.append([-torch.log2(error).item() for error in errors])
    return [[after[i] - before[i] for before, after in zip(bits, bits[1:])] for i in (0, 1)]


@pytest.mark.parametrize("name", ["tetrajet2", "quartet2", "luq-int4", "luq-fp4", "lss-int4"])
def test_the_mean_of_an_unbiased_gradient_gains_a_bit_for_four_times_the_draws(name):
    for gains in ladder(name):
        assert min(gains) >= .6 and sum(gains) >= 4.5, gains


@pytest.mark.parametrize("name", ["nvfp4", "four-over-six"])
def test_nvidias_recipe_is_unbiased_in_dgrad_only_because_x_rounds_to_nearest_in_wgrad(name):
    dgrad, wgrad = ladder(name)
    assert min(dgrad) >= .8 and wgrad[-1] <= .6, (dgrad, wgrad)


@pytest.mark.parametrize("name", ["fp4-bwd", "fp8", "mxfp8", "jetfire-fp4", "halo-fp4"])
def test_a_biased_gradients_mean_stops_gaining(name):
    for gains in ladder(name):
        assert gains[-1] <= .5, gains


# ---- quantisers

FLOATS = {"E2M1": (quantizers.E2M1, E2M1), "E4M3": (quantizers.E4M3, E4M3),
          "INT4": (quantizers.INT4, INT4), "powers": (baselines.POWERS_OF_TWO, POWERS_OF_TWO)}


def all_bfloat16():
    u = torch.arange(-2 ** 15, 2 ** 15).short().view(torch.bfloat16).float()
    return u[u.isfinite() & (u.abs() >= 2 ** -120)]


@pytest.mark.parametrize("name", ["E2M1", "E4M3", "INT4"])
def test_every_bfloat16_number_rounds_to_the_nearest_value_ties_to_even_and_saturates(name):
    grid, values = FLOATS[name]
    u = all_bfloat16()
    rounded = quantizers.to_grid(u, grid)
    assert torch.equal(rounded.double(), to_grid(u.double(), values))
    assert torch.equal(rounded.abs().unique().double(), values)         # and all of them occur
    assert not quantizers.to_grid(torch.zeros(1), grid).any()


def test_the_scales_of_nvfp4_and_the_elements_of_mxfp8_are_torchs_e4m3():
    u = all_bfloat16()
    u = u[u.abs() <= 448]
    rounded = quantizers.to_grid(u, quantizers.E4M3)
    assert torch.equal(rounded, u.to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("name", FLOATS)
def test_stochastic_rounding_goes_up_for_exactly_the_share_of_noise_that_is_its_probability(name):
    grid, values = FLOATS[name]
    low = values[:-1].float()[:, None, None]
    high = values[1:].float()[:, None, None]
    sixtyfourths = torch.arange(64) / 64
    u = low + (high - low) * sixtyfourths[:, None]              # [values, 64, 1]
    noise = sixtyfourths.expand(len(values) - 1, 64, 64)
    for sign in (1, -1):
        rounded = quantizers.to_grid((sign * u).expand(noise.shape), grid, noise) * sign
        is_up = rounded == high
        assert (is_up | (rounded == low)).all()
        assert torch.equal(is_up.sum(-1), torch.arange(64).expand(len(values) - 1, 64))
    assert quantizers.to_grid(2 * values[-1:].float(), grid, torch.zeros(1)) == values[-1]


def test_a_power_of_two_scale_has_every_exponent_of_a_normal_float():
    e = torch.arange(-126, 128)
    power = 2. ** e.double()
    assert torch.equal(quantizers.pow2(e.int()).double(), power)
    for mantissa in (1, 1.5, 2 - 2 ** -23):
        assert torch.equal(quantizers.floor_log2((power * mantissa).float()).long(), e)


@pytest.mark.parametrize("spec", [
    *(GemmSpec("mxfp4", rule) for rule in SCALE_RULES["mxfp4"]),
    GemmSpec("mxfp8", "absmax"), GemmSpec("int4", "absmax"),
    GemmSpec("nvfp4", "absmax"), GemmSpec("nvfp4", "four-six"),
], ids=lambda spec: f"{spec.format}-{spec.scale}")
def test_a_matrix_times_a_power_of_two_has_the_same_values_times_it_for_many_octaves(spec):
    torch.manual_seed(0)
    v = torch.randn(4, 64)
    values, factor, mask = quantizers.quantize(v, spec)
    expected = values.double() * factor
    octaves = [-40, -17, -1, 1, 2, 40]
    if spec.scale in ("floor", "nearest"):
        octaves = octaves[2:]                               # 1e-8 is added to a QuEST scale
    if spec.scale in ("absmax", "absmax34", "pma"):
        octaves += [-100, 100]                              # no square that could overflow
    for octave in octaves:
        values, factor, scaled_mask = quantizers.quantize(v * 2. ** octave, spec)
        assert torch.equal(values.double() * factor, expected * 2. ** octave)
        assert mask is None or torch.equal(mask, scaled_mask)


@pytest.mark.parametrize("rule", ["floor", "nearest"])
def test_a_block_whose_variance_overflows_is_nan_as_on_the_kernels(rule):
    v = torch.full((1, 32), 2. ** 70)
    v[0, ::2] *= -1
    _, scales, _ = reference.quantize_forward(v, rule)
    assert scales.tolist() == [[255]]
    values, _, _ = quantizers.quantize(columns.rotate(v, 32), GemmSpec("mxfp4", rule))
    assert values.isnan().all()
    values, _, _ = quantizers.quantize(v * 2. ** -10, GemmSpec("mxfp4", rule))
    assert values.isfinite().all() and values.any()


def block_errors(v, rule):
    values, factor, _ = quantizers.quantize(v, GemmSpec("mxfp4", rule))
    return (values * factor - v).double().unflatten(-1, (-1, 32)).square().sum(-1)


def test_mse_has_the_least_error_of_all_powers_of_two_in_every_single_block():
    torch.manual_seed(0)
    gaussian = torch.randn(512, 256) * 2 ** torch.rand(512, 1)
    laplace = torch.randn(256, 256) * torch.randn(256, 256).exp()
    # 8 and many of .5: under absmax's scale, 2, each .5 becomes 0; under 1 only the 8 is clipped
    spiky = .5 + .02 * torch.randn(256, 256)
    spiky[:, ::32] = 8.1
    for v in (gaussian, laplace, torch.rand(256, 256), spiky):
        error = block_errors(v, "mse")
        for e in range(-9, 5):
            scale = 2 ** (v.unflatten(-1, (-1, 32)).abs().amax(-1, True).log2().floor() + e)
            blocks = v.unflatten(-1, (-1, 32)).double()
            other = (to_grid(blocks / scale, E2M1) * scale - blocks).square().sum(-1)
            assert (error <= other + 1e-6 * error).all()
        for rule in ("nearest", "floor", "absmax"):
            assert (error <= block_errors(v, rule)).all()
    relative = block_errors(gaussian, "mse").sum() / gaussian.double().square().sum()
    assert abs(relative / .0125 - 1) <= .01
    assert block_errors(gaussian, "nearest").sum() > 1.05 * block_errors(gaussian, "mse").sum()


@pytest.mark.parametrize("rule, passes", [
    ("floor", False), ("nearest", False), ("mse", False), ("absmax", True)])
def test_a_value_that_a_rule_clips_on_purpose_gets_no_gradient_and_any_other_gets_its_own(
        rule, passes):
    x, w, dy = make_data(tokens=64)
    row = fp4.recipe("fp4", scale=rule, rotation="none", dgrad="off", wgrad="off")
    xq, x_mask = mx(x.double(), rule, 0)
    wq, w_mask = mx(w.double(), rule, 0)
    dx = dy.double() @ wq
    dw = dy.double().T @ xq
    assert 0 < (~x_mask).sum() < .2 * x.numel() and 0 < (~w_mask).sum() < .2 * w.numel()
    _, *results = run_passes(row, x, w, dy)
    for result, gradient, mask in zip(results, (dx, dw), (x_mask, w_mask)):
        expected = gradient if passes else gradient * mask
        assert (result - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert passes or not result[~mask].any()


def test_an_element_at_the_end_of_the_grid_counts_as_clipped():
    "6 is what 6 and everything above it becomes"
    v = torch.zeros(1, 32)
    v[0, :2] = torch.tensor([6., 5.9375])                   # absmax's scale is 1, and mse keeps it
    v[0, 2:] = torch.tensor([.5, 1, 1.5]).repeat(10)
    values, _, mask = quantizers.quantize(v, GemmSpec("mxfp4", "mse"))
    assert values[0, :2].tolist() == [6, 6]
    assert mask[0, :3].tolist() == [False, True, True]


@pytest.mark.parametrize("grid, share", [(INT4, .354), (E2M1, 2.92247856 / 6)])
def test_the_step_for_a_gaussian_is_the_one_with_the_least_squared_error(grid, share):
    v = torch.linspace(-8, 8, 20001).double()
    density = torch.exp(-v * v / 2)

    def error(step):
        return (density * (to_grid(v / step, grid) * step - v).square()).sum().item()

    assert error(share) < min(error(share * 1.01), error(share * .99))


def test_stochastic_rounding_of_nvfp4_never_clips_which_needs_the_room_of_16_to_17():
    torch.manual_seed(0)
    blocks = torch.randn(4096, 4, 16) * 2 ** (6 * torch.rand(4096, 4, 1))

    def largest(element):
        tensor_scale = quantizers.nvfp4_tensor_scale(
            blocks, GemmSpec("nvfp4", "absmax", rounding="stochastic"), element)
        scale, *_ = quantizers.nvfp4_blocks(blocks, tensor_scale, element, None)
        return (blocks / (scale * tensor_scale)).abs().max().item()

    assert 5.9 < largest(quantizers.LARGEST_ELEMENT["stochastic"]) <= 6
    assert largest(quantizers.LARGEST_ELEMENT["nearest"]) > 6.3     # to nearest may clip


def test_sawb_of_values_of_one_size_keeps_them():
    "its fit makes the clipping value negative"
    v = torch.tensor([2., -2]).repeat(8, 8)
    values, step = baselines.luq_quantize(v, "luq-int4", torch.float32)
    assert step == pytest.approx(4 / 15)
    assert (values * step - v).abs().max() <= step / 2 + 1e-6
    values, _ = baselines.luq_quantize(0 * v, "luq-int4", torch.float32)
    assert not values.any()


@pytest.mark.parametrize("size, rotation", [(1, 1), (40, 8), (96, 32), (640, 128), (4096, 1024)])
def test_halo_rotates_by_the_largest_power_of_two_that_divides_the_axis_up_to_1024(size, rotation):
    assert baselines.halo_rotation(size) == rotation


# ---- errors

@pytest.mark.parametrize("spec, mse, misalignment", [
    (GemmSpec("mxfp4", "floor"), 2.235e-2, 5.14e-2),
    (GemmSpec("mxfp4", "nearest"), 1.338e-2, 1.5e-2),
    (GemmSpec("mxfp4", "mse"), 1.251e-2, 1.25e-2),
    (GemmSpec(), 1.366e-2, 9.45e-3),
    (GemmSpec("mxfp4", "pma"), 1.382e-2, 3e-4),
    (GemmSpec(rounding="stochastic"), 2.778e-2, 0),
    (GemmSpec("mxfp4", "absmax"), 1.335e-2, 2.2e-2),
], ids=["floor", "nearest", "mse", "absmax34", "pma", "stochastic", "absmax"])
def test_errors_over_an_octave(spec, mse, misalignment):
    torch.manual_seed(0)
    result = quant_error.gaussian_error(spec, rows=128)
    assert abs(result[0] / mse - 1) <= .01, result
    assert abs(result[1] - misalignment) <= 6e-4, result


def test_the_papers_table_2_has_the_error_of_rule_nearest_in_its_quest_row_not_that_of_floor():
    torch.manual_seed(0)
    papers = [
        (GemmSpec(rounding="stochastic"), 2.77e-2, 0),
        (GemmSpec(), 1.37e-2, 9.3e-3),
        (GemmSpec("mxfp4", "nearest"), 1.32e-2, 1.3e-2),
    ]
    for spec, mse, misalignment in papers:
        result = quant_error.gaussian_error(spec, rows=64)
        assert abs(result[0] / mse - 1) <= .02
        assert abs(result[1] - misalignment) <= 2.5e-3
    floor = fp4.RECIPES["fp4"].forward                      # as in the code that they published
    assert floor.scale == "floor"
    error, misalignment = quant_error.gaussian_error(floor, rows=64)
    assert error > 1.6 * 1.32e-2 and misalignment > 3.5 * 1.3e-2


@pytest.mark.parametrize("changes, mse", [
    (dict(), 9.05e-3),
    (dict(scale="four-six"), 7.56e-3),
    (dict(rhs="square_blocks"), 12.40e-3),
    (dict(scale="four-six", rhs="square_blocks"), 12.38e-3),
    (dict(rounding="stochastic"), 23.55e-3),
    (dict(scale="four-six", rounding="stochastic"), 17.48e-3),
    (dict(rounding="eden"), 9.32e-3),
])
def test_errors_of_nvfp4_are_quartet_iis_table_1(changes, mse):
    torch.manual_seed(0)
    spec = GemmSpec("nvfp4", "absmax", 128, "before")._replace(**changes)
    result = quant_error.gaussian_error(spec, n_sigmas=4)
    assert abs(result[0] / mse - 1) <= .02, result
    # choosing by the error is a bias too
    biased = changes.get("rounding") is None or "scale" in changes
    if biased:
        assert abs(result[1]) > 1e-3
    else:
        assert abs(result[1]) <= 4e-4


def test_the_table_of_errors_has_a_line_for_every_quantiser_that_makes_sense(capsys, monkeypatch):
    monkeypatch.setattr(quant_error, "gaussian_error", lambda spec: (.0123, -.0001))
    quant_error.print_errors()
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["format", "scale", "rounding", "error", "misalignment"]
    assert lines[0].split() == ["mxfp4", "floor", "nearest", "0.01230", "-0.00010"]
    names = [" ".join(line.split()[:-2]) for line in lines]
    assert names == [
        *(f"mxfp4 {rule} {rounding}" for rule, rounding in [
            ("floor", "nearest"), ("floor", "eden"), ("nearest", "nearest"), ("nearest", "eden"),
            ("absmax34", "nearest"), ("absmax34", "stochastic"), ("absmax34", "eden"),
            ("absmax", "nearest"), ("absmax", "eden"), ("pma", "nearest"), ("pma", "eden"),
            ("mse", "nearest"), ("mse", "eden")]),
        "nvfp4 absmax nearest", "nvfp4 absmax nearest, 16 x 16", "nvfp4 absmax stochastic",
        "nvfp4 absmax eden", "nvfp4 four-six nearest", "nvfp4 four-six nearest, 16 x 16",
        "mxfp8 absmax nearest", "mxfp8 absmax eden",
        "int4 absmax nearest", "int4 absmax stochastic", "int4 absmax eden"]


def test_agreement_is_the_cosine_and_the_projection_onto_the_exact_gradient(monkeypatch):
    "a mean over sequences, for gradients that are known"
    exact = [torch.tensor([[[3., 0], [0, 4]], [[0, 1], [0, 0]]])]
    rounded = [torch.tensor([[[3., 4], [0, 0]], [[0, 2], [0, 0]]])]
    monkeypatch.setattr(quant_error, "gradients", lambda model, x, y: rounded)
    (cosine, alignment), = quant_error.agreement_by_depth(exact, None, None, None)
    assert abs(cosine - (9 / 25 + 1) / 2) <= 1e-6
    assert abs(alignment - (9 / 25 + 2) / 2) <= 1e-6


@pytest.mark.parametrize("rotation", [0, 32])
@pytest.mark.parametrize("rule", SCALE_RULES["mxfp4"])
def test_under_eden_with_a_fixed_rotation_a_row_is_as_long_in_its_own_direction_as_before(
        rule, rotation):
    torch.manual_seed(0)
    v = columns.rotate(torch.randn(64, 320) * 2 ** (4 * torch.rand(64, 1)), rotation)
    shares = {}
    for rounding in ("nearest", "eden"):
        spec = GemmSpec("mxfp4", rule, rotation, "none", rounding)
        values, factor, _ = quantizers.quantize(v, spec)
        q = values.double() * factor.double()
        shares[rounding] = (v * q).sum(1) / v.double().square().sum(1)
    assert (shares["eden"] - 1).abs().max() <= 1e-6
    assert (shares["nearest"] - 1).abs().min() > 1e-6


def test_a_forward_pass_with_edens_factor_and_a_fixed_rotation_draws_nothing():
    x, w, _ = make_data()
    for axes, is_random in ((dict(), False), (dict(format="nvfp4"), True)):
        row = fp4.recipe("fp4", rounding="eden:nearest:nearest", **axes)
        state = torch.get_rng_state()
        results = [matmul.forward(x, w, row)[0] for _ in range(2)]
        assert torch.equal(*results) != is_random
        assert torch.equal(state, torch.get_rng_state()) != is_random
        assert row.forward.is_fixed != is_random


def test_eden_takes_the_shrinkage_away_and_pma_most_of_it():
    def shrinkage(**columns):
        return quant_error.gaussian_error(GemmSpec(**columns), n_sigmas=4)[1]

    assert abs(shrinkage(rounding="eden")) <= 1e-4
    assert abs(shrinkage(scale="pma")) <= 1e-3
    assert shrinkage() >= 5e-3


def test_gradients_keep_their_length_through_depth_only_where_the_rounding_is_unbiased():
    def build(recipe):
        torch.manual_seed(0)
        config = ModelConfig(n_layer=4, n_embd=128, n_head=2, vocab_size=256, block_size=32)
        model = Llama(config, recipe, torch.float32)
        with torch.no_grad():                   # so that blocks matter beside the residual
            for p in model.blocks.parameters():
                if p.dim() == 2:
                    p.mul_(3)
        return model

    torch.manual_seed(1)
    x, y = torch.randint(256, (2, 8, 32))
    exact = quant_error.gradients(build(fp4.recipe("bf16")), x, y)
    assert len(exact) == 5 and exact[0].shape == (8, 32, 128)
    results = {}
    for name, changes in quant_error.BACKWARD.items():
        torch.manual_seed(2)
        model = build(fp4.recipe("fp4-bwd", **changes))
        results[name] = quant_error.agreement_by_depth(exact, model, x, y)
        no_block_yet = results[name][0]
        assert no_block_yet == (1, 1) or abs(no_block_yet[1] - 1) <= 1e-6

    def alignment(name, depth):
        return results[name][depth][1]

    assert abs(alignment("stochastic", 3) - 1) <= .02
    assert abs(alignment("nearest, EDEN", 3) - 1) <= .02
    assert alignment("QuEST", 3) < .85 < alignment("nearest", 3) < .96
    assert alignment("nearest", 4) < alignment("nearest", 1)
    # but in direction, to nearest is better
    assert results["stochastic"][4][0] < results["nearest"][4][0]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    "a text file; the first run makes its vocabulary and its token files, the second one finds them"
    path = tmp_path_factory.mktemp("corpus") / "text.py"
    functions = [f"def f{i}(x, y):\n    return x + {i} * y\n\n" for i in range(1500)]
    path.write_text("".join(functions))
    return str(path)


def parse_depth_line(line):
    "-> name, [(cosine, alignment) after each block]"
    pairs = re.findall(r"\S+ /\s*\S+", line[20:])
    return line[:20].strip(), [tuple(map(float, pair.split("/"))) for pair in pairs]


def test_the_depth_table_of_a_checkpoint_ranks_the_roundings_and_ignores_what_the_run_had_kept(
        corpus, tmp_path, capsys):
    args = ["--precision", "fp4", "--keep_first", "4", "--steps", "60", "--eval_every", "60",
            "--size", "tiny",
            "--batch", "4", "--seq", "64", "--data", corpus, "--out", str(tmp_path), "--name", "r",
            "--sample_tokens", "0"]
    assert quartet.run_cli(args) == 0
    capsys.readouterr()
    quant_error.print_decay(str(tmp_path / "r" / "ckpt.pt"), sequences=4)
    _, _, head, *lines = capsys.readouterr().out.splitlines()
    table = dict(parse_depth_line(line) for line in lines)
    assert head.split() == ["backward", "1", "2", "3", "4"]
    assert table.keys() == quant_error.BACKWARD.keys()
    cosine = {name: values[-1][0] for name, values in table.items()}
    alignment = {name: values[-1][1] for name, values in table.items()}
    assert alignment["QuEST"] < alignment["nearest"] < .97
    for name in ("stochastic", "nearest, EDEN", "nearest, PMA"):
        assert abs(alignment[name] - 1) < .05
    assert cosine["stochastic"] < cosine["nearest"] < 1


# ---- axes

def column(recipe, name):
    return [getattr(spec, name) for spec in recipe[:3]]


def test_a_value_changes_the_products_it_belongs_to_and_three_values_all():
    row = fp4.recipe("fp4", rotation="none")
    base = fp4.RECIPES["fp4"]
    assert column(row, "rotation") == [0, 0, 0] and column(row, "signs") == ["none"] * 3
    assert not row.has_kernels
    row = fp4.recipe("fp4", rotation="32:none:128")
    assert column(row, "rotation") == [32, 0, 128]
    assert column(row, "signs") == ["none", "none", "before"]
    row = fp4.recipe("fp4", scale="quest-nearest", rounding="sr")
    assert row == fp4.recipe("fp4-sr", scale="nearest")
    assert row.has_kernels and base.has_kernels
    assert fp4.recipe("fp4", dgrad="off", wgrad="off") == fp4.RECIPES["fp4-fwd"]
    assert fp4.recipe("fp4", forward="off") == fp4.RECIPES["fp4-bwd"]
    assert fp4.RECIPES["fp4-bwd"] == fp4.recipe("bf16", dgrad="on", wgrad="on")
    assert fp4.recipe("fp4", rounding="sr", signs="after") == fp4.RECIPES["fp4-original"]
    assert column(fp4.recipe("fp4", format="nvfp4"), "scale") == ["absmax"] * 3
    assert column(fp4.recipe("fp4", rounding="eden"), "rounding") == ["nearest", "eden", "eden"]
    row = fp4.recipe("fp4", rounding="eden:eden:eden", signs="before:before:before")
    assert column(row, "rounding") == ["eden"] * 3
    row = fp4.recipe("fp4", rounding="eden:nearest:nearest")
    assert row == fp4.RECIPES["fp4"]._replace(
        forward=fp4.RECIPES["fp4"].forward._replace(rounding="eden"))


def test_what_stands_left_and_right_of_a_slash_is_for_the_left_and_the_right_operand():
    def operands(spec):
        return [(operand.format, operand.scale) for operand in (spec.left, spec.right)]

    row = fp4.recipe("fp4", scale="mse/quest-floor")
    assert operands(row.forward) == [("mxfp4", "mse"), ("mxfp4", "floor")]
    assert row.dgrad == fp4.RECIPES["fp4"].dgrad and row.forward.is_packed
    assert fp4.recipe("fp4", scale="mse/mse") == fp4.recipe("fp4", scale="mse")
    row = fp4.recipe("fp4", format="mxfp8/mxfp4")
    assert operands(row.forward) == [("mxfp8", "absmax"), ("mxfp4", "floor")]
    assert operands(row.wgrad) == [("mxfp8", "absmax"), ("mxfp4", "absmax34")]
    assert not row.has_packed_products
    assert fp4.recipe("fp4", format="mxfp4/mxfp4") == fp4.RECIPES["fp4"]
    row = fp4.recipe("fp4", scale="mse/floor:pma/absmax34:pma")
    assert operands(row.dgrad) == [("mxfp4", "pma"), ("mxfp4", "absmax34")]
    assert operands(row.wgrad) == [("mxfp4", "pma")] * 2
    for spec in (row.forward, row.dgrad):
        assert spec.left == spec.left.left == spec.left.right and spec.right == spec.right.right
    row = fp4.recipe("nvfp4", format="nvfp4:nvfp4:mxfp8/mxfp4", rounding="nearest")
    assert row.wgrad.right.rhs == "from_unquantized"
    assert fp4.recipe("fp4", mean_split="on:off:on").forward.left.mean_split
    row = fp4.recipe("fp4", multiplier="1/0.84", scale="mse/nearest")
    assert [spec.multiplier for spec in (row.forward.left, row.forward.right)] == [1, .84]
    assert fp4.recipe("fp4", multiplier="1.0/1") == fp4.RECIPES["fp4"]
    assert label(vars(quartet.parse(["--scale", "mse/floor"]))) == "fp4-mse+floor"
    assert label(vars(quartet.parse(["--multiplier", "1/0.84"]))) == "fp4-multiplier-1+0.84"


@pytest.mark.parametrize("precision, axes, words", [
    ("fp4", dict(scale="four-six"),
     "forward: scale 'four-six' is not one of format mxfp4's: floor, nearest, absmax34"),
    ("fp4", dict(rotation="none", signs="before"),
     "dgrad: random signs before a rotation need a rotation"),
    ("fp4", dict(rounding="eden", signs="after"),
     "dgrad: rounding eden is unbiased only behind a random rotation"),
    ("fp4", dict(rounding="eden:nearest:eden", signs="none"),
     "wgrad: rounding eden is unbiased only behind a random rotation"),
    ("fp4", dict(rounding="sr:sr:sr"),
     "forward: stochastic rounding is unbiased only where the scale neither clips nor corrects, "
     "and floor of mxfp4 does"),
    ("quartet2", dict(scale="four-six:four-six:four-six"),
     "dgrad: scale four-six chooses by the error"),
    ("nvfp4", dict(rotation="32"),
     "dgrad: this row multiplies with the forward product's weight as it is"),
    ("nvfp4", dict(format="mxfp4", dgrad="off", rotation="32:32:32",
                   signs="before:before:before", rounding="eden:eden:eden"),
     "forward: square blocks of mxfp4 have no rounding eden"),
    ("fp4", dict(format="mxfp8/mxfp4", scale="nearest"),
     "forward: left operand, scale 'nearest' is not one of format mxfp8's: absmax"),
    ("fp4", dict(scale="floor/four-six"),
     "forward: right operand, scale 'four-six' is not one of format mxfp4's: floor, nearest"),
    ("fp4-sr", dict(scale="floor:absmax34/mse:absmax34"),
     "dgrad: right operand, stochastic rounding is unbiased only where the scale neither clips"),
    ("nvfp4", dict(format="nvfp4:mxfp4/mxfp8:nvfp4"),
     "dgrad: this row multiplies with the forward product's weight as it is, which cannot have a "
     "format or scale of its own"),
    ("nvfp4", dict(format="nvfp4/mxfp4:nvfp4:nvfp4", rounding="eden:sr:sr", rotation="32:none:16",
                   signs="before:none:before"),
     "forward: square blocks of mxfp4 have no rounding eden"),
    ("fp4", dict(scale="mse/floor/mse"),
     "scale 'mse/floor/mse': give one value, or two for the operands, left/right"),
    ("fp4", dict(scale="mse", multiplier="0.84"),
     "forward: a multiplier is for the scales floor and nearest, not for mse"),
    ("fp4", dict(multiplier="1:0.84:1"),
     "dgrad: a multiplier is for the scales floor and nearest, not for absmax34"),
    ("fp4", dict(scale="mse/floor", multiplier="0.84/1"),
     "forward: left operand, a multiplier is for the scales floor and nearest, not for mse"),
    ("nvfp4", dict(multiplier="0.84"), "forward: a multiplier is for the scales"),
    ("fp4", dict(multiplier="0.84x"),
     "multiplier '0.84x': NUMBER '0.84x' is not a number of at least 0.1 and less than 10"),
    ("fp4", dict(multiplier="1/nan"), "NUMBER 'nan' is not a number of at least 0.1"),
    ("fp4", dict(multiplier="0"), "NUMBER '0' is not a number of at least 0.1"),
    ("fp4", dict(scale="mse/"),
     "scale '' is not one of floor, nearest, absmax34"),
    ("fp4", dict(rotation="32/64"),
     "rotation '32/64' is not one of none, 16, 32, 64, 128"),
    ("bf16", dict(scale="nearest"),
     "bf16 has no quantised product whose scale could change"),
    ("fp4-fwd", dict(rounding="sr"),
     "fp4-fwd has no quantised product whose rounding could change"),
    ("luq-int4", dict(format="mxfp4"),
     "luq-int4 is a method of its own and has no format to change"),
    ("fp4", dict(down_input="int4"), "down_input 'int4' is not one of none, mxfp8"),
    ("fp4", dict(down_input="mxfp8:none:none"), "give one value"),
    ("bf16", dict(down_input="mxfp8"),
     "down_input mxfp8 needs a quantised forward product, and bf16 has none"),
    ("fp4", dict(down_input="mxfp8", forward="off"), "needs a quantised forward product"),
    ("luq-int4", dict(down_input="mxfp8"), "has no down_input to change"),
    ("mxfp8", dict(down_input="mxfp8"),
     "down_input mxfp8 changes nothing where the input of every layer has this format"),
    ("fp4", dict(down_input="mxfp8", scale="absmax34", rounding="sr:nearest:nearest"),
     "forward: left operand, stochastic rounding is unbiased only where the scale neither clips"),
    ("fp4", dict(rotation="32:64"),
     "rotation '32:64': give one value or three, forward:dgrad:wgrad"),
    ("fp4", dict(rotation="48"),
     "rotation '48' is not one of none, 16, 32, 64, 128"),
    ("fp4", dict(wgrad="on:off:on"),
     "wgrad 'on:off:on': give one value"),
    ("fp4", dict(rotations="32"),
     "rotations '32' is not one of format, scale, multiplier, rotation"),
])
def test_a_combination_without_meaning_is_refused_with_a_sentence_and_exit_code_2(
        precision, axes, words, capsys):
    with pytest.raises(ValueError, match=re.escape(words)):
        fp4.recipe(precision, **axes)
    if "rotations" in axes:
        return
    flags = [f"--{axis}={value}" for axis, value in axes.items()]
    assert quartet.run_cli(["--precision", precision, "--steps", "1", *flags]) == 2
    assert words in capsys.readouterr().err


def test_every_axis_is_a_flag_and_names_the_run():
    flags = ["--rotation", "none", "--signs", "none", "--dgrad", "off", "--scale", "nearest"]
    settings = quartet.parse(flags)
    assert label(vars(settings)) == "fp4-nearest-rotation-none-signs-none-dgrad-off"
    assert {f"--{axis}" for axis in fp4.AXES} == {
        "--format", "--scale", "--multiplier", "--rotation", "--signs", "--rounding",
        "--mean_split",
        "--forward", "--dgrad", "--wgrad", "--post_step", "--down_input"}
    for flag, name in (("--format", "fp4-mxfp8"), ("--down_input", "fp4-down_input-mxfp8")):
        assert label(vars(quartet.parse([flag, "mxfp8"]))) == name


def test_a_mean_that_all_tokens_share_costs_nothing_where_it_is_split_off():
    """Without, it sets the scales of x, and what tells a token from the others is lost."""
    x, w, dy = make_data(tokens=64)
    shift = 30 * torch.randn(1, 96)
    dy_shift = 1e-2 * torch.randn(1, 64)
    exact = (x @ w.T, dy @ w, dy.T @ x)

    def errors(x_shift, dy_shift, **axes):
        row = fp4.recipe("fp4", scale="absmax34", rotation="none", **axes)
        results = run_passes(row, x + x_shift, w, dy + dy_shift)
        wanted = ((x + x_shift) @ w.T, (dy + dy_shift) @ w, (dy + dy_shift).T @ (x + x_shift))
        return [((r - e).norm() / size.norm()).item()
                for r, e, size in zip(results, wanted, exact)]

    torch.manual_seed(0)
    y_error, dx_error, _ = errors(0, 0)
    # The mean meets the weight as it is quantised; what that costs is apart from the mean's own.
    y_kept, dx_kept, dw_kept = errors(shift, dy_shift)
    y_split, dx_split, dw_split = errors(shift, dy_shift, mean_split="on")
    assert y_split < .7 * y_kept and dx_split < .9 * dx_kept and dw_split < .1 * dw_kept


def test_a_mean_is_that_of_the_rows_and_of_no_rows_it_is_zero():
    v = torch.randn(40, 96).bfloat16()
    rest, mean = matmul.split_mean(v)
    assert (mean - v.double().mean(0, keepdim=True)).abs().max() <= 1e-6
    assert rest.dtype == mean.dtype == torch.float32 and torch.equal(rest, v.float() - mean)
    rest, mean = matmul.split_mean(v[:0])
    assert rest.shape == (0, 96) and mean.shape == (1, 96) and not mean.any()


def test_down_input_changes_the_row_of_the_layers_that_are_down_and_no_other():
    plain = fp4.RECIPES["fp4"]
    row = fp4.recipe("fp4", down_input="mxfp8")
    assert row._replace(down_input="none") == plain and row.has_kernels
    assert row.down == fp4.recipe("fp4", format="mxfp8/mxfp4:mxfp4:mxfp4")  # which has a statement
    assert not row.down.has_kernels and row.down.has_packed_products
    assert plain.down == plain and fp4.recipe("fp4", down_input="none") == plain
    squares = fp4.recipe("nvfp4", down_input="mxfp8")
    assert squares.down.forward.rhs == "square_blocks"
    assert (squares.down.forward.left.format, squares.down.forward.right.format) == (
        "mxfp8", "nvfp4")
    mixed = fp4.recipe("fp4", scale="mse/floor", down_input="mxfp8").down.forward
    assert (mixed.left.scale, mixed.right.scale) == ("absmax", "floor")
    times = fp4.recipe("fp4", multiplier="0.84", rounding="eden:nearest:nearest",
                       down_input="mxfp8").down.forward
    assert (times.left.multiplier, times.right.multiplier) == (1, .84)
    assert times.left.rounding == times.right.rounding == "eden"


def test_only_the_down_projections_of_quantised_blocks_leave_the_kernels_for_down_input():
    row = fp4.recipe("fp4", down_input="mxfp8", post_step="cage")
    config = ModelConfig(n_layer=2, n_embd=64, n_head=1, vocab_size=64, block_size=32)
    model = Llama(config, row, torch.float32, keep_first=1)
    recipes = {name: layer.recipe for name, layer in model.named_modules()
               if isinstance(layer, fp4.Linear)}
    assert {recipe for name, recipe in recipes.items() if name[:8] == "blocks.0"} == {
        fp4.RECIPES["bf16"]}
    assert recipes.pop("blocks.1.mlp.proj") == row.down
    assert [name for name, recipe in recipes.items() if recipe.has_kernels] == [
        "blocks.1.attention.qkv", "blocks.1.attention.proj", "blocks.1.mlp.gate_up"]
    model(torch.zeros(1, 32, dtype=torch.long), torch.zeros(1, 32, dtype=torch.long)).backward()
    fp4.quantize_weights(model)
    fp4.post_step_of(model)(.01, 9, 10)
    with pytest.raises(ValueError, match="a sharded model cannot have post_step cage"):
        row.check_run(10, True)                 # The down projections have no kernels.
    row.check_run(10, False)


def test_a_run_with_down_input_goes_on_where_it_was_stopped(corpus, tmp_path, capsys):
    def run(*flags):
        args = ["--size", "tiny", "--batch", "2", "--seq", "32", "--eval_every", "2", "--data",
                corpus, "--out", tmp_path, "--sample_tokens", "0", "--lr", "0.001", *flags]
        assert quartet.run_cli(list(map(str, args))) == 0, capsys.readouterr().err

    def losses(name): return [line.split(",")[1] for line in
                              (tmp_path / name / "log.csv").read_text().splitlines()
                              if line[:1].isdigit()]

    run("--steps", 4, "--down_input", "none,mxfp8", "--name", "r")
    plain, down = losses("r-fp4"), losses("r-fp4-down_input-mxfp8")
    assert len(down) == 4 and plain[0] != down[0]
    run("--steps", 2, "--down_input", "mxfp8", "--name", "half")
    run("--steps", 4, "--down_input", "mxfp8", "--name", "half", "--resume", "--allow_changes")
    assert losses("half")[0] == down[0] and len(losses("half")) == 4


# ---- emulation and kernels

@pytest.mark.parametrize("axes", [
    dict(signs="after"),
    dict(signs="after", scale="nearest"),
    dict(dgrad="off", wgrad="off"),
    dict(rotation="32:none:none"),
    dict(rotation="32:none:32", signs="none:none:after"),
])
def test_the_emulation_of_what_the_kernels_compute_agrees_with_them(axes):
    x, w, dy = make_data()                      # signs after the Hadamard cancel: nothing is random
    row = fp4.recipe("fp4", **axes)
    layer = fp4.Linear(96, 64, row)
    assert row.has_kernels
    with torch.no_grad():
        layer.weight.copy_(w)
    a = x.clone().requires_grad_()
    y = layer(a)
    y.backward(dy)
    by_kernels = (y.detach(), a.grad, layer.weight.grad)
    for emulated, expected in zip(run_passes(row, x, w, dy), by_kernels):
        assert (emulated - expected).norm() <= 1e-5 * expected.norm()


# What one scale serves is NaN together: a whole tensor, 32 x 32 tiles, or a block of one token.
ONE_SCALE = ("fp8", "nvfp4", "four-over-six", "tetrajet2", "quartet2", "luq-int4", "luq-fp4",
             "halo-fp4", "lss-int4")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", fp4.RECIPES)
def test_what_is_not_finite_reaches_outputs_and_gradients_and_no_more_than_its_scale_serves(
        name, bad):
    row = fp4.RECIPES[name]
    x, w, dy = make_data()
    x[3, 40] = bad
    y, dx, dw = layer_passes(row, x, w, dy)
    if name in ONE_SCALE:
        apart = 40
    else:
        apart = 32 if name == "jetfire-fp4" else 1
    is_bad = ~y.isfinite()
    assert is_bad[3].all()
    assert is_bad.any(1).sum() == apart
    assert not dw.isfinite().all()
    # x[3, 40] itself is what wgrad reads: in all rows of dw, in the columns of its rotation
    assert (~dw.isfinite()).any(1).all()

    nan_dy = torch.where(torch.arange(40)[:, None] == 3, torch.nan, dy)     # as a loss has it
    _, dx, _ = layer_passes(row, x, w, nan_dy)
    assert dx[3].isnan().all()

    x[3, 40] = 0
    dy[3, 5] = bad
    y, dx, dw = layer_passes(row, x, w, dy)
    is_bad = ~dx.isfinite()
    assert y.isfinite().all() and is_bad[3].any() and not dw.isfinite().all()
    assert is_bad.any(1).sum() == apart or name in ("halo-fp4", "lss-int4")


@pytest.mark.parametrize("name", fp4.RECIPES)
def test_a_weight_that_is_nan_reaches_the_outputs_and_the_gradients(name):
    x, w, dy = make_data()
    w[5, 40] = float("nan")
    y, dx, dw = layer_passes(fp4.RECIPES[name], x, w, dy)
    assert y[:, 5].isnan().all() and dx.isnan().any(1).all()


@pytest.mark.parametrize("name", EMULATED)
def test_any_number_of_tokens_and_features_of_odd_multiples_work_in_bfloat16(name):
    x, w, dy = make_data(7, 48, 80)
    results = layer_passes(fp4.RECIPES[name], x.bfloat16(), w, dy.bfloat16())
    for shape, result in zip(((7, 80), (7, 48), (80, 48)), results):
        assert result.shape == shape and result.isfinite().all() and result.abs().max() > 0


def test_zeros_stay_zeros_in_every_row():
    x, w, dy = make_data()
    for name in EMULATED:
        y, dx, dw = run_passes(fp4.RECIPES[name], 0 * x, w, 0 * dy)
        assert not y.any() and not dx.any() and not dw.any(), name


def test_the_readmes_own_recipe_runs_in_under_twenty_lines(corpus, tmp_path):
    with open(os.path.join(ROOT, "fp4", "README.md")) as file:
        readme = file.read()
    code = re.search(r"```python\n(# mine\.py.*?)```", readme, re.S).group(1)
    assert len(code.splitlines()) < 20
    script = tmp_path / "mine.py"
    script.write_text(code)
    done = subprocess.run(
        [sys.executable, script, "--precision", "mine", "--size", "tiny", "--steps", "3",
             "--batch", "4",
         "--seq", "32", "--data", corpus, "--sample_tokens", "5", "--out", tmp_path],
        env={**os.environ, "PYTHONPATH": ROOT}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "tiny-mine" / "ckpt.pt").exists(), done.stderr


@pytest.mark.parametrize("name", ["nvfp4", "luq-int4"])
def test_compiled_equals_eager_in_bfloat16_but_for_roundings_that_fusion_leaves_out(name):
    torch.compiler.reset()                      # float32, where it is equality: test_linear.py
    x, w, dy = make_data()
    layer = fp4.Linear(96, 64, fp4.recipe(name))
    results = []
    for run in (layer, torch.compile(layer, fullgraph=True)):
        a = x.bfloat16().requires_grad_()
        layer.weight.grad = None
        torch.manual_seed(3)
        y = run(a)
        y.backward(dy.bfloat16())
        results.append((y.detach(), a.grad, layer.weight.grad))
    eager, compiled = results
    for e, c in zip(eager, compiled):
        assert (e.float() - c.float()).norm() <= 5e-3 * c.float().norm()
