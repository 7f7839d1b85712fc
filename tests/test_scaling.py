"""Facts about the scaling law: what it reproduces, recovers and predicts, and what it refuses."""
import csv
import glob
import json
import os
import pickle
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import fp4
import quartet
from data import prepare
from data.files import Stopped, UserError
from model import PRESETS, Llama, count_params
from tools import run
from tools.scaling import __main__ as scaling
from tools.scaling import (advise, crossval, fitting, law, pictures, regions, runs, speeds,
                           sweep)

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PAPER = os.path.join(ROOT, "tools", "scaling", "data", "quartet.csv")
SECOND = os.path.join(ROOT, "tools", "scaling", "data", "quartet2.csv")
#                ln A alpha ln B beta ln E gamma
TRUE = np.array([12., .59, 13.2, .54, .3, .27, 0, 0, 0, 0])
WITHOUT_SIZE_TERM = np.append([-108., .59, 13.2, .54, .3, .27], [0] * 4)
WITHOUT_DATA_TERM = np.append([12., .59, -118.8, .54, .3, .27], [0] * 4)


def quantised(eff_N=1., eff_D=1., delta=0., tilt=0.):
    "the law of a quantised method, on top of TRUE"
    theta = TRUE.copy()
    theta[6:] = np.log(eff_N), np.log(eff_D), tilt, np.log1p(delta)
    return theta


def once(function):
    "the same function, computed once for equal runs: most tests ask about the authors'"
    results = {}

    def call(*args):
        key = pickle.dumps(args)
        if key not in results:
            results[key] = function(*args)
        return results[key]
    return call


HELD_OUT = crossval.held_out
COARSE_RATIOS = np.geomspace(5, 5000, 100)      # where no test looks at a boundary


def list_held_out(points):
    return list(HELD_OUT(points))


def held_out_of_few_draws(points):
    "for runs whose intervals no test looks at"
    return HELD_OUT(points, draws=20)


FIT_ALL = fitting.fit_all


def fit_all_of_draws(points, form=fitting.PAPER, draws=200):
    "half the draws, and the same whatever a command asks for, so that it is computed once"
    return FIT_ALL(points, form, 200)


fit_once = once(fit_all_of_draws)


def fit_all_once(points, form=fitting.PAPER, draws=200):
    return fit_once(points, form)


held_out_once = once(list_held_out)


@pytest.fixture(scope="session")
def paper():
    return runs.read(PAPER)[0]


@pytest.fixture(scope="session")
def fitted(paper):
    "the laws of the paper's form"
    base, methods, _ = fit_all_once(paper)
    return base, methods


@pytest.fixture(scope="session")
def lasting(paper):
    "the laws of the lasting form"
    base, methods, _ = fit_all_once(paper, fitting.LASTING)
    return base, methods


@pytest.fixture(scope="session")
def full(tmp_path_factory):
    "the authors' runs with those that Table 6 leaves out: their second notebook"
    path = tmp_path_factory.mktemp("runs") / "full.csv"
    with open(PAPER) as file:
        path.write_text(file.read().replace("# ", ""))
    return runs.read(path)[0]


@pytest.fixture
def cli(tmp_path, capsys, monkeypatch):
    "cli('fit', ...) -> exit code, stdout, stderr; bench.json and pictures are in an empty folder"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fitting, "fit_all", fit_all_once)
    monkeypatch.setattr(crossval, "held_out", held_out_once)
    monkeypatch.setattr(runs, "PAPER", PAPER)
    monkeypatch.setattr(speeds, "BENCH", str(tmp_path / "bench.json"))

    def call(*args):
        capsys.readouterr()
        code = scaling.run_cli([str(arg) for arg in args])
        printed = capsys.readouterr()
        return code, printed.out, printed.err
    return call


def format_coefficients(points):
    theta = fitting.fit_best(fitting.STARTS, fitting.BASE, points)
    ln_A, alpha, ln_B, beta, ln_E, gamma = theta[:6]
    return (f"{np.exp(ln_A):.3e} {alpha:.4f} {np.exp(ln_B):.3e} {beta:.4f} "
            f"{np.exp(ln_E):.4f} {gamma:.4f}")


def efficiencies(base_theta, free, points):
    "without the draws"
    starts = np.repeat(base_theta[None], 4, 0)
    starts[:, free] = np.log([[1], [.5], [.1], [.01]])
    return np.exp(fitting.fit_best(starts, free, points)[free])


def grid(sizes, tokens, theta=TRUE, noise=0., seed=0):
    "synthetic runs"
    n, d = (values.ravel() for values in np.meshgrid(np.log(sizes), np.log(tokens)))
    random = np.random.default_rng(seed)
    return n, d, law.log_loss(theta, n, d) + noise * random.standard_normal(len(n))


# ---- the paper's numbers

def test_the_fit_is_the_papers_table_6_to_its_printed_digits(paper):
    points = paper[law.BF16]
    assert len(points[0]) == 23
    printed = "1.524e+05 0.5886 5.255e+05 0.5440 1.3481 0.2739"
    assert format_coefficients(points) == printed


def test_without_the_two_largest_models_the_coefficients_are_quite_others(paper):
    n, _, _ = points = paper[law.BF16]
    small = fitting.select(points, n < np.log(3e8))
    printed = "2.254e+05 0.6618 4.227e+05 0.5721 1.6631 0.3079"
    assert format_coefficients(small) == printed


def test_with_the_run_that_table_6_leaves_out_the_fit_is_that_of_the_second_notebook(full):
    theta = fitting.fit_best(fitting.STARTS, fitting.BASE, full[law.BF16])
    printed = [11.75543771, .57852012, 13.0515853, .5388769, .2933008, .27641569]
    assert abs(theta[:6] - printed).max() <= 2e-6               # where scipy stopped


def test_table_6_needs_the_robust_loss(paper, monkeypatch):
    monkeypatch.setattr(fitting, "HUBER", 1.)                   # least squares
    assert format_coefficients(paper[law.BF16])[:9] != "1.524e+05"


@pytest.mark.parametrize("method, printed", [
    (("QuEST", "BF16"), .648),
    (("RTN-absmax", "BF16"), .608),
    (("SR-absmax", "BF16"), .435),
    (("QuEST w/ FP32 scales", "BF16"), .652),
    (("BF16", "SR-absmax"), .892),
    (("BF16", "RTN-absmax"), .927),
    (("BF16", "Eden128"), .950),
])
def test_efficiencies_are_the_first_notebooks_to_their_printed_digits(fitted, method, printed):
    _, methods = fitted
    free = 6 if method[1] == "BF16" else 7
    assert round(np.exp(methods[method].theta[free]), 3) == printed
    assert methods[method].theta[13 - free] == 0                # the other one is BF16's


def test_efficiencies_are_the_second_notebooks_on_its_runs(full):
    base_theta = fitting.fit_best(fitting.STARTS, fitting.BASE, full[law.BF16])
    for method, free, printed, digits in [
        (("QuEST", "BF16"), [6], [.645], 3),
        (("RTN-absmax", "BF16"), [6], [.606], 3),
        (("SR-absmax", "BF16"), [6], [.433], 3),
        (("Eden128", "BF16"), [6], [.639], 3),
        (("BF16", "SR-absmax"), [7], [.8935], 4),
        (("BF16", "RTN-absmax"), [7], [.928], 3),
        (("LUQ-INT4", "LUQ-INT4"), [6, 7], [.502, .154], 3),
        (("QuEST", "SR-absmax"), [6, 7], [.6584, .8217], 4),
    ]:
        found = efficiencies(base_theta, free, full[method]).round(digits)
        assert found.tolist() == printed, method


def test_the_pair_that_the_first_notebook_prints_comes_from_its_eight_runs(paper, fitted):
    base, _ = fitted
    n, d, _ = points = paper["QuEST", "SR-absmax"]
    N = np.exp(n)
    ratio = np.exp(d - n)
    of_30M = (N < 4e7) & (ratio < 500)
    of_50M = (N > 4e7) & (N < 6e7) & (ratio < 150)
    eight = fitting.select(points, of_30M | of_50M)
    assert efficiencies(base.theta, [6, 7], eight).round(4).tolist() == [.6418, .9435]


def test_the_law_of_quartet_2_is_another_one_and_its_efficiencies_are_alike():
    points = runs.read(SECOND)[0]
    published = {
        ("NVFP4 1x16", "BF16"): .738,
        ("BF16", "MXFP4 RTN H32 fixed signs"): .942,
    }
    # The other methods would be fitted for nothing: a fit does not depend on its neighbours.
    some = {method: points[method] for method in [law.BF16, *published]}
    base, methods, _ = fit_all_once(some)
    assert len(points[law.BF16][0]) == 18
    assert np.exp(base.theta[law.LN_E]) < .5                    # E: 1.35 on the first paper's runs
    for method, efficiency in published.items():
        free = 6 if method[1] == "BF16" else 7
        assert abs(np.exp(methods[method].theta[free]) - efficiency) <= .011


@pytest.mark.parametrize("N, ratio", [(1e8, 91), (1e9, 110), (7e9, 129), (7e10, 156)])
def test_fp4_is_best_from_the_papers_tokens_per_parameter_on_by_counting_bits(fitted, N, ratio):
    bops = speeds.for_gpu("bops")
    table = regions.four_precisions(*fitted, bops, "QuEST", "SR-absmax")
    (below, *_), (above, found, low, high) = regions.boundaries(table, bops, N)
    assert (below, above) == ("FP8:FP4", "FP4:FP4")
    assert abs(found / ratio - 1) <= .01
    assert low < found < high


@pytest.mark.parametrize("N, name, ratio", [
    (.822e9, "FP4:FP8", 261),
    (6.48e9, "FP4:FP8", 234),
    (51.8e9, "FP4:FP4", 209),
])
def test_and_on_the_measured_rtx_5090(fitted, N, name, ratio):
    rtx5090 = speeds.for_gpu("rtx5090")
    table = regions.four_precisions(*fitted, rtx5090, "QuEST", "SR-absmax")
    *_, (last, found, _, _) = regions.boundaries(table, rtx5090, N)
    assert last == name
    assert abs(found / ratio - 1) <= .015


def test_speedups_by_counting_bits_are_the_papers_table_1():
    bops = speeds.for_gpu("bops")
    found = [regions.speedups(bops, forward, backward, "fp8", 1e9)
             for forward, backward in (("fp4", "fp8"), ("fp8", "fp4"), ("fp4", "fp4"))]
    assert np.allclose(found, [(2, 1.2), (1, 1.5), (2, 2)])


def test_speedups_of_the_rtx_5090_are_the_published_ones():
    rtx5090 = speeds.for_gpu("rtx5090")
    fp4_forward, fp4_backward = rtx5090.at("fp4", 6.48e9)
    for reference, forward_speedup, backward_speedup in (("fp8", 2.14, 1.00), ("bf16", 4.77, 2.06)):
        forward, backward = rtx5090.at(reference, 6.48e9)
        assert np.allclose(forward / fp4_forward, forward_speedup)
        assert np.allclose(backward / fp4_backward, backward_speedup)
    _, training = regions.speedups(rtx5090, "fp4", "fp4", "fp8", 6.48e9)
    assert abs(training - 1.21) <= .01                          # the figure's bar


# ---- the fit

def test_the_jacobian_has_the_derivatives():
    theta = quantised(eff_N=.67, eff_D=.9, delta=.02, tilt=.2)
    n = np.log([3e7, 2e8, 8e8])
    d = np.log([1e9, 5e9, 8e10])
    columns = []
    for step in 1e-6 * np.eye(10):
        difference = law.log_loss(theta + step, n, d) - law.log_loss(theta - step, n, d)
        columns.append(difference / 2e-6)
    numeric = np.stack(columns, -1)
    assert abs(law.jacobian(theta, n, d) - numeric).max() <= 1e-8
    assert abs(numeric).max(0).min() > 1e-3                     # the bound is far below each


def test_the_law_is_the_formula():
    theta = quantised(eff_N=.67, eff_D=.9, delta=.02, tilt=.2)
    A, B, E, eff_N, eff_D = np.exp(theta[[0, 2, 4, 6, 7]])
    alpha, beta, gamma = theta[[1, 3, 5]]
    N = 3e7
    D = 2e9
    eff_N **= (D / N / 100) ** .2
    L = 1.02 * ((A / (N * eff_N) ** alpha + B / (D * eff_D) ** beta) ** gamma + E)
    assert np.allclose(law.log_loss(theta, np.log([N]), np.log([D])), np.log(L))


def test_coefficients_are_recovered_from_losses_without_noise():
    points = grid([3e7, 6e7, 1e8, 4e8, 1e9], [1e9, 4e9, 1e10, 6e10])
    theta = fitting.fit_best(fitting.STARTS, fitting.BASE, points)
    assert abs(theta - TRUE).max() <= 1e-3


def test_coefficients_and_predictions_of_noisy_losses_lie_in_their_intervals_as_often_as_said():
    inside = []
    predicted = []
    for seed in range(25):
        sizes = [3e7, 6e7, 1e8, 2e8, 4e8]
        points = grid(sizes, [1e9, 3e9, 1e10, 3e10], noise=.001, seed=seed)
        fit = fitting.fit_base(points, 100)
        low, high = np.quantile(fit.draws[:, :6], (.05, .95), axis=0)
        inside.append((low <= TRUE[:6]) & (TRUE[:6] <= high))
        n, d, y = grid([2e8, 8e8], [1e10, 6e10], noise=.001, seed=1000 + seed)
        loss, low, high = fitting.predict(fit, n, d)
        assert abs(loss - np.exp(y)).max() <= .04
        predicted.append((low <= np.exp(y)) & (np.exp(y) <= high))
    assert .8 <= np.mean(inside) <= .97
    assert .8 <= np.mean(predicted) <= .97


def test_efficiencies_are_recovered_alone_and_as_a_pair():
    sizes = [3e7, 6e7, 1e8, 4e8, 1e9]
    tokens = [1e9, 4e9, 1e10, 6e10]
    theta = quantised(.64, .93)
    forward_theta = quantised(.64, 1)
    backward_theta = quantised(1, .93)
    base, methods, unfitted = fitting.fit_all({
        law.BF16: grid(sizes, tokens, noise=3e-4),
        ("F", "BF16"): grid(sizes, tokens, forward_theta, 3e-4, 1),
        ("BF16", "B"): grid(sizes, tokens, backward_theta, 3e-4, 2),
        ("P", "P"): grid(sizes, tokens, theta, 3e-4, 3),
        ("X", "X"): grid([1e8], [1e9]),
    })
    for method, truth in [
        (("F", "BF16"), (.64, 1)),
        (("BF16", "B"), (1, .93)),
        (("P", "P"), (.64, .93)),
    ]:
        assert abs(np.exp(methods[method].theta[6:8]) - truth).max() <= .02
        low, high = np.exp(np.quantile(methods[method].draws[:, 6:8], (.01, .99), axis=0))
        assert (low <= truth).all() and (truth <= high).all()
    composed = fitting.compose(base, methods, "F", "B")
    halves = [methods["F", "BF16"].theta[6], methods["BF16", "B"].theta[7]]
    assert np.array_equal(composed.theta[6:8], halves)
    assert np.array_equal(composed.draws[:, :6], base.draws[:, :6])
    assert fitting.compose(base, methods, "F", "P") is None
    assert len(unfitted) == 1 and "X : X" in unfitted[0]


@pytest.fixture(scope="session")
def held_out(paper):
    "the BF16 runs of each paper, predicted by fits to others: {kind: [HeldOut]}, twice"
    second = runs.read(SECOND)[0]
    papers = []
    for points in (paper[law.BF16], second[law.BF16]):
        by_kind = {"one left out": [], "twice the tokens": [], "twice the size": []}
        for row in held_out_once(points):
            by_kind[row.kind].append(row)
        papers.append(by_kind)
    return papers


def test_runs_of_twice_the_tokens_and_of_twice_the_size_are_predicted_within_a_hundredth(held_out):
    for by_kind in held_out:
        for kind in ("twice the tokens", "twice the size"):
            errors = [abs(row.predicted - row.measured) for row in by_kind[kind]]
            assert np.mean(errors) <= .01


def test_the_90_percent_interval_holds_80_to_97_percent_of_the_runs_that_were_not_fitted(held_out):
    inside = {}
    for kind in held_out[0]:
        rows = [row for by_kind in held_out for row in by_kind[kind]]
        inside[kind] = np.array([row.low <= row.measured <= row.high for row in rows])
    assert .8 <= inside["one left out"].mean() <= .97
    assert .8 <= inside["twice the tokens"].mean() <= .97
    assert .8 <= inside["twice the size"].mean()
    assert len(inside["twice the size"]) == 6                   # too few for a bound above
    everything = np.concatenate([*inside.values()])
    assert .8 <= everything.mean() <= .97 and len(everything) > 80


def test_without_the_spread_of_a_single_run_the_interval_would_be_too_narrow():
    sizes = np.geomspace(3e7, 1e9, 8)
    tokens = np.geomspace(1e9, 1e11, 8)
    fit = fitting.fit_base(grid(sizes, tokens, noise=.002))
    n, d, y = grid(sizes, tokens, noise=.002, seed=1)

    def share_inside(fit):
        _, low, high = fitting.predict(fit, n, d)
        return np.mean((low <= np.exp(y)) & (np.exp(y) <= high))
    assert share_inside(fit) >= .8
    assert share_inside(fit._replace(residual_std=0 * fit.residual_std)) <= .6


def test_predictions_of_more_tokens_are_of_half_as_many_runs_and_too_high(held_out):
    rows = held_out[0]["twice the tokens"]
    error = np.array([row.predicted - row.measured for row in rows])
    assert len(rows) == 27
    assert len({(row.N, row.D) for row in rows}) == 14
    assert sum(error > 0) == 26 and error.min() > -5e-4
    assert abs(error.mean() - .0082) <= 5e-5


def test_predictions_are_printed_with_their_sign_and_the_number_of_distinct_runs(capsys):
    low = crossval.HeldOut("twice the tokens", 9, 1., 3e7, 1e9, 3.1, 3.08, 3., 3.09)
    scaling.print_held_out([low, low._replace(fitted=8), low._replace(D=2e9, predicted=3.11)])
    line = capsys.readouterr().out.splitlines()[2]
    assert line.split() == ["twice", "the", "tokens", "3", "2", "0.0167", "-0.0100", "0.0200", "0%"]


def test_a_printed_interval_holds_90_percent_of_the_draws():
    assert scaling.format_interval(np.linspace(1, 2, 101)) == "1.05 - 1.95"


# ---- the lasting form

SIZES = np.array([3e7, 6e7, 1.2e8, 2.4e8, 4.8e8])
RATIOS = 25 * 2. ** np.arange(6)
FORWARD = ("F", "BF16")
BACKWARD = ("BF16", "B")
PAIR = ("P", "P")
WORLD = {
    law.BF16: TRUE,
    FORWARD: quantised(.7, tilt=.1),
    BACKWARD: quantised(delta=.004),
    ("F", "B"): quantised(.7, delta=.004, tilt=.1),
    PAIR: quantised(.8, delta=.006, tilt=.1),
}


def world(seed=0, planted=0., noise=0., laws=WORLD):
    """
    runs of five sizes and six octaves of tokens a parameter, and the index of both

    planted is the deviation of what the law gets wrong: an offset of each size and of each octave
    """
    random = np.random.default_rng(seed)
    of_size = planted * random.standard_normal(len(SIZES))
    of_octave = planted * random.standard_normal(len(RATIOS))
    i, j = (index.ravel() for index in np.indices((len(SIZES), len(RATIOS))))
    n = np.log(SIZES)[i]
    d = n + np.log(RATIOS)[j]
    points = {}
    for method, theta in laws.items():
        error = noise * random.standard_normal(len(n))
        points[method] = (n, d, law.log_loss(theta, n, d) + of_size[i] + of_octave[j] + error)
    return points, i, j


def test_the_lasting_form_is_recovered_and_composed_of_its_halves():
    points, _, _ = world(noise=1e-4)
    spoilt = world(laws={("F", "B"): quantised(.2)})[0]
    base, methods, _ = fitting.fit_all(points | spoilt, fitting.LASTING, 20)
    for method in (FORWARD, BACKWARD, PAIR):
        found = methods[method].theta[[6, 7, 9]]
        assert abs(found - WORLD[method][[6, 7, 9]]).max() <= 4e-3
        assert methods[method].theta[8] == .1
    composed = fitting.compose(base, methods, "F", "B")         # not from the pair's own runs
    assert abs(composed.theta[6:] - WORLD["F", "B"][6:]).max() <= 4e-3
    deltas = methods[FORWARD].draws[:, 9] + methods[BACKWARD].draws[:, 9]
    assert np.array_equal(composed.draws[:, 9], deltas)
    n, d, y = points["F", "B"]
    assert abs(law.log_loss(composed.theta, n, d) - y).max() <= 1e-3


def share_inside(fit, points):
    _, low, high = fitting.predict(fit, *points[:2])
    loss = np.exp(points[2])
    return np.mean((low <= loss) & (loss <= high))


def test_intervals_hold_as_much_as_they_say_where_the_law_is_wrong():
    "of sizes and octaves that the fit has not seen, for methods of one pass and of both"
    points, i, j = world(4, planted=.0015, noise=5e-4)
    inside = {}
    without_misfit = []
    for index in (i, j):
        for group in range(index.max() + 1):
            kept = {method: fitting.select(runs, index != group)
                    for method, runs in points.items()}
            base, methods, _ = fitting.fit_all(kept, fitting.LASTING, 20)
            for method, runs in points.items():
                asked = fitting.select(runs, index == group)
                fit = fitting.compose(base, methods, *method)
                inside.setdefault(method, []).append(share_inside(fit, asked))
                without_misfit.append(share_inside(fit._replace(misfit=0.), asked))
    for method, shares in inside.items():
        assert .8 <= np.mean(shares) <= .97, method
    assert np.mean(without_misfit) <= .75                       # The control.


def test_the_misfit_is_the_deviation_of_whole_groups_that_were_left_out():
    points, i, j = world(3, planted=.003, laws={law.BF16: TRUE})
    errors = []
    for index in (i, j):
        for group in range(index.max() + 1):
            kept = fitting.select(points[law.BF16], index != group)
            n, d, y = fitting.select(points[law.BF16], index == group)
            theta = fitting.fit_best(fitting.STARTS, fitting.BASE, kept)
            errors += list(law.log_loss(theta, n, d) - y)
    by_hand = np.sqrt(np.mean(np.square(errors)))
    assert abs(fitting.misfit(points, fitting.LASTING) / by_hand - 1) <= .02


def test_the_deviation_of_few_residuals_is_drawn_as_uncertain_as_it_is():
    shares = {}
    for degrees in (5, 8):
        for seed in range(400):
            y = .001 * np.random.default_rng(seed).standard_normal(5)
            _, deviation = fitting.redraw(np.zeros(5), y, degrees, 200, seed)
            low, high = np.quantile(deviation, (.05, .95))
            shares.setdefault(degrees, []).append(low <= .001 <= high)
    assert .86 <= np.mean(shares[5]) <= .94
    assert np.mean(shares[8]) <= .8                             # Wrong degrees would be noticed.


def test_each_coefficient_costs_a_degree_of_freedom(monkeypatch):
    costs = []
    redraw = fitting.redraw

    def watch(fitted, y, degrees_of_freedom, draws, seed):
        costs.append(len(y) - degrees_of_freedom)
        return redraw(fitted, y, degrees_of_freedom, draws, seed)
    monkeypatch.setattr(fitting, "redraw", watch)
    points, _, _ = world(noise=1e-3)
    base = fitting.fit_base(points[law.BF16], 5)
    for form in (fitting.PAPER, fitting.LASTING):
        for method in (FORWARD, BACKWARD, PAIR):
            fitting.fit_method(base, form, method, points[method], 1)
    assert costs == [6, 1, 1, 2, 2, 1, 2]


def test_another_size_than_three_has_twice_the_deviation():
    theta = np.repeat(TRUE[None], 400, 0)
    n = np.log(SIZES)
    fit = fitting.Fit(TRUE, theta, np.full(400, .001), (), .002, tuple(n[:3]))
    known, new = fitting.deviation(fit, n[[0, 3]]).T
    assert np.all(known == .002) and np.all(new == .004)
    four = fit._replace(sizes=tuple(n[:4]))
    assert np.all(fitting.deviation(four, n) == .002)
    noisy = fit._replace(residual_std=np.full(400, .003))
    assert np.all(fitting.deviation(noisy, n[:1]) == .003)


@pytest.mark.parametrize("form, theta, held, sentence", [
    (fitting.PAPER, quantised(.7, 1.2), 7,
     "P : P: eff_D 1.2 is refused, as quantising adds no data; it stays 1"),
    (fitting.PAPER, quantised(1.05, .7), 6,
     "P : P: eff_N 1.05 is refused, as quantising adds no parameters; it stays 1"),
    (fitting.LASTING, quantised(.7, delta=-.01, tilt=.1), 9,
     "P : P: delta -1.0% is refused, as quantising saves no loss; it stays 0"),
])
def test_a_value_that_says_that_quantising_helps_is_refused(form, theta, held, sentence):
    points, _, _ = world(noise=1e-4, laws={law.BF16: TRUE, PAIR: theta})
    base = fitting.fit_base(points[law.BF16], 20)
    runs_of_pair = fitting.paired(points[PAIR], points[law.BF16], base.theta)
    fit = fitting.fit_method(base, form, PAIR, runs_of_pair, 1)
    assert fit.refused == (sentence,)
    assert fit.theta[held] == 0
    assert not fitting.says_that_it_helps(fit.draws, held).any()
    assert np.mean(fit.draws[:, held] == 0) >= .3
    # What is left is fitted again, and is the best without the one that is held.
    [other] = [i for i in form.both if i != held]
    n, d, y = runs_of_pair
    values = np.linspace(fit.theta[other] - .2, fit.theta[other] + .2, 401)
    grid_of_theta = np.repeat(fit.theta[None], 401, 0)
    grid_of_theta[:, other] = values
    cost = abs(law.log_loss(grid_of_theta, n, d) - y).sum(1)
    assert abs(values[cost.argmin()] - fit.theta[other]) <= 2e-3


def test_a_draw_whose_value_is_refused_is_fitted_again_without_it():
    n, d, _ = world(laws={PAIR: TRUE})[0][PAIR]
    free = quantised(.7, 1.2)
    fine = quantised(.7, .9)
    draws = np.stack((free, fine))
    losses = law.log_loss(draws, n, d)
    fitting.hold_draws(draws, fitting.EFF, (n, d, losses))
    assert abs(draws[1] - fine).max() <= 1e-9
    assert draws[0, 7] == 0
    candidates = np.repeat(TRUE[None], 2001, 0)
    candidates[:, 6] = np.linspace(-.6, -.1, 2001)
    cost = abs(law.log_loss(candidates, n, d) - losses[0]).sum(1)
    best = candidates[cost.argmin(), 6]
    assert abs(draws[0, 6] - best) <= 1e-3
    assert abs(best - free[6]) >= .01                           # It is another value.


def test_a_gap_is_what_is_left_when_the_error_of_its_bf16_run_is_taken_off():
    n = np.array([1., 2.])
    d = np.array([5., 6.])
    bf16 = (n, d, law.log_loss(TRUE, n, d) + [.1, 0])
    points = (np.array([2., 1., 1.]), np.array([6., 5., 6.]), np.array([3., 3., 3.]))
    assert fitting.partners(points, bf16).tolist() == [1, 0, -1]
    assert np.allclose(fitting.paired(points, bf16, TRUE)[2], [3., 2.9, 3.])


def test_a_method_that_spoils_a_run_is_not_asked_about_and_octaves_are_powers_of_two():
    bf16 = (np.zeros(2), np.array([3., 4.]), np.log([3., 3.]))
    fine = (np.zeros(2), np.array([3., 4.]), np.log([3.19, 3.1]))
    spoilt = (np.zeros(2), np.array([3., 4.]), np.log([3.1, 3.21]))
    points = {law.BF16: bf16, FORWARD: fine, BACKWARD: spoilt}
    assert list(fitting.stable(points)) == [law.BF16, FORWARD]
    n = np.log(3e7)
    ratios = np.array([24.6, 25.2, 49.2, 197, 394, 807])
    assert fitting.octave(n, n + np.log(ratios)).tolist() == [5, 5, 6, 8, 9, 10]


def test_the_lasting_form_predicts_the_gaps_of_larger_models_better_than_the_papers(
        fitted, lasting, paper):
    "the first two have a BF16 run of their size; data/larger.csv is in no fit"
    path = os.path.join(os.path.dirname(PAPER), "larger.csv")
    n, d, y = runs.read(path)[0]["QuEST", "SR-absmax"]
    loss_of_bf16 = {N: L for N, _, L in np.exp(paper[law.BF16]).T}
    measured = np.exp(y[:2]) - [loss_of_bf16[N] for N in np.exp(n[:2])]
    errors = []
    for base, methods in (fitted, lasting):
        fit = fitting.compose(base, methods, "QuEST", "SR-absmax")
        gap = np.exp(law.log_loss(fit.theta, n, d)) - np.exp(law.log_loss(base.theta, n, d))
        errors.append(abs(gap[:2] - measured).mean())
    assert errors[1] <= errors[0] / 2
    assert share_inside(fit, (n, d, y)) == 1


# ---- the table of validate

def test_a_cell_of_the_table_is_what_a_computation_by_hand_gives(paper):
    "the backward passes, delta alone: it is the median of the gaps of ln L"
    few = {method: paper[method] for method in (law.BF16, ("BF16", "SR-absmax"))}
    rows = [row for row in crossval.validate(few, [fitting.LASTING], ["the most tokens"], 10)
            if row.kind == "backward"]
    n, d, y = few["BF16", "SR-absmax"]
    of_bf16 = {(N, D): L for N, D, L in zip(*few[law.BF16])}
    gap = y - [of_bf16[place] for place in zip(n, d)]
    octaves = np.round(np.log2(np.exp(d - n)))
    errors = []
    for octave in (7, 8, 9, 10):        # Two octaves are the fewest that a law can be fitted to.
        n_base, d_base, _ = few[law.BF16]
        kept = np.round(np.log2(np.exp(d_base - n_base))) < octave
        theta = fitting.fit_best(fitting.STARTS, fitting.BASE,
                                 fitting.select(few[law.BF16], kept))
        share = np.expm1(np.median(gap[octaves < octave]))
        for i in np.flatnonzero(octaves == octave):
            measured = np.exp(y[i]) - np.exp(of_bf16[n[i], d[i]])
            errors.append(share * np.exp(law.log_loss(theta, n[i:i + 1], d[i:i + 1])[0]) - measured)
    count, size, bias, inside = crossval.summary(rows)
    assert count == len(errors) == 13
    assert abs(size - np.mean(np.abs(errors))) <= 1e-4
    assert abs(bias - np.mean(errors)) <= 1e-4
    assert inside == np.mean([row.is_inside for row in rows])


def test_a_summary_keeps_the_sign():
    rows = [crossval.Asked("", "both", "one size", error, error > 0) for error in (.01, -.04, .03)]
    assert np.allclose(crossval.summary(rows), (3, .08 / 3, 0, 2 / 3))


README_TABLE = os.path.join(ROOT, "tools", "scaling", "README.md")


def readme_lines(name):
    with open(README_TABLE) as file:
        return [line.strip() for line in file if line.strip().startswith(f"{name} ")]


def test_the_table_of_the_readme_is_the_commands_where_that_is_quick():
    "the numbers of the paper's form, whose intervals need no group left out, for one kind of split"
    split = "the largest size"
    rows = list(crossval.validate(runs.read(PAPER)[0], [fitting.PAPER], [split]))
    printed = [line for line in readme_lines("quartet.csv") if split in line]
    computed = crossval.table("quartet.csv", rows)
    assert len(computed) == len(printed) == 4
    for line, whole in zip(computed, printed):
        assert whole.startswith(line)


@pytest.mark.slow
@pytest.mark.parametrize("path", [PAPER, SECOND])
def test_the_table_of_the_readme_is_the_commands(path):
    name = os.path.basename(path)
    rows = list(crossval.validate(runs.read(path)[0]))
    assert crossval.table(name, rows) == readme_lines(name)


def test_validate_prints_a_line_for_each_kind_and_split(cli, tmp_path):
    points, _, _ = world(noise=1e-3, laws={law.BF16: TRUE, BACKWARD: WORLD[BACKWARD]})
    rows = [f"{N:.0f},{D:.0f},{','.join(method)},{L:.5f}\n"
            for method, runs_of_it in points.items() for N, D, L in np.exp(runs_of_it).T
            if N < 2e8 and D / N < 300]
    (tmp_path / "mine.csv").write_text(HEAD + "".join(rows))
    code, out, _ = cli("validate", "mine.csv")
    lines = [line for line in out.splitlines() if line.startswith("mine.csv")]
    assert code == 0
    kinds = [line[13:38].split(None, 1) for line in lines]
    # Three sizes cannot spare one.
    found = [(kind, split.strip()) for kind, split in kinds]
    splits = ("the most tokens", "one ratio")
    assert found == [(kind, split) for kind in ("BF16", "backward") for split in splits]


# ---- what is read, and what is refused

HEAD = "params,tokens,forward,backward,loss\n"


def test_runs_that_diverged_are_listed_and_not_fitted(cli, tmp_path, paper):
    with open(PAPER) as file:
        text = file.read()
    diverged = "3e7,1e9,BF16,BF16,nan\n3e7,2e9,BF16,BF16,inf\n4e7,2e9,QuEST,BF16,\n"
    (tmp_path / "bad.csv").write_text(text + diverged)
    points, left_out = runs.read(tmp_path / "bad.csv")
    assert len(left_out) == 4
    assert sum("diverged:" in sentence for sentence in left_out) == 3
    assert points.keys() == paper.keys()
    assert all(np.array_equal(points[method], paper[method]) for method in paper)
    code, _, err = cli("advise", "--runs", tmp_path / "bad.csv", "--params", "1B",
                       "--tokens", "20B")
    assert code == 0
    assert err.count("diverged:") == 3 and "3e7,1e9,BF16,BF16,nan" in err


def bf16_lines(*losses):
    return "".join(f"{3e7 * (1 + i % 3)},{1e9 * (1 + i)},BF16,BF16,{loss}\n"
                   for i, loss in enumerate(losses))


ONE_SIZE = "".join(f"3e7,{d}e9,BF16,BF16,3.{d}\n" for d in range(1, 9))
ONE_LENGTH = "".join(f"{n}e7,1e9,BF16,BF16,3.{n}\n" for n in range(1, 9))


@pytest.mark.parametrize("text, message", [
    (HEAD + bf16_lines(3, 3, 3, 3, 3, 3),
     "has 6 coefficients and needs at least 7 BF16 runs, got 6"),
    (HEAD + ONE_SIZE, "at least three model sizes, got 1"),
    (HEAD + ONE_LENGTH, "at least three numbers of tokens, got 1"),
    (HEAD + "3e7,1e9,QuEST,BF16,3.3\n", "no run with forward and backward BF16"),
    (HEAD + bf16_lines(3, 3) + bf16_lines(4), "line 4 repeats line 2"),
    (HEAD + bf16_lines(3, -1), "line 3: a loss must be positive, got -1"),
    (HEAD + bf16_lines(0), "line 2: a loss must be positive, got 0"),
    (HEAD + bf16_lines("three"), "line 2: could not convert string to float: 'three'"),
    (HEAD + "0,1e9,BF16,BF16,3\n", "line 2: params and tokens must be positive"),
    (HEAD + "3e7,,BF16,BF16,3\n", "line 2: params and tokens must be positive"),
    (HEAD + "3e7,1e9,BF16,BF16\n", "line 2: 4 fields, the first line has 5"),
    (HEAD + "3e7,1e9,,BF16,3\n", "line 2: forward or backward is empty"),
    (HEAD, "no run with forward and backward BF16"),
    ("", "has no column params, tokens, forward, backward, loss"),
    ("params,tokens,forward,loss\n",
     "has no column backward; its first line must name params,tokens,forward,backward"),
])
def test_a_bad_file_stops_with_one_sentence(cli, tmp_path, text, message):
    (tmp_path / "runs.csv").write_text(text)
    code, out, err = cli("fit", tmp_path / "runs.csv")
    assert code == 2
    assert message in err and err.count("\n") == 1
    assert not out


@pytest.mark.parametrize("args, message", [
    (("fit", "nowhere.csv"), "cannot read nowhere.csv: No such file"),
    (("fit", ROOT), "Is a directory"),
    (("fti",), "invalid choice: 'fti'"),
    ((), "the following arguments are required: command"),
    (("advise", "--params", "1B"), "required: --tokens"),
    (("advise", "--params", "1Q", "--tokens", "2B"), "'1Q' is not a number like 1.5B"),
    (("advise", "--params", "-1B", "--tokens", "2B"), "expected one argument"),
    (("advise", "--params", "0", "--tokens", "2B"), "must be positive and finite, got 0"),
    (("advise", "--params", "nan", "--tokens", "2B"), "must be positive and finite, got nan"),
    (("advise", "--params", "1B", "--tokens", "2B", "--gpu", "rtx9090"),
     "gpu 'rtx9090' is not bops"),
    (("advise", "--params", "1B", "--tokens", "2B", "--gpu", "no.json"), "cannot read no.json"),
    (("regions", "--forward", "LSQ", "--backward", "LSQ"),
     "no run tells what LSQ : LSQ loses, so there is nothing to compare"),
    (("collect", "nothing/log.csv"), "there is no finished run: nothing/log.csv"),
])
def test_a_bad_command_stops_with_one_sentence(cli, args, message):
    code, out, err = cli(*args)
    sentences = [line for line in err.splitlines() if not line.startswith("left out")]
    assert code == 2 and not out
    assert len(sentences) == 1 and message in sentences[0]


# ---- the commands

def test_fit_prints_the_law_its_uncertainty_and_what_it_predicts(cli, tmp_path):
    code, out, err = cli("fit")
    assert code == 0
    assert "marked with #: 8, 21, 56" in err
    for part in ("1.524e+05   2.", "QuEST : BF16", "0.648  0.", "twice the size", "measured 2.461"):
        assert part in out
    drawn = (tmp_path / "out" / "law.svg").read_text()
    assert drawn.count(">30.5M<") == 2
    assert drawn.count(">822M<") == 1
    assert ">QuEST : SR-absmax<" in drawn


@pytest.mark.parametrize("noise", [0, 1e-3])
def test_a_fit_says_when_the_runs_do_not_tell_what_the_size_does(cli, tmp_path, monkeypatch, noise):
    points = grid([3e7, 6e7, 1e8], [1e9, 2e9, 4e9, 8e9], WITHOUT_SIZE_TERM, noise)
    rows = [f"{N:.0f},{D:.0f},BF16,BF16,{L:.5f}\n" for N, D, L in zip(*np.exp(points))]
    (tmp_path / "runs.csv").write_text(HEAD + "".join(rows))
    with monkeypatch.context() as patch:
        patch.setattr(crossval, "held_out", held_out_of_few_draws)
        code, out, _ = cli("fit", "runs.csv")
    assert code == 0
    assert "not determined: these runs do not tell what size does\n" in out
    assert "e+42" not in out                                    # no number where there is none
    assert "do not tell" not in cli("fit")[1]


@pytest.mark.parametrize("theta, missing", [
    (TRUE, []),
    (WITHOUT_SIZE_TERM, [0, 1]),
    (WITHOUT_DATA_TERM, [2, 3]),
    # Where a fit to such runs ended, on one machine.
    (np.append([-106, 39., 9.6, .39, .3, .37], [0] * 4), [0, 1]),
])
def test_a_term_is_not_identified_when_no_run_needs_it(theta, missing):
    n, d, _ = grid([3e7, 6e7, 1e8], [1e9, 2e9, 4e9, 8e9])
    fit = fitting.Fit(theta, theta[None], np.array([1e-4, 1e-3, 1e-2]))
    assert [i for i in range(6) if fitting.term_not_identified(fit, i, n, d)] == missing
    fit = fit._replace(residual_std=np.array([10.]))            # so noisy that no term is seen
    assert [i for i in range(6) if fitting.term_not_identified(fit, i, n, d)] == [0, 1, 2, 3]


def test_regions_prints_and_draws_the_map_and_says_what_was_not_measured(cli, tmp_path):
    code, out, _ = cli("regions")
    assert code == 0
    assert "predicted, not measured" in out and "This machine was not measured" in out
    assert "100M parameters: FP8:FP4, then FP4:FP4 from 119 (" in out
    assert "by the paper's form: 100M FP8:FP4 from 5, FP4:FP4 from 92; 1B FP8:FP4 from 5" in out
    assert "Llama 3 70B, 214 tokens a parameter: FP8:FP4 (in " in out
    drawn = (tmp_path / "out" / "regions.svg").read_text()
    assert drawn.count(">Gemma 3 27B<") == 2                    # a panel each


def test_runs_of_bf16_alone_have_a_law_and_nothing_to_compare(cli, tmp_path):
    with open(PAPER) as file:
        lines = [line for line in file if line.startswith("params") or ",BF16,BF16," in line]
    (tmp_path / "bf16.csv").write_text("".join(lines))
    code, out, _ = cli("fit", "bf16.csv")
    assert code == 0
    assert "1.524e+05" in out and "picture: out/law.svg" in out
    advise_command = ["advise", "--params", "1B", "--tokens", "20B", "--gpu", "bops"]
    for args, names in ((advise_command, "QuEST : RTN-absmax"),
                        (["regions"], "QuEST : SR-absmax")):
        code, out, err = cli(*args, "--runs", "bf16.csv")
        assert code == 2 and not out
        assert f"no run tells what {names} loses, so there is nothing to compare" in err


def test_a_picture_that_cannot_be_drawn_is_a_sentence(monkeypatch, tmp_path):
    def draw_nothing(plots):
        pass
    path = str(tmp_path / "x.nonsense")
    assert "no picture" in pictures.save_picture(path, (1, 1), 1, draw_nothing)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    path = str(tmp_path / "x.svg")
    sentence = pictures.save_picture(path, (1, 1), 1, draw_nothing)
    assert "matplotlib is not installed" in sentence


def test_advice_within_the_runs_is_given_and_outside_says_how_far(cli):
    def ask(params, tokens, *options):
        code, out, _ = cli("advise", "--params", params, "--tokens", tokens, *options)
        return out
    inside = ask("100M", "10B", "--gpu", "rtx5090")
    assert "EXTRAPOLATED" not in inside
    assert "predicted, not measured" not in inside and "RTX 5090" in inside
    outside = ask("1.5B", "100B", "--gpu", "h100")
    assert ("The question is EXTRAPOLATED: 1.5B parameters are 1.8 times the most of any run; "
            "100B tokens are 1.3") in outside
    assert ("What the budgets buy is EXTRAPOLATED: 3B parameters are 3.6 times the most of any "
            "run; 200B") in outside
    assert "predicted, not measured" in outside
    assert "10M parameters are 0.33 of the least" in ask("10M", "10B")
    assert ("RTX 5090 was only measured on linears of models of 1e+08 to 5.2e+10"
            in ask("30M", "3B", "--gpu", "rtx5090"))


def test_the_advice_is_the_lowest_loss_that_the_budget_pays_for(paper, capsys):
    few = {method: paper[method] for method in (law.BF16, ("QuEST", "BF16"), ("BF16", "SR-absmax"),
                                                ("BF16", "RTN-absmax"))}
    lasting = fit_all_once(few, fitting.LASTING)[:2]
    fitted = fit_all_once(few)[:2]
    bops = speeds.for_gpu("bops")
    N = 1e9
    D = 4e11
    advise.advise(few, *lasting, fitted, bops, N, D)
    printed = capsys.readouterr().out
    # By precision: (parameters, tokens) that the budget pays for, as multiples of N and D.
    training = {
        "BF16:BF16": (1, 1),
        "FP8:FP8": (1, 2),
        "FP8:FP4": (1, 3),
        "FP4:FP8": (1, 2.4),
        "FP4:FP4": (1, 4),
        "FP4:FP4-SR": (1, 4),
    }
    both = {
        "BF16:BF16": (1, 1),
        "FP8:FP8": (2, 1),
        "FP8:FP4": (2, 1.5),
        "FP4:FP8": (4, .6),
        "FP4:FP4": (4, 1),
        "FP4:FP4-SR": (4, 1),
    }
    chosen = []
    for form, sentence in ((lasting, "Fixed {} budget: {}, loss {:.3f} ("),
                           (fitted, "By the paper's form: {1}, loss {2:.3f}; next")):
        fits = {row.name: row.fit for row in advise.compared_precisions(*form, bops)}
        for budget, pays_for in (("training", training), ("inference and training", both)):
            losses = {}
            for name, (more_N, more_D) in pays_for.items():
                n = np.log([more_N * N])
                d = np.log([more_D * D])
                losses[name] = np.exp(law.log_loss(fits[name].theta, n, d)[0])
            best = min(losses, key=losses.get)
            assert sentence.format(budget, best, losses[best]) in printed
            chosen.append(best)
    assert len(set(chosen)) > 1                                 # The questions differ.


def test_an_answer_needs_no_torch():
    code = ("import sys, tools.scaling.__main__; "
            "assert 'torch' not in sys.modules and 'numpy' in sys.modules")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# ---- speeds from this repository's bench

COST = {"bf16": (4, 8), "fp8": (2, 5), "fp4": (1.5, 4), "fp4-sr": (1.5, 4.5)}


def write_bench(path, rows=tuple(COST), widths=(1024, 4096), scale_of_wide=1.):
    """
    writes a file as tools/bench.py does, all times invented

    scale_of_wide is a factor of the backward times from 4096 on, except in bf16
    """
    linears = []
    for width in widths:
        for n_out, n_in in ((3 * width, width), (width, width), (width, 3 * width)):
            for row in rows:
                forward_cost, backward_cost = COST[row]
                if width >= 4096 and row != "bf16":
                    backward_cost *= scale_of_wide
                weights = n_out * n_in / 1e6
                linears.append({
                    "tokens": 8192,
                    "out": n_out,
                    "in": n_in,
                    "row": row,
                    "forward_ms": forward_cost * weights,
                    "backward_ms": backward_cost * weights,
                    "ms": 0,
                })
    steps = [dict(size="30M", row=row, ms=ms, tokens_per_s=1, peak_gib=1)
             for row, ms in (("bf16", 100), ("fp4", 150))]
    bench = dict(gpu="Test GPU", date="2026-01-01", torch="2.11", linears=linears, steps=steps)
    path.write_text(json.dumps(bench))
    return str(path)


def test_the_bench_is_read_as_times_of_models_of_the_widths_measured(tmp_path):
    bench = speeds.for_gpu(write_bench(tmp_path / "bench.json", scale_of_wide=.5))
    assert bench.name == "Test GPU"
    assert "measured by make bench on 2026-01-01, torch 2.11" in bench.source
    narrow, wide = bench.sizes
    assert [narrow, wide] == [count_params(8, 1024), count_params(32, 4096)]
    assert np.allclose(regions.speedups(bench, "fp4", "fp4-sr", "bf16", narrow), (4 / 1.5, 12 / 6))
    assert np.allclose(regions.speedups(bench, "fp4", "fp4", "bf16", wide * 2),
                       (4 / 1.5, 12 / 3.5))
    assert bench.steps == ("A whole training step of 30M there: fp4 takes 1.50 of bf16's time.",)
    assert bench.outside(1e8) == "" and "was only measured on" in bench.outside(1e12)


def fake_linear(M, N, K, row, backend):
    "the bursts of a linear, in which bf16 takes twice as long as every other row"
    unit = 2 if row == "bf16" else 1
    return [lambda: dict(forward_ms=2. * unit), lambda: dict(ms=6. * unit, called_ms=7. * unit)]


def fake_steps(sizes, gemm):
    return [[dict(size="30M", row="bf16", ms=2.), dict(size="30M", row="fp4", ms=3.)]]


def test_what_make_bench_writes_is_what_is_read(tmp_path, monkeypatch):
    "tools/bench.py's own main on a made-up GPU, on which fp4 takes half of bf16's time"
    from tools import bench as writer
    copy = dict(name="copy", ms=1., terabytes_per_s=3., of_copy=1.)
    for name, value in {
        "clear_gpu": lambda: None,      # Collecting garbage 14 times takes a while.
        "kernels": lambda _: [copy],
        "where": lambda *_: [],
        "alone": lambda *_: [dict(row="bf16", ms=12.)],
        "product": lambda *_: [lambda: dict(ms=1.)],
        "linear": fake_linear,
        "steps": fake_steps,
        "program": lambda *_: 0,
        "report": str,
        "RESULTS": str(tmp_path / "bench.json"),
        "README": str(tmp_path / "README.md"),
    }.items():
        monkeypatch.setattr(writer, name, value)
    monkeypatch.setattr(writer.energy, "idle_watts", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Test GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(fp4, "build", lambda gemm: SimpleNamespace(is_compiled=True))
    (tmp_path / "README.md").write_text("<!-- bench --><!-- /bench -->")
    assert writer.main([]) == 0
    bench = speeds.for_gpu(writer.RESULTS)
    assert bench.name == "Test GPU" and bench.has("fp8")
    assert "30M there: fp4 takes 1.50 of bf16's time" in bench.steps[0]
    widths = {min(shape[1:]) for shape in writer.SHAPES + writer.WIDTHS}
    assert len(bench.sizes) == len(widths)
    assert np.allclose(regions.speedups(bench, "fp4", "fp4-sr", "bf16", 1e9), 2)


def test_a_gpu_without_fp8_is_compared_with_bf16(cli, tmp_path, monkeypatch):
    monkeypatch.setattr(regions, "RATIOS", COARSE_RATIOS)
    write_bench(tmp_path / "bench.json", rows=("bf16", "fp4"))
    code, out, _ = cli("regions")                               # finds this machine's file itself
    assert code == 0
    assert "Test GPU" in out and "BF16:FP4" in out and "not measured: on a GPU" not in out
    code, out, _ = cli("advise", "--params", "1B", "--tokens", "50B")
    assert code == 0
    assert "Test GPU" in out and "FP8" not in out and "fp4 takes 1.50 of bf16's time" in out
    assert "FP4:BF16" in out and "FP4:FP4-SR" in out


@pytest.mark.parametrize("text, message", [
    ("{", "is not JSON"),
    ("{}", "not a file of `make bench` (KeyError"),
    ("[]", "not a file of `make bench` (TypeError"),
    ('{"linears": [{"out": 1}]}', "not a file of `make bench` (KeyError"),
    ('{"linears": [], "steps": [], "gpu": 1, "date": 1, "torch": 1}',
     "no linears in bf16 and fp4"),
])
def test_a_bad_bench_file_stops_with_one_sentence(cli, tmp_path, text, message):
    (tmp_path / "b.json").write_text(text)
    code, out, err = cli("advise", "--params", "1B", "--tokens", "50B", "--gpu", "b.json")
    assert code == 2
    assert message in err and err.count("\n") == 1
    assert not out


def test_a_shape_that_did_not_fit_into_memory_counts_in_no_precision(tmp_path):
    path = tmp_path / "b.json"
    full = speeds.for_gpu(write_bench(path))
    bench = json.loads(path.read_text())
    for linear in bench["linears"]:
        if linear["row"] == "fp8" and linear["out"] == 3 * 4096:
            del linear["ms"]
            del linear["forward_ms"]
            del linear["backward_ms"]
    del bench["steps"][1]["ms"]
    path.write_text(json.dumps(bench))
    part = speeds.for_gpu(str(path))
    assert part.steps == ()
    assert part.sizes.tolist() == full.sizes.tolist()
    for row in speeds.ROWS:             # the other two shapes have 4 of the width's 7 squares
        assert np.allclose(np.divide(part.times[row], full.times[row]), [[1, 4 / 7]] * 2)


def set_nan(linears):
    linears[0]["forward_ms"] = float("nan")


def set_negative(linears):
    linears[0]["backward_ms"] = -100.


def leave_no_shape_complete(linears):
    "a different one of the four rows is missing for each shape"
    for i, linear in enumerate(linears):
        if i % 4 == i // 4 % 4:
            del linear["ms"]


def leave_out_fp4(linears):
    for linear in linears:
        if linear["row"] == "fp4":
            del linear["ms"]


@pytest.mark.parametrize("change, message", [
    (set_nan, "a time that is not positive"),
    (set_negative, "a time that is not positive"),
    (leave_no_shape_complete, "no shape that was measured"),
    (leave_out_fp4, "no linears in bf16 and fp4"),
])
def test_a_bench_file_that_tells_nothing_is_refused(tmp_path, change, message):
    path = tmp_path / "b.json"
    write_bench(path)
    bench = json.loads(path.read_text())
    change(bench["linears"])
    path.write_text(json.dumps(bench))
    with pytest.raises(UserError, match=message):
        speeds.for_gpu(str(path))


# ---- a sweep of your own

@pytest.mark.parametrize("size", [*PRESETS, *sweep.TOY])
def test_the_formula_for_parameters_is_the_models(size):
    preset = (PRESETS | sweep.TOY)[size]
    with torch.device("meta"):
        model = Llama(preset.model_config(320, 64), fp4.RECIPES["bf16"], torch.bfloat16)
    total = sum(parameter.numel() for parameter in model.parameters())
    outside = model.embed.weight.numel() + model.head.weight.numel()
    assert count_params(preset.n_layer, preset.n_embd) == total - outside


CORPUS = dict(fingerprint="a" * 16, vocabulary="b" * 16, vocab_size=320)


def write_log(folder, val=3.5, last=None, steps=5, corpus=CORPUS, resumed=(), **settings):
    "the log of a run, as quartet.py writes it; the first evaluation has a loss of 3.9"
    defaults = dict(size="tiny", steps=steps, precision="bf16", device="cpu", data="stdlib")
    cfg = quartet.resolve(quartet.Settings(**(defaults | settings)))
    last = last or steps
    text = run.log_head(vars(cfg), "CPU", "test", corpus)
    for step in range(1, last + 1):
        loss_after = {1: 3.9, last: val}.get(step)
        text += run.log_row(run.Step(step, 4., loss_after, 1e-3, 1., 10., 100., "n/a"))
        text += "".join(run.log_resumed(step, changes) for at, changes in resumed if at == step)
    folder.mkdir(parents=True)
    (folder / "log.csv").write_text(text)


def test_finished_runs_are_collected_and_the_others_are_listed(cli, tmp_path):
    out = tmp_path / "out"
    write_log(out / "a", 3.25, precision="bf16")
    write_log(out / "b", 3.5, precision="fp4", batch=4, seq=256)
    write_log(out / "c", 3.75, precision="fp4-sr", size="30M", steps=None, tokens=1_400_000,
              seq=256, last=10)
    write_log(out / "interrupted", last=3)
    write_log(out / "nan", float("nan"), batch=2)
    write_log(out / "up", 4.5, batch=1)
    write_log(out / "a.1", 3.3)
    write_log(out / "lr", precision="fp8", resumed=[(2, dict(lr=[0.1, 0.002]))])
    write_log(out / "spoilt", precision="nvfp4")
    with open(out / "spoilt" / "log.csv", "a") as file:
        file.write(run.log_diverged("a weight is not finite"))
    (out / "other").mkdir()
    (out / "other" / "log.csv").write_text("step,loss\n")
    (out / "binary").mkdir()
    (out / "binary" / "log.csv").write_bytes(b"\xff\xfe\0")
    (out / "folder" / "log.csv").mkdir(parents=True)
    write_log(out / "zero", precision="mxfp8")
    text = (out / "zero" / "log.csv").read_text()
    for name, (old, new) in {
        "no length": ('"steps": 5', '"steps": null'),
        "unknown size": ('"size": "tiny"', '"size": "mine"'),
    }.items():
        (out / name).mkdir()
        (out / name / "log.csv").write_text(text.replace(old, new))
    (out / "zero" / "log.csv").write_text(text.replace('"vocab": null', '"vocab": []'))
    code, text, err = cli("collect", out / "*" / "log.csv")
    rows = list(csv.DictReader(text.splitlines()))
    tiny = str(count_params(4, 128))
    assert code == 0
    assert [[row[column] for column in runs.COLUMNS] for row in rows] == [
        [tiny, str(5 * 8 * 256), "BF16", "BF16", "3.25"],
        [tiny, str(5 * 4 * 256), "QuEST", "RTN-absmax", "3.5"],
        [str(count_params(6, 640)), str(10 * 512 * 256), "QuEST", "SR-absmax", "3.75"],
    ]
    for name, reason in {
        "interrupted": "ended at step 3 of 5",
        "nan": "diverged: no finite",
        "a.1": "the same run as",
        "up": "diverged: validation loss 3.9 at first, 4.5",
        "other": "not a log of quartet.py",
        "binary": "not a log of quartet.py (it is not text)",
        "folder": "[Errno 21] Is a directory",
        "zero": "not a log of quartet.py (TypeError: vocab is [])",
        "no length": "not a log of quartet.py",
        "unknown size": "not a log of quartet.py",
        "lr": "resumed after step 2 with lr 0.1 -> 0.002",
        "spoilt": "a weight is not finite",
    }.items():
        assert f"{name}/log.csv: {reason}" in err
    (tmp_path / "runs.csv").write_text(text)
    points, _ = runs.read(tmp_path / "runs.csv")
    assert sum(len(n) for n, _, _ in points.values()) == len(rows)


def test_a_run_given_in_tokens_has_the_steps_that_were_trained(tmp_path):
    write_log(tmp_path / "t", size="30M", steps=None, tokens=1_400_000, seq=512, batch=512, last=5)
    assert sweep.read_finished(tmp_path / "t" / "log.csv")["tokens"] == 5 * 512 * 512


def test_every_precision_has_a_name_in_the_law_and_axes_are_part_of_it():
    assert sweep.METHODS.keys() <= fp4.RECIPES.keys()
    names = sweep.method_names(dict(precision="fp4-fwd", scale="", signs=""))
    assert names == ("QuEST", "BF16")
    names = sweep.method_names(dict(precision="fp4", scale="nearest"))
    assert names == ("QuEST scale=nearest", "RTN-absmax scale=nearest")
    assert sweep.method_names(dict(precision="mine")) == ("mine", "mine")


def test_a_run_that_was_resumed_longer_or_elsewhere_is_collected(tmp_path):
    changes = dict(steps=[3, 5], eval_every=[None, 2], device=["cuda", "cpu"], micro=[8, 4])
    write_log(tmp_path / "a", resumed=[(1, {}), (3, changes)])
    row = sweep.read_finished(tmp_path / "a" / "log.csv")
    assert row["tokens"] == 5 * 8 * 256 and row["fingerprint"] == CORPUS["fingerprint"]


@pytest.mark.parametrize("part", ["fingerprint", "vocabulary"])
def test_runs_that_are_known_to_be_of_two_corpora_are_not_mixed(cli, tmp_path, part):
    write_log(tmp_path / "a")
    write_log(tmp_path / "b", precision="fp4", corpus=CORPUS | {part: "c" * 16})
    write_log(tmp_path / "old", precision="fp8", corpus=None)
    code, out, err = cli("collect", tmp_path / "*" / "log.csv")
    values = f"{CORPUS[part]} in {tmp_path}/a, {'c' * 16} in {tmp_path}/b"
    assert code == 2 and not out
    assert f"differ in their {part} and cannot obey one law: {values}" in err
    code, out, _ = cli("collect", tmp_path / "a" / "log.csv", tmp_path / "old" / "log.csv")
    assert code == 0 and len(out.splitlines()) == 3


@pytest.mark.parametrize("setting, value", [("data", "python"), ("seq", 128)])
def test_runs_of_different_corpora_or_lengths_are_not_mixed(cli, tmp_path, setting, value):
    write_log(tmp_path / "a")
    write_log(tmp_path / "b", precision="fp4", **{setting: value})
    code, out, err = cli("collect", tmp_path / "a" / "log.csv", tmp_path / "b" / "log.csv")
    assert code == 2
    assert f"differ in their {setting} and" in err and not out


def test_a_sweep_trains_what_is_not_finished_and_its_runs_are_collected(cli, tmp_path, monkeypatch):
    source = "".join(f"def f{i}(x):\n    return x + {i}\n\n" for i in range(1500))
    (tmp_path / "text.py").write_text(source)
    corpus = prepare.prepare(str(tmp_path / "text.py"), 320, out=str(tmp_path / "corpus"))
    flags = ("--batch", "4", "--seq", "32", "--device", "cpu", "--sample_tokens", "4")
    for device in ("cpu", "cuda"):
        monkeypatch.setitem(sweep.SWEEPS, device, (("toy64",), (256, 512), corpus, 0, flags))
    monkeypatch.setattr(sweep, "PRESETS", dict(PRESETS))
    monkeypatch.setattr(quartet, "PRESETS", sweep.PRESETS)

    def keep_threads(count):
        "the other tests keep theirs"
    monkeypatch.setattr(torch, "set_num_threads", keep_threads)
    assert cli("sweep", "--out", "law")[0] == 0
    logs = glob.glob("law/*/log.csv")
    written = {path: os.stat(path).st_mtime_ns for path in logs}
    os.remove(logs[0])
    assert cli("sweep", "--out", "law")[0] == 0
    assert len(logs) == 4
    # A loss that rises can be seen.
    assert all(len(run.read_log(path).vals) == 2 for path in logs)
    assert [path for path in logs if os.stat(path).st_mtime_ns != written[path]] == logs[:1]
    code, text, _ = cli("collect", "law/*/log.csv")
    assert code == 0
    assert text.count("toy64") == 4 and text.count("QuEST,RTN-absmax") == 2

    # A signal ends the sweep, and not only the run that is being trained.
    def stopped(cfg):
        raise Stopped(signal.SIGTERM)
    monkeypatch.setattr(quartet, "train", stopped)
    code, _, err = cli("sweep", "--out", "law2")
    assert code == 143 and err == "scaling: stopped by SIGTERM\n"


def test_a_fit_to_runs_of_bf16_and_fp4_alone_can_be_asked_too(cli, tmp_path, monkeypatch):
    monkeypatch.setattr(crossval, "held_out", held_out_of_few_draws)
    monkeypatch.setattr(regions, "RATIOS", COARSE_RATIOS)
    sizes = [3e7, 6e7, 1e8]
    tokens = [1e9, 4e9, 1e10, 6e10]
    with open(tmp_path / "mine.csv", "w") as file:
        file.write(HEAD)
        for method, points in [
            ("BF16,BF16", grid(sizes, tokens, noise=1e-3)),
            ("QuEST,RTN-absmax", grid(sizes, tokens, quantised(.67, .9), 1e-3, 1)),
        ]:
            for N, D, L in np.exp(points).T:
                file.write(f"{N:.0f},{D:.0f},{method},{L:.5f}\n")
    code, out, _ = cli("fit", "mine.csv")
    assert code == 0
    assert "QuEST : RTN-absmax" in out
    code, out, _ = cli("advise", "--runs", "mine.csv", "--params", "1B", "--tokens", "20B",
                       "--gpu", "bops")
    assert code == 0
    assert "FP4:FP4 " in out and "FP4:FP8" not in out and "FP8:FP8" in out
    code, out, _ = cli("regions", "--runs", "mine.csv", "--gpu", "bops", "--backward", "RTN-absmax")
    assert code == 0
    assert "FP4:FP4" in out
