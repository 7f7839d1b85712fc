"""
Fits the law of law.py to runs, and says how certain the fit is and what it predicts.

The fit has two stages, as in the paper. First come the six coefficients of the base law, A to
gamma, from runs in BF16. With these fixed, a method's own coefficients come from its runs. A Form
says which these are:

    PAPER       eff_N of a quantised forward pass, eff_D of a quantised backward pass
    LASTING     eff_N with its tilt and delta of a forward pass, delta of a backward pass; fitted
                to gaps, to the BF16 run of the same size and tokens

The law of a method that quantises both passes is composed of its two halves where these were run
apart: eff_N of one, eff_D of the other, both deltas. Only where they were not, it is fitted to the
runs of the pair. No coefficient may say that quantising helps (an efficiency above 1, a delta below
0): such a value is refused, the coefficient stays BF16's, and the others are fitted again.

What is minimised is Huber's loss of the error of ln L. Huber's loss is quadratic near zero and
linear beyond a width; with a width of 1e-4, far below the errors, it is nearly their absolute
value, so that an odd run has no more weight than the others.

How certain a prediction is has two parts. Every fit is repeated on losses that are drawn around the
fitted law with the standard deviation of the residuals; few residuals do not tell that deviation
precisely, so each draw has a deviation of its own (chi-squared). Then whole sizes, and whole
octaves of tokens a parameter, are left out and predicted from the rest: the deviation of these
errors, called misfit, is that of a run which was not fitted. Runs of three sizes cannot spare one,
so that a run of another size has twice the deviation. Of the paper's form, whose intervals are
those that were stated so far, the misfit is not measured.

There is no scipy here. Twenty lines of Levenberg-Marquardt in numpy run all starts and all draws
at once, which is what makes the intervals cheap, and they find the optimum that the authors
printed to all its digits.

The points of a fit are (n, d, y) = (ln N, ln D, ln L) of the runs of one method, an array each.
"""
from typing import NamedTuple

import numpy as np

from data.files import check
from tools.scaling.law import (BF16, DELTA, LN_EFF_D, LN_EFF_N, NAMES, TILT, jacobian, log_loss)

# Which entries of theta a fit may change.
BASE = [0, 1, 2, 3, 4, 5]
EFF_N = [LN_EFF_N]
EFF_D = [LN_EFF_D]
EFF = [LN_EFF_N, LN_EFF_D]

HUBER = 1e-4                            # width of Huber's loss
MAX_DAMPING = 1e12                      # of Levenberg-Marquardt
METHOD_STEPS = 30                       # for a draw's one or two coefficients
DRAWS = 400
#                             ln A     alpha     ln B     beta     ln E     gamma
START_GRID = np.meshgrid([5, 10], [.3, .6], [5, 10], [.3, .6], [0, .5], [.3, .6])
STARTS = np.zeros((64, len(NAMES)))
STARTS[:, BASE] = np.stack(START_GRID, -1).reshape(64, 6)
EFF_STARTS = [1, .5, .1, .01]

FEW_SIZES = 3                           # so many are needed, and none of them can be left out
NEW_SIZE = 2                            # times the deviation, where that is so
SPOILT = .2                             # A method that loses more than that has no law.


class Form(NamedTuple):
    """A form of the law: which coefficients a quantised pass has."""
    name: str
    tilt: float
    forward: list               # the entries of theta that a quantised forward pass has
    backward: list
    both: list                  # those of a pair whose halves were not run
    on_gaps: bool               # whether they are fitted to differences to BF16 runs


PAPER = Form("the paper's form", 0, EFF_N, EFF_D, EFF, False)
# The tilt was chosen on the forward runs of both papers, a tenth for both.
LASTING = Form("the lasting form", .1, [LN_EFF_N, DELTA], [DELTA], [LN_EFF_N, DELTA], True)


class Fit(NamedTuple):
    """A law and its uncertainty."""
    theta: np.ndarray           # (10,) the best fit
    draws: np.ndarray           # (DRAWS, 10) fits to redrawn losses: what else theta could be
    residual_std: np.ndarray    # (DRAWS,) standard deviation of one run's ln L around each draw
    refused: tuple = ()         # sentences on coefficients that would say that quantising helps
    misfit: float = 0.          # standard deviation of ln L of a run that was left out
    sizes: tuple = ()           # ln N of the sizes that the base law was fitted to


# ---- the optimiser

def huber(residual):
    """Computes Huber's loss, summed over the runs: r^2 / 2 near zero, HUBER |r| beyond."""
    size = abs(residual)
    quadratic = residual * residual / 2
    linear = HUBER * (size - HUBER / 2)
    return np.where(size <= HUBER, quadratic, linear).sum(-1)


def minimise(theta, free, points, steps):
    """
    Minimises Huber's loss from many starts at once, by Levenberg-Marquardt.

    theta (S, 10) has the starts; only its entries `free` change. In points = (n, d, y), y is
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
    weight = HUBER / np.maximum(abs(residual), HUBER)
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

def with_draws(theta, base, free, points, seed, on_gaps=False):
    """
    Repeats a fit on redrawn losses, and returns theta with these draws as a Fit.

    The coefficients that are not free are uncertain too: base.draws (DRAWS, 10) has them drawn. Of
    a fit to gaps, these draws move the BF16 run and the quantised one together.
    """
    n, d, y = points
    fitted = log_loss(theta, n, d)
    redrawn, residual_std = redraw(fitted, y, len(y) - len(free), len(base.draws), seed)
    if on_gaps:
        redrawn += log_loss(base.draws, n, d) - log_loss(base.theta, n, d)
    starts = base.draws.copy()
    starts[:, TILT] = theta[TILT]
    starts[:, free] = theta[free]
    draws, _ = minimise(starts, free, (n, d, redrawn), 100 if free == BASE else METHOD_STEPS)
    if free != BASE:
        hold_draws(draws, free, (n, d, redrawn))
    return Fit(theta, draws, residual_std)


def hold_draws(draws, free, points):
    """Does to each draw what best_of_method does: no coefficient may say that quantising helps."""
    n, d, redrawn = points
    for i in reversed(free):
        helps = says_that_it_helps(draws, i)
        others = [j for j in free if j != i]
        draws[helps, i] = 0
        if others and helps.any():
            held = (n, d, redrawn[helps])
            draws[helps], _ = minimise(draws[helps], others, held, METHOD_STEPS)
    for i in free:
        draws[says_that_it_helps(draws, i), i] = 0


def says_that_it_helps(theta, i):
    """Says whether coefficient i, an efficiency or delta, makes a method better than BF16."""
    return theta[..., i] < 0 if i == DELTA else theta[..., i] > 0


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
        check(count >= FEW_SIZES,
              f"the law needs BF16 runs of at least three {description}, got {count}")
    theta = fit_best(STARTS, BASE, points)
    alone = Fit(theta, np.repeat(theta[None], draws, 0), None)
    fit = with_draws(theta, alone, BASE, points, 0)
    return fit._replace(sizes=tuple(sorted(set(n))))


def fit_method(base, form, method, points, seed):
    """Fits the coefficients of one method, on top of a base law. points are those of `paired`."""
    theta, refused = best_of_method(base.theta, form, method, points)
    free = free_coefficients(form, *method)
    fit = with_draws(theta, base, free, points, seed, form.on_gaps)
    return fit._replace(refused=refused, sizes=base.sizes, misfit=base.misfit)


def best_of_method(base_theta, form, method, points, efficiencies=EFF_STARTS, steps=300):
    """
    Returns theta of one method, and sentences on the values that were refused.

    A coefficient that would say that quantising helps stays at BF16's value, which is 0 in theta.
    The fit starts from each of these efficiencies.
    """
    free = list(free_coefficients(form, *method))
    refused = []
    while True:
        theta = np.repeat(base_theta[None], len(efficiencies), 0)
        theta[:, TILT] = form.tilt
        for i in free:
            theta[:, i] = .01 if i == DELTA else np.log(efficiencies)
        theta, cost = minimise(theta, free, points, steps)
        best = theta[cost.argmin()]
        helps = [i for i in free if says_that_it_helps(best, i)]
        if not helps:
            return best, tuple(refused)
        refused.append(refusal(method, helps[-1], best[helps[-1]]))
        free.remove(helps[-1])
        if not free:
            return base_theta, tuple(refused)


def refusal(method, i, value):
    """Says why a coefficient of a method is not what the fit found."""
    name = " : ".join(method)
    if i == DELTA:
        return (f"{name}: delta {np.expm1(value):.1%} is refused, as quantising saves no loss; "
                "it stays 0")
    efficiency = np.exp(np.minimum(value, 99))
    what = "parameters" if i == LN_EFF_N else "data"
    return (f"{name}: {NAMES[i].removeprefix('ln ')} {efficiency:.3g} is refused, as quantising "
            f"adds no {what}; it stays 1")


def free_coefficients(form, forward, backward):
    """Says which entries of theta the runs of a method tell: BF16's are not fitted."""
    if backward == "BF16":
        return form.forward
    if forward == "BF16":
        return form.backward
    return form.both


def fit_all(runs, form=PAPER, draws=DRAWS):
    """
    Fits everything that runs = {(forward, backward): points} tell.

    Returns the base law, {method: Fit}, and sentences on the methods that could not be fitted.
    """
    check(BF16 in runs,
          "there is no run with forward and backward BF16, and the base law is fitted on those")
    base = fit_base(runs[BF16], draws)
    if form.on_gaps:
        base = base._replace(misfit=misfit(runs, form))
    methods = {}
    unfitted = []
    for seed, (method, points) in enumerate(runs.items(), 1):   # No two fits share their noise.
        if method == BF16:
            continue
        count = len(points[0])
        if count > len(free_coefficients(form, *method)) + 1:
            points = paired(points, runs[BF16], base.theta) if form.on_gaps else points
            methods[method] = fit_method(base, form, method, points, seed)
        else:
            unfitted.append(f"{' : '.join(method)}: too few runs ({count}) for an interval")
    return base, methods, unfitted


# ---- gaps to BF16, and groups of runs that are left out

def partners(points, bf16):
    """Returns the index of the BF16 run of the same size and tokens for each run, or -1."""
    index = {place: i for i, place in enumerate(zip(*bf16[:2]))}
    return np.array([index.get(place, -1) for place in zip(*points[:2])], int)


def paired(points, bf16, base_theta):
    """
    Takes what the base law gets wrong about the BF16 run of the same size and tokens off each run.

    A fit to such points is a fit to gaps. A run without its BF16 run stays as it is.
    """
    n, d, y = points
    error = np.append(bf16[2] - log_loss(base_theta, *bf16[:2]), 0)
    return n, d, y - error[partners(points, bf16)]


def stable(runs):
    """Leaves out the methods of which a run loses so much that it is spoilt, not shifted."""
    kept = {}
    for method, points in runs.items():
        partner = partners(points, runs[BF16])
        gaps = np.exp(points[2]) - np.exp(runs[BF16][2][partner])
        if not (gaps[partner >= 0] > SPOILT).any():
            kept[method] = points
    return kept


def octave(n, d):
    """Returns the tokens a parameter of each run, rounded to a power of two."""
    return np.round((d - n) / np.log(2))


def size(n, d):
    """Returns what `octave` does for the number of parameters: the size itself."""
    return n


def can_be_fitted(points):
    """Says whether a base law can be fitted to these BF16 runs, with a run to spare."""
    n, d, _ = points
    return len(n) > len(BASE) + 1 and min(len(set(n)), len(set(d))) >= FEW_SIZES


def misfit(runs, form):
    """
    Measures what the form gets wrong about runs that it was not fitted to: the deviation of ln L.

    Each size is left out with all its runs, and then each octave of tokens a parameter. 0 if there
    are too few runs to leave any out.
    """
    runs = stable(runs)
    errors = []
    for label in (size, octave):
        for value in sorted(set(label(*runs[BF16][:2]))):
            kept = select_all(runs, lambda n, d: label(n, d) != value)
            left_out = select_all(runs, lambda n, d: label(n, d) == value)
            if can_be_fitted(kept[BF16]):
                errors += prediction_errors(kept, left_out, form)
    return np.sqrt(np.mean(np.square(errors))) if errors else 0.


def prediction_errors(kept, left_out, form):
    """Fits the runs of `kept`, and lists the errors of ln L of those that were left out."""
    # There are many such fits, and no digit of them is printed: fewer starts and steps will do.
    theta, cost = minimise(STARTS[::4], BASE, kept[BF16], 100)
    base_theta = theta[cost.argmin()]
    errors = []
    for method, (n, d, y) in left_out.items():
        theta = base_theta
        if method != BF16:
            if len(kept[method][0]) <= len(free_coefficients(form, *method)) + 1:
                continue
            points = paired(kept[method], kept[BF16], base_theta)
            theta, _ = best_of_method(base_theta, form, method, points, [.7], 12)
        errors += list(log_loss(theta, n, d) - y)
    return errors


def term_not_identified(fit, i, n, d):
    """
    Says whether coefficient i belongs to a term of the law that these runs do not need.

    Without such a term, A / N^alpha or B / D^beta, the law moves at none of the runs by more than
    the noise does. Its coefficients can then be anything.
    """
    if i >= 4:                          # E and gamma belong to no single term
        return False
    amplitude = i // 2 * 2              # the index of ln A or of ln B
    without = np.where(np.arange(len(NAMES)) == amplitude, -np.inf, fit.theta)
    change = abs(log_loss(without, n, d) - log_loss(fit.theta, n, d))
    return change.max() <= 3 * np.median(fit.residual_std)


# ---- what a fit predicts

def compose(base, methods, forward, backward):
    """
    Composes the law of one precision: eff_N of its forward pass, eff_D of its backward pass, and
    both deltas, one on top of the other.

    Where the two passes were not run apart, the law is that of the runs of the pair. Returns None
    if there are no such runs either.
    """
    known = {BF16: base, **methods}
    forward_fit = known.get((forward, "BF16"))
    backward_fit = known.get(("BF16", backward))
    fit = methods.get((forward, backward))
    if forward_fit and backward_fit:
        theta = join(forward_fit.theta, backward_fit.theta)
        draws = join(forward_fit.draws, backward_fit.draws)
        refused = forward_fit.refused + backward_fit.refused
        fit = Fit(theta, draws, base.residual_std, refused)
    if fit is None:
        return None
    return fit._replace(residual_std=base.residual_std, misfit=base.misfit, sizes=base.sizes)


def join(forward_theta, backward_theta):
    """Takes eff_D from backward_theta, delta from both, and all else from forward_theta."""
    theta = forward_theta.copy()
    theta[..., LN_EFF_D] = backward_theta[..., LN_EFF_D]
    theta[..., DELTA] += backward_theta[..., DELTA]
    return theta


def deviation(fit, n):
    """
    Returns the standard deviation of ln L of one more run at each n, (draws, runs).

    It is that of the residuals or the misfit, whichever is larger, and twice that for a size that
    is not among so few that none could be left out to measure it.
    """
    spread = np.maximum(fit.residual_std, fit.misfit)
    is_new = ~np.isin(n, fit.sizes)
    few = 0 < len(fit.sizes) <= FEW_SIZES and fit.misfit > 0
    return spread[:, None] * np.where(is_new & few, NEW_SIZE, 1)


def predict(fit, n, d):
    """Predicts the loss of one more run at each (n, d): the loss, and its 90 % interval."""
    random = np.random.default_rng(10 ** 6)
    noise = random.standard_normal((len(fit.residual_std), len(n)))
    drawn = log_loss(fit.draws, n, d) + deviation(fit, n) * noise
    low, high = np.quantile(drawn, (.05, .95), axis=0)
    return np.exp(log_loss(fit.theta, n, d)), np.exp(low), np.exp(high)


def select(points, is_selected):
    """Takes some of the runs: is_selected is a boolean, or an index, for each."""
    n, d, y = points
    return n[is_selected], d[is_selected], y[is_selected]


def select_all(runs, is_selected):
    """Takes some of the runs of each method: is_selected returns a boolean for each (n, d)."""
    return {method: select(points, is_selected(*points[:2])) for method, points in runs.items()}
