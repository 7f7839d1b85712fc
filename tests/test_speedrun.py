"""Facts about `make speedrun`: what may run, when its clock stops, and what is written."""
import pytest

import fp4
import quartet
from data.files import UserError
from fp4.recipes import RECIPES
from test_train import corpus, two_blocks           # fixtures
from tools import cli, report, speedrun
from tools.run import Run, Step, log_path, read_log


@pytest.fixture
def toy(corpus, two_blocks, tmp_path, monkeypatch):
    "a Task for a CPU, which a run of a few steps can do"
    monkeypatch.setattr(report, "draw_curves", lambda path, runs: path)
    flags = (f"--size tiny --data {corpus} --batch 4 --seq 32 --eval_every 2 --no_compile "
             f"--sample_tokens 0 --out {tmp_path}/out")
    return speedrun.Task(flags, 4.0, "cpu")


@pytest.fixture
def readme(tmp_path, monkeypatch):
    "a README whose table of records is empty, in a folder for it and the logs"
    path = tmp_path / "README.md"
    path.write_text("Before.\n<!-- speedrun -->\nNo run has been made yet.\n<!-- /speedrun -->\n")
    monkeypatch.setattr(speedrun, "README", str(path))
    monkeypatch.setattr(speedrun, "LOGS", str(tmp_path / "speedruns"))
    monkeypatch.setattr(speedrun, "git_commit", lambda: "1a2b3c4")
    monkeypatch.setattr("tools.run.git_commit", lambda: "1a2b3c4")
    return path


def history(ms, bpb):
    "Steps with these milliseconds; bpb is {step: bits per byte}"
    return [Step(number, 3., 2. if number in bpb else None, 1e-3, 1., time, bpb=bpb.get(number))
            for number, time in enumerate(ms, 1)]


def run_of(rows, switch=None, resumed=(), **changes):
    config = vars(quartet.resolve(quartet.Settings(
        size="tiny", steps=len(rows), switch=switch, precision="fp4", device="cpu", name="r")))
    return Run({**config, **changes}, "GPU", rows, "2026-01-02", "1 GiB", dict(fingerprint="ab"),
               [dict(step=step, changes={}) for step in resumed], "", "1a2b3c4", "")


# ---- the clock

def test_the_clock_stops_at_the_first_evaluation_at_or_below_the_target():
    rows = history([10] * 8, {2: 1.5, 4: 1.25, 6: 1.0, 8: 1.5})
    run = run_of(rows)
    for target, n_steps in ((1.25, 4), (1.2, 6), (2., 2), (1.0, 6), (.99, 0)):
        assert speedrun.steps_to(run, target) == rows[:n_steps], target
    assert not speedrun.reached(Step(1, 3., 2., 1e-3, 1.), 9)          # its bits are not known


def test_steps_that_compile_count_as_the_median_of_the_others():
    rows = history([5000, 300, 10, 12, 11, 13, 900, 700, 14], {9: 1.})
    assert speedrun.seconds_of(run_of(rows), rows) == pytest.approx(
        (2 * 13 + 10 + 12 + 11 + 13 + 900 + 700 + 14) / 1000)
    switched = run_of(rows, switch="0.67:fp4-sr")           # after step 6 of 9
    assert speedrun.seconds_of(switched, rows) == pytest.approx(
        (4 * 12 + 10 + 12 + 11 + 13 + 14) / 1000)
    resumed = run_of(rows, resumed=[6])
    assert speedrun.seconds_of(resumed, rows) == speedrun.seconds_of(switched, rows)
    assert speedrun.seconds_of(switched, rows[:6]) == pytest.approx(
        (2 * 11.5 + 10 + 12 + 11 + 13) / 1000)
    assert speedrun.seconds_of(run_of(rows), rows[:1]) == 5


# ---- what may run

def test_every_product_has_to_be_in_4_bits():
    may = {"fp4", "fp4-sr", "fp4-original", "fp4-pma", "nvfp4", "four-over-six", "tetrajet2",
           "quartet2", "luq-int4", "luq-fp4", "jetfire-fp4", "halo-fp4", "lss-int4"}
    wide = {name: speedrun.products_not_in_4_bits(RECIPES[name]) for name in RECIPES}
    assert may <= {name for name, products in wide.items() if not products}
    assert wide["bf16"] == wide["fp8"] == wide["mxfp8"] == ["forward", "dgrad", "wgrad"]
    assert wide["fp4-fwd"] == ["dgrad", "wgrad"] and wide["fp4-bwd"] == ["forward"]
    mixed = fp4.recipe("fp4", format="mxfp4:mxfp8:mxfp4", scale="floor:absmax:absmax34")
    assert speedrun.products_not_in_4_bits(mixed) == ["dgrad"]
    for axes in (dict(down_input="mxfp8"), dict(format="mxfp8/mxfp4:mxfp4:mxfp4"),
                 dict(format="mxfp4/mxfp8:mxfp4:mxfp4")):
        row = fp4.recipe("fp4", **axes)
        assert speedrun.products_not_in_4_bits(row) == ["forward"], axes


@pytest.mark.parametrize("flags, sentence", [
    (["--precision", "bf16"], "every linear product in 4 bits, and bf16 has forward and dgrad and"),
    (["--wgrad", "off"], "and fp4-wgrad-off has wgrad in more"),
    (["--switch", "0.9:fp4-fwd"], "fp4-switch-0.9:fp4-fwd has dgrad and wgrad in more"),
    (["--size", "3M"], "the task says what --size is"),
    (["--keep_last", "1", "--data", "stdlib"], "what --data and --keep_last is: leave it out"),
    (["--seed", "1"], "the task says what --seed is"),
    (["--precision", "fp4,fp4-sr"], "a speedrun is one run"),
    (["a.csv", "--steps", "3"], "give one log.csv, and no flags beside it"),
    (["nosuch.csv"], "there is no nosuch.csv"),
])
def test_what_is_not_the_task_is_refused_before_anything_is_trained(
        toy, tmp_path, flags, sentence, monkeypatch):
    def train(flags):
        raise AssertionError("something is trained")    # for minutes, if it were

    monkeypatch.setattr(speedrun.quartet, "main", train)
    with pytest.raises(UserError) as refusal:
        speedrun.main(flags, toy)
    assert sentence in str(refusal.value) and not (tmp_path / "out").exists()


def test_the_task_is_that_of_its_description_and_needs_a_gpu(monkeypatch):
    monkeypatch.setattr("tools.machine.resolve_device", lambda device: "cuda")
    cfg, _ = speedrun.settings_of([], speedrun.TASK)
    assert (cfg.size, cfg.data, cfg.vocab, cfg.seed) == ("30M", "python", 4096, 0)
    assert (cfg.precision, cfg.switch, cfg.keep_first, cfg.keep_last) == ("fp4", None, 0, 0)
    assert cfg.tokens_per_param == 20 and cfg.steps is cfg.tokens is None
    cfg, _ = speedrun.settings_of(["--steps", "9", "--lr", "1", "--batch", "64"], speedrun.TASK)
    assert (cfg.steps, cfg.tokens_per_param, cfg.lr, cfg.batch) == (9, None, 1, 64)
    monkeypatch.setattr("tools.machine.resolve_device", lambda device: "cpu")
    with pytest.raises(UserError, match="is trained on cuda, and here it would be cpu"):
        speedrun.settings_of([], speedrun.TASK)
    monkeypatch.setattr(cli, "is_one_of_many", lambda: True)
    with pytest.raises(UserError, match="leave torchrun out"):
        speedrun.settings_of([], speedrun.TASK)


# ---- a run, and its row

def test_a_run_is_timed_printed_and_its_row_added_in_order(toy, readme, tmp_path, capsys):
    flags = ["--precision", "fp4", "--scale", "nearest", "--steps", "6", "--lr", "1e-2"]
    speedrun.main([*flags, "--name", "r"], toy)
    path = log_path(str(tmp_path / "out" / "r"))
    run = read_log(path)
    at = next(row for row in run.history if row.bpb is not None and row.bpb <= 4)
    seconds = speedrun.seconds_of(run, run.history[:at.step])
    printed = capsys.readouterr().out
    assert f"{seconds:.1f} s to {at.bpb:.4f} bits per byte (target 4.0), in {at.step} " in printed
    assert f"\nrecipe fp4-nearest\nGPU {run.device}\ncommit 1a2b3c4\nlog {path}\n" in printed
    assert "No run has been made yet." in readme.read_text() and "[log]" not in printed

    speedrun.main([path, "--write"], toy)
    name = f"fp4-nearest-1a2b3c4-{seconds:.1f}.csv"
    assert read_log(tmp_path / "speedruns" / name) == run
    [row] = speedrun.records(readme.read_text())
    assert row == [f"{seconds:.1f} s", "fp4-nearest", str(at.step), run.device, "1a2b3c4",
                   run.corpus["fingerprint"], f"[log](speedruns/{name})"]
    text = readme.read_text()
    assert text.startswith("Before.\n") and "No run has been made yet." not in text
    with pytest.raises(UserError, match="this run is in the table"):
        speedrun.main([path, "--write"], toy)

    other = tmp_path / "other.csv"
    fields = [line.split(",") for line in open(path).read().splitlines(keepends=True)]
    for ms in (1e6, 2e7, 1e7):          # not in the order of the table
        for line in fields:
            if line[0].isdigit():
                line[5] = f"{ms:.1f}"
        other.write_text("".join(map(",".join, fields)))
        speedrun.main(["--write", str(other)], toy)
    assert [line[0] for line in speedrun.records(readme.read_text())] == [
        f"{seconds:.1f} s", *(f"{s * at.step:.1f} s" for s in (1e3, 1e4, 2e4))]


def test_without_a_target_or_without_reaching_it_there_is_no_row(toy, readme, tmp_path):
    flags = ["--steps", "2", "--name", "r"]
    with pytest.raises(UserError, match="there is no target yet, so that no time can be told"):
        speedrun.main(flags, toy._replace(target=None))
    path = log_path(str(tmp_path / "out" / "r"))
    with pytest.raises(UserError, match=r"did not reach 0.1 bits per byte, but \d\.\d"):
        speedrun.main([path, "--write"], toy._replace(target=.1))
    assert "No run has been made yet." in readme.read_text()


def test_a_record_needs_a_commit(toy, readme, tmp_path, monkeypatch):
    monkeypatch.setattr(speedrun, "git_commit", lambda: "1a2b3c4-dirty-5d6e7f80")
    with pytest.raises(UserError, match="commit your changes before --write"):
        speedrun.main(["--steps", "2", "--write"], toy)
    assert not (tmp_path / "out").exists()
    for commit in ("unknown", "1a2b3c4-dirty-5d6e7f80"):
        run = run_of(history([10] * 4, {4: 1.}))._replace(commit=commit)
        with pytest.raises(UserError, match="which nobody else has"):
            speedrun.tell(run, "log.csv", toy, True)


def test_the_readme_of_the_tools_has_a_place_for_the_records():
    with open(speedrun.README) as file:
        text = file.read()
    assert text.count("<!-- speedrun -->") == text.count("<!-- /speedrun -->") == 1
    records = speedrun.records(text)
    assert records == sorted(records, key=speedrun.seconds_in)
    assert bool(records) != ("No run has been made yet" in text.partition("<!-- speedrun -->")[2]
                             .partition("<!-- /speedrun -->")[0])
    assert all(len(line) == len(speedrun.HEAD) for line in records)
    assert speedrun.TARGET is not None or not records
