"""
A few ops, each with several implementations and one schema; the device of the tensors picks one:

    CompositeExplicitAutograd   reference.py, the definition: runs on anything, slowly
    CPU                         cpu.cpp, once build() has compiled it (build.py)
    CUDA                        quantize.cu, likewise, and a product for the GPU: product.py

Shapes: M rows, K columns in blocks of 32; packed matrices are codes [M, K/2] and scales [M, K/32]. The operands of a
gradient's product have a format: packed, or on a GPU what its product wants (product.py): fp8, tiles of FP8 values (tiles.cuh),
or mxf4, packed but for the scales, which are in tiles (scale_tiles.cuh).
"""
import torch
from . import reference

lib = torch.library.Library("fp4", "DEF")
for schema in (
    "quantize_forward(Tensor x, str scale) -> (Tensor codes, Tensor scales, Tensor mask)",
    "quantize_backward(Tensor x, Tensor signs, Tensor seeds, bool stochastic, str turn, str turn_t, str format)"
        " -> (Tensor a, Tensor a_scales, Tensor at, Tensor at_scales)",
    "requantize(Tensor codes, Tensor scales, Tensor signs, Tensor seed, bool stochastic, str turn, str format)"
        " -> (Tensor at, Tensor at_scales)",
    "dequantize(Tensor codes, Tensor scales, ScalarType dtype) -> Tensor",
    "gemm(Tensor a, Tensor a_scales, Tensor b, Tensor b_scales, float alpha, ScalarType dtype) -> Tensor",
    "unrotate(Tensor d, Tensor mask, ScalarType dtype) -> Tensor",
):
    lib.define(schema)
    name = schema.split("(")[0]
    lib.impl(name, getattr(reference, name), "CompositeExplicitAutograd")
# opaque, so that torch.compile cannot draw anew in each consumer; dy keeps the call in the backward pass, and x, which
# differs from layer to layer, keeps the calls of two layers with one dy from being merged into one (both were seen)
lib.define("draw(Tensor dy, Tensor x, int n) -> (Tensor signs, Tensor seeds)", tags=torch.Tag.nondeterministic_seeded)
lib.impl("draw", reference.draw, "CompositeExplicitAutograd")
# two pairs that a kernel can do in one: x quantised, and its product with packed b; a gradient's product, masked and rotated back
lib.define("quantize_gemm(Tensor x, str scale, Tensor b, Tensor b_scales) -> (Tensor y, Tensor codes, Tensor scales, Tensor mask)")
def quantize_gemm(x, scale, b, b_scales):
    codes, scales, mask = torch.ops.fp4.quantize_forward(x, scale)
    return torch.ops.fp4.gemm(codes, scales, b, b_scales, 1.0, x.dtype), codes, scales, mask
lib.impl("quantize_gemm", quantize_gemm, "CompositeExplicitAutograd")
lib.define("gemm_unrotate(Tensor a, Tensor a_scales, Tensor b, Tensor b_scales, Tensor mask, float alpha, ScalarType dtype) -> Tensor")
lib.impl("gemm_unrotate", lambda a, a_scales, b, b_scales, mask, alpha, dtype: torch.ops.fp4.unrotate(
    torch.ops.fp4.gemm(a, a_scales, b, b_scales, alpha, torch.float32), mask, dtype), "CompositeExplicitAutograd")
# only on a GPU: packed [M, K] -> FP8 E4M3 [M, K] and a float32 scale a row [M, 1] that holds alpha, for product.py
lib.define("fold(Tensor codes, Tensor scales, float alpha) -> (Tensor fp8, Tensor row_scales)")


# ---- shapes only, for torch.compile

def packed(like, M, K):
    return like.new_empty(M, K // 2, dtype=torch.uint8), like.new_empty(M, K // 32, dtype=torch.uint8)

def quantised(x): return *packed(x, *x.shape), x.new_empty(x.shape[0], x.shape[1] // 32, dtype=torch.int32)

def padded(M): return (M + 31) // 32 * 32

def operand(like, M, K, format, right=False):
    m, k = (M + 127) // 128, (K + 127) // 128
    if format == "packed": return packed(like, M, K)
    if format == "mxf4": return packed(like, M, K)[0], like.new_empty(m * k * 512, dtype=torch.uint8)
    return like.new_empty(m, k, 128 * 128, dtype=torch.uint8), like.new_empty(m, k, 4 if right else 128, dtype=torch.float32)

for name, shapes in dict(
    quantize_forward=lambda x, scale: quantised(x),
    quantize_backward=lambda x, signs, seeds, stochastic, turn, turn_t, format:
        (*operand(x, *x.shape, format), *operand(x, x.shape[1], padded(x.shape[0]), format)),
    requantize=lambda codes, scales, signs, seed, stochastic, turn, format:
        operand(codes, 2 * codes.shape[1], padded(codes.shape[0]), format, right=True),
    dequantize=lambda codes, scales, dtype: codes.new_empty(codes.shape[0], 2 * codes.shape[1], dtype=dtype),
    gemm=lambda a, a_scales, b, b_scales, alpha, dtype: a.new_empty(a.shape[0], b.shape[0], dtype=dtype),
    quantize_gemm=lambda x, scale, b, b_scales: (x.new_empty(x.shape[0], b.shape[0]), *quantised(x)),
    gemm_unrotate=lambda a, a_scales, b, b_scales, mask, alpha, dtype: a.new_empty(mask.shape[0], 32 * mask.shape[1], dtype=dtype),
    unrotate=lambda d, mask, dtype: d.new_empty(d.shape, dtype=dtype),
    draw=lambda dy, x, n: (dy.new_empty(1, dtype=torch.int64), dy.new_empty(n, dtype=torch.int64)),
).items():
    torch.library.register_fake("fp4::" + name, shapes, lib=lib)


from .build import build
from .linear import Linear, quantize_weights_after
from .recipes import AXES, RECIPES, Recipe, recipe
