"""
The energy that GPUs take, in joules, by their own counters.

From Volta on, NVIDIA's GPUs count the millijoules that the whole board takes, memory included,
whoever makes it work. NVML, a part of the driver, reads that counter. Older GPUs, WSL and most
virtual machines have none; nor is anything read without NVML's package for Python:

    pip install nvidia-ml-py

Then a number of joules is None, in words n/a. This module knows no trainer.
"""
import contextlib
import math
import time
from typing import NamedTuple, Optional

import torch

from tools import machine, processes

# The counter moves some ten times a second. One that stands still for so long counts nothing.
LONGEST_PAUSE = 1.0                     # seconds
POLL = 0.001


def counter(device):
    """Returns a function that reads the joules which a GPU has taken since its driver was loaded;
    None where nothing counts them.

    device      torch's name of it: "cpu", "cuda" or "cuda:1"
    """
    if device == "cpu":
        return None
    try:
        import pynvml                   # An optional package: of nvidia-ml-py.
    except ImportError:
        return None
    # NVML numbers all GPUs of the machine, and torch those that CUDA_VISIBLE_DEVICES leaves, in
    # another order. What both know is the GPU's own identity.
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError:
        return None

    def read():
        try:
            return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000
        except pynvml.NVMLError:        # No measurement is worth the end of a run.
            return math.nan

    return read


class Meter:
    """Measures what one GPU takes within a with statement.

        with Meter("cuda") as meter:
            ...
        meter.joules                    # None where nothing counts them
        meter.seconds

    A reading is up to a tenth of a second old. So both ends wait until the GPU is done and its
    counter has just moved. At the end it idles so long, which counts: what is measured should take
    ten seconds, of which that is at most a hundredth, at the power of an idle GPU.
    """
    joules = None
    seconds = None

    def __init__(self, device):
        self.device = device
        self.read = counter(device)

    @property
    def watts(self):
        """The mean power; None where nothing counts joules."""
        return None if self.joules is None else self.joules / self.seconds

    def __enter__(self):
        self.start = self.next_movement()
        return self

    def __exit__(self, error, *details):
        if error:                       # What failed may have been the GPU.
            return
        stop = self.next_movement()
        if self.start and stop:
            self.joules = stop.joules - self.start.joules
            self.seconds = stop.time - self.start.time

    def next_movement(self):
        """Returns the Movement that the counter makes next, when the GPU is done; None if there is
        none."""
        machine.synchronize(self.device)
        if self.read is None:
            return None
        before = self.read()
        end = time.perf_counter() + LONGEST_PAUSE
        while time.perf_counter() < end:
            now = self.read()
            if now > before:
                return Movement(time.perf_counter(), now)
            time.sleep(POLL)
        return None


class Movement(NamedTuple):
    """A moment at which the counter has just moved."""
    time: float                         # in seconds, by time.perf_counter()
    joules: float                       # that it shows


def idle_watts(device, seconds):
    """Returns the power of a GPU that does nothing for some seconds; None where nothing counts
    joules.

    It has this process's memory and code on it, and is as warm as what came before left it.
    """
    with Meter(device) as meter:
        if meter.read:
            time.sleep(seconds)
    return meter.watts


# ---- of a run

class Spent:
    """What the steps of a run have taken."""
    memory = "n/a"                      # at most, on this process's GPU, such as 7.59 GiB
    joules: Optional[float] = None      # on all GPUs together; None where nothing counts them
    n_tokens = 0
    after = 0                           # the step after which the run went on

    @property
    def energy(self):
        """Such as "512345 J, 0.000551 J a token"; of a resumed run also which steps these are."""
        if self.joules is None or self.n_tokens == 0:
            return "n/a"
        which = f", of the steps after {self.after}" if self.after else ""
        return f"{self.joules:.0f} J, {self.joules / self.n_tokens:.3g} J a token{which}"


@contextlib.contextmanager
def of_run(cfg, history):
    """Gives a Spent, which is filled in when the with statement has ended in all processes.

    A GPU that several runs share (--jobs) cannot say what one of them took.

    cfg       the settings of a run: its device, jobs, batch and seq
    history   the list of its steps, to which those trained here are added
    """
    spent = Spent()
    spent.after = len(history)
    machine.forget_peak_memory(cfg.device)
    with Meter(cfg.device) as meter:
        yield spent
    spent.memory = machine.peak_memory(cfg.device)
    is_known = meter.joules is not None and cfg.jobs == 1
    [joules] = processes.sums(meter.joules if is_known else math.nan, device=cfg.device)
    spent.joules = None if math.isnan(joules) else joules
    spent.n_tokens = (len(history) - spent.after) * cfg.batch * cfg.seq
