"""
What does low precision cost, and which precision is best? The scaling law of Quartet (arXiv 2505.14669, section 4),
fitted to the authors' runs or to yours.

    python -m scaling fit                                       # the law, how certain it is, how well it predicts
    python -m scaling regions                                   # the best precision for each size and number of tokens
    python -m scaling advise --params 1.5B --tokens 100B        # the same for one model, with the reasons
    python -m scaling sweep                                     # train sizes x tokens x (bf16, fp4) of your own
    python -m scaling collect out/*/log.csv > runs.csv          # finished runs of quartet.py, for: fit runs.csv
"""
import argparse, csv, os, sys
import numpy as np
from scaling import advise, fitting, law, pictures, regions, runs       # numpy, no torch: an answer takes seconds
from scaling.advise import human, span
from scaling.runs import Stop, check
from scaling.speeds import BENCH, speeds
VAGUE = "not determined"                                        # said in place of an interval
UNTOLD = dict(alpha=": these runs do not tell what size does", beta=": these runs do not tell what tokens do")


def number(text):
    """1.5B, 300M, 1e9"""
    unit = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}.get(text[-1:].upper())
    try: x = float(text[:-1]) * unit if unit else float(text)
    except ValueError: raise Stop(f"{text!r} is not a number like 1.5B, 300M or 1e9")
    check(0 < x < np.inf, f"a number of parameters or tokens must be positive and finite, got {text}")
    return x


def load(path):
    """the runs and everything that is fitted to them"""
    found, left_out = runs.read(path)
    for sentence in left_out: print(f"left out: {sentence}", file=sys.stderr)
    return found, *fitting.fit_all(found)


def interval(draws):
    low, high = np.quantile(draws, (.05, .95), method="nearest")
    return f"{low:.3g} - {high:.3g}" if 1e-9 < high <= 100 * low else VAGUE


# ---- the commands

def fit(args):
    found, base, methods, unfitted = load(args.runs)
    n, d, y = found[law.BF16]
    print("L = (A / (N eff_N)^alpha + B / (D eff_D)^beta)^gamma + E\n"
          f"{len(y)} BF16 runs of {span(n)} parameters on {span(d)} tokens\n\n{'':6s} {'best':>10s}   90 %")
    for i, name in enumerate(law.NAMES[:6]):
        plain = (lambda x: np.exp(np.minimum(x, 99))) if name.startswith("ln ") else np.asarray
        fitted, drawn = f"{plain(base.theta[i]):.4g}", interval(plain(base.draws[:, i]))
        if abs(base.theta[i]) > 99 or fitting.nowhere(base, i, n, d): fitted, drawn = "", VAGUE     # > 99: the fit ran away
        if drawn == VAGUE: drawn += UNTOLD.get(name, "")
        print(f"{name.removeprefix('ln '):6s} {fitted:>10s}   {drawn}")
    error = abs(np.exp(law.log_loss(base.theta, n, d)) - np.exp(y))
    print(f"error of the fit: {error.mean():.4f} on average, {error.max():.4f} at most")

    print(f"\n{'forward : backward':52s} runs  {'eff_N':>6s}  {'90 %':15s} {'eff_D':>6s}  90 %")
    for method, f in methods.items():
        line = f"{' : '.join(method):52.52s} {len(found[method][0]):4d}  "
        for i in fitting.EFF:                                   # BF16's is 1 and is not fitted
            drawn = interval(np.exp(np.minimum(f.draws[:, i], 99)))
            line += f"{np.exp(f.theta[i]):6.3f}  {drawn:15s} " if f.theta[i] else " " * 24
        print(line.rstrip())
    for sentence in unfitted: print(sentence)
    for forward, backward in [m for m in methods if {(m[0], "BF16"), ("BF16", m[1])} <= methods.keys()]:
        n, d, y = found[forward, backward]
        error = np.exp(law.log_loss(fitting.compose(base, methods, forward, backward).theta, n, d)) - np.exp(y)
        print(f"{forward} : {backward} predicted from its two halves: error {abs(error).mean():.4f} on average, "
              f"{abs(error).max():.4f} at most, {error.mean():+.4f} with its sign")

    rows = list(fitting.held_out(found[law.BF16]))
    print("\nBF16 runs predicted by a fit to others    runs   mean error   largest   inside the 90 % interval")
    for kind in dict.fromkeys(row[0] for row in rows):
        measured, predicted, low, high = np.array([row[5:] for row in rows if row[0] == kind]).T
        error, inside = abs(predicted - measured), (low <= measured) & (measured <= high)
        print(f"{kind:40s}  {len(error):4d}   {error.mean():10.4f}   {error.max():7.4f}   {inside.mean():23.0%}")
    for kind, count, E, N, D, measured, predicted, low, high in rows:
        if kind == "twice the size":
            print(f"    {human(N)} on {human(D)} tokens, from the {count} runs of smaller models (E {E:.3f}): "
                  f"{predicted:.3f} ({low:.3f}-{high:.3f}), measured {measured:.3f}")
    if not rows: print("(too few runs to leave any out)")
    print(pictures.law_picture(args.picture, found, base, methods))


def best(args):
    found, base, methods, _ = load(args.runs)
    measured = os.path.exists(BENCH)
    panels = [speeds(gpu) for gpu in args.gpu or ["bops", "rtx5090", *[BENCH] * measured]]
    how = args.forward, args.backward
    tables = [regions.known(regions.precisions(base, methods, s, *how), *how) for s in panels]
    print(f"The best precision, forward:backward, at fixed inference and training cost. FP4 is {' : '.join(how)}.\n"
          "In brackets: 90 % of the law's draws; inf: more than 5000, or nowhere.")
    for s, table in zip(panels, tables):
        print(f"\n{s.name}: {s.source}")
        for N in 1e8, 1e9, 7e9, 7e10:
            (first, *_), *others = regions.boundaries(table, s, N)
            line = f"  {human(N):>4s} parameters: {first}"
            for name, ratio, low, high in others:
                line += f", then {name} from {ratio:.0f} ({low:.0f}-{high:.0f}) tokens a parameter on"
            print(line + "  [this size was not measured]" * bool(s.outside(N)))
        for name, (N, D) in regions.MODELS.items():
            budgets = np.array([N]), np.array([D])
            i = regions.losses(table, s, *budgets).argmin()
            share = (regions.losses(table, s, *budgets, draws=True).argmin(0) == i).mean()
            print(f"  {name}, {D / N:.0f} tokens a parameter: {table[i].name} (in {share:.0%} of the law's draws)")
    if not args.gpu and not measured: print(f"\nThis machine was not measured: on a GPU, `make bench` writes {BENCH}.")
    n, d, _ = found[law.BF16]
    print(f"\nThe law was fitted on {span(n)} parameters, {span(d - n)} tokens a parameter; the rest is extrapolated.")
    print(pictures.region_picture(args.picture, panels, tables, found))


def answer(args):
    N, D, s = number(args.params), number(args.tokens), speeds(args.gpu)
    found, base, methods, _ = load(args.runs)
    advise.advise(found, base, methods, s, N, D)


def collect(args):
    from scaling import sweep                                   # torch, for the sizes of model.py
    rows, left_out = sweep.collect(args.logs)
    for sentence in left_out: print(f"left out: {sentence}", file=sys.stderr)
    writer = csv.DictWriter(sys.stdout, rows[0], lineterminator="\n")
    writer.writeheader(), writer.writerows(rows)


def train(args):
    from scaling import sweep
    sweep.sweep(args.out, args.data)


# ---- the command line

def parse(argv):
    parser = argparse.ArgumentParser(prog="python -m scaling", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="command")
    def command(name, run, help):
        one = commands.add_parser(name, help=help, description=help, allow_abbrev=False)
        one.set_defaults(run=run)
        return one
    source = dict(default=runs.PAPER, help="CSV file of runs; default: the authors'")
    gpu = "bops | h100 | b200 | rtx5090 | a .json file of make bench; default: "
    one = command("fit", fit, "fit the law; how certain it is, how well it predicts")
    one.add_argument("runs", nargs="?", **source)
    one.add_argument("--picture", default="out/law.svg")
    one = command("regions", best, "the best precision for each model size and number of tokens")
    one.add_argument("--runs", **source)
    one.add_argument("--gpu", nargs="+", help=gpu + "bops, rtx5090 and this machine if it was measured")
    one.add_argument("--forward", default="QuEST", help="what FP4 is in the forward pass; default: QuEST")
    one.add_argument("--backward", default="SR-absmax", help="and backward; default: SR-absmax, as in the paper")
    one.add_argument("--picture", default="out/regions.svg")
    one = command("advise", answer, "what each precision costs for one model, and which one to take")
    one.add_argument("--params", required=True, help="without embedding and head, like 1.5B")
    one.add_argument("--tokens", required=True, help="like 100B")
    one.add_argument("--gpu", help=gpu + "this machine if it was measured, else bops")
    one.add_argument("--runs", **source)
    one = command("sweep", train, "train a small sweep with quartet.py; what is finished is not trained again")
    one.add_argument("--out", default="out/law")
    one.add_argument("--data", default="", help="corpus of quartet.py; default: stdlib on a CPU, python on a GPU")
    one = command("collect", collect, "finished runs of quartet.py as a CSV file, on stdout")
    one.add_argument("logs", nargs="+", metavar="log.csv")
    def error(message): raise Stop(f"{message} (python -m scaling --help lists the commands)")
    for p in (parser, *commands.choices.values()): p.error = error
    return parser.parse_args(argv)


def cli(argv):
    """one command, with everything a user can mend said in one sentence; returns the exit code"""
    try:
        args = parse(argv)
        args.run(args)
    except (Stop, OSError) as error:
        print(f"scaling: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(cli(sys.argv[1:]))
