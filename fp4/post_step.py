"""
What acts on the weights between two optimizer steps: the column post_step of recipes.py.

The optimizer moves float32 weights w, and the forward product reads Q(w), the values of a grid. A
weight that ends up near the middle between two grid points can cross it in every step: w hardly
moves, and Q(w) jumps to and fro. Two published remedies, each a few lines below:

    cage:STRENGTH:START             From the share START of the run on, each step also pulls w
                                    towards Q(w), by a force that grows from 0 to STRENGTH at the
                                    end: w <- w - lr * force * (w - Q(w)). This is CAGE (arXiv
                                    2510.18784, github.com/IST-DASLab/CAGE); its authors train
                                    with 10 and 0.8
    deosc:START:PERIOD:RATIO        After step START, in windows of PERIOD steps, it adds up how far
                                    w has gone and how far Q(w) has. At the end of a window, w <-
                                    Q(w) where Q(w) has gone RATIO times as far or farther, and the
                                    next window begins. This is OsciReset of TetraJet-v2 (arXiv
                                    2510.27527) as github.com/AMD-AGI/ALTO simplifies it, whose
                                    report on MXFP4 takes 2000, 200 and 4; TetraJet-v2's windows are
                                    50 steps of each 200. A block whose scale changes moves all of
                                    its Q(w), and that counts as well, as it does there

START of deosc is a number of steps, as its authors give it, so that a run which is resumed with
more steps keeps its windows.

Where the forward product rotates, its grid is in the rotated basis, that of v = w R. CAGE goes back
to the basis of w: its Q(w) is the quantised v, times R.T. Whether a value jumps between two points
can be seen only where the grid is, so deosc adds up and decides in the rotated basis, and takes
back what it changes. Both leave the optimizer's moments as they are.

Everything here follows from weights that all processes have alike, so all of them do the same. It
runs outside of compiled code and CUDA graphs, and changes weights in place. Torch counts that, so
that a layer notices that its stored quantised weight is stale (stored_weight.py).
"""
import torch

from . import ops, stored_weight
from .emulate import columns
from .recipes import parse_post_step

# What a layer remembers for deosc from one step to the next: its weight, [N, K], and two sums since
# the window began, [N, K padded] in the basis of the grid. These are buffers of the layer, so that
# a checkpoint of the model has them, and a resumed run goes on in the middle of a window.
STATE = ("deosc_last", "deosc_distance", "deosc_quantized_distance")


def add_state(layer):
    """Gives a layer what its post_step has to remember, and takes away what that of an earlier
    recipe had; a layer whose recipe needs nothing gets nothing."""
    for buffer in STATE:
        layer._buffers.pop(buffer, None)
    name, *_ = parse_post_step(layer.recipe.post_step)
    if name == "deosc":
        w = layer.weight.detach()
        v = rotate(w, layer.recipe)
        for buffer, like in zip(STATE, (w, v, v)):
            layer.register_buffer(buffer, torch.zeros_like(like, dtype=torch.float32))


def without_state(weights):
    """Returns a model's state without what add_state has added: for a model of another recipe."""
    return {name: value for name, value in weights.items() if not name.endswith(STATE)}


class PostStep:
    """Does to the weights of some layers what the post_step of their recipes says.

    A training loop calls it after every optimizer.step(), before quantize_weights. It costs nothing
    where that is "none".
    """

    def __init__(self, layers):
        self.layers = [layer for layer in layers if layer.recipe.post_step != "none"]
        self.methods = [parse_post_step(layer.recipe.post_step) for layer in self.layers]

    @torch.no_grad()
    def __call__(self, lr, done, steps):
        """lr is the learning rate of the step, done the number of steps done, of steps in all."""
        for layer, (name, *numbers) in zip(self.layers, self.methods):
            METHODS[name](layer, lr, done, steps, *numbers)


# ---- the grid of a weight

def rotate(w, recipe):
    """Returns w [N, K] in the basis of its grid, float32 [N, K padded]."""
    spec = recipe.forward.right
    return columns.rotate_for(columns.pad_to_blocks(w, spec), spec, None)


def rotate_back(v, w, recipe):
    """Returns v, in the basis of the grid of w, in the basis of w."""
    if recipe.has_kernels:
        return ops.unrotate(v, ops.nothing_clipped(*v.shape, v.device), torch.float32)
    return columns.rotate_for(v, recipe.forward.right, None, undo=True)[:, :w.shape[1]]


def quantize(w, recipe):
    """Returns what the forward product reads of w, as float32, in the basis of the grid."""
    q, _ = quantize_with_mask(w, recipe)
    return q


def quantize_with_mask(w, recipe):
    """As quantize(), and also returns the mask of what is not clipped, int32 [N, K padded / 32],
    one bit a value; [0] where nothing is."""
    if recipe.has_kernels:
        packed, mask = ops.quantize_forward(w, recipe.forward_scale)
        return ops.dequantize(packed, torch.float32), mask
    values, _, factor, mask = columns.quantize_operand(
        w, recipe.forward.right, transposed=False, factor=None, scales=None, signs=None, seed=None,
        square=recipe.forward.rhs == "square_blocks", operand_format="packed", dtype=torch.float32)
    return values * factor, mask


def on_grid(w, recipe):
    """Returns Q(w) in the basis of w: the weight that the forward product multiplies."""
    return rotate_back(quantize(w, recipe), w, recipe)


# ---- the methods

def cage(layer, lr, done, steps, strength, start):
    force = strength * max(0, (done / steps - start) / (1 - start))
    if force > 0:
        w = stored_weight.local(layer.weight)
        w.sub_(w - on_grid(w, layer.recipe), alpha=lr * force)


def deosc(layer, lr, done, steps, start, period, ratio):
    if done < start:
        return
    w = layer.weight
    recipe = layer.recipe
    last = layer.deosc_last             # w after the step before
    if done > start:
        v = rotate(w, recipe)
        q = quantize(w, recipe)
        layer.deosc_distance += (v - rotate(last, recipe)).abs()
        layer.deosc_quantized_distance += (q - quantize(last, recipe)).abs()
        if (done - start) % period == 0:
            snap = oscillates(layer.deosc_distance, layer.deosc_quantized_distance, ratio)
            # Blocks without such a value stay as they are, to the last bit.
            w += rotate_back(torch.where(snap, q - v, 0), w, recipe)
            layer.deosc_distance.zero_()
            layer.deosc_quantized_distance.zero_()
    last.copy_(w)


def oscillates(distance, quantized_distance, ratio):
    """Says which values have jumped RATIO times as far as they have moved; those at rest do not."""
    return (distance > 0) & (quantized_distance >= ratio * distance)


METHODS = {"cage": cage, "deosc": deosc}
