"""
Markdown tables for the screen and the README, and what rewrites the README between two markers.
"""
import os

README = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "README.md")


def show(value, form): return "out of memory" if value is None else format(value, form)

def ratio(value, base): return "" if value is None or base is None else f"{value / base:.2f}"

def table(head, lines):
    """the first column to the left, the others to the right"""
    widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]
    rule = ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]
    align = lambda line: [line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:]))]
    return "\n".join("| " + " | ".join(align(line)) + " |" for line in [head, rule, *lines])


def shape(entry): return entry["size"] if "size" in entry else (entry["tokens"], entry["out"], entry["in"])

def by_row(entries):
    """{shape: {row: entry}}, in order"""
    found = {}
    for entry in entries: found.setdefault(shape(entry), {})[entry["row"]] = entry
    return found


def table_by_row(head, entries, name, cells):
    """a line an entry: name(shape) in the first row's, then row and cells(entry, bf16's entry)"""
    return table(head, [[name(s) if row == "bf16" else "", row, *cells(entry, rows["bf16"])]
                        for s, rows in by_row(entries).items() for row, entry in rows.items()])


def numbers(s): return ", ".join(map(str, s))

def kernel_table(found):
    return table(["kernel", "ms", "TB/s", "of a copy"],
                 [[k["name"], f"{k['ms']:.3f}", f"{k['terabytes_per_s']:.2f}", f"{k['of_copy']:.0%}"] for k in found])


def where_table(found):
    return table(["part", "ms", "at least"], [[part["name"], f"{part['ms']:.3f}", show(part["least_ms"], ".3f") if part["least_ms"] else ""] for part in found])


def product_table(found):
    flop = lambda e: 2 * e["tokens"] * e["out"] * e["in"]
    return table_by_row(["tokens, out, in", "row", "ms", "TFLOP/s", "/ bf16"], found, numbers, lambda e, base: [
        show(e.get("ms"), ".3f"), f"{flop(e) / e['ms'] / 1e9:.0f}" if "ms" in e else "",
        ratio(e.get("ms"), base.get("ms"))])


def linear_table(found):
    head = ["tokens, out, in", "row", "forward", "backward", "sum, GPU", "/ bf16", "called", "/ bf16"]
    return table_by_row(head, found, numbers, lambda e, base: [
        *(show(e.get(time), ".3f") for time in ("forward_ms", "backward_ms", "ms")), ratio(e.get("ms"), base.get("ms")),
        show(e.get("called_ms"), ".3f"), ratio(e.get("called_ms"), base.get("called_ms"))])


# ---- files

def replaced(text, body, name="bench"):
    """text with body between its markers"""
    start, stop = f"<!-- {name} -->", f"<!-- /{name} -->"
    if not (text.count(start) == text.count(stop) == 1 and text.index(start) < text.index(stop)):
        raise ValueError(f"it needs one {start} and, below it, one {stop}")
    return text[:text.index(start) + len(start)] + f"\n{body}\n" + text[text.index(stop):]


def write(path, text):
    """all of it, or what was there before"""
    with open(path + ".tmp", "w") as file: file.write(text)
    os.replace(path + ".tmp", path)
