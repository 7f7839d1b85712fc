"""
The three matrix products of a linear layer under any recipe.

Where both operands of a product are MXFP4, they are packed, 4.25 bits a value, and ops.gemm
multiplies them, as it does for Quartet. Any other product is emulated: an operand is rounded to the
values of its format but held in the dtype of the activations, and an ordinary matmul multiplies it.
The result is what hardware for the format would give, but takes longer than not quantising at all.

The products of y = x w.T, with x [M, K], w [N, K] and dy [M, N]:

    name       computed here                  sums over              rotation
    forward    y  = Q(x R) Q(w R).T           K, the in-features     R, along K
    dgrad      dx = Q(dy S) Q(wq.T S).T       N, the out-features    S, along N
    wgrad      dw = Q(dy.T S) Q(xq.T S).T     M, the tokens          S, along M

Q rounds to the format; each product has its own format, scale rule, rotation and rounding, which
are the columns of a GemmSpec (recipes.py). An operand is quantised along the axis that its product
sums over, because there its blocks' scales can be applied. columns.py does it: all that an operand
needs on its way from memory into a product is in one op.

xq and wq are what the forward product used, and a gradient quantises them again, transposed. Two
values of the column `rhs` change that: "reuse" takes them as they are, and "from_unquantized" takes
x R and w R, the tensors before the forward pass rounded them. They are saved as the forward product
read them, so that a quantiser of a gradient may read a packed matrix.

R and S are orthogonal (a Hadamard matrix, with random signs or without), so they cancel inside
each product. The signs are drawn anew at each call. dx and dw come out of theirs in the basis of x
R and w R; there they are masked where the forward pass clipped, and only then is R undone.

Axes are padded with zeros to whole blocks and whole rotations. Factors that bfloat16 cannot hold
are applied after the product, so that the rounded values are exact in bfloat16 (except those of
INT4, and of w and x where dgrad and wgrad take them over). With bfloat16 activations, a dw that is
not of packed operands is rounded to bfloat16 once, as it is in any BF16 training.
"""
import itertools
from typing import NamedTuple

import torch

from .. import ops
from ..ops import Packed
from ..recipes import GemmSpec
from . import columns
from .columns import SIGN_WORDS, pad_to_blocks, rotate_for
from .quantizers import constant_factor

# One draw makes all the random words of a call. It is an op of its own because torch.compile would
# otherwise draw anew in each consumer of the numbers, and the two operands of a product would get
# different signs. `dy` keeps the call in the backward pass. `x` is not read: it differs from layer
# to layer, and that keeps torch.compile from merging the calls of two layers with the same dy.
lib = torch.library.Library("fp4", "FRAGMENT")
lib.define("words(Tensor dy, Tensor x, int n) -> Tensor", tags=torch.Tag.nondeterministic_seeded)


def draw_words(dy, x, n):
    return torch.randint(-2 ** 63, 2 ** 63 - 1, (n,), device=dy.device)


def words_shape(dy, x, n): return dy.new_empty(n, dtype=torch.int64)


lib.impl("words", draw_words, "CompositeExplicitAutograd")
torch.library.register_fake("fp4::words", words_shape, lib=lib)
words = torch.ops.fp4.words


class Operand(NamedTuple):
    """A matrix in memory, to be quantised along its rows, or along its columns if transposed."""
    matrix: torch.Tensor                # values, or codes if there are scales
    spec: GemmSpec | None               # of this operand; None leaves the values as they are
    transposed: bool = False            # the operand is matrix.T
    factor: torch.Tensor | None = None  # float32 [1, 1] or [rows of matrix, 1]: times this
    square: bool = False                # blocks are squares, not stretches of one row
    scales: torch.Tensor | None = None  # of a packed matrix, which is transposed
    operand_format: str = "packed"      # of the result, if it is packed: columns.FORMATS
    packs: bool = False                 # whether it is: GemmSpec.is_packed of the product


class Quantized(NamedTuple):
    """A rotated and quantised matrix: it is approximately values * factor.

    values      [R, K padded], in the dtype of the activations, and scales [0]; or packed, which
                are codes uint8 [R, K padded / 2] and scales uint8 [R, K padded / 32], or what
                ops.py says of another operand format
    """
    values: torch.Tensor
    scales: torch.Tensor
    factor: torch.Tensor            # float32 [1, 1] or [R, 1]
    mask: torch.Tensor              # int32 [R, K padded / 32], a bit for what did not clip; or [0]

    @property
    def is_packed(self): return self.values.dtype == torch.uint8

    @property
    def is_tiled(self):
        "Says whether it is packed in FP8 tiles, which gemm_operands multiplies."
        return self.values.dim() == 3

    @property
    def packed(self): return Packed(self.values, self.scales)

    def unpacked(self, dtype):
        """Returns the values, which are exact in dtype if they have been packed."""
        return ops.dequantize(self.packed, dtype) if self.is_packed else self.values


class Saved(NamedTuple):
    """What the forward pass leaves for the backward pass."""
    x_values: torch.Tensor          # the four fields of Quantized, for x ...
    x_scales: torch.Tensor
    x_factor: torch.Tensor
    x_mask: torch.Tensor
    w_values: torch.Tensor          # ... and for w
    w_scales: torch.Tensor
    w_factor: torch.Tensor
    w_mask: torch.Tensor
    signs: torch.Tensor | None      # those of the rotation R
    x: torch.Tensor | None          # unquantised; None where wgrad has no use for it
    w: torch.Tensor

    @property
    def x_quantized(self): return Quantized(*self[:4])

    @property
    def w_quantized(self): return Quantized(*self[4:8])


# ---- from matrices to operands of a product

def quantize_operands(dy, nonce, operands):
    """Rotates and quantises the operands of a forward pass, or those of both gradients.

    operands        a list of Operand
    dy, nonce       the arguments of fp4::words. The results get dy's dtype. In the forward pass
                    these are x and w
    returns         a Quantized for each operand, and the signs int64 [2], or None if there are none

    All operands share one draw. The two of a product must share their signs in any case, or their
    rotations would not cancel.
    """
    signs, seeds = draw_signs_and_seeds(dy, nonce, [operand.spec for operand in operands])
    results = []
    for operand, seed in zip(operands, seeds):
        results.append(quantize_operand(operand, signs, seed, dy.dtype))
    return results, signs


def quantize_operand(operand, signs, seed, dtype):
    if operand.spec is not None:
        if operand.packs:
            dtype = torch.uint8
        return Quantized(*columns.quantize_operand(*operand[:-1], signs, seed, dtype))
    v = operand.matrix.to(dtype)
    if operand.factor is not None:
        v = (operand.matrix * operand.factor).to(dtype)
    return as_it_is(v.T if operand.transposed else v)


def as_it_is(v):
    no_scales = torch.empty(0, dtype=torch.uint8, device=v.device)
    factor = torch.ones(1, 1, dtype=torch.float32, device=v.device)
    no_mask = torch.empty(0, dtype=torch.int32, device=v.device)
    return Quantized(v, no_scales, factor, no_mask)


def draw_signs_and_seeds(dy, nonce, specs):
    """Draws the signs int64 [2], and for each spec that rounds at random a seed int64 [1].

    Nothing is drawn where nothing is random: the signs, and each such seed, are then None.
    """
    is_random = [spec is not None and spec.is_random for spec in specs]
    has_signs = any(spec is not None and spec.signs != "none" for spec in specs)
    if not has_signs and not any(is_random):
        return None, [None] * len(specs)

    drawn = words(dy, nonce, SIGN_WORDS + sum(is_random))
    places = itertools.count(SIGN_WORDS)
    seeds = [drawn.narrow(0, next(places), 1) if draws else None for draws in is_random]
    return drawn[:SIGN_WORDS], seeds


def scaled_matmul(a, b, factor, dtype):
    """Returns factor * a @ b.T in dtype."""
    return cast((a @ b.T).float() * factor, dtype)


def packed_product(left, right, shape, alpha, dtype):
    """Returns alpha * left @ right.T, [M, N] = shape, of two Quantized that are packed."""
    if left.is_tiled:
        return ops.gemm_operands(left.packed, right.packed, shape, alpha, dtype)
    return ops.gemm(left.packed, right.packed, alpha, dtype)


def constant_factors(spec):
    """Returns the factor of a product whose operands have no factors of their rows."""
    return constant_factor(spec.left) * constant_factor(spec.right)


def scaled_product(left, right, spec, shape, dtype):
    """Returns left @ right.T of two Quantized, times their factors, in dtype."""
    if left.is_packed and spec.rounding != "eden":
        return packed_product(left, right, shape, constant_factors(spec), dtype)
    factor = left.factor * right.factor.T
    if left.is_packed:
        product = packed_product(left, right, shape, 1., torch.float32)
        return cast(product * factor, dtype)
    return scaled_matmul(left.values, right.values, factor, dtype)


def cast(y, dtype):
    """Returns y in dtype, and y itself where it has that dtype already.

    Compiled by torch 2.11, an autograd Function that returns a .to() without effect gets zeros for
    its gradient.
    """
    return y if y.dtype == dtype else y.to(dtype)


# ---- the products

def forward(x, w, recipe):
    """Computes y = x w.T; returns it and what backward needs, a Saved."""
    spec = recipe.forward
    if spec is None:
        y = x @ w.to(x.dtype).T
        return y, Saved(*as_it_is(x), *as_it_is(w), None, x, w)

    is_square = spec.rhs == "square_blocks"
    operands = [Operand(x, spec.left, packs=spec.is_packed),
                Operand(w, spec.right, square=is_square, packs=spec.is_packed)]
    (x_quantized, w_quantized), signs = quantize_operands(x, w, operands)
    y = scaled_product(x_quantized, w_quantized, spec, (len(x), len(w)), x.dtype)
    keeps_x = recipe.wgrad is not None and recipe.wgrad.rhs == "from_unquantized"
    return y, Saved(*x_quantized, *w_quantized, signs, x if keeps_x else None, w)


def backward(dy, saved, recipe, backend=None):
    """Computes dx = dy w in dy's dtype, and dw = dy.T x in float32."""
    saved = Saved(*saved)
    used_w, used_x = saved.w_quantized, saved.x_quantized
    dgrad = as_the_product_wants(
        grad_lhs(recipe.dgrad, dy, transposed=False),
        grad_rhs(recipe.dgrad, used_w, saved.w, recipe.forward, saved.signs, dy.dtype),
        backend)
    wgrad = as_the_product_wants(
        grad_lhs(recipe.wgrad, dy, transposed=True),
        grad_rhs(recipe.wgrad, used_x, saved.x, recipe.forward, saved.signs, dy.dtype),
        backend)
    quantized, _ = quantize_operands(dy, saved.x_values, [*dgrad, *wgrad])

    # x and w are rotated alike, but each has its own scale rule, which may clip or not.
    forward_specs = (None, None) if recipe.forward is None else (
        recipe.forward.left, recipe.forward.right)
    x_basis, w_basis = (Basis(spec, saved.signs, saved.w.shape[1]) for spec in forward_specs)
    dx = grad_product(*quantized[:2], recipe.dgrad, len(dy), dy.dtype, saved.x_mask, x_basis)
    dw = grad_product(
        *quantized[2:], recipe.wgrad, dy.shape[1], torch.float32, saved.w_mask, w_basis)
    return cast(dx[:, :x_basis.width], dy.dtype), cast(dw[:, :w_basis.width], torch.float32)


def as_the_product_wants(left, right, backend):
    """Returns both operands of a gradient, to be written in FP8 tiles if the backend multiplies
    these, which saves their way through memory as packed matrices."""
    if backend is None or backend.format_for(left.matrix) != "fp8":
        return left, right
    if not all(operand.packs and columns.is_compiled(operand.spec) for operand in (left, right)):
        return left, right
    return left._replace(operand_format="fp8_left"), right._replace(operand_format="fp8_right")


def grad_lhs(spec, dy, transposed):
    """Returns the left Operand of a gradient: dy of dgrad, dy.T of wgrad."""
    if spec is None:
        return Operand(dy, None, transposed)
    return Operand(dy, spec.left, transposed, packs=spec.is_packed)


def grad_rhs(spec, used, unquantized, forward_spec, signs, dtype):
    """Returns the right Operand of a gradient, w.T of dgrad or x.T of wgrad, as spec.rhs says.

    used            the Quantized that the forward product multiplied, in the rotated basis
    unquantized     the same tensor before it was rotated and quantised
    signs           those of the forward rotation
    dtype           of the activations
    """
    factor = used.factor
    if spec is None:
        return Operand(used.unpacked(dtype), None, True, factor)
    if spec.rhs == "reuse":                 # The left operand is padded, so this one has to be.
        padded = pad_to_blocks(used.unpacked(dtype).T, spec).T
        padded_factor = factor if len(factor) == 1 else pad_to_blocks(factor.T, spec).T
        return Operand(padded, None, True, padded_factor)
    if spec.rhs == "from_unquantized":
        rotated = unquantized
        if forward_spec is not None:
            rotated = rotate_for(pad_to_blocks(unquantized, forward_spec), forward_spec, signs)
        return Operand(rotated, spec.right, True, packs=spec.is_packed)
    scales = used.scales if used.is_packed else None
    return Operand(used.values, spec.right, True, factor, scales=scales, packs=spec.is_packed)


class Basis(NamedTuple):
    """The basis in which the forward pass has quantised x or w, along its in-features."""
    spec: GemmSpec | None           # of this operand of the forward product
    signs: torch.Tensor | None
    width: int                      # the number of in-features

    @property
    def padded(self):
        return self.width if self.spec is None else columns.padded_size(self.width, self.spec)

    @property
    def has_epilogue(self):
        "Says whether gemm_unrotate takes a gradient out of it."
        return self.spec.rotation == 32 and self.spec.signs == "none"


def grad_product(left, right, spec, rows, dtype, mask, basis):
    """Multiplies two Quantized, and takes the gradient out of the basis of the forward rotation.

    rows        those of left
    returns     [rows, basis.padded] in dtype
    """
    shape = (rows, basis.padded)
    if basis.spec is None or not columns.has_basis(basis.spec):
        return scaled_product(left, right, spec, shape, dtype)
    if left.is_tiled and basis.has_epilogue and spec.rounding != "eden":
        if mask.numel() == 0:
            mask = ops.nothing_clipped(*shape, mask.device)
        return ops.gemm_unrotate(
            left.packed, right.packed, mask, constant_factors(spec), dtype)
    if left.is_packed:
        product = packed_product(left, right, shape, 1., dtype)
    else:
        product = left.values @ right.values.T
    return columns.unrotate(
        product, left.factor, right.factor, mask, basis.signs, dtype, basis.spec)


# What a recipe's `method` names, as a pair: forward(x, w, recipe) -> y, saved tensors, and
# backward(dy, saved tensors, recipe) -> dx, dw. The columns of a recipe describe the method "";
# baselines.py adds the others.
METHODS = {"": (forward, backward)}


class Matmul(torch.autograd.Function):
    """y = x w.T and its gradients, as the method of the recipe computes them.

    x           [M, K]  bfloat16 or float32
    w           [N, K]  float32
    recipe      a Recipe
    w_ready     None, or w as the method quantises it, where that is done already
    backend     the Backend that multiplies packed operands, or None
    returns     [M, N]  in x's dtype
    """

    @staticmethod
    def forward(ctx, x, w, recipe, w_ready=None, backend=None):
        method_forward, _ = METHODS[recipe.method]
        y, saved = method_forward(x, w if w_ready is None else w_ready, recipe)
        ctx.save_for_backward(*saved)
        ctx.recipe = recipe
        ctx.backend = backend
        return y

    @staticmethod
    def backward(ctx, dy):
        recipe = ctx.recipe
        dy = dy.contiguous()
        if recipe.method:
            _, method_backward = METHODS[recipe.method]
            dx, dw = method_backward(dy, ctx.saved_tensors, recipe)
        else:
            dx, dw = backward(dy, ctx.saved_tensors, recipe, ctx.backend)
        return dx, dw, None, None, None
