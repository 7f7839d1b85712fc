"""
The table of precisions: one row for each value of --precision.

A linear layer computes three matrix products: forward y = x w.T, dgrad dx = dy w, and wgrad dw =
dy.T x. A row says for each of them how its two operands are quantised along the axis that is summed
over. None leaves a product unquantised; where the forward product is quantised, dgrad and wgrad
still read its quantised w and x. The columns of a row are the fields of GemmSpec, once for each
product. Two columns belong to the whole row: post_step, what acts on the weights between two
optimizer steps (post_step.py), and down_input, a format for the input of the layers that suffer
most. A run can change the columns of its row: axes.py.

A row whose numbers the MXFP4 kernels compute runs on them (has_kernels). For any other row that has
columns, a kernel that is compiled for them quantises the operands (emulate/matmul.py). The MXFP4
kernels still multiply two operands of MXFP4; an ordinary matmul multiplies others. The methods that
no columns describe are emulated in PyTorch (emulate/baselines.py); only fp8 has products of its own
(emulate/fp8.py).
A row of your own is RECIPES["mine"] = Recipe(...), as the README shows.
"""
import math
from typing import NamedTuple

from .check import check

PER_OPERAND = ("format", "scale", "multiplier")     # columns that the operands can have for each


class GemmSpec(NamedTuple):
    """How the two operands of one product are quantised.

    format      what the elements are stored in: a key of SCALE_RULES
    scale       how a block finds its scale: one of SCALE_RULES[format]
    rotation    how many neighbours along the sum a Hadamard matrix rotates; 0 is no rotation
    signs       random signs "before" the rotation, "after" it (where they have no effect), "none"
    rounding    "nearest", "stochastic", or "eden": to nearest, and then the block's scale (nvfp4)
                or the whole row (other formats) is multiplied by a factor that removes the bias,
                if the rotation is random. In the forward product it may be fixed: there the factor
                only undoes that rounding makes the row shorter (2505.14669's authors have logged
                runs with "Eden32" forward and less loss than QuEST's, but not published what it is)
    rhs         what happens to the right operand, which is w, w.T or x.T:
                  "requantize"        it is quantised as the left one, or as rhs_format and so on
                                      say. In dgrad and wgrad it is the already quantised w or x
                                      that is quantised once more
                  "square_blocks"     as "requantize", but one scale serves a square of w, such as
                                      16 x 16, so that w.T has the same values (forward only)
                  "reuse"             the quantised w or x of the forward product is used as it is
                  "from_unquantized"  the unquantised w or x is quantised, to nearest
    multiplier  the rules of QUEST_RULES look for a power of two beside this number times the best
                scale: below 1, fewer values become zero, and more clip (as "mult" in the branch
                rotation_fix of github.com/IST-DASLab/Quartet)
    mean_split  whether the operand with a row for each token, x of forward and dy of the gradients,
                is quantised without the mean of its rows. The mean's part of the product is added,
                unquantised (Averis, 2603.10444; matmul.py has the formulas)
    rhs_format, rhs_scale, rhs_multiplier
                those of the right operand; None: those of the left one. Blocks, in squares or not,
                are then those of its format. What rhs "reuse" takes over has none of its own.
                (2505.14302: the error of weights grows faster with the tokens of a run than that
                of activations, so that one rule need not be the best for both)
    """
    format: str = "mxfp4"
    scale: str = "absmax34"
    rotation: int = 32
    signs: str = "before"
    rounding: str = "nearest"
    rhs: str = "requantize"
    multiplier: float = 1.
    mean_split: bool = False
    rhs_format: str | None = None
    rhs_scale: str | None = None
    rhs_multiplier: float | None = None

    # What quantises an operand, and its kernel, see the spec of this operand alone.

    @property
    def left(self):
        """How the left operand is quantised: x of forward, dy of dgrad, dy.T of wgrad."""
        return self._replace(rhs_format=None, rhs_scale=None, rhs_multiplier=None)

    @property
    def right(self):
        """How the right operand is quantised: w, w.T, x.T."""
        return self.left._replace(
            format=self.rhs_format or self.format,
            scale=self.rhs_scale or self.scale,
            multiplier=self.rhs_multiplier or self.multiplier,
            rounding="nearest" if self.rhs == "from_unquantized" else self.rounding)

    def with_operands(self, left, right):
        """Returns the spec of a product whose operands have the PER_OPERAND columns of these."""
        spec = self
        for column in PER_OPERAND:
            value = getattr(left, column)
            rhs_value = getattr(right, column)
            difference = None if rhs_value == value else rhs_value
            spec = spec._replace(**{column: value, f"rhs_{column}": difference})
        return spec

    @property
    def is_random(self):
        """Says whether noise rounds an operand, this spec's. EDEN needs it for the scales of NVFP4
        alone."""
        is_eden = self.rounding == "eden"
        return self.rounding == "stochastic" or is_eden and self.format == "nvfp4"

    @property
    def is_fixed(self):
        """Says whether equal operands of this spec always become equal values."""
        return self.signs == "none" and not self.is_random

    @property
    def is_packed(self):
        """Says whether both operands are MXFP4 in blocks along the sum: ops.gemm takes them."""
        return self.left.format == self.right.format == "mxfp4" and self.rhs != "reuse"


class Recipe(NamedTuple):
    """A row of the table: the three products, or the name of a method that has no columns."""
    forward: GemmSpec = None
    dgrad: GemmSpec = None
    wgrad: GemmSpec = None
    method: str = ""                # emulate/fp8.py, emulate/baselines.py
    post_step: str = "none"         # one of POST_STEPS, with its numbers: "cage:10:0.8"
    down_input: str = "none"        # the format of the input of some layers: see `down`

    @property
    def down(self):
        """The row as it is for the layers that a model names, Linear(is_down=True): their input has
        the format down_input in the forward product, and their weight that of the row.

        This is selective precision: 2505.14302 finds that quantising the input of the down
        projection of a feed-forward layer (FC2) costs the most of all where weights and activations
        have 4 bits, and gives this input 8. Both operands rotate as the row says.
        """
        if self.down_input == "none":
            return self
        forward = self.forward.with_operands(
            self.forward.left._replace(
                format=self.down_input, scale=SCALE_RULES[self.down_input][0], multiplier=1.),
            self.forward.right)
        return self._replace(forward=forward, down_input="none")

    @property
    def has_kernels(self):
        """Says whether the MXFP4 kernels (QuartetMatmul of linear.py) compute exactly this."""
        if not is_kernel_forward(self.forward):
            return False
        if self.dgrad is None and self.wgrad is None:
            return True
        if not is_kernel_backward(self.dgrad) or not is_kernel_backward(self.wgrad):
            return False
        return self.dgrad.rounding == self.wgrad.rounding

    @property
    def has_packed_products(self):
        """Says whether the product of MXFP4 (backend.py) computes any of the three."""
        products = (self.forward, self.dgrad, self.wgrad)
        return any(spec is not None and spec.is_packed for spec in products)

    @property
    def is_quantized(self):
        return self != Recipe()

    @property
    def feature_multiple(self):
        """In- and out-features of a layer have to be multiples of this."""
        if self.has_kernels:
            return 32
        return 16 if self.is_quantized else 1

    def check_features(self, in_features, out_features):
        """Raises ValueError if a layer of these sizes cannot run this recipe."""
        for side, features in (("in", in_features), ("out", out_features)):
            check(features % self.feature_multiple == 0,
                  f"{side}-features must be a multiple of {self.feature_multiple}, got {features}")

    @property
    def travels_as(self):
        """Says in which form the weights of a sharded model travel: the table of sharded.py."""
        if self.has_kernels:
            return "packed codes"
        if self.method == "fp8":
            return "FP8 values"
        return "float32" if self.is_quantized else "values as activations have them"

    def check_run(self, steps, is_sharded, begin=0, end=None):
        """Raises ValueError if post_step cannot act in a run of so many steps, or in a model that
        is spread over processes (sharded.py).

        begin, end      the recipe trains the steps after begin up to end; None: to the last one
        """
        end = steps if end is None else end
        own_steps = f"and this recipe trains steps {begin + 1} to {end} of {steps}"
        name, *numbers = parse_post_step(self.post_step)
        if name == "deosc":
            start, period, _ = numbers
            check(begin < start and start + period <= end,
                  f"the first window of deosc is from step {start} to step {start + period}, "
                  f"{own_steps}: give another START or PERIOD, deosc:START:PERIOD:RATIO")
        if name == "cage":
            _, start = numbers
            check(start * steps < end,
                  f"cage begins after {start} of the whole run, {own_steps}: give a smaller START, "
                  "cage:STRENGTH:START")
        if is_sharded:
            for row in (self, self.down):
                row.check_sharded()

    def check_sharded(self):
        """Raises ValueError if post_step needs more than the rows of a weight that a process has.

        The kernels quantise each row by itself. Other rows may have a scale for the whole tensor.
        """
        name, *_ = parse_post_step(self.post_step)
        check(name == "none" or name == "cage" and self.has_kernels,
              f"a sharded model cannot have post_step {name}, but only cage, and only in a row "
              "that runs on the kernels")

    # The columns as the kernels know them: for a recipe that has kernels.

    @property
    def forward_scale(self): return self.forward.scale

    @property
    def quantizes_backward(self): return self.dgrad is not None

    @property
    def stochastic(self): return self.dgrad.rounding == "stochastic"

    @property
    def sign_orders(self):
        """Of dgrad and of wgrad; "none" also means that nothing is rotated."""
        return self.dgrad.signs, self.wgrad.signs


def is_kernel_forward(spec):
    return spec is not None and spec in (QUEST, QUEST._replace(scale="nearest"))


def is_kernel_backward(spec):
    if spec is None:
        return False
    rotates = spec.rotation == 32 and spec.signs in ("before", "after")
    leaves = spec.rotation == 0 and spec.signs == "none"
    rounds = spec.rounding in ("nearest", "stochastic")
    others_are_quartets = spec == ABSMAX._replace(
        rotation=spec.rotation, signs=spec.signs, rounding=spec.rounding)
    return (rotates or leaves) and rounds and others_are_quartets


# Quartet's products: the forward one, and the backward ones in several forms. PMA is an ablation of
# its authors, ORIGINAL what the main branch of their published code computes by default: signs
# behind the rotation have no effect, so that it never changes, and only the rounding is random.
QUEST = GemmSpec("mxfp4", "floor", rotation=32, signs="none")
ABSMAX = GemmSpec("mxfp4", "absmax34", rotation=32, signs="before")
STOCHASTIC = ABSMAX._replace(rounding="stochastic")
ORIGINAL = STOCHASTIC._replace(signs="after")
PMA = ABSMAX._replace(scale="pma")

MXFP8 = GemmSpec("mxfp8", "absmax", rotation=0, signs="none")
MXFP8_GRAD = MXFP8._replace(rhs="from_unquantized")

NVFP4 = GemmSpec("nvfp4", "absmax", rotation=0, signs="none")
NVFP4_SQUARE = NVFP4._replace(rhs="square_blocks")
NVIDIA_DGRAD = NVFP4._replace(rounding="stochastic", rhs="reuse")
NVIDIA_WGRAD = GemmSpec("nvfp4", "absmax", 16, "before", "stochastic", "from_unquantized")
FOUR_SIX = NVFP4._replace(scale="four-six")
SQUARE_46 = FOUR_SIX._replace(rhs="square_blocks")
TETRAJET = GemmSpec("nvfp4", "absmax", 32, "before", "stochastic")
EDEN = GemmSpec("nvfp4", "absmax", 128, "before", "eden")

# Numbers such as 2505.14669 are papers on arXiv.
RECIPES = {
    "bf16":          Recipe(),                                  # nothing is quantised

    # Quartet as last published, and variants of it.
    "fp4":           Recipe(QUEST, ABSMAX, ABSMAX),             # 2505.14669v4, Algorithm 1
    "fp4-sr":        Recipe(QUEST, STOCHASTIC, STOCHASTIC),     # stochastic, as in the paper's v1
    "fp4-fwd":       Recipe(QUEST),                             # only the forward product is 4-bit
    "fp4-bwd":       Recipe(None, ABSMAX, ABSMAX),              # the opposite
    "fp4-original":  Recipe(QUEST, ORIGINAL, ORIGINAL),         # the authors' main branch, default
    "fp4-pma":       Recipe(QUEST, PMA, PMA),                   # undoes rounding's shrinkage

    # FP8: E4M3 forward, E5M2 gradients and a scale for each tensor; and E4M3 everywhere.
    "fp8":           Recipe(method="fp8"),                      # real FP8 products: emulate/fp8.py
    "mxfp8":         Recipe(MXFP8, MXFP8_GRAD, MXFP8_GRAD),     # OCP Microscaling v1.0

    # Other authors' methods for NVFP4. NVIDIA leaves some blocks of the model in BF16 and draws its
    # signs once; here they are drawn at each call, as in all rows. quartet2 corrects each block of
    # 16, as its Algorithm 1 says; the losses that its authors publish are of one S for 128 values.
    "nvfp4":         Recipe(NVFP4_SQUARE, NVIDIA_DGRAD, NVIDIA_WGRAD),  # 2509.25149, in all blocks
    "four-over-six": Recipe(SQUARE_46, NVIDIA_DGRAD, NVIDIA_WGRAD),     # 4/6 forward, 2601.22813
    "tetrajet2":     Recipe(NVFP4, TETRAJET, TETRAJET),         # simplified, 2601.22813, section 6
    "quartet2":      Recipe(FOUR_SIX, EDEN, EDEN),              # MS-EDEN backward, 2601.22813

    # Methods that the columns cannot describe: emulate/baselines.py.
    "luq-int4":      Recipe(method="luq-int4"),                 # LUQ, 2112.10769
    "luq-fp4":       Recipe(method="luq-fp4"),                  # the same with E2M1 forward
    "jetfire-fp4":   Recipe(method="jetfire-fp4"),              # Jetfire, 2403.12422, in E2M1
    "halo-fp4":      Recipe(method="halo-fp4"),                 # HALO-2, 2501.02625, in E2M1
    "lss-int4":      Recipe(method="lss-int4"),                 # LSS, 2306.11987, no learned step
}

# The scale rules of each format: how a block finds its scale. emulate/quantizers.py has them.
#     floor, nearest    QuEST, which clips: from the standard deviation, to a power of two
#     absmax34          from the largest value, and a factor 3/4: nothing clips
#     absmax            from the largest value, as the format's standard says
#     pma               absmax34, times a constant: rounding to nearest makes values smaller, by
#                       0.92 % on average, and this undoes it
#     mse               of three powers of two, the one with the least squared error
#     four-six          of two scales, which make the largest value 4 or 6, the better one
SCALE_RULES = {
    "mxfp4": ("floor", "nearest", "absmax34", "absmax", "pma", "mse"),
    "nvfp4": ("absmax", "four-six"),
    "mxfp8": ("absmax",),
    "int4": ("absmax",),
}
QUEST_RULES = ("floor", "nearest")


class Number(NamedTuple):
    """A number that can be given: the value of an axis, or a part of one, which may be left out."""
    name: str
    default: int | float            # Its type is that of what is given.
    least: int | float
    most: int | float               # Most itself is too much.


# The formats that down_input can have.
DOWN_INPUTS = ("none", "mxfp8")

# What acts on the weights after each optimizer step, and its numbers in their order. post_step.py
# says what they mean, and where the defaults come from.
POST_STEPS = {
    "none": (),
    "cage": (Number("STRENGTH", 10., 0, math.inf), Number("START", 0.8, 0, 1)),
    "deosc": (Number("START", 2000, 1, math.inf), Number("PERIOD", 200, 1, math.inf),
              Number("RATIO", 4., 0, math.inf)),
}


def parse_post_step(word):
    """Returns the name of what acts after a step, and its numbers: "cage:5" is ["cage", 5., 0.8].

    Raises ValueError for another name, and for a number that is none or out of range.
    """
    name, *given = str(word).split(":")
    check(name in POST_STEPS, f"post_step {name!r} is not one of {', '.join(POST_STEPS)}")
    numbers = POST_STEPS[name]
    form = ":".join([name, *(number.name for number in numbers)])
    check(len(given) <= len(numbers), f"post_step {word!r} has more numbers than {form}")
    values = [number.default for number in numbers]
    for i, text in enumerate(given):
        values[i] = parse_number(text, numbers[i], f"post_step {word!r}, {form}")
    return [name, *values]


def parse_number(text, number, where):
    kind = type(number.default)
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    words = {int: "a whole number", float: "a number"}
    below = "" if number.most == math.inf else f" and less than {number.most}"
    check(number.least <= value < number.most,
          f"{where}: {number.name} {text!r} is not {words[kind]} of at least {number.least}{below}")
    return value
