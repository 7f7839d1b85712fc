"""Facts about token files, the vocabulary, corpora and downloads."""
import collections, hashlib, http.server, os, subprocess, sys, threading
import numpy as np, pytest, regex
from data import prepare, tokenizer, tokens
from data.tokens import DataError

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def write(path, ids, vocab=4096):
    with tokens.TokenWriter(str(path), vocab) as w: w.append(ids)
    return str(path)


def header(*words): return np.array([*words, *[0] * (256 - len(words))], np.int32).tobytes()


# ---- files

def test_the_three_layouts_are_told_apart_and_read(tmp_path):
    ids = np.arange(1000) % 300
    assert np.array_equal(tokens.open_tokens(write(tmp_path / "a.bin", ids))[0], ids)
    assert tokens.open_tokens(write(tmp_path / "b.bin", ids, vocab=128256))[0].dtype == np.uint32
    (tmp_path / "c.bin").write_bytes(ids.astype(np.uint16).tobytes())
    assert np.array_equal(tokens.open_tokens(str(tmp_path / "c.bin"))[0], ids)
    assert [len(s) for s in tokens.open_tokens(str(tmp_path / "*.bin"))] == [1000, 1000, 1000]
    assert (tmp_path / "a.bin").read_bytes()[:4] == bytes.fromhex("88D83401") and (tmp_path / "b.bin").read_bytes()[:4] == bytes.fromhex("A1D93401")
    assert os.path.getsize(tmp_path / "a.bin") == 1024 + 2000


@pytest.mark.parametrize("content, words", [
    (b"", "empty"),
    (header(20240520, 1, 10) + bytes(18), "asks for 1,044 bytes, it has 1,042"),
    (header(20240520, 1, 10)[:500], "truncated"),
    (header(20240520, 2, 0), "version 2"),
    (header(20240801, 1, 0), "version 1"),
    (b"\x89PNG\r\n\x1a\n" + bytes(100), "not a token file"),
    (b"PK\3\4" + bytes(100), "not a token file"),
    (b"\7" * 101, "not a token file"),
    (b"Once upon a time\n" * 10, "looks like text"),
])
def test_a_damaged_or_foreign_file_is_refused_by_name(tmp_path, content, words):
    (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(DataError, match=words) as error: tokens.open_tokens(str(tmp_path / "x.bin"))
    assert "x.bin" in str(error.value) and "\n" not in str(error.value)


def test_a_missing_file_is_refused_with_what_to_do(tmp_path):
    with pytest.raises(DataError, match="prepare it with"): tokens.open_tokens(str(tmp_path / "no*.bin"))


# ---- batches

@pytest.fixture
def shards(tmp_path):
    write(tmp_path / "s1.bin", np.arange(0, 1000)), write(tmp_path / "s2.bin", np.arange(2000, 2777))
    return tokens.open_tokens(str(tmp_path / "s*.bin"))


def test_a_batch_is_a_function_of_the_step(shards):
    for step in (0, 3, 1000):
        a, b = (tokens.batch(shards, step, 4, 16, 1, 4096) for _ in range(2))
        assert np.array_equal(a, b) and a[0].shape == (4, 16) and np.array_equal(a[0][:, 1:], a[1][:, :-1])
        assert (np.diff(a[0], axis=1) == 1).all()               # a sequence never crosses from one shard to the next
    assert not np.array_equal(tokens.batch(shards, 0, 4, 16, 1, 4096), tokens.batch(shards, 0, 4, 16, 2, 4096))


def test_an_epoch_reads_each_window_once_whatever_the_batch_and_the_next_one_differs(shards):
    windows = (1000 - 16) // 16 + (777 - 16) // 16
    starts = lambda B, steps, first=0: [int(r[0]) for s in range(first, first + steps) for r in tokens.batch(shards, s, B, 16, 0, 4096)[0]]
    epoch = starts(1, windows)
    assert len(set(epoch)) == windows == len(epoch)
    assert starts(4, windows // 4) == epoch[:windows // 4 * 4]
    assert set(starts(1, windows, windows)) != set(epoch)       # another offset


def test_validation_predicts_every_token_once_in_order(shards):
    for B, T in ((4, 16), (3, 50), (1, 2000)):
        pairs = [(int(a), int(b)) for x, y in tokens.val_batches(shards, B, T, 4096) for a, b in zip(x.flat, y.flat) if b >= 0]
        assert [b for _, b in pairs] == [*range(1, 1000), *range(2001, 2777)] and all(b == a + 1 for a, b in pairs)
        assert all(x.shape == y.shape == (B, T) for x, y in tokens.val_batches(shards, B, T, 4096))


def test_a_token_outside_the_vocabulary_is_named_with_its_place(shards):
    with pytest.raises(DataError, match=r"token 2776 at position 776 of .*s2.bin .* vocabulary of 2,500"): list(tokens.val_batches(shards, 1, 4000, 2500))
    with pytest.raises(DataError, match="outside the vocabulary of 10"): tokens.batch(shards, 0, 4, 16, 0, 10)


def test_a_corpus_shorter_than_a_sequence_is_refused_with_numbers(shards):
    with pytest.raises(DataError, match="1,000 tokens.*sequence of 512, which needs 1,024"): tokens.batch(shards, 0, 1, 512, 0, 4096)


# ---- vocabulary

UGLY = ["", " ", "\n\n\t x", "def f(a, b):\r\n    return a*b  # 1234567\n", "héllo 日本語 🤗\x00\x7f", "a" * 1000, " " * 77 + "\n" * 9]


def test_encoding_and_decoding_give_the_text_back(tmp_path):
    tokenizer.save(tokenizer.train_bpe(["def f(x):\n    return x\n" * 50 + "naïve 日本"], 400), tmp_path)
    encoding = tokenizer.load_encoding(str(tmp_path))
    assert encoding.n_vocab == encoding.eot_token + 1 <= 401
    for text in UGLY: assert encoding.decode(encoding.encode_ordinary(text)) == text
    assert len(encoding.encode_ordinary("    return x")) < 6


def test_the_fast_trainer_makes_the_merges_of_the_plain_one():
    text = open(os.path.join(ROOT, "quartet.py")).read()[:6000]
    words = [[bytes([b]) for b in w.encode()] for w in regex.findall(tokenizer.PATTERN, text)]
    ranks = {bytes([b]): b for b in range(256)}
    while len(ranks) < 360:                                     # count all pairs anew for each merge
        pairs = collections.Counter(p for w in words for p in zip(w, w[1:]))
        best = min(pairs, key=lambda p: (-pairs[p], p))
        ranks[best[0] + best[1]] = len(ranks)
        words = [tokenizer.merge(w, best) for w in words]
    assert tokenizer.train_bpe([text], 360) == ranks


# ---- corpora

@pytest.fixture
def folder(tmp_path):
    for i in range(200):
        (tmp_path / "text" / f"d{i % 7}").mkdir(parents=True, exist_ok=True)
        (tmp_path / "text" / f"d{i % 7}" / f"{i}.txt").write_text(f"document {i}\n" * 40)
    (tmp_path / "text" / "copy.txt").write_text("document 3\n" * 40)
    (tmp_path / "text" / "binary.txt").write_bytes(b"\xff\xfe\x00")
    return tmp_path / "text"


def digest(path): return hashlib.sha256(open(path, "rb").read()).hexdigest()


def test_preparing_twice_gives_the_same_bytes_and_each_document_once(folder, tmp_path):
    for name in ("one", "two"): assert prepare.prepare(str(folder), 300, out=str(tmp_path / name)) == str(tmp_path / name)
    for file in ("train.bin", "val.bin", "vocab.tiktoken"): assert digest(tmp_path / "one" / file) == digest(tmp_path / "two" / file)
    encoding = tokenizer.load_encoding(str(tmp_path / "one"))
    train, val = (encoding.decode(tokens.open_tokens(pattern)[0].tolist()).split(tokenizer.END)[1:] for pattern in prepare.files(str(tmp_path / "one")))
    assert sorted(train + val) == sorted(f"document {i}\n" * 40 for i in range(200)) and len(val) >= 1
    assert prepare.prepare(str(tmp_path / "one")) == str(tmp_path / "one")                      # a folder that is ready
    assert not [f for f in os.listdir(tmp_path) if f.startswith(".making")]


def test_one_file_is_split_on_a_line_and_a_changed_file_is_another_corpus(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("".join(f"line {i}\n" for i in range(1000)))
    prepare.prepare(str(path), 300, out=str(tmp_path / "notes"))
    text = [tokenizer.load_encoding(str(tmp_path / "notes")).decode(tokens.open_tokens(p)[0].tolist()) for p in prepare.files(str(tmp_path / "notes"))]
    assert text[0].endswith("\n") and (text[0] + text[1]).replace(tokenizer.END, "") == path.read_text() and len(text[1]) < 1100
    before = prepare.own_name(str(path))
    path.write_text("other")
    assert prepare.own_name(str(path)) != before


def test_ready_shards_of_others_are_a_corpus_as_they_are(tmp_path):
    for name in ("fineweb_train_000001.bin", "fineweb_train_000002.bin", "fineweb_val_000000.bin"): write(tmp_path / name, np.arange(50000) % 50257, 50257)
    train, val = prepare.files(prepare.prepare(str(tmp_path)))
    assert len(tokens.open_tokens(train)) == 2 and len(tokens.open_tokens(val)) == 1
    assert tokenizer.vocab_size(str(tmp_path), tokens.open_tokens(train)) == 50257


def test_prepare_says_what_is_wrong_in_one_sentence_exits_with_2_and_leaves_nothing(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "file").write_text("x")
    for args, words in ((["nosuch"], "is not a file, a folder, or one of stdlib, python"), ([str(tmp_path / "empty.txt"), "--out", str(tmp_path / "c")], "too little text"),
                        ([str(tmp_path / "file"), "--vocab", "7"], "vocab 7"), ([str(tmp_path / "file"), "--out", str(tmp_path / "file" / "c")], "cannot write into")):
        done = subprocess.run([sys.executable, os.path.join(ROOT, "data", "prepare.py"), *args], capture_output=True, text=True)
        assert done.returncode == 2 and words in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr, done.stderr
    assert sorted(os.listdir(tmp_path)) == ["empty.txt", "file"]


def test_memory_stays_small_however_large_the_corpus(tmp_path):
    for i in range(80): (tmp_path / f"{i}.py").write_text(f"x{i} = {i}\n" * 90000)             # 80 MB
    code = "import resource, sys; sys.path.insert(0, sys.argv[1]); from data import prepare; m = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n" \
           "a = m(); prepare.prepare(sys.argv[2], 300, out=sys.argv[3]); print((m() - a) // 1024)"
    for i in range(80): assert os.path.getsize(tmp_path / f"{i}.py") < 1 << 20
    out = subprocess.run([sys.executable, "-c", code, ROOT, str(tmp_path), str(tmp_path / "out")], capture_output=True, text=True, check=True).stdout
    assert int(out.split()[-1]) <= 400


# ---- downloads, from a server on this machine

class Server(http.server.BaseHTTPRequestHandler):
    body, ranges, cut, etag, asked = bytes(range(256)) * 4000, True, 0, None, []

    def do_GET(self):
        start = int(self.headers["Range"][6:-1]) if self.headers.get("Range") and self.ranges else 0
        type(self).asked.append(start)
        self.send_response(404 if "missing" in self.path else 206 if start else 200)
        self.send_header("Content-Length", str(len(self.body) - start))
        if self.etag: self.send_header("X-Linked-Etag", f'"{self.etag}"')
        self.end_headers()
        end = self.cut if self.cut and len(self.asked) == 1 else len(self.body)
        self.wfile.write(self.body[start:end])

    def log_message(self, *_): pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(prepare.time, "sleep", lambda s: None)
    handler = type("Handler", (Server,), dict(asked=[]))
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    handler.url = f"http://127.0.0.1:{httpd.server_port}/file.bin"
    yield handler
    httpd.shutdown(), httpd.server_close()


def test_a_download_arrives_whole_and_is_not_repeated(server, tmp_path):
    for _ in range(2): assert open(prepare.download(server.url, str(tmp_path)), "rb").read() == server.body
    assert server.asked == [0] and os.listdir(tmp_path) == ["file.bin"]


def test_a_broken_download_goes_on_where_it_stopped(server, tmp_path):
    server.cut = 300_000
    assert open(prepare.download(server.url, str(tmp_path)), "rb").read() == server.body
    assert server.asked == [0, 300_000]


def test_a_server_that_ignores_ranges_sends_everything_again(server, tmp_path):
    server.cut, server.ranges = 300_000, False
    assert open(prepare.download(server.url, str(tmp_path)), "rb").read() == server.body


def test_a_published_checksum_is_checked(server, tmp_path):
    server.etag = hashlib.sha256(server.body).hexdigest()
    prepare.download(server.url, str(tmp_path / "good"))
    server.etag = "0" * 64
    with pytest.raises(DataError, match="published checksum"): prepare.download(server.url, str(tmp_path / "bad"))
    assert os.listdir(tmp_path / "bad") == []


def test_without_a_network_one_sentence_says_what_works_offline(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare.time, "sleep", lambda s: None)
    with pytest.raises(DataError, match="without a network there are stdlib, python, and files of yours"): prepare.download("http://127.0.0.1:9/x", str(tmp_path))


def test_a_missing_file_on_the_server_is_said_at_once(server, tmp_path):
    with pytest.raises(DataError, match="404"): prepare.download(server.url.replace("file", "missing"), str(tmp_path))
    assert len(server.asked) == 1


def test_the_corpora_from_the_network_are_built_from_what_it_sends(server, tmp_path, monkeypatch):
    import gzip, json
    monkeypatch.setattr(prepare, "HERE", str(tmp_path)), monkeypatch.setattr(prepare.download, "__defaults__", (str(tmp_path / "downloads"),))
    monkeypatch.setattr(prepare, "URLS", {k: server.url.replace("file.bin", k + ("_{split}_{i}.bin" if k == "fineweb" else "{i}.gz" if k == "c4" else ".txt")) for k in prepare.URLS})
    server.body = gzip.compress("\n".join(json.dumps(dict(text=f"page {i} of the web")) for i in range(500)).encode())
    assert len(tokens.open_tokens(prepare.files(prepare.prepare("c4", vocab=300))[1])[0]) > 10
    server.body = b"To be, or not to be\n" * 500
    assert tokens.open_tokens(prepare.files(prepare.prepare("shakespeare", vocab=300))[0])
    server.body = open(write(tmp_path / "t.bin", np.arange(5000), 50257), "rb").read()
    train, _ = prepare.files(prepare.prepare("fineweb", shards=2))
    assert len(tokens.open_tokens(train)) == 2
