"""
Turn texts into the files of a corpus: a vocabulary and token files, which appear all or none.
"""
import contextlib
import os
import time

from data import bpe, facts, tokenizer
from data.files import UserError, check
from data.prepared import files, read_record, workspace, write_record
from data.progress import progress_bar
from data.split import cut, read, size_of, split
from data.texts import END, count_kinds, list_files, no_text, quoted, unique
from data.tokenizer import VOCAB_FILE, Own
from data.tokens import TokenWriter, open_tokens

SAMPLE_CHARACTERS = 8_000_000       # of text that a vocabulary is trained on
DEFAULT_VOCAB = 4096
GROUP_CHARACTERS = 4_000_000        # of text that is encoded at a time
LEAST_TEXT_BYTES = 1_000            # A tenth of it is for validation, some sequences of 32.


def is_ready(folder, vocab):
    """
    Tells whether a folder holds a complete corpus with its vocabulary.

    UserError is raised if the vocabulary has changed since it was made, or has another size than
    `vocab`; None admits any.
    """
    try:
        for pattern in files(folder):
            open_tokens(pattern)
        vocabulary = Own(tokenizer.load(os.path.join(folder, VOCAB_FILE)))
    except UserError:
        return False
    tokenizer.check_unchanged(folder, vocabulary)
    tokenizer.check_size(folder, vocabulary.size, vocab)
    return True


def make_from_files(name, folder, vocab):
    """
    Makes a corpus of text files, unless the folder is ready.

    name   as in list_files()
    vocab  the number of entries in the vocabulary; None stands for the default
    """
    if is_ready(folder, vocab):
        return
    with workspace(folder) as work:
        # Another preparation may have made it while this one waited.
        if is_ready(folder, vocab):
            return
        listed, left_out = list_files(name)
        kept, no_texts = unique(listed)
        left_out += no_texts
        check(kept, no_text(name, left_out))
        pieces = cut(kept)
        check(size_of(pieces) >= LEAST_TEXT_BYTES,
              f"{quoted(name)} has {size_of(pieces):,} bytes of text, which is too little to "
              f"train and to validate on: give {LEAST_TEXT_BYTES:,} or more")
        train, val = split(pieces)
        # The vocabulary is trained on every n-th piece, so that its sample comes from everywhere.
        n = 1 + size_of(train) // SAMPLE_CHARACTERS
        vocab = vocab or DEFAULT_VOCAB
        ranks = bpe.train_bpe(sample(read(train[::n])), vocab - 1)
        parts = {
            "val.bin": (read(val), size_of(val)),
            "train.bin": (read(train), size_of(train)),
        }
        about = {"source": name, "vocab_asked": vocab, "left_out": count_kinds(left_out)}
        build(folder, work, parts, ranks, about)


def sample(passages):
    """Yields the text of the first passages, as much as a vocabulary is trained on."""
    size = 0
    for passage in passages:
        yield passage.text
        size += len(passage.text)
        if size > SAMPLE_CHARACTERS:
            return


def build(folder, work, parts, ranks, about):
    """
    Makes the vocabulary and the token files {name: (passages, bytes or None)} of a corpus.

    They are made in `work` and then moved. `about` goes into the record of the folder.
    """
    start_time = time.time()
    vocabulary = Own(ranks)
    tokenizer.save(ranks, os.path.join(work, VOCAB_FILE))
    sizes = {}
    for name, (passages, n_bytes) in parts.items():
        sizes[name] = write(os.path.join(work, name), passages, n_bytes, vocabulary)
    # What is listed can be cleaned even if this stops halfway. The training tokens are removed
    # first and moved last: where they are, everything is, and its record is true but for the
    # fingerprint.
    names = [VOCAB_FILE, *parts]
    counts = read_record(folder).get("counts", {}) | sizes
    write_record(folder, names, **about, vocab_size=vocabulary.size,
                 vocabulary=vocabulary.fingerprint, counts=counts, fingerprint=None)
    with contextlib.suppress(FileNotFoundError):
        os.remove(os.path.join(folder, names[-1]))
    for name in names:
        os.replace(os.path.join(work, name), os.path.join(folder, name))
    complete_record(folder, sizes)
    report(folder, sizes, vocabulary.size, time.time() - start_time, about["left_out"])


def complete_record(folder, counts):
    """
    Adds to a record what is known at the end: the fingerprint, and the size of each token file.

    counts  {file name: (tokens, bytes of text)} of new files; where they came as tokens, the bytes
            are not known, and None in the record
    """
    shards = [shard for pattern in files(folder) for shard in open_tokens(pattern)]
    counted = {os.path.basename(shard.filename): (len(shard), None) for shard in shards}
    counts = counted | read_record(folder).get("counts", {}) | counts
    write_record(folder, [], counts=counts, fingerprint=facts.fingerprint(facts.examine(shards)))


def report(folder, sizes, n_vocab, seconds, left_out):
    """Prints one line about a new corpus; sizes is {file name: (tokens, bytes of text)}."""
    counts = ", ".join(f"{n_tokens:,} tokens in {name}" for name, (n_tokens, _) in sizes.items())
    total_tokens = sum(n_tokens for n_tokens, _ in sizes.values())
    total_bytes = sum(n_bytes for _, n_bytes in sizes.values())
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in left_out.items())
    rest = f"; left out: {kinds}" if kinds else ""
    print(f"{folder}: {counts} ({total_bytes / total_tokens:.2f} bytes each, "
          f"vocabulary {n_vocab:,}, {seconds:.0f} s){rest}")


def write(path, passages, n_bytes, vocabulary):
    """Encodes passages into a token file, and returns how many tokens and bytes they have."""
    size = 0
    end_id = vocabulary.encode(END)
    with TokenWriter(path, vocabulary.size) as out, progress_bar(path, n_bytes) as bar:
        for group in groups(passages):
            texts = [passage.text for passage in group]
            for passage, ids in zip(group, vocabulary.encode_batch(texts, os.cpu_count())):
                # A text may begin with an END of its own.
                if passage.begins_document and ids[:1] != end_id:
                    ids = end_id + ids
                out.append(ids)
                size += len(passage.text.encode())
            bar.update(size - bar.n)
        check(out.n >= 2, f"there is too little text for {os.path.basename(path)}: add some")
    return out.n, size


def groups(passages):
    """Yields lists of passages that are encoded together, of some 4 million characters."""
    group = []
    size = 0
    for passage in passages:
        group.append(passage)
        size += len(passage.text)
        if size > GROUP_CHARACTERS:
            yield group
            group = []
            size = 0
    if group:
        yield group
