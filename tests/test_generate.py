"""Sampling from a trained model."""
import dataclasses
import io
import types

import pytest
import torch
from test_model import EXACT, SMALL, doubled, lively, logits_by_hand, relative_error, tokens_of
from test_train import BRIEF, corpus, resolved, run, two_blocks     # fixtures, and readers

import fp4
import quartet
from data.files import UserError
from model import Llama, ModelConfig
from tools import generate
from tools.generate import Decoder, Sampling, logits_without_cache


# ---- how a token is drawn

class Known(Llama):
    """Gives the same logits whatever it is shown, and notes that."""

    def __init__(self, logits, block_size=8):
        super().__init__(ModelConfig(1, 64, 1, 64, block_size), EXACT, torch.float32)
        self.logits = logits
        self.shown = []
        self.embed.register_forward_hook(lambda embed, args, out: self.shown.append(args[0]))

    def predict(self, x, targets):
        return self.logits.expand(len(x), 1, -1)


FLAGS = quartet.Settings()
USUAL = Sampling(FLAGS.temperature, FLAGS.top_k, FLAGS.top_p)


def generator_of(seed):
    return torch.Generator().manual_seed(seed)


def drawn(model, n_tokens, prompt=(3, 1), seed=0, **settings):
    got, = generate.generate(
        model, [prompt], n_tokens, USUAL._replace(**settings), [generator_of(seed)])
    assert len(got) == len(prompt) + n_tokens and got[:len(prompt)] == [*prompt]
    return torch.tensor(got[len(prompt):])


def drawn_of(logits, n, **settings):
    generator = generator_of(0)
    tokens = [generate.draw(logits[None], USUAL._replace(**settings), [generator])[0]
              for _ in range(n)]
    return torch.tensor(tokens)


def chi_squared(counts, probability):
    expected = probability * counts.sum()
    return ((counts - expected) ** 2 / expected).sum().item()


@pytest.mark.parametrize("settings, power", [({}, 1 / .8), ({"temperature": .5}, 2)])
def test_tokens_are_drawn_from_the_softmax_of_the_logits_over_the_temperature(settings, power):
    probability = torch.tensor([.02, .4, .08, .3, .2], dtype=torch.float64)
    tokens = drawn_of(probability.log(), 2000, **settings)
    counts = tokens.bincount(minlength=5).double()
    # 4 degrees of freedom: 30 is exceeded once in 200,000 times.
    expected = probability ** power
    assert chi_squared(counts, expected / expected.sum()) <= 30
    for wrong in (1, .8, 1.6, 3):
        expected = probability ** wrong
        assert chi_squared(counts, expected / expected.sum()) > 30


@pytest.mark.parametrize("settings, n_likely", [
    ({}, 50), ({"top_k": 3}, 3), ({"top_k": 0}, 64), ({"top_k": 99}, 64), ({"temperature": 0}, 1),
    ({"temperature": 1e-320}, 1)])
def test_only_the_most_likely_tokens_are_drawn_and_each_of_them_is(settings, n_likely):
    logits = torch.randn(64, generator=torch.Generator().manual_seed(0)) / 8
    tokens = drawn_of(logits, 1500, **settings)
    likely = sorted(range(64), key=lambda token: -logits[token])[:n_likely]
    assert set(tokens.tolist()) == set(likely)


@pytest.mark.parametrize("top_p, expected", [
    (.39, {1}), (0, {1}), (.41, {1, 3}), (.69, {1, 3}), (.71, {1, 3, 4}), (.97, {0, 1, 2, 3, 4}),
    (1, {0, 1, 2, 3, 4})])
def test_only_the_fewest_tokens_that_have_the_probability_are_drawn(top_p, expected):
    probability = torch.tensor([.04, .4, .06, .3, .2], dtype=torch.float64)
    tokens = drawn_of(probability.log(), 600, temperature=1, top_p=top_p)
    assert set(tokens.tolist()) == expected
    counts = tokens.bincount(minlength=5).double()[[*expected]]
    # What is left keeps its proportions; 30 is exceeded once in 200,000 times.
    assert chi_squared(counts, probability[[*expected]] / probability[[*expected]].sum()) <= 30


def test_the_probability_is_that_among_the_top_k_at_the_temperature():
    probability = torch.tensor([.04, .4, .06, .3, .2], dtype=torch.float64)
    # At temperature 1/2 the two likeliest have 16/25 and 9/25 of what they have together.
    for top_p, expected in ((.63, {1}), (.65, {1, 3})):
        tokens = drawn_of(probability.log(), 300, temperature=.5, top_k=2, top_p=top_p)
        assert set(tokens.tolist()) == expected


def test_a_number_that_is_not_finite_is_refused():
    for wrong in (torch.nan, torch.inf):
        logits = torch.zeros(2, 64)
        logits[1, 3] = wrong
        with pytest.raises(ValueError, match="the logits are not finite"):
            generate.draw(logits, USUAL, [generator_of(0)] * 2)


def test_a_sample_repeats_with_its_generator():
    tokens = drawn(Known(torch.zeros(64)), 20)
    assert torch.equal(tokens, drawn(Known(torch.zeros(64)), 20))
    assert not torch.equal(tokens, drawn(Known(torch.zeros(64)), 20, seed=1))


# ---- what the model is shown

def test_a_step_is_shown_the_new_token_and_beyond_a_block_the_last_block():
    model = Known(torch.zeros(64))
    text = [5, 6, 7, *drawn(model, 20, prompt=(5, 6, 7)).tolist()]
    shown = [[text[:3]], *([[token]] for token in text[3:8])]
    shown += [[text[n - 8:n]] for n in range(9, 23)]
    assert [idx.tolist() for idx in model.shown] == shown


def test_the_most_likely_continuation_is_that_of_a_llama_written_out():
    model = lively()
    text = tokens_of((20,)).tolist()
    got = [*text, *drawn(model, 10, text, temperature=0).tolist()]
    for _ in range(10):
        context = torch.tensor(text[-SMALL.block_size:])
        text.append(logits_by_hand(doubled(model), context, SMALL.n_head)[-1].argmax().item())
    assert got == text


# Rows whose forward product quantises each token by itself: the docstring of tools/generate.py.
BY_TOKEN = {"bf16", "mxfp8", *(name for name in fp4.RECIPES if name.startswith("fp4"))}


@pytest.mark.parametrize("precision", fp4.RECIPES)
def test_cached_logits_are_the_uncached_ones_where_tokens_are_quantised_by_themselves(precision):
    model = lively(recipe=fp4.RECIPES[precision])
    texts = tokens_of((2, 30)).tolist()
    decoder = Decoder(model, SMALL.block_size)
    errors = []
    with torch.no_grad():
        for n in range(9, 30):          # block_size is 24: the last ones slide.
            beginnings = [text[:n] for text in texts]
            expected = logits_without_cache(model, beginnings)
            errors.append(relative_error(decoder.next_logits(beginnings), expected.double()))
    # Sums in another order were 1e-6 apart. A value that is rounded to its other neighbour because
    # of that makes 1e-2, and a wrong key 1e-1.
    is_equal = sorted(errors)[len(errors) * 3 // 4] <= 1e-5
    assert is_equal == (precision in BY_TOKEN), errors


def test_prompts_of_several_lengths_give_each_the_logits_that_it_has_alone():
    model = lively()
    texts = [text[:n] for text, n in zip(tokens_of((4, 40)).tolist(), (1, 5, 22, 17))]
    decoder = Decoder(model, SMALL.block_size)
    with torch.no_grad():
        for step in range(8):           # From the third on, the longest is beyond a block.
            got = decoder.next_logits(texts)
            for row, text in zip(got, texts):
                expected = logits_by_hand(
                    doubled(model), torch.tensor(text[-SMALL.block_size:]), SMALL.n_head)[-1]
                assert relative_error(row, expected) <= 1e-5
            texts = [[*text, 7 * step % 96] for text in texts]


@pytest.mark.parametrize("precision", ["bf16", "fp4"])
def test_prompts_of_several_lengths_are_continued_as_each_alone(precision):
    model = lively(recipe=fp4.RECIPES[precision])
    prompts = [text[:n] for text, n in zip(tokens_of((3, 40)).tolist(), (2, 30, 9))]
    together = generate.generate(model, prompts, 12, USUAL, list(map(generator_of, range(3))))
    for seed, (prompt, text) in enumerate(zip(prompts, together)):
        assert text == [*prompt, *drawn(model, 12, prompt, seed).tolist()]


def test_a_short_text_needs_no_room_for_a_whole_block():
    decoder = Decoder(lively(), 6)
    with torch.no_grad():
        got = [decoder.next_logits([[1, 2, 3, 4, 5, 6][:n]]) for n in range(1, 7)]
        expected = lively()(torch.tensor([[1, 2, 3, 4, 5, 6]]))[0]
    assert relative_error(torch.cat(got), expected.double()) <= 1e-5
    assert decoder.caches[0].keys.shape == (1, 2, 6, 32)


def test_activations_of_bfloat16_are_cached_as_bfloat16():
    decoder = Decoder(lively(dtype=torch.bfloat16), 8)
    with torch.no_grad():
        logits = decoder.next_logits([[1, 2, 3]])
    assert logits.dtype == torch.float32 and decoder.caches[2].values.dtype == torch.bfloat16


# ---- a text and a checkpoint

LETTERS = types.SimpleNamespace(encode=lambda text: [ord(letter) for letter in text],
                                decode=lambda ids: ids)


def test_a_sample_is_the_prompt_and_what_the_seeds_generator_draws(two_blocks):
    samples = []
    for seed in (0, 1):
        cfg = resolved("--size", "tiny", "--seed", seed, "--sample_tokens", 30, "--top_k", 9)
        model = quartet.build_model(resolved("--size", "tiny"), 128)
        expected = [100, 101, *drawn(model, 30, [100, 101], seed, top_k=9).tolist()]
        torch.manual_seed(7)            # It is not the generator of everything.
        samples += generate.sample(model, LETTERS, ["de"], cfg)
        assert samples[-1] == expected and len(samples[-1]) == 32
    assert samples[0] != samples[1]


def test_the_flags_of_sampling_are_its_defaults_and_are_heard(two_blocks, monkeypatch):
    assert USUAL == (0.8, 50, 1) and resolved().top_p == 1
    heard = []
    monkeypatch.setattr(generate, "generate", lambda model, prompts, n, sampling, generators: (
        heard.append((prompts, n, sampling, len(generators))) or prompts))
    cfg = resolved("--temperature", 0, "--top_k", 3, "--top_p", .5, "--sample_tokens", 4)
    assert generate.sample(None, LETTERS, ["a", "bc"], cfg) == [[97], [98, 99]]
    assert heard == [([[97], [98, 99]], 4, (0, 3, .5), 2)]


@pytest.mark.parametrize("args, sentence", [
    (("--temperature", -1), "--temperature -1: must be 0 or more"),
    (("--temperature", "nan"), "--temperature nan: must be a finite number"),
    (("--top_k", -1), "--top_k -1: must be 0 or more"),
    (("--top_k", 1.5), "--top_k 1.5: must be a whole number"),
    (("--top_p", 1.1), "--top_p 1.1: must be 1 or less"),
    (("--top_p", -.1), "--top_p -0.1: must be 0 or more")])
def test_a_flag_out_of_bounds_is_one_sentence(args, sentence):
    with pytest.raises(UserError) as error:
        resolved(*args)
    assert sentence in str(error.value)


def test_each_line_of_the_input_is_continued_as_it_is_alone(run, monkeypatch):
    run("--steps", 4, "--name", "r", *BRIEF)

    def sampled(text, given=None):
        if given is not None:
            monkeypatch.setattr("sys.stdin", types.SimpleNamespace(buffer=io.BytesIO(given)))
        return run("--name", "r", "--sample", text, "--sample_tokens", 6)

    monkeypatch.setattr(generate, "TEXTS_AT_A_TIME", 2)
    code, _, out = sampled("-", "def f\n\nx = é\n".encode())
    alone = [sampled(text)[2].removesuffix("\n") for text in ("def f", "", "x = é")]
    assert code == 0 and out == generate.BETWEEN_TEXTS.join(alone) + "\n"
    code, sentence, _ = sampled("-", b"")
    assert code == 2 and "has no line" in sentence
    code, sentence, _ = sampled("-", b"a\xff")
    assert code == 2 and "cannot be read as UTF-8" in sentence
