"""
Make a corpus: data/NAME/train.bin, val.bin, vocab.tiktoken. quartet.py --data NAME does it by itself. With --vocab
2048 it is data/NAME-2048.

    python data/prepare.py stdlib              # the standard library's sources, 10 MB, offline: the default
    python data/prepare.py python              # and all of site-packages, hundreds of MB, offline
    python data/prepare.py notes.txt           # a text file of yours, or a folder of them
    python data/prepare.py shakespeare         # 1 MB, from the network
    python data/prepare.py c4 --shards 4       # web text, 300 MB a shard
    python data/prepare.py fineweb --shards 9  # ready GPT-2 tokens, 100 million a shard

A document starts with <|endoftext|>; about one in 64, chosen by a hash of its name, is for validation. A
corpus appears whole or not at all, a broken download goes on where it stopped, memory stays small.
"""
import argparse, codecs, glob, gzip, hashlib, itertools, json, os, site, sys, sysconfig, tempfile, time
if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from tqdm import tqdm
from data import tokenizer
from data.download import download
from data.tokens import DataError, TokenWriter, open_tokens

HERE = os.path.dirname(os.path.abspath(__file__))
URLS = dict(
    shakespeare="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    c4="https://huggingface.co/datasets/allenai/c4/resolve/main/en/c4-{}.json.gz",
    fineweb="https://huggingface.co/datasets/kjj0/fineweb10B-gpt2/resolve/main/fineweb_{}.bin",
)
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SAMPLE = 8_000_000                                      # characters of text that a vocabulary is trained on
MB = 1 << 20


def prepare(name, vocab=0, shards=1, out=None):
    """the folder of the corpus `name`, made if it is not there: one of the list above, a text file, a folder
    of text files, or a folder that holds token files already"""
    if vocab and not 257 <= vocab <= MB:
        raise DataError(f"a vocabulary of {vocab:,} is not possible: give --vocab between 257 and {MB:,}")
    if shards < 1:
        raise DataError(f"{shards} shards are too few: give --shards 1 or more")
    if os.path.isdir(name) and all(map(glob.glob, files(name))):
        if os.path.exists(os.path.join(name, "vocab.tiktoken")): ready(name, vocab)     # refuses another vocabulary
        return name
    listed = name in ("stdlib", "python", *URLS)
    if not listed and not os.path.exists(name):
        raise DataError(f"data {name!r} is not a file, a folder, or one of stdlib, python, {', '.join(URLS)}")
    folder = out or os.path.join(HERE, (name if listed else own_name(name)) + f"-{vocab}" * bool(vocab))
    try:
        if name == "fineweb": fineweb(folder, shards)
        elif name == "c4": c4(folder, shards, vocab)
        elif not ready(folder, vocab): from_files(name, folder, vocab or 4096)
    except OSError as error:                            # disk full, no permission ...
        why = error.strerror or error
        raise DataError(f"cannot make {folder} ({why}): free some space, or name another folder with --out")
    return folder


def files(folder):
    """the globs of a folder's train and val shards, ours or anybody's"""
    names = ["train.bin", "val.bin"]
    if not all(os.path.exists(os.path.join(folder, name)) for name in names):
        names = ["*train*.bin", "*val*.bin"]
    return [os.path.join(glob.escape(folder), name) for name in names]


def ready(folder, vocab):
    """is there a whole corpus, with the vocabulary that was asked for (0: any)?"""
    try:
        for pattern in files(folder): open_tokens(pattern)
        entries = len(tokenizer.load(os.path.join(folder, "vocab.tiktoken"))) + 1
    except DataError:
        return False
    if vocab not in (0, entries):
        raise DataError(f"{folder} has a vocabulary of {entries:,}, not {vocab:,}: remove it, or use --out")
    return True


# ---- text files -> documents. A piece is (name, path, start, stop): a file, or a part of a long one

def from_files(name, folder, vocab):
    if name == "shakespeare":
        name = download(URLS[name], os.path.join(HERE, "downloads", "shakespeare.txt"), SHAKESPEARE_SHA256)
    train, val = split(cut(unique(listing(name))))
    every = 1 + size_of(train) // SAMPLE
    ranks = tokenizer.train_bpe(sample(read(train[::every])), vocab - 1)
    build(folder, {"val.bin": (read(val), size_of(val)), "train.bin": (read(train), size_of(train))}, ranks)


def listing(name):
    """[(name, path)] of a corpus's files, in an order that does not depend on the machine"""
    paths = sysconfig.get_paths()
    if name == "stdlib":
        skip = "site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"    # tables
        return walk(paths["stdlib"], (".py",), skip)
    if name == "python":
        roots = [*site.getsitepackages(), paths["purelib"], paths["platlib"]]
        found = [file for root in dict.fromkeys(map(os.path.realpath, roots))
                 for file in walk(root, (".py", ".pyi", ".pyx", ".md", ".rst", ".txt"))]
        return listing("stdlib") + [file for file in found if os.path.getsize(file[1]) <= 2 * MB]
    return walk(name) if os.path.isdir(name) else [(os.path.basename(name), name)]


def walk(root, endings=("",), skip=()):
    found = []
    for folder, inside, names in os.walk(root):
        inside[:] = [d for d in inside if d not in ("__pycache__", *skip) and not d.startswith(".")]
        found += [os.path.join(folder, n) for n in names if n.endswith(endings) and not n.startswith(".")]
    return sorted((os.path.relpath(p, root).replace(os.sep, "/"), p) for p in found if os.path.isfile(p))


def own_name(path):
    """STEM-1a2b3c4d: a file or a folder that has changed is another corpus"""
    stats = [os.stat(p) for _, p in listing(path)]
    path = os.path.abspath(path)
    state = path, len(stats), sum(s.st_size for s in stats), max((s.st_mtime_ns for s in stats), default=0)
    stem = os.path.splitext(os.path.basename(path))[0]
    return f"{stem}-{hashlib.sha256(repr(state).encode()).hexdigest()[:8]}"


def unique(found):
    """[(name, path, size)] of the files that are text, each content once"""
    seen, kept = {None}, []
    for name, path in found:
        digest = text_digest(path)
        if digest not in seen: kept.append((name, path, os.path.getsize(path)))
        seen.add(digest)
    if not kept:
        raise DataError(f"none of {len(found):,} files is UTF-8 text: name a text file, or a folder of them")
    return kept


def text_digest(path):
    """SHA-256 of a file; None if it is empty, unreadable or not UTF-8 text"""
    sha, decoder = hashlib.sha256(), codecs.getincrementaldecoder("utf-8")()
    try:
        with open(path, "rb") as file:
            while chunk := file.read(MB):
                if "\0" in decoder.decode(chunk): return None
                sha.update(chunk)
            decoder.decode(b"", final=True)
            return sha.digest() if file.tell() else None
    except (OSError, UnicodeDecodeError):
        return None


def cut(found):
    """pieces of at most 1 MB, and at most a tenth of the whole, so that even one file can be split"""
    longest = min(MB, 1 + sum(size for *_, size in found) // 10)
    return [(name, path, start, min(start + longest, size))
            for name, path, size in found for start in range(0, size, longest)]


def split(pieces):
    """(train, val): by the hash of the file's name, or the last tenth if that gives too little or much"""
    val, total = [piece for piece in pieces if in_val(piece[0])], size_of(pieces)
    if .002 < size_of(val) / total < .1:
        return [piece for piece in pieces if not in_val(piece[0])], val
    ends = itertools.accumulate(stop - start for *_, start, stop in pieces[:-2])
    n = sum(end < .9 * total for end in ends)
    return pieces[:n + 1], pieces[n + 1:]


def in_val(name): return hashlib.sha256(os.fsencode(name)).digest()[0] < 4              # of 256: 1 in 64


def size_of(pieces): return sum(stop - start for *_, start, stop in pieces)


def read(pieces):
    """(does a document begin here?, text). A character across a cut belongs to the piece it begins in"""
    for _, path, start, stop in pieces:
        with open(path, "rb") as file:
            file.seek(start)
            raw = file.read(stop - start + 3)           # a character goes on for at most 3 bytes, 10xxxxxx
        first, last = 0, stop - start
        while first < len(raw) and raw[first] & 0xC0 == 0x80: first += 1
        while last < len(raw) and raw[last] & 0xC0 == 0x80: last += 1
        yield start == 0, raw[first:last].decode(errors="replace")      # unique() has found it to be UTF-8


# ---- documents -> token files

def sample(documents):
    """some of their texts, to train a vocabulary on"""
    size = 0
    for _, text in documents:
        yield text
        size += len(text)
        if size > SAMPLE: return


def build(folder, parts, ranks):
    """make the vocabulary and the token files {name: (documents, bytes or None)}: all appear, or none"""
    start, encoding = time.time(), tokenizer.encoding_of(ranks)
    os.makedirs(folder, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=".making-", dir=folder) as work:
            tokenizer.save(ranks, os.path.join(work, "vocab.tiktoken"))
            made = {part: write(os.path.join(work, part), *parts[part], encoding) for part in parts}
            for part in ("vocab.tiktoken", *parts):     # train last: where it is, all is
                os.replace(os.path.join(work, part), os.path.join(folder, part))
    finally:
        if not os.listdir(folder): os.rmdir(folder)
    tokens, size = map(sum, zip(*made.values()))
    print(f"{folder}:", ", ".join(f"{n:,} tokens in {part}" for part, (n, _) in made.items()),
          f"({size / tokens:.2f} bytes each, vocabulary {encoding.n_vocab:,}, {time.time() - start:.0f} s)")


def write(path, documents, total, encoding):
    """encode documents into a token file; returns how many tokens and bytes they have"""
    name, size = os.path.basename(path), 0
    with TokenWriter(path, encoding.n_vocab) as out, \
         tqdm(desc=name, total=total, unit="B", unit_scale=True, disable=None) as bar:
        for group in groups(documents):
            texts = [text for _, text in group]
            encoded = encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count())
            for (begins, text), tokens in zip(group, encoded):
                out.append([encoding.eot_token] * begins + tokens)
                size += len(text.encode())
            bar.update(size - bar.n)
        if out.n < 2:
            raise DataError(f"there is too little text for {name}: add some")
    return out.n, size


def groups(documents, most=4_000_000):
    """lists of documents of some 4 MB together"""
    group, size = [], 0
    for document in documents:
        group.append(document)
        size += len(document[1])
        if size > most:
            yield group
            group, size = [], 0
    if group: yield group


# ---- corpora from the network

def c4(folder, shards, vocab):
    """a token file for each shard; the vocabulary is trained on the first"""
    for i in range(shards):
        part, begun = f"train_{i:05d}.bin", ready(folder, vocab)
        if begun and os.path.exists(os.path.join(folder, part)): continue
        train = c4_file(f"train.{i:05d}-of-01024")
        if begun:
            ranks, parts = tokenizer.load(os.path.join(folder, "vocab.tiktoken")), {}
        else:
            ranks = tokenizer.train_bpe(sample(lines(train)), (vocab or 32768) - 1)
            parts = {"val_00000.bin": (lines(c4_file("validation.00000-of-00008")), None)}
        build(folder, parts | {part: (lines(train), None)}, ranks)


def c4_file(part):
    return download(URLS["c4"].format(part), os.path.join(HERE, "downloads", f"c4-{part}.json.gz"))


def lines(path):
    """the documents of a file of gzipped JSON lines"""
    with gzip.open(path, "rb") as file:
        for line in file: yield True, json.loads(line)["text"].encode(errors="replace").decode()


def fineweb(folder, shards):
    for part in ("val_000000", *(f"train_{i:06d}" for i in range(1, shards + 1))):
        download(URLS["fineweb"].format(part), os.path.join(folder, f"fineweb_{part}.bin"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("name", nargs="?", default="stdlib", help="one of the above; default stdlib")
    parser.add_argument("--vocab", type=int, default=0, help="its entries; default 4096, for c4 32768; data/NAME-X")
    parser.add_argument("--shards", type=int, default=1, help="how many files of c4 or fineweb")
    parser.add_argument("--out", help="folder; default data/NAME")
    try:
        print(prepare(**vars(parser.parse_args())), "is ready")
    except DataError as error:
        print(f"prepare: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("prepare: stopped: the same command goes on")


if __name__ == "__main__": main()
