"""
What does low precision cost, and which precision is best? The scaling law of Quartet
(arXiv 2505.14669, section 4), fitted to the authors' runs or to yours.

    python -m tools.scaling fit                     # the law, its uncertainty and predictions
    python -m tools.scaling validate                # how wrong it is about runs it has not seen
    python -m tools.scaling regions                 # the best precision by size and tokens
    python -m tools.scaling advise --params 1.5B --tokens 100B
                                                    # the same for one model, with the reasons
    python -m tools.scaling sweep                   # train sizes x tokens x (bf16, fp4)
    python -m tools.scaling collect out/*/log.csv > runs.csv
                                                    # finished runs of quartet.py, for: fit runs.csv
"""
import csv
import os
import sys

from data.files import UserError, check
from tools import cli


# ---- the command line

def parse(argv):
    parser = cli.Parser("python -m tools.scaling", __doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    add_fit(commands)
    add_validate(commands)
    add_regions(commands)
    add_advise(commands)
    add_sweep(commands)
    add_collect(commands)
    return parser.parse_args(argv)


def add_command(commands, name, description):
    return commands.add_parser(name, help=description, description=description)


def add_runs(command, *name, **options):
    command.add_argument(*name, help="CSV file of runs; default: the authors'", **options)


def add_gpu(command, default, **options):
    sources = "bops | h100 | b200 | rtx5090 | a .json file of make bench"
    command.add_argument("--gpu", help=f"{sources}; default: {default}", **options)


def add_fit(commands):
    command = add_command(commands, "fit",
                          "fit the law; how certain it is, how well it predicts")
    add_runs(command, "runs", nargs="?")
    command.add_argument("--picture", default="out/law.svg",
                         help="where it is drawn; default: out/law.svg")


def add_validate(commands):
    command = add_command(commands, "validate",
                          "how wrong both forms of the law are about runs they were not fitted to")
    command.add_argument("runs", nargs="*",
                         help="CSV files of runs; default: both papers', which takes two minutes")


def add_regions(commands):
    command = add_command(commands, "regions",
                          "the best precision for each model size and number of tokens")
    add_runs(command, "--runs")
    add_gpu(command, "bops, rtx5090 and this machine if it was measured", nargs="+")
    command.add_argument("--forward", default="QuEST",
                         help="what FP4 is in the forward pass; default: QuEST")
    command.add_argument("--backward", default="SR-absmax",
                         help="and backward; default: SR-absmax, as in the paper")
    command.add_argument("--picture", default="out/regions.svg",
                         help="where they are drawn; default: out/regions.svg")


def add_advise(commands):
    command = add_command(commands, "advise",
                          "what each precision costs for one model, and which one to take")
    command.add_argument("--params", required=True, help="without embedding and head, like 1.5B")
    command.add_argument("--tokens", required=True, help="like 100B")
    add_gpu(command, "this machine if it was measured, else bops")
    add_runs(command, "--runs")


def add_sweep(commands):
    command = add_command(commands, "sweep",
                          "train a small sweep with quartet.py; what is finished is not trained "
                          "again")
    command.add_argument("--out", default="out/law", help="folder of the runs; default: out/law")
    command.add_argument("--data", default="", help="corpus of quartet.py; default: stdlib on a "
                                                    "CPU, python on a GPU")


def add_collect(commands):
    command = add_command(commands, "collect",
                          "finished runs of quartet.py as a CSV file, on stdout")
    command.add_argument("logs", nargs="+", metavar="log.csv",
                         help="logs of runs; a pattern such as 'out/*/log.csv' is one, too")


# The command line is read here for the first time, to answer --help and mistyped flags without
# numpy. Where that is missing, the command goes on with the Python of .venv.
if __name__ == "__main__":
    cli.start(parse, "scaling", "tools.scaling", packages=["numpy"])

import numpy as np

# These need numpy and no torch, so that an answer takes seconds.
from tools.scaling import advise, crossval, fitting, law, pictures, regions, runs, speeds
from tools.scaling.advise import format_count, format_range

UNITS = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
MOST = 1e30                             # Beyond it the law's terms would overflow.
FEW_DRAWS = 20                          # for what is printed without its interval
NOT_DETERMINED = "not determined"       # stands in place of an interval
NOT_TOLD = {
    "alpha": ": these runs do not tell what size does",
    "beta": ": these runs do not tell what tokens do",
}
LARGEST_EXPONENT = 99                   # A coefficient beyond it means that the fit ran away.


def parse_count(text):
    """Reads 1.5B, 300M or 1e9. Raises UserError on anything else."""
    unit = UNITS.get(text[-1:].upper())
    try:
        x = float(text[:-1]) * unit if unit else float(text)
    except ValueError:
        raise UserError(f"{text!r} is not a number like 1.5B, 300M or 1e9")
    check(0 < x < np.inf,
          f"a number of parameters or tokens must be positive and finite, got {text}")
    check(x <= MOST, f"{text} is beyond any model: give {MOST:g} or less")
    return x


def load(path):
    """Returns the runs of a file, the authors' if it is None, and says what was left out."""
    points, left_out = runs.read(runs.PAPER if path is None else path)
    print_left_out(left_out)
    return points


def print_left_out(sentences):
    for sentence in sentences:
        print(f"left out: {sentence}", file=sys.stderr)


# ---- fit

def cmd_fit(args):
    points = load(args.runs)
    base, methods, unfitted = fitting.fit_all(points, fitting.PAPER)
    print_base_law(base, points[law.BF16])
    print("\nThe paper's form, eff_N and eff_D:")
    print_methods(points, methods, (law.LN_EFF_N, law.LN_EFF_D))
    for sentence in unfitted:
        print(sentence)
    base, methods, _ = fitting.fit_all(points, fitting.LASTING)
    print("\nThe lasting form, eff_N at 100 tokens a parameter and delta, a share of the loss:")
    print_methods(points, methods, (law.LN_EFF_N, law.DELTA))
    print_composed(points, base, methods)
    print_misfit(base)
    print_held_out(list(crossval.held_out(points[law.BF16])))
    print(pictures.law_picture(args.picture, points, base, methods))


def print_base_law(base, points):
    n, d, y = points
    print("L = (A / (N eff_N)^alpha + B / (D eff_D)^beta)^gamma + E\n"
          f"{len(y)} BF16 runs of {format_range(n)} parameters on {format_range(d)} tokens\n\n"
          f"{'':6s} {'best':>10s}   90 %")
    for i in fitting.BASE:
        print_coefficient(base, i, n, d)
    error = abs(np.exp(law.log_loss(base.theta, n, d)) - np.exp(y))
    print(f"error of the fit: {error.mean():.4f} on average, {error.max():.4f} at most")


def print_coefficient(base, i, n, d):
    name = law.NAMES[i]
    value = base.theta[i]
    draws = base.draws[:, i]
    if name.startswith("ln "):
        name = name.removeprefix("ln ")
        value = exp_capped(value)
        draws = exp_capped(draws)
    best = f"{value:.4g}"
    interval = format_interval(draws)
    ran_away = abs(base.theta[i]) > LARGEST_EXPONENT
    if ran_away or fitting.term_not_identified(base, i, n, d):
        best = ""
        interval = NOT_DETERMINED
    if interval == NOT_DETERMINED:
        interval += NOT_TOLD.get(name, "")
    print(f"{name:6s} {best:>10s}   {interval}")


def exp_capped(logs):
    """Exponentiates; a draw may have run away, and would overflow."""
    return np.exp(np.minimum(logs, LARGEST_EXPONENT))


def format_interval(draws):
    """Writes the 90 % interval of the draws, or that there is none to speak of."""
    low, high = np.quantile(draws, (.05, .95), method="nearest")
    if 1e-9 < high <= 100 * low:
        return f"{low:.3g} - {high:.3g}"
    return NOT_DETERMINED


def print_methods(points, methods, coefficients):
    """Prints two coefficients of each method with their 90 % intervals, and what was refused."""
    header = f"{'forward : backward':52s} runs"
    for i in coefficients:
        name = law.NAMES[i].removeprefix("ln ").replace("ln(1+delta)", "delta")
        header += f"  {name:>6s}  {'90 %':15s}"
    print(header.rstrip())
    for method, fit in methods.items():
        line = f"{' : '.join(method):52.52s} {len(points[method][0]):4d}"
        for i in coefficients:
            line += format_coefficient(fit, i)
        print(line.rstrip())
    for fit in methods.values():
        for sentence in fit.refused:
            print(sentence)


def format_coefficient(fit, i):
    """Writes a coefficient of a method and its interval; blanks where it is BF16's."""
    if not fit.theta[i]:
        return " " * 25
    if i == law.DELTA:
        low, high = np.expm1(np.quantile(fit.draws[:, i], (.05, .95)))
        interval = f"{low:.2%} - {high:.2%}"
        return f"  {np.expm1(fit.theta[i]):6.2%}  {interval:15s}"
    interval = format_interval(exp_capped(fit.draws[:, i]))
    return f"  {np.exp(fit.theta[i]):6.3f}  {interval:15s}"


def print_composed(points, base, methods):
    """Compares runs of whole methods with what their two halves, run apart, predict."""
    for forward, backward in methods:
        if (forward, "BF16") not in methods or ("BF16", backward) not in methods:
            continue
        n, d, y = points[forward, backward]
        fit = fitting.compose(base, methods, forward, backward)
        error = np.exp(law.log_loss(fit.theta, n, d)) - np.exp(y)
        print(f"{forward} : {backward} predicted from its two halves: error "
              f"{abs(error).mean():.4f} on average, {abs(error).max():.4f} at most, "
              f"{error.mean():+.4f} with its sign")


def print_misfit(base):
    """Says by how much the law is wrong about runs that it was not fitted to."""
    if not base.misfit:
        print("\nToo few runs to leave any out: no interval knows what the law gets wrong.")
        return
    print(f"\nRuns whose size, or tokens a parameter, were left out of the fit are off by "
          f"{base.misfit:.2%} of their loss\n(standard deviation). Every interval has it.")
    if len(base.sizes) <= fitting.FEW_SIZES:
        print("No size could be left out: another size than these has twice that deviation.")


def print_held_out(rows):
    """Prints how far off predictions of BF16 runs are, and of how many distinct ones."""
    print("\nBF16 runs predicted by a fit to others  predictions  runs  mean error  with sign  "
          "largest  inside the 90 % interval")
    for kind in dict.fromkeys(row.kind for row in rows):
        of_kind = [row for row in rows if row.kind == kind]
        distinct = len({(row.N, row.D) for row in of_kind})
        error = np.array([row.predicted - row.measured for row in of_kind])
        inside = np.mean([row.low <= row.measured <= row.high for row in of_kind])
        print(f"{kind:38s} {len(error):12d} {distinct:5d}  {abs(error).mean():10.4f}  "
              f"{error.mean():+9.4f}  {abs(error).max():7.4f}  {inside:23.0%}")
    for row in rows:
        if row.kind == "twice the size":
            print(f"    {format_count(row.N)} on {format_count(row.D)} tokens, from the "
                  f"{row.fitted} runs of smaller models (E {row.E:.3f}): {row.predicted:.3f} "
                  f"({row.low:.3f}-{row.high:.3f}), measured {row.measured:.3f}")
    if not rows:
        print("(too few runs to leave any out)")


# ---- validate

TABLE_HEAD = (
    f"{'':39s}{fitting.PAPER.name:^28s} {fitting.LASTING.name:^28s}\n"
    f"{'runs of':12s} {'passes':8s} {'left out':16s}"
    + f" {'runs':>4s} {'|error|':>7s} {'error':>8s} {'inside':>6s}" * 2)


def cmd_validate(args):
    print(TABLE_HEAD)
    for path in args.runs or [runs.PAPER, runs.SECOND]:
        rows = list(crossval.validate(load(path)))
        print("\n".join(crossval.table(os.path.basename(path), rows)))
    print("error: predicted less measured gap to BF16 of the same size and tokens, in BF16 of the "
          "loss;\ninside: share of the losses inside the 90 % interval")


# ---- regions

def cmd_regions(args):
    points = load(args.runs)
    base, methods, _ = fitting.fit_all(points, fitting.LASTING)
    paper = fitting.fit_all(points, fitting.PAPER, FEW_DRAWS)[:2]
    is_measured = os.path.exists(speeds.BENCH)
    gpus = args.gpu or ["bops", "rtx5090"]
    if is_measured and not args.gpu:
        gpus.append(speeds.BENCH)
    fp4_methods = (args.forward, args.backward)
    panels = [speeds.for_gpu(gpu) for gpu in gpus]
    tables = []
    for panel in panels:
        precisions = regions.four_precisions(base, methods, panel, *fp4_methods)
        tables.append(regions.with_known_law(precisions, *fp4_methods))

    print("The best precision, forward:backward, at fixed inference and training cost. "
          f"FP4 is {' : '.join(fp4_methods)}.\n"
          "In brackets: 90 % of the law's draws; inf: more than 5000, or nowhere.")
    for panel, precisions in zip(panels, tables):
        print(f"\n{panel.name}: {panel.source}")
        print_boundaries(precisions, panel)
        print_paper_boundaries(*paper, panel, fp4_methods)
        print_models(precisions, panel)
    if not args.gpu and not is_measured:
        print("\nThis machine was not measured: on a GPU, `make bench` writes "
              f"{speeds.BENCH}.")
    n, d, _ = points[law.BF16]
    print(f"\nThe law was fitted on {format_range(n)} parameters, {format_range(d - n)} tokens "
          "a parameter; the rest is extrapolated.")
    print(pictures.region_picture(args.picture, panels, tables, points))


SIZES = (1e8, 1e9, 7e9, 7e10)           # whose boundaries are printed


def print_boundaries(precisions, panel):
    """Prints from how many tokens a parameter on each precision is the best, for four sizes."""
    for N in SIZES:
        first, *others = regions.boundaries(precisions, panel, N)
        line = f"  {format_count(N):>4s} parameters: {first[0]}"
        for name, ratio, low, high in others:
            line += (f", then {name} from {ratio:.0f} ({low:.0f}-{high:.0f}) "
                     "tokens a parameter on")
        if panel.outside(N):
            line += "  [this size was not measured]"
        print(line)


def print_paper_boundaries(base, methods, panel, fp4_methods):
    """Prints the same by the paper's form, without intervals, in a line."""
    precisions = regions.four_precisions(base, methods, panel, *fp4_methods)
    precisions = regions.with_known_law(precisions, *fp4_methods)
    sizes = []
    for N in SIZES:
        steps = [f"{name} from {ratio:.0f}"
                 for name, ratio, _, _ in regions.boundaries(precisions, panel, N)]
        sizes.append(f"{format_count(N)} {', '.join(steps)}")
    print(f"  by the paper's form: {'; '.join(sizes)}")


def print_models(precisions, panel):
    """Prints the best precision for well-known models, and how certain that is."""
    for name, (params, tokens) in regions.MODELS.items():
        N = np.array([params])
        D = np.array([tokens])
        best = regions.log_losses(precisions, panel, N, D).argmin()
        best_drawn = regions.log_losses(precisions, panel, N, D, draws=True).argmin(0)
        share = (best_drawn == best).mean()
        print(f"  {name}, {tokens / params:.0f} tokens a parameter: {precisions[best].name} "
              f"(in {share:.0%} of the law's draws)")


# ---- the other commands

def cmd_advise(args):
    N = parse_count(args.params)
    D = parse_count(args.tokens)
    gpu_speeds = speeds.for_gpu(args.gpu)
    points = load(args.runs)
    base, methods, _ = fitting.fit_all(points, fitting.LASTING)
    paper = fitting.fit_all(points, fitting.PAPER, FEW_DRAWS)[:2]
    advise.advise(points, base, methods, paper, gpu_speeds, N, D)


def cmd_collect(args):
    from tools.scaling import sweep     # This imports torch, by way of model.py.
    rows, left_out = sweep.collect(args.logs)
    print_left_out(left_out)
    writer = csv.DictWriter(sys.stdout, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)


def cmd_sweep(args):
    from tools.scaling import sweep
    sweep.sweep(args.out, args.data)


# ---- main

COMMANDS = {
    "fit": cmd_fit,
    "validate": cmd_validate,
    "regions": cmd_regions,
    "advise": cmd_advise,
    "sweep": cmd_sweep,
    "collect": cmd_collect,
}


def main(argv):
    args = parse(argv)
    COMMANDS[args.command](args)


def run_cli(argv):
    """main(argv), in which a mistake of the user ends in one sentence; returns the exit code."""
    return cli.run(main, argv, "scaling", go_on="")


if __name__ == "__main__":
    sys.exit(run_cli(sys.argv[1:]))
