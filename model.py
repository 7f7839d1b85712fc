"""
The paper's Llama (arXiv 2505.14669, section 5 and Table 4): pre-norm RMSNorm, RoPE, SwiGLU, no biases,
untied head. Read bottom-up: norm, rotary embedding, attention, feed-forward, block, model.

What is quantised can be seen here: the four fp4.Linear of a block, in every block between keep_first and
keep_last. The embedding, the norms, attention itself and the head (nn.Linear) are not. Weights are float32,
activations are in the dtype of the model.

B sequences, T tokens each, C channels (the width), H heads of D = C/H channels, V tokens in the vocabulary.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F
from fp4 import Linear                      # the quantised matmul; precision is a row of fp4/recipes.py

#         layers width heads   lr       tiny and 3M are ours, the others the paper's (Table 4 and main_setup.sh)
SIZES = {
    "tiny":  (4,   128,   2,   2e-3),
    "3M":    (3,   256,   4,   2e-3),
    "30M":   (6,   640,   5,   1.2e-3),
    "50M":   (7,   768,   6,   1.2e-3),
    "100M":  (8,   1024,  8,   6e-4),
    "200M":  (10,  1280,  10,  3e-4),
    "430M":  (13,  1664,  13,  1.5e-4),
    "800M":  (16,  2048,  16,  7.5e-5),
    "1600M": (20,  2560,  20,  3.75e-5),
    "3200M": (28,  3072,  24,  7.5e-5),
    "7B":    (32,  4096,  32,  9.375e-6),
}


class RMSNorm(nn.Module):
    def __init__(self, C):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(C))

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-5)
        return (y * self.weight).to(x.dtype)


def rope_table(T, D, theta=10000.):
    """[T, D/2] angles as cos and sin"""
    angle = torch.outer(torch.arange(T), theta ** (-torch.arange(0, D, 2) / D))
    return angle.cos(), angle.sin()


def rope(x, cos, sin):
    """rotate the channel pairs (0, 1), (2, 3), ... of x (B, H, T, D) by the angle of their position"""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, C, H, how):
        super().__init__()
        self.H = H
        self.qkv = Linear(C, 3 * C, **how)
        self.proj = Linear(C, C, recompute=True, **how)                             # its input is attention's, which keeps it

    def forward(self, x, cos, sin):
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.H, -1).permute(2, 0, 3, 1, 4)      # each (B, H, T, D)
        y = F.scaled_dot_product_attention(rope(q, cos, sin), rope(k, cos, sin), v, is_causal=True)
        return self.proj(y.transpose(1, 2).reshape(B, T, C))


class SwiGLU(nn.Module):
    def __init__(self, C, how):
        super().__init__()
        hidden = -(-int(8 * C / 3) // 256) * 256                                    # 8/3 C, up to a multiple of 256
        self.gate_up = Linear(C, 2 * hidden, **how)
        self.proj = Linear(hidden, C, recompute=True, **how)                        # its input comes from gate and up

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.proj(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, C, H, how):
        super().__init__()
        self.norm1, self.attention = RMSNorm(C), Attention(C, H, how)
        self.norm2, self.mlp = RMSNorm(C), SwiGLU(C, how)

    def forward(self, x, cos, sin):
        x = x + self.attention(self.norm1(x), cos, sin)
        return x + self.mlp(self.norm2(x))


class Llama(nn.Module):
    """layers, width C, heads H, vocabulary V, at most T tokens; precision and axes as for fp4.Linear, but not in the
    first and last blocks that are kept"""

    def __init__(self, layers, C, H, V, T, precision, dtype, keep_first=0, keep_last=0, **axes):
        super().__init__()
        how = dict(precision=precision, **axes)
        kept = lambda i: i < keep_first or i >= layers - keep_last
        self.T, self.C, self.dtype = T, C, dtype
        self.embed = nn.Embedding(V, C)
        self.blocks = nn.ModuleList(Block(C, H, dict(precision="bf16") if kept(i) else how) for i in range(layers))
        self.norm = RMSNorm(C)
        self.head = nn.Linear(C, V, bias=False)
        cos, sin = rope_table(T, C // H)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02 / (2 * layers) ** 0.5 if name.endswith("proj.weight") else 0.02)

    def forward(self, idx, targets=None):
        """idx (B, T) -> logits (B, T, V), or the mean loss over targets (B, T), of which -1 do not count"""
        x = self.embed(idx).to(self.dtype)
        cos, sin = self.cos[:idx.shape[1]], self.sin[:idx.shape[1]]
        for block in self.blocks:
            x = block(x, cos, sin)
        logits = F.linear(self.norm(x), self.head.weight.to(x.dtype)).float()
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    def params(self):
        """the paper's N: all parameters, norms included, but for the embedding and the head"""
        return sum(p.numel() for p in self.parameters()) - self.embed.weight.numel() - self.head.weight.numel()

    def flops_per_token(self, T):
        """of a training step: 6 for each weight that multiplies, and attention's 12 C T a layer (as in PaLM)"""
        return 6 * (self.params() + self.head.weight.numel()) + 12 * len(self.blocks) * self.C * T

    @torch.no_grad()
    def generate(self, idx, n, temperature=0.8, top_k=50, generator=None):
        """idx (1, T) -> (1, T + n), one token after the other from the top_k most likely; no cache"""
        for _ in range(n):
            logits = self(idx[:, -self.T:])[:, -1] / temperature
            top, which = logits.topk(min(top_k, logits.shape[-1]))
            choice = torch.multinomial(top.softmax(-1), 1, generator=generator)
            idx = torch.cat((idx, which.gather(-1, choice)), dim=1)
        return idx
