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
import hashlib
import os
import signal
import sys

if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from data import signals
from data.files import Stopped, UserError, check
from data.prepared import holds_tokens
from data.texts import LISTED, MAX_VOCAB, MIN_VOCAB, check_name, check_path, list_files

HERE = os.path.dirname(os.path.abspath(__file__))


def prepare(name, vocab=None, shards=1, out=None):
    """
    Returns the folder of a corpus, which is made if it is not there.

    The name is one of the list above, a text file, a folder of text files, or a folder that holds
    token files already; ./c4 is a folder of yours, c4 never is. vocab is the number of entries in
    the vocabulary; None stands for the default.
    """
    check(shards >= 1, f"{shards} shards are too few: give --shards 1 or more")
    if name not in LISTED:
        check_path(name)
        if holds_tokens(name):
            return name
    check(vocab is None or name == "fineweb" or MIN_VOCAB <= vocab <= MAX_VOCAB,
          f"a vocabulary of {vocab} is not possible: give --vocab between {MIN_VOCAB} and "
          f"{MAX_VOCAB:,}")
    folder = out or default_folder(name, vocab)
    check_name(folder)
    try:
        make(name, folder, vocab, shards)
    except OSError as error:        # The disk is full or may not be written to, or a text is gone.
        raise UserError(f"cannot make {folder} ({error}): mend that, or name another folder with "
                        f"--out")
    return folder


def default_folder(name, vocab):
    corpus = name if name in LISTED else corpus_name(name)
    # The vocabulary of fineweb is GPT-2's in any case.
    suffix = f"-{vocab}" if vocab and name != "fineweb" else ""
    return os.path.join(HERE, corpus + suffix)


def corpus_name(path):
    """Returns STEM-1a2b3c4d: a file or a folder that has changed is another corpus."""
    listed, _ = list_files(path)
    path = os.path.abspath(path)
    state = [(file.name, file.size, file.changed_at) for file in listed]
    digits = hashlib.sha256(repr((path, state)).encode("utf-8", "surrogateescape")).hexdigest()[:8]
    stem = os.path.splitext(os.path.basename(path))[0]
    # A name may take 255 bytes on most disks, and a character up to 4.
    return f"{stem[:50]}-{digits}"


def make(name, folder, vocab, shards):
    # These take a second to import, so a mistake in the command is answered before.
    from data import build, web
    downloads = os.path.join(HERE, "downloads")
    if name == "fineweb":
        web.make_fineweb(folder, shards, vocab)
    elif name == "c4":
        web.make_c4(folder, shards, vocab, downloads)
    elif name == "shakespeare":
        web.make_shakespeare(folder, vocab, downloads)
    else:
        build.make_from_files(name, folder, vocab)


# ---- the command line

def parse(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("name", nargs="?", default="stdlib",
                        help="one of the above; default stdlib")
    parser.add_argument("--vocab", type=int,
                        help="its entries; default 4096, for c4 32768; data/NAME-X")
    parser.add_argument("--shards", type=int, default=1,
                        help="how many files of c4 or fineweb")
    parser.add_argument("--out", help="folder; default data/NAME")
    parser.error = fail
    return parser.parse_args(argv)


def fail(message):
    raise UserError(f"{message} (python data/prepare.py --help explains it)")


def main(argv):
    """Makes the corpus that a command line names, checks it, and returns the exit code."""
    try:
        args = parse(argv)
        with signals.become_exceptions():
            folder = prepare(args.name, args.vocab, args.shards, args.out)
            from data.corpus import open_folder
            open_folder(folder, args.vocab)
            print(folder, "is ready")
    except (UserError, OSError) as error:       # OSError: nobody reads what is printed, say.
        print(f"prepare: {error}", file=sys.stderr)
        return 2
    except ImportError as error:
        print(f"prepare: {sys.executable} has no {error.name}: run `make kernels`, which installs "
              f"what is needed into .venv", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, Stopped) as stop:
        print("prepare: stopped: the same command goes on", file=sys.stderr)
        return 128 + getattr(stop, "signal_number", signal.SIGINT)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
