"""
Fits the law of law.py to runs, and says how certain the fit is and what it predicts.

The fit has two stages, as in the paper. First come the six coefficients of the base law, A to
gamma, from runs in BF16. With these fixed, eff_N comes from runs with only the forward pass
quantised, and eff_D from runs with only the backward pass quantised. The law of a method that
quantises both is composed of the two, or fitted as a pair if the method was only ever run whole.

What is minimised is Huber's loss of the error of ln L. Huber's loss is quadratic near zero and
linear beyond delta; with delta = 1e-4, far below the errors, it is nearly their absolute value, so
that an odd run has no more weight than the others.

How certain a fit is: every fit is repeated on losses that are drawn around the fitted law with the
standard deviation of the residuals. Few residuals do not tell that deviation precisely, so each
draw has a deviation of its own (chi-squared). All 90 % intervals come from these draws. They do
not know what the law itself gets wrong outside the runs; held_out measures that.

There is no scipy here. Twenty lines of Levenberg-Marquardt in numpy run all starts and all draws
at once, which is what makes the intervals cheap, and they find the optimum that the authors
printed to all its digits.

The points of a fit are (n, d, y) = (ln N, ln D, ln L) of the runs of one method, an array each.
"""
from typing import NamedTuple

import numpy as np

from data.files import check
from tools.scaling.law import BF16, LN_E, jacobian, log_loss

# Which entries of theta a fit may change.
BASE = [0, 1, 2, 3, 4, 5]
EFF_N = [6]
EFF_D = [7]
EFF = [6, 7]

DELTA = 1e-4                            # Huber's
MAX_DAMPING = 1e12                      # of Levenberg-Marquardt
DRAWS = 400
#                             ln A     alpha     ln B     beta     ln E     gamma    eff_N eff_D
START_GRID = np.meshgrid([5, 10], [.3, .6], [5, 10], [.3, .6], [0, .5], [.3, .6], [0], [0])
STARTS = np.stack(START_GRID, -1).reshape(-1, 8)
EFF_STARTS = [1, .5, .1, .01]


class Fit(NamedTuple):
    """A law and its uncertainty."""
    theta: np.ndarray           # (8,) the best fit
    draws: np.ndarray           # (DRAWS, 8) fits to redrawn losses: what else theta could be
    residual_std: np.ndarray    # (DRAWS,) standard deviation of one run's ln L around each draw


class HeldOut(NamedTuple):
    """A run that was predicted by a fit to other runs."""
    kind: str                   # how the runs of the fit were chosen
    fitted: int                 # how many runs the fit had
    E: float                    # what the fit found for E
    N: float
    D: float
    measured: float             # the loss
    predicted: float
    low: float                  # the 90 % interval of the prediction
    high: float


# ---- the optimiser

def huber(residual):
    """Computes Huber's loss, summed over the runs: r^2 / 2 near zero, DELTA |r| beyond."""
    size = abs(residual)
    quadratic = residual * residual / 2
    linear = DELTA * (size - DELTA / 2)
    return np.where(size <= DELTA, quadratic, linear).sum(-1)


def minimise(theta, free, points, steps):
    """
    Minimises Huber's loss from many starts at once, by Levenberg-Marquardt.

    theta (S, 8) has the starts; only its entries `free` change. In points = (n, d, y), y is
    (runs,), or (S, runs) when each start has losses of its own. Returns theta and its cost (S,).
    """
    n, d, y = points
    theta = np.array(theta, float)
    damping = np.full(len(theta), 1e-3)
    residual = log_loss(theta, n, d) - y
    cost = huber(residual)
    with np.errstate(all="ignore"):     # A step may overflow; it is then not taken.
        for _ in range(steps):
            new = theta.copy()
            new[:, free] -= damped_step(theta, free, n, d, residual, damping)
            new_residual = log_loss(new, n, d) - y
            better = huber(new_residual) < cost
            if np.all(~better & (damping == MAX_DAMPING)):
                break                   # Every further step would be this one again.
            theta[better] = new[better]
            residual[better] = new_residual[better]
            cost = huber(residual)
            damping = np.where(better, damping / 3, damping * 4)
            damping = np.clip(damping, 1 / MAX_DAMPING, MAX_DAMPING)
    return theta, cost


def damped_step(theta, free, n, d, residual, damping):
    """Solves the damped normal equations: what to subtract from theta[:, free], (S, free)."""
    J = jacobian(theta, n, d)[..., free]
    # Huber's loss is a sum of squares with these weights.
    weight = DELTA / np.maximum(abs(residual), DELTA)
    gradient = np.einsum("sri,sr->si", J, weight * residual)
    hessian = np.einsum("sri,sr,srj->sij", J, weight, J)
    diagonal = np.einsum("sii->si", hessian)
    ridge = damping[:, None] * diagonal + 1e-30
    hessian += ridge[:, :, None] * np.eye(len(free))
    return np.linalg.solve(hessian, gradient[..., None])[..., 0]


def fit_best(starts, free, points):
    """Returns the lowest optimum: a short run from all starts, a long one from the four best."""
    theta, cost = minimise(starts, free, points, 60)
    theta, cost = minimise(theta[cost.argsort()[:4]], free, points, 300)
    return theta[cost.argmin()]


# ---- fits with their uncertainty

def with_draws(theta, base_draws, free, points, seed):
    """
    Repeats a fit on redrawn losses, and returns theta with these draws as a Fit.

    The coefficients that are not free are uncertain too: base_draws (DRAWS, 8) has them drawn.
    """
    n, d, y = points
    degrees_of_freedom = len(y) - len(free)
    fitted = log_loss(theta, n, d)
    redrawn, residual_std = redraw(fitted, y, degrees_of_freedom, len(base_draws), seed)
    starts = base_draws.copy()
    starts[:, free] = theta[free]
    draws, _ = minimise(starts, free, (n, d, redrawn), 100)
    return Fit(theta, draws, residual_std)


def redraw(fitted, y, degrees_of_freedom, draws, seed):
    """Draws losses around the fitted ones: (draws, runs), and the deviation of each draw."""
    random = np.random.default_rng(seed)
    residual = y - fitted
    # sqrt(r.r / degrees_of_freedom), times the uncertainty of that number itself.
    residual_std = np.sqrt(residual @ residual / random.chisquare(degrees_of_freedom, draws))
    noise = random.standard_normal((draws, len(y)))
    return fitted + residual_std[:, None] * noise, residual_std


def fit_base(points, draws=DRAWS):
    """Fits the six coefficients of the base law to BF16 runs. Raises UserError on too few."""
    n, d, y = points
    check(len(y) > len(BASE),
          f"the law has {len(BASE)} coefficients and needs at least {len(BASE) + 1} BF16 runs, "
          f"got {len(y)}")
    for description, values in (("model sizes", n), ("numbers of tokens", d)):
        count = len(set(values))
        check(count > 2,
              f"the law needs BF16 runs of at least three {description}, got {count}")
    theta = fit_best(STARTS, BASE, points)
    return with_draws(theta, np.repeat(theta[None], draws, 0), BASE, points, 0)


def fit_method(base, free, points, seed):
    """Fits eff_N, eff_D or both to the runs of one method, on top of a base law."""
    starts = np.repeat(base.theta[None], len(EFF_STARTS), 0)
    starts[:, free] = np.log(EFF_STARTS)[:, None]
    return with_draws(fit_best(starts, free, points), base.draws, free, points, seed)


def fit_all(runs):
    """
    Fits everything that runs = {(forward, backward): points} tell.

    Returns the base law, {method: Fit}, and sentences on the methods that could not be fitted.
    """
    check(BF16 in runs,
          "there is no run with forward and backward BF16, and the base law is fitted on those")
    base = fit_base(runs[BF16])
    methods = {}
    unfitted = []
    for seed, (method, points) in enumerate(runs.items(), 1):   # No two fits share their noise.
        if method == BF16:
            continue
        free = free_efficiencies(*method)
        count = len(points[0])
        if count > len(free) + 1:
            methods[method] = fit_method(base, free, points, seed)
        else:
            unfitted.append(f"{' : '.join(method)}: too few runs ({count}) for an interval")
    return base, methods, unfitted


def free_efficiencies(forward, backward):
    """Says which of eff_N and eff_D the runs of a method tell: BF16's is 1 and is not fitted."""
    if backward == "BF16":
        return EFF_N
    if forward == "BF16":
        return EFF_D
    return EFF


def term_not_identified(fit, i, n, d):
    """
    Says whether coefficient i belongs to a term of the law that these runs do not need.

    Without such a term, A / N^alpha or B / D^beta, the law moves at none of the runs by more than
    the noise does. Its coefficients can then be anything.
    """
    if i >= 4:                          # E and gamma belong to no single term
        return False
    amplitude = i // 2 * 2              # the index of ln A or of ln B
    without = np.where(np.arange(8) == amplitude, -np.inf, fit.theta)
    change = abs(log_loss(without, n, d) - log_loss(fit.theta, n, d))
    return change.max() <= 3 * np.median(fit.residual_std)


# ---- what a fit predicts

def compose(base, methods, forward, backward):
    """
    Composes the law of one precision: eff_N of its forward pass, eff_D of its backward pass.

    Where the two passes were not run apart, the law is that of the runs of the pair. Returns None
    if there are no such runs either.
    """
    known = {BF16: base, **methods}
    forward_fit = known.get((forward, "BF16"))
    backward_fit = known.get(("BF16", backward))
    if forward_fit and backward_fit:
        theta = join(forward_fit.theta, backward_fit.theta)
        draws = join(forward_fit.draws, backward_fit.draws)
        return Fit(theta, draws, base.residual_std)
    pair = methods.get((forward, backward))
    if pair is None:
        return None
    return pair._replace(residual_std=base.residual_std)


def join(forward_theta, backward_theta):
    """Takes eff_D from backward_theta and all else from forward_theta."""
    return np.concatenate((forward_theta[..., :7], backward_theta[..., 7:]), -1)


def predict(fit, n, d):
    """Predicts the loss of one more run at each (n, d): the loss, and its 90 % interval."""
    random = np.random.default_rng(10 ** 6)
    noise = random.standard_normal((len(fit.residual_std), len(n)))
    drawn = log_loss(fit.draws, n, d) + fit.residual_std[:, None] * noise
    low, high = np.quantile(drawn, (.05, .95), axis=0)
    return np.exp(log_loss(fit.theta, n, d)), np.exp(low), np.exp(high)


def held_out(points, draws=200):
    """
    Measures how well the law predicts runs that it was not fitted to: yields a HeldOut for each.

    Each run is left out alone once; then those runs are left out that have up to twice the tokens,
    or up to twice the size, of all the rest. `draws` is how many make an interval.
    """
    for kind, is_fitted, is_left_out in splits(*points):
        fitted = select(points, is_fitted)
        left_out = select(points, is_left_out)
        n, d, _ = fitted
        distinct = min(len(set(n)), len(set(d)))
        if not is_left_out.any() or len(n) < len(BASE) + 2 or distinct < 3:
            continue
        fit = fit_base(fitted, draws)
        E = np.exp(fit.theta[LN_E])
        N_D_and_measured = np.exp(left_out)
        predictions = predict(fit, *left_out[:2])
        for row in zip(*N_D_and_measured, *predictions):
            yield HeldOut(kind, len(n), E, *row)


def select(points, is_selected):
    """Takes some of the runs: is_selected is a boolean, or an index, for each."""
    n, d, y = points
    return n[is_selected], d[is_selected], y[is_selected]


def splits(n, d, y):
    """Yields (kind, is_fitted, is_left_out), the last two a boolean for each run."""
    index = np.arange(len(n))
    for i in index:
        yield "one left out", index != i, index == i
    # The authors' sizes lie a factor of 1.6 to 2.2 apart.
    for kind, values, reach in (("twice the tokens", d, 2.05), ("twice the size", n, 2.25)):
        for most in sorted(set(values)):
            is_larger = values > most
            yield kind, values <= most, is_larger & (values <= most + np.log(reach))
