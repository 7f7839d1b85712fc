"""The table of all rows, in made-up processes on a made-up GPU; and one real process on the CPU."""
import concurrent.futures
import json
import multiprocessing
import os
import re
import time
import types

import pytest
import torch

import fp4
from data.files import UserError
from fp4.axes import variant_name
from fp4.recipes import RECIPES
from test_bench import FakeProcess, cells, gpu, out_of_memory
from tools import bench, bench_rows, markdown

__all__ = ["gpu"]                       # a fixture
GIB = 2 ** 30


@pytest.fixture
def control(monkeypatch, gpu):
    """Processes of rows. bf16 takes 10 ms a step and others 20; the first step takes as many
    seconds as a row's name has letters. What is to go wrong is set in it."""
    control = types.SimpleNamespace(log=[], held=[], killed=[], cores=[], caches=[], late=(),
                                    full={}, broken={})

    def training_step(size, row, batch, seq, backend):
        assert (size, batch, seq, backend) == ("30M", 64, 512, "the backend of auto")
        if control.full.get(row, 99) <= len(control.held):
            out_of_memory()
        control.held.append(row)
        number = iter(range(10_000))

        def step():
            n = next(number)
            if n == control.broken.get(row):
                raise RuntimeError(f"step {n} of {row}\nis broken")
            control.log.append((row, "step"))
            gpu.launch(1, 1000 * len(row) - 1 if n == 0 else 9 + 10 * (row != "bf16"))

        return step

    class Pool(FakeProcess):
        """The executor of one process; its row is what it is first asked for."""
        row = None

        def __init__(self, *args):
            control.caches.append(args[-1][1])
            control.cores.append(args[-1][0])
            super().__init__(*args)

        def submit(self, f, *args):
            if f is os.getpid:
                return super().submit(lambda: ("the process of", self))
            self.row = self.row or args[-1]
            if self.row in control.late:
                return concurrent.futures.Future()
            return super().submit(f, *args)

        def __exit__(self, *error):
            control.held.clear()

    monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(bench, "training_step", training_step)
    monkeypatch.setattr(bench.gc, "collect", lambda: None)      # It takes a third of a second.
    monkeypatch.setattr(bench.time, "perf_counter", lambda: gpu.host / 1000)
    monkeypatch.setattr(bench_rows, "PATIENCE", 0.05)
    monkeypatch.setattr(fp4, "build", lambda gemm: f"the backend of {gemm}")
    monkeypatch.setattr(os, "kill", lambda process, number: control.killed.append(process[1].row))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: control.log.append("emptied"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: control.log.append("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * GIB)
    for name in ("TORCHINDUCTOR_COMPILE_THREADS", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "of an earlier run")
    return control


ROW = dict(first_s=3., ms=20., ratio=2., peak_gib=3.)
BF16 = dict(first_s=4., ms=10., ratio=1., peak_gib=3.)


# ---- a group

def test_a_row_has_its_time_beside_bf16_its_memory_and_the_seconds_until_its_first_step(control):
    entries = bench_rows.measure_group(["bf16", "fp4", "fp8"])
    assert entries == {"bf16": pytest.approx(BF16), "fp4": pytest.approx(ROW),
                       "fp8": pytest.approx(ROW)}
    assert control.held == [] and control.killed == []


def test_the_rows_share_the_cores_and_each_compiles_with_an_empty_cache(control, monkeypatch):
    folders = []
    start = bench_rows.start_process

    def recorded_start(cores, cache):
        assert os.listdir(cache) == [os.path.basename(folder) for folder in folders]
        start(cores, cache)
        folders.append(os.environ["TORCHINDUCTOR_CACHE_DIR"])
        assert os.listdir(folders[-1]) == [] and os.path.dirname(folders[-1]) == cache
        assert os.environ["TRITON_CACHE_DIR"] == os.path.join(folders[-1], "triton")
        assert os.environ["TORCHINDUCTOR_COMPILE_THREADS"] == "8"

    monkeypatch.setattr(os, "cpu_count", lambda: 17)
    monkeypatch.setattr(bench_rows, "start_process", recorded_start)
    bench_rows.measure_group(["bf16", "fp4"])
    assert len(set(folders)) == 2 and control.cores == [8, 8]
    assert not os.path.exists(control.caches[0])        # Nothing is left.


def test_a_row_that_waits_leaves_its_activations_memory_to_others(control):
    bench_rows.measure_group(["bf16", "fp4"])
    step = ("fp4", "step")
    # Three steps, of which the first compiles. Then of each turn the first takes the memory again,
    # and the second wakes the process up; the third is timed.
    of_fp4 = [what for what in control.log if what != ("bf16", "step")]
    start = of_fp4.index(step)
    assert of_fp4[start:start + 5] == [step, step, step, "reset", "emptied"]
    turns = "".join("e" if what == "emptied" else "s" for what in of_fp4[start + 5:])
    # bf16 empties its cache after each of its turns, too.
    assert turns.count("sss") == bench_rows.TURNS + 1 == turns.count("s") / 3
    assert re.fullmatch("(e*sss?e)+e*", turns)


def test_a_row_that_fails_is_a_line_and_the_others_have_their_times(control):
    control.broken["fp8"] = 0
    entries = bench_rows.measure_group(["bf16", "fp8", "fp4"])
    assert entries == {"bf16": pytest.approx(BF16), "fp4": pytest.approx(ROW),
                       "fp8": {"failed": "RuntimeError: step 0 of fp8"}}


def test_a_row_that_fails_in_its_turn_is_left_out_and_the_others_begin_again(control):
    control.broken["fp8"] = 9           # in its third turn
    entries = bench_rows.measure_group(["bf16", "fp8", "fp4"])
    assert entries == {"bf16": pytest.approx(BF16), "fp4": pytest.approx(ROW),
                       "fp8": {"first_s": 3., "failed": "RuntimeError: step 9 of fp8"}}


def test_a_row_that_takes_too_long_is_killed_and_a_process_that_has_died_is_one_that_failed(
        control):
    control.late = ["fp8"]
    entries = bench_rows.measure_group(["bf16", "fp8", "fp4"])
    assert entries["fp8"] == {"failed": "more than 0.05 s"} and control.killed == ["fp8"]
    assert entries["fp4"] == pytest.approx(ROW)


def test_rows_wait_together_and_not_one_after_the_other(control, monkeypatch):
    now = iter([100., 100., 100.03, 100.06])
    waited = []

    def answer(self, ask, seconds):
        waited.append(seconds)
        return {}

    monkeypatch.setattr(bench_rows, "time", types.SimpleNamespace(monotonic=lambda: next(now)))
    monkeypatch.setattr(bench_rows.Process, "answer", answer)
    bench_rows.measure_group(["bf16", "fp8", "fp4"])
    assert waited == pytest.approx([0.05, 0.02, -0.01])


def test_without_bf16_there_are_times_without_a_ratio(control):
    control.broken["bf16"] = 0
    entries = bench_rows.measure_group(["bf16", "fp4"])
    assert entries["fp4"] == pytest.approx({k: v for k, v in ROW.items() if k != "ratio"})


@pytest.mark.skipif(torch.cuda.is_available(), reason="the row would not fail")
def test_a_real_process_says_why_it_fails_and_is_killed_when_it_takes_too_long():
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
        process = bench_rows.Process("fp4", pool)
        assert re.match(r"\w+Error: .", process.first_answer(time.monotonic() + 100)["failed"])
        with pytest.raises(bench_rows.RowFailed, match="'fp4', \"TypeError: 'NoneType' object is"):
            process.take_turn()         # It has no step.
        start = time.monotonic()
        late = process.answer(lambda: pool.submit(time.sleep, 20), 0.1)
        assert late == {"failed": "more than 120 s"} and time.monotonic() - start < 10
        with pytest.raises(bench_rows.RowFailed, match="its process has died"):
            process.take_turn()


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_a_group_is_compiled_and_takes_turns(monkeypatch):
    monkeypatch.setattr(bench_rows, "TURNS", 2)
    entries = bench_rows.measure_group(["bf16", "fp4", "fp4 --scale mse"])
    for entry in entries.values():
        assert set(entry) == {"first_s", "ms", "ratio", "peak_gib"}, entries
        assert 0.5 < entry["ratio"] < 10 and 1 < entry["peak_gib"] < 40 and entry["first_s"] > 1


# ---- all groups

def test_every_row_and_variant_is_in_one_group_and_bf16_in_all():
    names = [*RECIPES, *bench_rows.VARIANTS]
    for memory, size in ((79.6, 8), (24, 2), (5, 2), (180, 8)):
        found = list(bench_rows.groups(names, memory))
        assert all(group[0] == "bf16" and 2 <= len(group) <= size for group in found)
        assert len(found[0]) == size
        others = [row for group in found for row in group[1:]]
        assert ["bf16", *others] == names


def test_the_variants_are_those_of_the_command_line():
    assert bench.recipe_of("fp4 --scale mse") == fp4.recipe("fp4", scale="mse")
    assert bench.recipe_of("fp4 --rotation 128 --scale mse") == fp4.recipe(
        "fp4", rotation="128", scale="mse")
    assert all(bench.recipe_of(row) == RECIPES[row] for row in RECIPES)
    recipes = {bench.recipe_of(row) for row in bench_rows.VARIANTS}
    assert len(recipes) == len(bench_rows.VARIANTS) and not recipes & set(RECIPES.values())
    assert variant_name("fp4", dict(scale="mse"))       # They are axes of the table.
    with pytest.raises(ValueError):
        bench.recipe_of("fp4 --scale none-such")


def test_bf16_is_reported_as_in_its_first_group_and_a_row_that_was_crowded_out_is_tried_again(
        control, monkeypatch):
    monkeypatch.setattr(bench_rows, "MOST_AT_A_TIME", 3)
    control.full = {"fp8": 2, "mxfp8": 0}
    *_, entries = bench_rows.measure(["bf16", "fp4", "fp8", "mxfp8"], memory=3 * 9)
    assert list(entries) == ["bf16", "fp4", "fp8", "mxfp8"]
    assert entries["fp8"] == pytest.approx(ROW) and entries["mxfp8"] == {}
    after_each = list(bench_rows.measure(["bf16", "fp4", "fp8", "mxfp8"], memory=3 * 9))
    assert len(after_each) == 2


# ---- the table and the README

@pytest.fixture
def results():
    entries = {"bf16": dict(first_s=8.2, ms=28.94, ratio=1., peak_gib=7.594),
               "fp4": dict(first_s=31., ms=32.1, ratio=1.114, peak_gib=6.35),
               "fp8": dict(first_s=31., ms=30., peak_gib=6.35),
               "mxfp8": {}, "nvfp4": {"failed": "more than 120 s"},
               "fp4 --scale mse": {"first_s": 9.6, "failed": "RuntimeError: broken"}}
    return dict(gpu="NVIDIA H100", torch="2.13.0", date="2026-11-27", entries=entries)


def test_a_row_has_a_line_whatever_becomes_of_it(results):
    head, _, *lines = cells(bench_rows.row_table(results["entries"]))
    assert head == ["row", "ms", "/ bf16", "peak GiB", "first step, s"]
    assert lines == [["`bf16`", "28.9", "1.00", "7.59", "8"],
                     ["`fp4`", "32.1", "1.11", "6.35", "31"],
                     ["`fp8`", "30.0", "~1.04", "6.35", "31"],
                     ["`mxfp8`", "out of memory", "", "", ""],
                     ["`nvfp4`", "failed", "", "", ""],
                     ["`fp4 --scale mse`", "failed", "", "", "10"]]


def test_below_the_table_stands_why_a_row_failed(results):
    text = bench_rows.report(results)
    assert text.startswith("`python -m tools.bench_rows` on one NVIDIA H100 (torch 2.13.0, ")
    assert text.endswith("- nvfp4: more than 120 s\n- fp4 --scale mse: RuntimeError: broken")
    assert max(len(line) for line in text.splitlines() if not line.startswith("|")) <= 100
    for entry in results["entries"].values():
        entry.pop("failed", None)
    assert bench_rows.report(results).endswith("|")


@pytest.fixture
def main(control, monkeypatch, tmp_path):
    """main(*argv) on a GPU of 80 GB -> the README afterwards"""
    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- rows -->\nold\n<!-- /rows -->\nb\n")
    device = types.SimpleNamespace(total_memory=80e9)
    monkeypatch.setattr(bench, "README", str(readme))
    monkeypatch.setattr(bench, "load_kernels", lambda gemm: None)
    monkeypatch.setattr(bench_rows, "RESULTS", str(tmp_path / "build" / "rows.json"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: device)

    def run(*argv):
        bench_rows.main(argv)
        return readme.read_text()
    return run


def test_a_full_run_has_every_row_and_rewrites_its_part_of_the_readme(main, tmp_path, capsys):
    text = main("--write")
    assert text.startswith("a\n<!-- rows -->\n`python -m")
    assert text.endswith("\n<!-- /rows -->\nb\n")
    for row in [*RECIPES, *bench_rows.VARIANTS]:
        assert text.count(f"| `{row}` ") == 1, row
    saved = json.loads((tmp_path / "build" / "rows.json").read_text())
    assert list(saved["entries"]) == [*RECIPES, *bench_rows.VARIANTS]
    assert "`fp4 --rounding eden`" in capsys.readouterr().out


def test_without_write_the_table_is_printed(main, capsys):
    assert main() == "a\n<!-- rows -->\nold\n<!-- /rows -->\nb\n"
    assert "`fp4 --rounding eden`" in capsys.readouterr().out


def test_without_a_gpu_or_markers_a_sentence_says_so(main, monkeypatch, tmp_path):
    (tmp_path / "README.md").write_text("no markers")
    with pytest.raises(UserError, match="^README.md is as it was, because it needs one <!-- rows"):
        main("--write")
    assert (tmp_path / "README.md").read_text() == "no markers"

    def load_kernels(gemm):
        raise ValueError("torch sees no GPU here")

    monkeypatch.setattr(bench, "load_kernels", load_kernels)
    with pytest.raises(UserError, match="^torch sees no GPU here$"):
        main()


def test_the_readme_of_the_method_has_the_markers():
    with open(bench.README) as file:
        assert "new" in markdown.replaced(file.read(), "new", "rows")
