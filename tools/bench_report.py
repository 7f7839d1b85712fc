"""
The tables of `make bench`, made of what bench.py has measured.

An entry is a dictionary: what was measured (tokens, out and in of a linear or a product, or the
size of a model), its row of fp4/recipes.py, and times. Where the GPU's memory did not suffice there
are no times. A time is a median over rounds. Its "ratio" is not that of two such medians, but the
median of the ratio to bf16 in the same round (rounds of bench.py).
"""
from tools.markdown import table

# tokens, out-features, in-features
SHAPES = [(16384, 4096, 4096), (16384, 11008, 4096), (16384, 4096, 11008), (32768, 2048, 2048),
          (32768, 640, 640)]
WIDTHS = [(16384, width, width) for width in (512, 1024, 2048, 4096, 8192)]
STEPS = {"tiny": (8, 256), "30M": (64, 512), "100M": (32, 512), "800M": (16, 512)}  # batch, seq
ROWS = ["bf16", "fp8", "fp4", "fp4-sr"]
VOCABULARY = 32000
ROUNDS = 24                             # of layers, products and kernels; and of training steps
STEP_ROUNDS = 12
ENERGY_SECONDS = 10                     # in which a step runs alone for its energy
CLOCKS = {"": "On the GPU", "called_": "Called from Python"}    # how their names in an entry begin


# ---- cells

def show(value, form):
    return "out of memory" if value is None else format(value, form)


def ratio(value, base):
    return "" if value is None or base is None else f"{value / base:.2f}"


def ratio_to_bf16(entry, base, clock=""):
    """That of the same rounds. Without it, what is known is that of the medians, marked by ~."""
    if clock + "ratio" in entry:
        return f"{entry[clock + 'ratio']:.2f}"
    of_medians = ratio(entry.get(clock + "ms"), base.get(clock + "ms"))
    return of_medians and "~" + of_medians


def ghz(entry, clock=""):
    value = entry.get(clock + "ghz")
    return "" if value is None else f"{value:.2f}"


def numbers(values): return ", ".join(map(str, values))


def shape(entry):
    return entry["size"] if "size" in entry else (entry["tokens"], entry["out"], entry["in"])


def by_row(entries):
    """{shape: {row: entry}}, in the order of the entries."""
    grouped = {}
    for entry in entries:
        grouped.setdefault(shape(entry), {})[entry["row"]] = entry
    return grouped


def table_by_row(head, entries, name, cells):
    """A line for each entry: name(shape) before the first row of a shape, then the row, and
    cells(entry, entry of bf16)."""
    lines = []
    for of_shape, rows in by_row(entries).items():
        for row, entry in rows.items():
            title = name(of_shape) if row == "bf16" else ""
            lines.append([title, row, *cells(entry, rows["bf16"])])
    return table(head, lines)


# ---- tables

def kernel_table(kernels):
    lines = [[kernel["name"], f"{kernel['ms']:.3f}", f"{kernel['terabytes_per_s']:.2f}",
              f"{kernel['of_copy']:.0%}"] for kernel in kernels]
    return table(["kernel", "ms", "TB/s", "of a copy"], lines)


def where_table(parts):
    lines = []
    for part in parts:
        least = show(part["least_ms"], ".3f") if part["least_ms"] else ""
        lines.append([part["name"], f"{part['ms']:.3f}", least])
    return table(["part", "ms", "at least"], lines)


def product_table(products):
    def cells(entry, base):
        rate = ""
        if "ms" in entry:
            flop = 2 * entry["tokens"] * entry["out"] * entry["in"]
            rate = f"{flop / entry['ms'] / 1e9:.0f}"
        return [show(entry.get("ms"), ".3f"), rate, ratio_to_bf16(entry, base), ghz(entry)]

    head = ["tokens, out, in", "row", "ms", "TFLOP/s", "/ bf16", "GHz"]
    return table_by_row(head, products, numbers, cells)


def linear_table(linears):
    def cells(entry, base):
        return [
            show(entry.get("forward_ms"), ".3f"),
            show(entry.get("backward_ms"), ".3f"),
            show(entry.get("ms"), ".3f"),
            ratio_to_bf16(entry, base),
            ghz(entry),
            show(entry.get("called_ms"), ".3f"),
            ratio_to_bf16(entry, base, "called_"),
            ghz(entry, "called_"),
        ]

    head = ["tokens, out, in", "row", "forward", "backward", "sum, GPU", "/ bf16", "GHz",
            "called", "/ bf16", "GHz"]
    return table_by_row(head, linears, numbers, cells)


def alone_table(alone):
    base = alone[0]
    lines = [[entry["row"], show(entry.get("ms"), ".3f"),
              ratio(entry.get("ms"), base.get("ms")), ghz(entry)] for entry in alone]
    return table(["row", "sum, GPU", "/ bf16", "GHz"], lines)


def step_name(size):
    batch, seq = STEPS[size]
    return f"{size}, {batch} x {seq}"


def step_table(steps):
    def cells(entry, base):
        return [
            show(entry.get("ms"), ".1f"),
            ratio_to_bf16(entry, base),
            show(entry.get("tokens_per_s"), ",.0f"),
            show(entry.get("peak_gib"), ".2f"),
            ratio(entry.get("peak_gib"), base.get("peak_gib")),
        ]

    head = ["step", "row", "ms", "/ bf16", "tokens/s", "peak GiB", "/ bf16"]
    return table_by_row(head, steps, step_name, cells)


def energy_table(steps):
    """What a step takes of the GPU's energy, where that is known."""
    def cells(entry, base):
        if "joules" not in entry:
            return ["n/a" if "ms" in entry else "out of memory", "", "", "", ""]
        batch, seq = STEPS[entry["size"]]
        return [
            f"{entry['joules']:.2f}",
            f"{1000 * entry['joules'] / (batch * seq):.3f}",
            ratio(entry["joules"], base.get("joules")),
            f"{entry['watts']:.0f}",
            f"{entry['alone_ms']:.1f}",
        ]

    head = ["step", "row", "J", "mJ a token", "/ bf16", "W", "ms, alone"]
    return table_by_row(head, steps, step_name, cells)


# ---- from which width on a row is faster

def squares(linears):
    """{width: {row: entry}} of the square layers, the widest first."""
    widest_first = sorted(by_row(linears).items(), reverse=True)
    return {dimensions[1]: rows for dimensions, rows in widest_first if dimensions in WIDTHS}


def width_table(linears):
    """The ratios by both clocks, of a row side by side."""
    columns = [(row, clock) for row in ROWS[1:] for clock in CLOCKS]
    lines = []
    for width, rows in reversed(squares(linears).items()):
        ratios = [ratio_to_bf16(rows[row], rows["bf16"], clock) or "out of memory"
                  for row, clock in columns]
        lines.append([str(width), *ratios])
    titles = ["called" if clock else f"{row} / bf16, GPU" for row, clock in columns]
    return table(["width", *titles], lines)


def faster_from(linears, row, clock):
    """The smallest measured width from which on row stays faster than bf16, or None."""
    smallest = None
    for width, rows in squares(linears).items():
        is_measured = clock + "ms" in rows[row]
        is_alone = clock + "ms" not in rows["bf16"]     # bf16 does not even fit into memory
        is_faster = is_measured and (is_alone or rows[row][clock + "ratio"] < 1)
        if not is_faster:
            break
        smallest = width
    return smallest


def break_even(linears, row, clock):
    width = faster_from(linears, row, clock)
    if width is None:
        widest = max(squares(linears))
        return (f"{CLOCKS[clock]}, {row} is not faster than bf16 at {widest}, the largest width "
                "measured.")
    return f"{CLOCKS[clock]}, {row} is faster than bf16 from a width of {width} on."


# ---- the whole report

ABOUT_LINEARS = f"""\
One linear layer, milliseconds, by two clocks. Forward, backward and their sum are the GPU's time,
replayed from a CUDA graph: what the layer costs inside a compiled model. "Called" is the same layer
called from Python, where a narrow one waits for the host. The rows of a shape take turns in
{ROUNDS} rounds whose order changes: one is replayed or called for some milliseconds, then the next.
A time is the median over the rounds, and a ratio the median of the ratio to bf16 by the same clock
in the same round. GHz is the GPU's frequency at the end of a turn."""

ABOUT_ALONE = f"""\
In turns, the rows share one state of the card. A row that runs alone settles at a frequency of its
own, since one that draws less power is slowed down less. Here each row ran for seconds without
turns at {numbers(SHAPES[0])}:"""

ABOUT_STEPS = f"""\
A training step, compiled: forward, backward, clip, AdamW, weights quantised; {VOCABULARY:,} tokens
in the vocabulary. Milliseconds by the clock on the wall, host included. The rows of a size take
turns, a step at a time, in {STEP_ROUNDS} rounds; medians and ratios are made as those of layers. A
ratio with ~ is that of two medians of different rounds, because both rows do not fit into memory
together."""

ABOUT_ENERGY = f"""\
The energy of these steps, of the whole board and by its own counter. Each row ran alone for
{ENERGY_SECONDS} seconds, each step waited for, as in training. W is the mean power. Idle, before
any step ran, the GPU took"""

NO_ENERGY = """\
The energy of these steps is n/a: this GPU does not count its joules, or NVML's package for Python
is missing (`pip install nvidia-ml-py`)."""

ABOUT_KERNELS = """\
The kernels at 16384 x 4096, bytes read and written; the product y = x w.T alone, the GPU's time,
replayed from a CUDA graph. The kernels take turns, and so do the rows of a product."""


def report(results):
    """What `make bench` writes between its markers, of all or some of the results."""
    title = f"`make bench` on one {results['gpu']} (torch {results['torch']}, {results['date']})"
    if "other_product" in results:
        title += f",\nbut with --gemm {results['other_product']}"
    parts = [title]
    parts += report_linears(results.get("linears", []), results.get("alone"),
                            results.get("where"))
    if "steps" in results:
        parts += [ABOUT_STEPS, step_table(results["steps"])]
        parts += report_energy(results["steps"], results["idle_watts"])
    if "kernels" in results:
        parts += [
            ABOUT_KERNELS,
            kernel_table(results["kernels"]),
            product_table(results["products"]),
        ]
    return "\n\n".join(parts)


def report_energy(steps, idle_watts):
    if idle_watts is None:
        return [NO_ENERGY]
    return [f"{ABOUT_ENERGY} {idle_watts:.0f} W.", energy_table(steps)]


def report_linears(linears, alone, where):
    parts = []
    if linears:
        in_table = [entry for entry in linears if shape(entry) in SHAPES]
        parts += [ABOUT_LINEARS, linear_table(in_table)]
    if alone:
        parts += [ABOUT_ALONE, alone_table(alone)]
    if where:
        parts += [
            f"Where fp4's time goes at {numbers(SHAPES[0])}. At least: the operations at the "
            "fastest rate in\nthe table of products below, or the bytes at a copy's bandwidth.",
            where_table(where),
        ]
    if squares(linears):
        sentences = [break_even(linears, row, clock) for clock in CLOCKS for row in ROWS[1:]]
        parts += [
            f"Square layers, {WIDTHS[0][0]} tokens, forward and backward, by both clocks.",
            "\n".join(sentences),
            width_table(linears),
        ]
    return parts
