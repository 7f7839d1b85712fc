"""
Remove what was prepared below data/, and nothing else.

    python3 -m data.clean

A folder that was prepared has a record, corpus.json. Exactly the files that it lists are removed,
then the folder if it is empty. Any Python will do: nothing has to be installed.
"""
import os
import sys

from data.prepared import (
    FACTS, MAKING, RECORD, is_busy, listed_paths, lock_of, read_record, remove_if_empty,
    remove_leftovers)

HERE = os.path.dirname(os.path.abspath(__file__))


def clean(here):
    """
    Cleans every folder in `here`, and says in a line each what was removed and what was not.

    Returns the exit code: 2 if something could not be removed. The other folders are cleaned.
    """
    outcomes = {}
    exit_code = 0
    for name in sorted(os.listdir(here)):
        folder = os.path.join(here, name)
        if os.path.isdir(folder) and not os.path.islink(folder) and name != "__pycache__":
            try:
                outcomes.setdefault(clean_folder(folder), []).append(os.path.relpath(folder))
            except OSError as error:
                print(f"clean: cannot remove {error.filename} ({error.strerror})", file=sys.stderr)
                exit_code = 2
    for outcome, folders in outcomes.items():
        print(f"{outcome}: {', '.join(folders)}")
    return exit_code


def clean_folder(folder):
    """Removes what was prepared in a folder, and returns what became of it."""
    if is_busy(folder):
        return "left alone, a preparation is running"
    record = read_record(folder)
    making = os.path.join(folder, MAKING)
    if not record and not os.path.isdir(making):
        return f"left alone, no {RECORD} says that it was prepared here"
    remove_leftovers(folder)
    remove_files([lock_of(folder)])
    remove_if_empty(making)
    if record:
        # The facts, and what a killed process left of them and of a record. The record goes last,
        # so that a clean that was stopped can be repeated.
        beside = [FACTS + ".tmp", FACTS, RECORD + ".tmp", RECORD]
        paths = [os.path.join(folder, name) for name in beside]
        remove_files(listed_paths(folder, record) + paths)
    remove_if_empty(folder)
    if os.path.exists(folder):
        return "removed what was prepared, and left the other files"
    return "removed"


def remove_files(paths):
    for path in paths:
        if os.path.isfile(path):
            os.remove(path)


if __name__ == "__main__":
    sys.exit(clean(HERE))
