"""
The files of one run: its folder, its lock and log.csv. It does not depend on the trainer.

A run lives in the folder OUT/NAME:

    log.csv     lines that start with # say what made the run, where it was resumed and when it
                ended; between them is a CSV table with one line a step
    ckpt.pt     everything that the next step depends on; ckpt-STEP.pt are older ones
    ckpt-STEP.shards    with --shard, a folder in which each process writes its part of that
    curve.svg   the loss, drawn at the end
    lock        who trains here at the moment; gone when nobody does
"""
import contextlib
import csv
import datetime
import functools
import hashlib
import itertools
import json
import math
import os
import re
import subprocess
import zipfile
from typing import NamedTuple, Optional

from data import locks
from data.files import UserError, atomic_write_text, check, sha256_of
from fp4.axes import AXES, variant_name

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CODE = (".py", ".cu", ".cuh", ".cpp", ".h")     # what a change of makes another program

# Settings that do not change which model comes out of a run. All others are its identity: if they
# are equal to those in the log of a folder, then the folder holds the same run.
NOT_IDENTITY = ("resume", "discard", "out", "name", "sample", "sample_tokens", "temperature",
                "top_k", "top_p", "seeds", "jobs", "keep", "allow_changes", "shard")
NO_KERNELS = "not used"                 # quartet.backend_description() of a row without kernels
LENGTHS = ("steps", "tokens", "tokens_per_param")
MAX_STEPS = 2 ** 31
# A corpus is known by its content. How it is called matters only where the content is not known.
CORPUS_NAMES = ("data", "vocab")
# A run that was resumed with other values of these can still be compared with other runs.
HARMLESS = ("micro", "compile", "replay", "device", "gemm", "eval_every", "weight_stats")
# Settings that may change on --resume. Any other says how the run has been trained so far, and
# would no longer be true of all its steps.
MAY_CHANGE = (*LENGTHS, *HARMLESS, *CORPUS_NAMES, "lr", "weight_decay", "clip")
# The names of checkpoints. The number is the step after which it was written.
CHECKPOINT = re.compile(r"ckpt(?:-(0|[1-9]\d*))?\.pt")
# The parts of a checkpoint, which only ours has all of.
PARTS = {"version", "config", "corpus", "history", "model", "optimizer", "shards"}
# What a process that was killed while it wrote a file leaves of it.
UNFINISHED = re.compile(r"(log\.csv|curve\.svg|ckpt(-(0|[1-9]\d*))?\.pt)\.tmp")


class Diverged(UserError):
    """A run came to a number that is not finite (Run.not_finite). Training goes no further."""
    exit_code = 3


def label(config):
    """The name of a run by its settings, such as fp4-nearest-keep_first-1-seed2.

    config is the dictionary of a run's settings.
    """
    parts = [variant_name(config["precision"], config)]
    if config.get("switch"):
        parts.append(f"switch-{config['switch']}")
    for setting in ("keep_first", "keep_last"):
        if config.get(setting):
            parts.append(f"{setting}-{config[setting]}")
    if config.get("seed"):
        parts.append(f"seed{config['seed']}")
    return "-".join(parts)


def folder_name(out, name, default):
    """The name of a run's folder in the folder out of all runs, checked; name None: the default."""
    if name is None:
        name = default
    # Bytes of another encoding than UTF-8 are not printable either.
    is_a_name = name.isprintable() and name == os.path.basename(name)
    check(is_a_name and name not in ("", ".", "..") and len(name.encode()) <= 200,
          f"name {name!r} is not the name of a folder: give a short one without /")
    check(out and out.isprintable(), f"out {out!r} is not the path of a folder")
    return name


def check_length(steps, n_tokens):
    """Refuse a run of no steps, or of too many; n_tokens is the number of tokens in a step."""
    check(steps > 0, f"the run is shorter than one step of {n_tokens:,} tokens")
    check(steps <= MAX_STEPS, f"the run has more than {MAX_STEPS:,} steps: give fewer tokens")


def changes(old, new, old_corpus=None, new_corpus=None):
    """
    {setting: [old value, new value]} where two dictionaries of settings mean another model.

    old_corpus and new_corpus are the identities of two data.corpus.Corpus. If both are known, they
    are compared, and what their corpora are called is not.
    """
    ignored = NOT_IDENTITY
    if old_corpus and new_corpus:
        ignored += CORPUS_NAMES
        old = old | old_corpus
        new = new | new_corpus
    return {name: [old.get(name), value] for name, value in new.items()
            if name not in ignored and value != old.get(name)}


def describe_changes(changed):
    """What changes() found, such as steps 4 -> 6, lr 0.1 -> 0.2."""
    return ", ".join(f"{name} {old} -> {new}" for name, (old, new) in changed.items())


# ---- the folder: one process at a time, and nothing is ever overwritten

@contextlib.contextmanager
def lock(folder):
    """
    Keep every other process out of the folder of a run, which is made if it is missing.

    What a killed process left half-written is removed. Raises UserError that names the process
    which holds the lock.
    """
    with lock_as_it_is(folder):
        for name in os.listdir(folder):
            if UNFINISHED.fullmatch(name):
                os.remove(os.path.join(folder, name))
        yield


@contextlib.contextmanager
def lock_as_it_is(folder):
    """As lock(), but no file in the folder is touched: it may be the user's."""
    check(not os.path.isfile(folder), f"{folder} is a file: choose another --name")
    is_new = not os.path.exists(folder)
    refusal = "wait until it ends, or choose another --name"
    try:
        with locks.hold(os.path.join(folder, "lock"), refusal):
            yield
    finally:
        if is_new:
            with contextlib.suppress(OSError):
                os.rmdir(folder)        # Where nothing was written, no folder stays.


def set_aside(folder):
    """Rename the folder of an earlier run of the same name, so that nothing is lost.

    Raises UserError if a process is at work there, or if what is there is not a run.
    """
    if not os.path.exists(folder):
        return
    with lock_as_it_is(folder):
        # With --jobs, log.txt is our own output.
        names = [name for name in os.listdir(folder) if name not in ("log.txt", "lock")]
        if all(map(UNFINISHED.fullmatch, names)):
            return
        check(run_in(folder) or has_checkpoint(folder),
              f"{folder} is not a run of quartet.py: choose another --name")
        new_name = free_name(folder)
        os.rename(folder, new_name)
        os.remove(os.path.join(new_name, "lock"))
    print(f"{folder} existed and is now {new_name}")


def has_checkpoint(folder):
    """Does a folder hold a checkpoint of ours? Other trainers call theirs ckpt.pt as well."""
    names = filter(CHECKPOINT.fullmatch, os.listdir(folder))
    return any(is_checkpoint(os.path.join(folder, name)) for name in names)


def is_checkpoint(path):
    """Does a file name all parts of a checkpoint? It is not loaded, which would take torch."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            pickled = b"".join(map(archive.read, names))
    except Exception:                   # A damaged file may raise anything.
        return False
    return all(part.encode() in pickled for part in PARTS)


def free_name(path):
    """The first of path.1, path.2, ... that does not exist."""
    for number in itertools.count(1):
        name = f"{path}.{number}"
        if not os.path.lexists(name):
            return name


# ---- log.csv is written

def log_path(folder): return os.path.join(folder, "log.csv")


class Step(NamedTuple):
    """One line of the table in log.csv."""
    step: int                           # counted from 1
    loss: float                         # of the training batch, before the step
    val: Optional[float]                # validation loss after the step; None: not evaluated
    lr: float
    norm: float                         # of the gradient, before it was clipped
    # Of a step that was not finished, the others are not known.
    ms: float = 0                       # wall-clock time of the step
    tokens_per_s: float = 0
    mfu: str = "n/a"                    # model FLOPs utilisation
    # Of a million blocks of 32, how many FP8 had to round; None: not counted, or not in FP8.
    beyond_window: Optional[float] = None
    bpb: Optional[float] = None         # val as bits per byte of text; None: not known
    # {column: share} of fp4/weight_stats.py, such as {"flips:mlp.down": 0.01}; None: not measured.
    weights: Optional[dict] = None


COLUMNS = Step._fields[:-1]             # of every table; behind them may come those of weights


def log_head(config, device_name, backend_description, corpus=None):
    """The lines at the top of log.csv, which say what made the run.

    config is a dictionary of settings, corpus the description of a data.corpus.Corpus.
    """
    lines = [
        f"# commit {git_commit()}",
        f"# config {json.dumps(config)}",
        f"# device {device_name}",
        f"# fp4 {backend_description}",
        *([f"# data {json.dumps(corpus)}"] if corpus else []),
        ",".join(COLUMNS),
    ]
    return "".join(line + "\n" for line in lines)


@functools.cache
def git_commit():
    """
    The commit of this source tree, and what differs from it: see state_of_tree().

    It is asked once, because a process goes on with the code that it has begun with.
    """
    return state_of_tree(ROOT)


def state_of_tree(folder):
    """
    The commit of a source tree, such as 1a2b3c4; "unknown" without git.

    Where code differs from it, or is not in it, -dirty- follows and a hash of that code: two trees
    with other changes have other names.
    """
    commit = git(folder, "describe", "--always").strip()
    if not commit:
        return "unknown"
    changed = git(folder, "diff", "--name-only", "--no-renames", "--relative", "-z", "HEAD", "--")
    untracked = git(folder, "ls-files", "--others", "--exclude-standard", "-z")
    names = {name for name in (changed + untracked).split("\0") if name.endswith(CODE)}
    if not names:
        return commit
    state = hashlib.sha256()
    for name in sorted(names):
        try:
            content = sha256_of(os.path.join(folder, name))
        except OSError:
            content = "removed"
        state.update(f"{name}\0{content}\0".encode(errors="surrogateescape"))
    return f"{commit}-dirty-{state.hexdigest()[:8]}"


def git(folder, *arguments):
    """What a command of git says about a folder; "" without git, or where it fails."""
    command = ["git", "-C", folder, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="surrogateescape")
    except OSError:
        return ""
    return done.stdout if done.returncode == 0 else ""


def log_row(row, columns=COLUMNS):
    """One Step as a line of a log.csv whose table has these columns."""
    cells = {
        "step": str(row.step),
        "loss": f"{row.loss:.6f}",
        "val": in_cell(row.val, ".4f"),
        "lr": f"{row.lr:.6e}",
        "norm": f"{row.norm:.6f}",
        "ms": f"{row.ms:.1f}",
        "tokens_per_s": f"{row.tokens_per_s:.0f}",
        "mfu": row.mfu,
        "beyond_window": in_cell(row.beyond_window, ".2f"),
        "bpb": in_cell(row.bpb, ".4f"),
    }
    cells |= {name: in_cell(share, ".4g") for name, share in (row.weights or {}).items()}
    return ",".join(cells.get(name, "") for name in columns) + "\n"


def in_cell(value, form):
    """A number as the text of a cell, which is empty for None."""
    return "" if value is None else format(value, form)


def show_step(bar, row, steps):
    """Print a step: on a terminal only where it was evaluated, since the bar shows the others.

    bar     the progress bar of the run
    row     the Step
    steps   length of the run
    """
    if bar.disable or row.val is not None:
        val = in_cell(row.val, ".4f")
        bpb = in_cell(row.bpb, ".4f") or ("n/a" if val else "")
        bar.write(f"step {row.step:5d}/{steps}  loss {row.loss:.4f}  val {val:6}  bpb {bpb:6}  "
                  f"lr {row.lr:.2e}  norm {row.norm:5.2f}  {row.ms:6.0f} ms  "
                  f"{row.tokens_per_s:9,.0f} tok/s  MFU {row.mfu}")
    bar.set_postfix_str(f"loss {row.loss:.4f}", refresh=False)
    bar.update()


def log_resumed(step, changed):
    """The line that says after which step a run went on, with which code, and which settings are
    new from there: changed is what changes() returns."""
    entry = dict(step=step, changes=changed, commit=git_commit())
    return f"# resumed {json.dumps(entry)}\n"


def log_end(memory, energy):
    """The last line of a finished run's log.csv; energy is in the words of energy.Spent."""
    return f"# finished {datetime.date.today()}, peak memory {memory}, energy {energy}\n"


def log_diverged(sentence):
    """The last line of a run that diverged."""
    return f"# diverged {sentence}\n"


class Log:
    """A log.csv to which lines are added, each at once whole. A with block closes it."""

    def __init__(self, path, columns=()):
        """Gives the table of the log the columns that it lacks: ours, and those named here."""
        text = read_text(path)
        new_text, self.columns = widened(text, [*COLUMNS, *columns])
        if new_text != text:
            atomic_write_text(path, new_text)
        self.file = open(path, "a", buffering=1, encoding="utf-8")
        self.write = self.file.write

    def write_row(self, row):
        self.write(log_row(row, self.columns))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()


def widened(text, names):
    """The text of a log with these columns in its table, empty where they are new; and the names of
    all its columns. An older version, or other flags, may have begun it with fewer."""
    columns = columns_of(text)
    new = [name for name in names if name not in columns]
    lines = []
    for line in text.splitlines():
        if is_row(line):
            line += "," * len(new)
        elif not line.startswith("#"):
            line = ",".join([*columns, *new])
        lines.append(line + "\n")
    return "".join(lines), [*columns, *new]


def columns_of(text):
    """The names of the columns of a log's table; none in an empty text."""
    heads = [line for line in text.splitlines() if not line.startswith("#") and not is_row(line)]
    return heads[0].split(",") if heads else []


def start_log(path, head):
    """Begin the log.csv of a new run. head is what log_head() returns."""
    atomic_write_text(path, head)


def resume_log(path, head, history, changed):
    """
    Let log.csv end where the checkpoint does, since the steps after it are trained again.

    The log keeps its own head: it says how the steps so far were trained. A log that is missing
    or that tells of other steps is replaced by a new one, and kept under another name.

    head      what log_head() returns for the settings in the checkpoint
    history   the list of Steps in the checkpoint
    changed   what changes() returns for the settings of the checkpoint and the present ones
    """
    lines = lines_so_far(path, history)
    if lines is None:
        if os.path.lexists(path):
            other = free_name(path)
            os.rename(path, other)
            print(f"{path} is not the log of this checkpoint and is now {other}")
        lines = [head]
    measured = dict.fromkeys(name for row in history for name in row.weights or {})
    text, columns = widened("".join(lines), [*COLUMNS, *measured])
    n_known = sum(is_row(line) for line in lines)
    missing = [log_row(row, columns) for row in history[n_known:]]
    text = "".join([text, *missing, log_resumed(len(history), changed)])
    atomic_write_text(path, text)


def lines_so_far(path, rows):
    """
    The lines of a log up to the last of these rows, or as far as they are there.

    None if it is not a log, or if its rows are others.
    """
    try:
        text = read_text(path)
        parse_log(text)
    except (OSError, ValueError):
        return None
    columns = columns_of(text)
    lines = []
    n_known = 0
    for line in text.splitlines(keepends=True):
        if is_row(line):
            is_cut = not line.endswith("\n")
            if n_known == len(rows) or is_cut:
                break
            if line != log_row(rows[n_known], columns):
                return None
            n_known += 1
        elif n_known == len(rows) > 0:
            break
        lines.append(line)
    return lines


def is_row(line):
    """Is this line of a log one of a step?"""
    return line[:1].isdigit()


# ---- log.csv is read

class Run(NamedTuple):
    """What a log.csv says."""
    config: dict                        # of the settings, at the end
    device: str
    history: list                       # of Step
    date: str                           # when it was finished, its last step evaluated; "": not
    memory: str                         # peak memory, such as "1.03 GiB"
    corpus: dict                        # the description of its Corpus; {}: in an older log
    resumed: list                       # of the dictionaries that log_resumed() writes
    divergence: str                     # the sentence with which it diverged; "": it did not
    commit: str                         # of the code that began it, as git_commit() gives it
    backend: str                        # what computed its FP4 products; NO_KERNELS: nothing did

    @property
    def vals(self):
        """All validation losses, in order."""
        return [row.val for row in self.history if row.val is not None]

    @property
    def bpb(self):
        """The last validation loss as bits per byte of text, or None."""
        return next((row.bpb for row in reversed(self.history) if row.val is not None), None)

    @property
    def not_finite(self):
        """Did the run come to a loss, a gradient or a weight that is not finite?"""
        losses = [row.loss for row in self.history] + self.vals
        return bool(self.divergence) or not all(map(math.isfinite, losses))

    @property
    def ended(self):
        """Is there nothing left to train, because the run was finished or is not finite?"""
        return bool(self.date) or self.not_finite

    @property
    def diverged(self):
        """Is an ended run not finite, or its last validation loss higher than its first?"""
        return self.not_finite or not self.vals[-1] <= self.vals[0]


def read_text(path):
    with open(path, encoding="utf-8") as file:
        return file.read()


def read_log(path):
    """The Run of a log.csv. Raises ValueError or OSError, with a sentence, if it is not one."""
    try:
        return parse_log(read_text(path))
    except UnicodeDecodeError:
        raise ValueError("not a log of quartet.py (it is not text)")


def parse_log(text):
    """The Run that the text of one log.csv describes.

    Raises ValueError, with a sentence, when the text is not a log.
    """
    try:
        return make_run(text.splitlines())
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError,
            csv.Error) as error:
        raise ValueError(f"not a log of quartet.py ({type(error).__name__}: {error})")


def make_run(lines):
    """The Run that the lines of a log describe; raises what their parts raise."""
    notes = [line[2:].partition(" ") for line in lines if line.startswith("# ")]
    head = {name: value for name, _, value in notes}
    resumed = [json.loads(value) for name, _, value in notes if name == "resumed"]
    config = json.loads(head["config"])
    for entry in resumed:
        config |= {name: new for name, (_, new) in entry["changes"].items()}
    corpus = json.loads(head.get("data", "{}"))
    check_types(config, corpus, resumed)
    history = parse_rows(lines)
    date, _, rest = head.get("finished", "").partition(", peak memory ")
    memory = rest.partition(", energy ")[0]     # An older log does not say its energy.
    if not (history and history[-1].val is not None):
        date = ""                       # How good it is in the end has yet to be evaluated.
    return Run(config, head["device"], history, date, memory, corpus, resumed,
               head.get("diverged", ""), head.get("commit", "unknown"), head.get("fp4", NO_KERNELS))


def check_types(config, corpus, resumed):
    """Raises TypeError unless the notes in a log have the types that names and tables need."""
    texts = dict.fromkeys(("precision", "name", "size", "data"), str)
    counts = dict.fromkeys(("seed", "batch", "seq"), int)
    optional = dict.fromkeys((*AXES, "switch"), (str, type(None)))
    optional |= dict.fromkeys(("keep_first", "keep_last", "jobs", "vocab"), (int, type(None)))
    optional |= dict.fromkeys(LENGTHS, (int, float, type(None)))
    for name, kinds in (texts | counts | optional).items():
        if not isinstance(config.get(name), kinds):
            raise TypeError(f"{name} is {config.get(name)!r}")
    if not all(isinstance(value, (str, int)) for value in corpus.values()):
        raise TypeError(f"data is {corpus!r}")
    if not all(isinstance(entry["step"], int) for entry in resumed):
        raise TypeError(f"resumed is {resumed!r}")


def parse_rows(lines):
    """The table between the comments of a log, as a list of Step."""
    rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    if rows and (not rows[-1]["mfu"] or None in rows[-1].values()):
        rows.pop()                      # It was cut off when the run was killed.
    history = [parse_row(fields) for fields in rows]
    for before, after in itertools.pairwise(history):
        if after.step <= before.step:
            raise ValueError(f"step {after.step} comes after step {before.step}")
    return history


def parse_row(fields):
    """A line of the table as a Step. A norm that is not finite makes the loss NaN."""
    norm = float(fields["norm"])
    loss = float(fields["loss"]) if math.isfinite(norm) else math.nan
    val = from_cell(fields["val"])
    # An older log does not have these two columns.
    beyond = from_cell(fields.get("beyond_window"))
    bpb = from_cell(fields.get("bpb"))
    weights = {name: float(text) for name, text in fields.items() if name and ":" in name and text}
    return Step(int(fields["step"]), loss, val, float(fields["lr"]), norm, float(fields["ms"]),
                float(fields["tokens_per_s"]), fields["mfu"], beyond, bpb, weights or None)


def from_cell(text):
    """The number in a cell, or None if that is empty or missing."""
    return float(text) if text else None


def split_logs(text):
    """The logs in a file that holds several, one after the other."""
    return ["# commit" + part for part in text.split("# commit")[1:]]


def thin_log(text):
    """What is worth keeping of a log: its head, its end, the evaluated steps and the last one."""
    lines = text.splitlines()
    last = max(i for i, line in enumerate(lines) if not line.startswith("#"))
    kept = []
    for i, line in enumerate(lines):
        is_comment = line.startswith("#")
        if is_comment or i == last or line.split(",")[2]:
            kept.append(line + "\n")
    return "".join(kept)


# ---- the run in a folder

def run_in(folder):
    """The Run whose log lies in a folder, or None."""
    try:
        return read_log(log_path(folder))
    except (OSError, ValueError):
        return None


def is_finished(folder):
    """Has the run in this folder been trained to its end?"""
    found = run_in(folder)
    return found is not None and bool(found.date)


def changes_to(folder, config, corpus=None):
    """What changes() finds between the run in a folder and config; {} where there is no run.

    corpus is the identity of the corpus that config names, if it is known.
    """
    found = run_in(folder)
    return changes(found.config, config, found.corpus, corpus) if found else {}


def refuse_other(folder, config, remedy):
    """Raise UserError, with the remedy, if a folder holds a run with other settings than config."""
    changed = changes_to(folder, config)
    check(not changed, f"{folder} holds a run with other settings ({describe_changes(changed)}): "
                       f"{remedy}")


def difference(run, config, corpus):
    """
    What tells a Run from the one that these settings make, in words; "" if it is the same run.

    corpus is the identity of a data.corpus.Corpus. A run of another corpus or vocabulary is not
    the same; a log that does not know its corpus may be of any. Nor is a run that was resumed with
    settings that make another model: its steps were not all trained alike.
    """
    changed = changes(run.config, config, run.corpus, corpus)
    parts = [describe_changes(changed)] if changed else []
    return ", ".join([*parts, *resumed_otherwise(run)])


def resumed_otherwise(run, harmless=HARMLESS):
    """Sentences on where a Run was resumed with other settings than those called harmless."""
    if run.corpus:                      # Another content is a change of its own.
        harmless += CORPUS_NAMES
    sentences = []
    for entry in run.resumed:
        changed = {name: change for name, change in entry["changes"].items()
                   if name not in harmless}
        if changed:
            sentences.append(f"resumed after step {entry['step']} with "
                             f"{describe_changes(changed)}")
    return sentences
