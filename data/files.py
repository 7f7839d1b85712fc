"""
Tell the user what to mend, and write files that are there whole or not at all.

Everything outside fp4/ shares these names. This module imports no torch, so that the tools which
only read files start at once.
"""
import contextlib
import hashlib
import os
import signal


class UserError(Exception):
    """Carries one sentence for the user: what is wrong, where, and what to do about it."""
    exit_code = 2                       # of the program that ends with this sentence


class Stopped(BaseException):
    """
    Says that a signal asked the process to stop (signals.py).

    As with KeyboardInterrupt, which Ctrl-C raises, nobody is to blame: `except Exception` must not
    catch it.
    """

    def __init__(self, signal_number):
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")
        self.signal_number = signal_number


def check(condition, sentence):
    """Raises UserError(sentence) unless the condition holds."""
    if not condition:
        raise UserError(sentence)


def checked(f, *args, **kwargs):
    """Returns f(*args, **kwargs). A ValueError, with which libraries say that an argument is wrong,
    becomes a UserError with the same sentence."""
    try:
        return f(*args, **kwargs)
    except ValueError as error:
        raise UserError(str(error))


def atomic_write(path, save):
    """
    Calls save(file) on a binary file that takes the place of `path` once it is complete.

    The folder of `path` is made if it is missing. If the file cannot be written, UserError is
    raised, and what stood at `path` before stays as it was.
    """
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with atomic_open(path) as file:
            save(file)
    except (OSError, RuntimeError) as error:
        raise_hidden_interrupt(error)
        # torch.save reports a full disk as a RuntimeError, which has no strerror.
        reason = getattr(error, "strerror", None) or "is the disk full?"
        raise UserError(f"cannot write {path}: {reason}; what was there before is kept")


def raise_hidden_interrupt(error):
    """Raises the interrupt in whose handling `error` came up, if there was one.

    torch.save, interrupted while it writes, ends with a RuntimeError about an unexpected position.
    """
    while error is not None:
        if isinstance(error, (KeyboardInterrupt, Stopped)):
            raise error
        error = error.__context__


@contextlib.contextmanager
def atomic_open(path):
    """
    Opens path + ".tmp" for writing and moves it to `path` when the with statement ends.

    After an exception it is removed instead, and what stood at `path` before stays as it was. The
    file is forced to the disk before it is moved: otherwise a power cut soon after the move could
    leave an empty file under the final name.
    """
    temporary = path + ".tmp"
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def atomic_write_text(path, text):
    """Write text into path, in UTF-8, as atomic_write does."""
    atomic_write(path, lambda file: file.write(text.encode()))


def sha256_of(path):
    """Returns the SHA-256 of a file in 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
