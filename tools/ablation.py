"""
The same model in several precisions: from the same weights and on the same batches, for each seed.

    python quartet.py --precision bf16,fp4,quartet2 --seeds 3
    python quartet.py --precision all --jobs 8          # every row of the table, 8 runs at a time

Nothing is trained twice: the log.csv of a run says what the run was, and whether it was finished.
So the same command goes on with what is missing, and an interrupted run goes on from its
checkpoint. Runs go seed by seed, so that what is there at any time can be compared.

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

from data.files import UserError
from data.prepare import prepare
from fp4 import build
from tools import cli
from tools.report import report
from tools.run import earlier_run, set_aside

PR_SET_PDEATHSIG = 1                    # of prctl: the signal for a process whose parent ends

# If this process is killed, none of its runs goes on unseen. Only Linux can promise that. The C
# library is loaded here, because little is safe between the fork and the start of a child.
die_with_parent = None
if sys.platform == "linux":
    die_with_parent = functools.partial(ctypes.CDLL(None).prctl, PR_SET_PDEATHSIG, signal.SIGKILL)


def compare(configs, path, train, script):
    """Train what is missing, then write the table of all runs to path.csv and path.svg.

    The arguments are those of finish(). Raises UserError when some runs failed.
    """
    failure = finish(configs, train, script)
    runs = [earlier_run(cfg) for cfg in configs]
    ended = [run for run in runs if run and run.ended]
    if ended:
        report(ended, path)
    if failure:
        raise failure


def finish(configs, train, script):
    """Train what is missing; returns the UserError that is to be raised if some runs failed.

    configs  settings of each run
    train    train(cfg) trains one run, and raises UserError when that diverges
    script   what a child process starts: quartet.py, or a script that adds rows to its table
    """
    missing = missing_runs(configs)
    jobs = configs[0].jobs
    if jobs == 1:
        train_in_turn(missing, train)
        return None
    # Corpus and kernels are made here once, not in each child.
    prepare(configs[0].data, configs[0].vocab)
    build(configs[0].gemm)
    failed = train_in_processes(missing, jobs, script)
    if not failed:
        return None
    reasons = [f"{log_text_path(cfg)}: {reason}" for cfg, reason in failed]
    return UserError(f"{len(failed)} of {len(configs)} runs failed, the same command tries them "
                     f"again: {'; '.join(reasons)}")


def missing_runs(configs):
    """Those of configs that are not finished; they resume where there is a checkpoint."""
    missing = []
    for cfg in configs:
        run = earlier_run(cfg)
        if run and run.ended:
            print(f"{cfg.name} is finished")
            continue
        has_checkpoint = os.path.exists(os.path.join(cfg.out, cfg.name, "ckpt.pt"))
        can_resume = run is not None and has_checkpoint
        missing.append(dataclasses.replace(cfg, resume=can_resume))
    return missing


def train_in_turn(configs, train):
    """Train one run after the other in this process. A run that diverges stops no other."""
    for cfg in configs:
        try:
            train(cfg)
        except UserError as error:
            run = earlier_run(cfg)
            if not (run and run.broken):
                raise
            print(error)


# ---- a process for each run

class Child(NamedTuple):
    process: subprocess.Popen
    cfg: object                         # the settings of its run
    slot: int                           # which of the runs at a time it is: 0 to jobs - 1
    start: float


def train_in_processes(configs, jobs, script):
    """Train `jobs` runs at a time, each in a process of its own; prints a line as each ends.

    Returns [(cfg, the last line of its output), ...] of the runs that failed.
    """
    waiting = list(configs)
    free_slots = list(range(jobs))
    children = []
    failed = []
    try:
        while waiting or children:
            while waiting and free_slots:
                children.append(start_child(waiting.pop(0), free_slots.pop(0), jobs, script))
            time.sleep(0.1)
            for child in [child for child in children if child.process.poll() is not None]:
                children.remove(child)
                free_slots.append(child.slot)
                has_failed, outcome = outcome_of(child.cfg)
                if has_failed:
                    failed.append((child.cfg, outcome))
                    outcome = f"failed: {outcome}"
                n_ended = len(configs) - len(waiting) - len(children)
                seconds = time.time() - child.start
                print(f"[{n_ended}/{len(configs)}] {child.cfg.name}: {outcome} ({seconds:.0f} s)",
                      flush=True)
    finally:
        for child in children:
            child.process.kill()
    return failed


def start_child(cfg, slot, jobs, script):
    """Start the process of one run, whose output goes to log.txt in the run's folder."""
    if not cfg.resume:
        set_aside(os.path.join(cfg.out, cfg.name))
    os.makedirs(os.path.join(cfg.out, cfg.name), exist_ok=True)
    with open(log_text_path(cfg), "a") as output:
        process = subprocess.Popen(
            [sys.executable, script, *cli.to_flags(cfg)],
            stdout=output,
            stderr=output,
            env=child_environment(slot, jobs),
            preexec_fn=die_with_parent,
        )
    return Child(process, cfg, slot, time.time())


def child_environment(slot, jobs):
    """The environment of a child: its share of the cores, and one GPU if there are several."""
    if hasattr(os, "sched_getaffinity"):
        n_cores = len(os.sched_getaffinity(0))
    else:
        n_cores = os.cpu_count()
    threads = str(max(1, n_cores // jobs))
    env = os.environ | dict(OMP_NUM_THREADS=threads, TORCHINDUCTOR_COMPILE_THREADS=threads)
    n_gpus = torch.cuda.device_count()
    if n_gpus > 1:
        env["CUDA_VISIBLE_DEVICES"] = str(slot % n_gpus)
    return env


def outcome_of(cfg):
    """Whether the run of a child that has ended failed, and how it ended, in words."""
    run = earlier_run(cfg)
    if not (run and run.ended):
        return True, last_line(log_text_path(cfg))
    if run.diverged:
        return False, f"diverged, seen at step {run.history[-1].step}"
    return False, f"val loss {run.vals[-1]:.4f}"


def log_text_path(cfg):
    return os.path.join(cfg.out, cfg.name, "log.txt")


def last_line(path):
    with open(path) as file:
        lines = file.read().strip().splitlines()
    return lines[-1] if lines else "it said nothing"
