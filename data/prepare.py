"""
Make a corpus: data/NAME/train.bin, val.bin and vocab.tiktoken.

    python data/prepare.py stdlib              # sources of the standard library, 10 MB; the default
    python data/prepare.py python              # and all of site-packages, hundreds of MB
    python data/prepare.py notes.txt           # a text file of yours, or a folder of them
    python data/prepare.py shakespeare         # 1 MB, from the network
    python data/prepare.py c4 --shards 4       # web text, 300 MB a shard, from the network
    python data/prepare.py fineweb --shards 9  # ready GPT-2 tokens, 100 million a shard, likewise

quartet.py --data NAME does this by itself. With --vocab 2048 the folder is data/NAME-2048.

Every document starts with <|endoftext|>. About one in 64, chosen by a hash of its name, is for
validation. A corpus appears complete or not at all, a broken download goes on where it stopped, and
memory stays small.
"""
import argparse
import codecs
import glob
import gzip
import hashlib
import itertools
import json
import os
import site
import sys
import sysconfig
import tempfile
import time
from typing import NamedTuple

if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from data import tokenizer
from data.download import download, progress_bar
from data.files import UserError, check
from data.tokens import TokenWriter, open_tokens

HERE = os.path.dirname(os.path.abspath(__file__))
URLS = {
    "shakespeare": ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/"
                    "tinyshakespeare/input.txt"),
    "c4": "https://huggingface.co/datasets/allenai/c4/resolve/main/en/c4-{}.json.gz",
    "fineweb": ("https://huggingface.co/datasets/kjj0/fineweb10B-gpt2/resolve/main/"
                "fineweb_{}.bin"),
}
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
VOCAB_FILE = "vocab.tiktoken"
SAMPLE_CHARACTERS = 8_000_000       # of text that a vocabulary is trained on
GROUP_CHARACTERS = 4_000_000        # of text that is encoded at a time
MB = 1 << 20
MAX_VOCAB = 1 << 20
SOURCE_ENDINGS = (".py", ".pyi", ".pyx", ".md", ".rst", ".txt")
# Folders of the standard library that hold other packages, tests, or mostly tables.
STDLIB_SKIP = ("site-packages", "dist-packages", "test", "tests", "idle_test", "encodings",
               "pydoc_data")


# ---- corpora

def prepare(name, vocab=0, shards=1, out=None):
    """
    Returns the folder of a corpus, which is made if it is not there.

    The name is one of the list above, a text file, a folder of text files, or a folder that holds
    token files already. vocab is the number of entries in the vocabulary; 0 stands for the default.
    """
    check(not vocab or 257 <= vocab <= MAX_VOCAB,
          f"a vocabulary of {vocab:,} is not possible: give --vocab between 257 and {MAX_VOCAB:,}")
    check(shards >= 1, f"{shards} shards are too few: give --shards 1 or more")
    if os.path.isdir(name) and all(glob.glob(pattern) for pattern in files(name)):
        if os.path.exists(os.path.join(name, VOCAB_FILE)):
            # This refuses a vocabulary of another size than `vocab`.
            is_ready(name, vocab)
        return name
    check(is_listed(name) or os.path.exists(name),
          f"data {name!r} is not a file, a folder, or one of stdlib, python, {', '.join(URLS)}")
    folder = out or default_folder(name, vocab)
    try:
        make(name, folder, vocab, shards)
    except OSError as error:        # the disk is full, or may not be written to
        reason = error.strerror or error
        raise UserError(f"cannot make {folder} ({reason}): free some space, "
                        f"or name another folder with --out")
    return folder


def is_listed(name): return name in ("stdlib", "python", *URLS)


def default_folder(name, vocab):
    corpus = name if is_listed(name) else corpus_name(name)
    suffix = f"-{vocab}" if vocab else ""
    return os.path.join(HERE, corpus + suffix)


def make(name, folder, vocab, shards):
    if name == "fineweb":
        download_fineweb(folder, shards)
    elif name == "c4":
        make_from_c4(folder, shards, vocab)
    elif not is_ready(folder, vocab):
        make_from_files(name, folder, vocab or 4096)


def files(folder):
    """Returns the globs of a folder's training and validation shards, whoever made them."""
    names = ["train.bin", "val.bin"]
    if not all(os.path.exists(os.path.join(folder, name)) for name in names):
        names = ["*train*.bin", "*val*.bin"]
    return [os.path.join(glob.escape(folder), name) for name in names]


def is_ready(folder, vocab):
    """
    Tells whether a folder holds a complete corpus with its vocabulary.

    UserError is raised if the vocabulary has another size than `vocab`, where 0 admits any.
    """
    try:
        for pattern in files(folder):
            open_tokens(pattern)
        n_entries = len(tokenizer.load(os.path.join(folder, VOCAB_FILE))) + 1
    except UserError:
        return False
    check(vocab in (0, n_entries),
          f"{folder} has a vocabulary of {n_entries:,}, not {vocab:,}: remove it, or use --out")
    return True


# ---- text files -> passages

class Piece(NamedTuple):
    """A text file, or a part of a long one."""
    name: str
    path: str
    start: int
    stop: int


class Passage(NamedTuple):
    """The text of a document, or of a part of it."""
    begins_document: bool
    text: str


def make_from_files(name, folder, vocab):
    if name == "shakespeare":
        path = os.path.join(HERE, "downloads", "shakespeare.txt")
        name = download(URLS[name], path, SHAKESPEARE_SHA256)
    train, val = split(cut(unique(list_files(name))))
    # The vocabulary is trained on every n-th piece, so that its sample comes from everywhere.
    n = 1 + size_of(train) // SAMPLE_CHARACTERS
    ranks = tokenizer.train_bpe(sample(read(train[::n])), vocab - 1)
    parts = {
        "val.bin": (read(val), size_of(val)),
        "train.bin": (read(train), size_of(train)),
    }
    build(folder, parts, ranks)


def list_files(name):
    """Returns [(name, path)] of a corpus's files, in an order that is the same on any machine."""
    if name == "stdlib":
        return walk(sysconfig.get_paths()["stdlib"], (".py",), STDLIB_SKIP)
    if name == "python":
        return list_files("stdlib") + list_site_packages()
    if os.path.isdir(name):
        return walk(name)
    return [(os.path.basename(name), name)]


def list_site_packages():
    paths = sysconfig.get_paths()
    roots = [*site.getsitepackages(), paths["purelib"], paths["platlib"]]
    distinct_roots = dict.fromkeys(os.path.realpath(root) for root in roots)
    listed = []
    for root in distinct_roots:
        listed += walk(root, SOURCE_ENDINGS)
    return [(name, path) for name, path in listed if os.path.getsize(path) <= 2 * MB]


def walk(root, endings=("",), skip=()):
    """Returns sorted [(path below root, path)] of the files that are not hidden."""
    listed = []
    for folder, subfolders, names in os.walk(root):
        # os.walk does not enter the subfolders that are taken out of its list.
        subfolders[:] = [subfolder for subfolder in subfolders
                         if subfolder not in ("__pycache__", *skip)
                         and not subfolder.startswith(".")]
        for name in names:
            path = os.path.join(folder, name)
            is_hidden = name.startswith(".")
            if name.endswith(endings) and not is_hidden and os.path.isfile(path):
                listed.append((os.path.relpath(path, root).replace(os.sep, "/"), path))
    return sorted(listed)


def corpus_name(path):
    """Returns STEM-1a2b3c4d: a file or a folder that has changed is another corpus."""
    stats = [os.stat(file_path) for _, file_path in list_files(path)]
    size = sum(stat.st_size for stat in stats)
    changed_at = max((stat.st_mtime_ns for stat in stats), default=0)
    path = os.path.abspath(path)
    state = (path, len(stats), size, changed_at)
    stem = os.path.splitext(os.path.basename(path))[0]
    return f"{stem}-{hashlib.sha256(repr(state).encode()).hexdigest()[:8]}"


def unique(listed):
    """Returns [(name, path, size)] of the files that are text; of equal ones only the first."""
    digests = set()
    kept = []
    for name, path in listed:
        digest = text_digest(path)
        if digest is not None and digest not in digests:
            digests.add(digest)
            kept.append((name, path, os.path.getsize(path)))
    check(kept,
          f"none of {len(listed):,} files is UTF-8 text: name a text file, or a folder of them")
    return kept


def text_digest(path):
    """Returns the SHA-256 of a file; None if it is empty, unreadable or not UTF-8 text."""
    sha = hashlib.sha256()
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        with open(path, "rb") as file:
            while chunk := file.read(MB):
                if "\0" in decoder.decode(chunk):
                    return None
                sha.update(chunk)
            decoder.decode(b"", final=True)
            is_empty = file.tell() == 0
    except (OSError, UnicodeDecodeError):
        return None
    return None if is_empty else sha.digest()


def cut(sized_files):
    """
    Cuts [(name, path, size)] into pieces of at most 1 MB, and at most a tenth of the corpus.

    A tenth, so that a corpus of one file can be split into training and validation too.
    """
    total = sum(size for _, _, size in sized_files)
    longest = min(MB, 1 + total // 10)
    pieces = []
    for name, path, size in sized_files:
        for start in range(0, size, longest):
            pieces.append(Piece(name, path, start, min(start + longest, size)))
    return pieces


def split(pieces):
    """
    Returns the pieces for training and those for validation.

    The hash of a file's name decides. If that gives validation less than 0.2 % or more than 10 %
    of the corpus, as with a few large files, the last tenth is for validation.
    """
    total = size_of(pieces)
    val = [piece for piece in pieces if in_val(piece.name)]
    if 0.002 < size_of(val) / total < 0.1:
        return [piece for piece in pieces if not in_val(piece.name)], val
    # The last two pieces are not counted, so that one at least is left for validation.
    ends = itertools.accumulate(piece.stop - piece.start for piece in pieces[:-2])
    n_train = 1 + sum(end < 0.9 * total for end in ends)
    return pieces[:n_train], pieces[n_train:]


def in_val(name):
    """Tells whether a hash of the name falls into the 4 of 256 that are for validation."""
    return hashlib.sha256(os.fsencode(name)).digest()[0] < 4


def size_of(pieces): return sum(piece.stop - piece.start for piece in pieces)


def read(pieces):
    """Yields the passage of each piece. A character across a cut belongs where it begins."""
    for _, path, start, stop in pieces:
        with open(path, "rb") as file:
            file.seek(start)
            # A character that begins before the cut has at most 3 bytes after it.
            raw = file.read(stop - start + 3)
        first = skip_continuation(raw, 0)
        last = skip_continuation(raw, stop - start)
        # unique() has checked that the file is UTF-8, so nothing is replaced unless the file has
        # changed since.
        text = raw[first:last].decode(errors="replace")
        yield Passage(start == 0, text)


def skip_continuation(raw, i):
    """Returns the first position from i on that is not inside a character (10xxxxxx in UTF-8)."""
    while i < len(raw) and raw[i] & 0xC0 == 0x80:
        i += 1
    return i


# ---- passages -> token files

def sample(passages):
    """Yields the text of the first passages, as much as a vocabulary is trained on."""
    size = 0
    for passage in passages:
        yield passage.text
        size += len(passage.text)
        if size > SAMPLE_CHARACTERS:
            return


def build(folder, parts, ranks):
    """
    Makes the vocabulary and the token files {name: (passages, bytes or None)} of a corpus.

    All of them appear, or none.
    """
    start_time = time.time()
    encoding = tokenizer.encoding_of(ranks)
    sizes = {}
    os.makedirs(folder, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=".making-", dir=folder) as work:
            tokenizer.save(ranks, os.path.join(work, VOCAB_FILE))
            for name, (passages, n_bytes) in parts.items():
                sizes[name] = write(os.path.join(work, name), passages, n_bytes, encoding)
            # The training tokens are moved last: where they are, everything is.
            for name in (VOCAB_FILE, *parts):
                os.replace(os.path.join(work, name), os.path.join(folder, name))
    finally:
        if not os.listdir(folder):
            os.rmdir(folder)
    report(folder, sizes, encoding.n_vocab, time.time() - start_time)


def report(folder, sizes, n_vocab, seconds):
    """Prints one line about a new corpus; sizes is {file name: (tokens, bytes of text)}."""
    counts = ", ".join(f"{n_tokens:,} tokens in {name}" for name, (n_tokens, _) in sizes.items())
    total_tokens = sum(n_tokens for n_tokens, _ in sizes.values())
    total_bytes = sum(n_bytes for _, n_bytes in sizes.values())
    print(f"{folder}: {counts} ({total_bytes / total_tokens:.2f} bytes each, "
          f"vocabulary {n_vocab:,}, {seconds:.0f} s)")


def write(path, passages, n_bytes, encoding):
    """Encodes passages into a token file, and returns how many tokens and bytes they have."""
    size = 0
    with TokenWriter(path, encoding.n_vocab) as out, progress_bar(path, n_bytes) as bar:
        for group in groups(passages):
            texts = [passage.text for passage in group]
            encoded = encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count())
            for passage, tokens in zip(group, encoded):
                if passage.begins_document:
                    tokens = [encoding.eot_token, *tokens]
                out.append(tokens)
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


# ---- corpora from the network

def make_from_c4(folder, shards, vocab):
    """Makes a token file for each shard of C4; the vocabulary is trained on the first."""
    for i in range(shards):
        name = f"train_{i:05d}.bin"
        is_begun = is_ready(folder, vocab)
        if is_begun and os.path.exists(os.path.join(folder, name)):
            continue
        train = download_c4(f"train.{i:05d}-of-01024")
        parts = {}
        if is_begun:
            ranks = tokenizer.load(os.path.join(folder, VOCAB_FILE))
        else:
            ranks = tokenizer.train_bpe(sample(read_c4(train)), (vocab or 32768) - 1)
            val = download_c4("validation.00000-of-00008")
            parts["val_00000.bin"] = (read_c4(val), None)
        parts[name] = (read_c4(train), None)
        build(folder, parts, ranks)


def download_c4(part):
    path = os.path.join(HERE, "downloads", f"c4-{part}.json.gz")
    return download(URLS["c4"].format(part), path)


def read_c4(path):
    """Yields the documents of a file of gzipped JSON lines."""
    with gzip.open(path, "rb") as file:
        for line in file:
            text = json.loads(line)["text"]
            # JSON may hold half a surrogate pair, which UTF-8 cannot: it becomes a question mark.
            yield Passage(True, text.encode(errors="replace").decode())


def download_fineweb(folder, shards):
    train = [f"train_{i:06d}" for i in range(1, shards + 1)]
    for part in ["val_000000", *train]:
        path = os.path.join(folder, f"fineweb_{part}.bin")
        download(URLS["fineweb"].format(part), path)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("name", nargs="?", default="stdlib",
                        help="one of the above; default stdlib")
    parser.add_argument("--vocab", type=int, default=0,
                        help="its entries; default 4096, for c4 32768; data/NAME-X")
    parser.add_argument("--shards", type=int, default=1,
                        help="how many files of c4 or fineweb")
    parser.add_argument("--out", help="folder; default data/NAME")
    args = parser.parse_args()
    try:
        folder = prepare(args.name, args.vocab, args.shards, args.out)
        print(folder, "is ready")
    except UserError as error:
        print(f"prepare: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("prepare: stopped: the same command goes on")


if __name__ == "__main__":
    main()
