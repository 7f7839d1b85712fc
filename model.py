"""
The paper's Llama (arXiv 2505.14669, section 5 and Table 4): pre-norm RMSNorm, rotary position
embedding, SwiGLU, no biases, and an output head that shares no weights with the embedding.

What is quantised can be seen here: the four fp4.Linear of a block, in every block but the first
keep_first and the last keep_last. The embedding, the norms, attention itself and the output head
are not. Weights are float32; activations have the dtype that the model is given.

Shapes: B sequences of T tokens; C = n_embd channels; n_head heads of D = C / n_head channels.
"""
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

import fp4                              # the quantised linear layer, and the table of recipes


# ---- sizes

def swiglu_width(n_embd):
    """The width inside the feed-forward layer: 8/3 n_embd, rounded up to a multiple of 256."""
    return 256 * -(-int(8 * n_embd / 3) // 256)


def count_params(n_layer, n_embd):
    """The paper's N: all parameters, norms included, but for the embedding and the head."""
    attention = 4 * n_embd * n_embd
    feed_forward = 3 * n_embd * swiglu_width(n_embd)
    norms = 2 * n_embd
    return n_layer * (attention + feed_forward + norms) + n_embd


@dataclass(frozen=True)
class ModelConfig:
    n_layer: int
    n_embd: int
    n_head: int
    vocab_size: int
    block_size: int                     # the longest sequence, in tokens

    @property
    def n_params(self):
        return count_params(self.n_layer, self.n_embd)

    def flops_per_token(self, seq):
        """Operations of a training step for each token of a sequence of seq tokens (as in PaLM):
        6 for each weight of a matrix product, and 12 n_embd seq for attention in each layer. The
        scales of the norms count like weights: less than 0.03 % at 30M."""
        weights = self.n_params + self.vocab_size * self.n_embd
        return 6 * weights + 12 * self.n_layer * self.n_embd * seq


@dataclass(frozen=True)
class Preset:
    """A size of the model, and how it is trained unless the command line says otherwise."""
    n_layer: int
    n_embd: int
    n_head: int
    lr: float                           # peak learning rate
    batch: int = 512                    # sequences in a step
    seq: int = 512                      # tokens in a sequence
    steps: int | None = None            # length of a run; None: by tokens_per_param
    tokens_per_param: float | None = 25
    data: str = "python"

    @property
    def n_params(self):
        return count_params(self.n_layer, self.n_embd)

    def model_config(self, vocab_size, block_size):
        return ModelConfig(self.n_layer, self.n_embd, self.n_head, vocab_size, block_size)


# tiny and 3M are ours, the others are the paper's (Table 4, and main_setup.sh of its code).
PRESETS = {
    "tiny": Preset(4, 128, 2, lr=2e-3, batch=8, seq=256, steps=350, tokens_per_param=None,
                   data="stdlib"),
    "3M": Preset(3, 256, 4, lr=2e-3, batch=128, seq=256),
    "30M": Preset(6, 640, 5, lr=1.2e-3),
    "50M": Preset(7, 768, 6, lr=1.2e-3),
    "100M": Preset(8, 1024, 8, lr=6e-4),
    "200M": Preset(10, 1280, 10, lr=3e-4),
    "430M": Preset(13, 1664, 13, lr=1.5e-4),
    "800M": Preset(16, 2048, 16, lr=7.5e-5),
    "1600M": Preset(20, 2560, 20, lr=3.75e-5),
    "3200M": Preset(28, 3072, 24, lr=7.5e-5),
    "7B": Preset(32, 4096, 32, lr=9.375e-6),
}


# ---- layers

NORM_EPS = 1e-5                         # The norm of zeros divides by its root, not by 0.
ROPE_THETA = 10000.0                    # Pairs of channels turn by 1 down to about 1/10000 a token.


class RMSNorm(nn.Module):
    """Divide by the root mean square over the channels, in float32, and scale each channel."""

    def __init__(self, n_embd):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_embd))

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + NORM_EPS)
        return (y * self.weight).to(x.dtype)


def rope_table(T, D, theta=ROPE_THETA):
    """cos and sin [T, D/2] of the angle by which a pair of channels turns at each position."""
    frequency = theta ** (-torch.arange(0, D, 2) / D)
    angle = torch.outer(torch.arange(T), frequency)
    return angle.cos(), angle.sin()


def rope(x, cos, sin):
    """Turn the channel pairs (0, 1), (2, 3), ... of x [B, n_head, T, D] by their angles."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((a * cos - b * sin, a * sin + b * cos), -1)
    return turned.flatten(-2).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention. linear(n_in, n_out) makes the layers whose products are quantised.

    cache, in sampling alone, keeps the keys and values of the tokens before x (tools/generate.py).
    """

    def __init__(self, config, linear):
        super().__init__()
        self.n_head = config.n_head
        self.qkv = linear(config.n_embd, 3 * config.n_embd)
        # scaled_dot_product_attention keeps its output, the input of proj, for its own backward
        # pass. So proj need not keep a quantised copy of it.
        self.proj = linear(config.n_embd, config.n_embd, recompute=True)

    def forward(self, x, cos, sin, cache=None):
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.n_head, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)            # each [B, n_head, T, D]
        q = rope(q, cos, sin)
        k = rope(k, cos, sin)
        if cache is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            y = cache.attend(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(B, T, C))


class SwiGLU(nn.Module):
    """The feed-forward layer: silu(gate) * up, both in one matrix product."""

    def __init__(self, config, linear):
        super().__init__()
        hidden = swiglu_width(config.n_embd)
        self.gate_up = linear(config.n_embd, 2 * hidden)
        # The input of proj is cheap to compute again, from gate and up. It is what --down_input
        # means: products of two numbers, with large outliers.
        self.proj = linear(hidden, config.n_embd, recompute=True, is_down=True)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.proj(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config, linear):
        super().__init__()
        self.norm1 = RMSNorm(config.n_embd)
        self.attention = Attention(config, linear)
        self.norm2 = RMSNorm(config.n_embd)
        self.mlp = SwiGLU(config, linear)

    def forward(self, x, cos, sin, cache=None):
        x = x + self.attention(self.norm1(x), cos, sin, cache)
        return x + self.mlp(self.norm2(x))


# ---- the model

class Llama(nn.Module):
    """
    config      ModelConfig
    recipe      fp4.Recipe of the linear layers inside the blocks
    dtype       of the activations
    keep_first  number of blocks at the beginning that are not quantised
    keep_last   number of blocks at the end that are not quantised
    backend     fp4.Backend, or None: the one that fp4.build() chooses
    """

    def __init__(self, config, recipe, dtype, keep_first=0, keep_last=0, backend=None):
        super().__init__()
        self.config = config
        self.dtype = dtype
        self.backend = backend
        quantized = partial(fp4.Linear, recipe=recipe, backend=backend)
        unquantized = partial(fp4.Linear, recipe=fp4.RECIPES["bf16"])

        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList()
        for i in range(config.n_layer):
            is_kept = i < keep_first or i >= config.n_layer - keep_last
            self.blocks.append(Block(config, unquantized if is_kept else quantized))
        self.norm = RMSNorm(config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)

        cos, sin = rope_table(config.block_size, config.n_embd // config.n_head)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.init_weights()

    def init_weights(self):
        """Normal with a standard deviation of 0.02, less where a layer's output is added to x:
        2 n_layer such sums follow each other."""
        for name, parameter in self.named_parameters():
            if parameter.dim() != 2:
                continue                # The scales of the norms stay 1.
            std = 0.02
            if name.endswith("proj.weight"):
                std /= (2 * self.config.n_layer) ** 0.5
            nn.init.normal_(parameter, std=std)

    def forward(self, idx, targets=None):
        """idx [B, T] -> logits [B, T, vocab_size]; with targets [B, T] the mean loss over them.
        Targets of -1 do not count."""
        T = idx.shape[1]
        x = self.embed(idx).to(self.dtype)
        for block in self.blocks:
            x = block(x, self.cos[:T], self.sin[:T])
        return self.predict(x, targets)

    def predict(self, x, targets):
        """x [B, T, n_embd], which the blocks have made -> what forward returns."""
        x = self.norm(x)
        weight = self.head.weight
        if targets is None:
            return F.linear(x, weight.to(x.dtype)).float()
        return fp4.linear_cross_entropy(x.flatten(0, 1), weight, targets.flatten())
