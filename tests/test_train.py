"""Facts about the trainer, from the command line to the files it leaves."""
import ast, dataclasses, os, shutil, subprocess, sys
import numpy as np, pytest, torch
import fp4, quartet
from data import prepare, tokens
from model import Llama

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    "a small text, so that a run takes seconds"
    folder = tmp_path_factory.mktemp("corpus")
    text = "".join(f"def f{i}(x, y):\n    return x + {i} * y\n\n" for i in range(1500))
    (folder / "text.py").write_text(text)
    return prepare.prepare(str(folder / "text.py"), 320, out=str(folder / "corpus"))


@pytest.fixture
def run(corpus, tmp_path, capsys):
    "run('--steps', 3) -> exit code, last line on stderr, what was printed"
    def run(*args, **kw):
        capsys.readouterr()
        code = quartet.cli([str(a) for a in ("--data", corpus, "--out", tmp_path, "--batch", 4, "--seq", 32, *args)])
        said = capsys.readouterr()
        return code, (said.err.strip().splitlines() or [""])[-1], said.out
    return run


def log(folder):
    "the columns of the log that do not measure time"
    return [line.split(",")[:5] for line in open(folder / "log.csv") if line[0] not in "#s"]


def state(folder): return torch.load(folder / "ckpt.pt", weights_only=True)


def equal(a, b):
    if isinstance(a, torch.Tensor): return torch.equal(a, b)
    if isinstance(a, dict): return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(equal, a, b))
    return a == b


# ---- the model

PAPER = {"30M": 30_482_560, "50M": 49_556_736, "100M": 102_777_856, "200M": 203_188_480, "430M": 443_068_288,
         "800M": 822_151_168, "1600M": 1_586_076_160, "3200M": 3_171_068_928, "7B": 6_476_271_616}


@pytest.mark.parametrize("size", PAPER)
def test_each_size_has_the_papers_number_of_parameters(size):
    layers, C, H, _ = quartet.SIZES[size]
    with torch.device("meta"):
        assert Llama(layers, C, H, 32000, 512, "bf16", torch.bfloat16).params() == PAPER[size]


def test_the_model_is_causal_and_its_loss_ignores_targets_of_minus_one():
    torch.manual_seed(0)
    model = Llama(2, 64, 2, 128, 32, "fp4", torch.float32)
    x = torch.randint(128, (2, 32))
    changed = x.clone()
    changed[:, 20] = (x[:, 20] + 1) % 128
    a, b = model(x), model(changed)
    assert torch.equal(a[:, :20], b[:, :20]) and not torch.equal(a[:, 20:], b[:, 20:])
    y = torch.full_like(x, -1)
    y[0, 3] = 7
    assert torch.allclose(model(x, y), -a[0, 3].log_softmax(-1)[7])


def test_rotary_embedding_depends_on_the_distance_only():
    from model import rope, rope_table
    q, k = torch.randn(2, 1, 1, 1, 64, dtype=torch.float64)
    cos, sin = rope_table(50, 64)
    score = lambda i, j: (rope(q, cos[i:i + 1], sin[i:i + 1]) * rope(k, cos[j:j + 1], sin[j:j + 1])).sum()
    assert torch.allclose(score(7, 3), score(45, 41), atol=1e-4) and not torch.allclose(score(7, 3), score(7, 4), atol=1e-4)


def test_the_schedule_is_the_papers():
    lr = [quartet.lr_at(s, 1000, 1.0) for s in range(1000)]
    assert lr[0] == pytest.approx(.01) and max(lr) == lr[100] == 1 and lr[-1] == pytest.approx(.1)
    assert np.all(np.diff(lr[:101]) > 0) and np.all(np.diff(lr[100:]) < 0)
    assert lr[50] == pytest.approx((1 + .01) / 2) and all(np.isfinite(quartet.lr_at(s, n, 1.)) for n in (1, 2, 9, 10, 11) for s in range(n))


# ---- runs

@pytest.mark.parametrize("precision", fp4.RECIPES)
def test_the_loss_falls_in_every_precision(run, tmp_path, precision):
    assert run("--precision", precision, "--steps", 30, "--name", "r", "--sample_tokens", 5)[0] == 0
    rows = log(tmp_path / "r")
    assert float(rows[0][1]) >= 5.5 and float(rows[-1][2]) <= 3.5
    assert {"log.csv", "curve.svg", "ckpt.pt"} == set(os.listdir(tmp_path / "r"))


def test_the_log_says_what_made_it(run, tmp_path):
    run("--steps", 2, "--name", "r", "--sample_tokens", 5)
    lines = open(tmp_path / "r" / "log.csv").read().splitlines()
    assert [l.split()[1] for l in lines[:4]] == ["commit", "config", "device", "fp4"] and '"precision": "fp4"' in lines[1]
    assert lines[4] == "step,loss,val,lr,norm,ms,tokens_per_s,mfu" and lines[5].endswith("n/a")


def test_the_same_seed_gives_the_same_log_and_another_seed_another(run, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)): run("--steps", 6, "--name", name, "--seed", seed, "--sample_tokens", 5)
    assert log(tmp_path / "a") == log(tmp_path / "b") != log(tmp_path / "c")


def test_microbatches_change_nothing_but_the_order_of_sums(run, tmp_path):
    for micro in (4, 1): run("--precision", "bf16", "--steps", 4, "--name", micro, "--micro", micro, "--sample_tokens", 5)
    for a, b in zip(log(tmp_path / "4"), log(tmp_path / "1")): assert abs(float(a[1]) - float(b[1])) <= 1e-3


def test_a_comma_list_trains_each_from_the_same_weights_on_the_same_batches_and_ends_with_a_table(run, tmp_path):
    code, _, out = run("--precision", "bf16,fp4,fp4-sr", "--steps", 4, "--sample_tokens", 5)
    assert code == 0 and "gap" in out and (tmp_path / "tiny-bf16-fp4-fp4-sr.svg").exists()
    first = [float(log(tmp_path / f"tiny-{p}")[0][1]) for p in ("bf16", "fp4", "fp4-sr")]
    assert first[1] == first[2] and 0 < abs(first[0] - first[1]) < .02                          # the same but for quantisation
    run("--precision", "fp4", "--steps", 4, "--name", "alone", "--sample_tokens", 5)
    assert log(tmp_path / "alone") == log(tmp_path / "tiny-fp4")


def test_an_axis_changes_the_row_and_names_the_run(run, tmp_path):
    assert run("--steps", 2, "--scale", "floor,nearest", "--sample_tokens", 5)[0] == 0
    assert log(tmp_path / "tiny-fp4-floor") != log(tmp_path / "tiny-fp4-nearest")


def test_a_compiled_run_learns_the_same(run, tmp_path):
    for name, flag in (("eager", []), ("compiled", ["--compile"])): run("--steps", 4, "--name", name, "--sample_tokens", 5, *flag)
    for a, b in zip(log(tmp_path / "eager"), log(tmp_path / "compiled"), strict=True): assert abs(float(a[1]) - float(b[1])) <= 1e-2


def test_an_earlier_run_of_the_same_name_is_set_aside(run, tmp_path):
    for _ in range(2): code, _, out = run("--steps", 2, "--name", "r", "--sample_tokens", 5)
    assert code == 0 and "existed and is now" in out and log(tmp_path / "r") == log(tmp_path / "r.1")


def test_a_sample_comes_from_the_checkpoint_and_repeats(run):
    run("--steps", 30, "--name", "r", "--sample_tokens", 5)
    a, b = (run("--name", "r", "--sample", "def f", "--sample_tokens", 20)[2] for _ in range(2))
    assert a == b and a.startswith("def f") and len(a) > 20


# ---- stop and resume

KILL = """
import os, signal, sys, torch, quartet
save, n = torch.save, [0]
def killed(state, file):
    n[0] += 1
    if n[0] == 2:                                               # in the middle of the second checkpoint
        file.write(b"half"); file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    save(state, file)
torch.save = killed
quartet.cli(sys.argv[1:])
"""


def test_stop_and_resume_equals_not_stopping_bit_for_bit_after_a_kill_in_the_middle_of_a_checkpoint(run, tmp_path, corpus):
    args = ["--precision", "fp4-sr", "--steps", 9, "--eval_every", 3, "--sample_tokens", 5]
    assert run(*args, "--name", "whole")[0] == 0
    command = [sys.executable, "-c", KILL, "--data", corpus, "--out", tmp_path, "--batch", 4, "--seq", 32, *args, "--name", "killed"]
    assert subprocess.run([str(c) for c in command], cwd=ROOT, capture_output=True).returncode == -9
    assert len(state(tmp_path / "killed")["history"]) == 3 and len(log(tmp_path / "killed")) == 6
    assert run(*args, "--name", "killed", "--resume")[0] == 0
    assert log(tmp_path / "killed") == log(tmp_path / "whole")
    a, b = state(tmp_path / "killed"), state(tmp_path / "whole")
    for key in ("model", "optimizer", "rng"): assert equal(a[key], b[key]), key
    assert [row[:5] for row in a["history"]] == [row[:5] for row in b["history"]]
    assert not (tmp_path / "killed" / "ckpt.pt.tmp").exists()


def test_resuming_with_other_settings_says_so_and_with_another_model_stops(run, tmp_path):
    run("--steps", 4, "--name", "r", "--sample_tokens", 5)
    before = open(tmp_path / "r" / "ckpt.pt", "rb").read()
    code, sentence, _ = run("--steps", 4, "--name", "r", "--resume", "--size", "30M")
    assert code == 2 and "is of another model (size tiny -> 30M" in sentence
    assert open(tmp_path / "r" / "ckpt.pt", "rb").read() == before
    code, _, out = run("--steps", 6, "--name", "r", "--resume", "--sample_tokens", 5)
    assert code == 0 and "resuming with other settings: steps 4 -> 6" in out and len(log(tmp_path / "r")) == 6


# ---- bad input: one sentence, exit code 2, nothing half-written

@pytest.mark.parametrize("args, words", [
    (["--precison", "fp4"], "unrecognized arguments: --precison fp4 (did you mean --precision?)"),
    (["--precision", "fp5"], "precision 'fp5' is not one of bf16, fp4"),
    (["--precision", "bf16,fp5"], "'fp5'"),
    (["--scale", "ceil"], "scale 'ceil' is not one of floor, nearest"),
    (["--size", "31M"], "size '31M' is not one of tiny, 3M"),
    (["--steps", "1.5"], "--steps"),
    (["--steps", "-3"], "steps must be a number and not negative"),
    (["--lr", "nan"], "lr must be a number and not negative"),
    (["--steps", "3", "--tokens", "1e6"], "give only one of steps and tokens"),
    (["--tokens", "100"], "shorter than one step of 128 tokens"),
    (["--batch", "6", "--micro", "4"], "batch 6 does not divide into microbatches of 4"),
    (["--seq", "100000"], "too few for a sequence of 100000"),
    (["--device", "tpu"], "device 'tpu' is not cpu or cuda"),
    (["--dtype", "float16"], "dtype 'float16' is not bfloat16 or float32"),
    (["--data", "nosuch"], "data 'nosuch' is not a file, a folder, or one of stdlib"),
    (["--resume", "--name", "none"], "there is no checkpoint"),
    (["--sample", "x", "--name", "none"], "there is no checkpoint"),
])
def test_a_bad_setting_is_one_sentence_and_writes_nothing(run, tmp_path, args, words):
    code, sentence, _ = run(*([] if "--steps" in args or "--tokens" in args else ["--steps", 2]), *args)
    assert code == 2 and words in sentence and sentence.startswith("quartet: ")
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_asking_for_a_gpu_where_there_is_none_is_said(run):
    assert "torch sees no GPU" in run("--device", "cuda")[1]


def test_damaged_token_files_and_tokens_outside_the_vocabulary_stop_the_run(run, tmp_path, corpus):
    bad = tmp_path / "bad"
    shutil.copytree(corpus, bad)
    with open(bad / "train.bin", "r+b") as f: f.truncate(2000)
    code, sentence, _ = run("--data", bad, "--steps", 2)
    assert code == 2 and "train.bin is truncated" in sentence
    with tokens.TokenWriter(str(bad / "train.bin"), 4096) as w: w.append(np.full(5000, 4000))
    code, sentence, _ = run("--data", bad, "--steps", 2, "--name", "r")
    assert code == 2 and "token 4000 at position" in sentence


def test_a_file_that_is_no_checkpoint_is_refused_and_kept(run, tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "ckpt.pt").write_bytes(b"hello")
    assert run("--resume", "--name", "r", "--steps", 2)[:2] == (2, f"quartet: {tmp_path}/r/ckpt.pt is not a checkpoint of quartet.py (KeyError)")
    torch.save({"weights": 1}, tmp_path / "r" / "ckpt.pt")
    assert "is of another version" in run("--resume", "--name", "r", "--steps", 2)[1]


def test_a_loss_that_is_not_finite_stops_the_run_with_step_loss_rate_and_checkpoint(run, tmp_path):
    code, sentence, _ = run("--precision", "bf16", "--lr", "1e20", "--steps", 40, "--eval_every", 1, "--name", "r", "--clip", "1e30")
    assert code == 2 and "loss nan" in sentence and "at step" in sentence and "lr " in sentence
    assert f"the last good checkpoint is {tmp_path}/r/ckpt.pt" in sentence
    assert all(p.isfinite().all() for p in state(tmp_path / "r")["model"].values())


def mounted(folder, options):
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True).returncode: pytest.skip("mounting is not permitted here")
    return folder


def test_a_full_disk_is_said_and_keeps_the_last_checkpoint(run, tmp_path):
    disk = mounted(tmp_path / "disk", "size=30m")               # a checkpoint has 13 MB, and the old one stays while the new one is written
    try:
        assert run("--steps", 2, "--out", disk, "--name", "r", "--sample_tokens", 5)[0] == 0
        before = open(disk / "r" / "ckpt.pt", "rb").read()
        with open(disk / "ballast", "wb") as f: f.write(bytes(8 << 20))
        code, sentence, _ = run("--steps", 4, "--out", disk, "--name", "r", "--resume")
        assert code == 2 and "cannot write" in sentence and "ckpt.pt" in sentence
        assert open(disk / "r" / "ckpt.pt", "rb").read() == before and not (disk / "r" / "ckpt.pt.tmp").exists()
    finally: subprocess.run(["umount", str(disk)], check=True)


def test_a_folder_that_cannot_be_written_is_said(run, tmp_path):
    (tmp_path / "file").write_text("")
    assert run("--steps", 2, "--out", tmp_path / "file")[:2] == (2, f"quartet: cannot write {tmp_path}/file/tiny-fp4/log.csv: Not a directory; what was there before is kept")
    disk = mounted(tmp_path / "ro", "size=1m,ro")
    try: assert "Read-only file system" in run("--steps", 2, "--out", disk)[1]
    finally: subprocess.run(["umount", str(disk)], check=True)


def test_the_exit_code_reaches_the_shell():
    done = subprocess.run([sys.executable, "quartet.py", "--size", "huge"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == "quartet: size 'huge' is not one of " + ", ".join(quartet.SIZES) + "\n"


def test_help_lists_every_setting_with_its_meaning():
    out = subprocess.run([sys.executable, "quartet.py", "--help"], cwd=ROOT, capture_output=True, text=True).stdout
    for f in dataclasses.fields(quartet.Config): assert f"--{f.name} " in out
    assert "largest norm of the gradient" in out


def test_without_a_compiler_the_definition_runs_and_one_line_says_so(tmp_path):
    shutil.copytree(os.path.join(ROOT, "fp4"), tmp_path / "fp4", ignore=shutil.ignore_patterns("build", "__pycache__"))
    code = "import fp4, torch; layer = fp4.Linear(64, 32, 'fp4'); layer(torch.randn(3, 64)).sum().backward(); print(layer.weight.grad.norm() > 0)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "CXX": "/nonexistent/c++"})
    assert done.stdout == "tensor(True)\n" and [l.startswith("fp4 runs reference.py") for l in done.stderr.strip().splitlines()].count(True) == 1, done.stderr


# ---- the tree

ORDER = ["quartet", "model", "fp4", "fp4.linear", "fp4.baselines", "fp4.fp8", "fp4.emulated", "fp4.build", "fp4.product", "fp4.nvfp4", "fp4.recipes",
         "fp4.formats", "fp4.reference"]


def imports(name):
    path = os.path.join(ROOT, name.replace(".", "/"))
    tree = ast.parse(open(path + ".py" if os.path.exists(path + ".py") else path + "/__init__.py").read())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import): yield from (a.name for a in node.names)
        if isinstance(node, ast.ImportFrom):
            base = "fp4" if node.level else node.module
            yield from ([f"{base}.{node.module}"] if node.level and node.module else [f"{base}.{a.name}" for a in node.names] if node.level else [base])


def test_imports_go_one_way():
    for i, name in enumerate(ORDER):
        inside = [m for m in imports(name) if m.split(".")[0] in ("quartet", "model", "fp4", "data")]
        assert all(m in ORDER[i + 1:] or m == "data" and name == "quartet" for m in inside), (name, inside)


def test_the_reading_budget_holds():
    done = subprocess.run([sys.executable, "tests/lines.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
