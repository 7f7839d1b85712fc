"""
Finished runs, one a line of a CSV file: params (without embedding and head), tokens, forward and backward precision
(BF16 = not quantised), final validation loss. Other columns are ignored.

    params,tokens,forward,backward,loss
    30482560,749993984,QuEST,BF16,3.48209

Left out, and said: lines that start with #, and runs that diverged (the loss is nan, inf or empty). Anything else that
is wrong stops with one sentence.

data/quartet.csv has the authors' runs; those of 1600 tokens a parameter are marked with #: the paper's Table 6 is
fitted without them. data/quartet2.csv has the runs of Quartet II (another code base: compare within one file).
"""
import csv, math, os
from collections import defaultdict
import numpy as np

PAPER = os.path.relpath(os.path.join(os.path.dirname(__file__), "data", "quartet.csv"))
COLUMNS = "params", "tokens", "forward", "backward", "loss"


class Stop(Exception):
    """nothing sensible can be computed; the message is one sentence for the user"""


def check(ok, sentence):
    if not ok: raise Stop(sentence)


def read(path):
    """{(forward, backward): (ln params, ln tokens, ln loss)}, an array each; and sentences on what was left out"""
    try: lines = open(path, encoding="utf-8-sig").read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise Stop(f"cannot read {path}: {getattr(error, 'strerror', None) or 'it is not text'}")
    header = [name.strip() for name in next(csv.reader(lines[:1]), [])]
    missing = [name for name in COLUMNS if name not in header]
    check(not missing, f"{path} has no column {', '.join(missing)}; its first line must name {','.join(COLUMNS)}")
    points, seen, diverged = defaultdict(list), {}, []
    marked = [str(number) for number, line in enumerate(lines, 1) if line.startswith("#")]
    for number, line in enumerate(lines[1:], 2):
        if not line.strip() or line.startswith("#"): continue
        where, fields = f"{path}, line {number}", next(csv.reader([line]))
        check(len(fields) == len(header), f"{where}: {len(fields)} fields, the first line has {len(header)}")
        row = {name: value.strip() for name, value in zip(header, fields)}
        method = row["forward"], row["backward"]
        check(all(method), f"{where}: forward or backward is empty; what is not quantised is called BF16")
        try: N, D, L = (float(row[name] or "nan") for name in ("params", "tokens", "loss"))
        except ValueError as error: raise Stop(f"{where}: {error}")
        check(0 < N < math.inf and 0 < D < math.inf, f"{where}: params and tokens must be positive, got {N:g}, {D:g}")
        if not math.isfinite(L):
            diverged.append(f"{where}, diverged: {line}")
            continue
        check(L > 0, f"{where}: a loss must be positive, got {L:g}")
        key = N, D, *method
        check(key not in seen, f"{where} repeats line {seen.get(key)}: one run of a kind, or the average of several")
        seen[key] = number
        points[method].append((N, D, L))
    left_out = [f"{path}, lines marked with #: {', '.join(marked)}"] * bool(marked) + diverged
    return {method: tuple(np.log(np.array(rows).T)) for method, rows in points.items()}, left_out
