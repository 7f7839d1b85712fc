"""
y = x w.T with all three matrix products in MXFP4: Quartet's Algorithm 1 (arXiv 2505.14669v4).

             left operand        right operand     summed over
    y    =   QuEST(x H)          QuEST(w H).T      K   in-features     fixed rotation H
    dx   =   Q(dy S)             Q(wq.T S).T       N   out-features    S = fresh random signs, then H
    dw   =   Q(dy.T S)           Q(xq.T S).T       M   tokens

H and S are orthogonal along the axis that is summed over, so they cancel inside each product. Both
backward operands carry a factor 3/4 that keeps the largest value from clipping: alpha = 16/9 takes it out
again. dx and dw arrive in the rotated basis of xq and wq: mask what clipped there, then rotate back.

Saved for backward: xq and wq, 4.25 bits a value and one mask bit; nothing in high precision. With `recompute` not even
xq: torch.compile makes x again from what others save, and it is quantised once more.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F
from . import baselines, emulated                              # every recipe that the kernels do not compute
from .build import build
from .product import operands
from .recipes import recipe

ops = torch.ops.fp4


class QuartetMatmul(torch.autograd.Function):
    """x [M, K], w [N, K] -> [M, N] in x's dtype. w is only where the gradient goes: its values are in packed_w"""

    @staticmethod
    def forward(ctx, x, w, packed_w, recipe, recompute):
        y, *packed_x = ops.quantize_gemm(x, recipe.scale, *packed_w[:2])
        ctx.save_for_backward(*([x] if recompute and torch.compiler.is_compiling() else packed_x), *packed_w)
        ctx.recipe = recipe
        return y

    @staticmethod
    def backward(ctx, dy):
        *x, wc, ws, w_mask = ctx.saved_tensors          # times 1, because torch.compile saves what an op of ours reads
        xc, xs, x_mask = x if len(x) == 3 else ops.quantize_forward(x[0] * 1.0, ctx.recipe.scale)
        dy = dy.contiguous()
        if ctx.recipe.backward:
            sr, (dgrad, wgrad), format = ctx.recipe.stochastic, ctx.recipe.turns, operands(dy)
            signs, seeds = ops.draw(dy, xc, 4)                                       # one sign word, four tensors
            gc, gs, gtc, gts = ops.quantize_backward(dy, signs, seeds[:2], sr, dgrad, wgrad, format)       # dy and dy.T
            wtc, wts = ops.requantize(wc, ws, signs, seeds[2:3], sr, dgrad, format)  # wq.T
            xtc, xts = ops.requantize(xc, xs, signs, seeds[3:], sr, wgrad, format)   # xq.T
            dx = ops.gemm_unrotate(gc, gs, wtc, wts, x_mask, 16 / 9, dy.dtype)
            dw = ops.gemm_unrotate(gtc, gts, xtc, xts, w_mask, 16 / 9, torch.float32)
        else:
            dx = ops.unrotate(dy @ ops.dequantize(wc, ws, dy.dtype), x_mask, dy.dtype)
            dw = ops.unrotate(dy.T @ ops.dequantize(xc, xs, dy.dtype), w_mask, torch.float32)
        return dx, dw, None, None, None


class Linear(nn.Linear):
    """nn.Linear without bias whose products run as its recipe says; in- and out-features are multiples of 32 (fp8: 16).
    The weight stays float32 for the optimizer; recompute: see above. Linear(640, 1792, "fp4", scale="nearest")"""

    def __init__(self, n_in, n_out, precision, recompute=False, **axes):
        self.recipe, self.recompute = recipe(precision, **axes), recompute
        for name, n in (("in", n_in), ("out", n_out)):
            if n % self.recipe.multiple:
                raise ValueError(f"{precision}: {name}-features must be a multiple of {self.recipe.multiple}, got {n}")
        self.kernels = self.recipe.kernels                      # once, not in the compiled graph
        if self.kernels: build()                                # the kernels, at their first use
        super().__init__(n_in, n_out, bias=False)
        self.packed = self.version = None

    def forward(self, x):
        if not self.recipe.quantised: return F.linear(x, self.weight.to(x.dtype))
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        if self.kernels: y = QuartetMatmul.apply(rows, self.weight, self.packed_weight(), self.recipe, self.recompute)
        else:            y = emulated.Matmul.apply(rows, self.weight, self.recipe)
        return y.view(*x.shape[:-1], self.out_features)

    def packed_weight(self):
        if self.packed is None or not torch.compiler.is_compiling() and self.version != self.weight._version:
            return ops.quantize_forward(self.weight.detach(), self.recipe.scale)
        return self.packed

    def quantize_weight(self):
        """quantise now, for every forward until the weight changes; into the same memory each time"""
        packed = ops.quantize_forward(self.weight.detach(), self.recipe.scale)
        self.packed = [old.copy_(new) for old, new in zip(self.packed, packed)] if self.packed else packed
        self.version = self.weight._version


def quantize_weights_after(optimizer, model):
    """quantise the weights of model's fp4 layers now, and after each optimizer.step(): once a step, not once a microbatch"""
    layers = [m for m in model.modules() if isinstance(m, Linear) and m.kernels]
    def quantize(*_):
        for layer in layers: layer.quantize_weight()
    quantize()
    optimizer.register_step_post_hook(quantize)
