"""
Vocabularies: what turns text into token ids and back.

A corpus made here has a byte-level BPE vocabulary of its own (data/bpe.py trains it) in the file
vocab.tiktoken, in tiktoken's text format: a line holds a token in base64 and its rank. nanoGPT's
corpora of characters have meta.pkl. Without either file, the width of the tokens tells whose they
are. A checkpoint keeps the state() of its vocabulary, so that a model can write text when the
corpus is gone.
"""
import base64
import functools
import hashlib
import json
import os
import pickle
import re

import numpy as np
import tiktoken

from data.bpe import BYTES, PATTERN
from data.files import UserError, check
from data.prepared import read_record
from data.texts import END, MAX_VOCAB

VOCAB_FILE = "vocab.tiktoken"
META_FILE = "meta.pkl"
MAX_META_BYTES = 64 << 20
GPT2_SIZE = 50257
LLAMA3_SIZE = 128256


class Vocabulary:
    """
    A vocabulary of `size` entries, of which nothing but the size is known, or whose text cannot be
    had here. The classes below can encode and decode.
    """

    def __init__(self, size, kind="unknown", why="came without one"):
        self.size = size
        self.kind = kind
        self.why = why

    def state(self):
        """Returns the vocabulary as a dict of plain types, for a checkpoint."""
        return {"kind": self.kind, "size": self.size}

    @functools.cached_property
    def fingerprint(self):
        """16 hex digits that tell this vocabulary from all others."""
        content = json.dumps(self.state(), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def encode(self, text):
        """Returns the ids of a text, at least one; END in the text is the special token."""
        raise UserError(self.no_text())

    def decode(self, ids):
        """Returns the text of ids; those outside the vocabulary are skipped."""
        raise UserError(self.no_text())

    def bytes_of_ids(self):
        """Returns how many bytes of text each id stands for, an array of `size`: 0 for END."""
        raise UserError(self.no_text())

    def no_text(self):
        return f"there is no text, because the vocabulary of these tokens {self.why}"


class BytePairs(Vocabulary):
    """A vocabulary with which tiktoken encodes, by self.encoding."""

    def encode(self, text):
        return self.encode_batch([text])[0] or [self.encoding.eot_token]

    def encode_batch(self, texts, threads=1):
        """Returns the ids of each text, none for an empty one."""
        return self.encoding.encode_batch(texts, num_threads=threads, allowed_special={END})

    def decode(self, ids):
        return self.encoding.decode([i for i in ids if 0 <= i < self.size])

    def bytes_of_ids(self):
        lengths = np.array([len(self.encoding.decode_single_token_bytes(i))
                            for i in range(self.size)])
        lengths[self.encoding.eot_token] = 0
        return lengths


class Own(BytePairs):
    """A vocabulary {token: rank} that was trained here; END comes after its tokens."""

    def __init__(self, ranks):
        super().__init__(len(ranks) + 1, "bpe")
        self.ranks = ranks

    def state(self):
        return super().state() | {"tokens": to_lines(self.ranks)}

    @functools.cached_property
    def encoding(self):
        return tiktoken.Encoding(
            "own",
            pat_str=PATTERN,
            mergeable_ranks=self.ranks,
            special_tokens={END: len(self.ranks)},
        )


class Gpt2(BytePairs):
    """GPT-2's, which tiktoken downloads once, when the first text needs it."""

    def __init__(self):
        super().__init__(GPT2_SIZE, "gpt2")

    @functools.cached_property
    def encoding(self):
        try:
            return tiktoken.get_encoding("gpt2")
        except (OSError, ValueError) as error:      # the errors of requests are OSErrors
            raise UserError(f"GPT-2's vocabulary cannot be downloaded ({type(error).__name__}): "
                            f"connect once, and tiktoken keeps a copy")


class Characters(Vocabulary):
    """
    Strings with ids, as in nanoGPT's meta.pkl: mostly single characters, and no END.

    ValueError is raised unless `strings` is {id: string} with one entry at least.
    """

    def __init__(self, size, strings):
        if not is_alphabet(strings):
            raise ValueError("an alphabet has ids and their strings, at least one")
        super().__init__(size, "characters")
        self.strings = strings          # {id: string}
        self.ids = {string: i for i, string in strings.items()}
        longest_first = sorted(self.ids, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, longest_first)))

    def state(self):
        return super().state() | {"strings": [list(item) for item in sorted(self.strings.items())]}

    def encode(self, text):
        ids = []
        i = 0
        while i < len(text):
            match = self.pattern.match(text, i)
            check(match, f"{text[i]!r} is not in the vocabulary, which has {self.size} entries")
            ids.append(self.ids[match.group()])
            i = match.end()
        return ids or [0]

    def decode(self, ids):
        return "".join(self.strings.get(i, "") for i in ids)

    def bytes_of_ids(self):
        check(len(self.strings) == self.size, "not every id of this vocabulary has a string")
        return np.array([len(self.strings[i].encode(errors="replace")) for i in range(self.size)])


def llama3():
    return Vocabulary(LLAMA3_SIZE, "llama3", "is Llama 3's, which may not be passed on")


# ---- of a corpus, and of a checkpoint

def open_vocabulary(folder, vocab=None, token_bytes=2):
    """
    Returns the vocabulary of a corpus folder, without a download.

    vocab        how many entries it has to have; None admits any
    token_bytes  the width of the tokens, which decides where the folder has no vocabulary: tokens
                 of 4 bytes are Llama 3's, of 2 bytes GPT-2's, unless vocab says another size
    """
    if os.path.exists(os.path.join(folder, VOCAB_FILE)):
        vocabulary = Own(load(os.path.join(folder, VOCAB_FILE)))
        check_unchanged(folder, vocabulary)
    elif os.path.exists(os.path.join(folder, META_FILE)):
        vocabulary = load_meta(os.path.join(folder, META_FILE))
    else:
        check(VOCAB_FILE not in read_record(folder).get("files", []),
              f"{folder} has lost its {VOCAB_FILE}: remove the folder and prepare it again")
        vocabulary = llama3() if token_bytes == 4 else Gpt2()
        if vocab is not None and vocab != vocabulary.size:
            check(1 <= vocab <= MAX_VOCAB,
                  f"a vocabulary of {vocab:,} is not possible: give --vocab up to {MAX_VOCAB:,}")
            vocabulary = Vocabulary(vocab)
    check_size(folder, vocabulary.size, vocab)
    return vocabulary


def check_size(folder, size, vocab):
    """Refuses a vocabulary of another size than was asked for, unless its text had no more."""
    if vocab is None or vocab == size:
        return
    check(vocab == read_record(folder).get("vocab_asked"),
          f"{folder} has a vocabulary of {size:,}, not {vocab:,}: leave out --vocab, or remove the "
          f"folder")


def check_unchanged(folder, vocabulary):
    """Refuses a vocabulary other than the one the tokens were made with, if that is recorded."""
    check(read_record(folder).get("vocabulary") in (None, vocabulary.fingerprint),
          f"the {VOCAB_FILE} in {folder} has changed since it was prepared: remove the folder and "
          f"prepare it again")


def vocabulary_from_state(state):
    """Returns the vocabulary whose state() is given."""
    try:
        kind = state["kind"]
        if kind == "bpe":
            return Own(from_lines(state["tokens"].splitlines()))
        if kind == "characters":
            return Characters(state["size"], dict(state["strings"]))
        known = {"gpt2": Gpt2, "llama3": llama3, "unknown": lambda: Vocabulary(state["size"])}
        return known[kind]()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"the vocabulary in the checkpoint is damaged ({type(error).__name__})")


# ---- files

def to_lines(ranks):
    """Returns {token: rank} in tiktoken's text format."""
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()]
    return "".join(lines)


def from_lines(lines):
    """Returns {token: rank} of lines in tiktoken's text format, or raises ValueError."""
    ranks = {}
    for line in lines:
        token, rank = line.split()
        ranks[base64.b64decode(token, validate=True)] = int(rank)
    has_all_bytes = ranks.keys() >= set(BYTES)
    has_all_ranks = sorted(ranks.values()) == list(range(len(ranks)))
    if not has_all_bytes or not has_all_ranks:
        raise ValueError("a byte or a rank is missing")
    return ranks


def save(ranks, path):
    with open(path, "w") as file:
        file.write(to_lines(ranks))


def load(path):
    """
    Reads a vocab.tiktoken and returns {token: rank}.

    tiktoken's own reader is not used, because it caches by path and would miss a new file.
    """
    try:
        with open(path, encoding="ascii") as file:
            return from_lines(file)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the vocabulary {path} ({error}): prepare the corpus again")


class PlainUnpickler(pickle.Unpickler):
    """Reads numbers, strings, lists and dicts. An ordinary Unpickler runs what a file tells it."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it holds a {module}.{name}")


def load_meta(path):
    """Returns the vocabulary in nanoGPT's meta.pkl: vocab_size and, for text, itos."""
    try:
        with open(path, "rb") as file:
            check(os.path.getsize(path) <= MAX_META_BYTES, f"{path} is too large to be a meta.pkl")
            meta = PlainUnpickler(file).load()
        size = meta["vocab_size"]
        strings = meta.get("itos")
    except UserError:
        raise
    except Exception as error:          # A damaged pickle may raise anything.
        raise UserError(f"cannot read {path} ({error}): nanoGPT's holds vocab_size and itos, all "
                        f"of plain types")
    check(type(size) is int and 1 <= size <= MAX_VOCAB,
          f"{path} says vocab_size {size!r}, which is no size of a vocabulary")
    if strings is None:
        return Vocabulary(size)
    if isinstance(strings, list):
        strings = dict(enumerate(strings))
    check(is_alphabet(strings),
          f"{path} has something else in itos than ids and their strings, at least one")
    check(all(i < size for i in strings),
          f"{path} has an id {max(strings):,} in itos, but vocab_size is {size:,}")
    return Characters(size, strings)


def is_alphabet(strings):
    return isinstance(strings, dict) and strings and all(map(is_entry, strings.items()))


def is_entry(item):
    i, string = item
    return type(i) is int and i >= 0 and isinstance(string, str) and string != ""
