"""
Which precision is best for a given model size and number of tokens (paper section 4.2, Figure 1b and c).

Two budgets are fixed: one of inference, which pays for a model of N parameters in a reference precision, and one of
training, which pays for D tokens with it. A precision whose forward pass is fw times and whose training step is tr
times as fast affords fw N parameters and D tr/fw tokens. The best one has the lowest loss there, by its law.

Few tokens per parameter: data is what is missing, a faster backward pass buys it, and a larger model would starve.
Many: the larger model that an FP4 forward pass affords has time to learn.
"""
from typing import NamedTuple
import numpy as np
from scaling import fitting, law
from scaling.runs import check

#          parameters, training tokens
MODELS = {"Llama 3 70B": (70e9, 15e12), "Qwen2.5 72B": (72e9, 18e12), "Gemma 3 27B": (27e9, 14e12),
          "Gemma 3 12B": (12e9, 12e12), "Gemma 3 4B": (4e9, 4e12), "Gemma 3 1B": (1e9, 2e12)}


class Precision(NamedTuple):
    name: str                   # forward:backward
    forward: str                # whose times the forward pass has, and
    backward: str               # whose the backward pass
    fit: fitting.Fit                # its law; None if the runs do not tell it


def precisions(base, methods, speeds, forward, backward):
    """the paper's four. FP8 loses nothing in its model; where FP8 was not measured, BF16 takes its place"""
    wide = "fp8" if speeds.has("fp8") else "bf16"
    fit = lambda *how: fitting.compose(base, methods, *how)
    fp8 = wide == "fp8" and fit("fp8", "fp8") or base           # a sweep of one's own may have runs of it
    return [Precision(f"{wide.upper()}:{wide.upper()}", wide, wide, fp8),
            Precision(f"{wide.upper()}:FP4", wide, "fp4", fit("BF16", backward)),
            Precision(f"FP4:{wide.upper()}", "fp4", wide, fit(forward, "BF16")),
            Precision("FP4:FP4", "fp4", "fp4", fit(forward, backward))]


def known(table, forward, backward):
    """the rows whose law the runs tell"""
    found = [p for p in table if p.fit]
    check(len({id(p.fit) for p in found}) > 1,                  # FP8 without runs of its own has BF16's law
          f"no run tells what {forward} : {backward} loses, so there is nothing to compare; "
          "`python -m scaling fit` lists what the runs are of")
    return found


def faster(speeds, forward, backward, reference, N):
    """(forward, training): how many times as fast as the precision `reference`, for models of N parameters"""
    f0, b0 = speeds.at(reference, N)
    f, b = speeds.at(forward, N)[0], speeds.at(backward, N)[1]
    return f0 / f, (f0 + b0) / (f + b)


def losses(table, speeds, N, D, draws=False):
    """ln L of each precision at what the budgets (N, D) pay for: (precisions, runs), or (precisions, draws, runs)"""
    rows = []
    for p in table:
        fw, tr = faster(speeds, p.forward, p.backward, table[0].forward, N)
        rows.append(law.log_loss(p.fit.draws if draws else p.fit.theta, np.log(N * fw), np.log(D * tr / fw)))
    return np.array(rows)


def boundaries(table, speeds, N, ratios=np.geomspace(5, 5000, 1400)):
    """going up in tokens per parameter, yields (best precision, from which ratio on, low, high): 90 % of the draws"""
    N = np.full(len(ratios), float(N))
    best = losses(table, speeds, N, N * ratios).argmin(0)
    drawn = losses(table, speeds, N, N * ratios, draws=True).argmin(0)              # (draws, ratios)
    for i in np.flatnonzero(np.diff(best, prepend=-1)):
        from_ = np.where(drawn == best[i], ratios, np.inf).min(1)                   # inf: never in this draw
        yield table[best[i]].name, ratios[i], *np.quantile(from_, (.05, .95), method="nearest")
