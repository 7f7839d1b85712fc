"""
Several runs side by side: a table of their losses and speeds, and pictures of their curves.

Runs that differ in nothing but the seed share a label, and are one row of the table. The first row
is what all others are compared with. Its gap to another row is taken seed by seed, because two
runs with the same seed start from the same weights and see the same batches: what differs between
them is mostly the precision, while two seeds may end much further apart.
"""
import itertools
import os
import statistics
from typing import NamedTuple, Optional

from data.files import atomic_write, atomic_write_text, check
from tools import markdown
from tools.run import label

NO_PICTURE = "(no picture: matplotlib is not installed)"
ABOUT_GAPS = ("A gap is the mean over the seeds, of two runs with the same seed, "
              "± its standard error;\n(noise): less than twice that.")
FEW_RUNS = 6                            # Up to here a picture has room for the training losses.
COLORS = ("0.4", "C3", "C0", "C2", "C1", "C4")
DASHES = ("-", "--", ":", "-.")


def report(runs, path):
    """
    Print the table of these runs and write it to path.csv, their curves to path.svg.

    Returns the table as Markdown, and path.svg or why there is no picture. Raises UserError if the
    runs are not of one corpus, so that their losses do not compare, and as check_files() does.
    """
    check_one_corpus(runs)
    check_files(path)
    rows = table(runs)
    body = text(rows, max(run.config.get("jobs") or 1 for run in runs))
    lines = [",".join(map(csv_field, line)) + "\n" for line in (Row._fields, *rows)]
    atomic_write_text(path + ".csv", "".join(lines))
    picture = draw_curves(path + ".svg", histories_by_label(runs))
    print(f"\n{body}\n\n{path}.csv, curves: {picture}")
    return body, picture


def check_one_corpus(runs):
    """Raises UserError if two runs are known to be of different corpora or vocabularies."""
    for part in ("fingerprint", "vocabulary", "vocab_size"):
        names = {run.corpus[part]: run.config["name"] for run in runs if part in run.corpus}
        values = ", ".join(f"{value} in {name}" for value, name in names.items())
        check(len(names) < 2, f"these runs are of different corpora and cannot stand in one table: "
                              f"{part} {values}")


def check_files(path):
    """Raises UserError if path.csv is not an earlier table, or path.svg a picture without one."""
    if is_table(path + ".csv"):
        return
    for name in (path + ".csv", path + ".svg"):
        check(not os.path.lexists(name),
              f"{name} is not of an earlier table, and would be replaced: choose another --name")


def is_table(path):
    """Does a file begin like one that report() has written?"""
    beginning = ",".join(Row._fields).encode()
    try:
        with open(path, "rb") as file:
            return file.read(len(beginning)) == beginning
    except OSError:
        return False


def csv_field(value):
    if value is None:
        return ""
    if isinstance(value, float):
        return str(round(value, 6))
    return str(value)


def by_label(runs):
    """{label: {seed: run}}, in the order in which the labels come first."""
    groups = {}
    for run in runs:
        name = label(run.config | dict(seed=0))
        groups.setdefault(name, {})[run.config["seed"]] = run
    return groups


def histories_by_label(runs):
    """{label: [history of each seed]}"""
    return {name: [run.history for run in seeds.values()] for name, seeds in by_label(runs).items()}


# ---- the numbers

class Row(NamedTuple):
    """A row of the table, and a line of the CSV file. None stands where there is no number."""
    run: str
    seeds: int
    diverged: int                       # number of seeds that diverged
    val: Optional[float]                # final validation loss, mean of the seeds that did not
    gap: Optional[float]                # to the first row at the end: mean over the seeds
    error: Optional[float]              # its standard error
    noise: bool                         # Is the gap below twice its standard error?
    to_fp4: Optional[float]             # the same three to fp4, where that is among the runs
    to_fp4_error: Optional[float]
    to_fp4_noise: bool
    first: int                          # the step of the first evaluation
    early: Optional[float]              # the gap to the first row at that step. There the seeds
    early_error: Optional[float]        # differ less: each learns to copy at another step.
    tokens_per_s: float                 # median over all steps
    memory: str                         # peak memory


class Gap(NamedTuple):
    mean: Optional[float] = None
    error: Optional[float] = None       # standard error of the mean; None of fewer than two pairs
    noise: bool = False                 # Is the mean below twice its standard error?


def table(runs):
    """The Rows of these runs, one for each label."""
    groups = by_label(runs)
    base = next(iter(groups.values()))
    fp4 = groups.get("fp4", {})
    return [make_row(name, seeds, base, fp4) for name, seeds in groups.items()]


def make_row(name, seeds, base, fp4):
    """The Row of one label. seeds, base (the first row) and fp4 are {seed: run}."""
    good = {seed: run for seed, run in seeds.items() if not run.diverged}
    steps = [step for run in seeds.values() for step in run.history]
    to_base = Gap()
    to_base_early = Gap()
    to_fp4 = Gap()
    if seeds is not base:
        to_base = paired_gap(good, base, -1)
        to_base_early = paired_gap(good, base, 0)
        if fp4 not in (seeds, base):
            to_fp4 = paired_gap(good, fp4, -1)
    return Row(
        run=name,
        seeds=len(seeds),
        diverged=len(seeds) - len(good),
        val=mean([run.vals[-1] for run in good.values()]),
        gap=to_base.mean,
        error=to_base.error,
        noise=to_base.noise,
        to_fp4=to_fp4.mean,
        to_fp4_error=to_fp4.error,
        to_fp4_noise=to_fp4.noise,
        first=next((step.step for step in steps if step.val is not None), 0),
        early=to_base_early.mean,
        early_error=to_base_early.error,
        tokens_per_s=statistics.median([step.tokens_per_s for step in steps] or [0]),
        memory=next((run.memory for run in seeds.values() if run.memory), ""),
    )


def paired_gap(runs, base, evaluation):
    """The Gap of runs to base, both {seed: run}, over the seeds that diverged in neither.

    evaluation says which of the validation losses is compared: 0 is the first, -1 the last.
    """
    gaps = []
    for seed, run in runs.items():
        if seed in base and not base[seed].diverged:
            gaps.append(run.vals[evaluation] - base[seed].vals[evaluation])
    if len(gaps) < 2:
        return Gap(mean(gaps))
    error = statistics.stdev(gaps) / len(gaps) ** 0.5
    return Gap(mean(gaps), error, abs(mean(gaps)) < 2 * error)


def mean(values): return statistics.mean(values) if values else None


# ---- the table as text

def text(rows, jobs):
    """The rows as Markdown that can be read in a terminal as well.

    jobs is the number of runs that trained at the same time.
    """
    several_seeds = max(row.seeds for row in rows) > 1
    columns = list(make_columns(rows, several_seeds))
    head = [heading for heading, _ in columns]
    lines = list(zip(*[cells for _, cells in columns]))
    notes = []
    if several_seeds:
        notes.append(ABOUT_GAPS)
    if jobs > 1:
        notes.append(f"tokens/s: of each of {jobs} runs that share the machine.")
    blank = [""] if notes else []
    return "\n".join([markdown.table(head, lines), *blank, *notes])


def make_columns(rows, several_seeds):
    """Yields (heading, [cell of each row]) for each column that has something to show."""
    base = rows[0]
    yield "run", [row.run for row in rows]
    if several_seeds:
        yield "seeds", [str(row.seeds) for row in rows]
    yield "val loss", [format_val(row, several_seeds) for row in rows]
    yield f"gap to {base.run}", [format_gap(row.gap, row.error, row.noise) for row in rows]
    if any(row.to_fp4 is not None for row in rows):
        yield "gap to fp4", [
            format_gap(row.to_fp4, row.to_fp4_error, row.to_fp4_noise) for row in rows
        ]
    yield f"after {base.first:,} steps", [format_early_gap(row, base) for row in rows]
    yield "tokens/s", [f"{row.tokens_per_s:,.0f}" for row in rows]
    yield "peak memory", [row.memory or "n/a" for row in rows]


def format_val(row, several_seeds):
    """The final loss, such as 4.5000 or diverged (1 of 3) 4.5000."""
    parts = []
    if row.diverged:
        parts.append("diverged")
        if several_seeds:
            parts.append(f"({row.diverged} of {row.seeds})")
    if row.val is not None:
        parts.append(f"{row.val:.4f}")
    return " ".join(parts)


def format_gap(gap, error, noise=False):
    """A gap, such as +0.0400 ± 0.0058 (noise)."""
    if gap is None:
        return ""
    parts = [f"{gap:+.4f}"]
    if error is not None:
        parts.append(f"± {error:.4f}")
    if noise:
        parts.append("(noise)")
    return " ".join(parts)


def format_early_gap(row, base):
    """The gap at the first evaluation, unless that of the first row was at another step."""
    if row.first != base.first:
        return ""
    return format_gap(row.early, row.early_error)


# ---- pictures

def draw_curves(path, runs):
    """Draw the loss over the steps as an SVG file. runs is {label: [history of each seed]}.

    The validation loss is a line, the mean over the seeds. Where the runs are few, the training
    loss of the first seed is drawn faintly behind it. Returns path, or why there is no picture.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return NO_PICTURE
    are_few = len(runs) <= FEW_RUNS
    figure = Figure(figsize=(7, 4 if are_few else 6), layout="constrained")
    plot = figure.subplots()
    styles = itertools.cycle(itertools.product(DASHES, COLORS))
    for (dash, color), (name, histories) in zip(styles, runs.items()):
        if are_few:
            steps = [row.step for row in histories[0]]
            losses = [row.loss for row in histories[0]]
            plot.plot(steps, losses, color=color, alpha=0.25, linewidth=1)
        steps, vals = common_evaluations(histories)
        means = [statistics.mean(of_seeds) for of_seeds in vals]
        legend = f"{name}  {means[-1]:.4f}" if means else name
        plot.plot(steps, means, color=color, linestyle=dash, label=legend)
    plot.set(xlabel="step", ylabel="loss")
    plot.legend(fontsize=None if are_few else 7)
    save_svg(figure, path)
    return path


def draw_gap(path, runs, tokens_per_step):
    """Draw the validation loss over the tokens as an SVG file. runs is as in draw_curves.

    A line is the mean over the seeds, the band around it their range. The training losses are left
    out and the axis of the loss begins just below the curves, so that the gap between them can be
    seen. Returns path, or why there is no picture.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return NO_PICTURE
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    plot = figure.subplots()
    for color, (name, histories) in zip(COLORS, runs.items()):
        draw_band(plot, color, name, histories, tokens_per_step)
    n_seeds = max(map(len, runs.values()))
    title = f"mean and range of {n_seeds} seeds" if n_seeds > 1 else None
    plot.set(xlabel="training tokens, in millions", ylabel="validation loss")
    plot.grid(alpha=0.3)
    plot.legend(title=title)
    save_svg(figure, path)
    return path


def draw_band(plot, color, name, histories, tokens_per_step):
    """Draw the mean of several seeds as a line, and their range as a band around it."""
    steps, vals = common_evaluations(histories)
    millions = [step * tokens_per_step / 1e6 for step in steps]
    means = [statistics.mean(of_seeds) for of_seeds in vals]
    lowest = [min(of_seeds) for of_seeds in vals]
    highest = [max(of_seeds) for of_seeds in vals]
    plot.fill_between(millions, lowest, highest, color=color, alpha=0.2, linewidth=0)
    plot.plot(millions, means, color=color, marker="o", markersize=4,
              label=f"{name}, {means[-1]:.4f} at the end")


def common_evaluations(histories):
    """The steps at which every history was evaluated, and the list of their losses at each."""
    vals = [{row.step: row.val for row in history if row.val is not None} for history in histories]
    steps = [step for step in vals[0] if all(step in of_seed for of_seed in vals)]
    return steps, [[of_seed[step] for of_seed in vals] for step in steps]


def save_svg(figure, path):
    """Write a figure as an SVG file that is the same whenever it is drawn from the same numbers."""
    import matplotlib
    # Without a fixed salt, the names inside the file are random.
    with matplotlib.rc_context({"svg.hashsalt": "quartet"}):
        atomic_write(path, lambda file: figure.savefig(file, format="svg", metadata={"Date": None}))
