"""
Token files, and the batches that are read from them.

data/layout.py knows the layouts and refuses what is none. Files are memory-mapped, so that a corpus
may be larger than memory. Several files (shards) make one corpus.
"""
import contextlib
import functools
import glob
import os

import numpy as np

from data.files import UserError, atomic_open, check
from data.layout import GPT2, HEADER_BYTES, LAYOUTS, LLAMA3, open_file


# ---- reading files

def open_tokens(pattern):
    """
    Opens a token file, or all the shards that a glob names.

    Returns a list of one-dimensional memory maps, one a file, in the order of the files' names.
    """
    if os.path.exists(pattern):
        # A path that exists is never read as a glob: its name may contain a bracket.
        paths = [pattern]
    else:
        paths = sorted(glob.glob(pattern))
    paths = [path for path in paths if os.path.isfile(path)]
    check(paths, f"there is no token file {pattern}: make it with python data/prepare.py")
    return [open_file(path) for path in paths]


def check_range(tokens, vocab, path, start):
    """Refuses tokens outside the vocabulary; they lie in the file from position `start` on."""
    if len(tokens) == 0 or tokens.max() < vocab:
        return
    i = int((tokens >= vocab).argmax())
    raise UserError(
        f"token {tokens[i]} at position {start + i:,} of {path}, but the vocabulary has "
        f"{vocab:,} entries: the file was made with another tokenizer; prepare it again")


# ---- writing files

class TokenWriter:
    """
    Writes a token file piece by piece, in the layout that the size of the vocabulary calls for.

        with TokenWriter(path, vocab) as out:
            out.append(tokens)      # any number of times

    The file appears when it is complete. After an exception, what was there before is still there.
    """

    def __init__(self, path, vocab):
        self.path = path
        self.vocab = vocab
        self.n = 0
        self.magic = GPT2 if vocab <= 65536 else LLAMA3
        self.version, self.dtype = LAYOUTS[self.magic]

    def __enter__(self):
        self.on_exit = contextlib.ExitStack()
        self.file = self.on_exit.enter_context(atomic_open(self.path))
        # What is pushed last runs first: the header is completed before the file is moved.
        self.on_exit.push(self.write_header)
        self.file.write(bytes(HEADER_BYTES))
        return self

    def append(self, tokens):
        tokens = np.asarray(tokens)
        check_range(tokens, self.vocab, self.path, self.n)
        self.n += len(tokens)
        check(self.n < 2**31,
              f"{self.path} would get 2**31 tokens, more than a header can say: split the text")
        self.file.write(tokens.astype(self.dtype).tobytes())

    def write_header(self, exception_type, *_):
        """Fills in the number of tokens, which is known only at the end."""
        if exception_type is None:
            self.file.seek(0)
            self.file.write(np.array([self.magic, self.version, self.n], "<i4").tobytes())

    def __exit__(self, *exception):
        return self.on_exit.__exit__(*exception)


# ---- batches

def batch(shards, step, B, T, seed):
    """
    Returns the training batch of a step: x and y, int64 [B, T], where y is one token ahead of x.

    Each epoch reads every window of T + 1 tokens once, in a fresh order and from a fresh offset, as
    the paper's code does. Sequence g = step * B + b depends on the seed and on g alone. Hence a
    resumed run continues exactly, and the i-th of n slices of a batch is
    batch(shards, step * n + i, B // n, T, seed).

    UserError is raised if no shard holds T + 1 tokens, MemoryError if the batch is too large.
    """
    check_long_enough(shards, T)
    ends = np.cumsum([count_windows(len(shard), T) for shard in shards])
    rows = empty(B, T + 1)
    for b in range(B):
        shard, start = find_sequence(shards, ends, step * B + b, T, seed)
        rows[b] = shard[start:start + T + 1]
    return rows[:, :-1].copy(), rows[:, 1:].copy()


def empty(n_rows, n_columns):
    """Returns an int64 array without contents, or raises MemoryError."""
    try:
        return np.empty((n_rows, n_columns), np.int64)
    except ValueError as error:
        # So numpy says it of a size that no machine can address.
        raise MemoryError(str(error)) from error


def check_long_enough(shards, T):
    """Refuses a corpus in which no shard holds a sequence of T tokens and the token after it."""
    check(any(len(shard) > T for shard in shards),
          f"{shards[0].filename} has {len(shards[0]):,} tokens: too few for a sequence of {T}, "
          f"which takes {T + 1}; shorten it or prepare more text")


def count_windows(n_tokens, T):
    """
    Returns how many windows of T + 1 tokens an epoch reads from a shard.

    That many fit at any offset below T; a shard too short for that still gives one if it holds one.
    """
    holds_one = int(n_tokens > T)
    return max((n_tokens - T) // T, holds_one)


def find_sequence(shards, ends, g, T, seed):
    """
    Returns the shard of sequence g of the run, and where in the shard the sequence starts.

    ends[i] is the number of windows in the shards up to and including shard i.
    """
    total = int(ends[-1])
    epoch, position = divmod(g, total)
    offset, order = epoch_order(total, T, seed, epoch)
    window = int(order[position])
    i = int(np.searchsorted(ends, window, "right"))
    n_windows = count_windows(len(shards[i]), T)
    first_window = int(ends[i]) - n_windows
    # The offset applies in full, except in a shard of fewer than 2T tokens, which has no room.
    room = len(shards[i]) - T * n_windows
    return shards[i], T * (window - first_window) + offset % min(T, room)


@functools.lru_cache(2)     # the sequences of one batch may lie in two epochs
def epoch_order(n_windows, T, seed, epoch):
    """Returns by how many tokens an epoch's windows are shifted, and in which order they come."""
    rng = np.random.default_rng((seed, epoch))
    return int(rng.integers(T)), rng.permutation(n_windows)


def val_batches(shards, B, T):
    """
    Yields x and y, int64 [B, T], until every token but the first of a shard has been predicted.

    Each token is predicted once, in order. Where a row is padded, x is 0 and y is -1.
    """
    windows = []
    for shard in shards:
        windows += [(shard, start) for start in range(0, len(shard) - 1, T)]
    for first in range(0, len(windows), B):
        x = empty(B, T)
        y = empty(B, T)
        x[:] = 0
        y[:] = -1
        for b, (shard, start) in enumerate(windows[first:first + B]):
            tokens = shard[start:start + T + 1]
            n = len(tokens) - 1
            x[b, :n] = tokens[:-1]
            y[b, :n] = tokens[1:]
        yield x, y
