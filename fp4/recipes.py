"""
The table of precisions: one row per value of --precision. A row answers one question per column, and
any column can be changed for one run: Linear(..., "fp4", scale="nearest"), or --scale nearest.
"""
from typing import NamedTuple


class Recipe(NamedTuple):
    forward: bool = True        # y = x w.T: quantise x and w (QuEST)?
    backward: bool = True       # dx = dy w, dw = dy.T x: quantise dy, and x and w once more (AbsMax * 3/4)?
    scale: str = "floor"        # the forward scale is a power of two: "floor" (the authors' code) or "nearest"
    rounding: str = "nearest"   # of the backward operands: "nearest" (paper v4) or "stochastic" (v1)
    signs: str = "before"       # the random signs act "before" the Hadamard, or "after": then they do nothing


RECIPES = {
    "bf16":    Recipe(forward=False, backward=False),
    "fp4":     Recipe(),                        # Quartet as last published (arXiv 2505.14669v4, Algorithm 1)
    "fp4-sr":  Recipe(rounding="stochastic"),   # the first version's rounding
    "fp4-fwd": Recipe(backward=False),          # QAT: 4-bit forward, unquantised backward
}

AXES = {"scale": ("floor", "nearest"), "rounding": ("nearest", "stochastic"), "signs": ("before", "after")}


def recipe(precision, **axes):
    """the row `precision`, with the given axes changed; a ValueError lists the choices"""
    if precision not in RECIPES:
        raise ValueError(f"precision {precision!r} is not one of {', '.join(RECIPES)}")
    for axis, value in axes.items():
        if value not in AXES.get(axis, ()):
            raise ValueError(f"{axis} {value!r} is not one of {', '.join(AXES.get(axis, AXES))}")
    return RECIPES[precision]._replace(**axes)
