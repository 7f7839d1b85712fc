"""
What one step does to the quantised weights of a model: a measure of oscillation.

The optimizer moves float32 weights w by little, and the forward product reads Q(w), the values of a
grid. A weight near the middle between two points of the grid may cross it again and again: w hardly
moves, and Q(w) jumps to and fro. TetraJet-v2 (arXiv 2510.27527) takes this for a part of what 4
bits cost; post_step.py has its remedy and another one. So for each kind of layer three shares of
all its weights are measured:

    flips       those whose Q(w) is another after the step than before it, by more than JUMP of the
                larger. It is values that are compared, not codes: a block whose scale changes flips
                only where a value does. Two points of a grid lie farther apart than JUMP, of MXFP4
                by a quarter. But in NVFP4 and INT4 a scale that follows the largest weight changes
                in nearly every step by little, and all its values with it, which is no flip
    zeros       those with Q(w) = 0 after the step
    clipped     those that lie outside the grid after the step, as the mask of the forward product
                says; 0 for a scale that never clips

A NaN is another number each time.

Q(w) and its mask are in the basis in which the forward product reads w, the rotated one. Measured
are the layers whose grid stays from step to step: a forward product that is quantised and draws
neither signs nor noise. Each measurement quantises these weights twice, and keeps a float32 copy
of what came out between the two.
"""
import torch

from . import reference
from .post_step import quantize_with_mask

MEASURES = ("flips", "zeros", "clipped")
JUMP = 1 / 32


class WeightStats:
    """
    Measures a step of a model: before_step() before the optimizer's, after_step() behind all that
    changes weights.

    layers      {name: Linear}, as named_modules() calls them, with whole weights; layers of one
                kind, such as blocks.0.attention.qkv and blocks.1.attention.qkv, are taken together
    """

    def __init__(self, layers):
        self.kinds = {}                 # {kind: its layers}
        for name, layer in layers.items():
            spec = layer.recipe.forward
            if spec is not None and spec.right.is_fixed:
                self.kinds.setdefault(kind_of(name), []).append(layer)
        self.columns = [f"{measure}:{kind}" for measure in MEASURES for kind in self.kinds]
        self.before = None

    @torch.no_grad()
    def before_step(self):
        """Keeps what the forward products read of the weights."""
        self.before = {kind: [quantized(layer)[0] for layer in layers]
                       for kind, layers in self.kinds.items()}

    @torch.no_grad()
    def after_step(self):
        """Returns {column: share} since before_step(); None if that was not called, or if the model
        has nothing to measure."""
        if not self.before:
            return None
        shares = {}
        for kind, layers in self.kinds.items():
            before = self.before[kind]
            n_weights = sum(q.numel() for q in before)
            counts = sum(map(count, before, layers)).tolist()
            shares |= {f"{measure}:{kind}": n / n_weights for measure, n in zip(MEASURES, counts)}
        self.before = None
        return {column: shares[column] for column in self.columns}


def kind_of(name):
    """Returns the name of a layer behind its last number: blocks.3.mlp.down is one of mlp.down."""
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    first = numbers[-1] + 1 if numbers else 0
    return ".".join(parts[first:]) or name


def quantized(layer):
    """Returns what the forward product reads of a weight [N, K] and the mask of what it does not
    clip, both without columns of padding alone: float32 and bool, [N, K]; more columns where a
    rotation mixes padding with values."""
    w = layer.weight
    q, mask = quantize_with_mask(w, layer.recipe)
    if mask.numel():
        is_kept = reference.unbits(mask).flatten(-2).bool()
    else:
        is_kept = torch.ones_like(q, dtype=torch.bool)
    rotation = layer.recipe.forward.rotation or 1
    n_columns = w.shape[1] + -w.shape[1] % rotation
    return q[:, :n_columns], is_kept[:, :n_columns]


def count(q_before, layer):
    """Returns how many values of a layer flipped, are zero and are clipped, int64 [3]."""
    q, is_kept = quantized(layer)
    larger = torch.maximum(q.abs(), q_before.abs())
    stays = (q - q_before).abs() <= JUMP * larger
    return torch.stack([(~stays).sum(), (q == 0).sum(), (~is_kept).sum()])
