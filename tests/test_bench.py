"""The tables of `make bench` from made-up times, its clocks on a made-up GPU, what it measures on
the CPU, and make's GPU targets."""
import concurrent.futures
import contextlib
import functools
import gc
import glob
import json
import os
import re
import shutil
import subprocess
import sys
import types
import weakref

import pytest
import torch
from torch.overrides import TorchFunctionMode

import fp4
from fp4 import ops as fp4_ops
from fp4.backend import Backend, select_backend
from model import PRESETS, Preset
from tools import bench, bench_report, energy, machine, markdown, sanitize

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")
CPU = select_backend(None)
RATIO = {"bf16": 1., "fp8": 0.8, "fp4": 0.6, "fp4-sr": 0.7}
# The medians of the ratios in a round are not the ratios of the medians.
IN_A_ROUND = {"bf16": 1., "fp8": 0.81, "fp4": 0.62, "fp4-sr": 0.71}
CALLED_IN_A_ROUND = {"bf16": 1., "fp8": 0.84, "fp4": 0.65, "fp4-sr": 0.74}
WHAT = {"tokens", "out", "in", "row", "size"}       # the keys of an entry that are no measurements


def entry(M, N, K, row, ms, ratio, called_ratio):
    return {"tokens": M, "out": N, "in": K, "row": row, "forward_ms": ms / 4,
            "backward_ms": 3 * ms / 4, "ms": ms, "ratio": ratio, "ghz": 1.5 + ms / 8,
            "called_ms": ms + 1, "called_ratio": called_ratio, "called_ghz": 1.75 + ms / 8}


def without_times(entry):
    return {key: value for key, value in entry.items() if key in WHAT}


def widths(ratios, called_ratios=(.5,) * len(bench.WIDTHS)):
    """square layers, all but bf16 at these ratios to it by the two clocks; None: out of memory"""
    entries = []
    for shape, ratio, called in zip(bench.WIDTHS, ratios, called_ratios, strict=True):
        for row in bench.ROWS:
            of_row = (1., 1.) if row == "bf16" else (ratio, called)
            is_lost = None in of_row
            made = entry(*shape, row, 2., *((1., 1.) if is_lost else of_row))
            entries.append(without_times(made) if is_lost else made)
    return entries


@pytest.fixture
def results():
    shapes = dict.fromkeys(bench.SHAPES + bench.WIDTHS)
    return dict(
        gpu="NVIDIA H200", torch="2.11.0", date="2026-11-23",
        kernels=[dict(name="copy", ms=0.1, terabytes_per_s=4., of_copy=1.),
                 dict(name="fold", ms=0.2, terabytes_per_s=3., of_copy=0.75)],
        products=[{"tokens": 16384, "out": 4096, "in": 4096, "row": row, "ms": RATIO[row],
                   "ratio": IN_A_ROUND[row], "ghz": 1.75} for row in ("bf16", "fp8", "fp4")],
        alone=[dict(row=row, ms=3 * RATIO[row], ghz=1.25) for row in bench.ROWS],
        where=[dict(name="quantise x", ms=0.125, least_ms=0.1),
               dict(name="everything else", ms=0.01, least_ms=None)],
        linears=[entry(*s, row, 2 * RATIO[row], IN_A_ROUND[row], CALLED_IN_A_ROUND[row])
                 for s in shapes for row in bench.ROWS],
        idle_watts=71.4,
        steps=[dict(size=size, row=row, ms=100 * RATIO[row], ratio=IN_A_ROUND[row],
                    tokens_per_s=8192 / RATIO[row], peak_gib=20 * RATIO[row],
                    joules=64 * RATIO[row] ** 2, watts=640 * RATIO[row], alone_ms=99 * RATIO[row])
               for size in bench.STEPS for row in bench.ROWS])


def cells(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]


# ---- tables

def test_a_table_is_markdown_with_aligned_columns():
    text = markdown.table(["what", "ms"], [["copy", "0.1"], ["a long name", "12.25"]])
    assert text == ("| what        |    ms |\n| ----------- | ----: |\n"
                    "| copy        |   0.1 |\n| a long name | 12.25 |")


def test_each_linear_has_its_times_by_both_clocks_and_their_ratios_in_the_same_rounds(results):
    text = bench_report.linear_table(results["linears"][:len(bench.ROWS)])
    head, _, bf16, _, fp4, _ = cells(text)
    assert head == ["tokens, out, in", "row", "forward", "backward", "sum, GPU", "/ bf16", "GHz",
                    "called", "/ bf16", "GHz"]
    assert bf16 == ["16384, 4096, 4096", "bf16", "0.500", "1.500", "2.000", "1.00", "1.75",
                    "3.000", "1.00", "2.00"]
    assert fp4 == ["", "fp4", "0.300", "0.900", "1.200", "0.62", "1.65", "2.200", "0.65", "1.90"]


def test_a_product_has_its_operations_a_second(results):
    head, _, bf16, _, fp4 = cells(bench_report.product_table(results["products"]))
    assert head == ["tokens, out, in", "row", "ms", "TFLOP/s", "/ bf16", "GHz"]
    # 2 * 16384 * 4096 * 4096 operations are 549,755,813,888: 550 trillion a second if in 1 ms.
    assert bf16 == ["16384, 4096, 4096", "bf16", "1.000", "550", "1.00", "1.75"]
    assert fp4 == ["", "fp4", "0.600", "916", "0.62", "1.75"]


def test_a_kernel_has_its_bandwidth_and_its_share_of_a_copy_s(results):
    _, _, copy, fold = cells(bench_report.kernel_table(results["kernels"]))
    assert copy == ["copy", "0.100", "4.00", "100%"]
    assert fold == ["fold", "0.200", "3.00", "75%"]


def test_a_step_has_its_ratio_of_time_and_of_memory_to_bf16(results):
    text = bench_report.step_table(results["steps"][-len(bench.ROWS):])
    lines = {tuple(line[:2]): line[2:] for line in cells(text)}
    assert lines["800M, 16 x 512", "bf16"] == ["100.0", "1.00", "8,192", "20.00", "1.00"]
    assert lines["", "fp4"] == ["60.0", "0.62", "13,653", "12.00", "0.60"]


def test_a_step_has_its_joules_those_of_a_token_and_their_ratio_to_bf16(results):
    text = bench_report.energy_table(results["steps"][-len(bench.ROWS):])
    head, _, *lines = cells(text)
    assert head == ["step", "row", "J", "mJ a token", "/ bf16", "W", "ms, alone"]
    lines = {tuple(line[:2]): line[2:] for line in lines}
    assert lines["800M, 16 x 512", "bf16"] == ["64.00", "7.812", "1.00", "640", "99.0"]
    assert lines["", "fp4"] == ["23.04", "2.812", "0.36", "384", "59.4"]


def test_joules_that_are_not_known_are_said_to_be_so(results):
    bf16, fp8, *_ = results["steps"]
    del bf16["joules"]
    fp8.update(without_times(fp8))
    steps = [bf16, without_times(fp8), *results["steps"][2:]]
    lines = {line[1]: line[2:] for line in cells(bench_report.energy_table(steps[:4]))}
    assert lines["bf16"] == ["n/a", "", "", "", ""] and lines["fp8"][0] == "out of memory"
    assert lines["fp4"][:3] == ["23.04", "11.250", ""]
    assert "Idle, before\nany step ran, the GPU took 71 W." in bench_report.report(results)
    results["idle_watts"] = None
    text = bench_report.report(results)
    assert bench_report.NO_ENERGY in text and "mJ a token" not in text


def test_a_ratio_of_medians_of_different_rounds_is_marked(results):
    steps = results["steps"][-len(bench.ROWS):]
    for step in steps[1:]:
        del step["ratio"]               # It did not fit beside bf16.
    lines = {line[1]: line[3] for line in cells(bench_report.step_table(steps))}
    assert (lines["bf16"], lines["fp8"], lines["fp4"]) == ("1.00", "~0.80", "~0.60")


@pytest.mark.parametrize("lost", ["bf16", "fp4"])
def test_what_does_not_fit_into_memory_stays_in_every_table(results, lost):
    for part in ("linears", "steps", "products"):
        results[part] = [without_times(e) if e["row"] == lost else e for e in results[part]]
    for e in results["linears"] + results["steps"] + results["products"]:
        if lost == "bf16":              # Nothing was in a round with it.
            e.pop("ratio", None)
            e.pop("called_ratio", None)
    for name in ("linear", "step", "product"):
        text = getattr(bench_report, name + "_table")(results[name + "s"])
        head, _, *lines = cells(text)
        mine = [line for line in lines if line[1] == lost]
        assert mine and all(line[2] == "out of memory" for line in mine)
        ratios = [i for i, title in enumerate(head) if title == "/ bf16"]
        without_ratio = lines if lost == "bf16" else mine
        assert all(line[i] == "" for line in without_ratio for i in ratios)
    assert "out of memory" in bench_report.width_table(results["linears"])


@pytest.mark.parametrize("clock, words", [("", "On the GPU, "),
                                          ("called_", "Called from Python, ")])
@pytest.mark.parametrize("ratios, width", [
    ((3, 2, .9, .8, .7), 2048),
    ((.9, .9, .9, .9, .9), 512),
    ((3, 2, 1.5, 1.2, .99), 8192),
    ((3, 2, 1.5, 1.2, 1.), None),
    ((.9, 2, .9, 1.1, .9), 8192),                   # faster here and there does not count
    ((.9, .9, .9, .9, 1.1), None),
    ((3, .9, .9, .9, float("nan")), None),
    ((3, .9, .9, .9, None), None),
])
def test_the_width_from_which_fp4_pays_is_the_smallest_from_which_it_stays_faster(
        ratios, width, clock, words):
    other = (1.5, .5, .5, .5, .5)                   # By the other clock it pays from 1024 on.
    entries = widths(other, ratios) if clock else widths(ratios, other)
    assert bench_report.faster_from(entries, "fp4", clock) == width
    expected = f"faster than bf16 from a width of {width} on."
    if width is None:
        expected = "not faster than bf16 at 8192, the largest width measured."
    assert bench_report.break_even(entries, "fp4", clock) == f"{words}fp4 is {expected}"


def test_the_width_from_which_a_row_pays_is_that_of_its_own_ratio_and_not_of_two_medians():
    entries = widths((3, 2, .9, .9, .9))            # with the same median in every row
    assert bench_report.faster_from(entries, "fp8", "") == 2048


def test_the_report_says_from_which_width_on_a_row_pays_by_each_clock(results):
    results["linears"] = widths((3, 2, .9, .8, .7), (3, 2, 1.5, .875, .75))
    text = bench_report.report(results)
    for row in ("fp8", "fp4", "fp4-sr"):
        sentence = f"{row} is faster than bf16 from a width of"
        assert f"\nOn the GPU, {sentence} 2048 on.\n" in text
        assert f"\nCalled from Python, {sentence} 4096 on.\n" in text
    head, _, *lines = cells(bench_report.width_table(results["linears"]))
    assert head == ["width", "fp8 / bf16, GPU", "called", "fp4 / bf16, GPU", "called",
                    "fp4-sr / bf16, GPU", "called"]
    assert lines[0] == ["512", *3 * ["3.00", "3.00"]]
    assert lines[3] == ["4096", *3 * ["0.80", "0.88"]]


def test_where_only_bf16_runs_out_of_memory_fp4_is_faster():
    entries = []
    for e in widths((3, 2, 1.5, .9, .9)):
        is_lost = e["row"] == "bf16" and e["out"] == 8192
        if e["out"] == 8192:
            del e["ratio"]
        entries.append(without_times(e) if is_lost else e)
    assert bench_report.faster_from(entries, "fp4", "") == 4096


def test_the_report_keeps_to_100_columns_outside_its_tables(results):
    lines = bench_report.report(results).splitlines()
    assert max(len(line) for line in lines if not line.startswith("|")) <= 100


# ---- the README

def test_only_what_is_between_the_markers_is_rewritten():
    text = "before\n<!-- bench -->\nold | table\n<!-- /bench -->\nafter"
    once = markdown.replaced(text, "new", "bench")
    assert once == "before\n<!-- bench -->\nnew\n<!-- /bench -->\nafter"
    assert markdown.replaced(once, "new", "bench") == once


@pytest.mark.parametrize("text", ["", "<!-- bench -->", "<!-- /bench --><!-- bench -->",
                                  2 * "<!-- bench --><!-- /bench -->"])
def test_a_readme_without_its_markers_is_refused(text):
    with pytest.raises(ValueError, match="it needs one <!-- bench -->"):
        markdown.replaced(text, "new", "bench")


def test_the_readme_of_the_method_has_the_markers():
    with open(bench.README) as file:
        assert "new" in markdown.replaced(file.read(), "new", "bench")


@pytest.fixture
def measured(results, monkeypatch, tmp_path):
    """a GPU on which everything has been measured; main(*argv) -> exit code, README, results"""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: results["gpu"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(fp4, "build", lambda gemm: select_backend((9, 0), gemm))
    monkeypatch.setattr(bench, "kernels", lambda backend: results["kernels"])
    monkeypatch.setattr(bench, "each", lambda f, shapes, rows, backend: results[f.__name__ + "s"])
    monkeypatch.setattr(bench, "steps", lambda sizes, gemm: [results["steps"]])
    monkeypatch.setattr(energy, "idle_watts", lambda device, seconds: results["idle_watts"])
    monkeypatch.setattr(bench, "alone", lambda shape, rows, backend: results["alone"])
    monkeypatch.setattr(bench, "clear_gpu", lambda: None)       # It imports the compiler.
    monkeypatch.setattr(bench, "program", lambda name, *argv: 0)
    monkeypatch.setattr(bench, "where", lambda M, N, K, rate, bandwidth, backend: results["where"])
    monkeypatch.setattr(bench, "README", str(tmp_path / "README.md"))
    monkeypatch.setattr(bench, "RESULTS", str(tmp_path / "bench.json"))
    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- bench -->\n<!-- /bench -->\nb\n")
    return lambda *argv: (bench.main(argv), readme.read_text(), tmp_path / "bench.json")


def test_a_full_run_rewrites_the_readme_and_keeps_every_number(measured, results):
    code, text, saved_path = measured()
    assert code == 0 and text.endswith("<!-- /bench -->\nb\n")
    assert text.startswith("a\n<!-- bench -->\n`make bench` on one NVIDIA H200")
    for table in (bench_report.step_table(results["steps"]),
                  bench_report.energy_table(results["steps"]),
                  bench_report.kernel_table(results["kernels"]),
                  bench_report.width_table(results["linears"]),
                  bench_report.alone_table(results["alone"]),
                  bench_report.where_table(results["where"])):
        assert table in text
    saved = json.loads(saved_path.read_text())
    for part in ("gpu", "kernels", "linears", "alone", "where", "idle_watts", "steps"):
        assert saved[part] == results[part]
    assert {"torch", "date"} < set(saved)
    assert not glob.glob(str(saved_path.parent / "*.tmp"))


@pytest.mark.parametrize("argv", [("--quick",), ("--only", "kernels"), ("--only", "linears"),
                                  ("--only", "steps"), ("--gemm", "bf16"), ("--gemm", "own")])
def test_part_of_a_run_prints_and_rewrites_nothing(measured, argv, capsys):
    code, text, saved_path = measured(*argv)
    assert code == 0 and text == "a\n<!-- bench -->\n<!-- /bench -->\nb\n"
    assert not saved_path.exists()
    assert "NVIDIA H200" in capsys.readouterr().out


@pytest.mark.parametrize("gemm, product", [
    ("fp8", "FP8 tensor cores (the library's)"), ("bf16", "BF16 tensor cores (the library's)"),
    ("fp32", "FP32 (gemm_fp32.cu)")])
def test_another_product_than_the_gpu_s_own_is_printed_under_its_name(
        measured, results, gemm, product, capsys, monkeypatch):
    loaded = []

    def each(measure, shapes, rows, backend):
        loaded.append(backend)
        return results[measure.__name__ + "s"]

    def steps(sizes, gemm):
        loaded.append(select_backend((9, 0), gemm))
        return [results["steps"]]

    monkeypatch.setattr(bench, "each", each)
    monkeypatch.setattr(bench, "steps", steps)
    assert measured("--gemm", gemm)[0] == 0
    title, label, _, *rest = capsys.readouterr().out.splitlines()
    assert title.startswith("`make bench` on one NVIDIA H200 (torch ") and title.endswith("),")
    assert label.startswith(f"but with --gemm {gemm}: ") and product in label
    # Everything but the profile, which knows the names of Hopper's kernels alone.
    assert bench_report.step_table(results["steps"]) in "\n".join(rest)
    assert "Where fp4's time goes" not in "\n".join(rest)
    # Products, linears and steps were measured with it.
    assert [backend.operand_format for backend in loaded] == 3 * ["packed"]
    assert all(product in backend.description for backend in loaded)


def test_each_process_that_times_a_step_loads_the_product_that_is_asked_for(monkeypatch):
    monkeypatch.setattr(fp4, "build", lambda gemm: f"the backend of {gemm}")
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "")
    monkeypatch.setattr(bench.Held, "backend", None)
    bench.start_process(1, "bf16")
    assert bench.Held.backend == "the backend of bf16"
    seen = []

    def training_step(*arguments):
        seen.append(arguments)
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(bench, "training_step", training_step)
    assert bench.if_it_fits(bench.prepare_step, "tiny", "fp4") is None
    assert seen == [("tiny", "fp4", *bench.STEPS["tiny"], "the backend of bf16")]


def test_a_product_that_the_gpu_does_not_have_is_a_sentence_and_exit_code_2(measured, capsys):
    code, text, saved_path = measured("--gemm", "library")
    assert code == 2 and not saved_path.exists()
    assert capsys.readouterr().err == (
        "bench: gemm 'library' needs a GPU of compute capability 10.x or 12.x (Blackwell), and "
        "this one has 9.0: choose auto, which means 'own' here\n")


def test_without_markers_the_numbers_are_kept_and_a_sentence_says_what_is_missing(measured, capsys):
    with open(bench.README, "w") as file:
        file.write("no markers")
    code, text, saved_path = measured()
    assert code == 2 and text == "no markers" and saved_path.exists()
    sentence = "README.md is as it was, because it needs one <!-- bench -->"
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("module", ["tools.bench", "tools.sanitize"])
def test_without_a_gpu_a_sentence_and_exit_code_2(module):
    done = subprocess.run([sys.executable, "-m", module], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 2 and not done.stdout
    assert re.fullmatch(r"(bench|sanitize): torch sees no GPU here\n", done.stderr)


def test_a_gpu_that_torch_cannot_use_is_told_why(measured, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine, "unusable_gpu", lambda: "there is an NVIDIA GPU, but ...")
    assert measured()[0] == 2
    assert capsys.readouterr().err == "bench: there is an NVIDIA GPU, but ...\n"


def test_without_kernels_there_is_nothing_to_measure(measured, monkeypatch, capsys):
    monkeypatch.setattr(fp4, "build", lambda gemm: Backend("reference.py", is_compiled=False))
    code, text, saved_path = measured()
    assert code == 2 and not saved_path.exists()
    assert capsys.readouterr().err == "bench: the kernels did not build\n"


# ---- the clock, on a made-up GPU

class FakeGPU:
    """a host that launches and a GPU that does one thing after the other, in ms"""
    def __init__(self):
        self.host = 0.
        self.free = 0.                  # when the GPU has done everything that was launched
        self.ghz = 1.5

    def launch(self, host_ms, gpu_ms):
        self.host += host_ms
        self.free = max(self.free, self.host) + gpu_ms

    def synchronize(self):
        self.host = max(self.host, self.free)

    def sleep(self, cycles):
        self.launch(0.005, cycles / self.ghz / 1e6)

    def event(self, enable_timing):
        assert enable_timing
        return FakeEvent(self)


class FakeEvent:
    def __init__(self, gpu):
        self.gpu = gpu

    def record(self):
        self.gpu.launch(0.001, 0)
        self.time = self.gpu.free

    def elapsed_time(self, stop):
        assert self.gpu.host >= stop.time, "the GPU is not there yet"
        return stop.time - self.time


@pytest.fixture
def gpu(monkeypatch):
    gpu = FakeGPU()
    monkeypatch.setattr(torch.cuda, "Event", gpu.event)
    monkeypatch.setattr(torch.cuda, "synchronize", gpu.synchronize)
    monkeypatch.setattr(torch.cuda, "_sleep", gpu.sleep)
    return gpu


@pytest.mark.parametrize("host_ms, gpu_ms", [(0.5, 2.), (0.5, 0.1), (0.5, 0.001), (0.01, 0.3)])
def test_a_burst_lasts_as_long_as_the_slower_of_host_and_gpu_does(gpu, host_ms, gpu_ms):
    def three_calls():
        for _ in range(3):
            gpu.launch(host_ms, gpu_ms)

    measure = bench.burst(three_calls, 3, repeats=50, name="called_")
    for _ in range(2):
        gpu.launch(7, 1000)             # Nor does what came before, and the host is not ahead.
        measured = measure()
        assert set(measured) == {"called_ms", "called_ghz"}
        # 150 calls, and recording an event takes the host 0.001 ms. Without a call before them that
        # is not timed, the host's first launch would count.
        assert measured["called_ms"] == pytest.approx(max(host_ms, gpu_ms), abs=2e-5)
        assert measured["called_ghz"] == pytest.approx(1.5)


def test_the_first_call_of_a_burst_finds_a_cold_cache_and_is_not_timed(gpu):
    calls = []

    def f():
        calls.append(8. if len(calls) % 3 == 0 else 2.)
        gpu.launch(0.01, calls[-1])

    measure = bench.burst(f, repeats=2)
    assert [measure()["ms"], measure()["ms"]] == pytest.approx([2., 2.]) and len(calls) == 6


def test_the_frequency_is_that_in_which_the_work_leaves_the_card(gpu):
    def work():
        gpu.ghz -= 0.1
        gpu.launch(0.01, 2.)

    assert bench.burst(work, repeats=2)()["ghz"] == pytest.approx(1.2)


def test_what_is_compared_with_nothing_is_a_median(gpu):
    times = iter([5., 9., 1.] * 100)
    assert bench.gpu_milliseconds(lambda: gpu.launch(0.01, next(times)), 9) in (3., 5., 7.)


@pytest.mark.parametrize("n", [1, 2, 3, 12])
def test_every_burst_comes_as_often_in_each_place(n):
    bursts = list("abcdefghijkl"[:n])
    orders = [bench.in_turn(bursts, number) for number in range(2 * n)]
    for order in orders:
        assert sorted(order) == bursts
    for place in range(n):
        assert sorted(order[place] for order in orders) == sorted(2 * bursts)
    # Two rounds together: nothing is earlier on average.
    for there, back in zip(orders[::2], orders[1::2]):
        assert there == back[::-1]
    assert bench.in_turn(bursts, 2 * n) == orders[0] and bursts == list("abcdefghijkl"[:n])


def counting(log, row, name="ms"):
    """a burst whose n-th value is n; the one that does not count is 0"""
    values = iter(range(1000))

    def measure():
        log.append((row, name))
        return {name: next(values)}

    return measure


def test_each_round_measures_every_burst_of_every_row_once_after_one_round_that_does_not_count():
    log = []
    rows = {row: [counting(log, row), counting(log, row, "called_ms")] for row in "abc"}
    measured = bench.rounds(rows, 4)
    assert measured == {row: {"ms": [1, 2, 3, 4], "called_ms": [1, 2, 3, 4]} for row in "abc"}
    every_burst = [(row, name) for row in "abc" for name in ("ms", "called_ms")]
    rounds = [log[start:start + 6] for start in range(0, len(log), 6)]
    assert len(rounds) == 5 and all(sorted(one) == sorted(every_burst) for one in rounds)
    assert rounds[1] == every_burst and rounds[2] == every_burst[::-1]
    assert rounds[3] == every_burst[1:] + every_burst[:1]


def test_what_is_compared_takes_turns_in_as_many_rounds_as_the_tables_say(results):
    assert len(bench.rounds({"a": [counting([], "a")]})["a"]["ms"]) == bench.ROUNDS
    text = bench_report.report(results)
    assert f"{bench.ROUNDS} rounds" in text and f"{bench.STEP_ROUNDS} rounds" in text


def drifting_rows():
    """four rows that cost the same, in three bursts each, on a card that slows down by 1 % a burst
    """
    n_bursts = iter(range(10_000))
    return {row: 3 * [lambda: {"ms": 1 + 0.01 * next(n_bursts)}] for row in bench.ROWS}


def test_a_card_that_slows_down_favours_no_row(monkeypatch):
    measured = bench.medians(bench.rounds(drifting_rows()))
    assert [times["ratio"] for times in measured.values()] == pytest.approx(4 * [1.], abs=0.005)
    # It does where rows keep their places, even if they are measured in rounds.
    monkeypatch.setattr(bench, "in_turn", lambda bursts, number: bursts)
    assert bench.medians(bench.rounds(drifting_rows()))["fp4-sr"]["ratio"] > 1.02


def test_a_ratio_is_the_median_of_the_ratios_to_the_base_in_the_same_round():
    measured = {"fp4": {"ms": [2., 1., 5.], "called_ms": [3., 9., 12.], "ghz": [1., 3., 2.]},
                "bf16": {"ms": [1., 2., 10.], "called_ms": [1.5, 6., 2.], "ghz": [2., 2., 2.]}}
    medians = bench.medians(measured)
    # The ratios of a round are 2, 1/2, 1/2 and 2, 3/2, 6; those of the medians are 1 and 9/2.
    assert medians["fp4"] == dict(ms=2., called_ms=9., ghz=2., ratio=.5, called_ratio=2.)
    assert medians["bf16"] == dict(ms=2., called_ms=2., ghz=2., ratio=1., called_ratio=1.)
    assert bench.medians(measured, base="fp4")["bf16"]["ratio"] == 2.
    assert bench.medians({"fp4": measured["fp4"]})["fp4"] == dict(ms=2., called_ms=9., ghz=2.)


def out_of_memory(*args):
    raise torch.OutOfMemoryError("full")


def test_a_row_that_does_not_fit_is_left_out_of_the_rounds_and_the_others_are_in_them():
    log = []
    rows = {"bf16": [counting(log, "bf16")], "fp8": None,
            "fp4": [counting(log, "fp4"), out_of_memory]}
    assert bench.rounds(rows, 3) == {"bf16": {"ms": [1, 2, 3]}}
    assert log.count(("fp4", "ms")) == 1
    assert bench.medians(bench.rounds({"bf16": None, "fp4": [out_of_memory]})) == {}
    with pytest.raises(ZeroDivisionError):
        bench.rounds({"bf16": [lambda: 1 / 0]})


class Holder:
    """a burst that holds memory"""
    alive = weakref.WeakSet()

    def __init__(self, log, name):
        self.alive.add(self)
        self.log = log
        self.name = name

    def __call__(self):
        self.log.append(self.name)
        return {"ms": 1.}


def test_the_rows_of_a_shape_are_ready_before_one_is_timed_and_gone_before_the_next_shape(
        monkeypatch):
    log = []
    monkeypatch.setattr(bench, "clear_gpu", lambda: log.append(("cleared", len(Holder.alive))))

    def prepare(M, N, K, row, backend):
        assert backend == "backend"
        log.append("prepared")
        if (M, row) == (2, "fp8"):
            out_of_memory()
        return [Holder(log, (M, row))]

    entries = bench.each(prepare, [(1, 7, 8), (2, 7, 8)], ["bf16", "fp8", "fp4"], "backend")
    n_bursts = [3 * (bench.ROUNDS + 1), 2 * (bench.ROUNDS + 1)]
    first = 3 + n_bursts[0]
    assert log[:3] == 3 * ["prepared"] and {name[0] for name in log[3:first]} == {1}
    assert log[first:first + 4] == [("cleared", 0), *3 * ["prepared"]]
    assert len(log) == first + 4 + n_bursts[1] + 1 and log[-1] == ("cleared", 0)
    expected = [{"tokens": M, "out": 7, "in": 8, "row": row, "ms": 1., "ratio": 1.}
                for M in (1, 2) for row in ("bf16", "fp8", "fp4")]
    expected[4] = without_times(expected[4])
    assert entries == expected


def test_memory_running_out_is_a_result_and_other_errors_are_errors():
    assert bench.if_it_fits(out_of_memory) is None
    assert bench.if_it_fits(lambda a, b: a + b, 1, 2) == 3
    with pytest.raises(ZeroDivisionError):
        bench.if_it_fits(lambda: 1 / 0)


# ---- what is measured, on the CPU, without a clock

class OnTheCPU(TorchFunctionMode):
    """cuda means cpu"""
    def __torch_function__(self, f, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if "cuda" in str(kwargs.get("device")):
            kwargs["device"] = "cpu"
        return args[0] if f is torch.Tensor.cuda else f(*args, **kwargs)


@pytest.fixture
def calls(monkeypatch):
    """nothing is compiled, and time is what was called: 1 ms a forward and 10 ms a backward pass
    when they are replayed, and twice that when they are called"""
    calls = []
    forward = fp4.Linear.forward
    backward = torch.autograd.backward
    class Captured:
        def __init__(self, f):
            self.f = f

        def __call__(self):
            self.f()

    def burst(f, n_calls=1, repeats=2, name=""):
        def measure():
            start = len(calls)
            f()
            ms = sum(10 if call == "backward" else 1 for call in calls[start:])
            return {name + "ms": ms / n_calls * (1 if isinstance(f, Captured) else 2)}
        return measure

    def recorded_forward(self, x):
        calls.append(x.data_ptr())
        return forward(self, x)

    def recorded_backward(*args, **kwargs):
        calls.append("backward")
        return backward(*args, **kwargs)

    # The cache is as large as two pairs of x and dy of the test below.
    device = types.SimpleNamespace(L2_cache_size=2 * 64 * (64 + 32))
    monkeypatch.setattr(bench, "burst", burst)
    monkeypatch.setattr(bench, "captured", Captured)
    monkeypatch.setattr(torch, "compile", lambda f, fullgraph, dynamic=None: f)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: device)
    monkeypatch.setattr(bench, "clear_gpu", lambda: None)
    monkeypatch.setattr(fp4.Linear, "forward", recorded_forward)
    monkeypatch.setattr(torch.autograd, "backward", recorded_backward)
    return calls


def test_a_linear_is_timed_by_both_clocks_on_more_inputs_than_the_cache_holds(calls, monkeypatch):
    monkeypatch.setattr(bench, "rounds", functools.partial(bench.rounds, n=2))
    with OnTheCPU():
        entries = bench.each(bench.linear, [(64, 64, 32)], bench.ROWS, CPU)
    for row, of_row in zip(bench.ROWS, entries, strict=True):
        assert of_row == {
            "tokens": 64, "out": 64, "in": 32, "row": row, "forward_ms": 1., "backward_ms": 10.,
            "ms": 11., "called_ms": 22., "forward_ratio": 1., "ratio": 1., "called_ratio": 1.}
    # Three times the cache are x and dy of three pairs, in each of the rows.
    assert len(set(calls) - {"backward"}) == 3 * len(bench.ROWS)


def test_what_a_captured_graph_reads_stays_in_memory(monkeypatch):
    class Graph(contextlib.nullcontext):
        def replay(self):
            assert read() is not None

    class Stream:
        def wait_stream(self, other):
            pass

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: graph)
    inputs = torch.ones(3)
    read = weakref.ref(inputs)
    replay = bench.captured(lambda inputs=inputs: inputs + 1)
    del inputs
    gc.collect()
    replay()


def test_alone_each_row_has_the_gpu_s_time_of_both_passes(calls, monkeypatch):
    monkeypatch.setattr(bench, "SETTLING_SECONDS", 0.1)
    with OnTheCPU():
        entries = bench.alone((64, 64, 32), ["bf16", "fp4"], CPU)
    assert entries == [dict(row="bf16", ms=11.), dict(row="fp4", ms=11.)]


def test_a_row_that_does_not_fit_has_no_time_alone_and_the_next_one_has(monkeypatch):
    def linear(M, N, K, row, backend):
        if row == "bf16":
            out_of_memory()
        return [None, lambda: dict(ms=5.), None]

    monkeypatch.setattr(bench, "linear", linear)
    monkeypatch.setattr(bench, "clear_gpu", lambda: None)
    entries = bench.alone((64, 64, 32), ["bf16", "fp4"], CPU)
    assert entries == [dict(row="bf16"), dict(row="fp4", ms=5.)]
    assert cells(bench_report.alone_table(entries))[2:] == [
        ["bf16", "out of memory", "", ""], ["fp4", "5.000", "", ""]]


def test_the_first_half_of_the_time_alone_does_not_count(monkeypatch):
    now = iter(range(100))
    clock = types.SimpleNamespace(perf_counter=lambda: next(now))
    monkeypatch.setattr(bench, "time", clock)
    ms = iter([100., 100., 100., 7., 7., 9.])
    assert bench.settle(lambda: dict(ms=next(ms)), seconds=7) == dict(ms=7.)


@pytest.mark.parametrize("row", ["bf16", "fp4"])
def test_a_product_is_replayed_on_more_inputs_than_the_cache_holds(row, calls, monkeypatch):
    inputs = []
    gemm = fp4_ops.gemm

    def recorded_gemm(x, *args):
        inputs.append(x.codes.data_ptr())
        calls.append("product")
        return gemm(x, *args)

    monkeypatch.setattr(fp4_ops, "gemm", recorded_gemm)
    with OnTheCPU():
        [measure] = bench.product(64, 64, 32, row, CPU)
    times = measure()
    assert times == {"ms": 1. if row == "fp4" else 0.}
    # Two pairs are in the cache, and a pair is three times x.
    assert len(set(inputs)) == len(inputs) == (9 if row == "fp4" else 0)


def test_the_rate_of_a_kernel_is_its_bytes_over_its_time_and_its_share_that_over_the_copy_s(
        monkeypatch):
    calls = [("copy", 4, lambda: None), ("fold", 1.5, lambda: None)]
    monkeypatch.setattr(bench, "kernel_calls", lambda M, K, operand_format: calls)
    # The ms of a call in the round that does not count, and in the next two. The copy's are slower
    # in the second, and so are the other's.
    times = {calls[0][2]: [9., 0.5, 1.], calls[1][2]: [9., 0.25, 0.75]}

    def burst(f, repeats):
        of_f = iter(times[f])
        return lambda: {"ms": next(of_f)}

    monkeypatch.setattr(bench, "burst", burst)
    monkeypatch.setattr(bench, "rounds", functools.partial(bench.rounds, n=2))
    backend = types.SimpleNamespace(operand_format="packed")
    copy, fold = bench.kernels(backend, M=1000, K=2000)
    # 8 MB in 0.75 ms, and 3 MB in 0.5 ms
    assert (copy["name"], copy["ms"], fold["name"], fold["ms"]) == ("copy", 0.75, "fold", 0.5)
    assert copy["terabytes_per_s"] == pytest.approx(8e6 / 0.75e-3 / 1e12)
    assert fold["terabytes_per_s"] == pytest.approx(3e6 / 0.5e-3 / 1e12)
    # In the rounds it takes 1/2 and 3/4 of the copy's time for 3/8 of the bytes.
    assert (copy["of_copy"], fold["of_copy"]) == pytest.approx((1., 3 / 8 / (5 / 8)))


def n_bytes(values):
    if isinstance(values, torch.Tensor):
        return values.nbytes
    return sum(map(n_bytes, values))


def test_the_bytes_of_a_kernel_are_those_of_its_inputs_and_outputs():
    M, K = 128, 64
    read = {"copy": 2, "quantise forward": 2, "quantise forward, float32 weight": 4,
            "quantise backward, dy and dy.T": 2, "quantise backward, packed x.T": 17 / 32,
            "mask and un-rotate": 2 + 1 / 8}
    with OnTheCPU():
        calls = list(bench.kernel_calls(M, K, "packed"))
        counted = {}
        for name, bytes_per_value, f in calls:
            if name == "fold into FP8":             # It has no implementation on the CPU.
                assert bytes_per_value == 17 / 32 + 1
                continue
            name = last if name.startswith("the same") else name
            counted.setdefault(name, []).append(bytes_per_value)
            assert read[name] + n_bytes(f()) / (M * K) == bytes_per_value, name
            last = name
    assert set(counted) == set(read) and calls[0][0] == "copy"
    assert [len(of_name) for of_name in counted.values()] == [1, 1, 1, 2, 2, 1]


def test_rows_that_are_held_together_are_compiled_once_each(monkeypatch):
    graphs = []
    compile = torch.compile

    def count(module, inputs):
        graphs.append(module)
        return module.forward

    monkeypatch.setattr(torch, "compile",
                        lambda f, **options: compile(f, backend=count, **options))
    monkeypatch.setattr(bench, "inputs_beyond_cache", lambda n_bytes: 2)
    torch._dynamo.reset()
    with OnTheCPU():
        rows = [bench.layer_and_inputs(32, 64, 32, row, CPU) for row in bench.ROWS]
    for _ in range(2):
        for _, forward_and_backward, pairs in rows:
            forward_and_backward(*pairs[0])
    torch._dynamo.reset()
    assert len(graphs) == len(bench.ROWS)


# ---- training steps, in made-up processes

class FakeProcess:
    """a ProcessPoolExecutor of one process, which has a `Held` of its own"""
    def __init__(self, n, context, start, args):
        assert n == 1 and context.get_start_method() == "spawn"
        self.held = {"backend": None, "step": None}
        self.in_process(start, *args)

    def __enter__(self):
        return self

    def in_process(self, f, *args):
        outside = {name: getattr(bench.Held, name) for name in self.held}
        try:
            for name, value in self.held.items():
                setattr(bench.Held, name, value)
            return f(*args)
        finally:
            self.held = {name: getattr(bench.Held, name) for name in self.held}
            for name, value in outside.items():
                setattr(bench.Held, name, value)

    def submit(self, f, *args):
        future = concurrent.futures.Future()
        try:
            future.set_result(self.in_process(f, *args))
        except Exception as error:
            future.set_exception(error)
        return future


@pytest.fixture
def fake_steps(monkeypatch, gpu):
    """processes in which a step takes the host 1 ms, and then the GPU 10 ms for bf16, fewer for
    other rows, and 1 ms for each letter of the size; fits(those in memory, job) says who fits"""
    control = types.SimpleNamespace(log=[], fits=lambda held, job: True, held=[])
    log = control.log

    def training_step(size, row, batch, seq, backend):
        assert backend == "the backend of own" and (batch, seq) == bench.STEPS[size]
        job = (size, row)
        if not control.fits(control.held, job):
            out_of_memory()
        control.held.append(job)
        log.append(("prepared", job))
        slow = iter([True])             # The first step compiles.

        def step():
            log.append(job)
            gpu.launch(1, 1000 if next(slow, False) else 10 * RATIO[row] + len(size))

        return step

    class Process(FakeProcess):
        def __exit__(self, *error):
            control.held.clear()

    monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor", Process)
    monkeypatch.setattr(fp4, "build", lambda gemm: f"the backend of {gemm}")
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "")
    monkeypatch.setattr(bench.gc, "collect", lambda: None)      # It takes a third of a second.
    monkeypatch.setattr(bench, "training_step", training_step)
    monkeypatch.setattr(bench.time, "perf_counter", lambda: gpu.host / 1000)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: log.append("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2 ** 30)
    monkeypatch.setattr(energy, "counter", lambda device: None)
    monkeypatch.setattr(machine, "synchronize", lambda device: gpu.synchronize())
    return control


def test_the_steps_of_a_group_are_all_compiled_before_one_is_timed(fake_steps):
    jobs = [("tiny", "bf16"), ("30M", "bf16"), ("tiny", "fp4"), ("30M", "fp4")]
    times = bench.side_by_side(jobs, "own")
    last = max(i for i, what in enumerate(fake_steps.log) if what[0] == "prepared")
    timed = fake_steps.log[last + 1:]
    timed = timed[timed.index("reset") + 1:]
    # A step that counts comes after one that does not.
    assert len(timed) == 4 * 2 * (bench.STEP_ROUNDS + 1)
    # The rows of a size take turns: there, back, and from the second row on.
    half = len(timed) // 2
    assert {size for size, _ in timed[:half]} == {"tiny"} and set(timed[half:]) == {*jobs[1::2]}
    rows = [row for _, row in timed[:half:2]]
    assert rows[:8] == ["bf16", "fp4", "bf16", "fp4", "fp4", "bf16", "fp4", "bf16"]
    # The clock starts when the step before is done, and stops when this one is.
    assert times == {("tiny", "bf16"): pytest.approx(dict(ms=15., peak_gib=3., ratio=1.)),
                     ("tiny", "fp4"): pytest.approx(dict(ms=11., peak_gib=3., ratio=11 / 15)),
                     ("30M", "bf16"): pytest.approx(dict(ms=14., peak_gib=3., ratio=1.)),
                     ("30M", "fp4"): pytest.approx(dict(ms=10., peak_gib=3., ratio=10 / 14))}


def test_the_peak_of_memory_is_that_of_the_steps_after_compiling(fake_steps):
    bench.side_by_side([("tiny", "fp4")], "own")
    job = ("tiny", "fp4")
    assert fake_steps.log[:6] == [("prepared", job), job, job, job, "reset", job]


@pytest.fixture
def joules(fake_steps, gpu, monkeypatch):
    """a counter by which the fake GPU takes 500 W; it moves every 100 ms"""
    pause = types.SimpleNamespace(perf_counter=lambda: gpu.host / 1000,
                                  sleep=lambda seconds: gpu.launch(1000 * seconds, 0))
    monkeypatch.setattr(energy, "time", pause)
    monkeypatch.setattr(energy, "counter", lambda device: lambda: 50. * (gpu.host // 100))


def test_each_step_runs_alone_for_its_energy_after_all_have_taken_turns(fake_steps, joules):
    times = bench.side_by_side([("tiny", "bf16"), ("tiny", "fp4")], "own")
    for row, ms in (("bf16", 15), ("fp4", 11)):
        assert times["tiny", row]["alone_ms"] == pytest.approx(ms)
        assert times["tiny", row]["watts"] == pytest.approx(500)
        assert times["tiny", row]["joules"] == pytest.approx(0.5 * ms, rel=0.01)
    # Ten seconds of each, one after the other.
    n_steps = {"bf16": 667, "fp4": 910}
    alone = [job for job in fake_steps.log if job[0] == "tiny"][-sum(n_steps.values()):]
    assert alone == n_steps["bf16"] * [("tiny", "bf16")] + n_steps["fp4"] * [("tiny", "fp4")]


def test_a_step_whose_energy_is_known_does_not_run_alone_again(fake_steps, joules):
    jobs = [("tiny", "bf16"), ("tiny", "fp4")]
    times = bench.side_by_side(jobs, "own", known=[jobs[0]])
    assert "joules" not in times[jobs[0]] and times[jobs[1]]["joules"] == pytest.approx(5.5, 0.01)


def test_a_counter_that_stands_still_gives_a_step_no_joules(fake_steps, joules, monkeypatch):
    monkeypatch.setattr(energy, "counter", lambda device: lambda: 50.)
    times = bench.side_by_side([("tiny", "bf16")], "own")
    assert set(times["tiny", "bf16"]) == {"ms", "peak_gib", "ratio"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_a_step_of_more_work_takes_more_joules(monkeypatch):
    if energy.counter("cuda") is None:
        pytest.skip("no counter: pip install nvidia-ml-py")
    monkeypatch.setattr(bench, "ENERGY_SECONDS", 2)
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    found = []
    for n_products in (10, 20):
        monkeypatch.setattr(bench.Held, "step", lambda: [a @ a for _ in range(n_products)])
        found.append(bench.step_energy())
    one, two = found
    assert 1.7 < two["joules"] / one["joules"] < 2.3
    # What is not measured in the 2 seconds is the time until the counter moves.
    assert one["watts"] == pytest.approx(1000 * one["joules"] / one["alone_ms"], rel=0.1)


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_a_step_that_does_not_fit_is_tried_beside_bf16_and_then_alone(fake_steps, limit):
    fake_steps.fits = lambda held, job: len(held) < limit
    [*_, entries] = bench.steps(["800M"], "own")
    assert [(e["size"], e["row"]) for e in entries] == [("800M", row) for row in bench.ROWS]
    for e in entries:
        ms = 10 * RATIO[e["row"]] + 5
        assert e["ms"] == pytest.approx(ms) and e["tokens_per_s"] == pytest.approx(8192e3 / ms)
        # Rows that were never together with bf16 have no ratio, which the table marks.
        has_ratio = limit > 1 or e["row"] == "bf16"
        assert ("ratio" in e) == has_ratio
        assert not has_ratio or e["ratio"] == pytest.approx(ms / 15)


def test_a_step_that_does_not_fit_alone_has_no_times_and_is_not_tried_for_ever(fake_steps):
    tried = []

    def fits(held, job):
        tried.append((list(held), job))
        return job[1] != "fp8"

    fake_steps.fits = fits
    [*_, entries] = bench.steps(["800M"], "own")
    assert entries[1] == dict(size="800M", row="fp8") and all("ratio" in e for e in entries[2:])
    fp8, bf16 = ("800M", "fp8"), ("800M", "bf16")
    assert [held for held, job in tried if job == fp8] == [[bf16], [bf16], []]


def test_every_group_of_steps_has_bf16_for_its_ratios():
    for sizes, rows in bench.SIDE_BY_SIDE:
        assert rows[0] == "bf16" and set(sizes) <= set(bench.STEPS)
    jobs = {(size, row) for sizes, rows in bench.SIDE_BY_SIDE for size in sizes for row in rows}
    assert jobs == {(size, row) for size in bench.STEPS for row in bench.ROWS}


def test_bf16_is_reported_as_in_its_first_group_and_other_rows_relative_to_it_in_their_own(
        monkeypatch):
    groups = iter([{("800M", "bf16"): dict(ms=10., ratio=1.),
                    ("800M", "fp8"): dict(ms=8., ratio=0.8),
                    ("800M", "fp4"): dict(ms=9., ratio=0.9)},
                   {("800M", "bf16"): dict(ms=20., ratio=1.),
                    ("800M", "fp4-sr"): dict(ms=19., ratio=0.95)}])
    known = []

    def side_by_side(jobs, gemm, has_joules):
        known.append(list(has_joules))
        return next(groups)

    monkeypatch.setattr(bench, "side_by_side", side_by_side)
    after_each = list(bench.steps(["800M"], "auto"))
    assert [[e["row"] for e in entries] for entries in after_each] == [
        [], ["bf16", "fp8", "fp4"], bench.ROWS]
    assert [(e["ms"], e["ratio"]) for e in after_each[-1]] == [
        (10., 1.), (8., 0.8), (9., 0.9), (19., 0.95)]
    # Nor is its energy measured twice.
    assert known == [[], [("800M", row) for row in ("bf16", "fp8", "fp4")]]


@pytest.mark.parametrize("row", bench.ROWS)
def test_a_step_trains_and_quantises_the_weights_once(row, calls, monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", Preset(1, 32, 1, lr=1e-2))
    monkeypatch.setattr(bench, "VOCABULARY", 64)
    quantised = []
    models = []
    quantize_weight = fp4.Linear.quantize_weight

    def recorded_compile(model, fullgraph):
        models.append(model)
        return model

    def recorded_quantize(layer):
        quantised.append(layer)
        quantize_weight(layer)

    monkeypatch.setattr(torch, "compile", recorded_compile)
    monkeypatch.setattr(fp4.Linear, "quantize_weight", recorded_quantize)
    with OnTheCPU():
        step = bench.training_step("tiny", row, 2, 32, CPU)
        weight = models[0].blocks[0].mlp.proj.weight
        before = weight.clone()
        start = len(quantised)
        step()
    assert not torch.equal(before, weight)
    assert len(quantised) - start == (4 if row in ("fp4", "fp4-sr") else 0)


def test_the_parts_of_a_linear_have_their_kernels_times_and_what_they_take_at_least(monkeypatch):
    kernels = {"void (anonymous namespace)::forward_kernel<bf16>(...)": 0.5,
               "void (anonymous namespace)::backward_kernel<FloatSource<bf16>>(...)": 0.75,
               "void (anonymous namespace)::backward_kernel<PackedSource>(...)": 1.,
               "void (anonymous namespace)::gemm_kernel<1>(...)": 2.,
               "void (anonymous namespace)::gemm_kernel<2>(...)": 4., "fill_": 0.125}
    monkeypatch.setattr(bench, "layer_and_inputs", lambda *args: (None, "f", "pairs"))
    monkeypatch.setattr(bench, "kernel_times", lambda f, pairs: kernels)
    M, N, K = 1000, 200, 400
    parts = bench.where(M, N, K, 1e12, 1e9, "backend")
    ms = [("quantise x", 0.5), ("fold w into FP8", 0.), ("quantise dy and dy.T", 0.75),
          ("requantise x.T and w.T", 1.), ("three products, two un-rotations", 6.),
          ("everything else", 0.125)]
    assert [(part["name"], part["ms"]) for part in parts] == ms
    # A byte takes 1e-6 ms. A packed value has 17/32 bytes, and one in FP8 with a scale for 128 of
    # them 33/32. x: bf16 is read; packed, its mask and FP8 are written. w: packed to FP8. dy: bf16
    # to two in FP8. x.T and w.T: packed to FP8. The products write y and dx in bf16 and dw in
    # float32; what they read may be in the cache.
    x, y, w = M * K * 1e-6, M * N * 1e-6, N * K * 1e-6
    expected = [x * (2 + 17 / 32 + 1 / 8 + 33 / 32), w * (17 / 32 + 1), y * (2 + 33 / 16),
                (x + w) * (17 / 32 + 1), 2 * (x + y) + 4 * w, None]
    assert [part["least_ms"] for part in parts] == [
        None if least is None else pytest.approx(least) for least in expected]
    # With a slow product the operations are the limit: three products of 2 M N K.
    [*_, slow, _] = bench.where(M, N, K, 1e9, 1e9, "backend")
    assert slow["least_ms"] == pytest.approx(6 * M * N * K / 1e9 * 1000)


def test_the_time_of_a_kernel_is_that_in_one_call(monkeypatch):
    calls = []

    class Profile:
        def __init__(self, activities):
            pass

        def __enter__(self):
            self.before = len(calls)
            return self

        def __exit__(self, *error):
            self.n_calls = len(calls) - self.before

        def key_averages(self):
            total = 500 * self.n_calls          # microseconds
            return [types.SimpleNamespace(key="gemm", self_device_time_total=total)]

    monkeypatch.setattr(torch.profiler, "profile", Profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    times = bench.kernel_times(lambda *args: calls.append(args), [(1, 2), (3, 4), (5, 6)])
    assert times == {"gemm": 0.5}
    assert calls[:6] == 2 * [(1, 2), (3, 4), (5, 6)]


def test_every_named_part_of_a_linear_is_a_kernel_that_exists():
    sources = glob.glob(os.path.join(ROOT, "fp4", "kernels", "*.cu*"))
    text = "".join(open(path).read() for path in sources)
    for name in bench.PARTS:
        kernel, _, argument = name.partition("<")
        assert re.search(r"__global__[^;{]*?\b" + kernel, text), kernel
        assert not argument or f"struct {argument}" in text, argument


# ---- make compile, make sanitize

@pytest.fixture
def compile(tmp_path):
    """make compile in a folder with these .cu files and an nvcc that writes down its arguments"""
    def run(*files, fails="nothing", nvcc=True):
        for folder in ("fp4/kernels", "tools", "bin"):
            (tmp_path / folder).mkdir(parents=True)
        for name in ("Makefile", "tools/compile.py", "fp4/__init__.py", "fp4/build.py",
                     "fp4/axes.py", "fp4/check.py", "fp4/recipes.py", "fp4/toolchain.py"):
            shutil.copy(os.path.join(ROOT, name), tmp_path / name)
        toolchain = tmp_path / "fp4" / "toolchain.py"
        toolchain.write_text(toolchain.read_text().replace("/usr/local/cuda", "/nonexistent"))
        for file in files:
            (tmp_path / "fp4" / "kernels" / file).touch()
        if nvcc:
            fake = tmp_path / "bin" / "nvcc"
            fake.write_text(f'#!/bin/sh\necho "$@" >> log\ncase "$*" in *{fails}*) exit 1;; esac\n')
            fake.chmod(0o755)
        for tool in ("make", "sh", "date", "nproc", "grep"):
            os.symlink(shutil.which(tool), tmp_path / "bin" / tool)
        os.symlink(sys._base_executable, tmp_path / "bin" / "python3")
        done = subprocess.run(["make", "compile"], cwd=tmp_path, capture_output=True, text=True,
                              env={"PATH": str(tmp_path / "bin")})
        log = (tmp_path / "log").read_text() if (tmp_path / "log").exists() else ""
        pattern = r"arch=compute_(\w+),code=sm_(\w+) -c (\S+)"
        jobs = {(os.path.basename(file), compute, code)
                for compute, code, file in re.findall(pattern, log)}
        return done, jobs, log
    return run


def test_a_cu_named_after_a_machine_is_compiled_for_it_and_every_other_for_all(compile):
    done, jobs, log = compile("quantize.cu", "gemm_sm90.cu", "gemm_sm100.cu", "gemm_sm120.cu")
    targets = {"quantize.cu": ["75", "80", "89", "90", "90a", "100", "100a", "120", "120a"],
               "gemm_sm90.cu": ["90a"],
               "gemm_sm100.cu": ["100a", "103a"], "gemm_sm120.cu": ["120a", "121a"]}
    assert done.returncode == 0, done.stderr
    assert jobs == {(file, gpu, gpu) for file, gpus in targets.items() for gpu in gpus}
    assert all("-Werror all-warnings" in line for line in log.splitlines())
    assert done.stdout.count(" s\n") == 14


def test_the_kernels_of_a_gemm_spec_are_compiled_for_several(compile):
    done, jobs, log = compile("quantize_columns.cu")
    assert done.returncode == 0, done.stderr
    assert len(jobs) == 9 and done.stdout.count(" s\n") == 11
    for name, gpus in (("nvfp4_absmax_128_before_eden", 9),
                       ("nvfp4_four_six_0_none_nearest_square", 1),
                       ("mxfp4_absmax34_32_before_stochastic", 1)):
        assert log.count(f"-DCOLUMN_NAME={name} ") == gpus


def test_one_failed_compilation_fails_make_compile(compile):
    assert compile("quantize.cu", "gemm_sm90.cu", fails="sm_120a")[0].returncode == 2


def test_without_nvcc_make_compile_says_so(compile):
    done = compile("quantize.cu", nvcc=False)[0]
    assert done.returncode == 2 and "compile: there is no nvcc: install" in done.stderr


def test_the_sanitizer_sees_every_op():
    from fp4 import emulate                 # Its ops are registered when it is imported.
    names = torch._C._dispatch_get_all_op_names()
    ops = {name.split("::")[1] for name in names if name.startswith("fp4::")}
    calls = sanitize.calls(33, 160, torch.float32, "fp8")
    assert emulate and {name for name, _ in calls} == ops - sanitize.NO_KERNEL


def test_the_sanitizer_s_calls_of_quantisers_are_calls_that_their_ops_take():
    for M, K in sanitize.SHAPES:
        for op, arguments in sanitize.column_calls(M, K, torch.bfloat16):
            op(*arguments)


@pytest.mark.parametrize("operand_format", ["fp8", "mxf4"])
def test_the_sanitizer_makes_operands_of_the_sizes_that_the_quantisers_make(operand_format):
    for M, K in sanitize.SHAPES:
        for is_right in (False, True):
            expected = fp4_ops.operand_shapes(torch.empty(0), M, K, operand_format, is_right)
            operand = sanitize.operand(M, K, operand_format, is_right)
            assert ([(t.shape, t.dtype) for t in operand]
                    == [(t.shape, t.dtype) for t in expected])


@pytest.mark.parametrize("M, K", sanitize.SHAPES)
def test_the_sanitizer_s_calls_are_calls_that_the_ops_take(M, K):
    for name, args in sanitize.calls(M, K, torch.bfloat16, "packed"):
        needs_gpu = name == "packed_to_fp8"
        if name in ("quantize_backward", "requantize_transposed"):
            needs_gpu = args[-1] != fp4_ops.OPERAND_FORMATS.index("packed")
        if not needs_gpu:
            getattr(torch.ops.fp4, name)(*args)


def test_every_kernel_that_is_built_is_where_the_sanitizer_looks_in_an_unnamed_namespace():
    from fp4 import backend, build
    sources = {*build.__globals__["CUDA_SOURCES"], *build.__globals__["COLUMN_CUDA_SOURCES"]}
    for capability in ((7, 5), (9, 0), (10, 0), (12, 0)):
        gemm = "auto" if capability == (7, 5) else "own"
        sources |= set(backend.select_backend(capability, gemm).sources)
    for name in sources:
        with open(os.path.join(ROOT, "fp4", "kernels", name)) as file:
            text = file.read()
        inside = text[text.index("\nnamespace {\n"):text.index("\n}  // namespace\n")]
        assert text.count("__global__") == inside.count("__global__") > 0, name
