"""Facts about many runs side by side: what is trained, what is kept, and what the table says."""
import ast, csv, dataclasses, math, os, signal, statistics, subprocess, sys, time
import pytest, torch
import fp4, quartet
from data import prepare
from fp4 import emulated
from model import Llama
from scaling import ablation, logs, study, table as side
from test_train import ROOT, corpus, log, run                   # fixtures and a reader

FEW = "--steps", 4, "--eval_every", 2, "--sample_tokens", 0


@pytest.fixture(autouse=True)
def small(monkeypatch): monkeypatch.setitem(quartet.SIZES, "tiny", (2, 64, 1, 2e-3))


def table(out):
    "the rows of a printed table, by the first cell"
    lines = [[cell.strip() for cell in line.strip("| ").split("|")] for line in out.splitlines() if line.startswith("| ") and not line.startswith("| ---")]
    return {line[0]: dict(zip(lines[0], line)) for line in lines[1:]}


def written(tmp_path, vals, memory="n/a", **settings):
    "a log as quartet.py writes it, read again; vals: of the evaluations"
    cfg = quartet.complete(quartet.Config(**dict(size="tiny", steps=2 * len(vals), device="cpu", out=str(tmp_path)) | settings))
    history = [(i + 1, 5., v, 1e-3, 1., 10., 100. * (i + 1), "n/a") for i, v in enumerate(v for val in vals for v in (None, val))]
    folder = tmp_path / cfg.name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.csv").write_text(quartet.log_text(cfg, "test", history) + f"# finished 2026-01-02, peak memory {memory}\n")
    return logs.read(folder / "log.csv")


# ---- the table

def test_a_gap_is_the_mean_over_pairs_with_one_seed_and_noise_below_twice_its_standard_error(tmp_path):
    base, gaps = [5.0, 4.0, 4.5], dict(fp4=[.03, .05, .04], quartet2=[.03, -.02, .01])
    runs = [written(tmp_path, [6, v], precision="bf16", seed=s) for s, v in enumerate(base)]
    for name, of in gaps.items(): runs += [written(tmp_path, [6.1 + .1 * s, v + g], precision=name, seed=s) for s, (v, g) in enumerate(zip(base, of))]
    rows = {row.run: row for row in side.table(runs)}
    for name, of in gaps.items():                               # the seeds differ by far more than the rows
        assert math.isclose(rows[name].gap, statistics.mean(of), abs_tol=1e-4)
        assert math.isclose(rows[name].error, statistics.stdev(of) / 3 ** .5, abs_tol=1e-4)
    pairs = [a - b for a, b in zip(gaps["quartet2"], gaps["fp4"])]
    assert math.isclose(rows["quartet2"].to_fp4, statistics.mean(pairs), abs_tol=1e-4) and rows["bf16"].to_fp4 is rows["fp4"].to_fp4 is None
    assert math.isclose(rows["quartet2"].to_fp4_error, statistics.stdev(pairs) / 3 ** .5, abs_tol=1e-4) and rows["quartet2"].to_fp4_noise
    assert rows["bf16"].gap is None and math.isclose(rows["bf16"].val, 4.5)
    assert not rows["fp4"].noise and rows["quartet2"].noise and rows["fp4"].tokens_per_s == 250
    cells = table(side.text([*rows.values()], 1))
    assert cells["fp4"]["gap to bf16"] == "+0.0400 ± 0.0058" and cells["quartet2"]["gap to bf16"].endswith("(noise)")
    assert cells["bf16"] == {"run": "bf16", "seeds": "3", "val loss": "4.5000", "gap to bf16": "", "gap to fp4": "", "after 2 steps": "", "tokens/s": "250", "peak memory": "n/a"}
    assert cells["fp4"]["after 2 steps"] == "+0.2000 ± 0.0577"                              # of the first evaluation
    assert cells["quartet2"]["gap to fp4"] == f"{statistics.mean(pairs):+.4f} ± {statistics.stdev(pairs) / 3 ** .5:.4f} (noise)"


def test_a_run_that_ends_above_its_first_evaluation_or_at_nan_diverged_and_the_other_seeds_count(tmp_path):
    runs = [written(tmp_path, [6, 5], precision="bf16", seed=s) for s in range(3)]
    runs += [written(tmp_path, vals, precision="fp4", seed=s) for s, vals in enumerate(([6, 5.5], [6, 6.1], [6, math.nan]))]
    runs += [written(tmp_path, [7, 7.5], precision="fp4-sr")]
    bf16, some, all_ = side.table(runs)
    assert (some.diverged, some.seeds, all_.diverged) == (2, 3, 1) and math.isclose(some.gap, .5) and all_.val is None
    cells = table(side.text([bf16, some, all_], 1))
    assert cells["fp4"]["val loss"] == "diverged (2 of 3) 5.5000" and cells["fp4-sr"]["val loss"] == "diverged (1 of 1)"


def test_one_seed_gives_a_gap_without_a_spread_and_shared_machines_are_said(tmp_path):
    runs = [written(tmp_path, [6, v], precision=p, jobs=8) for p, v in (("bf16", 5), ("fp4", 5.25))]
    said = side.text(side.table(runs), 8)
    assert table(said)["fp4"]["gap to bf16"] == "+0.2500" and "seeds" not in said and "gap to fp4" not in said and "8 runs that share the machine" in said


def test_the_readmes_table_comes_from_logs_alone_in_the_order_of_the_recipes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, file in dict(README="README.md", PICTURES="", RUNS="runs.csv").items(): monkeypatch.setattr(study, name, str(tmp_path / file))
    (tmp_path / "README.md").write_text("before\n<!-- ablation -->\nold\n<!-- /ablation -->\nafter")
    for p, v in (("quartet2", 5.1), ("bf16", 5), ("fp4", 5.25)):
        for s in range(2): written(tmp_path / "study", [6, v + .1 * s], precision=p, seed=s)
    found = sorted(str(path) for path in (tmp_path / "study").glob("*/log.csv"))
    os.rename(tmp_path / "study" / "tiny-fp4-seed1", tmp_path / "study" / "tiny-fp4-seed1.1")       # set aside: not of this study
    found = sorted(str(path) for path in (tmp_path / "study").glob("*/log.csv"))
    assert quartet.cli(found, study.main) == 0
    text = (tmp_path / "README.md").read_text()
    assert [*table(text)] == ["bf16", "fp4", "quartet2"] and table(text)["fp4"]["seeds"] == "1" and (tmp_path / "ablation.svg").exists()
    assert "old" not in text and text.startswith("before") and "`stdlib`, 4,096 in the vocabulary; CPU, torch" in text and "2026-01-02" in text
    assert [row["run"] for row in csv.DictReader(open(tmp_path / "out" / "ablation.csv"))] == ["bf16", "fp4", "quartet2"]
    written(tmp_path / "study", [6, 5], precision="fp4-sr", seq=128)
    capsys.readouterr()
    assert quartet.cli([*found, str(tmp_path / "study" / "tiny-fp4-sr" / "log.csv")], study.main) == 2
    assert capsys.readouterr().err == "quartet: these runs differ in --seq: 128, 256\n" and (tmp_path / "README.md").read_text() == text


def test_what_is_kept_of_the_readmes_runs_gives_the_same_table_and_takes_more_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, file in dict(README="README.md", PICTURES="", RUNS="runs.csv").items(): monkeypatch.setattr(study, name, str(tmp_path / file))
    (tmp_path / "README.md").write_text("<!-- ablation -->\n<!-- /ablation -->")
    for p, v in (("bf16", 5), ("fp4", math.nan)): written(tmp_path / "study", [6, v], precision=p)
    assert quartet.cli(sorted(str(path) for path in (tmp_path / "study").glob("*/log.csv")), study.main) == 0
    text, kept = (tmp_path / "README.md").read_text(), (tmp_path / "runs.csv").read_text()
    assert table(text)["fp4"]["val loss"] == "diverged"
    assert len(kept.splitlines()) == 2 * (4 + 1 + 2 + 1)        # head, names of the columns, two evaluations, end
    assert quartet.cli(["runs.csv"], study.main) == 0
    assert (tmp_path / "README.md").read_text() == text
    written(tmp_path / "more", [6, 4], precision="fp4-sr")
    written(tmp_path / "more", [6, 5, 3], precision="fp4-sr", name="long-fp4-sr")               # a table of its own
    assert quartet.cli(["runs.csv", "more/tiny-fp4-sr/log.csv", "more/long-fp4-sr/log.csv"], study.main) == 0
    text = (tmp_path / "README.md").read_text()
    assert [line.split()[1] for line in text.splitlines() if line.startswith(("| bf16", "| fp4"))] == ["bf16", "fp4", "fp4-sr", "fp4-sr"]
    assert (tmp_path / "ablation2.svg").exists() and (tmp_path / "runs.csv").read_text().startswith(kept)


# ---- what is trained and what is kept

def test_seeds_train_each_row_from_the_same_weights_and_end_with_a_csv_file(run, tmp_path):
    code, _, out = run("--precision", "bf16,fp4", "--seeds", 2, *FEW)
    assert code == 0 and {row["seeds"] for row in table(out).values()} == {"2"} and "±" in table(out)["fp4"]["gap to bf16"]
    first = {name: float(log(tmp_path / f"tiny-{name}")[0][1]) for name in ("bf16", "fp4", "bf16-seed1", "fp4-seed1")}
    assert abs(first["bf16"] - first["fp4"]) < .02 < abs(first["bf16"] - first["bf16-seed1"]) + .02
    rows = list(csv.DictReader(open(tmp_path / "tiny-bf16-fp4.csv")))
    gaps = [float(log(tmp_path / f"tiny-fp4{s}")[-1][2]) - float(log(tmp_path / f"tiny-bf16{s}")[-1][2]) for s in ("", "-seed1")]
    assert rows[1]["run"] == "fp4" and float(rows[1]["gap"]) == pytest.approx(statistics.mean(gaps), abs=1e-5)
    assert (tmp_path / "tiny-bf16-fp4.svg").exists()


def test_what_is_finished_is_kept_and_what_has_other_settings_is_set_aside(run, tmp_path):
    run("--precision", "bf16,fp4", *FEW)
    before = {name: os.stat(tmp_path / name / "log.csv").st_ino for name in ("tiny-bf16", "tiny-fp4")}
    now = lambda: {name: os.stat(tmp_path / name / "log.csv").st_ino for name in before}
    code, _, out = run("--precision", "bf16,fp4,fp4", *FEW, "--seeds", 1)
    assert code == 0 and out.count("is finished") == 2 and now() == before and [*table(out)] == ["bf16", "fp4"]
    os.remove(tmp_path / "tiny-fp4" / "ckpt.pt"), os.remove(tmp_path / "tiny-bf16" / "ckpt.pt")     # the log is enough
    assert run("--precision", "bf16,fp4", *FEW)[2].count("is finished") == 2
    code, _, out = run("--precision", "bf16,fp4", *FEW, "--lr", .001)
    assert code == 0 and out.count("existed and is now") == 2 and os.stat(tmp_path / "tiny-fp4.1" / "log.csv").st_ino == before["tiny-fp4"]


def test_an_interrupted_run_goes_on_from_its_checkpoint_and_ends_as_if_it_had_not_been(run, tmp_path, monkeypatch):
    args = "--precision", "fp4-sr,fp4", "--steps", 9, "--eval_every", 3, "--sample_tokens", 0
    assert run(*args, "--out", tmp_path / "whole")[0] == 0
    batch, n = quartet.tokens.batch, [0]
    def stopped(*a):
        n[0] += 1
        if n[0] == 9 + 1 + 1 + 5 + 1: raise KeyboardInterrupt   # the first run, two looks at the corpus, five steps of the second
        return batch(*a)
    monkeypatch.setattr(quartet.tokens, "batch", stopped)
    assert run(*args)[0] == 130
    monkeypatch.undo()
    monkeypatch.setitem(quartet.SIZES, "tiny", (2, 64, 1, 2e-3))
    assert len(log(tmp_path / "tiny-fp4-sr")) == 9 and len(log(tmp_path / "tiny-fp4")) == 5
    code, _, out = run(*args)
    assert code == 0 and "tiny-fp4-sr is finished" in out and not (tmp_path / "tiny-fp4.1").exists()
    for name in ("tiny-fp4-sr", "tiny-fp4"): assert log(tmp_path / name) == log(tmp_path / "whole" / name)


@pytest.fixture
def broken(monkeypatch):
    "a row whose products are NaN"
    forward, backward = emulated.METHODS[""]
    nan = lambda x, w, recipe: (forward(x, w, fp4.Recipe())[0] * math.nan, forward(x, w, fp4.Recipe())[1])
    monkeypatch.setitem(emulated.METHODS, "broken", (nan, backward))
    monkeypatch.setitem(fp4.RECIPES, "broken", fp4.Recipe(method="broken"))


def test_a_row_that_diverges_is_said_and_the_next_one_is_trained(run, tmp_path, broken):
    code, _, out = run("--precision", "bf16,broken,fp4", *FEW)
    assert code == 0 and table(out)["broken"]["val loss"] == "diverged" and "loss nan" in out and float(table(out)["fp4"]["val loss"]) > 0
    before = open(tmp_path / "tiny-broken" / "log.csv").read()
    code, _, out = run("--precision", "bf16,broken,fp4", *FEW)  # and not again
    assert code == 0 and "tiny-broken is finished" in out and open(tmp_path / "tiny-broken" / "log.csv").read() == before
    assert run("--precision", "broken", *FEW, "--name", "alone")[0] == 2        # but on its own that is an error


def test_a_checkpoint_can_be_discarded_at_the_end(run, tmp_path):
    assert run("--precision", "bf16,fp4", *FEW, "--discard")[0] == 0
    assert not list(tmp_path.glob("*/ckpt.pt")) and len(list(tmp_path.glob("*/log.csv"))) == 2


def test_all_is_every_row(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(ablation, "compare", lambda configs, *_: asked.extend(configs) or {})
    assert quartet.cli(["--precision", "all", "--seeds", "2", "--steps", "1"]) == 0
    assert [cfg.precision for cfg in asked] == [*fp4.RECIPES] * 2 and [cfg.seed for cfg in asked] == [0] * len(fp4.RECIPES) + [1] * len(fp4.RECIPES)
    assert len({cfg.name for cfg in asked}) == len(asked)


# ---- several at a time

MINE = """
import sys, quartet, fp4
quartet.SIZES["tiny"] = (2, 64, 1, 2e-3)
fp4.RECIPES["mine"] = fp4.RECIPES["fp4"]
fp4.RECIPES["fails"] = fp4.Recipe(method="not there")
sys.exit(quartet.cli(sys.argv[1:]))
"""


@pytest.fixture
def command(corpus, tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    return lambda *args: [str(a) for a in (sys.executable, tmp_path / "mine.py", "--data", corpus, "--out", tmp_path, "--batch", 4, "--seq", 32, "--sample_tokens", 0, *args)]


ENV = {**os.environ, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1"}


def test_jobs_run_the_script_that_was_started_and_one_that_fails_stops_no_other(command, tmp_path):
    args = command("--precision", "bf16,fails,mine", "--jobs", 2, "--steps", 4, "--eval_every", 2)
    done = subprocess.run(args, capture_output=True, text=True, env=ENV)
    assert done.returncode == 2 and "1 of 3 runs failed" in done.stderr and f"{tmp_path}/tiny-fails/log.txt: KeyError: 'not there'" in done.stderr
    said = [line.split(": ")[0].split("] ")[1] for line in done.stdout.splitlines() if line.startswith("[")]
    assert sorted(said) == ["tiny-bf16", "tiny-fails", "tiny-mine"] and [*table(done.stdout)] == ["bf16", "mine"]
    assert "2 runs that share the machine" in done.stdout and "step     4/4" in open(tmp_path / "tiny-mine" / "log.txt").read()
    assert not [f for f in os.listdir(tmp_path) if f.endswith(".1")]


def test_a_killed_parent_takes_its_runs_with_it_and_the_same_command_goes_on(command, tmp_path):
    args = command("--precision", "bf16,mine", "--jobs", 2, "--steps", 40, "--eval_every", 10)
    whole = subprocess.run([*args[:2], *args[2:], "--out", str(tmp_path / "whole")], capture_output=True, text=True, env=ENV)
    assert whole.returncode == 0, whole.stderr
    process, logs = subprocess.Popen(args, env=ENV, stdout=subprocess.DEVNULL), [tmp_path / f"tiny-{p}" / "log.csv" for p in ("bf16", "mine")]
    lines = lambda: [path.exists() and len(path.read_text().splitlines()) for path in logs]
    while process.poll() is None and min(lines()) < 20: time.sleep(.02)         # 5 lines before the first step
    process.send_signal(signal.SIGKILL), process.wait()
    time.sleep(.2)
    stopped = lines()
    time.sleep(1)
    assert lines() == stopped and min(stopped) < 45 and (tmp_path / "tiny-mine" / "ckpt.pt").exists()
    done = subprocess.run(args, capture_output=True, text=True, env=ENV)
    assert done.returncode == 0 and not [f for f in os.listdir(tmp_path) if f.endswith(".1")], done.stderr
    for path in logs: assert log(path.parent) == log(tmp_path / "whole" / path.parent.name)


def test_the_settings_of_a_run_survive_the_way_through_a_command_line():
    given = ["--precision", "fp4", "--scale", "nearest", "--size", "3M", "--compile", "--discard", "--seed", "3", "--jobs", "8", "--lr", "1e-3",
             "--tokens_per_param", "2.5", "--rotation", "32:none:128", "--keep_first", "1", "--device", "cpu"]
    cfg = quartet.complete(quartet.parse(given))
    assert quartet.complete(quartet.parse(ablation.flags(cfg))) == cfg and cfg.name == "3M-fp4-nearest-rotation-32:none:128-keep_first-1-seed3"
    assert (cfg.batch, cfg.seq, cfg.lr) == (128, 256, 1e-3)


# ---- kept blocks, vocabularies, bad flags

def test_the_first_and_last_blocks_that_are_kept_are_not_quantised_and_name_the_run(run, tmp_path):
    model = Llama(4, 64, 1, 128, 32, "fp4", torch.float32, keep_first=1, keep_last=2)
    quantised = [{m.recipe.quantised for m in block.modules() if isinstance(m, fp4.Linear)} for block in model.blocks]
    assert quantised == [{False}, {True}, {False}, {False}]
    run("--precision", "bf16,fp4", "--keep_first", 1, "--keep_last", 1, *FEW)      # all there are
    code, _, out = run("--precision", "bf16,fp4", "--keep_last", 1, *FEW)
    assert code == 0 and [*table(out)] == ["bf16-keep_last-1", "fp4-keep_last-1"]
    kept = log(tmp_path / "tiny-fp4-keep_first-1-keep_last-1")
    assert kept == log(tmp_path / "tiny-bf16-keep_first-1-keep_last-1") != log(tmp_path / "tiny-fp4-keep_last-1")


def test_a_vocabulary_of_another_size_is_another_corpus(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "HERE", str(tmp_path))
    (tmp_path / "text.py").write_text("".join(f"def f{i}(x, y):\n    return x + {i} * y\n\n" for i in range(1500)))
    cfg = quartet.complete(quartet.parse(["--data", str(tmp_path / "text.py"), "--vocab", "300", "--seq", "32"]))
    _, _, vocab, folder = quartet.corpus(cfg)
    plain = quartet.corpus(dataclasses.replace(cfg, vocab=0))
    assert vocab == 300 and folder.endswith("-300") and folder == plain[3] + "-300" and plain[2] > 300
    assert quartet.corpus(dataclasses.replace(cfg, data=folder))[3] == folder       # a folder of token files: the same vocabulary
    with pytest.raises(quartet.tokens.DataError, match="has a vocabulary of 300, not 310"): quartet.corpus(dataclasses.replace(cfg, data=folder, vocab=310))


@pytest.mark.parametrize("args, words", [
    (["--seeds", "0"], "seeds and jobs must be 1 or more, got 0 and 1"),
    (["--jobs", "-2"], "seeds and jobs must be 1 or more, got 1 and -2"),
    (["--keep_first", "-1"], "keep_first must be a number and not negative, got -1"),
    (["--keep_first", "2", "--keep_last", "1"], "tiny has 2 blocks: keep_first 2 and keep_last 1 are more"),
    (["--vocab", "7"], "a vocabulary of 7 is not possible"),
    (["--precision", "bf16,all"], "precision 'all' is not one of"),
])
def test_a_bad_setting_is_one_sentence(args, words, tmp_path, capsys):
    (tmp_path / "text.py").write_text("x = 1\n" * 900)
    assert quartet.cli(["--steps", "1", "--data", str(tmp_path / "text.py"), "--out", str(tmp_path / "out"), *args]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and said[0].startswith("quartet: ") and words in said[0] and not (tmp_path / "out").exists()


def test_the_ablation_does_not_import_the_trainer_that_imports_it():
    tree = ast.parse(open(os.path.join(ROOT, "scaling", "ablation.py")).read())
    top = {name.name for node in tree.body if isinstance(node, ast.Import) for name in node.names}
    assert "quartet" not in top and "torch" in top


def test_the_study_asks_for_runs_that_exist_each_once(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(study, "finish", lambda configs, *_: asked.extend(configs))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ablation.Failed, match="there is no finished run"): study.main(["--device", "cpu", "--out", str(tmp_path)])
    order = [(cfg.seed, -cfg.tokens_per_param) for cfg in asked]
    assert order == sorted(order)                               # seed by seed, the long ones first
    short, long = ([cfg for cfg in asked if cfg.tokens_per_param == n] for n in (25, 100))
    assert len(asked) == len(set(asked)) == len({cfg.name for cfg in asked}) == len(short) + len(long)
    assert len(short) == 3 * (len(fp4.RECIPES) + 1 + 4 + 2 + 1 + 3 + 1 + 1) and len(long) == 3 * (3 + 3 + 1)


def test_the_study_writes_what_there_is_and_then_says_what_failed(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(study, "finish", lambda *_: ablation.Failed("2 runs failed"))
    with pytest.raises(ablation.Failed, match="2 runs failed"): study.main(["--device", "cpu", "--out", str(tmp_path)])
    monkeypatch.chdir(tmp_path)
    for name in ("README", "PICTURES", "RUNS"): monkeypatch.setattr(study, name, str(tmp_path / name))
    (tmp_path / "README").write_text("<!-- ablation -->\n<!-- /ablation -->"), (tmp_path / "PICTURES").mkdir()
    written(tmp_path / "some", [6, 5], precision="bf16")
    with pytest.raises(ablation.Failed, match="2 runs failed"): study.main(["--device", "cpu", "--out", str(tmp_path / "some")])
    assert [*table((tmp_path / "README").read_text())] == ["bf16"]
