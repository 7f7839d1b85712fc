"""What is done with all linear layers of a model at once."""
import torch
import torch.nn as nn

from . import stored_weight
from .check import check
from .linear import Linear
from .post_step import PostStep, add_state
from .weight_stats import WeightStats


def layers_with_kernels(model):
    """Yields the name and the layer of each Linear that runs on the kernels, its weight whole."""
    for name, layer in linears(model):
        if layer.has_kernels and not stored_weight.is_sharded(layer.weight):
            yield name, layer


def linears(model):
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            yield name, module


def quantize_weights(model):
    """Quantises the weight of every layer of the model that runs on the kernels, and in a sharded
    model what travels of each weight.

    A training loop calls it before its first step and after every optimizer.step(): once a step,
    not once a microbatch. Other changes of a weight are noticed, but for two that
    stored_weight.py names: call it after these.
    """
    for _, layer in layers_with_kernels(model):
        layer.quantize_weight()
    strips = [layer.strip for _, layer in linears(model) if layer.strip is not None]
    if strips:
        from .sharded import renew_strips       # It imports much that others do not need.
        renew_strips(strips)


def post_step_of(model):
    """Returns what acts on the weights of the model after each step, as its recipe says: a function
    of the learning rate, the number of steps done, and that of the whole run.

    A training loop calls it after every optimizer.step(), before quantize_weights.
    """
    return PostStep(layer for _, layer in linears(model))


def weight_stats_of(model, is_on=True):
    """Returns a WeightStats, which measures what steps do to the quantised weights of the model;
    with is_on=False one that measures nothing."""
    return WeightStats(dict(linears(model)) if is_on else {})


def set_recipe(model, recipe, backend=None):
    """Gives every Linear inside a model another recipe, in place, from the next step on.

    A layer that has it already stays as it is. Weights and biases stay the same objects, so that an
    optimizer keeps what it knows about them. What follows from the recipe is made anew: the stored
    copy of a weight, and what a post_step remembers. Who calls it also has to make anew what was
    made from the model: compiled code, CUDA graphs and post_step_of(model). In a sharded model,
    call quantize_weights before the next pass.

    backend     what build() returns; None: call it, if the recipe has a product of MXFP4
    Raises ValueError, before it changes any, if a layer does not fit the recipe, or if the weights
    of a sharded model would have to travel in another form (sharded.py).
    """
    rows = {layer: recipe.down if layer.is_down else recipe for _, layer in linears(model)}
    rows = {layer: row for layer, row in rows.items() if layer.recipe != row}
    for layer, row in rows.items():
        row.check_features(layer.in_features, layer.out_features)
        check(not stored_weight.is_sharded(layer.weight)
              or row.travels_as == layer.recipe.travels_as,
              f"the weights of this sharded model travel as {layer.recipe.travels_as}, and with "
              f"the new recipe it would be {row.travels_as}")
    for layer, row in rows.items():
        layer.set_recipe(row, backend)


def mark_last(model, is_last):
    """Tells a model of several processes, before each microbatch, whether it is the step's last.

    PyTorch's DistributedDataParallel averages the gradients with the last one only. Blocks of a
    sharded model whose weights are quantised keep what was gathered until then.
    """
    model.require_backward_grad_sync = is_last
    for module in model.modules():
        if getattr(module, "keeps_gathered", False):
            module.set_reshard_after_backward(is_last, recurse=False)


def check_weights(model):
    """Raises ValueError, naming a layer, if a stored copy is not what its weight gives, or if in a
    sharded model what travels is not; there all processes call it together.

    It quantises every weight and compares, so it is for finding a mistake, not for every step.
    """
    for name, layer in layers_with_kernels(model):
        if layer.stored is None:
            continue
        expected = stored_weight.quantize(layer.weight, layer.recipe.forward_scale)
        pairs = zip(stored_weight.parts(layer.stored), stored_weight.parts(expected))
        is_same = all(torch.equal(part.to(other.device), other) for part, other in pairs)
        check_same(is_same, name)
    for name, layer in linears(model):
        if layer.strip is not None and layer.strip.quantized is not None:
            check_same(layer.strip.is_right(), name)


def check_same(is_same, name):
    check(is_same, f"{name or 'the layer'}: the stored quantised weight is not that of the weight; "
                   "call fp4.quantize_weights(model) after changing weights")


def replace_linears(model, recipe, keep=()):
    """Replaces every nn.Linear inside a model by a Linear with the same weight and bias, in place.

    The parameters stay the same objects, so that an optimizer, or another layer, that has them
    still has them. Subclasses of nn.Linear stay, because not all are called: of some, such as the
    one inside nn.MultiheadAttention, only the weight is read.

    keep        names of layers, as model.named_modules() has them, that stay as they are; the name
                of a module keeps all that is inside it
    Returns the names of the layers that were replaced. Raises ValueError, before it replaces any,
    if a layer does not fit the recipe, if keep names nothing, if nothing is left to replace, or if
    the recipe has a down_input, because nobody says which layers that is for.
    """
    check(recipe.down == recipe,
          f"down_input {recipe.down_input} is for layers that a model makes with is_down=True, and "
          "replace_linears makes none")
    names = {name for name, _ in model.named_modules(remove_duplicate=False)}
    for name in keep:
        check(name in names, f"keep: the model has no module {name!r}")
    linears = {name: module for name, module in model.named_modules(remove_duplicate=False)
               if type(module) is nn.Linear and name and not is_kept(name, keep)}
    check(linears, "the model has no nn.Linear inside that could be replaced")
    for name, linear in linears.items():
        check_fits(name, linear, recipe)

    # A layer that a model has in two places becomes one layer in two places.
    replacements = {linear: quantized_like(linear, recipe) for linear in linears.values()}
    for name, linear in linears.items():
        parent, _, own_name = name.rpartition(".")
        setattr(model.get_submodule(parent), own_name, replacements[linear])
    return list(linears)


def is_kept(name, keep):
    return any(name == kept or name.startswith(f"{kept}.") for kept in keep)


def check_fits(name, linear, recipe):
    multiple = recipe.feature_multiple
    sizes = (linear.in_features, linear.out_features)
    check(all(size % multiple == 0 for size in sizes),
          f"{name} has {sizes[0]} in- and {sizes[1]} out-features, which are not multiples of "
          f"{multiple}; keep=[{name!r}] leaves it as it is")
    check(not linear._forward_hooks and not linear._forward_pre_hooks,
          f"{name} has hooks, which would be lost; keep=[{name!r}] leaves it as it is")


def quantized_like(linear, recipe):
    has_bias = linear.bias is not None
    with torch.device("meta"):          # The parameters are those of linear: none is made here.
        new = Linear(linear.in_features, linear.out_features, recipe, bias=has_bias)
    new.weight = linear.weight
    new.bias = linear.bias
    add_state(new)                      # on the device of the weight
    return new
