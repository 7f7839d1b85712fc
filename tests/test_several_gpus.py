"""Runs on several GPUs of this machine are those of one GPU, up to what a GPU itself leaves open.

They need two GPUs, and take four where there are four. The order in which a GPU adds the gradients
of attention changes from run to run, so that nothing is equal bit for bit after the first step.
"""
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from test_train import ROOT, corpus, log        # a fixture, and a reader

N_GPUS = torch.cuda.device_count()
pytestmark = pytest.mark.skipif(N_GPUS < 2, reason="needs two GPUs")
NUMBERS = [n for n in (2, 4) if n <= max(N_GPUS, 2)]
WAYS = {"ddp": [], "sharded": ["--shard"]}
SMALL = ["--size", "tiny", "--batch", "16", "--micro", "4", "--seq", "64", "--eval_every", "3",
         "--steps", "6", "--sample_tokens", "5"]
# How far losses near 6 may be from those of one GPU. The gradients of the first step are the same
# up to the order of sums, so that weights differ by little. That grows from step to step, and
# faster in FP8, where a value near the middle between two codes goes to the other one: on 4 H200s
# .00005 in the second step became .0027 in the third, in which the loss jumps from 5.06 to 5.43.
CLOSE_AT_FIRST = 5e-4
CLOSE = {"bf16": 2e-3, "fp8": 1e-2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def command(corpus, folder):
    "command(n, '--name', 'r'): the command line of a run on n GPUs; 0 is one without torchrun"
    def command(n, *args):
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"]
        return [sys.executable, *(torchrun if n else []), os.path.join(ROOT, "quartet.py"),
                "--data", str(corpus), "--out", str(folder), *SMALL, *args]
    return command


@pytest.fixture(scope="module")
def trained(command, folder):
    "trained(n, 'ddp', 'bf16'): the rows of its log; each run is trained once"
    rows = {}

    def trained(n, way, precision, *args):
        name = "-".join([str(n), way, precision, *args]).replace("--", "")
        if name not in rows:
            finish(command(n, *WAYS[way], "--precision", precision, "--name", name, *args))
            rows[name] = log(folder / name)
        return rows[name]
    return trained


def finish(words):
    done = subprocess.run(words, capture_output=True, text=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "2"})
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def column(rows, i): return [float(row[i]) for row in rows if row[i]]


def far(rows, others, i):
    pairs = zip(column(rows, i), column(others, i), strict=True)
    return max(abs(one - other) for one, other in pairs)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("n", NUMBERS)
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_losses_are_those_of_one_gpu(trained, n, way, precision):
    alone = trained(0, "ddp", precision, "--no_compile")
    several = trained(n, way, precision, "--no_compile")
    assert len(several) == 6
    norm, norm_alone = column(several, 4)[0], column(alone, 4)[0]
    assert abs(norm - norm_alone) <= 1e-4 * norm_alone
    assert far(several[:2], alone[:2], 1) <= CLOSE_AT_FIRST
    assert far(several, alone, 1) <= CLOSE[precision]
    assert far(several, alone, 2) <= CLOSE[precision]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("n", NUMBERS)
def test_the_first_loss_in_fp4_is_that_of_one_gpu(trained, n, way):
    alone = trained(0, "ddp", "fp4", "--no_compile")
    several = trained(n, way, "fp4", "--no_compile")
    assert abs(column(several, 1)[0] - column(alone, 1)[0]) <= 1e-5
    assert far(several, alone, 1) <= .05        # Later, each draws its own rotations.


@pytest.mark.parametrize("way", WAYS)
def test_compiled_models_train_as_others(trained, way):
    compiled = trained(2, way, "bf16", "--compile")
    assert far(compiled, trained(2, way, "bf16", "--no_compile"), 1) <= .02
    assert len(trained(2, way, "fp4", "--compile")) == 6


@pytest.mark.parametrize("end", [(0, "ddp"), (2, "ddp"), (2, "sharded")], ids=str)
@pytest.mark.parametrize("start", [(n, way) for n in NUMBERS for way in WAYS], ids=str)
def test_a_run_goes_on_with_another_number_of_gpus(trained, command, folder, start, end):
    n, way = start
    rows = trained(n, way, "bf16", "--no_compile")
    name = f"{n}-{way}-to-{end[0]}-{end[1]}"
    shutil.copytree(folder / f"{n}-{way}-bf16-no_compile", folder / name)
    shutil.move(folder / name / "ckpt-3.pt", folder / name / "ckpt.pt")
    finish(command(end[0], *WAYS[end[1]], "--precision", "bf16", "--name", name, "--resume",
                   "--no_compile"))
    assert len(log(folder / name)) == 6 and far(log(folder / name), rows, 1) <= CLOSE["bf16"]


@pytest.mark.parametrize("way", WAYS)
def test_a_signal_to_torchrun_saves_and_stops_all(command, folder, way):
    words = command(2, *WAYS[way], "--precision", "fp4", "--name", f"stopped-{way}",
                    "--no_compile", "--steps", "100000", "--eval_every", "100000")
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    path = folder / f"stopped-{way}"
    deadline = time.monotonic() + 120
    while not ((path / "log.csv").exists() and log(path)) and time.monotonic() < deadline:
        time.sleep(.2)
    process.send_signal(signal.SIGTERM)
    _, printed = process.communicate(timeout=60)
    assert printed.count("stopped by SIGTERM") == 1 and "(exit code 143)" in printed
    assert (path / "ckpt.pt").exists() and not (path / "lock").exists()
