"""
Quantisers of the emulated recipes: they round numbers to those that a 4- or 8-bit format can hold.

Four bits alone can say little. These are all the magnitudes of E2M1, the 4-bit float with a sign,
two bits of exponent and one bit of mantissa:

    0   0.5   1   1.5   2   3   4   6

So the formats below cut a row into blocks of neighbours, and each block has a scale of its own that
is stored beside it. A number is then element * scale:

    format   elements               scale of a block                 block   bits a number
    mxfp4    E2M1, up to 6          E8M0: a power of two             32      4.25
    mxfp8    E4M3, up to 448        E8M0: a power of two             32      8.25
    int4     integers, -7 .. 7      float32                          32      5
    nvfp4    E2M1, up to 6          E4M3, and a float32 a tensor     16      4.5

E4M3 is an 8-bit float with four bits of exponent and three of mantissa; it serves as a format of
elements or, in nvfp4, of scales. E8M0 is eight bits of exponent and nothing else. mxfp4 and mxfp8
are OCP Microscaling v1.0.

A scale rule says how a block finds its scale. It may let the largest values clip, which means that
they saturate at the format's largest, where that makes the error of all the others smaller.

A block is a stretch along K, the axis that the product sums over: only there can hardware apply its
scale in the middle of the sum. In *square blocks* n rows by n columns share a scale. A weight that
is quantised so keeps its blocks when it is transposed, and the backward pass can use it as it is.

"four-six" (Four Over Six) is a scale rule of nvfp4. Nothing lies between 4 and 6, so values near 5
are rounded badly. It tries two scales, under which a block's largest value becomes 6, or 4, and
keeps the one with the smaller error.

Three ways of rounding:

    nearest      ties go to the even neighbour; the smallest error, but numbers shrink on average
    stochastic   up or down with probabilities that make the mean exact; more than twice the error
    eden         to nearest, then times S = <v, v> / <v, q>. Behind a random rotation that is
                 unbiased too, at almost the error of nearest. Without one it is not, but q is as
                 long in the direction of v as v is

A quantiser takes v [R, K] in float32 and returns values, factor and mask, with v ~= values *
factor. The factor, [1, 1] or [R, 1], is what a format holds beside its blocks: the float32 scale of
a tensor, the 4/3 that undoes Quartet's 3/4, or the S of a row. It is applied after the forward
product, so that the values stay exact in bfloat16. The mask says what did not clip, where a rule
clips on purpose; it is None where all gradients pass. A NaN or Inf makes its whole block NaN.

This is the definition of what kernels/columns.cuh computes, byte for byte. So the order of every
sum is fixed, and exponents are read by bit operations.
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .. import reference
from ..recipes import QUEST_RULES
from ..reference import QUEST_SCALE_PER_STD


class Grid(NamedTuple):
    """The magnitudes of a format: steps of 2**(exponent - mantissa_bits) from 0 to max_value."""
    mantissa_bits: int
    min_exponent: int           # below 2**min_exponent the steps stay as they are (subnormals)
    max_value: float


E2M1 = Grid(1, 0, 6)
E4M3 = Grid(3, -6, 448)
INT4 = Grid(2, 2, 7)

ELEMENTS = {"mxfp4": E2M1, "mxfp8": E4M3, "int4": INT4, "nvfp4": E2M1}
BLOCK_SIZE = {"mxfp4": 32, "mxfp8": 32, "int4": 32, "nvfp4": 16}

# Rounding to nearest under absmax34 shrinks Gaussian numbers by 0.92 % on average; the rule "pma"
# undoes that by this factor, 1 / (1 - 0.0092), which is the one in Quartet's code.
PMA_FACTOR = 1.009276


# ---- rounding to a grid

# reference.py has exact functions of the same names, for any float. These two read and write the
# exponent field by bit operations, which torch.compile fuses. floor_log2, for x >= 0, gives -127
# for all that is below 2**-126. pow2 stops at the smallest scale of E8M0: it gives 2**-127, whose
# exponent field is 0, in place of any smaller power.

def floor_log2(x): return ((x.view(torch.int32) >> 23) & 255) - 127


def pow2(e):
    bits = (e.clamp(-126, 127) + 127) << 23
    return torch.where(e < -126, 0x400000, bits).view(torch.float32)


def to_grid(u, grid, noise=None):
    """Rounds u to the grid; what lies beyond its largest value becomes that.

    noise, one number of [0, 1) for each of u, rounds stochastically: up where it and what u has
    gone beyond the lower value make a step together. Without it u is rounded to nearest, ties to
    even.
    """
    exponent = floor_log2(u.abs()).clamp_min(grid.min_exponent)
    step = pow2(exponent - grid.mantissa_bits)
    steps = u.abs() / step
    if noise is None:
        steps = steps.round()
    else:
        steps_below = steps.floor()
        steps = steps_below + (steps - steps_below >= 1 - noise)
    return torch.copysign((steps * step).clamp_max(grid.max_value), u)


def total(v):
    """Sums over the last axis, [..., 1]: first neighbours, then these sums, and so on.

    A sum of 32 is that of reference.py.
    """
    while v.shape[-1] > 1:
        v = F.pad(v, (0, v.shape[-1] % 2))
        v = v[..., 0::2] + v[..., 1::2]
    return v


def divide(v, number):
    """Returns v / number, rounded once. A GPU would multiply by an inverse, rounded as well."""
    return v / torch.full_like(v, number)


# ---- blocks

def split_blocks(v, size, square):
    """Splits [R, K] into blocks [R, K/size, size], or square ones [R/size, K/size, size * size].

    For square blocks, missing rows are filled up with zeros.
    """
    if not square:
        return v.unflatten(-1, (-1, size))
    v = F.pad(v, (0, 0, 0, -len(v) % size))
    tiles = v.unflatten(-1, (-1, size)).unflatten(0, (-1, size)).transpose(1, 2)
    return tiles.flatten(-2)


def join_blocks(blocks, rows, size, square):
    """Undoes split_blocks: returns [rows, K]."""
    if square:
        tiles = blocks.unflatten(-1, (size, size))
        blocks = tiles.transpose(1, 2).flatten(0, 1)[:rows]
    return blocks.flatten(-2)


def block_max(blocks): return blocks.abs().amax(-1, True)


# ---- EDEN

# Behind a random rotation, S = <v, v> / <v, q> times q is an unbiased estimate of v, where q is v
# rounded to nearest, elements * scale. S is 1 where q has nothing left to correct.

def eden_block_correction(v, elements, scale):
    """Returns the S of each block."""
    return eden_correction(total(v * v), total(v * elements) * scale)


def eden_row_correction(v, elements, scale):
    """Returns the S of each row [R, 1], from the sums over its blocks."""
    vv = total(v * v).squeeze(-1)
    vq = (total(v * elements) * scale).squeeze(-1)
    return eden_correction(total(vv), total(vq))


def eden_correction(vv, vq): return torch.where(vq == 0, 1., vv / vq)


# ---- formats with a scale for each block and no other: MXFP4, MXFP8 and INT4

# A scale rule of a power-of-two format takes blocks [..., n] and returns the exponent of each,
# int32 [..., 1].

def quest_scale(blocks):
    """Returns the scale with the least squared error for a Gaussian with a block's deviation."""
    n = blocks.shape[-1]
    mean = total(blocks) / n
    variance = (total(blocks * blocks) / n - mean.square()).clamp_min(0)
    return variance.double().sqrt().float() * QUEST_SCALE_PER_STD + 1e-8


def floor_exponent(blocks, multiplier):
    return floor_log2(multiplier * quest_scale(blocks))


def nearest_exponent(blocks, multiplier):
    best = multiplier * quest_scale(blocks)
    below = floor_log2(best)
    return below + (best > pow2(below) * 2 ** .5).int()


# The largest value of a block gets the largest exponent of the elements: 2 in E2M1, 8 in E4M3.
def absmax_exponent(blocks): return floor_log2(block_max(blocks)) - 2
def absmax_exponent_e4m3(blocks): return floor_log2(block_max(blocks)) - 8


def mse_exponent(blocks):
    """Returns the one of three exponents around absmax's that has the least squared error."""
    smallest = absmax_exponent(blocks) - 1
    errors = []
    for i in range(3):
        scale = pow2(smallest + i)
        rounded = to_grid(blocks / scale, E2M1) * scale
        errors.append(total((rounded - blocks).square()))
    return smallest + torch.cat(errors, -1).argmin(-1, True).int()


# The rules that recipes.SCALE_RULES names; those of QUEST_RULES take a multiplier, too. None means
# that the scale is no power of two; it is found where the format is quantised.
SCALE_FUNCTIONS = {
    "mxfp4": {
        "floor": floor_exponent,        # the power of two below QuEST's scale
        "nearest": nearest_exponent,    # the one nearest to it
        "absmax34": absmax_exponent,    # and then times 3/4, so that nothing clips
        "absmax": absmax_exponent,      # as OCP Microscaling has it: above 6 after scaling it clips
        "pma": absmax_exponent,         # absmax34, and its mean shrinkage undone
        "mse": mse_exponent,
    },
    "nvfp4": {"absmax": None, "four-six": None},
    "mxfp8": {"absmax": absmax_exponent_e4m3},
    "int4": {"absmax": None},
}
CLIPS_ON_PURPOSE = ("floor", "nearest", "mse")      # what these rules clip gets no gradient
THREE_QUARTERS = ("absmax34", "pma")


class Blocks(NamedTuple):
    """A matrix [R, K] that is approximately elements * scale * factor."""
    elements: torch.Tensor      # on the grid of the format, in blocks: split_blocks
    scale: torch.Tensor         # of each block
    factor: torch.Tensor        # [1, 1] or [R, 1]
    mask: torch.Tensor | None   # bool [R, K]


def quantize_blocks(v, spec, noise, square):
    """Quantises to the Blocks of MXFP4, MXFP8 or INT4.

    EDEN's correction does not fit into their scales. It becomes one factor for each row, so it is
    made of the sums over the row's blocks.
    """
    size = BLOCK_SIZE[spec.format]
    grid = ELEMENTS[spec.format]
    blocks = split_blocks(v, size, square)
    if noise is not None:
        noise = split_blocks(noise, size, square)
    is_eden = spec.rounding == "eden"

    scale = block_scale(blocks, spec, grid)
    u = blocks / scale * gain_of(spec)
    elements = to_grid(u, grid, noise)

    mask = None
    if spec.scale in CLIPS_ON_PURPOSE:
        mask = join_blocks(u.abs() < grid.max_value, len(v), size, square)
    factor = v.new_full((1, 1), constant_factor(spec))
    if is_eden:
        factor = eden_row_correction(blocks, elements, scale)
    return Blocks(elements, scale, factor, mask)


def gain_of(spec): return .75 if spec.scale in THREE_QUARTERS else 1.


def constant_factor(spec):
    """Returns the factor of all values, which only EDEN replaces."""
    return (PMA_FACTOR if spec.scale == "pma" else 1) / gain_of(spec)


def quantize_mx(v, spec, noise, square):
    blocks = quantize_blocks(v, spec, noise, square)
    values = join_blocks(blocks.elements * blocks.scale, len(v), BLOCK_SIZE[spec.format], square)
    return values, blocks.factor, blocks.mask


def quantize_packed(v, spec, noise, square):
    """Quantises to MXFP4 as quantize does, but packs the values as reference.py does.

    Returns codes uint8 [R, K/2], scales uint8 [R, K/32], factor and mask. Their values are those
    that quantize returns, to the sign of a zero.
    """
    blocks = quantize_blocks(v, spec, noise, square)
    size = BLOCK_SIZE["mxfp4"]
    elements = join_blocks(blocks.elements, len(v), size, square)
    scale = join_blocks(blocks.scale.expand_as(blocks.elements), len(v), size, square)
    scale = scale[:, ::size, None]
    code = reference.round_nearest(elements).unflatten(-1, (-1, size))
    packed = reference.pack(code, reference.floor_log2(scale), scale.isfinite())
    return *packed, blocks.factor, blocks.mask


def block_scale(blocks, spec, grid):
    """Returns the scale of each block: 1 for one of zeros, NaN for one that is not finite."""
    largest = block_max(blocks)
    if spec.format == "int4":
        scale = divide(largest, grid.max_value)
    else:
        find_exponent = SCALE_FUNCTIONS[spec.format][spec.scale]
        multiplier = (spec.multiplier,) if spec.scale in QUEST_RULES else ()
        exponent = find_exponent(blocks, *multiplier)
        overflows = exponent > 127              # QuEST's variance: above about 2**63
        scale = torch.where(overflows, torch.nan, pow2(exponent))
    scale = torch.where(largest == 0, 1., scale)
    return torch.where(largest.isfinite(), scale, torch.nan)


# ---- NVFP4

# The element that a block's largest value is scaled to, by rounding. A block's scale is E4M3 and
# may have been rounded down, after which the largest element would be above 6: by 1/17 at most, and
# by more only in blocks 28,000 times smaller than the tensor's largest, whose scale is subnormal.
# Stochastic rounding must not clip and leaves room for that. EDEN may clip a little: the authors
# of 2601.22813 found the smallest error at 1/.93 of that value.
LARGEST_ELEMENT = {"nearest": 6, "stochastic": 6 * 16 / 17, "eden": 6 * 16 / 17 / .93}


def quantize_nvfp4(v, spec, noise, square):
    """Quantises to NVFP4.

    Rounding "eden" is MS-EDEN (2601.22813, Algorithm 1): the elements are rounded to nearest, then
    each block's correction goes into its scale, which is rounded stochastically. (The authors'
    training code has one correction for the 8 blocks of a rotation.)
    """
    size = BLOCK_SIZE["nvfp4"]
    blocks = split_blocks(v, size, square)
    if noise is not None:
        noise = split_blocks(noise, size, square)
    is_eden = spec.rounding == "eden"
    element_noise = None if is_eden else noise

    largest_element = LARGEST_ELEMENT[spec.rounding]
    tensor_scale = nvfp4_tensor_scale(blocks, spec, largest_element)
    result = nvfp4_blocks(blocks, tensor_scale, largest_element, element_noise)
    if spec.scale == "four-six":
        if element_noise is not None:
            element_noise = element_noise.flip(-1)          # as if it had been drawn again
        result = choose_smaller_error(result, nvfp4_blocks(
            blocks, tensor_scale, largest_element * 4 / 6, element_noise))
    scale, elements, _ = result
    if is_eden:
        correction = eden_block_correction(blocks, elements, scale * tensor_scale)
        scale = to_grid(scale * correction, E4M3, noise[..., :1])
    values = join_blocks(elements * scale, len(v), size, square)
    return values, tensor_scale.view(1, 1), None


def nvfp4_tensor_scale(blocks, spec, largest_element):
    """Returns the float32 scale of the tensor, under which the largest block scale is 448 or 256.

    E4M3 ends at 448; 256 leaves room for a scale that is 6/4 as large (four-six), and for EDEN's S.
    """
    only_absmax = spec.scale == "absmax" and spec.rounding != "eden"
    largest_scale = 448 if only_absmax else 256
    scale = divide(block_max(blocks).amax(), largest_scale * largest_element)
    finite = scale.isfinite()
    scale = torch.where(scale == 0, 1., scale)
    return torch.where(finite, scale, torch.nan)


def nvfp4_blocks(blocks, tensor_scale, largest_element, noise):
    """Scales the largest value of each block to largest_element.

    Returns the E4M3 scale of each block, its elements, and the sum of their squared errors in units
    of tensor_scale. One inverse a block, which is rounded, takes the place of 16 divisions.
    """
    scale = to_grid(block_max(blocks) / (largest_element * tensor_scale), E4M3)
    scale = torch.where(scale == 0, 1., scale)
    inverse = (1 / (scale * tensor_scale)).clamp_max(torch.finfo(torch.float32).max)
    u = blocks * inverse
    elements = to_grid(u, E2M1, noise)
    return scale, elements, total((elements - u).square()) * (scale * scale)


def choose_smaller_error(first, second):
    """Returns, for each block, the one of two results of nvfp4_blocks with the smaller error."""
    is_better = second[-1] < first[-1]
    return [torch.where(is_better, theirs, ours) for ours, theirs in zip(first, second)]


def quantize(v, spec, noise=None, square=False):
    """Quantises v as a GemmSpec says.

    v           [R, K]  float32, K a multiple of the format's block
    noise       [R, K]  numbers of [0, 1), or None unless spec.is_random
    square      whether blocks are square
    returns     values [R, K], factor [1, 1] or [R, 1], mask [R, K] or None
    """
    if spec.format == "nvfp4":
        return quantize_nvfp4(v, spec, noise, square)
    return quantize_mx(v, spec, noise, square)
