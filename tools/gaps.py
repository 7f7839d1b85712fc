"""
Is a gap between two rows of a table more than chance? Its 95 % interval, and what it can see.

Two runs with the same seed start from the same weights and see the same batches. So the gap between
two rows is the mean, over the seeds, of the difference between two such runs. With other seeds it
would have come out differently. How differently is estimated from what the seeds disagree about,
in one of two ways:

own       from the row's own differences, by Student's t. It assumes nothing about other rows. But
          three seeds say little about their own spread: the interval is 4.3 standard errors wide
          to either side, where many seeds would need 2.
pooled    from what is left of the losses of many rows, once each row's mean and each seed's mean
          are taken away. 18 rows of three seeds have 34 such numbers to spare (degrees of
          freedom), and the interval is 2.03 standard errors wide. It assumes that the seeds of all
          these rows spread alike.

A pool is trusted only as far as that assumption goes. `p_alike` is the probability that rows which
do spread alike look as uneven as these. Where it is below 5 %, the wider of the two intervals
counts. With three seeds it notices only a row that spreads several times as much as the others: a
pool is for rows of one kind, chosen before looking. Both ways take a gap to be normally distributed
over seeds, which so few cannot confirm.

Nothing here knows a run: losses are {row: {seed: loss}}.
"""
import functools
import math
import statistics
from typing import NamedTuple, Optional

import numpy as np

FALSE_ALARMS = 0.05                     # A 95 % interval misses the true gap in 5 % of cases.
POWER = 0.8
FEWEST_ROWS = 3                         # Fewer rows say little more together than each alone.
N_TABLES = 10_000                       # that are drawn for p_alike


class Gap(NamedTuple):
    """How far a row is above another. None stands where there are too few pairs of runs."""
    mean: Optional[float] = None
    half: Optional[float] = None        # half the width of the 95 % interval
    own: Optional[float] = None         # the same from the row's own seeds alone
    p: Optional[float] = None           # the probability of such a gap, or more, between equal rows
    holm: Optional[float] = None        # p corrected for the number of rows that are compared

    @property
    def is_told_apart(self):
        """Does the interval exclude zero?"""
        return self.half is not None and abs(self.mean) > self.half

    @property
    def is_found(self):
        """Is it told apart even if it was looked for among all rows?"""
        return self.holm is not None and self.holm < FALSE_ALARMS


class Share(NamedTuple):
    """How much of a gap a row closes: 0 is none of it, 1 all, and below 0 it makes it wider.

    None stands where the seeds say too little."""
    mean: Optional[float] = None
    low: Optional[float] = None         # ends of the 95 % interval
    high: Optional[float] = None


class Pool(NamedTuple):
    """What several rows say together about the spread of a gap between two of them."""
    rows: tuple                         # their names
    error: float                        # standard error of a gap
    df: int                             # degrees of freedom
    widest: str                         # the row that spreads most
    share: float                        # of the squares that are left, those of that row
    p_alike: float                      # that rows which spread alike have such a row

    @property
    def is_alike(self):
        """Is nothing to be seen against the assumption that all rows spread alike?"""
        return self.p_alike >= FALSE_ALARMS

    @property
    def half(self):
        """Half the width of the 95 % interval of a gap."""
        return t_critical(self.df) * self.error


# ---- Student's t

def t_tail(t, df):
    """The probability that |T| is above t, for a whole number df of degrees of freedom.

    The closed form of Abramowitz and Stegun, 26.7.3 and 26.7.4: an angle and a finite sum.
    """
    angle = math.atan2(t, math.sqrt(df))
    cosine = math.cos(angle)
    first = df % 2
    term = cosine ** first
    total = 0.0
    for exponent in range(first, df - 1, 2):
        total += term
        term *= cosine ** 2 * (exponent + 1) / (exponent + 2)
    inside = math.sin(angle) * total
    if df % 2:
        inside = (angle + inside) * 2 / math.pi
    return max(0.0, 1 - inside)


@functools.cache
def t_critical(df, tail=FALSE_ALARMS):
    """What |T| exceeds with the probability `tail`."""
    return root_of(lambda t: tail - t_tail(t, df), 0, 1e6)


def root_of(rising, low, high):
    """Where a rising function is zero, by bisection."""
    for _ in range(60):
        middle = (low + high) / 2
        if rising(middle) < 0:
            low = middle
        else:
            high = middle
    return high


def power(gap, df):
    """
    The probability that a true gap is told apart from zero.

    The gap is in standard errors. This is the noncentral t distribution: the estimated error is
    s times the true one, and the probability is averaged over the s that may come out.
    """
    critical = t_critical(df)
    normal_cdf = statistics.NormalDist().cdf
    weights = 0.0
    told_apart = 0.0
    for i in range(-500, 80):
        s = math.exp(i / 50)
        weight = math.exp(df * (math.log(s) - (s * s - 1) / 2))
        above = normal_cdf(gap - critical * s)
        below = normal_cdf(-gap - critical * s)
        weights += weight
        told_apart += weight * (above + below)
    return told_apart / weights


def smallest_visible(error, df):
    """The true gap that is told apart from zero with a probability of 80 %."""
    return error * root_of(lambda gap: power(gap, df) - POWER, 0, 100)


# ---- gaps

def gaps_to(reference, losses, pool=None):
    """{row: Gap} of each other row to the row `reference`, corrected for their number."""
    pooled = set(pool.rows) if pool else set()
    gaps = {}
    for row, of_seeds in losses.items():
        if row == reference:
            continue
        gap = own_gap(differences(of_seeds, losses.get(reference, {})))
        is_pooled = {row, reference} <= pooled
        gaps[row] = pooled_gap(gap, pool) if is_pooled else gap
    return with_holm(gaps)


def differences(row, reference):
    """The differences between the runs with the same seed."""
    return [loss - reference[seed] for seed, loss in row.items() if seed in reference]


def own_gap(pairs):
    """The Gap from the differences of its own pairs of runs."""
    if len(pairs) < 2:
        return Gap(*pairs)
    mean = statistics.mean(pairs)
    error = statistics.stdev(pairs) / math.sqrt(len(pairs))
    df = len(pairs) - 1
    half = t_critical(df) * error
    return Gap(mean, half, half, p_value(mean, error, df))


def pooled_gap(gap, pool):
    """A Gap with the interval of the pool; if its rows do not spread alike, with the wider one."""
    half = pool.half
    p = p_value(gap.mean, pool.error, pool.df)
    if not pool.is_alike:
        half = max(half, gap.own)
        p = max(p, gap.p)
    return gap._replace(half=half, p=p)


def share_closed(row, reference, base):
    """
    The Share gain / gap, of the means over the seeds of gain = reference - row and gap = reference
    - base. Each argument is {seed: loss}.

    Both parts of this fraction are uncertain, and not independent of each other. The interval is
    Fieller's: it has each share for which the mean of gain - share x gap may be zero, by Student's
    t. There is none if the mean of the gap may be zero as well.
    """
    seeds = [seed for seed in row if seed in reference and seed in base]
    gains = np.array([reference[seed] - row[seed] for seed in seeds])
    gaps = np.array([reference[seed] - base[seed] for seed in seeds])
    if len(seeds) < 2:
        return Share()
    scatter = np.cov(gains, gaps) / len(seeds)          # of the two means
    allowed = t_critical(len(seeds) - 1) ** 2 * scatter
    # (gain - share gap)^2 <= t^2 variance(gain - share gap) is a parabola in the share.
    a = gaps.mean() ** 2 - allowed[1, 1]
    b = gains.mean() * gaps.mean() - allowed[0, 1]
    c = gains.mean() ** 2 - allowed[0, 0]
    if a <= 0:
        return Share()
    spread = math.sqrt(max(0.0, b * b - a * c))
    return Share(float(gains.mean() / gaps.mean()), float((b - spread) / a),
                 float((b + spread) / a))


def p_value(mean, error, df):
    if error == 0:
        return 0.0 if mean else 1.0
    return t_tail(abs(mean) / error, df)


def with_holm(gaps):
    """The same {row: Gap} with p corrected by Holm's method.

    Of so many rows, some are told apart by chance. With the corrected p, the probability that any
    of them is stays below 5 %. The smallest p is multiplied by the number of rows, the next one by
    one less, and so on; none becomes smaller than the one before.
    """
    tested = sorted((gap.p, row) for row, gap in gaps.items() if gap.p is not None)
    corrected = dict(gaps)
    largest = 0.0
    for place, (p, row) in enumerate(tested):
        largest = max(largest, min(1.0, p * (len(tested) - place)))
        corrected[row] = gaps[row]._replace(holm=largest)
    return corrected


# ---- a pool

def pool_of(losses, rows):
    """The Pool of those rows that have every seed, or None if they are too few for one."""
    seeds = max((losses[row].keys() for row in rows), key=len, default=())
    complete = [row for row in rows if losses[row].keys() == seeds]
    if len(complete) < FEWEST_ROWS or len(seeds) < 2:
        return None
    table = np.array([[losses[row][seed] for seed in seeds] for row in complete])
    squares = (leftover(table) ** 2).sum(-1)
    df = (len(complete) - 1) * (len(seeds) - 1)
    variance = squares.sum() / df       # of one run
    widest = int(squares.argmax())
    share = share_of_widest(table)
    drawn = np.random.default_rng(0).normal(size=(N_TABLES, *table.shape))
    p_alike = float((share_of_widest(drawn) >= share).mean())
    error = math.sqrt(2 * variance / len(seeds))
    return Pool(tuple(complete), error, df, complete[widest], float(share), p_alike)


def leftover(tables):
    """What is left of tables [..., rows, seeds] without the means of their rows and seeds."""
    of_rows = tables.mean(-1, keepdims=True)
    of_seeds = tables.mean(-2, keepdims=True)
    return tables - of_rows - of_seeds + tables.mean((-2, -1), keepdims=True)


def share_of_widest(tables):
    """Of the squares that are left in each table, the share of the row that has most of them."""
    squares = (leftover(tables) ** 2).sum(-1)
    return squares.max(-1) / np.maximum(squares.sum(-1), 1e-30)
