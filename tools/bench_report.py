"""
The tables of `make bench`, made of what bench.py has measured.

An entry is a dictionary: what was measured (tokens, out and in of a linear or a product, or the
size of a model), its row of fp4/recipes.py, and times. Where the GPU's memory did not suffice there
are no times.
"""
from tools.markdown import table

# tokens, out-features, in-features
SHAPES = [(16384, 4096, 4096), (16384, 11008, 4096), (16384, 4096, 11008), (32768, 2048, 2048),
          (32768, 640, 640)]
WIDTHS = [(16384, width, width) for width in (512, 1024, 2048, 4096, 8192)]
STEPS = {"tiny": (8, 256), "30M": (64, 512), "100M": (32, 512), "800M": (16, 512)}  # batch, seq
ROWS = ["bf16", "fp8", "fp4", "fp4-sr"]
VOCABULARY = 32000


# ---- cells

def show(value, form):
    return "out of memory" if value is None else format(value, form)


def ratio(value, base):
    return "" if value is None or base is None else f"{value / base:.2f}"


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
        return [show(entry.get("ms"), ".3f"), rate, ratio(entry.get("ms"), base.get("ms"))]

    return table_by_row(["tokens, out, in", "row", "ms", "TFLOP/s", "/ bf16"], products, numbers,
                        cells)


def linear_table(linears):
    def cells(entry, base):
        return [
            show(entry.get("forward_ms"), ".3f"),
            show(entry.get("backward_ms"), ".3f"),
            show(entry.get("ms"), ".3f"),
            ratio(entry.get("ms"), base.get("ms")),
            show(entry.get("called_ms"), ".3f"),
            ratio(entry.get("called_ms"), base.get("called_ms")),
        ]

    head = ["tokens, out, in", "row", "forward", "backward", "sum, GPU", "/ bf16", "called",
            "/ bf16"]
    return table_by_row(head, linears, numbers, cells)


def step_table(steps):
    def name(size):
        batch, seq = STEPS[size]
        return f"{size}, {batch} x {seq}"

    def cells(entry, base):
        return [
            show(entry.get("ms"), ".1f"),
            ratio(entry.get("ms"), base.get("ms")),
            show(entry.get("tokens_per_s"), ",.0f"),
            show(entry.get("peak_gib"), ".2f"),
            ratio(entry.get("peak_gib"), base.get("peak_gib")),
        ]

    head = ["step", "row", "ms", "/ bf16", "tokens/s", "peak GiB", "/ bf16"]
    return table_by_row(head, steps, name, cells)


# ---- from which width on a row is faster

def squares(linears):
    """{width: {row: entry}} of the square layers, the widest first."""
    widest_first = sorted(by_row(linears).items(), reverse=True)
    return {dimensions[1]: rows for dimensions, rows in widest_first if dimensions in WIDTHS}


def width_table(linears):
    lines = []
    for width, rows in reversed(squares(linears).items()):
        base = rows["bf16"].get("ms")
        ratios = [ratio(rows[row].get("ms"), base) or "out of memory" for row in ROWS[1:]]
        lines.append([str(width), *ratios])
    return table(["width", *(f"{row} / bf16" for row in ROWS[1:])], lines)


def faster_from(linears, row):
    """The smallest measured width from which on row stays faster than bf16, or None."""
    smallest = None
    for width, rows in squares(linears).items():
        ms = rows[row].get("ms")
        base = rows["bf16"].get("ms", float("inf"))
        is_faster = ms is not None and ms < base
        if not is_faster:
            break
        smallest = width
    return smallest


def break_even(linears, row):
    width = faster_from(linears, row)
    if width is None:
        widest = max(squares(linears))
        return f"{row} is not faster than bf16 at {widest}, the largest width measured."
    return f"{row} is faster than bf16 from a width of {width} on."


# ---- the whole report

def report(results):
    """What `make bench` writes between its markers, of all or some of the results."""
    title = f"`make bench` on one {results['gpu']} (torch {results['torch']}, {results['date']})"
    if "other_product" in results:
        title += f",\nbut with --gemm {results['other_product']}"
    parts = [title]
    parts += report_linears(results.get("linears", []), results.get("where"))
    if "steps" in results:
        parts += [
            "A training step, compiled: forward, backward, clip, AdamW, weights quantised; "
            f"{VOCABULARY:,} tokens\nin the vocabulary.",
            step_table(results["steps"]),
        ]
    if "kernels" in results:
        parts += [
            "The kernels at 16384 x 4096, bytes read and written; the product y = x w.T alone.",
            kernel_table(results["kernels"]),
            product_table(results["products"]),
        ]
    return "\n\n".join(parts)


def report_linears(linears, where):
    parts = []
    if linears:
        parts += [
            "One linear layer, milliseconds. Forward, backward and their sum are the GPU's time, "
            "replayed\nfrom a CUDA graph: what the layer costs inside a compiled model. \"Called\" "
            "is the same layer called\nfrom Python, where a narrow one waits for the host.",
            linear_table([entry for entry in linears if shape(entry) in SHAPES]),
        ]
    if where:
        parts += [
            f"Where fp4's time goes at {numbers(SHAPES[0])}. At least: the operations at the "
            "fastest rate in\nthe table of products below, or the bytes at a copy's bandwidth.",
            where_table(where),
        ]
    if squares(linears):
        widths = "\n".join(break_even(linears, row) for row in ROWS[1:])
        parts += [
            f"Square layers, {WIDTHS[0][0]} tokens, the sum on the GPU.\n{widths}",
            width_table(linears),
        ]
    return parts
