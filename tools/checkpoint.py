"""
Checkpoints: everything that the next step depends on, in files that prove that they are whole.

The newest is FOLDER/ckpt.pt. Older ones are called after the step at which they were written,
ckpt-280.pt, so that a run can go back to before something went wrong:

    mv ckpt-280.pt ckpt.pt              # and then --resume

The file is torch.save's, a zip archive that holds a checksum of each of its parts. torch.load does
not look at them; here they are compared before anything is loaded. This module does not depend on
the trainer.
"""
import os
import shutil
import zipfile

import torch

from data.files import UserError, atomic_write, check
from tools.run import CHECKPOINT, PARTS, Step

VERSION = 2


def pack(config, corpus, model, optimizer, history):
    """
    Everything that the next step depends on, as a dictionary of plain types and tensors. The place
    in the data needs no entry: it is a function of the step.

    config   the settings of the run, a dictionary
    corpus   a data.corpus.Corpus
    history  a list of run.Step
    """
    on_gpu = config["device"] != "cpu"
    return dict(
        version=VERSION,
        config=dict(config),
        corpus=dict(
            identity=corpus.identity,
            folder=corpus.folder,
            vocabulary=corpus.vocabulary.state(),
        ),
        history=[tuple(row) for row in history],
        model=model.state_dict(),
        optimizer=optimizer.state_dict(),
        rng=torch.get_rng_state(),
        cuda_rng=torch.cuda.get_rng_state(config["device"]) if on_gpu else None,
    )


def all_finite(state):
    """Are all weights and all moments of the optimizer finite?"""
    moments = [value for of_weight in state["optimizer"]["state"].values()
               for value in of_weight.values()]
    verdicts = {}
    for value in [*state["model"].values(), *moments]:
        if torch.is_tensor(value) and value.is_floating_point():
            verdicts.setdefault(value.device, []).append(value.isfinite().all())
    # The CPU waits for the GPU here, once and not for each tensor.
    return all(torch.stack(of_device).all().item() for of_device in verdicts.values())


# ---- written

def save(folder, state, keep):
    """
    Make `state` the newest checkpoint of a folder, and keep that many checkpoints.

    At any instant there is a whole one: the last one stays ckpt.pt until the new one is on the
    disk. Raises UserError if the new one cannot be written.
    """
    newest = newest_path(folder)

    def write(file):
        torch.save(state, file)
        if keep > 1:
            keep_newest(folder)

    atomic_write(newest, write)
    step = len(state["history"])
    numbers = [number for number in numbers_in(folder) if number < step]
    for number in numbers_in(folder):
        # A later step than the newest belongs to steps that the user abandoned.
        if number not in numbers[:keep - 1]:
            os.remove(numbered_path(folder, number))


def keep_newest(folder):
    """Give ckpt.pt a second name, by its step, unless it is damaged."""
    newest = newest_path(folder)
    if not os.path.exists(newest):
        return
    try:
        step = len(read(newest, mmap=True)["history"])
    except UserError as error:
        print(f"{error}; it is replaced")
        return
    path = numbered_path(folder, step)
    if os.path.exists(path):
        os.remove(path)
    try:
        os.link(newest, path)
    except OSError:                     # There are file systems without links.
        with open(newest, "rb") as source:
            atomic_write(path, lambda file: shutil.copyfileobj(source, file))


def discard(folder):
    """Remove all checkpoints of a folder."""
    for path in paths(folder):
        os.remove(path)


# ---- found

def newest_path(folder):
    return os.path.join(folder, "ckpt.pt")


def numbered_path(folder, step):
    return os.path.join(folder, f"ckpt-{step}.pt")


def numbers_in(folder):
    """The steps in the names of a folder's older checkpoints, the latest first."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    matches = [CHECKPOINT.fullmatch(name) for name in names]
    return sorted((int(match[1]) for match in matches if match and match[1]), reverse=True)


def paths(folder):
    """The checkpoints of a folder, the newest first."""
    newest = [newest_path(folder)] if os.path.exists(newest_path(folder)) else []
    return newest + [numbered_path(folder, step) for step in numbers_in(folder)]


def exists(folder):
    return bool(paths(folder))


# ---- read

def load(folder):
    """
    The newest whole checkpoint of a folder, what pack() returned, on the CPU.

    Says so if it is not the newest one. Raises UserError if there is none.
    """
    newest = newest_path(folder)
    found = paths(folder)
    check(found, f"there is no checkpoint {newest}: train first, or name another run with --name")
    problems = [] if newest in found else [f"there is no {newest}"]
    for path in found:
        try:
            state = read(path)
        except UserError as error:
            problems.append(str(error))
            continue
        if problems:
            print(f"{'; '.join(problems)}: going on from {path}, after step "
                  f"{len(state['history'])}")
        return state
    raise UserError(f"{'; '.join(problems)}: there is nothing to go on from, train it again")


def read(path, mmap=False):
    """One checkpoint. Raises UserError if it is damaged, or is something else.

    With mmap, its tensors stay on the disk until they are looked at.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged_part = archive.testzip()
        check(damaged_part is None, f"{path} is damaged in {damaged_part!r}")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except (UserError, MemoryError):
        raise
    except Exception as error:          # A damaged file may raise anything.
        raise UserError(f"{path} is damaged or not a checkpoint of quartet.py "
                        f"({type(error).__name__})")
    is_ours = isinstance(state, dict) and state.get("version") == VERSION and PARTS <= state.keys()
    check(is_ours, f"{path} is of another version of quartet.py")
    return state


def restore(state, model, optimizer, device):
    """Put a loaded checkpoint into model, optimizer and torch's generators.

    Returns the history so far, a list of run.Step. Raises UserError if the model does not fit.
    """
    restore_model(state, model)
    try:
        optimizer.load_state_dict(state["optimizer"])
    except (KeyError, RuntimeError, ValueError) as error:
        raise UserError(f"the checkpoint is of another optimizer: {complaint(error)}")
    torch.set_rng_state(state["rng"])
    if device != "cpu" and state["cuda_rng"] is not None:
        torch.cuda.set_rng_state(state["cuda_rng"], device)
    return [Step(*row) for row in state["history"]]


def restore_model(state, model):
    """Put the weights of a loaded checkpoint into a model. Raises UserError if they do not fit."""
    try:
        model.load_state_dict(state["model"])
    except (KeyError, RuntimeError) as error:
        raise UserError("the checkpoint is of another model, choose another --name: "
                        f"{complaint(error)}")


def complaint(error):
    """What torch says first about the weights that do not fit; its headline is left out."""
    lines = [line.strip() for line in str(error).splitlines()]
    return lines[1] if len(lines) > 1 else lines[0]
