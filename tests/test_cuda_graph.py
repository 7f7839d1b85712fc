"""Parts of a step that are replayed as CUDA graphs do what they do when they are called."""
import contextlib
import functools
import math

import pytest
import torch

import fp4
import quartet
from data.files import UserError
from fp4 import ops
from model import Llama, ModelConfig
from tools import cuda_graph, machine, processes
from tools.cuda_graph import Replayed, forward_backward, pays
from test_train import SMALL, corpus, log, run         # fixtures, and a reader

ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


# ---- without a GPU

class FakeGraph:
    """What is done while it records is not done. A replay does it."""
    recorded = None                     # the one that is being recorded

    def __init__(self):
        self.actions = []

    def replay(self):
        for action in self.actions:
            action()


@pytest.fixture
def fake(monkeypatch):
    @contextlib.contextmanager
    def recording(graph):
        FakeGraph.recorded = graph
        yield
        FakeGraph.recorded = None
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", recording)


class Doubled:
    """A function of tensors that counts its calls, and can be recorded."""

    def __init__(self):
        self.n_calls = 0

    def __call__(self, x, y):
        self.n_calls += 1
        result = torch.full_like(x, math.nan)

        def action():
            result.copy_(2 * x + y)

        if FakeGraph.recorded is None:
            action()
        else:
            FakeGraph.recorded.actions.append(action)
        return result


def test_the_first_call_is_an_ordinary_one_the_second_is_recorded_and_all_see_their_inputs(fake):
    f = Doubled()
    replayed = Replayed(f)
    for i in range(5):
        x = torch.tensor([1.0 + i, 2.0])
        assert replayed(x, torch.tensor([10.0, 20.0 * i])).tolist() == [12 + 2 * i, 4 + 20 * i]
        assert x.tolist() == [1 + i, 2]
    assert f.n_calls == 2


def test_a_wrong_number_of_inputs_is_refused(fake):
    replayed = Replayed(Doubled())
    x = torch.zeros(2)
    replayed(x, x)
    replayed(x, x)
    with pytest.raises(ValueError):
        replayed(x)


def test_a_microbatch_adds_its_share():
    torch.manual_seed(0)
    model = Llama(ModelConfig(1, 32, 1, 64, 8), fp4.recipe("bf16"), torch.float32)
    x, y = torch.randint(64, (2, 3, 8)).unbind()
    whole = model(x, y)
    expected = torch.autograd.grad(whole, model.head.weight)[0]
    accumulate = forward_backward(model, 4)
    parts = [accumulate(x, y) for _ in range(4)]
    assert not parts[0].requires_grad
    assert torch.allclose(sum(parts), whole.detach(), rtol=1e-6)
    assert torch.allclose(model.head.weight.grad, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("is_asked, device, width, is_spread, expected", [
    (None, "cuda", 128, False, True),
    (None, "cuda:1", 639, False, True),
    (None, "cuda", 640, False, False),
    (None, "cpu", 128, False, False),
    (None, "cuda", 128, True, False),
    (False, "cuda", 128, False, False),
    (False, "cpu", 128, True, False),
    (True, "cuda", 2048, False, True),
])
def test_small_models_on_one_gpu_are_replayed_and_others_if_asked(
        is_asked, device, width, is_spread, expected):
    assert pays(is_asked, device, width, is_spread) is expected


@pytest.mark.parametrize("device, is_spread", [("cpu", False), ("cuda", True)])
def test_what_cannot_be_replayed_is_refused(device, is_spread):
    with pytest.raises(UserError, match="one process on a GPU"):
        pays(True, device, 128, is_spread)


@pytest.mark.parametrize("is_sharded, n_processes, expected", [
    (False, 1, True),
    (True, 1, False),
    (False, 2, False),
])
def test_a_run_that_is_spread_is_not_replayed(monkeypatch, is_sharded, n_processes, expected):
    monkeypatch.setattr(machine, "resolve_device", lambda device: "cuda")
    monkeypatch.setattr(processes, "size", lambda: n_processes)
    settings = quartet.Settings(size="tiny", name="r", shard=is_sharded)
    assert quartet.resolve(settings).replay is expected


def test_a_replayed_run_keeps_the_memory_of_its_gradients(run, monkeypatch):
    places = []

    def watched(f):
        def call(*inputs):
            result = f(*inputs)
            if isinstance(f, functools.partial) and f.func is torch.nn.utils.clip_grad_norm_:
                places.append([parameter.grad.data_ptr() for parameter in f.args[0]])
            return result
        return call

    monkeypatch.setattr(cuda_graph, "pays", lambda *args: True)
    monkeypatch.setattr(cuda_graph, "Replayed", watched)
    assert run(*SMALL, "--steps", 3, "--sample_tokens", 5, "--name", "r")[0] == 0
    assert len(places) == 3 and places[0] == places[1] == places[2]


# ---- on a GPU

@ON_GPU
@pytest.mark.parametrize("precision", ["bf16", "fp4", "fp4-sr", "quartet2"])
def test_a_replayed_run_has_the_losses_of_another(run, tmp_path, precision):
    "Attention adds gradients in a changing order; so losses are equal at first, and near later."
    steps = (*SMALL, "--batch", 8, "--micro", 4, "--steps", 8, "--sample_tokens", 5)
    for name in ("--replay", "--no_replay"):
        code = run(*steps, "--device", "cuda", "--precision", precision, name, "--name", name[2:])
        assert code[0] == 0
    rows, others = log(tmp_path / "replay"), log(tmp_path / "no_replay")
    assert len(rows) == len(others) == 8
    assert rows[0][1] == others[0][1]
    for row, other in zip(rows, others):
        assert abs(float(row[1]) - float(other[1])) <= 1e-3
        assert abs(float(row[4]) - float(other[4])) <= 1e-2 * float(other[4])
    assert abs(float(rows[-1][2]) - float(others[-1][2])) <= 1e-3


@ON_GPU
def test_each_replay_draws_anew_and_what_a_call_would_draw():
    x = torch.zeros(32, 32, device="cuda")

    def draws(f):
        torch.manual_seed(5)
        return [torch.cat(f(x)).tolist() for _ in range(4)]

    replayed = Replayed(lambda x: [part.clone() for part in ops.draw(x, x, 2)])
    replayed(x)                         # The first one is no replay.
    called = draws(lambda x: ops.draw(x, x, 2))
    assert draws(replayed) == called
    assert len({tuple(draw) for draw in called}) == 4


@ON_GPU
def test_a_replay_renews_the_quantised_weights():
    layer = fp4.Linear(64, 96, fp4.recipe("fp4")).cuda()
    renew = Replayed(lambda: fp4.quantize_weights(layer))
    for seed in range(4):
        torch.manual_seed(seed)
        with torch.no_grad():
            layer.weight.normal_()
        renew()
        fp4.check_weights(layer)
