"""
A trained model continues texts: --sample of quartet.py, and the sample at the end of a run.

A text is continued token by token. Attention needs the keys and values of all tokens before the
new one, and they stay what they were: the model is causal. So they are kept, in a cache, and a step
computes one token of each text. A text may become longer than the model's block_size. From there on
the model sees its last block_size tokens, whose positions, and so whose keys, are others after each
token: then every step computes the whole window, as it would without a cache.

Does a token get the logits that it would get without a cache, or beside other texts? Where the
forward product quantises each token by itself, up to the order of sums: in bf16, mxfp8 and the rows
fp4 and fp4-*. Other rows are different. Where one scale serves all tokens of a call (fp8, nvfp4,
four-over-six, tetrajet2, quartet2, luq-*, halo-fp4, lss-int4) or a square of 32 x 32 of them
(jetfire-fp4), it depends on which tokens are computed together. A forward product with random
signs, or with rounding that is stochastic or EDEN's, is random in any case.
"""
import dataclasses
import sys
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

import fp4
from data.files import check, checked
from data.tokenizer import vocabulary_from_state
from fp4 import stored_weight
from model import PRESETS
from tools import checkpoint, machine, processes, schedule

TEXTS_AT_A_TIME = 64
BETWEEN_TEXTS = "\n----\n"


# ---- a text and a checkpoint

def from_checkpoint(cfg, settings_of, build_model):
    """The text --sample, continued by the checkpoint of the run that cfg names; or several texts.

    settings_of and build_model are those of quartet.py, which imports this module.
    """
    state = checkpoint.load(cfg.folder)
    trained = schedule.settings_at(settings_of(state, cfg), PRESETS, len(state["history"]))
    vocabulary = vocabulary_from_state(state["corpus"]["vocabulary"])
    texts = processes.by_rank_0(lines_of_input) if cfg.sample == "-" else [cfg.sample]
    with machine.errors_in_words(trained):
        # The weights are packed before they go to the GPU, which need not hold them in float32.
        model = build_model(dataclasses.replace(trained, device="cpu"), vocabulary.size)
        checkpoint.restore_model(state, model)
        hold_for_inference(model)
        return BETWEEN_TEXTS.join(sample(model.to(cfg.device), vocabulary, texts, cfg))


def hold_for_inference(model):
    """Rounds each weight to what the forward pass makes of it in any case: packed, where it runs on
    the kernels, or the dtype of the activations. A row that is emulated keeps float32 weights in
    its blocks."""
    fp4.pack_weights(model, model.dtype)
    model.embed.to(model.dtype)
    model.head.to(model.dtype)


def lines_of_input():
    """The lines of the standard input, each a text."""
    try:
        texts = sys.stdin.buffer.read().decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        check(False, f"--sample -: the standard input cannot be read as UTF-8: {error}")
    check(texts, "--sample -: the standard input has no line; each is a text to continue")
    return texts


def sample(model, vocabulary, texts, cfg):
    """Each text, continued by the model as it would be alone. Raises UserError if one cannot be."""
    sampling = Sampling(cfg.temperature, cfg.top_k, cfg.top_p)
    prompts = [vocabulary.encode(text) for text in texts]
    continued = []
    for first in range(0, len(prompts), TEXTS_AT_A_TIME):
        some = prompts[first:first + TEXTS_AT_A_TIME]
        generators = [torch.Generator(cfg.device).manual_seed(cfg.seed) for _ in some]
        continued += checked(generate, model, some, cfg.sample_tokens, sampling, generators)
    return [vocabulary.decode(ids) for ids in continued]


# ---- one token after the other

class Sampling(NamedTuple):
    """How a token is drawn. The trainer's flags have the defaults."""
    temperature: float                  # divides the logits; at 0 the likeliest token is taken
    top_k: int                          # Only so many of the likeliest are drawn; 0: all.
    top_p: float                        # Of these, only the fewest that have this probability.


@torch.no_grad()
def generate(model, prompts, n_tokens, sampling, generators):
    """Continues each prompt, a list of tokens, by n_tokens; returns the lists.

    The prompts may have different lengths. generators are torch's, one for each.
    Raises ValueError when the logits are not finite.
    """
    texts = [list(prompt) for prompt in prompts]
    if stored_weight.is_sharded(model.head.weight):
        # The model's own forward pass gathers the weights, and no other one does.
        next_logits = partial(logits_without_cache, model)
    else:
        n_columns = min(model.config.block_size, max(map(len, texts)) + n_tokens)
        next_logits = Decoder(model, n_columns).next_logits
    for _ in range(n_tokens):
        tokens = draw(next_logits(texts), sampling, generators)
        for text, token in zip(texts, tokens, strict=True):
            text.append(token)
    return texts


def draw(logits, sampling, generators):
    """Draws a token for each row of logits [B, vocab_size], with its own generator; a list."""
    temperature, top_k, top_p = sampling
    n_likely = 1 if temperature == 0 else min(top_k or logits.shape[1], logits.shape[1])
    values, tokens = logits.topk(n_likely)              # from the largest to the smallest
    if not values.isfinite().all():
        raise ValueError("the logits are not finite")
    # In float64, so that a tiny temperature is not 0.
    scaled = (values - values[:, :1]).double() / (temperature or 1)
    probability = scaled.softmax(-1)
    if top_p < 1:
        of_likelier = probability.cumsum(-1) - probability
        is_left_out = of_likelier >= top_p
        is_left_out[:, 0] = False                       # The likeliest is always there.
        probability = probability.masked_fill(is_left_out, 0)
    choices = [torch.multinomial(row[None].float(), 1, generator=generator)
               for row, generator in zip(probability, generators, strict=True)]
    return tokens.gather(1, torch.cat(choices))[:, 0].tolist()


def logits_without_cache(model, texts):
    """The logits [B, vocab_size] of the next token of texts, lists of tokens of one length."""
    windows = [text[-model.config.block_size:] for text in texts]
    return model(torch.tensor(windows, device=model.cos.device))[:, -1]


# ---- the cache

class Decoder:
    """Gives the logits of the next token of B texts, and keeps what attention has to see again.

    The texts stand in the rows of a table with n_columns columns, so that all end in the same one.
    Shorter texts have padding on their left, which no token attends to.
    """

    def __init__(self, model, n_columns):
        self.model = model
        self.columns = torch.arange(n_columns, device=model.cos.device)
        self.padding = None             # int64 [B, 1]: the columns before each text
        self.caches = None              # of each block's attention

    def next_logits(self, texts):
        """The logits [B, vocab_size] after texts, lists of tokens, each of which has one token more
        than in the call before."""
        longest = max(map(len, texts))
        if self.caches is None or longest > len(self.columns):
            return self.begin(texts)
        idx = self.columns.new_tensor([text[-1:] for text in texts])
        return self.step(idx, self.columns[longest - 1:longest])

    def begin(self, texts):
        """Computes the last block_size tokens of each text, and forgets what was before."""
        windows = [text[-self.model.config.block_size:] for text in texts]
        longest = max(map(len, windows))
        padding = [longest - len(window) for window in windows]
        idx = [[0] * n + window for n, window in zip(padding, windows)]
        self.padding = self.columns.new_tensor(padding)[:, None]
        self.caches = [Cache(len(self.columns)) for _ in self.model.blocks]
        return self.step(self.columns.new_tensor(idx), self.columns[:longest])

    def step(self, idx, columns):
        """idx [B, T], tokens in the columns [T] -> the logits [B, vocab_size] after the last one.

        It does nothing that a CUDA graph could not record, once the caches have their memory.
        """
        position = (columns - self.padding).clamp_min(0)
        cos = self.model.cos[position][:, None]         # [B, 1, T, D/2]: for all heads
        sin = self.model.sin[position][:, None]
        is_visible = (self.columns <= columns[:, None]) & (self.columns >= self.padding[..., None])
        # Padding sees itself, because what sees nothing would be NaN.
        mask = is_visible | (self.columns == columns[:, None])
        x = self.model.embed(idx).to(self.model.dtype)
        for block, cache in zip(self.model.blocks, self.caches, strict=True):
            cache.columns = columns
            cache.mask = mask[:, None]
            x = block(x, cos, sin, cache)
        return self.model.predict(x[:, -1:], None)[:, 0]


class Cache:
    """The keys and values of one attention layer, [B, n_head, n_columns, D].

    columns     int64 [T]: where the tokens of this step stand
    mask        bool [B, 1, T, n_columns]: which columns each of them attends to
    """

    def __init__(self, n_columns):
        self.n_columns = n_columns
        self.keys = None
        self.values = None

    def attend(self, q, k, v):
        """Keeps k and v of a step, and returns the attention of q; all are [B, n_head, T, D]."""
        if self.keys is None:
            size = (*k.shape[:2], self.n_columns, k.shape[3])
            self.keys = k.new_zeros(size)
            self.values = v.new_zeros(size)
        self.keys.index_copy_(2, self.columns, k)
        self.values.index_copy_(2, self.columns, v)
        return F.scaled_dot_product_attention(q, self.keys, self.values, self.mask)
