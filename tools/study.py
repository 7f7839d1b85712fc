"""
The README's study: every precision and what each ingredient of fp4 buys, on one model, with several seeds; then the most
promising ones again, four times as long.

    make ablation                                               # on a GPU; without one two rows of the tiny model
    python -m scaling.study --seeds 2 --jobs 14                 # the same with other flags of quartet.py
    python -m scaling.study scaling/data/study.csv out/study/*/log.csv     # its table from finished runs, without training

Runs go seed by seed, so that what is there compares, the long ones first. They are kept in scaling/data/study.csv: of each log
its head and the evaluated steps.
"""
import glob, os, shutil, sys
import torch
import quartet
from fp4 import RECIPES
from fp4.tables import README, replaced, write
from scaling.ablation import Failed, compare, finish
from scaling.logs import label, parse, split, thin
from scaling.speeds import params
from scaling.table import report

# 25 tokens a parameter (of 10, bf16's seeds ended 0.2 apart), eight runs at a time; three seeds: longer runs tell more than more seeds
STUDY = "--size 3M --data python --vocab 2048 --micro 128 --eval_every 400 --seeds 3 --jobs 8 --compile --discard --sample_tokens 0 --out out/study".split()
ROWS = "all", "fp4 --scale nearest", "fp4 --rotation none:32:32,32:none:32,32:32:none,128", "fp4 --rounding nearest:sr:nearest,nearest:nearest:sr", \
       "fp4 --scale nearest --rotation 32:none:32", "fp4 --scale mse,absmax34,absmax", "fp4 --rotation 128:32:32", "fp4 --rounding eden"
FINALISTS = "bf16,fp4,fp4-sr", "fp4 --scale nearest", "fp4 --rotation 32:none:32", "fp4 --scale nearest --rotation 32:none:32", "fp4 --scale mse"
LONG = "--tokens_per_param 100 --eval_every 1600 --name 3M-100".split()
WHAT = [["--precision", *row.split(), *more] for rows, more in ((ROWS, []), (FINALISTS, LONG)) for row in rows]
SMALL = "--precision bf16,fp4 --size tiny".split()              # without a GPU
SAME = "size", "data", "vocab", "seq", "batch", "lr", "dtype"
HERE = os.path.dirname(os.path.abspath(__file__))
PICTURES, RUNS = os.path.join(HERE, "..", ".readme"), os.path.join(HERE, "data", "study.csv")


def finished(paths):
    """[(log, run), ...] of the finished runs in these files, the last of each name, in the order of the table of precisions;
    refuses to mix. Only what is kept of a log counts: then scaling/data/study.csv gives the same tables"""
    logs = [(path, log) for path in paths for log in split(open(path).read())]
    kept = {run.config["name"]: thin(log) for path, log in logs if (run := parse(log)).ended and (
            os.path.basename(path) != "log.csv" or run.config["name"] == os.path.basename(os.path.dirname(path)))}  # else set aside
    runs = [(log, parse(log)) for log in kept.values()]
    if not runs: raise Failed("there is no finished run")
    for what in SAME:
        values = {str(run.config.get(what)) for _, run in runs}
        if len(values) > 1: raise Failed(f"these runs differ in --{what}: {', '.join(sorted(values))}")
    order = lambda item: ([*RECIPES].index(item[1].config["precision"]), label(item[1].config))
    return sorted(runs, key=order)


def by_length(runs):
    """[("ablation", the shortest), ("ablation2", the next), ...]: only runs of one length compare"""
    lengths = {}
    for run in runs: lengths.setdefault(tuple(run.config.get(k) for k in ("steps", "tokens", "tokens_per_param")), []).append(run)
    return [("ablation" + f"{i}" * (i > 1), lengths[length]) for i, length in enumerate(sorted(lengths), 1)]


def section(runs, name):
    """the README's on runs of one length"""
    run = max(runs, key=lambda run: run.date)
    layers, C, _, _ = quartet.SIZES[run.config["size"]]
    tokens, picture = run.history[-1][0] * run.config["batch"] * run.config["seq"], f"{name}.svg"
    body = report(runs, os.path.join("out", name), quartet.write)
    shutil.copyfile(os.path.join("out", picture), os.path.join(PICTURES, picture))
    return (f"{params(layers, C) / 1e6:.1f} M parameters in the blocks, {tokens / 1e6:.0f} M tokens of "
            f"`{run.config['data']}`, {run.config['vocab'] or 4096:,} in the vocabulary; {run.device}; {run.date}.\n\n"
            f"![curves](.readme/{picture})\n\n{body}")


def main(argv):
    """train what is missing of the study, seed by seed, or none if files of finished runs are given; write the README's tables"""
    files, gpu, failure = [arg for arg in argv if arg.endswith(".csv")], torch.cuda.is_available(), None
    if not files:
        asked = [quartet.parse([*STUDY * gpu, *what, *argv]) for what in
                 ([SMALL] if not gpu else [[]] if "--precision" in " ".join(argv) else WHAT)]
        configs, rest = [*{cfg: None for one in asked for cfg in quartet.runs(one)}], (quartet.FREE, quartet.__file__)
        # the README's tables are a GPU's
        if not gpu: return compare(configs, os.path.join(asked[0].out, "ablation"), quartet.train, quartet.write, *rest)
        failure = finish(sorted(configs, key=lambda cfg: (cfg.seed, -cfg.tokens_per_param)), quartet.train, *rest)
        files = glob.glob(os.path.join(asked[0].out, "*", "log.csv"))
    try: found = finished(files)
    except (Failed, ValueError) as wrong: raise failure or Failed(str(wrong))
    parts = [section(runs, name) for name, runs in by_length([run for _, run in found])]
    write(README, replaced(open(README).read(), "\n\n".join(parts), "ablation"))
    write(RUNS, "".join(log for log, _ in found))
    if failure: raise failure


if __name__ == "__main__":
    sys.exit(quartet.cli(sys.argv[1:], main))
