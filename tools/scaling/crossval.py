"""
Asks the law about runs that it was not fitted to, and says how wrong it was.

Four questions are asked of a file of runs, for each form of the law and for methods that quantise
the forward pass, the backward pass and both:

    the largest size            fitted to smaller models, asked about the next size
    one size                    fitted to all other sizes
    the most tokens             fitted to fewer tokens a parameter, asked about the next octave
    one ratio                   fitted to all other octaves of tokens a parameter

All runs of such a group are left out, those in BF16 included. What is compared are gaps: a run's
loss less that of BF16 of the same size and tokens, measured and predicted. Beside it stands the
share of the runs whose loss lies inside the 90 % interval that the fit states.

held_out asks the same of the BF16 runs alone, one by one and at twice the tokens or the size.
"""
from typing import NamedTuple

import numpy as np

from tools.scaling import fitting
from tools.scaling.law import BF16, LN_E, log_loss

FORMS = (fitting.PAPER, fitting.LASTING)
KINDS = ("BF16", "forward", "backward", "both")
SPLITS = ("the largest size", "one size", "the most tokens", "one ratio")
DRAWS = 60                              # so many make an interval here
ENOUGH = 4                              # runs of a method, for every form to be fitted to it


class Asked(NamedTuple):
    """A run, and what a fit that had not seen it said about it."""
    form: str
    kind: str                   # which passes are quantised, of KINDS
    split: str                  # how it was left out, of SPLITS
    error: float                # predicted less measured gap to BF16; in BF16, of the loss
    is_inside: bool             # whether its loss is inside the 90 % interval


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


# ---- all methods

def kind_of(forward, backward):
    """Says which passes of a method are quantised, in a word of KINDS."""
    if backward == "BF16":
        return "BF16" if forward == "BF16" else "forward"
    return "backward" if forward == "BF16" else "both"


def groups(runs):
    """
    Yields (split, is_kept, is_asked) for each way to leave out a group of runs.

    is_kept and is_asked take (n, d) of runs and return a boolean for each.
    """
    for label, largest, one in ((fitting.size, *SPLITS[:2]), (fitting.octave, *SPLITS[2:])):
        labels = [label(n, d) for n, d, _ in runs.values()]
        for value in np.unique(np.concatenate(labels)):
            def is_asked(n, d, label=label, value=value):
                return label(n, d) == value

            def is_smaller(n, d, label=label, value=value):
                return label(n, d) < value

            def is_other(n, d, label=label, value=value):
                return label(n, d) != value
            yield largest, is_smaller, is_asked
            yield one, is_other, is_asked


def validate(runs, forms=FORMS, splits=SPLITS, draws=DRAWS):
    """
    Yields an Asked for each run, form of the law and way to leave the run out.

    Methods that lose too much to obey a law are left out altogether; groups without which too few
    BF16 runs remain are not asked about.
    """
    runs = fitting.stable(runs)
    for split, is_kept, is_asked in groups(runs):
        kept = fitting.select_all(runs, is_kept)
        kept = {method: points for method, points in kept.items() if len(points[0]) >= ENOUGH}
        asked = fitting.select_all(runs, is_asked)
        if split in splits and BF16 in kept and fitting.can_be_fitted(kept[BF16]):
            for form in forms:
                yield from ask(form, split, kept, asked, draws)


def ask(form, split, kept, asked, draws):
    """Fits the runs of `kept`, and yields an Asked for each run of `asked`."""
    base, methods, _ = fitting.fit_all(kept, form, draws)
    for method, points in asked.items():
        fit = base if method == BF16 else fitting.compose(base, methods, *method)
        if fit:
            for error, is_inside in compare(base, fit, points, asked[BF16]):
                yield Asked(form.name, kind_of(*method), split, error, is_inside)


def compare(base, fit, points, bf16):
    """
    Yields (error, is_inside) of each of these runs that has a BF16 run of its size and tokens.

    The error of the BF16 runs themselves is that of their loss.
    """
    partner = fitting.partners(points, bf16)
    n, d, y = points = fitting.select(points, partner >= 0)
    if not len(n):
        return
    loss, low, high = fitting.predict(fit, n, d)
    is_inside = (low <= np.exp(y)) & (np.exp(y) <= high)
    error = loss - np.exp(y)
    if fit is not base:
        error -= np.exp(log_loss(base.theta, n, d)) - np.exp(bf16[2][partner[partner >= 0]])
    yield from zip(error, is_inside)


def summary(rows):
    """Returns (runs, mean |error|, mean error, share inside the interval) of some Asked."""
    error = np.array([row.error for row in rows])
    inside = np.mean([row.is_inside for row in rows])
    return len(rows), abs(error).mean(), error.mean(), inside


def table(name, rows):
    """Returns the lines of a table of all Asked of a file: a line for each kind and split."""
    lines = []
    for kind in KINDS:
        for split in SPLITS:
            place = f"{name:12s} {kind:8s} {split:16s}"
            cells = ""
            for form in FORMS:
                cell = [row for row in rows
                        if (row.form, row.kind, row.split) == (form.name, kind, split)]
                if cell:
                    count, size, bias, inside = summary(cell)
                    cells += f" {count:4d} {size:7.4f} {bias:+8.4f} {inside:6.0%}"
            if cells:
                lines.append(place + cells)
    return lines


# ---- BF16 alone

def held_out(points, draws=200):
    """
    Measures how well the law predicts runs that it was not fitted to: yields a HeldOut for each.

    Each run is left out alone once; then those runs are left out that have up to twice the tokens,
    or up to twice the size, of all the rest. `draws` is how many make an interval.
    """
    for kind, is_fitted, is_left_out in held_out_splits(*points):
        fitted = fitting.select(points, is_fitted)
        left_out = fitting.select(points, is_left_out)
        if not is_left_out.any() or not fitting.can_be_fitted(fitted):
            continue
        fit = fitting.fit_base(fitted, draws)
        E = np.exp(fit.theta[LN_E])
        N_D_and_measured = np.exp(left_out)
        predictions = fitting.predict(fit, *left_out[:2])
        for row in zip(*N_D_and_measured, *predictions):
            yield HeldOut(kind, len(fitted[0]), E, *row)


def held_out_splits(n, d, y):
    """Yields (kind, is_fitted, is_left_out), the last two a boolean for each run."""
    index = np.arange(len(n))
    for i in index:
        yield "one left out", index != i, index == i
    # The authors' sizes lie a factor of 1.6 to 2.2 apart.
    for kind, values, reach in (("twice the tokens", d, 2.05), ("twice the size", n, 2.25)):
        for most in sorted(set(values)):
            is_larger = values > most
            yield kind, values <= most, is_larger & (values <= most + np.log(reach))
