"""
The same model in several precisions: from the same weights and on the same batches, for each seed.

    python quartet.py --precision bf16,fp4,quartet2 --seeds 3
    python quartet.py --precision all --jobs 8          # every row of the table, 8 runs at a time

Nothing is trained twice: the log.csv of a run says what the run was, and whether it was finished.
So the same command goes on with what is missing, and an interrupted run goes on from its
checkpoint. Runs go seed by seed, so that what is there at any time can be compared. A run that
diverges stops no other: it is a row of the table.

Several processes of torchrun (tools/processes.py) train each run together. Rank 0 decides from the
files what is missing, and writes the table.

This module does not import quartet.py, which is the program that calls it: its callers hand over
the function that trains a run, and the script that a child process starts.
"""
import ctypes
import dataclasses
import functools
import os
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import torch

from data import signals
from data.corpus import open_corpus
from data.files import Stopped, UserError, check
from tools import checkpoint, cli, processes
from tools.report import check_files, report
from tools.run import Diverged, difference, run_in, set_aside

STOP_SECONDS = 60                       # for a child to finish its step and save
PR_SET_PDEATHSIG = 1                    # of prctl: the signal for a process whose parent ends

# If this process is killed, its runs stop as well, after their step and a checkpoint. Only Linux
# can promise that. The C library is loaded here, because little is safe between the fork and the
# start of a child.
stop_with_parent = None
if sys.platform == "linux":
    stop_with_parent = functools.partial(ctypes.CDLL(None).prctl, PR_SET_PDEATHSIG, signal.SIGTERM)


def compare(configs, path, train, script):
    """Train what is missing, then write the table of all runs to path.csv and path.svg.

    The arguments are those of finish(). Raises UserError when some runs failed, and before
    anything is trained if the table would replace a file of the user.
    """
    processes.by_rank_0(lambda: check_files(path))
    runs, failure = finish(configs, train, script)
    if runs:
        processes.by_rank_0(lambda: report(runs, path))
    if failure:
        raise failure


def finish(configs, train, script):
    """
    Train what is missing of these runs, which have one corpus.

    configs  settings of each run
    train    train(cfg) trains one run, and raises Diverged if the run diverges
    script   what a child process starts: quartet.py, or a script that adds rows to its table

    Returns the Runs that have ended, and the UserError that is to be raised if some failed.
    """
    jobs = configs[0].jobs
    processes.all_or_none(lambda: check(
        jobs == 1 or not cli.is_one_of_many(),
        f"--jobs {jobs} trains {jobs} runs at a time, but all processes of torchrun train one "
        "run together: leave --jobs or torchrun out"))
    # The corpus is made here once, not in each child. It is that of the moment: what was trained on
    # another one of the same name cannot stand beside it.
    corpus = processes.one_before_others(
        lambda: open_corpus(configs[0].data, configs[0].vocab)).identity
    missing = processes.by_rank_0(lambda: missing_runs(configs, corpus))
    if jobs == 1:
        failed = train_in_turn(missing, train)
    else:
        failed = train_in_processes(missing, jobs, script)
    failure = UserError(f"{len(failed)} of {len(configs)} runs failed, the same command tries them "
                        f"again: {'; '.join(failed)}")
    ended = processes.by_rank_0(lambda: ended_runs(configs, corpus))
    return ended, processes.told_by(0, failure) if failed else None


def ended_runs(configs, corpus):
    """The Runs in the folders of configs that have ended, and are the same; corpus is an identity.
    """
    ended = []
    for cfg in configs:
        run = run_in(cfg.folder)
        if run and run.ended and not difference(run, vars(cfg), corpus):
            ended.append(run)
    return ended


def missing_runs(configs, corpus):
    """Those of configs that are not finished; they resume where there is a checkpoint.

    corpus is the identity of the corpus. A run that is not the same is named, and trained again.
    """
    missing = []
    for cfg in configs:
        folder = cfg.folder
        run = run_in(folder)
        differs = difference(run, vars(cfg), corpus) if run else ""
        if differs:
            print(f"{folder} holds another run ({differs}): {cfg.name} is trained again")
        elif run and run.ended:
            print(f"{cfg.name} {'diverged' if run.diverged else 'is finished'}")
            continue
        can_resume = run is not None and not differs and checkpoint.exists(folder)
        missing.append(dataclasses.replace(cfg, resume=can_resume))
    return missing


def train_in_turn(configs, train):
    """Train one run after the other in this process. A run that fails or diverges stops no other.
    One of several processes that fails alone cannot go on: the others wait for it in that run.

    Returns a sentence about each run that failed.
    """
    failed = []
    for cfg in configs:
        try:
            train(cfg)
        except Diverged as error:
            print(error)
        except UserError as error:
            if not processes.all_have(error):
                raise
            failed.append(tell_failure(cfg, error))
    return failed


def tell_failure(cfg, error):
    """Print that a run failed; returns the sentence about it."""
    print(f"{cfg.name}: failed: {error}", flush=True)
    return f"{cfg.name}: {error}"


# ---- a process for each run

class Child(NamedTuple):
    process: subprocess.Popen
    cfg: object                         # the settings of its run
    slot: int                           # which of the runs at a time it is: 0 to jobs - 1
    start: float                        # seconds
    n_said: int                         # bytes in its log.txt before it began


def train_in_processes(configs, jobs, script):
    """Train `jobs` runs at a time, each in a process of its own; prints a line as each begins and
    ends.

    Returns a sentence about each run that failed.
    """
    waiting = list(configs)
    free_slots = list(range(jobs))
    children = []
    failed = []
    announcement = f"the runs finish their steps and save, for {STOP_SECONDS} s at most"
    with signals.Noted(announcement) as stop:
        try:
            while (waiting or children) and not stop.is_asked:
                while waiting and free_slots:
                    cfg = waiting.pop(0)
                    try:
                        children.append(start_child(cfg, free_slots[0], jobs, script))
                    except (UserError, OSError) as error:       # Its folder is in use, say.
                        failed.append(tell_failure(cfg, error))
                        continue
                    free_slots.pop(0)
                    tell_start(cfg)
                time.sleep(0.1)
                for child in [child for child in children if child.process.poll() is not None]:
                    children.remove(child)
                    free_slots.append(child.slot)
                    n_ended = len(configs) - len(waiting) - len(children)
                    if not tell_outcome(child, f"[{n_ended}/{len(configs)}]"):
                        failed.append(f"{log_text_path(child.cfg)}: {last_line(child)}")
        finally:
            # Some are left after a signal, or when nobody reads what is printed here.
            stop_children(children)
        if stop.is_asked:
            tell_what_is_left([child.cfg for child in children] + waiting, len(configs))
        stop.raise_if_asked()
    return failed


def start_child(cfg, slot, jobs, script):
    """Start the process of one run, whose output goes to log.txt in the run's folder."""
    if not cfg.resume:
        set_aside(cfg.folder)
    os.makedirs(cfg.folder, exist_ok=True)
    with open(log_text_path(cfg), "a") as output:
        n_said = output.tell()
        process = subprocess.Popen(
            [sys.executable, script, *cli.to_flags(cfg)],
            stdout=output,
            stderr=output,
            env=child_environment(cfg.device, slot, jobs),
            preexec_fn=stop_with_parent,
            # Ctrl-C reaches every process of a terminal's group. Children shall not get it twice.
            start_new_session=True,
        )
    return Child(process, cfg, slot, time.time(), n_said)


def child_environment(device, slot, jobs):
    """The environment of a child: its share of the cores, and one GPU if several are visible."""
    if hasattr(os, "sched_getaffinity"):
        n_cores = len(os.sched_getaffinity(0))
    else:
        n_cores = os.cpu_count()
    threads = str(max(1, n_cores // jobs))
    env = os.environ | dict(OMP_NUM_THREADS=threads, TORCHINDUCTOR_COMPILE_THREADS=threads)
    n_gpus = torch.cuda.device_count()
    if device == "cuda" and n_gpus > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else list(map(str, range(n_gpus)))
        env["CUDA_VISIBLE_DEVICES"] = names[slot % n_gpus].strip()
    return env


def tell_start(cfg):
    print(f"{cfg.name}: {'resumed' if cfg.resume else 'started'}, what it says is in "
          f"{log_text_path(cfg)}", flush=True)


def tell_outcome(child, prefix):
    """Print how the run of a child that has ended came out; returns whether it came to an end."""
    run = run_in(child.cfg.folder)
    has_ended = run is not None and run.ended
    says_so = child.process.returncode == Diverged.exit_code
    has_diverged = run.diverged if has_ended else says_so
    if has_diverged:
        step = run.history[-1].step if run and run.history else 1
        outcome = f"diverged, seen at step {step}"
    elif has_ended:
        outcome = f"val loss {run.vals[-1]:.4f}"
    else:
        outcome = f"failed: {last_line(child)}"
    seconds = time.time() - child.start
    print(f"{prefix} {child.cfg.name}: {outcome} ({seconds:.0f} s)", flush=True)
    return has_ended or has_diverged


def stop_children(children):
    """Let each child finish its step and save. A second signal, or a minute, ends their time."""
    for child in children:
        child.process.terminate()
    deadline = time.time() + STOP_SECONDS
    try:
        for child in children:
            child.process.wait(max(0, deadline - time.time()))
    except (KeyboardInterrupt, Stopped, subprocess.TimeoutExpired):
        for child in children:
            child.process.kill()
            child.process.wait()


def tell_what_is_left(configs, n_runs):
    """Print how many runs the same command will resume and how many it will begin."""
    n_saved = sum(checkpoint.exists(cfg.folder) for cfg in configs)
    print(f"{n_runs - len(configs)} of {n_runs} runs have ended; the same command resumes "
          f"{n_saved} from their checkpoints and begins {len(configs) - n_saved}", flush=True)


def log_text_path(cfg): return os.path.join(cfg.folder, "log.txt")


def last_line(child):
    """The last thing that a child said."""
    with open(log_text_path(child.cfg), "rb") as file:
        file.seek(child.n_said)
        lines = file.read().decode(errors="replace").strip().splitlines()
    line = lines[-1] if lines else "it said nothing"
    code = child.process.returncode
    if code == -signal.SIGKILL:
        return f"killed, as the system does when memory is full; before, it said: {line}"
    return line
