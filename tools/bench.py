"""
How fast kernels, linear layers and whole training steps are on this GPU, against compiled BF16 in
the same run; and, where there are several GPUs, how training scales with their number.

    make bench                              # everything; rewrites the tables of fp4/README.md
    python -m tools.bench --only linears    # kernels | linears | steps; prints only
    python -m tools.bench --only rows       # others | scaling | inference: programs of their own
    python -m tools.bench --quick           # fewer shapes; prints only
    python -m tools.bench --gemm bf16       # with another product than this GPU's; prints only

Inputs rotate, so that they come from memory and not from the cache. Activations and gradients are
quantised inside what is timed. The weight of a linear in fp4 is not: that happens once an optimizer
step, and the training steps count it.

A narrow layer called from Python waits for the host, in BF16 as in FP4. In a compiled model the
host is ahead, and the layer waits for the GPU. So a linear is timed by two clocks: "GPU" replays it
from a CUDA graph, and "called" calls the compiled layer.

A card at its limit of power or temperature lowers its frequency, by a tenth and more, so what is
measured a minute later is measured on another card. Everything that is compared is therefore in
memory at once, and takes turns (rounds, below). A time is the median over the rounds, and a ratio
the median of the ratio to BF16 in the same round. One layer is also timed without turns.

All this is done on the first GPU. Then bench_rows.py measures a step of every row of the table of
precisions, and bench_scaling.py several GPUs, if there are more. What bench_others.py measures,
layers of another library, and bench_inference.py, the steps of generate.py, are not a part of
`make bench`.
"""
import concurrent.futures
import contextlib
import datetime
import functools
import gc
import importlib
import io
import itertools
import json
import math
import multiprocessing
import os
import statistics
import sys
import time

from tools import cli


PROGRAMS = ("rows", "others", "scaling", "inference")   # bench_rows.py, bench_others.py ...


def parse(argv):
    parser = cli.Parser("python -m tools.bench", __doc__)
    parser.add_argument("--only", choices=("kernels", "linears", "steps", *PROGRAMS),
                        help="measure this part and print it")
    parser.add_argument("--quick", action="store_true", help="fewer shapes, printed")
    parser.add_argument("--gemm", default="auto",
                        help="which product FP4 runs on (fp4/backend.py); printed unless auto")
    args = parser.parse_args(argv)
    if args.only in PROGRAMS and (args.quick or args.gemm != "auto"):
        parser.error(f"--only {args.only} takes neither --quick nor --gemm")
    return args


# The imports below take seconds, so that --help and mistyped flags are answered here.
if __name__ == "__main__":
    cli.start(parse, "bench", "tools.bench")

import torch

import fp4
from data.files import UserError, atomic_write_text
from fp4 import ops
from fp4.check import check
from model import PRESETS, Llama
from tools import energy, machine
from tools.bench_report import (
    ENERGY_SECONDS, ROUNDS, ROWS, SHAPES, STEP_ROUNDS, STEPS, VOCABULARY, WIDTHS, report, shape)
from tools.markdown import rewrite

FP4_FOLDER = os.path.dirname(os.path.abspath(fp4.__file__))
README = os.path.join(FP4_FOLDER, "README.md")
RESULTS = os.path.join(FP4_FOLDER, "build", "bench.json")
SPIN_CYCLES = 500_000                   # a third of a millisecond
SETTLING_SECONDS = 6
IDLE_SECONDS = 3
# The steps that are compiled and held in memory together: 80 GB should suffice for each of these
# groups. Every group has bf16 in it, because only what is held together can take turns.
SIDE_BY_SIDE = [(("tiny", "30M", "100M"), ROWS), (("800M",), ("bf16", "fp8", "fp4")),
                (("800M",), ("bf16", "fp4-sr"))]


# ---- time: a burst is a function that measures something once, for some milliseconds

def burst(f, n_calls=1, repeats=2, name=""):
    """A burst that gives the GPU's ms for one of the n_calls calls in f, and its frequency.

    The frequency is that at the end of f: a kernel that spins for a number of cycles is timed.
    """
    def measure():
        start, stop, spin_start, spin_stop = [
            torch.cuda.Event(enable_timing=True) for _ in range(4)]
        torch.cuda.synchronize()
        f()                             # not timed: the host gets ahead, and the cache is f's own
        start.record()
        for _ in range(repeats):
            f()
        stop.record()
        torch.cuda._sleep(SPIN_CYCLES // 10)    # Meanwhile the host launches what follows.
        spin_start.record()
        torch.cuda._sleep(SPIN_CYCLES)
        spin_stop.record()
        torch.cuda.synchronize()
        ms = start.elapsed_time(stop) / (repeats * n_calls)
        ghz = SPIN_CYCLES / spin_start.elapsed_time(spin_stop) / 1e6
        return {name + "ms": ms, name + "ghz": ghz}

    return measure


def gpu_milliseconds(f, n=30):
    """Median time of f on the GPU, compared with nothing."""
    measure = burst(f)
    return statistics.median(measure()["ms"] for _ in range(n))


def in_turn(bursts, number):
    """The bursts in the order of round `number`.

    Two rounds go there and back, so that each burst comes early once and late once. The next two
    begin with another burst.
    """
    first = number // 2 % max(1, len(bursts))       # There are none if no row fits into memory.
    order = bursts[first:] + bursts[:first]
    return order if number % 2 == 0 else order[::-1]


def rounds(rows, n=ROUNDS):
    """{row: {name: its values, one a round}}, of rows = {row: its bursts}.

    In every round each burst of each row is measured once. One round more comes first and does not
    count: it warms up, and a row that runs out of memory in it is left out, as one without bursts.
    """
    fitting = [row for row in rows if rows[row] and if_it_fits(run_all, rows[row])]
    bursts = [(row, measure) for row in fitting for measure in rows[row]]
    measured = {row: {} for row in fitting}
    for number in range(n):
        for row, measure in in_turn(bursts, number):
            for name, value in measure().items():
                measured[row].setdefault(name, []).append(value)
    return measured


def run_all(bursts):
    for measure in bursts:
        measure()
    return True


def medians(measured, base="bf16"):
    """{row: its medians, and for each time that of the ratio to the base's in the same round}.

    The ratio of "called_ms" is "called_ratio", and that of "ms" is "ratio". Without a base there
    are none.
    """
    base_values = measured.get(base, {})
    result = {}
    for row, values in measured.items():
        result[row] = {name: statistics.median(values[name]) for name in values}
        for name in values:
            if name.endswith("ms") and name in base_values:
                pairs = zip(values[name], base_values[name], strict=True)
                ratio = statistics.median(value / of_base for value, of_base in pairs)
                result[row][name.removesuffix("ms") + "ratio"] = ratio
    return result


def captured(f):
    """f as one launch of a CUDA graph: what is left is the GPU's time."""
    side_stream = torch.cuda.Stream()
    side_stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side_stream):
        for _ in range(3):
            f()                         # Whatever is done lazily happens before the capture.
    torch.cuda.current_stream().wait_stream(side_stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        f()

    def replay():
        graph.replay()

    replay.of = f                       # The graph reads what f refers to, so that must stay.
    return replay


def if_it_fits(f, *args):
    """What f(*args) returns, or None when the GPU's memory does not suffice."""
    try:
        return f(*args)
    except torch.OutOfMemoryError:
        pass                            # From here on nothing refers to what was made before.
    gc.collect()
    torch.cuda.empty_cache()
    return None


def clear_gpu():
    torch._dynamo.reset()               # Each layer is compiled for its own shape.
    gc.collect()
    torch.cuda.empty_cache()


def log(*words):
    print(*words, file=sys.stderr, flush=True)


class Rotating:
    """Gives one input after the other, so that none is still in the GPU's cache."""

    def __init__(self, inputs):
        self.cycle = itertools.cycle(inputs)

    def __call__(self):
        return next(self.cycle)


def inputs_beyond_cache(n_bytes):
    """How many inputs of n_bytes do not fit into three times the GPU's cache."""
    cache = torch.cuda.get_device_properties().L2_cache_size
    return max(2, math.ceil(3 * cache / n_bytes))


def random_bf16(rows, columns):
    return torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)


# ---- kernels and products

def kernels(backend, M=16384, K=4096):
    """The bytes that each kernel reads and writes a second, and their share of a copy's."""
    calls = list(kernel_calls(M, K, backend.operand_format))
    bursts = {i: [burst(f, repeats=10)] for i, (_, _, f) in enumerate(calls)}
    times = medians(rounds(bursts), base=0)
    copy_bytes = calls[0][1]
    measured = []
    for i, (name, bytes_per_value, _) in enumerate(calls):
        ms = times[i]["ms"]
        rate = bytes_per_value * M * K / ms / 1e9
        of_copy = bytes_per_value / copy_bytes / times[i]["ratio"]
        measured.append(dict(name=name, ms=ms, terabytes_per_s=rate, of_copy=of_copy))
        log(f"{name}: {ms:.3f} ms")
    return measured


def kernel_calls(M, K, operand_format):
    """(name, bytes that a value costs, call) of each kernel; the copy comes first."""
    inputs = [random_bf16(M, K) for _ in range(4)]
    x = Rotating(inputs)
    packed = Rotating([ops.quantize_forward(v, "floor")[0] for v in inputs])
    weight = torch.randn(M, K, device="cuda")
    to = torch.empty_like(inputs[0])
    mask = ops.quantize_forward(inputs[0], "floor")[1]

    bf16 = 2
    mask_bit = 1 / 8
    packed_bytes = 1 / 2 + 1 / 32       # a code, and a scale for 32
    fp8_bytes = 1 + 1 / 32              # FP8, and four bytes of scale for 128
    operand = fp8_bytes if operand_format == "fp8" else packed_bytes
    yield "copy", 2 * bf16, lambda: to.copy_(x())
    yield ("quantise forward", bf16 + packed_bytes + mask_bit,
           lambda: ops.quantize_forward(x(), "floor"))
    yield ("quantise forward, float32 weight", 4 + packed_bytes + mask_bit,
           lambda: ops.quantize_forward(weight, "floor"))
    yield from backward_calls(x, packed, operand_format, bf16 + 2 * operand, packed_bytes + operand)
    yield ("mask and un-rotate", 2 * bf16 + mask_bit,
           lambda: ops.unrotate(x(), mask, torch.bfloat16))
    yield ("fold into FP8", packed_bytes + 1,
           lambda: torch.ops.fp4.packed_to_fp8(*packed(), 1.0))


def backward_calls(x, packed, operand_format, dy_bytes, packed_x_bytes):
    """The backward quantisers, of a gradient and of a packed x, to nearest and stochastically."""
    signs, seeds = ops.draw(x(), x(), 2)

    def quantize(stochastic):
        return ops.quantize_backward(x(), signs, seeds, stochastic, "before", "before",
                                     operand_format)

    def requantize(stochastic):
        return ops.requantize_transposed(packed(), signs, seeds[:1], stochastic, "before",
                                         operand_format)

    yield "quantise backward, dy and dy.T", dy_bytes, lambda: quantize(False)
    yield "the same, stochastic rounding", dy_bytes, lambda: quantize(True)
    yield "quantise backward, packed x.T", packed_x_bytes, lambda: requantize(False)
    yield "the same, stochastic rounding", packed_x_bytes, lambda: requantize(True)


def product(M, N, K, row, backend):
    """The bursts of y = x w.T alone, replayed from a CUDA graph. The operands are quantised
    already. Those of fp4 are packed, and making FP8 or BF16 of them counts here. The ops know the
    backend already."""
    one = torch.ones((), device="cuda")

    def quantize(v):
        if row == "fp8":
            return v.to(torch.float8_e4m3fn)
        if row == "fp4":
            return ops.quantize_forward(v, "floor")[0]
        return v

    def multiply(x, w):
        if row == "fp8":
            return torch._scaled_mm(x, w.T, one, one, out_dtype=torch.bfloat16,
                                    use_fast_accum=True)
        if row == "fp4":
            return ops.gemm(x, w, 1.0, torch.bfloat16)
        return x @ w.T

    w = quantize(random_bf16(N, K))
    n_inputs = inputs_beyond_cache(2 * M * K)
    inputs = [quantize(random_bf16(M, K)) for _ in range(n_inputs)]

    def products_of_all():
        for x in inputs:
            multiply(x, w)

    return [burst(captured(products_of_all), n_inputs)]


# ---- linears

def layer_and_inputs(M, N, K, row, backend):
    """What with_inputs() returns, of the layer of a row."""
    layer = fp4.Linear(K, N, fp4.recipe(row), backend=backend).cuda()
    fp4.quantize_weights(layer)         # as in training, before the first microbatch
    return with_inputs(layer, M, N, K)


def with_inputs(layer, M, N, K):
    """A layer, compiled, its forward and backward pass in one function, and pairs (x, dy)."""
    run = torch.compile(layer, fullgraph=True, dynamic=False)
    n_pairs = inputs_beyond_cache(2 * M * (K + N))
    pairs = [(random_bf16(M, K).requires_grad_(), random_bf16(M, N)) for _ in range(n_pairs)]

    def forward_and_backward(x, dy):
        x.grad = None
        layer.weight.grad = None
        run(x).backward(dy)

    return run, forward_and_backward, pairs


def linear(M, N, K, row, backend):
    """The bursts of a linear: its forward pass and both passes, replayed, and both, called."""
    run, forward_and_backward, pairs = layer_and_inputs(M, N, K, row, backend)

    def forward_of_all():
        for x, _ in pairs:
            run(x)

    def both_of_all():
        for pair in pairs:
            forward_and_backward(*pair)

    both_of_all()                       # compiles, before anything is captured
    n = len(pairs)
    return [burst(captured(forward_of_all), n, name="forward_"),
            burst(captured(both_of_all), n),
            burst(both_of_all, n, name="called_")]


def each(prepare, shapes, rows, backend):
    """The times of every shape and row; what does not fit into memory beside the rows before it
    has none. prepare returns the bursts of a row."""
    entries = []
    for M, N, K in shapes:
        times = take_turns(prepare, (M, N, K), rows, backend)
        clear_gpu()
        for row in rows:
            entry = {"tokens": M, "out": N, "in": K, "row": row, **times.get(row, {})}
            if "forward_ms" in entry:
                entry["backward_ms"] = entry["ms"] - entry["forward_ms"]
            entries.append(entry)
            log(f"{prepare.__name__} {M}, {N}, {K} {row}: {in_words(times.get(row))}")
    return entries


def take_turns(prepare, shape, rows, backend):
    bursts = {row: if_it_fits(prepare, *shape, row, backend) for row in rows}
    return medians(rounds(bursts))


def alone(shape, rows, backend):
    """The GPU's time of each row's linear when it does not take turns but runs alone for some
    seconds, so that the card settles at the frequency that this row leaves it."""
    entries = []
    for row in rows:
        times = if_it_fits(settled_linear, *shape, row, backend)
        clear_gpu()
        entries.append({"row": row, **(times or {})})
        log(f"alone {row}: {in_words(times)}")
    return entries


def settled_linear(M, N, K, row, backend):
    _, both_passes, _ = linear(M, N, K, row, backend)
    return settle(both_passes, SETTLING_SECONDS)


def settle(measure, seconds):
    """Medians of a burst that is measured again and again; the first half does not count."""
    end = time.perf_counter() + seconds
    measured = []
    while time.perf_counter() < end:
        measured.append(measure())
    counted = measured[len(measured) // 2:]
    return {name: statistics.median(values[name] for values in counted) for name in measured[0]}


def in_words(times):
    if not times:
        return "out of memory"
    return ", ".join(f"{name} {value:.3f}" for name, value in times.items())


# Part of a kernel's name -> what the kernel is for, its number of products, and the bytes of memory
# that it cannot do without.
PARTS = {
    "forward_kernel": (
        "quantise x", 0, lambda M, N, K: M * K * (2 + 17 / 32 + 1 / 8 + 33 / 32)),
    "tiles_kernel": (
        "fold w into FP8", 0, lambda M, N, K: N * K * (17 / 32 + 1)),
    "backward_kernel<FloatSource": (
        "quantise dy and dy.T", 0, lambda M, N, K: M * N * (2 + 2 * 33 / 32)),
    "backward_kernel<PackedSource": (
        "requantise x.T and w.T", 0, lambda M, N, K: (M + N) * K * (17 / 32 + 1)),
    "gemm_kernel": (
        "three products, two un-rotations", 3, lambda M, N, K: 2 * M * (N + K) + 4 * N * K),
}


def where(M, N, K, flop_per_s, bytes_per_s, backend):
    """The parts of fp4's linear, in ms, by the GPU's own counters; and at least what their
    operations at this rate, or their bytes at this bandwidth, would take."""
    _, forward_and_backward, pairs = layer_and_inputs(M, N, K, "fp4", backend)
    ms = {name: 0.0 for name, _, _ in PARTS.values()} | {"everything else": 0.0}
    for kernel_name, kernel_ms in kernel_times(forward_and_backward, pairs).items():
        ms[part_of(kernel_name)] += kernel_ms
    least = {}
    for name, n_products, n_bytes in PARTS.values():
        least[name] = 1000 * max(2 * n_products * M * N * K / flop_per_s,
                                 n_bytes(M, N, K) / bytes_per_s)
    return [dict(name=name, ms=ms[name], least_ms=least.get(name)) for name in ms]


def kernel_times(f, inputs):
    """{name of a kernel: its ms in one call of f}, as the GPU counts them."""
    for args in inputs:
        f(*args)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for args in inputs * 4:
            f(*args)
        torch.cuda.synchronize()
    n_calls = 4 * len(inputs)
    return {kernel.key: kernel.self_device_time_total / 1000 / n_calls
            for kernel in profile.key_averages()}


def part_of(kernel_name):
    kernel_name = kernel_name.replace("(anonymous namespace)::", "")
    for key, (part, _, _) in PARTS.items():
        if key in kernel_name:
            return part
    return "everything else"


# ---- training steps: a process for each size and row. They compile side by side. Then this process
# asks one after the other for a burst, and the others wait.

class Held:
    """What a process that times a training step keeps from one request to the next."""
    backend = None                      # what build() returned
    step = None                         # what training_step() returned


def start_process(cores, gemm):
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = str(cores)
    with contextlib.redirect_stderr(io.StringIO()):
        Held.backend = fp4.build(gemm)          # The first process has said what runs.


def recipe_of(row):
    """The recipe of a row as quartet.py's command line has it, such as "fp4 --scale mse"."""
    precision, *words = row.split()
    axes = {flag.removeprefix("--"): value for flag, value in zip(words[::2], words[1::2])}
    return fp4.recipe(precision, **axes)


def training_step(size, row, batch, seq, backend):
    """Forward, backward, clip, AdamW and quantisation of the weights as one function, as in
    quartet.py."""
    preset = PRESETS[size]
    with torch.device("cuda"):
        config = preset.model_config(VOCABULARY, seq)
        model = Llama(config, recipe_of(row), torch.bfloat16, backend=backend)
        batches = Rotating(torch.randint(VOCABULARY, (4, 2, batch, seq)).unbind())
    optimizer = torch.optim.AdamW(model.parameters(), lr=preset.lr, betas=(0.9, 0.95),
                                  weight_decay=0.1, fused=True)
    fp4.quantize_weights(model)
    forward = torch.compile(model, fullgraph=True)

    def step():
        x, y = batches()
        forward(x, y).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        fp4.quantize_weights(model)

    return step


def prepare_step(size, row):
    """Makes and compiles a step; returns the seconds until the first one is done."""
    start = time.perf_counter()
    step = training_step(size, row, *STEPS[size], Held.backend)
    step()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    for _ in range(2):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    Held.step = step
    return seconds


def time_step():
    """The burst of a step, by the clock on the wall, host included."""
    Held.step()                         # not timed: the process wakes up
    torch.cuda.synchronize()
    start = time.perf_counter()
    Held.step()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return dict(ms=1000 * seconds, peak_gib=torch.cuda.max_memory_allocated() / 2 ** 30)


def step_energy():
    """What a step takes when steps run alone for some seconds, each waited for as in training;
    nothing where the GPU does not count its joules."""
    meter = energy.Meter("cuda")
    if not meter.read:
        return {}
    n_steps = 0
    seconds = 0
    with meter:
        start = time.perf_counter()
        while seconds < ENERGY_SECONDS:
            Held.step()
            torch.cuda.synchronize()
            n_steps += 1
            seconds = time.perf_counter() - start
    if meter.joules is None:
        return {}
    return dict(joules=meter.joules / n_steps, watts=meter.watts, alone_ms=1000 * seconds / n_steps)


def ask_for_time(process): return process.submit(time_step).result()


def side_by_side(jobs, gemm, known=()):
    """{(size, row): times} of the jobs that fit into memory together. Rows of one size take turns.
    Then each of them runs alone for its energy, but for those where that is known.
    """
    context = multiprocessing.get_context("spawn")
    shared = max(1, os.cpu_count() // len(jobs)), gemm
    with contextlib.ExitStack() as stack:
        processes = {}
        for job in jobs:
            pool = concurrent.futures.ProcessPoolExecutor(1, context, start_process, shared)
            processes[job] = stack.enter_context(pool)
        ready = {job: processes[job].submit(if_it_fits, prepare_step, *job) for job in jobs}
        fitting = [job for job in jobs if ready[job].result()]
        all_times = {}
        for size in dict.fromkeys(size for size, _ in fitting):
            bursts = {row: [functools.partial(ask_for_time, processes[size, row])]
                      for other, row in fitting if other == size}
            times_of_size = medians(rounds(bursts, STEP_ROUNDS))
            all_times.update({(size, row): times for row, times in times_of_size.items()})
        for job in [job for job in all_times if job not in known]:
            all_times[job].update(processes[job].submit(step_energy).result())
        return all_times


def steps(sizes, gemm):
    """Yields everything that has been measured so far, after each group of steps."""
    entries = {}
    for together, rows in SIDE_BY_SIDE:
        jobs = [(size, row) for size in together if size in sizes for row in rows]
        all_times = side_by_side(jobs, gemm, entries.keys()) if jobs else {}
        for size, row in jobs:
            if "ms" in entries.get((size, row), {}):
                continue                # It is bf16, which each group has for its ratios.
            times = all_times.get((size, row)) or with_fewer_beside((size, row), jobs, gemm)
            entries[size, row] = step_entry(size, row, times)
            log(f"step {size} {row}: {in_words(times)}")
        yield list(entries.values())


def with_fewer_beside(job, tried, gemm):
    """The times of a step that did not fit beside all that was tried: beside bf16, or else alone,
    where there is no ratio to bf16."""
    bf16 = (job[0], "bf16")
    for attempt in ([bf16, job], [job]):
        if len(set(attempt)) == len(attempt) < len(tried):
            times = side_by_side(attempt, gemm, {bf16} - {job}).get(job)
            if times:
                return times
    return {}


def step_entry(size, row, times):
    entry = dict(size=size, row=row, **times)
    if "ms" in entry:
        batch, seq = STEPS[size]
        entry["tokens_per_s"] = 1000 * batch * seq / entry["ms"]
    return entry


# ---- main

def measure_parts(args, backend, is_full_run, results):
    """Yields (name, measurements) of each part that the flags ask for."""
    shapes = SHAPES
    widths = WIDTHS
    if args.quick:
        shapes = [SHAPES[0], SHAPES[-1]]
        widths = []
    if args.only in (None, "kernels"):
        has_fp8 = torch.cuda.get_device_capability() >= (8, 9)
        yield "kernels", kernels(backend)
        rows = ["bf16", "fp8", "fp4"] if has_fp8 else ["bf16", "fp4"]
        yield "products", each(product, shapes, rows, backend)
    if args.only in (None, "linears"):
        yield "linears", each(linear, list(dict.fromkeys(shapes + widths)), ROWS, backend)
        yield "alone", alone(SHAPES[0], ROWS, backend)
    if is_full_run:                     # After what is timed: profiling slows the host for good.
        rates = [2 * math.prod(shape(entry)) / entry["ms"] * 1000
                 for entry in results["products"] if "ms" in entry]
        copy_bandwidth = results["kernels"][0]["terabytes_per_s"] * 1e12
        yield "where", where(*SHAPES[0], max(rates), copy_bandwidth, backend)
        clear_gpu()
    if args.only in (None, "steps"):
        yield "idle_watts", energy.idle_watts("cuda", IDLE_SECONDS)
        for entries in steps(["tiny", "30M"] if args.quick else STEPS, args.gemm):
            yield "steps", entries


def load_kernels(gemm):
    """What computes FP4 on this GPU. Raises ValueError where nothing can be measured."""
    check(torch.cuda.is_available(), machine.unusable_gpu() or "torch sees no GPU here")
    backend = fp4.build(gemm)
    check(backend.is_compiled, "the kernels did not build")
    return backend


def program(name, *argv):
    """Does what python -m tools.bench_NAME does; returns its exit code."""
    module = importlib.import_module(f"tools.bench_{name}")     # They import this one.
    return cli.run(module.main, argv, "bench", go_on="")


def main(argv):
    args = parse(argv)
    if args.only in PROGRAMS:
        return program(args.only)
    try:
        backend = load_kernels(args.gemm)
    except ValueError as reason:        # or the GPU does not have this product
        log("bench:", reason)
        return 2
    results = dict(gpu=torch.cuda.get_device_name(), torch=torch.__version__,
                   date=str(datetime.date.today()))
    if args.gemm != "auto":
        results["other_product"] = f"{args.gemm}: {backend.description}"
    is_full_run = not (args.only or args.quick or args.gemm != "auto")
    start = time.perf_counter()
    for name, value in measure_parts(args, backend, is_full_run, results):
        results[name] = value
        log(f"{name}: {time.perf_counter() - start:.0f} s")
        if is_full_run:                 # What is measured is not lost.
            atomic_write_text(RESULTS, json.dumps(results, indent=1))
    print(report(results))
    if not is_full_run:
        return 0
    try:
        rewrite(README, report(results), "bench")
    except UserError as error:
        log("bench:", error)
        return 2
    names = ["rows", "scaling"] if torch.cuda.device_count() > 1 else ["rows"]
    return max([program(name, "--write") for name in names])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
