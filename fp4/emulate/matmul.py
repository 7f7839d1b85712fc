"""
The three matrix products of a linear layer under any recipe, in plain PyTorch.

"Emulated" means that an operand is rounded to the values of its 4-bit format but held in the dtype
of the activations, and that an ordinary matmul multiplies it. The result is what hardware for the
format would give. It takes longer than not quantising at all: this file is for comparing methods.

The products of y = x w.T, with x [M, K], w [N, K] and dy [M, N]:

    name       emulated here                  sums over              rotation
    forward    y  = Q(x R) Q(w R).T           K, the in-features     R, along K
    dgrad      dx = Q(dy S) Q(wq.T S).T       N, the out-features    S, along N
    wgrad      dw = Q(dy.T S) Q(xq.T S).T     M, the tokens          S, along M

Q rounds to the format; each product has its own format, scale rule, rotation and rounding, which
are the columns of a GemmSpec (recipes.py). An operand is quantised along the axis that its product
sums over, because there its blocks' scales can be applied.

xq and wq are what the forward product used, and a gradient quantises them again, transposed. Two
values of the column `rhs` change that: "reuse" takes them as they are, and "from_unquantized" takes
x R and w R, the tensors before the forward pass rounded them.

R and S are orthogonal (a Hadamard matrix, with random signs or without), so they cancel inside
each product. The signs are drawn anew at each call. dx and dw come out of theirs in the basis of x
R and w R; there they are masked where the forward pass clipped, and only then is R undone.

Axes are padded with zeros to whole blocks and whole rotations. Factors that bfloat16 cannot hold
are applied after the product, so that the rounded values are exact in bfloat16 (except those of
INT4, and of w and x where dgrad and wgrad take them over). With bfloat16 activations, dw is rounded
to bfloat16 once, as it is in any BF16 training.
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..recipes import GemmSpec
from .quantizers import BLOCK_SIZE, quantize

MAX_ROTATION = 128          # signs are drawn for the longest rotation; a shorter one uses the first

# One draw makes all the random numbers of a call. It is an op of its own because torch.compile
# would otherwise draw anew in each consumer of the numbers, and the two operands of a product
# would get different signs. `dy` keeps the call in the backward pass. `x` is not read: it differs
# from layer to layer, and that keeps torch.compile from merging the calls of two layers with the
# same dy.
lib = torch.library.Library("fp4", "FRAGMENT")
lib.define("uniform(Tensor dy, Tensor x, int n) -> Tensor", tags=torch.Tag.nondeterministic_seeded)

def draw_uniform(dy, x, n): return torch.rand(n, device=dy.device)
def uniform_shape(dy, x, n): return dy.new_empty(n, dtype=torch.float32)

lib.impl("uniform", draw_uniform, "CompositeExplicitAutograd")
torch.library.register_fake("fp4::uniform", uniform_shape, lib=lib)
uniform = torch.ops.fp4.uniform


class Operand(NamedTuple):
    """A matrix on its way into a product, to be quantised along its last axis."""
    values: torch.Tensor            # [R, K]
    spec: GemmSpec | None           # how; None leaves the values as they are
    square: bool = False            # blocks are squares, not stretches of one row


class Quantized(NamedTuple):
    """A rotated and quantised matrix: it is approximately values * factor."""
    values: torch.Tensor            # [R, K padded], in the dtype of the activations
    factor: torch.Tensor            # float32 [1, 1] or [R, 1]
    mask: torch.Tensor | None       # bool [R, K padded]: what did not clip; None: all passes


class Saved(NamedTuple):
    """What the forward pass leaves for the backward pass."""
    x_values: torch.Tensor          # the three fields of Quantized, for x ...
    x_factor: torch.Tensor
    x_mask: torch.Tensor | None
    w_values: torch.Tensor          # ... and for w
    w_factor: torch.Tensor
    w_mask: torch.Tensor | None
    signs: torch.Tensor | None      # those of the rotation R
    x: torch.Tensor | None          # unquantised; None where wgrad has no use for it
    w: torch.Tensor


# ---- rotations

def hadamard_matrix(n, device):
    """Returns the orthogonal Hadamard matrix [n, n] for a power of two n, at most 2**16.

    Entry (i, j) is negative where i & j has an odd number of ones. reference.py rotates by a
    butterfly, whose order of sums is fixed so that kernels can equal it bit for bit. A product with
    this matrix equals that up to rounding, and is what torch.compile and a GPU do fast, for any n.
    """
    i = torch.arange(n, device=device)
    parity = i[:, None] & i
    for shift in (8, 4, 2, 1):
        parity = parity ^ (parity >> shift)
    return (1 - 2 * (parity & 1)) * n ** -.5


def rotate(v, n, signs=None, signs_after=False):
    """Rotates each n neighbours along the last axis of v; n = 0 returns v itself.

    signs [n] are multiplied in before the Hadamard matrix or after it. The Hadamard matrix is its
    own inverse, so that the same signs on the other side undo the rotation.
    """
    if n == 0:
        return v
    v = v.float().unflatten(-1, (-1, n))
    if signs is not None and not signs_after:
        v = v * signs
    v = v @ hadamard_matrix(n, v.device)
    if signs is not None and signs_after:
        v = v * signs
    return v.flatten(-2)


def rotate_for(v, spec, signs, undo=False):
    """Rotates v as spec says, or undoes that. signs [MAX_ROTATION], or None where spec has none."""
    if spec.signs == "none":
        return rotate(v, spec.rotation)
    signs_after = spec.signs == "after"
    if undo:
        signs_after = not signs_after
    return rotate(v, spec.rotation, signs[:spec.rotation], signs_after)


# ---- from matrices to operands of a product

def pad_to_blocks(v, spec):
    """Appends zeros to the last axis until it holds whole blocks and whole rotations."""
    unit = max(spec.rotation, BLOCK_SIZE[spec.format])
    return F.pad(v, (0, -v.shape[-1] % unit))


def quantize_operands(dy, nonce, operands):
    """Rotates and quantises the operands of a forward pass, or those of both gradients.

    operands        a list of Operand
    dy, nonce       the arguments of fp4::uniform. The results get dy's dtype. In the forward pass
                    these are x and w
    returns         a Quantized for each operand, and the signs [MAX_ROTATION], or None if there
                    are none

    All operands share one draw. The two of a product must share their signs in any case, or their
    rotations would not cancel.
    """
    operands = [pad_operand(operand) for operand in operands]
    signs, noises = draw_signs_and_noise(dy, nonce, operands)
    results = []
    for operand, noise in zip(operands, noises):
        results.append(quantize_operand(operand, signs, noise, dy.dtype))
    return results, signs


def pad_operand(operand):
    if operand.spec is None:
        return operand
    return operand._replace(values=pad_to_blocks(operand.values, operand.spec))


def quantize_operand(operand, signs, noise, dtype):
    v, spec, square = operand
    if spec is None:
        factor = torch.ones(1, 1, dtype=torch.float32, device=v.device)
        return Quantized(v.to(dtype), factor, None)
    rotated = rotate_for(v, spec, signs).float()
    values, factor, mask = quantize(rotated, spec, noise, square)
    return Quantized(values.to(dtype), factor, mask)


def draw_signs_and_noise(dy, nonce, operands):
    """Draws the signs [MAX_ROTATION], and for each operand that rounds at random its noise [R, K].

    Nothing is drawn where nothing is random: the signs, and each such noise, are then None.
    """
    has_signs = False
    sizes = [MAX_ROTATION]
    for v, spec, _ in operands:
        is_random = spec is not None and spec.rounding != "nearest"
        sizes.append(v.numel() if is_random else 0)
        has_signs = has_signs or (spec is not None and spec.signs != "none")
    if not has_signs and sum(sizes) == MAX_ROTATION:
        return None, [None] * len(operands)

    parts = uniform(dy, nonce, sum(sizes)).split(sizes)
    signs = torch.where(parts[0] < .5, -1., 1.)
    noises = []
    for operand, noise in zip(operands, parts[1:]):
        noises.append(noise.view_as(operand.values) if noise.numel() else None)
    return signs, noises


def scaled_matmul(a, b, factor, dtype):
    """Returns factor * a @ b.T in dtype."""
    return cast((a @ b.T).float() * factor, dtype)


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
        factor = x.new_ones(1, 1, dtype=torch.float32)
        return y, Saved(x, factor, None, w, factor, None, None, x, w)

    operands = [Operand(x, spec), Operand(w, spec, square=spec.rhs == "square_blocks")]
    (x_quantized, w_quantized), signs = quantize_operands(x, w, operands)
    factor = x_quantized.factor * w_quantized.factor.T
    y = scaled_matmul(x_quantized.values, w_quantized.values, factor, x.dtype)
    keeps_x = recipe.wgrad is not None and recipe.wgrad.rhs == "from_unquantized"
    return y, Saved(*x_quantized, *w_quantized, signs, x if keeps_x else None, w)


def backward(dy, saved, recipe):
    """Computes dx = dy w in dy's dtype, and dw = dy.T x in float32."""
    saved = Saved(*saved)
    w_used = saved.w_values * saved.w_factor
    x_used = saved.x_values * saved.x_factor
    operands = [
        Operand(dy, recipe.dgrad),
        grad_rhs(recipe.dgrad, w_used, saved.w, recipe.forward, saved.signs),
        Operand(dy.T, recipe.wgrad),
        grad_rhs(recipe.wgrad, x_used, saved.x, recipe.forward, saved.signs),
    ]
    quantized, _ = quantize_operands(dy, saved.x_values, operands)
    dy_rows, w_columns, dy_columns, x_columns = quantized

    dx = grad_product(dy_rows, w_columns, dy.dtype, saved.x_mask, recipe.forward, saved.signs)
    dw = grad_product(dy_columns, x_columns, torch.float32, saved.w_mask, recipe.forward,
                      saved.signs)
    in_features = saved.w.shape[1]                      # without the padding
    return cast(dx[:, :in_features], dy.dtype), cast(dw[:, :in_features], torch.float32)


def grad_rhs(spec, used, unquantized, forward_spec, signs):
    """Returns the right Operand of a gradient, w.T of dgrad or x.T of wgrad, as spec.rhs says.

    used            what the forward product multiplied, in the rotated basis
    unquantized     the same tensor before it was rotated and quantised
    signs           those of the forward rotation
    """
    if spec is None:
        return Operand(used.T, None)
    if spec.rhs == "reuse":
        return Operand(pad_to_blocks(used.T, spec), None)
    if spec.rhs == "from_unquantized":
        rotated = unquantized
        if forward_spec is not None:
            rotated = rotate_for(pad_to_blocks(unquantized, forward_spec), forward_spec, signs)
        return Operand(rotated.T, spec._replace(rounding="nearest"))
    return Operand(used.T, spec)


def grad_product(left, right, dtype, mask, forward_spec, signs):
    """Multiplies two Quantized, and takes the gradient out of the basis of the forward rotation."""
    grad = scaled_matmul(left.values, right.values, left.factor * right.factor.T, dtype)
    if mask is not None:
        grad = grad * mask                  # a selection would hide a NaN, a product does not
    if forward_spec is not None:
        grad = rotate_for(grad, forward_spec, signs, undo=True)
    return grad


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
    returns     [M, N]  in x's dtype
    """

    @staticmethod
    def forward(ctx, x, w, recipe, w_ready=None):
        method_forward, _ = METHODS[recipe.method]
        y, saved = method_forward(x, w if w_ready is None else w_ready, recipe)
        ctx.save_for_backward(*saved)
        ctx.recipe = recipe
        return y

    @staticmethod
    def backward(ctx, dy):
        _, method_backward = METHODS[ctx.recipe.method]
        dx, dw = method_backward(dy.contiguous(), ctx.saved_tensors, ctx.recipe)
        return dx, dw, None, None
