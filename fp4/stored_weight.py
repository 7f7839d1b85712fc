"""
The stored copy of a layer's quantised weight, and how a layer knows that it is fresh.

A weight changes once in an optimizer step, and every microbatch and evaluation until the next one
reads it. So it is quantised once (Linear.quantize_weight), and the copy stays in the same memory,
where compiled code and CUDA graphs expect it. But not only the optimizer changes weights:
load_state_dict, copy_, the swap with an average, .to and others do. So the copy has a note of its
source: the memory of the weight, and torch's count of the changes made to it in place (_version).
The copy is fresh as long as both are the same. (Torch forgets to count the step of a fused
optimizer, so count_step does.) Who looks?

    eager       Linear.forward, before each product. It quantises the weight anew, for this
                product alone, if the copy is not fresh
    compiled    a graph cannot look, but an op in it can, whose implementation is in Python. It
                renews the copy if it is not fresh: quantize_gemm, below
    CUDA graph  nobody: a replay runs kernels only. Call quantize_weights after a change. That is
                also what torch.compile(mode="reduce-overhead") does

Nothing can see that weight.data is changed in place, which torch does not count, nor a call of
torch._foreach_* on the weights of a sharded model. There, too, one has to call quantize_weights.
check_weights of whole_model.py finds what was forgotten.
"""
import weakref
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from . import ops
from .check import check
from .ops import Packed


class QuantizedWeight(NamedTuple):
    packed: Packed
    mask: Tensor
    is_stored: bool                 # rather than made for one product


# ---- what a copy was made from

def source_of(weight):
    """Returns a token of the weight: two are equal if the weight was not changed between them.

    It is the weight's memory and torch's count of its changes. The reference to the memory is
    weak, so that it keeps none alive. An address alone would not do, because new memory can get
    the address of old.
    """
    if weight.is_inference():
        return object()             # Torch does not count its changes, so this equals nothing.
    return weakref.ref(weight.untyped_storage()), weight.data_ptr(), weight._version


def is_fresh(stored, weight):
    # The note is on the codes, because an op of a compiled graph is given tensors only.
    return getattr(stored.packed.codes, "source", None) == source_of(weight)


def count_step(optimizer, args, kwargs):
    """Counts the step of an optimizer as a change of its parameters, where torch does not: with
    fused=True, and with foreach=True in a sharded model, whose parameters are DTensors."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if group.get("fused") or is_sharded(parameter):
                torch.autograd.graph.increment_version(parameter)


register_optimizer_step_post_hook(count_step)


# ---- making a copy, and choosing one for a product

def quantize(weight, scale, is_stored=False):
    # What inference mode makes could not be saved for a backward pass later.
    with torch.inference_mode(False):
        packed, mask = ops.quantize_forward(weight.detach(), scale)
    return QuantizedWeight(packed, mask, is_stored)


def store(stored, weight, scale):
    """Returns the copy of the weight: `stored` with new contents, or a new one if that cannot be.

    stored      the QuantizedWeight that was returned before, or None
    """
    new = quantize(weight, scale, is_stored=True)
    if is_at_hand(stored, weight):
        for old_part, new_part in zip(parts(stored), parts(new)):
            old_part.copy_(new_part)
        new = stored
    new.packed.codes.source = source_of(weight)
    return new


def parts(quantized): return *quantized.packed, quantized.mask


def is_at_hand(stored, weight):
    """Says whether there is a copy, and on the weight's device."""
    return stored is not None and stored.packed.codes.device == weight.device


def operand(stored, weight, scale):
    """Returns the QuantizedWeight for a product: the stored copy, or a new one if that is stale."""
    if is_at_hand(stored, weight) and (torch.compiler.is_compiling() or is_fresh(stored, weight)):
        return stored
    return quantize(weight, scale)


# ---- a weight that was gathered from several processes

class GatheredWeight(torch.autograd.Function):
    """Stands for weight.to(dtype) where that was done before the weight was gathered (sharded.py).

    weight      [N, K]  float32; it only receives the gradient
    gathered    [N, K]  the weight in the dtype of the activations
    """

    @staticmethod
    def forward(ctx, weight, gathered):
        return gathered.view_as(gathered)

    @staticmethod
    def backward(ctx, dw):
        return dw.float(), None


def is_sharded(weight):
    """Says whether a weight is a strip, a DTensor, as fully_shard makes it (sharded.py)."""
    return hasattr(weight, "to_local")


def local(tensor):
    """Returns what this process has of a tensor: its strip of one that is sharded."""
    return getattr(tensor, "_local_tensor", tensor)


def check_gathered(layer):
    """Refuses a layer of a sharded model that is called by itself: the memory of what was gathered
    is freed then, and a kernel would read it all the same."""
    check(layer.gathered is None or not is_sharded(layer.weight),
          "this layer is a part of a sharded model: call the whole model")


def cast(layer, dtype):
    """Returns the weight of a layer in the dtype of the activations."""
    if layer.gathered is None:
        return layer.weight.to(dtype)
    return GatheredWeight.apply(layer.weight, layer.gathered)


# ---- the op of a compiled graph

def renew_then_gemm(x, scale, weight, w_codes, w_scales, w_mask):
    stored = QuantizedWeight(Packed(w_codes, w_scales), w_mask, True)
    if not is_fresh(stored, weight):
        store(stored, weight, ops.word_of(scale, ops.SCALES))
    return torch.ops.fp4.quantize_gemm(x, scale, w_codes, w_scales)


# The schema does not say that the copy is written to. If it did, torch.compile would count each
# call as a change of the copy, and a backward pass after two forward passes would be refused,
# because what the first one saved has changed. It has not, unless the weight has; then store()
# counts. Nothing else in a forward pass reads the copy, so nothing can be ordered before the
# renewal that has to come after it.
@ops.op("quantize_gemm_stored(Tensor x, int scale, Tensor weight, Tensor w_codes, Tensor w_scales,"
        " Tensor w_mask) -> (Tensor y, Tensor codes, Tensor scales, Tensor mask)",
        renew_then_gemm)
def quantize_gemm_stored_shapes(x, scale, weight, w_codes, w_scales, w_mask):
    return ops.quantize_gemm_shapes(x, scale, w_codes, w_scales)


def quantize_gemm(x, scale, weight, stored):
    """Does what ops.quantize_gemm does with the stored copy of a weight, which it renews first."""
    y, codes, scales, mask = torch.ops.fp4.quantize_gemm_stored(
        x, ops.number_of(scale, ops.SCALES), weight, *parts(stored))
    return y, Packed(codes, scales), mask
