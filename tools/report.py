"""
Several runs side by side: a table of their losses, and pictures of their curves.

Runs that differ in nothing but the seed share a label, and are one row of the table. The first row
is what all others are compared with, and fp4 is a second such row. A gap is taken seed by seed,
because two runs with the same seed start from the same weights and see the same batches: what
differs between them is mostly the precision, while two seeds may end much further apart.

The end point is the final validation loss: it is what a conclusion rests on. The gap at the first
evaluation is secondary. There the seeds often differ less; but what differs there need not differ
at the end.

Beside a gap stands half its 95 % interval, from the row's own seeds or, between fp4 and its
variants, from what all of these rows say together (tools/gaps.py says when each is right). Rows of
another kind are not pooled: they differ more between seeds, or less.
"""
import collections
import itertools
import os
import statistics
from typing import NamedTuple, Optional

from data.files import atomic_write, atomic_write_text, check
from fp4.recipes import RECIPES
from tools import checkpoint, markdown
from tools.gaps import Gap, Pool, Share, gaps_to, pool_of, share_closed, smallest_visible
from tools.run import NO_KERNELS, label, log_end, log_path

NO_PICTURE = "(no picture: matplotlib is not installed)"
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
    found = table(runs)
    body = text(found)
    atomic_write_text(path + ".csv", csv_text(found.rows))
    picture = draw_curves(path + ".svg", histories_by_label(runs))
    print(f"\n{body}\n\n{path}.csv, curves: {picture}")
    return body, picture


def finish(cfg, history, spent):
    """Draw the curve of a run that is trained to its end, and say where everything is.

    cfg      the settings of the run
    history  its list of run.Step
    spent    what they have taken, an energy.Spent
    """
    curve = draw_curves(os.path.join(cfg.folder, "curve.svg"), {cfg.name: [history]})
    files = [log_path(cfg.folder), curve]
    if cfg.discard:
        checkpoint.discard(cfg.folder)
    else:
        files.append(checkpoint.newest_path(cfg.folder))
    # This is written last: nothing is done any more to a run that is finished.
    with open(log_path(cfg.folder), "a") as log:
        log.write(log_end(spent.memory, spent.energy))
    last = history[-1]
    bpb = "n/a" if last.bpb is None else f"{last.bpb:.4f}"
    print(f"\n{cfg.name}: final val loss {last.val:.4f}, {bpb} bits per byte; {', '.join(files)}")


def check_one_corpus(runs):
    """Raises UserError if two runs are known to be of different corpora or vocabularies."""
    for part in ("fingerprint", "vocabulary", "vocab_size"):
        names = {run.corpus[part]: run.config["name"] for run in runs if part in run.corpus}
        values = ", ".join(f"{value} in {name}" for value, name in names.items())
        check(len(names) < 2, f"these runs are of different corpora and cannot stand in one table: "
                              f"{part} {values}")


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
    gap: Gap                            # to the first row at the end
    to_fp4: Gap                         # to fp4 at the end, if that is another row
    closed: Share                       # of the gap from the first row to fp4, if that is known
    first: int                          # the step of the first evaluation
    early: Gap                          # at that step, to fp4 or else to the first row
    tokens_per_s: Optional[float]       # median of all steps of the runs that shared no machine
    memory: str                         # peak memory
    bpb: Optional[float] = None         # val as bits per byte of text


class Table(NamedTuple):
    rows: list                          # of Row
    reference: str                      # fp4, or the first row: what early gaps are to
    pool: Optional[Pool]                # of fp4 and its variants at the end
    early_pool: Optional[Pool]          # and at the first evaluation
    facts: list                         # sentences on where the runs come from


def table(runs):
    """The Table of these runs."""
    groups = by_label(runs)
    base = next(iter(groups))
    reference = second_reference(groups) or base
    pool, at_end = gaps_at_end(groups, base, reference)
    step = first_evaluation(groups)
    early = losses_after(groups, step)
    early_pool = pool_of(early, variants(groups))
    to_early = gaps_to(reference, early, early_pool)
    rows = []
    for name, seeds in groups.items():
        rows.append(make_row(name, seeds, step, *at_end[name], to_early.get(name, Gap())))
    return Table(rows, reference, pool, early_pool, provenance(runs))


def gaps_at_end(groups, base, reference):
    """The Pool of the final losses, and {label: (gap, to_fp4, closed)} as a Row has them."""
    final = final_losses(groups)
    pool = pool_of(final, variants(groups))
    to_base = gaps_to(base, final, pool)
    to_fp4 = {}
    closed = {}
    if reference != base:
        to_fp4 = gaps_to(reference, final | {base: {}}, pool)    # base has it as a gap to base
        closed = shares_closed(base, final, to_base["fp4"], to_fp4)
    return pool, {name: (to_base.get(name, Gap()), to_fp4.get(name, Gap()),
                         closed.get(name, Share())) for name in groups}


def second_reference(groups):
    """fp4, if that is not the first row and if there is a third one; else None."""
    base = next(iter(groups))
    others = groups.keys() - {base, "fp4"}
    return "fp4" if "fp4" in groups and others else None


def variants(groups):
    """The labels of fp4 and its variants."""
    return [name for name, seeds in groups.items() if all(map(is_variant, seeds.values()))]


def is_variant(run):
    """Is this a run of fp4, or of a variant that multiplies in 4 bits in the forward pass, and in
    all steps?"""
    if run.config.get("switch"):
        return False                    # That is another kind of row.
    precision = run.config["precision"]
    is_fp4 = precision.split("-")[0] == "fp4" and precision in RECIPES
    return is_fp4 and RECIPES[precision].forward and run.config.get("forward") != "off"


def shares_closed(base, final, gap, to_fp4):
    """{label: Share} of the gap from base to fp4 that rows close which are told apart from fp4.

    gap     from base to fp4. Nothing unless it is known to a third of itself: a share of a vague
            gap says nothing
    to_fp4  {label: Gap}. An interval is at least as wide as that of this gap, which may be pooled
    """
    if gap.half is None or gap.mean < 3 * gap.half:
        return {}
    shares = {}
    for name, to in to_fp4.items():
        if to.is_told_apart:
            share = share_closed(final[name], final["fp4"], final[base])
            low = (-to.mean - to.half) / gap.mean
            high = (-to.mean + to.half) / gap.mean
            shares[name] = Share(share.mean, min(share.low, low), max(share.high, high))
    return shares


def final_losses(groups):
    """{label: {seed: final validation loss}} of the runs that did not diverge."""
    losses = {}
    for name, seeds in groups.items():
        losses[name] = {seed: run.vals[-1] for seed, run in seeds.items() if not run.diverged}
    return losses


def losses_after(groups, step):
    """{label: {seed: validation loss after a step}} of the runs that did not diverge."""
    losses = {name: {} for name in groups}
    for name, seeds in groups.items():
        for seed, run in seeds.items():
            found = [row.val for row in run.history if row.step == step and row.val is not None]
            if found and not run.diverged:
                losses[name][seed] = found[0]
    return losses


def first_evaluation(groups):
    """The step of the first evaluation of the first row that has one, or 0."""
    for seeds in groups.values():
        for run in seeds.values():
            for row in run.history:
                if row.val is not None:
                    return row.step
    return 0


def make_row(name, seeds, step, to_base, to_fp4, closed, early):
    """The Row of one label; seeds is {seed: run}."""
    good = [run for run in seeds.values() if not run.diverged]
    alone = [run for run in seeds.values() if not shares_machine(run)]
    speeds = [row.tokens_per_s for run in alone for row in run.history]
    bpbs = [run.bpb for run in good]
    return Row(
        run=name,
        seeds=len(seeds),
        diverged=len(seeds) - len(good),
        val=statistics.mean(run.vals[-1] for run in good) if good else None,
        gap=to_base,
        to_fp4=to_fp4,
        closed=closed,
        first=step,
        early=early,
        tokens_per_s=statistics.median(speeds) if speeds else None,
        memory=next((run.memory for run in seeds.values() if run.memory), ""),
        bpb=statistics.mean(bpbs) if bpbs and None not in bpbs else None,
    )


def shares_machine(run):
    """Did other runs train on the same machine, so that its speed is not its own?"""
    return (run.config.get("jobs") or 1) > 1


# ---- where the runs come from

def provenance(runs):
    """Sentences on the states of the code, the machines and the corpora that these runs are of."""
    states = count_values(map(state_of_code, runs))
    facts = [f"The runs are of {len(states)} states of the code: {in_words(states)}."]
    if len(states) == 1:
        facts = [f"All runs are of one state of the code: {state_of_code(runs[0])}."]
    if any("-dirty" in state and "-dirty-" not in state for state in states):
        facts.append("What differs from the commit in a dirty one is not recorded.")
    devices = count_values(run.device for run in runs)
    if len(devices) > 1:
        facts.append(f"{len(devices)} devices: {in_words(devices)}.")
    jobs = count_values(run.config.get("jobs") or 1 for run in runs)
    if max(jobs) > 1:
        facts.append(f"Runs at a time: {in_words(jobs)}; where several share a machine, none has a "
                     "speed of its own.")
    n_unknown = sum(not run.corpus for run in runs)
    if n_unknown:
        facts.append(f"Whether all runs had the same corpus is not recorded in {n_unknown} of "
                     f"{len(runs)} logs.")
    mixed = mixed_backends(runs)
    if mixed:
        facts.append(f"Emulated in some seeds, computed by kernels in others: {', '.join(mixed)}.")
    return facts


def state_of_code(run):
    """The commit that trained a run, or those, where it was resumed with another."""
    resumed = [entry.get("commit", "not recorded") for entry in run.resumed]
    return ", then ".join(dict.fromkeys([run.commit, *resumed]))


def count_values(values):
    """{value: how often it occurs}, the most frequent first."""
    return dict(collections.Counter(values).most_common())


def in_words(counts):
    """What count_values() returns, such as 8322953 (38 runs), 4e74935 (19)."""
    first, *others = counts.items()
    listed = [f"{first[0]} ({first[1]} runs)", *(f"{value} ({n})" for value, n in others)]
    return ", ".join(listed)


def mixed_backends(runs):
    """The rows that kernels computed in some seeds and PyTorch in others."""
    rows = []
    for name, seeds in by_label(runs).items():
        backends = {run.backend for run in seeds.values()}
        if NO_KERNELS in backends and len(backends) > 1:
            rows.append(name)
    return rows


# ---- the table as CSV

def csv_text(rows):
    """The rows as the text of a CSV file, at full precision."""
    lines = [csv_columns(), *map(csv_fields, rows)]
    return "".join(",".join(line) + "\n" for line in lines)


def csv_columns():
    """The names of the columns: of a Gap, gap, gap_half, gap_own, gap_p and gap_holm."""
    names = []
    for name, kind in Row.__annotations__.items():
        names.append(name)
        if kind in (Gap, Share):
            names += [f"{name}_{field}" for field in kind._fields[1:]]
    return names


def csv_fields(row):
    fields = []
    for value in row:
        fields += map(csv_field, value if isinstance(value, (Gap, Share)) else [value])
    return fields


def csv_field(value):
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.8g}"
    return str(value)


def check_files(path):
    """Raises UserError if path.csv is not an earlier table, or path.svg a picture without one."""
    if is_table(path + ".csv"):
        return
    for name in (path + ".csv", path + ".svg"):
        check(not os.path.lexists(name),
              f"{name} is not of an earlier table, and would be replaced: choose another --name")


def is_table(path):
    """Does a file begin like one that report() has written, now or in an earlier version?"""
    beginning = ",".join(csv_columns()[:5]).encode() + b","
    try:
        with open(path, "rb") as file:
            return file.read(len(beginning)) == beginning
    except OSError:
        return False


# ---- the table as text

def text(table):
    """A Table as Markdown that can be read in a terminal as well."""
    several_seeds = max(row.seeds for row in table.rows) > 1
    columns = list(make_columns(table, several_seeds))
    head = [heading for heading, _ in columns]
    lines = list(zip(*[cells for _, cells in columns]))
    return f"{markdown.table(head, lines)}\n\n{markdown.bullets(notes_on(table))}"


def make_columns(table, several_seeds):
    """Yields (heading, [cell of each row]) for each column that has something to show."""
    rows = table.rows
    yield "run", [row.run for row in rows]
    if several_seeds:
        yield "seeds", [str(row.seeds) for row in rows]
    yield "val loss", [format_val(row, several_seeds) for row in rows]
    if any(row.bpb is not None for row in rows):
        yield "bits per byte", ["" if row.bpb is None else f"{row.bpb:.4f}" for row in rows]
    yield f"gap to {rows[0].run}", [format_gap(row.gap) for row in rows]
    if any(row.to_fp4.mean is not None for row in rows):
        yield "gap to fp4", [format_gap(row.to_fp4) for row in rows]
    if any(row.closed.mean is not None for row in rows):
        yield "gap closed", [format_closed(row.closed) for row in rows]
    yield secondary(table), [format_early(row.early) for row in rows]
    if any(row.tokens_per_s is not None for row in rows):
        yield "tokens/s", [format_speed(row.tokens_per_s) for row in rows]
    yield "peak memory", [row.memory or "n/a" for row in rows]


def secondary(table):
    return f"secondary: to {table.reference}, step {table.rows[0].first:,}"


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


def format_gap(gap):
    """A gap, such as +0.0400 ± 0.0058 * or +0.0400 ± 0.0900 (not told apart)."""
    if gap.half is None or gap.is_told_apart:
        return format_early(gap)
    return f"{format_early(gap)} (not told apart)"


def format_closed(share):
    """A share of a gap, such as 23 % (14 to 33)."""
    if share.mean is None:
        return ""
    return f"{share.mean * 100:.0f} % ({share.low * 100:.0f} to {share.high * 100:.0f})"


def format_early(gap):
    """A gap without the words that say what its interval shows."""
    if gap.mean is None:
        return ""
    parts = [f"{gap.mean:+.4f}"]
    if gap.half is not None:
        parts.append(f"± {gap.half:.4f}")
    if gap.is_found:
        parts.append("*")
    return " ".join(parts)


def format_speed(tokens_per_s):
    return "" if tokens_per_s is None else f"{tokens_per_s:,.0f}"


# ---- the notes below it

ONE_SEED = "One seed: nothing here tells a gap from chance. `--seeds 3` gives each gap an interval."
ABOUT_GAPS = (
    "The end point is the final validation loss. A gap is the mean, over the seeds, of the "
    "difference between two runs with the same seed, ± half its 95 % interval. Two rows are told "
    "apart if that leaves out zero. `*`: even if all gaps of the column are tested at once (Holm's "
    "method); whoever searches the table for its best row should trust only these."
)


def notes_on(table):
    """Paragraphs on what the intervals are made of, what they could have shown, and of what."""
    facts = " ".join(table.facts)
    if max(row.seeds for row in table.rows) == 1:
        return [ONE_SEED, facts]
    notes = [ABOUT_GAPS]
    if table.pool:
        notes += [about_pool(table.pool), about_power(table.pool)]
    else:
        notes.append("± is from the row's own seeds (Student's t).")
    if any(row.closed.mean is not None for row in table.rows):
        notes.append(about_closed(table.rows[0].run))
    return [*notes, about_secondary(table), facts]


def about_pool(pool):
    """Which intervals are pooled, and whether the rows look as if they may be."""
    return (
        "± between fp4 and its variants that multiply in 4 bits in the forward pass is from what "
        f"these {len(pool.rows)} rows say together: a standard error of {pool.error:.4f}, with "
        f"{pool.df} degrees of freedom. Two of them are told apart if they differ by more than "
        f"{pool.half:.4f}. {evenness(pool)} Everywhere else ± is from the row's own seeds "
        "(Student's t)."
    )


def evenness(pool):
    """Do the rows of a pool look as if their seeds spread alike?"""
    often = f"in {pool.p_alike * 100:.0f} % of cases"
    premise = "This takes the seeds of these rows to spread alike"
    if pool.is_alike:
        return f"{premise}; rows that do look at least as uneven as these {often}."
    return (f"{premise}, which is in doubt: {pool.widest} has {pool.share * 100:.0f} % of all "
            f"squared deviations, and of rows that do, one has as much {often}. So where a row's "
            "own interval is wider, it stands here.")


def about_power(pool):
    """How small a gap these runs could have shown."""
    gap = smallest_visible(pool.error, pool.df)
    at_best = "" if pool.is_alike else " at best"
    return (f"A gap below {gap:.3f} between two of these rows would probably not have been seen: "
            f"one of {gap:.3f} is told apart with a probability of 80 %{at_best}.")


def about_closed(base):
    """What the column of closed shares says."""
    return (f"gap closed: how far a row ends below fp4, as a share of the gap from {base} to fp4, "
            "with its 95 % interval (Fieller's theorem, because both are uncertain; at least as "
            "wide as that of the gap to fp4). It is there for rows that are told apart from fp4. "
            "It is not corrected for the number of rows: after a search, trust it where the gap "
            "has `*`.")


def about_secondary(table):
    """What the column of the first evaluation shows, and what it cannot."""
    step = table.rows[0].first
    note = (f"secondary: the gap to {table.reference} after {step:,} steps. What differs there "
            "need not differ at the end.")
    pool = table.early_pool
    if pool:
        note += (f" The pooled standard error is {pool.error:.4f}, with {pool.df} degrees of "
                 "freedom: two of these rows are told apart there if they differ by more than "
                 f"{pool.half:.4f}. {evenness(pool)}")
    return note


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
