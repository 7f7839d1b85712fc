"""
What each quantiser does to numbers, without training anything.

    python -m tools.quant_error                     # the paper's Table 2, for every quantiser
    python -m tools.quant_error out/NAME/ckpt.pt    # and how gradients of that model decay

The first table is Table 2 of arXiv 2505.14669v4: the relative squared error on Gaussian numbers,
averaged over an octave of their standard deviation, because a power-of-two scale treats each
deviation differently; and the misalignment 1 - <q, v> / <v, v>, which is what a product shrinks by,
on average. An unbiased quantiser has none.

The second table shows how the error of a biased quantiser adds up from layer to layer. For one
batch, the forward pass is unquantised and the backward pass is quantised. The gradient q that
arrives at each depth is compared with the exact one, g, by its cosine and its alignment
<q, g> / <g, g>.
"""
import argparse
import dataclasses
import sys

from data.files import UserError
from fp4.recipes import AXES, SCALE_RULES, GemmSpec, validate

ROUNDINGS = ("nearest", "stochastic", "eden")

# Changes to the row fp4-bwd, for the second table. Three values are for forward, dgrad and wgrad.
BACKWARD = {
    "stochastic": {"rounding": "stochastic"},
    "nearest": {},
    "QuEST": {"scale": "floor:floor:floor"},
    "nearest, PMA": {"scale": "pma:pma:pma"},
    "nearest, EDEN": {"rounding": "eden"},
}


# ---- the first table

def quantizers():
    """Yields every valid combination of format, scale rule and rounding, and NVFP4's squares."""
    for element_format, rules in SCALE_RULES.items():
        for scale in rules:
            for rounding in ROUNDINGS:
                spec = GemmSpec(element_format, scale, 128, "before", rounding)
                if not is_valid(spec):
                    continue
                yield spec
                if element_format == "nvfp4" and rounding == "nearest":
                    yield spec._replace(rhs="square_blocks")


def is_valid(spec):
    try:
        validate("", spec)
    except ValueError:
        return False
    return True


def gaussian_error(spec, n_sigmas=16, rows=512, columns=1024):
    """Returns the relative squared error and the misalignment of a GemmSpec.

    Both are means over n_sigmas standard deviations, which are spread over one octave.
    """
    import torch                    # here, so that --help answers without it
    from fp4.emulate.matmul import Operand, pad_to_blocks, quantize_operands, rotate_for

    error = 0.
    misalignment = 0.
    for i in range(n_sigmas):
        v = torch.randn(rows, columns) * 2 ** ((i + .5) / n_sigmas)
        operand = Operand(v, spec, square=spec.rhs == "square_blocks")
        (quantized,), signs = quantize_operands(v, v, [operand])
        rotated = rotate_for(pad_to_blocks(v, spec), spec, signs).double()
        q = (quantized.values * quantized.factor).double()
        size = rotated.square().sum()
        error += (q - rotated).square().sum() / size
        misalignment += 1 - (q * rotated).sum() / size
    return error.item() / n_sigmas, misalignment.item() / n_sigmas


def print_errors():
    import torch
    print(f"{'format':8s}{'scale':12s}{'rounding':14s}{'error':>10s}{'misalignment':>15s}")
    for spec in quantizers():
        torch.manual_seed(0)
        error, misalignment = gaussian_error(spec)
        rounding = spec.rounding
        if spec.rhs == "square_blocks":
            rounding += ", 16 x 16"
        print(f"{spec.format:8s}{spec.scale:12s}{rounding:18s}{error:8.5f}{misalignment:13.5f}")


# ---- the second table

def gradients(model, x, y):
    """Returns the gradients [B, T, C] of the loss by each block's output, last first, and by the
    embedding."""
    outputs = []

    def keep_gradient(module, inputs, output):
        output.retain_grad()
        outputs.append(output)

    hooks = []
    for module in (model.embed, *model.blocks):
        hooks.append(module.register_forward_hook(keep_gradient))
    model(x, y).backward()
    for hook in hooks:
        hook.remove()
    return [output.grad.double() for output in reversed(outputs)]


def agreement_by_depth(exact, model, x, y):
    """Returns (cosine, alignment) after each number of blocks, a mean over the sequences."""
    results = []
    for q, g in zip(gradients(model, x, y), exact):
        cosine = dot(q, g) / (dot(q, q) * dot(g, g)).sqrt()
        alignment = dot(q, g) / dot(g, g)
        results.append((cosine.mean().item(), alignment.mean().item()))
    return results


def dot(a, b): return (a * b).sum((1, 2))


def print_decay(path, sequences=16):
    """Prints the second table for the model of a checkpoint.

    Raises UserError or OSError if it, or the corpus that it was trained on, cannot be read.
    """
    import torch
    import quartet
    from tools import run

    state = run.load_checkpoint(path)
    cfg = unquantized_settings(state["config"])
    x, y = validation_batch(state, cfg, sequences)

    def load_model(**changes):
        model = quartet.build_model(dataclasses.replace(cfg, **changes), state["vocab"])
        model.load_state_dict(state["model"])
        return model

    exact = gradients(load_model(), x, y)
    print(f"\n{path}: cosine / alignment of the gradient after so many blocks")
    print_row("backward", [f"{depth:>16d}" for depth in range(1, len(exact))])
    for name, changes in BACKWARD.items():
        torch.manual_seed(0)
        model = load_model(precision="fp4-bwd", **changes)
        after_blocks = agreement_by_depth(exact, model, x, y)[1:]
        print_row(name, [f"{cosine:8.3f} /{aligned:6.3f}" for cosine, aligned in after_blocks])


def unquantized_settings(config):
    """Returns the settings of a run, resolved again for this machine, with nothing quantised."""
    import quartet
    changes = {
        "precision": "bf16",
        "keep_first": 0,
        "keep_last": 0,
        "device": "",
        "steps": 1,
        "tokens": 0,
        "tokens_per_param": 0,
        **dict.fromkeys(AXES, ""),
    }
    return quartet.resolve(quartet.Settings(**(config | changes)))


def validation_batch(state, cfg, sequences):
    """Returns inputs and targets [sequences, seq] of a batch that the run was evaluated on."""
    import quartet
    from data import prepare, tokens
    _, val_pattern = prepare.files(state["data"])
    shards = tokens.open_tokens(val_pattern)
    batch = tokens.batch(shards, 0, sequences, cfg.seq, 0, state["vocab"])
    return quartet.to_device(batch, cfg.device)


def print_row(name, cells):
    print(f"{name:20s}" + "".join(cells))


def main(argv):
    summary, _, details = __doc__.strip().partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m tools.quant_error", description=summary, epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="*", metavar="CKPT", help="a checkpoint of quartet.py")
    args = parser.parse_args(argv)
    print_errors()
    try:
        for path in args.checkpoints:
            print_decay(path)
    except (UserError, OSError) as error:
        print(f"tools.quant_error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
