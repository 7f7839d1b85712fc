"""
The same model in several precisions: from the same weights and on the same batches, for each seed.

    python quartet.py --precision bf16,fp4,quartet2 --seeds 3   # `all`: every row; --jobs 8: so many at a time
    make ablation                                               # the README's: on a GPU every row, five seeds
    python -m scaling.ablation --seeds 2                        # the same with other flags of quartet.py
    python -m scaling.ablation out/study/*/log.csv              # the README's table from finished runs, here or copied

Nothing is trained twice: what a run was, and whether it was finished, is in its log.csv. The same command goes on with
what is missing, an interrupted run from its checkpoint. Runs go seed by seed, so that what is there compares.
"""
import csv, ctypes, dataclasses, functools, glob, itertools, json, math, os, shutil, statistics, subprocess, sys, time
from typing import NamedTuple
import torch
from fp4 import AXES, RECIPES

# All rows, 25 tokens a parameter. Eight at a time: one such model leaves most of an H100 idle
STUDY = ("--precision all --size 3M --data python --vocab 2048 --micro 128 --eval_every 400 --seeds 5 --jobs 8 --compile "
         "--discard --sample_tokens 0 --out out/study").split()
SMALL = "--precision bf16,fp4 --size tiny".split()              # without a GPU
SAME = "size", "data", "vocab", "seq", "batch", "steps", "tokens", "tokens_per_param", "lr", "dtype"


PICTURE = os.path.join(os.path.dirname(__file__), "..", ".readme", "ablation.svg")


# ---- one run: its name, its log

def label(config):
    """fp4-nearest, fp4-signs-none, fp4-keep_first-1-seed2"""
    alone = lambda axis, v: axis == "scale" or sum(v in choices for choices in AXES.values()) == 1
    parts = [v if alone(axis, v) else f"{axis}-{v}" for axis in AXES if (v := config.get(axis))]
    parts += [f"{name}-{n}" for name in ("keep_first", "keep_last") if (n := config.get(name))]
    return "-".join([config["precision"], *parts, *[f"seed{config['seed']}"] * bool(config.get("seed"))])


class Run(NamedTuple):
    """what a log.csv says"""
    config: dict
    device: str
    history: list       # (step, loss, val loss or None, tokens/s), one a step
    date: str           # when it was finished; "": it was not
    memory: str

    vals     = property(lambda self: [row[2] for row in self.history if row[2] is not None])
    broken   = property(lambda self: bool(self.history) and not math.isfinite(self.history[-1][1]))
    ended    = property(lambda self: bool(self.date) or self.broken)
    diverged = property(lambda self: self.broken or not self.vals[-1] <= self.vals[0])      # NaN, or higher than at first


def read(path):
    """a ValueError says in a sentence what is wrong"""
    try:
        lines = open(path).read().splitlines()
        said = dict(line[2:].split(" ", 1) for line in lines if line.startswith("# "))
        rows = csv.DictReader(line for line in lines if not line.startswith("#"))
        rows = [row for row in rows if row["mfu"]]              # without: the line was cut off
        loss = lambda row: float(row["loss"]) if math.isfinite(float(row["norm"])) else math.nan
        val = lambda row: float(row["val"]) if row["val"] else None
        history = [(int(row["step"]), loss(row), val(row), float(row["tokens_per_s"])) for row in rows]
        date, _, memory = said.get("finished", "").partition(", peak memory ")
        return Run(json.loads(said["config"]), said["device"], history, date, memory)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"not a log of quartet.py ({type(error).__name__}: {error})")


def earlier(cfg, free):
    """the run in cfg's folder if it is this very one: all settings alike but for the free ones"""
    try: run = read(os.path.join(cfg.out, cfg.name, "log.csv"))
    except (OSError, ValueError): return None
    return run if all(run.config.get(k) == v for k, v in vars(cfg).items() if k not in free) else None


def set_aside(folder):
    """an earlier run of this name is not lost"""
    if not os.path.exists(folder) or os.listdir(folder) == ["log.txt"]: return         # that is from the process around us
    aside = next(f for i in itertools.count(1) if not os.path.exists(f := f"{folder}.{i}"))
    os.rename(folder, aside)
    print(f"{folder} existed and is now {aside}")


# ---- many runs

def compare(configs, path, train, write, free, script):
    """train what is missing, then write path.csv and path.svg; returns {name: why} of what failed. train(cfg) raises
    when it diverges; script is what a process of its own starts: quartet.py, or one that adds rows"""
    todo = []
    for cfg in configs:
        run, folder = earlier(cfg, free), os.path.join(cfg.out, cfg.name)
        if run and run.ended: print(f"{cfg.name} is finished")
        else: todo.append(dataclasses.replace(cfg, resume=run is not None and os.path.exists(f"{folder}/ckpt.pt")))
    failed = {}
    if configs[0].jobs > 1: failed = parallel(todo, configs[0].jobs, free, script)
    else:
        for cfg in todo:
            try: train(cfg)
            except Exception as error:
                run = earlier(cfg, free)
                if not (run and run.broken): raise
                print(error)
    found = [run for cfg in configs if (run := earlier(cfg, free)) and run.ended]
    if found: report(found, path, write)
    return failed


def parallel(todo, jobs, free, script):
    """the same, a process each; a line as each ends. Returns {name: the last line it said} of those that failed"""
    slots, running, failed, total = list(range(jobs)), {}, {}, len(todo)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads, gpus = str(max(1, cores // jobs)), torch.cuda.device_count()
    try:
        while todo or running:
            while todo and slots:
                cfg, slot = todo.pop(0), slots.pop(0)
                log = os.path.join(folder := os.path.join(cfg.out, cfg.name), "log.txt")
                if not cfg.resume: set_aside(folder)
                os.makedirs(folder, exist_ok=True)
                env = os.environ | dict(OMP_NUM_THREADS=threads, TORCHINDUCTOR_COMPILE_THREADS=threads, TQDM_DISABLE="1")
                if gpus > 1: env["CUDA_VISIBLE_DEVICES"] = str(slot % gpus)
                with open(log, "a") as out:
                    process = subprocess.Popen([sys.executable, script, *flags(cfg)], stdout=out, stderr=out, env=env,
                                               preexec_fn=die_with_parent)
                running[process] = cfg, slot, log, time.time()
            time.sleep(.1)
            for process in [p for p in running if p.poll() is not None]:
                cfg, slot, log, start = running.pop(process)
                slots.append(slot)
                run = earlier(cfg, free)
                if not (run and run.ended):
                    failed[cfg.name] = (open(log).read().strip().splitlines() or ["it said nothing"])[-1]
                    said = f"failed: {failed[cfg.name]}"
                elif run.diverged: said = f"diverged, seen at step {run.history[-1][0]}"
                else: said = f"val loss {run.vals[-1]:.4f}"
                print(f"[{total - len(todo) - len(running)}/{total}] {cfg.name}: {said} ({time.time() - start:.0f} s)", flush=True)
    finally:
        for process in running: process.kill()
    return failed


def flags(cfg):
    """cfg as a command line"""
    given = {f.name: v for f in dataclasses.fields(cfg) if (v := getattr(cfg, f.name)) != f.default}
    return [f"--{k}" if v is True else f"--{k}={v}" for k, v in given.items()]

# PR_SET_PDEATHSIG, SIGKILL: where the parent is killed no run goes on unseen
die_with_parent = functools.partial(ctypes.CDLL(None).prctl, 1, 9) if sys.platform == "linux" else None


# ---- table, curves

class Row(NamedTuple):
    run: str
    seeds: int
    diverged: int       # of the seeds
    val: float          # mean of those that did not
    gap: float          # to the first row with the same seed: mean, and its standard error
    error: float
    noise: bool         # is the gap below twice its standard error?
    tokens_per_s: float
    memory: str


def table(runs):
    rows, by_label = [], {}
    for run in runs: by_label.setdefault(label(run.config | dict(seed=0)), {})[run.config["seed"]] = run
    first = next(iter(by_label.values()))
    for name, seeds in by_label.items():
        vals = {seed: run.vals[-1] for seed, run in seeds.items() if not run.diverged}
        base = {} if seeds is first else {seed: run.vals[-1] for seed, run in first.items() if not run.diverged}
        gaps = [vals[seed] - base[seed] for seed in vals.keys() & base.keys()]
        mean = lambda values: statistics.mean(values) if values else None
        error = statistics.stdev(gaps) / len(gaps) ** .5 if len(gaps) > 1 else None
        rows.append(Row(name, len(seeds), len(seeds) - len(vals), mean(vals.values()), mean(gaps), error,
                        error is not None and abs(mean(gaps)) < 2 * error,
                        statistics.median(row[3] for run in seeds.values() for row in run.history),
                        next((run.memory for run in seeds.values() if run.memory), "")))
    return rows


def text(rows, jobs):
    """rows as Markdown that can be read in a terminal as well"""
    many = max(row.seeds for row in rows) > 1
    cells = [["run", "seeds", "val loss", f"gap to {rows[0].run}", "tokens/s", "peak memory"]]
    for row in rows:
        gap, val = "", "diverged" * bool(row.diverged)
        if row.gap is not None: gap = f"{row.gap:+.4f}"
        if row.error is not None: gap += f" ± {row.error:.4f}" + " (noise)" * row.noise
        if row.diverged and many: val += f" ({row.diverged} of {row.seeds})"
        if row.val is not None: val = f"{val} {row.val:.4f}".strip()
        cells.append([row.run, str(row.seeds), val, gap, f"{row.tokens_per_s:,.0f}", row.memory or "n/a"])
    if not many: cells = [line[:1] + line[2:] for line in cells]
    widths = [max(map(len, column)) for column in zip(*cells)]
    padded = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in cells]
    lines = ["| " + " | ".join(line) + " |" for line in padded]
    lines.insert(1, "|" + "|".join("-" * (w + 1) + (":" if i else "-") for i, w in enumerate(widths)) + "|")
    notes = ["A gap is the mean over the seeds, of two runs with the same seed, ± its standard error; "
             "(noise): less than twice that."] * many
    notes += [f"tokens/s: of each of {jobs} runs that share the machine."] * (jobs > 1)
    return "\n".join(lines + [""] * bool(notes) + notes)


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


# ---- the README's

def study(logs):
    """the finished runs of these logs, in the order of the table of precisions; refuses to mix"""
    runs = [(os.path.basename(os.path.dirname(path)), read(path)) for path in logs]
    runs = [run for folder, run in runs if run.ended and run.config["name"] == folder]      # else it was set aside
    if not runs: raise ValueError("there is no finished run")
    for what in SAME:
        values = {str(run.config.get(what)) for run in runs}
        if len(values) > 1: raise ValueError(f"these runs differ in --{what}: {', '.join(sorted(values))}")
    return sorted(runs, key=lambda run: ([*RECIPES].index(run.config["precision"]), label(run.config)))


def main(argv):
    import quartet                                              # here: quartet.py imports this file
    from fp4.bench import README, replaced, write
    from scaling.speeds import params
    logs, gpu = [arg for arg in argv if arg.endswith("log.csv")], torch.cuda.is_available()
    try:
        if not logs:
            argv = [*(STUDY if gpu else SMALL), *argv]
            code = subprocess.call([sys.executable, quartet.__file__, *argv])
            if code or not gpu: return code                     # the README's table is a GPU's
            logs = glob.glob(os.path.join(quartet.parse(argv).out, "*", "log.csv"))
        runs = study(logs)
        run = max(runs, key=lambda run: run.date)
        layers, C, _, _ = quartet.SIZES[run.config["size"]]
        tokens = run.history[-1][0] * run.config["batch"] * run.config["seq"]
        body = report(runs, os.path.join("out", "ablation"), quartet.write)
        shutil.copyfile(os.path.join("out", "ablation.svg"), PICTURE)
        head = (f"{params(layers, C) / 1e6:.1f} M parameters in the blocks, {tokens / 1e6:.0f} M tokens of "
                f"`{run.config['data']}`, {run.config['vocab'] or 4096:,} in the vocabulary; {run.device}; {run.date}.")
        write(README, replaced(open(README).read(), f"{head}\n\n![curves](.readme/ablation.svg)\n\n{body}", "ablation"))
    except (OSError, ValueError, quartet.Stop) as error:
        print(f"ablation: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
