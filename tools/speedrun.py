"""
One fixed task, against the clock: a 30M model, every linear product of whose blocks is in 4 bits,
is trained on the corpus `python` until its validation text takes at most TARGET bits per byte.

    make speedrun                                           # the row fp4
    python -m tools.speedrun --precision fp4 --post_step cage --steps 2000 --lr 2e-3
    python -m tools.speedrun --write                        # and its row goes into README.md
    python -m tools.speedrun out/speedrun/NAME/log.csv --write      # of a run that is there

The flags are those of quartet.py (`python quartet.py --help`), which trains the run, but for what
makes the task: size, corpus, vocabulary, seed, evaluations, and blocks that are not quantised.
Which recipe, how many steps, of how many sequences, with which learning rate: that is everybody's
own choice.

The clock is that of modded-nanogpt (github.com/KellerJordan/modded-nanogpt). It counts training
steps, from the first one to the evaluation at which the target is reached, and neither evaluations
nor compilation. There the kernels are compiled and warmed up before the clock starts. Here the
steps in which that happens are in the log: the first WARM_UP of a run, and the first ones after it
was resumed or has switched to another recipe. Each of them counts as much as the median step.
"""
import os
import shutil
import statistics
import sys
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

from data.files import UserError, check
from tools import cli

if __name__ == "__main__":
    cli.start(partial(cli.answer_help, __doc__), "speedrun", "tools.speedrun")

import quartet
from model import PRESETS
from tools import markdown, schedule
from tools.run import LENGTHS, git_commit, label, log_path, read_log, read_text

# In bits per byte of the validation text. It is to be set by the first run: to what the row fp4 has
# at the end of LENGTH, rounded up to three decimals. None: there has been no run.
TARGET = None
LENGTH = "--tokens_per_param=20"        # where no other is given
WARM_UP = 2                             # steps that compile, and record CUDA graphs
FOUR_BITS = ("mxfp4", "nvfp4", "int4")  # formats
FOUR_BITS_METHODS = ("-fp4", "-int4")   # how the names of such methods end
# What is a matter of the machine or of the recipe may be typed; this may not.
FIXED = ("size", "data", "vocab", "seed", "seeds", "eval_every", "keep_first", "keep_last", "jobs",
         "sample", "discard")
HERE = os.path.dirname(os.path.abspath(__file__))
README = os.path.join(HERE, "README.md")
LOGS = os.path.join(HERE, "speedruns")
HEAD = ["time", "recipe", "steps", "GPU", "commit", "corpus", "log"]


class Task(NamedTuple):
    """What is the same for all."""
    flags: str                          # of quartet.py
    target: float                       # in bits per byte; None: not set yet
    device: str                         # the kind that it is trained on


TASK = Task("--size 30M --data python --vocab 4096 --seed 0 --eval_every 25 --keep 1 "
            "--sample_tokens 0 --out out/speedrun", TARGET, "cuda")


def main(argv, task=TASK):
    """Train a run, or read the log of one, and print its row of the table; --write adds it."""
    is_written = "--write" in argv
    argv = [argument for argument in argv if argument != "--write"]
    logs = [argument for argument in argv if argument.endswith(".csv")]
    if is_written:
        check("-dirty" not in git_commit(),
              "a record names the commit that anybody can run: commit your changes before --write")
    if logs:
        check(len(argv) == 1, "give one log.csv, and no flags beside it but --write")
        path = logs[0]
        check(os.path.isfile(path), f"there is no {path}")
    else:
        path = train(argv, task)
    try:
        run = read_log(path)
    except ValueError as error:
        raise UserError(f"{path}: {error}")
    tell(run, path, task, is_written)


# ---- the run

def train(argv, task):
    """Train with these flags of quartet.py; returns the path of the log."""
    cfg, flags = settings_of(argv, task)
    quartet.main(flags)
    return log_path(cfg.folder)


def settings_of(argv, task):
    """The settings of a run, and all of its flags. Raises UserError for one that is not the task.
    """
    check(not cli.is_one_of_many(), "a speedrun is one process on one GPU: leave torchrun out")
    typed = cli.given(quartet.Settings, argv)
    fixed = [f"--{name}" for name in FIXED if name in typed]
    check(not fixed, f"the task says what {' and '.join(fixed)} is: leave it out")
    length = [] if typed & set(LENGTHS) else [LENGTH]
    flags = [*task.flags.split(), *length, *argv]
    configs = list(quartet.expand_runs(quartet.parse(flags)))
    check(len(configs) == 1, "a speedrun is one run: give one recipe, not a list")
    cfg = configs[0]
    check_recipes(cfg)
    check(cfg.device.startswith(task.device), f"a speedrun is trained on {task.device}, and here "
                                              f"it would be {cfg.device}")
    return cfg, flags


def check_recipes(cfg):
    """Raises UserError if a product of a linear layer is not in 4 bits in some phase of a run."""
    for recipe in schedule.recipes_of(cfg):
        wide = products_not_in_4_bits(recipe)
        check(not wide, f"a speedrun has every linear product in 4 bits, and {label(vars(cfg))} "
                        f"has {' and '.join(wide)} in more")


def products_not_in_4_bits(recipe):
    """The names of a recipe's products whose operands are not both in 4 bits."""
    names = ["forward", "dgrad", "wgrad"]
    if recipe.method:                   # It has no columns, but a name that says its format.
        return [] if recipe.method.endswith(FOUR_BITS_METHODS) else names
    return [name for name in names
            if not all(is_in_4_bits(getattr(row, name)) for row in (recipe, recipe.down))]


def is_in_4_bits(spec):
    """Are both operands of a product in 4 bits? None is one that is not quantised."""
    return spec is not None and {spec.left.format, spec.right.format} <= set(FOUR_BITS)


# ---- the clock

def reached(row, target):
    """Is this Step an evaluation at which the target is reached?"""
    return row.bpb is not None and row.bpb <= target


def steps_to(run, target):
    """The Steps up to the first one at which the target is reached; [] if none does."""
    for number, row in enumerate(run.history, 1):
        if reached(row, target):
            return run.history[:number]
    return []


def seconds_of(run, rows):
    """How long these Steps of a Run have taken; those that warm up count as the median of others.
    """
    warming = {begin + n for begin in beginnings(run) for n in range(1, WARM_UP + 1)}
    others = [row.ms for row in rows if row.step not in warming]
    typical = statistics.median(others or [row.ms for row in rows])
    return sum(typical if row.step in warming else row.ms for row in rows) / 1000


def beginnings(run):
    """After how many steps a process has begun to train, or another recipe has begun."""
    cfg = SimpleNamespace(**run.config)
    steps = schedule.n_steps(cfg, PRESETS[cfg.size].n_params)
    switches = schedule.ends_of(cfg, steps)[:-1]
    return {0, *switches, *(entry["step"] for entry in run.resumed)}


# ---- what is said and written

def tell(run, path, task, is_written):
    """Print what came of a Run, and add its row to the table if that is asked for."""
    check(run.vals, f"{path} has no evaluation")
    best = min((row.bpb for row in run.history if row.bpb is not None), default=None)
    check(task.target is not None,
          f"there is no target yet, so that no time can be told: {path} came to {best} bits per "
          "byte, and the end of the row fp4 is what TARGET in tools/speedrun.py is to be set to")
    rows = steps_to(run, task.target)
    check(rows, f"{path} did not reach {task.target} bits per byte, but {best}")
    name = label(run.config)
    seconds = seconds_of(run, rows)
    print(f"{seconds:.1f} s to {rows[-1].bpb:.4f} bits per byte (target {task.target}), in "
          f"{rows[-1].step:,} steps\nrecipe {name}\nGPU {run.device}\ncommit {run.commit}\n"
          f"log {path}")
    record = [f"{seconds:.1f} s", name, f"{rows[-1].step:,}", run.device, run.commit,
              str(run.corpus.get("fingerprint", "unknown"))]
    if is_written:
        record.append(add_record(record, run, path))
    print(markdown.table(HEAD[:len(record)], [record]))


def add_record(record, run, path):
    """Keep the log of a record in speedruns/, and put its row into README.md; returns the link."""
    check("-dirty" not in run.commit and run.commit != "unknown",
          f"{path} is of the code {run.commit}, which nobody else has: train it from a commit")
    name = f"{label(run.config)}-{run.commit}-{record[0].removesuffix(' s')}.csv"
    kept = os.path.join(LOGS, name)
    check(not os.path.lexists(kept), f"{kept} is there already: this run is in the table")
    link = f"[log](speedruns/{name})"
    lines = sorted([*records(read_text(README)), [*record, link]], key=seconds_in)
    markdown.rewrite(README, markdown.table(HEAD, lines), "speedrun")
    os.makedirs(LOGS, exist_ok=True)
    shutil.copyfile(path, kept)
    return link


def records(text):
    """The rows of the table of records in a README, each a list of cells."""
    part = text.partition("<!-- speedrun -->")[2].partition("<!-- /speedrun -->")[0]
    lines = [line for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def seconds_in(line): return float(line[0].removesuffix(" s"))


if __name__ == "__main__":
    sys.exit(quartet.run_cli(sys.argv[1:], main))
