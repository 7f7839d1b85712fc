"""
A trained model as a folder that Hugging Face's transformers loads.

    python -m tools.huggingface export out/NAME DIR     # of the newest checkpoint of a run
    python -m tools.huggingface export out/NAME/ckpt-280.pt DIR
    python -m tools.huggingface export out/NAME DIR --form fpquant-pseudo

DIR is there whole or not at all; one that has files in it is refused.
"""
import contextlib
import json
import os
import shutil
import sys
from importlib.util import find_spec

from data import signals
from data.files import UserError, check
from tools import cli

FORMS = ("bf16", "fpquant-pseudo", "fpquant")       # weights.FORMS; torch is not needed for --help


def parse(argv):
    parser = cli.Parser("python -m tools.huggingface", __doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    description = "write a trained model as a folder of Hugging Face"
    command = commands.add_parser("export", help=description, description=description)
    command.add_argument("run", metavar="RUN", help="folder of a run, or one of its checkpoints")
    command.add_argument("folder", metavar="DIR", help="the folder that is written")
    command.add_argument("--form", choices=FORMS, default="bf16",
                         help="bf16 | fpquant-pseudo | fpquant (tools/README.md); default: bf16")
    return parser.parse_args(argv)


# The imports below take seconds, so that --help and mistyped flags are answered here.
if __name__ == "__main__":
    cli.start(parse, "huggingface", "tools.huggingface")

import quartet
from data.tokenizer import vocabulary_from_state
from model import PRESETS
from tools import checkpoint, machine, schedule
from tools.huggingface import vocabulary, weights

# As --sample draws, unless flags say otherwise.
SAMPLING = {"do_sample": True, "temperature": quartet.Settings.temperature,
            "top_k": quartet.Settings.top_k}


# ---- from a checkpoint

def export(run, folder, form):
    """Writes the model of a run, or of one checkpoint, into a new folder; returns what it says.

    Raises UserError if there is no such model, if it has no such form, if safetensors is missing,
    or if the folder cannot be written.
    """
    check_free(folder)
    check(find_spec("safetensors"),
          "the package safetensors writes the file of tensors: pip install safetensors")
    state = checkpoint.read(run) if os.path.isfile(run) else checkpoint.load_newest(run)
    cfg = quartet.settings_of(state, quartet.Settings(device="cpu"))
    cfg = schedule.settings_at(cfg, PRESETS, len(state["history"]))
    weights.check_form(form, schedule.recipe_of(cfg))
    own = vocabulary_from_state(state["corpus"]["vocabulary"])
    with machine.errors_in_words(cfg):
        model = quartet.build_model(cfg, own.size)
        checkpoint.restore_model(state, model)
        return write(model, own, folder, form)


# ---- into a folder

def write(model, own, folder, form):
    """Writes a Llama with its vocabulary into a new folder; returns sentences about it."""
    end_id = vocabulary.end_id(own)
    texts, sentence = vocabulary.files(own, model.config.block_size)
    texts["config.json"] = to_json(weights.config(model, form, end_id))
    texts["generation_config.json"] = to_json(
        {"bos_token_id": end_id, "eos_token_id": end_id, **SAMPLING})
    tensors = weights.convert(model, form)
    with new_folder(folder) as temporary:
        for name, text in texts.items():
            with open(os.path.join(temporary, name), "w", encoding="utf-8") as file:
                file.write(text)
        save(tensors, os.path.join(temporary, "model.safetensors"))
    n_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    return [f"{folder} has {weights.FORMS[form]}; {n_bytes:,} bytes of weights",
            *about_padding(model.config.vocab_size, own.size),
            *([sentence] if sentence else [])]


def save(tensors, path):
    """Writes {name: tensor}. Raises OSError if the disk is full, say."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file
    try:
        save_file(tensors, path, {"format": "pt"})      # which package makes tensors of them
    except SafetensorError as error:
        raise OSError(0, str(error))


def about_padding(rows, size):
    """What is said about rows that stand for no token, in a list."""
    if rows == size:
        return []
    return [f"vocab_size is {rows:,}, a multiple of 64 as in training; no token has the ids from "
            f"{size:,} on"]


def to_json(entries):
    return json.dumps(entries, indent=2) + "\n"


def check_free(folder):
    """Raises UserError if there is something in the place of a new folder."""
    is_empty = os.path.isdir(folder) and not os.listdir(folder)
    check(is_empty or not os.path.lexists(folder),
          f"{folder} is there already: name another folder, or remove it")


@contextlib.contextmanager
def new_folder(folder):
    """Gives a temporary folder, which becomes `folder` when the with statement ends.

    After an exception it is removed. It lies beside `folder`, so that it need not be copied.
    Raises UserError if the folder cannot be written.
    """
    path = os.path.abspath(folder)
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        os.makedirs(temporary)
        yield temporary
        check_free(folder)
        os.rename(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}; nothing of it is left")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# ---- main

def main(argv):
    args = parse(argv)
    print(*export(args.run, args.folder, args.form), sep="\n")


def run_cli(argv):
    """main(argv), in which a mistake of the user ends in one sentence; returns the exit code."""
    with signals.become_exceptions():
        return cli.run(main, argv, "huggingface", go_on="")


if __name__ == "__main__":
    sys.exit(run_cli(sys.argv[1:]))
