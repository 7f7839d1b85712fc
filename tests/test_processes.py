"""
Facts about runs of several processes. Most are started by launcher.py, in the place of torchrun.

Where N processes compute what one does, only the order of sums differs: in float32, the losses of a
few steps agree to CLOSE. What N processes compute twice is equal bit for bit.
"""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import numpy as np
import pytest
import torch

from data import locks, tokens
from launcher import free_port
from test_train import ROOT, corpus, equal, log, state      # a fixture and readers of its runs
from tools import checkpoint, cli, processes
from tools.run import read_log

CLOSE = 3e-6                            # relative, of what the log tells in 6 decimals or more
SECONDS = 150                           # A launch takes 2 s on an idle machine.
SMALL = ("--size", "tiny", "--seq", 32, "--batch", 12, "--micro", 1, "--eval_every", 2,
         "--steps", 6, "--sample_tokens", 5)
# number of processes, 0: without torchrun; and whether the model is sharded
KINDS = {"one": (0,), "two": (2,), "three": (3,), "four": (4,),
         "two-sharded": (2, "--shard"), "three-sharded": (3, "--shard"),
         "four-sharded": (4, "--shard")}
SLOW = pytest.mark.slow
# On a machine with GPUs, too, the processes are to run on the CPU.
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
# A line of torch's own log, such as that nvcc is here and no GPU.
TORCH_LOG = re.compile(r"^(\[rank\d+\]:)?[IWE]\d{4} \d\d:\d\d:.*\n", re.M)
LAUNCHER = os.path.join(ROOT, "tests", "launcher.py")


class Launched(NamedTuple):
    """How a launch ended: what each process returned and printed, by rank."""
    codes: list
    out: list
    err: list

    @property
    def sentence(self):
        """What was said on stderr; only one process may have said anything."""
        said = [text for text in self.err if text]
        assert len(said) <= 1, self
        return said[0] if said else ""


@pytest.fixture(scope="session")
def server():
    "a process of launcher.py"
    process = subprocess.Popen([sys.executable, LAUNCHER], stdin=subprocess.PIPE, cwd=ROOT,
                               stdout=subprocess.PIPE, text=True, env=ENV)
    yield process
    process.stdin.close()
    process.wait(10)


@pytest.fixture(scope="session")
def launch(server, corpus, tmp_path_factory):
    "launch(out, 2, '--steps', 3) -> Launched; the runs lie in the folder out"
    folder = tmp_path_factory.mktemp("printed")

    def launch(out, n, *args, plant=""):
        argv = [str(arg) for arg in ("--data", corpus, "--out", out, *args)]
        for name in os.listdir(folder):
            os.remove(folder / name)
        request = dict(argv=argv, n=n, plant=plant, folder=str(folder), seconds=SECONDS)
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        codes = json.loads(server.stdout.readline())
        out, err = [[(folder / f"{rank}.{name}").read_text(errors="replace")
                     for rank in range(len(codes))] for name in ("out", "err")]
        launched = Launched(codes, out, [TORCH_LOG.sub("", text) for text in err])
        assert None not in codes, f"it hangs: {launched}"
        return launched
    return launch


@pytest.fixture(scope="session")
def trained(launch, tmp_path_factory):
    "trained('two', 'bf16') -> the folder of a run of 6 steps, and Launched; trained once only"
    out = tmp_path_factory.mktemp("trained")
    found = {}

    def trained(kind, precision, name="whole"):
        key = f"{kind}-{precision}-{name}"
        if key not in found:
            plant = stop("RANK == 0", 4) if name == "stopped" else ""
            n, *shard = KINDS[kind]
            launched = launch(out, n, *SMALL, *shard, "--precision", precision, "--name", key,
                              plant=plant)
            code = 128 + signal.SIGTERM if name == "stopped" else 0
            assert set(launched.codes) == {code}, launched
            found[key] = out / key, launched
        return found[key]
    return trained


@pytest.fixture
def copied(trained, tmp_path):
    "copied('two', 'bf16', 'stopped') -> a copy of that run in tmp_path, which may be changed"
    def copied(kind, precision, name="whole"):
        source = trained(kind, precision, name)[0]
        shutil.copytree(source, tmp_path / source.name)
        return tmp_path / source.name
    return copied


def at_step(done, where, what):
    """A plant: where the condition on RANK holds, what is executed as soon as a process has that
    many steps behind it and takes its next batch."""
    return f"""
import os, signal, sys, time, torch
from data.files import UserError
batch = quartet.tokens.batch
def planted(shards, i, micro, T, seed):
    if i >= 12 * {done} and {where}:
        {what}
    return batch(shards, i, micro, T, seed)
quartet.tokens.batch = planted
"""


def stop(where, after):
    """A plant: processes where the condition holds get SIGTERM once, in the last of these steps."""
    return at_step(after - 1, where, "quartet.tokens.batch = batch; "
                                     "os.kill(os.getpid(), signal.SIGTERM)")


def numbers(folder):
    "losses, validation losses, learning rates and norms of a log, one row a step; nan: none"
    return np.array([[float(cell or "nan") for cell in row] for row in log(folder)])


def close(folder, other):
    """Whether two logs tell of the same steps, with losses and norms that are CLOSE. A validation
    loss has 4 decimals, of which the last may be rounded up or down."""
    a, b = numbers(folder), numbers(other)
    if a.shape != b.shape:
        return False
    err = np.abs(a - b) / np.maximum(1, np.abs(b))
    val_err = np.nan_to_num(err[:, 2])
    return (np.isnan(a) == np.isnan(b)).all() and val_err.max() <= 1.01e-4 \
        and np.delete(err, 2, axis=1).max() <= CLOSE


def weights(folder):
    "the weights and moments of the newest checkpoint in a folder, whole"
    saved = checkpoint.load(str(folder))
    if saved["shards"]:
        from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
        dcp_to_torch_save(saved["shards"]["path"], folder.parent / "whole.pt")
        return torch.load(folder.parent / "whole.pt", weights_only=True)
    return {part: saved[part] for part in ("model", "optimizer")}


def said_once(launched, sentence):
    """Whether all processes together say a sentence on stderr once."""
    return "".join(launched.err).count(sentence) == 1


# ---- the same run

@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "one"])
def test_several_processes_train_the_run_of_one(trained, kind):
    one, alone = trained("one", "bf16")
    folder, launched = trained(kind, "bf16")
    assert close(folder, one)
    n = KINDS[kind][0]
    assert read_log(folder / "log.csv").device.startswith(f"{n} x CPU, ")
    # One process speaks, and says what one alone does.
    assert launched.out[1:] == [""] * (n - 1) and launched.sentence == ""
    lines = [re.sub(r" +\d+ ms.*", "", text).replace(folder.name, one.name).splitlines()
             for text in (launched.out[0], alone.out[0])]
    assert len(lines[0]) == len(lines[1])
    assert lines[0][0].replace(f"on {n} x CPU", "on CPU") == lines[1][0] != lines[0][0]
    assert sum(line.startswith("step ") for line in lines[0]) == 6
    names = {re.sub(r"^ckpt-\d\.shards$", "", name) for name in os.listdir(folder)}
    assert names - {""} == {"ckpt.pt", "ckpt-4.pt", "log.csv"}


@pytest.mark.parametrize("shard", [[], ["--shard"]], ids=["whole", "sharded"])
def test_one_process_of_torchrun_trains_that_run_bit_for_bit(launch, trained, tmp_path, shard):
    launched = launch(tmp_path, 1, *SMALL, *shard, "--precision", "fp4", "--name", "r")
    assert launched.codes == [0]
    whole, _ = trained("one", "fp4")
    assert log(tmp_path / "r") == log(whole) and equal(weights(tmp_path / "r"), weights(whole))


def test_the_microbatches_of_a_step_are_shared_out(launch, tmp_path):
    plant = f"""
batch = quartet.tokens.batch
def planted(shards, i, *args):
    with open(f"{tmp_path}/{{RANK}}.txt", "a") as file:
        print(i, file=file)
    return batch(shards, i, *args)
quartet.tokens.batch = planted
"""
    launched = launch(tmp_path, 3, *SMALL, "--precision", "bf16", "--micro", 2, "--steps", 3,
                      "--name", "r", plant=plant)
    assert launched.codes == [0, 0, 0]
    shares = [(tmp_path / f"{rank}.txt").read_text().split() for rank in range(3)]
    assert [len(share) for share in shares] == [6, 6, 6]
    assert sorted(map(int, sum(shares, []))) == list(range(18))


def test_the_speed_in_the_log_is_that_of_all_processes(trained):
    history = read_log(trained("three", "bf16")[0] / "log.csv").history
    for row in history:
        assert row.tokens_per_s == pytest.approx(12 * 32 / row.ms * 1000, rel=.01)


def test_the_joules_in_the_log_are_those_of_all_processes_and_since_a_resume_of_its_steps(
        launch, tmp_path):
    # Two readings find a movement of the counter, so that from one to the next it moves by two.
    plant = """
import itertools
from tools import energy
energy.counter = lambda device: itertools.count(0, 1920 * (RANK + 1)).__next__
"""
    args = [*SMALL, "--precision", "bf16", "--name", "r"]
    for steps, joules in ((2, "15 J a token"), (5, "10 J a token, of the steps after 2")):
        launched = launch(tmp_path, 2, *args, "--steps", steps, "--resume", plant=plant)
        assert launched.codes == [0, 0], launched
        [end] = re.findall("# finished .*", (tmp_path / "r" / "log.csv").read_text())
        assert end.endswith(f", energy 11520 J, {joules}")


@pytest.mark.parametrize("kind", ["two", "two-sharded"])
def test_fp4_repeats_itself_bit_for_bit_and_is_not_that_of_another_number_of_processes(
        trained, kind):
    folder, _ = trained(kind, "fp4")
    again, _ = trained(kind, "fp4", "again")
    assert log(folder) == log(again) and equal(weights(folder), weights(again))
    one, _ = trained("one", "fp4")
    # The first loss is before any update, and its forward pass rounds without a generator.
    assert numbers(folder)[0][1] == pytest.approx(numbers(one)[0][1], rel=CLOSE)
    assert numbers(folder)[-1][1] != pytest.approx(numbers(one)[-1][1], rel=CLOSE)
    assert numbers(folder)[-1][1] == pytest.approx(numbers(one)[-1][1], rel=.01)


@SLOW
@pytest.mark.parametrize("kind", ["two", "two-sharded"])
def test_a_compiled_model_of_several_processes_trains_the_run_of_one(
        launch, trained, tmp_path, kind):
    n, *shard = KINDS[kind]
    launched = launch(tmp_path, n, *SMALL, *shard, "--precision", "bf16", "--compile", "--name",
                      "r")
    assert launched.codes == [0, 0] and launched.sentence == ""
    err = np.abs(numbers(tmp_path / "r") / numbers(trained("one", "bf16")[0]) - 1)
    assert np.nanmax(err) <= 1e-4       # Compiled, sums within a layer have another order, too.


def test_no_two_seeds_steps_and_ranks_have_the_same_random_numbers(monkeypatch):
    def first_number(seed, step, rank):
        monkeypatch.setattr(processes, "rank", lambda: rank)
        processes.seed_step(seed, step)
        return torch.rand(1, dtype=torch.float64).item()

    grid = [(seed, step, rank) for seed in (0, 1, 2, 2 ** 40) for step in (0, 1, 2, 999, 2 ** 31)
            for rank in (0, 1, 2, 3, 4095)]
    found = [first_number(*place) for place in grid]
    assert len(set(found)) == len(grid)
    assert [first_number(*place) for place in grid] == found


@pytest.mark.parametrize("n", range(1, 9))
def test_items_are_dealt_so_that_each_counts_once_and_all_processes_have_as_many(monkeypatch, n):
    monkeypatch.setattr(processes, "size", lambda: n)
    for n_items in range(20):
        counted = []
        lengths = set()
        for rank in range(n):
            monkeypatch.setattr(processes, "rank", lambda: rank)
            dealt = list(processes.deal(range(n_items)))
            counted += [item for item, counts in dealt if counts]
            lengths.add(len(dealt))
        assert sorted(counted) == list(range(n_items)) and lengths == {-(-n_items // n)}


def test_validation_batches_that_do_not_divide_give_the_loss_of_one_process(
        launch, corpus, tmp_path):
    from data.corpus import open_corpus
    n_batches = len(list(tokens.val_batches(open_corpus(corpus).val, 2, 32)))
    assert n_batches % 3 and n_batches % 2 == 0     # An odd number of rows is the harder case.
    args = [*SMALL, "--precision", "bf16", "--steps", 1, "--micro", 2]
    for name, n in (("one", 0), ("three", 3)):
        assert set(launch(tmp_path, n, *args, "--name", name).codes) == {0}
    assert close(tmp_path / "three", tmp_path / "one")


# ---- refusals

@pytest.mark.parametrize("n, args, words", [
    (2, ["--batch", 13], "nearest that do: --batch 12 and --batch 14"),
    (4, ["--batch", 3], "does not divide among 4 processes; the nearest that do: --batch 4 (exit"),
    (2, ["--micro", 4], "microbatches of 4: give --micro 2"),
    (2, ["--device", "cuda:1"], "device cuda:1: "),
    (2, ["--stepz", 3], "did you mean --steps?"),
    (2, ["--sample", "x"], "there is no checkpoint"),
    (3, ["--seq", 100_000], "too few for a sequence of 100000"),
    (2, ["--steps", 0], "--steps"),
    (2, ["--precision", "bf16,fp4", "--jobs", 2], "leave --jobs or torchrun out"),
    (1, ["--precision", "bf16,fp4", "--jobs", 2], "leave --jobs or torchrun out"),
    (2, ["--precision", "bf16,fp4", "--resume"], "--resume is for one run"),
], ids=["batch", "small-batch", "micro", "device", "flag", "sample", "seq", "steps", "jobs",
        "jobs-of-one", "resume"])
def test_a_mistake_is_told_once_with_its_exit_code_and_nothing_is_written(
        launch, tmp_path, n, args, words):
    launched = launch(tmp_path, n, *SMALL, *args, "--name", "r")
    assert launched.codes == [2] * n
    lines = launched.sentence.splitlines()
    assert len(lines) == 1 and words in lines[0] and lines[0].endswith(" (exit code 2)"), launched
    assert "".join(launched.out) == "" and os.listdir(tmp_path) == []


def test_one_process_alone_is_told_to_use_torchrun_for_shard(launch, tmp_path):
    launched = launch(tmp_path, 0, *SMALL, "--shard", "--name", "r")
    assert launched.codes == [2] and "start them with torchrun" in launched.sentence
    assert "exit code" not in launched.sentence and os.listdir(tmp_path) == []


def test_a_folder_in_use_is_refused_in_one_sentence_and_stays_as_it_is(launch, copied):
    folder = copied("two", "bf16", "stopped")
    before = sorted(os.listdir(folder))
    with locks.hold(str(folder / "lock")):
        for args in ([], ["--resume"]):
            launched = launch(folder.parent, 2, *SMALL, "--precision", "bf16", "--name",
                              folder.name, *args)
            assert launched.codes == [2, 2]
            assert f"is in use by process {os.getpid()}" in launched.sentence
    assert sorted(os.listdir(folder)) == before and os.listdir(folder.parent) == [folder.name]


def test_resuming_where_there_is_nothing_begins_anew_and_says_so_once(launch, tmp_path):
    launched = launch(tmp_path, 2, *SMALL, "--precision", "bf16", "--steps", 1, "--resume",
                      "--name", "r")
    assert launched.codes == [0, 0] and launched.out[0].count("begins anew") == 1
    assert launched.out[1] == launched.sentence == ""


# ---- failures of one process

LOST = "another process of this run has ended, see what it said; --resume goes on"


def check_goes_on(launch, folder, kind, whole):
    """The run in a folder, which has ended after step 4, is that of the folder whole in the end.

    DistributedDataParallel groups gradients anew after its first step. Of two processes that does
    not matter: a + b is b + a. Of more, the order of sums is another one after a run has gone on.
    """
    assert len(checkpoint.load(str(folder))["history"]) == 4
    n, *shard = KINDS[kind]
    launched = launch(folder.parent, n, "--resume", "--name", folder.name, "--sample_tokens", 0,
                      *shard)
    assert set(launched.codes) == {0} and f"{folder.name} goes on after step 4" in launched.out[0]
    assert re.fullmatch(r"(fp4 runs .*\n)?", launched.sentence)
    assert launched.out[1:] == [""] * (n - 1)
    if n > 2 and not shard:
        assert close(folder, whole)
    else:
        assert log(folder) == log(whole) and equal(weights(folder), weights(whole))


FAILURES = {
    "mistake": ("raise UserError('planted')", 2, "quartet, process 1: planted (exit code 2)"),
    "memory": ("raise torch.OutOfMemoryError('CUDA out of memory')", 2,
               "quartet, process 1: the machine's memory does not hold a microbatch of 1 x 32 "
               "tokens: take a --seq of less than 32"),
    "fault": ("raise KeyError('a fault of ours')", 1, "KeyError: 'a fault of ours'"),
    "killed": ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, ""),
    "exit": ("sys.exit(7)", 7, ""),
}


@pytest.mark.parametrize("kind, failure", [
    ("two", "mistake"), ("two", "memory"), ("two", "fault"), ("two", "exit"),
    ("three-sharded", "mistake"), ("two-sharded", "killed"),
    pytest.param("three", "killed", marks=SLOW)])
def test_one_that_fails_alone_ends_all_at_once_and_the_run_goes_on_from_its_checkpoint(
        launch, trained, tmp_path, kind, failure):
    what, code, words = FAILURES[failure]
    n, *shard = KINDS[kind]
    start = time.monotonic()
    launched = launch(tmp_path, n, *SMALL, *shard, "--precision", "bf16", "--name", "r",
                      plant=at_step(5, "RANK == 1", what))
    assert time.monotonic() - start < 40
    assert launched.codes == [1, code, 1][:n]
    assert said_once(launched, LOST) and LOST in launched.err[0]
    assert words in launched.err[1] and launched.err[2:] == [""] * (n - 2)
    check_goes_on(launch, tmp_path / "r", kind, trained(kind, "bf16")[0])


def test_the_first_process_that_fails_alone_says_why_and_nobody_else_says_anything(
        launch, tmp_path):
    launched = launch(tmp_path, 3, *SMALL, "--precision", "bf16", "--name", "r",
                      plant=at_step(5, "RANK == 0", "raise UserError('planted')"))
    assert launched.codes == [2, 1, 1]
    assert launched.sentence == "quartet, process 0: planted (exit code 2)\n"
    assert os.listdir(tmp_path / "r") != [] and not (tmp_path / "r" / "lock").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_mistake_of_one_where_all_are_together_is_told_once_by_it_alone(launch, tmp_path, rank):
    plant = f"""
from data.files import UserError
check = quartet.tokens.check_long_enough
def planted(*args):
    if RANK == {rank}:
        raise UserError("planted")
    check(*args)
quartet.tokens.check_long_enough = planted
"""
    launched = launch(tmp_path, 3, *SMALL, "--precision", "bf16", "--name", "r", plant=plant)
    assert launched.codes == [2, 2, 2] and launched.sentence == launched.err[rank]
    assert launched.sentence == "quartet: planted (exit code 2)\n" and os.listdir(tmp_path) == []


@pytest.mark.parametrize("kind", ["two", "two-sharded"])
@pytest.mark.parametrize("what, words", [
    ("next(model.blocks.parameters())", "loss nan,"), ("moment", "at step 2")],
    ids=["weight", "moment"])
def test_a_nan_of_one_process_is_divergence_of_all(launch, tmp_path, kind, what, words):
    if what == "moment":                # Nothing but the checkpoint's own look can see it.
        plant = """
pack = quartet.checkpoint.pack
def planted(*args):
    state = pack(*args)
    moment = state["optimizer"]["state"]["norm.weight"]["exp_avg"]
    if RANK == 1:
        getattr(moment, "_local_tensor", moment)[-1] = float("nan")
    return state
quartet.checkpoint.pack = planted
"""
    else:
        plant = f"""
quantize_weights = quartet.fp4.quantize_weights
def planted(model):
    if RANK == 1:
        weight = {what}.data
        getattr(weight, "_local_tensor", weight).fill_(float("nan"))
    quantize_weights(model)
quartet.fp4.quantize_weights = planted
"""
    n, *shard = KINDS[kind]
    launched = launch(tmp_path, n, *SMALL, *shard, "--precision", "bf16", "--name", "r",
                      plant=plant)
    assert launched.codes == [3, 3] and "r has diverged" in launched.sentence
    assert words in launched.sentence and "there is no checkpoint yet" in launched.sentence
    assert os.listdir(tmp_path / "r") == ["log.csv"]
    assert read_log(tmp_path / "r" / "log.csv").not_finite


# ---- signals

WHILE_EVALUATED = """
import os, signal
evaluate = quartet.evaluate
def planted(*args):
    if RANK == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return evaluate(*args)
quartet.evaluate = planted
"""


@pytest.mark.parametrize("kind, where", [
    ("two", "RANK == 1"), ("two", "RANK == 0"), ("two", "True"), ("three-sharded", "RANK == 1")],
    ids=["two-other", "two-first", "two-all", "three-sharded-other"])
def test_a_signal_to_any_process_stops_all_after_the_same_step_with_a_checkpoint(
        launch, trained, tmp_path, kind, where):
    n, *shard = KINDS[kind]
    launched = launch(tmp_path, n, *SMALL, *shard, "--precision", "bf16", "--name", "r",
                      "--eval_every", 6, plant=stop(where, 4))
    assert launched.codes == [128 + signal.SIGTERM] * n
    said = launched.sentence.splitlines()
    assert said[0] == "" and said[1].startswith("SIGTERM: stopping after this step"), said
    assert said[2].startswith("quartet: stopped by SIGTERM; --resume") and len(said) == 3, said
    assert said[2].endswith("(exit code 143)") and len(log(tmp_path / "r")) == 4
    if where == "RANK == 1":
        n, *shard = KINDS[kind]
        assert set(launch(tmp_path, n, "--resume", "--name", "r", *shard).codes) == {0}
        whole = trained(kind, "bf16")[0]
        assert np.array_equal(np.delete(numbers(tmp_path / "r"), 2, axis=1),
                              np.delete(numbers(whole), 2, axis=1))


def test_a_signal_that_comes_when_the_processes_have_met_already_stops_them_a_step_later(
        launch, tmp_path):
    launched = launch(tmp_path, 2, *SMALL, "--precision", "bf16", "--name", "r",
                      plant=WHILE_EVALUATED)
    assert launched.codes == [128 + signal.SIGTERM] * 2
    assert said_once(launched, "stopped by SIGTERM") and len(log(tmp_path / "r")) == 3
    assert len(state(tmp_path / "r")["history"]) == 3


# ---- checkpoints

@pytest.mark.parametrize("late", [0, 1])
def test_a_checkpoint_that_is_due_in_one_process_is_written_by_all(launch, tmp_path, late):
    plant = f"quartet.CHECKPOINT_SECONDS = 0 if RANK == {late} else 1e9"
    launched = launch(tmp_path, 2, *SMALL, "--shard", "--steps", 3, "--eval_every", 1000,
                      "--keep", 9, "--precision", "bf16", "--name", "r", plant=plant)
    assert launched.codes == [0, 0]
    shards = {name for name in os.listdir(tmp_path / "r") if name.endswith(".shards")}
    assert shards == {"ckpt-1.shards", "ckpt-2.shards", "ckpt-3.shards"}


@pytest.mark.parametrize("precision, before, after", [
    ("bf16", "one", "two"), ("bf16", "one", "three-sharded"),
    ("bf16", "two", "one"), ("fp4", "two", "two"), ("bf16", "two", "four-sharded"),
    ("bf16", "two-sharded", "one"), ("fp4", "two-sharded", "two-sharded"),
    ("bf16", "four-sharded", "three-sharded"), ("bf16", "four-sharded", "four-sharded"),
    pytest.param("bf16", "four-sharded", "two", marks=SLOW),
    pytest.param("bf16", "three", "three", marks=SLOW)])
def test_a_run_goes_on_with_any_number_of_processes_sharded_or_not(
        launch, trained, copied, precision, before, after):
    folder = copied(before, precision, "stopped")
    if before == after:
        check_goes_on(launch, folder, after, trained(after, precision)[0])
        return
    n, *shard = KINDS[after]
    launched = launch(folder.parent, n, "--resume", "--name", folder.name, *shard)
    assert set(launched.codes) == {0} and "changes: none" in launched.out[0]
    assert launched.sentence == "" and close(folder, trained("one", precision)[0])
    is_sharded = checkpoint.load(str(folder))["shards"] is not None
    assert is_sharded == bool(shard)


@pytest.mark.parametrize("kind, first, second, stop_after", [
    ("two", ["bf16"], ["fp4-sr"], 3),
    ("two", ["fp4"], ["bf16"], 4),
    ("two-sharded", ["fp4"], ["fp4", "--scale", "nearest", "--rounding", "sr"], 3),
    ("two-sharded", ["nvfp4"], ["quartet2"], 4)])
def test_a_run_that_switches_is_two_runs_of_one_recipe_and_may_be_stopped_anywhere(
        launch, tmp_path, kind, first, second, stop_after):
    """The switch comes after step 3. Bit for bit, its first steps are those of a run without it,
    and its last ones those of that run when it goes on with another precision."""
    n, *shard = KINDS[kind]
    row, *axes = second
    changes = [f"+{axis[2:]}={value}" for axis, value in zip(axes[::2], axes[1::2])]
    switched = [*SMALL, *shard, "--precision", *first, "--switch", f"0.5:{row}{''.join(changes)}"]
    # The second phase has a DistributedDataParallel of its own, and that of the first is gone.
    alone = at_step(4, "True", "import gc; assert sum(type(each) is torch.nn.parallel."
                               "DistributedDataParallel for each in gc.get_objects()) <= 1")
    assert launch(tmp_path, n, *switched, "--name", "whole", plant=alone).codes == [0, 0]
    for name, args, done, others in (
            ("stopped", switched, stop_after, []),
            ("twice", switched[:-2], 3, ["--allow_changes", "--precision", *second])):
        stopped = launch(tmp_path, n, *args, "--name", name, plant=stop("RANK == 0", done))
        assert stopped.codes == [143, 143] and len(log(tmp_path / name)) == done
        launched = launch(tmp_path, n, *shard, "--name", name, "--resume", *others)
        assert launched.codes == [0, 0], launched
        assert log(tmp_path / name) == log(tmp_path / "whole"), name
        assert equal(weights(tmp_path / name), weights(tmp_path / "whole")), name


def test_weights_of_a_sharded_model_cannot_travel_in_another_form_after_a_switch(launch, tmp_path):
    launched = launch(tmp_path, 2, *SMALL, "--shard", "--precision", "bf16", "--switch", "0.5:fp4",
                      "--name", "r")
    assert launched.codes == [2, 2] and os.listdir(tmp_path) == []
    assert "travel as values as activations have them and then as packed" in launched.sentence


def test_a_checkpoint_has_no_state_of_a_generator(trained):
    for kind in ("two", "two-sharded"):
        saved = state(trained(kind, "fp4")[0])
        assert saved["version"] == 3
        assert saved.keys() == {"version", "config", "corpus", "history", "model", "optimizer",
                                "shards"}


@pytest.mark.parametrize("fault", ["bit", "file", "folder"])
def test_a_damaged_shard_gives_way_to_the_checkpoint_before(launch, trained, copied, fault):
    whole, _ = trained("two-sharded", "bf16")
    folder = copied("two-sharded", "bf16")
    assert {"ckpt-4.shards", "ckpt-6.shards"} <= set(os.listdir(folder))
    shard = folder / "ckpt-6.shards" / "__1_0.distcp"
    if fault == "bit":
        damaged = bytearray(shard.read_bytes())
        damaged[len(damaged) // 2] ^= 1
        shard.write_bytes(damaged)
    elif fault == "file":
        shard.unlink()
    else:
        shutil.rmtree(shard.parent)
    words = f"{shard} is damaged" if fault == "bit" else "ckpt.pt needs it"
    launched = launch(folder.parent, 2, "--resume", "--name", folder.name, "--shard")
    assert launched.codes == [0, 0]
    said = [line for line in launched.out[0].splitlines() if "going on from" in line]
    assert said and words in said[0] and "ckpt-4.pt, after step 4" in said[0], launched
    assert log(folder) == log(whole) and equal(weights(folder), weights(whole))


def test_the_metadata_of_shards_is_checked_as_well(launch, copied):
    folder = copied("two-sharded", "bf16")
    (folder / "ckpt-6.shards" / ".metadata").write_bytes(b"")
    with pytest.raises(checkpoint.UserError, match="metadata is damaged"):
        checkpoint.read(str(folder / "ckpt.pt"))


def test_checkpoints_go_with_their_shards_and_discard_removes_all(launch, copied):
    folder = copied("two-sharded", "bf16", "stopped")
    shutil.copytree(folder / "ckpt-4.shards", folder / "ckpt-5.shards")     # of a killed process
    (folder / "ckpt-9.shards").mkdir()                  # of steps that the user abandoned
    (folder / "ckpt-x.shards").mkdir()                  # not ours
    args = ["--resume", "--name", folder.name, "--shard", "--keep"]
    assert launch(folder.parent, 2, *args, 2, "--steps", 8, "--allow_changes").codes == [0, 0]
    found = {name for name in os.listdir(folder) if name.startswith("ckpt")}
    assert found == {"ckpt.pt", "ckpt-8.shards", "ckpt-6.pt", "ckpt-6.shards", "ckpt-x.shards"}
    assert launch(folder.parent, 2, *args, 1, "--steps", 10, "--discard").codes == [0, 0]
    assert set(os.listdir(folder)) == {"log.csv", "ckpt-x.shards"}


def test_shards_that_cannot_be_written_leave_the_checkpoint_before(launch, trained, tmp_path):
    plant = """
from torch.distributed.checkpoint.filesystem import FileSystemWriter
write_data = FileSystemWriter.write_data
n_saved = 0
def planted(*args):
    global n_saved
    n_saved += 1
    if RANK == 1 and n_saved == 3:
        raise OSError(28, "No space left on device")
    return write_data(*args)
FileSystemWriter.write_data = planted
"""
    launched = launch(tmp_path, 2, *SMALL, "--shard", "--precision", "bf16", "--name", "r",
                      plant=plant)
    assert launched.codes == [2, 2]
    assert f"cannot write {tmp_path}/r/ckpt-6.shards: " in launched.sentence
    assert "No space left on device" in launched.sentence
    check_goes_on(launch, tmp_path / "r", "two-sharded", trained("two-sharded", "bf16")[0])


def test_one_process_samples_from_shards_what_several_do(launch, trained):
    folder, _ = trained("two-sharded", "bf16")
    args = ["--name", folder.name, "--sample", "def", "--sample_tokens", 20]
    alone = launch(folder.parent, 0, *args)
    together = launch(folder.parent, 2, *args)
    assert alone.codes == [0] and together.codes == [0, 0]
    assert alone.out[0].startswith("def") and together.out == [alone.out[0], ""]
    assert alone.sentence == together.sentence == ""


@pytest.mark.parametrize("kind", ["two", "two-sharded"])
@pytest.mark.parametrize("n, shard", [(0, []), (2, []), (2, ["--shard"])],
                         ids=["to-one", "to-two", "to-two-sharded"])
def test_a_checkpoint_of_another_model_is_refused_in_one_sentence(
        launch, copied, kind, n, shard):
    folder = copied(kind, "bf16", "stopped")
    plant = """
import dataclasses
quartet.PRESETS["tiny"] = dataclasses.replace(quartet.PRESETS["tiny"], n_embd=128)
"""
    launched = launch(folder.parent, n, "--resume", "--name", folder.name, *shard, plant=plant)
    assert set(launched.codes) == {2}
    assert re.search(r"is of another model, choose another --name: .*\b128\b",
                     launched.sentence), launched


@pytest.mark.parametrize("typed", [["--batch", 12], ["--micro", 2]],
                         ids=["batch", "micro"])
def test_the_batch_may_be_typed_again(launch, copied, typed):
    folder = copied("two", "bf16", "stopped")
    launched = launch(folder.parent, 2, "--resume", "--name", folder.name, *typed)
    assert launched.codes == [0, 0], launched


def test_what_cannot_go_on_is_told_once(launch, copied):
    folder = copied("two", "bf16")
    args = ["--resume", "--name", folder.name]
    for n, typed, code, words in ((2, ["--steps", 5], 2, "has 6 steps already"),
                                  (2, ["--seed", 1, "--steps", 8], 2, "is another run"),
                                  (4, ["--batch", 6, "--allow_changes", "--steps", 8], 2,
                                   "does not divide among 4 processes"),
                                  (2, [], 0, "")):
        launched = launch(folder.parent, n, *args, *typed)
        assert launched.codes == [code] * n and words in launched.sentence, launched
    assert launched.out[0].count("is finished after 6 steps") == 1 and launched.out[1] == ""


def test_a_microbatch_that_no_longer_fits_the_share_is_made_smaller(launch, tmp_path):
    args = [*SMALL, "--precision", "bf16", "--steps", 2, "--name", "r"]
    assert launch(tmp_path, 0, *args, "--micro", 12).codes == [0]
    more = launch(tmp_path, 4, "--resume", "--name", "r", "--steps", 3)
    assert more.codes == [0] * 4 and "micro 12 -> 3" in more.out[0], more


# ---- ablations

def test_an_ablation_trains_each_run_with_all_processes_and_prints_its_table_once(
        launch, trained, tmp_path):
    args = [*SMALL, "--precision", "bf16,fp4", "--name", "n"]
    launched = launch(tmp_path, 2, *args)
    assert launched.codes == [0, 0] and launched.out[1] == launched.err[1] == ""
    assert launched.out[0].count("| run ") == 1
    assert set(os.listdir(tmp_path)) == {"n.csv", "n-bf16", "n-fp4"}
    for precision in ("bf16", "fp4"):
        assert log(tmp_path / f"n-{precision}") == log(trained("two", precision)[0])
    table = (tmp_path / "n.csv").read_bytes()
    again = launch(tmp_path, 2, *args)
    assert again.codes == [0, 0] and again.out[0].count("is finished") == 2
    assert (tmp_path / "n.csv").read_bytes() == table


def test_only_the_first_process_looks_at_the_files_of_an_ablation(launch, tmp_path):
    # On a second machine, say, there may be no folder of these runs.
    plant = """
from tools import ablation
if RANK:
    def refuse(*args):
        raise KeyError("looked at the files")
    ablation.run_in = ablation.check_files = ablation.report = refuse
"""
    args = [*SMALL, "--precision", "bf16,fp8", "--steps", 1, "--name", "n"]
    for _ in range(2):
        launched = launch(tmp_path, 2, *args, plant=plant)
        assert launched.codes == [0, 0], launched


def test_runs_that_fail_or_diverge_stop_no_other_and_are_told_once(launch, tmp_path):
    (tmp_path / "n-bf16").write_text("in the way")
    plant = """
train = quartet.train
agree = quartet.processes.end_of_step
def planted(cfg):
    factor = float("nan") if cfg.precision == "fp8" else 1
    quartet.processes.end_of_step = lambda loss, *args: agree(factor * loss, *args)
    train(cfg)
quartet.train = planted
"""
    launched = launch(tmp_path, 2, *SMALL, "--precision", "bf16,fp8,fp4", "--steps", 2, "--name",
                      "n", plant=plant)
    assert launched.codes == [2, 2]
    assert "quartet: 1 of 3 runs failed" in launched.sentence
    assert launched.out[0].count("n-fp8 has diverged") == 1 and launched.out[1] == ""
    assert "| fp8 | diverged" in launched.out[0] and "| fp4 " in launched.out[0]


def test_one_that_fails_alone_in_an_ablation_says_why_and_ends_it(launch, tmp_path):
    launched = launch(tmp_path, 2, *SMALL, "--precision", "bf16,fp4", "--name", "n",
                      plant=at_step(3, "RANK == 1", "raise UserError('planted')"))
    assert launched.codes == [1, 2] and LOST in launched.err[0]
    assert launched.err[1] == "quartet, process 1: planted (exit code 2)\n"
    assert os.listdir(tmp_path) == ["n-bf16"]


# ---- torchrun itself

def torchrun(out, corpus, *args, plant="", options=("--standalone", "--nproc_per_node=2")):
    """Starts launcher.py with torchrun; returns the process, whose output is one text."""
    command = [sys.executable, "-m", "torch.distributed.run", *options, LAUNCHER,
               "--data", corpus, "--out", out, *SMALL, "--precision", "bf16", "--name", "r", *args]
    return subprocess.Popen(
        [str(part) for part in command], cwd=ROOT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, env={**ENV, "PLANT": plant})


def printed(process):
    """What a process prints until it ends. One that hangs is killed, and the test fails."""
    try:
        return process.communicate(timeout=SECONDS)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(f"it hangs: {process.communicate()[0]}")


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=SLOW)])
def test_torchrun_passes_a_signal_on_and_the_run_goes_on(launch, trained, corpus, tmp_path, number):
    slow = "import time\nshow = quartet.run.show_step\n" \
           "quartet.run.show_step = lambda *row: (show(*row), time.sleep(.3))"
    process = torchrun(tmp_path, corpus, "--steps", 500, plant=slow)
    lines = []
    while not (lines and lines[-1].startswith("step     2/")):
        lines.append(process.stdout.readline())
        assert lines[-1], lines
    process.send_signal(number)
    text = printed(process)
    name = signal.Signals(number).name
    assert text.count(f"quartet: stopped by {name}") == 1 and process.returncode != 0, text
    assert text.count("stopping after this step") == 1 and f"(exit code {128 + number})" in text
    n_rows = len(log(tmp_path / "r"))
    assert 2 <= n_rows == len(state(tmp_path / "r")["history"]) < 400
    assert set(os.listdir(tmp_path / "r")) >= {"ckpt.pt", "log.csv"}
    more = launch(tmp_path, 2, "--resume", "--name", "r", "--steps", n_rows + 1)
    assert more.codes == [0, 0] and f"r goes on after step {n_rows}" in more.out[0]


def test_torchrun_ends_all_when_one_is_killed_and_all_train_what_one_does(
        launch, trained, corpus, tmp_path):
    plant = at_step(5, "RANK == 1", "os.kill(os.getpid(), signal.SIGKILL)")
    start = time.monotonic()
    process = torchrun(tmp_path, corpus, plant=plant)
    text = printed(process)
    assert process.returncode == 1 and text.count(LOST) == 1, text
    assert time.monotonic() - start < 60        # 40, and what it takes to start
    check_goes_on(launch, tmp_path / "r", "two", trained("two", "bf16")[0])


@SLOW
@pytest.mark.parametrize("what, words", [
    ("raise UserError('planted')", "quartet, process 1: planted (exit code 2)"),
    ("sys.exit(7)", LOST), ("raise torch.OutOfMemoryError('CUDA out of memory')",
                            "quartet, process 1: the machine's memory does not hold")],
    ids=["mistake", "exit", "memory"])
def test_torchrun_ends_all_when_one_fails(launch, trained, corpus, tmp_path, what, words):
    process = torchrun(tmp_path, corpus, "--shard", plant=at_step(5, "RANK == 1", what))
    text = printed(process)
    assert process.returncode == 1 and text.count(words) == 1, text
    check_goes_on(launch, tmp_path / "r", "two-sharded", trained("two-sharded", "bf16")[0])


@SLOW
def test_torchrun_tells_a_mistake_once(corpus, tmp_path):
    text = printed(torchrun(tmp_path, corpus, "--batch", 13))
    assert text.count("quartet: ") == 1 and "(exit code 2)" in text and os.listdir(tmp_path) == []


@pytest.mark.parametrize("options", [
    lambda port, rank: (f"--node_rank={rank}", "--master_addr=127.0.0.1", f"--master_port={port}"),
    pytest.param(lambda port, rank: ("--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}",
                                     "--rdzv_id=7"), marks=SLOW),
], ids=["master-address", "rendezvous"])
def test_two_machines_train_the_run_of_two_processes(trained, corpus, tmp_path, options):
    port = free_port()
    both = [torchrun(tmp_path, corpus, options=("--nnodes=2", "--nproc_per_node=1",
                                                *options(port, rank))) for rank in range(2)]
    texts = [printed(process) for process in both]
    assert [process.returncode for process in both] == [0, 0], texts
    assert log(tmp_path / "r") == log(trained("two", "bf16")[0])
    assert "".join(texts).count("final val loss") == 1
