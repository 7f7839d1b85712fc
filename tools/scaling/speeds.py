"""
Says how long a training step takes in each precision.

The cost model of the paper (section 4.2) asks for two numbers: the time of the forward and of the
backward products of a model of N parameters, in any unit. They come from one of these sources:

    bops            the number of bits alone: FP8 is twice and FP4 four times as fast as BF16, and
                    the backward pass is twice the work of the forward pass
    h100, b200      the same, with the units of the datasheet (an H100 has none for FP4: its FP4
                    operands run as FP8)
    rtx5090         the authors' kernels, as they measured them on the four linears of a block, on
                    32,768 tokens
    a file          what `make bench` measured on the GPU at hand (fp4/build/bench.json)
"""
import csv
import json
import os
from collections import defaultdict
from typing import NamedTuple

import numpy as np

from data.files import UserError, check

HERE = os.path.dirname(__file__)
ROWS = ("bf16", "fp8", "fp4", "fp4-sr")         # the rows of fp4/recipes.py that are compared
BENCH = os.path.relpath(os.path.join(HERE, "..", "..", "fp4", "build", "bench.json"))


class Speeds(NamedTuple):
    """The times of one GPU, over the size of the model."""
    name: str                   # of the GPU
    source: str                 # what the times are, in words
    sizes: np.ndarray           # the models that were measured, in parameters, rising; it has a
                                # single entry if the size does not matter
    times: dict                 # {precision: (forward, backward)}, each an array over the sizes
    steps: tuple = ()           # sentences on whole training steps, which are more than products

    def at(self, precision, N):
        """
        Returns (forward, backward) for models of N parameters: linear between the sizes that were
        measured, constant outside them.
        """
        return [np.interp(N, self.sizes, times) for times in self.times[precision]]

    def has(self, precision):
        return precision in self.times

    def outside(self, N):
        """Returns a sentence if N is not among the models that were measured, otherwise ""."""
        is_inside = .9 * self.sizes[0] <= N <= 1.1 * self.sizes[-1]
        if len(self.sizes) == 1 or is_inside:
            return ""
        return (f"{self.name} was only measured on linears of models of {self.sizes[0]:.2g} to "
                f"{self.sizes[-1]:.2g}")


def for_gpu(gpu):
    """
    Returns the Speeds of a name in the table above, or of a .json file of `make bench`.

    Without a name they are those of this machine's file, or by counting bits if there is none.
    """
    if gpu == "rtx5090":
        return rtx5090()
    if gpu == "h100":
        source = "FP8 units, no FP4 units, quantisation for nothing"
        return by_units("H100", source, fp8=2, fp4=2)
    if gpu == "b200":
        return by_units("B200", "FP8 and FP4 units, quantisation for nothing", fp8=2, fp4=4)
    if gpu == "bops" or (not gpu and not os.path.exists(BENCH)):
        return by_units("BOPS", "twice the speed for half the bits", fp8=2, fp4=4)
    check(not gpu or gpu.endswith(".json"),
          f"gpu {gpu!r} is not bops, h100, b200, rtx5090 or a .json of `make bench`")
    return from_bench(gpu or BENCH)


def by_units(name, source, **speedups):
    """Makes BF16's forward pass take 1 and its backward pass 2; speedups are over BF16."""
    times = {}
    for precision, speedup in {"bf16": 1, **speedups}.items():
        times[precision] = (np.array([1 / speedup]), np.array([2 / speedup]))
    return Speeds(name, f"predicted, not measured: {source}", np.ones(1), times)


def rtx5090():
    """
    Reads the authors' speedups of FP4 over FP8 and over BF16.

    They publish no times, so FP8's forward pass is set to 1 and its backward pass to 2.
    """
    with open(os.path.join(HERE, "data", "rtx5090.csv")) as file:
        rows = list(csv.DictReader(file))
    column = {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}
    fp8_forward = np.ones(len(rows))
    fp8_backward = 2 * fp8_forward
    fp4_forward = fp8_forward / column["forward_vs_fp8"]
    fp4_backward = fp8_backward / column["backward_vs_fp8"]
    times = {
        "bf16": (fp4_forward * column["forward_vs_bf16"],
                 fp4_backward * column["backward_vs_bf16"]),
        "fp8": (fp8_forward, fp8_backward),
        "fp4": (fp4_forward, fp4_backward),
    }
    source = "the authors' kernels, measured by them"
    return Speeds("RTX 5090", source, column["params"], times)


# ---- the file of `make bench`

def from_bench(path):
    """
    Reads a file of tools/bench.py. Raises UserError if it is none, or if it tells nothing.

    The linears of one width stand for a model that wide, with a layer for each 128 of its width.
    What did not fit into memory has no times in the file; a shape counts only if it has times in
    every row, so that the sums below are over the same shapes.
    """
    bench = read_json(path)
    try:
        times = linear_times(bench)
        step_sentences = compare_steps(bench)
        name = bench["gpu"]
        source = f"measured by make bench on {bench['date']}, torch {bench['torch']}"
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not a file of `make bench` ({type(error).__name__}: {error})")

    rows = [row for row in ROWS if any(row in of_width for of_width in times.values())]
    check("bf16" in rows and "fp4" in rows,
          f"{path} has no linears in bf16 and fp4, so there is nothing to compare")
    shapes = common_shapes(times, rows)
    check(shapes, f"{path} has no shape that was measured in all of {', '.join(rows)}")
    total = {row: sum_over_shapes(times, row, shapes) for row in rows}
    check(all((row_times > 0).all() for row_times in total.values()),
          f"{path} holds a time that is not positive")
    from model import count_params      # This imports torch, which no other source needs.
    sizes = [count_params(max(1, width // 128), width) for width in shapes]
    return Speeds(name, source, np.array(sizes, float), total, tuple(step_sentences))


def read_json(path):
    try:
        with open(path) as file:
            return json.load(file)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; `make bench` writes one on a GPU")
    except ValueError:
        raise UserError(f"{path} is not JSON; `make bench` writes it anew")


def linear_times(bench):
    """Returns {width: {row: {(tokens, out, in): (forward ms, backward ms)}}}."""
    times = defaultdict(lambda: defaultdict(dict))
    for linear in bench["linears"]:
        width = min(linear["out"], linear["in"])
        shape = (linear["tokens"], linear["out"], linear["in"])
        if "ms" in linear:
            forward_ms = float(linear["forward_ms"])
            backward_ms = float(linear["backward_ms"])
            times[width][linear["row"]][shape] = (forward_ms, backward_ms)
    return times


def compare_steps(bench):
    """Returns a sentence on each whole training step that was timed in bf16 as well."""
    ms = {}
    for step in bench.get("steps", []):
        if "ms" in step:
            ms[step["size"], step["row"]] = float(step["ms"])
    sentences = []
    for (size, row), row_ms in ms.items():
        if row != "bf16" and (size, "bf16") in ms:
            ratio = row_ms / ms[size, "bf16"]
            sentences.append(f"A whole training step of {size} there: {row} takes {ratio:.2f} of "
                             "bf16's time.")
    return sentences


def common_shapes(times, rows):
    """Returns {width: shapes with times in every row}, narrow widths first, none without shapes."""
    shapes = {}
    for width in sorted(times):
        measured = [set(times[width][row]) for row in rows]
        in_every_row = set.intersection(*measured)
        if in_every_row:
            shapes[width] = in_every_row
    return shapes


def sum_over_shapes(times, row, shapes):
    """Returns the row's times, summed over the shapes of each width: (2, widths)."""
    totals = []
    for width, of_width in shapes.items():
        totals.append(np.sum([times[width][row][shape] for shape in of_width], axis=0))
    return np.array(totals).T
