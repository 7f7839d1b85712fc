"""A run that switches to another recipe: which steps have which, and that nothing else changes."""
import dataclasses
import signal

import pytest
import torch

import fp4
import quartet
from data.files import UserError
from fp4 import AXES, post_step
from model import PRESETS, Llama, ModelConfig
from test_cuda_graph import ON_GPU
from test_train import (        # fixtures and readers
    BRIEF, SMALL, corpus, equal, log, resolved, run, state, stopping_after, two_blocks)
from tools import checkpoint, report, schedule
from tools.run import label, parse_log, read_log


@pytest.fixture(autouse=True)
def small(two_blocks, monkeypatch):
    monkeypatch.setattr(report, "draw_curves", lambda path, runs: path)


def settings(*args, **changes):
    cfg = resolved("--size", "tiny", "--batch", 4, "--seq", 32, *args)
    return dataclasses.replace(cfg, **changes)


def recipes_by_hand(share, steps, first, second):
    "the recipe of each step, as the docstring of schedule.py says it"
    n_first = round(share * steps)
    return [first] * n_first + [second] * (steps - n_first)


# ---- which steps

@pytest.mark.parametrize("share, steps, n_first", [
    ("0.8", 350, 280), ("0.29", 100, 29), ("0.5", 5, 2), ("0.5", 7, 4), ("0.57", 100, 57),
    ("0.999", 1000, 999), ("1e-3", 1000, 1), (".5", 2, 1), ("0.7", 10, 7)])
def test_the_first_phase_has_its_share_of_the_steps_rounded(share, steps, n_first):
    cfg = settings("--precision", "bf16", "--steps", steps, "--switch", f"{share}:fp4")
    first, second = schedule.phases_of(cfg, 1)
    assert (first.begin, first.end, second.begin, second.end) == (0, n_first, n_first, steps)
    assert first.recipe == fp4.recipe("bf16") and second.recipe == fp4.recipe("fp4")
    assert first.steps == second.steps == steps
    for done in range(steps + 1):
        assert schedule.phase_at([first, second], done) is (first if done <= n_first else second)


def test_a_share_is_of_the_length_however_that_is_given():
    cfg = settings("--precision", "bf16", "--tokens", 128 * 40, "--switch", "0.25:fp4")
    assert [phase.end for phase in schedule.phases_of(cfg, 1)] == [10, 40]
    cfg = settings("--tokens_per_param", 2, "--switch", "0.25:bf16")
    assert [phase.end for phase in schedule.phases_of(cfg, 64 * 20)] == [5, 20]


def test_without_a_switch_there_is_one_phase():
    for args in ([], ["--scale", "mse", "--post_step", "cage"]):
        cfg = settings("--steps", 9, *args)
        phase, = schedule.phases_of(cfg, 1)
        assert (phase.begin, phase.end, phase.steps, phase.cfg) == (0, 9, 9, cfg)
        assert phase.recipe == schedule.recipe_of(cfg) == schedule.recipes_of(cfg)[0]


def test_each_phase_has_its_own_row_and_axes():
    word = "0.8:fp4+post_step=cage:10:0.8+scale=mse+rotation=32:none:128"
    cfg = settings("--precision", "fp4-sr", "--scale", "nearest", "--signs", "after",
                   "--steps", 10, "--switch", word, "--keep_first", 1)
    first, second = schedule.phases_of(cfg, 1)
    assert first.recipe == fp4.recipe("fp4-sr", scale="nearest", signs="after")
    assert second.recipe == fp4.recipe("fp4", post_step="cage:10:0.8", scale="mse",
                                       rotation="32:none:128")
    for phase in (first, second):
        assert phase.cfg.switch is None and phase.cfg.keep_first == 1
        assert schedule.recipe_of(phase.cfg) == phase.recipe
    plain = settings("--scale", "nearest", "--steps", 10, "--switch", "0.8:fp4")
    assert {axis: getattr(schedule.phases_of(plain, 1)[1].cfg, axis) for axis in AXES} == \
        dict.fromkeys(AXES)


@pytest.mark.parametrize("flags, sentence", [
    (["--switch", "0.5"], "switch '0.5' is not SHARE:ROW or SHARE:ROW+AXIS=VALUE"),
    (["--switch", "0.5:"], "is not SHARE:ROW"),
    (["--switch", "half:fp4"], "is not SHARE:ROW"),
    (["--switch", "nan:fp4"], "the share has to be more than 0 and less than 1"),
    (["--switch", "0:fp4"], "the share has to be more than 0 and less than 1"),
    (["--switch", "1:fp4"], "the share has to be more than 0 and less than 1"),
    (["--switch=-0.5:fp4"], "the share has to be more than 0 and less than 1"),
    (["--switch", "0.5:fp5"], "precision 'fp5' is not one of bf16, fp4"),
    (["--switch", "0.5:fp4+mse"], "is not SHARE:ROW or SHARE:ROW+AXIS=VALUE"),
    (["--switch", "0.5:fp4+switch=0.7:bf16"], "'switch' is not one of format, scale"),
    (["--switch", "0.5:fp4+keep_first=1"], "'keep_first' is not one of format, scale"),
    (["--switch", "0.5:fp4+scale=mes"], "scale 'mes' is not one of"),
    (["--switch", "0.5:bf16+scale=mse"], "bf16 has no quantised product whose scale"),
    (["--switch", "0.1:bf16"], "comes after step 0 of 4, and each phase needs a step"),
    (["--switch", "0.9:bf16"], "comes after step 4 of 4, and each phase needs a step"),
    (["--switch", "0.5:bf16", "--post_step", "deosc:1:2"],
     "the first window of deosc is from step 1 to step 3, and this recipe trains steps 1 to 2 of"),
    (["--switch", "0.5:fp4+post_step=deosc:2:1"],
     "the first window of deosc is from step 2 to step 3, and this recipe trains steps 3 to 4 of"),
    (["--switch", "0.5:fp4+post_step=deosc:3:2"], "this recipe trains steps 3 to 4 of 4"),
    (["--switch", "0.5:bf16", "--post_step", "cage:10:0.5"],
     "cage begins after 0.5 of the whole run, and this recipe trains steps 1 to 2 of 4"),
    (["--switch", "0.5:bf16,0.5"], "switch '0.5' is not SHARE:ROW"),
    (["--switch", ""], "switch '' is not SHARE:ROW"),
])
def test_a_switch_that_cannot_be_is_refused_before_anything_is_written(
        run, tmp_path, flags, sentence):
    code, last_line, _ = run("--steps", 4, "--name", "r", *flags)
    assert code == 2 and sentence in last_line, last_line
    assert not (tmp_path / "r").exists()


def test_the_forms_in_which_sharded_weights_travel_have_to_be_the_same():
    for first, second, may in (("fp4", "fp4-sr", True), ("fp4", "fp4-fwd", True),
                               ("nvfp4", "quartet2", True), ("bf16", "fp4", False),
                               ("fp8", "fp4", False), ("fp4", "nvfp4", False)):
        cfg = settings("--precision", first, "--steps", 4, "--switch", f"0.5:{second}")
        schedule.phases_of(cfg, 1)
        sharded = dataclasses.replace(cfg, shard=True)
        if may:
            schedule.phases_of(sharded, 1)
        else:
            with pytest.raises(UserError, match="with --shard weights travel as"):
                schedule.phases_of(sharded, 1)


# ---- a list, and names

def test_a_list_of_switches_is_an_ablation_and_none_is_a_run_without_one():
    typed = quartet.parse(["--size=tiny", "--device=cpu", "--seeds=2", "--precision=bf16,fp4",
                           "--switch=none, 0.5:fp4-bwd,0.8:fp4+scale=mse"])
    configs = list(quartet.expand_runs(typed))
    switches = [None, "0.5:fp4-bwd", "0.8:fp4+scale=mse"]
    assert [(cfg.seed, cfg.precision, cfg.switch) for cfg in configs] == [
        (seed, row, switch) for seed in (0, 1) for row in ("bf16", "fp4") for switch in switches]
    assert [cfg.name for cfg in configs[:3]] == [
        "tiny-bf16", "tiny-bf16-switch-0.5:fp4-bwd", "tiny-bf16-switch-0.8:fp4+scale=mse"]
    plain, = quartet.expand_runs(quartet.parse(["--size=tiny", "--device=cpu"]))
    none, = quartet.expand_runs(quartet.parse(["--size=tiny", "--device=cpu", "--switch=none"]))
    assert plain == none
    unrotated = quartet.parse(["--size=tiny", "--device=cpu", "--rotation=none,32"])
    assert [cfg.rotation for cfg in quartet.expand_runs(unrotated)] == ["none", "32"]
    named = quartet.parse(["--size=tiny", "--device=cpu", "--name=x", "--switch=none,0.5:bf16"])
    assert [cfg.name for cfg in quartet.expand_runs(named)] == [
        "x-fp4", "x-fp4-switch-0.5:bf16"]


def test_an_axis_that_leaves_the_row_as_it_is_makes_no_other_run():
    args = ["--size=tiny", "--device=cpu", "--post_step=none,cage", "--mean_split=off,on",
            "--multiplier=1", "--down_input=none"]
    runs = [(cfg.name, cfg.post_step, cfg.mean_split)
            for cfg in quartet.expand_runs(quartet.parse(args))]
    assert runs == [("tiny-fp4", None, None), ("tiny-fp4-cage", "cage", None),
                    ("tiny-fp4-mean_split-on", None, "on"),
                    ("tiny-fp4-mean_split-on-cage", "cage", "on")]


def test_the_label_of_a_run_says_its_switch():
    cfg = settings("--scale", "mse", "--keep_first", 1, "--seed", 2, "--switch", "0.5:bf16")
    assert label(vars(cfg)) == "fp4-mse-switch-0.5:bf16-keep_first-1-seed2"
    old = {name: value for name, value in vars(settings()).items() if name != "switch"}
    assert label(old) == "fp4"


def test_an_ablation_of_switches_is_a_table_whose_rows_are_not_pooled_with_fp4s(run, tmp_path):
    args = ["--precision", "fp4", "--switch", "none,0.5:bf16", "--seeds", 2, "--steps", 4,
            "--eval_every", 2, *BRIEF]
    code, _, printed = run(*args)
    assert code == 0
    runs = [read_log(path / "log.csv") for path in sorted(tmp_path.glob("tiny-fp4*"))
            if path.is_dir()]
    assert sorted(label(run.config | dict(seed=0)) for run in runs) == [
        "fp4", "fp4", "fp4-switch-0.5:bf16", "fp4-switch-0.5:bf16"]
    assert "| fp4-switch-0.5:bf16 |" in printed
    assert [report.is_variant(run) for run in runs] == [not run.config["switch"] for run in runs]
    assert run(*args)[2].count("is finished") == 4


def test_an_old_log_has_no_switch_and_a_switch_of_another_type_is_no_log(run, tmp_path):
    assert run("--steps", 2, "--name", "r", *BRIEF)[0] == 0
    text = (tmp_path / "r" / "log.csv").read_text()
    assert '"switch": null, ' in text or ', "switch": null' in text
    old = text.replace('"switch": null, ', "").replace(', "switch": null', "")
    assert '"switch"' not in old and len(parse_log(old).history) == 2
    (tmp_path / "r" / "log.csv").write_text(old)
    assert "is finished" in run("--name", "r", "--resume")[2]
    with pytest.raises(ValueError, match="switch is 5"):
        parse_log(text.replace('"switch": null', '"switch": 5'))


# ---- the model gets another recipe

CONFIG = ModelConfig(n_layer=3, n_embd=64, n_head=2, vocab_size=64, block_size=16)
ROWS = [fp4.recipe("bf16"), fp4.recipe("fp4"), fp4.recipe("fp8"),
        fp4.recipe("fp4", down_input="mxfp8")]


def loss_and_gradient(model):
    torch.manual_seed(1)
    x, y = torch.randint(64, (2, 3, 16)).unbind()
    loss = model(x, y)
    return [loss, *torch.autograd.grad(loss, [*model.parameters()])]


@pytest.mark.parametrize("first", ROWS, ids=range(4))
@pytest.mark.parametrize("second", ROWS, ids=range(4))
def test_after_a_switch_a_model_computes_what_one_of_the_second_recipe_does(first, second):
    torch.manual_seed(0)
    model = Llama(CONFIG, first, torch.float32, 1, 0)
    fp4.quantize_weights(model)
    loss_and_gradient(model)
    fp4.set_recipe(model.blocks[1:], second)
    torch.manual_seed(0)
    other = Llama(CONFIG, second, torch.float32, 1, 0)
    fp4.quantize_weights(model)
    fp4.check_weights(model)
    for got, expected in zip(loss_and_gradient(model), loss_and_gradient(other), strict=True):
        assert torch.equal(got, expected)
    for block, is_kept in zip(model.blocks, (True, False, False)):
        expected = fp4.recipe("bf16") if is_kept else second
        assert block.attention.qkv.recipe == expected
        assert block.mlp.proj.recipe == expected.down


def test_the_weights_stay_the_same_tensors_and_what_a_post_step_remembers_is_new():
    layer = fp4.Linear(64, 32, fp4.recipe("fp4", post_step="deosc:1:3:4"))
    model = torch.nn.Sequential(layer)
    weight = layer.weight
    fp4.post_step_of(model)(.01, 1, 9)
    assert layer.deosc_last.any()
    fp4.set_recipe(model, layer.recipe)
    assert layer.deosc_last.any()       # It has this recipe already.
    fp4.set_recipe(model, fp4.recipe("fp4", post_step="deosc:1:4:4"))
    assert not layer.deosc_last.any() and not fp4.post_step_of(model).layers == []
    fp4.set_recipe(model, fp4.recipe("bf16"))
    assert layer.weight is weight and list(model.state_dict()) == ["0.weight"]
    assert layer.backend is None and layer.stored is None
    assert fp4.post_step_of(model).layers == []
    fp4.set_recipe(model, fp4.recipe("fp4", post_step="deosc:1:3:4"))
    assert set(layer.state_dict()) == {"weight", *post_step.STATE}


def test_a_layer_that_does_not_fit_leaves_all_as_they_were():
    model = torch.nn.Sequential(fp4.Linear(64, 32, fp4.recipe("bf16")),
                                fp4.Linear(32, 20, fp4.recipe("bf16")))
    with pytest.raises(ValueError, match="out-features must be a multiple of 32, got 20"):
        fp4.set_recipe(model, fp4.recipe("fp4"))
    assert [layer.recipe for layer in model] == [fp4.recipe("bf16")] * 2


def test_the_kernels_of_both_phases_are_loaded_at_first(monkeypatch):
    args = ("--precision", "bf16", "--switch", "0.5:fp4+scale=mse")
    model = quartet.build_model(settings(*args), 64)
    assert model.backend is fp4.build() and not model.blocks[0].mlp.proj.recipe.is_quantized
    asked = []
    monkeypatch.setattr(fp4, "load_kernels", lambda *given: asked.append(given))
    assert quartet.build_model(settings(*args, gemm="bf16"), 64).backend is None
    assert asked == [([fp4.recipe("bf16"), fp4.recipe("fp4", scale="mse")], "bf16")]


# ---- a run

def recorded(monkeypatch):
    "[the recipes of the blocks] in each forward pass that is trained, as lists are filled"
    seen = []
    forward = Llama.forward

    def watched(model, *args):
        if torch.is_grad_enabled():
            seen.append([block.mlp.proj.recipe for block in model.blocks])
        return forward(model, *args)

    monkeypatch.setattr(Llama, "forward", watched)
    return seen


def test_each_step_has_the_recipe_of_its_phase_and_kept_blocks_have_none(run, monkeypatch):
    seen = recorded(monkeypatch)
    args = ["--precision", "fp4-sr", "--switch", "0.3:fp4+scale=mse", "--steps", 7,
            "--keep_first", 1]
    code, _, printed = run(*args, "--name", "r", *BRIEF)
    assert code == 0 and "7 steps (2 of fp4-sr, 5 of fp4-mse) of 128 tokens" in printed
    rows = recipes_by_hand(.3, 7, fp4.recipe("fp4-sr"), fp4.recipe("fp4", scale="mse"))
    assert seen == [[fp4.recipe("bf16"), row] for row in rows]


def test_a_switched_run_is_two_runs_of_one_recipe_each(run, tmp_path, monkeypatch):
    """Its first steps are those of a run without a switch; its last ones those of a run that was
    told to go on with another precision."""
    args = ["--steps", 6, "--lr", "1e-2", *BRIEF]
    assert run(*args, "--precision", "bf16", "--switch", "0.5:fp4-sr", "--name", "s")[0] == 0
    with monkeypatch.context() as stopping:
        stopping.setattr(quartet.run, "show_step", stopping_after(2))
        run(*args, "--precision", "bf16", "--name", "r")
    assert run("--precision", "fp4-sr", "--name", "r", "--resume", "--allow_changes")[0] == 0
    assert log(tmp_path / "s") == log(tmp_path / "r")
    for part in ("model", "optimizer"):
        assert equal(state(tmp_path / "s")[part], state(tmp_path / "r")[part]), part


CASES = {
    "bf16-fp4": ["--precision", "bf16", "--switch", "0.5:fp4-sr"],
    "fp4-bf16": ["--precision", "fp4-sr", "--switch", "0.5:bf16"],
    "deosc-before": ["--post_step", "deosc:1:2:0.5", "--switch", "0.5:fp4-fwd"],
    "deosc-after": ["--precision", "bf16", "--switch", "0.5:fp4+post_step=deosc:5:2:0.5"],
    "deosc-both": ["--post_step", "deosc:1:2:0.5", "--switch",
                   "0.5:nvfp4+post_step=deosc:5:2:0.5"],
    "cage-after": ["--precision", "bf16", "--switch", "0.5:fp4+post_step=cage:50:0.3+scale=mse"],
}
STEPS = 8                               # The switch comes after the fourth.


@pytest.fixture(scope="module")
def whole():
    return {}


@pytest.mark.parametrize("case, stop", [
    ("bf16-fp4", 2), ("bf16-fp4", 4), ("bf16-fp4", 5), ("fp4-bf16", 4), ("fp4-bf16", 6),
    ("deosc-before", 2), ("deosc-before", 4), ("deosc-before", 5), ("deosc-after", 4),
    ("deosc-after", 6), ("deosc-both", 4), ("deosc-both", 6), ("cage-after", 4), ("cage-after", 6)])
def test_a_run_that_is_stopped_anywhere_ends_as_one_that_was_not(
        run, tmp_path, monkeypatch, whole, case, stop):
    "It is stopped after `stop` steps: before the switch, exactly there, and behind it."
    args = [*CASES[case], "--steps", STEPS, "--lr", "1e-2", *BRIEF]
    if case not in whole:
        assert run(*args, "--name", "whole")[0] == 0
        whole[case] = log(tmp_path / "whole"), state(tmp_path / "whole")
    with monkeypatch.context() as stopping:
        stopping.setattr(quartet.run, "show_step", stopping_after(stop - 1))
        assert run(*args, "--name", "r")[0] == 128 + signal.SIGTERM
    assert len(log(tmp_path / "r")) == stop
    assert run("--name", "r", "--sample", "def")[0] == 0
    assert run("--name", "r", "--resume")[0] == 0
    rows, ended = whole[case]
    assert log(tmp_path / "r") == rows
    for part in ("model", "optimizer"):
        assert equal(state(tmp_path / "r")[part], ended[part]), part


def test_a_sample_has_the_recipe_of_the_phase_in_which_the_checkpoint_was_written(
        run, tmp_path, monkeypatch):
    args = ["--precision", "fp4", "--switch", "0.5:luq-fp4", "--steps", 4, "--eval_every", 1,
            "--keep", 9]
    assert run(*args, "--name", "r", *BRIEF)[0] == 0
    for done, row in ((1, "fp4"), (2, "fp4"), (3, "luq-fp4")):
        (tmp_path / "r" / f"ckpt-{done}.pt").rename(tmp_path / "r" / "ckpt.pt")
        loaded = checkpoint.load(str(tmp_path / "r"))
        typed = quartet.parse(["--device", "cpu"])
        cfg = schedule.settings_at(quartet.settings_of(loaded, typed), PRESETS, done)
        assert (cfg.precision, cfg.switch) == (row, None)
        built = []
        with monkeypatch.context() as watching:
            set_recipe = fp4.Linear.set_recipe      # Every layer begins with it.

            def noted(layer, recipe, backend=None):
                built.append(recipe)
                set_recipe(layer, recipe, backend)

            watching.setattr(fp4.Linear, "set_recipe", noted)
            assert run("--name", "r", "--sample", "def", *BRIEF)[0] == 0
        assert set(built) == {fp4.recipe(row)}


def test_a_run_may_become_longer_as_long_as_no_trained_step_would_have_had_another_recipe(
        run, tmp_path, monkeypatch):
    args = ["--precision", "bf16", "--switch", "0.5:fp4", "--steps", 6, *BRIEF]
    with monkeypatch.context() as stopping:
        stopping.setattr(quartet.run, "show_step", stopping_after(1))
        run(*args, "--name", "r")
    seen = recorded(monkeypatch)
    assert run("--name", "r", "--resume", "--steps", 10)[0] == 0
    rows = recipes_by_hand(.5, 10, fp4.recipe("bf16"), fp4.recipe("fp4"))
    assert seen == [[row, row] for row in rows[2:]]


def test_a_length_that_moves_the_switch_across_trained_steps_is_refused(
        run, tmp_path, monkeypatch):
    args = ["--precision", "bf16", "--switch", "0.5:fp4", *BRIEF]
    with monkeypatch.context() as stopping:
        stopping.setattr(quartet.run, "show_step", stopping_after(4))
        run(*args, "--steps", 8, "--name", "r")
    before = (tmp_path / "r" / "log.csv").read_text()
    code, sentence, _ = run("--name", "r", "--resume", "--steps", 12)
    assert code == 2
    assert ("5 steps are trained, with --switch after step 4; in a run of 12 steps it would have "
            "come after step 6") in sentence
    assert (tmp_path / "r" / "log.csv").read_text() == before


def test_another_switch_is_another_run(run, tmp_path):
    args = ["--precision", "bf16", "--steps", 4, *BRIEF]
    assert run(*args, "--switch", "0.5:fp4", "--name", "r")[0] == 0
    for switch in ("0.5:fp4-sr", "0.6:fp4"):
        code, sentence, _ = run(*args, "--switch", switch, "--name", "r", "--resume")
        assert code == 2 and f"is another run (switch 0.5:fp4 -> {switch})" in sentence
    assert "is finished" in run("--name", "r", "--resume")[2]


def losses(folder):
    return [float(row[1]) for row in log(folder)]


@pytest.mark.slow
def test_a_compiled_run_switches_as_another_does(run, tmp_path):
    args = ["--precision", "bf16", "--switch", "0.5:fp4", "--steps", 6, *BRIEF]
    assert run(*args, "--name", "eager")[0] == 0
    assert run(*args, "--compile", "--name", "compiled")[0] == 0
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), rel=1e-4)
    assert run(*args[:2], *args[4:], "--name", "never")[0] == 0
    assert losses(tmp_path / "never")[:3] == losses(tmp_path / "eager")[:3]
    assert losses(tmp_path / "never")[3] != pytest.approx(losses(tmp_path / "eager")[3], rel=1e-4)


@ON_GPU
@pytest.mark.parametrize("case", CASES)
def test_a_replayed_run_switches_as_another_does_and_goes_on_from_a_checkpoint(
        run, tmp_path, monkeypatch, case):
    "Attention adds gradients in a changing order; so losses are near, not equal."
    args = [*SMALL, *CASES[case], "--device", "cuda", "--steps", STEPS, *BRIEF]
    for name in ("--replay", "--no_replay"):
        assert run(*args, name, "--name", name[2:])[0] == 0
    for stop in (2, 4, 6):
        with monkeypatch.context() as stopping:
            stopping.setattr(quartet.run, "show_step", stopping_after(stop - 1))
            assert run(*args, "--replay", "--name", stop)[0] == 128 + signal.SIGTERM
        assert run("--name", stop, "--resume")[0] == 0
    expected = losses(tmp_path / "no_replay")
    for name in ("replay", "2", "4", "6"):
        assert losses(tmp_path / name) == pytest.approx(expected, abs=2e-3), name
