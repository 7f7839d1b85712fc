"""
What torchrun starts for test_sharded.py, in each of its processes: the checks of a sharded model.

    torchrun --nproc_per_node=2 tests/sharded_worker.py REPORT CHECK:RECIPE:DTYPE ...

A check is a function of this file that yields a sentence on each thing that is wrong. It compares
the sharded model with a whole one, which each process has beside it. It must not stop where
something is wrong, because the other processes would wait for what it sends next. REPORT becomes a
JSON file: for each check, what is wrong in any process. An exception is one of these things, too.
"""
import datetime
import json
import os
import sys
import traceback
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import fp4
from fp4 import ops
from fp4.emulate import fp8
from model import Llama, ModelConfig

N_EMBD, N_HEAD, VOCAB, T = 96, 3, 160, 32
LEARNING_RATE = 1e-2
EPS = 1e-3              # of AdamW: a first step is then not merely the sign of the gradient
HALF_ULP = 2 ** -24     # the relative error of a rounding to float32
FP4 = ("fp4", "fp4-sr", "fp4-fwd")
HAS_GPUS = torch.cuda.device_count() >= int(os.environ["WORLD_SIZE"])
DEVICE = "cuda" if HAS_GPUS else "cpu"      # with fewer GPUs than processes


class Case:
    """A whole model and a sharded one with the same weights, and data for each process."""

    def __init__(self, recipe, dtype):
        self.name = recipe
        self.recipe = fp4.recipe(recipe)
        self.dtype = getattr(torch, dtype)
        self.whole = self.new_model()
        self.sharded = self.new_model()
        fp4.shard(self.sharded, self.sharded.blocks, DEVICE, self.dtype)

    def new_model(self):
        torch.manual_seed(0)
        config = ModelConfig(2, N_EMBD, N_HEAD, VOCAB, T)
        return Llama(config, self.recipe, self.dtype).to(DEVICE)

    def pairs(self):
        """Yields the name of each Linear, that of the whole model, and that of the sharded one."""
        sharded = dict(self.sharded.named_modules())
        for name, layer in self.whole.named_modules():
            if isinstance(layer, fp4.Linear):
                yield name, layer, sharded[name]

    def has_strips(self, layer):
        """Whether its weight can travel in another form than float32."""
        n = dist.get_world_size()
        is_emulated = isinstance(layer, fp4.Linear) and self.name == "nvfp4"
        return n > 1 and layer.weight.shape[0] % n == 0 and not is_emulated

    def keeps_gathered(self):
        """Whether a block keeps what was gathered from its forward to its backward pass."""
        return self.name in (*FP4, "fp8") and all(self.has_strips(layer)
                                                  for _, layer, _ in self.pairs())

    def copy_to_whole(self):
        """Gives the whole model the weights of the sharded one."""
        with torch.no_grad():
            for own, other in zip(self.whole.parameters(), self.sharded.parameters()):
                own.copy_(other.full_tensor())


def data_of(rank):
    generator = torch.Generator().manual_seed(100 + rank)
    idx = torch.randint(0, VOCAB, (2, T + 1), generator=generator).to(DEVICE)
    return idx[:, :-1], idx[:, 1:]


def passes(model, rank, times=1):
    """Runs forward passes with the data and the seed of a rank, and then their backward passes.

    Returns the first loss. The gradients add up, as they do in any model.
    """
    torch.manual_seed(7 + rank)
    losses = [model(*data_of(rank)) for _ in range(times)]
    for loss in losses:
        loss.backward()
    return losses[0].detach()


def gradients(model):
    """Returns the gradients of all parameters, whole, and forgets them."""
    grads = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
             for p in model.parameters()]
    model.zero_grad()
    return grads


def names(case): return [name for name, _ in case.whole.named_parameters()]


# ---- what was gathered

def gathered(case):
    """What products read is, byte for byte, what the whole weight gives."""
    wrong = []
    seen = []

    def look(name, whole, layer):
        seen.append(name)
        wrong.extend(f"{name}: {what}" for what in wrong_in_layer(case, whole, layer))

    for name, whole, layer in case.pairs():
        layer.register_forward_pre_hook(
            lambda layer, args, name=name, whole=whole: look(name, whole, layer))
    case.sharded.norm.register_forward_hook(lambda *args: wrong.extend(wrong_in_root(case)))
    fp4.quantize_weights(case.sharded)
    passes(case.sharded, 0)
    with torch.no_grad():                       # Later gatherings reuse the memory of the first.
        for parameter in [*case.sharded.parameters(), *case.whole.parameters()]:
            parameter.mul_(-.75)
    wrong.append("-- and with other weights:")
    passes(case.sharded, 0)
    if len(wrong) > 1:
        yield from wrong
    if seen != 2 * [name for name, _, _ in case.pairs()]:
        yield f"the layers that ran are {seen}"


def wrong_in_layer(case, whole, layer):
    w = whole.weight.detach()
    if isinstance(layer.weight, DTensor):
        yield "the weight was not gathered"
    if not case.has_strips(whole):
        yield from not_same("the weight", layer.weight, w)
        if layer.gathered is not None:
            yield "something else than float32 was gathered"
    elif case.name in FP4:
        packed, mask = ops.quantize_forward(w, case.recipe.forward_scale)
        yield from not_same("the codes", layer.gathered.packed.codes, packed.codes)
        yield from not_same("the scales", layer.gathered.packed.scales, packed.scales)
        yield from not_same("the mask", layer.gathered.mask, mask)
    elif case.name == "fp8":
        expected = fp8.quantize(w, fp8.E4M3)
        yield from not_same("the values", layer.gathered.values.view(torch.uint8),
                            expected.values.view(torch.uint8))
        yield from not_same("the scale", layer.gathered.scale, expected.scale)
    else:
        yield from not_same("the cast weight", layer.gathered, w.to(case.dtype))


def wrong_in_root(case):
    """Embedding and head are rounded to the dtype if they are cut into equal strips, norms not."""
    for part in ("embed", "head", "norm"):
        w = getattr(case.whole, part).weight.detach()
        if part != "norm" and case.has_strips(getattr(case.whole, part)):
            w = w.to(case.dtype).float()
        yield from not_same(part, getattr(case.sharded, part).weight, w)


def not_same(name, got, expected):
    got = got.detach()
    if got.dtype != expected.dtype or got.shape != expected.shape:
        yield f"{name} is {got.dtype} {tuple(got.shape)}"
    elif not torch.equal(got, expected):
        yield f"{name} differs in {int((got != expected).sum())} of {got.numel()} places"


# ---- training

def same_data(case):
    """With the same data and seed everywhere, each process has the gradients of the whole model."""
    yield from not_same("the loss", passes(case.sharded, 0), passes(case.whole, 0))
    yield from wrong_in_gradients(case)


def wrong_in_gradients(case):
    """Compares the gradients of equal passes in all processes with those of the whole model.

    The sum of 2 or 4 equal numbers is exact, and so is their mean. With n = 3, the sum and its
    division round n + 2 times at most.
    """
    n = dist.get_world_size()
    for name, got, expected in zip(names(case), gradients(case.sharded), gradients(case.whole)):
        if n == 3:
            yield from beyond(name, got, expected, (n + 2) * HALF_ULP * expected.abs())
        else:
            yield from not_same(name, got, expected)


def step(case):
    """A step with other data in each process is one with the mean of their gradients.

    The sum of n gradients and its division by n round n + 2 times at most, each time by half a
    unit of the sum of their magnitudes at most. The norm by which both are clipped has a relative
    error below 1e-6. A first step of AdamW is that of c / (|c| + EPS), of the clipped gradient c;
    its derivative is below 1 / EPS, and a relative error of c below 1e-6 changes it by a quarter of
    that at most. Then some roundings of the update and of the weight are left.
    """
    n = dist.get_world_size()
    rank = dist.get_rank()
    loss = passes(case.sharded, rank)
    each = []
    for other in range(n):
        expected = passes(case.whole, other)
        if other == rank:
            yield from not_same("the loss", loss, expected)
        each.append(gradients(case.whole))
    errors = []
    for parameter, *grads in zip(case.whole.parameters(), *each):
        parameter.grad = torch.stack(grads).double().mean(0).float()
        errors.append((n + 2) * HALF_ULP * torch.stack(grads).abs().mean(0))
    for name, whole, own, error in zip(
            names(case), case.whole.parameters(), case.sharded.parameters(), errors):
        yield from beyond(f"the gradient of {name}", own.grad.full_tensor(), whole.grad,
                          error + HALF_ULP * whole.grad.abs())
    take_step(case.whole, fused=True)
    take_step(case.sharded, fused=True)
    for name, whole, own, error in zip(
            names(case), case.whole.parameters(), case.sharded.parameters(), errors):
        bound = (LEARNING_RATE * (1e-6 + 8 * HALF_ULP + error / EPS)
                 + 4 * HALF_ULP * whole.detach().abs())
        yield from beyond(name, own.detach().full_tensor(), whole.detach(), bound)


def take_step(model, **kind):
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
    torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, eps=EPS, **kind).step()
    model.zero_grad()


def beyond(name, got, expected, bound):
    err = (got - expected).abs()
    if not (err <= bound).all():
        excess = torch.where(err <= bound, 0., err / bound).max()
        yield f"{name} is off by {float(excess):.3g} times what may be"


# ---- changes of the weights

def changes(case):
    """Each change is noticed in the next pass, although nobody calls quantize_weights."""
    last = None
    for change in (nothing, fused_step, step_of_a_loop, foreach_step, load, copy_in_place,
                   copy_in_inference_mode, change_of_the_strip, data_in_place):
        with torch.no_grad():
            case.sharded(*data_of(0))           # No backward pass gives these weights up.
        change(case.sharded)
        case.copy_to_whole()
        loss = passes(case.sharded, 0)
        yield from not_same(f"the loss after {change.__name__}", loss, passes(case.whole, 0))
        yield from (f"after {change.__name__}, {what}" for what in wrong_in_gradients(case))
        if last is not None and loss == last:
            yield f"{change.__name__} changes nothing, so that it shows nothing"
        last = loss


def nothing(model):
    fp4.quantize_weights(model)


def fused_step(model):
    passes(model, 0)
    take_step(model, fused=True)


def step_of_a_loop(model):
    passes(model, 0)
    take_step(model, foreach=False)


def foreach_step(model):
    passes(model, 0)
    take_step(model, foreach=True)


def load(model):
    torch.manual_seed(3)
    state = {name: distribute_tensor(.02 * torch.randn(p.shape, device=DEVICE), p.device_mesh,
                                     p.placements)
             for name, p in model.state_dict().items()}
    model.load_state_dict(state)


def copy_in_place(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter * .5)


def copy_in_inference_mode(model):
    with torch.inference_mode():
        for parameter in model.parameters():
            parameter.copy_(parameter * 3)


def change_of_the_strip(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.to_local().mul_(-.75)


def data_in_place(model):
    """The change that nothing can see: quantize_weights has to be called."""
    for parameter in model.parameters():
        parameter.to_local().data.mul_(-1.5)
    fp4.quantize_weights(model)


def pull(case):
    """CAGE pulls the rows of each process as it pulls those of the whole weight, to the last bit,
    and the next pass reads what they have become."""
    with torch.no_grad():
        case.sharded(*data_of(0))
    before = [whole.weight.detach().clone() for _, whole, _ in case.pairs()]
    for _, whole, layer in case.pairs():
        for each in (whole, layer):
            each.recipe = each.recipe._replace(post_step="cage:10:0")
    for model in (case.whole, case.sharded):
        fp4.post_step_of(model)(LEARNING_RATE, 1, 1)
    if any(torch.equal(old, whole.weight) for old, (_, whole, _) in zip(before, case.pairs())):
        yield "a weight was not pulled"
    for name, whole, layer in case.pairs():
        weight = layer.weight.detach().full_tensor()
        yield from not_same(f"the weight of {name}", weight, whole.weight.detach())
    yield from not_same("the loss", passes(case.sharded, 0), passes(case.whole, 0))


def renewals(case):
    """Weights are quantised once a step, and not in the passes that follow."""
    count = Counter()
    quantize_forward = ops.quantize_forward
    quantize_fp8 = fp8.quantize

    def counting_forward(*args):
        count["fp4"] += 1
        return quantize_forward(*args)

    def counting_fp8(x, dtype, largest=None):
        count["fp8"] += largest is not None
        return quantize_fp8(x, dtype, largest)

    ops.quantize_forward = counting_forward
    fp8.quantize = counting_fp8
    try:
        for round_ in ("first", "second"):
            fp4.quantize_weights(case.sharded)
            expected = sum(case.has_strips(layer) for _, layer, _ in case.pairs())
            if count.total() != expected:
                yield f"{round_}: quantize_weights quantised {count} of {expected} weights"
            passes(case.sharded, 0, times=2)
            if count.total() != expected:
                yield f"{round_}: two passes made that {count}"
            take_step(case.sharded, fused=True)
            count.clear()
    finally:
        ops.quantize_forward = quantize_forward
        fp8.quantize = quantize_fp8


def mistakes(case):
    """What cannot be right is said: a forgotten quantize_weights, and a layer called by itself."""
    layer = case.sharded.blocks[1].mlp.proj
    fp4.quantize_weights(case.sharded)
    passes(case.sharded, 0)
    fp4.check_weights(case.sharded)
    if dist.get_rank() == 0:
        layer.weight.to_local().data.mul_(-1.5)     # In one process; all have to hear of it.
    yield from not_raised("blocks.1.mlp.proj: the stored", fp4.check_weights, case.sharded)
    fp4.quantize_weights(case.sharded)
    fp4.check_weights(case.sharded)
    x = torch.zeros(32, layer.in_features, dtype=case.dtype, device=DEVICE)
    yield from not_raised("a part of a sharded model", layer, x)


def not_raised(words, f, argument):
    try:
        f(argument)
    except ValueError as error:
        if words not in str(error):
            yield f"{error}, where {words} is expected"
    else:
        yield f"{words}: nothing is said"


# ---- numbers that are not finite

def poison(case):
    """A NaN or Inf in the rows of the last process arrives as it would from a whole weight."""
    block = case.sharded.blocks[0]
    layer = block.attention.qkv
    with torch.no_grad():
        for value in (torch.nan, torch.inf, -torch.inf):
            own = layer.weight.to_local()
            kept = own.clone()
            if dist.get_rank() == dist.get_world_size() - 1:
                own[-1, 40] = value
            else:
                own.add_(0)         # All processes have to see a change, or none.
            case.copy_to_whole()
            loss = case.sharded(*data_of(0))
            expected = case.whole(*data_of(0))
            if not loss.isnan() or not expected.isnan():
                yield f"{value}: the loss is {loss}, and that of the whole model {expected}"
            block.unshard()
            wrong = wrong_in_packed if case.name in FP4 else wrong_in_fp8
            yield from (f"{value}: {what}" for what in wrong(case, layer))
            block.reshard()
            own.copy_(kept)


def wrong_in_packed(case, layer):
    yield from wrong_in_layer(case, case.whole.blocks[0].attention.qkv, layer)
    is_nan = layer.gathered.packed.scales == 255
    if is_nan.nonzero().tolist() != [[len(is_nan) - 1, 40 // 32]]:
        yield f"the blocks of NaN are {is_nan.nonzero().tolist()}"


def wrong_in_fp8(case, layer):
    values, scale = layer.gathered
    is_nan = (values.float() * scale).isnan()
    if not is_nan.all():
        yield f"{int((~is_nan).sum())} values are not NaN"


# ---- what travels, and what stays

def traffic(case):
    """What a process sends in a step of two microbatches has the size that the table of sharded.py
    says, and is sent no oftener than necessary."""
    sent = []
    # FSDP2 of older torch calls the function by its older name.
    name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    all_gather = getattr(dist, name)

    def counting(output, own, **kwargs):
        sent.append((own.numel() * own.element_size(), output.numel() * output.element_size()))
        return all_gather(output, own, **kwargs)

    setattr(dist, name, counting)
    try:
        fp4.quantize_weights(case.sharded)
        for is_last in (False, True):
            fp4.mark_last(case.sharded, is_last)
            passes(case.sharded, 0)
    finally:
        setattr(dist, name, all_gather)
    n = dist.get_world_size()
    block = sum(bytes_of(case, layer) for layer in case.whole.blocks[0].modules()
                if hasattr(layer, "weight"))
    root = sum(bytes_of(case, getattr(case.whole, part)) for part in ("embed", "norm", "head"))
    # The root and both blocks in the forward pass, and both blocks in the backward pass; or each
    # block once in all.
    sizes = 2 * [root, block, block, block, block]
    if case.keeps_gathered():
        sizes = [root, block, block, root]
    expected = [(size, n * size) for size in sizes] if n > 1 else []
    if sent != expected:
        yield f"{sent} bytes travelled, and not {expected}"


def bytes_of(case, layer):
    """How many bytes of a layer's weight one of the processes sends."""
    rows = -(-layer.weight.shape[0] // dist.get_world_size())
    bits = 32
    if layer.weight.dim() == 2 and case.has_strips(layer):
        bits = torch.finfo(case.dtype).bits
        if isinstance(layer, fp4.Linear):
            bits = {"fp8": 8, "bf16": bits}.get(case.name, 4.25 + 1)
    return int(rows * layer.weight[0].numel() * bits) // 8


def freed(case):
    """A block gives up its whole weights after each pass, and shares one placeholder with others.

    The root, and blocks of quantised weights, keep them until their backward pass, or give them up
    after an evaluation.
    """
    placeholders = set()
    wrong = []
    blocks = list(case.sharded.blocks)
    sizes = [layer.weight.numel() for _, layer, _ in case.pairs() if case.has_strips(layer)]

    def look(layer, args):
        if layer.gathered is not None:
            memory = layer.weight.untyped_storage()
            placeholders.add((memory.data_ptr(), memory.nbytes()))
            if layer.weight.shape != (layer.out_features, layer.in_features):
                wrong.append(f"a weight has the shape {tuple(layer.weight.shape)}")

    for _, _, layer in case.pairs():
        layer.register_forward_pre_hook(look)
    if not case.keeps_gathered():
        blocks[1].register_forward_pre_hook(
            lambda *args: wrong.extend(kept_whole(blocks[0], "when the next one begins")))
        case.sharded.norm.register_forward_pre_hook(
            lambda *args: wrong.extend(kept_whole(blocks[1], "after the forward pass")))
    in_root = {}
    case.sharded.norm.register_forward_hook(
        lambda *args: in_root.update({name: getattr(case.sharded, name).weight.untyped_storage()
                                      for name in ("embed", "head")}))
    for _ in range(2):
        passes(case.sharded, 0)
        wrong.extend(kept_whole(case.sharded, "after the backward pass"))
        wrong.extend(f"{name} keeps its memory" for name, memory in in_root.items()
                     if memory.size())
        with torch.no_grad():
            case.sharded(*data_of(0))
        wrong.extend(kept_whole(case.sharded, "after an evaluation"))
    yield from wrong
    if [size for _, size in placeholders] != ([4 * max(sizes)] if sizes else []):
        yield f"the placeholders, and their bytes, are {placeholders}"


def kept_whole(module, when):
    """Yields what of a module's gathered weights still has memory."""
    for name, part in module.named_modules():
        if hasattr(part, "weight") and not isinstance(part.weight, DTensor):
            yield f"{when}, {name} is whole"
        held = tensors_of(getattr(part, "gathered", None))
        if sum(tensor.untyped_storage().size() for tensor in held):
            yield f"{when}, what was gathered of {name} is kept"


def tensors_of(gathered):
    """The tensors that have travelled; the scale of fp8 has not."""
    if gathered is None:
        return []
    if isinstance(gathered, torch.Tensor):
        return [gathered]
    if isinstance(gathered, fp8.Scaled):
        return [gathered.values]
    return [*gathered.packed, gathered.mask]


# ---- other orders of passes

def orders(case):
    """An evaluation, two forward passes before their backward passes, and gradients that add up.

    Each backward pass adds a mean over the processes, which only 2 and 4 processes find exactly.
    """
    with torch.no_grad():
        yield from not_same("an evaluation", case.sharded(*data_of(0)), case.whole(*data_of(0)))
    yield from not_same("the loss", passes(case.sharded, 0, times=2),
                        passes(case.whole, 0, times=2))
    passes(case.sharded, 0)
    passes(case.whole, 0)
    with torch.no_grad():
        yield from not_same("a late evaluation", case.sharded(*data_of(1)),
                            case.whole(*data_of(1)))
    yield from wrong_in_gradients(case)


def microbatches(case):
    """Gradients of microbatches add up, although weights may be gathered once; and the next step
    has its own weights."""
    for _ in range(2):
        fp4.quantize_weights(case.sharded)
        for is_last in (False, True):
            fp4.mark_last(case.sharded, is_last)
            yield from not_same("the loss", passes(case.sharded, 0), passes(case.whole, 0))
        yield from kept_whole(case.sharded, "after the last microbatch")
        yield from wrong_in_gradients(case)
        copy_in_place(case.sharded)
        case.copy_to_whole()


def blocks_of_layers(case):
    """A block may be nothing but layers, and two of them may share a weight, which both read."""
    for is_shared in (False, True):
        case.whole = new_layers(case.recipe, is_shared)
        case.sharded = new_layers(case.recipe, is_shared)
        fp4.shard(case.sharded, list(case.sharded), DEVICE, case.dtype)
        torch.manual_seed(1)
        x = torch.randn(8, 64).to(DEVICE, case.dtype)
        outputs = []
        for model in (case.whole, case.sharded):
            torch.manual_seed(2)
            outputs.append(model(x))
            outputs[-1].square().sum().backward()
        yield from not_same(f"shared: {is_shared}, the output", outputs[1], outputs[0].detach())
        yield from (f"shared: {is_shared}, {what}" for what in wrong_in_gradients(case))


def new_layers(recipe, is_shared):
    torch.manual_seed(0)
    first, second = [fp4.Linear(64, 64, recipe) for _ in range(2)]
    if is_shared:
        second.weight = first.weight
    return torch.nn.Sequential(torch.nn.Sequential(first, second, torch.nn.GELU())).to(DEVICE)


def compiled(case):
    """Blocks that are compiled one by one compute what eager ones do, up to the order of sums."""
    fp4.quantize_weights(case.sharded)
    for block in case.sharded.blocks:
        block.forward = torch.compile(block.forward, fullgraph=True)
    for change in (nothing, copy_in_place):     # The second is not told to the compiled blocks.
        change(case.sharded)
        case.copy_to_whole()
        loss = passes(case.sharded, 0)
        yield from beyond("the loss", loss, passes(case.whole, 0), 1e-6 * loss)
        for name, got, expected in zip(names(case), gradients(case.sharded),
                                       gradients(case.whole)):
            err = (got - expected).norm() / expected.norm()
            if not err <= 1e-5:
                yield f"{name} after {change.__name__} is off by {float(err):.2g}"


# ---- the program

def wrong_in(check, recipe, dtype):
    """Returns what is wrong in this process."""
    try:
        return list(globals()[check](Case(recipe, dtype)))
    except Exception:
        return [traceback.format_exc()]


def main(report, *checks):
    torch.set_num_threads(1)
    # A process that raises leaves the others waiting: not for long.
    patience = datetime.timedelta(seconds=60)
    if HAS_GPUS:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # Other attention adds its gradients in an order that changes.
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH).__enter__()
    dist.init_process_group("cpu:gloo,cuda:nccl" if HAS_GPUS else "gloo", timeout=patience)
    results = {}
    for check in checks:
        everyones = [None] * dist.get_world_size()
        dist.all_gather_object(everyones, wrong_in(*check.split(":")))
        results[check] = [f"rank {rank}: {what}" for rank, wrong in enumerate(everyones)
                          for what in wrong]
        if dist.get_rank() == 0:
            Path(report).write_text(json.dumps(results))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)         # An orderly end would now and then abort in the threads of gloo.


if __name__ == "__main__":
    main(*sys.argv[1:])
