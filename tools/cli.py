"""
Comforts of the command line: it builds the parser from a dataclass, checks every value that was
typed, suggests what a mistyped flag meant, turns a user's mistake into one sentence and an exit
code, and finds an interpreter that has torch. It does not depend on the trainer.
"""
import argparse
import contextlib
import dataclasses
import difflib
import functools
import importlib.util
import math
import os
import re
import signal
import sys
import textwrap
from decimal import Decimal

from data.files import Stopped, UserError, check

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PACKAGES = ("torch", "numpy", "tiktoken", "tqdm")
GO_ON = "--resume, or the same command for several runs, goes on from the last checkpoint"
LARGEST_INT = 2 ** 63 - 1               # What C++, numpy and torch can hold, whatever a flag means.


# ---- what flags there are

def flag(default, meaning, least=None, most=None, choices=()):
    """A field of a settings dataclass, with the text that --help prints for it.

    default  None means that the flag was not given
    least    the smallest value that may be typed, most the largest; None is no bound
    choices  the only values that may be typed, if there are any; a dictionary may still grow
    """
    metadata = dict(help=meaning, least=least, most=most, choices=choices)
    return dataclasses.field(default=default, metadata=metadata)


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Breaks lines between words only: the name jetfire-fp4 is one word."""

    def _split_lines(self, text, width):
        return textwrap.wrap(text, width, break_on_hyphens=False)


class Parser(argparse.ArgumentParser):
    """Raises UserError where argparse would print how the program is used and exit.

    hint  what to add to argparse's message, a function of that message
    """

    def __init__(self, prog, description, hint=None, **options):
        super().__init__(prog, description=description, allow_abbrev=False,
                         formatter_class=HelpFormatter, **options)
        self.hint = hint or (lambda message: f"{prog} --help explains it")

    def parse_args(self, argv):
        for word in argv:
            check(is_utf8(word), f"{shown(word)} is not UTF-8 text")
            # Python 3.11 drops a value that is "--", and leaves an empty list in its place.
            check(not re.fullmatch(r"--[\w-]+=--", word), f"{shown(word)}: a value cannot be --")
        return super().parse_args(argv)

    def error(self, message):
        raise UserError(f"{message} ({self.hint(message)})")

    def print_help(self, file=None):
        # Flushed, so that a closed pipe is noticed while run() is there to deal with it.
        print(self.format_help(), end="", file=file, flush=True)


def parser_of(settings_class, description=None):
    """The Parser of a dataclass made of flag() fields; it tells only what was typed."""
    fields = dataclasses.fields(settings_class)
    parser = Parser("python quartet.py", description, functools.partial(hint, fields),
                    usage="%(prog)s [--FLAG X ...]", argument_default=argparse.SUPPRESS)
    for field in fields:
        # argparse takes % for the beginning of a placeholder.
        meaning = meaning_of(field).replace("%", "%%")
        name = "--" + field.name
        if field.type is not bool:
            parser.add_argument(name, metavar="X", type=functools.partial(read_value, field),
                                help=meaning)
            continue
        parser.add_argument(name, action="store_true", help=meaning)
        if field.default is not False:
            parser.add_argument("--no_" + field.name, action="store_false", dest=field.name,
                                help="the opposite")
    return parser


def meaning_of(field):
    """The text of a flag for --help, with its choices and its default where it does not tell it."""
    text = field.metadata["help"]
    if field.metadata["choices"]:
        text += ": " + " | ".join(field.metadata["choices"])
    has_default = field.type is not bool and field.default not in (None, "")
    if has_default and "default" not in text:
        text += f"; default: {field.default}"
    return text


# ---- what was typed

def parse(settings_class, argv, description):
    """The command line argv as an object of settings_class, a dataclass made of flag() fields.

    A field of type bool becomes a flag without a value; where it is not off by default, there is
    a second one, --no_name. Of a flag that is there several times the last one counts.
    Raises UserError for what is not a flag, has no value, or has one that is not possible.
    """
    return settings_class(**vars(parser_of(settings_class, description).parse_args(argv)))


def given(settings_class, argv):
    """The names of the flags that were typed."""
    return set(vars(parser_of(settings_class).parse_args(argv)))


def read_value(field, text):
    """The text that was typed for a flag, as a value of its type within its bounds."""
    read, kind = READERS[field.type]
    place = f"--{field.name} {shown(text)}"
    try:
        value = read(text)
    except ValueError:
        raise UserError(f"{place}: must be {kind}")
    least, most, choices = (field.metadata[key] for key in ("least", "most", "choices"))
    if most is None and field.type is int:
        most = LARGEST_INT
    check(least is None or value >= least, f"{place}: must be {least} or more")
    check(most is None or value <= most, f"{place}: must be {most} or less")
    check(not choices or value in choices,
          f"{place}: must be one of {', '.join(choices)}{nearest(text, choices)}")
    return value


# Digits are ASCII's, and nothing stands around them: int() and float() admit more than that.
NUMBER = re.compile(r"[+-]?(?=\.?\d)(\d+(_\d+)*)?(\.\d*)?(e[+-]?\d{1,4})?", re.ASCII | re.I)


def whole_number(text):
    """The int that a text says, exactly; 3e9 and 3_000_000_000 are whole numbers too.

    Raises ValueError for anything else.
    """
    # float() would round what is above 2^53, and int() takes neither 3e9 nor 5,000 digits.
    number = Decimal(number_text(text))
    if number != number.to_integral_value():
        raise ValueError(f"{text} is not a whole number")
    return int(number)


def finite_number(text):
    """The float that a text says. Raises ValueError for anything else, infinity and NaN too."""
    value = float(number_text(text))
    if not math.isfinite(value):
        raise ValueError(f"{text} is too large")
    return value


def number_text(text):
    """The text itself. Raises ValueError if it does not look like a number."""
    if not NUMBER.fullmatch(text):
        raise ValueError(f"{text} is not a number")
    return text


def is_utf8(text):
    """False if Python put halves of characters in the place of bytes that it could not read.

    No log or table of ours can hold those."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


READERS = {
    int: (whole_number, "a whole number, such as 1000 or 3e9"),
    float: (finite_number, "a finite number, such as 0.5 or 1e-3"),
    str: (str, "a text"),
}


def shown(text, longest=60):
    """A text as it can stand in a sentence: short, and in quotes if it would be hard to see."""
    if len(text) > longest:
        text = text[:longest] + "..."
    is_plain = text.isprintable() and text != "" and " " not in text
    return text if is_plain else ascii(text)


def to_flags(settings):
    """The command line that parse() would turn into these settings."""
    flags = []
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if value == field.default:
            continue
        if value is True:
            flags.append(f"--{field.name}")
        elif value is False:
            flags.append(f"--no_{field.name}")
        else:
            flags.append(f"--{field.name}={value}")
    return flags


# ---- what was meant

# What other trainers, nanoGPT above all, call these flags, and what is different where anything is.
OTHER_NAMES = {
    "learning_rate": ("lr", ""),
    "max_lr": ("lr", ""),
    "wd": ("weight_decay", ""),
    "max_iters": ("steps", ""),
    "max_steps": ("steps", ""),
    "num_iterations": ("steps", ""),
    "epochs": ("tokens", "the length of a run is told in steps or in tokens"),
    "batch_size": ("micro", "nanoGPT's batch_size is a microbatch, and --batch a whole step's"),
    "micro_batch_size": ("micro", ""),
    "device_batch_size": ("micro", ""),
    "total_batch_size": ("batch", "in sequences"),
    "gradient_accumulation_steps": ("batch", "the sequences of a step; --micro are computed at a "
                                             "time"),
    "block_size": ("seq", ""),
    "sequence_length": ("seq", ""),
    "eval_interval": ("eval_every", ""),
    "grad_clip": ("clip", ""),
    "max_grad_norm": ("clip", ""),
    "dataset": ("data", ""),
    "vocab_size": ("vocab", ""),
    "out_dir": ("out", "the folder of all runs; --name is the folder of this one in it"),
    "output_dir": ("out", "the folder of all runs; --name is the folder of this one in it"),
    "init_from": ("resume", "which takes no value; without it a run starts from scratch"),
    "n_layer": ("size", "a row of its own, such as 30M"),
    "n_head": ("size", "a row of its own, such as 30M"),
    "n_embd": ("size", "a row of its own, such as 30M"),
    "model": ("size", ""),
    "start": ("sample", "the text that is continued"),
    "prompt": ("sample", "the text that is continued"),
    "max_new_tokens": ("sample_tokens", ""),
    "num_workers": ("jobs", "how many runs train at a time"),
}


def hint(fields, message):
    """Which flag was probably meant, to be added to argparse's message about another one."""
    # The message on an unknown flag ends "... arguments: --precison fp4"; others name a known one.
    words = message.partition("arguments: ")[2].split() or [""]
    plain = words[0].split("=")[0].strip("-").replace("-", "_").lower()
    other, difference = OTHER_NAMES.get(plain, (plain, ""))
    names = [field.name for field in fields]
    names += ["no_" + field.name for field in fields if field.type is bool]
    meant = difflib.get_close_matches(other, names, 1)
    if not meant:
        return "python quartet.py --help lists all"
    return f"did you mean --{meant[0]}?" + (f" {difference}" if difference else "")


def nearest(text, choices):
    """The choice that was probably meant, as the end of a sentence."""
    by_lower_case = {choice.lower(): choice for choice in choices}
    meant = difflib.get_close_matches(text.lower(), by_lower_case, 1)
    return f" (did you mean {by_lower_case[meant[0]]}?)" if meant else ""


# ---- how a program ends

def run(main, argv, name="quartet", go_on=GO_ON):
    """Call main(argv); returns the exit code, after a sentence on stderr where it is not 0.

    0, or what main returns: done; 2: command or data have to be mended; 3: the run diverged;
    128 + n: signal n stopped it. Any other exception is a fault of ours and passes through.

    name   of the program, which the sentence begins with
    go_on  what is said about going on after the program was stopped
    """
    admit_any_text(sys.stdout, sys.stderr)
    try:
        code = main(argv) or 0
        flush_output()
        return code
    except (UserError, OSError, MemoryError, Stopped, KeyboardInterrupt) as error:
        code, sentence = explain(error)
        name = teller(error, name)
    if code > 128 and go_on:
        sentence += f"; {go_on}"
    if is_one_of_many():                # torchrun's own exit code is always 1.
        sentence += f" (exit code {code})"
    drop_unwritten(sys.stdout)
    if sys.stderr is not None and name:
        with contextlib.suppress(OSError):      # The terminal may be gone.
            print(f"{name}: {on_one_line(sentence)}", file=sys.stderr)
        drop_unwritten(sys.stderr)
    return code


def on_one_line(text):
    """The text with escapes in place of line ends and of whatever else a terminal would act on."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def explain(error):
    """The exit code for an exception and the sentence about it."""
    if isinstance(error, (Stopped, KeyboardInterrupt)):
        number = getattr(error, "signal_number", signal.SIGINT)
        return 128 + number, f"stopped by {signal.Signals(number).name}"
    if isinstance(error, UserError):
        return error.exit_code, str(error)
    if isinstance(error, BrokenPipeError):
        return 128 + signal.SIGPIPE, "stopped, because nobody reads what it prints"
    if isinstance(error, OSError):
        reason = error.strerror or str(error)
        return 2, f"{error.filename or 'cannot read, write or print'}: {reason}"
    # Python's and numpy's memory is left; a trainer explains torch's (tools/machine.py).
    reason = str(error).strip().partition("\n")[0]
    return 2, f"out of memory, take a smaller --micro, --batch, --seq or --size: {reason}"


def admit_any_text(*streams):
    """Make characters that a stream's encoding lacks appear as \\u1234 and raise nothing, and every
    line appear at once: Python keeps back what goes to a pipe, such as `| tee log.txt`."""
    for stream in streams:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace", line_buffering=True)


def flush_output():
    """Write what was printed so far, if there is anywhere to print to: `>&-` leaves no stdout."""
    if sys.stdout is not None:
        sys.stdout.flush()


def drop_unwritten(stream):
    """Flush a stream, or let what it holds go where that fails: at the end of the process Python
    would try again, and answer with an exit code of its own."""
    if stream is None:
        return
    try:
        stream.flush()
    except OSError:
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


# ---- one of several processes (tools/processes.py)

def is_one_of_many():
    """Whether torchrun, or a launcher that says the same, has started this process with others."""
    said = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    return said <= os.environ.keys()


def once_a_machine(error):
    """An error that all processes have, marked so that only one on each machine tells it."""
    error.is_told_elsewhere = os.environ.get("LOCAL_RANK", "0") != "0"
    return error


def teller(error, name):
    """In whose name an error is told; "" if another process tells it.

    An error has a mark is_told_elsewhere if all processes have it: whether another one tells it.
    """
    if not is_one_of_many():
        return name
    rank = os.environ["RANK"]
    if isinstance(error, (Stopped, KeyboardInterrupt)):     # They stop together.
        return name if rank == "0" else ""
    if not hasattr(error, "is_told_elsewhere"):
        return f"{name}, process {rank}"
    return "" if error.is_told_elsewhere else name


# ---- which Python runs it

def start(parse_argv, name="quartet", module=None, packages=PACKAGES):
    """Answer --help and mistyped flags; then make sure that this interpreter has what it needs.

    A program calls it before it imports what takes seconds or may be missing.

    module    the name that the program has for python -m; None: it is started as a file
    packages  what it needs
    """
    def read(argv):
        try:
            parse_argv(argv)            # What it returns is no exit code.
        except UserError as error:
            raise once_a_machine(error)

    code = run(read, sys.argv[1:], name)
    if code:
        sys.exit(code)
    program = ["-m", module, *sys.argv[1:]] if module else sys.argv
    use_venv(program, packages)


def answer_help(text, argv):
    """Print the text where --help is asked for, and end: for a program whose other flags are those
    of one that takes seconds to import."""
    if "--help" in argv or "-h" in argv:
        print(text.strip())
        sys.exit()


def use_venv(arguments, packages=PACKAGES):
    """Start over with the Python of .venv, which make creates, where this one lacks packages.

    arguments  the command line without the interpreter
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if not missing:
        return
    python = os.path.join(ROOT, ".venv", "bin", "python")
    in_venv = os.path.realpath(sys.prefix) == os.path.realpath(os.path.join(ROOT, ".venv"))
    if os.path.exists(python) and not in_venv:
        sys.stdout.flush()
        os.execv(python, [python, *arguments])
    print(f"quartet: {sys.executable} has no {', '.join(missing)}: run `make kernels`, which "
          "installs what is needed into .venv", file=sys.stderr)
    sys.exit(2)
