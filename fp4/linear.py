"""
A linear layer whose three matrix products run in MXFP4: Algorithm 1 of Quartet (arXiv 2505.14669,
version 4). reference.py explains MXFP4 and the two quantisers, QuEST and Q.

Training a linear layer y = x w.T, with x [M, K], w [N, K] and y [M, N], takes three products. Each
of them sums over one axis, and its two operands are quantised in blocks of 32 along that axis:

    product    exactly          sums over              what is multiplied here
    forward    y  = x w.T       K, the in-features     xq wq.T,  xq = QuEST(x H),  wq = QuEST(w H)
    dgrad      dx = dy w        N, the out-features    Q(dy S)    Q(wq.T S).T
    wgrad      dw = dy.T x      M, the tokens          Q(dy.T S)  Q(xq.T S).T

H rotates each block: it is a fixed orthogonal matrix of 32 x 32. S is a random rotation, random
signs followed by H, which is drawn anew in each call.

Why rotate? A block of 32 numbers shares one scale, so that one large number makes its 31
neighbours coarse. Multiplying the block by an orthogonal matrix spreads the large number over all
of them. Both operands of a product are rotated by the same matrix along the axis that is summed
over. There it cancels, up to what was rounded: (x H) (w H).T = x H H.T w.T = x w.T. It is random
in the backward pass so that rounding errs differently in every step, and errors average out.

Why two quantisers? The forward pass wants the smallest error and may clip large values: QuEST. The
backward pass wants errors that are near zero on average (little bias), because they add up over
many layers and steps; so it must not clip. Q rounds to nearest, or stochastically. It scales by a
power of two that brings the largest value of a block into [4, 8), where 6 is the end of the grid,
and then by 3/4, into [3, 6). A product of two such operands is 9/16 of what it should be, and is
multiplied by 16/9.

The gradient of rounding is zero almost everywhere, so the backward pass pretends that rounding
changed nothing (a "straight-through estimator"). Where a value was clipped it does not: moving
such a value changes nothing, and its gradient is set to zero. The mask says which values those are.

dgrad multiplies with wq, which is rotated along K, so dx comes out rotated along K; likewise dw.
The mask belongs to rotated values too. So dx and dw are masked first, and only then is H undone.

What is saved for the backward pass? The two packed operands, 4.25 bits a value, and for each a mask
with one bit a value, which is 1 inside the grid and 0 at its end or beyond. Nothing is saved in
high precision (but see recompute at Linear). That is why the backward pass quantises wq and xq once
more, along another axis, instead of w and x.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from . import emulate, ops, post_step, stored_weight
from .ops import Packed

UNDO_BOTH_THREE_QUARTERS = 16 / 9        # (4/3)**2: each operand of a product carries 3/4


class QuartetMatmul(torch.autograd.Function):
    """Computes y = x w.T, with forward, dgrad and wgrad in MXFP4.

    x           [M, K]  float32 or bfloat16
    weight      [N, K]  float32; it only receives the gradient: the products read w_quantized
    w_quantized         of stored_weight.py: Packed wq, its mask, and whether it is stored
    recipe, backend, recompute      those of the Linear
    returns     [M, N]  in x's dtype
    """

    @staticmethod
    def forward(ctx, x, weight, w_quantized, recipe, backend, recompute):
        wq, w_mask, is_stored = w_quantized
        if is_stored and torch.compiler.is_compiling():
            # The op looks whether wq is still that of the weight, which a graph cannot see.
            y, xq, x_mask = stored_weight.quantize_gemm(
                x, recipe.forward_scale, weight, w_quantized)
        else:
            y, xq, x_mask = ops.quantize_gemm(x, recipe.forward_scale, wq)

        # With recompute, a compiled model does not keep xq, but hands x to the backward pass. In a
        # compiled model, save_for_backward does not decide what is stored: torch.compile chooses
        # which tensors to keep and which to compute again, and x is to be computed again.
        ctx.recomputes_x = recompute and torch.compiler.is_compiling()
        saved_x = (x,) if ctx.recomputes_x else (*xq, x_mask)
        ctx.save_for_backward(*wq, w_mask, *saved_x)
        ctx.recipe = recipe
        ctx.backend = backend
        return y

    @staticmethod
    def backward(ctx, dy):
        saved = ctx.saved_tensors
        wq = Packed(*saved[:2])
        w_mask = saved[2]
        if ctx.recomputes_x:
            # torch.compile keeps a tensor that an op of ours reads directly. One that is read only
            # by plain arithmetic, here x * 1.0, it computes again in the backward pass, from
            # tensors that it keeps in any case.
            xq, x_mask = ops.quantize_forward(saved[3] * 1.0, ctx.recipe.forward_scale)
        else:
            xq = Packed(*saved[3:5])
            x_mask = saved[5]
        dy = dy.contiguous()

        if ctx.recipe.quantizes_backward:
            dgrad, wgrad = quantize_gradient_operands(dy, xq, wq, ctx.recipe, ctx.backend)
            dx = ops.gemm_unrotate(*dgrad, x_mask, UNDO_BOTH_THREE_QUARTERS, dy.dtype)
            dw = ops.gemm_unrotate(*wgrad, w_mask, UNDO_BOTH_THREE_QUARTERS, torch.float32)
        else:
            dx = ops.unrotate(dy @ ops.dequantize(wq, dy.dtype), x_mask, dy.dtype)
            dw = ops.unrotate(dy.T @ ops.dequantize(xq, dy.dtype), w_mask, torch.float32)
        return dx, dw, None, None, None, None


def quantize_gradient_operands(dy, xq, wq, recipe, backend):
    """Returns the two operands of dgrad and the two of wgrad.

    An operand is quantised along the axis that its product sums over. So dy is needed as it is and
    transposed, and xq and wq, whose blocks lie along K, are needed transposed.
    """
    # The same 32 signs serve all four tensors. The two of a product must share them, or the
    # rotation would not cancel. The draw is an op of its own because torch.compile would draw anew
    # for each tensor that uses the signs, and the gradient would be silently wrong (its cosine with
    # the true gradient was 0.23).
    signs, seeds = ops.draw(dy, xq.codes, 4)
    stochastic = recipe.stochastic
    dgrad_order, wgrad_order = recipe.sign_orders
    operand_format = backend.format_for(dy)

    dy_rows, dy_columns = ops.quantize_backward(
        dy, signs, seeds[:2], stochastic, dgrad_order, wgrad_order, operand_format)
    w_columns = ops.requantize_transposed(
        wq, signs, seeds[2:3], stochastic, dgrad_order, operand_format)
    x_columns = ops.requantize_transposed(
        xq, signs, seeds[3:], stochastic, wgrad_order, operand_format)
    return (dy_rows, w_columns), (dy_columns, x_columns)


class Linear(nn.Linear):
    """nn.Linear whose matrix products run as its recipe says.

    The weight stays float32 for the optimizer. Where the kernels compute the recipe, they read a
    quantised copy. quantize_weight stores it, once per optimizer step, and every microbatch and
    evaluation uses it until the weight changes (stored_weight.py). Without a stored copy, and in
    other recipes, the weight is quantised in each call.

    recipe      what recipe("fp4") of recipes.py returns
    backend     what build() returns; None: call it, if the recipe has a product of MXFP4
    recompute   for a layer whose input is cheap to compute again: when the model is compiled, the
                backward pass computes and quantises x once more, from what other layers keep,
                and this layer keeps neither x nor xq. It has no effect otherwise
    bias        whether a bias, which is not quantised, is added to the product
    is_down     whether recipe.down is its row: for an input that is hard to quantise

    Raises ValueError unless both feature counts are multiples of 32 (of 16 if the recipe is
    emulated, and any number if nothing is quantised).
    """

    def __init__(self, in_features, out_features, recipe, recompute=False, backend=None,
                 bias=False, is_down=False):
        recipe = recipe.down if is_down else recipe
        recipe.check_features(in_features, out_features)
        super().__init__(in_features, out_features, bias=bias)
        self.recompute = recompute
        self.is_down = is_down
        self.strip = None           # sharded.py: of a weight that is spread over processes
        self.gathered = None        # and what its products read instead of it
        self.set_recipe(recipe, backend)

    def set_recipe(self, recipe, backend=None):
        """Computes by this row from now on; set_recipe of whole_model.py chooses and checks it."""
        self.recipe = recipe
        self.has_kernels = recipe.has_kernels       # computed here, not in the compiled graph
        self.backend = emulate.load_kernels([recipe], backend=backend)
        self.stored = None
        post_step.add_state(self)

    def forward(self, x):
        stored_weight.check_gathered(self)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if not self.recipe.is_quantized:
            return F.linear(x, stored_weight.cast(self, x.dtype), bias)

        rows = x.reshape(-1, x.shape[-1]).contiguous()
        if self.has_kernels:
            w_quantized = self.gathered or stored_weight.operand(
                self.stored, self.weight, self.recipe.forward_scale)
            y = QuartetMatmul.apply(
                rows, self.weight, w_quantized, self.recipe, self.backend, self.recompute)
        else:
            y = emulate.Matmul.apply(
                rows, self.weight, self.recipe, self.gathered, self.backend)
        y = y.view(*x.shape[:-1], self.out_features)
        return y if bias is None else y + bias

    def quantize_weight(self):
        """Stores the quantised weight, which then serves until the weight changes."""
        self.stored = stored_weight.store(self.stored, self.weight, self.recipe.forward_scale)

    def __getstate__(self):
        """Leaves the stored copy out of copies and pickles of the layer: they make their own."""
        return {**self.__dict__, "stored": None}
