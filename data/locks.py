"""
Let one process at a time work in a folder.

A lock is a file that is locked and names its holder. The lock belongs to the open file, so that it
ends with the process, however that ends: what a killed process leaves of its file does not matter.
This module imports only Python's own.
"""
import contextlib
import datetime
import errno
import fcntl
import os
import re
import socket
import stat
import sys
import time

from data.files import UserError, check

TRIES = 1000
# What a file system answers that has no locks.
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS)

# What stands in the file of a lock. One that is being taken is empty.
WORDS = re.compile(r"(process \d+ on .*, started .*)?")


@contextlib.contextmanager
def hold(path, refusal=None):
    """
    Holds the lock `path` within a with statement; its folder is made if it is missing.

    refusal  what the user can do where another process holds the lock: the end of the UserError
             that is raised then. None: wait until that process ends, and say so.

    The folder may be renamed meanwhile. The file then goes with it, and is left to the caller.
    A file of that name that is not a lock is refused, and stays as it is.
    """
    for _ in range(TRIES):
        with open_file(path) as file:
            wait_for(file, path, refusal)
            if not is_at(file, path):
                continue                # Its holder has ended just now, and removed or moved it.
            check(is_lock(file), f"{path} is something else than a lock: name another folder")
            try:
                write_words(file, path)
                yield
            finally:
                # It is removed while it is locked: who opened it before sees that it is gone.
                if is_at(file, path):
                    os.remove(path)
            return
    raise cannot_write(path, "it vanishes again and again")


def open_file(path):
    """Returns the file of a lock, open and not locked yet."""
    for _ in range(TRIES):
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            return open(path, "ab+", buffering=0)
        except FileExistsError:
            reason = f"{os.path.dirname(path)} is not a folder"
        except FileNotFoundError as error:
            reason = error.strerror
        except OSError as error:
            raise cannot_write(path, error.strerror)
        # Perhaps whoever had the lock has just removed the folder.
    raise cannot_write(path, reason)


def cannot_write(path, reason):
    return UserError(f"cannot write {path}: {reason}; mend that, or name another folder")


def wait_for(file, path, refusal):
    """Locks an open file. Where another process has locked it, it refuses or waits, as hold()."""
    try:
        if try_lock(file):
            return
        in_use = f"{os.path.dirname(path)} is in use by {holder(file)}"
        if refusal is not None:
            raise UserError(f"{in_use}: {refusal}")
        print(f"{in_use}: waiting until it ends", file=sys.stderr)
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise UserError(f"cannot lock {path}: {error.strerror}; name another folder")
        print(f"{path}: this file system has no locks ({error.strerror}); make sure yourself that "
              "no second process works there")


def try_lock(file):
    """Locks an open file, if no other process has locked it, and tells whether that was so."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_held(path):
    """Tells whether a process holds the lock `path` right now."""
    try:
        with open(path, "rb+") as file:
            return not try_lock(file)
    except OSError:                     # There is no such file, or the file system has no locks.
        return False


def write_words(file, path):
    """Writes into the file of a lock who holds it."""
    words = (f"process {os.getpid()} on {socket.gethostname()}, started "
             f"{datetime.datetime.now():%Y-%m-%d %H:%M:%S}")
    try:
        file.truncate(0)
        file.write(words.encode())
    except OSError as error:            # The disk is full, say.
        raise cannot_write(path, error.strerror)


def read_words(file):
    """Returns what stands in the file of a lock, which is short."""
    file.seek(0)
    return file.read(1000).decode(errors="replace")


def is_lock(file):
    """Tells whether an open file is one of a lock, and not the user's."""
    is_regular = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
    return is_regular and bool(WORDS.fullmatch(read_words(file)))


def holder(file):
    """Returns who holds a lock; a process that began just now is still writing that."""
    for _ in range(20):
        words = read_words(file)
        if words:
            return words
        time.sleep(0.05)
    return "another process"


def is_at(file, path):
    """Tells whether an open file is still the one that has the name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False
