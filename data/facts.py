"""
What is computed once for a token file and kept beside it: its SHA-256 and its largest token.

They are kept in one small file a folder, with the size and the time of each token file. Where the
folder may not be written, they are computed each time.
"""
import contextlib
import hashlib
import json
import os
from typing import NamedTuple

from data.files import UserError, atomic_write_text, sha256_of
from data.prepared import FACTS

CHUNK_TOKENS = 1 << 24


class Facts(NamedTuple):
    """What is known about a token file, as long as its size and time have not changed."""
    size: int
    changed_at: int                 # in nanoseconds
    sha256: str
    largest: int                    # token


def examine(shards):
    """Returns the Facts of token files of one folder, computing only those that are not known."""
    folder = os.path.dirname(shards[0].filename)
    known = load(folder)
    facts = {os.path.basename(shard.filename): facts_of(shard, known) for shard in shards}
    if facts.items() - known.items():
        save(folder, known | facts)
    return list(facts.values())


def facts_of(shard, known):
    path = shard.filename
    status = os.stat(path)
    before = known.get(os.path.basename(path))
    if before and before[:2] == (status.st_size, status.st_mtime_ns):
        return before
    starts = range(0, len(shard), CHUNK_TOKENS)
    largest = max(int(shard[start:start + CHUNK_TOKENS].max()) for start in starts)
    return Facts(status.st_size, status.st_mtime_ns, sha256_of(path), largest)


def load(folder):
    """Returns {file name: Facts}; {} if they are not there or not readable."""
    try:
        with open(os.path.join(folder, FACTS), encoding="utf-8") as file:
            entries = json.load(file).items()
        return {
            name: Facts(int(size), int(changed_at), str(sha256), int(largest))
            for name, (size, changed_at, sha256, largest) in entries
        }
    except (OSError, ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        return {}


def save(folder, facts):
    """
    Writes them, if possible; where it is not, they will be computed again.

    Several processes may do so at once and get in each other's way. What one of them spoils is no
    JSON, and load() finds nothing in it.
    """
    with contextlib.suppress(UserError):
        atomic_write_text(os.path.join(folder, FACTS), json.dumps(facts, indent=1))


def fingerprint(facts):
    """Returns 16 hex digits that tell the contents of some files, in order, from all others."""
    digests = "".join(entry.sha256 for entry in facts)
    return hashlib.sha256(digests.encode()).hexdigest()[:16]
