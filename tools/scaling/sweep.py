"""
Trains a sweep for a law of your own, and collects finished runs as the input of the fit.

`sweep` trains sizes x tokens x (bf16, fp4) with quartet.py. If it is interrupted, the same command
goes on with what is missing. On a GPU it is a small real sweep; on a CPU it is a toy of
minutes, with a law of its own that its intervals call uncertain. `collect` turns the logs of
finished runs into a file that the fit reads.
"""
import dataclasses
import glob
import math
import os
from types import SimpleNamespace

import torch

import quartet
from data import prepare, signals
from data.files import check
from fp4.axes import AXES
from model import PRESETS, Preset, count_params
from tools import schedule
from tools.ablation import finish
from tools.run import HARMLESS, LENGTHS, read_log, resumed_otherwise
from tools.scaling.runs import COLUMNS

# Sizes below tiny: with one layer and a small vocabulary, size matters within minutes.
TOY = {
    "toy32": Preset(n_layer=1, n_embd=32, n_head=1, lr=.256 / 32),
    "toy64": Preset(n_layer=1, n_embd=64, n_head=1, lr=.256 / 64),
    "toy128": Preset(n_layer=1, n_embd=128, n_head=1, lr=.256 / 128),
}
# By device: sizes, tokens, corpus, the corpus' vocabulary (0: as quartet.py chooses), flags.
SWEEPS = {
    "cpu": (
        ("toy32", "toy64", "toy128"),
        (2**16, 3 * 2**15, 2**17, 2**18),
        "stdlib",
        320,
        ("--seq", "128", "--batch", "4"),
    ),
    "cuda": (
        ("30M", "50M", "100M"),
        (25e6, 50e6, 100e6, 200e6),
        "python",
        0,
        ("--batch", "256", "--compile"),
    ),
}
# What a log says of its corpus; nothing in an older one.
CORPUS = ("fingerprint", "vocabulary")
# Rows of fp4/recipes.py in the words of the authors' runs: (forward, backward). Any other row is a
# method of its own, forward and backward.
# The authors' runs of RTN-absmax and SR-absmax had their random signs on the wrong side of the
# rotation, where they do nothing, and fp4 and fp4-sr have not. Quartet II ran both: eff_D is 0.934
# with these signs and 0.936 with the right ones.
METHODS = {
    "bf16": ("BF16", "BF16"),
    "fp4": ("QuEST", "RTN-absmax"),
    "fp4-sr": ("QuEST", "SR-absmax"),
    "fp4-fwd": ("QuEST", "BF16"),
    "fp4-bwd": ("BF16", "RTN-absmax"),
}
# A run may be resumed with these changed and still obey the law of its size and length.
MAY_CHANGE = (*LENGTHS, *HARMLESS)


class Unfinished(Exception):
    """Says in a sentence why a log is not one of a finished run."""


# ---- training

def sweep(out, data=""):
    """
    Trains what is missing of the sweep for this machine, in folders under `out`.

    data is a corpus of quartet.py, in place of the sweep's own. A run that was interrupted goes on
    from its checkpoint.
    """
    on_gpu = torch.cuda.is_available()
    sizes, budgets, corpus, vocab, flags = SWEEPS["cuda" if on_gpu else "cpu"]
    PRESETS.update(TOY)                 # This happens here only: nothing else has use for them.
    if not on_gpu:
        torch.set_num_threads(1)        # On a busy machine two threads are many times slower.
    if not data:
        data = corpus
        if vocab:
            data = prepare.prepare(corpus, vocab, out=os.path.join(out, "corpus"))
    configs = [settings_of_run(out, size, precision, budget, data, flags)
               for budget in budgets for size in sizes for precision in ("bf16", "fp4")]
    with signals.become_exceptions():
        finish(configs, quartet.train, quartet.__file__)


def settings_of_run(out, size, precision, budget, data, flags):
    """The settings of the run on `budget` tokens. It is evaluated half way and at the end: a loss
    that rises in between has diverged."""
    cfg = quartet.resolve(quartet.parse([
        "--size", size,
        "--precision", precision,
        "--tokens", f"{budget:.0f}",
        "--out", out,
        "--name", f"{size}-{precision}-{budget / 1e6:.3g}M",
        "--data", data,
        *flags,
    ]))
    steps = schedule.n_steps(cfg, n_params=0)    # Of no interest, as the tokens are given.
    return dataclasses.replace(cfg, eval_every=max(1, steps // 2))


# ---- collecting

def read_finished(log_path):
    """Returns a log.csv as a row of the fit's input. Raises Unfinished where it cannot be one."""
    try:
        log = read_log(log_path)
        steps, row = describe_run(log.config)
    except (OSError, ValueError) as error:
        raise Unfinished(str(error))
    except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
        # A setting is missing in the log, or has a value that was never possible.
        raise Unfinished(f"not a log of quartet.py ({type(error).__name__}: {error})")

    otherwise = resumed_otherwise(log, MAY_CHANGE)
    if otherwise:
        raise Unfinished(", ".join(otherwise))
    if log.divergence:
        raise Unfinished(log.divergence)
    if row["tokens"] <= 0:
        raise Unfinished("not a log of quartet.py (it does not tell how long the run is)")
    done = log.history[-1].step if log.history else 0
    if done < steps:
        raise Unfinished(f"ended at step {done} of {steps}: interrupted or diverged")
    if not log.vals or not math.isfinite(log.vals[-1]):
        raise Unfinished("diverged: no finite validation loss at the end")
    first, last = log.vals[0], log.vals[-1]
    if last > first:
        raise Unfinished(f"diverged: validation loss {first} at first, {last} at the end")
    row["loss"] = last
    row["run"] = os.path.dirname(log_path)
    for part in CORPUS:
        row[part] = log.corpus.get(part, "")
    return row


def describe_run(config):
    """
    Returns the length of a run in steps, and its row of the fit's input.

    config is the log's. The row has its columns in order, the loss and the folder still empty.
    """
    cfg = SimpleNamespace(**config)
    preset = (PRESETS | TOY)[cfg.size]
    n_params = count_params(preset.n_layer, preset.n_embd)
    steps = schedule.n_steps(cfg, n_params)
    forward, backward = method_names(config)
    row = {
        "params": n_params,
        "tokens": steps * cfg.batch * cfg.seq,
        "forward": forward,
        "backward": backward,
        "loss": math.nan,
        "run": "",
        "data": cfg.data,
        "seq": cfg.seq,
    }
    return steps, row


def method_names(config):
    """Returns (forward, backward) of a run; an axis that was changed is part of the names, and so
    is a switch to another recipe."""
    precision = config["precision"]
    forward, backward = METHODS.get(precision, (precision, precision))
    changes = "".join(f" {axis}={config[axis]}" for axis in AXES if config.get(axis))
    if forward != "BF16":
        forward += changes
    if backward != "BF16":
        backward += changes
    switch = f" switch={config['switch']}" if config.get("switch") else ""
    return forward + switch, backward + switch


def collect(patterns):
    """
    Reads the logs that these patterns match.

    Returns the rows of the finished runs, and sentences on what was left out. Raises UserError if
    there is no such run, or if the runs mix corpora or lengths of sequences: their losses do not
    compare.
    """
    paths = []
    for pattern in patterns:
        paths += glob.glob(pattern) or [pattern]
    # By folder, NAME comes before NAME.1, which is an earlier run that was set aside.
    paths.sort(key=os.path.dirname)

    rows = []
    left_out = []
    folder_of_run = {}
    for path in paths:
        try:
            row = read_finished(path)
        except Unfinished as reason:
            left_out.append(f"{path}: {reason}")
            continue
        kind = tuple(row[column] for column in COLUMNS[:4])     # all but the loss
        if kind in folder_of_run:
            left_out.append(f"{path}: the same run as {folder_of_run[kind]}")
            continue
        folder_of_run[kind] = row["run"]
        rows.append(row)
    check(rows, f"there is no finished run: {'; '.join(left_out)}")
    for column in ("data", "seq", *CORPUS):
        check_same(rows, column)
    return rows, left_out


def check_same(rows, column):
    """Raises UserError if the runs are known to differ in what changes the meaning of a loss."""
    folder_of_value = {row[column]: row["run"] for row in rows if row[column] != ""}
    values = ", ".join(f"{value} in {folder}" for value, folder in folder_of_value.items())
    check(len(folder_of_value) < 2,
          f"these runs differ in their {column} and cannot obey one law: {values}")
