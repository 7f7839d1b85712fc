"""
Counts the blocks that a product in FP8 does not hold exactly.

Without FP4 units, an MXFP4 block is multiplied as FP8 values whose exponents hold the block's
scale (backend.py). Blocks that share one float32 scale must not lie too far apart for that: a block
is beyond the window, and rounds, if its scale is a factor of 2^15 (E4M3) or 2^29 (E5M2) or more
below the largest of its group. Blocks of zeros do not count, nor do those with a NaN.

                left operand            right operand
    own         E4M3, 1 x 128 values    E5M2, 32 x 128 values   kernels/fp8_tiles.cuh
    fp8         E4M3, a row             E4M3, a row             backend.gemm_on_fp8

Other products have no window, or none that was measured. Counted are the layers whose quantisers
are Quartet's; other recipes may multiply MXFP4 in the same products (emulate/matmul.py), uncounted.
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F

from . import ops
from .backend import Backend
from .linear import quantize_gradient_operands
from .whole_model import layers_with_kernels

NO_EXPONENT = -1000                     # of a block that does not count
UNCHANGED = Backend("leaves the operands of a gradient as MXFP4, to be counted")


class Window(NamedTuple):
    """How far the blocks of an operand may lie apart, and which blocks share a scale."""
    octaves: int                        # so many neighbouring exponents are exact
    rows: int                           # of a group
    blocks: int | None                  # of a group, along a row; None is the whole row


class Count(NamedTuple):
    beyond: int
    blocks: int


WINDOWS = {                             # (left operand, right operand)
    "own": (Window(15, 1, 4), Window(29, 32, 4)),
    "fp8": (Window(15, 1, None), Window(15, 1, None)),
}


def count_beyond(packed, window):
    """Counts the blocks of a Packed matrix, and those of them that are beyond the window."""
    codes, scales = packed
    is_zero = (codes.unflatten(1, (-1, 16)) & 0x77 == 0).all(-1)
    counts = ~is_zero & (scales != 255)
    exponents = torch.where(counts, scales.int(), NO_EXPONENT)
    n_rows, n_blocks = exponents.shape
    width = window.blocks or n_blocks
    padding = (0, -n_blocks % width, 0, -n_rows % window.rows)
    groups = F.pad(exponents, padding, value=NO_EXPONENT)
    groups = groups.unflatten(1, (-1, width)).unflatten(0, (-1, window.rows))
    largest = groups.amax((1, 3), keepdim=True)
    is_beyond = (groups != NO_EXPONENT) & (groups <= largest - window.octaves)
    return Count(int(is_beyond.sum()), scales.numel())


def count_of_layer(x, dy, layer, windows):
    """Yields a Count for each operand of the three products of a layer: x [M, K], dy [M, N]."""
    left, right = windows
    scale = layer.recipe.forward_scale
    xq, _ = ops.quantize_forward(x, scale)
    wq, _ = ops.quantize_forward(layer.weight.detach(), scale)
    yield count_beyond(xq, left)
    yield count_beyond(wq, right)
    if not layer.recipe.quantizes_backward:
        return
    for left_operand, right_operand in quantize_gradient_operands(
            dy, xq, wq, layer.recipe, UNCHANGED):
        yield count_beyond(left_operand, left)
        yield count_beyond(right_operand, right)


def windows_of(layer):
    """Returns the windows of the product that a layer runs, or None if it has none."""
    return WINDOWS.get(layer.backend.window) if layer.weight.is_cuda else None


def count_in_model(model, *inputs, windows_of=windows_of):
    """Runs a model forward and backward once, and counts the blocks of all its quantised products.

    model(*inputs) has to return a loss. Returns {layer's name: Count}, without the layers that have
    no window, and without those of a sharded model (sharded.py), whose weights are not here; the
    model does not run if no layer is left. Gradients, random numbers and all else stay as they
    were.
    """
    names = {layer: name for name, layer in layers_with_kernels(model) if windows_of(layer)}
    if not names:
        return {}
    counts = {}

    def watch(layer, inputs, y):
        x = inputs[0].detach().reshape(-1, layer.in_features).contiguous()
        y.register_hook(lambda dy: count(layer, x, dy))

    def count(layer, x, dy):
        dy = dy.reshape(-1, layer.out_features).contiguous()
        of_operands = count_of_layer(x, dy, layer, windows_of(layer))
        counts[names[layer]] = Count(*map(sum, zip(*of_operands)))

    hooks = [layer.register_forward_hook(watch) for layer in names]
    devices = {layer.weight.device for layer in names if layer.weight.is_cuda}
    try:
        with torch.random.fork_rng(devices), torch.enable_grad():
            torch.autograd.grad(model(*inputs), list(model.parameters()), allow_unused=True)
    finally:
        for hook in hooks:
            hook.remove()
    return counts


def blocks_beyond_window(model, x, y):
    """Counts in the first sequences of a batch, and returns how many blocks of a million are beyond
    the window; None where nothing has one.

    x, y    inputs and targets of the model, [B, T]
    """
    # A few sequences tell it. This pass is not compiled, and takes more memory than others.
    counts = count_in_model(model, x[:8], y[:8])
    if not counts:
        return None
    beyond, blocks = map(sum, zip(*counts.values()))
    return 1e6 * beyond / blocks
