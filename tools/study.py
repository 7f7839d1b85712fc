"""
The study of tools/README.md: every precision, and what each ingredient of fp4 buys, on one model
with several seeds; then the most promising variants again, four times as long.

    make ablation                               # on a GPU; without one, two rows of the tiny model
    python -m tools.study --seeds 2 --jobs 14   # the same with other flags of quartet.py
    python -m tools.study tools/study.csv out/study/*/log.csv       # only its tables, no training
    python -m tools.study tools/study.csv --against luq-int4        # prints gaps to another row

Runs go seed by seed, so that what is there at any time can be compared, and the long ones first.
What is worth keeping of their logs, which is the head and the evaluated steps, goes to study.csv.
The third command makes the tables from finished runs alone, and the last one writes nothing.
`python quartet.py --help` lists the flags.
"""
import glob
import os
import shutil
import sys
import textwrap

from data.files import UserError, atomic_write_text, check
from tools import cli


def answer_help(argv):
    """Answer --help at once: quartet.py, which knows the flags, takes seconds to import."""
    if "--help" in argv or "-h" in argv:
        print(__doc__.strip())
        sys.exit()


if __name__ == "__main__":
    cli.start(answer_help, "study", "tools.study")

import torch

import quartet
from fp4.recipes import RECIPES
from model import PRESETS, count_params
from tools.ablation import compare, finish
from tools.markdown import rewrite
from tools.report import (NO_PICTURE, by_label, check_one_corpus, draw_gap, histories_by_label,
                          report, table, text)
from tools.run import (LENGTHS, label, parse_log, read_text, resumed_otherwise, split_logs,
                       thin_log)

# Three seeds of 25 tokens a parameter, because longer runs tell more than more seeds do: at 10
# tokens a parameter, the seeds of bf16 ended 0.2 apart.
STUDY = (
    "--size 3M --data python --vocab 2048 --micro 128 --eval_every 400 --seeds 3 --jobs 8 "
    "--compile --discard --sample_tokens 0 --out out/study"
)
VARIANTS = (
    "--precision all",
    "--precision fp4 --scale nearest",
    "--precision fp4 --rotation none:32:32,32:none:32,32:32:none,128",
    "--precision fp4 --rounding nearest:sr:nearest,nearest:nearest:sr",
    "--precision fp4 --scale nearest --rotation 32:none:32",
    "--precision fp4 --scale mse,absmax34,absmax",
    "--precision fp4 --rotation 128:32:32",
    "--precision fp4 --rounding eden",
)
FINALISTS = (
    "--precision bf16,fp4,fp4-sr",
    "--precision fp4 --scale nearest",
    "--precision fp4 --rotation 32:none:32",
    "--precision fp4 --scale nearest --rotation 32:none:32",
    "--precision fp4 --scale mse",
)
LONG = "--tokens_per_param 100 --eval_every 1600 --name 3M-100"
WITHOUT_GPU = "--precision bf16,fp4 --size tiny"

# Only runs that agree in these settings can stand in one study.
SHARED = ("size", "data", "vocab", "seq", "batch", "lr", "dtype")
GAP = ("bf16", "fp4")                   # the two rows of gap.svg
HERE = os.path.dirname(os.path.abspath(__file__))
PICTURES = HERE
README = os.path.join(HERE, "README.md")
RUNS = os.path.join(HERE, "study.csv")


def main(argv):
    """Train what is missing of the study, seed by seed, and write its tables into README.md.

    Arguments that end in .csv are files of finished runs: then nothing is trained.
    """
    if any(argument.endswith(".csv") for argument in argv):
        show_finished(argv)
        return
    if not torch.cuda.is_available():
        compare_without_gpu(argv)
        return
    out, configs = study_runs(argv)
    _, failure = finish(configs, quartet.train, quartet.__file__)
    try:
        logs = finished_logs(glob.glob(os.path.join(out, "*", "log.csv")))
    except UserError as error:
        raise failure or error
    write_results(logs)
    if failure:
        raise failure


def show_finished(argv):
    """Write the tables of finished runs into README.md, or print those of --against."""
    parser = cli.Parser("python -m tools.study", __doc__)
    parser.add_argument("files", nargs="+", help="log.csv of runs, or study.csv")
    parser.add_argument("--against", metavar="ROW", help="print the gaps to this row, no more")
    arguments = parser.parse_args(argv)
    logs = finished_logs(arguments.files)
    if arguments.against:
        print_against(arguments.against, logs)
    else:
        write_results(logs)


def print_against(row, logs):
    """Print the tables with another row first. Raises UserError if there is no such row."""
    tables = []
    for runs in by_length([parse_log(log) for log in logs]):
        groups = by_label(runs)
        if row in groups:
            others = [run for run in runs if run not in groups[row].values()]
            tables.append(text(table([*groups[row].values(), *others])))
    check(tables, f"no run is called {row}")
    print("\n\n".join(tables))


# ---- what is trained

def compare_without_gpu(argv):
    """Train two rows of the tiny model. The tables of README.md stay: they are a GPU's."""
    settings = quartet.parse([*WITHOUT_GPU.split(), *argv])
    configs = list(dict.fromkeys(quartet.expand_runs(settings)))
    compare(configs, os.path.join(settings.out, "ablation"), quartet.train, quartet.__file__)


def study_runs(argv):
    """The folder of the study's runs, and the settings of each run, in the order of training."""
    commands = [*VARIANTS, *(f"{row} {LONG}" for row in FINALISTS)]
    if any(argument.startswith("--precision") for argument in argv):
        commands = [""]                 # argv itself says which rows are trained.
    configs = {}                        # A dictionary has each run once, and keeps the order.
    for command in commands:
        settings = quartet.parse([*STUDY.split(), *command.split(), *argv])
        configs |= dict.fromkeys(quartet.expand_runs(settings))
    return settings.out, sorted(configs, key=lambda cfg: (cfg.seed, -(cfg.tokens_per_param or 0)))


# ---- what is kept

def finished_logs(paths):
    """The logs of the finished runs in these files, thinned, in the order of the recipes.

    Of several runs of one name the last counts. What is no log is left out, which is said. Raises
    UserError when there is no run, or when they differ in what they have to share.
    """
    kept = {}
    for path in paths:
        try:
            logs = split_logs(read_text(path))
            check(logs, "not a log of quartet.py")
            # The tables are made of what is kept, so that study.csv alone gives the same.
            kept |= {name: thin_log(log) for name, log in finished(path, logs)}
        except (UserError, OSError, ValueError) as error:
            print(f"left out: {path}: {error}")
    check(kept, "there is no finished run")
    runs = [parse_log(log) for log in kept.values()]
    for setting in SHARED:
        values = sorted({str(run.config.get(setting) or "default") for run in runs})
        check(len(values) == 1, f"these runs differ in --{setting}: {', '.join(values)}")
    check_one_corpus(runs)
    return sorted(kept.values(), key=place_in_table)


def finished(path, logs):
    """Yields (name, log) of the logs in a file that are of finished runs."""
    for log in logs:
        run = parse_log(log)
        otherwise = resumed_otherwise(run)
        if otherwise:
            print(f"left out: {path}: {', '.join(otherwise)}")
        elif run.ended and not is_set_aside(path, run):
            yield run.config["name"], log


def is_set_aside(path, run):
    """Is this a log.csv in a folder that no longer has the name of its run?"""
    folder = os.path.basename(os.path.dirname(path))
    return os.path.basename(path) == "log.csv" and folder != run.config["name"]


def place_in_table(log):
    config = parse_log(log).config
    return list(RECIPES).index(config["precision"]), label(config)


def by_length(runs):
    """[runs of one length, ...], the shortest first: only runs of one length can be compared."""
    lengths = {}
    for run in runs:
        length = tuple(run.config.get(setting) or 0 for setting in LENGTHS)
        lengths.setdefault(length, []).append(run)
    return [lengths[length] for length in sorted(lengths)]


# ---- what is written

def write_results(logs):
    """Write the tables into README.md, the pictures beside it, and the logs into study.csv."""
    lengths = by_length([parse_log(log) for log in logs])
    sections = []
    for number, runs in enumerate(lengths, 1):
        name = "ablation" if number == 1 else f"ablation{number}"
        sections.append(make_section(runs, name))
    draw_longest(lengths[-1])
    rewrite(README, "\n\n".join(sections), "ablation")
    atomic_write_text(RUNS, "".join(logs))


def make_section(runs, name):
    """The part of README.md about runs of one length; its picture is name.svg."""
    run = max(runs, key=lambda run: run.date)
    preset = PRESETS[run.config["size"]]
    n_params = count_params(preset.n_layer, preset.n_embd)
    n_tokens = run.history[-1].step * tokens_per_step(run)
    about = (f"{n_params / 1e6:.1f} M parameters in the blocks, {n_tokens / 1e6:.0f} M tokens of "
             f"`{run.config['data']}`, {run.config['vocab'] or 4096:,} in the vocabulary; "
             f"{run.device}; {run.date}.")
    about = textwrap.fill(about, 100, break_long_words=False, break_on_hyphens=False)
    body, picture = report(runs, os.path.join("out", name))
    if picture == NO_PICTURE:
        return f"{about}\n\n{body}"
    shutil.copyfile(picture, os.path.join(PICTURES, f"{name}.svg"))
    return f"{about}\n\n![curves]({name}.svg)\n\n{body}"


def draw_longest(runs):
    """Draw gap.svg, which shows bf16 and fp4, if both are among these runs and did not diverge."""
    good = [run for run in runs if not run.diverged]
    groups = by_label(good)
    if any(name not in groups for name in GAP):
        return
    histories = histories_by_label(good)
    draw_gap(os.path.join(PICTURES, "gap.svg"), {name: histories[name] for name in GAP},
             tokens_per_step(runs[0]))


def tokens_per_step(run): return run.config["batch"] * run.config["seq"]


if __name__ == "__main__":
    sys.exit(quartet.run_cli(sys.argv[1:], main))
