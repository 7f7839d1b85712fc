"""
Comforts of the command line: it builds the parser from a dataclass, suggests what a mistyped flag
meant, turns a user's mistake into one sentence, and finds an interpreter that has torch. It does
not depend on the trainer.
"""
import argparse
import dataclasses
import difflib
import importlib.util
import os
import sys

from data.files import UserError

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PACKAGES = ("torch", "numpy", "tiktoken", "tqdm")
STOPPED_BY_CTRL_C = 130                 # 128 + SIGINT, as a shell would say it


def flag(default, meaning):
    """A field of a settings dataclass, with the text that --help prints for it."""
    return dataclasses.field(default=default, metadata={"help": meaning})


def parse(settings_class, argv, description):
    """The command line argv as an object of settings_class, a dataclass made of flag() fields.

    A field of type bool with the default None becomes two flags, --name and --no_name.
    Raises UserError for anything that is not a flag or not of its type.
    """
    fields = dataclasses.fields(settings_class)
    parser = argparse.ArgumentParser(
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for field in fields:
        add_flag(parser, field)

    def fail(message):
        raise UserError(message + hint(message, fields))

    parser.error = fail
    return settings_class(**vars(parser.parse_args(argv)))


def add_flag(parser, field):
    name = "--" + field.name
    # argparse takes % for the beginning of a placeholder.
    meaning = field.metadata["help"].replace("%", "%%")
    if field.type is bool:
        parser.add_argument(name, action="store_true", default=field.default, help=meaning)
        if field.default is None:
            parser.add_argument("--no_" + field.name, action="store_false", dest=field.name,
                                help="the opposite")
        return
    parse_value = whole_number if field.type is int else field.type
    parser.add_argument(name, metavar="X", type=parse_value, default=field.default, help=meaning)


def whole_number(text):
    """An int; 3e9 and 3_000_000_000 are whole numbers too."""
    value = float(text)
    if not value.is_integer():
        raise ValueError(f"{text} is not a whole number")
    return int(value)


def hint(message, fields):
    """What to add to argparse's message: the flag that was probably meant."""
    # The message ends "... arguments: --precison fp4" or begins "argument --steps: ...".
    word = message.split("arguments: ")[-1].split()[0].split("=")[0]
    near = difflib.get_close_matches(word, ["--" + field.name for field in fields], 1)
    if near:
        return f" (did you mean {near[0]}?)"
    return " (python quartet.py --help lists all)"


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


def run(main, argv):
    """Call main(argv); returns the exit code: 0, 2 for a mistake of the user, 130 for Ctrl-C."""
    try:
        main(argv)
    except (UserError, OSError) as error:       # OSError: the disk of the log is full, say.
        print(f"quartet: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("quartet: stopped; --resume, or the same command for several runs, goes on from "
              "the last checkpoint", file=sys.stderr)
        return STOPPED_BY_CTRL_C
    return 0


def start(parse_argv):
    """Answer --help and mistyped flags; then make sure that this interpreter has what it needs.

    A script calls it before it imports what takes seconds or may be missing.
    """
    code = run(parse_argv, sys.argv[1:])
    if code:
        sys.exit(code)
    use_venv(sys.argv)


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
