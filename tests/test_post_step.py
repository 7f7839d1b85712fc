"""What acts on the weights between optimizer steps, against its formulas written out in float64."""
import signal

import pytest
import torch

import fp4
import quartet
from fp4 import ops, post_step, stored_weight
from fp4.emulate import matmul
from test_baselines import E2M1, hadamard, mx, nvfp4, quest_scale
from test_train import (        # fixtures and readers
    BRIEF, corpus, equal, log, run, state, stopping_after)
from tools import report
from tools.run import label


def layer_of(name, n_in=96, n_out=64, **axes):
    torch.manual_seed(0)
    return fp4.Linear(n_in, n_out, fp4.recipe(name, **axes))


# ---- CAGE

def quest_in_its_own_basis(w):
    values, _ = mx(w, "floor")
    return hadamard(values, 32)


QUANTIZED = {"fp4": quest_in_its_own_basis, "nvfp4": lambda w: nvfp4(w, square=True)}


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("word, force", [("cage", 10 * .5), ("cage:3", 3 * .5),
                                         ("cage:3:0.2", 3 * .875)])
def test_cage_is_its_formula_in_float64(name, word, force):
    layer = layer_of(name, post_step=word)
    w = layer.weight.detach().double()
    expected = w - .01 * force * (w - QUANTIZED[name](w))
    fp4.post_step_of(layer)(.01, 9, 10)
    assert not torch.allclose(w, expected, rtol=0, atol=1e-4)
    assert torch.allclose(layer.weight.detach().double(), expected, rtol=0, atol=1e-7)


ROWS = [("fp4", {}), ("nvfp4", {}), ("mxfp8", {}), ("quartet2", {}), ("fp4-fwd", {}),
        ("fp4", dict(scale="mse")), ("fp4", dict(scale="pma")), ("fp4", dict(rotation="128")),
        ("fp4", dict(format="int4")), ("fp4", dict(scale="mse/floor")),
        ("fp4", dict(format="mxfp8/mxfp4")), ("fp4", dict(rounding="eden:nearest:nearest"))]


@pytest.mark.parametrize("name, axes", ROWS)
def test_the_grid_is_what_the_forward_product_reads(name, axes):
    layer = layer_of(name, post_step="cage", **axes)
    w = layer.weight.detach()
    if layer.recipe.has_kernels:
        layer.quantize_weight()
        expected = ops.dequantize(layer.stored.packed, torch.float32)
    else:
        _, saved = matmul.forward(torch.randn(32, 96), w, layer.recipe)
        quantized = matmul.Saved(*saved).w_quantized
        expected = quantized.unpacked(torch.float32) * quantized.factor
    assert torch.equal(post_step.quantize(w, layer.recipe), expected)
    there = post_step.rotate(w, layer.recipe)
    assert there.shape == expected.shape
    assert (there - expected).norm() < .2 * there.norm()
    back = post_step.rotate_back(there, w, layer.recipe)
    assert torch.allclose(back, w, rtol=0, atol=1e-6)


def test_cage_does_nothing_before_its_start_and_grows_from_there_to_the_end():
    layer = layer_of("fp4", post_step="cage:10:0.8")
    first = layer.weight.detach().clone()
    version = layer.weight._version
    act = fp4.post_step_of(layer)
    for done in range(1, 81):
        act(.01, done, 100)
    assert layer.weight._version == version and torch.equal(layer.weight, first)
    distances = []
    for done in (81, 90, 100):
        with torch.no_grad():
            layer.weight.copy_(first)
        act(.01, done, 100)
        distances.append((layer.weight - first).norm().item())
    assert distances[1] / distances[0] == pytest.approx(10, rel=1e-3)
    assert distances[2] / distances[0] == pytest.approx(20, rel=1e-3)


def test_a_layer_notices_that_its_stored_weight_is_stale():
    layer = layer_of("fp4", post_step="cage:10:0")
    layer.quantize_weight()
    assert stored_weight.is_fresh(layer.stored, layer.weight)
    fp4.post_step_of(layer)(.05, 1, 1)
    assert not stored_weight.is_fresh(layer.stored, layer.weight)


# ---- de-oscillation

def window_of(layer, v, moves, start=2, period=6):
    """Takes a layer through a window in which its rotated weight v makes these moves, a list of
    tensors; returns the weight as it was set last."""
    act = fp4.post_step_of(layer)
    n = layer.recipe.forward.rotation
    for done, move in enumerate(moves, 1):
        w = v + move
        w = (hadamard(w, n) if n else w).float()
        with torch.no_grad():
            layer.weight.copy_(w)
        act(.01, done, 100)
        if done < start + period:
            assert torch.equal(layer.weight, w), done
        assert layer.deosc_last.any() == (done >= start)
    return w


@pytest.mark.parametrize("axes", [{}, dict(rotation="none")])
def test_what_flips_between_two_points_is_snapped_and_what_drifts_is_not(axes):
    layer = layer_of("fp4", 32, 32, post_step="deosc:2:6:4", **axes)
    torch.manual_seed(1)
    v = torch.randn(32, 32, dtype=torch.float64)
    v[:, 31] = 8 * quest_scale(v).squeeze(1).log2().floor().exp2()      # the scale holds 6 or more
    q, unit = grid_of(layer, v)
    v = q.clone()                                       # All are in the middle of their bins.
    v[0, 5] = 1.25 * unit[0]                            # between the points 1 and 1.5
    v[1, 7] = 0
    moves = []
    for t in range(8):
        move = torch.zeros_like(v)
        move[0, 5] = .02 * unit[0] * (-1) ** t
        move[1, 7] = .3 * unit[1] * t
        moves.append(move)
    w = window_of(layer, v, moves)
    after = layer.weight.detach().double()
    after = hadamard(after, 32) if layer.recipe.forward.rotation else after
    assert torch.equal(layer.weight[1:], w[1:])         # not a bit of another block
    snapped = after[0, 5] / unit[0]
    assert abs(snapped - 1) < 1e-5 or abs(snapped - 1.5) < 1e-5, snapped
    others = torch.arange(32) != 5
    assert torch.allclose(after[0, others], v[0, others], rtol=0, atol=1e-6)
    for buffer in ("deosc_distance", "deosc_quantized_distance"):
        assert not getattr(layer, buffer).any()
    assert torch.equal(layer.deosc_last, layer.weight)


def grid_of(layer, v):
    "v rounded to the grid, and the scale of each row, of one block"
    w = (hadamard(v, 32) if layer.recipe.forward.rotation else v).float()
    q = post_step.quantize(w, layer.recipe).double()
    unit = q.abs().amax(1) / 6
    is_point = ((q / unit[:, None]).abs()[..., None] - E2M1).abs().amin(-1) < 1e-6
    assert is_point.all()
    return q, unit


def test_the_ratio_decides():
    for ratio, expected in ((2.4, True), (2.6, False)):
        distance, quantized = torch.tensor([.2, 0.]), torch.tensor([.5, 0.])
        snaps = post_step.oscillates(distance, quantized, ratio)
        assert snaps.tolist() == [expected, False]      # What rests has a ratio of 0 / 0.


def test_the_next_window_begins_where_the_last_one_ends():
    layer = layer_of("fp4", 32, 32, post_step="deosc:1:3:0.001")
    act = fp4.post_step_of(layer)
    changed = []
    for done in range(1, 11):
        with torch.no_grad():
            layer.weight += .01 * torch.randn(32, 32)
        before = layer.weight.detach().clone()
        act(.01, done, 10)
        changed.append(not torch.equal(layer.weight, before))
    assert [done for done, change in enumerate(changed, 1) if change] == [4, 7, 10]


def test_layers_that_are_replaced_have_their_state_where_their_weights_are():
    model = torch.nn.Sequential(torch.nn.Linear(32, 64))
    fp4.replace_linears(model, fp4.recipe("fp4", post_step="deosc:1:1:4"))
    assert {buffer.device.type for buffer in model.buffers()} == {"cpu"}
    fp4.post_step_of(model)(.01, 1, 4)
    assert torch.equal(model[0].deosc_last, model[0].weight)
    plain = torch.nn.Sequential(fp4.Linear(32, 64, fp4.recipe("bf16"), bias=True))
    plain.load_state_dict(post_step.without_state(model.state_dict()))


# ---- the column

def test_a_row_with_a_post_step_is_otherwise_the_same_row():
    plain = fp4.recipe("fp4")
    row = fp4.recipe("fp4", post_step="cage:5")
    assert row.post_step == "cage:5" and row._replace(post_step="none") == plain
    assert row.has_kernels and row.is_quantized and row.feature_multiple == 32
    assert fp4.recipe("fp4", post_step="none") == plain
    assert not fp4.recipe("bf16", post_step="none").is_quantized
    assert fp4.post_step_of(layer_of("fp4")).layers == []


@pytest.mark.parametrize("word, name", [
    ("none", "fp4-post_step-none"), ("cage", "fp4-cage"), ("deosc", "fp4-deosc"),
    ("cage:5:0.5", "fp4-post_step-cage:5:0.5")])
def test_the_name_of_a_run_says_its_post_step(word, name):
    assert label(vars(quartet.parse(["--post_step", word]))) == name


@pytest.mark.parametrize("word, numbers", [
    ("none", []), ("cage", [10., .8]), ("cage:0", [0., .8]), ("cage:1e1:0", [10., 0.]),
    ("deosc", [2000, 200, 4.]), ("deosc:1:1:0.5", [1, 1, .5])])
def test_numbers_may_be_left_out(word, numbers):
    name, *got = fp4.recipes.parse_post_step(word)
    assert got == numbers and list(map(type, got)) == list(map(type, numbers))


@pytest.mark.parametrize("flags, sentence", [
    (["--post_step", "cagey"], "post_step 'cagey' is not one of none, cage, deosc"),
    (["--post_step", "none:1"], "post_step 'none:1' has more numbers than none"),
    (["--post_step", "cage:1:0.5:2"], "has more numbers than cage:STRENGTH:START"),
    (["--post_step", "cage:x"], "STRENGTH 'x' is not a number of at least 0"),
    (["--post_step", "cage:nan"], "STRENGTH 'nan' is not a number of at least 0"),
    (["--post_step", "cage:inf"], "STRENGTH 'inf' is not a number of at least 0"),
    (["--post_step", "cage:-1"], "STRENGTH '-1' is not a number of at least 0"),
    (["--post_step", "cage:1:1"], "START '1' is not a number of at least 0 and less than 1"),
    (["--post_step", "deosc:0"], "START '0' is not a whole number of at least 1"),
    (["--post_step", "deosc:1:0"], "PERIOD '0' is not a whole number of at least 1"),
    (["--post_step", "deosc:1.5"], "START '1.5' is not a whole number of at least 1"),
    (["--post_step", "cage", "--precision", "bf16"],
     "post_step cage needs a quantised forward product, and bf16 has none"),
    (["--post_step", "cage", "--forward", "off"], "needs a quantised forward product"),
    (["--post_step", "cage", "--precision", "luq-fp4"],
     "luq-fp4 is a method of its own and has no post_step to change"),
    (["--post_step", "cage", "--rounding", "stochastic:nearest:nearest", "--scale", "absmax34"],
     "needs a grid that stays"),
    (["--post_step", "deosc", "--signs", "before:before:before"], "needs a grid that stays"),
    (["--post_step", "cage", "--format", "nvfp4", "--rounding", "eden:nearest:nearest"],
     "needs a grid that stays"),
    (["--post_step", "deosc:3:2"],
     "the first window of deosc is from step 3 to step 5, and this recipe trains steps 1 to 4 of 4:"
     " give another START or PERIOD"),
])
def test_a_word_that_means_nothing_is_refused(run, tmp_path, flags, sentence):
    code, last_line, _ = run("--steps", 4, "--name", "r", *flags)
    assert code == 2 and sentence in last_line
    assert not (tmp_path / "r").exists()


def test_a_sharded_model_has_only_what_is_local_to_a_row():
    fp4.recipe("fp4", post_step="cage").check_run(1, True)
    fp4.recipe("nvfp4").check_run(1, True)
    for row in (fp4.recipe("nvfp4", post_step="cage"), fp4.recipe("fp4", post_step="deosc:1:1")):
        row.check_run(2, False)
        with pytest.raises(ValueError, match="a sharded model cannot have post_step"):
            row.check_run(2, True)


# ---- a run

CASES = ["cage:50:0.3", "deosc:2:3:0.5"]


@pytest.mark.parametrize("word", CASES)
def test_a_resumed_run_ends_as_if_it_had_not_been_stopped(run, tmp_path, monkeypatch, word):
    """It is stopped after the fourth step, in the middle of deosc's window from 2 to 5."""
    monkeypatch.setattr(report, "draw_curves", lambda path, runs: path)
    args = ["--precision", "fp4-sr", "--post_step", word, "--steps", 7, *BRIEF]
    assert run(*args, "--name", "whole")[0] == 0
    with monkeypatch.context() as stopping:
        stopping.setattr(quartet.run, "show_step", stopping_after(3))
        assert run(*args, "--name", "r")[0] == 128 + signal.SIGTERM
    assert len(log(tmp_path / "r")) == 4
    assert run(*args, "--name", "r", "--resume")[0] == 0
    assert log(tmp_path / "r") == log(tmp_path / "whole")
    for part in ("model", "optimizer"):
        assert equal(state(tmp_path / "r")[part], state(tmp_path / "whole")[part]), part
    assert run("--name", "r", "--sample", "def")[0] == 0


def test_a_run_without_one_is_as_it_was_and_one_with_one_is_another(run, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "draw_curves", lambda path, runs: path)
    args = ["--steps", 6, *BRIEF]
    for name in ("none", *CASES):
        assert run(*args, "--post_step", name, "--name", name.partition(":")[0])[0] == 0
    assert run(*args, "--name", "plain")[0] == 0
    plain = state(tmp_path / "plain")
    assert not any("deosc" in name for name in plain["model"])
    for part in ("model", "optimizer"):
        assert equal(state(tmp_path / "none")[part], plain[part]), part
    assert log(tmp_path / "none") == log(tmp_path / "plain")
    for name in ("cage", "deosc"):
        pairs = zip(log(tmp_path / name), log(tmp_path / "plain"))
        # cage acts after the second step of six, and deosc after the fifth: another loss follows.
        n_equal = {"cage": 2, "deosc": 5}[name]
        assert [row == other for row, other in pairs] == [True] * n_equal + [False] * (6 - n_equal)
