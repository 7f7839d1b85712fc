"""What is measured on several GPUs: real cells of the tiny model in two processes on the CPU, their
bytes counted by hand, processes that run out of memory, and the tables from made-up entries."""
import json
import os
import re

import pytest
import torch

from data.files import UserError
from model import Llama
from tools import (
    bench, bench_inference, bench_others, bench_rows, bench_scaling, cli, machine, markdown,
    processes)
from tools.bench_report import VOCABULARY
from tools.bench_scaling import LOADS, ONE

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")


def cell(way, row, gpus=2, size="tiny", device="cpu"):
    return dict(gpus=gpus, size=size, way=way, row=row, device=device)


@pytest.fixture
def results_at(tmp_path, monkeypatch):
    path = tmp_path / "build" / "scaling.json"
    monkeypatch.setattr(bench_scaling, "RESULTS", str(path))
    return path


# ---- real cells

# The tiny model: what is quantised in one of its 4 blocks, and everything else.
MATRICES = 128 * 3 * 128 + 128 * 128 + 128 * 2 * 512 + 512 * 128
NORMS = 2 * 128
OUTSIDE = 2 * VOCABULARY * 128 + 128
PARAMETERS = 4 * (MATRICES + NORMS) + OUTSIDE
N_MICRO = 2


def gathered(bytes_a_value, times):
    """the bytes that one of two processes sends of a sharded model's weights in a step

    times   how often a block is gathered
    """
    # What is outside is gathered for each microbatch, with its two matrices in the dtype of the
    # activations. Norms travel in float32.
    block = MATRICES * bytes_a_value + 4 * NORMS
    outside = 2 * VOCABULARY * 128 * 2 + 4 * 128
    return (times * 4 * block + N_MICRO * outside) / 2


def test_two_processes_send_what_a_count_by_hand_says(results_at):
    rows = [("ddp", "fp4"), ("sharded", "bf16"), ("sharded", "fp4")]
    results = dict(entries=[])
    bench_scaling.measure_all(results, [cell(*names) for names in rows])
    assert json.loads(results_at.read_text()) == results
    assert [(entry["way"], entry["row"]) for entry in results["entries"]] == rows
    for entry in results["entries"]:
        assert "failed" not in entry
        # Each process has two microbatches of one sequence of 64 tokens.
        assert entry["tokens_per_s"] == pytest.approx(1000 * 2 * N_MICRO * 64 / entry["ms"])
    ddp, bf16, fp4 = results["entries"]

    # The gradient of each parameter is summed once a step. An all-reduce is a reduce-scatter and a
    # gather, and each of two processes sends a half in both.
    assert ddp["reductions"] == {"float32": 4 * PARAMETERS * 2 / 2} and ddp["gathers"] == {}
    # BF16 travels for each forward and for each backward pass. FP4 travels once; codes, scales and
    # masks take 4.25 + 1 bits a value. What is mixed is uint8.
    assert bf16["gathers"] == {"uint8": gathered(2, times=2 * N_MICRO)}
    assert fp4["gathers"] == {"uint8": gathered(1 / 2 + 1 / 32 + 1 / 8, times=1)}
    # The gradients of each microbatch; and the squares of norms of 6 parameters a block and of 3
    # others, for clipping.
    norms = 4 * (4 * 6 + 3) * 2
    scattered = {"float32": (N_MICRO * 4 * PARAMETERS + norms) / 2}
    assert bf16["reductions"] == fp4["reductions"] == scattered


# ---- what is sent

@pytest.mark.parametrize("name, args, returns, kind, n_bytes", [
    # 4 processes: a GPU sends 3/4 of the whole data, or twice that.
    ("c10d::allreduce_", ([torch.zeros(8)],), None, "reductions", 2 * 24),
    ("c10d::allreduce_coalesced_", ([torch.zeros(8), torch.zeros(4)],), None, "reductions", 2 * 36),
    ("c10d::_reduce_scatter_base_", (torch.zeros(2), torch.zeros(8)), None, "reductions", 24),
    ("c10d::reduce_scatter_", ([torch.zeros(2)], [[torch.zeros(2)] * 4]), None, "reductions", 24),
    ("c10d::_allgather_base_", (torch.zeros(8), torch.zeros(2)), None, "gathers", 24),
    ("c10d::allgather_", ([[torch.zeros(2)] * 4], [torch.zeros(2)]), None, "gathers", 24),
    ("_c10d_functional::all_reduce", (torch.zeros(8), "sum", "0"), None, "reductions", 2 * 24),
    ("_c10d_functional::all_gather_into_tensor", (torch.zeros(2), 4, "0"), torch.zeros(8),
     "gathers", 24),
    ("_c10d_functional::reduce_scatter_tensor", (torch.zeros(8), "sum", 4, "0"), torch.zeros(2),
     "reductions", 24),
], ids=range(9))
def test_a_collective_sends_what_a_ring_sends(monkeypatch, name, args, returns, kind, n_bytes):
    monkeypatch.setattr(processes, "size", lambda: 4)
    counter = bench_scaling.Wire()
    for _ in range(2):                  # They add up.
        called(counter, name, args, returns)
    other = "gathers" if kind == "reductions" else "reductions"
    assert counter.sent == {kind: {"float32": 2 * n_bytes}, other: {}}
    assert counter.ignore_compile_internals()


def called(counter, name, args, returns=None):
    def op(*args): return returns
    op.namespace = name.partition("::")[0]
    op.name = lambda: name + ".default"
    return counter.__torch_dispatch__(op, (), args)


def test_a_collective_that_is_not_known_is_refused_and_what_sends_nothing_is_not_counted():
    counter = bench_scaling.Wire()
    with pytest.raises(UserError, match="the bytes of c10d::alltoall_ are not counted"):
        called(counter, "c10d::alltoall_", (torch.zeros(8),))
    assert called(counter, "_c10d_functional::wait_tensor", (torch.zeros(8),), "waited") == "waited"
    assert called(counter, "aten::add", (torch.zeros(8),), "added") == "added"
    assert counter.sent == {"gathers": {}, "reductions": {}}


# ---- a step

def training(row="fp4", shard=False):
    cfg = bench_scaling.settings(cell("sharded" if shard else "ddp", row))
    return bench_scaling.Training(cfg, LOADS["tiny"])


def test_a_model_that_is_not_sharded_has_done_a_step_before_it_depends_on_others(monkeypatch):
    steps = []
    monkeypatch.setattr(bench_scaling.Training, "step", lambda self: steps.append(self))
    assert steps == [training()]
    assert training(shard=True).model.embed.weight.device.type == "cpu" and len(steps) == 1


def test_a_step_changes_every_weight_and_quantises_the_new_ones_once(monkeypatch):
    one = training()
    before = [parameter.detach().clone() for parameter in one.model.parameters()]
    one.step()
    for old, new in zip(before, one.model.parameters(), strict=True):
        assert not torch.equal(old, new)
    assert all(parameter.grad is None for parameter in one.model.parameters())
    bench_scaling.fp4.check_weights(one.model)


def test_a_model_has_random_matrices_norms_of_1_and_the_trainers_positions():
    one = bench_scaling.empty_model(bench_scaling.settings(cell("ddp", "bf16")))
    bench_scaling.fill(one)
    for parameter in one.parameters():
        if parameter.dim() == 1:
            assert torch.equal(parameter, torch.ones_like(parameter))
        else:
            assert float(parameter.detach().std()) == pytest.approx(0.02, rel=0.05)
    trained = Llama(one.config, bench_scaling.fp4.recipe("bf16"), torch.bfloat16)
    assert torch.equal(one.cos, trained.cos) and torch.equal(one.sin, trained.sin)
    assert one.config.vocab_size == VOCABULARY


def test_gradients_travel_with_the_last_microbatch_only():
    one = training("bf16")
    seen = []

    class Trained(torch.nn.Module):
        def forward(self, x, y):
            seen.append(self.require_backward_grad_sync)
            return one.model(x, y)

    one.trained = Trained()
    one.step()
    assert seen == [False, True]


class FakeClock:
    """a Training whose steps last as long as these seconds"""
    def __init__(self, seconds, log):
        self.cfg = bench_scaling.settings(cell("ddp", "bf16"))
        self.load = LOADS["tiny"]._replace(n_timed=3)
        self.seconds = iter(seconds)
        self.now = 0
        self.log = log

    def join(self):
        self.log.append("join")

    def step(self):
        self.now += next(self.seconds)
        self.log.append("step")


def test_a_time_is_the_median_over_steps_of_the_slowest_process(monkeypatch):
    log = []
    fake = FakeClock([50, 40, 1, 2, 6, 1], log)
    monkeypatch.setattr(bench_scaling.time, "perf_counter", lambda: fake.now)
    monkeypatch.setattr(processes, "size", lambda: 2)
    # The other process takes 5, 1 and 1 seconds, so that the steps last 5, 2 and 6.
    monkeypatch.setattr(processes, "gather_numbers",
                        lambda *mine, device: [list(mine), [5., 1., 1., mine[-1]]])
    entry = bench_scaling.time_and_count(fake)
    assert entry == dict(ms=5000, tokens_per_s=fake.cfg.batch * 64 / 5, gathers={}, reductions={})
    assert log == ["join", *["step"] * (2 + 3 + 1)]


def test_one_gpu_sends_nothing_and_no_step_is_made_to_count_it(monkeypatch):
    log = []
    fake = FakeClock([50, 40, 1, 2, 6], log)
    monkeypatch.setattr(bench_scaling.time, "perf_counter", lambda: fake.now)
    entry = bench_scaling.time_and_count(fake)
    assert set(entry) == {"ms", "tokens_per_s"} and entry["ms"] == 2000


# ---- memory that does not suffice

def no_memory(*args):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_on_one_gpu_what_does_not_fit_is_an_entry_without_times(monkeypatch):
    monkeypatch.setattr(bench_scaling, "time_and_count", no_memory)
    monkeypatch.setattr(bench_scaling, "Training", lambda cfg, load: None)
    assert bench_scaling.measure(cell(ONE, "bf16", 1)) == {}
    monkeypatch.setattr(bench_scaling, "Training", no_memory)
    assert bench_scaling.measure(cell(ONE, "bf16", 1)) == {}


def test_another_error_than_that_of_memory_passes_through(monkeypatch):
    def fail(*args):
        raise RuntimeError("NCCL error")

    monkeypatch.setattr(bench_scaling, "Training", fail)
    with pytest.raises(RuntimeError, match="NCCL error"):
        bench_scaling.measure(cell(ONE, "bf16", 1))


# What torchrun starts instead of the program: one whose steps are nothing, and where process 1 runs
# out of memory alone, before it depends on the others (fp8) or after that (fp4).
FAULTY = """
import sys
sys.path.insert(0, {root!r})
import torch
from tools import bench_scaling, cli, processes

class Training:
    def __init__(self, cfg, load):
        self.cfg = cfg
        self.load = load
        self.run_out("fp8")

    def run_out(self, row):
        if self.cfg.precision == row and processes.rank() == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        if self.cfg.precision == "luq-int4":
            raise ZeroDivisionError("something else")

    def join(self):
        processes.gather_objects(None)

    def step(self):
        self.run_out("fp4")
        processes.gather_objects(None)

bench_scaling.Training = Training
sys.exit(processes.leave(cli.run(bench_scaling.main, sys.argv[1:], "bench_scaling", go_on="")))
"""


def test_a_process_out_of_memory_costs_its_cell_and_no_other_and_nobody_waits_for_it(
        results_at, tmp_path, monkeypatch, capfd):
    script = tmp_path / "faulty.py"
    script.write_text(FAULTY.format(root=ROOT))
    monkeypatch.setattr(bench_scaling, "PROGRAM", (str(script),))
    starts = []
    run_torchrun = bench_scaling.run_torchrun
    monkeypatch.setattr(bench_scaling, "run_torchrun",
                        lambda n: starts.append(n) or run_torchrun(n))
    rows = ["bf16", "fp8", "fp4-sr", "fp4", "luq-int4"]
    results = dict(entries=[])
    bench_scaling.measure_all(results, [cell("ddp", row) for row in rows])
    entries = results["entries"]
    assert [entry["row"] for entry in entries] == rows
    assert ["ms" in entry for entry in entries] == [True, False, True, False, False]
    # Only what happens among the others costs a start of torchrun, with the cells that are left.
    assert starts == [2, 2]
    assert [entry.get("failed") for entry in entries] == [
        None, None, None, None, "ZeroDivisionError: something else"]
    assert json.loads(results_at.read_text())["entries"] == entries


def test_what_cannot_fit_is_not_tried(results_at, monkeypatch):
    tried = []

    def run_torchrun(n):
        saved = json.loads(results_at.read_text())
        tried.extend(saved["cells"])
        saved["entries"] += [{**one, "ms": 1.} for one in saved["cells"]]
        results_at.write_text(json.dumps(saved))
        return []

    monkeypatch.setattr(bench_scaling, "run_torchrun", run_torchrun)
    # The model of 7B has 6.7 billion parameters, and each takes 16 bytes.
    monkeypatch.setattr(bench_scaling, "memory_of", lambda device: 80e9)
    cells = [cell("ddp", "fp4", 2, "7B"), cell("sharded", "fp4", 2, "7B"),
             cell(ONE, "fp4", 1, "7B")]
    results = dict(entries=[])
    bench_scaling.measure_all(results, cells)
    assert tried == [cells[1]]
    assert results["entries"] == [cells[0], {**cells[1], "ms": 1.}, cells[2]]


@pytest.mark.parametrize("way, gpus, memory, fits", [
    ("ddp", 2, 16 * PARAMETERS, False), ("ddp", 2, 16 * PARAMETERS + 1, True),
    (ONE, 1, 16 * PARAMETERS, False),
    ("sharded", 2, 8 * PARAMETERS, False), ("sharded", 2, 8 * PARAMETERS + 1, True),
])
def test_16_bytes_a_parameter_have_to_fit_where_it_is(way, gpus, memory, fits):
    assert bench_scaling.n_parameters("tiny") == PARAMETERS
    assert bench_scaling.may_fit(cell(way, "fp4", gpus), memory) == fits


TORCHRUN = ["E1126 20:42:00.1 7 torch/distributed/elastic/multiprocessing/api.py:984] failed "
            "(exitcode: 1) local_rank: 1 (pid: 9) of binary: python\n", "Traceback\n",
            "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n", "=====\n"]


@pytest.mark.parametrize("lines, reason", [
    (["tiny bf16: 3 ms\n", "[rank1]:   line 3\n", "[rank1]: ValueError: no\n", "\n"],
     "ValueError: no"),
    (["a\n", "W1126 20:42:00.1 7 api.py:1] Sending process 3 closing signal SIGTERM\n"], "a"),
    (["ValueError: no\n", "bench_scaling: another process of this run has ended, see what\n"],
     "ValueError: no"),
    (["RuntimeError: CUDA out of memory\n", "bench_scaling: NCCL error\n"],
     "RuntimeError: CUDA out of memory"),
    ([], "it ended without a word"),
], ids=range(5))
def test_why_a_torchrun_failed_is_what_its_processes_said_last(lines, reason):
    assert bench_scaling.why([*lines, *TORCHRUN]) == reason


# ---- what is measured by default

@pytest.mark.parametrize("n_visible, numbers", [(2, [1, 2]), (4, [1, 2, 4]), (6, [1, 2, 4, 6]),
                                                (8, [1, 2, 4, 8])])
def test_the_numbers_of_gpus_are_powers_of_2_and_all_there_are(monkeypatch, n_visible, numbers):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n_visible)
    assert bench_scaling.numbers_of_gpus(None, "cuda") == numbers
    assert bench_scaling.numbers_of_gpus("2,1", "cuda") == [1, 2]
    with pytest.raises(UserError, match=f"--gpus {n_visible + 1}: there are {n_visible}"):
        bench_scaling.numbers_of_gpus(f"1,{n_visible + 1}", "cuda")


@pytest.mark.parametrize("text", ["two", "1,,2", "-1", "0", "1.5"])
def test_what_is_no_list_of_numbers_is_refused(text):
    with pytest.raises(UserError, match=f"--gpus {re.escape(text)}"):
        bench_scaling.numbers_of_gpus(text, "cpu")


def test_the_plan_has_one_gpu_first_and_large_models_sharded_only():
    cells = bench_scaling.plan([1, 2], ["800M", "7B"], ["bf16", "fp4"], None, "cuda")
    names = [bench_scaling.name_of(one) for one in cells]
    assert names == [
        "800M bf16, one GPU, on 1", "800M fp4, one GPU, on 1",
        "7B bf16, one GPU, on 1", "7B fp4, one GPU, on 1",
        "800M bf16, ddp, on 2", "800M fp4, ddp, on 2",
        "800M bf16, sharded, on 2", "800M fp4, sharded, on 2",
        "7B bf16, sharded, on 2", "7B fp4, sharded, on 2"]
    only = bench_scaling.plan([2], ["7B"], ["fp4"], ["ddp"], "cuda")
    assert only == [cell("ddp", "fp4", 2, "7B", "cuda")]


@pytest.mark.parametrize("argv, sentence", [
    (["--sizes", "30M,9M"], "size '9M' is not one of tiny, 30M, 800M, 3200M, 7B"),
    (["--rows", "fp5"], "row 'fp5' is not one of bf16, "),
    (["--ways", "alone"], "way 'alone' is not one of ddp, sharded"),
    (["--device", "cpu", "--write"], "the tables of the README are those of GPUs"),
], ids=range(4))
def test_a_mistyped_flag_is_a_sentence(argv, sentence):
    with pytest.raises(UserError, match=sentence):
        bench_scaling.parse(argv)


@pytest.mark.parametrize("n_gpus", [0, 1])
def test_without_several_gpus_a_sentence_and_exit_code_2(monkeypatch, capsys, n_gpus):
    monkeypatch.setattr(machine, "unusable_gpu", lambda: "")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n_gpus)
    sentence = f"what several GPUs make of a step needs several, and torch sees {n_gpus} here\n"
    assert cli.run(bench_scaling.main, [], "bench_scaling") == 2
    assert capsys.readouterr() == ("", f"bench_scaling: {sentence}")
    assert bench.main(["--only", "scaling"]) == 2
    assert capsys.readouterr() == ("", f"bench: {sentence}")


def test_a_gpu_that_torch_cannot_use_is_told_why(monkeypatch):
    monkeypatch.setattr(machine, "unusable_gpu", lambda: "there is an NVIDIA GPU, but ...")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match="there is an NVIDIA GPU, but ..."):
        bench_scaling.numbers_of_gpus(None, "cuda")


# ---- the whole program, from made-up cells

@pytest.fixture
def made_up(results_at, monkeypatch, tmp_path):
    """two GPUs on which everything has been measured; main(*argv) -> what is in the README, and the
    names of the cells that were measured"""
    names = []

    def measure_all(results, cells):
        names.extend(map(bench_scaling.name_of, cells))
        results["entries"] += [entry(**{**one, "device": "cuda"}) for one in cells]
        bench_scaling.save(results)

    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- scaling -->\n<!-- /scaling -->\nb\n")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(machine, "device_name", lambda device: "NVIDIA H100")
    monkeypatch.setattr(bench_scaling, "measure_all", measure_all)
    monkeypatch.setattr(bench_scaling, "README", str(readme))

    def main(*argv):
        names.clear()
        bench_scaling.main(argv)
        return readme.read_text(), names
    return main


def entry(size, way, row, gpus, device="cuda"):
    """As if 2 GPUs made 1.8 times the tokens of one, sharded ones 1.5 times; fp4 is twice as fast,
    and gathers a third."""
    speed = {ONE: 1000, "ddp": 1800, "sharded": 1500}[way] * {"bf16": 1, "fp8": 1.5, "fp4": 2}[row]
    made = dict(gpus=gpus, size=size, way=way, row=row, device=device, ms=1., tokens_per_s=speed,
                peak_gib={ONE: 12., "ddp": 14., "sharded": 7.}[way])
    if gpus > 1:
        made["gathers"] = {} if way == "ddp" else {"uint8": 3e9 if row == "bf16" else 1e9}
        made["reductions"] = {"float32": 4e9}
    return made


@pytest.mark.parametrize("argv, is_written", [((), False), (("--write",), True)])
def test_the_readme_is_rewritten_only_if_asked_for(made_up, capsys, argv, is_written):
    text, names = made_up("--sizes", "30M", *argv)
    printed = capsys.readouterr().out
    assert printed.startswith("`python -m tools.bench_scaling` on up to 2 x NVIDIA H100 (torch ")
    body = printed if is_written else ""
    assert text == f"a\n<!-- scaling -->\n{body}<!-- /scaling -->\nb\n"
    assert len(names) == 9              # three rows on one GPU, and two ways on two


def test_resume_measures_what_is_missing_or_has_failed_today(made_up, results_at, capsys):
    made_up("--sizes", "30M", "--rows", "bf16,fp4", "--ways", "ddp")
    saved = json.loads(results_at.read_text())
    saved["entries"][-1]["failed"] = "a reason"
    results_at.write_text(json.dumps(saved))
    again = ("--sizes", "30M", "--rows", "bf16,fp4", "--ways", "ddp")
    assert made_up(*again, "--resume")[1] == ["30M fp4, ddp, on 2"]
    assert made_up(*again, "--resume")[1] == []
    assert len(made_up(*again)[1]) == 4
    saved["date"] = "2026-01-01"
    results_at.write_text(json.dumps(saved))
    assert len(made_up(*again, "--resume")[1]) == 4
    results_at.unlink()
    assert len(made_up(*again, "--resume")[1]) == 4


def test_the_readme_of_the_method_has_the_markers_behind_its_text():
    with open(bench_scaling.README) as file:
        text = file.read()
    assert "new" in markdown.replaced(text, "new", "scaling")
    section = text[text.index("## Several GPUs"):text.index("## Blackwell")]
    assert "<!-- scaling -->" in section and text.index("## Speed") < text.index("## Several GPUs")


# ---- the hook of make bench

@pytest.mark.parametrize("n_gpus, calls", [(0, ["rows"]), (1, ["rows"]), (2, ["rows", "scaling"])])
def test_a_full_run_of_bench_measures_rows_and_several_gpus_at_the_end(
        monkeypatch, tmp_path, n_gpus, calls):
    readme = tmp_path / "README.md"
    readme.write_text("<!-- bench -->\n<!-- /bench -->\n")
    seen = []

    def program(name):
        def main(argv):
            assert argv == () or argv == ("--write",) and "new" in readme.read_text()
            seen.append(name if argv else f"{name}, printed")
            return codes[name]
        return main

    monkeypatch.setattr(bench, "README", str(readme))
    monkeypatch.setattr(bench, "load_kernels", lambda gemm: None)
    monkeypatch.setattr(bench, "measure_parts", lambda *args: [])
    monkeypatch.setattr(bench, "report", lambda results: "new")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n_gpus)
    monkeypatch.setattr(bench_rows, "main", program("rows"))
    monkeypatch.setattr(bench_others, "main", program("others"))
    monkeypatch.setattr(bench_scaling, "main", program("scaling"))
    monkeypatch.setattr(bench_inference, "main", program("inference"))
    codes = dict(rows=None, others=None, scaling=None, inference=None)
    assert bench.main([]) == 0 and seen == calls
    assert bench.main(["--only", "steps"]) == 0 and seen == calls
    for name in bench.PROGRAMS:
        assert bench.main(["--only", name]) == 0 and seen.pop() == f"{name}, printed"
    codes["rows"] = 2                   # What follows is measured all the same.
    assert bench.main([]) == 2 and seen == 2 * calls


@pytest.mark.parametrize("argv", [["--quick"], ["--gemm", "bf16"]], ids=["quick", "gemm"])
@pytest.mark.parametrize("name", bench.PROGRAMS)
def test_a_program_of_its_own_takes_no_flag_that_means_nothing_to_it(name, argv):
    with pytest.raises(UserError, match=f"--only {name} takes neither --quick nor --gemm"):
        bench.parse(["--only", name, *argv])


# ---- tables

def cells_of(text):
    return [[part.strip() for part in line.strip("|").split("|")] for line in text.splitlines()]


@pytest.fixture
def results():
    rows = ("bf16", "fp4")
    entries = [entry("800M", ONE, row, 1) for row in rows]
    entries += [entry("800M", way, row, 2) for way in ("ddp", "sharded") for row in rows]
    entries += [cell(ONE, "fp4", 1, "7B", "cuda"), entry("7B", "sharded", "fp4", 2)]
    return dict(gpu="NVIDIA H100", torch="2.13.0", date="2026-11-26", entries=entries)


def test_the_speed_table_has_tokens_a_second_efficiency_and_memory(results):
    head, _, *lines = cells_of(bench_scaling.speed_table(results["entries"], [1, 2]))
    assert head == ["GPU's step", "way", "row", "1: tokens/s", "GiB", "2: tokens/s", "of N x 1",
                    "GiB"]
    assert lines == [
        ["800M, 8 x 16 x 512", "ddp", "bf16", "1,000", "12.00", "1,800", "90%", "14.00"],
        ["", "", "fp4", "2,000", "12.00", "3,600", "90%", "14.00"],
        ["", "sharded", "bf16", "1,000", "12.00", "1,500", "75%", "7.00"],
        ["", "", "fp4", "2,000", "12.00", "3,000", "75%", "7.00"],
        # Nothing is known of what one GPU would do.
        ["7B, 4 x 2 x 512", "sharded", "fp4", "out of memory", "", "3,000", "", "7.00"]]


def test_what_only_one_gpu_has_done_has_a_line_of_its_own(results):
    only = [one for one in results["entries"] if one["gpus"] == 1 and one["size"] == "800M"]
    _, _, *lines = cells_of(bench_scaling.speed_table(only, [1]))
    assert lines == [["800M, 8 x 16 x 512", "one GPU", "bf16", "1,000", "12.00"],
                     ["", "", "fp4", "2,000", "12.00"]]
    assert "collective" not in bench_scaling.report({**results, "entries": only})


def test_the_table_of_what_is_sent_has_a_row_s_gathers_as_a_share_of_bf16_s(results):
    head, _, *lines = cells_of(bench_scaling.wire_table(results["entries"], 2))
    assert head == ["GPU's step", "way", "row", "gathers GB", "/ bf16", "reductions GB",
                    "of dtype", "sum GB"]
    assert lines == [
        ["800M, 8 x 16 x 512", "ddp", "bf16", "0.000", "", "4.000", "float32", "4.000"],
        ["", "", "fp4", "0.000", "", "4.000", "float32", "4.000"],
        ["", "sharded", "bf16", "3.000", "1.00", "4.000", "float32", "7.000"],
        ["", "", "fp4", "1.000", "0.33", "4.000", "float32", "5.000"],
        ["7B, 4 x 2 x 512", "sharded", "fp4", "1.000", "", "4.000", "float32", "5.000"]]


def test_what_is_sent_is_that_of_the_largest_number_of_gpus(results):
    more = [{**one, "gpus": 4, "gathers": {"uint8": 6e9}} for one in results["entries"]
            if one["way"] == "sharded" and one["size"] == "800M"]
    results["entries"] += more
    text = bench_scaling.report(results)
    assert "What one of 4 GPUs sends" in text and "| 10.000 |" in re.sub(" +", " ", text)
    assert "4: tokens/s" in text and text.startswith(
        "`python -m tools.bench_scaling` on up to 4 x NVIDIA H100 (torch 2.13.0, 2026-11-26)\n")


def test_what_failed_is_in_the_table_and_its_reason_below(results):
    results["entries"][2] = {**cell("ddp", "bf16", 2, "800M", "cuda"), "failed": "NCCL error"}
    text = bench_scaling.report(results)
    _, _, ddp, *_ = cells_of(bench_scaling.speed_table(results["entries"], [1, 2]))
    assert ddp == ["800M, 8 x 16 x 512", "ddp", "bf16", "1,000", "12.00", "failed", "", ""]
    assert "- 800M bf16, ddp, on 2: NCCL error" in text


def test_the_report_keeps_to_100_columns_outside_its_tables(results):
    lines = bench_scaling.report(results).splitlines()
    assert max(len(line) for line in lines if not line.startswith("|")) <= 100
