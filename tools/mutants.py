"""
Do the tests notice? Plants faults in a copy of the repository, one at a time, and runs the tests
that should fail.

    make mutants
    python -m tools.mutants --only quartet recipes  # two lists of tests/mutants/
    python -m tools.mutants --grep rotation         # faults whose description has this word

A file of tests/mutants/ lists the faults of one area. A fault is a text that occurs once in a file,
what replaces it, and which tests should then fail. These tests have to pass without the fault. A
fault that no test can notice, because it computes the same, says so, and counts as one that
survived. At least 97 % must be killed, and every survivor needs its reason; the exit code is 1
otherwise.
"""
import argparse
import importlib.util
import multiprocessing
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
LISTS = ROOT / "tests" / "mutants"
LEAST_KILLED = 0.97
TIME_LIMIT = 300                        # seconds; a fault that hangs is noticed, too
TIME_LIMIT_OF_ALL = 3600                # for all tests that are named, without a fault

PASSED, FAILED = 0, 1                   # exit codes of pytest
# Each run of the tests is forked from a process that has loaded torch and pytest, which takes as
# long as a few tests.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["pytest", "numpy", "torch", "torch._dynamo"])
# Python recognises a stale .pyc by the time and the size of its source. A fault may have the same
# of both, so nothing is cached.
ENVIRONMENT = {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}

KILLED = "killed"
SURVIVED = "SURVIVED"
EXPECTED = "survives"                   # The list says why.
BROKEN = "BROKEN"                       # No test ran: the fault proves nothing.


class Mutant(NamedTuple):
    """A fault to plant, and the tests that should notice it."""
    what: str                           # is wrong, in words
    file: str
    old: str                            # occurs once in the file
    new: str
    tests: str = ""                     # such as tests/test_a.py::test_b, separated by blanks
    survives: str = ""                  # why no test can notice it


class Result(NamedTuple):
    mutant: Mutant
    outcome: str
    seconds: float


# ---- the lists

def load(only=(), word=""):
    """The mutants of these lists, of all of them by default, whose description has the word."""
    known = sorted(path.stem for path in LISTS.glob("*.py"))
    unknown = set(only) - set(known)
    if unknown:
        raise ValueError(f"there is no list {', '.join(sorted(unknown))}; "
                         f"the lists are {', '.join(known)}")
    mutants = []
    for name in only or known:
        spec = importlib.util.spec_from_file_location(f"mutants_{name}", LISTS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        mutants += module.MUTANTS
    return [mutant for mutant in mutants if word in mutant.what]


def mistakes(mutants):
    """Yields a sentence on each mutant that cannot be planted."""
    texts = {file: (ROOT / file).read_text() for file in {mutant.file for mutant in mutants}}
    for mutant in mutants:
        count = texts[mutant.file].count(mutant.old)
        name = f"{mutant.file}, {mutant.what!r}"
        if count != 1:
            yield f"{name}: the text occurs {count} times"
        if mutant.old == mutant.new:
            yield f"{name}: nothing changes"
        if bool(mutant.tests) == bool(mutant.survives):
            yield f"{name}: needs either tests or the reason why none can notice"
        if not all(part.startswith("tests/") for part in mutant.tests.split()):
            yield f"{name}: tests are files of tests/, or tests in them, separated by blanks"


# ---- planting

def copy_repository(folder):
    """Copies what git knows or does not ignore, and the compiled kernels, into a new folder."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            copy = folder / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, copy)
    build = ROOT / "fp4" / "build"
    if build.exists():
        shutil.copytree(build, folder / "fp4" / "build")


def run_tests(folder, arguments, time_limit):
    """Runs pytest in a copy of the repository; returns its exit code and what it printed."""
    with tempfile.NamedTemporaryFile() as output:
        process = PROCESSES.Process(target=run_pytest, args=(folder, arguments, output.name))
        process.start()
        process.join(time_limit)
        if process.is_alive():
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
        printed = Path(output.name).read_text(errors="replace")
    has_crashed = process.exitcode < 0
    return FAILED if has_crashed else process.exitcode, printed


def run_pytest(folder, arguments, output):
    """What a process of its own does: it becomes pytest in this folder, and prints into a file."""
    os.setsid()                         # With this, all that it starts can be stopped, too.
    with open(output, "w") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    import pytest                       # Here it is loaded already, and so is torch.
    for name in list(sys.modules):      # Ours are to come from the copy.
        if name.partition(".")[0] in ("quartet", "model", "data", "fp4", "tools"):
            del sys.modules[name]
    os.chdir(folder)
    sys.path = [str(folder), *(path for path in sys.path if path not in ("", str(ROOT)))]
    sys.dont_write_bytecode = True
    sys.exit(pytest.main(["-x", "-q", "-rs", "-p", "no:cacheprovider", *arguments]))


def plant(mutant, folder):
    """Plants one fault in a copy of the repository, runs its tests, and takes the fault out."""
    if mutant.survives:
        return Result(mutant, EXPECTED, 0)
    start = time.perf_counter()
    path = folder / mutant.file
    text = path.read_text()
    path.write_text(text.replace(mutant.old, mutant.new))
    try:
        code, _ = run_tests(folder, mutant.tests.split(), TIME_LIMIT)
    finally:
        path.write_text(text)
    outcome = {PASSED: SURVIVED, FAILED: KILLED}.get(code, BROKEN)
    return Result(mutant, outcome, time.perf_counter() - start)


def check_tests(folders, mutants):
    """Raises ValueError unless all tests that are named pass without a fault."""
    tests = sorted({part for mutant in mutants for part in mutant.tests.split()})
    shares = [tests[i::len(folders)] for i in range(len(folders))]

    def run_share(folder, share):
        return run_tests(folder, share, TIME_LIMIT_OF_ALL) if share else (PASSED, "")

    with ThreadPoolExecutor(len(folders)) as pool:
        for code, output in pool.map(run_share, folders, shares):
            if code != PASSED or "SKIPPED" in output:
                raise ValueError(f"without a fault, tests fail or are skipped:\n{output}")


def plant_all(mutants, folders):
    """Yields the Result of each mutant. One is planted in each folder at a time."""
    free = queue.Queue()
    for folder in folders:
        free.put(folder)

    def plant_in_free_folder(mutant):
        folder = free.get()
        try:
            return plant(mutant, folder)
        finally:
            free.put(folder)

    with ThreadPoolExecutor(len(folders)) as pool:
        yield from pool.map(plant_in_free_folder, mutants)


# ---- what is printed

def describe(result):
    mutant = result.mutant
    line = f"{result.outcome:8}  {result.seconds:5.1f} s  {mutant.file}: {mutant.what}"
    return f"{line} ({mutant.survives})" if mutant.survives else line


def summary(results, seconds):
    """One sentence with the figure, and whether it is good enough."""
    killed = sum(result.outcome == KILLED for result in results)
    explained = sum(result.outcome == EXPECTED for result in results)
    unexplained = len(results) - killed - explained
    share = killed / len(results)
    sentence = (f"{killed} of {len(results)} faults killed ({share:.1%}) in {seconds / 60:.0f} "
                f"minutes; {explained} survive for the reason given, {unexplained} without one")
    return sentence, share >= LEAST_KILLED and not unexplained


def main(argv):
    parser = argparse.ArgumentParser("mutants", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=(), metavar="LIST", help="only these lists")
    parser.add_argument("--grep", default="", metavar="WORD", help="only faults described so")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="faults at a time")
    args = parser.parse_args(argv)
    start = time.perf_counter()
    try:
        mutants = load(args.only, args.grep)
        wrong = list(mistakes(mutants))
        if wrong or not mutants:
            raise ValueError("\n".join(wrong) or "there is no such fault")
        os.environ.update(ENVIRONMENT)
        with tempfile.TemporaryDirectory() as temporary:
            folders = [Path(temporary) / str(i) for i in range(max(1, args.jobs))]
            for folder in folders:
                copy_repository(folder)
            check_tests(folders, mutants)
            results = []
            for result in plant_all(mutants, folders):
                results.append(result)
                print(describe(result), flush=True)
    except ValueError as error:
        print("mutants:", error, file=sys.stderr)
        return 2
    sentence, is_enough = summary(results, time.perf_counter() - start)
    print(sentence)
    return 0 if is_enough else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
