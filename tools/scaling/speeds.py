"""
How long a training step takes in each precision. The cost model of the paper (section 4.2) asks for two numbers: the
time of the forward and of the backward products of a model of N parameters, in any unit. Where they come from:

    bops            nothing but bits: FP8 twice and FP4 four times as fast as BF16; backward twice the work of forward
    h100, b200      the same with the datasheet's units (an H100 has none for FP4: its FP4 operands run as FP8)
    rtx5090         the authors' kernels, measured by them on the four linears of a block, 32,768 tokens
    a file          what `make bench` measured on the GPU at hand (fp4/build/bench.json)
"""
import csv, json, os
from collections import defaultdict
from typing import NamedTuple
import numpy as np
from scaling.runs import Stop, check

HERE = os.path.dirname(__file__)
ROWS = "bf16", "fp8", "fp4", "fp4-sr"                            # of fp4/recipes.py that are compared
BENCH = os.path.relpath(os.path.join(HERE, "..", "fp4", "build", "bench.json"))


class Speeds(NamedTuple):
    name: str                   # of the GPU
    source: str                 # what the times are, in words
    sizes: np.ndarray           # models that were measured, in parameters, rising; one entry if it does not matter
    times: dict                 # {precision: (forward, backward)}, each an array over the sizes
    steps: tuple = ()           # sentences on whole training steps, which are more than these products

    def at(self, precision, N):
        """(forward, backward) for models of N parameters: linear between the measured ones, constant outside"""
        return [np.interp(N, self.sizes, t) for t in self.times[precision]]

    def has(self, precision): return precision in self.times

    def outside(self, N):
        """a sentence if N is not among the models that were measured, otherwise nothing"""
        if len(self.sizes) == 1 or .9 * self.sizes[0] <= N <= 1.1 * self.sizes[-1]: return ""
        return f"{self.name} was only measured on linears of models of {self.sizes[0]:.2g} to {self.sizes[-1]:.2g}"


def by_units(name, source, **faster):
    """BF16's forward takes 1, its backward 2; another precision is `faster` so many times"""
    return Speeds(name, f"predicted, not measured: {source}", np.ones(1),
                  {p: (np.array([1 / x]), np.array([2 / x])) for p, x in dict(bf16=1, **faster).items()})


def rtx5090():
    """the authors publish how much faster FP4 is than FP8 and than BF16; FP8's forward is a third of its step"""
    rows = list(csv.DictReader(open(os.path.join(HERE, "data", "rtx5090.csv"))))
    column = {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}
    one = np.ones(len(rows))
    fp4 = one / column["forward_vs_fp8"], 2 / column["backward_vs_fp8"]
    bf16 = fp4[0] * column["forward_vs_bf16"], fp4[1] * column["backward_vs_bf16"]
    return Speeds("RTX 5090", "the authors' kernels, measured by them", column["params"],
                  dict(bf16=bf16, fp8=(one, 2 * one), fp4=fp4))


def params(layers, C):
    """the paper's N of a model of model.py: everything but the embedding and the head"""
    hidden = -(-int(8 * C / 3) // 256) * 256
    return layers * (4 * C * C + 3 * C * hidden + 2 * C) + C


def bench(path):
    """a file of fp4/bench.py; the linears of one width stand for a model that wide, with a layer for each 128 of it.
    What did not fit into memory has no times there, and a shape counts if it has times in every row"""
    try: found = json.load(open(path))
    except OSError as error: raise Stop(f"cannot read {path}: {error.strerror}; `make bench` writes one on a GPU")
    except ValueError: raise Stop(f"{path} is not JSON; `make bench` writes it anew")
    times = defaultdict(lambda: defaultdict(dict))              # {width: {row: {shape: (forward, backward)}}}
    try:
        for one in found["linears"]:
            width, shape = min(one["out"], one["in"]), (one["tokens"], one["out"], one["in"])
            if "ms" in one: times[width][one["row"]][shape] = float(one["forward_ms"]), float(one["backward_ms"])
        ms = {(step["size"], step["row"]): float(step["ms"]) for step in found.get("steps", []) if "ms" in step}
        name, source = found["gpu"], f"measured by make bench on {found['date']}, torch {found['torch']}"
    except (KeyError, TypeError, ValueError) as error:
        raise Stop(f"{path} is not a file of `make bench` ({type(error).__name__}: {error})")
    rows = [row for row in ROWS if any(row in of_width for of_width in times.values())]
    check({"bf16", "fp4"} <= {*rows}, f"{path} has no linears in bf16 and fp4, so there is nothing to compare")
    shapes = {w: set.intersection(*({*times[w][row]} for row in rows)) for w in sorted(times)}
    widths = [w for w in shapes if shapes[w]]
    check(widths, f"{path} has no shape that was measured in all of {', '.join(rows)}")
    total = {row: np.array([np.sum([times[w][row][s] for s in shapes[w]], axis=0) for w in widths]).T for row in rows}
    check(all((t > 0).all() for t in total.values()), f"{path} holds a time that is not positive")
    steps = [f"A whole training step of {size} there: {row} takes {t / ms[size, 'bf16']:.2f} of bf16's time."
             for (size, row), t in ms.items() if row != "bf16" and (size, "bf16") in ms]
    return Speeds(name, source, np.array([params(max(1, w // 128), w) for w in widths], float), total, tuple(steps))


def speeds(gpu):
    """the row of the table above that is meant; nothing given: the file of `make bench` if there is one, else bops"""
    if gpu == "rtx5090": return rtx5090()
    if gpu == "h100": return by_units("H100", "FP8 units, no FP4 units, quantisation for nothing", fp8=2, fp4=2)
    if gpu == "b200": return by_units("B200", "FP8 and FP4 units, quantisation for nothing", fp8=2, fp4=4)
    if gpu == "bops" or not gpu and not os.path.exists(BENCH):
        return by_units("BOPS", "twice the speed for half the bits", fp8=2, fp4=4)
    check(not gpu or gpu.endswith(".json"), f"gpu {gpu!r} is not bops, h100, b200, rtx5090 or a .json of `make bench`")
    return bench(gpu or BENCH)
