"""
Tell the folders that were prepared here from all others, and prepare in one only once at a time.

A prepared folder has a record, corpus.json: what it was made from, and which files were made. Only
these files are ever overwritten or cleaned. While something is being made, its subfolder
.quartet-making holds what is not complete, and a lock. This module imports only Python's own.
"""
import contextlib
import glob
import json
import os
import shutil

from data import locks
from data.files import atomic_write_text, check

RECORD = "corpus.json"
MADE_BY = "quartet"                 # stands in a record; others' corpus.json has something else
MAKING = ".quartet-making"          # a name that nobody else gives to a folder
FACTS = ".quartet.json"             # what data/facts.py keeps beside token files


def files(folder):
    """Returns the globs of a folder's training and validation shards, whoever made them."""
    names = ["train.bin", "val.bin"]
    if not all(os.path.exists(os.path.join(folder, name)) for name in names):
        names = ["*train*.bin", "*val*.bin"]
    return [os.path.join(glob.escape(folder), name) for name in names]


def holds_tokens(folder):
    """
    Tells whether a folder holds token files, whoever made them.

    UserError is raised if there are some for training and none for validation, or the reverse.
    """
    if not os.path.isdir(folder):
        return False
    train, val = [sorted(glob.glob(pattern)) for pattern in files(folder)]
    for found, missing in ((train, "val.bin"), (val, "train.bin")):
        names = ", ".join(os.path.basename(path) for path in found[:3])
        check(not found or (train and val),
              f"{folder} has {names} and no {missing}: token files for training and for validation "
              f"are both needed")
    return bool(train)


# ---- the record

def read_record(folder):
    """Returns the record of a folder; {} if it was not prepared here, or by an older version."""
    try:
        with open(os.path.join(folder, RECORD), encoding="utf-8") as file:
            record = json.load(file)
        is_ours = record["made_by"] == MADE_BY
        is_plain = all(os.path.basename(name) == name for name in record["files"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return {}
    return record if is_ours and is_plain else {}


def write_record(folder, names, **about):
    """
    Adds files that are about to be made to the record, and what is known about the corpus.

    UserError is raised if one of them is there already and was not made here.
    """
    record = read_record(folder)
    ours = [RECORD, *record["files"]] if record else []
    for name in (RECORD, *names):
        check(name in ours or not os.path.lexists(os.path.join(folder, name)),
              f"{folder} has a {name} that was not made here, or by an older version: remove it, "
              f"or make the corpus in another folder")
    listed = {*ours, *names} - {RECORD}
    record |= {"made_by": MADE_BY, "files": sorted(listed), **about}
    atomic_write_text(os.path.join(folder, RECORD), json.dumps(record, indent=1) + "\n")


# ---- one at a time

@contextlib.contextmanager
def workspace(folder):
    """
    Yields an empty folder inside `folder` that no other process has, and removes it afterwards.

    Where another process is at work in `folder`, it waits for its end. What a killed one left is
    removed. A folder that is empty in the end is removed too.
    """
    work = os.path.join(folder, MAKING, "files")
    try:
        with locks.hold(lock_of(folder)):
            try:
                remove_leftovers(folder)
                os.mkdir(work)
                yield work
            finally:
                shutil.rmtree(work, ignore_errors=True)
                remove_empty_record(folder)
    finally:
        # The lock is gone. If another process has it by now, its folder is not empty.
        remove_if_empty(os.path.join(folder, MAKING))
        remove_if_empty(folder)


def lock_of(folder):
    return os.path.join(folder, MAKING, "lock")


def remove_leftovers(folder):
    """Removes what a killed preparation left half-made."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(os.path.join(folder, MAKING, "files"))


def is_busy(folder):
    """Tells whether a process is preparing something in a folder right now."""
    return locks.is_held(lock_of(folder))


def listed_paths(folder, record):
    """Returns the paths of the files in a record: complete, half downloaded, half written."""
    return [os.path.join(folder, name + ending)
            for name in record.get("files", [])
            for ending in ("", ".part", ".tmp")]


def remove_empty_record(folder):
    """Removes a record of files that were not made."""
    record = read_record(folder)
    if record and not any(map(os.path.exists, listed_paths(folder, record))):
        os.remove(os.path.join(folder, RECORD))


def remove_if_empty(folder):
    with contextlib.suppress(OSError):          # It is not empty.
        os.rmdir(folder)
