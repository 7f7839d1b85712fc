"""
The studies of tools/README.md: many runs of one model, in rows that answer one question.

    make ablation                               # on a GPU; without one, two rows of the tiny model
    python -m tools.study recipes --jobs 14     # the same with other flags of quartet.py
    python -m tools.study screen --jobs 14      # another study: one of STUDIES
    python -m tools.study screen tools/studies/screen.csv out/screen/*/log.csv  # only its tables
    python -m tools.study recipes tools/studies/recipes.csv --against luq-int4  # gaps to a row

What is asked, by which runs, and by which end point, stands in STUDIES before the first run. Runs
go seed by seed, so that what is there at any time can be compared, and the long ones first. What is
worth keeping of their logs, which is the head and the evaluated steps, goes to studies/NAME.csv.
The fourth command makes the tables from finished runs alone, and the last one writes nothing.
`python quartet.py --help` lists the flags.
"""
import glob
import os
import shutil
import sys
import textwrap
from functools import partial
from typing import NamedTuple

from data.files import UserError, atomic_write_text, check
from tools import cli

if __name__ == "__main__":
    cli.start(partial(cli.answer_help, __doc__), "study", "tools.study")

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


class Study(NamedTuple):
    """Runs that are compared with each other."""
    question: str                       # and how it will be answered, as README.md says it
    flags: str                          # of quartet.py, for all runs
    commands: tuple                     # flags of quartet.py, each for one row or several


FLAGS = ("--size 3M --data python --vocab 2048 --micro 128 --seeds 3 --jobs 8 "
         "--compile --discard --sample_tokens 0")
# The recipes have 25 tokens a parameter, because longer runs tell more than more seeds do: at 10
# tokens a parameter, the seeds of bf16 ended 0.2 apart. The most promising ones have four times as
# many.
LONG = "--tokens_per_param 100 --eval_every 1600 --name 3M-100"
RECIPES_STUDY = Study(
    "What does each precision cost, and what does each ingredient of fp4 buy?",
    f"{FLAGS} --eval_every 400",
    (
        "--precision all",
        "--precision fp4 --scale nearest",
        "--precision fp4 --rotation none:32:32,32:none:32,32:32:none,128",
        "--precision fp4 --rounding nearest:sr:nearest,nearest:nearest:sr",
        "--precision fp4 --scale nearest --rotation 32:none:32",
        "--precision fp4 --scale mse,absmax34,absmax",
        "--precision fp4 --rotation 128:32:32",
        "--precision fp4 --rounding eden",
        f"{LONG} --precision bf16,fp4,fp4-sr",
        f"{LONG} --precision fp4 --scale nearest",
        f"{LONG} --precision fp4 --rotation 32:none:32",
        f"{LONG} --precision fp4 --scale nearest --rotation 32:none:32",
        f"{LONG} --precision fp4 --scale mse",
    ),
)
SCREEN = Study(
    "Which ingredients lower the final loss of fp4 at 100 tokens a parameter? Each row is compared "
    "with fp4 by the final validation loss, seed by seed, and its interval is pooled over the "
    "variants of fp4. Three seeds see a gap of about 0.016, a sixth of that from bf16 to fp4. This "
    "study only chooses: what it finds is tried again with seeds that did not choose it.",
    f"{FLAGS} --tokens_per_param 100 --eval_every 1600",
    (
        "--precision bf16,fp4",
        # The pull towards the grid: its authors' strength and start, then stronger, earlier, both,
        # and weak throughout.
        "--precision fp4 --post_step cage:10:0.8,cage:30:0.8,cage:10:0.5,cage:30:0.5,cage:3:0",
        "--precision fp4 --post_step deosc",
        # Other quantisers of the forward product, and a last block or an input that has more bits.
        "--precision fp4 --rounding eden:nearest:nearest",
        "--precision fp4 --scale mse/floor",
        "--precision fp4 --mean_split on:off:off",
        "--precision fp4 --down_input mxfp8",
        "--precision fp4 --keep_last 1",
        # Most of the run in 8 bits.
        "--precision fp8 --switch 0.8:fp4+post_step=cage:10:0.8",
    ),
)
STUDIES = {"recipes": RECIPES_STUDY, "screen": SCREEN}
WITHOUT_GPU = "--precision bf16,fp4 --size tiny"

# Only runs that agree in these settings can stand in one study.
SHARED = ("size", "data", "vocab", "seq", "batch", "lr", "dtype")
GAP = ("bf16", "fp4")                   # the two rows of gap.svg
HERE = os.path.dirname(os.path.abspath(__file__))
README = os.path.join(HERE, "README.md")
RESULTS = os.path.join(HERE, "studies")         # what is kept of the runs, and pictures


def main(argv):
    """Train what is missing of a study, seed by seed, and write its tables into README.md.

    The first argument is its name. If others end in .csv, they are files of finished runs, and
    nothing is trained.
    """
    name, *argv = argv or ["recipes"]
    check(name in STUDIES, f"study {name!r} is not one of {', '.join(STUDIES)}")
    if any(argument.endswith(".csv") for argument in argv):
        show_finished(name, argv)
        return
    if not torch.cuda.is_available():
        compare_without_gpu(argv)
        return
    out, configs = study_runs(name, argv)
    _, failure = finish(configs, quartet.train, quartet.__file__)
    try:
        logs = finished_logs(glob.glob(os.path.join(out, "*", "log.csv")))
    except UserError as error:
        raise failure or error
    write_results(name, logs)
    if failure:
        raise failure


def show_finished(name, argv):
    """Write the tables of finished runs into README.md, or print those of --against."""
    parser = cli.Parser("python -m tools.study NAME", __doc__)
    parser.add_argument("files", nargs="+", help="log.csv of runs, or studies/NAME.csv")
    parser.add_argument("--against", metavar="ROW", help="print the gaps to this row, no more")
    arguments = parser.parse_args(argv)
    logs = finished_logs(arguments.files)
    if arguments.against:
        print_against(arguments.against, logs)
    else:
        write_results(name, logs)


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


def study_runs(name, argv):
    """The folder of a study's runs, and the settings of each run, in the order of training."""
    study = STUDIES[name]
    commands = study.commands
    if any(argument.startswith("--precision") for argument in argv):
        commands = [""]                 # argv itself says which rows are trained.
    configs = {}                        # A dictionary has each run once, and keeps the order.
    for command in commands:
        flags = f"{study.flags} --out out/{name} {command}"
        settings = quartet.parse([*flags.split(), *argv])
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
            # The tables are made of what is kept, so that studies/NAME.csv alone gives the same.
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

def write_results(name, logs):
    """Write the tables of a study into README.md, and its pictures and its logs into studies/."""
    os.makedirs(RESULTS, exist_ok=True)
    lengths = by_length([parse_log(log) for log in logs])
    sections = []
    for number, runs in enumerate(lengths, 1):
        sections.append(make_section(runs, name if number == 1 else f"{name}{number}"))
    if name == "recipes":
        draw_longest(lengths[-1])
    rewrite(README, section_text(name, sections), name)
    atomic_write_text(os.path.join(RESULTS, f"{name}.csv"), "".join(logs))


def section_text(name, sections):
    """What stands between the marks of a study in README.md; a study that has no runs yet has no
    sections."""
    question = filled(STUDIES[name].question)
    return "\n\n".join([question, *(sections or ["No run of it has been made yet."])])


def filled(text):
    return textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)


def make_section(runs, name):
    """The part of README.md about runs of one length; its picture is studies/name.svg."""
    run = max(runs, key=lambda run: run.date)
    preset = PRESETS[run.config["size"]]
    n_params = count_params(preset.n_layer, preset.n_embd)
    n_tokens = run.history[-1].step * tokens_per_step(run)
    about = filled(
        f"{n_params / 1e6:.1f} M parameters in the blocks, {n_tokens / 1e6:.0f} M tokens of "
        f"`{run.config['data']}`, {run.config['vocab'] or 4096:,} in the vocabulary; "
        f"{epochs(n_tokens, runs)}; {run.device}; {run.date}.")
    body, picture = report(runs, os.path.join("out", name))
    summary = f"<summary>The table, {len(by_label(runs))} rows</summary>"
    details = f"<details>{summary}\n\n{body}\n\n</details>"
    if picture == NO_PICTURE:
        return f"{about}\n\n{details}"
    shutil.copyfile(picture, os.path.join(RESULTS, f"{name}.svg"))
    return f"{about}\n\n![curves](studies/{name}.svg)\n\n{details}"


def epochs(n_tokens, runs):
    """How often these runs have seen their corpus, in words."""
    known = {run.corpus["train_tokens"] for run in runs if "train_tokens" in run.corpus}
    if len(known) != 1:
        return "epochs not recorded"
    return f"{n_tokens / known.pop():.2f} epochs"


def draw_longest(runs):
    """Draw gap.svg, which shows bf16 and fp4, if both are among these runs and did not diverge."""
    good = [run for run in runs if not run.diverged]
    groups = by_label(good)
    if any(name not in groups for name in GAP):
        return
    histories = histories_by_label(good)
    draw_gap(os.path.join(RESULTS, "gap.svg"), {name: histories[name] for name in GAP},
             tokens_per_step(runs[0]))


def tokens_per_step(run): return run.config["batch"] * run.config["seq"]


if __name__ == "__main__":
    sys.exit(quartet.run_cli(sys.argv[1:], main))
