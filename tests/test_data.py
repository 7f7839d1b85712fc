"""Facts about token files, batches, the vocabulary, corpora and downloads. Nothing here needs a network."""
import collections, contextlib, gzip, hashlib, http.server, json, os, random, subprocess, sys, threading
import numpy as np, pytest, regex
from data import download, prepare, tokenizer, tokens
from data.tokens import DataError, TokenWriter, open_tokens

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def make(path, ids, vocab=50257):
    with TokenWriter(str(path), vocab) as out: out.append(ids)
    return str(path)


def header(*words): return np.array([*words, *[0] * (256 - len(words))], "<i4").tobytes()


def sentence(error, *words):
    """one sentence for the user, with these words in it"""
    text = str(error.value)
    assert "\n" not in text and all(word in text for word in words), text


# ---- token files

def test_the_three_layouts_are_told_apart_and_read(tmp_path):
    ids = np.arange(1000) * 60
    make(tmp_path / "a.bin", ids, 60000), make(tmp_path / "b.bin", ids * 2, 128256)
    (tmp_path / "c.bin").write_bytes(ids.astype("<u2").tobytes())
    for name, width, factor in (("a", 2, 1), ("b", 4, 2), ("c", 2, 1)):
        shard, = open_tokens(str(tmp_path / f"{name}.bin"))
        assert isinstance(shard, np.memmap) and shard.dtype.itemsize == width
        assert np.array_equal(shard, ids * factor)
    assert [len(s) for s in open_tokens(str(tmp_path / "[abc].bin"))] == [1000] * 3     # kinds may be mixed
    start = (tmp_path / "a.bin").read_bytes()[:12], (tmp_path / "b.bin").read_bytes()[:12]
    assert [s.hex(" ", 4) for s in start] == ["88d83401 01000000 e8030000", "a1d93401 07000000 e8030000"]
    assert os.path.getsize(tmp_path / "a.bin") == 1024 + 2000


def test_a_path_with_glob_characters_is_a_path(tmp_path):
    (tmp_path / "[x]").mkdir()
    assert len(open_tokens(make(tmp_path / "[x]" / "train.bin", [1, 2, 3]))[0]) == 3
    make(tmp_path / "[x]" / "val.bin", [1, 2, 3])
    assert [len(open_tokens(pattern)) for pattern in prepare.files(str(tmp_path / "[x]"))] == [1, 1]


@pytest.mark.parametrize("content, words", [
    (b"", "0 bytes"),
    (b"\7\0", "2 bytes"),
    (b"\7" * 101, "101 bytes"),
    (header(20240520, 1, 10) + bytes(18), "10 tokens and their header take 1,044 bytes, the file has 1,042"),
    (header(20240801, 7, 10) + bytes(41), "too long"),
    (header(20240520, 1, 10)[:500], "truncated"),
    (header(20240520)[:4], "truncated"),
    (header(20240520, 2, 0), "version 2"),
    (header(20240801, 1, 0), "version 1"),
    (header(20240520, 1, 1) + bytes(2), "holds 1 tokens"),
    (b"\x89PNG\r\n\x1a\n" + bytes(100), "a PNG file"),
    (gzip.compress(b"x" * 100, mtime=0), "a gzip file"),
    (b"PK\3\4" + bytes(100), "a zip file"),
    (b"\x93NUMPY" + bytes(100), "a NumPy file"),
    (b"Once upon a time\n" * 10, "looks like text"),
    ("naïve 日本語\n".encode() * 99, "looks like text"),                # the 1024th byte lies inside a character
])
def test_a_damaged_or_foreign_file_is_refused_in_a_sentence(tmp_path, content, words):
    (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(DataError) as error: open_tokens(str(tmp_path / "x.bin"))
    sentence(error, "x.bin", words)


def test_a_missing_file_or_an_empty_glob_is_refused_with_what_to_do(tmp_path):
    for name in ("no.bin", "no*.bin", ""):
        with pytest.raises(DataError) as error: open_tokens(str(tmp_path / name))
        sentence(error, name, "python data/prepare.py")


def test_real_tokens_are_never_taken_for_something_else(tmp_path):
    for vocab in (65, 4096, 50257):
        rng = np.random.default_rng(vocab)
        for first in range(0, vocab, max(1, vocab // 300)):             # whatever the first token is
            path = tmp_path / "x.bin"
            path.write_bytes(np.r_[first, rng.integers(vocab, size=30)].astype("<u2").tobytes())
            assert open_tokens(str(path))[0][0] == first


def test_a_writer_that_fails_leaves_what_was_there(tmp_path):
    path = make(tmp_path / "x.bin", [1, 2, 3])
    before = (tmp_path / "x.bin").read_bytes()
    with pytest.raises(KeyboardInterrupt), TokenWriter(path, 50257) as out:
        out.append(np.arange(100000) % 50257)
        assert (tmp_path / "x.bin").read_bytes() == before              # nothing shows before the end
        raise KeyboardInterrupt
    with pytest.raises(DataError) as error: make(path, [5, 4096], 4096)
    sentence(error, "token 4096 at position 1", "4,096 entries")
    assert (tmp_path / "x.bin").read_bytes() == before and os.listdir(tmp_path) == ["x.bin"]


# ---- batches

@pytest.fixture
def shards(tmp_path):
    make(tmp_path / "s1.bin", range(0, 1000)), make(tmp_path / "s2.bin", range(2000, 2777))
    make(tmp_path / "s3.bin", range(4000, 4005)), make(tmp_path / "s4.bin", range(5000, 5020))
    return open_tokens(str(tmp_path / "s*.bin"))


def starts(shards, B, steps, T=16, seed=0):
    return [int(row[0]) for step in steps for row in tokens.batch(shards, step, B, T, seed)[0]]


def test_a_batch_is_a_function_of_the_step(shards):
    for step in (1000, 0, 3, 0):
        x, y = tokens.batch(shards, step, 4, 16, 1)
        assert x.shape == y.shape == (4, 16) and x.dtype == y.dtype == np.int64 and (y == x + 1).all()
        assert (np.diff(x, axis=1) == 1).all()                          # windows lie inside one shard
        assert np.array_equal(x, tokens.batch(shards, step, 4, 16, 1)[0])
    assert starts(shards, 4, [0]) != starts(shards, 4, [1]) != starts(shards, 4, [1], seed=1)


def test_an_epoch_reads_every_window_once_and_the_next_one_other_windows(shards):
    windows = (1000 - 16) // 16 + (777 - 16) // 16 + 0 + 1              # s3 is too short, s4 holds one
    first, second = starts(shards, 1, range(windows)), starts(shards, 1, range(windows, 2 * windows))
    assert len(set(first)) == len(set(second)) == windows and set(first) != set(second)
    read = np.concatenate([tokens.batch(shards, step, 1, 16, 0)[0][0] for step in range(windows)])
    assert len(set(read.tolist())) == windows * 16                      # no token twice
    assert sum(r < 1000 for r in read) == 976 and sum(2000 <= r < 2777 for r in read) == 752
    assert first != sorted(first)


def test_slices_of_a_batch_and_other_batch_sizes_give_the_same_sequences(shards):
    whole = starts(shards, 12, range(20))                               # over two epochs
    assert whole == starts(shards, 1, range(240)) == starts(shards, 48, range(5))
    slices = [starts(shards, 12 // 3, [step * 3 + i]) for step in range(20) for i in range(3)]
    assert whole == sum(slices, [])


def test_two_corpora_of_one_size_and_two_of_another_do_not_get_in_each_others_way(shards, tmp_path):
    other = open_tokens(make(tmp_path / "other.bin", range(10000, 10500)))
    alone = [starts(shards, 4, [s]) for s in range(5)], [starts(other, 4, [s]) for s in range(5)]
    mixed = zip(*[(starts(shards, 4, [s]), starts(other, 4, [s])) for s in range(5)])
    assert tuple(map(list, mixed)) == alone and min(alone[1][0]) >= 10000


def test_the_shortest_corpus_that_holds_a_sequence_is_enough(tmp_path):
    shard = open_tokens(make(tmp_path / "s.bin", range(17)))
    x, y = tokens.batch(shard, 0, 3, 16, 0)
    assert np.array_equal(x, [range(16)] * 3) and np.array_equal(y, [range(1, 17)] * 3)
    with pytest.raises(DataError) as error: tokens.batch(shard, 0, 3, 17, 0)
    sentence(error, "s.bin has 17 tokens: too few for a sequence of 17, which takes 18")


@pytest.mark.parametrize("B, T", [(4, 16), (3, 50), (1, 2000), (7, 1)])
def test_validation_predicts_every_token_once_in_order(shards, B, T):
    batches = list(tokens.val_batches(shards, B, T))
    assert all(x.shape == y.shape == (B, T) and x.dtype == y.dtype == np.int64 for x, y in batches)
    x, y = (np.concatenate([b[i].ravel() for b in batches]) for i in (0, 1))
    assert y[y >= 0].tolist() == [*range(1, 1000), *range(2001, 2777), *range(4001, 4005), *range(5001, 5020)]
    assert (x[y >= 0] + 1 == y[y >= 0]).all() and (x[y < 0] == 0).all() and (y[y < 0] == -1).all()


def test_a_token_outside_the_vocabulary_is_named_with_its_place(shards):
    for read in (lambda vocab: list(tokens.val_batches(shards[:2], 3, 100, vocab)),
                 lambda vocab: [tokens.batch(shards[1:2], s, 1, 776, 0, vocab) for s in range(9)]):
        read(2777)
        with pytest.raises(DataError) as error: read(2776)
        sentence(error, "token 2776 at position 776 of", "s2.bin", "the vocabulary has 2,776 entries")


# ---- vocabulary

def test_the_example_in_the_docstring_is_what_happens():
    assert list(tokenizer.train_bpe(["aaabdaaabac"], 300))[256:] == [b"aa", b"aaa", b"aaab"]


def test_the_fast_trainer_makes_the_merges_of_a_plain_one():
    with open(os.path.join(ROOT, "data", "tokens.py")) as file: text = file.read() + "aaaaaaa abababa " * 9
    words = [[bytes([b]) for b in word.encode()] for word in regex.findall(tokenizer.PATTERN, text)]
    ranks = {bytes([b]): b for b in range(256)}
    while len(ranks) < 600:                                             # count every pair anew for each merge
        pairs = collections.Counter(a + b for word in words for a, b in zip(word, word[1:]))
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        ranks.setdefault(best, len(ranks))
        for word in words:
            for i in range(len(word)):
                if b"".join(word[i:i + 2]) == best and len(word[i:]) > 1: word[i:i + 2] = [best]
    assert list(tokenizer.train_bpe([text], 600).items()) == list(ranks.items())


def test_tiktoken_applies_the_merges_as_they_were_learnt():
    with open(os.path.join(ROOT, "data", "tokens.py")) as file: text = file.read()
    ranks = tokenizer.train_bpe([text], 500)
    learnt = []
    for word in regex.findall(tokenizer.PATTERN, text):
        word = [bytes([b]) for b in word.encode()]
        for token in list(ranks)[256:]: collections.deque(tokenizer.merge(word, token), 0)
        learnt += word
    assert tokenizer.encoding_of(ranks).encode_ordinary(text) == [ranks[token] for token in learnt]


def test_encoding_loses_nothing(tmp_path):
    ranks = tokenizer.train_bpe(["def f(x):\n    return x\n" * 50 + "naïve 日本"], 400)
    tokenizer.save(ranks, tmp_path / "vocab.tiktoken")
    encoding = tokenizer.load_encoding(str(tmp_path))
    assert encoding.n_vocab == encoding.eot_token + 1 <= 401
    assert tokenizer.load_encoding(str(tmp_path / "vocab.tiktoken")).encode("x") == encoding.encode("x")
    rng = random.Random(0)
    letters = list(map(chr, range(0x3000))) + list(" \n\r\t🤗\u2028\ufeff\U0010ffff") * 500
    ugly = ["", " ", "\n\n\t x", "def f(a, b):\r\n    return a*b  # 1234567\n", "a" * 99999, "<|endoftext|>"]
    ugly += ["".join(rng.choices(letters, k=200)) for _ in range(200)]
    for text in ugly: assert encoding.decode(encoding.encode_ordinary(text)) == text
    assert len(encoding.encode_ordinary("def f(x):\n    return x\n")) < 10


def test_a_million_spaces_are_encoded():                                # by GPT-4's own pattern they are not
    encoding = tokenizer.encoding_of({bytes([b]): b for b in range(256)})
    for text in (" " * 10**6 + "x", "\n" * 10**6, " \n" * 10**6):
        assert encoding.decode(encoding.encode_ordinary(text)) == text


@pytest.mark.parametrize("content", [b"hello\n", b"YQ== 0\n", b"YQ== x\n", b"!!! 1\n", b"", b"YQ== 0 0\n"])
def test_a_damaged_vocabulary_is_refused_in_a_sentence(tmp_path, content):
    (tmp_path / "vocab.tiktoken").write_bytes(content)
    with pytest.raises(DataError) as error: tokenizer.load_encoding(str(tmp_path))
    sentence(error, "vocab.tiktoken", "prepare the corpus again")


def test_without_a_vocabulary_and_a_network_a_sentence_says_so(tmp_path, monkeypatch):
    def offline(name): raise ConnectionError("no network")
    monkeypatch.setattr(tokenizer.tiktoken, "get_encoding", offline)
    with pytest.raises(DataError) as error: tokenizer.load_encoding(str(tmp_path))
    sentence(error, "vocab.tiktoken is not there", "connect once")


# ---- corpora

@pytest.fixture
def folder(tmp_path):
    """200 documents in folders, a duplicate, and what is no text"""
    root = tmp_path / "text"
    for i in range(200):
        (root / f"d{i % 7}").mkdir(parents=True, exist_ok=True)
        (root / f"d{i % 7}" / f"{i}.txt").write_text(f"document {i}\n" * 40)
    (root / "copy.txt").write_text("document 3\n" * 40)
    (root / "latin1.txt").write_bytes("naïve".encode("latin1"))
    (root / "binary").write_bytes(bytes(99)), (root / "empty.txt").touch()
    (root / ".hidden").write_text("hidden")
    return root


def texts(corpus):
    encoding = tokenizer.load_encoding(str(corpus))
    return [encoding.decode(open_tokens(pattern)[0].tolist()) for pattern in prepare.files(str(corpus))]


def digest(corpus):
    return [hashlib.sha256((corpus / name).read_bytes()).hexdigest() for name in sorted(os.listdir(corpus))]


def test_preparing_twice_gives_the_same_bytes_and_each_document_once(folder, tmp_path):
    for name in ("one", "two"):
        assert prepare.prepare(str(folder), 300, out=str(tmp_path / name)) == str(tmp_path / name)
    assert digest(tmp_path / "one") == digest(tmp_path / "two") and len(os.listdir(tmp_path / "one")) == 3
    train, val = (text.split(tokenizer.END)[1:] for text in texts(tmp_path / "one"))
    assert sorted(train + val) == sorted(f"document {i}\n" * 40 for i in range(200)) and 1 <= len(val) <= 20
    assert prepare.prepare(str(tmp_path / "one")) == str(tmp_path / "one")              # it is ready


def test_the_split_goes_by_name_and_does_not_depend_on_the_machine(folder):
    names = [name for name, *_ in prepare.unique(prepare.listing(str(folder)))]
    assert names == sorted(names) and "d3/3.txt" not in names and "copy.txt" in names   # the first of the two
    assert [name for name in names if prepare.in_val(name)] == ["d1/127.txt", "d3/73.txt"]
    train, val = prepare.split([(f"file{i}", "", 0, 100) for i in range(6400)])
    assert 60 < len(val) < 140 and not {p[0] for p in train} & {p[0] for p in val}


@pytest.mark.parametrize("text", ["line\n" * 999, "日本語🤗é" * 99, "🤗" * 5 + "abc", "abcdefghijk" * 30,
                                  "".join(map(chr, range(32, 3000)))])
def test_one_file_is_one_document_whose_last_tenth_is_for_validation(tmp_path, text):
    (tmp_path / "notes.txt").write_bytes(text.encode())
    prepare.prepare(str(tmp_path / "notes.txt"), 300, out=str(tmp_path / "notes"))
    train, val = texts(tmp_path / "notes")
    assert train + val == tokenizer.END + text and len(val) <= 3 + .11 * len(text)


def test_a_changed_file_is_another_corpus_and_its_name_tells_whose(tmp_path):
    (tmp_path / "notes.txt").write_text("some text")
    before = prepare.own_name(str(tmp_path / "notes.txt"))
    assert before.startswith("notes-") and before == prepare.own_name(str(tmp_path / "notes.txt"))
    (tmp_path / "notes.txt").write_text("other text")
    assert prepare.own_name(str(tmp_path / "notes.txt")) != before


def test_a_whole_corpus_is_left_alone_and_a_broken_one_is_made_again(folder, tmp_path):
    out = tmp_path / "out"
    prepare.prepare(str(folder), 300, out=str(out))
    whole, stamp = digest(out), os.stat(out / "train.bin").st_mtime_ns
    prepare.prepare(str(folder), out=str(out))
    assert os.stat(out / "train.bin").st_mtime_ns == stamp
    with pytest.raises(DataError) as error: prepare.prepare(str(folder), 290, out=str(out))
    sentence(error, "vocabulary of 300, not 290")
    for name in os.listdir(out):
        (out / name).write_bytes((out / name).read_bytes()[:-3])             # of the vocabulary a rank's end
        prepare.prepare(str(folder), 300, out=str(out))
        assert digest(out) == whole


def test_other_files_in_the_output_folder_survive(folder, tmp_path):
    (tmp_path / "out").mkdir(), (tmp_path / "out" / "thesis.tex").write_text("years of work")
    prepare.prepare(str(folder), 300, out=str(tmp_path / "out"))
    assert sorted(os.listdir(tmp_path / "out")) == ["thesis.tex", "train.bin", "val.bin", "vocab.tiktoken"]


def test_ready_shards_of_others_are_a_corpus_as_they_are(tmp_path):
    for name in ("x_train_1.bin", "x_train_2.bin", "x_val_0.bin"): make(tmp_path / name, np.arange(500))
    train, val = prepare.files(prepare.prepare(str(tmp_path)))
    assert len(open_tokens(train)) == 2 and len(open_tokens(val)) == 1
    assert tokenizer.vocab_size(str(tmp_path), open_tokens(train)) == 50257


def test_the_standard_library_is_a_corpus_of_sources_without_tests():
    names = [name for name, _ in prepare.listing("stdlib")]
    assert len(names) > 500 and names == sorted(names) and {"argparse.py", "json/decoder.py"} < set(names)
    assert not [n for n in names if {"test", "tests", "site-packages"} & set(n.split("/")[:-1])]
    names = {name for name, _ in prepare.listing("python")}
    assert {"argparse.py", "numpy/__init__.py", "tqdm/std.py"} < names


def run(*args, **kwargs):
    return subprocess.run([sys.executable, os.path.join(ROOT, "data", "prepare.py"), *map(str, args)],
                          capture_output=True, text=True, **kwargs)


def test_prepare_says_what_is_wrong_in_one_sentence_exits_with_2_and_leaves_nothing(tmp_path):
    (tmp_path / "empty.txt").touch(), (tmp_path / "one.txt").write_text("x"), (tmp_path / "none").mkdir()
    cases = {("nosuch",): "stdlib, python, shakespeare, c4, fineweb",
             (tmp_path / "empty.txt", "--out", tmp_path / "out"): "none of 1 files is UTF-8 text",
             (tmp_path / "none", "--out", tmp_path / "out"): "none of 0 files is UTF-8 text",
             (tmp_path / "one.txt", "--out", tmp_path / "out"): "too little text",
             (tmp_path / "one.txt", "--vocab", 7): "a vocabulary of 7 is not possible",
             ("c4", "--shards", 0): "0 shards are too few",
             ("stdlib", "--out", tmp_path / "one.txt" / "out"): "Not a directory"}
    for args, words in cases.items():
        done = run(*args)
        assert done.returncode == 2 and done.stderr.startswith("prepare: "), done.stderr
        assert words in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert sorted(os.listdir(tmp_path)) == ["empty.txt", "none", "one.txt"]
    assert run("stdlib", "--vocabulary", 7).returncode == 2             # a typo


@contextlib.contextmanager
def tmpfs(path, options):
    path.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", path], capture_output=True).returncode:
        pytest.skip("may not mount here")
    try: yield path
    finally: subprocess.run(["umount", path], check=True)


def test_a_full_or_read_only_disk_is_a_sentence_and_nothing_stays(tmp_path):
    (tmp_path / "big.txt").write_text("".join(map(str, range(200000))))
    with tmpfs(tmp_path / "full", "size=200k") as full:
        done = run(tmp_path / "big.txt", "--vocab", 300, "--out", full / "out")
        assert done.returncode == 2 and "No space left" in done.stderr and done.stderr.count("\n") == 1
        assert os.listdir(full) == []
    with tmpfs(tmp_path / "locked", "ro") as locked:
        done = run(tmp_path / "big.txt", "--vocab", 300, "--out", locked / "out")
        assert done.returncode == 2 and "Read-only" in done.stderr and done.stderr.count("\n") == 1


def test_an_interrupted_preparation_leaves_nothing(folder, tmp_path, monkeypatch):
    def interrupted(*_): raise KeyboardInterrupt
    monkeypatch.setattr(prepare, "groups", interrupted)
    with pytest.raises(KeyboardInterrupt): prepare.prepare(str(folder), 300, out=str(tmp_path / "out"))
    assert os.listdir(tmp_path) == ["text"]


def test_memory_stays_small_however_large_the_corpus(tmp_path):
    line = "".join(f"x{i} = {i}\n" for i in range(999))
    for i in range(64): (tmp_path / f"{i}.py").write_text(f"y = {i}\n" + line * 100)    # 70 MB
    assert sum(f.stat().st_size for f in tmp_path.iterdir()) > 60e6
    code = "import resource, sys; sys.path.insert(0, sys.argv[1]); from data import prepare\n" \
           "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024\n" \
           "before = peak(); prepare.prepare(sys.argv[2], 1000, out=sys.argv[3]); print(peak() - before)"
    args = ROOT, str(tmp_path), str(tmp_path) + "-out"
    done = subprocess.run([sys.executable, "-c", code, *args], stdout=subprocess.PIPE, check=True)
    assert int(done.stdout.split()[-1]) < 300                           # MB; all at once would be 1000


# ---- downloads, from a server on this machine

class Server(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        if self.path.startswith("/redirect"):
            self.send_response(302)
            self.send_header("Location", self.path.replace("/redirect", ""))
            self.send_header("X-Linked-Etag", f'"{server.etag}"')
            return self.end_headers()
        start = int(self.headers["Range"][6:-1]) if "Range" in self.headers and server.ranges else 0
        server.asked.append(start)
        body, part = server.body, server.body[start:]
        self.send_response(server.status or (416 if start >= len(body) else 206 if start else 200))
        if start: self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Length", str(len(part)))
        self.send_header("ETag", '"' + "ab" * 32 + '"')                 # as GitHub's: no SHA-256
        self.end_headers()
        self.wfile.write(part[:server.cuts.pop(0)] if server.cuts else part)

    def log_message(self, *_): pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download.time, "sleep", lambda seconds: None)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        server.body, server.asked, server.cuts = bytes(range(256)) * 4000, [], []
        server.ranges, server.status, server.etag = True, 0, ""
        server.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(.01,), daemon=True).start()
        yield server
        server.shutdown()


def get(server, path, url="/file", **kwargs):
    download.download(server.url + url, str(path / "file"), **kwargs)
    return (path / "file").read_bytes()


def test_a_download_arrives_whole_and_is_not_repeated(server, tmp_path):
    for _ in range(2): assert get(server, tmp_path / "new") == server.body
    assert server.asked == [0] and os.listdir(tmp_path / "new") == ["file"]


def test_a_broken_download_goes_on_where_it_stopped(server, tmp_path):
    server.cuts = [300_000, 1]
    assert get(server, tmp_path) == server.body and server.asked == [0, 300_000, 300_001]


def test_a_later_run_goes_on_with_the_part(server, tmp_path):
    (tmp_path / "file.part").write_bytes(server.body[:500_000])
    assert get(server, tmp_path) == server.body and server.asked == [500_000]
    assert os.listdir(tmp_path) == ["file"]


def test_a_server_that_ignores_ranges_sends_everything_again(server, tmp_path):
    server.cuts, server.ranges = [300_000], False
    assert get(server, tmp_path) == server.body and server.asked == [0, 0]


def test_a_part_longer_than_the_file_is_thrown_away(server, tmp_path):
    (tmp_path / "file.part").write_bytes(bytes(2_000_000))
    assert get(server, tmp_path) == server.body and server.asked == [2_000_000, 0]


def test_a_download_that_never_completes_keeps_its_part_and_says_where(server, tmp_path):
    server.cuts = [100, 100, 100, 100]
    with pytest.raises(DataError) as error: get(server, tmp_path)
    sentence(error, server.url, "broke off after 400 of 1,024,000 bytes", "kept in", "file.part")
    assert (tmp_path / "file.part").read_bytes() == server.body[:400] and len(os.listdir(tmp_path)) == 1


def test_a_checksum_given_or_published_on_a_redirect_is_checked(server, tmp_path):
    server.etag = good = hashlib.sha256(server.body).hexdigest()
    assert get(server, tmp_path / "a", "/redirect/file") == server.body
    assert get(server, tmp_path / "b", sha256=good) == server.body
    server.etag = "0" * 64
    for name, url, given in (("c", "/redirect/file", None), ("d", "/file", "0" * 64)):
        with pytest.raises(DataError) as error: get(server, tmp_path / name, url, sha256=given)
        sentence(error, "SHA-256", "try again")
        assert os.listdir(tmp_path / name) == []


def test_without_a_network_one_sentence_says_what_works_offline(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(download.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(prepare, "HERE", str(tmp_path))
    monkeypatch.setattr(prepare, "URLS", {name: "http://127.0.0.1:9/{}" for name in prepare.URLS})
    for name in prepare.URLS:
        monkeypatch.setattr(sys, "argv", ["prepare.py", name])
        with pytest.raises(SystemExit) as stop: prepare.main()
        said = capsys.readouterr().err
        assert stop.value.code == 2 and said.count("\n") == 1
        assert said.startswith("prepare: cannot download http://127.0.0.1:9/")
        assert "the offline corpora are stdlib, python, or a file of yours" in said
    assert os.listdir(tmp_path) == []


def test_what_a_server_does_not_have_is_said_at_once_and_its_trouble_is_waited_out(server, tmp_path):
    server.status = 404
    with pytest.raises(DataError) as error: get(server, tmp_path)
    sentence(error, "404"), server.asked.clear()
    server.status = 503
    with pytest.raises(DataError) as error: get(server, tmp_path)
    sentence(error, "503")
    assert len(server.asked) == download.TRIES and os.listdir(tmp_path) == []


def test_the_corpora_from_the_network_are_made_of_what_it_sends(server, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "HERE", str(tmp_path))
    monkeypatch.setattr(prepare, "URLS", {name: f"{server.url}/{name}-{{}}" for name in prepare.URLS})
    pages = [f"page {i} of the web, \ud800" for i in range(500)]
    server.body = gzip.compress("\n".join(json.dumps(dict(text=page)) for page in pages).encode())
    train, val = texts(prepare.prepare("c4", 300))
    assert train == val == "".join(tokenizer.END + page.replace("\ud800", "?") for page in pages)
    before = digest(tmp_path / "c4-300")
    train, val = prepare.files(prepare.prepare("c4", 300, shards=3))
    assert len(open_tokens(train)) == 3 and len(open_tokens(val)) == 1
    assert set(before) <= set(digest(tmp_path / "c4-300"))                  # what was there is kept
    server.body = b"To be, or not to be\n" * 500
    monkeypatch.setattr(prepare, "SHAKESPEARE_SHA256", hashlib.sha256(server.body).hexdigest())
    assert "".join(texts(prepare.prepare("shakespeare", 300))) == tokenizer.END + server.body.decode()
    with open(make(tmp_path / "t.bin", np.arange(5000)), "rb") as file: server.body = file.read()
    train, val = prepare.files(prepare.prepare("fineweb", shards=2))
    assert len(open_tokens(train)) == 2 and len(open_tokens(val)) == 1
