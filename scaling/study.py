"""
The README's study: every precision and what each ingredient of fp4 buys, on one model, with several seeds.

    make ablation                                               # on a GPU; without one two rows of the tiny model
    python -m scaling.study --seeds 2 --jobs 14                 # the same with other flags of quartet.py
    python -m scaling.study scaling/data/study.csv out/study/*/log.csv     # its table from finished runs, without training

Runs go seed by seed, so that what is there compares. They are kept in scaling/data/study.csv: of each log its head and
the evaluated steps.
"""
import glob, os, shutil, sys
import torch
import quartet
from fp4 import RECIPES
from fp4.tables import README, replaced, write
from scaling.ablation import Failed, compare
from scaling.logs import label, parse, split, thin
from scaling.speeds import params
from scaling.table import report

# 25 tokens a parameter (of 10, bf16's seeds ended 0.2 apart), eight runs at a time. All rows, and what each ingredient of fp4 buys
STUDY = "--size 3M --data python --vocab 2048 --micro 128 --eval_every 400 --seeds 5 --jobs 8 --compile --discard --sample_tokens 0 --out out/study".split()
WHAT = [["--precision", *what.split()] for what in ("all", "fp4 --scale nearest", "fp4 --rotation none:32:32,32:none:32,32:32:none,128",
                                                    "fp4 --rounding nearest:sr:nearest,nearest:nearest:sr")]
SMALL = "--precision bf16,fp4 --size tiny".split()              # without a GPU
SAME = "size", "data", "vocab", "seq", "batch", "steps", "tokens", "tokens_per_param", "lr", "dtype"
HERE = os.path.dirname(os.path.abspath(__file__))
PICTURE, RUNS = os.path.join(HERE, "..", ".readme", "ablation.svg"), os.path.join(HERE, "data", "study.csv")


def finished(paths):
    """{name: (log, run)} of the finished runs in these files, in the order of the table of precisions; refuses to mix"""
    logs = [(path, log) for path in paths for log in split(open(path).read())]
    runs = {run.config["name"]: (log, run) for path, log in logs if (run := parse(log)).ended and (
            os.path.basename(path) != "log.csv" or run.config["name"] == os.path.basename(os.path.dirname(path)))}  # else set aside
    if not runs: raise Failed("there is no finished run")
    for what in SAME:
        values = {str(run.config.get(what)) for _, run in runs.values()}
        if len(values) > 1: raise Failed(f"these runs differ in --{what}: {', '.join(sorted(values))}")
    order = lambda item: ([*RECIPES].index(item[1][1].config["precision"]), label(item[1][1].config))
    return dict(sorted(runs.items(), key=order))


def main(argv):
    """train what is missing of the study, seed by seed, or none if files of finished runs are given; write the README's table"""
    files, gpu = [arg for arg in argv if arg.endswith(".csv")], torch.cuda.is_available()
    if not files:
        asked = [quartet.parse([*what, *STUDY * gpu, *argv]) for what in
                 ([SMALL] if not gpu else [[]] if "--precision" in " ".join(argv) else WHAT)]
        configs = sorted({cfg: None for one in asked for cfg in quartet.runs(one)}, key=lambda cfg: cfg.seed)
        compare(configs, os.path.join(asked[0].out, "ablation"), quartet.train, quartet.write, quartet.FREE, quartet.__file__)
        if not gpu: return                                      # the README's table is a GPU's
        files = glob.glob(os.path.join(asked[0].out, "*", "log.csv"))
    try: found = finished(files)
    except ValueError as error: raise Failed(str(error))
    runs = [run for _, run in found.values()]
    run = max(runs, key=lambda run: run.date)
    layers, C, _, _ = quartet.SIZES[run.config["size"]]
    tokens = run.history[-1][0] * run.config["batch"] * run.config["seq"]
    body = report(runs, os.path.join("out", "ablation"), quartet.write)
    head = (f"{params(layers, C) / 1e6:.1f} M parameters in the blocks, {tokens / 1e6:.0f} M tokens of "
            f"`{run.config['data']}`, {run.config['vocab'] or 4096:,} in the vocabulary; {run.device}; {run.date}.")
    write(README, replaced(open(README).read(), f"{head}\n\n![curves](.readme/ablation.svg)\n\n{body}", "ablation"))
    shutil.copyfile(os.path.join("out", "ablation.svg"), PICTURE)
    write(RUNS, "".join(thin(log) for log, _ in found.values()))


if __name__ == "__main__":
    sys.exit(quartet.cli(sys.argv[1:], main))
