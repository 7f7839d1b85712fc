"""
An answer for one model: what each precision costs in loss, in training and in inference, and which one to take.

Three questions about N parameters and D tokens, each against BF16:

    the same run                    N, D            what is lost, and what is saved
    the same training cost          N, D tr         a training step that is tr times as fast pays for more tokens
    and the same inference cost     fw N, D tr/fw   a forward pass that is fw times as fast pays for a larger model, too

Times are of the linears in the blocks (speeds.py): attention, head and optimizer, not in them, dilute every saving.
"""
import numpy as np
from scaling import fitting, law, regions


def human(x):
    """1.5e9 -> 1.5B"""
    for size, letter in (1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K"):
        if x >= .9995 * size: return f"{x / size:.3g}{letter}"
    return f"{x:.3g}"


def span(logs): return f"{human(np.exp(min(logs)))} to {human(np.exp(max(logs)))}"


def table(base, methods, speeds):
    """the precisions that both the runs and the times know, BF16 first; FP4 as in the trainer's rows fp4 and fp4-sr"""
    rows = regions.precisions(base, methods, speeds, "QuEST", "RTN-absmax")
    if speeds.has("fp8"): rows.insert(0, regions.Precision("BF16:BF16", "bf16", "bf16", base))
    sr = "fp4-sr" if speeds.has("fp4-sr") else "fp4"            # if not measured apart
    rows.append(regions.Precision("FP4:FP4-SR", "fp4", sr, fitting.compose(base, methods, "QuEST", "SR-absmax")))
    return regions.known(rows, "QuEST", "RTN-absmax")


def question(rows, N, D):
    """each precision at its own N and D: [(loss, low, high)], and in which share of the draws its loss is the lowest"""
    points = [(p.fit, np.log([n]), np.log([d])) for p, n, d in zip(rows, N, D)]
    drawn = np.array([law.log_loss(fit.draws, n, d)[:, 0] for fit, n, d in points])
    share = np.bincount(drawn.argmin(0), minlength=len(rows)) / drawn.shape[1]
    return np.array([np.ravel(fitting.predict(*point)) for point in points]), share


def choice(budget, rows, N, D, loss, share):
    """prints the best precision for a budget, what comes next, and why"""
    best, second = loss[:, 0].argsort(kind="stable")[:2]        # stable: BF16 before what is no better
    n, d, (eff_n, eff_d) = N[best], D[best], np.exp(rows[best].fit.theta[6:])
    why = f"BF16's time pays for {human(n)} parameters on {human(d)} tokens" if best else \
          "What is faster loses more than its speed can buy back"
    if eff_n != 1 or eff_d != 1:
        why += f", worth {human(n * eff_n)} on {human(d * eff_d)} of BF16 (eff_N {eff_n:.2f}, eff_D {eff_d:.2f})"
    print("Fixed {} budget: {}, loss {:.3f} ({:.3f}-{:.3f})".format(budget, rows[best].name, *loss[best]) +
          f", the lowest in {share[best]:.0%} of the draws; next {rows[second].name}, {loss[second, 0]:.3f}.\n    {why}.")


def outside(what, x, fitted):
    """how far x is from the runs of the fit, in words; nothing if it is among them"""
    low, high = np.exp(min(fitted)), np.exp(max(fitted))
    if x > 1.01 * high: return f"{human(x)} {what} are {x / high:.2g} times the most of any run"
    if x < .99 * low: return f"{human(x)} {what} are {x / low:.2g} of the least of any run"
    return ""


def advise(runs, base, methods, speeds, N, D):
    """prints the table of the three questions, the best choice for each budget, and how far outside the runs that is"""
    rows = table(base, methods, speeds)
    fw, tr = np.array([regions.faster(speeds, p.forward, p.backward, "bf16", N) for p in rows]).T
    one = np.ones(len(rows))
    same, train, both = [(n, d, *question(rows, n, d)) for n, d in
                         ((N * one, D * one), (N * one, D * tr), (N * fw, D * tr / fw))]
    print(f"{human(N)} parameters, {human(D)} tokens ({D / N:.3g} a parameter); {speeds.name}: {speeds.source}\n")
    print(f"{'':10s}  {'the same run':^35s}   {'the same training cost':^21s}   {'and the same inference cost':^30s}")
    print(f"{'fwd:bwd':10s}  {'loss':>5s} {'90 %':^13s} {'training':>8s} {'infer.':>6s}   "
          f"{'tokens':>7s} {'loss':>6s} {'best':>6s}   {'params':>7s} {'tokens':>7s} {'loss':>6s} {'best':>7s}")
    for i, p in enumerate(rows):
        loss, low, high = same[2][i]
        print(f"{p.name:10s}  {loss:.3f}  {low:.3f}-{high:.3f} {1 / tr[i]:8.2f} {1 / fw[i]:6.2f}   "
              f"{human(train[1][i]):>7s} {train[2][i, 0]:6.3f} {train[3][i]:6.0%}   "
              f"{human(both[0][i]):>7s} {human(both[1][i]):>7s} {both[2][i, 0]:6.3f} {both[3][i]:7.0%}")
    print("training, infer.: time relative to BF16. best: in which share of the law's draws its loss is the lowest.\n"
          "FP4 is QuEST forward, RTN-absmax backward (--precision fp4), or SR-absmax backward (fp4-sr).\n")

    choice("training", rows, *train)
    choice("inference and training", rows, *both)
    print()
    if any(p.name == "FP8:FP8" and p.fit is base for p in rows): print("FP8 is given BF16's loss, as in the paper.")
    for sentence in speeds.steps: print(sentence)
    n, d, _ = runs[law.BF16]
    asked = [outside("parameters", N, n), outside("tokens", D, d), outside("tokens a parameter", D / N, d - n)]
    bought = [outside("parameters", max(both[0]), n), outside("tokens", max(train[1]), d)]
    for what, far in ("The question", [*asked, speeds.outside(N)]), ("What the budgets buy", bought):
        if any(far): print(f"{what} is EXTRAPOLATED: {'; '.join(filter(None, far))}.")
    if any(asked + bought): print("The intervals do not know what the law gets wrong outside the runs.")
    forward, backward = ("BF16", "QuEST", "fp8"), ("BF16", "RTN-absmax", "SR-absmax", "fp8")
    most = min(max(runs[m][0]) for m in methods if m[0] in forward and m[1] in backward)
    print(f"Efficiencies come from models of up to {human(np.exp(most))} parameters and are taken to hold for all.")
