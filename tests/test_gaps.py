"""Facts about gaps between rows: intervals, pools, corrections and what they could have shown."""
import math

import numpy as np
import pytest

from tools import gaps
from tools.gaps import (Gap, gaps_to, own_gap, pool_of, power, smallest_visible, t_critical,
                        t_tail, with_holm)

# Printed in any textbook: what |T| exceeds with a probability of 5 % and of 1 %.
STUDENT = {1: (12.706, 63.657), 2: (4.303, 9.925), 3: (3.182, 5.841), 4: (2.776, 4.604),
           5: (2.571, 4.032), 10: (2.228, 3.169), 29: (2.045, 2.756), 34: (2.032, 2.728),
           120: (1.980, 2.617)}


@pytest.fixture
def few_tables(monkeypatch):
    "p_alike from fewer tables, where many pools are made"
    monkeypatch.setattr(gaps, "N_TABLES", 200)


# ---- Student's t

@pytest.mark.parametrize("df", STUDENT)
def test_the_quantiles_of_students_t_are_those_of_the_printed_tables(df):
    found = (t_critical(df), t_critical(df, .01))
    assert [round(t, 3) for t in found] == list(STUDENT[df])


@pytest.mark.parametrize("df", [1, 2, 3, 6, 17])
def test_the_tail_of_students_t_is_the_integral_of_its_density(df):
    constant = math.gamma((df + 1) / 2) / math.sqrt(df * math.pi) / math.gamma(df / 2)
    for t in (0, .3, 1, 2.5, 7):
        x = np.linspace(0, t, 20001)
        density = constant * (1 + x ** 2 / df) ** (-(df + 1) / 2)
        assert t_tail(t, df) == pytest.approx(1 - 2 * np.trapezoid(density, x), abs=1e-7)


# ---- a gap from its own seeds

def test_a_gap_is_the_mean_of_paired_differences_with_a_95_percent_interval_of_students_t():
    losses = {"a": {0: 5.0, 1: 4.0, 2: 4.5}, "b": {2: 4.6, 0: 5.2, 1: 4.0, 7: 9.0}}
    gap = gaps_to("a", losses)["b"]             # differences .2, .0, .1; a has no seed 7
    error = .1 / math.sqrt(3)
    assert gap.mean == pytest.approx(.1) and gap.half == gap.own
    assert gap.half == pytest.approx(4.30265 * error, rel=1e-5)
    # The closed form for two degrees of freedom, at t = sqrt(3).
    assert gap.p == gap.holm == pytest.approx(1 - math.sqrt(3 / 5))
    assert not gap.is_told_apart and list(gaps_to("a", losses)) == ["b"]
    assert gaps_to("b", losses)["a"].mean == pytest.approx(-.1)


@pytest.mark.parametrize("pairs, expected", [
    ([], Gap()),
    ([.25], Gap(.25)),
    ([.25, .25], Gap(.25, 0, 0, 0)),
    ([0, 0], Gap(0, 0, 0, 1)),
])
def test_fewer_than_two_pairs_have_no_interval_and_equal_ones_an_empty_one(pairs, expected):
    assert own_gap(pairs) == expected


@pytest.mark.parametrize("mean, half, is_apart", [
    (.2, .1, True), (-.2, .1, True), (.1, .1, False), (-.05, .1, False), (.2, None, False)])
def test_two_rows_are_told_apart_if_the_interval_leaves_out_zero(mean, half, is_apart):
    assert Gap(mean, half).is_told_apart == is_apart


def test_five_percent_of_equal_rows_are_told_apart_by_three_seeds():
    rng = np.random.default_rng(0)
    pairs = rng.normal(size=(4000, 3))
    new = np.mean([own_gap(list(row)).is_told_apart for row in pairs])
    error = pairs.std(1, ddof=1) / math.sqrt(3)
    old = np.mean(abs(pairs.mean(1)) > 2 * error)
    bound = .015                        # four standard deviations of such a share
    assert abs(new - .05) < bound
    assert abs(old - .05) > 5 * bound   # "twice the standard error" is wrong in 18 %


# ---- a pool

# Without the means of rows (1.5, 3.5, 2.5) and seeds (2, 3): 0 0, -1 1, 1 -1.
BY_HAND = {"a": {0: 1, 1: 2}, "b": {0: 2, 1: 5}, "c": {0: 3, 1: 2}}


def test_a_pool_is_what_is_left_without_the_means_of_rows_and_seeds():
    pool = pool_of(BY_HAND, ["a", "b", "c"])
    assert pool.rows == ("a", "b", "c") and pool.df == 2
    # Four squares of two degrees of freedom are the variance of a run; a gap is of 2 x 2 runs.
    assert pool.error == pytest.approx(math.sqrt(4 / 2 * 2 / 2))
    assert pool.half == pytest.approx(4.30265 * math.sqrt(2), rel=1e-5)
    assert pool.widest == "b" and pool.share == pytest.approx(.5)


def test_the_error_of_a_pool_is_that_of_paired_differences():
    rng = np.random.default_rng(0)
    table = rng.normal(size=(7, 4)) + rng.normal(size=4) + rng.normal(size=(7, 1))
    losses = {str(i): dict(enumerate(row)) for i, row in enumerate(table)}
    variances = []
    for i in range(7):
        for j in range(i):
            variances.append((table[i] - table[j]).var(ddof=1) / 4)
    pool = pool_of(losses, [*losses])
    assert pool.error == pytest.approx(math.sqrt(np.mean(variances))) and pool.df == 6 * 3


def test_a_pool_is_of_the_rows_that_have_every_seed():
    less = BY_HAND | {"c": {0: 3}, "d": {0: 4, 1: 2}, "other": {0: 90, 1: 7}}
    assert pool_of(less, ["a", "b", "c", "d"]).rows == ("a", "b", "d")
    assert pool_of(less, ["a", "b", "c"]) is None           # two rows are too few,
    one_seed = {row: {0: losses[0]} for row, losses in BY_HAND.items()}
    assert pool_of(one_seed, [*one_seed]) is None           # and so is one seed
    assert pool_of(BY_HAND, []) is None


def test_only_gaps_between_two_rows_of_a_pool_have_its_interval():
    losses = BY_HAND | {"other": {0: 1.5, 1: 2.75}}
    pool = pool_of(losses, ["a", "b", "c"])
    found = gaps_to("a", losses, pool)
    assert found["b"].half == found["c"].half == pool.half
    assert found["b"].own != pool.half
    assert found["other"].half == found["other"].own
    assert all(gap.half == gap.own for gap in gaps_to("other", losses, pool).values())
    assert found["b"].p == pytest.approx(t_tail(2 / pool.error, 2))


@pytest.mark.parametrize("own, half, p", [(.1, .3, .04), (.5, .5, .2)])
def test_where_rows_do_not_spread_alike_the_wider_interval_counts(own, half, p):
    pool = gaps.Pool(("a", "b"), .3 / t_critical(10), 10, "b", .6, .049)
    mean = .3                           # the edge of the pool's interval, where p is .05
    gap = gaps.pooled_gap(Gap(mean, own, own, p), pool)
    assert gap == Gap(mean, pytest.approx(half), own, pytest.approx(max(p, .05)))
    alike = gaps.pooled_gap(Gap(mean, own, own, p), pool._replace(p_alike=.05))
    assert alike == Gap(mean, pytest.approx(.3), own, pytest.approx(.05))


SEEDS = {"bf16": [1.80, 1.79, 1.82, 1.78], "fp4": [1.90, 1.88, 1.91, 1.88],
         "better": [1.87, 1.86, 1.88, 1.87], "worse": [1.91, 1.89, 1.94, 1.88]}


@pytest.mark.parametrize("row", ["better", "worse"])
def test_a_share_is_in_its_interval_if_what_is_left_of_the_gain_is_not_told_from_zero(row):
    row, fp4, bf16 = [dict(enumerate(SEEDS[name])) for name in (row, "fp4", "bf16")]
    found = gaps.share_closed(row | {9: 5.}, fp4 | {8: 5.}, bf16 | {7: 5.})     # no pairs
    assert found == gaps.share_closed(row, fp4, bf16)

    def left(share):
        "the gap that is left of each seed's gain if a row closes this share"
        return own_gap([fp4[s] - row[s] - share * (fp4[s] - bf16[s]) for s in range(4)])

    assert left(found.mean).mean == pytest.approx(0, abs=1e-12)
    for end, inside in ((found.low, 1e-6), (found.high, -1e-6)):
        assert abs(left(end).mean) == pytest.approx(left(end).half)
        assert not left(end + inside).is_told_apart and left(end - inside).is_told_apart


def test_without_a_gap_or_with_one_seed_no_share_is_known():
    row, fp4, bf16 = [dict(enumerate(SEEDS[name])) for name in ("better", "fp4", "bf16")]
    assert gaps.share_closed({0: 1.87}, fp4, bf16) == gaps.Share()
    assert gaps.share_closed(row, fp4, {0: 1.8, 1: 1.9, 2: 2.0, 3: 1.8}) == gaps.Share()
    assert gaps.share_closed(row, fp4, fp4) == gaps.Share()
    assert gaps.share_closed(fp4, fp4, bf16)[:2] == (0, 0)


def test_95_percent_of_intervals_have_the_true_share_in_them():
    rng = np.random.default_rng(0)
    n_missed = 0
    n_missed_with_a_known_gap = 0
    for _ in range(1000):
        bf16, fp4, row = rng.normal([[0], [6], [12]], size=(3, 6))     # a gap twice as wide
        found = gaps.share_closed(*(dict(enumerate(losses)) for losses in (row, fp4, bf16)))
        n_missed += not found.low <= -1 <= found.high
        # An interval that takes the gap for known.
        gain = own_gap(list(fp4 - row))
        gap = (fp4 - bf16).mean()
        n_missed_with_a_known_gap += abs(gain.mean / gap + 1) > gain.half / gap
    assert abs(n_missed / 1000 - .05) < .02
    assert n_missed_with_a_known_gap / 1000 > .1


def draw(rng, spreads, n_seeds=3):
    "losses of rows that do not differ, but whose seeds spread so much; seeds differ more"
    table = rng.normal(size=(len(spreads), n_seeds)) * np.array(spreads)[:, None]
    table += 10 * rng.normal(size=n_seeds)
    return {str(i): dict(enumerate(row)) for i, row in enumerate(table)}


@pytest.mark.usefixtures("few_tables")
def test_five_percent_of_equal_rows_are_told_apart_by_a_pool_and_their_spread_is_seen_alike():
    rng = np.random.default_rng(0)
    n_apart = 0
    n_doubted = 0
    n_too_many = 0
    for _ in range(1000):
        losses = draw(rng, [1] * 6)
        pool = pool_of(losses, [*losses])
        n_apart += gaps_to("0", losses, pool)["1"].is_told_apart
        n_doubted += not pool.is_alike
        # A pool that takes the error of a run for that of a gap.
        n_too_many += gaps_to("0", losses, pool._replace(error=pool.error / 2 ** .5))["1"].p < .05
    assert abs(n_apart / 1000 - .05) < .02
    assert .02 < n_doubted / 1000 < .1
    assert n_too_many / 1000 > .1


@pytest.mark.usefixtures("few_tables")
def test_a_row_that_spreads_far_more_is_not_told_apart_because_the_others_agree():
    rng = np.random.default_rng(0)
    n_apart = 0
    n_by_pool_alone = 0
    n_doubted = 0
    for _ in range(400):
        losses = draw(rng, [1] * 9 + [12])
        pool = pool_of(losses, [*losses])
        n_doubted += not pool.is_alike and pool.widest == "9"
        n_apart += gaps_to("0", losses, pool)["9"].is_told_apart
        always = pool._replace(p_alike=1)
        n_by_pool_alone += gaps_to("0", losses, always)["9"].is_told_apart
    assert n_doubted / 400 > .9
    assert n_apart / 400 < .1
    assert n_by_pool_alone / 400 > .2


# ---- many rows at once

def test_holms_correction_by_hand():
    p = dict(a=.01, b=.04, c=.03, d=.005)
    found = with_holm({row: Gap(1, 1, 1, value) for row, value in p.items()} | {"none": Gap(1)})
    # In order .005 x 4, .01 x 3, .03 x 2, and .04 x 1, which is not below the one before.
    expected = dict(d=.02, a=.03, c=.06, b=.06, none=None)
    assert {row: gap.holm for row, gap in found.items()} == pytest.approx(expected)
    assert [row for row, gap in found.items() if gap.is_found] == ["a", "d"]
    assert list(found) == ["a", "b", "c", "d", "none"]
    assert with_holm({row: Gap(1, 1, 1, .7) for row in "ab"})["b"].holm == 1


@pytest.mark.usefixtures("few_tables")
def test_in_five_percent_of_tables_at_most_is_any_of_many_equal_rows_found():
    rng = np.random.default_rng(0)
    n_found = 0
    n_apart = 0
    for _ in range(400):
        losses = draw(rng, [1] * 18)
        found = gaps_to("0", losses, pool_of(losses, [*losses])).values()
        n_found += any(gap.is_found for gap in found)
        n_apart += any(gap.is_told_apart for gap in found)
    assert n_found / 400 < .09
    assert n_apart / 400 > .3           # Told apart one by one, some of 17 rows are.


# ---- what could have been seen

@pytest.mark.parametrize("df, gap", [(1, 4), (2, 5), (10, 3), (34, 2), (34, 0), (200, 1)])
def test_the_power_is_the_share_of_true_gaps_that_are_told_apart(df, gap):
    rng = np.random.default_rng(0)
    means = rng.normal(size=100_000) + gap
    errors = np.sqrt(rng.chisquare(df, size=100_000) / df)
    simulated = np.mean(abs(means / errors) > t_critical(df))
    assert power(gap, df) == pytest.approx(simulated, abs=.007)


def test_the_smallest_visible_gap_of_three_seeds_is_told_apart_in_80_percent_of_cases():
    rng = np.random.default_rng(0)

    def share(gap):
        pairs = rng.normal(size=(2000, 3)) * .3 + gap
        return np.mean([own_gap(list(row)).is_told_apart for row in pairs])

    error = .3 / math.sqrt(3)
    assert abs(share(smallest_visible(error, 2)) - .8) < .04
    assert share((1.96 + .84) * error) < .5         # what many seeds would show
    assert smallest_visible(.0053, 10) == pytest.approx(.0165, abs=1e-4)
