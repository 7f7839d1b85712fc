"""Sampling from a trained model."""
import types

import pytest
import torch
from test_model import EXACT, SMALL, doubled, lively, logits_by_hand, tokens_of
from test_train import resolved, two_blocks     # the second is a fixture

import quartet
from model import Llama, ModelConfig
from tools import generate


# ---- one token after the other

class Known(Llama):
    """Gives the same logits whatever it is shown, and notes that."""

    def __init__(self, logits, block_size=8):
        super().__init__(ModelConfig(1, 64, 1, 64, block_size), EXACT, torch.float32)
        self.logits = logits
        self.shown = []

    def forward(self, idx):
        self.shown.append(idx[0].tolist())
        wrong = torch.zeros(1, idx.shape[1] - 1, len(self.logits))  # Only the last token counts.
        return torch.cat((wrong, self.logits[None, None]), 1)


def drawn(model, n_tokens, prompt=(3, 1), seed=0, **settings):
    generator = torch.Generator().manual_seed(seed)
    got = generate.generate(
        model, torch.tensor([prompt]), n_tokens, generator=generator, **settings)
    assert got.shape == (1, len(prompt) + n_tokens) and got[0, :len(prompt)].tolist() == [*prompt]
    return got[0, len(prompt):]


def chi_squared(counts, probability):
    expected = probability * counts.sum()
    return ((counts - expected) ** 2 / expected).sum().item()


@pytest.mark.parametrize("settings, power", [({}, 1 / .8), ({"temperature": .5}, 2)])
def test_tokens_are_drawn_from_the_softmax_of_the_logits_over_the_temperature(settings, power):
    probability = torch.tensor([.02, .4, .08, .3, .2], dtype=torch.float64)
    tokens = drawn(Known(probability.log()), 2000, **settings)
    counts = tokens.bincount(minlength=5).double()
    # 4 degrees of freedom: 30 is exceeded once in 200,000 times.
    expected = probability ** power
    assert chi_squared(counts, expected / expected.sum()) <= 30
    for wrong in (1, .8, 1.6, 3):
        expected = probability ** wrong
        assert chi_squared(counts, expected / expected.sum()) > 30


@pytest.mark.parametrize("settings, n_likely", [({}, 50), ({"top_k": 3}, 3)])
def test_only_the_most_likely_tokens_are_drawn_and_each_of_them_is(settings, n_likely):
    logits = torch.randn(64, generator=torch.Generator().manual_seed(0)) / 8
    tokens = drawn(Known(logits), 1500, **settings)
    likely = sorted(range(64), key=lambda token: -logits[token])[:n_likely]
    assert set(tokens.tolist()) == set(likely)


def test_a_sample_is_shown_the_last_block_and_repeats_with_its_generator():
    model = Known(torch.zeros(64))
    tokens = drawn(model, 20, prompt=(5, 6, 7))
    text = [5, 6, 7, *tokens.tolist()]
    assert model.shown == [text[max(0, n - 8):n] for n in range(3, 23)]
    assert torch.equal(tokens, drawn(model, 20, prompt=(5, 6, 7)))
    assert not torch.equal(tokens, drawn(model, 20, prompt=(5, 6, 7), seed=1))


def test_the_most_likely_continuation_is_that_of_a_llama_written_out():
    model = lively()
    text = tokens_of((20,)).tolist()
    got = generate.generate(model, torch.tensor([text]), 10, top_k=1)[0].tolist()
    for _ in range(10):
        context = torch.tensor(text[-SMALL.block_size:])
        text.append(logits_by_hand(doubled(model), context, SMALL.n_head)[-1].argmax().item())
    assert got == text


def test_a_sample_is_the_prompt_and_what_the_seeds_generator_draws(two_blocks):
    words = types.SimpleNamespace(encode=lambda text: [ord(letter) for letter in text],
                                  decode=lambda ids: ids)
    samples = []
    for seed in (0, 1):
        cfg = resolved("--size", "tiny", "--seed", seed, "--sample_tokens", 30)
        model = quartet.build_model(resolved("--size", "tiny"), 128)
        generator = torch.Generator().manual_seed(seed)
        expected = generate.generate(
            model, torch.tensor([[100, 101]]), 30, generator=generator)
        torch.manual_seed(7)            # It is not the generator of everything.
        samples.append(generate.sample(model, words, "de", cfg))
        assert samples[-1] == expected[0].tolist() and len(samples[-1]) == 32
    assert samples[0] != samples[1]
