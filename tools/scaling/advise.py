"""
Answers for one model: what each precision costs in loss, in training and in inference, and which
one to take.

There are three questions about N parameters and D tokens, each against BF16:

    the same run                    N, D            what is lost, and what is saved
    the same training cost          N, D tr         a training step that is tr times as fast pays
                                                    for more tokens
    and the same inference cost     fw N, D tr/fw   a forward pass that is fw times as fast pays
                                                    for a larger model, too

The times are those of the linears in the blocks (speeds.py). Attention, head and optimizer are not
in them and dilute every saving.
"""
from typing import NamedTuple

import numpy as np

from tools.scaling import fitting, law, regions


# ---- numbers in words

def format_count(x):
    """Writes 1.5e9 as 1.5B."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if x >= .9995 * size:           # This is what rounds to 1.00.
            return f"{x / size:.3g}{letter}"
    return f"{x:.3g}"


def format_range(logs):
    """Writes the range of numbers whose logarithms are given, as 30.5M to 822M."""
    return f"{format_count(np.exp(min(logs)))} to {format_count(np.exp(max(logs)))}"


def extrapolation(unit, x, logs):
    """Says how far x is outside the runs, which have these logarithms; "" if it is among them."""
    low = np.exp(min(logs))
    high = np.exp(max(logs))
    if x > 1.01 * high:
        return f"{format_count(x)} {unit} are {x / high:.2g} times the most of any run"
    if x < .99 * low:
        return f"{format_count(x)} {unit} are {x / low:.2g} of the least of any run"
    return ""


# ---- the three questions

class Answer(NamedTuple):
    """What every precision reaches within one budget; each array has an entry a precision."""
    N: np.ndarray               # the parameters that the budget pays for
    D: np.ndarray               # the tokens
    loss: np.ndarray            # (precisions, 3): the loss, and its 90 % interval
    share: np.ndarray           # in which share of the law's draws the loss is the lowest


def compared_precisions(base, methods, speeds):
    """
    Lists the precisions that both the runs and the times know, BF16 first.

    FP4 is that of the rows fp4 (QuEST forward, RTN-absmax backward) and fp4-sr of the trainer.
    """
    rows = regions.four_precisions(base, methods, speeds, "QuEST", "RTN-absmax")
    if speeds.has("fp8"):
        rows.insert(0, regions.Precision("BF16:BF16", "bf16", "bf16", base))
    # Where fp4-sr was not timed, it is taken to be as fast as fp4.
    sr_times = "fp4-sr" if speeds.has("fp4-sr") else "fp4"
    sr_fit = fitting.compose(base, methods, "QuEST", "SR-absmax")
    rows.append(regions.Precision("FP4:FP4-SR", "fp4", sr_times, sr_fit))
    return regions.with_known_law(rows, "QuEST", "RTN-absmax")


def evaluate(precisions, N, D):
    """Predicts the loss of each precision at its own N and D."""
    losses = []
    drawn = []
    for precision, params, tokens in zip(precisions, N, D):
        n = np.log([params])
        d = np.log([tokens])
        losses.append(np.ravel(fitting.predict(precision.fit, n, d)))
        drawn.append(law.log_loss(precision.fit.draws, n, d)[:, 0])
    drawn = np.array(drawn)
    wins = np.bincount(drawn.argmin(0), minlength=len(precisions))
    return Answer(N, D, np.array(losses), wins / drawn.shape[1])


def three_answers(precisions, fw, tr, N, D):
    """Answers the three questions, for the speedups fw and tr of each precision."""
    ones = np.ones(len(precisions))
    return (evaluate(precisions, N * ones, D * ones),
            evaluate(precisions, N * ones, D * tr),
            evaluate(precisions, N * fw, D * tr / fw))


def advise(runs, base, methods, paper, speeds, N, D):
    """
    Prints the table of the three questions, the best precision for each budget, and how far
    outside the runs all that is.

    paper is (base, methods) by the paper's form of the law, which may advise something else.
    """
    precisions = compared_precisions(base, methods, speeds)
    fw, tr = np.array([
        regions.speedups(speeds, precision.forward, precision.backward, "bf16", N)
        for precision in precisions]).T
    answers = three_answers(precisions, fw, tr, N, D)
    by_paper = compared_precisions(*paper, speeds)
    paper_answers = three_answers(by_paper, fw, tr, N, D)

    print(f"{format_count(N)} parameters, {format_count(D)} tokens ({D / N:.3g} a parameter); "
          f"{speeds.name}: {speeds.source}\n")
    print_table(precisions, fw, tr, *answers)
    print_choices(precisions, answers, by_paper, paper_answers)
    if any(row.name == "FP8:FP8" and row.fit is base for row in precisions):
        print("FP8 is given BF16's loss, as in the paper.")
    for sentence in speeds.steps:
        print(sentence)
    print_extrapolation(runs[law.BF16], speeds, N, D, max(answers[2].N), max(answers[1].D))
    print_reach_of_efficiencies(runs, methods)


def print_table(precisions, fw, tr, same_run, same_training, same_both):
    print(f"{'':10s}  {'the same run':^35s}   {'the same training cost':^21s}   "
          f"{'and the same inference cost':^30s}")
    print(f"{'fwd:bwd':10s}  {'loss':>5s} {'90 %':^13s} {'training':>8s} {'infer.':>6s}   "
          f"{'tokens':>7s} {'loss':>6s} {'best':>6s}   "
          f"{'params':>7s} {'tokens':>7s} {'loss':>6s} {'best':>7s}")
    for i, precision in enumerate(precisions):
        loss, low, high = same_run.loss[i]
        training_loss = same_training.loss[i, 0]
        both_loss = same_both.loss[i, 0]
        print(f"{precision.name:10s}  {loss:.3f}  {low:.3f}-{high:.3f} "
              f"{1 / tr[i]:8.2f} {1 / fw[i]:6.2f}   "
              f"{format_count(same_training.D[i]):>7s} {training_loss:6.3f} "
              f"{same_training.share[i]:6.0%}   "
              f"{format_count(same_both.N[i]):>7s} {format_count(same_both.D[i]):>7s} "
              f"{both_loss:6.3f} {same_both.share[i]:7.0%}")
    print("training, infer.: time relative to BF16. best: in which share of the law's draws its "
          "loss is the lowest.\n"
          "FP4 is QuEST forward, RTN-absmax backward (--precision fp4), or SR-absmax backward "
          "(fp4-sr).\n")


def print_choices(precisions, answers, by_paper, paper_answers):
    """Prints the choice for both budgets, and that of the paper's form of the law."""
    for i, budget in enumerate(("training", "inference and training"), 1):
        print_choice(budget, precisions, answers[i])
        print_paper_choice(by_paper, paper_answers[i])
    print()


def print_choice(budget, precisions, answer):
    """Prints the best precision for a budget, what comes next, and why."""
    losses = answer.loss[:, 0]
    # The sort is stable, so that BF16 comes before what is no better.
    best, second = losses.argsort(kind="stable")[:2]
    loss, low, high = answer.loss[best]
    print(f"Fixed {budget} budget: {precisions[best].name}, loss {loss:.3f} "
          f"({low:.3f}-{high:.3f}), the lowest in {answer.share[best]:.0%} of the draws; "
          f"next {precisions[second].name}, {losses[second]:.3f}.")

    N = answer.N[best]
    D = answer.D[best]
    theta = precisions[best].fit.theta
    eff_N = np.exp(theta[law.LN_EFF_N] * (D / N / 100) ** theta[law.TILT])
    delta = np.expm1(theta[law.DELTA])
    if best == 0:
        reason = "What is faster loses more than its speed can buy back"
    else:
        reason = (f"BF16's time pays for {format_count(N)} parameters on {format_count(D)} tokens")
    if eff_N != 1:
        reason += f", worth {format_count(N * eff_N)} of BF16 (eff_N {eff_N:.2f})"
    if delta:
        reason += f", at {delta:.1%} more loss"
    print(f"    {reason}.")


def print_paper_choice(precisions, answer):
    """Prints which precision the paper's form of the law would choose for the same budget."""
    losses = answer.loss[:, 0]
    best, second = losses.argsort(kind="stable")[:2]
    print(f"    By the paper's form: {precisions[best].name}, loss {losses[best]:.3f}; "
          f"next {precisions[second].name}, {losses[second]:.3f}.")


# ---- how far outside the runs

def print_extrapolation(points, speeds, N, D, most_N, most_D):
    """
    Says what of the question, and of what the budgets pay for, lies outside the BF16 runs.

    most_N and most_D are the most parameters and tokens that a precision affords.
    """
    n, d, _ = points
    question = [
        extrapolation("parameters", N, n),
        extrapolation("tokens", D, d),
        extrapolation("tokens a parameter", D / N, d - n),
    ]
    bought = [
        extrapolation("parameters", most_N, n),
        extrapolation("tokens", most_D, d),
    ]
    unmeasured = speeds.outside(N)
    for subject, sentences in (("The question", [*question, unmeasured]),
                               ("What the budgets buy", bought)):
        outside = [sentence for sentence in sentences if sentence]
        if outside:
            print(f"{subject} is EXTRAPOLATED: {'; '.join(outside)}.")
    if any(question + bought):
        print("The intervals know what the law gets wrong one size, or twice the tokens, outside "
              "the runs; not farther.")


def print_reach_of_efficiencies(runs, methods):
    """Says up to which size there are runs of every method that the table is made of."""
    forward_methods = ("BF16", "QuEST", "fp8")
    backward_methods = ("BF16", "RTN-absmax", "SR-absmax", "fp8")
    largest = []
    for forward, backward in methods:
        if forward in forward_methods and backward in backward_methods:
            n, _, _ = runs[forward, backward]
            largest.append(max(n))
    print(f"Efficiencies come from models of up to {format_count(np.exp(min(largest)))} "
          "parameters and are taken to hold for all.")
