"""Facts about many runs side by side: what is trained, what is kept, and what the table says."""
import ast
import csv
import dataclasses
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import time

import pytest
import torch

import fp4
import quartet
from data.files import Stopped, UserError, atomic_write
from fp4.emulate import matmul
from model import PRESETS, Llama, ModelConfig
from test_train import ROOT, corpus, log, run               # fixtures and a reader
from tools import ablation, checkpoint, cli, report, study
from tools.run import (Step, lock, log_diverged, log_head, log_row, parse_log, read_log, split_logs,
                       state_of_tree)

FEW = ("--steps", 4, "--eval_every", 2, "--sample_tokens", 0)
TINY = dataclasses.replace(PRESETS["tiny"], n_layer=2, n_embd=64, n_head=1)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(quartet.PRESETS, "tiny", TINY)


@pytest.fixture
def undrawn(monkeypatch):
    "pictures are empty files: drawing takes longer than such a short run"
    monkeypatch.setattr(report, "save_svg", lambda figure, path: atomic_write(path, empty))


def empty(file):
    pass


def table(out):
    "the rows of a printed table, by the first cell"
    lines = []
    for line in out.splitlines():
        if line.startswith("| ") and not line.startswith("| ---"):
            lines.append([cell.strip() for cell in line.strip("| ").split("|")])
    return {line[0]: dict(zip(lines[0], line)) for line in lines[1:]}


CORPUS = dict(fingerprint="a" * 16, vocabulary="b" * 16, vocab_size=320)


def written(tmp_path, vals, memory="n/a", corpus=CORPUS, bits=None, **settings):
    """a log as quartet.py writes it, read again; vals: of the evaluations, bits: per byte where a
    loss is 1, or None"""
    settings = dict(size="tiny", steps=2 * len(vals), device="cpu", out=str(tmp_path)) | settings
    cfg = quartet.resolve(quartet.Settings(**settings))
    every_second = [v for val in vals for v in (None, val)]
    history = [Step(i, 5., v, 1e-3, 1., 10., 100. * i, "n/a", bpb=v and bits and v * bits)
               for i, v in enumerate(every_second, 1)]
    head = log_head(vars(cfg), "CPU, torch test", "test", corpus)
    end = f"# finished 2026-01-02, peak memory {memory}\n"
    folder = tmp_path / cfg.name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.csv").write_text(head + "".join(map(log_row, history)) + end)
    return read_log(folder / "log.csv")


def numbered(folder):
    "the names of runs that were set aside"
    return [name for name in os.listdir(folder) if name.endswith(".1")]


# ---- the table

def test_the_table_has_bits_per_byte_where_the_logs_do(tmp_path):
    runs = [written(tmp_path, [9, val], precision=precision, seed=seed, bits=.5)
            for precision, vals in dict(bf16=(4, 6), fp4=(5, 7)).items()
            for seed, val in enumerate(vals)]
    cells = table(report.text(report.table(runs)))
    assert {name: row["bits per byte"] for name, row in cells.items()} == {
        "bf16": "2.5000", "fp4": "3.0000"}
    head, *lines = csv.reader(report.csv_text(report.table(runs).rows).splitlines())
    assert head[-1] == "bpb" and [line[-1] for line in lines] == ["2.5", "3"]

    # One seed is of an older version, one diverged.
    older = written(tmp_path, [9, 7], precision="fp4", seed=2)
    diverged = written(tmp_path, [6, 9], precision="bf16", seed=2, bits=.5)
    cells = table(report.text(report.table([*runs, older, diverged])))
    assert {name: row["bits per byte"] for name, row in cells.items()} == {
        "bf16": "2.5000", "fp4": ""}
    assert "bits per byte" not in report.text(report.table([older]))


def half_of(pairs):
    "half the 95 % interval of the mean of three differences: Student's t is 4.303 then"
    return 4.30265 * statistics.stdev(pairs) / 3 ** .5


def three_seeds(tmp_path, gaps, base=(5.0, 4.0, 4.5), first=6):
    "runs of bf16, and of other rows that are so much above it for each seed"
    runs = [written(tmp_path, [first, v], precision="bf16", seed=s) for s, v in enumerate(base)]
    for name, of in gaps.items():
        for s, (v, g) in enumerate(zip(base, of)):
            precision, _, scale = name.partition(" ")
            axes = dict(scale=scale) if scale else {}
            runs.append(written(tmp_path, [first + g, v + g], precision=precision, seed=s, **axes))
    return runs


def test_a_gap_is_the_mean_over_pairs_with_one_seed_and_stands_beside_half_its_interval(tmp_path):
    gaps = dict(fp4=[.03, .05, .04], quartet2=[.03, -.02, .01])
    found = report.table(three_seeds(tmp_path, gaps))
    rows = {row.run: row for row in found.rows}
    for name, of in gaps.items():       # the seeds differ by far more than the rows
        assert rows[name].gap[:2] == pytest.approx((statistics.mean(of), half_of(of)), rel=1e-5)
    pairs = [a - b for a, b in zip(gaps["quartet2"], gaps["fp4"])]
    to_fp4 = (statistics.mean(pairs), half_of(pairs))
    assert rows["quartet2"].to_fp4[:2] == pytest.approx(to_fp4, rel=1e-5)
    assert rows["bf16"].to_fp4 == rows["fp4"].to_fp4 == rows["bf16"].gap == report.Gap()
    assert math.isclose(rows["bf16"].val, 4.5)

    text = report.text(found)
    cells = table(text)
    assert cells["fp4"]["gap to bf16"] == "+0.0400 ± 0.0248 *"
    assert cells["quartet2"]["gap to bf16"] == f"+0.0067 ± {half_of(gaps['quartet2']):.4f} " \
                                               "(not told apart)"
    assert cells["quartet2"]["gap to fp4"] == "{:+.4f} ± {:.4f} (not told apart)".format(*to_fp4)
    assert cells["bf16"] == {
        "run": "bf16", "seeds": "3", "val loss": "4.5000", "gap to bf16": "", "gap to fp4": "",
        "secondary: to fp4, step 2": "-0.0400 ± 0.0248 *", "tokens/s": "250", "peak memory": "n/a",
    }
    early = "{:+.4f} ± {:.4f}".format(*to_fp4)      # The gaps are the same at step 2.
    assert cells["quartet2"]["secondary: to fp4, step 2"] == early
    in_one_line = " ".join(text.split())
    assert "The end point is the final validation loss." in in_one_line
    assert "secondary: the gap to fp4 after 2 steps." in in_one_line
    assert "- ± is from the row's own seeds (Student's t)." in text
    assert "noise" not in text


@pytest.mark.parametrize("of_fp4, is_shown", [([.10, .11, .12], True), ([.08, .11, .14], False)])
def test_the_share_of_fp4_s_gap_that_a_row_closes_is_shown_where_both_gaps_are_known(
        of_fp4, is_shown, tmp_path):
    gaps = {"fp4": of_fp4, "fp4 nearest": [.08, .085, .09], "fp8": [.01, .02, .0],
            "quartet2": [.10, .12, .11]}
    found = report.table(three_seeds(tmp_path, gaps))
    cells = table(report.text(found))
    assert ("gap closed" in cells["fp4"]) == is_shown
    assert ("Fieller's theorem" in " ".join(report.text(found).split())) == is_shown
    rows = {row[0]: dict(zip(report.csv_columns(), row)) for row in map(report.csv_fields,
                                                                       found.rows)}
    if is_shown:                        # by hand: (0.025 +- 4.303 * 0.005 / 3 ** .5) / 0.11
        assert cells["fp4-nearest"]["gap closed"] == "23 % (11 to 34)"
        assert rows["fp4-nearest"]["closed"] == "0.22727273"
        assert cells["fp4"]["gap closed"] == cells["bf16"]["gap closed"] == ""
        assert cells["quartet2"]["gap closed"] == ""            # not told apart from fp4
    else:
        row = rows["fp4-nearest"]
        assert row["closed"] == row["closed_low"] == row["closed_high"] == ""


def test_the_interval_of_a_share_is_no_narrower_than_that_of_its_gap(tmp_path):
    # Three seeds that agree by chance, beside rows of which the pool knows how seeds scatter.
    gaps = {"fp4": [.10, .101, .099], "fp4 nearest": [.07, .0707, .0693],
            "fp4-sr": [.10, .11, .10], "fp4-original": [.11, .10, .10]}
    found = report.table(three_seeds(tmp_path, gaps))
    row = next(row for row in found.rows if row.run == "fp4-nearest")
    assert row.to_fp4.half > 3 * row.to_fp4.own and row.closed.mean == pytest.approx(.3)
    assert row.closed.low == pytest.approx(.3 - row.to_fp4.half / .1)
    assert row.closed.high == pytest.approx(.3 + row.to_fp4.half / .1)


def test_the_two_ends_of_a_run_are_compared_each_with_its_own_losses(tmp_path):
    runs = [written(tmp_path, [6, 5.5, 5], precision="bf16", seed=s) for s in range(2)]
    runs += [written(tmp_path, [6.5, 5.7, 5.25], precision="fp4", seed=s) for s in range(2)]
    row = report.table(runs).rows[1]
    assert (row.first, row.early.mean, row.gap.mean) == (2, .5, .25)
    # An evaluation at another step says nothing about this one.
    late = written(tmp_path, [5, 4], precision="fp8")
    late = late._replace(history=late.history[:1] + late.history[2:])
    assert report.table([*runs, late]).rows[2].early == report.Gap()
    assert report.table([*runs, late]).rows[2].gap.mean == -1


FAMILY = {"fp4": [.30, .35, .40], "fp4 nearest": [.31, .33, .44], "fp4-sr": [.36, .30, .38],
          "fp4-bwd": [.01, .02, .05], "nvfp4": [.21, .28, .22]}


def test_fp4_and_its_variants_share_a_pooled_error_and_no_other_row_does(tmp_path):
    found = report.table(three_seeds(tmp_path, FAMILY))
    rows = {row.run: row for row in found.rows}
    # What is left without the means of rows and seeds, by hand.
    pooled = [FAMILY["fp4"], FAMILY["fp4 nearest"], FAMILY["fp4-sr"]]
    of_seeds = [statistics.mean(column) for column in zip(*pooled)]
    overall = statistics.mean(of_seeds)
    squares = 0
    for row in pooled:
        for value, of_seed in zip(row, of_seeds):
            squares += (value - statistics.mean(row) - of_seed + overall) ** 2
    error = math.sqrt(2 * squares / 4 / 3)          # four degrees of freedom, three seeds
    assert found.pool.rows == ("fp4", "fp4-nearest", "fp4-sr") and found.pool.df == 4
    assert found.pool.error == pytest.approx(error, rel=1e-6)
    half = 2.77645 * error
    for name in ("fp4-nearest", "fp4-sr"):
        assert rows[name].to_fp4.half == pytest.approx(half, rel=1e-5)
        assert rows[name].early.half == pytest.approx(half, rel=1e-5)
        assert rows[name].gap.half == rows[name].gap.own        # bf16 is not in the pool.
    for name in ("fp4-bwd", "nvfp4"):
        pairs = [a - b for a, b in zip(FAMILY[name], FAMILY["fp4"])]
        assert rows[name].to_fp4.half == pytest.approx(half_of(pairs), rel=1e-5)

    text = " ".join(report.text(found).split())
    assert f"these 3 rows say together: a standard error of {error:.4f}, with 4 degrees" in text
    assert f"told apart if they differ by more than {half:.4f}." in text
    visible = f"{report.smallest_visible(error, 4):.3f}"
    assert f"A gap below {visible} between two of these rows would probably not have" in text
    assert f"one of {visible} is told apart with a probability of 80 %." in text
    assert "uneven as these in" in text


def test_where_a_variant_spreads_more_than_the_others_that_is_said_and_the_wider_interval_stands(
        tmp_path):
    calm = {f"fp4 {scale}": [.30, .301, .3 + i / 1000]
            for i, scale in enumerate(("nearest", "mse", "absmax", "absmax34"))}
    gaps = {"fp4": [.3, .3, .3], **calm, "fp4-sr": [.3, .5, .4]}
    found = report.table(three_seeds(tmp_path, gaps))
    rows = {row.run: row for row in found.rows}
    assert found.pool.widest == "fp4-sr" and not found.pool.is_alike
    assert rows["fp4-sr"].to_fp4.half == pytest.approx(half_of([0, .2, .1]), rel=1e-4)
    assert rows["fp4-nearest"].to_fp4.half == pytest.approx(found.pool.half)
    text = " ".join(report.text(found).split())
    assert "which is in doubt: fp4-sr has 8" in text
    assert "with a probability of 80 % at best" in text


def test_only_variants_that_multiply_in_4_bits_in_the_forward_pass_are_pooled(tmp_path):
    settings = dict(fp4={}, sr=dict(precision="fp4-sr"), nearest=dict(scale="nearest"),
                    kept=dict(keep_first=1), off=dict(forward="off"), bwd=dict(precision="fp4-bwd"),
                    bf16=dict(precision="bf16"), nvfp4=dict(precision="nvfp4"))
    runs = {name: written(tmp_path, [6, 5], **dict(precision="fp4") | changed)
            for name, changed in settings.items()}
    mine = runs["fp4"]._replace(config=runs["fp4"].config | dict(precision="fp4-mine"))
    assert [name for name, run in runs.items() if report.is_variant(run)] == [
        "fp4", "sr", "nearest", "kept"]
    assert not report.is_variant(mine)              # a row that somebody else's script added


def test_the_gaps_of_a_column_are_corrected_for_their_number(tmp_path):
    gaps = dict(fp4=[.50, .55, .6], fp8=[.30, .31, .33], mxfp8=[.3, .34, .31], nvfp4=[.6, .52, .5])
    rows = report.table(three_seeds(tmp_path, gaps)).rows
    for column in ("gap", "to_fp4", "early"):
        found = [getattr(row, column) for row in rows]
        p = sorted(gap.p for gap in found if gap.p is not None)
        smallest = min(gap.holm for gap in found if gap.holm is not None)
        assert len(p) == (3 if column == "to_fp4" else 4)
        assert smallest == pytest.approx(min(1, p[0] * len(p)))


def test_a_run_that_ends_above_its_first_evaluation_or_at_nan_diverged_and_the_other_seeds_count(
        tmp_path):
    runs = [written(tmp_path, [6, 5], precision="bf16", seed=s) for s in range(3)]
    for s, vals in enumerate(([6, 5.5], [6, 6.1], [6, math.nan])):
        runs.append(written(tmp_path, vals, precision="fp4", seed=s))
    runs.append(written(tmp_path, [7, 7.5], precision="fp4-sr"))
    found = report.table(runs)
    _, some, all_ = found.rows
    assert (some.diverged, some.seeds, all_.diverged) == (2, 3, 1)
    assert math.isclose(some.gap.mean, .5) and all_.val is None
    cells = table(report.text(found))
    assert cells["fp4"]["val loss"] == "diverged (2 of 3) 5.5000"
    assert cells["fp4-sr"]["val loss"] == "diverged (1 of 1)"


def test_one_seed_gives_a_gap_without_an_interval_and_says_that_it_tells_nothing_from_chance(
        tmp_path):
    runs = [written(tmp_path, [6, 5], precision="bf16"),
            written(tmp_path, [6.5, 5.25], precision="fp4")]
    text = report.text(report.table(runs))
    assert table(text)["fp4"] == {
        "run": "fp4", "val loss": "5.2500", "gap to bf16": "+0.2500",
        "secondary: to bf16, step 2": "+0.5000", "tokens/s": "250", "peak memory": "n/a"}
    lines = text.splitlines()
    assert lines[5] == ("- One seed: nothing here tells a gap from chance. `--seeds 3` gives each "
                        "gap an interval.")
    assert len(lines) == 7 and lines[6].startswith("- All runs are of one state of the code: ")


def test_the_speed_is_that_of_runs_that_had_the_machine_to_themselves(tmp_path):
    runs = [written(tmp_path, [6, 5], precision="bf16", jobs=8),
            written(tmp_path, [6, 5.25], precision="fp4", jobs=8)]
    found = report.table(runs)
    assert [row.tokens_per_s for row in found.rows] == [None, None]
    assert "tokens/s" not in report.text(found)
    assert "Runs at a time: 8 (2 runs); where several" in " ".join(report.text(found).split())
    runs.append(written(tmp_path, [6, 5, 4], precision="fp4", seed=1, jobs=1))
    text = report.text(report.table(runs))
    cells = table(text)
    assert (cells["bf16"]["tokens/s"], cells["fp4"]["tokens/s"]) == ("", "350")
    assert "Runs at a time: 8 (2 runs), 1 (1)" in " ".join(text.split())


def test_fp4_in_the_first_row_is_compared_with_once(tmp_path):
    runs = [written(tmp_path, [6, 5], precision=precision) for precision in ("fp4", "bf16", "fp8")]
    text = report.text(report.table(runs))
    assert [*table(text)["bf16"]] == [
        "run", "val loss", "gap to fp4", "secondary: to fp4, step 2", "tokens/s", "peak memory"]


def test_fp4_in_the_first_row_has_the_interval_of_the_pool(tmp_path):
    runs = [run for run in three_seeds(tmp_path, FAMILY) if run.config["precision"] != "bf16"]
    found = report.table(runs)
    assert found.rows[1].run == "fp4-nearest" and found.pool
    assert found.rows[1].gap.half == found.pool.half != found.rows[1].gap.own


# ---- where the runs of a table come from

def test_a_table_says_of_how_many_states_of_the_code_and_machines_its_runs_are(tmp_path):
    runs = [written(tmp_path, [6, 5], precision="fp4", seed=seed) for seed in range(4)]
    same = [run._replace(commit="abc1234") for run in runs]
    assert report.provenance(same) == ["All runs are of one state of the code: abc1234."]
    commits = ("abc1234", "def5678-dirty", "abc1234", "abc1234-dirty-0a1b2c3d")
    other = [run._replace(commit=commit) for run, commit in zip(runs, commits)]
    assert report.provenance(other) == [
        "The runs are of 3 states of the code: abc1234 (2 runs), def5678-dirty (1), "
        "abc1234-dirty-0a1b2c3d (1).",
        "What differs from the commit in a dirty one is not recorded."]
    same[0] = same[0]._replace(device="H200", corpus={}, resumed=[{"step": 2, "changes": {}}])
    again = {"step": 3, "changes": {}, "commit": "def5678"}
    same[1] = same[1]._replace(resumed=[again | {"commit": "abc1234"}, again])
    assert report.provenance(same) == [
        "The runs are of 3 states of the code: abc1234 (2 runs), abc1234, then not recorded (1), "
        "abc1234, then def5678 (1).",
        "2 devices: CPU, torch test (3 runs), H200 (1).",
        "Whether all runs had the same corpus is not recorded in 1 of 4 logs."]


def test_a_table_names_the_rows_that_are_emulated_in_some_seeds_only(tmp_path):
    runs = []
    for precision, backends in dict(bf16=(0, 0), fp4=(1, 0), fp8=(1, 1)).items():
        for seed, on_kernels in enumerate(backends):
            run = written(tmp_path, [6, 5], precision=precision, seed=seed)
            assert run.backend == "test"
            runs.append(run._replace(backend="kernels" if on_kernels else "not used"))
    assert report.provenance(runs)[1:] == [
        "Emulated in some seeds, computed by kernels in others: fp4."]
    # The words are those of the trainer.
    model = Llama(ModelConfig(n_layer=1, n_embd=64, n_head=1, vocab_size=64, block_size=32),
                  fp4.RECIPES["nvfp4"], torch.float32)
    assert quartet.backend_description(model) == report.NO_KERNELS


def runs_of_the_study():
    with open(os.path.join(ROOT, "tools", "studies", "recipes.csv")) as file:
        return [parse_log(log) for log in split_logs(file.read())]


def test_an_older_log_knows_its_commit_and_not_its_corpus():
    runs = runs_of_the_study()
    assert len(runs) == 114 and {run.corpus == {} for run in runs} == {True}
    assert len({run.commit for run in runs}) == 6
    assert sum(run.commit == "4e74935-dirty" for run in runs) == 7


@pytest.mark.parametrize("part", CORPUS)
def test_runs_of_two_corpora_do_not_stand_in_one_table(tmp_path, part):
    runs = [
        written(tmp_path, [6, 5], precision="bf16"),
        written(tmp_path, [6, 5], precision="fp4", corpus=CORPUS | {part: "c" * 16}),
        written(tmp_path, [6, 5], precision="fp8", corpus=None),
    ]
    with pytest.raises(UserError) as caught:
        report.report(runs, str(tmp_path / "table"))
    assert str(caught.value) == (
        "these runs are of different corpora and cannot stand in one table: "
        f"{part} {CORPUS[part]} in tiny-bf16, {'c' * 16} in tiny-fp4")
    assert not list(tmp_path.glob("table*"))
    report.check_one_corpus([runs[0], runs[2]])     # An older log does not know its corpus.


def test_a_run_that_diverged_before_its_first_evaluation_is_a_row(tmp_path):
    good = written(tmp_path, [6, 5], precision="bf16")
    log = tmp_path / "tiny-bf16" / "log.csv"
    head = log.read_text().split("1,5.0")[0]
    bad = parse_log(head.replace("bf16", "fp4") + log_diverged("a weight is not finite"))
    assert table(report.text(report.table([good, bad])))["fp4"]["val loss"] == "diverged"


@pytest.fixture
def tree(tmp_path, monkeypatch):
    "a source tree with one commit: the folder, and a function that asks for its state"
    folder = tmp_path / "tree"
    (folder / "tools").mkdir(parents=True)
    (folder / "model.py").write_text("x = 1\n")
    (folder / "tools" / "a.cu").write_text("// kernel\n")
    (folder / "README.md").write_text("text\n")
    (folder / ".gitignore").write_text("out/\n")
    for name in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{name}_NAME", "test")
        monkeypatch.setenv(f"GIT_{name}_EMAIL", "test@example.org")
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "one"]):
        subprocess.run(["git", "-C", str(folder), *command], check=True)
    return folder, lambda: state_of_tree(str(folder))


def test_two_trees_with_other_code_than_their_commit_have_other_names(tree):
    folder, state = tree
    commit = state()
    assert re.fullmatch(r"[0-9a-f]{7,}", commit)
    (folder / "README.md").write_text("another text\n")
    (folder / "out").mkdir()
    (folder / "out" / "mine.py").write_text("ignored\n")
    (folder / "notes.txt").write_text("no code\n")
    assert state() == commit            # The code is the commit's.
    states = {commit}
    for name, content in (("model.py", "x = 2\n"), ("model.py", "x = 3\n"),
                          ("tools/a.cu", "// other\n"), ("tools/mine.py", "y = 1\n"),
                          ("tools/mine.py", "y = 2\n"), ("tools/ours.py", "y = 2\n")):
        (folder / name).write_text(content)
        assert re.fullmatch(rf"{commit}-dirty-[0-9a-f]{{8}}", state())
        states.add(state())
    os.remove(folder / "tools" / "a.cu")
    states.add(state())
    assert len(states) == 8
    os.rename(folder / "tools" / "mine.py", folder / "tools" / "yours.py")
    assert state() not in states
    subprocess.run(["git", "-C", str(folder), "add", "-A"], check=True)
    assert state() not in states        # What is staged is not committed.
    subprocess.run(["git", "-C", str(folder), "reset", "-q", "--hard"], check=True)
    assert state() == commit


def test_without_git_the_state_of_the_code_is_unknown(tree, tmp_path, monkeypatch):
    _, state = tree
    (tmp_path / "no tree").mkdir()
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    assert state_of_tree(str(tmp_path / "no tree")) == "unknown"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert state() == "unknown"


# ---- the study's tables

@pytest.fixture
def readme(tmp_path, monkeypatch):
    "the study writes everything into this folder; its README.md"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study, "README", str(tmp_path / "README.md"))
    monkeypatch.setattr(study, "RESULTS", str(tmp_path / "studies"))
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- recipes -->\nold\n<!-- /recipes -->\nafter")
    return readme


def logs_in(folder):
    return sorted(str(path) for path in folder.glob("*/log.csv"))


def test_the_readmes_table_comes_from_logs_alone_in_the_order_of_the_recipes(
        readme, tmp_path, capsys):
    for p, v in (("quartet2", 5.1), ("bf16", 5), ("fp4", 5.25)):
        for s in range(2):
            written(tmp_path / "study", [6, v + .1 * s], precision=p, seed=s)
    # set aside: not of this study
    os.rename(tmp_path / "study" / "tiny-fp4-seed1", tmp_path / "study" / "tiny-fp4-seed1.1")
    logs = logs_in(tmp_path / "study")
    assert quartet.run_cli(["recipes", *logs], study.main) == 0
    text = readme.read_text()
    assert [*table(text)] == ["bf16", "fp4", "quartet2"]
    assert table(text)["fp4"]["seeds"] == "1"
    assert (tmp_path / "studies" / "recipes.svg").exists()
    assert "\nold\n" not in text and text.startswith("before")
    in_one_line = " ".join(text.split())
    assert "`stdlib`, 4,096 in the vocabulary; epochs not recorded; CPU, torch" in in_one_line
    assert "2026-01-02" in text
    prose = [line for line in text.splitlines() if not line.startswith("|")]
    assert max(map(len, prose)) <= 100
    with open(tmp_path / "out" / "recipes.csv") as file:
        assert [row["run"] for row in csv.DictReader(file)] == ["bf16", "fp4", "quartet2"]

    written(tmp_path / "study", [6, 5], precision="fp4-sr", seq=128)
    capsys.readouterr()
    other = str(tmp_path / "study" / "tiny-fp4-sr" / "log.csv")
    assert quartet.run_cli(["recipes", *logs, other], study.main) == 2
    assert capsys.readouterr().err == "quartet: these runs differ in --seq: 128, 256\n"
    assert readme.read_text() == text


@pytest.mark.usefixtures("undrawn")
def test_what_is_kept_of_the_readmes_runs_gives_the_same_table_and_takes_more_runs(
        readme, tmp_path):
    for p, v in (("bf16", 5), ("fp4", math.nan)):
        written(tmp_path / "study", [6, v], precision=p)
    assert quartet.run_cli(["recipes", *logs_in(tmp_path / "study")], study.main) == 0
    text = readme.read_text()
    kept = (tmp_path / "studies" / "recipes.csv").read_text()
    assert table(text)["fp4"]["val loss"] == "diverged"
    # head, names of the columns, two evaluations, end
    assert len(kept.splitlines()) == 2 * (5 + 1 + 2 + 1)
    assert quartet.run_cli(["recipes", "studies/recipes.csv"], study.main) == 0
    assert readme.read_text() == text

    written(tmp_path / "more", [6, 4], precision="fp4-sr")
    # a table of its own
    written(tmp_path / "more", [6, 5, 3], precision="fp4-sr", name="long-fp4-sr")
    more = ["more/tiny-fp4-sr/log.csv", "more/long-fp4-sr/log.csv"]
    assert quartet.run_cli(["recipes", "studies/recipes.csv", *more], study.main) == 0
    text = readme.read_text()
    rows = [line.split()[1] for line in text.splitlines() if line.startswith(("| bf16", "| fp4"))]
    assert rows == ["bf16", "fp4", "fp4-sr", "fp4-sr"]
    assert (tmp_path / "studies" / "recipes2.svg").exists()
    assert (tmp_path / "studies" / "recipes.csv").read_text().startswith(kept)


@pytest.mark.usefixtures("undrawn")
def test_the_tables_of_the_readme_are_those_of_the_runs_that_are_kept(readme, tmp_path, capsys):
    with open(os.path.join(ROOT, "tools", "README.md")) as file:
        committed = file.read()
    kept = os.path.join(ROOT, "tools", "studies", "recipes.csv")
    readme.write_text(committed)
    assert quartet.run_cli(["recipes", kept], study.main) == 0
    assert readme.read_text() == committed
    with open(kept, "rb") as file:
        assert (tmp_path / "studies" / "recipes.csv").read_bytes() == file.read()


def test_the_pooled_errors_of_the_study():
    short, long = [report.table(runs) for runs in study.by_length(runs_of_the_study())]
    found = [(round(pool.error, 4), pool.df, len(pool.rows))
             for pool in (short.pool, short.early_pool, long.pool)]
    assert found == [(.0231, 34, 18), (.0053, 34, 18), (.0053, 10, 6)]
    # The six rows of 100 tokens a parameter differ no more than their seeds: F(5, 10) = 1.43.
    means = [row.val for row in long.rows if row.run in long.pool.rows]
    ratio = statistics.variance(means) / (long.pool.error ** 2 / 2)
    assert ratio == pytest.approx(1.43, abs=.01)


@pytest.mark.usefixtures("undrawn")
def test_the_gaps_to_another_row_are_printed_and_nothing_is_written(readme, tmp_path, capsys):
    for precision, vals in dict(bf16=[6, 5], fp4=[6, 5.25], fp8=[6, 5.1]).items():
        written(tmp_path / "study", vals, precision=precision)
    written(tmp_path / "study", [6, 5, 4], precision="fp8", name="long-fp8")
    before = readme.read_text()
    logs = logs_in(tmp_path / "study")
    assert quartet.run_cli(["recipes", *logs, "--against", "fp8"], study.main) == 0
    short, long = capsys.readouterr().out.split("\n\n| run")
    assert [*table(short)] == ["fp8", "bf16", "fp4"]
    assert table(short)["fp4"]["gap to fp8"] == "+0.1500"
    assert [*table("| run" + long)] == ["fp8"]
    assert readme.read_text() == before and not (tmp_path / "studies" / "recipes.csv").exists()
    assert quartet.run_cli(["recipes", *logs, "--against", "fp9"], study.main) == 2
    assert "no run is called fp9" in capsys.readouterr().err


def test_the_gap_is_drawn_from_the_longest_runs_and_drawing_again_changes_no_picture(
        readme, tmp_path):
    for seed in range(2):
        written(tmp_path / "study", [6, 5], precision="bf16", seed=seed)
        written(tmp_path / "study", [6, 5.2], precision="fp4", seed=seed)
    assert quartet.run_cli(["recipes", *logs_in(tmp_path / "study")], study.main) == 0
    folder = tmp_path / "studies"
    pictures = {name: (folder / name).read_bytes() for name in ("recipes.svg", "gap.svg")}
    assert quartet.run_cli(["recipes", "studies/recipes.csv"], study.main) == 0
    assert pictures == {name: (folder / name).read_bytes() for name in pictures}
    written(tmp_path / "study", [6, 5, 4], precision="bf16", name="long-bf16")
    written(tmp_path / "study", [6, 5, 4.5], precision="fp4", name="long-fp4")
    assert quartet.run_cli(["recipes", *logs_in(tmp_path / "study")], study.main) == 0
    assert (tmp_path / "studies" / "recipes.svg").read_bytes() == pictures["recipes.svg"]
    assert (tmp_path / "studies" / "gap.svg").read_bytes() != pictures["gap.svg"]


def test_without_matplotlib_the_tables_are_written_all_the_same(readme, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for precision in ("bf16", "fp4"):
        written(tmp_path / "study", [6, 5], precision=precision)
    assert quartet.run_cli(["recipes", *logs_in(tmp_path / "study")], study.main) == 0
    assert [*table(readme.read_text())] == ["bf16", "fp4"]
    assert "![curves]" not in readme.read_text() and not list(tmp_path.glob("*.svg"))


@pytest.mark.usefixtures("undrawn")
def test_a_table_says_how_many_epochs_its_runs_are_where_their_logs_do(readme, tmp_path):
    described = CORPUS | {"train_tokens": 10_000}
    written(tmp_path / "study", [6, 5], precision="bf16", corpus=described)
    assert quartet.run_cli(["recipes", *logs_in(tmp_path / "study")], study.main) == 0
    assert "0.82 epochs" in readme.read_text()          # four steps of 8 x 256 tokens
    written(tmp_path / "study", [6, 5], precision="fp4", corpus=described | {"train_tokens": 9})
    assert quartet.run_cli(["recipes", *logs_in(tmp_path / "study")], study.main) == 0
    assert "epochs not recorded" in " ".join(readme.read_text().split())


@pytest.mark.parametrize("name", study.STUDIES)
def test_the_readme_says_what_each_study_asks(name):
    with open(os.path.join(ROOT, "tools", "README.md")) as file:
        section = file.read().partition(f"<!-- {name} -->")[2].partition(f"<!-- /{name} -->")[0]
    kept = os.path.join(ROOT, "tools", "studies", f"{name}.csv")
    if os.path.exists(kept):
        assert section.strip().startswith(study.filled(study.STUDIES[name].question))
    else:
        assert section.strip() == study.section_text(name, [])


@pytest.mark.usefixtures("undrawn")
def test_what_cannot_stand_in_the_study_is_left_out_and_said(readme, tmp_path, capsys):
    for precision in ("bf16", "fp4", "fp4-sr"):
        written(tmp_path / "study", [6, 5], precision=precision)
    files = logs_in(tmp_path / "study")
    with open(tmp_path / "study" / "tiny-fp4-sr" / "log.csv", "a") as file:
        file.write('# resumed {"step": 2, "changes": {"lr": [0.1, 0.002]}}\n')
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe")
    (tmp_path / "other.csv").write_text("a,b\n")
    files += ["binary.csv", "other.csv", "missing.csv"]
    assert quartet.run_cli(["recipes", *files], study.main) == 0
    out = capsys.readouterr().out
    assert [*table(readme.read_text())] == ["bf16", "fp4"]
    assert "tiny-fp4-sr/log.csv: resumed after step 2 with lr 0.1 -> 0.002" in out
    for name in ("binary", "other", "missing"):
        assert f"left out: {name}.csv: " in out

    # Not even if its length gives it a table of its own.
    written(tmp_path / "study", [6, 5, 4], precision="fp8", corpus=CORPUS | {"vocab_size": 400})
    assert quartet.run_cli(["recipes", *logs_in(tmp_path / "study")], study.main) == 2
    assert "are of different corpora" in capsys.readouterr().err


def test_the_studys_help_needs_no_torch(tmp_path):
    code = ("import runpy, sys\n"
            "sys.argv = ['study', '--help']\n"
            "try:\n    runpy.run_module('tools.study', run_name='__main__')\n"
            "finally:\n    assert 'torch' not in sys.modules\n")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "make ablation" in done.stdout, done.stderr


# ---- what is trained and what is kept

def test_seeds_train_each_row_from_the_same_weights_and_end_with_a_csv_file(
        run, tmp_path, monkeypatch):
    weights = []
    build_model = quartet.build_model

    def build(*args):
        model = build_model(*args)
        weights.append({name: w.detach().clone() for name, w in model.named_parameters()})
        return model

    monkeypatch.setattr(quartet, "build_model", build)
    code, _, out = run("--precision", "bf16,fp4", "--seeds", 2, *FEW)
    assert code == 0
    assert {row["seeds"] for row in table(out).values()} == {"2"}
    assert "±" in table(out)["fp4"]["gap to bf16"]
    for name, fp4_weights, seed1_weights in zip(weights[0], weights[1].values(),
                                                weights[2].values()):
        assert torch.equal(weights[0][name], fp4_weights), name
        is_drawn = weights[0][name].std() > 0       # Gains begin as ones.
        assert torch.equal(weights[0][name], seed1_weights) != is_drawn, name
    assert len(weights) == 4 and sum(w.std() > 0 for w in weights[0].values()) >= 10
    first = {name: float(log(tmp_path / f"tiny-{name}")[0][1])
             for name in ("bf16", "fp4", "bf16-seed1", "fp4-seed1")}
    between_rows = abs(first["bf16"] - first["fp4"])
    between_seeds = abs(first["bf16"] - first["bf16-seed1"])
    assert 4 * between_rows < between_seeds
    with open(tmp_path / "tiny-bf16-fp4.csv") as file:
        rows = list(csv.DictReader(file))
    gaps = []
    for seed in ("", "-seed1"):
        fp4_end = float(log(tmp_path / f"tiny-fp4{seed}")[-1][2])
        bf16_end = float(log(tmp_path / f"tiny-bf16{seed}")[-1][2])
        gaps.append(fp4_end - bf16_end)
    assert rows[1]["run"] == "fp4"
    assert float(rows[1]["gap"]) == pytest.approx(statistics.mean(gaps), abs=1e-5)
    assert float(rows[1]["gap_half"]) == pytest.approx(
        12.7062 * statistics.stdev(gaps) / 2 ** .5, rel=1e-4)
    assert float(rows[0]["early"] or 0) == 0 and rows[1]["early_p"]
    assert (tmp_path / "tiny-bf16-fp4.svg").exists()


@pytest.mark.usefixtures("undrawn")
def test_what_is_finished_is_kept_and_what_has_other_settings_is_set_aside(run, tmp_path):
    def inodes():
        names = ("tiny-bf16", "tiny-fp4")
        return {name: os.stat(tmp_path / name / "log.csv").st_ino for name in names}

    run("--precision", "bf16,fp4", "--name", "tiny", *FEW)
    before = inodes()
    code, _, out = run("--precision", "bf16,fp4,fp4", "--name", "tiny", *FEW, "--seeds", 1)
    assert code == 0 and out.count("is finished") == 2
    assert inodes() == before and [*table(out)] == ["bf16", "fp4"]
    os.remove(tmp_path / "tiny-fp4" / "ckpt.pt")            # the log is enough
    os.remove(tmp_path / "tiny-bf16" / "ckpt.pt")
    again = ("--precision", "bf16,fp4", "--name", "tiny", *FEW)
    assert run(*again)[2].count("is finished") == 2
    code, _, out = run(*again, "--lr", .001)
    assert code == 0 and out.count("existed and is now") == 2
    assert f"{tmp_path}/tiny-fp4 holds another run (lr 0.002 -> 0.001)" in out
    assert os.stat(tmp_path / "tiny-fp4.1" / "log.csv").st_ino == before["tiny-fp4"]


@pytest.mark.usefixtures("undrawn")
def test_a_run_of_another_corpus_is_not_the_same_run(run, tmp_path):
    run("--precision", "bf16,fp4", *FEW)
    path = tmp_path / "tiny-fp4" / "log.csv"
    fingerprint = read_log(path).corpus["fingerprint"]
    path.write_text(path.read_text().replace(fingerprint, "f" * 16))
    code, _, out = run("--precision", "bf16,fp4", *FEW)
    assert code == 0 and "tiny-bf16 is finished" in out and "tiny-fp4 is finished" not in out
    assert f"tiny-fp4 holds another run (fingerprint {'f' * 16} -> {fingerprint})" in out
    assert numbered(tmp_path) == ["tiny-fp4.1"]
    assert read_log(path).corpus["fingerprint"] == fingerprint


@pytest.mark.usefixtures("undrawn")
def test_an_interrupted_run_goes_on_from_its_checkpoint_and_ends_as_if_it_had_not_been(
        run, tmp_path, monkeypatch):
    args = ("--precision", "fp4-sr,fp4", "--steps", 9, "--eval_every", 3, "--sample_tokens", 0)
    assert run(*args, "--out", tmp_path / "whole")[0] == 0
    batch = quartet.tokens.batch
    n_calls = 0

    def stopped(*a):
        nonlocal n_calls
        n_calls += 1
        # the first run, five steps of the second
        if n_calls == 9 + 5 + 1:
            raise KeyboardInterrupt
        return batch(*a)

    monkeypatch.setattr(quartet.tokens, "batch", stopped)
    assert run(*args)[0] == 130
    monkeypatch.undo()
    monkeypatch.setitem(quartet.PRESETS, "tiny", TINY)
    assert len(log(tmp_path / "tiny-fp4-sr")) == 9 and len(log(tmp_path / "tiny-fp4")) == 5
    code, _, out = run(*args)
    assert code == 0 and "tiny-fp4-sr is finished" in out
    assert not (tmp_path / "tiny-fp4.1").exists()
    for name in ("tiny-fp4-sr", "tiny-fp4"):
        assert log(tmp_path / name) == log(tmp_path / "whole" / name)


@pytest.fixture
def broken(monkeypatch):
    "a row whose products are NaN"
    forward, backward = matmul.METHODS[""]

    def nan(x, w, recipe):
        y, saved = forward(x, w, fp4.Recipe())
        return y * math.nan, saved

    monkeypatch.setitem(matmul.METHODS, "broken", (nan, backward))
    monkeypatch.setitem(fp4.RECIPES, "broken", fp4.Recipe(method="broken"))


@pytest.mark.usefixtures("undrawn")
def test_a_row_that_diverges_is_said_and_the_next_one_is_trained(run, tmp_path, broken):
    code, _, out = run("--precision", "bf16,broken,fp4", *FEW)
    assert code == 0 and table(out)["broken"]["val loss"] == "diverged" and "loss nan" in out
    assert float(table(out)["fp4"]["val loss"]) > 0
    before = (tmp_path / "tiny-broken" / "log.csv").read_text()
    code, _, out = run("--precision", "bf16,broken,fp4", *FEW)      # and not again
    assert code == 0 and "tiny-broken diverged" in out
    assert (tmp_path / "tiny-broken" / "log.csv").read_text() == before
    # but on its own that is an error
    assert run("--precision", "broken", *FEW, "--name", "alone")[0] == 3


@pytest.mark.usefixtures("undrawn")
def test_a_run_that_fails_stops_no_other_and_the_table_is_written(run, tmp_path):
    (tmp_path / "tiny-bf16").mkdir()
    (tmp_path / "tiny-bf16" / "thesis.tex").write_text("mine")
    code, err, text = run("--precision", "bf16,fp4", *FEW)
    assert code == 2 and "1 of 2 runs failed" in err and "tiny-bf16 is not a run of" in err
    assert [*table(text)] == ["fp4"] and "tiny-bf16: failed: " in text
    assert (tmp_path / "tiny-bf16-fp4.csv").exists()


@pytest.mark.parametrize("ending", [".csv", ".svg"])
def test_a_file_of_the_user_is_not_replaced_by_a_table_and_that_is_said_before_training(
        run, tmp_path, ending):
    path = tmp_path / f"tiny-bf16-fp4{ending}"
    path.write_text("run,mine\n")
    code, err, _ = run("--precision", "bf16,fp4", *FEW)
    assert code == 2 and f"{path} is not of an earlier table, and would be replaced" in err
    assert os.listdir(tmp_path) == [path.name] and path.read_text() == "run,mine\n"


def test_the_columns_of_the_csv_file_are_explained_in_the_readme(tmp_path):
    runs = [written(tmp_path, [6, 5 + s], precision=p, seed=s, jobs=2)
            for p in ("bf16", "fp4") for s in range(2)]
    rows = report.table(runs).rows
    head, *lines = csv.reader(report.csv_text(rows).splitlines())
    assert {len(line) for line in lines} == {len(head)}
    cells = dict(zip(head, lines[1]))
    assert cells["run"] == "fp4" and cells["to_fp4"] == cells["tokens_per_s"] == ""
    assert (cells["gap"], cells["gap_half"], cells["gap_p"]) == ("0", "0", "1")
    with open(os.path.join(ROOT, "tools", "README.md")) as file:
        readme = file.read()
    for name in (*report.Row._fields, *(f"_{field}" for field in report.Gap._fields[1:])):
        assert f"`{name}`" in readme, name
        assert any(column.endswith(name) for column in head)


@pytest.mark.usefixtures("undrawn")
def test_a_table_of_an_earlier_version_is_replaced(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("run,seeds,diverged,val,gap,error,noise,to_fp4\nbf16,1,0,5,,,False,\n")
    report.report([written(tmp_path, [6, 5], precision="bf16")], str(tmp_path / "table"))
    assert path.read_text().startswith("run,seeds,diverged,val,gap,gap_half,")


@pytest.mark.usefixtures("undrawn")
def test_a_table_replaces_an_earlier_one(tmp_path):
    path = tmp_path / "table"
    runs = [written(tmp_path, [6, 5], precision="bf16")]
    report.report(runs, str(path))
    runs.append(written(tmp_path, [6, 5], precision="fp4"))
    report.report(runs, str(path))
    assert len((tmp_path / "table.csv").read_text().splitlines()) == 3


@pytest.mark.usefixtures("undrawn")
def test_a_checkpoint_can_be_discarded_at_the_end(run, tmp_path):
    assert run("--precision", "bf16,fp4", *FEW, "--discard")[0] == 0
    assert not list(tmp_path.glob("*/ckpt.pt"))
    assert len(list(tmp_path.glob("*/log.csv"))) == 2


def test_all_is_every_row(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)         # The checkout may have runs of its user in out/.
    configs = []
    monkeypatch.setattr(ablation, "compare", lambda these, *_: configs.extend(these))
    assert quartet.run_cli(["--precision", "all", "--seeds", "2", "--steps", "1"]) == 0
    assert [cfg.precision for cfg in configs] == [*fp4.RECIPES] * 2
    n = len(fp4.RECIPES)
    assert [cfg.seed for cfg in configs] == [0] * n + [1] * n
    assert len({cfg.name for cfg in configs}) == len(configs)


# ---- several at a time: what the parent makes of its children

@pytest.fixture
def children(tmp_path, monkeypatch, capfd):
    "children(code, n, jobs) trains n runs in processes of this code; returns what failed, output"
    monkeypatch.setenv("PYTHONPATH", ROOT)

    def children(code, n=1, jobs=2):
        script = tmp_path / "child.py"
        script.write_text(CHILD + code)
        failed = ablation.train_in_processes(settings(tmp_path, n), jobs, str(script))
        return failed, capfd.readouterr().out
    return children


CHILD = """
import os, signal, sys, time
folder = os.path.join(*[word.split("=")[1] for name in ("--out", "--name")
                        for word in sys.argv if word.startswith(name + "=")])
number = int(folder[-1])
def say(text): print(text, flush=True)
"""
# It saves when it is asked to stop, as a run does.
STOPS = """
def stop(*a):
    open(os.path.join(folder, "ckpt.pt"), "w").close()
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
open(os.path.join(folder, "ready"), "w").close()
time.sleep(30)
"""
HANGS = STOPS.replace("stop)", "signal.SIG_IGN)")


def settings(tmp_path, n):
    argv = ["--size", "tiny", "--device", "cpu", "--out", str(tmp_path / "out")]
    return [quartet.resolve(quartet.parse([*argv, "--name", f"r{i}"])) for i in range(n)]


def test_jobs_says_at_once_what_it_started_and_where_the_logs_are(children, tmp_path):
    _, out = children("say('hello')", n=2)
    for i in range(2):
        path = tmp_path / "out" / f"r{i}" / "log.txt"
        assert f"r{i}: started, what it says is in {path}\n" in out
        assert path.read_text() == "hello\n"
    assert out.index("r1: started") < out.index("[1/2]")


def test_a_child_that_fails_is_reported_with_its_last_sentence(children, tmp_path):
    code = ("if number == 0: os.kill(os.getpid(), 9)\n"
            "if number == 1: say('step 1'); sys.exit('quartet: out of memory, take less')\n"
            "if number == 2: say(b'\\xff'); say('\\xff'); raise KeyError('not there')\n"
            "if number == 3: say('step 7'); os.kill(os.getpid(), 9)\n")
    (tmp_path / "out" / "r0").mkdir(parents=True)
    (tmp_path / "out" / "r0" / "log.txt").write_text("of an earlier run\n")
    killed = "killed, as the system does when memory is full; before, it said: "
    failed, out = children(code, n=4)
    said = [killed + "it said nothing", "quartet: out of memory, take less",
            "KeyError: 'not there'", killed + "step 7"]
    assert sorted(failed) == [f"{tmp_path}/out/r{i}/log.txt: {line}" for i, line in enumerate(said)]
    assert "r1: failed: quartet: out of memory, take less (" in out


def test_a_child_that_diverges_has_not_failed(children):
    failed, out = children("say('quartet: r0 has diverged'); sys.exit(3)")
    assert failed == [] and "[1/1] r0: diverged, seen at step 1" in out


def test_a_folder_in_use_is_neither_moved_nor_does_it_stop_the_others(children, tmp_path):
    folder = tmp_path / "out" / "r0"
    with lock(str(folder)):
        (folder / "ckpt.pt").write_text("")
        failed, out = children("say('hello')", n=2)
        assert sorted(os.listdir(folder)) == ["ckpt.pt", "lock"]
    assert len(failed) == 2 and f"{folder} is in use by process {os.getpid()}" in failed[0]
    assert failed[1].endswith("log.txt: hello") and "r0: failed: " in out


@pytest.fixture
def stopped(monkeypatch, tmp_path):
    "stopped(n): a signal comes when n children are ready"
    sleep = time.sleep

    def stopped(n):
        def look(seconds):
            sleep(seconds)
            if len(list(tmp_path.glob("out/*/ready"))) == n:
                monkeypatch.setattr(time, "sleep", sleep)
                os.kill(os.getpid(), signal.SIGTERM)
        monkeypatch.setattr(time, "sleep", look)
    return stopped


def test_when_the_parent_is_stopped_its_children_save_and_it_says_what_is_left(
        children, stopped, tmp_path, capfd):
    stopped(2)
    with pytest.raises(Stopped):
        children(STOPS, n=3)
    assert capfd.readouterr().out.splitlines()[-1] == (
        "0 of 3 runs have ended; the same command resumes 2 from their checkpoints and begins 1")
    assert not (tmp_path / "out" / "r2").exists()


SLOW_TO_STOP = STOPS.replace("def stop(*a):\n", "def stop(*a):\n    time.sleep(.5)\n")


def test_a_signal_that_comes_twice_at_once_is_one_request(children, stopped, monkeypatch, capfd):
    wait = subprocess.Popen.wait

    def signalled(process, timeout=None):
        os.kill(os.getpid(), signal.SIGTERM)
        return wait(process, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", signalled)
    stopped(2)
    with pytest.raises(Stopped):
        children(SLOW_TO_STOP, n=2)
    assert "resumes 2 from their checkpoints and begins 0" in capfd.readouterr().out


@pytest.mark.parametrize("function", ["tell_outcome", "tell_start"])
def test_when_nobody_reads_what_the_parent_prints_its_children_save(
        children, tmp_path, monkeypatch, function):
    def closed(*args):
        while not (tmp_path / "out" / "r0" / "ready").exists():
            time.sleep(.02)
        raise BrokenPipeError

    monkeypatch.setattr(ablation, function, closed)
    with pytest.raises(BrokenPipeError):
        children("if number == 1: sys.exit()\n" + SLOW_TO_STOP, n=2)
    assert (tmp_path / "out" / "r0" / "ckpt.pt").exists()


@pytest.mark.parametrize("again", [False, True], ids=["after a minute", "at a second signal"])
def test_children_that_do_not_stop_are_killed(children, stopped, capfd, monkeypatch, again):
    monkeypatch.setattr(ablation, "STOP_SECONDS", 20 if again else .3)
    wait = subprocess.Popen.wait
    processes = []

    def interrupted(process, timeout=None):
        processes.append(process)
        if again and timeout:
            raise KeyboardInterrupt
        return wait(process, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", interrupted)
    stopped(2)
    start = time.time()
    with pytest.raises(Stopped):
        children(HANGS, n=2)
    assert time.time() - start < 15
    assert {process.returncode for process in processes} == {-9}
    assert "resumes 0 from their checkpoints and begins 2" in capfd.readouterr().out


@pytest.mark.parametrize("visible, n_gpus, device, seen", [
    (None, 4, "cuda", ["0", "1", "2", "3", "0"]),
    ("2,3", 2, "cuda", ["2", "3", "2"]),
    ("GPU-8a, GPU-9b", 2, "cuda", ["GPU-8a", "GPU-9b"]),
    ("3,1,-1,0", 2, "cuda", ["3", "1", "3"]),
    ("5", 1, "cuda", ["5", "5"]),
    ("2,3", 2, "cuda:1", ["2,3", "2,3"]),
    ("2,3", 2, "cpu", ["2,3"]),
    (None, 0, "cpu", [None]),
])
def test_the_children_share_the_gpus_that_are_visible(monkeypatch, visible, n_gpus, device, seen):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n_gpus)
    found = [ablation.child_environment(device, slot, 8) for slot in range(len(seen))]
    assert [env.get("CUDA_VISIBLE_DEVICES") for env in found] == seen


# ---- several at a time: real runs

MINE = """
import dataclasses, math, sys, time, quartet, fp4
from fp4.emulate import matmul
from tools import report
tiny = quartet.PRESETS["tiny"]
quartet.PRESETS["tiny"] = dataclasses.replace(tiny, n_layer=2, n_embd=64, n_head=1)
fp4.RECIPES["mine"] = fp4.RECIPES["fp4"]
fp4.RECIPES["fails"] = fp4.Recipe(method="not there")
forward, backward = matmul.METHODS[""]
def nan(x, w, recipe):
    y, saved = forward(x, w, fp4.Recipe())
    return y * math.nan, saved
matmul.METHODS["nan"] = (nan, backward)
fp4.RECIPES["nan"] = fp4.Recipe(method="nan")
report.draw_curves = lambda path, runs: path
show_step = quartet.run.show_step
def show_slowly(*args):
    time.sleep(.02)                     # so that a run is not over before it is stopped
    show_step(*args)
quartet.run.show_step = show_slowly
sys.exit(quartet.run_cli(sys.argv[1:]))
"""
ENV = {**os.environ, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def command(corpus, tmp_path_factory):
    "command(folder, '--steps', 4): a command line whose runs go to that folder"
    script = tmp_path_factory.mktemp("script") / "mine.py"
    script.write_text(MINE)

    def command(out, *args):
        first = (sys.executable, script, "--data", corpus, "--out", out, "--batch", 4,
                 "--seq", 32, "--sample_tokens", 0, "--jobs", 2, "--steps", 40, "--eval_every", 10,
                 "--size", "tiny", "--device", "cpu")
        return [str(arg) for arg in (*first, *args)]
    return command


def finish(args):
    return subprocess.run(args, capture_output=True, text=True, env=ENV)


@pytest.fixture(scope="module")
def four_jobs(command, tmp_path_factory):
    "the folder of four runs, one fails and one diverges, and what the command said"
    out = tmp_path_factory.mktemp("jobs")
    return out, finish(command(out, "--precision", "bf16,fails,nan,mine"))


def test_jobs_run_the_script_that_was_started_and_one_that_fails_stops_no_other(four_jobs):
    out, done = four_jobs
    assert done.returncode == 2 and "1 of 4 runs failed" in done.stderr, done.stderr
    assert f"{out}/tiny-fails/log.txt: KeyError: 'not there'" in done.stderr
    names = [line.split(": ")[0].split("] ")[1]
             for line in done.stdout.splitlines() if line.startswith("[")]
    assert sorted(names) == ["tiny-bf16", "tiny-fails", "tiny-mine", "tiny-nan"]
    assert [*table(done.stdout)] == ["bf16", "nan", "mine"]
    assert table(done.stdout)["nan"]["val loss"] == "diverged"
    assert "tiny-nan: diverged, seen at step 1" in done.stdout
    assert "Runs at a time: 2 (3 runs)" in done.stdout
    assert "step    40/40" in (out / "tiny-mine" / "log.txt").read_text()
    assert not numbered(out)


@pytest.mark.parametrize("number", [
    signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_a_parent_that_is_stopped_or_killed_takes_its_runs_with_it_and_they_go_on_from_there(
        command, four_jobs, tmp_path, number):
    args = command(tmp_path, "--precision", "bf16,mine", "--eval_every", 1000)
    folders = [tmp_path / f"tiny-{precision}" for precision in ("bf16", "mine")]

    def lines():
        return [(folder / "log.csv").exists() and len(log(folder)) for folder in folders]

    process = subprocess.Popen(args, env=ENV, stdout=subprocess.PIPE, text=True)
    while process.poll() is None and min(lines()) < 2:
        time.sleep(.02)
    process.send_signal(number)
    out, _ = process.communicate()
    while any((folder / "lock").exists() for folder in folders):
        time.sleep(.02)
    assert process.returncode == (-9 if number == signal.SIGKILL else 143)
    if number == signal.SIGTERM:
        assert re.fullmatch(r"\d of 2 runs have ended; the same command resumes \d from their "
                            "checkpoints and begins 0", out.splitlines()[-1])
    # A quick run may be at its end by the time that the other has begun.
    assert min(lines()) < 40
    for folder, n_lines in zip(folders, lines()):
        assert len(checkpoint.load(str(folder))["history"]) == n_lines
    if number == signal.SIGTERM:
        done = finish(args)
        assert done.returncode == 0 and not numbered(tmp_path), done.stderr
        for folder in folders:
            whole = log(four_jobs[0] / folder.name)
            assert [row[:2] for row in log(folder)] == [row[:2] for row in whole]


def test_the_settings_of_a_run_survive_the_way_through_a_command_line():
    argv = ["--precision", "fp4", "--scale", "nearest", "--size", "3M", "--compile", "--discard",
            "--seed", "3", "--jobs", "8", "--lr", "1e-3", "--tokens_per_param", "2.5",
            "--rotation", "32:none:128", "--keep_first", "1", "--device", "cpu"]
    cfg = quartet.resolve(quartet.parse(argv))
    assert quartet.resolve(quartet.parse(cli.to_flags(cfg))) == cfg
    assert cfg.name == "3M-fp4-nearest-rotation-32:none:128-keep_first-1-seed3"
    assert (cfg.batch, cfg.seq, cfg.lr) == (128, 256, 1e-3)


# ---- kept blocks, vocabularies, bad flags

@pytest.mark.usefixtures("undrawn")
def test_the_first_and_last_blocks_that_are_kept_are_not_quantised_and_name_the_run(run, tmp_path):
    config = ModelConfig(n_layer=4, n_embd=64, n_head=1, vocab_size=128, block_size=32)
    model = Llama(config, fp4.RECIPES["fp4"], torch.float32, keep_first=1, keep_last=2)
    quantised = []
    for block in model.blocks:
        layers = [m for m in block.modules() if isinstance(m, fp4.Linear)]
        quantised.append({layer.recipe.is_quantized for layer in layers})
    assert quantised == [{False}, {True}, {False}, {False}]
    # all there are
    run("--precision", "bf16,fp4", "--keep_first", 1, "--keep_last", 1, *FEW)
    code, _, out = run("--precision", "bf16,fp4", "--keep_last", 1, *FEW)
    assert code == 0 and [*table(out)] == ["bf16-keep_last-1", "fp4-keep_last-1"]
    kept = log(tmp_path / "tiny-fp4-keep_first-1-keep_last-1")
    assert kept == log(tmp_path / "tiny-bf16-keep_first-1-keep_last-1")
    assert kept != log(tmp_path / "tiny-fp4-keep_last-1")


@pytest.mark.parametrize("args, words", [
    (["--seeds", "0"], "--seeds 0: must be 1 or more"),
    (["--jobs", "-2"], "--jobs -2: must be 1 or more"),
    (["--keep_first", "-1"], "--keep_first -1: must be 0 or more"),
    (["--keep_first", "2", "--keep_last", "1"],
     "tiny has 2 blocks: keep_first 2 and keep_last 1 are more"),
    (["--vocab", "7"], "a vocabulary of 7 is not possible: give --vocab between 257 and"),
    (["--precision", "bf16,all"], "precision 'all' is not one of"),
])
def test_a_bad_setting_is_one_sentence(args, words, tmp_path, capsys):
    (tmp_path / "text.py").write_text("x = 1\n" * 900)
    argv = ["--steps", "1", "--data", str(tmp_path / "text.py"), "--out", str(tmp_path / "out"),
            "--size", "tiny", "--device", "cpu"]
    assert quartet.run_cli([*argv, *args]) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1 and errors[0].startswith("quartet: ") and words in errors[0]
    assert not (tmp_path / "out").exists()


def test_the_ablation_does_not_import_the_trainer_that_imports_it():
    with open(os.path.join(ROOT, "tools", "ablation.py")) as file:
        tree = ast.parse(file.read())
    imports = [node for node in tree.body if isinstance(node, ast.Import)]
    top = {name.name for node in imports for name in node.names}
    assert "quartet" not in top and "torch" in top


# ---- the study's runs

def test_the_study_asks_for_runs_that_exist_each_once(monkeypatch, tmp_path):
    configs = []
    monkeypatch.setattr(study, "finish", lambda these, *_: (configs.extend(these), None))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match="there is no finished run"):
        study.main(["recipes", "--device", "cpu", "--out", str(tmp_path)])
    order = [(cfg.seed, -cfg.tokens_per_param) for cfg in configs]
    assert order == sorted(order)       # seed by seed, the long ones first
    short = [cfg for cfg in configs if cfg.tokens_per_param == 25]
    long = [cfg for cfg in configs if cfg.tokens_per_param == 100]
    n = len(configs)
    assert n == len(set(configs)) == len({cfg.name for cfg in configs}) == len(short) + len(long)
    assert len(short) == 3 * (len(fp4.RECIPES) + 1 + 4 + 2 + 1 + 3 + 1 + 1)
    assert len(long) == 3 * (3 + 3 + 1)


def test_the_screen_trains_each_of_its_rows_with_three_seeds():
    out, configs = study.study_runs("screen", ["--device", "cpu", "--out", "elsewhere"])
    assert out == "elsewhere" and study.study_runs("screen", ["--device", "cpu"])[0] == "out/screen"
    names = {(cfg.name.removesuffix(f"-seed{cfg.seed}"), cfg.seed) for cfg in configs}
    assert len(configs) == len(names) == 3 * 14
    assert {cfg.tokens_per_param for cfg in configs} == {100}
    rows = {(cfg.precision, cfg.post_step, cfg.keep_last) for cfg in configs}
    assert ("bf16", None, 0) in rows and ("fp4", None, 0) in rows
    assert ("fp4", "cage:10:0.5", 0) in rows and ("fp4", None, 1) in rows


def test_there_is_no_other_study(capsys):
    assert quartet.run_cli(["screens"], study.main) == 2
    assert "study 'screens' is not one of recipes, screen" in capsys.readouterr().err


@pytest.mark.usefixtures("undrawn")
def test_the_study_writes_what_there_is_and_then_says_what_failed(monkeypatch, readme, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(study, "finish", lambda *_: ([], UserError("2 runs failed")))
    with pytest.raises(UserError, match="2 runs failed"):
        study.main(["recipes", "--device", "cpu", "--out", str(tmp_path / "none")])
    written(tmp_path / "some", [6, 5], precision="bf16")
    with pytest.raises(UserError, match="2 runs failed"):
        study.main(["recipes", "--device", "cpu", "--out", str(tmp_path / "some")])
    assert [*table(readme.read_text())] == ["bf16"]


# ---- children share the machine

def test_a_child_is_not_in_the_group_that_ctrl_c_reaches(children, tmp_path):
    children("say(os.getsid(0) == os.getpid())")
    assert (tmp_path / "out" / "r0" / "log.txt").read_text() == "True\n"


def test_a_slot_is_taken_again_when_its_run_has_ended(children, monkeypatch):
    slots = []
    environment = ablation.child_environment

    def noted(device, slot, jobs):
        slots.append(slot)
        return environment(device, slot, jobs)

    monkeypatch.setattr(ablation, "child_environment", noted)
    children("time.sleep(3 if number == 0 else 0)", n=4)
    assert slots == [0, 1, 1, 1]


def test_the_children_share_the_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    found = [ablation.child_environment("cpu", 0, jobs)["OMP_NUM_THREADS"] for jobs in (2, 3, 16)]
    assert found == ["4", "2", "1"]
