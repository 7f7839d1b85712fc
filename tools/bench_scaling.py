"""
What several GPUs make of a training step: tokens a second, memory, and bytes sent to other GPUs.

    python -m tools.bench_scaling                       # prints only
    python -m tools.bench_scaling --write               # rewrites the tables of fp4/README.md
    python -m tools.bench_scaling --gpus 1,2 --sizes 800M --rows bf16,fp4 --ways sharded
    python -m tools.bench_scaling --device cpu          # the tiny model, to try it without a GPU

Each GPU has the same sequences in a step, however many GPUs there are. So N GPUs that cost nothing
would make N times the tokens of one. The model has two ways to spread, as in quartet.py: every GPU
has all of it (ddp), or strips of it (sharded). On one GPU it is neither.

For each number of GPUs torchrun starts as many processes, which measure one cell after the other: a
size, a way and a row of fp4/recipes.py. After each cell fp4/build/scaling.json has what is known so
far, and --resume measures only what is not in it. Where a process runs out of memory in the middle
of an exchange, the others cannot go on; then torchrun starts anew with the next cell.
"""
import dataclasses
import datetime
import gc
import itertools
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from typing import NamedTuple

from data.files import atomic_write_text, check
from fp4.recipes import RECIPES
from tools import cli


class Load(NamedTuple):
    """What one GPU has to do in a step of a size."""
    micro: int                          # sequences in a microbatch
    seq: int                            # tokens in a sequence
    n_micro: int                        # microbatches
    n_timed: int                        # steps that are timed
    ways: tuple = ("ddp", "sharded")    # with several GPUs, unless --ways says otherwise
    by_block: bool = False              # compiled block by block, as sharded models always are


# To compile many blocks as one graph takes a minute. So deep models are compiled block by block on
# one GPU, too, and what is compared is the same code.
LOADS = {
    "tiny": Load(1, 64, 2, 1),
    "30M": Load(64, 512, 1, 5),
    "800M": Load(16, 512, 8, 5),
    "3200M": Load(4, 512, 4, 3, ("sharded",), by_block=True),
    "7B": Load(2, 512, 4, 3, ("sharded",), by_block=True),
}
WAYS = ("ddp", "sharded")
ONE = "one GPU"                         # the way of a model that is not spread
WARM_UP = 2                             # steps that are not timed; the first one compiles
BYTES_A_PARAMETER = 16                  # the weight, its gradient and AdamW's two means, in float32


def parse(argv):
    parser = cli.Parser("python -m tools.bench_scaling", __doc__)
    parser.add_argument("--gpus", help="numbers of GPUs; default: 1, 2, 4, ... and all there are")
    parser.add_argument("--sizes", help="default: " + listed(list(LOADS)[1:]))
    parser.add_argument("--rows", default="bf16,fp8,fp4", help="default: bf16,fp8,fp4")
    parser.add_argument("--ways", help="ddp,sharded; default: both, for large sizes sharded only")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"),
                        help="cpu: two processes and no GPU")
    parser.add_argument("--write", action="store_true", help="rewrite the tables of the README")
    parser.add_argument("--resume", action="store_true",
                        help="measure only what today's scaling.json does not have")
    parser.add_argument("--measure", metavar="FILE",
                        help="internal: be one of the processes that measure the cells in FILE")
    args = parser.parse_args(argv)
    args.sizes = chosen(args.sizes, LOADS, "size")
    args.rows = chosen(args.rows, RECIPES, "row")
    args.ways = chosen(args.ways, WAYS, "way")
    check(not (args.write and args.device == "cpu"), "the tables of the README are those of GPUs")
    return args


def chosen(text, known, what):
    """The names in a comma list, checked; None if there is none."""
    if text is None:
        return None
    names = text.split(",")
    for name in names:
        check(name in known, f"{what} {name!r} is not one of {listed(known)}")
    return names


def listed(values): return ", ".join(map(str, values))


# The imports below take seconds, so that --help and mistyped flags are answered here.
if __name__ == "__main__":
    cli.start(parse, "bench_scaling", "tools.bench_scaling")

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fp4
import quartet
from fp4 import stored_weight
from model import PRESETS, count_params, rope_table
from tools import machine, processes
from tools.bench_report import VOCABULARY
from tools.markdown import bullets, rewrite, table

FP4_FOLDER = os.path.dirname(os.path.abspath(fp4.__file__))
README = os.path.join(FP4_FOLDER, "README.md")
RESULTS = os.path.join(FP4_FOLDER, "build", "scaling.json")
PROGRAM = ("-m", "tools.bench_scaling")     # what torchrun starts


# ---- which cells there are

def numbers_of_gpus(text, device):
    """The numbers of GPUs, in ascending order. Raises UserError if torch does not see so many."""
    if device == "cpu":
        n_visible = os.cpu_count()
        text = text or "1,2"
    else:
        n_visible = torch.cuda.device_count()
        check(n_visible > 1, machine.unusable_gpu() or
              f"what several GPUs make of a step needs several, and torch sees {n_visible} here")
    if text is None:
        powers = [2 ** i for i in range(n_visible.bit_length())]
        return sorted({*powers, n_visible})
    check(re.fullmatch(r"\d{1,4}(,\d{1,4})*", text), f"--gpus {text}: must be numbers, as 1,2,4")
    numbers = sorted(set(map(int, text.split(","))))
    check(numbers[0] > 0, "--gpus 0: must be 1 or more")
    check(numbers[-1] <= n_visible, f"--gpus {numbers[-1]}: there are {n_visible}")
    return numbers


def plan(numbers, sizes, rows, ways, device):
    """Returns the cells in the order in which they are measured. A cell is a dictionary.

    One GPU comes first, so that inductor's cache on disk has its code for the others.
    """
    cells = []
    for n, size in itertools.product(numbers, sizes):
        for way in (ways or LOADS[size].ways) if n > 1 else (ONE,):
            cells += [dict(gpus=n, size=size, way=way, row=row, device=device) for row in rows]
    return cells


def n_parameters(size):
    """All parameters of a size, those of embedding and head, too."""
    preset = PRESETS[size]
    return count_params(preset.n_layer, preset.n_embd) + 2 * VOCABULARY * preset.n_embd


def may_fit(cell, memory):
    """Whether what the optimizer needs, without any activation, fits into these bytes of a GPU."""
    n_bytes = BYTES_A_PARAMETER * n_parameters(cell["size"])
    if cell["way"] == "sharded":
        n_bytes /= cell["gpus"]
    return n_bytes < memory


def memory_of(device):
    return math.inf if device == "cpu" else torch.cuda.get_device_properties(0).total_memory


# ---- one of the processes: a training step, as in quartet.py

def settings(cell):
    """The settings of quartet.py that train a cell."""
    load = LOADS[cell["size"]]
    return quartet.resolve(quartet.Settings(
        precision=cell["row"],
        size=cell["size"],
        seq=load.seq,
        batch=load.micro * load.n_micro * processes.size(),
        micro=load.micro,
        device=cell["device"],
        dtype="bfloat16",
        shard=cell["way"] == "sharded",
    ))


class Training:
    """The training of one cell on random tokens, from random weights.

    It begins in each process alone, so that a model that is not sharded has done a whole step, and
    has shown that it fits into memory, before the processes depend on each other.
    """

    def __init__(self, cfg, load):
        self.cfg = cfg
        self.load = load
        self.model = empty_model(cfg)
        processes.seed_step(cfg.seed, 0)
        if not cfg.shard:
            self.begin()
            self.step()

    def begin(self):
        fill(self.model)
        cfg = self.cfg
        by_block = dataclasses.replace(cfg, shard=cfg.shard or self.load.by_block)
        self.trained = quartet.compiled(self.model, by_block)
        self.optimizer = quartet.build_optimizer(self.model, cfg)
        shape = (4, 2, cfg.micro, cfg.seq)
        tokens = torch.randint(VOCABULARY, shape, device=cfg.device)
        self.batches = itertools.cycle(tokens.unbind())
        fp4.quantize_weights(self.model)

    def join(self):
        """Connects the models of all processes."""
        if self.cfg.shard:
            fp4.shard(self.model, self.model.blocks, self.cfg.device, self.model.dtype)
            self.begin()
        else:
            self.trained = processes.average_gradients(self.trained)
            fp4.quantize_weights(self.model)    # They are those of process 0 now.

    def step(self):
        n_micro = self.load.n_micro
        for i in range(n_micro):
            x, y = next(self.batches)
            fp4.mark_last(self.trained, i == n_micro - 1)
            loss = self.trained(x, y) / n_micro
            loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.cfg.clip)
        processes.number(norm)          # The trainer looks whether it is finite.
        self.optimizer.step()
        self.optimizer.zero_grad()
        fp4.quantize_weights(self.model)


def empty_model(cfg):
    """The model without values of its parameters.

    One that is to be sharded is in the machine's memory, but takes none there, because nobody has
    written to it yet. fp4.shard moves it to the GPU block by block, where fill() gives its strips
    values. So no GPU ever has to hold the whole model, and no CPU to draw billions of numbers.
    """
    with torch.device("meta"):
        # With shard, build_model leaves the model where it was made.
        model = quartet.build_model(dataclasses.replace(cfg, shard=True), VOCABULARY)
    model.to_empty(device="cpu" if cfg.shard else cfg.device)
    config = model.config
    cos, sin = rope_table(config.block_size, config.n_embd // config.n_head)
    model.cos.copy_(cos)
    model.sin.copy_(sin)
    return model


@torch.no_grad()
def fill(model):
    """Gives every parameter, or this process's strip of it, a value: the embedding and all matrices
    random ones, and the scales of the norms 1."""
    for parameter in model.parameters():
        values = stored_weight.local(parameter)
        if parameter.dim() == 2:
            values.normal_(std=0.02)
        else:
            values.fill_(1)


# ---- what is sent

# The collectives of torch.distributed: their kind, how often a GPU sends (N-1)/N of the whole data
# to its neighbour in a ring of N, and which argument is the whole data; None: it is the result.
COLLECTIVES = {
    "c10d::allreduce_": ("reductions", 2, 0),
    "c10d::allreduce_coalesced_": ("reductions", 2, 0),
    "c10d::_reduce_scatter_base_": ("reductions", 1, 1),
    "c10d::reduce_scatter_": ("reductions", 1, 1),
    "c10d::reduce_scatter_tensor_coalesced_": ("reductions", 1, 1),
    "c10d::_allgather_base_": ("gathers", 1, 0),
    "c10d::allgather_": ("gathers", 1, 0),
    "c10d::allgather_into_tensor_coalesced_": ("gathers", 1, 0),
    "_c10d_functional::all_reduce": ("reductions", 2, 0),
    "_c10d_functional::reduce_scatter_tensor": ("reductions", 1, 0),
    "_c10d_functional::all_gather_into_tensor": ("gathers", 1, None),
}
SEND_NOTHING = ("_c10d_functional::wait_tensor", "_c10d_functional::_wrap_tensor_autograd")


class Wire(TorchDispatchMode):
    """Counts the bytes that this GPU sends within a with statement: sent[kind][dtype].

    DDP's and FSDP2's collectives go through torch's dispatcher like all ops, those in the backward
    pass, too: autograd takes the mode along into its threads. Raises ValueError for a collective
    that is not in the table.
    """

    def __init__(self):
        super().__init__()
        self.sent = {"gathers": {}, "reductions": {}}

    @classmethod
    def ignore_compile_internals(cls):
        return True                     # Otherwise nothing that is compiled would run.

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented       # It comes back as what is done with the strips.
        result = op(*args, **(kwargs or {}))
        name = op.name().partition(".")[0]
        if op.namespace in ("c10d", "_c10d_functional") and name not in SEND_NOTHING:
            check(name in COLLECTIVES, f"the bytes of {name} are not counted")
            self.count(*COLLECTIVES[name], args, result)
        return result

    def count(self, kind, times, index, args, result):
        n = processes.size()
        for tensor in tree_leaves(result if index is None else args[index]):
            dtype = str(tensor.dtype).removeprefix("torch.")
            n_bytes = times * (n - 1) * tensor.nbytes / n
            self.sent[kind][dtype] = self.sent[kind].get(dtype, 0) + n_bytes


# ---- one of the processes: the measurements

def measure_cells(path):
    """Measures the cells in a file one after the other; writes into it after each."""
    with open(path) as file:
        results = json.load(file)
    with processes.joined(results["cells"][0]["device"]):
        for cell in results["cells"]:
            entry = {**cell, **measure(cell)}
            results["entries"].append(entry)
            processes.by_rank_0(lambda: atomic_write_text(path, json.dumps(results, indent=1)))
            print(f"{name_of(cell)}: {in_words(entry)}")
            forget(cell["device"])


def name_of(cell):
    return f"{cell['size']} {cell['row']}, {cell['way']}, on {cell['gpus']}"


def in_words(entry):
    if "tokens_per_s" not in entry:
        return entry.get("failed", "out of memory")
    return f"{entry['ms']:.1f} ms, {entry['tokens_per_s']:,.0f} tokens/s"


def forget(device):
    """Frees the memory of a cell. What is compiled stays on disk."""
    if device != "cpu":
        torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()


def measure(cell):
    """Returns what is measured in a cell: nothing if it does not fit into memory.

    Raises MemoryError in a process that runs out of memory where it cannot tell the others.
    """
    machine.forget_peak_memory(cell["device"])
    load = LOADS[cell["size"]]
    try:
        training = processes.all_or_none(lambda: fitting(Training, settings(cell), load))
        return fitting(time_and_count, training)
    except MemoryError as error:
        if not processes.all_have(error):
            raise
    return {}


def fitting(f, *args):
    """Returns f(*args). Where torch says that memory is used up, it is a MemoryError, as Python
    says it: the error that processes.all_or_none passes on."""
    try:
        return f(*args)
    except RuntimeError as error:
        if not machine.is_out_of_memory(error):
            raise
        raise MemoryError(f"out of memory: {machine.first_line(error)}")


def time_and_count(training):
    cfg = training.cfg
    load = training.load
    training.join()
    seconds = [seconds_of_step(training) for _ in range(WARM_UP + load.n_timed)][WARM_UP:]
    peak = 0 if cfg.device == "cpu" else torch.cuda.max_memory_allocated() / 2 ** 30
    *of_steps, peaks = zip(*processes.gather_numbers(*seconds, peak, device=cfg.device))
    # A step lasts until the slowest process has done it.
    median = statistics.median(max(of_step) for of_step in of_steps)
    entry = dict(ms=1000 * median, tokens_per_s=cfg.batch * cfg.seq / median)
    if cfg.device != "cpu":
        entry["peak_gib"] = max(peaks)
    if processes.size() > 1:
        with Wire() as wire:
            training.step()
        entry.update(wire.sent)
    return entry


def seconds_of_step(training):
    machine.synchronize(training.cfg.device)
    start = time.perf_counter()
    training.step()
    machine.synchronize(training.cfg.device)
    return time.perf_counter() - start


# ---- the process that starts the others

def measure_all(results, cells):
    """Measures these cells, and adds an entry for each to the results, which are on disk at any
    time."""
    memory = memory_of(cells[0]["device"])
    for n, of_n in itertools.groupby(cells, key=lambda cell: cell["gpus"]):
        of_n = list(of_n)
        results["entries"] += [cell for cell in of_n if not may_fit(cell, memory)]
        left = [cell for cell in of_n if may_fit(cell, memory)]
        while left:
            left = measure_some(results, left, n)


def measure_some(results, cells, n):
    """Starts torchrun once. Returns the cells that are left: none, or, if it fails, those after the
    one in which it has failed."""
    save({**results, "cells": cells})
    lines = run_torchrun(n)
    with open(RESULTS) as file:
        entries = json.load(file)["entries"]
    left = cells[len(entries) - len(results["entries"]):]
    if left:
        reason = why(lines)
        is_memory = "out of memory" in reason.lower()
        entries.append({**left[0], **({} if is_memory else {"failed": reason})})
        log(f"{name_of(left[0])}: {in_words(entries[-1])}")
    results["entries"] = entries
    save(results)
    return left[1:]


def save(results):
    os.makedirs(os.path.dirname(RESULTS), exist_ok=True)
    atomic_write_text(RESULTS, json.dumps(results, indent=1))


def run_torchrun(n):
    """Runs n processes that measure the cells in RESULTS. Returns the lines that they print, which
    go to stderr meanwhile."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               f"--nproc_per_node={n}", *PROGRAM, "--measure", RESULTS]
    threads = str(max(1, os.cpu_count() // n))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": threads}
    lines = []
    with subprocess.Popen(command, cwd=cli.ROOT, env=environment, text=True, errors="replace",
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        for line in process.stdout:
            log(line.rstrip("\n"))
            lines.append(line)
    return lines


def why(lines):
    """What the processes have said last before torchrun tells that one of them has ended, or that
    one is out of memory."""
    ours = itertools.takewhile(lambda line: "failed (exitcode" not in line, lines)
    said = [re.sub(r"^\[rank\d+\]: ?", "", line).strip() for line in ours
            if not re.match(r"[WEI]\d{4} ", line)]
    # Those that live tell only that another one does not.
    own = [line for line in said if line and "another process of this run" not in line]
    of_memory = [line for line in own if "out of memory" in line.lower()]
    return (of_memory or own or ["it ended without a word"])[-1]


def log(*words):
    print(*words, file=sys.stderr, flush=True)


# ---- tables

ABOUT = """\
Each GPU has the same sequences at every number of GPUs. "Of N x 1" is tokens a second divided by N
times those of one GPU. A time is the median over steps of the slowest process's, by the clock on
the wall; peak memory is the largest of all GPUs. ddp: every GPU has the whole model; sharded: each
has strips of it. A sharded model is compiled block by block, and so are 3200M and 7B on one GPU;
others are one graph."""

ABOUT_WIRE = """\
What one of {n} GPUs sends in a step, if each collective runs as a ring: (N-1)/N of the whole data
for a gather and for a reduce-scatter, twice as much for an all-reduce. Gathers bring weights, and
reductions sum gradients."""


def report(results):
    """What --write puts between the markers."""
    entries = results["entries"]
    numbers = sorted({entry["gpus"] for entry in entries})
    title = (f"`python -m tools.bench_scaling` on up to {numbers[-1]} x {results['gpu']} "
             f"(torch {results['torch']}, {results['date']})")
    parts = [title, ABOUT, speed_table(entries, numbers)]
    if numbers[-1] > 1:
        parts += [ABOUT_WIRE.format(n=numbers[-1]), wire_table(entries, numbers[-1])]
    failures = [f"{name_of(entry)}: {entry['failed']}" for entry in entries if "failed" in entry]
    if failures:
        parts += ["What failed:", bullets(failures)]
    return "\n\n".join(parts)


def speed_table(entries, numbers):
    """A line for each size, way and row; what one GPU does is in the lines of both ways."""
    by_cell = {(e["size"], e["way"], e["row"], e["gpus"]): e for e in entries}
    head = ["GPU's step", "way", "row"]
    for n in numbers:
        head += [f"{n}: tokens/s", *(["of N x 1"] if n > 1 else []), "GiB"]
    lines = []
    for size, way, row in lines_of(entries):
        line = [step_name(size), way, row]
        base = by_cell.get((size, ONE, row, 1), {})
        for n in numbers:
            entry = base if n == 1 else by_cell.get((size, way, row, n), {})
            line += [tokens_per_s(entry), *([of_one(entry, base)] if n > 1 else []), gib(entry)]
        lines.append(line)
    return table(head, without_repeats(lines))


def lines_of(entries):
    """(size, way, row) of the entries, each once, by size and way. One GPU has lines of its own
    only for what no others have done."""
    cells = dict.fromkeys((entry["size"], entry["way"], entry["row"]) for entry in entries)
    spread = {(size, row) for size, way, row in cells if way != ONE}
    lines = [cell for cell in cells if cell[1] != ONE or (cell[0], cell[2]) not in spread]
    ways = [ONE, *WAYS]
    return sorted(lines, key=lambda line: (list(LOADS).index(line[0]), ways.index(line[1])))


def without_repeats(lines):
    """The lines without the first two cells where they are those of the line before."""
    shown = []
    before = [None, None]
    for line in lines:
        is_same_step = line[0] == before[0]
        is_same_way = is_same_step and line[1] == before[1]
        shown.append(["" if is_same_step else line[0], "" if is_same_way else line[1], *line[2:]])
        before = line
    return shown


def step_name(size):
    load = LOADS[size]
    return f"{size}, {load.n_micro} x {load.micro} x {load.seq}"


def tokens_per_s(entry):
    if not entry:                       # It was not asked for.
        return ""
    if "tokens_per_s" not in entry:
        return "failed" if "failed" in entry else "out of memory"
    return f"{entry['tokens_per_s']:,.0f}"


def of_one(entry, base):
    """The efficiency: tokens a second over those that as many single GPUs would make."""
    if "tokens_per_s" not in entry or "tokens_per_s" not in base:
        return ""
    return f"{entry['tokens_per_s'] / (entry['gpus'] * base['tokens_per_s']):.0%}"


def gib(entry):
    return f"{entry['peak_gib']:.2f}" if "peak_gib" in entry else ""


def wire_table(entries, n):
    """What is sent with n GPUs, and a row's gathers as a share of bf16's."""
    measured = [entry for entry in entries if entry["gpus"] == n and "gathers" in entry]
    by_cell = {(e["size"], e["way"], e["row"]): e for e in measured}
    lines = []
    for size, way, row in lines_of(measured):
        entry = by_cell[size, way, row]
        gathers, reductions = [sum(entry[kind].values()) for kind in ("gathers", "reductions")]
        base = by_cell.get((size, way, "bf16"), {"gathers": {}})
        of_bf16 = sum(base["gathers"].values())
        share = f"{gathers / of_bf16:.2f}" if of_bf16 else ""
        lines.append([step_name(size), way, row, gigabytes(gathers), share,
                      gigabytes(reductions), listed(entry["reductions"]),
                      gigabytes(gathers + reductions)])
    head = ["GPU's step", "way", "row", "gathers GB", "/ bf16", "reductions GB", "of dtype",
            "sum GB"]
    return table(head, without_repeats(lines))


def gigabytes(n_bytes): return f"{n_bytes / 1e9:.3f}"


# ---- main

def main(argv):
    args = parse(argv)
    if args.measure:
        return measure_cells(args.measure)
    numbers = numbers_of_gpus(args.gpus, args.device)
    sizes = args.sizes or (["tiny"] if args.device == "cpu" else list(LOADS)[1:])
    backend = fp4.build()               # Later, all processes find the compiled kernels.
    check(backend.is_compiled, "the kernels did not build")
    results = dict(gpu=machine.device_name(args.device), torch=torch.__version__,
                   date=str(datetime.date.today()), entries=[])
    if args.resume:
        results["entries"] = measured_today(results)
    known = [name_of(entry) for entry in results["entries"]]
    cells = plan(numbers, sizes, args.rows, args.ways, args.device)
    cells = [cell for cell in cells if name_of(cell) not in known]
    start = time.perf_counter()
    if cells:
        measure_all(results, cells)
    log(f"scaling: {time.perf_counter() - start:.0f} s")
    text = report(results)
    print(text)
    if args.write:
        rewrite(README, text, "scaling")


def measured_today(results):
    """The entries in RESULTS that have not failed, if they are of the same GPU, torch and day."""
    try:
        with open(RESULTS) as file:
            saved = json.load(file)
    except OSError:
        return []
    is_same = all(saved[key] == results[key] for key in ("gpu", "torch", "date"))
    return [entry for entry in saved["entries"] if is_same and "failed" not in entry]


if __name__ == "__main__":
    sys.exit(processes.leave(cli.run(main, sys.argv[1:], "bench_scaling", go_on="")))
