"""
Find the text files of a corpus, and say what is the matter with the others.

This module imports only Python's own, so that a wrong name is refused at once.
"""
import codecs
import collections
import hashlib
import os
import site
import stat
import sysconfig
import unicodedata
from typing import NamedTuple

from data.files import UserError, check

END = "<|endoftext|>"               # opens every document; inside a text it separates documents
MIN_VOCAB = 257                     # of a vocabulary of text: the bytes and END
MAX_VOCAB = 1 << 20
LISTED = ("stdlib", "python", "shakespeare", "c4", "fineweb")
CHUNK_BYTES = 1 << 20
# A folder with more than this was hardly meant: `--data /`, say. Listing it ends there.
MAX_FILES = 100_000
MAX_BYTES = 20 << 30
MAX_SOURCE_BYTES = 2 << 20          # of a file in site-packages
SOURCE_ENDINGS = (".py", ".pyi", ".pyx", ".md", ".rst", ".txt")
# Folders of the standard library that hold other packages, tests, or mostly tables.
STDLIB_SKIP = ("site-packages", "dist-packages", "test", "tests", "idle_test", "encodings",
               "pydoc_data")
# What looks like a file there is a part of the system, and reading it may never end.
SYSTEM_FOLDERS = ("/dev", "/proc", "/sys")
MEMORY_DISK = "/dev/shm"
FOREIGN_FILES = {
    b"\x89PNG": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"%PDF-": "PDF",
    b"\x1f\x8b\x08": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"PK\3\4": "zip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x93NUMPY": "NumPy",
    b"\x89HDF": "HDF5",
    b"PAR1": "Parquet",
    b"ARROW1": "Arrow",
    b"\x80\4\x95": "pickle",
    b"\x80\5\x95": "pickle",
}
OTHER_ENCODINGS = {                 # by the mark at the beginning; UTF-32's begins with UTF-16's
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


class TextFile(NamedTuple):
    """A file that may be text. `name` is its path below the folder of the corpus."""
    name: str
    path: str
    size: int
    changed_at: int                 # in nanoseconds


class LeftOut(NamedTuple):
    """Something that is not part of the corpus: a kind for counting, and the reason in words."""
    kind: str
    name: str
    reason: str


# ---- names

def quoted(name):
    """Returns a name as part of a line, whatever characters and however many of them it has."""
    return repr(name) if len(name) <= 200 else f"{name[:200]!r}..."


def check_name(name):
    """Refuses a name that is empty or cannot be printed in a line."""
    check(name, f"the name of the data is empty: give a file, a folder, or one of "
                f"{', '.join(LISTED)}")
    has_control = any(unicodedata.category(c) in ("Cc", "Cs") for c in name)
    check(not has_control, f"the name {quoted(name)} has a control character in it, or is not "
                           f"UTF-8: rename it")


def check_path(name):
    """Refuses a path that is not a file or a folder which can be read to its end."""
    check_name(name)
    shown = quoted(name)
    try:
        mode = os.stat(name).st_mode
    except FileNotFoundError:
        raise UserError(f"data {shown} is not a file, a folder, or one of {', '.join(LISTED)}")
    except OSError as error:
        raise UserError(f"cannot read data {shown} ({error.strerror}): give another name")
    is_plain = stat.S_ISREG(mode) or stat.S_ISDIR(mode)
    check(is_plain and not is_system(name),
          f"data {shown} is a pipe, a device or a part of the system: save the text in a file, "
          f"and give its name")


def is_system(path):
    """Tells whether a path lies where the system shows its devices and processes as files."""
    path = os.path.abspath(path) + os.sep
    below = tuple(folder + os.sep for folder in SYSTEM_FOLDERS)
    return path.startswith(below) and not path.startswith(MEMORY_DISK + os.sep)


# ---- listing

def list_files(name):
    """
    Returns the TextFiles of a corpus and the LeftOuts.

    The order is the same on any machine. Whether a file holds text is for unique() to find out.
    """
    if name == "stdlib":
        return walk(sysconfig.get_paths()["stdlib"], (".py",), STDLIB_SKIP)
    if name == "python":
        stdlib, left_out = list_files("stdlib")
        packages, left_out_there = list_site_packages()
        return stdlib + packages, left_out + left_out_there
    if os.path.isdir(name):
        return walk(name)
    status = os.stat(name)
    return [TextFile(os.path.basename(name), name, status.st_size, status.st_mtime_ns)], []


def list_site_packages():
    paths = sysconfig.get_paths()
    roots = [*site.getsitepackages(), paths["purelib"], paths["platlib"]]
    distinct_roots = dict.fromkeys(os.path.realpath(root) for root in roots)
    listed = []
    left_out = []
    for root in distinct_roots:
        found, left_out_there = walk(root, SOURCE_ENDINGS)
        listed += [file for file in found if file.size <= MAX_SOURCE_BYTES]
        left_out += left_out_there
    return listed, left_out


def walk(root, endings=("",), skip=()):
    """
    Returns the files below a folder, sorted, and what is left out: hidden files and folders, links
    to folders, what is no file or may not be read.

    UserError is raised as soon as there are too many.
    """
    listed = []
    left_out = []
    total = 0

    def note(error):
        left_out.append(unreadable("unreadable", error.filename, error))

    for folder, subfolders, names in os.walk(root, onerror=note):
        left_out += leave_out_folders(folder, subfolders, skip)
        for name in names:
            if not name.endswith(endings):
                continue
            file = text_file(root, os.path.join(folder, name))
            if isinstance(file, LeftOut):
                left_out.append(file)
                continue
            listed.append(file)
            total += file.size
            check(len(listed) <= MAX_FILES and total <= MAX_BYTES,
                  f"{quoted(root)} has more files than can be meant, {len(listed):,} with "
                  f"{total / 2**30:.1f} GiB so far, and {MAX_FILES:,} with {MAX_BYTES / 2**30:.0f} "
                  f"GiB are the most: name a folder in it")
    return sorted(listed), left_out


def leave_out_folders(folder, subfolders, skip):
    """Takes subfolders out of the list of os.walk, which then does not enter them."""
    left_out = []
    for subfolder in list(subfolders):
        path = os.path.join(folder, subfolder)
        is_link = os.path.islink(path)          # os.walk does not enter it in any case
        is_hidden = subfolder.startswith(".")
        if is_link:
            left_out.append(LeftOut("linked", path, "is a link to a folder"))
        elif is_hidden:
            left_out.append(LeftOut("hidden", path, "is hidden"))
        if is_link or is_hidden or is_system(path) or subfolder in ("__pycache__", *skip):
            subfolders.remove(subfolder)
    return left_out


def text_file(root, path):
    """Returns a TextFile, or a LeftOut if the path is no ordinary file."""
    name = os.path.relpath(path, root).replace(os.sep, "/")
    if os.path.basename(path).startswith("."):
        return LeftOut("hidden", name, "is hidden")
    try:
        status = os.stat(path)
    except OSError as error:
        kind = "linked" if os.path.islink(path) else "unreadable"
        return unreadable(kind, name, error)
    if not stat.S_ISREG(status.st_mode):
        return LeftOut("special", name, "is a pipe or a device")
    return TextFile(name, path, status.st_size, status.st_mtime_ns)


def unreadable(kind, name, error):
    return LeftOut(kind, name, f"cannot be read ({error.strerror})")


# ---- which of them are text

def unique(listed):
    """
    Returns the files that are UTF-8 text, of equal ones only the first, and the LeftOuts.
    """
    digests = set()
    kept = []
    left_out = []
    for file in listed:
        digest, kind, reason = examine(file.path)
        if digest in digests:
            left_out.append(LeftOut("duplicate", file.name, "is equal to another"))
        elif digest is None:
            left_out.append(LeftOut(kind, file.name, reason))
        else:
            digests.add(digest)
            kept.append(file)
    return kept, left_out


def examine(path):
    """
    Returns (SHA-256, "", "") of a text file without its byte order mark.

    For another file it is (None, kind, reason) in the words of LeftOut.
    """
    sha = hashlib.sha256()
    decoder = codecs.getincrementaldecoder("utf-8")()
    position = 0
    size = 0
    try:
        with open(path, "rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                if position == 0:
                    foreign = foreign_kind(chunk)
                    if foreign:
                        return None, "not UTF-8", foreign
                n_pending = len(decoder.getstate()[0])
                nul = decoder.decode(chunk).find("\0")
                if nul >= 0:
                    return None, "not UTF-8", f"has a NUL byte at {position + chunk.find(0):,}"
                text = chunk if position else chunk.removeprefix(codecs.BOM_UTF8)
                sha.update(text)
                size += len(text)
                position += len(chunk)
            n_pending = len(decoder.getstate()[0])
            decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        i = position - n_pending + error.start
        byte = error.object[error.start]
        return None, "not UTF-8", f"has byte 0x{byte:02X} at {i:,}, which is not UTF-8"
    except OSError as error:
        return None, "unreadable", f"cannot be read ({error.strerror})"
    if size == 0:
        return None, "empty", "is empty"
    return sha.digest(), "", ""


def foreign_kind(head):
    """Says what kind of file begins like this, or returns None if it may be UTF-8 text."""
    for start, kind in FOREIGN_FILES.items():
        if head.startswith(start):
            return f"is a {kind} file"
    for start, kind in OTHER_ENCODINGS.items():
        if head.startswith(start):
            return f"begins with the mark of {kind}: save it as UTF-8"
    return None


def no_text(name, left_out):
    """Returns the sentence for a corpus of which nothing is text."""
    # What was left out for its place or its name comes last: it says least.
    telling = sorted(left_out, key=lambda out: out.kind in ("hidden", "linked"))
    reasons = [f"{quoted(out.name)} {out.reason}" for out in telling[:3]]
    n_more = len(left_out) - len(reasons)
    more = f", and {n_more:,} more" if n_more else ""
    return (f"there is no UTF-8 text in {quoted(name)}: "
            f"{'; '.join(reasons) or 'it has no files'}{more}")


def count_kinds(left_out):
    """Returns {kind: how many were left out}."""
    return dict(sorted(collections.Counter(out.kind for out in left_out).items()))
