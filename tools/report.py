"""Several runs side by side: the mean over their seeds, gaps to the first row, curves"""
import itertools, statistics
from typing import NamedTuple
from fp4 import tables
from scaling.logs import label


class Row(NamedTuple):
    run: str
    seeds: int
    diverged: int       # of the seeds
    val: float          # mean of those that did not
    gap: float          # to the first row with the same seed: mean, and its standard error
    error: float
    noise: bool         # is the gap below twice its standard error?
    to_fp4: float       # the same three to fp4, where that is among the runs
    to_fp4_error: float
    to_fp4_noise: bool
    first: int          # the step of the first evaluation
    early: float        # the same two at that step: there seeds differ less, as each learns to copy at another step
    early_error: float
    tokens_per_s: float
    memory: str


def table(runs):
    rows, by_label = [], {}
    for run in runs: by_label.setdefault(label(run.config | dict(seed=0)), {})[run.config["seed"]] = run
    first, fp4 = next(iter(by_label.values())), by_label.get("fp4", {})
    for name, seeds in by_label.items():
        good = {seed: run for seed, run in seeds.items() if not run.diverged}
        mean = lambda values: statistics.mean(values) if values else None
        def gap(base, at=-1):
            if seeds is first or seeds is base: base = {}
            gaps = [run.vals[at] - base[seed].vals[at] for seed, run in good.items() if seed in base and not base[seed].diverged]
            error = statistics.stdev(gaps) / len(gaps) ** .5 if len(gaps) > 1 else None
            return mean(gaps), error, error is not None and abs(mean(gaps)) < 2 * error
        rows.append(Row(name, len(seeds), len(seeds) - len(good), mean([run.vals[-1] for run in good.values()]), *gap(first), *gap(fp4),
                        next((row[0] for run in seeds.values() for row in run.history if row[2] is not None), 0), *gap(first, 0)[:2],
                        statistics.median(row[3] for run in seeds.values() for row in run.history),
                        next((run.memory for run in seeds.values() if run.memory), "")))
    return rows


def text(rows, jobs):
    """rows as Markdown that can be read in a terminal as well"""
    many = max(row.seeds for row in rows) > 1
    cells = [["run", "seeds", "val loss", f"gap to {rows[0].run}", "gap to fp4", f"after {rows[0].first:,} steps", "tokens/s", "peak memory"]]
    show = lambda gap, error, noise=False: "" if gap is None else f"{gap:+.4f}" + ("" if error is None else f" ± {error:.4f}") + " (noise)" * noise
    for row in rows:
        gap, to_fp4 = show(row.gap, row.error, row.noise), show(row.to_fp4, row.to_fp4_error, row.to_fp4_noise)
        val = "diverged" * bool(row.diverged)
        if row.diverged and many: val += f" ({row.diverged} of {row.seeds})"
        if row.val is not None: val = f"{val} {row.val:.4f}".strip()
        early = show(row.early, row.early_error) if row.first == rows[0].first else ""
        cells.append([row.run, str(row.seeds), val, gap, to_fp4, early, f"{row.tokens_per_s:,.0f}", row.memory or "n/a"])
    hidden = [1] * (not many) + [4] * all(row.to_fp4 is None for row in rows)
    cells = [[cell for i, cell in enumerate(line) if i not in hidden] for line in cells]
    notes = ["A gap is the mean over the seeds, of two runs with the same seed, ± its standard error; "
             "(noise): less than twice that."] * many
    notes += [f"tokens/s: of each of {jobs} runs that share the machine."] * (jobs > 1)
    return "\n".join([tables.table(cells[0], cells[1:])] + [""] * bool(notes) + notes)


def curves(write, path, runs):
    """{label: [history of each seed]} as a picture: val loss as a line; of few runs the train loss, faint behind it"""
    try: from matplotlib.figure import Figure
    except ImportError: return "(no picture: matplotlib is not installed)"
    few = len(runs) <= 6
    figure = Figure(figsize=(7, 4 if few else 6), layout="constrained")
    plot = figure.subplots()
    colors, dashes = itertools.cycle(["0.4", "C3", "C0", "C2", "C1", "C4"]), ["-", "--", ":", "-."]
    for i, (color, (name, histories)) in enumerate(zip(colors, runs.items())):
        if few: plot.plot(*zip(*[row[:2] for row in histories[0]]), color=color, alpha=0.25, linewidth=1)
        at = [{row[0]: row[2] for row in history if row[2] is not None} for history in histories]
        steps = [step for step in at[0] if all(step in one for one in at)]
        vals = [statistics.mean(one[step] for one in at) for step in steps]
        plot.plot(steps, vals, color=color, linestyle=dashes[i // 6 % 4], label=f"{name}  {vals[-1]:.4f}" if vals else name)
    plot.set(xlabel="step", ylabel="loss")
    plot.legend(fontsize=None if few else 7)
    write(path, lambda file: figure.savefig(file, format="svg"))
    return path


def report(runs, path, write):
    """table on the terminal and as path.csv, curves as path.svg; returns the table as Markdown"""
    rows, by_label = table(runs), {}
    for run in runs: by_label.setdefault(label(run.config | dict(seed=0)), []).append(run.history)
    plain = lambda v: "" if v is None else str(round(v, 6)) if isinstance(v, float) else str(v)
    lines = [",".join(map(plain, line)) + "\n" for line in (Row._fields, *rows)]
    write(path + ".csv", lambda file: file.write("".join(lines).encode()))
    body = text(rows, max(run.config.get("jobs", 1) for run in runs))
    print(f"\n{body}\n\n{path}.csv, curves: {curves(write, path + '.svg', by_label)}")
    return body
