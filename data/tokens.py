"""
Token files and the batches read from them. Three layouts, told apart by their first four bytes:

    llm.c, GPT-2 tokens      256 int32: 20240520, 1, number of tokens, 0 ...; then uint16; ours are of this kind
    llm.c, Llama-3 tokens    256 int32: 20240801, 7, number of tokens, 0 ...; then uint32
    nanoGPT                  nothing but uint16

Files are memory-mapped, so a corpus may be larger than memory; several files (shards) make one corpus.
"""
import functools, glob, os
import numpy as np

HEADER = 1024                                                   # bytes
KINDS = {20240520: (1, np.uint16), 20240801: (7, np.uint32)}    # magic: version, type


class DataError(Exception):
    """the message is one sentence for the user: what, where, what to do"""


def open_tokens(pattern):
    """a path, or a glob that names several shards -> their tokens, one array a file"""
    paths = sorted(glob.glob(pattern))
    if not paths:
        raise DataError(f"no token file {pattern}: prepare it with python data/prepare.py")
    return [open_file(path) for path in paths]


def open_file(path):
    size = os.path.getsize(path)
    if size < 4:
        raise DataError(f"{path} is empty: prepare it again")
    head = np.fromfile(path, np.int32, min(HEADER, size) // 4)
    if head[0] not in KINDS:
        start = head.tobytes()
        if size % 2 or start[:4] in (b"PK\3\4", b"\x89PNG", b"PAR1") or start[:2] in (b"\x1f\x8b", b"\x80\4") or start[1:6] == b"NUMPY":
            raise DataError(f"{path} is not a token file: it starts with {start[:4].hex(' ')}")
        if not any(b >= 127 or b < 9 for b in start):
            raise DataError(f"{path} looks like text, not tokens: prepare it with python data/prepare.py {path}")
        return np.memmap(path, np.uint16, "r")
    version, dtype = KINDS[head[0]]
    if head[1] != version:
        raise DataError(f"{path} has version {head[1]} of its format, this reads version {version}: prepare it again")
    expected = HEADER + int(head[2]) * np.dtype(dtype).itemsize
    if size != expected:
        raise DataError(f"{path} is truncated or damaged: its header asks for {expected:,} bytes, it has {size:,}; prepare it again")
    return np.memmap(path, dtype, "r", HEADER)


class TokenWriter:
    """with TokenWriter(path, vocab) as w: w.append(ids), any number of times"""

    def __init__(self, path, vocab):
        self.path, self.n = path, 0
        self.magic = 20240520 if vocab <= 65536 else 20240801
        self.dtype = KINDS[self.magic][1]

    def __enter__(self):
        self.file = open(self.path, "wb")
        self.file.write(bytes(HEADER))
        return self

    def append(self, ids):
        ids = np.asarray(ids, self.dtype)
        self.n += len(ids)
        self.file.write(ids.tobytes())

    def __exit__(self, failed, *_):
        with self.file:
            if failed: return
            header = np.zeros(256, np.int32)
            header[:3] = self.magic, KINDS[self.magic][0], self.n
            self.file.seek(0)
            self.file.write(header.tobytes())
            self.file.flush(), os.fsync(self.file.fileno())


def in_range(tokens, vocab, shard, start):
    if len(tokens) and tokens.max() >= vocab:
        i = int(tokens.argmax())
        raise DataError(f"token {tokens[i]} at position {start + i:,} of {shard.filename} is outside the vocabulary of {vocab:,}: "
                        "the file was made with another tokenizer")
    return tokens


@functools.lru_cache(2)
def order(windows, T, seed, epoch):
    """where the windows of an epoch begin, and in which order they come"""
    random = np.random.default_rng((seed, epoch))
    return random.integers(T), random.permutation(windows)


def batch(shards, step, B, T, seed, vocab):
    """x, y int64 [B, T], y one token ahead. A function of the step: no state, so resume is exact. Each epoch reads
    every window of T + 1 tokens once, in a fresh order and from a fresh offset, as the paper's code does"""
    each = [max(0, (len(s) - T) // T) for s in shards]          # so many fit whatever the offset
    ends, total = np.cumsum(each), sum(each)
    if not total:
        raise DataError(f"{shards[0].filename} has {len(shards[0]):,} tokens: too few for a sequence of {T}, which needs {2 * T:,}")
    rows = []
    for g in range(step * B, step * B + B):
        offset, permutation = order(total, T, seed, g // total)
        window = permutation[g % total]
        i = int(np.searchsorted(ends, window, "right"))
        start = int(offset + T * (window - (ends[i] - each[i])))
        rows.append(in_range(shards[i][start:start + T + 1], vocab, shards[i], start))
    rows = np.stack(rows).astype(np.int64)
    return rows[:, :-1].copy(), rows[:, 1:].copy()


def val_batches(shards, B, T, vocab):
    """(x, y) [B, T] that predict every token of the corpus once, in order; what is missing at the end is y = -1"""
    windows = [(s, start) for s in shards for start in range(0, len(s) - 1, T)]
    for i in range(0, len(windows), B):
        x, y = np.zeros((B, T), np.int64), np.full((B, T), -1, np.int64)
        for row, (s, start) in enumerate(windows[i:i + B]):
            t = in_range(s[start:start + T + 1], vocab, s, start)
            x[row, :len(t) - 1], y[row, :len(t) - 1] = t[:-1], t[1:]
        yield x, y
