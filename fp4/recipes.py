"""
The table of precisions: one row per value of --precision. A row says for each of the three products of a linear layer
(y = x w.T, dgrad dx = dy w, wgrad dw = dy.T x) how its two operands are quantised along the axis that is summed over,
or None: not at all. Each column can be changed for one run, Linear(..., "fp4", scale="nearest") or --scale nearest,
with one value for the products named at AXES or with three: --rotation 32:none:128 is forward, dgrad, wgrad.

A row whose numbers the MXFP4 kernels compute runs on them (`kernels`); any other is emulated in PyTorch
(emulated.py), and so are the methods that no columns describe (baselines.py). A row of your own: RECIPES["mine"] =
Recipe(...), as the README shows.
"""
from typing import NamedTuple
from .formats import SCALES     # which scale rules a format has


class Product(NamedTuple):
    format: str = "mxfp4"           # of the elements
    scale: str = "absmax34"         # how a block finds its scale: formats.py
    rotation: int = 32              # Hadamard rotation of so many neighbours along the sum; 0: none
    signs: str = "before"           # random signs "before" the Hadamard, "after" it (then they do nothing), or "none"
    rounding: str = "nearest"       # "nearest", "stochastic", or "eden": to nearest, then a factor against bias
    right: str = "alike"            # the right operand, w, w.T or x.T: "alike"; forward also in "square" blocks; else
                                    # alike quantises again what the forward product used, "kept" takes that as it is,
                                    # "original" quantises the unquantised tensor, to nearest


class Recipe(NamedTuple):
    forward: Product = None
    dgrad: Product = None
    wgrad: Product = None
    method: str = ""                # a method of its own, without columns: fp8.py, baselines.py

    @property
    def kernels(self):
        """do the MXFP4 kernels (linear.py's QuartetMatmul) compute exactly this?"""
        forward = [QUEST._replace(scale=s) for s in ("floor", "nearest")]
        turned = (32, "before"), (32, "after"), (0, "none")
        backward = [[p._replace(rotation=n, signs=s) for n, s in turned] for p in (ABSMAX, STOCHASTIC)]
        return self.forward in forward and any(self.dgrad in ps and self.wgrad in ps for ps in ([None], *backward))

    quantised = property(lambda self: any(self))
    multiple  = property(lambda self: 32 if self.kernels else 16 if self.quantised else 1)   # of the features
    # the columns as QuartetMatmul knows them
    scale      = property(lambda self: self.forward.scale)
    backward   = property(lambda self: self.dgrad is not None)
    stochastic = property(lambda self: self.dgrad.rounding == "stochastic")
    turns      = property(lambda self: (self.dgrad.signs, self.wgrad.signs))     # "none": not rotated either


QUEST = Product("mxfp4", "floor", 32, "none")                       # Quartet's forward product, and its backward ones
ABSMAX = Product("mxfp4", "absmax34", 32, "before")
STOCHASTIC, PMA = ABSMAX._replace(rounding="stochastic"), ABSMAX._replace(scale="pma")
ORIGINAL = STOCHASTIC._replace(signs="after")
MXFP8 = Product("mxfp8", "absmax", 0, "none", right="original")
NVFP4 = Product("nvfp4", "absmax", 0, "none")
FOUR_SIX = NVFP4._replace(scale="four-six")
NVIDIA = (NVFP4._replace(rounding="stochastic", right="kept"),
          Product("nvfp4", "absmax", 16, "before", "stochastic", "original"))
TETRAJET = Product("nvfp4", "absmax", 32, "before", "stochastic")
EDEN = Product("nvfp4", "absmax", 128, "before", "eden")

RECIPES = {
    "bf16":          Recipe(),
    "fp4":           Recipe(QUEST, ABSMAX, ABSMAX),         # Quartet as last published (2505.14669v4, Algorithm 1)
    "fp4-sr":        Recipe(QUEST, STOCHASTIC, STOCHASTIC), # the first version's rounding, with true random signs
    "fp4-fwd":       Recipe(QUEST),                         # QAT: 4-bit forward, unquantised backward
    "fp4-bwd":       Recipe(None, ABSMAX, ABSMAX),          # the opposite; stochastic, it is Tseng et al. (2502.20586)
    "fp4-original":  Recipe(QUEST, ORIGINAL, ORIGINAL),     # what Quartet's published main branch computes by default
    "fp4-pma":       Recipe(QUEST, PMA, PMA),               # Quartet's ablation: the shrinkage of to nearest, undone
    "fp8":           Recipe(method="fp8"),                  # E4M3 forward, E5M2 gradients, a scale a tensor: fp8.py
    "mxfp8":         Recipe(MXFP8._replace(right="alike"), MXFP8, MXFP8),       # OCP Microscaling v1.0, E4M3 everywhere
    "nvfp4":         Recipe(NVFP4._replace(right="square"), *NVIDIA),           # NVIDIA (2509.25149), in all layers
    "four-over-six": Recipe(FOUR_SIX._replace(right="square"), *NVIDIA),        # with 4/6 forward, as 2601.22813 ran it
    "tetrajet2":     Recipe(NVFP4, TETRAJET, TETRAJET),     # TetraJet-v2, simplified as in 2601.22813, section 6
    "quartet2":      Recipe(FOUR_SIX, EDEN, EDEN),          # Quartet II (2601.22813): MS-EDEN backward
    "luq-int4":      Recipe(method="luq-int4"),             # LUQ (2112.10769); this one and those below: baselines.py
    "luq-fp4":       Recipe(method="luq-fp4"),              # the same with E2M1 forward
    "jetfire-fp4":   Recipe(method="jetfire-fp4"),          # Jetfire (2403.12422) in E2M1
    "halo-fp4":      Recipe(method="halo-fp4"),             # HALO-2 (2501.02625) in E2M1
    "lss-int4":      Recipe(method="lss-int4"),             # LSS (2306.11987), without learning the step
}

PRODUCTS = "forward", "dgrad", "wgrad"
ALL, FORWARD, BACKWARD = (0, 1, 2), (0,), (1, 2)                    # which products a single value changes
AXES = {
    "format":   (*SCALES,),
    "scale":    (*dict.fromkeys(s for rules in SCALES.values() for s in rules), "quest-floor", "quest-nearest"),
    "rotation": ("none", "16", "32", "64", "128"),
    "signs":    ("before", "after", "none"),
    "rounding": ("nearest", "stochastic", "eden", "rtn", "sr"),
    "forward":  ("on", "off"),
    "dgrad":    ("on", "off"),
    "wgrad":    ("on", "off"),
}
CHANGES = dict(format=ALL, scale=FORWARD, rotation=ALL, signs=BACKWARD, rounding=BACKWARD)
SAME = {"quest-floor": "floor", "quest-nearest": "nearest", "rtn": "nearest", "sr": "stochastic"}


def check(ok, sentence):
    if not ok: raise ValueError(sentence)


def recipe(precision, **axes):
    """the row `precision`, with the given axes changed; a ValueError says in a sentence what is wrong"""
    check(precision in RECIPES, f"precision {precision!r} is not one of {', '.join(RECIPES)}")
    row = RECIPES[precision]
    for axis, value in axes.items():
        check(axis in AXES, f"{axis} {value!r} is not one of {', '.join(AXES)}")
        values = str(value).split(":")
        for v in values: check(v in AXES[axis], f"{axis} {v!r} is not one of {', '.join(AXES[axis])}")
        check(len(values) == 1 or len(values) == 3 and axis in CHANGES, f"{axis} {value!r}: give one value"
              + " or three, forward:dgrad:wgrad" * (axis in CHANGES))
    check(not (row.method and axes), f"{precision} is a method of its own and has no {', '.join(axes)} to change")
    products = [p if axes.get(name) != "off" else None for name, p in zip(PRODUCTS, row)]
    for i, name in enumerate(PRODUCTS):
        if axes.get(name) == "on" and not products[i]: products[i] = (QUEST, ABSMAX, ABSMAX)[i]
    for axis in CHANGES:
        if axis not in axes: continue
        values = str(axes[axis]).split(":")
        which = [i for i in (ALL if len(values) == 3 else CHANGES[axis]) if products[i]]
        check(which, f"{precision} has no quantised product{' left' * (len(axes) > 1)} whose {axis} could change")
        for i in which:
            v = values[i % len(values)]
            v = SAME.get(v, v) if axis != "rotation" else 0 if v == "none" else int(v)
            products[i] = products[i]._replace(**{axis: v})
            if axis == "format" and products[i].scale not in SCALES[v]:         # the row's scale rule where v has it
                rule = (QUEST, ABSMAX, ABSMAX)[i].scale if v == "mxfp4" else [*SCALES[v]][0]
                products[i] = products[i]._replace(scale=rule)
            if axis == "rotation" and v == 0: products[i] = products[i]._replace(signs="none")
    for name, p in zip(PRODUCTS, products):
        if p: sensible(name, p)
    return Recipe(*products, row.method)


def sensible(name, p):
    """refuse combinations that mean nothing"""
    rules, stochastic, eden = SCALES[p.format], p.rounding == "stochastic", p.rounding == "eden"
    clips = p.scale != "absmax34" and p.format not in ("nvfp4", "int4")
    other = "weight" if name == "dgrad" else "input"
    for wrong, sentence in (
        (p.scale not in rules, f"scale {p.scale!r} is not one of format {p.format}'s: {', '.join(rules)}"),
        (not p.rotation and p.signs != "none", f"random signs {p.signs} a rotation need a rotation"),
        (eden and p.signs != "before", "rounding eden is unbiased only behind a random rotation: signs before"),
        (eden and p.right == "square" and p.format != "nvfp4", f"square blocks of {p.format} have no rounding eden"),
        (p.rounding != "nearest" and p.scale == "four-six",
            f"scale four-six chooses by the error, which makes rounding {p.rounding} biased"),
        (stochastic and clips, "stochastic rounding is unbiased only where the scale neither clips nor corrects, "
                               f"and {p.scale} of {p.format} does"),
        (p.rotation and p.right == "kept", f"this row multiplies with the forward product's {other} as it is, "
                                           "which cannot be rotated along another axis")):
        check(not wrong, f"{name}: {sentence}")
