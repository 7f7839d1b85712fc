"""
What each quantiser does to numbers, without training anything.

    python -m tools.quant_error                     # error and shrinkage of every quantiser
    python -m tools.quant_error out/NAME/ckpt.pt    # and how gradients of that model decay

The first table measures what Table 2 of arXiv 2505.14669v4 does: the relative squared error on
Gaussian numbers, averaged over an octave of their standard deviation, because a power-of-two scale
treats each deviation differently; and the misalignment 1 - <q, v> / <v, v>, which is what a product
shrinks by, on average. An unbiased quantiser has none. Where the paper prints 1.32e-2 and 1.3e-2
for QuEST, that is the rule "nearest"; the published code and the row fp4 have the rule "floor",
whose error and misalignment are 2.2e-2 and 5.1e-2. The other rows of the paper agree.

The second table shows how the error of a biased quantiser adds up from layer to layer. For one
batch, the forward pass is unquantised and the backward pass is quantised. The gradient q that
arrives at each depth is compared with the exact one, g, by its cosine and its alignment
<q, g> / <g, g>.
"""
import dataclasses
import sys

from data.files import check
from fp4.axes import AXES, validate
from fp4.recipes import SCALE_RULES, GemmSpec
from tools import cli

ROUNDINGS = ("nearest", "stochastic", "eden")
SEQUENCES = 16                          # in the batch of the second table

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
    from fp4.emulate.columns import pad_to_blocks, rotate_for
    from fp4.emulate.matmul import Operand, quantize_operands

    error = 0.
    misalignment = 0.
    for i in range(n_sigmas):
        v = torch.randn(rows, columns) * 2 ** ((i + .5) / n_sigmas)
        operand = Operand(v, spec, square=spec.rhs == "square_blocks")
        (quantized,), signs = quantize_operands(v, v, [operand])
        rotated = rotate_for(pad_to_blocks(v, spec), spec, signs).double()
        values = quantized.unpacked(v.dtype)
        q = (values * quantized.factor).double()
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


def print_decay(path, sequences=SEQUENCES):
    """Prints the second table for the model of a checkpoint.

    Raises UserError or OSError if it, or the corpus that it was trained on, cannot be read.
    """
    import torch
    import quartet
    from tools import checkpoint

    state, cfg, (x, y) = open_checkpoint(path, sequences)
    vocab_size = state["corpus"]["identity"]["vocab_size"]

    def load_model(**changes):
        model = quartet.build_model(dataclasses.replace(cfg, **changes), vocab_size)
        checkpoint.restore_model(state, model)
        return model

    exact = gradients(load_model(), x, y)
    print(f"\n{path}: cosine / alignment of the gradient after so many blocks")
    print_row("backward", [f"{depth:>16d}" for depth in range(1, len(exact))])
    for name, changes in BACKWARD.items():
        torch.manual_seed(0)
        model = load_model(precision="fp4-bwd", **changes)
        after_blocks = agreement_by_depth(exact, model, x, y)[1:]
        print_row(name, [f"{cosine:8.3f} /{aligned:6.3f}" for cosine, aligned in after_blocks])


def open_checkpoint(path, sequences):
    """Returns a checkpoint, its settings with nothing quantised, and a batch to measure with.

    Raises what print_decay() raises.
    """
    from fp4.post_step import without_state
    from tools import checkpoint
    state = checkpoint.read(path)
    state["model"] = without_state(state["model"])
    cfg = unquantized_settings(state["config"])
    return state, cfg, validation_batch(state["corpus"], cfg, sequences)


def unquantized_settings(config):
    """Returns the settings of a run, resolved again for this machine, with nothing quantised."""
    import quartet
    unquantized = dict(precision="bf16", switch=None, keep_first=0, keep_last=0, gemm="auto")
    changes = unquantized | dict.fromkeys(AXES)
    return quartet.settings_of(dict(config=config | changes), quartet.Settings())


def validation_batch(trained_on, cfg, sequences):
    """Returns inputs and targets [sequences, seq] of a batch that the run was evaluated on.

    trained_on says which corpus that was. Raises UserError if it is another one by now.
    """
    import quartet
    from data import tokens
    from data.corpus import open_corpus
    corpus = open_corpus(trained_on["folder"])
    check(corpus.identity == trained_on["identity"],
          f"the model was trained on another corpus than the one in {corpus.folder} by now")
    batch = tokens.batch(corpus.val, 0, sequences, cfg.seq, 0)
    return quartet.to_device(batch, cfg.device)


def print_row(name, cells):
    print(f"{name:20s}" + "".join(cells))


# ---- the command line

def parse(argv):
    parser = cli.Parser("python -m tools.quant_error", __doc__)
    parser.add_argument("checkpoints", nargs="*", metavar="CKPT", help="a checkpoint of quartet.py")
    return parser.parse_args(argv)


def main(argv):
    args = parse(argv)
    for path in args.checkpoints:
        open_checkpoint(path, SEQUENCES)    # A wrong path is said now, not after a minute.
    print_errors()
    for path in args.checkpoints:
        print_decay(path)


if __name__ == "__main__":
    cli.start(parse, "quant_error", "tools.quant_error")
    sys.exit(cli.run(main, sys.argv[1:], "quant_error", go_on=""))
