"""
Facts about a corpus as a whole: which names are data, what of them is text, how it is split, whose
token files are refused, the vocabulary without the corpus, and what is cleaned.

Nothing here needs a network.
"""
import codecs
import dataclasses
import errno
import fcntl
import gzip
import itertools
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import types

import numpy as np
import pytest

from data import (
    build, clean, facts, layout, locks, prepare, prepared, signals, split, texts, tokenizer, tokens)
from data.bpe import BYTES
from data.corpus import Corpus, open_corpus
from data.files import Stopped, UserError
from data.texts import END

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PREPARE = os.path.join(ROOT, "data", "prepare.py")


def sentence(error, *words):
    """The error is one sentence for the user, with these words in it."""
    text = str(error.value)
    assert "\n" not in text, text
    assert all(word in text for word in words), text


def refused(function, *args, words=(), **kwargs):
    with pytest.raises(UserError) as error:
        function(*args, **kwargs)
    sentence(error, *words)


def bpe_of_bytes():
    return {token: rank for rank, token in enumerate(BYTES)}


def write_tokens(path, ids, vocab=50257):
    with tokens.TokenWriter(str(path), vocab) as out:
        out.append(ids)


@pytest.fixture
def folder(tmp_path):
    """A folder of token files without a vocabulary: GPT-2's, then."""
    folder = tmp_path / "tokens"
    folder.mkdir()
    rng = np.random.default_rng(0)
    write_tokens(folder / "train.bin", rng.integers(50257, size=5000))
    write_tokens(folder / "val.bin", rng.integers(50257, size=500))
    return folder


@pytest.fixture
def notes(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("".join(f"note {i}: {i * i} is a square\n" for i in range(2000)))
    return path


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The folder that stands for data/ in a test."""
    monkeypatch.setattr(prepare, "HERE", str(tmp_path / "data"))
    return tmp_path / "data"


# ---- fingerprints and what is kept beside token files

def test_the_fingerprint_tells_contents_apart_and_nothing_else(folder, tmp_path):
    first = open_corpus(str(folder)).fingerprint
    assert len(first) == 16 and int(first, 16) >= 0
    shutil.copytree(folder, tmp_path / "copy")
    os.utime(tmp_path / "copy" / "train.bin", (0, 0))
    assert open_corpus(str(tmp_path / "copy")).fingerprint == first
    content = bytearray((folder / "train.bin").read_bytes())
    content[2000] ^= 1
    (folder / "train.bin").write_bytes(content)
    changed = open_corpus(str(folder)).fingerprint
    # Which file is for training matters, too.
    (folder / "train.bin").rename(folder / "x")
    (folder / "val.bin").rename(folder / "train.bin")
    (folder / "x").rename(folder / "val.bin")
    assert len({first, changed, open_corpus(str(folder)).fingerprint}) == 3


def test_a_token_file_is_read_once_until_it_changes(folder, monkeypatch):
    first = open_corpus(str(folder)).fingerprint
    hashed = []

    def hash_of(path):
        hashed.append(os.path.basename(path))
        return "0" * 64

    monkeypatch.setattr(facts, "sha256_of", hash_of)
    assert open_corpus(str(folder)).fingerprint == first
    assert hashed == []
    os.utime(folder / "val.bin", (0, 0))
    open_corpus(str(folder))
    assert hashed == ["val.bin"]
    for damage in (b"", b"[1]", b'{"train.bin": 3}', b'{"train.bin": [1, 2, 3, "x"]}', b"\xff",
                   b'{"train.bin": [1e400, 1, "a", 1]}', b"[" * 200_000):
        (folder / prepared.FACTS).write_bytes(damage)
        hashed.clear()
        open_corpus(str(folder))
        assert hashed == ["train.bin", "val.bin"], damage


def test_a_folder_that_may_not_be_written_is_read_each_time_without_a_word(folder, capfd):
    first = open_corpus(str(folder))
    os.remove(folder / prepared.FACTS)
    (folder / prepared.FACTS).mkdir()           # root may write everywhere, but not here
    for _ in range(2):
        assert open_corpus(str(folder)).fingerprint == first.fingerprint
    assert sorted(os.listdir(folder)) == [prepared.FACTS, "train.bin", "val.bin"]
    assert capfd.readouterr() == ("", "")


def test_a_token_outside_the_vocabulary_is_found_when_the_corpus_is_opened(folder, monkeypatch):
    monkeypatch.setattr(facts, "CHUNK_TOKENS", 1000)
    ids = np.arange(5000)
    ids[4321] = 50257
    write_tokens(folder / "train.bin", ids, 60000)
    for _ in range(2):                          # also from what is kept
        refused(open_corpus, str(folder), words=["token 50257 at position 4,321", "train.bin",
                                                 "50,257 entries"])


def test_token_files_that_have_changed_since_they_were_prepared_are_refused(notes, here):
    folder = open_corpus(str(notes)).folder
    # Without their vocabulary they would be taken for GPT-2's.
    os.rename(os.path.join(folder, "vocab.tiktoken"), os.path.join(folder, "x"))
    refused(open_corpus, folder, words=["has lost its vocab.tiktoken"])
    os.rename(os.path.join(folder, "x"), os.path.join(folder, "vocab.tiktoken"))
    path = os.path.join(folder, "train.bin")
    with open(path, "r+b") as file:
        file.seek(3000)
        file.write(b"\1")
    refused(open_corpus, str(notes), words=[folder, "have changed since they were prepared"])


def test_a_vocabulary_that_has_changed_since_it_was_prepared_is_refused(notes, here):
    folder = open_corpus(str(notes), 300).folder
    path = os.path.join(folder, "vocab.tiktoken")
    with open(path) as file:
        lines = file.read().splitlines()
    first, second = lines[-2].split()[0], lines[-1].split()[0]
    swapped = [*lines[:-2], f"{second} {len(lines) - 2}", f"{first} {len(lines) - 1}"]
    longer = [*lines, f"AAECAw== {len(lines)}"]
    for changed in (swapped, longer):
        tokenizer.save(tokenizer.from_lines(changed), path)
        for name in (folder, str(notes)):
            refused(open_corpus, name, 300 if name != folder else None,
                    words=[f"the vocab.tiktoken in {folder} has changed"])
    # An older record does not know the vocabulary.
    record = prepared.read_record(folder)
    del record["vocabulary"]
    with open(os.path.join(folder, "corpus.json"), "w") as file:
        json.dump(record, file)
    assert open_corpus(folder).vocabulary.size == len(longer) + 1


def test_an_edited_text_is_another_corpus_and_the_old_one_stays_usable(notes, here):
    before = open_corpus(str(notes))
    again = open_corpus(str(notes))
    assert (again.folder, again.fingerprint) == (before.folder, before.fingerprint)
    notes.write_text(notes.read_text() + "one more note\n")
    after = open_corpus(str(notes))
    assert after.folder != before.folder
    assert after.fingerprint != before.fingerprint
    old = open_corpus(before.folder)
    assert old.fingerprint == before.fingerprint
    assert old.vocabulary.fingerprint == before.vocabulary.fingerprint


def test_files_that_changed_places_are_another_corpus(tmp_path):
    for name in "ab":
        (tmp_path / name).write_text(name)
        os.utime(tmp_path / name, (1, 1))
    before = prepare.corpus_name(str(tmp_path))
    (tmp_path / "b").rename(tmp_path / "c")
    assert prepare.corpus_name(str(tmp_path)) != before


# ---- vocabularies

RANKS = {bytes([value]): value for value in range(256)} | {b"ab": 256, b"abc": 257}
VOCABULARIES = {
    "own": tokenizer.Own(RANKS),
    "characters": tokenizer.Characters(5, {0: "a", 1: "b", 2: "\n", 4: "é"}),
    "gpt2": tokenizer.Gpt2(),
    "llama3": tokenizer.llama3(),
    "unknown": tokenizer.Vocabulary(777),
}


@pytest.mark.parametrize("name", VOCABULARIES)
def test_a_vocabulary_comes_back_from_its_state_which_is_made_of_plain_types(name):
    vocabulary = VOCABULARIES[name]
    state = json.loads(json.dumps(vocabulary.state()))
    assert state == vocabulary.state()
    again = tokenizer.vocabulary_from_state(state)
    assert type(again) is type(vocabulary)
    assert (again.size, again.fingerprint) == (vocabulary.size, vocabulary.fingerprint)
    if name in ("own", "characters"):
        assert again.decode(again.encode("abba\nab")) == "abba\nab"
        assert again.encode("abba\nab") == vocabulary.encode("abba\nab")


def test_every_vocabulary_has_a_fingerprint_of_its_own():
    same_size = {token: rank for token, rank in RANKS.items() if rank < 257} | {b"abd": 257}
    others = [tokenizer.Vocabulary(778), tokenizer.Own({**RANKS, b"abcd": 258}),
              tokenizer.Own(same_size),
              tokenizer.Characters(5, {0: "a", 1: "b", 2: "\n", 3: "é"})]
    every = [*VOCABULARIES.values(), *others]
    assert len({vocabulary.fingerprint for vocabulary in every}) == len(every)


@pytest.mark.parametrize("state", [
    None, {}, {"kind": "bpe"}, {"kind": "x", "size": 3}, {"kind": "bpe", "tokens": "? 1"},
    {"kind": "characters", "size": 3, "strings": 7},
    {"kind": "characters", "size": 3, "strings": []},
    {"kind": "characters", "size": 3, "strings": [[0, ""]]}, {"kind": ["bpe"], "size": 3}, "text",
])
def test_a_damaged_state_is_refused_in_a_sentence(state):
    refused(tokenizer.vocabulary_from_state, state, words=["the vocabulary in the checkpoint"])


def test_text_becomes_ids_and_ids_text():
    own, characters = VOCABULARIES["own"], VOCABULARIES["characters"]
    assert own.size == 259
    assert own.encode("abcab") == [257, 256]
    assert own.encode(f"a{END}b{END}") == [97, 258, 98, 258]
    assert own.encode("") == [258]
    assert own.decode([-1, 97, 258, 259, 10**9]) == f"a{END}"
    assert own.decode([0xE9]) == "\ufffd"
    assert characters.encode("é\nab") == [4, 2, 0, 1]
    assert characters.encode("") == [0]
    assert characters.decode([4, 3, 0, 99, -1]) == "éa"
    refused(characters.encode, "abx", words=["'x' is not in the vocabulary"])
    words = tokenizer.Characters(3, {0: "a", 1: "aa", 2: "b"})
    assert words.encode("aaab") == [1, 0, 2]            # the longest that fits


def test_gpt2s_vocabulary_is_not_downloaded_before_a_text_needs_it(folder, monkeypatch):
    def offline(name):
        raise ConnectionError("no network")

    monkeypatch.setattr(tokenizer.tiktoken, "get_encoding", offline)
    vocabulary = open_corpus(str(folder)).vocabulary
    assert vocabulary.size == 50257
    assert vocabulary.fingerprint == tokenizer.vocabulary_from_state({"kind": "gpt2"}).fingerprint
    for use in (lambda: vocabulary.encode("text"), lambda: vocabulary.decode([1])):
        refused(use, words=["GPT-2's vocabulary cannot be downloaded", "connect once"])


def test_tokens_of_four_bytes_are_llama_3s_and_have_no_text_here(folder):
    write_tokens(folder / "train.bin", np.arange(128256), 128256)
    vocabulary = open_corpus(str(folder)).vocabulary
    assert vocabulary.size == 128256
    for use in (lambda: vocabulary.encode("text"), lambda: vocabulary.decode([1])):
        refused(use, words=["there is no text", "Llama 3's"])


def test_vocab_is_honoured_or_refused_for_a_folder_of_tokens(folder, notes, tmp_path):
    assert open_corpus(str(folder), 50304).vocabulary.size == 50304
    refused(open_corpus(str(folder), 50304).vocabulary.encode, "text", words=["came without one"])
    refused(open_corpus, str(folder), 50000, words=["50,000 entries"])
    for vocab in (-1, 0):
        refused(open_corpus, str(folder), vocab, words=[f"vocabulary of {vocab} is not possible"])
    assert type(open_corpus(str(folder), 50257).vocabulary) is tokenizer.Gpt2
    made = prepare.prepare(str(notes), 300, out=str(tmp_path / "made"))
    assert open_corpus(made, 300).vocabulary.size == 300
    refused(open_corpus, made, 301, words=["a vocabulary of 300, not 301"])


def test_a_text_with_too_few_pairs_for_its_vocabulary_can_be_opened_again(notes, here):
    # The second time a run resumes: it must not be told that its vocabulary has another size.
    sizes = [open_corpus(str(notes), 4000).vocabulary.size for _ in range(2)]
    assert sizes[0] == sizes[1] < 4000
    folder = open_corpus(str(notes), 4000).folder
    assert open_corpus(folder, 4000).vocabulary.size == sizes[0]
    refused(open_corpus, folder, 3999, words=["not 3,999"])


# ---- bits per byte

def predicted_text(corpus):
    """The bytes of the text that validation predicts, decoded id by id, and the number of ids."""
    end = corpus.vocabulary.size - 1
    text = b""
    n_targets = 0
    for _, y in tokens.val_batches(corpus.val, 3, 64):
        ids = y[y >= 0].tolist()
        n_targets += len(ids)
        text += corpus.vocabulary.encoding.decode_bytes([i for i in ids if i != end])
    return text, n_targets


def test_bits_per_byte_are_the_loss_of_all_predicted_tokens_over_the_bytes_of_their_text(tmp_path):
    (tmp_path / "text").mkdir()
    for i in range(40):
        words = f"Größe {i}: {i * i} Füße, 長さ {i ** 3} 🙂\n" * (10 + i)
        (tmp_path / "text" / f"{i}.txt").write_text(words, encoding="utf-8")
    opened = open_corpus(prepare.prepare(str(tmp_path / "text"), 400, out=str(tmp_path / "out")))
    text, n_targets = predicted_text(opened)
    assert END.encode() not in text and len(text) > 2000
    # The ids begin with END, which nothing predicts. Another END is predicted.
    end = opened.vocabulary.size - 1
    ends = sum(int((shard == end).sum()) for shard in opened.val)
    assert ends >= 2 and n_targets == sum(map(len, opened.val)) - 1
    assert opened.bits_per_byte(2.5) == pytest.approx(
        2.5 * n_targets / math.log(2) / len(text), rel=1e-12)
    assert opened.bits_per_byte(None) is None


def test_a_model_that_knows_nothing_needs_the_same_bits_per_byte_with_any_vocabulary(tmp_path):
    # Bytes at random have no pairs that occur often. A model of the 256 bytes needs 8 bits for
    # each, and so does one of the pairs of letters that needs 16 for each pair.
    letters = "".join(random.Random(0).choices("abcdefghijklmnop", k=4000))
    bits = []
    for n_letters in (1, 2):
        folder = tmp_path / str(n_letters)
        folder.mkdir()
        words = sorted(map("".join, itertools.product("abcdefghijklmnop", repeat=n_letters)))
        (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": len(words), "itos": words}))
        ids = [words.index(letters[i:i + n_letters]) for i in range(0, len(letters), n_letters)]
        for name in ("train.bin", "val.bin"):
            write_tokens(folder / name, np.array(ids))
        bits.append(open_corpus(str(folder)).bits_per_byte(math.log(len(words))))
    assert bits == pytest.approx([4, 4], rel=1e-12)


def test_the_bytes_of_characters_are_those_of_utf8(folder):
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 4, "itos": ["a", "é", "長", "🙂"]}))
    write_tokens(folder / "train.bin", np.array([0, 1, 2, 3] * 50), 4)
    write_tokens(folder / "val.bin", np.array([3, 0, 1, 2, 3, 0]), 4)
    assert open_corpus(str(folder)).bytes_per_token == (1 + 2 + 3 + 4 + 1) / 5
    meta = {"vocab_size": 5, "itos": ["a", "é", "長", "🙂"]}      # Nobody knows what id 4 is.
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    assert open_corpus(str(folder)).bits_per_byte(2.) is None


def test_every_shard_counts_but_for_its_first_token_in_pieces_of_any_size(tmp_path, monkeypatch):
    letters = ["a", "é", "長", "🙂"]
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 4, "itos": letters}))
    write_tokens(tmp_path / "it_train_0.bin", np.array([0, 1, 2, 3] * 50), 4)
    shards = [np.arange(9 + i) * 7 % 4 for i in range(3)]
    for i, ids in enumerate(shards):
        write_tokens(tmp_path / f"it_val_{i}.bin", ids, 4)
    predicted = [len(letters[i].encode()) for ids in shards for i in ids[1:]]
    for chunk in (1, 3, 100):
        monkeypatch.setattr(facts, "CHUNK_TOKENS", chunk)
        opened = open_corpus(str(tmp_path))
        assert opened.bytes_per_token == sum(predicted) / len(predicted)


def test_bits_per_byte_are_not_known_where_the_vocabulary_is_not(folder, monkeypatch):
    def offline(name):
        raise ConnectionError("no network")

    with monkeypatch.context() as patch:
        patch.setattr(tokenizer.tiktoken, "get_encoding", offline)
        assert open_corpus(str(folder)).bits_per_byte(3.) is None
        assert open_corpus(str(folder), 50304).bits_per_byte(3.) is None
    write_tokens(folder / "train.bin", np.arange(128256), 128256)
    assert open_corpus(str(folder)).bits_per_byte(3.) is None       # Llama 3's
    nothing = Corpus("", [], [np.zeros(5, np.uint16)], tokenizer.Own(bpe_of_bytes()), "")
    assert nothing.bytes_per_token == 1
    only_ends = dataclasses.replace(nothing, val=[np.full(5, 256, np.uint16)])
    assert only_ends.bytes_per_token is None


def test_of_gpt2s_vocabulary_the_end_of_a_text_has_no_bytes(folder, monkeypatch):
    # Stands for GPT-2's, which a test cannot download: id i has i % 7 + 1 bytes.
    gpt2 = types.SimpleNamespace(
        eot_token=50256, decode_single_token_bytes=lambda i: b"x" * (i % 7 + 1))
    monkeypatch.setattr(tokenizer.tiktoken, "get_encoding", lambda name: gpt2)
    ids = np.fromfile(folder / "val.bin", np.uint16, offset=1024).astype(int)
    ids[[0, 100, 499]] = 50256
    write_tokens(folder / "val.bin", ids)
    lengths = np.where(ids == 50256, 0, ids % 7 + 1)[1:]
    assert open_corpus(str(folder)).bytes_per_token == lengths.sum() / 499


# ---- nanoGPT's meta.pkl

def test_nanogpts_meta_is_honoured(folder):
    letters = "\n !abcdefghij"
    ids = [letters.index(c) for c in "a bad cafe!\n" * 100]
    for name in ("train.bin", "val.bin"):
        np.array(ids, np.uint16).tofile(folder / name)
    meta = {"vocab_size": len(letters), "itos": dict(enumerate(letters)),
            "stoi": {c: i for i, c in enumerate(letters)}}
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        (folder / "meta.pkl").write_bytes(pickle.dumps(meta, protocol))
        vocabulary = open_corpus(str(folder)).vocabulary
        assert vocabulary.size == 13
        assert vocabulary.decode(vocabulary.encode("a bad cafe!")) == "a bad cafe!"
    assert open_corpus(str(folder), 13).vocabulary.size == 13
    refused(open_corpus, str(folder), 50257, words=["a vocabulary of 13, not 50,257"])
    meta["vocab_size"] = 12
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    refused(open_corpus, str(folder), words=["id 12 in itos, but vocab_size is 12"])
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 8}))
    refused(open_corpus, str(folder), words=["token 8 at position 8 of", "8 entries"])


class Evil:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize("meta", [
    pickle.dumps(Evil()),
    pickle.dumps({"vocab_size": 3, "itos": Evil()}),
    pickle.dumps({"vocab_size": np.int64(3)}),
    pickle.dumps({"vocab_size": 0}),
    pickle.dumps({"vocab_size": True}),
    pickle.dumps({"vocab_size": 1e9}),
    pickle.dumps({"vocab_size": 3, "itos": {"a": 0}}),
    pickle.dumps({"vocab_size": 3, "itos": {0: ""}}),
    pickle.dumps({"vocab_size": 3, "itos": {}}),
    pickle.dumps({"vocab_size": 3, "itos": []}),
    pickle.dumps([1]),
    pickle.dumps({"vocab_size": 3})[:-5],
    b"",
    b"text",
    b"cos\nsystem\n(S'touch executed'\ntR.",
    b"\x80\4\x95\xff\xff\xff\xff\xff\xff\xff\x7f",
])
def test_a_meta_that_is_no_plain_data_is_refused_and_never_executed(
        folder, meta, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (folder / "meta.pkl").write_bytes(meta)
    refused(open_corpus, str(folder), words=["meta.pkl"])
    assert not (tmp_path / "executed").exists()


# ---- token files of other types

def token_streams():
    """Token ids as real corpora have them, and as odd ones might: (vocabulary, ids)."""
    for seed in range(6):
        rng = np.random.default_rng(seed)
        for vocab in (2, 3, 5, 16, 65, 256, 257, 300, 1000, 2048, 4096, 32000, 50257, 65536):
            n = int(rng.integers(2, 40_000)) // 2 * 2
            zipf = (rng.zipf(1.2, n) - 1) % vocab
            yield vocab, rng.integers(vocab, size=n)
            yield vocab, zipf
            yield vocab, rng.permutation(vocab)[zipf]
            yield vocab, np.where(rng.random(n) < 0.98, 0, zipf)                # many zeros
            yield vocab, np.repeat(zipf, rng.integers(1, 200, n))[:n]           # long runs
            yield vocab, np.r_[np.full(n // 2, zipf[0]), zipf[n // 2:]]         # a constant stretch
            yield vocab, np.full(n, zipf[0])
            yield vocab, np.sort(zipf)


def test_real_tokens_are_never_taken_for_another_type():
    count = 0
    for vocab, ids in token_streams():
        head = ids.astype("<u2").tobytes()[:layout.LOOK_BYTES]
        assert layout.type_of(head) is None, (vocab, ids[:20])
        count += 1
    assert count == 6 * 14 * 8
    # A run of one token is a whole number in float32 if its lower bits are 0.
    for token in range(0, 65536, 64):
        assert layout.type_of(np.full(100, token, "<u2").tobytes()) is None, token
    # In a binary file most words may be 0.
    rng = np.random.default_rng(1)
    for rarity in np.geomspace(1e-4, 0.5, 300):
        words = rng.random(layout.LOOK_BYTES // 2) < rarity
        assert layout.type_of(words.astype("<u2").tobytes()) is None, rarity


@pytest.mark.parametrize("dtype, name, most", [
    ("<i8", "int64", 10**6), ("<u8", "int64", 10**6), ("<i4", "int32 or uint32", 10**6),
    ("<u4", "int32 or uint32", 10**6), ("<f4", "float32", 65536), ("<f8", "float64", 65536),
    (">i8", "big-endian", 65536), (">i4", "big-endian", 65536), (">u2", "big-endian", 256),
    ("u1", "uint8", 128),
])
def test_tokens_of_another_type_are_noticed(dtype, name, most, tmp_path):
    for seed in range(10):
        rng = np.random.default_rng(seed)
        for vocab in (2, 65, 256, 4096, 50257, 128256):
            if vocab > most or (dtype in ("u1", ">u2") and vocab < 65):
                continue
            ids = (rng.zipf(1.2, 3000) - 1) % vocab
            if dtype == "u1":
                ids = rng.integers(vocab, size=3000)
            if vocab > 65536:
                ids = rng.permutation(vocab)[ids]       # a large vocabulary is used everywhere
            path = str(tmp_path / "train.bin")
            ids.astype(dtype).tofile(path)
            refused(layout.open_file, path, words=["train.bin", f"looks like {name}", "uint16"])


def test_a_type_is_noticed_from_32_tokens_on_and_not_in_a_file_of_odd_length(tmp_path):
    path = str(tmp_path / "train.bin")
    for n, is_noticed in ((64, True), (32, True), (20, False)):
        np.arange(1, n + 1).tofile(path)
        if is_noticed:
            refused(layout.open_file, path, words=["int64"])
        else:
            layout.open_file(path)
    # 2-byte tokens, an odd number of them, every second one a separator with id 0
    np.array([7, 0] * 500 + [7], np.uint16).tofile(path)
    layout.open_file(path)
    # The same with another id, in a vocabulary that is too small to fill the lower half of a number
    np.array([[token, 1] for token in range(2, 4002)], np.uint16).tofile(path)
    layout.open_file(path)


@pytest.mark.parametrize("magic", [20240520, 20240801])
def test_a_flipped_bit_in_the_first_number_is_noticed(magic, tmp_path):
    path = tmp_path / "train.bin"
    version = layout.LAYOUTS[magic][0]
    for bit in range(32):
        header = np.zeros(256, "<u4")
        header[:3] = magic ^ 1 << bit, version, 100
        path.write_bytes(header.tobytes() + bytes(400 if magic == 20240801 else 200))
        flipped = magic ^ 1 << bit
        known = layout.OTHER_FILES.get(flipped, "one bit off")
        refused(layout.open_file, str(path), words=["train.bin", known])


def test_other_files_of_llm_c_and_big_endian_ones_are_named(tmp_path):
    path = tmp_path / "train.bin"
    for magic, name in layout.OTHER_FILES.items():
        path.write_bytes(np.array([magic, 1, 3, *[0] * 400], "<i4").tobytes())
        refused(layout.open_file, str(path), words=[name, "of llm.c"])
    for magic in layout.LAYOUTS:
        path.write_bytes(np.array([magic, 1, 3, *[0] * 400], ">i4").tobytes())
        refused(layout.open_file, str(path), words=["big-endian"])


def test_training_tokens_without_validation_tokens_are_refused_by_name(folder):
    (folder / "val.bin").rename(folder / "kept")
    refused(open_corpus, str(folder), words=["train.bin and no val.bin"])
    (folder / "kept").rename(folder / "val.bin")
    (folder / "train.bin").rename(folder / "kept")
    refused(open_corpus, str(folder), words=["val.bin and no train.bin"])


# ---- the split

def widely_different_sizes(rng):
    n = rng.randint(1, 30)
    return [int(10 ** rng.uniform(0, rng.choice((3, 5, 6.5)))) for _ in range(n)]


def test_validation_gets_a_fair_share_whatever_the_sizes_of_the_files():
    rng = random.Random(0)
    for trial in range(3000):
        sizes = widely_different_sizes(rng)
        files = [texts.TextFile(f"{trial}/{i}", "", size, 0) for i, size in enumerate(sizes)]
        pieces = split.cut(files)
        train, val = split.split(pieces)
        share = split.size_of(val) / sum(sizes)
        assert split.size_of(train) + split.size_of(val) == sum(sizes)
        if sum(sizes) >= build.LEAST_TEXT_BYTES:
            assert 0.005 <= share <= 0.12, (sizes, share)
            assert split.size_of(val) >= min(split.LEAST_BYTES, 0.1 * sum(sizes) - 1)
        # Every byte is in one of the two, once and in order.
        for part in (train, val):
            assert part == sorted(part, key=pieces_in_order(files))


def pieces_in_order(files):
    order = {file.name: i for i, file in enumerate(files)}
    return lambda piece: (order[piece.name], piece.start)


def test_two_files_of_any_sizes_give_validation_tokens(tmp_path):
    rng = random.Random(1)
    for trial in range(8):
        root = tmp_path / str(trial)
        root.mkdir()
        for name in ("one", "two"):
            words = " ".join(str(rng.random()) for _ in range(int(10 ** rng.uniform(1, 4))))
            (root / f"{name}.txt").write_text(words + " " * 1_000)
        corpus = open_corpus(prepare.prepare(str(root), 300, out=str(tmp_path / f"{trial}-out")))
        counts = prepared.read_record(corpus.folder)["counts"]
        shares = [counts[name][1] for name in ("val.bin", "train.bin")]
        assert 0.005 <= shares[0] / sum(shares) <= 0.13


def test_too_little_text_is_one_sentence(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 999)
    refused(prepare.prepare, str(tmp_path), out=str(tmp_path / "out"),
            words=["has 999 bytes of text", "give 1,000 or more"])


def test_a_cut_anywhere_loses_nothing(tmp_path):
    text = f"é{END}日本{END}{END}🤗<|endof{END}|>\n"
    raw = text.encode()
    (tmp_path / "a").write_bytes(raw)
    # What may not be cut: each END, and each character outside of them.
    parts = re.findall(f"{re.escape(END)}|.", text, re.S)
    starts = list(itertools.accumulate([len(part.encode()) for part in parts], initial=0))
    for i in range(len(raw) + 1):
        head, *_ = split.read([split.Piece("a", str(tmp_path / "a"), 0, i)])
        assert len(head.text.encode()) == min(start for start in starts if start >= i)
        for j in (i, i + 1, len(raw)):
            bounds = [0, i, min(j, len(raw)), len(raw)]
            pairs = zip(bounds, bounds[1:])
            pieces = [split.Piece("a", str(tmp_path / "a"), *pair) for pair in pairs]
            passages = [passage.text for passage in split.read(pieces)]
            assert "".join(passages) == text
            assert sum(passage.count(END) for passage in passages) == 4


def test_end_of_text_in_a_text_separates_documents(tmp_path):
    stories = [f"Story {i} of a cat.\n" * 20 for i in range(50)]
    path = tmp_path / "stories.txt"
    path.write_text(END.join(stories))
    opened = open_corpus(prepare.prepare(str(path), 300, out=str(tmp_path / "out")))
    ids = np.concatenate([*opened.train, *opened.val]).tolist()
    end = opened.vocabulary.size - 1
    assert ids.count(end) == 50                         # the first stands before the first story
    assert ids[0] == end
    assert opened.vocabulary.decode(ids) == END + END.join(stories)
    # A text that begins with one gets no second.
    path.write_text(END + END.join(stories))
    opened = open_corpus(prepare.prepare(str(path), 300, out=str(tmp_path / "again")))
    ids = np.concatenate([*opened.train, *opened.val]).tolist()
    assert opened.vocabulary.decode(ids) == END + END.join(stories)


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path):
    (tmp_path / "a").write_bytes(b"caf\xe9 au lait")
    pieces = [split.Piece("a", str(tmp_path / "a"), 0, 12)]
    refused(list, split.read(pieces), words=["has changed while it was read"])


def test_a_byte_order_mark_is_not_part_of_a_text(tmp_path, capsys):
    text = "text with a mark \ufeff inside\n" * 500
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_bytes(codecs.BOM_UTF8 + text.encode())
    (tmp_path / "text" / "b.txt").write_bytes(text.encode())
    (tmp_path / "text" / "c.txt").write_bytes(codecs.BOM_UTF8)
    opened = open_corpus(prepare.prepare(str(tmp_path / "text"), 300, out=str(tmp_path / "out")))
    ids = np.concatenate([*opened.train, *opened.val]).tolist()
    assert opened.vocabulary.decode(ids) == END + text
    assert "left out: 1 duplicate, 1 empty" in capsys.readouterr().out


@pytest.mark.parametrize("name", texts.LISTED)
def test_a_folder_in_the_current_directory_is_never_taken_for_a_listed_corpus(
        folder, here, name, tmp_path, monkeypatch):
    made = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare, "make", lambda *args: made.append(args[:2]))
    folder.rename(tmp_path / name)
    assert prepare.prepare(name) == str(here / name)
    assert made == [(name, str(here / name))]
    assert open_corpus(f"./{name}").folder == f"./{name}"


def test_a_corpus_may_be_made_in_a_folder_with_the_name_of_another(notes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert prepare.main([str(notes), "--vocab", "300", "--out", "c4"]) == 0
    assert "train.bin" in os.listdir("c4")


@pytest.mark.parametrize("name", ["notes.txt", "stdlib", "c4", "shakespeare"])
def test_a_vocabulary_that_is_made_has_room_for_the_bytes(name, notes, here, monkeypatch):
    monkeypatch.chdir(notes.parent)
    for vocab in (0, 65, 256, texts.MAX_VOCAB + 1):
        refused(open_corpus, name, vocab, words=[f"a vocabulary of {vocab} is not possible",
                                                 "between 257 and 1,048,576"])
    assert not here.exists()


def test_what_is_left_out_is_counted(tmp_path, capsys):
    root = tmp_path / "text"
    (root / "sub").mkdir(parents=True)
    for name in ("a", "b", "sub/c"):
        (root / name).write_text("the same text\n" * 1000)
    for name in ("d", "e", "f", "g"):
        (root / name).write_bytes(b"na\xefve")
    (root / "empty").touch()
    (root / ".hidden").touch()
    (root / "loop").symlink_to("..")
    (root / "nowhere").symlink_to("nothing")
    os.mkfifo(root / "pipe")
    open_corpus(prepare.prepare(str(root), 300, out=str(tmp_path / "out")))
    line, = capsys.readouterr().out.splitlines()
    kinds = {"duplicate": 2, "empty": 1, "hidden": 1, "linked": 2, "not UTF-8": 4, "special": 1}
    assert line.endswith("left out: " + ", ".join(f"{n} {kind}" for kind, n in kinds.items()))
    assert prepared.read_record(str(tmp_path / "out"))["left_out"] == kinds


# ---- names that are no data

@pytest.fixture
def odd_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    os.symlink("loop", "loop")
    for name in ("two\nlines.txt", "na\udcefve.txt"):
        with open(name, "w") as file:
            file.write("text\n" * 9000)
    server = socket.socket(socket.AF_UNIX)
    server.bind("socket")
    yield
    server.close()


@pytest.mark.parametrize("name, words", [
    ("", "the name of the data is empty"),
    ("no\0no", "control character"),
    ("two\nlines.txt", "control character"),
    ("na\udcefve.txt", "not UTF-8"),
    ("x" * 5000, "File name too long"),
    ("nothing", "data 'nothing' is not a file, a folder, or one of stdlib, python"),
    ("loop", "levels of symbolic links"),
    ("pipe", "a pipe, a device"),
    ("socket", "a pipe, a device"),
    ("/dev/zero", "a pipe, a device"),
    ("/dev/stdin", "a pipe, a device"),
    ("/dev/fd/0", "a pipe, a device"),
    ("/proc", "a part of the system"),
    ("/proc/self/status", "a part of the system"),
    ("/dev", "a part of the system"),
])
def test_what_is_no_file_and_no_folder_is_refused(odd_files, here, name, words):
    with open("two\nlines.txt") as stdin:
        before = os.dup(0)
        os.dup2(stdin.fileno(), 0)
        try:
            refused(open_corpus, name, words=[words])
        finally:
            os.dup2(before, 0)
            os.close(before)
    assert not here.exists()


def test_a_text_on_the_memory_disk_is_data():
    for path in ("/dev/shm", "/dev/shm/notes.txt", "/devices", "/home/dev/notes.txt"):
        assert not texts.is_system(path), path
    for path in ("/dev", "/dev/shmem", "/sys/kernel", "/home/../proc/cpuinfo"):
        assert texts.is_system(path), path


def test_a_folder_of_absurd_size_is_refused_with_its_count_before_it_is_read(tmp_path, monkeypatch):
    for i in range(20):
        (tmp_path / f"{i}").write_text("x" * 100)
    assert len(texts.list_files(str(tmp_path))[0]) == 20

    def open_(*_):
        raise AssertionError("a file was read")

    monkeypatch.setattr("builtins.open", open_)
    monkeypatch.setattr(texts, "MAX_FILES", 12)
    refused(prepare.prepare, str(tmp_path), words=[str(tmp_path), "13 with"])
    monkeypatch.setattr(texts, "MAX_FILES", 100)
    monkeypatch.setattr(texts, "MAX_BYTES", 700)
    refused(prepare.prepare, str(tmp_path), words=[str(tmp_path), "8 with"])


def test_the_parts_of_the_system_are_not_listed(tmp_path, monkeypatch):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "kmsg").write_text("never ends")
    (tmp_path / "a").write_text("text")
    monkeypatch.setattr(texts, "SYSTEM_FOLDERS", (str(tmp_path / "proc"),))
    assert [file.name for file in texts.list_files(str(tmp_path))[0]] == ["a"]


def test_a_folder_without_read_permission_is_said(tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()

    def scandir(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", scandir)         # root may read everything
    refused(prepare.prepare, str(tmp_path / "closed"), out=str(tmp_path / "out"),
            words=["closed", "Permission denied"])


def test_a_long_name_makes_a_corpus_whose_name_fits(tmp_path, here):
    path = tmp_path / ("日" * 80 + ".txt")
    path.write_text("text of a file with a long name\n" * 1000)
    folder = open_corpus(str(path), 300).folder
    assert os.path.basename(folder).startswith("日" * 50 + "-")


# ---- what is the matter with a file

@pytest.mark.parametrize("content, words", [
    (b"", "is empty"),
    (codecs.BOM_UTF8, "is empty"),
    ("text".encode("utf-16"), "begins with the mark of UTF-16"),
    ("text".encode("utf-32"), "begins with the mark of UTF-32"),
    (b"na\xefve", "has byte 0xEF at 2, which is not UTF-8"),
    (b"x" * (1 << 20) + b"caf\xe9", "has byte 0xE9 at 1,048,579"),
    (("é" * 600_000).encode()[:-1], "has byte 0xC3 at 1,199,998"),
    (b"x" * 77 + b"\0", "has a NUL byte at 77"),
    (gzip.compress(b"text", mtime=0), "is a gzip file"),
    (b"PK\3\4....", "is a zip file"),
    (b"PAR1....", "is a Parquet file"),
    (b"%PDF-1.7\n", "is a PDF file"),
])
def test_what_is_the_matter_with_a_file_is_said(tmp_path, content, words):
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    refused(prepare.prepare, str(path), out=str(tmp_path / "out"), words=[f"'notes.txt' {words}"])


def test_a_file_that_ends_inside_a_character_is_no_text(tmp_path):
    (tmp_path / "a").write_bytes("naïve é".encode()[:-1])
    assert texts.examine(str(tmp_path / "a")) == (
        None, "not UTF-8", "has byte 0xC3 at 7, which is not UTF-8")


def test_of_many_files_the_first_are_named(tmp_path):
    root = tmp_path / "text"
    root.mkdir()
    for i in range(9):
        (root / f"{i}.txt").write_bytes(b"\xff" * 9)
    (root / ".hidden").touch()
    (root / "two\nlines").touch()
    refused(prepare.prepare, str(root), out=str(tmp_path / "out"), words=[
        "there is no UTF-8 text in", "'0.txt' has byte 0xFF at 0", "'2.txt' has", ", and 8 more"])
    assert not (tmp_path / "out").exists()


# ---- processes

def start(*args, **kwargs):
    return subprocess.Popen([sys.executable, PREPARE, *map(str, args)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, **kwargs)


def wait_for(condition):
    deadline = time.time() + 30
    while not condition():
        assert time.time() < deadline
        time.sleep(0.01)


def test_help_is_printed_without_an_import_that_takes_time():
    code = ("import sys; sys.path.insert(0, sys.argv.pop()); from data import prepare\n"
            "try: prepare.main(['--help'])\n"
            "finally: print(sorted({'numpy', 'regex', 'tiktoken', 'tqdm'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", code, ROOT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "quartet.py --data NAME" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_without_the_packages_a_sentence_says_what_to_do(notes):
    done = subprocess.run([sys.executable, "-I", "-S", PREPARE, notes], capture_output=True,
                          text=True)
    assert done.returncode == 2
    assert "run `make kernels`" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_preparation_leaves_nothing_and_says_how_it_was_stopped(tmp_path, number, code):
    rng = random.Random(0)
    (tmp_path / "big.txt").write_text(" ".join(str(rng.random()) for _ in range(400_000)))
    process = start(tmp_path / "big.txt", "--out", tmp_path / "out")
    wait_for((tmp_path / "out" / ".quartet-making" / "files").exists)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == code, err
    assert err == "prepare: stopped: the same command goes on\n"
    assert os.listdir(tmp_path) == ["big.txt"]


def test_what_a_killed_preparation_left_is_removed_by_the_next(notes, tmp_path):
    out = tmp_path / "out"
    # The first is ours, the others are not.
    for name in (".quartet-making/files", ".making/files", ".making-of"):
        (out / name).mkdir(parents=True)
        (out / name / "train.bin.tmp").write_text("half of it")
    (out / ".quartet-making" / "lock").touch()
    prepare.prepare(str(notes), 300, out=str(out))
    names = [".making", ".making-of", ".quartet.json", "corpus.json", "train.bin", "val.bin",
             "vocab.tiktoken"]
    assert sorted(os.listdir(out)) == names
    for name in (".making/files", ".making-of"):
        assert os.listdir(out / name) == ["train.bin.tmp"]


def test_two_preparations_at_once_both_end_with_the_right_files(notes, tmp_path):
    prepare.prepare(str(notes), 300, out=str(tmp_path / "alone"))
    out = tmp_path / "out"
    (out / ".quartet-making").mkdir(parents=True)
    with open(out / ".quartet-making" / "lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)                # Both have to wait.
        processes = [start(notes, "--vocab", 300, "--out", out) for _ in range(2)]
        for process in processes:
            line = process.stderr.readline()
            making = f"{out}/.quartet-making"
            assert line == f"{making} is in use by another process: waiting until it ends\n"
        os.remove(out / ".quartet-making" / "lock")
    printed = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sorted(line.count("tokens in train.bin") for line in printed) == [0, 1]
    for name in ("train.bin", "val.bin", "vocab.tiktoken", "corpus.json"):
        assert (out / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    assert prepared.MAKING not in os.listdir(out)


def test_several_processes_may_open_a_corpus_at_once(folder):
    code = ("import sys; sys.path.insert(0, sys.argv[1]); from data.corpus import open_corpus\n"
            "print(open_corpus(sys.argv[2]).fingerprint)")
    command = [sys.executable, "-c", code, ROOT, str(folder)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(3)]
    printed = {process.communicate()[0] for process in processes}
    assert printed == {open_corpus(str(folder)).fingerprint.encode() + b"\n"}
    assert sorted(os.listdir(folder)) == [prepared.FACTS, "train.bin", "val.bin"]


HOLD = """
import sys
sys.path.insert(0, sys.argv[1])
from data import locks
with locks.hold(sys.argv[2]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock tmp_path/folder/lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, ROOT, str(tmp_path / "folder" / "lock")], text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_lock_that_is_held_is_refused_or_waited_for(holder, tmp_path, capsys):
    path = str(tmp_path / "folder" / "lock")
    in_use = (f"{tmp_path / 'folder'} is in use by process {holder.pid} on {os.uname().nodename}, "
              f"started 20")
    assert locks.is_held(path)
    refused(locks.hold(path, "go away").__enter__, words=[in_use, ": go away"])
    threading.Timer(0.3, holder.stdin.close).start()
    with locks.hold(path):
        assert holder.wait() == 0
        assert f"process {os.getpid()} on" in (tmp_path / "folder" / "lock").read_text()
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert printed.err.startswith(in_use) and printed.err.endswith(": waiting until it ends\n")
    assert os.listdir(tmp_path / "folder") == []


def test_a_killed_process_holds_no_lock(holder, tmp_path):
    path = str(tmp_path / "folder" / "lock")
    holder.kill()
    holder.wait()
    assert os.path.exists(path) and not locks.is_held(path)
    with locks.hold(path, "go away"):
        words = (tmp_path / "folder" / "lock").read_text()
        assert re.fullmatch(rf"process {os.getpid()} on \S+, started [-\d]+ [:\d]+", words)
    assert not os.path.exists(path)


def test_where_there_are_no_locks_a_preparation_goes_on_and_says_so(
        notes, tmp_path, monkeypatch, capsys):
    def flock(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    prepare.prepare(str(notes), 300, out=str(tmp_path / "out"))
    assert "this file system has no locks (No locks available)" in capsys.readouterr().out
    assert "train.bin" in os.listdir(tmp_path / "out")


@pytest.mark.parametrize("context, words", [
    (signals.Noted, ""),
    (signals.BetweenSteps, "\nSIGTERM: stopping after this step and a checkpoint; a signal more "
                           "than 1 s from now stops at once\n"),
])
def test_a_first_signal_is_noted_and_one_a_second_later_stops(context, words, monkeypatch, capfd):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with context() as stop:
        assert not stop.is_asked
        # The second counts from the first signal on, which also says what stopped the process.
        for seconds, number in ((0, signal.SIGTERM), (0.6, signal.SIGUSR1), (0.4, signal.SIGUSR1)):
            now[0] += seconds
            os.kill(os.getpid(), number)
            assert stop.is_asked
        with pytest.raises(Stopped) as stopped:
            stop.raise_if_asked()
        assert stopped.value.signal_number == signal.SIGTERM
        now[0] += 0.1
        with pytest.raises(Stopped):
            os.kill(os.getpid(), signal.SIGTERM)
    assert capfd.readouterr().err == words


@pytest.mark.parametrize("number, kind", [
    (signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Stopped), (signal.SIGHUP, Stopped),
    (signal.SIGUSR1, Stopped),
])
def test_each_signal_that_asks_to_stop_becomes_an_exception_and_none_is_swallowed(number, kind):
    # The handler of before, so that a signal without one does not end the tests.
    earlier = signal.signal(number, lambda *_: None)
    try:
        with pytest.raises(kind) as stopped, signals.become_exceptions():
            try:
                os.kill(os.getpid(), number)
                time.sleep(0.1)
            except Exception:                   # as in a program that goes on after any fault
                pass
        assert getattr(stopped.value, "signal_number", signal.SIGINT) == number
    finally:
        signal.signal(number, earlier)


def test_files_that_were_not_made_here_are_never_overwritten(notes, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for name in ("train.bin", "corpus.json", "vocab.tiktoken"):
        (out / name).write_text("mine")
        refused(prepare.prepare, str(notes), 300, out=str(out),
                words=[f"has a {name} that was not made here"])
        assert os.listdir(out) == [name]
        assert (out / name).read_text() == "mine"
        os.remove(out / name)


def test_a_link_that_was_not_made_here_is_never_overwritten(notes, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "train.bin").symlink_to("on-a-disk-that-is-not-mounted")
    refused(prepare.prepare, str(notes), 300, out=str(tmp_path / "out"),
            words=["has a train.bin that was not made here"])
    assert os.listdir(tmp_path / "out") == ["train.bin"]


def test_a_record_lists_all_files_that_were_ever_made(tmp_path):
    prepared.write_record(str(tmp_path), ["b.bin"], source="b")
    prepared.write_record(str(tmp_path), ["a.bin"], vocab_size=300)
    assert prepared.read_record(str(tmp_path)) == {
        "made_by": "quartet", "files": ["a.bin", "b.bin"], "source": "b", "vocab_size": 300}


def test_a_record_of_another_program_is_none(folder):
    for record in ({"files": ["train.bin"]}, {"made_by": "another", "files": ["train.bin"]}):
        (folder / "corpus.json").write_text(json.dumps(record))
        assert prepared.read_record(str(folder)) == {}
        assert clean.clean_folder(str(folder)).startswith("left alone")
        refused(prepared.write_record, str(folder), ["x.bin"], words=["has a corpus.json that was"])


class Crash(BaseException):
    """What a power cut is to these tests."""


def crash_after(monkeypatch, n):
    """Lets n calls of os.replace and os.remove through, and none after them."""
    calls = []

    def counted(function):
        def call(*args, **kwargs):
            calls.append(function)
            if len(calls) > n:
                raise Crash
            return function(*args, **kwargs)
        return call

    for name in ("replace", "remove"):
        monkeypatch.setattr(os, name, counted(getattr(os, name)))


def made_of(folder):
    return [(folder / name).read_bytes() for name in ("train.bin", "val.bin", "vocab.tiktoken")]


def counts_of(folder): return prepared.read_record(str(folder))["counts"]


def test_a_preparation_that_was_killed_anywhere_is_begun_again(tmp_path, monkeypatch):
    # What was made of another text has lost a file. What is made of this one takes its place.
    path = tmp_path / "text.txt"
    for name, word in (("old", "word"), ("new", "number")):
        path.write_text("".join(f"{word} {i} of a text\n" for i in range(100)))
        prepare.prepare(str(path), 270, out=str(tmp_path / name))
    (tmp_path / "old" / "val.bin").unlink()
    out = tmp_path / "out"
    is_killed = True
    n = -1
    while is_killed:
        n += 1
        shutil.copytree(tmp_path / "old", out)
        with monkeypatch.context() as patched:
            crash_after(patched, n)
            try:
                prepare.prepare(str(path), 270, out=str(out))
                is_killed = False
            except Crash:
                pass
        if build.is_ready(str(out), 270):
            assert made_of(out) == made_of(tmp_path / "new"), n
            assert counts_of(out) == counts_of(tmp_path / "new"), n
        prepare.prepare(str(path), 270, out=str(out))
        assert made_of(out) == made_of(tmp_path / "new"), n
        shutil.rmtree(out)
    assert n > 5


def test_the_vocabulary_is_trained_on_a_sample_from_everywhere(tmp_path, monkeypatch):
    sampled = []
    train_bpe = build.bpe.train_bpe

    def noted(passages, size):
        sampled.extend(passages)
        return train_bpe(sampled, size)

    monkeypatch.setattr(build.bpe, "train_bpe", noted)
    monkeypatch.setattr(build, "SAMPLE_CHARACTERS", 10_000)
    monkeypatch.setattr(split, "PIECE_BYTES", 1_000)
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{i:09}\n" for i in range(10_000)))
    prepare.prepare(str(path), 300, out=str(tmp_path / "out"))
    # Of the 90 pieces that are trained on, every tenth; each has 100 lines.
    places = [int(text[:9]) for text in sampled]
    assert places == [*range(0, 9_000, 1_000)]
    # Long passages, as C4's, end before the sample does.
    passages = [split.Passage(True, "x" * 4_000)] * 9
    assert len(list(build.sample(passages))) == 3


def test_the_record_counts_tokens_and_bytes(tmp_path):
    path = tmp_path / "text.txt"
    out = tmp_path / "out"
    for text in ("日本語 naïve\n" * 900, "another text\n" * 900):
        path.write_text(text)
        made = open_corpus(prepare.prepare(str(path), 300, out=str(out)))
        counts = prepared.read_record(str(out))["counts"]
        assert counts["train.bin"][0] == len(made.train[0])
        assert counts["val.bin"][0] == len(made.val[0])
        assert counts["train.bin"][1] + counts["val.bin"][1] == len(text.encode())
        assert counts["val.bin"][1] == len(made.vocabulary.decode(made.val[0].tolist()).encode())
        (out / "val.bin").unlink()              # Now it is made again.


# ---- cleaning

def test_a_clean_that_was_stopped_anywhere_can_be_repeated(tmp_path, monkeypatch):
    is_stopped = True
    n = -1
    while is_stopped:
        n += 1
        here = tmp_path / str(n)
        prepared.write_record(str(here / "made"), ["train.bin", "val.bin"])
        for name in ("train.bin", "val.bin", prepared.FACTS):
            (here / "made" / name).write_text("")
        with monkeypatch.context() as patched:
            crash_after(patched, n)
            try:
                clean.clean(str(here))
                is_stopped = False
            except Crash:
                pass
        clean.clean(str(here))
        assert os.listdir(here) == [], n
    assert n == 4


@pytest.fixture
def data(notes, here):
    """A folder like data/, with a prepared corpus, and what else may lie there."""
    prepare.prepare(str(notes), 300)
    for name in ("mybook", "empty", "__pycache__"):
        (here / name).mkdir()
    (here / "mybook" / "train.bin").write_text("not from git")
    (here / "prepare.py").touch()
    (here / "link").symlink_to(here / "mybook")
    return here


def test_clean_removes_what_was_prepared_and_nothing_else(data, notes, capsys):
    mixed = prepare.prepare(str(notes), 310)
    with open(os.path.join(mixed, "thesis.tex"), "w") as file:
        file.write("years of work")
    (data / "killed" / ".quartet-making").mkdir(parents=True)
    (data / "downloads").mkdir()
    prepared.write_record(str(data / "downloads"), ["c4.json.gz"])
    (data / "downloads" / "c4.json.gz.part").touch()
    # A process that was killed while it wrote leaves these.
    for name in (".quartet.json.tmp", "corpus.json.tmp"):
        (data / "downloads" / name).touch()
    clean.clean(str(data))
    left = sorted(os.listdir(data))
    assert left == sorted(["mybook", "empty", "__pycache__", "prepare.py", "link",
                           os.path.basename(mixed)])
    assert os.listdir(mixed) == ["thesis.tex"]
    assert (data / "mybook" / "train.bin").read_text() == "not from git"
    out = capsys.readouterr().out.splitlines()[1:]
    assert len(out) == 3, out
    said = [line for line in out if line.startswith("left alone, no corpus.json")]
    assert len(said) == 1 and "mybook" in said[0] and "empty" in said[0]


def test_clean_leaves_what_is_only_named_like_ours(data, capsys):
    for name in (".making-of", ".making", ".quartet-making-of"):
        (data / "mybook" / name / "files").mkdir(parents=True)
    for name in (".making-notes", ".quartet-making-notes", ".quartet.json-notes"):
        (data / "mybook" / name).touch()
    made, = [folder for folder in data.iterdir() if folder.name.startswith("notes-")]
    (made / ".quartet.json-notes").touch()
    (data / "a-file").mkdir()
    (data / "a-file" / ".quartet-making").touch()
    before = sorted(os.walk(data / "mybook"))
    assert clean.clean(str(data)) == 0
    assert sorted(os.walk(data / "mybook")) == before
    assert os.listdir(made) == [".quartet.json-notes"]
    assert os.listdir(data / "a-file") == [".quartet-making"]
    assert capsys.readouterr().err == ""


def test_the_trouble_of_one_folder_does_not_keep_clean_from_the_others(data, capsys):
    (data / "a" / ".quartet-making").mkdir(parents=True)
    (data / "a" / ".quartet-making" / "files").touch()      # not a folder: cannot be removed as one
    assert clean.clean(str(data)) == 2
    err = capsys.readouterr().err
    assert err.startswith("clean: cannot remove ") and err.count("\n") == 1
    assert os.path.join("a", ".quartet-making", "files") in err
    assert not [folder for folder in data.iterdir() if folder.name.startswith("notes-")]


def test_clean_leaves_a_running_preparation_alone(data, capsys):
    making = data / "running" / ".quartet-making"
    (making / "files").mkdir(parents=True)
    with open(making / "lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        clean.clean(str(data))
        assert (making / "files").exists()
    assert "a preparation is running" in capsys.readouterr().out
    clean.clean(str(data))
    assert not (data / "running").exists()


def test_a_record_that_names_files_elsewhere_removes_nothing(data):
    records = [json.dumps({"made_by": prepared.MADE_BY, "files": names})
               for names in (["../mybook/train.bin"], "train.bin/x", [3], None)]
    for record in [*records, "[" * 200_000]:
        (data / "mybook" / "corpus.json").write_text(record)
        clean.clean(str(data))
        assert (data / "mybook" / "train.bin").exists()
        assert (data / "mybook" / "corpus.json").exists()


def test_any_python_can_clean(tmp_path):
    (tmp_path / "data").mkdir()
    for name in os.listdir(os.path.join(ROOT, "data")):
        if name.endswith(".py"):
            shutil.copy(os.path.join(ROOT, "data", name), tmp_path / "data")
    prepared.write_record(str(tmp_path / "data" / "stdlib"), ["train.bin"])
    (tmp_path / "data" / "stdlib" / "train.bin").touch()
    done = subprocess.run([sys.executable, "-S", "-m", "data.clean"], cwd=tmp_path,
                          capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"removed: {os.path.join('data', 'stdlib')}\n"
    assert not (tmp_path / "data" / "stdlib").exists()


# ---- what tells two corpora apart

def test_the_identity_of_a_corpus_tells_its_tokens_and_vocabulary(folder):
    opened = open_corpus(str(folder))
    assert opened.identity == {"fingerprint": opened.fingerprint, "vocab_size": 50257,
                               "vocabulary": tokenizer.Gpt2().fingerprint}
    larger = open_corpus(str(folder), 50304)
    changed = {name for name, value in larger.identity.items() if opened.identity[name] != value}
    assert changed == {"vocabulary", "vocab_size"}


def test_the_fingerprint_is_of_validation_files_too(folder):
    first = open_corpus(str(folder)).fingerprint
    write_tokens(folder / "val.bin", np.arange(600))
    assert open_corpus(str(folder)).fingerprint != first


def test_a_token_file_of_another_length_and_the_same_time_is_read(folder):
    first = open_corpus(str(folder)).fingerprint
    before = os.stat(folder / "val.bin")
    write_tokens(folder / "val.bin", np.arange(400))
    os.utime(folder / "val.bin", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert open_corpus(str(folder)).fingerprint != first


def test_clean_leaves_what_a_link_points_to(notes, here, tmp_path):
    elsewhere = prepare.prepare(str(notes), 300, out=str(tmp_path / "elsewhere"))
    here.mkdir()
    (here / "linked").symlink_to(elsewhere)
    clean.clean(str(here))
    assert (tmp_path / "elsewhere" / "train.bin").exists() and (here / "linked").is_symlink()


def test_an_edit_that_keeps_the_size_makes_another_corpus(tmp_path):
    path = tmp_path / "notes.txt"
    found = set()
    for number, text in ((1, "one text"), (2, "two text")):
        path.write_text(text)
        os.utime(path, ns=(number, number))
        found.add(prepare.corpus_name(str(path)))
    assert len(found) == 2


def test_train_bin_and_val_bin_are_the_corpus_whatever_lies_beside_them(folder):
    first = open_corpus(str(folder)).fingerprint
    for name in ("old_train.bin", "my_val_2.bin"):
        shutil.copy(folder / "train.bin", folder / name)
    opened = open_corpus(str(folder))
    assert (len(opened.train), len(opened.val), opened.fingerprint) == (1, 1, first)


def test_the_vocabulary_knows_nothing_of_the_validation_text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("a text to train on. " * 900 + "zq" * 1000)
    made = open_corpus(prepare.prepare(str(path), 300, out=str(tmp_path / "out")))
    assert not any(b"zq" in token for token in made.vocabulary.ranks)
