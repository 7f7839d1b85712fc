"""
The ops of the method. An op of torch.library has one schema, which is its name with the types of
its arguments and results, and several implementations. The device of the tensors picks one:

    CPU     kernels/cpu.cpp, once build() has compiled it (build.py)
    CUDA    kernels/quantize.cu and others, likewise; for the product of two matrices see backend.py
    any     reference.py, the definition, slowly; torch calls it "CompositeExplicitAutograd"

torch.compile does not look into an op. It only has to know the shapes of the results, which a
"fake" implementation tells it.

An op takes and returns plain tensors and numbers, because a schema knows nothing else. The
functions of the same names in this file wrap the ops: they put codes and scales together, and take
words for settings. Use these.

Shapes: M is a number of rows, K of columns, in blocks of 32. A packed matrix is codes [M, K/2] and
scales [M, K/32]; reference.py explains both. The operands of a gradient's product have a format:

    "packed"    as above
    "fp8"       tiles of FP8 values, and a scale for each row of a tile or for 32 of them
                (kernels/fp8_tiles.cuh)
    "mxf4"      packed codes, and the scales in tiles, as Blackwell's instruction of this name wants
                them (kernels/scale_tiles.cuh)

A GPU's backend (backend.py) says which one its product wants, so that the quantisers write it.
"""
from typing import NamedTuple

import torch
from torch import Tensor

from . import reference
from .check import check

# A word reaches an op as its place in one of these lists. An op must take no str: every str that
# crosses torch's stable ABI is leaked, 48 bytes each (torch 2.11 to 2.13). The enums of
# kernels/ops.h have the same order; there "fp8" is fp8_left or fp8_right.
SCALES = ("floor", "nearest")
SIGN_ORDERS = ("before", "after", "none")
OPERAND_FORMATS = ("packed", "mxf4", "fp8")

MATVEC_ROWS = 8                 # the most that matvec multiplies, as in kernels/ops.h
TILE_SIDE = 128                 # of the tiles of FP8 values and of the tiles of scales
BYTES_PER_SCALE_TILE = 512      # 128 rows of 4 scales

library = torch.library.Library("fp4", "DEF")


class Packed(NamedTuple):
    """A matrix of 4-bit values, or an operand of a product in another format of those above."""
    codes: Tensor
    scales: Tensor


def number_of(word, words):
    check(word in words, f"{word!r} is not one of {', '.join(words)}")
    return words.index(word)


def word_of(number, words):
    check(0 <= number < len(words), f"{number} is not the number of one of {', '.join(words)}")
    return words[number]


def op(schema, fallback, tags=()):
    """Defines an op and the implementation that runs where no other does.

    The function below the decorator tells torch.compile the shapes of the results.
    """
    def register(shapes):
        name = schema.split("(")[0]
        library.define(schema, tags=tags)
        library.impl(name, fallback, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fp4::{name}", shapes, lib=library)
        return shapes
    return register


# ---- shapes that several ops share

def packed_shapes(like, rows, columns):
    codes = like.new_empty(rows, columns // 2, dtype=torch.uint8)
    scales = like.new_empty(rows, columns // 32, dtype=torch.uint8)
    return codes, scales


def mask_shape(x): return x.new_empty(x.shape[0], x.shape[1] // 32, dtype=torch.int32)


def pad_to_32(rows): return (rows + 31) // 32 * 32


def tiles_across(size): return (size + TILE_SIDE - 1) // TILE_SIDE


def operand_shapes(like, rows, columns, operand_format, is_right=False):
    """An operand of a gradient's product: values and scales, in the format that is named."""
    codes, scales = packed_shapes(like, rows, columns)
    if operand_format == "packed":
        return codes, scales
    down = tiles_across(rows)
    across = tiles_across(columns)
    if operand_format == "mxf4":
        return codes, like.new_empty(down * across * BYTES_PER_SCALE_TILE, dtype=torch.uint8)
    values = like.new_empty(down, across, TILE_SIDE * TILE_SIDE, dtype=torch.uint8)
    scales_per_tile = 4 if is_right else TILE_SIDE
    return values, like.new_empty(down, across, scales_per_tile, dtype=torch.float32)


# ---- the quantiser of the forward pass

def quantize_forward_by_definition(x, scale):
    return reference.quantize_forward(x, word_of(scale, SCALES))


@op("quantize_forward(Tensor x, int scale) -> (Tensor codes, Tensor scales, Tensor mask)",
    quantize_forward_by_definition)
def quantize_forward_shapes(x, scale):
    return *packed_shapes(x, *x.shape), mask_shape(x)


def quantize_forward(x, scale):
    """Rotates and quantises x [M, K] for the forward pass; scale is "floor" or "nearest".

    Returns Packed [M, K] and the mask of what was not clipped, int32 [M, K/32], one bit a value.
    """
    codes, scales, mask = torch.ops.fp4.quantize_forward(x, number_of(scale, SCALES))
    return Packed(codes, scales), mask


# ---- the quantisers of the backward pass

def quantize_backward_by_definition(
        x, signs, seeds, stochastic, sign_order, sign_order_t, operand_format):
    return reference.quantize_backward(
        x, signs, seeds, stochastic, word_of(sign_order, SIGN_ORDERS),
        word_of(sign_order_t, SIGN_ORDERS), word_of(operand_format, OPERAND_FORMATS))


@op("quantize_backward(Tensor x, Tensor signs, Tensor seeds, bool stochastic, int sign_order,"
    " int sign_order_t, int operand_format)"
    " -> (Tensor values, Tensor scales, Tensor values_t, Tensor scales_t)",
    quantize_backward_by_definition)
def quantize_backward_shapes(
        x, signs, seeds, stochastic, sign_order, sign_order_t, operand_format):
    rows, columns = x.shape
    operand_format = word_of(operand_format, OPERAND_FORMATS)
    plain = operand_shapes(x, rows, columns, operand_format)
    transposed = operand_shapes(x, columns, pad_to_32(rows), operand_format)
    return *plain, *transposed


def quantize_backward(x, signs, seeds, stochastic, sign_order, sign_order_t, operand_format):
    """Rotates and quantises x [M, K] along K, and x.T [K, M] along M, as left operands.

    signs int64 [1], seeds int64 [2] and the sign orders are explained in reference.py.
    Returns two Packed, x and x.T; M of the second is padded with zeros to a multiple of 32.
    """
    values, scales, values_t, scales_t = torch.ops.fp4.quantize_backward(
        x, signs, seeds, stochastic, number_of(sign_order, SIGN_ORDERS),
        number_of(sign_order_t, SIGN_ORDERS), number_of(operand_format, OPERAND_FORMATS))
    return Packed(values, scales), Packed(values_t, scales_t)


def requantize_transposed_by_definition(
        codes, scales, signs, seed, stochastic, sign_order, operand_format):
    return reference.requantize_transposed(
        codes, scales, signs, seed, stochastic, word_of(sign_order, SIGN_ORDERS),
        word_of(operand_format, OPERAND_FORMATS))


@op("requantize_transposed(Tensor codes, Tensor scales, Tensor signs, Tensor seed,"
    " bool stochastic, int sign_order, int operand_format)"
    " -> (Tensor values_t, Tensor scales_t)",
    requantize_transposed_by_definition)
def requantize_transposed_shapes(
        codes, scales, signs, seed, stochastic, sign_order, operand_format):
    rows = 2 * codes.shape[1]
    columns = pad_to_32(codes.shape[0])
    operand_format = word_of(operand_format, OPERAND_FORMATS)
    return operand_shapes(codes, rows, columns, operand_format, is_right=True)


def requantize_transposed(packed, signs, seed, stochastic, sign_order, operand_format):
    """Transposes a packed matrix [M, K], rotates and quantises it along M, as a right operand.

    Returns Packed [K, M], with M padded with zeros to a multiple of 32. seed is int64 [1].
    """
    return Packed(*torch.ops.fp4.requantize_transposed(
        *packed, signs, seed, stochastic, number_of(sign_order, SIGN_ORDERS),
        number_of(operand_format, OPERAND_FORMATS)))


# torch.compile would draw anew for each tensor that uses the signs, if it saw the drawing. So it is
# an op. dy is an argument so that the call stays in the backward pass. x, which is not read, makes
# the calls of two layers with the same dy different; otherwise they would be merged into one draw.
# Both were seen to happen.
@op("draw(Tensor dy, Tensor x, int n) -> (Tensor signs, Tensor seeds)",
    reference.draw, tags=torch.Tag.nondeterministic_seeded)
def draw_shapes(dy, x, n):
    return dy.new_empty(1, dtype=torch.int64), dy.new_empty(n, dtype=torch.int64)


def draw(dy, x, n):
    """Draws signs int64 [1] and n seeds int64 [n], on dy's device. x is not read: see above."""
    return torch.ops.fp4.draw(dy, x, n)


# ---- products, and the way out of the rotated basis

@op("dequantize(Tensor codes, Tensor scales, ScalarType dtype) -> Tensor", reference.dequantize)
def dequantize_shape(codes, scales, dtype):
    return codes.new_empty(codes.shape[0], 2 * codes.shape[1], dtype=dtype)


def dequantize(packed, dtype):
    """Returns the values of a packed matrix, [M, K] in float32 or bfloat16."""
    return torch.ops.fp4.dequantize(*packed, dtype)


@op("gemm(Tensor a, Tensor a_scales, Tensor b, Tensor b_scales, float alpha, ScalarType dtype)"
    " -> Tensor",
    reference.gemm)
def gemm_shape(a, a_scales, b, b_scales, alpha, dtype):
    return a.new_empty(a.shape[0], b.shape[0], dtype=dtype)


def gemm(a, b, alpha, dtype):
    """Returns alpha * a @ b.T, [M, N], of packed a [M, K] and b [N, K]."""
    return torch.ops.fp4.gemm(*a, *b, alpha, dtype)


@op("matvec(Tensor x, Tensor x_scales, Tensor w, Tensor w_scales, ScalarType dtype) -> Tensor",
    reference.matvec)
def matvec_shape(x, x_scales, w, w_scales, dtype):
    return x.new_empty(x.shape[0], w.shape[0], dtype=dtype)


def matvec(x, w, dtype):
    """Returns x @ w.T, [M, N], of packed x [M, K] and w [N, K]; M is at most MATVEC_ROWS.

    It reads each weight once, 17 bytes for 32 of them, and is for decoding.
    """
    return torch.ops.fp4.matvec(*x, *w, dtype)


def gemm_of_packed(a, a_scales, b, b_scales, rows, columns, alpha, dtype):
    return torch.ops.fp4.gemm(a, a_scales, b, b_scales, alpha, dtype)


@op("gemm_operands(Tensor a, Tensor a_scales, Tensor b, Tensor b_scales, int rows, int columns,"
    " float alpha, ScalarType dtype) -> Tensor",
    gemm_of_packed)
def gemm_operands_shape(a, a_scales, b, b_scales, rows, columns, alpha, dtype):
    return a.new_empty(rows, columns, dtype=dtype)


def gemm_operands(a, b, shape, alpha, dtype):
    """Multiplies two operands of the backward pass, which are in the format of the backend."""
    return torch.ops.fp4.gemm_operands(*a, *b, *shape, alpha, dtype)


@op("unrotate(Tensor d, Tensor mask, ScalarType dtype) -> Tensor", reference.unrotate)
def unrotate_shape(d, mask, dtype):
    return d.new_empty(d.shape, dtype=dtype)


def unrotate(d, mask, dtype):
    """Masks a gradient d [M, K] in the rotated basis, then undoes the rotation."""
    return torch.ops.fp4.unrotate(d, mask, dtype)


def nothing_clipped(rows, columns, device):
    """Returns the mask for unrotate of a matrix [rows, columns] of which no value has clipped."""
    return torch.full((rows, columns // 32), -1, dtype=torch.int32, device=device)


# ---- two pairs of ops that a kernel can do in one

def quantize_then_gemm(x, scale, b, b_scales):
    codes, scales, mask = torch.ops.fp4.quantize_forward(x, scale)
    y = torch.ops.fp4.gemm(codes, scales, b, b_scales, 1.0, x.dtype)
    return y, codes, scales, mask


@op("quantize_gemm(Tensor x, int scale, Tensor b, Tensor b_scales)"
    " -> (Tensor y, Tensor codes, Tensor scales, Tensor mask)",
    quantize_then_gemm)
def quantize_gemm_shapes(x, scale, b, b_scales):
    y = x.new_empty(x.shape[0], b.shape[0])
    return y, *packed_shapes(x, *x.shape), mask_shape(x)


def quantize_gemm(x, scale, b):
    """Quantises x [M, K] as quantize_forward does, and multiplies it with packed b [N, K].

    Returns y = x @ b.T [M, N] in x's dtype, Packed x, and its mask.
    """
    y, codes, scales, mask = torch.ops.fp4.quantize_gemm(x, number_of(scale, SCALES), *b)
    return y, Packed(codes, scales), mask


def gemm_then_unrotate(a, a_scales, b, b_scales, mask, alpha, dtype):
    d = torch.ops.fp4.gemm(a, a_scales, b, b_scales, alpha, torch.float32)
    return torch.ops.fp4.unrotate(d, mask, dtype)


@op("gemm_unrotate(Tensor a, Tensor a_scales, Tensor b, Tensor b_scales, Tensor mask, float alpha,"
    " ScalarType dtype) -> Tensor",
    gemm_then_unrotate)
def gemm_unrotate_shape(a, a_scales, b, b_scales, mask, alpha, dtype):
    return a.new_empty(mask.shape[0], 32 * mask.shape[1], dtype=dtype)


def gemm_unrotate(a, b, mask, alpha, dtype):
    """Multiplies two operands of the backward pass, masks the product and undoes its rotation.

    a and b are in the format of the backend; the shape [M, N] of the result is the mask's.
    """
    return torch.ops.fp4.gemm_unrotate(*a, *b, mask, alpha, dtype)


# Only a GPU has this op: packed [M, K] becomes FP8 E4M3 [M, K] with a float32 scale a row, [M, 1],
# that holds alpha. backend.py hands both to the library's FP8 product.
library.define("packed_to_fp8(Tensor codes, Tensor scales, float alpha)"
               " -> (Tensor fp8, Tensor row_scales)")
