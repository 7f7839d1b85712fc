"""A trained model that holds its weights packed: the same outputs, and a quarter of the memory."""
import copy

import pytest
import torch
from operands import error_of_a_sum
from test_model import lively, tokens_of
from torch import nn

import fp4
from fp4 import ops, reference
from fp4.inference import PackedLinear
from model import PRESETS, Llama, ModelConfig
from tools import generate

WIDE = ModelConfig(n_layer=3, n_embd=96, n_head=3, vocab_size=96, block_size=24)
ON_KERNELS = [name for name, recipe in fp4.RECIPES.items() if recipe.has_kernels]


def packed_copy(model):
    packed = copy.deepcopy(model)
    generate.hold_for_inference(packed)
    return packed


def bytes_of(module):
    tensors = [*module.parameters(), *module.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("precision, kept", [
    *((name, {}) for name in fp4.RECIPES), ("fp4", {"keep_first": 1, "keep_last": 1})], ids=str)
def test_the_logits_are_those_of_the_model_that_was_trained_to_the_last_byte(
        precision, kept, dtype):
    model = lively(WIDE, fp4.RECIPES[precision], dtype, **kept)
    packed = packed_copy(model)
    tokens = tokens_of((2, 19))
    with torch.no_grad():
        # Some rows draw random numbers.
        torch.manual_seed(0)
        expected = model(tokens)
        torch.manual_seed(0)
        assert torch.equal(packed(tokens), expected)


def test_a_row_packs_with_its_own_scale():
    model = lively(WIDE, fp4.recipe("fp4", scale="nearest"))
    with torch.no_grad():
        assert torch.equal(packed_copy(model)(tokens_of((1, 5))), model(tokens_of((1, 5))))


@pytest.mark.parametrize("precision", ON_KERNELS)
def test_the_weights_of_the_blocks_take_at_most_0_30_of_bf16s(precision):
    config = PRESETS["30M"].model_config(64, 32)
    model = Llama(config, fp4.RECIPES[precision], torch.bfloat16)
    in_bf16 = 2 * sum(parameter.numel() for parameter in model.blocks.parameters())
    generate.hold_for_inference(model)
    assert 0.26 <= bytes_of(model.blocks) / in_bf16 <= 0.30
    # The two large matrices outside, and the scales of the last norm, in float32.
    outside = bytes_of(model) - bytes_of(model.blocks) - bytes_of_tables(model)
    assert outside == 2 * 2 * 64 * 640 + 4 * 640


def bytes_of_tables(model):
    return 4 * (model.cos.numel() + model.sin.numel())


def test_unquantised_blocks_have_weights_in_the_dtype_of_the_activations():
    model = lively(WIDE, fp4.RECIPES["fp4"], torch.bfloat16, keep_first=1)
    generate.hold_for_inference(model)
    assert model.blocks[0].mlp.proj.weight.dtype == torch.bfloat16
    assert isinstance(model.blocks[1].mlp.proj, PackedLinear)
    assert not [name for name, _ in model.blocks[1:].named_parameters() if "norm" not in name]


def test_layers_that_are_emulated_stay_and_are_named():
    model = lively(WIDE, fp4.RECIPES["nvfp4"])
    left = fp4.pack_weights(model, torch.bfloat16)
    assert len(left) == 12 and left[0] == "blocks.0.attention.qkv"
    assert model.blocks[0].attention.qkv.weight.dtype == torch.float32
    assert fp4.pack_weights(lively(WIDE, fp4.RECIPES["fp4"]), torch.float32) == []


@pytest.mark.parametrize("rows", [1, 8, 9])
def test_few_rows_are_the_same_product_summed_in_another_order(rows):
    torch.manual_seed(0)
    model = nn.Sequential(fp4.Linear(4096, 96, fp4.RECIPES["fp4"]))
    x = torch.randn(rows, 4096)
    with torch.no_grad():
        trained = model(x)
        fp4.pack_weights(model, torch.float32)
        got = model(x)
    packed, _ = ops.quantize_forward(x, "floor")
    weight = ops.Packed(model[0].codes, model[0].scales)
    if rows <= 8:
        assert torch.equal(got, ops.matvec(packed, weight, torch.float32))
        exact = reference.gemm(*packed, *weight, 1.0, torch.float64)
        assert ((got - exact).abs() <= error_of_a_sum(packed, weight)).all()
    else:
        assert torch.equal(got, trained)


class Twice(nn.Module):
    "has one layer in two places, and a bias"

    def __init__(self):
        super().__init__()
        self.a = fp4.Linear(64, 64, fp4.RECIPES["fp4"], bias=True)
        self.b = nn.Sequential(self.a)
        nn.init.normal_(self.a.bias)

    def forward(self, x):
        return self.b(self.a(x))


@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 5, 64)])
def test_a_layer_in_two_places_stays_one_and_its_bias_is_added(shape):
    torch.manual_seed(0)
    model = Twice()
    x = torch.randn(shape)
    with torch.no_grad():
        expected = model(x)
        fp4.pack_weights(model, torch.float32)
        assert model.a is model.b[0] and isinstance(model.a, PackedLinear)
        assert torch.equal(model(x), expected) and model(x).shape == shape


def test_what_was_packed_is_saved_and_loaded_as_such():
    model = Twice()
    fp4.pack_weights(model, torch.float32)
    assert {name.split(".")[-1] for name in model.state_dict()} == {"codes", "scales", "bias"}
    other = Twice()
    fp4.pack_weights(other, torch.float32)
    other.load_state_dict(model.state_dict())
    x = torch.randn(2, 64)
    assert torch.equal(other(x), model(x))


def test_what_cannot_be_packed_is_refused_and_nothing_is_replaced(monkeypatch):
    with pytest.raises(ValueError, match="a single layer has no model"):
        fp4.pack_weights(Twice().a, torch.float32)
    model = Twice()
    monkeypatch.setattr("fp4.stored_weight.is_sharded", lambda weight: True)
    with pytest.raises(ValueError, match="spread over processes"):
        fp4.pack_weights(model, torch.float32)
    assert isinstance(model.a, fp4.Linear)


def test_a_nan_in_a_weight_reaches_the_output_as_in_training():
    model = Twice()
    model.a.weight.data[3, 40] = torch.nan
    x = torch.randn(2, 64)
    with torch.no_grad():
        expected = model.a(x)
        fp4.pack_weights(model, torch.float32)
        got = model.a(x)
    assert got[:, 3].isnan().all() and torch.equal(got.isnan(), expected.isnan())
