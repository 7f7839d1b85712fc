"""What a run of quartet.py was: its label, and its log.csv"""
import csv, json, math
from typing import NamedTuple
from fp4 import AXES


def label(config):
    """fp4-nearest, fp4-rotation-128, fp4-keep_first-1-seed2"""
    alone = lambda axis, v: axis == "scale" or not v.isdigit() and sum(v in choices for choices in AXES.values()) == 1
    parts = [v if alone(axis, v) else f"{axis}-{v}" for axis in AXES if (v := config.get(axis))]
    parts += [f"{name}-{n}" for name in ("keep_first", "keep_last") if (n := config.get(name))]
    return "-".join([config["precision"], *parts, *[f"seed{config['seed']}"] * bool(config.get("seed"))])


class Run(NamedTuple):
    """what a log.csv says"""
    config: dict
    device: str
    history: list       # (step, loss, val loss or None, tokens/s), one a step
    date: str           # when it was finished; "": it was not
    memory: str

    vals     = property(lambda self: [row[2] for row in self.history if row[2] is not None])
    broken   = property(lambda self: bool(self.history) and not math.isfinite(self.history[-1][1]))
    ended    = property(lambda self: bool(self.date) or self.broken)
    diverged = property(lambda self: self.broken or not self.vals[-1] <= self.vals[0])      # NaN, or higher than at first


def read(path): return parse(open(path).read())


def split(text):
    """the logs of a file of several, one after the other"""
    return ["# commit" + part for part in text.split("# commit")[1:]]


def thin(text):
    """what is worth keeping of a log: its head and end, and of its steps the evaluated and the last"""
    lines = text.splitlines()
    last = max(i for i, line in enumerate(lines) if not line.startswith("#"))
    kept = [line for i, line in enumerate(lines) if line.startswith("#") or i == last or line.split(",")[2]]
    return "".join(line + "\n" for line in kept)


def parse(text):
    """a ValueError says in a sentence what is wrong"""
    try:
        lines = text.splitlines()
        said = dict(line[2:].split(" ", 1) for line in lines if line.startswith("# "))
        rows = csv.DictReader(line for line in lines if not line.startswith("#"))
        rows = [row for row in rows if row["mfu"]]              # without: the line was cut off
        loss = lambda row: float(row["loss"]) if math.isfinite(float(row["norm"])) else math.nan
        val = lambda row: float(row["val"]) if row["val"] else None
        history = [(int(row["step"]), loss(row), val(row), float(row["tokens_per_s"])) for row in rows]
        date, _, memory = said.get("finished", "").partition(", peak memory ")
        return Run(json.loads(said["config"]), said["device"], history, date, memory)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"not a log of quartet.py ({type(error).__name__}: {error})")
