"""Facts about the command line: what is read, refused and suggested, and how a program ends."""
import dataclasses
import errno
import os
import random
import re
import signal
import string
import subprocess
import sys
from pathlib import Path

import pytest

import quartet
from data.files import Stopped, UserError
from tools import cli, quant_error
from tools.cli import flag

ROOT = Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Settings:
    steps: int = flag(None, "length of the run; default: 350", least=1)
    batch: int = flag(8, "sequences in a step", least=1, most=512)
    seed: int = flag(0, "seed of everything", least=0)
    shift: int = flag(0, "any whole number")
    lr: float = flag(None, "peak learning rate", least=0, most=10)
    clip: float = flag(1.0, "largest norm; 0 does not clip", least=0)
    gemm: str = flag("fp8", "what multiplies", choices=("fp8", "own", "Library"))
    eval_every: int = flag(None, "steps between evaluations", least=1)
    out: str = flag("out", "folder of all 100% of the runs")
    sample: str = flag(None, "a text")
    resume: bool = flag(False, "go on")
    compile: bool = flag(None, "compile; default: on a GPU")
    color: bool = flag(True, "in color")


def parse(*argv):
    return cli.parse(Settings, argv, "What it does.")


def refusal(*argv):
    with pytest.raises(UserError) as caught:
        parse(*argv)
    return str(caught.value)


# ---- values

@pytest.mark.parametrize("text, value", [
    ("12", 12), ("+12", 12), ("-12", -12), ("007", 7), ("3e9", 3_000_000_000),
    ("3_000_000_000", 3_000_000_000), ("2.5e6", 2_500_000), ("1e18", 10 ** 18), ("5.", 5),
    ("9007199254740993", 9007199254740993), ("1234567890123456789", 1234567890123456789),
])
def test_whole_numbers_stay_whole(text, value):
    assert cli.whole_number(text) == value
    assert parse("--shift", text).shift == value


@pytest.mark.parametrize("text", ["1.5", "1e-3", "0x10", "nan", "inf", "", " ", " 5", "5 ", "5\n",
                                  "-", "e5", ".", "1__0", "_1", "1_", "١٢", "²", "1e99999",
                                  "1 000", "1,000", "True", "9" * 5000 + "x"])
def test_what_is_no_whole_number_is_refused_in_a_sentence(text):
    sentence = refusal(f"--shift={text}")
    assert sentence.endswith(": must be a whole number, such as 1000 or 3e9")
    assert sentence.isprintable() and len(sentence) < 150


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "infinity", "1e309", "9" * 5000, "", " 1",
                                  "١", "1e", "0x1p-3", "1/3"])
def test_what_is_no_finite_number_is_refused_in_a_sentence(text):
    assert refusal(f"--clip={text}").endswith(": must be a finite number, such as 0.5 or 1e-3")


@pytest.mark.parametrize("argv, sentence", [
    (["--steps", "0"], "--steps 0: must be 1 or more"),
    (["--steps", "-3"], "--steps -3: must be 1 or more"),
    (["--batch=513"], "--batch 513: must be 512 or less"),
    (["--batch", "1e9"], "--batch 1e9: must be 512 or less"),
    (["--lr", "1e308"], "--lr 1e308: must be 10 or less"),
    (["--lr=-1e-9"], "--lr -1e-9: must be 0 or more"),
    (["--seed", str(2 ** 64)], f"--seed {2 ** 64}: must be {2 ** 63 - 1} or less"),
    (["--steps", "1e9999"], f"--steps 1e9999: must be {2 ** 63 - 1} or less"),
    (["--seed", "9" * 5000], f"--seed {'9' * 60}...: must be {2 ** 63 - 1} or less"),
    (["--gemm", "library"], "--gemm library: must be one of fp8, own, Library "
                            "(did you mean Library?)"),
    (["--gemm="], "--gemm '': must be one of fp8, own, Library"),
    (["--out", "r\udcff"], "'r\\udcff' is not UTF-8 text"),
    (["--out=--"], "--out=--: a value cannot be --"),
])
def test_a_value_outside_its_bounds_is_refused_beside_its_flag(argv, sentence):
    assert refusal(*argv) == sentence


def test_a_value_on_its_bounds_is_taken_and_what_was_not_given_is_not_checked():
    assert parse() == Settings() and parse().steps is None
    settings = parse("--steps", "1", "--batch", "512", "--lr", "0", "--clip", "0", "--seed",
                     str(2 ** 63 - 1))
    assert settings == Settings(steps=1, batch=512, lr=0, clip=0, seed=2 ** 63 - 1)
    assert parse("--sample", "").sample == ""


# ---- flags

ALL = "(python quartet.py --help lists all)"


@pytest.mark.parametrize("argv, words, hint", [
    (["--steps"], "--steps: expected one argument", ALL),
    (["--out", "--resume"], "--out: expected one argument", ALL),
    (["--resume=1"], "--resume: ignored explicit argument", ALL),
    (["--no_compile="], "--no_compile: ignored explicit argument", ALL),
    (["--stpes", "3"], "--stpes", "(did you mean --steps?)"),
    (["--eval-every", "3"], "--eval-every", "(did you mean --eval_every?)"),
    (["--no-compile"], "--no-compile", "(did you mean --no_compile?)"),
    (["-steps", "3"], "-steps", "(did you mean --steps?)"),
    (["--Steps=3"], "--Steps=3", "(did you mean --steps?)"),
    (["--no_compil"], "--no_compil", "(did you mean --no_compile?)"),
    (["steps=3"], "steps=3", "(did you mean --steps?)"),
    (["--learning_rate", "1"], "--learning_rate", "(did you mean --lr?)"),
    (["--qwertz"], "--qwertz", ALL),
    ([""], "unrecognized arguments", ALL),
    (["--=3"], "--=3", ALL),
    (["\udcff"], "'\\udcff' is not UTF-8 text", ""),
])
def test_what_is_no_flag_is_refused_with_what_was_meant(argv, words, hint):
    sentence = refusal(*argv)
    assert words in sentence and sentence.endswith(hint)


NANOGPT = {
    "learning_rate": "lr", "max_iters": "steps", "batch_size": "micro", "block_size": "seq",
    "out_dir": "out", "eval_interval": "eval_every", "grad_clip": "clip", "n_layer": "size",
    "n_head": "size", "n_embd": "size", "dataset": "data", "init_from": "resume", "start": "sample",
    "gradient_accumulation_steps": "batch", "max_new_tokens": "sample_tokens",
}


@pytest.mark.parametrize("name", NANOGPT)
def test_flags_of_nanogpt_get_a_hint(name):
    for form in (f"--{name}=1", f"--{name.replace('_', '-')}"):
        with pytest.raises(UserError, match=rf"\(did you mean --{NANOGPT[name]}\?"):
            quartet.parse([form])


def test_a_hint_says_what_differs_and_names_flags_of_the_trainer_only():
    with pytest.raises(UserError, match="nanoGPT's batch_size is a microbatch, and --batch a"):
        quartet.parse(["--batch_size", "12"])
    names = {field.name for field in dataclasses.fields(quartet.Settings)}
    assert {meant for meant, _ in cli.OTHER_NAMES.values()} <= names
    assert not names & cli.OTHER_NAMES.keys()


def test_the_last_of_equal_flags_counts_and_a_value_may_begin_with_a_minus():
    assert parse("--steps", "3", "--compile", "--steps=4", "--no_compile") == \
        Settings(steps=4, compile=False)
    assert parse("--shift", "-5", "--sample", "- item").sample == "- item"
    assert parse("--sample=--x").sample == "--x" and parse("--sample", "a=b").sample == "a=b"
    assert parse("--sample", "a=--").sample == parse("--sample=a=--").sample == "a=--"


def test_what_was_typed_is_known_even_where_it_is_the_default():
    argv = ["--batch", "8", "--lr=1e-3", "--no_color", "--lr=1e-4"]
    assert cli.given(Settings, argv) == {"batch", "lr", "color"}
    assert cli.given(Settings, []) == set()
    with pytest.raises(UserError):
        cli.given(Settings, ["--batch", "0"])


def random_settings(rng):
    "any values of the flags' types, None only where it is the default"
    characters = string.printable + "é→\u2028=-%"
    choose = {
        int: lambda: rng.choice([0, 1, -1, rng.getrandbits(62), -rng.getrandbits(50)]),
        float: lambda: rng.choice([0.0, 1e-05, 1e16, -2.5, rng.random(), 5e-324, 1e308]),
        str: lambda: rng.choice(["", "-", "--x", "--steps=3", " ", "None",
                                 "".join(rng.choices(characters, k=5))]),
        bool: lambda: rng.random() < 0.5,
    }
    values = {}
    for field in dataclasses.fields(Settings):
        bare = dataclasses.field(default=field.default, metadata={
            "help": "any", "least": None, "most": None, "choices": ()})
        is_off = field.type is bool and field.default is False
        value = field.default
        if rng.random() < 0.7:
            value = True if is_off else choose[field.type]()
        values[field.name] = (field.type, bare, value)
    unbounded = dataclasses.make_dataclass(
        "Unbounded", [(name, kind, bare) for name, (kind, bare, _) in values.items()])
    return unbounded, unbounded(**{name: value for name, (_, _, value) in values.items()})


def test_flags_say_settings_exactly():
    rng = random.Random(0)
    for _ in range(300):
        kind, settings = random_settings(rng)
        flags = cli.to_flags(settings)
        again = cli.parse(kind, flags, "")
        assert dataclasses.astuple(again) == dataclasses.astuple(settings), flags
        assert list(map(type, dataclasses.astuple(again))) == \
            list(map(type, dataclasses.astuple(settings)))
    assert cli.to_flags(Settings(sample="", compile=False, color=False, lr=1e-05)) == \
        ["--lr=1e-05", "--sample=", "--no_compile", "--no_color"]


# ---- --help

def help_of(parse_argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_argv(["--resume", "--help"])
    assert stopped.value.code == 0
    return capsys.readouterr().out


def test_help_tells_defaults_choices_and_meanings(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    text = " ".join(help_of(lambda argv: parse(*argv), capsys).split())
    for words in ("What it does.",
                  "--batch X sequences in a step; default: 8",
                  "--seed X seed of everything; default: 0",
                  "--steps X length of the run; default: 350",
                  "--gemm X what multiplies: fp8 | own | Library; default: fp8",
                  "--no_compile the opposite",
                  "100% of the runs"):
        assert words in text, words
    assert "--no_resume" not in text


def test_help_of_the_trainer_tells_every_default_and_the_sizes(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "10000")
    text = help_of(quartet.parse, capsys)
    for field in dataclasses.fields(quartet.Settings):
        line = re.search(rf"^  --{field.name} .*", text, re.M).group()
        assert "default: " in line or field.default in (None, "", False), line
    for name in (*quartet.PRESETS, *quartet.RECIPES):
        assert re.search(rf"\b{re.escape(name)}\b", text), name


def programs():
    "the command of everything that can be started: a file, or a module after -m"
    yield "quartet.py"
    yield "data/prepare.py"
    for path in sorted((ROOT / "tools").rglob("*.py")):
        if 'if __name__ == "__main__":' in path.read_text():
            name = path.relative_to(ROOT).with_suffix("")
            parts = [part for part in name.parts if part != "__main__"]
            yield "-m " + ".".join(parts)
    for command in ("fit", "regions", "advise", "sweep", "collect"):
        yield f"-m tools.scaling {command}"
    yield "tools/style.py"


@pytest.mark.parametrize("program", list(programs()))
def test_help_is_answered_before_anything_is_imported(program):
    command = [sys.executable, "-X", "importtime", *program.split(), "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    assert done.returncode == 0 and "--help" in done.stdout, done.stderr[-500:]
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    imported = {line.split("|")[-1].strip() for line in lines[1:]}
    assert not imported & {"torch", "numpy", "tiktoken", "tqdm", "matplotlib"}
    assert len(imported) < 200
    assert len(lines) == len(done.stderr.splitlines()), "something was said besides the help"


# The study and the speedrun know their flags from quartet.py, which imports torch.
FLAGS_OF_QUARTET = ("-m tools.study", "-m tools.speedrun")


@pytest.mark.parametrize("program", [name for name in programs() if name not in FLAGS_OF_QUARTET])
def test_a_mistyped_flag_is_answered_before_torch_is_imported(program):
    command = [sys.executable, "-X", "importtime", *program.split(), "--qwertz=--"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    assert done.returncode == 2 and done.stdout == "", done.stderr[-500:]
    assert "--qwertz" in done.stderr.splitlines()[-1]
    assert not re.search(r"\| +torch$", done.stderr, re.M)


def test_other_command_lines_are_refused_in_one_sentence_too():
    parser = cli.Parser("python -m tools.x", "What it does.")
    parser.add_argument("--picture")
    assert parser.parse_args(["--picture=a"]).picture == "a"
    for argv, sentence in (
        (["--pic", "a"], "unrecognized arguments: --pic a (python -m tools.x --help explains it)"),
        (["--picture=--"], "--picture=--: a value cannot be --"),
        (["--picture", "\udcff"], "'\\udcff' is not UTF-8 text"),
    ):
        with pytest.raises(UserError) as caught:
            parser.parse_args(argv)
        assert str(caught.value) == sentence


# ---- how a program ends

class Diverged(UserError):
    exit_code = 3


@pytest.mark.parametrize("error, code, sentence", [
    (UserError("mend this"), 2, "mend this"),
    (Diverged("it has diverged"), 3, "it has diverged"),
    (KeyboardInterrupt(), 130, f"stopped by SIGINT; {cli.GO_ON}"),
    (Stopped(signal.SIGTERM), 143, f"stopped by SIGTERM; {cli.GO_ON}"),
    (Stopped(signal.SIGUSR1), 138, f"stopped by SIGUSR1; {cli.GO_ON}"),
    (OSError(errno.ENAMETOOLONG, "File name too long", "out/aaa"), 2,
     "out/aaa: File name too long"),
    (OSError(errno.ENOSPC, "No space left on device"), 2,
     "cannot read, write or print: No space left on device"),
    (OSError("odd"), 2, "cannot read, write or print: odd"),
    (BrokenPipeError(), 141, f"stopped, because nobody reads what it prints; {cli.GO_ON}"),
    (MemoryError("Unable to allocate 7 GiB"), 2,
     "out of memory, take a smaller --micro, --batch, --seq or --size: Unable to allocate 7 GiB"),
])
def test_every_way_to_end_has_its_exit_code_and_one_sentence(capsys, error, code, sentence):
    def main(argv):
        print("so far")
        raise error

    assert cli.run(main, []) == code
    printed = capsys.readouterr()
    assert printed.err == f"quartet: {sentence}\n" and printed.out == "so far\n"


def test_a_sentence_is_one_line_whatever_was_typed(capsys):
    with pytest.raises(UserError) as refused:
        parse("a\nb\x1b[2J")

    def main(argv):
        raise refused.value

    assert cli.run(main, []) == 2
    error = capsys.readouterr().err
    assert r"a\nb\x1b[2J" in error and error.count("\n") == 1 and "\x1b" not in error


def test_a_fault_of_ours_keeps_its_traceback_and_success_its_code():
    for error in (RuntimeError("shape '[3]' is invalid"), KeyError("x"), ValueError("y")):
        def main(argv):
            raise error
        with pytest.raises(type(error)):
            cli.run(main, [])
    assert cli.run(lambda argv: None, []) == 0 and cli.run(lambda argv: 1, []) == 1


def test_another_program_has_its_own_name_and_nothing_to_go_on_with(capsys):
    def main(argv):
        raise KeyboardInterrupt
    assert cli.run(main, [], "bench", go_on="") == 130
    assert capsys.readouterr().err == "bench: stopped by SIGINT\n"


PROGRAM = ("import sys; from tools import cli\n"
           "def main(argv):\n    for i in range(20000): print(i, '→ \udcff')\n"
           "sys.exit(cli.run(main, []))\n").encode("ascii", "backslashreplace").decode()


def start(redirection, **environment):
    command = f'"{sys.executable}" -c "$PROGRAM" {redirection}'
    return subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "PROGRAM": PROGRAM, **environment})


@pytest.mark.parametrize("redirection, code, sentence", [
    ("| head -1; exit ${PIPESTATUS[0]}", 141, "stopped, because nobody reads what it prints"),
    ("> /dev/full", 2, "cannot read, write or print: No space left on device"),
    (">&-", 0, ""),
    ("> /dev/null", 0, ""),
    ("2>&- | head -1 > /dev/null; exit ${PIPESTATUS[0]}", 141, ""),
    ("> /dev/full 2>&1", 2, ""),
])
def test_an_output_that_takes_nothing_ends_in_a_sentence(redirection, code, sentence):
    done = start(redirection)
    assert done.returncode == code
    assert done.stderr.count("\n") == bool(sentence) and sentence in done.stderr


def test_what_was_not_written_to_a_full_disk_is_noticed(monkeypatch):
    # Python keeps back a line without its end, and would try to write it after the exit code.
    code = ("import sys; from tools import cli\n"
            "sys.exit(cli.run(lambda argv: print('half a line', end=''), []))")
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=full,
                              stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr == "quartet: cannot read, write or print: No space left on device\n"


def test_an_output_that_is_not_utf8_raises_nothing():
    done = start("", PYTHONIOENCODING="ascii", PYTHONUTF8="0", LC_ALL="C")
    assert done.returncode == 0 and done.stdout.startswith("0 \\u2192 \\udcff\n"), done.stderr


def test_a_terminal_that_was_closed_ends_in_a_sentence():
    code = ("import os, sys; from tools import cli\n"
            "def main(argv):\n    while True: print('step', flush=True)\n"
            "code = cli.run(main, [])\n"
            "open(sys.argv[1], 'w').write(str(code))\n"
            "sys.exit(code)\n")
    controller, terminal = os.openpty()
    read_end, write_end = os.pipe()
    process = subprocess.Popen([sys.executable, "-c", code, f"/dev/fd/{write_end}"], cwd=ROOT,
                               stdin=terminal, stdout=terminal, stderr=terminal,
                               pass_fds=[write_end])
    os.close(terminal)
    os.close(write_end)
    os.read(controller, 100)
    os.close(controller)
    assert process.wait(timeout=30) == 2
    assert os.read(read_end, 10) == b"2"
    os.close(read_end)


def test_a_checkpoint_that_is_not_there_is_said_before_a_minute_of_measuring(monkeypatch, tmp_path):
    monkeypatch.setattr(quant_error, "print_errors", lambda: pytest.fail("measured first"))
    with pytest.raises(UserError, match="nofile is damaged or not a checkpoint"):
        quant_error.main([str(tmp_path / "nofile")])
