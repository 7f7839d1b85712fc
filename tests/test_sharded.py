"""A sharded model computes what a whole one does, and sends what the table of sharded.py says.

The checks are functions of sharded_worker.py, which run in processes that talk over gloo, on the
CPU; where there are enough GPUs, each process has one, and they talk over NCCL. Starting the
processes takes seconds, so they are started once for each number of them, and run all checks of the
tests that were selected.
"""
import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fp4
from fp4 import sharded, stored_weight
from fp4.emulate import fp8
from fp4.emulate.matmul import Matmul

HERE = Path(__file__).resolve().parent
TIME_LIMIT = 240                # seconds; of all checks with one number of processes
ALL = [f"{recipe}:{dtype}" for recipe in ("fp4", "fp4-sr", "fp8", "bf16", "nvfp4")
       for dtype in ("float32", "bfloat16")]
SOME = ["fp4:float32", "fp8:bfloat16", "bf16:bfloat16", "nvfp4:float32"]
STORED = ["fp4:float32", "fp4-fwd:bfloat16", "fp8:bfloat16"]        # recipes that quantise a strip
fp4.build()                     # The processes need not all compile the kernels.


# ---- the processes

def checks(check, cases):
    """Makes one test of each case: a number of processes, and CHECK:RECIPE:DTYPE."""
    pairs = [(n, f"{check}:{name}") for n, names in cases.items() for name in names]
    return pytest.mark.parametrize("n, check", pairs, ids=[f"{n}-{name}" for n, name in pairs])


@pytest.fixture
def wrong(request, tmp_path_factory, n, check):
    """What was wrong in the processes of a test: sentences, or "".

    The first test that asks runs the checks of all, and leaves them in a file for the others and
    for the other workers of pytest-xdist.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    report = folder / f"sharded{n}.json"
    with open(folder / f"sharded{n}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not report.exists():
            selected = [item.callspec.params for item in request.session.items
                        if item.path == Path(__file__) and "wrong" in item.fixturenames]
            run_processes(n, report, [each["check"] for each in selected if each["n"] == n])
    results = json.loads(report.read_text())
    missing = ["the processes ended before this check", results["output"]]
    return "\n".join(results.get(check, missing))


def run_processes(n, report, names):
    """Runs the checks in n processes; adds what they printed to their report."""
    partial = report.with_suffix(".partial")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               f"--nproc_per_node={n}", HERE / "sharded_worker.py", partial, *names]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        output, _ = process.communicate(timeout=TIME_LIMIT)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)         # torchrun then ends the others.
        output, _ = process.communicate()
        output += f"\nstopped after {TIME_LIMIT} seconds"
    results = json.loads(partial.read_text()) if partial.exists() else {}
    report.write_text(json.dumps({**results, "output": output[-5000:]}))


@checks("gathered", {2: ALL, 3: SOME, 4: SOME, 1: SOME})
def test_what_is_gathered_is_byte_for_byte_the_quantised_whole_weight(wrong):
    assert not wrong, wrong


@checks("traffic", {2: ALL, 3: SOME, 4: SOME, 1: SOME})
def test_so_many_bytes_travel_as_the_table_says(wrong):
    assert not wrong, wrong


@checks("same_data", {2: ALL, 3: SOME, 4: SOME, 1: SOME})
def test_with_the_same_data_everywhere_the_gradients_are_those_of_the_whole_model(wrong):
    assert not wrong, wrong


@checks("step", {2: ALL, 3: SOME, 4: SOME, 1: SOME})
def test_a_step_is_one_with_the_mean_gradient_of_all_processes(wrong):
    assert not wrong, wrong


@checks("changes", {2: [*STORED, "bf16:bfloat16", "nvfp4:float32"], 3: ["fp4:float32"],
                    1: ["fp4:float32"]})
def test_a_changed_weight_is_not_stale(wrong):
    assert not wrong, wrong


@checks("pull", {2: ["fp4:float32"], 3: ["fp4:float32"]})
def test_cage_pulls_the_rows_of_each_process_as_those_of_the_whole_weight(wrong):
    assert not wrong, wrong


@checks("renewals", {2: STORED})
def test_a_weight_is_quantised_once_a_step(wrong):
    assert not wrong, wrong


@checks("mistakes", {2: STORED, 4: ["fp4:float32"]})
def test_what_cannot_be_right_is_said_in_all_processes(wrong):
    assert not wrong, wrong


@checks("poison", {2: STORED, 4: ["fp4:float32", "fp8:bfloat16"]})
def test_what_is_not_finite_in_one_process_arrives_in_all(wrong):
    assert not wrong, wrong


@checks("freed", {2: SOME, 3: ["fp4:float32"]})
def test_a_block_gives_up_its_whole_weights_after_each_pass(wrong):
    assert not wrong, wrong


@checks("orders", {2: SOME, 4: ["fp4:float32"], 1: ["fp4:float32"]})
def test_evaluations_and_passes_in_another_order_are_those_of_the_whole_model(wrong):
    assert not wrong, wrong


@checks("microbatches", {2: SOME, 4: STORED, 1: ["fp4:float32"]})
def test_microbatches_of_a_step_add_up(wrong):
    assert not wrong, wrong


@checks("blocks_of_layers", {2: STORED})
def test_a_block_may_be_nothing_but_layers_and_two_may_share_a_weight(wrong):
    assert not wrong, wrong


@pytest.mark.slow
@checks("compiled", {2: ["fp4:float32", "fp8:float32"]})
def test_compiled_blocks_compute_what_eager_ones_do(wrong):
    assert not wrong, wrong


# ---- what needs no second process

def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_part_is_quantised_to_fp8_as_a_part_of_the_whole():
    whole = random(64, 32)
    expected = fp8.quantize(whole, fp8.E4M3)
    largest = whole.abs().amax()
    for part, values in zip(whole.chunk(4), expected.values.chunk(4)):
        got = fp8.quantize(part, fp8.E4M3, largest)
        assert torch.equal(got.values.float(), values.float())
        assert torch.equal(got.scale, expected.scale)


def test_an_fp8_product_reads_a_weight_that_is_quantised_already_and_not_the_other():
    recipe = fp4.recipe("fp8")
    x = random(16, 64, seed=1).requires_grad_()
    weight = random(32, 64, seed=2).requires_grad_()
    unread = torch.full((32, 64), torch.nan, requires_grad=True)
    dy = random(16, 32, seed=3)
    ready = fp8.quantize(weight.detach(), fp8.E4M3)
    results = []
    for w, w_ready in ((weight, None), (unread, ready)):
        y = Matmul.apply(x, w, recipe, w_ready)
        results.append((y, *torch.autograd.grad(y, (x, w), dy)))
    for expected, got in zip(*results):
        assert torch.equal(got, expected)


def test_a_gathered_weight_hands_its_gradient_to_the_float32_weight():
    layer = fp4.Linear(64, 32, fp4.recipe("bf16"))
    x = random(8, 64, seed=1).bfloat16()
    dy = random(8, 32, seed=2).bfloat16()
    expected = layer(x)
    expected_dw, = torch.autograd.grad(expected, layer.weight, dy)
    layer.gathered = layer.weight.detach().bfloat16()
    with torch.no_grad():
        layer.weight.fill_(torch.nan)
    got = layer(x)
    dw, = torch.autograd.grad(got, layer.weight, dy)
    assert torch.equal(got, expected) and torch.equal(dw, expected_dw)
    assert dw.dtype == torch.float32
    assert stored_weight.cast(layer, torch.bfloat16).data_ptr() == layer.gathered.data_ptr()


@pytest.mark.parametrize("recipe", fp4.RECIPES)
def test_each_recipe_has_its_way_to_travel(recipe):
    layer = fp4.Linear(64, 64, fp4.recipe(recipe))
    expected = {"fp8": sharded.Float8Strip, "bf16": sharded.CastStrip}.get(recipe)
    if layer.has_kernels:
        expected = sharded.PackedStrip
    assert sharded.strip_class_of(layer, torch.bfloat16) is expected


def test_matrices_outside_of_linear_layers_are_rounded_if_activations_are():
    for layer in (torch.nn.Embedding(64, 64), torch.nn.Linear(64, 64)):
        assert sharded.strip_class_of(layer, torch.bfloat16) is sharded.RoundedStrip
        assert sharded.strip_class_of(layer, torch.float32) is None
    assert sharded.strip_class_of(torch.nn.LayerNorm(64), torch.bfloat16) is None
