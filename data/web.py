"""
Corpora from the network: Tiny Shakespeare, C4, and FineWeb as GPT-2 tokens.
"""
import gzip
import json
import os
import zlib

from data import bpe, build, tokenizer
from data.download import download
from data.files import UserError, check
from data.prepared import workspace, write_record
from data.split import Passage

URLS = {
    "shakespeare": ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/"
                    "tinyshakespeare/input.txt"),
    "c4": "https://huggingface.co/datasets/allenai/c4/resolve/main/en/c4-{}.json.gz",
    "fineweb": ("https://huggingface.co/datasets/kjj0/fineweb10B-gpt2/resolve/main/"
                "fineweb_{}.bin"),
}
C4_VOCAB = 32768                    # the default
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def download_to(folder, name, url, sha256=None):
    """Downloads a file into a folder that lists it, and returns its path."""
    path = os.path.join(folder, name)
    if not os.path.exists(path):
        write_record(folder, [name])
    return download(url, path, sha256)


def make_shakespeare(folder, vocab, downloads):
    if build.is_ready(folder, vocab):
        return
    with workspace(downloads):
        path = download_to(downloads, "shakespeare.txt", URLS["shakespeare"], SHAKESPEARE_SHA256)
    build.make_from_files(path, folder, vocab)


def make_c4(folder, shards, vocab, downloads):
    """
    Makes a token file for each shard of C4; the vocabulary is trained on the first.

    vocab  its number of entries; None stands for the default
    """
    for i in range(shards):
        name = f"train_{i:05d}.bin"
        path = os.path.join(folder, name)
        if build.is_ready(folder, vocab) and os.path.exists(path):
            continue
        with workspace(folder) as work:
            is_begun = build.is_ready(folder, vocab)
            if is_begun and os.path.exists(path):
                continue
            train = download_c4(f"train.{i:05d}-of-01024", downloads)
            parts = {}
            if is_begun:
                ranks = tokenizer.load(os.path.join(folder, tokenizer.VOCAB_FILE))
            else:
                ranks = bpe.train_bpe(build.sample(read_c4(train)), (vocab or C4_VOCAB) - 1)
                val = download_c4("validation.00000-of-00008", downloads)
                parts["val_00000.bin"] = (read_c4(val), None)
            parts[name] = (read_c4(train), None)
            about = {"source": "c4", "vocab_asked": vocab or C4_VOCAB, "left_out": {}}
            build.build(folder, work, parts, ranks, about)


def download_c4(part, downloads):
    name = f"c4-{part}.json.gz"
    with workspace(downloads):
        return download_to(downloads, name, URLS["c4"].format(part))


def read_c4(path):
    """Yields the documents of a file of gzipped JSON lines."""
    try:
        with gzip.open(path, "rb") as file:
            for line in file:
                text = json.loads(line)["text"]
                # JSON may hold half a surrogate pair, which UTF-8 cannot: it becomes "?".
                yield Passage(True, text.encode(errors="replace").decode())
    except (EOFError, ValueError, KeyError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is damaged ({error}): remove it, and it is downloaded again")


def make_fineweb(folder, shards, vocab):
    check(vocab in (None, tokenizer.GPT2_SIZE),
          f"fineweb comes as tokens of GPT-2's vocabulary, which has {tokenizer.GPT2_SIZE:,} "
          f"entries, not {vocab}: leave out --vocab, or take c4")
    train = [f"train_{i:06d}" for i in range(1, shards + 1)]
    parts = [part for part in ("val_000000", *train)
             if not os.path.exists(os.path.join(folder, f"fineweb_{part}.bin"))]
    if not parts:
        return
    with workspace(folder):
        for part in parts:
            download_to(folder, f"fineweb_{part}.bin", URLS["fineweb"].format(part))
        write_record(folder, [], source="fineweb", vocab_size=tokenizer.GPT2_SIZE)
        build.complete_record(folder, {})
