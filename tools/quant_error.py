"""
What each quantiser does to numbers, without training anything.

    python -m fp4.error                             # the paper's Table 2, for every quantiser there is
    python -m fp4.error out/NAME/ckpt.pt            # and how gradients of that model decay with depth

Table 2 (arXiv 2505.14669v4): the relative squared error on Gaussian numbers, averaged over an octave of their
standard deviation (a power-of-two scale treats each differently), and the misalignment 1 - <q, v> / <v, v>: what a
product shrinks by, on average. An unbiased quantiser has none; the error of a biased one adds up from layer to layer,
as the second table shows: one batch, forward unquantised, backward quantised, and the gradient that arrives at each
depth against the exact one, as cosine and alignment <q, g> / <g, g>.
"""
import dataclasses, sys
import torch
from .emulated import operands, pad, turn
from .formats import SCALES
from .recipes import Product, sensible

BACKWARD = {        # changes to the row fp4-bwd, for the second table; three values: forward, dgrad, wgrad
    "stochastic":         dict(rounding="stochastic"),
    "nearest":            dict(),
    "QuEST":              dict(scale="floor:floor:floor"),
    "nearest, PMA":       dict(scale="pma:pma:pma"),
    "nearest, EDEN":      dict(rounding="eden"),
}


def quantisers():
    """every sensible combination of format, scale rule and rounding, and NVFP4's square blocks"""
    for format, rules in SCALES.items():
        for scale in rules:
            for rounding in ("nearest", "stochastic", "eden"):
                how = Product(format, scale, 128, "before", rounding)
                try: sensible("", how)
                except ValueError: continue
                yield how
                if format == "nvfp4" and rounding == "nearest": yield how._replace(right="square")


def gaussian(how, sigmas=16, rows=512, columns=1024):
    """relative squared error and misalignment"""
    error = shrinkage = 0.
    for i in range(sigmas):
        v = torch.randn(rows, columns) * 2 ** ((i + .5) / sigmas)
        (q, factor, _), signs = operands(v, v, (v, how, how.right == "square"))
        v, q = turn(pad(v, how), how, signs).double(), (q * factor).double()
        error += (q - v).square().sum() / v.square().sum()
        shrinkage += 1 - (q * v).sum() / v.square().sum()
    return error.item() / sigmas, shrinkage.item() / sigmas


def gradients(model, x, y):
    """of the loss by the output of each block, the last first, and of the embedding: [B, T, C] each"""
    outputs = []
    hooks = [m.register_forward_hook(lambda m, i, out: (out.retain_grad(), outputs.append(out))[0])
             for m in (model.embed, *model.blocks)]
    model(x, y).backward()
    for hook in hooks: hook.remove()
    return [out.grad.double() for out in reversed(outputs)]


def depth(exact, model, x, y):
    """(cosine, alignment) after each number of blocks, averaged over the batch's sequences"""
    dot = lambda a, b: (a * b).sum((1, 2))
    return [((dot(q, g) / (dot(q, q) * dot(g, g)).sqrt()).mean().item(), (dot(q, g) / dot(g, g)).mean().item())
            for q, g in zip(gradients(model, x, y), exact)]


def checkpoint(path, sequences=16):
    """the second table"""
    import quartet                                              # only in this file does the folder know the trainer
    state = quartet.load(path)
    axes = dict.fromkeys(quartet.fp4.AXES, "")
    plain = dict(precision="bf16", keep_first=0, keep_last=0, device="", steps=1, tokens=0, tokens_per_param=0, **axes)
    cfg = quartet.complete(quartet.Config(**state["config"] | plain))
    def model(**changes):
        model = quartet.build_model(dataclasses.replace(cfg, **changes), state["vocab"])
        model.load_state_dict(state["model"])
        return model
    val = quartet.tokens.open_tokens(quartet.prepare.files(state["data"])[1])
    x, y = quartet.to_device(quartet.tokens.batch(val, 0, sequences, cfg.seq, 0, state["vocab"]), cfg.device)
    exact = gradients(model(), x, y)
    print(f"\n{path}: cosine / alignment of the gradient after so many blocks")
    print(f"{'backward':20s}" + "".join(f"{k:>16d}" for k in range(1, len(exact))))
    for name, changes in BACKWARD.items():
        torch.manual_seed(0)
        after = depth(exact, model(precision="fp4-bwd", **changes), x, y)[1:]
        print(f"{name:20s}" + "".join(f"{cosine:8.3f} /{alignment:6.3f}" for cosine, alignment in after))


if __name__ == "__main__":
    print(f"{'format':8s}{'scale':12s}{'rounding':14s}{'error':>10s}{'misalignment':>15s}")
    for how in quantisers():
        torch.manual_seed(0)
        error, shrinkage = gaussian(how)
        rounding = how.rounding + ", 16 x 16" * (how.right == "square")
        print(f"{how.format:8s}{how.scale:12s}{rounding:18s}{error:8.5f}{shrinkage:13.5f}")
    if sys.argv[1:]:
        import quartet
        try: [checkpoint(path) for path in sys.argv[1:]]
        except (quartet.Stop, quartet.tokens.DataError, OSError) as error:
            print(f"fp4.error: {error}", file=sys.stderr)
            sys.exit(2)
