"""The model against a small Llama that is written out here, in float64 and formula by formula."""
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fp4
from model import (
    PRESETS, Attention, Llama, ModelConfig, RMSNorm, SwiGLU, rope, rope_table, swiglu_width)

SMALL = ModelConfig(n_layer=3, n_embd=64, n_head=2, vocab_size=96, block_size=24)
EXACT = fp4.RECIPES["bf16"]             # It quantises nothing; float32 is the dtype given here.


# ---- the Llama, written out

def norm_by_hand(x, weight):
    return weight * x / torch.sqrt((x ** 2).mean(-1, keepdim=True) + 1e-5)


def turn_by_hand(x, first=0):
    "x [T, D]: multiply channels 2 i and 2 i + 1, as one complex number, by e^(i angle)"
    T, D = x.shape
    pairs = torch.complex(x[:, 0::2], x[:, 1::2])
    position = torch.arange(first, first + T, dtype=torch.float64)[:, None]
    frequency = torch.tensor([10000 ** (-2 * i / D) for i in range(D // 2)], dtype=torch.float64)
    turned = pairs * torch.exp(1j * position * frequency)
    return torch.stack((turned.real, turned.imag), -1).reshape(T, D)


def attention_by_hand(x, qkv, proj, n_head, first=0):
    "x [T, C]; a token looks at itself and those before it"
    T, C = x.shape
    D = C // n_head
    q, k, v = x @ qkv[:C].T, x @ qkv[C:2 * C].T, x @ qkv[2 * C:].T
    is_later = torch.ones(T, T).triu(1).bool()
    heads = []
    for h in range(n_head):
        channels = slice(h * D, (h + 1) * D)
        turned_q = turn_by_hand(q[:, channels], first)
        turned_k = turn_by_hand(k[:, channels], first)
        score = (turned_q @ turned_k.T / math.sqrt(D)).masked_fill(is_later, -math.inf)
        heads.append(score.softmax(-1) @ v[:, channels])
    return torch.cat(heads, -1) @ proj.T


def mlp_by_hand(x, gate_up, proj):
    hidden = len(gate_up) // 2
    gate, up = x @ gate_up[:hidden].T, x @ gate_up[hidden:].T
    return (gate / (1 + torch.exp(-gate)) * up) @ proj.T


def logits_by_hand(weights, tokens, n_head):
    "weights by their names, tokens [T] -> [T, vocab_size]"
    x = weights["embed.weight"][tokens]
    n_layer = sum(name.endswith("norm1.weight") for name in weights)
    for i in range(n_layer):
        def of(name):
            return weights[f"blocks.{i}.{name}.weight"]

        normed = norm_by_hand(x, of("norm1"))
        x = x + attention_by_hand(normed, of("attention.qkv"), of("attention.proj"), n_head)
        normed = norm_by_hand(x, of("norm2"))
        x = x + mlp_by_hand(normed, of("mlp.gate_up"), of("mlp.proj"))
    return norm_by_hand(x, weights["norm.weight"]) @ weights["head.weight"].T


def losses_by_hand(weights, tokens, targets, n_head):
    "minus the log of each target's probability, [T]"
    logits = logits_by_hand(weights, tokens, n_head)
    return -logits.log_softmax(-1)[torch.arange(len(targets)), targets]


def doubled(model):
    return {name: weight.detach().double() for name, weight in model.state_dict().items()}


def lively(config=SMALL, recipe=EXACT, dtype=torch.float32, **kept):
    "a model in which every part matters: large weights, uneven norms, and tiny embeddings"
    model = Llama(config, recipe, dtype, **kept)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            is_norm = parameter.dim() == 1
            parameter.copy_(1 + .3 * drawn if is_norm else 1.5 * drawn / drawn.shape[-1] ** .5)
        model.embed.weight.mul_(.02)    # Its square is near the 1e-5 of the first norm.
    return model


def tokens_of(shape, vocab_size=SMALL.vocab_size, seed=2):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def relative_error(got, expected):
    return ((got.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("T", [24, 17, 1])
def test_the_logits_are_those_of_a_llama_written_out(T):
    model = lively()
    x = tokens_of((2, T))
    got = model(x)
    assert got.shape == (2, T, 96) and got.dtype == torch.float32
    for tokens, logits in zip(x, got):
        expected = logits_by_hand(doubled(model), tokens, SMALL.n_head)
        assert relative_error(logits, expected) <= 4e-6


def test_loss_and_gradients_are_those_of_a_llama_written_out():
    model = lively()
    x, y = tokens_of((2, 24)), tokens_of((2, 24), seed=3)
    y[0, 20:] = -1                      # They do not count: the mean is over 44 tokens.
    loss = model(x, y)
    loss.backward()
    weights = {name: weight.requires_grad_() for name, weight in doubled(model).items()}
    first = losses_by_hand(weights, x[0, :20], y[0, :20], SMALL.n_head)
    second = losses_by_hand(weights, x[1], y[1], SMALL.n_head)
    expected = (first.sum() + second.sum()) / 44
    expected.backward()
    assert abs(loss.item() - expected.item()) <= 1e-5
    for name, parameter in model.named_parameters():
        assert relative_error(parameter.grad, weights[name].grad) <= 1e-5, name


# ---- its layers

def test_pairs_of_neighbours_turn_as_complex_numbers_do_at_theta_10000():
    T, D = 600, 64
    cos, sin = rope_table(T, D)
    x = torch.randn(2, 3, T, D, generator=torch.Generator().manual_seed(0))
    got = rope(x, cos, sin)
    for b in range(2):
        for head in range(3):
            expected = turn_by_hand(x[b, head].double())
            # An angle of 600 has an error of 600 / 2^24 in float32.
            assert (got[b, head] - expected).abs().max() <= 2e-4
    # By the slowest pair a theta of 9900 would show: there the turn is small, and exact.
    slowest = 599 * 10000 ** (-62 / 64)
    assert torch.atan2(sin[-1, -1], cos[-1, -1]).item() == pytest.approx(slowest, rel=1e-5)


def test_a_norm_of_tiny_and_of_huge_values_is_divided_by_the_root_of_mean_square_plus_1e_5():
    norm = RMSNorm(64)
    x = torch.randn(5, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + .5
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(-1, 2, 64))
    for size in (1e-6, 1e-3, 3e-3, 1, 1e6):
        expected = norm_by_hand(size * x, norm.weight.double())
        assert relative_error(norm((size * x).float()), expected) <= 1e-6, size


def test_bfloat16_is_normed_and_turned_in_float32_and_rounded_once():
    x = torch.randn(600, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    norm = RMSNorm(64)
    with torch.no_grad():
        norm.weight.uniform_(.5, 2, generator=torch.Generator().manual_seed(1))
    normed = norm(x)
    turned = rope(x, *rope_table(600, 64))
    for got, expected in (
            (normed, norm_by_hand(x.double(), norm.weight.double())),
            (turned, turn_by_hand(x.double()))):
        assert got.dtype == torch.bfloat16
        # Rounded twice, one in three differs.
        assert (got == expected.bfloat16()).double().mean() >= .998


def linear(n_in, n_out, recompute=False, is_down=False):
    return fp4.Linear(n_in, n_out, EXACT)


def test_the_feed_forward_layer_gates_with_its_first_half():
    torch.manual_seed(0)
    mlp = SwiGLU(SMALL, linear)
    x = 3 * torch.randn(2, 5, 64)
    expected = mlp_by_hand(x.double(), mlp.gate_up.weight.double(), mlp.proj.weight.double())
    assert relative_error(mlp(x), expected) <= 1e-6
    swapped = mlp.gate_up.weight.double().roll(256, 0)
    assert relative_error(mlp(x), mlp_by_hand(x.double(), swapped, mlp.proj.weight.double())) > .5


def test_attention_turns_queries_and_keys_and_sees_distances_only():
    torch.manual_seed(0)
    attention = Attention(SMALL, linear)
    x = 2 * torch.randn(2, 16, 64)
    cos, sin = rope_table(100, 32)
    got = attention(x, cos[:16], sin[:16])
    weights = attention.qkv.weight.double(), attention.proj.weight.double()
    for rows, y in zip(x.double(), got):
        assert relative_error(y, attention_by_hand(rows, *weights, SMALL.n_head)) <= 1e-6
    # The same tokens further on: no distance has changed, and nothing else may matter.
    moved = attention(x, cos[70:86], sin[70:86])
    assert relative_error(moved, got.double()) <= 1e-5
    # At other distances the result is another.
    stretched = attention(x, cos[:48:3], sin[:48:3])
    assert relative_error(stretched, got.double()) > .1


@pytest.mark.parametrize("keep_first, keep_last", [(0, 0), (1, 0), (0, 2), (1, 1), (2, 2), (4, 0)])
def test_four_layers_of_each_block_are_quantised_but_for_the_blocks_that_are_kept(
        keep_first, keep_last):
    config = ModelConfig(n_layer=4, n_embd=64, n_head=2, vocab_size=64, block_size=8)
    recipe = fp4.RECIPES["nvfp4"]
    model = Llama(config, recipe, torch.float32, keep_first, keep_last)
    quantised = {name for name, module in model.named_modules()
                 if isinstance(module, fp4.Linear) and module.recipe == recipe}
    layers = ("attention.qkv", "attention.proj", "mlp.gate_up", "mlp.proj")
    assert quantised == {f"blocks.{i}.{layer}" for layer in layers
                         for i in range(keep_first, 4 - keep_last)}
    others = [module.recipe for name, module in model.named_modules()
              if isinstance(module, fp4.Linear) and name not in quantised]
    assert len(others) == 16 - len(quantised) and set(others) <= {EXACT}


def test_activations_have_the_dtype_that_is_given_and_weights_and_logits_are_float32():
    model = lively(dtype=torch.bfloat16)
    seen = set()
    for block in model.blocks:
        for module in (block, block.norm1, block.attention.qkv, block.mlp, block.mlp.proj):
            module.register_forward_hook(lambda module, x, y: seen.add(y.dtype))
    x = tokens_of((1, 24))
    got = model(x)
    assert seen == {torch.bfloat16} and got.dtype == torch.float32
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    expected = logits_by_hand(doubled(model), x[0], SMALL.n_head)
    assert 1e-3 <= relative_error(got[0], expected) <= 3e-2


# ---- its first weights

def test_each_parameter_has_its_standard_deviation_and_is_drawn_for_itself():
    torch.manual_seed(0)
    config = ModelConfig(n_layer=8, n_embd=128, n_head=2, vocab_size=512, block_size=8)
    model = Llama(config, fp4.RECIPES["nvfp4"], torch.bfloat16, keep_first=1)
    assert model.head.weight is not model.embed.weight
    assert all(name.endswith(".weight") for name, _ in model.named_parameters())
    ends_a_sum = ("attention.proj.weight", "mlp.proj.weight")
    first_values = set()
    n_matrices = 0
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert "norm" in name and torch.equal(parameter, torch.ones_like(parameter)), name
            continue
        std = .02 / math.sqrt(2 * 8) if name.endswith(ends_a_sum) else .02
        drawn = parameter.detach().double() / std
        n = drawn.numel()               # at least 16,384
        # Of a normal distribution: six standard errors of each moment.
        assert abs(drawn.mean()) <= 6 / n ** .5, name
        assert abs(drawn.std() - 1) <= 6 / (2 * n) ** .5, name
        assert abs((drawn ** 4).mean() - 3) <= 6 * (96 / n) ** .5, name
        first_values.add(drawn[0, 0].item())
        n_matrices += 1
    assert len(first_values) == n_matrices == 8 * 4 + 2


# ---- sizes

PAPER = {                               # Table 4 and main_setup.sh: layers, width, heads, hidden
    "30M": (6, 640, 5, 1792, 1.2e-3),   # width, peak learning rate
    "50M": (7, 768, 6, 2048, 1.2e-3),
    "100M": (8, 1024, 8, 2816, 6e-4),
    "200M": (10, 1280, 10, 3584, 3e-4),
    "430M": (13, 1664, 13, 4608, 1.5e-4),
    "800M": (16, 2048, 16, 5632, 7.5e-5),
    "1600M": (20, 2560, 20, 6912, 3.75e-5),
    "3200M": (28, 3072, 24, 8192, 7.5e-5),
    "7B": (32, 4096, 32, 11008, 9.375e-6),
}


def test_each_size_of_the_paper_has_its_layers_learning_rate_and_batch():
    for size, row in PAPER.items():
        preset = PRESETS[size]
        width = swiglu_width(preset.n_embd)
        assert (preset.n_layer, preset.n_embd, preset.n_head, width, preset.lr) == row, size
        assert (preset.batch, preset.seq) == (512, 512)
        assert (preset.steps, preset.tokens_per_param) == (None, 25)
        config = preset.model_config(32000, 256)
        assert (config.n_layer, config.n_embd, config.n_head) == row[:3]
        assert (config.vocab_size, config.block_size) == (32000, 256)
    assert set(PRESETS) == {*PAPER, "tiny", "3M"}


@pytest.mark.parametrize("T", [24, 8])
def test_the_operations_of_a_step_are_those_that_torch_counts_in_a_llama_written_out(T):
    model = lively()
    weights = {name: weight.requires_grad_() for name, weight in doubled(model).items()}
    tokens = tokens_of((T,))
    with FlopCounterMode(display=False) as counter:
        losses_by_hand(weights, tokens, tokens, SMALL.n_head).sum().backward()
    # The formula counts each scale of a norm as a weight of a product, too.
    in_norms = 6 * sum(weight.numel() for weight in weights.values() if weight.dim() == 1)
    assert counter.get_total_flops() == T * (SMALL.flops_per_token(T) - in_norms)
