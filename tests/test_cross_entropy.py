"""The output head with its loss, in chunks, is torch's linear and cross entropy."""
import pytest
import torch
import torch.nn.functional as F

import fp4
from fp4 import cross_entropy
from operands import DEVICES

M, K, V = 70, 24, 45
# How many logits a chunk may have: all, 16 tokens' worth, which leaves a last chunk of 6, and less
# than one token's.
CHUNKS = [10 ** 6, 16 * V + 1, 7]


@pytest.fixture(params=DEVICES)
def case(request):
    "x, weight and targets, of which some do not count"
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(M, K, generator=generator).to(request.param)
    weight = torch.randn(V, K, generator=generator).to(request.param)
    targets = torch.randint(V, (M,), generator=generator).to(request.param)
    targets[3:9] = -1
    return x.requires_grad_(), weight.requires_grad_(), targets


def by_torch(x, weight, targets):
    logits = F.linear(x, weight.to(x.dtype)).float()
    return F.cross_entropy(logits, targets, ignore_index=-1)


def gradients(f, x, weight, targets, factor=1.0):
    loss = f(x, weight, targets)
    return loss.detach(), *torch.autograd.grad(loss * factor, (x, weight))


def in_float64(case, factor=1.0):
    x, weight, targets = case
    logits = F.linear(x.double(), weight.double())
    loss = F.cross_entropy(logits, targets, ignore_index=-1)
    return loss.detach(), *torch.autograd.grad(loss * factor, (x, weight))


def relative(got, expected):
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("size", CHUNKS)
def test_loss_and_gradients_are_those_of_the_whole_logits(case, monkeypatch, size):
    monkeypatch.setattr(cross_entropy, "MAX_LOGITS", size)
    for got, expected in zip(gradients(fp4.linear_cross_entropy, *case, 3.0),
                             in_float64(case, 3.0)):
        assert got.shape == expected.shape and got.dtype == torch.float32
        assert relative(got, expected) <= 1e-6


@pytest.mark.parametrize("size", CHUNKS)
def test_in_bfloat16_it_is_as_near_to_the_truth_as_torch(case, monkeypatch, size):
    monkeypatch.setattr(cross_entropy, "MAX_LOGITS", size)
    x, weight, targets = case
    x = x.detach().bfloat16().requires_grad_()
    truth = in_float64((x.detach().float().requires_grad_(), weight, targets))
    ours = gradients(fp4.linear_cross_entropy, x, weight, targets)
    torchs = gradients(by_torch, x, weight, targets)
    assert ours[1].dtype == torch.bfloat16 and ours[2].dtype == torch.float32
    for our, their, true in zip(ours, torchs, truth):
        assert relative(our, true) <= 1.5 * relative(their, true) + 1e-6


def test_no_piece_of_logits_is_larger_than_a_chunk(case, monkeypatch):
    monkeypatch.setattr(cross_entropy, "MAX_LOGITS", 16 * V)
    sizes = []
    linear = F.linear

    def watched(x, w):
        sizes.append(linear(x, w).numel())
        return linear(x, w)

    monkeypatch.setattr(F, "linear", watched)
    gradients(fp4.linear_cross_entropy, *case)
    assert sizes == [16 * V] * 4 + [6 * V]


@pytest.mark.parametrize("size", CHUNKS)
def test_without_a_gradient_the_loss_is_the_same(case, monkeypatch, size):
    monkeypatch.setattr(cross_entropy, "MAX_LOGITS", size)
    with torch.no_grad():
        loss = fp4.linear_cross_entropy(*case)
    assert loss == fp4.linear_cross_entropy(*case) and not loss.requires_grad


def test_a_token_that_does_not_count_gets_no_gradient(case):
    _, dx, _ = gradients(fp4.linear_cross_entropy, *case)
    assert (dx[3:9] == 0).all() and (dx[9:] != 0).any(1).all()


def test_not_a_number_stays_one(case):
    x, weight, targets = case
    x = x.detach().clone()
    x[20, 5] = torch.nan
    loss, dx, dw = gradients(fp4.linear_cross_entropy, x.requires_grad_(), weight, targets)
    assert loss.isnan() and dx[20].isnan().all() and dw.isnan().all()


def test_where_no_token_counts_the_loss_is_not_a_number_as_in_torch(case):
    x, weight, targets = case
    nothing = torch.full_like(targets, -1)
    assert by_torch(x, weight, nothing).isnan()
    assert fp4.linear_cross_entropy(x, weight, nothing).isnan()


def test_compiled_it_is_one_graph_with_the_same_results(case, monkeypatch):
    monkeypatch.setattr(cross_entropy, "MAX_LOGITS", 16 * V)
    compiled = torch.compile(fp4.linear_cross_entropy, fullgraph=True)
    for got, expected in zip(gradients(compiled, *case), in_float64(case)):
        assert relative(got, expected) <= 1e-6
