"""
A model that is spread over several processes, and what travels of a weight when it is needed whole.

PyTorch's fully_shard (FSDP2) cuts each weight [N, K] into strips of N/P rows for P processes, which
it calls shards. A process keeps the master weights, the gradient and the optimizer's state of its
own strips only. Before a block runs, forward or backward, the strips of its weights are gathered
(FSDP2: "unshard"); afterwards the memory of the whole weights is freed ("reshard"). The gradient of
a weight is averaged over the processes, and each of them gets the rows of its strip.

Usually a weight travels in BF16, and each process quantises what has arrived. It can be quantised
before, because the blocks of 32 that share a scale lie inside a row: the quantised strips together
are, byte for byte, the quantised whole weight. It is they that travel here:

    recipe                              what travels of a weight                bits a value
    of the kernels (fp4 ...)            packed codes, scales, and the mask      4.25 + 1
    fp8                                 E4M3 values                             8
    unquantised; embedding and head     the dtype of the activations            16 or 32
    others; and exceptions, below       float32                                 32

Quantised weights are so small that a block whose weights are all quantised keeps what was gathered
until the last backward pass of a step. In FP4 a weight thus travels once a step, and in BF16 twice
a microbatch.

The mask, a bit a value, says what was clipped and gets no gradient (linear.py). The one scale of
fp8 comes from the largest value of the whole weight, which all processes find together. Exceptions
are norms and biases; a weight that two layers share; one whose rows cannot be cut into P equal
strips, because FSDP2 pads unequal strips only if they travel as they are; and everything if P is 1.

How it is done: FSDP2 asks a strip for two methods, fsdp_pre_all_gather, which returns what is to be
sent, and fsdp_post_all_gather, which is given what has arrived. They are meant for subclasses of
Tensor. A strip here stays a plain tensor, and the methods are attributes of that one tensor, so
that the optimizer and checkpoints need not know of them. So it has to stay the same tensor: change
weights in place. What has arrived becomes layer.gathered, and the products read it. The weight
itself is then a placeholder. Autograd needs a float32 tensor [N, K] to give the gradient to; it is
a piece of memory that all layers share, and nobody reads.
"""
from collections import Counter

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from . import ops, stored_weight
from .emulate import fp8
from .linear import Linear
from .ops import Packed
from .stored_weight import QuantizedWeight


def shard(model, blocks, device, dtype):
    """Spreads a model over all processes of torch.distributed, in place.

    model   its parameters are whole, and the same in all processes. Those that are not on the
            device yet are moved there block by block. It has to cast the weights of its embedding
            and head to dtype itself, as model.py does, because they arrive rounded to it
    blocks  modules inside it, each of which is gathered as one. What is left is gathered together,
            and stays whole from the forward pass to the end of the backward pass. So do blocks of
            quantised weights, or until the last one of a step, where mark_last announces it
    device  "cpu" or "cuda"
    dtype   of the activations
    """
    for layer in model.modules():
        if isinstance(layer, Linear):
            layer.recipe.check_sharded()
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    classes = {layer: strip_class_of(layer, dtype)
               for layer in layers_to_adapt(model, mesh.size())}
    for block in blocks:
        linears = [layer for layer in block.modules() if isinstance(layer, Linear)]
        block.keeps_gathered = all(
            classes.get(layer) in (PackedStrip, Float8Strip) for layer in linears)
        fully_shard(block, mesh=mesh, reshard_after_forward=not block.keeps_gathered)
    fully_shard(model, mesh=mesh)
    model.register_forward_hook(reshard_after_evaluation)

    sizes = [layer.weight.numel() for layer in classes if isinstance(layer, Linear)]
    placeholder = torch.empty(max(sizes, default=0), device=device)
    for layer, strip_class in classes.items():
        if strip_class is not None:
            # The tensor of the strip refers to this object, and so keeps it alive.
            strip_class(layer, dtype, placeholder)


def layers_to_adapt(model, n_processes):
    """Returns the layers whose weights can travel in another form than float32."""
    if n_processes == 1:
        return []           # FSDP2 then copies the first tensor that is to be sent, and no others.
    layers = [layer for layer in model.modules() if hasattr(layer, "weight")]
    # A strip tells one layer what has arrived, so a weight that two layers share has to be whole.
    owners = Counter(layer.weight for layer in layers)
    return [layer for layer in layers
            if owners[layer.weight] == 1 and layer.weight.shape[0] % n_processes == 0]


def reshard_after_evaluation(model, args, output):
    """Some weights stay whole until a backward pass. After an evaluation none comes, and whole
    weights would not see the next step of the optimizer."""
    if not torch.is_grad_enabled():
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def strip_class_of(layer, dtype):
    """Returns the class that says how the weight of a layer travels, or None: in float32."""
    if isinstance(layer, Linear):
        return STRIPS[layer.recipe.travels_as]
    is_matrix = isinstance(layer, (nn.Embedding, nn.Linear))
    return RoundedStrip if is_matrix and dtype != torch.float32 else None


def renew_strips(strips):
    """Quantises QuantizedStrips anew: quantize_weights does it once a step.

    All processes call it together, because those of fp8 have to find their scales together.
    """
    for strip in strips:
        if isinstance(strip, PackedStrip):
            strip.renew()
    float8 = [strip for strip in strips if isinstance(strip, Float8Strip)]
    if float8:
        for strip, largest in zip(float8, largest_of_whole(float8)):
            strip.renew(largest)


def largest_of_whole(strips):
    """Returns for each strip the largest magnitude of the whole weight: the maximum over all
    processes, which call this together.

    NaN becomes infinity, which no maximum loses. It makes the whole weight NaN, too, because the
    scale becomes infinite, and 0 * inf is NaN.
    """
    largest = torch.stack([strip.rows.abs().amax() for strip in strips])
    largest = torch.where(largest.isnan(), torch.inf, largest)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest


# ---- ways to travel

class Strip:
    """The strip of a layer's weight in this process, and how the weight travels.

    rows        of the weight, float32 [N/P, K]
    to_send     returns the tensors that travel
    received    makes layer.gathered of the whole ones that have arrived
    """

    def __init__(self, layer, dtype, placeholder):
        self.layer = layer
        self.dtype = dtype
        self.placeholder = placeholder
        # The very tensor that FSDP2 looks at. to_local() returns another around the same memory:
        # FSDP2 would not see the methods there, and float32 would travel, without a word.
        self.parameter = layer.weight
        self.rows = self.parameter._local_tensor
        self.rows.fsdp_pre_all_gather = self.before_gathering
        self.rows.fsdp_post_all_gather = self.after_gathering

    def before_gathering(self, mesh, outer_size, outer_stride, module, mp_policy):
        """Returns what is to be sent, and metadata for after_gathering: none.

        FSDP2 calls it, and counts its parameters: there have to be these five.
        """
        return self.to_send(), None

    def after_gathering(self, arrived, metadata, param_dtype, *, out=None):
        """Takes what has arrived; FSDP2 calls it.

        The first time, it returns what stands for the whole weight, and which tensors are to be
        freed besides those that have arrived: none. Later, out is that weight.
        """
        self.layer.gathered = self.received(*arrived)
        if out is None:
            N = self.layer.out_features
            K = self.layer.in_features
            return self.placeholder[:N * K].view(N, K), ()


class CastStrip(Strip):
    """The weight in the dtype of the activations, as an unquantised product reads it."""

    def to_send(self): return (self.rows.to(self.dtype),)

    def received(self, whole): return whole


class QuantizedStrip(Strip):
    """A strip that is quantised once, and travels in that form until its weight changes.

    A weight has to be changed in all processes alike: all of them then notice, and quantise anew.
    """

    def __init__(self, layer, dtype, placeholder):
        super().__init__(layer, dtype, placeholder)
        self.quantized = None           # what is sent
        self.source = None              # and what it was made from
        layer.strip = self

    def to_send(self):
        if self.source != self.current_source():
            self.renew()
        return self.quantized

    def keep(self, *parts):
        self.quantized = parts
        self.source = self.current_source()

    def is_right(self):
        """Says whether what travels is what the weight gives, in all processes; changes nothing."""
        before = dict(self.__dict__)
        self.renew()
        pairs = zip(before["quantized"], self.quantized)
        n_wrong = sum(not torch.equal(old, new) for old, new in pairs)
        self.__dict__.update(before)
        n_wrong = torch.tensor(n_wrong, device=self.rows.device)
        dist.all_reduce(n_wrong)
        return n_wrong.item() == 0

    def current_source(self):
        """Some changes in place count for the parameter alone, a DTensor around the rows."""
        return stored_weight.source_of(self.rows), self.parameter._version


class PackedStrip(QuantizedStrip):
    """Codes, scales and mask, as the kernels' recipes read them."""

    def renew(self):
        packed, mask = ops.quantize_forward(self.rows, self.layer.recipe.forward_scale)
        self.keep(*packed, mask)

    def received(self, codes, scales, mask):
        return QuantizedWeight(Packed(codes, scales), mask, is_stored=False)


class Float8Strip(QuantizedStrip):
    """E4M3 values, as the recipe fp8 reads them; all processes know the scale."""

    def renew(self, largest=None):
        if largest is None:
            largest, = largest_of_whole([self])
        fp8_strip = fp8.quantize(self.rows, fp8.E4M3, largest)
        self.scale = fp8_strip.scale
        self.keep(fp8_strip.values.view(torch.uint8))       # gloo cannot send FP8.

    def received(self, values): return fp8.Scaled(values.view(fp8.E4M3), self.scale)


# By the travels_as of a Recipe.
STRIPS = {
    "packed codes": PackedStrip,
    "FP8 values": Float8Strip,
    "values as activations have them": CastStrip,
    "float32": None,
}


class RoundedStrip(CastStrip):
    """A matrix that is no Linear of ours, embedding or head, which the model itself casts to the
    dtype of the activations. It travels in that dtype, and becomes a float32 tensor again."""

    @torch.no_grad()
    def after_gathering(self, arrived, metadata, param_dtype, *, out=None):
        if out is None:
            whole = arrived[0].float()
            return whole, (whole,)
        # To autograd, what is filled in again has not changed.
        with torch.autograd._unsafe_preserve_version_counter(out):
            out.copy_(arrived[0])
