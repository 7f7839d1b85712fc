"""A stored quantised weight is never stale in silence, however the weight was changed."""
import copy
import io

import pytest
import torch
from torch.optim.swa_utils import AveragedModel

import fp4
from fp4 import stored_weight

fp4.build()
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
PRECISIONS = ["fp4", "fp4-fwd"]
X = torch.randn(40, 64, generator=torch.Generator().manual_seed(1))
DY = torch.randn(40, 32, generator=torch.Generator().manual_seed(2))


def new_model(seed=0, precision="fp4"):
    torch.manual_seed(seed)
    recipe = fp4.recipe(precision)
    return torch.nn.Sequential(fp4.Linear(64, 96, recipe), fp4.Linear(96, 32, recipe))


def output_and_gradients(run, model):
    """Runs a training step of fixed draws, without the optimizer."""
    torch.manual_seed(3)
    model.zero_grad()
    x = X.clone().requires_grad_()
    y = run(x)
    y.backward(DY)
    return [y.detach(), x.grad, *(p.grad.clone() for p in model.parameters())]


def fresh_copy(model):
    """A new model, which has never stored a quantised weight, with the same weights."""
    fresh = new_model(precision=next(n for n in fp4.RECIPES if fp4.RECIPES[n] == model[0].recipe))
    fresh.load_state_dict(model.state_dict())
    return fresh


def is_as_fresh(run, model):
    fresh = fresh_copy(model)
    pairs = zip(output_and_gradients(run, model), output_and_gradients(fresh, fresh), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


# ---- ways to change the weights of a model; each gets the weights it may use

def load(model, new):
    model.load_state_dict(dict(zip(model.state_dict(), new)))


def load_and_assign(model, new):
    model.load_state_dict(dict(zip(model.state_dict(), new)), assign=True)


def copy_in_place(model, new):
    with torch.no_grad():
        for layer, value in zip(model, new):
            layer.weight.copy_(value)


def copy_in_inference_mode(model, new):
    with torch.inference_mode():
        for p, value in zip(model.parameters(), new):
            p.copy_(value)


def lerp_in_place(model, new):
    with torch.no_grad():
        for p, value in zip(model.parameters(), new):
            p.lerp_(value, .5)


def foreach(model, new):
    with torch.no_grad():
        torch._foreach_mul_(list(model.parameters()), .25)
        torch._foreach_copy_(list(model.parameters())[:1], new[:1])


def step_of_an_optimizer(model, new):
    for p, value in zip(model.parameters(), new):
        p.grad = value.clone()
    torch.optim.AdamW(model.parameters(), lr=.1, fused=True).step()


def replace_parameters(model, new):
    for layer, value in zip(model, new):
        layer.weight = torch.nn.Parameter(value.clone())


def replace_parameters_twice(model, new):
    for layer, value in zip(model, new):
        version = layer.weight._version
        for number in (2, 3):       # The third may get the memory that the first had.
            layer.weight = torch.nn.Parameter(number * value)
            while layer.weight._version < version:
                with torch.no_grad():
                    layer.weight.mul_(1)


def assign_data(model, new):
    for p, value in zip(model.parameters(), new):
        p.data = value.clone()


def to_bfloat16_and_back(model, new):
    """The version is the same afterwards, and often so is the address."""
    model.bfloat16().float()


def swap_tensors(model, new):
    for layer, value in zip(model, new):
        torch.utils.swap_tensors(layer.weight, torch.nn.Parameter(value.clone()))


WAYS = [load, load_and_assign, copy_in_place, copy_in_inference_mode, lerp_in_place, foreach,
        step_of_an_optimizer, replace_parameters, replace_parameters_twice, assign_data,
        to_bfloat16_and_back, swap_tensors]


@pytest.fixture(scope="module", params=["fp4", pytest.param("fp4-fwd", marks=pytest.mark.slow)])
def compiled(request):
    """A compiled model that stored its weights before it was compiled."""
    torch.compiler.reset()
    model = new_model(precision=request.param)
    fp4.quantize_weights(model)
    return torch.compile(model, fullgraph=True), model


@pytest.mark.parametrize("change", WAYS)
def test_a_changed_weight_is_not_stale_in_a_compiled_model(compiled, change):
    run, model = compiled
    changed_and_fresh(run, model, change)


@pytest.mark.parametrize("change", WAYS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_changed_weight_is_not_stale_in_an_eager_model(precision, change):
    model = new_model(precision=precision)
    changed_and_fresh(model, model, change)


def changed_and_fresh(run, model, change):
    fp4.quantize_weights(model)
    assert is_as_fresh(run, model)
    with torch.no_grad():
        before = run(X)             # An evaluation has a graph of its own.
    torch.manual_seed(10 + WAYS.index(change))
    change(model, [torch.randn_like(p) for p in model.parameters()])
    with torch.no_grad():
        after = run(X)
        assert torch.equal(after, fresh_copy(model)(X))
    assert not torch.equal(before, after)
    assert is_as_fresh(run, model)


def swapped_evaluated_and_swapped_back(run, model):
    fp4.quantize_weights(model)
    kept = [p.detach().clone() for p in model.parameters()]
    before = output_and_gradients(run, model)
    copy_in_place(model, [2 * p for p in kept])
    model.eval()
    with torch.no_grad():
        assert torch.equal(run(X), fresh_copy(model)(X))
        assert torch.equal(run(X), 4 * before[0])
    model.train()
    copy_in_place(model, kept)
    after = output_and_gradients(run, model)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_an_average_can_be_swapped_in_for_an_evaluation_of_an_eager_model():
    model = new_model()
    swapped_evaluated_and_swapped_back(model, model)


def test_an_average_can_be_swapped_in_for_an_evaluation_of_a_compiled_model(compiled):
    swapped_evaluated_and_swapped_back(*compiled)


@pytest.mark.parametrize("compiles", [False, True])
def test_a_deep_copy_has_no_stored_weight_that_it_could_take_for_its_own(compiles):
    torch.compiler.reset()
    model = new_model()
    fp4.quantize_weights(model)
    other = copy.deepcopy(model)
    for layer, copied in zip(model, other):
        while copied.weight._version < layer.weight._version:
            copy_in_place([copied], [2 * copied.weight])
        assert copied.weight._version == layer.weight._version
    assert not torch.equal(other[0].weight, model[0].weight)
    assert is_as_fresh(torch.compile(other, fullgraph=True) if compiles else other, other)
    assert is_as_fresh(model, model)


@pytest.mark.parametrize("compiles", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_averaged_model_is_not_stale(compiles):
    torch.compiler.reset()
    model = new_model()
    fp4.quantize_weights(model)
    averaged = AveragedModel(model)
    run = torch.compile(averaged.module, fullgraph=True) if compiles else averaged.module
    for _ in range(2):
        averaged.update_parameters(model)
        fp4.quantize_weights(averaged)
        assert is_as_fresh(run, averaged.module)
        step_of_an_optimizer(model, [torch.randn_like(p) for p in model.parameters()])
        averaged.update_parameters(model)
        assert is_as_fresh(run, averaged.module)


@needs_gpu
@pytest.mark.parametrize("compiles", [False, True])
def test_a_model_that_was_moved_to_a_gpu_does_not_use_the_copy_on_the_cpu(compiles):
    torch.compiler.reset()
    model = new_model()
    fp4.quantize_weights(model)
    run = torch.compile(model, fullgraph=True) if compiles else model
    with torch.no_grad():
        on_the_cpu = run(X)
        model.cuda()
        moved = run(X.cuda())
        assert torch.allclose(moved.cpu(), on_the_cpu, atol=1e-3)
        fp4.quantize_weights(model)
        assert torch.equal(run(X.cuda()), moved)
    fp4.check_weights(model)


@needs_gpu
def test_a_captured_cuda_graph_follows_a_changed_weight_after_quantize_weights():
    model = new_model().cuda()
    x = X.cuda()
    fp4.quantize_weights(model)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        for _ in range(2):
            model(x)
        with torch.cuda.graph(graph):
            y = model(x)
        copy_in_place(model, [2 * p for p in model.parameters()])
        fp4.quantize_weights(model)
        graph.replay()
        assert torch.equal(y, model(x))


# ---- what it costs, and what compiled graphs do with it

def test_no_weight_is_quantised_or_copied_while_the_stored_one_is_fresh(compiled, monkeypatch):
    run, model = compiled
    fp4.quantize_weights(model)
    is_as_fresh(run, model)
    quantised = []
    original = stored_weight.quantize
    monkeypatch.setattr(stored_weight, "quantize",
                        lambda *a, **k: quantised.append(a) or original(*a, **k))
    saved = set()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.add(t.data_ptr()) or t,
                                                  lambda t: t):
        y = run(X.clone().requires_grad_())
    y.backward(DY)
    with torch.no_grad():
        run(X)
    assert quantised == []
    assert {layer.stored.packed.codes.data_ptr() for layer in model} <= saved
    copy_in_place(model, [torch.randn_like(p) for p in model.parameters()])
    for _ in range(3):
        run(X.clone().requires_grad_()).backward(DY)
    assert len(quantised) == 2          # a compiled model renews what it stored


def test_two_forward_passes_may_come_before_a_backward_pass_of_both(compiled):
    run, model = compiled
    fp4.quantize_weights(model)
    grads = []
    for forward in (run, model):
        model.zero_grad()
        torch.manual_seed(0)
        first, second = (X.clone().requires_grad_() for _ in range(2))
        (forward(first) + forward(second)).backward(DY)
        grads.append([first.grad, second.grad, *(p.grad.clone() for p in model.parameters())])
    for a, b in zip(*grads):
        assert torch.equal(a, b)


def test_a_weight_changed_between_forward_and_backward_pass_is_an_error_in_a_compiled_model(
        compiled):
    run, model = compiled
    fp4.quantize_weights(model)
    first, second = (run(X.clone().requires_grad_()) for _ in range(2))
    second.backward(DY)                 # The first pass can still be followed by its backward pass.
    copy_in_place(model, [torch.randn_like(p) for p in model.parameters()])
    run(X.clone().requires_grad_())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        first.backward(DY)


def test_weights_stored_in_inference_mode_serve_a_backward_pass_later():
    model = new_model()
    with torch.inference_mode():
        fp4.quantize_weights(model)
    assert is_as_fresh(model, model)


def test_a_layer_made_in_inference_mode_has_no_count_of_changes_and_is_never_stale():
    with torch.inference_mode():
        model = new_model()
        fp4.quantize_weights(model)
        for p in model.parameters():
            p.mul_(2)
        assert torch.equal(model(X), fresh_copy(model)(X))


# ---- where the copy is not

def test_state_dicts_copies_and_pickles_hold_the_weight_alone():
    model = new_model()
    plain = len(pickled(model))
    fp4.quantize_weights(model)
    assert list(model.state_dict()) == ["0.weight", "1.weight"]
    assert len(list(model.parameters())) == 2 and not list(model.buffers())
    assert len(pickled(model)) == plain
    loaded = torch.load(io.BytesIO(pickled(model)), weights_only=False)
    for other in (loaded, copy.deepcopy(model)):
        assert torch.equal(other(X), model(X))
        fp4.quantize_weights(other)
        fp4.check_weights(other)


def pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    return file.getvalue()


# ---- the check

def test_check_weights_names_the_layer_whose_stored_weight_is_not_its_weights():
    model = new_model()
    fp4.check_weights(model)            # Nothing is stored yet.
    fp4.quantize_weights(model)
    fp4.check_weights(model)
    model[1].weight.data[3, 5] += 1     # Torch does not count it, and the product is stale.
    assert stored_weight.is_fresh(model[1].stored, model[1].weight)
    with pytest.raises(ValueError, match=r"^1: the stored .*call fp4.quantize_weights\(model\)"):
        fp4.check_weights(model)
    fp4.quantize_weights(model)
    fp4.check_weights(model)
    assert is_as_fresh(model, model)


def test_a_weight_moved_inside_of_its_memory_is_not_stale():
    both = torch.randn(2, 96, 64)
    layer = fp4.Linear(64, 96, fp4.recipe("fp4"))
    layer.weight = torch.nn.Parameter(both[0])
    layer.quantize_weight()
    before = layer(X)
    layer.weight.data = both[1]
    assert not torch.equal(layer(X), before)


def test_a_weight_in_new_memory_at_the_address_of_old_is_not_stale():
    memory = torch.randn(96, 64).numpy()
    layer = fp4.Linear(64, 96, fp4.recipe("fp4"))
    layer.weight = torch.nn.Parameter(torch.from_numpy(memory))
    layer.quantize_weight()
    before = layer(X)
    source = layer.weight.data_ptr(), layer.weight._version
    memory *= 2
    layer.weight = torch.nn.Parameter(torch.from_numpy(memory))
    assert (layer.weight.data_ptr(), layer.weight._version) == source
    assert torch.equal(layer(X), 2 * before)


def test_a_copy_on_another_device_is_not_at_hand():
    layer = fp4.Linear(64, 96, fp4.recipe("fp4"))
    layer.quantize_weight()
    assert not stored_weight.is_at_hand(layer.stored, layer.weight.to("meta"))
