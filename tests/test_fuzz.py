"""
Command lines that nobody would write: each ends with a documented exit code and a sentence.

The lines are drawn with a fixed seed from the fields of quartet.Settings, so that a new flag is
covered as soon as it is there. They run in this process. Most of them train nothing, because
train() is replaced where a run would be long; small runs train one step for real.
"""
import contextlib
import dataclasses
import itertools
import json
import os
import random
import resource
import shutil
import signal
import traceback

import pytest
import torch

import quartet
from data import prepare
from fp4 import AXES, RECIPES
from model import PRESETS, Preset
from tools import ablation, report

TRAIN = quartet.train
CODES = {0, 2, 3, *range(129, 160)}
NUMBERS = ["0", "1", "2", "-1", "1.5", "nan", "inf", "-inf", "1e308", "1e-308", "-1e308", "1e9",
           "1e18", str(2 ** 31), str(2 ** 63 - 1), str(2 ** 63), str(2 ** 64), "9" * 5000, "0x10",
           "1_000", "١٢", " 5", "5 ", "1e400", "-0", "true"]
TEXTS = ["", " ", "-", "--", "-1", "a/b", "../up", ".", "..", "a,b", ",", ",,", "fp4,fp4", ":",
         "none:none:none", "a\nb", "%s", "{}", "é→", "\u202e", "\udcff", "a" * 300, "None",
         "--help", "../../../x", "~", "*", "cpu:7", "cuda:-1", "cuda:x", "all"]
WORDS = ["", "--", "-", "x", "--resume", "--no_compile", "--resume=1", "--qwertz", "--steps", "-h=",
         "--=", "=", "--lr", "\udcff", "--batch_size", "--eval-every=3"]
SECONDS = 20                            # A line that takes longer is a fault.
SPOILED = 60                            # runs that are gone on with
GIGABYTES = 4                           # What a line may take, besides what is taken already.
TOY = Preset(n_layer=1, n_embd=32, n_head=1, lr=1e-3)
SMALL = ("--size", "toy", "--seq", "16", "--batch", "2", "--steps", "1", "--sample_tokens", "2",
         "--device", "cpu", "--no_compile")


# ---- what is typed

def good_values(field, corpus):
    "values that mean something for a flag"
    choices = {
        "precision": [*RECIPES, "bf16,fp4", "all"],
        "size": ["toy", "tiny", "7B"],
        "data": [corpus, os.path.join(corpus, "train.bin"), "nosuch", os.path.dirname(corpus)],
        "out": ["out", "here", "."],
        "name": ["r", "other"],
        "device": ["cpu", "cuda", "cuda:1"],
        "dtype": ["float32", "bfloat16", "float16"],
        "gemm": ["auto", "fp8", "own", "library"],
        "sample": ["def", "", "<|endoftext|>", "-"],
        "temperature": ["0", "0.8", "1e-300", "1e300"],
        "top_p": ["0", "0.5", "1"],
        "switch": ["none", "0.5:bf16", "0.5:fp4+scale=mse", "none,0.5:bf16", "0.5:fp4+x"],
    }
    if field.name in AXES:
        words = ["1", "0.84", "0.84/1"] if field.name == "multiplier" else AXES[field.name]
        values = list(map(str, words))
        return [*values, ",".join(values[:2]), ":".join((values * 3)[:3])]
    return choices.get(field.name, ["1", "2", "4", "300"])


def values_of(field, corpus):
    "what can be typed for a flag: sensible values, its bounds, one beyond them, and nonsense"
    least, most = field.metadata["least"], field.metadata["most"]
    bounds = [str(bound + change) for bound in (least, most) if bound is not None
              for change in (-1, 0, 1)]
    nonsense = TEXTS if field.type is str else NUMBERS + TEXTS[:4]
    return [*good_values(field, corpus) * 3, *bounds, *nonsense]


def random_line(rng, corpus):
    "a list of words; flags come several times, lack their value, or are none"
    words = []
    for field in rng.choices(dataclasses.fields(quartet.Settings), k=rng.choice([1, 1, 2, 3, 5])):
        flag = f"--{field.name}"
        if field.type is bool:
            words.append(rng.choice([flag, flag, f"--no_{field.name}", f"{flag}=1"]))
            continue
        value = rng.choice(values_of(field, corpus))
        if rng.random() < 0.5:
            words.append(f"{flag}={value}")
        else:
            words += [flag, value]
        if rng.random() < 0.03:
            words.pop()
    if rng.random() < 0.1:
        words.insert(rng.randrange(len(words) + 1), rng.choice(WORDS))
    return words


def single_flags(rng, corpus):
    "each flag with all of its values, but for a third of the texts; and words that are no flags"
    for word in WORDS:
        yield [word]
    for field in dataclasses.fields(quartet.Settings):
        if field.type is bool:
            yield [f"--{field.name}"]
            continue
        values = list(dict.fromkeys(values_of(field, corpus)))
        if field.type is str:
            values = rng.sample(values, k=len(values) // 3)
        for value in values:
            yield [f"--{field.name}={value}"]


# ---- where it runs

@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    functions = [f"def f{i}(x, y):\n    return x + {i} * y\n\n" for i in range(400)]
    (folder / "text.py").write_text("".join(functions))
    # What torch imports when an optimizer is first made takes seconds, which no line is to pay.
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)]).step()
    return prepare.prepare(str(folder / "text.py"), 270, out=str(folder / "corpus"))


@pytest.fixture
def sandbox(tmp_path, monkeypatch):
    "an empty folder, deep inside one that is looked through afterwards"
    folder = tmp_path / "a" / "b" / "c" / "d"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    # Nobody waits here, and no process is started that nobody ends.
    monkeypatch.setattr("builtins.input", lambda *prompt: pytest.fail("it prompts"))
    monkeypatch.setattr(ablation, "train_in_processes", lambda configs, jobs, script: [])
    # Corpora are made in the source tree. They are to appear here.
    monkeypatch.setattr(prepare, "HERE", str(folder / "out"))
    # A picture would take most of the time of such a run.
    monkeypatch.setattr(report, "save_svg", lambda figure, path: None)
    monkeypatch.setitem(PRESETS, "toy", TOY)
    small_runs = itertools.count()

    def train_a_few(cfg):
        work = cfg.batch * cfg.seq * (cfg.steps or 1e9)
        is_small = cfg.size == "toy" and work <= 100 and cfg.sample_tokens < 10
        is_first = os.listdir(folder) == []         # the first run of its line
        if is_small and is_first and not cfg.compile and next(small_runs) % 10 == 0:
            TRAIN(cfg)

    monkeypatch.setattr(quartet, "train", train_a_few)
    with limited_memory():
        yield folder


@contextlib.contextmanager
def limited_memory():
    "so that a line which asks for too much gets a MemoryError, and not the machine into trouble"
    if torch.cuda.is_available():
        yield                           # CUDA reserves addresses without end.
        return
    with open("/proc/self/statm") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (taken + GIGABYTES * 2 ** 30, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


class TooSlow(BaseException):
    pass


def too_slow(signal_number, frame):
    raise TooSlow(f"more than {SECONDS} s")


class Call:
    """One command line: what came of it, and what is wrong with that."""

    def __init__(self, words, capsys):
        capsys.readouterr()
        self.words = words
        self.error = None
        signal.signal(signal.SIGALRM, too_slow)
        signal.alarm(SECONDS)
        try:
            self.code = quartet.run_cli(words)
        except SystemExit as stopped:
            self.code = stopped.code
        except BaseException as error:
            self.code = 1
            self.error = error
        finally:
            signal.alarm(0)
        printed = capsys.readouterr()
        self.last_line = (printed.err.splitlines() or [""])[-1]

    def fault(self):
        "in words, or None"
        if self.error is not None:
            frames = [frame for frame in traceback.extract_tb(self.error.__traceback__)
                      if "site-packages" not in frame.filename]
            place = f"{os.path.basename(frames[-1].filename)}:{frames[-1].lineno}"
            return f"{place} {type(self.error).__name__}: {str(self.error)[:200]}"
        if self.code not in CODES:
            return f"exit code {self.code}"
        if self.code and not self.last_line.startswith("quartet: "):
            return f"exit code {self.code} without a sentence: {self.last_line!r}"
        if self.code and len(self.last_line) > 2000:
            return "a sentence of thousands of characters"
        return None


def files_in(folder):
    found = set()
    for path, folders, names in os.walk(folder):
        found |= {os.path.join(path, name) for name in (*folders, *names)}
    return found


def outside(new_files, words, sandbox):
    "those of the new files that do not lie in the folder --out"
    out = "out"
    for word, following in zip(words, [*words[1:], ""]):
        if word == "--out":
            out = following
        elif word.startswith("--out="):
            out = word.removeprefix("--out=")
    allowed = os.path.normpath(os.path.join(sandbox, out))
    return {path for path in new_files
            if os.path.commonpath([path, allowed]) not in (allowed, path)}


def remove(path):
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def faults_of(lines, corpus, sandbox, capsys):
    "in words, what is wrong with these command lines, each after --data and what makes it SMALL"
    faults = []
    top = sandbox.parents[3]
    known = files_in(top)
    for words in lines:
        call = Call(["--data", corpus, *SMALL, *words], capsys)
        fault = call.fault()
        strays = outside(files_in(top) - known, words, str(sandbox))
        if strays:
            fault = f"{fault or ''} wrote {sorted(strays)[:3]}"
        if fault:
            faults.append(f"{ascii(words)[:300]}\n    {fault}")
        for path in top.glob("*"):
            if path.name != "a":
                remove(path)
        shutil.rmtree(top / "a")
        sandbox.mkdir(parents=True)
        os.chdir(sandbox)
    return "\n".join(faults)


# ---- files of another making

ODD = [None, "x", "", "mine", -1, 0, 2 ** 70, 1e308, float("nan"), True, [], [None], {}, {"a": 1}]


def spoil_checkpoint(rng, folder):
    "make it one of another version: a part is missing, a setting is missing, unknown or different"
    path = os.path.join(folder, "ckpt.pt")
    state = torch.load(path, weights_only=True)
    config = state["config"]
    name = rng.choice(list(config))
    kind = rng.randrange(5)
    if kind == 0:
        del state[rng.choice(list(state))]
    elif kind == 1:
        state["version"] = rng.choice(ODD)
    elif kind == 2:
        del config[name]
    else:
        config[rng.choice([name, name, name, "unknown"])] = rng.choice(ODD)
    torch.save(state, path)


def spoil_log(rng, folder):
    path = os.path.join(folder, "log.csv")
    with open(path) as file:
        lines = file.read().splitlines()
    i = rng.randrange(len(lines))
    kind, _, text = lines[i].removeprefix("# ").partition(" ")
    if text.startswith("{") and rng.random() < 0.8:
        value = json.loads(text)
        value[rng.choice(list(value))] = rng.choice(ODD)
        lines[i] = f"# {kind} {json.dumps(value)}"
    else:
        fields = lines[i].split(",")
        fields[rng.randrange(len(fields))] = rng.choice(["", "x", "-1", "nan", "1e999", "é", "\0"])
        lines[i] = rng.choice([",".join(fields), "", "# config []", "# config", "#", lines[0]])
    with open(path, "w") as file:
        file.write("\n".join(lines) + "\n")


AGAIN = (
    [],
    ["--resume", "--steps", "2"],
    ["--resume", "--steps", "2", "--allow_changes", "--lr", "1"],
    ["--sample", "def"],
    ["--precision", "bf16,fp4"],
)


# ---- the facts

def test_every_single_flag_ends_in_a_sentence_or_works(corpus, sandbox, capsys):
    faults = faults_of(single_flags(random.Random(0), corpus), corpus, sandbox, capsys)
    assert not faults, faults


def test_random_command_lines_end_in_a_sentence_or_work(corpus, sandbox, capsys):
    rng = random.Random(0)
    lines = [random_line(rng, corpus) for _ in range(300)]
    faults = faults_of(lines, corpus, sandbox, capsys)
    assert not faults, faults


def test_files_that_were_spoiled_end_in_a_sentence_or_are_replaced(
        corpus, sandbox, capsys, monkeypatch):
    monkeypatch.setattr(quartet, "train", TRAIN)
    rng = random.Random(1)
    assert Call(["--data", corpus, *SMALL], capsys).code == 0
    shutil.copytree("out", "../whole")
    faults = []
    for _ in range(SPOILED):
        shutil.rmtree("out")
        shutil.copytree("../whole", "out")
        how = rng.choice([spoil_checkpoint, spoil_log])
        how(rng, "out/toy-fp4")
        words = rng.choice(AGAIN)
        fault = Call(["--data", corpus, *SMALL, *words], capsys).fault()
        if fault:
            faults.append(f"{how.__name__} {words}: {fault}")
    assert not faults, "\n".join(faults)
