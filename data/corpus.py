"""
Open a corpus for training: its tokens, its vocabulary, and a fingerprint that tells it from others.
"""
from typing import NamedTuple

from data import facts, tokens
from data.files import check
from data.prepare import prepare
from data.prepared import files, read_record
from data.tokenizer import Vocabulary, open_vocabulary


class Corpus(NamedTuple):
    folder: str
    train: list                     # of memory-mapped token files
    val: list
    vocabulary: Vocabulary
    fingerprint: str                # 16 hex digits, from the contents of the token files

    @property
    def identity(self):
        """What tells a run's corpus from another: plain types, for its log and checkpoint."""
        return {
            "fingerprint": self.fingerprint,
            "vocabulary": self.vocabulary.fingerprint,
            "vocab_size": self.vocabulary.size,
        }

    @property
    def description(self):
        """The identity, and how many tokens there are to train on."""
        return {**self.identity, "train_tokens": sum(map(len, self.train))}


def open_corpus(name, vocab=None):
    """
    Returns the corpus of a name that data/prepare.py knows, and makes it if it is missing.

    vocab is the number of entries in its vocabulary; None stands for the default.
    """
    return open_folder(prepare(name, vocab), vocab)


def open_folder(folder, vocab=None):
    """
    Returns the corpus in a folder of token files.

    All that can be checked without the length of a sequence is checked here, every token included.
    """
    train, val = [tokens.open_tokens(pattern) for pattern in files(folder)]
    token_bytes = max(shard.dtype.itemsize for shard in train + val)
    vocabulary = open_vocabulary(folder, vocab, token_bytes)
    known = facts.examine(train + val)
    for shard, fact in zip(train + val, known):
        if fact.largest >= vocabulary.size:
            refuse_largest(shard, vocabulary.size)
    fingerprint = facts.fingerprint(known)
    prepared_as = read_record(folder).get("fingerprint")
    check(prepared_as in (None, fingerprint),
          f"the token files in {folder} have changed since they were prepared: remove the folder "
          f"and prepare it again")
    return Corpus(folder, train, val, vocabulary, fingerprint)


def refuse_largest(shard, vocab):
    """Raises the UserError that names the first token outside the vocabulary."""
    for start in range(0, len(shard), facts.CHUNK_TOKENS):
        part = shard[start:start + facts.CHUNK_TOKENS]
        tokens.check_range(part, vocab, shard.filename, start)
