"""
Split texts into what is trained on and what is for validation, and read both in pieces.

A large file is cut into pieces of 1 MB, so that memory stays small.
"""
import codecs
import hashlib
import os
from typing import NamedTuple

from data.files import UserError
from data.texts import END

PIECE_BYTES = 1 << 20
LEAST_SHARE = 0.005                 # of the text, for validation
MOST_SHARE = 0.1
TAIL_SHARE = 0.1                    # if names do not give a share between these two
MOST_TAIL_SHARE = 0.12
LEAST_BYTES = 16_384                # some eight sequences of 512 tokens
CHARACTER_BYTES = 4                 # the longest in UTF-8
END_BYTES = END.encode()


class Piece(NamedTuple):
    """A text file, or the bytes of it from start to stop."""
    name: str
    path: str
    start: int
    stop: int


class Passage(NamedTuple):
    """The text of a document, or of a part of it."""
    begins_document: bool
    text: str


def cut(files):
    """Cuts TextFiles into pieces of at most 1 MB."""
    pieces = []
    for file in files:
        for start in range(0, file.size, PIECE_BYTES):
            stop = min(start + PIECE_BYTES, file.size)
            pieces.append(Piece(file.name, file.path, start, stop))
    return pieces


def split(pieces):
    """
    Returns the pieces for training and those for validation.

    The hash of a file's name decides. If that gives validation too small or too large a share of
    the text, as with few files, or too little for a reliable loss, it gets the last tenth instead.
    """
    total = size_of(pieces)
    val = [piece for piece in pieces if in_val(piece.name)]
    least = max(LEAST_SHARE * total, LEAST_BYTES)
    if least <= size_of(val) <= MOST_SHARE * total:
        return [piece for piece in pieces if not in_val(piece.name)], val
    return split_tail(pieces)


def in_val(name):
    """Tells whether a hash of the name falls into the 4 of 256 that are for validation."""
    return hashlib.sha256(os.fsencode(name)).digest()[0] < 4


def split_tail(pieces):
    """
    Returns the pieces without the last tenth of their bytes, and these.

    The piece in which the tenth begins belongs to it as a whole, so that a document stays together;
    if that would be too much, it is cut in two.
    """
    total = size_of(pieces)
    missing = int(TAIL_SHARE * total)
    room = int(MOST_TAIL_SHARE * total)
    head = list(pieces)
    tail = []
    while missing > 0:
        last = head.pop()
        if last.stop - last.start > room:
            boundary = last.stop - missing
            head.append(last._replace(stop=boundary))
            last = last._replace(start=boundary)
        tail.append(last)
        missing -= last.stop - last.start
        room -= last.stop - last.start
    return head, tail[::-1]


def size_of(pieces): return sum(piece.stop - piece.start for piece in pieces)


def read(pieces):
    """
    Yields the passage of each piece.

    A character, or an END in the text, that lies across a cut belongs where it begins. A file's
    byte order mark is not part of its text.
    """
    for _, path, start, stop in pieces:
        # To see what lies across a cut takes that many bytes on both sides of it.
        margin = len(END_BYTES) + CHARACTER_BYTES
        offset = max(0, start - margin)
        with open(path, "rb") as file:
            file.seek(offset)
            raw = file.read(stop + margin - offset)
        first = boundary_from(raw, start - offset)
        last = boundary_from(raw, stop - offset)
        text = raw[first:last]
        if start == 0:
            text = text.removeprefix(codecs.BOM_UTF8)
        try:
            yield Passage(start == 0, text.decode())
        except UnicodeDecodeError:      # texts.unique() has checked that the file is UTF-8.
            raise UserError(f"{path} has changed while it was read: prepare it again")


def boundary_from(raw, i):
    """Returns the first position from i on that is inside neither a character nor an END."""
    reach = len(END_BYTES) - 1
    start = raw.find(END_BYTES, max(0, i - reach), i + reach)
    if start >= 0:
        return start + len(END_BYTES)
    while i < len(raw) and raw[i] & 0xC0 == 0x80:       # in UTF-8 10xxxxxx continues a character
        i += 1
    return i
