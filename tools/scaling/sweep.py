"""
A sweep of one's own. `sweep` trains sizes x tokens x (bf16, fp4) with quartet.py; interrupted, it continues with the
first run that is not finished. On a GPU it is a small real one; on a CPU a toy of minutes, with a law of its own that
its intervals call uncertain. `collect` turns the logs of finished runs into the fit's input.
"""
import glob, math, os
import torch
import quartet
from data import prepare, tokens
from fp4 import AXES
from model import SIZES
from scaling.logs import read
from scaling.runs import COLUMNS, Stop, check
from scaling.speeds import params

# layers, width, heads, lr: below tiny; with one layer and a small vocabulary size matters within minutes
TOY = {f"toy{C}": (1, C, 1, .256 / C) for C in (32, 64, 128)}
SWEEPS = {  # sizes, tokens, corpus, its vocabulary if not the usual one, flags
    "cpu":  (TOY, (2**16, 3 * 2**15, 2**17, 2**18), "stdlib", 320, ("--seq", "128", "--batch", "4")),
    "cuda": (("30M", "50M", "100M"), (25e6, 50e6, 100e6, 200e6), "python", 0, ("--batch", "256", "--compile"))}

# a row of fp4/recipes.py in the words of the authors' runs; any other row is a method of its own, forward and backward
METHODS = {"bf16": ("BF16", "BF16"), "fp4": ("QuEST", "RTN-absmax"), "fp4-sr": ("QuEST", "SR-absmax"),
           "fp4-fwd": ("QuEST", "BF16"), "fp4-bwd": ("BF16", "RTN-absmax")}


def sweep(out, data=""):
    sizes, budgets, corpus, vocab, flags = SWEEPS["cuda" if torch.cuda.is_available() else "cpu"]
    SIZES.update(TOY)                                           # here only: they serve nothing else
    if not torch.cuda.is_available(): torch.set_num_threads(1)  # on a busy machine two are many times slower
    try: data = data or (prepare.prepare(corpus, vocab, out=os.path.join(out, "corpus")) if vocab else corpus)
    except tokens.DataError as error: raise Stop(str(error))
    for budget in budgets:
        for size in sizes:
            for precision in ("bf16", "fp4"):
                name = f"{size}-{precision}-{budget / 1e6:.3g}M"
                log = os.path.join(out, name, "log.csv")
                if os.path.exists(log) and isinstance(finished(log), dict): continue
                code = quartet.cli(["--size", size, "--precision", precision, "--tokens", f"{budget:.0f}", "--out", out,
                                    "--name", name, "--data", data, "--eval_every", "1000000", *flags])
                check(code != 130 and os.path.exists(log), f"stopped at {name}; the same command continues there")


def method(config):
    """(forward, backward) of a run; an axis that was changed is part of the names"""
    forward, backward = METHODS.get(config["precision"], (config["precision"],) * 2)
    changed = "".join(f" {axis}={config[axis]}" for axis in AXES if config.get(axis))
    return tuple(name if name == "BF16" else name + changed for name in (forward, backward))


def finished(path):
    """the run of one log.csv as a line of the fit's input, or a sentence on why it is none"""
    try:
        log = read(path)
        config, vals = log.config, log.vals
        layers, C, _, _ = (SIZES | TOY)[config["size"]]
        N, a_step = params(layers, C), config["batch"] * config["seq"]
        steps = config["steps"] or int((config["tokens"] or config["tokens_per_param"] * N) // a_step)
        done = log.history[-1][0] if log.history else 0
        forward, backward = method(config)
        run = dict(params=N, tokens=steps * a_step, forward=forward, backward=backward, loss=vals and vals[-1],
                   run=os.path.dirname(path), data=config["data"], seq=config["seq"])
    except (OSError, ValueError) as error: return str(error)
    except (KeyError, TypeError) as error: return f"not a log of quartet.py ({type(error).__name__}: {error})"
    if done < steps: return f"ended at step {done} of {steps}: interrupted or diverged"
    if not (vals and math.isfinite(vals[-1])): return "diverged: no finite validation loss at the end"
    if vals[-1] > vals[0]: return f"diverged: validation loss {vals[0]} at first, {vals[-1]} at the end"
    return run


def collect(patterns):
    """-> (rows, sentences on what was left out); refuses to mix corpora: their losses do not compare"""
    rows, left_out, seen = [], [], {}
    paths = [path for pattern in patterns for path in glob.glob(pattern) or [pattern]]
    for path in sorted(paths, key=os.path.dirname):             # NAME before NAME.1, an earlier run that was set aside
        run = finished(path)
        key = isinstance(run, dict) and tuple(run[column] for column in COLUMNS[:4])
        if not key: left_out.append(f"{path}: {run}")
        elif key in seen: left_out.append(f"{path}: the same run as {seen[key]}")
        else:
            seen[key] = run["run"]
            rows.append(run)
    check(rows, f"there is no finished run: {'; '.join(left_out)}")
    for what in "data", "seq":
        values = {run[what]: run["run"] for run in rows}
        check(len(values) == 1, f"these runs differ in --{what} and cannot obey one law: "
                                + ", ".join(f"{value} in {run}" for value, run in values.items()))
    return rows, left_out
