"""
A trained model that only computes outputs holds its weights packed: 4.25 bits a value.

Training keeps a weight in float32 for the optimizer, beside its quantised copy and the mask of what
was clipped, for the gradient. The forward product reads the quantised copy alone. So without
training nothing else is needed, and a layer computes the same from it, to the last byte. Up to 8
rows at a time, as in decoding, are multiplied by a kernel that reads the packed weight once
(kernels/matvec.cu): the same product, summed in another order.
"""
import torch.nn as nn

from . import ops, stored_weight
from .check import check
from .linear import Linear
from .ops import Packed


class PackedLinear(nn.Module):
    """Computes what a Linear that runs on the kernels computes, from its packed weight alone.

    codes       uint8 [N, K/2], and scales uint8 [N, K/32]: QuEST(w H), as in linear.py
    bias        [N], or None
    """

    def __init__(self, layer):
        super().__init__()
        self.scale = layer.recipe.forward_scale
        packed = stored_weight.quantize(layer.weight, self.scale).packed
        self.register_buffer("codes", packed.codes)
        self.register_buffer("scales", packed.scales)
        self.bias = layer.bias

    def forward(self, x):
        """x [..., K] -> [..., N] in x's dtype."""
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        weight = Packed(self.codes, self.scales)
        if len(rows) <= ops.MATVEC_ROWS:
            packed, _ = ops.quantize_forward(rows, self.scale)
            y = ops.matvec(packed, weight, x.dtype)
        else:
            y, _, _ = ops.quantize_gemm(rows, self.scale, weight)
        y = y.view(*x.shape[:-1], len(self.codes))
        return y if self.bias is None else y + self.bias.to(x.dtype)


def pack_weights(model, dtype):
    """Makes a model one that can only compute outputs, in place: with packed weights where the
    kernels quantise them, and with weights in dtype where nothing is quantised.

    dtype       of the activations, to which an unquantised weight would be rounded in each call
    Returns the names of the layers whose weights stay float32, because their rows are emulated:
    these quantise the weight in each call. Raises ValueError for a model that is sharded.
    """
    layers = {name: module for name, module in model.named_modules(remove_duplicate=False)
              if isinstance(module, Linear)}
    check("" not in layers, "a single layer has no model in which it could be replaced")
    is_sharded = any(stored_weight.is_sharded(layer.weight) for layer in layers.values())
    check(not is_sharded, "weights that are spread over processes cannot be packed")
    # A layer that a model has in two places becomes one layer in two places.
    kernel_layers = {layer for layer in layers.values() if layer.has_kernels}
    packed = {layer: PackedLinear(layer) for layer in kernel_layers}
    for name, layer in layers.items():
        if layer in packed:
            parent, _, own_name = name.rpartition(".")
            setattr(model.get_submodule(parent), own_name, packed[layer])
        elif not layer.recipe.is_quantized:
            weight = layer.weight.detach().to(dtype)
            layer.weight = nn.Parameter(weight, requires_grad=False)
    return [name for name, layer in layers.items()
            if layer.recipe.is_quantized and layer not in packed]
