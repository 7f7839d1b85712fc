"""
Several processes that train one model, each on its share of every batch. torchrun starts them, on
one machine or many, and PyTorch's own engine, torch.distributed, connects them:

    torchrun --nproc_per_node=4 quartet.py --size 800M

Every process runs the whole program. The processes are numbered; a number is called a rank. Rank 0
speaks for all: it alone prints, and writes the files of a run. Without torchrun there is one
process, rank 0 of 1, and every function here simply does its work alone. This module knows no
trainer.

Functions under "together" wait for all processes. So all have to call them, and in the same order:
if one process skipped one of them, the others would wait for it.

If one process fails, all end. A mistake that is found together is raised in all of them, and told
once. Where one fails alone, for lack of memory say, it tells that and ends. The others notice, or
torchrun ends them within 30 seconds.
"""
import contextlib
import datetime
import gc
import itertools
import math
import os
import sys
import warnings

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from data import signals
from data.files import UserError, check
from tools import cli, machine

# torchrun notices at once that a process has ended. This is for one that waits for others that
# live, or that have not come yet; they may take minutes to compile a model, or to make a corpus.
PATIENCE = datetime.timedelta(minutes=30)
# How torch says that another process is gone: gloo, NCCL, and the store in which they meet.
LOST = ("Connection closed by peer", "Connection reset by peer", "NCCL", "Broken pipe",
        "Connection refused", "recvValue failed", "failed to recv", "Timed out waiting")


class ProcessLost(UserError):
    """Another process of the run has ended. Why, that process has said itself, if it could."""
    exit_code = 1


# ---- who is there

def size(): return dist.get_world_size() if dist.is_initialized() else 1


def rank(): return dist.get_rank() if dist.is_initialized() else 0


@contextlib.contextmanager
def joined(device):
    """Connects the processes that torchrun has started, within a with statement.

    Each process gets a GPU of its own, which is called "cuda" from here on, unless the device, the
    value of a flag, is "cpu". Raises UserError where there are fewer GPUs than processes, and
    ProcessLost when another process ends within the with statement.
    """
    if not cli.is_one_of_many():
        yield
        return
    backend = "gloo"
    if is_on_gpu(device):
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=PATIENCE)
    streams = sys.stdout, sys.stderr
    try:
        if rank() > 0:                  # Warnings and progress bars, too, appear once.
            sys.stdout = sys.stderr = open(os.devnull, "w")
        yield
    except RuntimeError as error:
        if not is_loss(error):
            raise
        lost = ProcessLost("another process of this run has ended, see what it said; --resume goes "
                           f"on from the last checkpoint ({machine.first_line(error)})")
        raise told_by(0, lost) from error
    finally:
        sys.stdout, sys.stderr = streams
    dist.destroy_process_group()


def is_loss(error):
    """Whether torch says with an error that another process is gone."""
    return any(words in str(error) for words in LOST)


def leave(code):
    """Returns an exit code; one of several processes ends with it here and now.

    Python's orderly exit sometimes crashes in the threads of torch.distributed.
    """
    if cli.is_one_of_many():
        for stream in (sys.stdout, sys.stderr):
            cli.drop_unwritten(stream)
        os._exit(code)
    return code


def is_on_gpu(device):
    """Whether the processes run on GPUs. Raises UserError if there are too few on this machine."""
    n_processes = int(os.environ["LOCAL_WORLD_SIZE"])
    try:
        if machine.resolve_device(device) == "cpu":
            return False
        n_gpus = torch.cuda.device_count()
        check(n_processes <= n_gpus,
              f"{n_processes} processes on a machine with {n_gpus} GPUs: give torchrun "
              f"--nproc_per_node={n_gpus}, or quartet.py --device cpu")
    except UserError as error:
        raise cli.once_a_machine(error)
    return True


# ---- together

ERRORS = (UserError, OSError, MemoryError)


def by_rank_0(f):
    """Returns what f() returns in rank 0, which alone calls it. If it raises, all raise that."""
    if size() == 1:
        return f()
    outcome = [None, None]
    if rank() == 0:
        try:
            outcome[0] = f()
        except ERRORS as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0, device=torch.device("cpu"))
    result, error = outcome
    if error is not None:
        raise told_by(0, error)
    return result


def all_or_none(f):
    """Calls f in every process, and returns what it returns there. If it raises in one process, all
    raise that."""
    if size() == 1:
        return f()
    result = None
    error = None
    try:
        result = f()
    except ERRORS as caught:
        error = caught
    for its_rank, error in enumerate(gather_objects(error)):
        if error is not None:
            raise told_by(its_rank, error)
    return result


def one_before_others(f):
    """As all_or_none, but on each machine one process calls f before the others do: it prepares
    what they find."""
    is_early = os.environ.get("LOCAL_RANK", "0") == "0"
    early = all_or_none(lambda: f() if is_early else None)
    late = all_or_none(lambda: None if is_early else f())
    return early if is_early else late


def told_by(its_rank, error):
    """Returns an error of all processes, marked so that only one of them tells it."""
    error.is_told_elsewhere = rank() != its_rank
    return error


def all_have(error):
    """Whether an error was raised in all processes, so that they can go on together."""
    return size() == 1 or hasattr(error, "is_told_elsewhere")


@contextlib.contextmanager
def held_by_rank_0(context):
    """Enters a context, a lock say, in rank 0 only, for all. What that raises, all raise."""
    with contextlib.ExitStack() as stack:
        by_rank_0(lambda: stack.enter_context(context) and None)
        yield


def gather_numbers(*values, device):
    """Returns a list with the values of each process, by rank. A value is a number or a tensor of
    one number; what is returned are floats."""
    mine = torch.stack([torch.as_tensor(value, dtype=torch.float64, device=device)
                        for value in values])
    if size() == 1:
        return [mine.tolist()]
    of_all = [torch.empty_like(mine) for _ in range(size())]
    dist.all_gather(of_all, mine)
    return torch.stack(of_all).tolist()


def gather_objects(value):
    """Returns a list with the value of each process, which may be any object."""
    if size() == 1:
        return [value]
    values = [None] * size()
    dist.all_gather_object(values, value)
    return values


def sums(*values, device):
    """Returns the sum over all processes of each value."""
    return [sum(of_all) for of_all in zip(*gather_numbers(*values, device=device))]


def between_steps():
    """Returns a data.signals.BetweenSteps. The processes stop at the same end_of_step(), and one of
    them says so."""
    return signals.BetweenSteps(is_announced=rank() == 0, is_alone=size() == 1)


def end_of_step(loss, is_late, stop, device):
    """The only exchange of a step besides that of gradients, so that all processes go on alike.

    Returns the mean of the losses, and whether it is late for any process. A signal that any of
    them has received asks all to stop; stop is what between_steps() returns.
    """
    numbers = gather_numbers(loss, is_late, stop.received or 0, device=device)
    losses, are_late, received = zip(*numbers)
    if any(received):
        stop.agree_on(int(max(received)))
    return sum(losses) / len(losses), any(are_late)


def deal(items):
    """Yields the items of this process, each with whether it counts.

    Each round hands one item to every process, because they may have to meet in each. In the last
    round, a process without an item gets the first one of the round, which does not count.
    """
    items = iter(items)
    while hand := list(itertools.islice(items, size())):
        is_own = rank() < len(hand)
        yield hand[rank() if is_own else 0], is_own


# ---- what a process has to do

def share_of(items):
    """Returns every size()-th of the items, from that of this process's rank on."""
    return items[rank()::size()]


def check_divides(batch, micro):
    """Raises UserError unless each process gets as many microbatches of a batch as the others.

    batch, micro    sequences in a step and in a microbatch
    """
    n = size()
    lower = batch // n * n
    nearest = " and ".join(f"--batch {number}" for number in (lower, lower + n) if number > 0)
    check(batch % n == 0, f"a batch of {batch} sequences does not divide among {n} processes; the "
                          f"nearest that do: {nearest}")
    share = batch // n
    check(share % micro == 0, f"the {share} sequences of each of {n} processes do not divide into "
                              f"microbatches of {micro}: give --micro {fitting(micro, batch)}")


def fitting(micro, batch):
    """Returns the largest microbatch, at most micro, into which the share of a process divides."""
    return math.gcd(micro, batch // size())


def seed_step(seed, step):
    """Seeds torch's generators for a step of this process, from the run's seed, the step and the
    rank alone. So a run that is resumed needs no state of a generator, and no two processes have
    the same random rotations and noise."""
    words = np.random.SeedSequence((seed, step, rank())).generate_state(1, np.uint64)
    torch.manual_seed(int(words[0]))


def average_gradients(model):
    """Returns the model in PyTorch's DistributedDataParallel, which averages the gradients of all
    processes in the backward pass; one process gets the model itself.

    A model that is compiled as one graph hands over all gradients at once, at the end. To send them
    while the rest is computed, it would have to be compiled block by block, and that loses more
    than it gains (fp4/README.md). So they travel in larger groups than the usual 25 MB, which is
    faster.

    It groups the gradients anew after its first step, and with them the order of sums changes. So
    of three processes or more, a run that is resumed differs in last bits from one that is not.
    """
    if size() == 1:
        return model
    # One of an earlier phase (schedule.py) refers to itself, and keeps the gradients until this.
    gc.collect()
    # torch.compile would split a graph for it, which our autograd functions do not support.
    torch._dynamo.config.optimize_ddp = False
    with warnings.catch_warnings():     # Its new name for broadcast_buffers is not in torch 2.11.
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(model, broadcast_buffers=False, bucket_cap_mb=400,
                                       gradient_as_bucket_view=True)


def own_path(path):
    """Returns the path of a file that only rank 0 writes; other processes get one of no use."""
    return path if rank() == 0 else os.devnull


def number(tensor):
    """Returns a tensor of one number as a float. The norm of a sharded model's gradient is a
    DTensor, of which each process may have a part."""
    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.item()
