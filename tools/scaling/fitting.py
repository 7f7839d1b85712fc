"""
The law fitted to runs, how certain the fit is, and what it predicts.

Two stages, as in the paper: the six coefficients of the base law on BF16 runs; then, with these fixed, eff_N on runs
with only the forward pass quantised, eff_D on those with only the backward pass. A method that quantises both is
composed of the two, or fitted as a pair if it was only run whole. What is minimised is Huber's loss of the error of
ln L with delta = 1e-4: far below the errors, so nearly their absolute value; an odd run has no more weight than others.

The points of a fit are (n, d, y) = ln N, ln D, ln L of the runs of one method, an array each.

How certain: every fit is repeated on losses drawn around the fitted law with the spread of the residuals. That spread
is itself known from few residuals only, so each draw has its own (chi-squared). All 90 % intervals come from the draws.
What the law itself gets wrong outside the runs they do not know: held_out measures that.

No scipy: twenty lines of Levenberg-Marquardt in numpy run all starts and all draws at once, which is what makes the
intervals cheap, and find the optimum that the authors printed to all its digits.
"""
from typing import NamedTuple
import numpy as np
from scaling.law import BF16, log_loss, slopes
from scaling.runs import check

BASE, EFF_N, EFF_D, EFF = [0, 1, 2, 3, 4, 5], [6], [7], [6, 7]                          # what of theta a fit may change
DELTA, DRAWS = 1e-4, 400
STARTS = np.stack(np.meshgrid([5, 10], [.3, .6], [5, 10], [.3, .6], [0, .5], [.3, .6], [0], [0]), -1).reshape(-1, 8)


class Fit(NamedTuple):
    theta: np.ndarray           # (8,) the best fit
    draws: np.ndarray           # (DRAWS, 8) fits to redrawn losses: what else it could be
    spread: np.ndarray          # (DRAWS,) standard deviation of one run's ln L around each


def huber(r):
    """r^2/2 near zero, delta |r| beyond: summed over the runs"""
    return np.where(abs(r) <= DELTA, r * r / 2, DELTA * (abs(r) - DELTA / 2)).sum(-1)


def minimise(theta, free, n, d, y, steps):
    """Levenberg-Marquardt from many starts theta (S, 8) at once, y = ln L (runs) or (S, runs); -> theta, cost (S,)"""
    theta, damping = np.array(theta, float), np.full(len(theta), 1e-3)
    r = log_loss(theta, n, d) - y
    cost = huber(r)
    with np.errstate(all="ignore"):                             # a step may overflow; it is then not taken
        for _ in range(steps):
            J = slopes(theta, n, d)[..., free]
            weight = DELTA / np.maximum(abs(r), DELTA)          # Huber = least squares with these weights
            gradient = np.einsum("sri,sr->si", J, weight * r)
            H = np.einsum("sri,sr,srj->sij", J, weight, J)
            diagonal = np.einsum("sii->si", H)
            H += (damping[:, None] * diagonal + 1e-30)[:, :, None] * np.eye(len(free))
            new = theta.copy()
            new[:, free] -= np.linalg.solve(H, gradient[..., None])[..., 0]
            new_r = log_loss(new, n, d) - y
            better = huber(new_r) < cost
            theta[better], r[better] = new[better], new_r[better]
            cost = huber(r)
            damping = np.clip(np.where(better, damping / 3, damping * 4), 1e-12, 1e12)
    return theta, cost


def best(starts, free, points):
    """the lowest optimum; a short run from all starts, a long one from the four best"""
    theta, cost = minimise(starts, free, *points, 60)
    theta, cost = minimise(theta[cost.argsort()[:4]], free, *points, 300)
    return theta[cost.argmin()]


def redraw(theta, around, free, points, seed):
    """theta with its uncertainty; the coefficients that are not free are drawn already, in around (DRAWS, 8)"""
    n, d, y = points
    draw, r, dof = np.random.default_rng(seed), y - log_loss(theta, n, d), len(y) - len(free)
    spread = np.sqrt(r @ r / draw.chisquare(dof, len(around)))  # sqrt(r.r / dof), times its own uncertainty
    redrawn = log_loss(theta, n, d) + spread[:, None] * draw.standard_normal((len(around), len(y)))
    starts = around.copy()
    starts[:, free] = theta[free]
    return Fit(theta, minimise(starts, free, n, d, redrawn, 100)[0], spread)


def fit_base(points, draws=DRAWS):
    """the six coefficients, from BF16 runs (ln N, ln D, ln L)"""
    n, d, y = points
    check(len(y) > len(BASE), f"the law has {len(BASE)} coefficients and needs at least {len(BASE) + 1} BF16 runs, "
                              f"got {len(y)}")
    for what, x in ("model sizes", n), ("numbers of tokens", d):
        check(len(set(x)) > 2, f"the law needs BF16 runs of at least three {what}, got {len(set(x))}")
    theta = best(STARTS, BASE, points)
    return redraw(theta, np.repeat(theta[None], draws, 0), BASE, points, 0)


def nowhere(fit, i, n, d):
    """whether coefficient i is one of A / N^alpha or B / D^beta and no run needs that term: without it none moves by more than noise"""
    without = np.where(np.arange(8) == i // 2 * 2, -np.inf, fit.theta)
    return i < 4 and abs(log_loss(without, n, d) - log_loss(fit.theta, n, d)).max() <= 3 * np.median(fit.spread)


def fit_method(base, free, points, seed):
    """eff_N, eff_D or both, from the runs of one method, on top of a base law"""
    starts = np.repeat(base.theta[None], 4, 0)
    starts[:, free] = np.log([[1], [.5], [.1], [.01]])
    return redraw(best(starts, free, points), base.draws, free, points, seed)


def fit_all(runs):
    """runs = {(forward, backward): points} -> base law, {method: Fit}, sentences on what could not be fitted"""
    check(BF16 in runs, "there is no run with forward and backward BF16, and the base law is fitted on those")
    base, methods, left_out = fit_base(runs[BF16]), {}, []
    for seed, (method, points) in enumerate(runs.items(), 1):   # no two fits share their noise
        if method == BF16: continue
        free = EFF_N if method[1] == "BF16" else EFF_D if method[0] == "BF16" else EFF
        if len(points[0]) > len(free) + 1: methods[method] = fit_method(base, free, points, seed)
        else: left_out.append(f"{' : '.join(method)}: too few runs ({len(points[0])}) for an interval")
    return base, methods, left_out


def compose(base, methods, forward, backward):
    """the law of one precision: eff_N of its forward, eff_D of its backward pass; None if the runs do not tell them"""
    alone = {("BF16", "BF16"): base, **methods}
    if (forward, "BF16") in alone and ("BF16", backward) in alone:
        a, b = alone[forward, "BF16"], alone["BF16", backward]
        join = lambda x, y: np.concatenate((x[..., :7], y[..., 7:]), -1)
        return Fit(join(a.theta, b.theta), join(a.draws, b.draws), base.spread)
    whole = methods.get((forward, backward))
    return whole and whole._replace(spread=base.spread)


def predict(fit, n, d):
    """the loss of one more run at each (n, d) and its 90 % interval"""
    noise = np.random.default_rng(10 ** 6).standard_normal((len(fit.spread), len(n)))
    low, high = np.quantile(log_loss(fit.draws, n, d) + fit.spread[:, None] * noise, (.05, .95), axis=0)
    return np.exp(log_loss(fit.theta, n, d)), np.exp(low), np.exp(high)


def held_out(points):
    """how well the law predicts runs that it was not fitted on: each run left out alone, and those of up to twice the
    tokens or the size of the rest; yields (kind, number fitted, E of the fit, N, D, measured, predicted, low, high)"""
    n, d, y = points
    splits = [("one left out", np.arange(len(n)) != i, np.arange(len(n)) == i) for i in range(len(n))]
    for kind, x, reach in ("twice the tokens", d, 2.05), ("twice the size", n, 2.25):       # sizes: steps of 1.6 to 2.2
        splits += [(kind, x <= most, (x > most) & (x <= most + np.log(reach))) for most in sorted(set(x))]
    for kind, fitted, asked in splits:
        some = n[fitted], d[fitted], y[fitted]
        if not asked.any() or len(some[0]) < len(BASE) + 2 or min(len(set(x)) for x in some[:2]) < 3: continue
        fit = fit_base(some, 200)
        for row in zip(np.exp(n[asked]), np.exp(d[asked]), np.exp(y[asked]), *predict(fit, n[asked], d[asked])):
            yield kind, len(some[0]), np.exp(fit.theta[4]), *row
