"""
Token files, and the batches read from them. Three layouts, told apart by their first four bytes:

    llm.c, GPT-2      256 int32: 20240520, 1, number of tokens, 0 ...; then uint16. Ours are of this kind
    llm.c, Llama 3    256 int32: 20240801, 7, number of tokens, 0 ...; then uint32
    nanoGPT           nothing but uint16

Files are memory-mapped, so a corpus may be larger than memory; several files (shards) make one corpus.
"""
import codecs, functools, glob, os
import numpy as np

HEADER = 1024                                           # bytes
KINDS = {20240520: (1, "<u2"), 20240801: (7, "<u4")}    # magic: version, type; all little-endian
FOREIGN = {b"\x89PNG": "PNG", b"\x1f\x8b\x08": "gzip", b"PK\3\4": "zip", b"\x28\xb5\x2f\xfd": "zstd",
           b"\x93NUMPY": "NumPy", b"PAR1": "Parquet", b"\x80\4\x95": "pickle", b"\x80\5\x95": "pickle"}


class DataError(Exception):
    """the message is one sentence for the user: what, where, what to do"""


def open_tokens(pattern):
    """a file, or a glob that names several shards -> their tokens, one memory map a file"""
    paths = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern))
    paths = [path for path in paths if os.path.isfile(path)]
    if not paths:
        raise DataError(f"there is no token file {pattern}: make it with python data/prepare.py")
    return [open_file(path) for path in paths]


def open_file(path):
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        head = file.read(HEADER)
    magic = int.from_bytes(head[:4], "little")
    if magic not in KINDS:
        check_headerless(path, head, size)
        return np.memmap(path, "<u2", "r")
    (version, dtype), (_, found, n) = KINDS[magic], np.frombuffer(head.ljust(12, b"\0"), "<u4", 3).tolist()
    expected = HEADER + n * np.dtype(dtype).itemsize
    if size < HEADER or size != expected:
        wrong = "truncated" if size < expected else "too long"
        raise DataError(f"{path} is {wrong}: {n:,} tokens and their header take {expected:,} bytes, "
                        f"the file has {size:,}; prepare it again")
    if found != version:
        raise DataError(f"{path} has version {found} of its format, not {version}: prepare it again")
    if n < 2:
        raise DataError(f"{path} holds {n} tokens, and to predict one takes two: prepare it from more text")
    return np.memmap(path, dtype, "r", HEADER)


def check_headerless(path, head, size):
    """bare uint16 have no mark of their own: refuse what is evidently something else"""
    for start, kind in FOREIGN.items():
        if head.startswith(start):
            raise DataError(f"{path} is a {kind} file, not tokens: name what data/prepare.py has made")
    if size >= 16 and is_text(head):
        raise DataError(f"{path} looks like text, not tokens: prepare it with python data/prepare.py {path}")
    if size < 4 or size % 2:
        raise DataError(f"{path} has {size:,} bytes, not two or more tokens of 2 bytes: prepare it again")


def is_text(head):
    """UTF-8 without control characters; its last character may be cut off"""
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return all(c.isprintable() or c in "\t\n\r\f\ufeff" for c in text)


class TokenWriter:
    """with TokenWriter(path, vocab) as out: out.append(tokens), any number of times. The file appears when it
    is complete; after an exception what was there before is still there"""

    def __init__(self, path, vocab):
        self.path, self.vocab, self.n = path, vocab, 0
        self.magic = 20240520 if vocab <= 65536 else 20240801
        self.version, self.dtype = KINDS[self.magic]

    def __enter__(self):
        self.file = open(self.path + ".tmp", "wb")
        self.file.write(bytes(HEADER))
        return self

    def append(self, tokens):
        tokens = np.asarray(tokens)
        check_range(tokens, self.vocab, self.path, self.n)
        self.n += len(tokens)
        if self.n >= 2**31:
            raise DataError(f"{self.path} would get 2**31 tokens, more than a header can say: split the text")
        self.file.write(tokens.astype(self.dtype).tobytes())

    def __exit__(self, failed, *_):
        try:
            with self.file:
                if not failed:
                    self.file.seek(0)
                    self.file.write(np.array([self.magic, self.version, self.n], "<i4").tobytes())
                    self.file.flush()
                    os.fsync(self.file.fileno())
            if not failed: os.replace(self.path + ".tmp", self.path)
        finally:
            if os.path.exists(self.path + ".tmp"): os.remove(self.path + ".tmp")


def check_range(tokens, vocab, path, start):
    """the tokens, which lie in the file from `start` on, are all in the vocabulary"""
    if len(tokens) and tokens.max() >= vocab:
        i = int((tokens >= vocab).argmax())
        raise DataError(f"token {tokens[i]} at position {start + i:,} of {path}, but the vocabulary has "
                        f"{vocab:,} entries: the file was made with another tokenizer; prepare it again")


@functools.lru_cache(2)                                 # a batch may lie in two epochs
def epoch_order(windows, T, seed, epoch):
    """by how much an epoch's windows are shifted, and in which order they come"""
    rng = np.random.default_rng((seed, epoch))
    return int(rng.integers(T)), rng.permutation(windows)


def batch(shards, step, B, T, seed, vocab=None):
    """x, y: int64 [B, T], y one token ahead. Each epoch reads every window of T+1 tokens once, in a fresh
    order and from a fresh offset, as the paper's code does. Sequence g = step*B + b depends on nothing but g:
    resume is exact, and the i-th of n slices of a batch is batch(shards, step*n + i, B//n, T, seed)"""
    fits = [max((len(s) - T) // T, int(len(s) > T)) for s in shards]    # windows that fit at any offset
    ends, total = np.cumsum(fits), sum(fits)
    if not total:
        raise DataError(f"{shards[0].filename} has {len(shards[0]):,} tokens: too few for a sequence of {T}, "
                        f"which takes {T + 1}; shorten it or prepare more text")
    rows = np.empty((B, T + 1), np.int64)
    for b, g in enumerate(range(step * B, step * B + B)):
        shift, order = epoch_order(total, T, seed, g // total)
        window = int(order[g % total])
        i = int(np.searchsorted(ends, window, "right"))
        start = T * (window - int(ends[i]) + fits[i])
        start += shift % min(T, len(shards[i]) - T * fits[i])           # all of it, but in a shard below 2T
        rows[b] = shards[i][start:start + T + 1]
        if vocab: check_range(rows[b], vocab, shards[i].filename, start)
    return rows[:, :-1].copy(), rows[:, 1:].copy()


def val_batches(shards, B, T, vocab=None):
    """(x, y) [B, T] that predict every token but a shard's first, once, in order; padding is x = 0, y = -1"""
    windows = [(s, start) for s in shards for start in range(0, len(s) - 1, T)]
    for first in range(0, len(windows), B):
        x, y = np.zeros((B, T), np.int64), np.full((B, T), -1)
        for b, (s, start) in enumerate(windows[first:first + B]):
            tokens = s[start:start + T + 1]
            if vocab: check_range(tokens, vocab, s.filename, start)
            x[b, :len(tokens) - 1], y[b, :len(tokens) - 1] = tokens[:-1], tokens[1:]
        yield x, y
