"""
The layouts of token files, and what is wrong with a file that has none of them.

There are three layouts, told apart by their first four bytes. All numbers are little-endian:

    llm.c, GPT-2      256 int32: 20240520, 1, number of tokens, 0 ...; then uint16
    llm.c, Llama 3    256 int32: 20240801, 7, number of tokens, 0 ...; then uint32
    nanoGPT           no header, only uint16

Any bytes could be the third. So a file without header is looked at before it is believed.
"""
import codecs
import os

import numpy as np

from data.files import UserError, check
from data.texts import FOREIGN_FILES

HEADER_BYTES = 1024
GPT2 = 20240520
LLAMA3 = 20240801
LAYOUTS = {GPT2: (1, "<u2"), LLAMA3: (7, "<u4")}    # first number of the header: version, dtype
OTHER_FILES = {                     # llm.c's, by the first number
    20240326: "a checkpoint of GPT-2",
    20240327: "a state for debugging",
    20240328: "a tokenizer",
    20240522: "questions of an evaluation such as HellaSwag",
    20240527: "a state of the optimizer",
    20240803: "a checkpoint of Llama 3",
}
LOOK_BYTES = 1 << 16                # how much of a file without header is looked at
MANY = 32                           # so many values are no coincidence: see type_of()


def open_file(path):
    """Returns the tokens of a file as a memory map, or raises UserError."""
    try:
        with open(path, "rb") as file:
            head = file.read(LOOK_BYTES)
        magic = int.from_bytes(head[:4], "little")
        if magic in LAYOUTS:
            version, dtype = LAYOUTS[magic]
            check_header(path, head, version, np.dtype(dtype).itemsize)
            return np.memmap(path, dtype, "r", HEADER_BYTES)
        check_magic(path, head[:4])
        check_headerless(path, head)
        return np.memmap(path, "<u2", "r")
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror or error})")


def check_header(path, head, layout_version, token_bytes):
    """Refuses a file of llm.c whose length, version or number of tokens is wrong."""
    size = os.path.getsize(path)
    # The file may end within the header: zeros stand in for what is missing, and the length is
    # checked first.
    _, version, n = np.frombuffer(head.ljust(12, b"\0"), "<u4", 3).tolist()
    expected = HEADER_BYTES + n * token_bytes
    fault = "truncated" if size < expected else "too long"
    check(size == expected,
          f"{path} is {fault}: {n:,} tokens and their header take {expected:,} bytes, "
          f"the file has {size:,}; prepare it again")
    check(version == layout_version,
          f"{path} has version {version} of its format, not {layout_version}: prepare it again")
    check(n >= 2,
          f"{path} holds {n} tokens, and to predict one takes two: prepare it from more text")


def check_magic(path, start):
    """Refuses a file whose first four bytes show that it has a header, but not of tokens."""
    magic = int.from_bytes(start, "little")
    check(magic not in OTHER_FILES,
          f"{path} is {OTHER_FILES.get(magic)} of llm.c, not tokens: name what data/prepare.py has "
          f"made")
    for known in LAYOUTS:
        check(int.from_bytes(start, "big") != known,
              f"{path} is big-endian: token files are little-endian; write it again")
        check((magic ^ known).bit_count() != 1,
              f"{path} begins with {magic}, one bit off llm.c's {known}: it is damaged; prepare it "
              f"again")


def check_headerless(path, head):
    """Refuses what is evidently not a file of bare uint16."""
    for start, kind in FOREIGN_FILES.items():
        check(not head.startswith(start),
              f"{path} is a {kind} file, not tokens: name what data/prepare.py has made")
    size = os.path.getsize(path)
    check(size < 16 or not is_text(head[:HEADER_BYTES]),
          f"{path} looks like text, not tokens: prepare it with python data/prepare.py {path}")
    check(size >= 4 and size % 2 == 0,
          f"{path} has {size:,} bytes, not two or more tokens of 2 bytes: prepare it again")
    other = type_of(head) if size % 4 == 0 else None
    check(not other,
          f"{path} looks like {other}, and tokens without a header are read as uint16: write them "
          f"as tokens.astype('<u2')")


def is_text(head):
    """Tells whether the bytes are UTF-8 without control characters; the last may be cut off."""
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return all(c.isprintable() or c in "\t\n\r\f\ufeff" for c in text)


def type_of(head):
    """
    Returns the type of the tokens whose bytes are given, or None if they may be uint16.

    Read as uint16, wider numbers give words that differ between even and odd positions: the upper
    half of an int32 below 65,536 is always 0. In text a word is as likely at an even position as at
    an odd one. So if 32 words are above all those at odd positions, the chance that all of them lie
    at even ones is 2^-32, whatever the text: a small vocabulary or many zeros. (A run of one token
    has both kinds of position.)
    """
    words = np.frombuffer(head, "<u2", len(head) // 8 * 4)
    even = words[0::2]
    odd = words[1::2]
    if len(even) < MANY:
        return None
    highest = int(odd.max())
    # A vocabulary of more than 65,536 entries uses the whole lower half.
    is_upper_half = highest == 0 or (highest < 16 and even.max() >= 32768)
    if is_upper_half and (even > highest).sum() >= MANY:
        return "int32 or uint32" if words[2::4].any() else "int64 or uint64"
    for dtype in ("<f4", "<f8"):
        if are_whole_numbers(head, dtype, even, odd):
            return "float32" if dtype == "<f4" else "float64"
    # With swapped bytes, small numbers are multiples of 256; a few real tokens may be that, too.
    is_swapped = not even.any() or (not (words & 255).any() and len(np.unique(words)) >= 8)
    if is_swapped and np.count_nonzero(odd) >= MANY:
        return "big-endian numbers"
    if are_bytes(words):
        return "uint8"
    return None


def are_whole_numbers(head, dtype, even, odd):
    """Tells whether the bytes are floats below 65,536 without a fraction, and many of them."""
    values = np.frombuffer(head, dtype, len(head) // 8 * 8 // np.dtype(dtype).itemsize)
    with np.errstate(invalid="ignore"):
        is_whole = (values >= 0) & (values < 65536) & (values == np.floor(values))
    # A run of one token such as 0x4700 is a whole number in float32, but with two equal halves.
    return bool(is_whole.all()) and (even != odd).sum() >= MANY and np.count_nonzero(values) >= MANY


def are_bytes(words):
    """
    Tells whether each word is rather two ids below 128.

    In a vocabulary of 2,048 and more entries the lower byte of a token above 255 is as often 128
    and more as less. Here different tokens are counted, because a run of one proves nothing.
    """
    low = words & 255
    high = words >> 8
    n_high = np.count_nonzero(np.unique(words) >> 8)
    return n_high >= MANY and high.max() >= 8 and max(low.max(), high.max()) < 128
