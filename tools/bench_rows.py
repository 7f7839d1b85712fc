"""
What a training step of each row of fp4/recipes.py costs beside compiled BF16: the 30M model, 64
sequences of 512 tokens. Its time, its memory, and how long one waits for the first step.

    python -m tools.bench --only rows       # prints only, as python -m tools.bench_rows does
    python -m tools.bench_rows --write      # rewrites the table of fp4/README.md

As in bench.py each row has a process of its own. The rows of a group compile side by side, each
with an empty cache, and then take turns with bf16, which is in every group. A row that waits holds
its weights but no activations, so that more rows fit into memory together.

A row that fails, or whose first step takes more than two minutes, is a line that says so.
"""
import concurrent.futures
import contextlib
import datetime
import itertools
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from concurrent.futures.process import BrokenProcessPool

from data.files import atomic_write_text, checked
from fp4.recipes import RECIPES
from tools import cli


def parse(argv):
    parser = cli.Parser("python -m tools.bench_rows", __doc__)
    parser.add_argument("--write", action="store_true", help="rewrite the table of the README")
    return parser.parse_args(argv)


# The imports below take seconds, so that --help and mistyped flags are answered here.
if __name__ == "__main__":
    cli.start(parse, "bench_rows", "tools.bench_rows")

import torch

from tools import bench, machine
from tools.bench_report import ratio_to_bf16, show, step_name
from tools.markdown import bullets, rewrite, table

RESULTS = os.path.join(bench.FP4_FOLDER, "build", "rows.json")
SIZE = "30M"
# Rows that are changed by flags of quartet.py.
VARIANTS = ["fp4 --scale mse", "fp4 --scale absmax", "fp4 --rotation 128", "fp4 --rounding eden"]
TURNS = 6                               # of each row; one more comes first and does not count
PATIENCE = 120                          # seconds until the first step, in which Python starts, too
MOST_AT_A_TIME = 8
GIB_OF_A_ROW = 9                        # while the rows of a group compile, all may hold so much


# ---- in the process of a row

def start_process(cores, cache):
    """The compiler finds nothing that an earlier run, or another row, has left."""
    folder = tempfile.mkdtemp(dir=cache)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
    os.environ["TRITON_CACHE_DIR"] = os.path.join(folder, "triton")
    bench.start_process(cores, "auto")


def attempt(f, *args):
    """What f(*args) returns, or {"failed": why}."""
    try:
        return f(*args)
    except Exception as error:          # Of any kind: it is a line of the table.
        return {"failed": f"{type(error).__name__}: {machine.first_line(error)}"}


def first_step(row):
    """{"first_s": seconds until the first step is done}; {} where memory does not suffice."""
    seconds = bench.if_it_fits(bench.prepare_step, SIZE, row)
    torch.cuda.empty_cache()
    return {} if seconds is None else {"first_s": seconds}


def time_step():
    """The burst of a step. Others get the memory afterwards, and before it a step that is not timed
    takes it from the GPU again."""
    bench.Held.step()
    times = bench.time_step()
    torch.cuda.empty_cache()
    return times


# ---- the process that asks

class RowFailed(Exception):
    """A row that failed when it took its turn."""

    def __init__(self, row, why):
        super().__init__(row, why)
        self.row = row
        self.why = why


class Process:
    """The process of a row, which begins with its first step. pool is a ProcessPoolExecutor of one.
    """

    def __init__(self, row, pool):
        self.row = row
        self.pool = pool
        self.id = pool.submit(os.getpid)        # This starts it.
        self.first = pool.submit(attempt, first_step, row)

    def answer(self, ask, seconds):
        """What comes of the future that ask() returns: {"failed": why} if nothing does within so
        many seconds. The process is killed then."""
        try:
            return ask().result(max(0, seconds))
        except concurrent.futures.TimeoutError:
            os.kill(self.id.result(), signal.SIGKILL)
            return {"failed": f"more than {PATIENCE} s"}
        except BrokenProcessPool:
            return {"failed": "its process has died"}

    def first_answer(self, deadline):
        """The answer to first_step, if it comes before a deadline."""
        return self.answer(lambda: self.first, deadline - time.monotonic())

    def take_turn(self):
        times = self.answer(lambda: self.pool.submit(attempt, time_step), PATIENCE)
        if "failed" in times:
            raise RowFailed(self.row, times["failed"])
        return times


def measure_group(rows):
    """{row: what was measured}: the seconds until its first step, its times and memory; or
    {"failed": why}; or {} where memory does not suffice."""
    context = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack:
        cache = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
        shared = max(1, os.cpu_count() // len(rows)), cache
        deadline = time.monotonic() + PATIENCE
        processes = {}
        for row in rows:
            pool = concurrent.futures.ProcessPoolExecutor(1, context, start_process, shared)
            processes[row] = Process(row, stack.enter_context(pool))
        entries = {row: processes[row].first_answer(deadline) for row in rows}
        take_turns(processes, entries)
    return entries


def take_turns(processes, entries):
    """Adds times to the entries of the rows that have done a step. One that fails is left out, and
    the others begin again."""
    while True:
        bursts = {row: [processes[row].take_turn] for row, entry in entries.items()
                  if "first_s" in entry and "failed" not in entry}
        try:
            times = bench.medians(bench.rounds(bursts, TURNS))
        except RowFailed as failure:
            entries[failure.row]["failed"] = failure.why
            continue
        for row in times:
            entries[row].update(times[row])
        return


def groups(rows, memory, most=MOST_AT_A_TIME):
    """Yields groups of rows, with bf16 first in each, which fit into these GiB of memory."""
    others = iter([row for row in rows if row != "bf16"])
    at_a_time = min(most, int(memory // GIB_OF_A_ROW))
    while group := list(itertools.islice(others, max(1, at_a_time - 1))):
        yield ["bf16", *group]


def measure(rows, memory):
    """Yields {row: what was measured} of all rows so far, after each group."""
    entries = {}
    for group in groups(rows, memory):
        found = measure_group(group)
        crowded_out = [row for row in group if found[row] == {}]
        for row in crowded_out:         # Others were compiling beside it.
            found[row] = measure_group(list(dict.fromkeys(["bf16", row])))[row]
        for row in group:
            entries.setdefault(row, found[row])
            bench.log(f"row {row}: {entries[row].get('failed') or bench.in_words(entries[row])}")
        yield entries


# ---- the table

ABOUT = f"""\
A training step of {step_name(SIZE)} tokens, of every row of recipes.py and of some that flags
change, made and timed as above: each takes turns with bf16, in {TURNS} rounds. First step: seconds
from making the model to the end of its first step, with an empty cache, while other rows compile
beside it. A row that has not done it after {PATIENCE} s is given up."""


def report(results):
    """What is between the markers of the README."""
    title = f"`python -m tools.bench_rows` on one {results['gpu']} (torch {results['torch']}, " \
            f"{results['date']})"
    entries = results["entries"]
    failures = [f"{row}: {entry['failed']}" for row, entry in entries.items() if "failed" in entry]
    parts = [title, ABOUT, row_table(entries)]
    return "\n\n".join(parts + ([bullets(failures)] if failures else []))


def row_table(entries):
    lines = []
    for row, entry in entries.items():
        time_or_why = "failed" if "failed" in entry else show(entry.get("ms"), ".1f")
        lines.append([
            f"`{row}`",
            time_or_why,
            ratio_to_bf16(entry, entries["bf16"]),
            f"{entry['peak_gib']:.2f}" if "peak_gib" in entry else "",
            f"{entry['first_s']:.0f}" if "first_s" in entry else "",
        ])
    return table(["row", "ms", "/ bf16", "peak GiB", "first step, s"], lines)


# ---- main

def main(argv):
    args = parse(argv)
    checked(bench.load_kernels, "auto")      # Later, all processes find them compiled.
    memory = torch.cuda.get_device_properties().total_memory / 2 ** 30
    results = dict(gpu=torch.cuda.get_device_name(), torch=torch.__version__,
                   date=str(datetime.date.today()))
    start = time.perf_counter()
    for entries in measure([*RECIPES, *VARIANTS], memory):
        results["entries"] = entries
        atomic_write_text(RESULTS, json.dumps(results, indent=1))       # It is not lost.
    bench.log(f"rows: {time.perf_counter() - start:.0f} s")
    text = report(results)
    print(text)
    if args.write:
        rewrite(bench.README, text, "rows")


if __name__ == "__main__":
    sys.exit(cli.run(main, sys.argv[1:], "bench_rows", go_on=""))
