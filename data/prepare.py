"""
Make a corpus: data/NAME/train.bin, val.bin, vocab.tiktoken. quartet.py --data NAME does it by itself.

    python data/prepare.py stdlib              # the standard library's sources, offline, 14 MB: the default
    python data/prepare.py python              # and all of site-packages: hundreds of MB, offline
    python data/prepare.py notes.txt           # a text file of yours, or a folder of them
    python data/prepare.py shakespeare         # 1 MB, from the network
    python data/prepare.py c4 --shards 4       # web text, 300 MB a shard
    python data/prepare.py fineweb --shards 9  # ready GPT-2 tokens, 100 million a shard

Each document starts with <|endoftext|>; about one in 64, chosen by a hash of its name, is for validation.
A corpus appears whole or not at all; a broken download goes on where it stopped.
"""
import argparse, glob, gzip, hashlib, itertools, json, os, shutil, site, sys, sysconfig, tempfile, time, urllib.error, urllib.request
if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from tqdm import tqdm
from data import tokenizer
from data.tokens import DataError, TokenWriter, open_tokens

HERE = os.path.dirname(os.path.abspath(__file__))
TEXT = (".py", ".pyi", ".md", ".rst", ".txt")
TABLES = ("test", "tests", "idle_test", "encodings", "pydoc_data")          # folders of the standard library that are no prose
URLS = {
    "shakespeare": "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    "fineweb": "https://huggingface.co/datasets/kjj0/fineweb10B-gpt2/resolve/main/fineweb_{split}_{i:06d}.bin",
    "c4": "https://huggingface.co/datasets/allenai/c4/resolve/main/en/c4-train.{i:05d}-of-01024.json.gz",
}


def files(folder):
    """the globs of the train and the val shards"""
    return tuple(os.path.join(glob.escape(folder), f"{s}.bin" if os.path.exists(os.path.join(folder, f"{s}.bin")) else f"*{s}*.bin")
                 for s in ("train", "val"))


def prepare(name, vocab=0, shards=1, out=None):
    """the folder of the corpus `name`, made if it is not there: a corpus of the list above, a text file, a folder
    of text files, or a folder that holds token files already"""
    ready = lambda folder: all(glob.glob(pattern) for pattern in files(folder))
    if os.path.isdir(name) and ready(name):
        return name
    own = name not in ("stdlib", "python") and name not in URLS
    if own and not os.path.exists(name):
        raise DataError(f"data {name!r} is not a file, a folder, or one of stdlib, python, {', '.join(URLS)}")
    folder = out or os.path.join(HERE, own_name(name) if own else name)
    if name == "fineweb":
        fineweb(folder, shards)
    elif not ready(folder):
        size = vocab or (32768 if name == "c4" else 4096)
        if name == "c4": documents, n = c4(shards), None
        else:
            paths = [(os.path.basename(p), p) for p in [download(URLS[name])]] if name in URLS else listing(name)
            documents, n = (lambda: read(paths)), len(paths)
        build(folder, documents, n, size)
    return folder


# ---- where the documents are: (for validation?, text), always in the same order

def listing(name):
    """[(relative path, path)] of the text files of a corpus, sorted"""
    stdlib = sysconfig.get_paths()["stdlib"]
    if os.path.isfile(name): return [(os.path.basename(name), name)]
    if name == "stdlib": return walk(stdlib, (".py",), skip=TABLES + ("site-packages", "dist-packages"))
    if name == "python":
        roots = dict.fromkeys([*site.getsitepackages(), *(sysconfig.get_paths()[k] for k in ("purelib", "platlib"))])
        return listing("stdlib") + [f for root in roots for f in walk(root, TEXT)]
    return walk(name, TEXT)


def walk(root, endings, skip=()):
    found = []
    for folder, inside, names in os.walk(root):
        inside[:] = [d for d in inside if d not in skip and d != "__pycache__" and not d.startswith(".")]
        found += [(os.path.relpath(p, root), p) for p in (os.path.join(folder, n) for n in names) if p.endswith(endings)]
    return sorted(found)


def in_val(name): return hashlib.sha256(name.encode()).digest()[0] < 4         # 4 of 256


def read(paths):
    """the texts of the files, each once; what is no UTF-8 is left out, and in a folder what is over 1 MB (generated)"""
    chosen, seen = {name for name, _ in paths if in_val(name)} or {paths[-1][0]}, set()
    for name, path in paths:
        try:
            if len(paths) > 1 and os.path.getsize(path) > 1 << 20: continue
            with open(path, "rb") as file: raw = file.read()
            text, key = raw.decode(), hashlib.blake2b(raw, digest_size=8).digest()
        except (OSError, UnicodeDecodeError): continue
        if not text.strip() or key in seen: continue
        seen.add(key)
        if len(paths) > 1:
            yield name in chosen, text
        else:                                                   # one document: its last tenth, from a new line on
            cut = text.find("\n", len(text) * 9 // 10) + 1
            yield from ((False, text[:cut]), (True, text[cut:]))


def c4(shards):
    paths = [download(URLS["c4"].format(i=i)) for i in range(shards)]
    def documents():
        for path in paths:
            with gzip.open(path, "rt", encoding="utf-8") as file:
                for i, line in enumerate(file): yield in_val(f"{os.path.basename(path)}:{i}"), json.loads(line)["text"]
    return documents


def fineweb(folder, shards):
    if not glob.glob(os.path.join(folder, "*train*.bin")) or shards > 1:
        for split, i in [("val", 0)] + [("train", i) for i in range(1, shards + 1)]:
            download(URLS["fineweb"].format(split=split, i=i), folder)


def own_name(path):
    """a changed file or folder is another corpus"""
    stats = [os.stat(p) for _, p in listing(path)]
    state = f"{os.path.abspath(path)} {len(stats)} {sum(s.st_size for s in stats)} {max((s.st_mtime_ns for s in stats), default=0)}"
    return os.path.splitext(os.path.basename(os.path.normpath(path)))[0] + "-" + hashlib.sha256(state.encode()).hexdigest()[:8]


# ---- documents -> tokens

def build(folder, documents, n, vocab):
    """documents() yields (for validation?, text), n of them or None; memory stays small however many there are"""
    start, parent = time.time(), os.path.dirname(os.path.abspath(folder))
    try:
        os.makedirs(parent, exist_ok=True)
        work = tempfile.mkdtemp(prefix=".making-", dir=parent)
    except OSError as error: raise DataError(f"cannot write into {parent}: {error.strerror}")
    try:
        ranks = tokenizer.train_bpe(bites(documents(), n), vocab - 1)
        tokenizer.save(ranks, work)
        encoding = tokenizer.encoding_of(ranks)
        letters, counts = encode(work, documents, n, encoding)
        if os.path.isdir(folder): shutil.rmtree(folder)         # only ever an incomplete one
        os.chmod(work, 0o755)
        os.rename(work, folder)
    except OSError as error: raise DataError(f"cannot write {folder}: {error.strerror}")
    finally: shutil.rmtree(work, ignore_errors=True)
    print(f"{folder}: {counts[0]:,} train and {counts[1]:,} val tokens, vocabulary {encoding.n_vocab:,}, "
          f"{letters / sum(counts):.2f} characters a token, {time.time() - start:.0f} s")


def bites(documents, n, limit=8_000_000):
    """some 8 MB of the texts to train the vocabulary on: of a long list every k-th document"""
    k = max(1, (n or 1) // 1500)
    for _, text in itertools.islice(documents, 0, None, k):
        yield text[:200_000]
        limit -= min(len(text), 200_000)
        if limit < 0: return


def encode(work, documents, n, encoding):
    """write train.bin and val.bin; returns the number of characters, and of tokens in each"""
    letters = 0
    with TokenWriter(os.path.join(work, "train.bin"), encoding.n_vocab) as train, \
         TokenWriter(os.path.join(work, "val.bin"), encoding.n_vocab) as val, tqdm(total=n, desc="tokenising", unit=" documents") as bar:
        for group in groups(documents()):
            texts = [text for _, text in group]
            for (to_val, _), ids in zip(group, encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count())):
                (val if to_val else train).append([encoding.eot_token, *ids])
            letters += sum(map(len, texts))
            bar.update(len(group))
    if not train.n or not val.n:
        raise DataError("there is too little text: it takes one document for training and one for validation")
    return letters, (train.n, val.n)


def groups(documents, size=4_000_000):
    """lists of documents of some 4 MB together"""
    group, letters = [], 0
    for document in documents:
        group.append(document)
        letters += len(document[1])
        if letters > size:
            yield group
            group, letters = [], 0
    if group: yield group


# ---- from the network

def download(url, folder=os.path.join(HERE, "downloads")):
    """the path of the downloaded file. It grows as NAME.part, which the next try goes on with; length and, where the
    server publishes it (Hugging Face: X-Linked-Etag), SHA-256 are checked"""
    path = os.path.join(folder, url.rsplit("/", 1)[1])
    if os.path.exists(path): return path
    os.makedirs(folder, exist_ok=True)
    for attempt in range(4):
        try:
            fetch(url, path + ".part", path)
            return path
        except urllib.error.HTTPError as error:
            if error.code == 416: os.remove(path + ".part")     # longer than the file: not ours, start again
            elif error.code < 500: raise DataError(f"{url}: the server says {error.code} {error.reason}")
            reason = error
        except OSError as error:                                # no network, connection lost, too short
            if error.errno: raise DataError(f"cannot write {path}: {error.strerror}")
            reason = getattr(error, "reason", error)
        time.sleep(attempt)
    kept = f"; what was downloaded is kept in {path}.part" if os.path.exists(path + ".part") else ""
    raise DataError(f"cannot download {url} ({reason}){kept}; without a network there are stdlib, python, and files of yours")


def fetch(url, part, path):
    have = os.path.getsize(part) if os.path.exists(part) else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-", "User-Agent": "quartet"} if have else {"User-Agent": "quartet"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        if answer.status != 206: have = 0                       # the server starts at the beginning
        total = have + int(answer.headers.get("Content-Length", 0))
        with open(part, "ab" if have else "wb") as file, \
             tqdm(total=total or None, initial=have, unit="B", unit_scale=True, desc=os.path.basename(path)) as bar:
            while chunk := answer.read(1 << 20):
                file.write(chunk)
                bar.update(len(chunk))
        published = (answer.headers.get("X-Linked-Etag") or answer.headers.get("ETag") or "").strip('"')
    if total and os.path.getsize(part) != total: raise ConnectionError("the connection broke off")
    if len(published) == 64 and set(published) <= set("0123456789abcdef"):
        with open(part, "rb") as file: found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != published:
            os.remove(part)
            raise ConnectionError("the file does not have the published checksum")
    os.replace(part, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("--vocab", type=int, default=0, help="size of the vocabulary; default 4096, c4 32768")
    parser.add_argument("--shards", type=int, default=1, help="how many files of c4 or fineweb")
    parser.add_argument("--out", help="folder; default data/NAME")
    asked = parser.parse_args()
    if asked.vocab and not 260 <= asked.vocab <= 1 << 20: raise DataError(f"vocab {asked.vocab} is not between 260 and 1,048,576")
    print(prepare(asked.name, asked.vocab, asked.shards, asked.out), "is ready")


if __name__ == "__main__":
    try: main()
    except DataError as error:
        print(f"prepare: {error}", file=sys.stderr)
        sys.exit(2)
