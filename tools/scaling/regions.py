"""
Finds the best precision for a model size and a number of tokens (paper section 4.2, Figure 1b, c).

Two budgets are fixed: one of inference, which pays for a model of N parameters in a reference
precision, and one of training, which pays for training that model on D tokens. A precision whose
forward pass is fw times as fast, and whose training step is tr times as fast, affords more for the
same money: fw N parameters and D tr/fw tokens. It also loses something, which its law tells. The
best precision is the one with the lowest loss at what it affords.

With few tokens per parameter, data is what is missing: a faster backward pass buys it, and a larger
model would starve. With many, the larger model that an FP4 forward pass affords has time to learn.
That is by counting bits: on the measured RTX 5090, whose FP4 backward pass is no faster than FP8's
up to 7B, the larger model is trained in FP4 forward and FP8 backward.
"""
from typing import NamedTuple

import numpy as np

from data.files import check
from tools.scaling import fitting, law

MODELS = {                              # parameters, training tokens
    "Llama 3 70B": (70e9, 15e12),
    "Qwen2.5 72B": (72e9, 18e12),
    "Gemma 3 27B": (27e9, 14e12),
    "Gemma 3 12B": (12e9, 12e12),
    "Gemma 3 4B": (4e9, 4e12),
    "Gemma 3 1B": (1e9, 2e12),
}
RATIOS = np.geomspace(5, 5000, 1400)    # tokens per parameter, among which boundaries are sought


class Precision(NamedTuple):
    """A row of the comparison: how fast a precision is, and what it loses."""
    name: str                           # forward:backward
    forward: str                        # the row of speeds.py whose times the forward pass has
    backward: str                       # the same for the backward pass
    fit: fitting.Fit                    # its law; None if the runs do not tell it


def four_precisions(base, methods, speeds, forward, backward):
    """
    Lists the paper's four: 8 or 4 bits forward, 8 or 4 bits backward.

    FP4 is the method `forward` in the forward pass and `backward` in the backward pass. FP8 loses
    nothing in the paper's model, unless these runs have some in fp8. Where the speed of FP8 was
    not measured, BF16 takes its place.
    """
    if speeds.has("fp8"):
        wide = "fp8"
        wide_fit = fitting.compose(base, methods, "fp8", "fp8") or base
    else:
        wide = "bf16"
        wide_fit = base
    label = wide.upper()
    both_fit = fitting.compose(base, methods, forward, backward)
    forward_fit = fitting.compose(base, methods, forward, "BF16")
    backward_fit = fitting.compose(base, methods, "BF16", backward)
    return [
        Precision(f"{label}:{label}", wide, wide, wide_fit),
        Precision(f"{label}:FP4", wide, "fp4", backward_fit),
        Precision(f"FP4:{label}", "fp4", wide, forward_fit),
        Precision("FP4:FP4", "fp4", "fp4", both_fit),
    ]


def with_known_law(precisions, forward, backward):
    """Keeps the rows whose law the runs tell. Raises UserError if nothing is left to compare."""
    known = [precision for precision in precisions if precision.fit]
    # FP8 without runs of its own has the very law of BF16, so the laws are what must differ.
    laws = {id(precision.fit) for precision in known}
    check(len(laws) > 1,
          f"no run tells what {forward} : {backward} loses, so there is nothing to compare; "
          "`python -m tools.scaling fit` lists what the runs are of")
    return known


def speedups(speeds, forward, backward, reference, N):
    """
    Returns (fw, tr): how many times as fast as the precision `reference` the forward pass and the
    training step are, for models of N parameters.
    """
    reference_forward, reference_backward = speeds.at(reference, N)
    forward_time, _ = speeds.at(forward, N)
    _, backward_time = speeds.at(backward, N)
    reference_step = reference_forward + reference_backward
    return reference_forward / forward_time, reference_step / (forward_time + backward_time)


def log_losses(precisions, speeds, N, D, draws=False):
    """
    Computes ln L of each precision at what the budgets pay for, by the first one's speed.

    N and D are arrays (runs,). Returns (precisions, runs), or with draws (precisions, draws, runs).
    """
    reference = precisions[0].forward
    rows = []
    for precision in precisions:
        fw, tr = speedups(speeds, precision.forward, precision.backward, reference, N)
        theta = precision.fit.draws if draws else precision.fit.theta
        rows.append(law.log_loss(theta, np.log(N * fw), np.log(D * tr / fw)))
    return np.array(rows)


def boundaries(precisions, speeds, N):
    """
    Yields the best precisions for a model of N parameters, as tokens per parameter rise.

    Each comes as (name, ratio from which on it is the best, low, high). 90 % of the law's draws lie
    between low and high; inf means that it is never the best in a draw.
    """
    N = np.full(len(RATIOS), float(N))
    D = N * RATIOS
    best = log_losses(precisions, speeds, N, D).argmin(0)                       # (ratios,)
    best_drawn = log_losses(precisions, speeds, N, D, draws=True).argmin(0)     # (draws, ratios)
    for i in np.flatnonzero(np.diff(best, prepend=-1)):
        first_ratio = np.where(best_drawn == best[i], RATIOS, np.inf).min(1)
        low, high = np.quantile(first_ratio, (.05, .95), method="nearest")
        yield precisions[best[i]].name, RATIOS[i], low, high
