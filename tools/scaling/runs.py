"""
Reads finished runs from a CSV file, one run a line.

    params,tokens,forward,backward,loss
    30482560,749993984,QuEST,BF16,3.48209

The columns are the number of parameters (without embedding and head), the number of tokens, the
precisions of the forward and of the backward pass (BF16 means that it is not quantised), and the
final validation loss. Other columns are ignored.

Two kinds of line are left out, and the user is told: those that start with #, and runs that
diverged (the loss is nan, inf or empty). Anything else that is wrong stops with one sentence.

data/quartet.csv has the authors' runs. Those of 1600 tokens a parameter are marked with #, because
the paper's Table 6 is fitted without them. data/quartet2.csv has the runs of Quartet II, which come
from another code base: compare runs within one of the files only. data/larger.csv has three larger
models of the first paper (its Figure 5; two have their BF16 run in quartet.csv), which are fitted
by nobody and show what the law says far outside.
"""
import csv
import math
import os
from collections import defaultdict
from typing import NamedTuple

import numpy as np

from data.files import UserError, check

DATA = os.path.join(os.path.dirname(__file__), "data")
PAPER = os.path.relpath(os.path.join(DATA, "quartet.csv"))
SECOND = os.path.relpath(os.path.join(DATA, "quartet2.csv"))


class Run(NamedTuple):
    """One line of a file; the fields are its columns."""
    params: float
    tokens: float
    forward: str
    backward: str
    loss: float                         # NaN where the run diverged


COLUMNS = Run._fields


def read(path):
    """
    Reads a file of runs. Raises UserError on the first thing that is wrong with it.

    Returns {(forward, backward): (ln params, ln tokens, ln loss)}, each an array over the runs, and
    a list of sentences on what was left out.
    """
    lines = read_lines(path)
    header = read_header(path, lines)
    commented = []
    diverged = []
    line_of_run = {}
    points = defaultdict(list)
    for number, line in enumerate(lines, 1):
        if line.startswith("#"):
            commented.append(str(number))
        if number == 1 or not line.strip() or line.startswith("#"):
            continue
        place = f"{path}, line {number}"
        run = parse_run(place, header, line)
        if not math.isfinite(run.loss):
            diverged.append(f"{place}, diverged: {line}")
            continue
        check(run.loss > 0, f"{place}: a loss must be positive, got {run.loss:g}")
        kind = run[:4]                  # all but the loss
        check(kind not in line_of_run,
              f"{place} repeats line {line_of_run.get(kind)}: one run of a kind, "
              "or the average of several")
        line_of_run[kind] = number
        points[run.forward, run.backward].append((run.params, run.tokens, run.loss))
    left_out = diverged
    if commented:
        left_out = [f"{path}, lines marked with #: {', '.join(commented)}", *diverged]
    return {method: tuple(np.log(np.array(rows).T)) for method, rows in points.items()}, left_out


def read_lines(path):
    try:
        with open(path, encoding="utf-8-sig") as file:
            return file.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise UserError(f"cannot read {path}: {reason}")


def read_header(path, lines):
    """Returns the names of the columns, from the first line."""
    fields = next(csv.reader(lines[:1]), [])
    header = [name.strip() for name in fields]
    missing = [name for name in COLUMNS if name not in header]
    check(not missing, f"{path} has no column {', '.join(missing)}; "
                       f"its first line must name {','.join(COLUMNS)}")
    return header


def parse_run(place, header, line):
    """Returns the Run of one line. place says where the line is, for an error."""
    fields = next(csv.reader([line]))
    check(len(fields) == len(header),
          f"{place}: {len(fields)} fields, the first line has {len(header)}")
    row = {name: value.strip() for name, value in zip(header, fields)}
    method = (row["forward"], row["backward"])
    check(all(method),
          f"{place}: forward or backward is empty; what is not quantised is called BF16")
    try:
        N, D, L = (float(row[name] or "nan") for name in ("params", "tokens", "loss"))
    except ValueError as error:
        raise UserError(f"{place}: {error}")
    check(0 < N < math.inf and 0 < D < math.inf,
          f"{place}: params and tokens must be positive, got {N:g}, {D:g}")
    return Run(N, D, *method, L)
