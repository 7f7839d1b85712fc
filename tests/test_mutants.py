"""The faults of tests/mutants/ can be planted, and the runner tells killed from survived."""
import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from fp4.recipes import RECIPES
from tools import mutants
from tools.mutants import Mutant

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def repository(tmp_path, monkeypatch):
    "a repository of one module and its tests; a function that plants faults there"
    (tmp_path / "tests" / "mutants").mkdir(parents=True)
    (tmp_path / "sum.py").write_text("def add(a, b): return a + b\n\n\nUNUSED = 1\n")
    (tmp_path / "tests" / "test_sum.py").write_text(
        "import pytest\n"
        "from sum import add\n\n\n"
        "def test_the_sum_of_two_numbers():\n    assert add(2, 3) == 5\n\n\n"
        "def test_that_fails():\n    assert add(2, 3) == 6\n\n\n"
        "@pytest.mark.skip\ndef test_that_is_skipped():\n    pass\n")
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    monkeypatch.setattr(mutants, "ROOT", tmp_path)
    monkeypatch.setattr(mutants, "LISTS", tmp_path / "tests" / "mutants")

    def plant(*faults, arguments=()):
        text = "\n".join(map(repr, faults)).replace("\n", ",\n")
        (tmp_path / "tests" / "mutants" / "sums.py").write_text(
            f"from tools.mutants import Mutant\nMUTANTS = [{text}]\n")
        return mutants.main(["--jobs", "1", *arguments])
    return plant


GOOD = "tests/test_sum.py::test_the_sum_of_two_numbers"
SUBTRACTED = Mutant("subtracted", "sum.py", "a + b", "a - b", GOOD)
UNNOTICED = Mutant("unnoticed", "sum.py", "UNUSED = 1", "UNUSED = 2", GOOD)


def test_what_tests_notice_is_killed_and_what_they_do_not_survives(repository, capsys):
    assert repository(SUBTRACTED, UNNOTICED) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("killed ") and lines[0].endswith("sum.py: subtracted")
    assert lines[1].startswith("SURVIVED ")
    assert lines[2].startswith("1 of 2 faults killed (50.0%) ")
    assert (mutants.ROOT / "sum.py").read_text().startswith("def add(a, b): return a + b\n")


def test_a_fault_that_keeps_the_tests_from_running_is_not_killed(repository, capsys):
    no_module = Mutant("no function", "sum.py", "def add", "def added", GOOD)
    assert repository(SUBTRACTED, no_module) == 1
    assert "BROKEN " in capsys.readouterr().out


def test_all_killed_is_enough(repository, capsys):
    assert repository(SUBTRACTED, UNNOTICED, arguments=["--grep", "subtracted", "--jobs", "2"]) == 0
    assert "1 of 1 faults killed (100.0%)" in capsys.readouterr().out


def test_what_survives_for_a_reason_counts_as_survived(repository, capsys):
    explained = Mutant("explained", "sum.py", "UNUSED = 1", "UNUSED = 2", survives="it is unused")
    assert repository(SUBTRACTED, explained) == 1
    assert "1 of 2 faults killed (50.0%)" in capsys.readouterr().out


def test_at_least_97_percent_have_to_be_killed_and_the_others_explained():
    killed = mutants.Result(SUBTRACTED, mutants.KILLED, 1)
    expected = mutants.Result(SUBTRACTED, mutants.EXPECTED, 1)
    survived = mutants.Result(UNNOTICED, mutants.SURVIVED, 1)
    assert mutants.summary([killed] * 97 + [expected] * 3, 1)[1]
    assert not mutants.summary([killed] * 96 + [expected] * 4, 1)[1]
    assert not mutants.summary([killed] * 99 + [survived], 1)[1]


@pytest.mark.parametrize("fault, reason", [
    (SUBTRACTED._replace(old="a * b"), "occurs 0 times"),
    (SUBTRACTED._replace(old="a"), "occurs 3 times"),
    (SUBTRACTED._replace(new="a + b"), "nothing changes"),
    (SUBTRACTED._replace(tests=""), "needs either"),
    (SUBTRACTED._replace(survives="why"), "needs either"),
    (SUBTRACTED._replace(tests=GOOD + " -k sum"), "are files of tests/"),
    (SUBTRACTED._replace(tests="tests/test_sum.py::test_that_fails"), "without a fault"),
    (SUBTRACTED._replace(tests="tests/test_sum.py::test_that_is_skipped"), "without a fault"),
    (SUBTRACTED._replace(tests="tests/test_sum.py::test_nowhere"), "without a fault"),
], ids=range(9))
def test_a_list_that_proves_nothing_is_refused(repository, capsys, fault, reason):
    assert repository(fault) == 2
    assert reason in capsys.readouterr().err


def test_a_list_that_is_not_there_is_refused(repository, capsys):
    assert repository(SUBTRACTED, arguments=["--only", "nothing"]) == 2
    assert "the lists are sums" in capsys.readouterr().err


# ---- the lists of this repository

ALL = mutants.load()


def test_every_fault_of_the_lists_can_be_planted():
    assert list(mutants.mistakes(ALL)) == []


def test_the_tests_that_the_lists_name_are_there():
    missing = set()
    for test in {part for mutant in ALL for part in mutant.tests.split()}:
        file, _, name = test.partition("::")
        function = name.partition("[")[0]
        if f"def {function}(" not in (ROOT / file).read_text():
            missing.add(test)
    assert not missing


def test_every_module_has_at_least_three_faults():
    count = Counter(mutant.file for mutant in ALL)
    files = [ROOT / "quartet.py", ROOT / "model.py"]
    for folder in ("data", "fp4", "tools"):
        files += [file for file in (ROOT / folder).rglob("*.py") if "build" not in file.parts[:-1]]
    names = [str(file.relative_to(ROOT)) for file in files if file.name != "__init__.py"]
    assert {name: count[name] for name in names if count[name] < 3} == {}


def test_every_recipe_has_at_least_three_faults():
    words = [re.findall(r"[\w-]+", f"{mutant.what} {mutant.tests}") for mutant in ALL]
    count = Counter(name for named in words for name in set(named) & RECIPES.keys())
    assert {name: count[name] for name in RECIPES if count[name] < 3} == {}
