"""
Checkpoints: everything that the next step depends on, in files that prove that they are whole.

The newest is FOLDER/ckpt.pt. Older ones are called after the step at which they were written,
ckpt-280.pt, so that a run can go back to before something went wrong:

    mv ckpt-280.pt ckpt.pt              # and then --resume

The file is torch.save's, a zip archive that holds a checksum of each of its parts. torch.load does
not look at them; here they are compared before anything is loaded.

Several processes (tools/processes.py) call these functions together, and rank 0 reads and writes
all but one thing: the weights of a sharded model are too many for one process. Each writes its own,
by torch.distributed.checkpoint, into the folder ckpt-STEP.shards, and ckpt.pt names the files there
with their checksums. Whichever way a checkpoint was written, any number of processes can go on from
it, sharded or not. This module does not depend on the trainer.
"""
import os
import re
import shutil
import warnings
import zipfile
import zlib

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions, get_model_state_dict, get_optimizer_state_dict, get_state_dict,
    set_model_state_dict, set_optimizer_state_dict)

from data.files import UserError, atomic_write, check
from tools import processes
from tools.run import CHECKPOINT, PARTS, Step

VERSION = 3
ERRORS_OF_LOADING = (KeyError, RuntimeError, ValueError, dcp.api.CheckpointException)
SHARDS = re.compile(r"ckpt-(0|[1-9]\d*)\.shards")


def pack(config, corpus, model, optimizer, history):
    """
    Everything that the next step depends on, as a dictionary of plain types and tensors. The place
    in the data and the state of torch's generators need no entry: they are functions of the step.

    config   the settings of the run, a dictionary
    corpus   a data.corpus.Corpus
    history  a list of run.Step
    """
    weights, optimizer_state = get_state_dict(model, optimizer)
    return dict(
        version=VERSION,
        config=dict(config),
        corpus=dict(
            identity=corpus.identity,
            folder=corpus.folder,
            vocabulary=corpus.vocabulary.state(),
        ),
        history=[tuple(row) for row in history],
        model=weights,
        optimizer=optimizer_state,
        shards=None,
    )


def all_finite(state):
    """Are all weights and all moments of the optimizer finite, in all processes?"""
    moments = [value for of_weight in state["optimizer"]["state"].values()
               for value in of_weight.values()]
    verdicts = {}
    for value in [*state["model"].values(), *moments]:
        if torch.is_tensor(value) and value.is_floating_point():
            value = getattr(value, "_local_tensor", value)      # of a sharded one, the part here
            verdicts.setdefault(value.device, []).append(value.isfinite().all())
    # The CPU waits for the GPU here, once and not for each tensor.
    is_finite = all(torch.stack(of_device).all().item() for of_device in verdicts.values())
    return all(verdict for verdict, in processes.gather_numbers(is_finite, device="cpu"))


# ---- written

def save(folder, state, keep):
    """
    Make `state` the newest checkpoint of a folder, and keep that many checkpoints.

    At any instant there is a whole one: the last one stays ckpt.pt until the new one is on the
    disk. Raises UserError if the new one cannot be written.
    """
    if any(hasattr(weight, "device_mesh") for weight in state["model"].values()):
        state = write_shards(folder, state)
    processes.by_rank_0(lambda: write_file(folder, state, keep))


def write_file(folder, state, keep):
    newest = newest_path(folder)

    def write(file):
        torch.save(state, file)
        if keep > 1:
            keep_newest(folder)

    atomic_write(newest, write)
    step = len(state["history"])
    numbers = [number for number in numbers_in(folder) if number < step]
    kept = numbers[:keep - 1]
    for number in numbers_in(folder):
        # A later step than the newest belongs to steps that the user abandoned.
        if number not in kept:
            os.remove(numbered_path(folder, number))
    remove_shards(folder, keep=[*kept, step])


def write_shards(folder, state):
    """Let each process write its weights and its part of the optimizer's state.

    Returns the state without them, but with the names and checksums of the files that hold them.
    """
    name = f"ckpt-{len(state['history'])}.shards"
    path = os.path.join(folder, name)
    processes.by_rank_0(lambda: shutil.rmtree(path, ignore_errors=True))
    tensors = {part: state[part] for part in ("model", "optimizer")}
    try:
        dcp.save(tensors, checkpoint_id=path)
    except dcp.api.CheckpointException as error:
        raise processes.told_by(0, UserError(f"cannot write {path}: {complaint(error)}"))
    # The files of rank 1 are __1_0.distcp, __1_1.distcp, ...
    sums = processes.gather_objects(checksums(path, f"__{processes.rank()}_"))
    files = {file: checksum for of_process in sums for file, checksum in of_process.items()}
    files |= processes.by_rank_0(lambda: checksums(path, ".metadata"))
    processes.by_rank_0(lambda: check_there(path, files, "all machines have to see one folder"))
    return {**state, "model": {}, "optimizer": {}, "shards": {"folder": name, "files": files}}


def checksums(path, prefix):
    """{name: CRC-32} of the files in a folder whose names begin with the prefix."""
    return {name: checksum(os.path.join(path, name))
            for name in sorted(os.listdir(path)) if name.startswith(prefix)}


def checksum(path):
    value = 0
    with open(path, "rb") as file:
        while piece := file.read(2 ** 24):
            value = zlib.crc32(piece, value)
    return value


def remove_shards(folder, keep=()):
    """Remove the shards of all checkpoints of a folder but those of the steps in keep."""
    for name in os.listdir(folder):
        match = SHARDS.fullmatch(name)
        if match and int(match[1]) not in keep:
            shutil.rmtree(os.path.join(folder, name))


def keep_newest(folder):
    """Give ckpt.pt a second name, by its step, unless it is damaged."""
    newest = newest_path(folder)
    if not os.path.exists(newest):
        return
    try:
        step = len(read_file(newest, mmap=True)["history"])
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
    remove_shards(folder)


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


def last_good(folder):
    """The path of the newest checkpoint, in a sentence."""
    if exists(folder):
        return f"the last good checkpoint is {newest_path(folder)}"
    return "there is no checkpoint yet"


# ---- read

def load(folder):
    """
    The newest whole checkpoint of a folder, what pack() returned, on the CPU.

    Of several processes only rank 0 has its weights and the optimizer's state. restore() sends them
    to the others. Says so if it is not the newest one. Raises UserError if there is none.
    """
    state = {}

    def load_rest():
        state.update(load_newest(folder))
        return {**state, "model": {}, "optimizer": {}}

    rest = processes.by_rank_0(load_rest)
    return state or rest


def load_newest(folder):
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


def read(path):
    """One checkpoint. Raises UserError if it or its shards are damaged, or if it is none."""
    state = read_file(path)
    shards = state["shards"]
    if shards is not None:
        shards["path"] = os.path.join(os.path.dirname(path), shards["folder"])
        check_there(shards["path"], shards["files"], f"{path} needs it")
        for name, expected in shards["files"].items():
            file = os.path.join(shards["path"], name)
            check(checksum(file) == expected, f"{file} is damaged")
    return state


def check_there(path, names, reason):
    """Raise UserError, with a reason, unless a folder holds files of these names."""
    for name in names:
        file = os.path.join(path, name)
        check(os.path.isfile(file), f"there is no {file}: {reason}")


def read_file(path, mmap=False):
    """The file of a checkpoint, whose weights may be in shards. Raises UserError if it is damaged,
    or is something else.

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


def restore(state, model, optimizer):
    """Put a loaded checkpoint into model and optimizer, sharded or not.

    Returns the history so far, a list of run.Step. Raises UserError if the model does not fit.
    """
    restore_model(state, model)
    optimizer_state = state["optimizer"]
    options = options_of_whole_weights()
    try:
        if state["shards"]:
            optimizer_state = get_optimizer_state_dict(model, optimizer)
            read_shards(state, {"optimizer": optimizer_state})
            options = None
        set_optimizer_state_dict(model, optimizer, optimizer_state, options=options)
    except ERRORS_OF_LOADING as error:
        raise misfit("optimizer", error)
    return [Step(*row) for row in state["history"]]


def restore_model(state, model):
    """Put the weights of a loaded checkpoint into a model. Raises UserError if they do not fit."""
    weights = state["model"]
    options = options_of_whole_weights()
    try:
        if state["shards"]:
            weights = get_model_state_dict(model)
            read_shards(state, {"model": weights})
            options = None
        set_model_state_dict(model, weights, options=options)
    except ERRORS_OF_LOADING as error:
        raise misfit("model", error)


def read_shards(state, tensors):
    """Fill nested dictionaries of tensors, sharded or not, from the shards of a checkpoint."""
    is_alone = processes.size() == 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)        # that one process reads alone
        dcp.load(tensors, checkpoint_id=state["shards"]["path"], no_dist=is_alone)


def options_of_whole_weights():
    """For torch: how whole weights that only rank 0 has reach all processes."""
    is_many = processes.size() > 1
    return StateDictOptions(full_state_dict=True, broadcast_from_rank0=is_many)


def misfit(what, error):
    """The UserError of all processes about a checkpoint of another model; or the error itself, if
    it says that a process is gone."""
    if processes.is_loss(error):
        return error
    return processes.told_by(0, UserError(
        f"the checkpoint is of another {what}, choose another --name: {complaint(error)}"))


def complaint(error):
    """What torch says first about the weights that do not fit; its headline is left out."""
    if isinstance(error, dcp.api.CheckpointException):      # It has the errors of all processes.
        error, _ = next(iter(error.failures.values()))
    lines = [line.strip() for line in str(error).splitlines()]
    return lines[1] if len(lines) > 1 else lines[0]
