"""
The output head and the loss of a language model, which never hold all logits.

Of a microbatch of 32,768 tokens and a vocabulary of 32,000, the logits take 2 GB in BF16, and their
gradient as much again: more than all that the layers of a 30M model keep for the backward pass.
Neither is needed whole. A token's loss depends on its own logits only, and their gradient is known
as soon as they are, softmax(logits) - one_hot(target). So the forward pass takes one chunk of
tokens after the other, goes all the way from logits to gradients, and keeps the gradients of x and
of the weight. The backward pass only multiplies these by the gradient of the loss.

The same idea is in Liger-Kernel (arXiv 2410.10989, section 3.2) and in newer versions of torch, as
F.linear_cross_entropy, where torch.compile cannot take it into its graph yet (2.13).
"""
import torch
import torch.nn.functional as F

# Logits of a chunk: 256 MB in BF16. Smaller chunks save little more. Each chunk reads and writes
# the gradient of the weight once, and that takes time.
MAX_LOGITS = 2 ** 27


def linear_cross_entropy(x, weight, targets):
    """Returns the mean cross entropy of the logits x weight.T, a float32 number.

    x           [M, K]  in the dtype of the activations, in which the logits are computed
    weight      [V, K]  float32
    targets     [M]     int64, of 0 .. V - 1; tokens of -1 do not count
    """
    has_backward = torch.is_grad_enabled()
    return LinearCrossEntropy.apply(x, weight, targets, has_backward)


class LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, targets, has_backward):
        w = weight.to(x.dtype)
        is_counted = (targets >= 0)[:, None]
        loss = x.new_zeros((), dtype=torch.float32)
        dx = []
        dw = torch.zeros_like(weight) if has_backward else None
        for part in chunks(len(x), MAX_LOGITS // len(w)):
            log_p = F.linear(x[part], w).float().log_softmax(-1)
            loss = loss + F.nll_loss(log_p, targets[part], ignore_index=-1, reduction="sum")
            if has_backward:
                dlogits = log_p.exp_().sub_(one_hot(targets[part], len(w))).to(x.dtype)
                dx.append((dlogits @ w) * is_counted[part])
                dw += dlogits.T @ (x[part] * is_counted[part])
        n_counted = is_counted.sum()
        if has_backward:
            ctx.save_for_backward(torch.cat(dx), dw, n_counted)
        return loss / n_counted

    @staticmethod
    def backward(ctx, dloss):
        dx, dw, n_counted = ctx.saved_tensors
        scale = dloss / n_counted
        return dx * scale, dw * scale, None, None


def chunks(n, size):
    """Yields slices of 0 .. n - 1, of at most `size` or 1."""
    size = max(1, size)
    for start in range(0, n, size):
        yield slice(start, start + size)


def one_hot(targets, n):
    """Returns 1 at each target and 0 elsewhere, int8 [M, n]; a target of -1 is nowhere."""
    vocabulary = torch.arange(n, device=targets.device)
    return (vocabulary == targets[:, None]).to(torch.int8)
