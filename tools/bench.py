"""
How fast kernels, linear layers and whole training steps are on this GPU, against compiled BF16 in the same run.

    make bench                              # or python -m fp4.bench: everything; rewrites the README's tables
    python -m fp4.bench --only linears      # kernels | linears | steps; prints only
    python -m fp4.bench --quick             # fewer shapes; prints only

Every time is a median, and inputs rotate, so that they come from memory and not from the cache. Activations and
gradients are quantised inside what is timed. The weight of a linear in fp4 is not: that happens once an optimizer step,
and the steps below count it.

A narrow layer called from Python waits for the host, in BF16 as in FP4; in a compiled model the host is ahead, and one
waits for the GPU. So a linear is timed in both ways: "GPU" replays it from a CUDA graph, "called" calls the compiled layer.
"""
import argparse, concurrent.futures, contextlib, datetime, gc, io, itertools, json, math, multiprocessing, os, statistics
import sys, time
import torch
import fp4
from fp4.tables import (README, by_row, kernel_table, linear_table, numbers, product_table, ratio, replaced, shape, show,
                        table, table_by_row, where_table, write)

ops = torch.ops.fp4
HERE = os.path.dirname(os.path.abspath(__file__))
RESULTS = os.path.join(HERE, "build", "bench.json")
ROWS = [row for row in ("bf16", "fp8", "fp4", "fp4-sr") if row in fp4.RECIPES]
# tokens, out, in
SHAPES = [(16384, 4096, 4096), (16384, 11008, 4096), (16384, 4096, 11008), (32768, 2048, 2048), (32768, 640, 640)]
WIDTHS = [(16384, width, width) for width in (512, 1024, 2048, 4096, 8192)]
STEPS = {"tiny": (8, 256), "30M": (64, 512), "100M": (32, 512), "800M": (16, 512)}      # sequences, tokens
SIDE_BY_SIDE = [(("tiny", "30M", "100M"), ROWS), (("800M",), ROWS[:2]), (("800M",), ROWS[2:])]         # in 80 GB
VOCABULARY = 32000


# ---- time

def milliseconds(f, n=30):
    """median time of f on the GPU"""
    for _ in range(3): f()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(n)]
    for start, stop in events:
        start.record(), f(), stop.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(stop) for start, stop in events)


def captured(f):
    """f as one launch: what is left is the GPU's time"""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3): f()                                  # whatever is lazy happens before the capture
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph): f()
    return graph.replay


def seconds(f, n=10):
    """median time of f by the clock on the wall, host included"""
    times = []
    for _ in range(n):
        torch.cuda.synchronize()
        start = time.perf_counter()
        f()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def fits(measure, *args):
    """what measure(*args) returns, or {} when the GPU's memory does not suffice"""
    try: return measure(*args)
    except torch.OutOfMemoryError: return {}
    finally:
        torch._dynamo.reset()                                   # each layer is compiled for its own shape
        gc.collect(), torch.cuda.empty_cache()


def say(*words): print(*words, file=sys.stderr, flush=True)


# ---- kernels and products

def kernels(M=16384, K=4096):
    """each kernel's bytes a second, read and written, as a share of a copy's"""
    inputs = [torch.randn(M, K, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    weight, to = torch.randn(M, K, device="cuda"), torch.empty_like(inputs[0])
    mask = ops.quantize_forward(inputs[0], "floor")[2]
    packed = [ops.quantize_forward(x, "floor")[:2] for x in inputs]
    x, p = (lambda it=itertools.cycle(inputs): next(it)), (lambda it=itertools.cycle(packed): next(it))
    signs, seeds = ops.draw(inputs[0], inputs[0], 2)
    format = fp4.product.FORMAT                                 # of a gradient's operands: on Hopper FP8 tiles
    four, eight, bit = .5 + 1 / 32, 1 + 1 / 32, 1 / 8           # bytes a value
    out, turns, turn = eight if format == "fp8" else four, ("before", "before", format), ("before", format)
    calls = [
        ("copy",                             4,              lambda: to.copy_(x())),
        ("quantise forward",                 2 + four + bit, lambda: ops.quantize_forward(x(), "floor")),
        ("quantise forward, float32 weight", 4 + four + bit, lambda: ops.quantize_forward(weight, "floor")),
        ("quantise backward, dy and dy.T",   2 + 2 * out,    lambda: ops.quantize_backward(x(), signs, seeds, False, *turns)),
        ("the same, stochastic rounding",    2 + 2 * out,    lambda: ops.quantize_backward(x(), signs, seeds, True, *turns)),
        ("quantise backward, packed x.T",    four + out,     lambda: ops.requantize(*p(), signs, seeds[:1], False, *turn)),
        ("the same, stochastic rounding",    four + out,     lambda: ops.requantize(*p(), signs, seeds[:1], True, *turn)),
        ("mask and un-rotate",               4 + bit,        lambda: ops.unrotate(x(), mask, torch.bfloat16)),
        ("fold into FP8",                    four + 1,       lambda: ops.fold(*p(), 1.0)),
    ]
    found = []
    for name, count, f in calls:
        ms = milliseconds(f)
        found.append(dict(name=name, ms=ms, terabytes_per_s=count * M * K / ms / 1e9))
        found[-1]["of_copy"] = found[-1]["terabytes_per_s"] / found[0]["terabytes_per_s"]
        say(f"{name}: {ms:.3f} ms")
    return found


def rotation(count):
    """how many inputs of so many bytes it takes to leave the cache"""
    return max(2, -(-3 * torch.cuda.get_device_properties().L2_cache_size // count))


def product(M, N, K, row):
    """y = x w.T alone, of operands that are quantised already; fp4's are packed and are folded into FP8 here"""
    normal = lambda n: torch.randn(n, K, device="cuda", dtype=torch.bfloat16)
    scaled = lambda x, w: torch._scaled_mm(x, w.T, one, one, out_dtype=torch.bfloat16, use_fast_accum=True)
    w, one = normal(N), torch.ones((), device="cuda")
    pack, f = {
        "bf16": (lambda x: x,                                      lambda x, w: x @ w.T),
        "fp8":  (lambda x: x.to(torch.float8_e4m3fn),              scaled),
        "fp4":  (lambda x: ops.quantize_forward(x, "floor")[:2],   lambda x, w: ops.gemm(*x, *w, 1.0, torch.bfloat16)),
    }[row]
    w, xs = pack(w), itertools.cycle([pack(normal(M)) for _ in range(rotation(2 * M * K))])
    return dict(ms=milliseconds(lambda: f(next(xs), w)))


# ---- linears

def layer_and_inputs(M, N, K, row):
    """a compiled layer, and its forward and backward pass on inputs that rotate"""
    layer = fp4.Linear(K, N, row).cuda()
    fp4.quantize_weights_after(torch.optim.SGD(layer.parameters()), layer)      # as in training, before a microbatch
    run = torch.compile(layer, fullgraph=True, dynamic=False)
    normal = lambda n: torch.randn(M, n, device="cuda", dtype=torch.bfloat16)
    pairs = [(normal(K).requires_grad_(), normal(N)) for _ in range(rotation(2 * M * (K + N)))]
    def both(x, dy):
        x.grad = layer.weight.grad = None
        run(x).backward(dy)
    return run, both, pairs


def linear(M, N, K, row):
    run, both, pairs = layer_and_inputs(M, N, K, row)
    def forward_of_all():
        for x, _ in pairs: run(x)
    def both_of_all():
        for pair in pairs: both(*pair)
    it = itertools.cycle(pairs)
    called = milliseconds(lambda: both(*next(it)))
    forward, ms = (milliseconds(captured(f)) / len(pairs) for f in (forward_of_all, both_of_all))
    return dict(forward_ms=forward, backward_ms=ms - forward, ms=ms, called_ms=called)


def each(measure, shapes, rows):
    """measure for every shape and row; one that does not fit into memory has no times"""
    found = []
    for (M, N, K), row in itertools.product(shapes, rows):
        found.append({"tokens": M, "out": N, "in": K, "row": row, **fits(measure, M, N, K, row)})
        say(f"{measure.__name__} {M}, {N}, {K} {row}, ms: {show(found[-1].get('ms'), '.3f')}")
    return found


# a kernel's name -> what it is for, operations and bytes of memory it cannot do without
PARTS = {
    "forward_kernel":                ("quantise x", 0, lambda M, N, K: M * K * (2 + 17 / 32 + 1 / 8 + 33 / 32)),
    "fold_":                         ("fold w into FP8", 0, lambda M, N, K: N * K * (17 / 32 + 1)),
    "backward_kernel<Matrix":        ("quantise dy and dy.T", 0, lambda M, N, K: M * N * (2 + 2 * 33 / 32)),
    "backward_kernel<PackedMatrix":  ("requantise x.T and w.T", 0, lambda M, N, K: (M + N) * K * (17 / 32 + 1)),
    "gemm_kernel":                   ("three products, two un-rotations", 3, lambda M, N, K: 2 * M * (N + K) + 4 * N * K),
}

def where(M, N, K, rate, bandwidth):
    """the parts of fp4's linear, in ms: what the GPU's counters say of each kernel, and what its operations at the FP8
    product's rate (1/s) or its bytes at a copy's bandwidth (bytes/s) would take"""
    run, both, pairs = layer_and_inputs(M, N, K, "fp4")
    for pair in pairs: both(*pair)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        for pair in pairs * 4: both(*pair)
        torch.cuda.synchronize()
    spent = {name: 0. for name, _, _ in PARTS.values()} | {"everything else": 0.}
    for kernel in seen.key_averages():
        name = kernel.key.replace("(anonymous namespace)::", "")
        part = next((PARTS[key][0] for key in PARTS if key in name), "everything else")
        spent[part] += kernel.self_device_time_total / 1000 / len(pairs * 4)
    least = {name: max(1000 * 2 * products * M * N * K / rate, 1000 * count(M, N, K) / bandwidth) for name, products, count in PARTS.values()}
    return [dict(name=name, ms=ms, least_ms=least.get(name)) for name, ms in spent.items()]


# ---- training steps: one process a size and row. They compile side by side, then each is timed while the others wait

def share(barrier, lock, cores):
    global compiled, turn
    compiled, turn = barrier, lock
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = str(cores)
    with contextlib.redirect_stderr(io.StringIO()): fp4.build()                 # has said once what it runs


def training_step(size, row, B, T):
    """forward, backward, clip, AdamW and quantisation of the weights as one function, as in quartet.py"""
    from model import SIZES, Llama                              # here, because fp4 knows no model
    layers, C, H, lr = SIZES[size]
    with torch.device("cuda"):
        model = Llama(layers, C, H, VOCABULARY, T, row, torch.bfloat16)
        batches = itertools.cycle(torch.randint(VOCABULARY, (4, 2, B, T)).unbind())
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    fp4.quantize_weights_after(optimizer, model)
    forward = torch.compile(model, fullgraph=True)
    def step():
        forward(*next(batches)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return step


def timed_step(size, row):
    B, T = STEPS[size]
    try:
        step = training_step(size, row, B, T)
        for _ in range(3): step()
        torch.cuda.synchronize()
    finally: compiled.wait()
    with turn:
        torch.cuda.reset_peak_memory_stats()
        s = seconds(step)
        return dict(ms=1000 * s, tokens_per_s=B * T / s, peak_gib=torch.cuda.max_memory_allocated() / 2 ** 30)


def side_by_side(jobs):
    context, n = multiprocessing.get_context("spawn"), len(jobs)
    shared = context.Barrier(n), context.Lock(), max(1, os.cpu_count() // n)
    with concurrent.futures.ProcessPoolExecutor(n, context, share, shared) as pool:
        return [future.result() for future in [pool.submit(fits, timed_step, *job) for job in jobs]]


def steps(sizes):
    """what has been measured so far, again and again"""
    found = []
    for together, rows in SIDE_BY_SIDE:
        jobs = [(size, row) for size in together if size in sizes for row in rows]
        for (size, row), times in zip(jobs, side_by_side(jobs) if jobs else []):
            if not times: [times] = side_by_side([(size, row)])                 # it did not fit beside the others; does it alone?
            found.append(dict(size=size, row=row, **times))
            say(f"step {size} {row}, ms: {show(times.get('ms'), '.1f')}")
        yield found


# ---- the report

def step_table(found):
    head = ["step", "row", "ms", "/ bf16", "tokens/s", "peak GiB", "/ bf16"]
    return table_by_row(head, found, lambda size: "{}, {} x {}".format(size, *STEPS[size]), lambda e, base: [
        show(e.get("ms"), ".1f"), ratio(e.get("ms"), base.get("ms")),
        show(e.get("tokens_per_s"), ",.0f"),
        show(e.get("peak_gib"), ".2f"), ratio(e.get("peak_gib"), base.get("peak_gib"))])


def squares(found):
    """{width: {row: entry}}, the widest first"""
    return {s[1]: rows for s, rows in sorted(by_row(found).items(), reverse=True) if s in WIDTHS}


def width_table(found):
    ratios = lambda rows: [ratio(rows[row].get("ms"), rows["bf16"].get("ms")) or "out of memory" for row in ROWS[1:]]
    return table(["width", *(f"{row} / bf16" for row in ROWS[1:])],
                 [[str(width), *ratios(rows)] for width, rows in reversed(squares(found).items())])


def faster_from(found, row):
    """the smallest measured width from which on row stays faster than bf16, or None"""
    first = None
    for width, rows in squares(found).items():
        ms, base = rows[row].get("ms"), rows["bf16"].get("ms", float("inf"))
        if ms is None or not ms < base: break
        first = width
    return first


def break_even(found, row):
    width = faster_from(found, row)
    if width is None: return f"{row} is not faster than bf16 at {max(squares(found))}, the largest width measured."
    return f"{row} is faster than bf16 from a width of {width} on."


def report(found):
    parts = [f"`make bench` on one {found['gpu']} (torch {found['torch']}, {found['date']})"]
    linears = found.get("linears", [])
    if linears:
        parts += ["One linear layer, milliseconds. Forward, backward and their sum are the GPU's time, replayed from a CUDA\n"
                  "graph: what the layer costs inside a compiled model. \"Called\" is the same layer called from Python,\n"
                  "where a narrow one waits for the host.", linear_table([e for e in linears if shape(e) in SHAPES])]
    if "where" in found:
        parts += [f"Where fp4's time goes at {numbers(SHAPES[0])}. At least: the operations at the fastest rate in the table of products\n"
                  "below, or the bytes at a copy's bandwidth.", where_table(found["where"])]
    if squares(linears):
        parts += [f"Square layers, {WIDTHS[0][0]} tokens, the sum on the GPU.\n" +
                  "\n".join(break_even(linears, row) for row in ROWS[1:]), width_table(linears)]
    if "steps" in found:
        parts += ["A training step, compiled: forward, backward, clip, AdamW, weights quantised; "
                  f"{VOCABULARY:,} tokens in the vocabulary.", step_table(found["steps"])]
    if "kernels" in found:
        parts += ["The kernels at 16384 x 4096, bytes read and written; the product y = x w.T alone.",
                  kernel_table(found["kernels"]), product_table(found["products"])]
    return "\n\n".join(parts)


# ---- main

def main(argv):
    parser = argparse.ArgumentParser(prog="bench", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("kernels", "linears", "steps"), help="measure this part and print it")
    parser.add_argument("--quick", action="store_true", help="fewer shapes, printed")
    asked = parser.parse_args(argv)
    problem = ("torch sees no GPU here" if not torch.cuda.is_available() else
               "the kernels did not build" if fp4.build().startswith("reference") else None)
    if problem:
        say("bench:", problem)
        return 2
    found = dict(gpu=torch.cuda.get_device_name(), torch=torch.__version__, date=str(datetime.date.today()))
    shapes, widths = ([SHAPES[0], SHAPES[-1]], []) if asked.quick else (SHAPES, WIDTHS)
    products = ["bf16"] + ["fp8"] * (torch.cuda.get_device_capability() >= (8, 9)) + ["fp4"]
    whole = not (asked.only or asked.quick)
    def measured():
        if asked.only in (None, "kernels"):
            yield "kernels", kernels()
            yield "products", each(product, shapes, products)
        if asked.only in (None, "linears"): yield "linears", each(linear, dict.fromkeys(shapes + widths), ROWS)
        if whole:                                               # after what is timed: profiling slows the host down for good
            fastest = max(2 * math.prod(shape(e)) / e["ms"] * 1000 for e in found["products"] if "ms" in e)
            yield "where", where(*SHAPES[0], fastest, found["kernels"][0]["terabytes_per_s"] * 1e12)
        if asked.only in (None, "steps"):
            for so_far in steps(["tiny", "30M"] if asked.quick else STEPS): yield "steps", so_far
    start = time.perf_counter()
    for name, value in measured():
        found[name] = value
        say(f"{name}: {time.perf_counter() - start:.0f} s")
        if whole: write(RESULTS, json.dumps(found, indent=1))   # what is measured is not lost
    print(report(found))
    if not whole: return 0
    try: write(README, replaced(open(README).read(), report(found)))
    except ValueError as error:
        say(f"bench: {os.path.basename(README)} is as it was, because {error}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
