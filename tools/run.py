"""
The files of one run: its label, log.csv and checkpoint. It does not depend on the trainer.

A run lives in the folder OUT/NAME:

    log.csv     lines that start with # say what made the run and when it ended; between them is
                a CSV table with one line a step
    ckpt.pt     everything that the next step depends on
    curve.svg   the loss, drawn at the end
"""
import csv
import datetime
import itertools
import json
import math
import os
import subprocess
from typing import NamedTuple, Optional

from data.files import UserError, atomic_write, check
from fp4.recipes import variant_name

# Settings that do not change which model comes out of a run. All others are its identity: if they
# are equal to those in the log of a folder, then the folder holds the same run.
NOT_IDENTITY = ("resume", "discard", "out", "name", "sample", "sample_tokens", "seeds", "jobs")
CHECKPOINT_VERSION = 1


def label(config):
    """The name of a run by its settings, such as fp4-nearest-keep_first-1-seed2.

    config is the dictionary of a run's settings.
    """
    parts = [variant_name(config["precision"], config)]
    for setting in ("keep_first", "keep_last"):
        if config.get(setting):
            parts.append(f"{setting}-{config[setting]}")
    if config.get("seed"):
        parts.append(f"seed{config['seed']}")
    return "-".join(parts)


def set_aside(folder):
    """Rename the folder of an earlier run of the same name, so that nothing is lost."""
    if not os.path.exists(folder):
        return
    if os.listdir(folder) == ["log.txt"]:
        return                          # With --jobs, that file is our own output.
    for number in itertools.count(1):
        new_name = f"{folder}.{number}"
        if not os.path.exists(new_name):
            break
    os.rename(folder, new_name)
    print(f"{folder} existed and is now {new_name}")


# ---- log.csv

class Step(NamedTuple):
    """One line of the table in log.csv."""
    step: int                           # counted from 1
    loss: float                         # of the training batch, before the step
    val: Optional[float]                # validation loss after the step; None: not evaluated
    lr: float
    norm: float                         # of the gradient, before it was clipped
    ms: float                           # wall-clock time of the step
    tokens_per_s: float
    mfu: str                            # model FLOPs utilisation, or n/a


def log_head(config, device_name, backend_description):
    """The lines at the top of log.csv, which say what made the run."""
    lines = [
        f"# commit {git_commit()}",
        f"# config {json.dumps(config)}",
        f"# device {device_name}",
        f"# fp4 {backend_description}",
        ",".join(Step._fields),
    ]
    return "".join(line + "\n" for line in lines)


def git_commit():
    """The commit of this source tree, with -dirty where files differ from it."""
    here = os.path.dirname(os.path.abspath(__file__))
    command = ["git", "-C", here, "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        commit = ""
    return commit or "unknown"


def log_row(row):
    """One Step as a line of log.csv."""
    val = "" if row.val is None else f"{row.val:.4f}"
    return (f"{row.step},{row.loss:.6f},{val},{row.lr:.6e},{row.norm:.6f},{row.ms:.1f},"
            f"{row.tokens_per_s:.0f},{row.mfu}\n")


def log_end(memory):
    """The last line of a finished run's log.csv."""
    return f"# finished {datetime.date.today()}, peak memory {memory}\n"


class Run(NamedTuple):
    """What a log.csv says."""
    config: dict
    device: str
    history: list                       # of Step
    date: str                           # when the run was finished; "": it was not
    memory: str                         # peak memory, such as "1.03 GiB"

    @property
    def vals(self):
        """All validation losses, in order."""
        return [row.val for row in self.history if row.val is not None]

    @property
    def broken(self):
        """Did the run stop at a loss or gradient norm that was not finite?"""
        return bool(self.history) and not math.isfinite(self.history[-1].loss)

    @property
    def ended(self):
        """Is there nothing left to train, because the run was finished or is broken?"""
        return bool(self.date) or self.broken

    @property
    def diverged(self):
        """Did the validation loss end as NaN, or higher than it was at the first evaluation?"""
        return self.broken or not self.vals[-1] <= self.vals[0]


def read_log(path):
    with open(path) as file:
        return parse_log(file.read())


def parse_log(text):
    """The Run that the text of one log.csv describes.

    Raises ValueError, with a sentence, when the text is not a log.
    """
    try:
        lines = text.splitlines()
        head = dict(line[2:].split(" ", 1) for line in lines if line.startswith("# "))
        table = csv.DictReader(line for line in lines if not line.startswith("#"))
        # A line without its last field was cut off when the run was killed.
        history = [parse_row(fields) for fields in table if fields["mfu"]]
        date, _, memory = head.get("finished", "").partition(", peak memory ")
        return Run(json.loads(head["config"]), head["device"], history, date, memory)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"not a log of quartet.py ({type(error).__name__}: {error})")


def parse_row(fields):
    """A line of the table as a Step. A norm that is not finite makes the loss NaN."""
    norm = float(fields["norm"])
    loss = float(fields["loss"]) if math.isfinite(norm) else math.nan
    val = float(fields["val"]) if fields["val"] else None
    return Step(int(fields["step"]), loss, val, float(fields["lr"]), norm, float(fields["ms"]),
                float(fields["tokens_per_s"]), fields["mfu"])


def split_logs(text):
    """The logs in a file that holds several, one after the other."""
    return ["# commit" + part for part in text.split("# commit")[1:]]


def thin_log(text):
    """What is worth keeping of a log: its head, its end, the evaluated steps and the last one."""
    lines = text.splitlines()
    last = max(i for i, line in enumerate(lines) if not line.startswith("#"))
    kept = []
    for i, line in enumerate(lines):
        is_comment = line.startswith("#")
        if is_comment or i == last or line.split(",")[2]:
            kept.append(line + "\n")
    return "".join(kept)


def earlier_run(cfg):
    """The Run in the folder of cfg if it is this very run, finished or not; otherwise None."""
    try:
        run = read_log(os.path.join(cfg.out, cfg.name, "log.csv"))
    except (OSError, ValueError):
        return None
    same = all(run.config.get(name) == value for name, value in vars(cfg).items()
               if name not in NOT_IDENTITY)
    return run if same else None


# ---- checkpoints

def save_checkpoint(path, cfg, vocab_size, data_folder, model, optimizer, history):
    """Write everything that the next step depends on. The place in the data needs no entry: it
    is a function of the step."""
    import torch
    on_gpu = cfg.device != "cpu"
    state = dict(
        version=CHECKPOINT_VERSION,
        config=dict(vars(cfg)),
        vocab=vocab_size,
        data=data_folder,
        history=[tuple(row) for row in history],
        model=model.state_dict(),
        optimizer=optimizer.state_dict(),
        rng=torch.get_rng_state(),
        cuda_rng=torch.cuda.get_rng_state(cfg.device) if on_gpu else None,
    )
    atomic_write(path, lambda file: torch.save(state, file))


def load_checkpoint(path):
    """The dictionary that save_checkpoint wrote; UserError if the file is something else."""
    import torch
    check(os.path.exists(path),
          f"there is no checkpoint {path}: train first, or name another run with --name")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{path} is not a checkpoint of quartet.py ({type(error).__name__})")
    is_ours = isinstance(state, dict) and state.get("version") == CHECKPOINT_VERSION
    check(is_ours, f"{path} is of another version of quartet.py")
    return state


def restore_checkpoint(state, cfg, model, optimizer):
    """Put a loaded checkpoint into model, optimizer and torch's generators.

    Returns the history so far, a list of Step. Raises UserError if the model does not fit.
    """
    import torch
    old = state["config"]
    changes = [f"{name} {old.get(name)} -> {value}" for name, value in vars(cfg).items()
               if name not in NOT_IDENTITY and value != old.get(name)]
    try:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    except (RuntimeError, ValueError):
        reason = ", ".join(changes) or "the vocabulary differs"
        raise UserError(f"the checkpoint of {cfg.name} is of another model ({reason}): "
                        "choose another --name")
    if changes:
        print(f"resuming with other settings: {', '.join(changes)}")
    torch.set_rng_state(state["rng"])
    if cfg.device != "cpu" and state["cuda_rng"] is not None:
        torch.cuda.set_rng_state(state["cuda_rng"], cfg.device)
    return [Step(*row) for row in state["history"]]
