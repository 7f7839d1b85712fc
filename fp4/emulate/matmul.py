"""
Any recipe in plain PyTorch: quantise, de-quantise, multiply in the activations' dtype. Slower than unquantised, for
comparing methods. What a recipe's columns say, on x [M, K], w [N, K] and dy [M, N]:

    y  = Q(x R) Q(w R).T                    R: rotation along K
    dx = Q(dy S) Q(wq.T S).T                S: random, along N. wq and xq are what the forward product used; with right
    dw = Q(dy.T S) Q(xq.T S).T              S: along M          "kept" as they are, with "original" w R and x R instead

R and S cancel inside the products; dx and dw arrive in the basis of x R and w R, are masked there and rotated back.
Axes are padded with zeros to whole blocks and rotations. Values are exact in bfloat16 (but for INT4's), the factors
come after the product; on a GPU dw is rounded to bfloat16 once, as in any BF16 training.
"""
import torch
import torch.nn.functional as F
from .formats import BLOCK, quantize

# one draw of all the numbers a call needs. Opaque, with the arguments of fp4.draw and for its reasons (__init__.py)
lib = torch.library.Library("fp4", "FRAGMENT")
lib.define("uniform(Tensor dy, Tensor x, int n) -> Tensor", tags=torch.Tag.nondeterministic_seeded)
lib.impl("uniform", lambda dy, x, n: torch.rand(n, device=dy.device), "CompositeExplicitAutograd")
torch.library.register_fake("fp4::uniform", lambda dy, x, n: dy.new_empty(n, dtype=torch.float32), lib=lib)
uniform = torch.ops.fp4.uniform


def hadamard(n, device):
    """[n, n]: entry (i, j) is minus where i & j has an odd number of bits"""
    i = torch.arange(n, device=device)
    odd = i[:, None] & i
    for shift in (8, 4, 2, 1): odd = odd ^ odd >> shift
    return (1 - 2 * (odd & 1)) * n ** -.5

def rotate(v, n, signs=None, after=False):
    """each n neighbours along the last axis; signs [n] before the Hadamard or after it; the inverse swaps the two"""
    if not n: return v
    signs = 1. if signs is None else signs
    v = v.float().unflatten(-1, (-1, n))
    return (v @ hadamard(n, v.device) * signs if after else v * signs @ hadamard(n, v.device)).flatten(-2)

def turn(v, how, signs, back=False):
    """v rotated as how says, or that undone; signs [128] or None"""
    signs = None if how.signs == "none" else signs[:how.rotation]
    return rotate(v, how.rotation, signs, (how.signs == "after") != back)

def product(a, b, factor, dtype):
    """factor * a @ b.T"""
    return cast((a @ b.T).float() * factor, dtype)

# compiled by torch 2.11, a Function that returns a .to() without effect gets zeros for a gradient
def cast(y, dtype): return y if y.dtype == dtype else y.to(dtype)

def pad(v, how): return F.pad(v, (0, -v.shape[-1] % max(how.rotation, BLOCK[how.format])))


def operands(like, mark, *wanted):
    """[(v [R, K], how, square), ...] rotated and quantised: each (values in dtype, factor, mask); and the signs"""
    wanted = [(pad(v, how), how, square) for v, how, square in wanted]
    sizes = [128] + [v.numel() * (how.rounding != "nearest") for v, how, _ in wanted]
    if all(how.signs == "none" for _, how, _ in wanted) and sum(sizes) == 128: signs, *noise = [None] * len(sizes)
    else: signs, *noise = uniform(like, mark, sum(sizes)).split(sizes)
    signs, results = None if signs is None else torch.where(signs < .5, -1., 1.), []
    for (v, how, square), n in zip(wanted, noise):
        n = n.view_as(v) if n is not None and n.numel() else None
        q, factor, mask = quantize(turn(v, how, signs).float(), how, n, square)
        results.append((q.to(like.dtype), factor, mask))
    return *results, signs


def forward(x, w, recipe):
    how, one = recipe.forward, x.new_ones(1, 1, dtype=torch.float32)
    if not how:
        return x @ w.to(x.dtype).T, (x, one, None, w, one, None, None, x, w)
    (xq, xf, x_mask), (wq, wf, w_mask), signs = operands(x, w, (x, how, False), (w, how, how.right == "square"))
    keep_x = recipe.wgrad and recipe.wgrad.right == "original"
    return product(xq, wq, xf * wf.T, x.dtype), (xq, xf, x_mask, wq, wf, w_mask, signs, x if keep_x else None, w)


def backward(dy, saved, recipe):
    xq, xf, x_mask, wq, wf, w_mask, signs, x, w = saved
    how = recipe.forward
    turned = lambda v: turn(pad(v, how), how, signs) if how else v              # as forward did
    dgrad, wgrad = (recipe.dgrad, dy, wq * wf, w), (recipe.wgrad, dy.T, xq * xf, x)
    jobs = []
    for p, left, used, original in (dgrad, wgrad):
        if p: jobs.append((left, p, False))
        if p and p.right == "alike": jobs.append((used.T, p, False))
        if p and p.right == "original": jobs.append((turned(original).T, p._replace(rounding="nearest"), False))
    done, grads = iter(operands(dy, xq, *jobs)), []
    for (p, left, used, _), mask, dtype in ((dgrad, x_mask, dy.dtype), (wgrad, w_mask, torch.float32)):
        a, af, _ = next(done) if p else (left, 1., None)
        b, bf, _ = next(done) if p and p.right != "kept" else (used.T.to(dy.dtype), wf.new_ones(1, 1), None)
        d = product(a, pad(b, p) if p else b, af * bf.T, dtype)
        if mask is not None: d = d * mask                       # a product, not a selection: NaN stays visible
        if how: d = turn(d, how, signs, back=True)
        grads.append(cast(d[:, :w.shape[1]], dtype))
    return grads


METHODS = {"": (forward, backward)}         # baselines.py adds its own; backward(dy, saved, recipe) -> dx, dw


class Matmul(torch.autograd.Function):
    """x [M, K], w [N, K] float32 -> x @ w.T [M, N] in x's dtype; it and its gradients as the recipe's method does"""

    @staticmethod
    def forward(ctx, x, w, recipe):
        y, saved = METHODS[recipe.method][0](x, w, recipe)
        ctx.save_for_backward(*saved)
        ctx.recipe = recipe
        return y

    @staticmethod
    def backward(ctx, dy):
        return *METHODS[ctx.recipe.method][1](dy.contiguous(), ctx.saved_tensors, ctx.recipe), None
