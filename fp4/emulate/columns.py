"""
The quantiser of an operand, for every GemmSpec: an op of torch, whose kernel is compiled for this
GemmSpec alone, and its definition in plain PyTorch.

    definition      quantize_by_definition, unrotate_by_definition below, and quantizers.py
    arithmetic      kernels/columns.cuh, which is shared by a CPU and a GPU
    kernels         kernels/columns_cpu.cpp, kernels/quantize_columns.cu

A GemmSpec here is that of one operand (GemmSpec.left, .right); rhs and what is named after it mean
nothing. Its columns are constants for the compiler. So one source serves every recipe, and
what its kernel does not need is not in it: no rotation, no noise, no mask. The kernel gives the
definition's bytes. Where none was compiled, the definition runs.

An operand is read from a matrix in memory, as it is or transposed. It is padded with zeros along
the axis that its product sums over, rotated, scaled and rounded, and written, all in one pass; the
scale of an NVFP4 tensor takes a pass more. MXFP4 can be written packed, as reference.py does it, in
4.25 bits a value; all formats can be written in the dtype of the activations. A packed matrix can
be read again, transposed, and is not unpacked in memory for that.

Random numbers are words of 64 bits, drawn in the backward pass. Two of them are the signs of a
rotation: bit i % 64 of word i // 64 negates element i. Another one is the seed of an operand's
noise; its elements take their bytes as in reference.py.
"""
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .. import reference
from ..build import BUILD_ERRORS, columns_name, first_line, load_columns
from ..ops import operand_shapes
from .quantizers import CLIPS_ON_PURPOSE, quantize, quantize_packed

SIGN_WORDS = 2                      # 128 signs, for the longest rotation; a shorter one reads fewer
BLOCK = 32                          # Axes are padded to it: the blocks of all formats divide it.
# The scale rules that kernels/columns.cuh has.
KERNEL_SCALES = ("floor", "nearest", "absmax34", "absmax", "pma", "mse", "four-six")


# ---- the definition

def sign_values(words, n):
    """Returns n numbers 1 or -1, of signs int64 [SIGN_WORDS]."""
    bits = (words[:, None] >> torch.arange(64, device=words.device)) & 1
    return 1 - 2 * bits.flatten()[:n]


def rotate(v, n, signs=None, signs_after=False):
    """Rotates each n neighbours along the last axis of v [R, K]; n = 0 returns v itself.

    It multiplies them by the orthogonal Hadamard matrix: by a butterfly, as reference.hadamard does
    for n = 32. signs, int64 [SIGN_WORDS], are applied before the matrix or after it. The matrix is
    its own inverse, so the same signs on the other side undo the rotation.
    """
    if n == 0:
        return v
    v = v.float().unflatten(-1, (-1, n))
    if signs is not None and not signs_after:
        v = v * sign_values(signs, n)
    v = reference.butterfly(v, lambda a, b: (a + b, a - b)) * n ** -.5
    if signs is not None and signs_after:
        v = v * sign_values(signs, n)
    return v.flatten(-2)


def rotate_for(v, spec, signs, undo=False):
    """Rotates v as spec says, or undoes that. signs int64 [SIGN_WORDS]; None if spec has none."""
    if spec.signs == "none":
        return rotate(v, spec.rotation)
    signs_after = spec.signs == "after"
    if undo:
        signs_after = not signs_after
    return rotate(v, spec.rotation, signs, signs_after)


def has_basis(spec):
    """Says whether a gradient has something to undo: a rotation, or a mask."""
    return spec.rotation != 0 or spec.scale in CLIPS_ON_PURPOSE


def padded_size(k, spec): return k + -k % max(spec.rotation, BLOCK)


def pad_to_blocks(v, spec):
    """Appends zeros to the last axis until it holds whole blocks and whole rotations."""
    return F.pad(v, (0, padded_size(v.shape[-1], spec) - v.shape[-1]))


def quantize_by_definition(x, scales, factor, signs, seed, transposed, dtype, spec, square):
    """Quantises x or x.T along the last axis. The arguments are those of quantize_operand."""
    v = x.float() if scales is None else reference.dequantize(x, scales, torch.float32)
    if factor is not None:
        v = v * factor
    rotated = rotate_for(pad_to_blocks(v.T if transposed else v, spec), spec, signs)
    noise = None
    if spec.is_random:
        noise = (reference.noise(seed, rotated.numel()).view_as(rotated) + .5) / 256
    if dtype == torch.uint8:
        values, scales, factor, mask = quantize_packed(rotated, spec, noise, square)
    else:
        values, factor, mask = quantize(rotated, spec, noise, square)
        values = values.to(dtype).contiguous()
        scales = torch.empty(0, dtype=torch.uint8, device=x.device)
    if mask is None:
        mask = torch.empty(0, dtype=torch.int32, device=x.device)
    else:
        mask = reference.bits(mask.unflatten(-1, (-1, BLOCK)))
    return values, scales, factor, mask


def unrotate_by_definition(product, left, right, mask, signs, dtype, spec):
    """Takes a gradient out of the rotated basis. The arguments are those of unrotate."""
    grad = product.float() * (left * right.T)
    if spec.scale in CLIPS_ON_PURPOSE:
        kept = reference.unbits(mask).flatten(-2)
        grad = grad * kept                  # a selection would hide a NaN, a product does not
    return rotate_for(grad, spec, signs, undo=True).to(dtype)


# ---- the ops of a GemmSpec, compiled at its first use

library = torch.library.Library("fp4_columns", "DEF")

# The name of each GemmSpec that was asked for, with its two ops; None: its definition runs.
ops = {}


class Ops(NamedTuple):
    quantize: Callable
    unrotate: Callable


def prepare(recipe):
    """Loads the kernels of a recipe's quantisers, compiled if they are not yet.

    Where that fails, it prints a line that says why, and the definition runs.
    """
    for spec, square in quantizers_of(recipe):
        name = columns_name(spec, square)
        if name not in ops:
            ops[name] = load_or_fall_back(spec, square) if has_kernel(spec, square) else None


def quantizers_of(recipe):
    """Returns the (GemmSpec, whether blocks are square) of all operands that matmul.py makes."""
    found = []
    for spec in (recipe.forward, recipe.dgrad, recipe.wgrad):
        if spec is None:
            continue
        is_square = spec.rhs == "square_blocks"
        found.append((spec.left, False))
        if spec.rhs != "reuse":
            found.append((spec.right, is_square))
        if is_square and has_basis(spec.right):         # which dw is taken out of
            found.append((spec.right, False))
    return found


def has_kernel(spec, square):
    """Says whether columns.cuh has this quantiser; a scale rule of a user's own it has not."""
    fits_square = spec.format == "nvfp4" and spec.rotation <= 32 and spec.rounding == "nearest"
    return spec.scale in KERNEL_SCALES and (fits_square or not square)


def load_or_fall_back(spec, square):
    name = columns_name(spec, square)
    try:
        load_columns(spec, square)
    except BUILD_ERRORS as error:
        print(f"fp4 quantises {name} in PyTorch, which is slow, because its kernel did not build:",
              first_line(error), file=sys.stderr)
        return None
    return define_ops(name, spec)


# What an operand can be written as, if it is not values: the enum OperandFormat of kernels/ops.h.
FORMATS = ("packed", "mxf4", "fp8_left", "fp8_right")


def quantized_shapes(spec, x, x_scales, transposed, dtype, operand_format):
    """Returns empty tensors like those that quantising x or x.T makes.

    operand_format      its number in FORMATS
    """
    rows, k = x.shape if x_scales is None else (x.shape[0], 2 * x.shape[1])
    if transposed:
        rows, k = k, rows
    padded = padded_size(k, spec)
    factors = rows if spec.rounding == "eden" and spec.format != "nvfp4" else 1
    mask_shape = (rows, padded // BLOCK) if spec.scale in CLIPS_ON_PURPOSE else (0,)
    values = x.new_empty(rows, padded, dtype=dtype)
    scales = x.new_empty(0, dtype=torch.uint8)
    if dtype == torch.uint8:
        word, _, side = FORMATS[operand_format].partition("_")
        values, scales = operand_shapes(x, rows, padded, word, is_right=side == "right")
    return (values, scales,
            x.new_empty(factors, 1, dtype=torch.float32),
            x.new_empty(mask_shape, dtype=torch.int32))


def define_ops(name, spec):
    """Gives the two ops of a name their schemas; the library that was loaded implements them."""
    def shapes_of_quantize(
            x, x_scales, factor, signs, seed, transposed, dtype, operand_format=0):
        return quantized_shapes(spec, x, x_scales, transposed, dtype, operand_format)

    def unrotated_shape(product, left, right, mask, signs, dtype):
        return torch.empty_like(product, dtype=dtype)

    library.define(f"quantize_{name}(Tensor x, Tensor? x_scales, Tensor? factor, Tensor? signs, "
                   "Tensor? seed, bool transposed, ScalarType dtype, int operand_format=0) "
                   "-> (Tensor values, Tensor scales, Tensor factor, Tensor mask)")
    library.define(f"unrotate_{name}(Tensor product, Tensor left, Tensor right, Tensor mask, "
                   "Tensor? signs, ScalarType dtype) -> Tensor")
    torch.library.register_fake(f"fp4_columns::quantize_{name}", shapes_of_quantize, lib=library)
    torch.library.register_fake(f"fp4_columns::unrotate_{name}", unrotated_shape, lib=library)
    namespace = torch.ops.fp4_columns
    return Ops(getattr(namespace, f"quantize_{name}").default,
               getattr(namespace, f"unrotate_{name}").default)


def is_compiled(spec):
    """Says whether operands in blocks along their rows are quantised by a kernel."""
    return ops.get(columns_name(spec, square=False)) is not None


def quantize_operand(
        matrix, spec, transposed, factor, square, scales, operand_format, signs, seed, dtype):
    """Rotates and quantises a matrix in memory as the GemmSpec of one operand says, along its rows.

    matrix      [R, K], or [K, R] if transposed: the operand is then its transpose; float32 or
                bfloat16. With scales: codes uint8 [K, R/2], and transposed
    factor      float32 [1, 1], or a column with as many rows as the matrix; the matrix is
                multiplied by it. None: nothing is
    square      whether blocks are square
    scales      uint8 [K, R/32] of a matrix that is packed, or None
    operand_format      of what is packed: one of FORMATS. Tiles need a kernel (is_compiled) and a
                GPU; a right operand in tiles is transposed
    signs       int64 [SIGN_WORDS], or None where spec has none
    seed        int64 [1], or None unless spec.is_random
    dtype       of the values: float32 or bfloat16; uint8 packs them, which MXFP4 allows
    returns     values [R, K padded] in dtype, scales [0], factor float32 [1, 1] or [R, 1], mask
                int32 [R, K padded / 32] or [0]. Packed: codes uint8 [R, K padded / 2] and scales
                uint8 [R, K padded / 32] instead; in tiles as ops.operand_shapes says
    """
    number = FORMATS.index(operand_format)
    if matrix.numel() == 0:
        return quantize_nothing(spec, matrix, scales, transposed, dtype, number)
    compiled = ops.get(columns_name(spec, square))
    if compiled is None:
        return quantize_by_definition(
            matrix, scales, factor, signs, seed, transposed, dtype, spec, square)
    return compiled.quantize(
        matrix.contiguous(), scales, factor, signs, seed, transposed, dtype, number)


def quantize_nothing(spec, x, x_scales, transposed, dtype, operand_format):
    """Returns what quantising an empty matrix gives: nothing, and 1 for each factor. So a layer
    that is given no tokens has gradients of zero."""
    values, scales, factor, mask = quantized_shapes(
        spec, x, x_scales, transposed, dtype, operand_format)
    return values, scales, torch.ones_like(factor), mask


def unrotate(product, left, right, mask, signs, dtype, spec):
    """Multiplies a product by its factors and masks it; then undoes the rotation of a GemmSpec.

    product         [M, K], in the rotated basis, float32 or bfloat16
    left, right     the factors of its operands, float32 [1, 1], or [M, 1] and [K, 1]
    mask            int32 [M, K / 32], where spec has one: what clipped gets no gradient
    signs           int64 [SIGN_WORDS], or None where spec has none
    returns         [M, K] in dtype
    """
    compiled = ops.get(columns_name(spec, square=False))
    if compiled is None:
        return unrotate_by_definition(product, left, right, mask, signs, dtype, spec)
    return compiled.unrotate(product, left, right, mask, signs, dtype)
