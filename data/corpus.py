"""
Open a corpus for training: its tokens, its vocabulary, and a fingerprint that tells it from others.
"""
import functools
import math
from dataclasses import dataclass

from data import facts, tokens
from data.files import UserError, check
from data.prepare import prepare
from data.prepared import files, read_record
from data.tokenizer import Vocabulary, open_vocabulary


@dataclass(frozen=True)
class Corpus:
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

    @functools.cached_property
    def bytes_per_token(self):
        """
        How many bytes of text a token stands for, on average over the tokens that validation
        predicts; None if the vocabulary does not tell.

        END has no bytes.
        """
        try:
            lengths = self.vocabulary.bytes_of_ids()
        except UserError:
            return None
        n_tokens = 0
        n_bytes = 0
        for shard in self.val:
            predicted = shard[1:]       # as in tokens.val_batches
            n_tokens += len(predicted)
            for start in range(0, len(predicted), facts.CHUNK_TOKENS):
                n_bytes += int(lengths[predicted[start:start + facts.CHUNK_TOKENS]].sum())
        return n_bytes / n_tokens if n_bytes else None

    @property
    def token_in_words(self):
        if self.bytes_per_token is None:
            return "an unknown number of bytes (no bits per byte)"
        return f"{self.bytes_per_token:.2f} bytes"

    def bits_per_byte(self, loss):
        """
        Returns a validation loss, in nats a token, as the bits that the model needs to encode a
        byte of the text; None if that is not known, or loss is None.

        A token of a larger vocabulary stands for more text, so its loss is higher, though the model
        may be no worse. Bits per byte compare across vocabularies. END has no bytes, but its loss
        counts: it is a part of the mean. nanochat's evaluate_bpb (github.com/karpathy/nanochat)
        leaves that out.
        """
        if loss is None or self.bytes_per_token is None:
            return None
        return loss / math.log(2) / self.bytes_per_token


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
