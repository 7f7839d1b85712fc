"""The shares of quantised weights that flip, are zero and are clipped, against brute force."""
import dataclasses
import math
import signal

import pytest
import torch

import fp4
import quartet
from data.corpus import open_corpus
from data.files import UserError
from fp4 import weight_stats
from model import Llama, ModelConfig
from test_baselines import hadamard, int4, mx, nvfp4
from test_train import (        # fixtures and readers
    BRIEF, corpus, log, run, state, stopping_after, two_blocks)
from tools import report
from tools.run import COLUMNS, read_log

KINDS = ["attention.qkv", "attention.proj", "mlp.gate_up", "mlp.proj"]
NAMES = [f"{measure}:{kind}" for measure in ("flips", "zeros", "clipped") for kind in KINDS]


# ---- the statement: what is read of a weight w, in float64, as numbers of which equal ones are one
# point of the grid; and which of them are clipped

def quest(rule, rotation=32):
    def read(w):
        values, is_kept = mx(w, rule, rotation)
        n = w.shape[1] if rotation == 0 else values.shape[1]
        return values[:, :n], ~is_kept[:, :n]
    return read


def nvidia(w):
    tensor_scale = w.abs().max() / (448 * 6)
    values = nvfp4(w, square=True)[:, :w.shape[1]] / tensor_scale
    return (values * 2 ** 20).round(), torch.zeros_like(values, dtype=torch.bool)


def integers(w):
    v = hadamard(w, 32)
    scale = v.unflatten(1, (-1, 32)).abs().amax(-1) / 7
    codes = int4(v) / scale.repeat_interleave(32, 1)
    return codes.round(), torch.zeros_like(v, dtype=torch.bool)


STATEMENTS = {
    "fp4": (("fp4", {}), quest("floor")),
    "nearest": (("fp4", dict(scale="nearest")), quest("nearest")),
    "not rotated": (("fp4-fwd", dict(rotation="none")), quest("floor", 0)),
    "rotated by 128": (("fp4", dict(rotation="128")), quest("floor", 128)),
    "nvfp4": (("nvfp4", {}), nvidia),
    "int4": (("fp4", dict(format="int4")), integers),
}
each_row = pytest.mark.parametrize("row, read", STATEMENTS.values(), ids=STATEMENTS)


def shares_by_hand(weights, moved, read):
    "{column: share} of two lists of weights of one kind"
    n = flips = zeros = clips = 0
    for before, after in zip(weights, moved):
        (q_before, _), (q, clipped) = read(before.double()), read(after.double())
        n += q.numel()
        flips += int((q != q_before).sum())
        zeros += int((q == 0).sum())
        clips += int(clipped.sum())
    return dict(flips=flips / n, zeros=zeros / n, clipped=clips / n)


def weights_of(model):
    return {name: w.detach().clone() for name, w in model.named_parameters()}


def move(model, size):
    with torch.no_grad():
        for w in model.parameters():
            # The largest stay, or a scale of all would follow them: that is a test of its own.
            w += size * w.std() * torch.randn_like(w) * (w.abs() < w.abs().max() / 2)


@each_row
def test_the_shares_are_those_of_brute_force_without_the_blocks_that_are_kept(row, read):
    torch.manual_seed(0)
    name, axes = row
    config = ModelConfig(n_layer=4, n_embd=32, n_head=1, vocab_size=64, block_size=32)
    model = Llama(config, fp4.recipe(name, **axes), torch.float32, keep_first=1, keep_last=1)
    stats = fp4.weight_stats_of(model)
    assert stats.columns == NAMES
    before = weights_of(model)
    stats.before_step()
    # A block of INT4 has a scale that is no power of two, and the more it moves the more is a flip.
    move(model, .005 if "format" in axes else .05)
    after = weights_of(model)
    found = stats.after_step()
    assert list(found) == NAMES
    for kind in KINDS:
        of_kind = [f"blocks.{i}.{kind}.weight" for i in (1, 2)]
        expected = shares_by_hand([before[n] for n in of_kind], [after[n] for n in of_kind], read)
        assert .002 < expected["flips"] < .3 and .01 < expected["zeros"] < .3
        assert (expected["clipped"] > 0) == (name != "nvfp4" and "format" not in axes)
        assert {m: found[f"{m}:{kind}"] for m in expected} == expected, kind


def layer_of(w, name, **axes):
    layer = fp4.Linear(w.shape[1], w.shape[0], fp4.recipe(name, **axes))
    with torch.no_grad():
        layer.weight.copy_(w)
    return layer


def measured(layer, w):
    "the shares of a step that makes w of the weight of a layer called mlp.down"
    stats = weight_stats.WeightStats({"mlp.down": layer})
    stats.before_step()
    with torch.no_grad():
        layer.weight.copy_(w)
    return {name.split(":")[0]: share for name, share in stats.after_step().items()}


@pytest.mark.parametrize("name, axes, read", [
    ("fp4", dict(rotation="none"), quest("floor", 0)),
    ("fp4", dict(rotation="128"), quest("floor", 128)),
    ("fp4", dict(rotation="16"), None),
    ("nvfp4", {}, nvidia),
])
def test_padding_does_not_count_unless_a_rotation_makes_values_of_it(name, axes, read):
    torch.manual_seed(1)
    w = torch.randn(32, 48)
    moved = w + .02 * torch.randn(32, 48) * (w.abs() < 2)
    found = measured(layer_of(w, name, **axes), moved)
    if read is None:                    # Its second block of 32 has 16 values and 16 of padding.
        def read(w):
            values, is_kept = mx(torch.nn.functional.pad(w, (0, 16)), "floor", 16)
            return values[:, :48], ~is_kept[:, :48]
    assert found == shares_by_hand([w], [moved], read)


def test_a_block_whose_scale_changes_flips_only_where_a_value_does():
    w = torch.full((32, 32), 2.)
    w[:, 0] = 7                         # scale 1: 7 is 6, and 2 is 2
    moved = w.clone()
    moved[:16, 0] = 8                   # scale 2: 8 is 4 times 2, and 2 is 1 times 2
    found = measured(layer_of(w, "fp4", rotation="none", scale="absmax"), moved)
    assert found == dict(flips=16 / 1024, zeros=0, clipped=0)


def test_a_scale_that_follows_the_largest_weight_flips_nothing():
    torch.manual_seed(2)
    w = torch.randn(64, 64)
    largest = w.abs().argmax()
    moved = w.clone()
    moved.view(-1)[largest] *= 1.0001
    layer = layer_of(w, "nvfp4")
    q_before, _ = weight_stats.quantized(layer)
    found = measured(layer, moved)
    q, _ = weight_stats.quantized(layer)
    assert (q != q_before).float().mean() > .8
    assert found["flips"] == shares_by_hand([w], [moved], nvidia)["flips"] < .001


def test_a_nan_flips_and_is_not_zero():
    w = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    w[3, 5] = math.nan
    for name in ("fp4", "nvfp4"):
        found = measured(layer_of(w, name), w)
        assert found["flips"] in (32 / 2048, 1)         # of its block, or of the tensor's scale
        assert 0 <= found["zeros"] < .3


def test_only_layers_whose_grid_stays_are_measured():
    def columns(name, **axes):
        return fp4.weight_stats_of(torch.nn.Sequential(layer_of(torch.zeros(32, 32), name, **axes)))

    for name, axes in (("bf16", {}), ("fp8", {}), ("luq-fp4", {}), ("fp4-bwd", {}),
                       ("fp4", dict(signs="before:before:before")),
                       ("fp4", dict(scale="absmax34", rounding="stochastic:nearest:nearest"))):
        stats = columns(name, **axes)
        assert stats.columns == [], name
        stats.before_step()
        assert stats.after_step() is None
    for name in ("fp4", "fp4-fwd", "nvfp4", "quartet2", "mxfp8"):
        assert columns(name).columns == ["flips:0", "zeros:0", "clipped:0"], name


def test_a_step_that_was_not_announced_is_not_measured():
    model = torch.nn.Sequential(layer_of(torch.randn(32, 32), "fp4"))
    stats = fp4.weight_stats_of(model)
    assert stats.after_step() is None
    stats.before_step()
    assert stats.after_step()["flips:0"] == 0
    assert stats.after_step() is None
    off = fp4.weight_stats_of(model, None)
    off.before_step()
    assert off.columns == [] and off.after_step() is None


@pytest.mark.parametrize("name, kind", [
    ("blocks.0.attention.qkv", "attention.qkv"), ("blocks.11.mlp.down", "mlp.down"),
    ("model.layers.3.experts.7.up", "up"), ("head", "head"), ("body.head", "body.head"),
    ("0", "0"), ("blocks.3", "blocks.3")])
def test_layers_that_differ_in_their_numbers_are_of_one_kind(name, kind):
    assert weight_stats.kind_of(name) == kind


# ---- a run

@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    monkeypatch.setattr(report, "draw_curves", lambda path, runs: path)


def test_a_run_logs_what_its_step_did_to_the_weights_of_its_checkpoints(run, two_blocks, tmp_path):
    args = ["--precision", "fp4", "--post_step", "cage:50:0", "--steps", 4, "--eval_every", 1,
            "--keep_first", 1, "--keep", 4, *BRIEF]
    assert run(*args, "--weight_stats", "--name", "r")[0] == 0
    found = read_log(tmp_path / "r" / "log.csv")
    saved = [torch.load(tmp_path / "r" / name, weights_only=True)
             for name in ("ckpt-1.pt", "ckpt-2.pt", "ckpt-3.pt", "ckpt.pt")]
    for i, row in enumerate(found.history[1:], 1):
        for kind in KINDS:
            pair = [[at["model"][f"blocks.1.{kind}.weight"]] for at in saved[i - 1:i + 1]]
            expected = shares_by_hand(*pair, quest("floor"))
            assert expected["flips"] > 0
            for measure, share in expected.items():
                assert row.weights[f"{measure}:{kind}"] == pytest.approx(share, rel=1e-3, abs=1e-9)
    history = saved[-1]["history"]
    assert [list(step[-1]) for step in history] == [NAMES] * 4
    assert run(*args, "--name", "without")[0] == 0
    assert log(tmp_path / "without") == log(tmp_path / "r")
    for name, w in state(tmp_path / "without")["model"].items():
        assert torch.equal(w, saved[-1]["model"][name]), name


def table_of(folder):
    "the names of the columns of a log, and its rows, all of them as wide"
    lines = [line.split(",") for line in (folder / "log.csv").read_text().splitlines()
             if not line.startswith("#")]
    assert len({len(line) for line in lines}) == 1
    return lines[0], lines[1:]


def test_the_columns_are_there_if_they_are_asked_for_and_full_where_a_step_was_evaluated(
        run, two_blocks, tmp_path):
    args = ["--steps", 4, "--eval_every", 2, *BRIEF]
    assert run(*args, "--name", "off")[0] == run(*args, "--name", "on", "--weight_stats")[0] == 0
    assert table_of(tmp_path / "off")[0] == list(COLUMNS)
    names, rows = table_of(tmp_path / "on")
    assert names == [*COLUMNS, *NAMES]
    assert [[cell != "" for cell in row[len(COLUMNS):]] for row in rows] == [
        [full] * len(NAMES) for full in (False, True, False, True)]
    assert [row.weights for row in read_log(tmp_path / "off" / "log.csv").history] == [None] * 4
    assert run(*args, "--name", "bf16", "--precision", "bf16", "--weight_stats")[0] == 0
    assert table_of(tmp_path / "bf16")[0] == list(COLUMNS)      # It has no grid.


def test_a_run_that_is_resumed_goes_on_measuring(run, two_blocks, tmp_path, monkeypatch):
    args = ["--steps", 7, "--eval_every", 2, "--weight_stats", *BRIEF]
    assert run(*args, "--name", "whole")[0] == 0
    with monkeypatch.context() as stopping:
        stopping.setattr(quartet.run, "show_step", stopping_after(3))
        assert run(*args, "--name", "r")[0] == 128 + signal.SIGTERM
    assert run("--name", "r", "--resume", "--steps", 7, "--eval_every", 2, *BRIEF)[0] == 0
    whole, resumed = (read_log(tmp_path / name / "log.csv").history for name in ("whole", "r"))
    assert [row.weights for row in resumed] == [row.weights for row in whole]
    assert table_of(tmp_path / "r")[0] == table_of(tmp_path / "whole")[0]


def test_measuring_can_begin_and_end_where_a_run_is_resumed_and_the_table_stays_one(
        run, two_blocks, tmp_path):
    flags = {2: [], 4: ["--weight_stats"], 6: ["--no_weight_stats"], 8: [], 10: ["--weight_stats"]}
    for steps, flag in flags.items():
        resumed = ["--resume"] if steps > 2 else []
        code, sentence, _ = run("--name", "r", "--steps", steps, "--eval_every", 2, *flag, *resumed,
                                *BRIEF)
        assert code == 0, sentence
    found = read_log(tmp_path / "r" / "log.csv")
    assert [row.step for row in found.history if row.weights] == [4, 10]
    assert table_of(tmp_path / "r")[0] == [*COLUMNS, *NAMES]
    assert [entry["changes"].get("weight_stats") for entry in found.resumed] == [
        [None, True], [True, False], None, [False, True]]
    # A log that was lost comes back from the checkpoint with them.
    (tmp_path / "r" / "log.csv").unlink()
    assert run("--name", "r", "--steps", 11, "--resume", "--no_weight_stats", *BRIEF)[0] == 0
    again = read_log(tmp_path / "r" / "log.csv")
    assert [row.weights for row in again.history[:10]] == [row.weights for row in found.history]
    assert table_of(tmp_path / "r")[0] == [*COLUMNS, *NAMES]


def test_a_sharded_model_is_refused_before_anything_is_written(corpus, tmp_path):
    cfg = quartet.resolve(quartet.parse([
        "--data", corpus, "--out", str(tmp_path), "--size", "tiny", "--device", "cpu", "--steps",
        "1", "--weight_stats", "--shard"]))
    opened = open_corpus(corpus)
    with pytest.raises(UserError, match="a sharded model has no weight_stats"):
        quartet.prepare(cfg, opened)
    quartet.prepare(dataclasses.replace(cfg, weight_stats=False), opened)
    quartet.prepare(dataclasses.replace(cfg, shard=False), opened)
