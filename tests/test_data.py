"""
Facts about token files, batches, the vocabulary, corpora and downloads.

Nothing here needs a network.
"""
import collections
import contextlib
import gzip
import hashlib
import http.server
import io
import json
import os
import random
import subprocess
import sys
import threading

import numpy as np
import pytest
import regex

from data import (
    bpe, build, download, files, prepare, prepared, progress, split, texts, tokenizer, tokens, web)
from data.corpus import open_corpus
from data.files import UserError
from data.tokens import TokenWriter, open_tokens

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def make(path, ids, vocab=50257):
    with TokenWriter(str(path), vocab) as out:
        out.append(ids)
    return str(path)


def header(*words):
    return np.array([*words, *[0] * (256 - len(words))], "<i4").tobytes()


def sentence(error, *words):
    """The error is one sentence for the user, with these words in it."""
    text = str(error.value)
    assert "\n" not in text, text
    assert all(word in text for word in words), text


# ---- files that are there whole or not at all

def test_an_atomic_write_makes_the_folder_and_the_file(tmp_path):
    path = tmp_path / "a" / "b" / "file"
    for content in (b"first", b"second"):
        files.atomic_write(str(path), lambda file: file.write(content))
        assert path.read_bytes() == content
        assert os.listdir(path.parent) == ["file"]


def test_an_atomic_write_into_the_current_folder_needs_no_folder_in_its_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files.atomic_write("file", lambda file: file.write(b"content"))
    assert (tmp_path / "file").read_bytes() == b"content"


@pytest.mark.parametrize("error, words", [
    (OSError(28, "No space left on device"), "No space left on device"),
    (RuntimeError("unexpected pos 64 vs 0"), "is the disk full?"),      # as torch.save raises it
])
def test_an_atomic_write_that_fails_is_a_sentence_and_keeps_what_was_there(tmp_path, error, words):
    def fail(file):
        file.write(b"half of it")
        raise error

    (tmp_path / "file").write_bytes(b"before")
    with pytest.raises(UserError) as raised:
        files.atomic_write(str(tmp_path / "file"), fail)
    sentence(raised, f"cannot write {tmp_path / 'file'}: {words}; what was there before is kept")
    assert (tmp_path / "file").read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["file"]


def test_an_interrupted_atomic_write_leaves_what_was_there(tmp_path):
    def interrupt(file):
        file.write(b"half of it")
        raise KeyboardInterrupt

    (tmp_path / "file").write_bytes(b"before")
    with pytest.raises(KeyboardInterrupt):
        files.atomic_write(str(tmp_path / "file"), interrupt)
    assert (tmp_path / "file").read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["file"]


def test_a_file_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    called = []
    fsync = os.fsync
    replace = os.replace

    def forced(number):
        called.append(("to the disk", os.fstat(number).st_size))
        fsync(number)

    def moved(source, target):
        called.append(("name", os.path.getsize(source)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", forced)
    monkeypatch.setattr(os, "replace", moved)
    files.atomic_write_text(str(tmp_path / "file"), "naïve")
    assert called == [("to the disk", 6), ("name", 6)]
    assert (tmp_path / "file").read_bytes() == "naïve".encode()


# ---- progress bars

class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stderr, is_shown", [
    (None, False), (io.StringIO(), False), (Terminal(), True)], ids=["closed", "file", "terminal"])
def test_a_bar_shows_only_on_a_terminal(monkeypatch, stderr, is_shown):
    monkeypatch.setattr(sys, "stderr", stderr)
    with progress.bar_on_terminal(total=3) as bar:
        assert bar.disable != is_shown
        bar.update()
    assert stderr is None or bool(stderr.getvalue()) == is_shown


def test_the_bar_of_a_download_that_goes_on_begins_where_it_stopped(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress.progress_bar("somewhere/text.gz", 4000, 1000) as bar:
        assert (bar.n, bar.total, bar.desc) == (1000, 4000, "text.gz")
        assert "1.00k/4.00k" in str(bar) and "25%" in str(bar)


# ---- token files

def test_the_three_layouts_are_told_apart_and_read(tmp_path):
    ids = np.arange(1000) * 60
    make(tmp_path / "a.bin", ids, 60000)
    make(tmp_path / "b.bin", ids * 2, 128256)
    (tmp_path / "c.bin").write_bytes(ids.astype("<u2").tobytes())
    for name, width, factor in (("a", 2, 1), ("b", 4, 2), ("c", 2, 1)):
        shard, = open_tokens(str(tmp_path / f"{name}.bin"))
        assert isinstance(shard, np.memmap)
        assert shard.dtype.itemsize == width
        assert np.array_equal(shard, ids * factor)
    # Shards of one corpus may have different layouts.
    assert [len(shard) for shard in open_tokens(str(tmp_path / "[abc].bin"))] == [1000] * 3
    gpt2_start = (tmp_path / "a.bin").read_bytes()[:12]
    llama3_start = (tmp_path / "b.bin").read_bytes()[:12]
    assert gpt2_start.hex(" ", 4) == "88d83401 01000000 e8030000"
    assert llama3_start.hex(" ", 4) == "a1d93401 07000000 e8030000"
    assert os.path.getsize(tmp_path / "a.bin") == 1024 + 2000


def test_a_path_with_glob_characters_is_a_path(tmp_path):
    (tmp_path / "[x]").mkdir()
    assert len(open_tokens(make(tmp_path / "[x]" / "train.bin", [1, 2, 3]))[0]) == 3
    make(tmp_path / "[x]" / "val.bin", [1, 2, 3])
    patterns = prepared.files(str(tmp_path / "[x]"))
    assert [len(open_tokens(pattern)) for pattern in patterns] == [1, 1]


@pytest.mark.parametrize("content, words", [
    (b"", "0 bytes"),
    (b"\7\0", "2 bytes"),
    (b"\7" * 101, "101 bytes"),
    (header(20240520, 1, 10) + bytes(18),
     "10 tokens and their header take 1,044 bytes, the file has 1,042"),
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
    # The 1024th byte is the first of a character.
    (("x" + "naïve 日本語\n" * 99).encode(), "looks like text"),
])
def test_a_damaged_or_foreign_file_is_refused_in_a_sentence(tmp_path, content, words):
    (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(UserError) as error:
        open_tokens(str(tmp_path / "x.bin"))
    sentence(error, "x.bin", words)


def test_shards_are_in_the_order_of_their_names(tmp_path):
    for i in (3, 1, 10, 2):
        make(tmp_path / f"train_{i:02}.bin", range(i, 20))
    firsts = [int(shard[0]) for shard in open_tokens(str(tmp_path / "*train*.bin"))]
    assert firsts == [1, 2, 3, 10]


@pytest.mark.parametrize("vocab, width", [(257, 2), (65536, 2), (65537, 4), (1 << 20, 4)])
def test_the_width_of_tokens_is_the_smallest_that_holds_the_vocabulary(tmp_path, vocab, width):
    shard, = open_tokens(make(tmp_path / "x.bin", [0, vocab - 1, 7], vocab))
    assert shard.dtype.itemsize == width
    assert shard.tolist() == [0, vocab - 1, 7]


def test_a_missing_file_or_an_empty_glob_is_refused_with_what_to_do(tmp_path):
    for name in ("no.bin", "no*.bin", ""):
        with pytest.raises(UserError) as error:
            open_tokens(str(tmp_path / name))
        sentence(error, name, "python data/prepare.py")


def test_real_tokens_are_never_taken_for_something_else(tmp_path):
    path = tmp_path / "x.bin"
    for vocab in (65, 4096, 50257):
        rng = np.random.default_rng(vocab)
        for first in range(0, vocab, max(1, vocab // 300)):         # whatever the first token is
            ids = np.r_[first, rng.integers(vocab, size=30)]
            path.write_bytes(ids.astype("<u2").tobytes())
            assert open_tokens(str(path))[0][0] == first


def test_a_writer_that_fails_leaves_what_was_there(tmp_path):
    path = make(tmp_path / "x.bin", [1, 2, 3])
    before = (tmp_path / "x.bin").read_bytes()
    with pytest.raises(KeyboardInterrupt), TokenWriter(path, 50257) as out:
        out.append(np.arange(100000) % 50257)
        # Nothing shows before the end.
        assert (tmp_path / "x.bin").read_bytes() == before
        raise KeyboardInterrupt
    with pytest.raises(UserError) as error:
        make(path, [5, 4096], 4096)
    sentence(error, "token 4096 at position 1", "4,096 entries")
    assert (tmp_path / "x.bin").read_bytes() == before
    assert os.listdir(tmp_path) == ["x.bin"]


# ---- batches

@pytest.fixture
def shards(tmp_path):
    make(tmp_path / "s1.bin", range(0, 1000))
    make(tmp_path / "s2.bin", range(2000, 2777))
    make(tmp_path / "s3.bin", range(4000, 4005))
    make(tmp_path / "s4.bin", range(5000, 5020))
    return open_tokens(str(tmp_path / "s*.bin"))


def starts(shards, B, steps, T=16, seed=0):
    return [int(row[0]) for step in steps for row in tokens.batch(shards, step, B, T, seed)[0]]


def test_a_batch_is_a_function_of_the_step(shards):
    for step in (1000, 0, 3, 0):
        x, y = tokens.batch(shards, step, 4, 16, 1)
        assert x.shape == y.shape == (4, 16)
        assert x.dtype == y.dtype == np.int64
        assert (y == x + 1).all()
        assert (np.diff(x, axis=1) == 1).all()                      # windows lie inside one shard
        assert np.array_equal(x, tokens.batch(shards, step, 4, 16, 1)[0])
    assert starts(shards, 4, [0]) != starts(shards, 4, [1]) != starts(shards, 4, [1], seed=1)


def test_an_epoch_reads_every_window_once_and_the_next_one_other_windows(shards):
    windows = (1000 - 16) // 16 + (777 - 16) // 16 + 0 + 1          # s3 is too short, s4 holds one
    first = starts(shards, 1, range(windows))
    second = starts(shards, 1, range(windows, 2 * windows))
    assert len(set(first)) == len(set(second)) == windows
    assert set(first) != set(second)
    rows = [tokens.batch(shards, step, 1, 16, 0)[0][0] for step in range(windows)]
    read = np.concatenate(rows)
    assert len(set(read.tolist())) == windows * 16                  # no token twice
    assert sum(token < 1000 for token in read) == 976
    assert sum(2000 <= token < 2777 for token in read) == 752
    assert first != sorted(first)


def test_slices_of_a_batch_and_other_batch_sizes_give_the_same_sequences(shards):
    sequences = starts(shards, 12, range(20))                       # over two epochs
    assert sequences == starts(shards, 1, range(240)) == starts(shards, 48, range(5))
    slices = [starts(shards, 12 // 3, [step * 3 + i]) for step in range(20) for i in range(3)]
    assert sequences == sum(slices, [])


def test_two_corpora_of_different_sizes_do_not_get_in_each_others_way(shards, tmp_path):
    other = open_tokens(make(tmp_path / "other.bin", range(10000, 10500)))
    alone = [starts(shards, 4, [step]) for step in range(5)]
    other_alone = [starts(other, 4, [step]) for step in range(5)]
    mixed = []
    other_mixed = []
    for step in range(5):
        mixed.append(starts(shards, 4, [step]))
        other_mixed.append(starts(other, 4, [step]))
    assert mixed == alone
    assert other_mixed == other_alone
    assert min(other_alone[0]) >= 10000


def test_the_shortest_corpus_that_holds_a_sequence_is_enough(tmp_path):
    shard = open_tokens(make(tmp_path / "s.bin", range(17)))
    x, y = tokens.batch(shard, 0, 3, 16, 0)
    assert np.array_equal(x, [range(16)] * 3)
    assert np.array_equal(y, [range(1, 17)] * 3)
    tokens.check_long_enough(shard, 16)
    for read in (lambda: tokens.batch(shard, 0, 3, 17, 0),
                 lambda: tokens.check_long_enough(shard, 17)):
        with pytest.raises(UserError) as error:
            read()
        sentence(error, "s.bin has 17 tokens: too few for a sequence of 17, which takes 18")


@pytest.mark.parametrize("B", [2**50, 2**62, 2**64])
def test_a_batch_that_no_machine_holds_is_a_memory_error(shards, B):
    for read in (lambda: tokens.batch(shards, 0, B, 16, 0),
                 lambda: next(tokens.val_batches(shards, B, 16))):
        with pytest.raises(MemoryError):
            read()


@pytest.mark.parametrize("B, T", [(4, 16), (3, 50), (1, 2000), (7, 1)])
def test_validation_predicts_every_token_once_in_order(shards, B, T):
    batches = list(tokens.val_batches(shards, B, T))
    for x, y in batches:
        assert x.shape == y.shape == (B, T)
        assert x.dtype == y.dtype == np.int64
    x = np.concatenate([x.ravel() for x, _ in batches])
    y = np.concatenate([y.ravel() for _, y in batches])
    expected = [*range(1, 1000), *range(2001, 2777), *range(4001, 4005), *range(5001, 5020)]
    assert y[y >= 0].tolist() == expected
    assert (x[y >= 0] + 1 == y[y >= 0]).all()
    assert (x[y < 0] == 0).all()
    assert (y[y < 0] == -1).all()


# ---- vocabulary

def source_text():
    with open(os.path.join(ROOT, "data", "tokens.py")) as file:
        return file.read()


def test_the_example_in_the_docstring_is_what_happens():
    assert list(bpe.train_bpe(["aaabdaaabac"], 300))[256:] == [b"aa", b"aaa", b"aaab"]


def test_the_fast_trainer_makes_the_merges_of_a_plain_one():
    text = source_text() + "aaaaaaa abababa " * 9
    ranks = plain_bpe(text, 600)
    assert list(bpe.train_bpe([text], 600).items()) == list(ranks.items())


def plain_bpe(text, size):
    """Trains a vocabulary as train_bpe() does, but counts every pair anew for each merge."""
    words = [[bytes([b]) for b in word.encode()] for word in regex.findall(bpe.PATTERN, text)]
    ranks = {bytes([b]): b for b in range(256)}
    while len(ranks) < size:
        pairs = collections.Counter(a + b for word in words for a, b in zip(word, word[1:]))
        best = min(pairs, key=lambda pair: (-pairs[pair], pair), default=b"")
        if pairs[best] < 2:
            return ranks
        ranks.setdefault(best, len(ranks))
        for word in words:
            for i in range(len(word)):
                if b"".join(word[i:i + 2]) == best and len(word[i:]) > 1:
                    word[i:i + 2] = [best]
    return ranks


def test_the_fast_trainer_makes_the_merges_of_a_plain_one_from_few_letters_too():
    # Of few letters most pairs overlap with themselves and with their neighbours.
    for seed in range(60):
        rng = random.Random(seed)
        letters = "ab"[:1 + seed % 2]
        words = ["".join(rng.choices(letters, k=rng.randint(1, 30))) for _ in range(20)]
        text = " ".join(words)
        expected = plain_bpe(text, 300)
        assert list(bpe.train_bpe([text], 300).items()) == list(expected.items()), seed


def test_text_is_cut_into_words_as_documented():
    text = "The cat's 1234567 = (x)\n\n  if  y:"
    words = ["The", " cat", "'s", " ", "123", "456", "7", " =", " (", "x", ")\n\n", " ", " if",
             " ", " y", ":"]
    assert regex.findall(bpe.PATTERN, text) == words


def test_tiktoken_applies_the_merges_as_they_were_learnt():
    text = source_text()
    ranks = bpe.train_bpe([text], 500)
    learnt = []
    for characters in regex.findall(bpe.PATTERN, text):
        word = [bytes([b]) for b in characters.encode()]
        for token in list(ranks)[256:]:
            for _ in bpe.merge(word, token):
                pass
        learnt += word
    assert tokenizer.Own(ranks).encode(text) == [ranks[token] for token in learnt]


def test_a_vocabulary_with_a_rank_twice_is_refused():
    lines = tokenizer.to_lines({bytes([b]): b for b in range(256)} | {b"ab": 255})
    with pytest.raises(ValueError):
        tokenizer.from_lines(lines.splitlines())


def test_encoding_loses_nothing(tmp_path):
    ranks = bpe.train_bpe(["def f(x):\n    return x\n" * 50 + "naïve 日本"], 400)
    tokenizer.save(ranks, tmp_path / "vocab.tiktoken")
    vocabulary = tokenizer.open_vocabulary(str(tmp_path))
    assert vocabulary.size == len(ranks) + 1 <= 401
    rng = random.Random(0)
    letters = list(map(chr, range(0x3000))) + list(" \n\r\t🤗\u2028\ufeff\U0010ffff") * 500
    ugly = [" ", "\n\n\t x", "def f(a, b):\r\n    return a*b  # 1234567\n", "a" * 99999,
            "<|endoftext|>"]
    ugly += ["".join(rng.choices(letters, k=200)) for _ in range(200)]
    for text in ugly:
        assert vocabulary.decode(vocabulary.encode(text)) == text
    assert len(vocabulary.encode("def f(x):\n    return x\n")) < 10


def test_a_million_spaces_are_encoded():
    # By GPT-4's own pattern they are not.
    vocabulary = tokenizer.Own({bytes([b]): b for b in range(256)})
    for text in (" " * 10**6 + "x", "\n" * 10**6, " \n" * 10**6):
        assert vocabulary.decode(vocabulary.encode(text)) == text


@pytest.mark.parametrize(
    "content", [b"hello\n", b"YQ== 0\n", b"YQ== x\n", b"!!! 1\n", b"", b"YQ== 0 0\n"])
def test_a_damaged_vocabulary_is_refused_in_a_sentence(tmp_path, content):
    (tmp_path / "vocab.tiktoken").write_bytes(content)
    with pytest.raises(UserError) as error:
        tokenizer.open_vocabulary(str(tmp_path))
    sentence(error, "vocab.tiktoken", "prepare the corpus again")


# ---- corpora

@pytest.fixture
def folder(tmp_path):
    """200 documents in folders, a duplicate, and what is no text."""
    root = tmp_path / "text"
    for i in range(200):
        (root / f"d{i % 7}").mkdir(parents=True, exist_ok=True)
        (root / f"d{i % 7}" / f"{i}.txt").write_text(f"document {i}\n" * 40)
    (root / "copy.txt").write_text("document 3\n" * 40)
    (root / "latin1.txt").write_bytes("naïve".encode("latin1"))
    (root / "binary").write_bytes(bytes(99))
    (root / "empty.txt").touch()
    (root / ".hidden").write_text("hidden")
    return root


def contents(corpus):
    vocabulary = tokenizer.open_vocabulary(str(corpus))
    patterns = prepared.files(str(corpus))
    return [vocabulary.decode(open_tokens(pattern)[0].tolist()) for pattern in patterns]


def digest(corpus):
    """Of everything in a folder except the facts, which hold the times of the files."""
    names = sorted(set(os.listdir(corpus)) - {prepared.FACTS})
    return [hashlib.sha256((corpus / name).read_bytes()).hexdigest() for name in names]


def test_preparing_twice_gives_the_same_bytes_and_each_document_once(folder, tmp_path):
    for name in ("first", "second"):
        out = str(tmp_path / name)
        assert prepare.prepare(str(folder), 300, out=out) == out
    assert digest(tmp_path / "first") == digest(tmp_path / "second")
    names = [".quartet.json", "corpus.json", "train.bin", "val.bin", "vocab.tiktoken"]
    assert sorted(os.listdir(tmp_path / "first")) == names
    train, val = (text.split(tokenizer.END)[1:] for text in contents(tmp_path / "first"))
    assert sorted(train + val) == sorted(f"document {i}\n" * 40 for i in range(200))
    assert 20 <= len(val) <= 24
    # The folder is ready, and itself the name of a corpus.
    assert prepare.prepare(str(tmp_path / "first")) == str(tmp_path / "first")


def test_the_split_goes_by_name_and_does_not_depend_on_the_machine(folder):
    kept, _ = texts.unique(texts.list_files(str(folder))[0])
    names = [file.name for file in kept]
    assert names == sorted(names)
    assert "d3/3.txt" not in names and "copy.txt" in names          # the first of the two
    assert [name for name in names if split.in_val(name)] == ["d1/127.txt", "d3/73.txt"]
    pieces = [split.Piece(f"file{i}", "", 0, 1000) for i in range(6400)]
    train, val = split.split(pieces)
    assert 60 < len(val) < 140
    assert not {piece.name for piece in train} & {piece.name for piece in val}


@pytest.mark.parametrize("text", [
    "line\n" * 3999,
    "日本語🤗é" * 999,
    "🤗" * 3005 + "abc",
    "abcdefghijk" * 1000,
    "".join(map(chr, range(32, 9000))),
])
def test_one_file_is_one_document_whose_last_tenth_is_for_validation(tmp_path, text):
    (tmp_path / "notes.txt").write_bytes(text.encode())
    prepare.prepare(str(tmp_path / "notes.txt"), 300, out=str(tmp_path / "notes"))
    train, val = contents(tmp_path / "notes")
    assert train + val == tokenizer.END + text
    share = len(val.encode()) / len(text.encode())
    assert share == pytest.approx(0.1, abs=0.001)


def test_a_changed_file_is_another_corpus_and_its_name_tells_whose(tmp_path):
    (tmp_path / "notes.txt").write_text("some text")
    before = prepare.corpus_name(str(tmp_path / "notes.txt"))
    assert before.startswith("notes-")
    assert before == prepare.corpus_name(str(tmp_path / "notes.txt"))
    (tmp_path / "notes.txt").write_text("other text")
    assert prepare.corpus_name(str(tmp_path / "notes.txt")) != before


def test_the_folder_of_a_corpus_tells_its_vocabulary(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "HERE", "data")
    assert prepare.default_folder("c4", None) == "data/c4"
    assert prepare.default_folder("c4", 2048) == "data/c4-2048"
    assert prepare.default_folder("fineweb", 50257) == "data/fineweb"
    (tmp_path / "notes.txt").write_text("some text")
    name = prepare.corpus_name(str(tmp_path / "notes.txt"))
    assert prepare.default_folder(str(tmp_path / "notes.txt"), 300) == f"data/{name}-300"


def test_passages_are_encoded_in_groups_and_none_is_lost(monkeypatch):
    monkeypatch.setattr(build, "GROUP_CHARACTERS", 10)
    lengths = [3, 8, 11, 1, 1, 9, 10, 0, 40, 2]
    passages = [split.Passage(True, "x" * length) for length in lengths]
    grouped = list(build.groups(passages))
    assert sum(grouped, []) == passages
    for group in grouped:
        sizes = [len(passage.text) for passage in group]
        assert sum(sizes[:-1]) <= 10
        assert sum(sizes) > 10 or group is grouped[-1]


def test_a_complete_corpus_is_left_alone_and_a_broken_one_is_made_again(folder, tmp_path):
    out = tmp_path / "out"
    prepare.prepare(str(folder), 300, out=str(out))
    complete = digest(out)
    changed_at = os.stat(out / "train.bin").st_mtime_ns
    prepare.prepare(str(folder), out=str(out))
    assert os.stat(out / "train.bin").st_mtime_ns == changed_at
    with pytest.raises(UserError) as error:
        prepare.prepare(str(folder), 290, out=str(out))
    sentence(error, "vocabulary of 300, not 290")
    for name in ("train.bin", "val.bin", "vocab.tiktoken"):
        # The end of the vocabulary is a rank.
        (out / name).write_bytes((out / name).read_bytes()[:-3])
        prepare.prepare(str(folder), 300, out=str(out))
        assert digest(out) == complete


def test_other_files_in_the_output_folder_survive(folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    prepare.prepare(str(folder), 300, out=str(tmp_path / "out"))
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years of work"
    assert (tmp_path / "out" / "train.bin").exists()


def test_ready_shards_of_others_are_a_corpus_as_they_are(tmp_path):
    for name in ("x_train_1.bin", "x_train_2.bin", "x_val_0.bin"):
        make(tmp_path / name, np.arange(500))
    opened = open_corpus(str(tmp_path))
    assert (len(opened.train), len(opened.val), opened.vocabulary.size) == (2, 1, 50257)
    assert opened.folder == str(tmp_path)


def test_the_standard_library_is_a_corpus_of_sources_without_tests():
    names = [file.name for file in texts.list_files("stdlib")[0]]
    assert len(names) > 300             # Some distributions leave parts of it out.
    assert names == sorted(names)
    assert {"argparse.py", "json/decoder.py"} < set(names)
    unwanted = {"test", "tests", "site-packages"}
    assert not [name for name in names if unwanted & set(name.split("/")[:-1])]
    names = {file.name for file in texts.list_files("python")[0]}
    assert {"argparse.py", "numpy/__init__.py", "tqdm/std.py"} < names


def run(*args, **kwargs):
    script = os.path.join(ROOT, "data", "prepare.py")
    return subprocess.run([sys.executable, script, *map(str, args)],
                          capture_output=True, text=True, **kwargs)


def run_main(capsys, *args):
    """Runs prepare.py as run() does, but in this process: a new one takes a second to start."""
    code = prepare.main(list(map(str, args)))
    return code, capsys.readouterr().err


def test_prepare_says_what_is_wrong_in_one_sentence_exits_with_2_and_leaves_nothing(
        tmp_path, capsys):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "one.txt").write_text("x")
    (tmp_path / "none").mkdir()
    out = tmp_path / "out"
    cases = {
        ("nosuch",): "stdlib, python, shakespeare, c4, fineweb",
        (tmp_path / "empty.txt", "--out", out): "'empty.txt' is empty",
        (tmp_path / "none", "--out", out): "it has no files",
        (tmp_path / "one.txt", "--out", out): "has 1 bytes of text, which is too little",
        (tmp_path / "one.txt", "--vocab", 7): "a vocabulary of 7 is not possible",
        (tmp_path / "one.txt", "--vocab", 0): "a vocabulary of 0 is not possible",
        ("fineweb", "--vocab", 60000): "GPT-2's vocabulary, which has 50,257 entries, not 60000",
        ("c4", "--shards", 0): "0 shards are too few",
        (tmp_path / "one.txt", "--out", tmp_path / "one.txt" / "out"): "Not a directory",
    }
    for args, words in cases.items():
        code, message = run_main(capsys, *args)
        assert code == 2, message
        assert message.startswith("prepare: ")
        assert words in message
        assert message.count("\n") == 1, message
    assert sorted(os.listdir(tmp_path)) == ["empty.txt", "none", "one.txt"]
    done = run("nosuch", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("prepare: ") and done.stderr.count("\n") == 1, done.stderr
    code, message = run_main(capsys, "stdlib", "--vocabulary", "7")     # a typo
    assert code == 2 and message.startswith("prepare: ") and message.count("\n") == 1


@contextlib.contextmanager
def tmpfs(path, options):
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", options, "none", path]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount here")
    try:
        yield path
    finally:
        subprocess.run(["umount", path], check=True)


def test_a_full_or_read_only_disk_is_a_sentence_and_nothing_stays(tmp_path):
    (tmp_path / "big.txt").write_text("".join(map(str, range(200000))))
    with tmpfs(tmp_path / "full", "size=200k") as full:
        done = run(tmp_path / "big.txt", "--vocab", 300, "--out", full / "out")
        assert done.returncode == 2
        assert "No space left" in done.stderr
        assert done.stderr.count("\n") == 1
        assert os.listdir(full) == []
    with tmpfs(tmp_path / "locked", "ro") as locked:
        done = run(tmp_path / "big.txt", "--vocab", 300, "--out", locked / "out")
        assert done.returncode == 2
        assert "Read-only" in done.stderr
        assert done.stderr.count("\n") == 1


def test_an_interrupted_preparation_leaves_nothing(folder, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "groups", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare.prepare(str(folder), 300, out=str(tmp_path / "out"))
    assert os.listdir(tmp_path) == ["text"]


PEAK_MEMORY = """
import resource, sys
sys.path.insert(0, sys.argv[1])
from data import prepare

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

before = peak()
prepare.prepare(sys.argv[2], 1000, out=sys.argv[3])
print(peak() - before)
"""


def test_memory_stays_small_however_large_the_corpus(tmp_path):
    # Words that become tokens encode three times as fast as numbers, which are cut into pieces.
    text = "def training(memory):\n    return corpus + tokens\n" * 22_000
    for i in range(57):
        (tmp_path / f"{i}.py").write_text(f"y = {i}\n" + text)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) > 60e6
    args = [ROOT, str(tmp_path), str(tmp_path) + "-out"]
    done = subprocess.run([sys.executable, "-c", PEAK_MEMORY, *args],
                          stdout=subprocess.PIPE, check=True)
    assert int(done.stdout.split()[-1]) < 300           # MB; encoded all at once it would be 475


# ---- downloads, from a server on this machine

class Server(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        if self.path.startswith("/redirect"):
            self.send_response(302)
            self.send_header("Location", self.path.replace("/redirect", ""))
            if server.etag:
                self.send_header("X-Linked-Etag", f'"{server.etag}"')
            self.send_header("ETag", '"' + "cd" * 32 + '"')
            self.end_headers()
            return
        start = 0
        if "Range" in self.headers and server.ranges:
            start = int(self.headers["Range"][6:-1])
        server.starts.append(start)
        body = server.body
        self.send_response(server.status or self.status_of(start))
        if start:
            sent = f"{start}-{len(body) - 1}" if start < len(body) else "*"
            self.send_header("Content-Range", f"bytes {sent}/{len(body)}")
        self.send_header("Content-Length", str(len(body[start:])))
        self.send_header("ETag", '"' + "ab" * 32 + '"')             # as GitHub's: not a SHA-256
        self.end_headers()
        stop = start + server.cuts.pop(0) if server.cuts else len(body)
        self.wfile.write(body[start:stop])

    def status_of(self, start):
        if start >= len(self.server.body):
            return 416
        return 206 if start else 200

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download.time, "sleep", lambda seconds: None)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        server.body = bytes(range(256)) * 4000
        server.starts = []              # the first byte of each request
        server.cuts = []                # after how many bytes the next answers break off
        server.ranges = True
        server.status = 0
        server.etag = ""
        server.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(.01,), daemon=True).start()
        yield server
        server.shutdown()


def get(server, path, url="/file", **kwargs):
    download.download(server.url + url, str(path / "file"), **kwargs)
    return (path / "file").read_bytes()


def test_a_download_arrives_whole_and_is_not_repeated(server, tmp_path):
    for _ in range(2):
        assert get(server, tmp_path / "new") == server.body
    assert server.starts == [0]
    assert os.listdir(tmp_path / "new") == ["file"]


def test_a_broken_download_goes_on_where_it_stopped(server, tmp_path):
    server.cuts = [300_000, 1]
    assert get(server, tmp_path) == server.body
    assert server.starts == [0, 300_000, 300_001]


def test_a_later_run_goes_on_with_the_part(server, tmp_path):
    (tmp_path / "file.part").write_bytes(server.body[:500_000])
    assert get(server, tmp_path) == server.body
    assert server.starts == [500_000]
    assert os.listdir(tmp_path) == ["file"]


def test_a_server_that_ignores_ranges_sends_everything_again(server, tmp_path):
    server.cuts = [300_000]
    server.ranges = False
    assert get(server, tmp_path) == server.body
    assert server.starts == [0, 0]


def test_a_part_longer_than_the_file_is_thrown_away(server, tmp_path):
    (tmp_path / "file.part").write_bytes(bytes(2_000_000))
    assert get(server, tmp_path) == server.body
    assert server.starts == [2_000_000, 0]


def test_a_part_that_is_complete_is_not_downloaded_again(server, tmp_path):
    (tmp_path / "file.part").write_bytes(server.body)
    good = hashlib.sha256(server.body).hexdigest()
    assert get(server, tmp_path, sha256=good) == server.body
    assert server.starts == [len(server.body)]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file.part").write_bytes(server.body)
    with pytest.raises(UserError) as error:
        get(server, tmp_path / "other", sha256="0" * 64)
    sentence(error, "SHA-256", "try again")


def test_a_download_that_never_completes_keeps_its_part_and_says_where(server, tmp_path):
    server.cuts = [100, 100, 100, 100]
    with pytest.raises(UserError) as error:
        get(server, tmp_path)
    sentence(error, server.url, "broke off after 400 of 1,024,000 bytes", "kept in", "file.part")
    assert (tmp_path / "file.part").read_bytes() == server.body[:400]
    assert len(os.listdir(tmp_path)) == 1


def test_a_checksum_given_or_published_on_a_redirect_is_checked(server, tmp_path):
    good = hashlib.sha256(server.body).hexdigest()
    server.etag = good
    assert get(server, tmp_path / "a", "/redirect/file") == server.body
    assert get(server, tmp_path / "b", sha256=good) == server.body
    server.etag = "0" * 64
    for name, url, sha256 in (("c", "/redirect/file", None), ("d", "/file", "0" * 64)):
        with pytest.raises(UserError) as error:
            get(server, tmp_path / name, url, sha256=sha256)
        sentence(error, "SHA-256", "try again")
        assert os.listdir(tmp_path / name) == []


def test_an_etag_is_no_checksum(server, tmp_path):
    assert get(server, tmp_path / "a") == server.body
    assert get(server, tmp_path / "b", "/redirect/file") == server.body


def test_each_try_waits_a_second_longer_than_the_one_before(server, tmp_path, monkeypatch):
    waited = []
    monkeypatch.setattr(download.time, "sleep", waited.append)
    server.status = 503
    with pytest.raises(UserError):
        get(server, tmp_path)
    assert waited == [0, 1, 2, 3]


def test_without_a_network_one_sentence_says_what_works_offline(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(download.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(prepare, "HERE", str(tmp_path))
    monkeypatch.setattr(web, "URLS", {name: "http://127.0.0.1:9/{}" for name in web.URLS})
    for name in web.URLS:
        code, message = run_main(capsys, name)
        assert code == 2
        assert message.count("\n") == 1
        assert message.startswith("prepare: cannot download http://127.0.0.1:9/")
        assert "the offline corpora are stdlib, python, or a file of yours" in message
    assert os.listdir(tmp_path) == []


def test_what_a_server_does_not_have_is_said_at_once_and_its_trouble_is_waited_out(
        server, tmp_path):
    server.status = 404
    with pytest.raises(UserError) as error:
        get(server, tmp_path)
    sentence(error, "404")
    server.starts.clear()
    server.status = 503
    with pytest.raises(UserError) as error:
        get(server, tmp_path)
    sentence(error, "503")
    assert len(server.starts) == download.TRIES
    assert os.listdir(tmp_path) == []


def test_the_corpora_from_the_network_are_made_of_what_it_sends(server, tmp_path, monkeypatch):
    urls = {name: f"{server.url}/{name}-{{}}" for name in web.URLS}
    monkeypatch.setattr(prepare, "HERE", str(tmp_path))
    monkeypatch.setattr(web, "URLS", urls)
    pages = [f"page {i} of the web, \ud800" for i in range(500)]
    lines = [json.dumps({"text": page}) for page in pages]
    server.body = gzip.compress("\n".join(lines).encode())
    train, val = contents(prepare.prepare("c4", 300))
    expected = "".join(tokenizer.END + page.replace("\ud800", "?") for page in pages)
    assert train == val == expected
    before = digest(tmp_path / "c4-300")
    # A later shard has other words, and the vocabulary of the first.
    server.body = gzip.compress(json.dumps({"text": "another web, " * 900}).encode())
    train, val = prepared.files(prepare.prepare("c4", 300, shards=3))
    assert len(open_tokens(train)) == 3
    assert len(open_tokens(val)) == 1
    # What was there is kept, apart from the record.
    assert len(set(before) - set(digest(tmp_path / "c4-300"))) == 1

    server.body = server.body[:-9]
    train = tmp_path / "downloads" / "c4-train.00000-of-01024.json.gz"
    train.write_bytes(train.read_bytes()[:-9])
    with pytest.raises(UserError) as error:
        prepare.prepare("c4", 301)
    sentence(error, train.name, "is damaged")

    server.body = b"To be, or not to be\n" * 600
    sha256 = hashlib.sha256(server.body).hexdigest()
    monkeypatch.setattr(web, "SHAKESPEARE_SHA256", sha256)
    shakespeare = contents(prepare.prepare("shakespeare", 300))
    assert "".join(shakespeare) == tokenizer.END + server.body.decode()

    with open(make(tmp_path / "t.bin", np.arange(5000)), "rb") as file:
        server.body = file.read()
    train, val = prepared.files(prepare.prepare("fineweb", shards=2))
    assert len(open_tokens(train)) == 2
    assert len(open_tokens(val)) == 1
    counts = prepared.read_record(str(tmp_path / "fineweb"))["counts"]
    assert counts == {f"fineweb_{part}.bin": [5000, None]
                      for part in ("train_000001", "train_000002", "val_000000")}
