"""The tables of `make bench` from made-up times, its measurements without their clock on the CPU,
and make's GPU targets."""
import glob
import json
import os
import re
import shutil
import subprocess
import sys
import types

import pytest
import torch
from torch.overrides import TorchFunctionMode

import fp4
from fp4 import ops as fp4_ops
from fp4.backend import Backend, select_backend
from model import PRESETS, Preset
from tools import bench, bench_report, machine, markdown, sanitize

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")
CPU = select_backend(None)
RATIO = {"bf16": 1., "fp8": 0.8, "fp4": 0.6, "fp4-sr": 0.7}
TIMES = {"ms", "forward_ms", "backward_ms", "called_ms", "tokens_per_s", "peak_gib"}


def entry(M, N, K, row, ms):
    return {"tokens": M, "out": N, "in": K, "row": row, "forward_ms": ms / 4,
            "backward_ms": 3 * ms / 4, "ms": ms, "called_ms": ms + 1}


def without_times(entry):
    return {key: value for key, value in entry.items() if key not in TIMES}


def widths(*ratios):
    """square layers, fp4 at these ratios to bf16; None: out of memory"""
    entries = []
    for shape, ratio in zip(bench.WIDTHS, ratios, strict=True):
        for row in bench.ROWS:
            r = 1. if row == "bf16" else ratio
            entries.append(entry(*shape, row, r) if r else without_times(entry(*shape, row, 1)))
    return entries


@pytest.fixture
def results():
    shapes = dict.fromkeys(bench.SHAPES + bench.WIDTHS)
    return dict(
        gpu="NVIDIA H200", torch="2.11.0", date="2026-11-23",
        kernels=[dict(name="copy", ms=0.1, terabytes_per_s=4., of_copy=1.),
                 dict(name="fold", ms=0.2, terabytes_per_s=3., of_copy=0.75)],
        products=[{"tokens": 16384, "out": 4096, "in": 4096, "row": row, "ms": RATIO[row]}
                  for row in ("bf16", "fp8", "fp4")],
        where=[dict(name="quantise x", ms=0.125, least_ms=0.1),
               dict(name="everything else", ms=0.01, least_ms=None)],
        linears=[entry(*s, row, 2 * RATIO[row]) for s in shapes for row in bench.ROWS],
        steps=[dict(size=size, row=row, ms=100 * RATIO[row], tokens_per_s=8192 / RATIO[row],
                    peak_gib=20 * RATIO[row])
               for size in bench.STEPS for row in bench.ROWS])


def cells(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]


# ---- tables

def test_a_table_is_markdown_with_aligned_columns():
    text = markdown.table(["what", "ms"], [["copy", "0.1"], ["a long name", "12.25"]])
    assert text == ("| what        |    ms |\n| ----------- | ----: |\n"
                    "| copy        |   0.1 |\n| a long name | 12.25 |")


def test_each_linear_has_its_times_and_their_ratios_to_bf16(results):
    text = bench_report.linear_table(results["linears"][:len(bench.ROWS)])
    lines = {tuple(line[:2]): line[2:] for line in cells(text)}
    bf16 = lines["16384, 4096, 4096", "bf16"]
    assert bf16 == ["0.500", "1.500", "2.000", "1.00", "3.000", "1.00"]
    assert lines["", "fp4"] == ["0.300", "0.900", "1.200", "0.60", "2.200", "0.73"]


def test_a_step_has_its_ratio_of_time_and_of_memory_to_bf16(results):
    text = bench_report.step_table(results["steps"][-len(bench.ROWS):])
    lines = {tuple(line[:2]): line[2:] for line in cells(text)}
    assert lines["800M, 16 x 512", "bf16"] == ["100.0", "1.00", "8,192", "20.00", "1.00"]
    assert lines["", "fp4"] == ["60.0", "0.60", "13,653", "12.00", "0.60"]


@pytest.mark.parametrize("lost", ["bf16", "fp4"])
def test_what_does_not_fit_into_memory_stays_in_every_table(results, lost):
    for part in ("linears", "steps", "products"):
        results[part] = [without_times(e) if e["row"] == lost else e for e in results[part]]
    for name in ("linear", "step", "product"):
        text = getattr(bench_report, name + "_table")(results[name + "s"])
        head, _, *lines = cells(text)
        mine = [line for line in lines if line[1] == lost]
        assert mine and all(line[2] == "out of memory" for line in mine)
        ratios = [i for i, title in enumerate(head) if title == "/ bf16"]
        without_ratio = lines if lost == "bf16" else mine
        assert all(line[i] == "" for line in without_ratio for i in ratios)
    assert "out of memory" in bench_report.width_table(results["linears"])


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
def test_the_width_from_which_fp4_pays_is_the_smallest_from_which_it_stays_faster(ratios, width):
    assert bench_report.faster_from(widths(*ratios), "fp4") == width
    sentence = bench_report.break_even(widths(*ratios), "fp4")
    expected = f"width of {width} on" if width else "not faster than bf16 at 8192"
    assert expected in sentence


def test_where_only_bf16_runs_out_of_memory_fp4_is_faster():
    entries = []
    for e in widths(3, 2, 1.5, .9, .9):
        is_lost = e["row"] == "bf16" and e["out"] == 8192
        entries.append(without_times(e) if is_lost else e)
    assert bench_report.faster_from(entries, "fp4") == 4096


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
                  bench_report.kernel_table(results["kernels"]),
                  bench_report.width_table(results["linears"]),
                  bench_report.where_table(results["where"])):
        assert table in text
    saved = json.loads(saved_path.read_text())
    for part in ("gpu", "kernels", "linears", "where", "steps"):
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
    for name in ("all_compiled", "clock", "backend"):
        monkeypatch.setattr(bench.Shared, name, None)
    bench.start_process("barrier", "lock", 1, "bf16")
    assert bench.Shared.backend == "the backend of bf16"
    seen = []

    def training_step(*arguments):
        seen.append(arguments[-1])
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(bench, "training_step", training_step)
    monkeypatch.setattr(bench.Shared, "all_compiled", types.SimpleNamespace(wait=lambda: None))
    assert bench.measure_if_it_fits(bench.timed_step, "tiny", "fp4") == {}
    assert seen == ["the backend of bf16"]


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
    """nothing is compiled or captured, and time is what was called: 1 ms a forward, 10 ms a
    backward"""
    calls = []
    forward = fp4.Linear.forward
    backward = torch.autograd.backward

    def milliseconds(f):
        start = len(calls)
        f()
        return sum(10 if call == "backward" else 1 for call in calls[start:])

    def recorded_forward(self, x):
        calls.append(x.data_ptr())
        return forward(self, x)

    def recorded_backward(*args, **kwargs):
        calls.append("backward")
        return backward(*args, **kwargs)

    # The cache is as large as two pairs of x and dy of the test below.
    device = types.SimpleNamespace(L2_cache_size=2 * 64 * (64 + 32))
    monkeypatch.setattr(bench, "gpu_milliseconds", milliseconds)
    monkeypatch.setattr(bench, "captured", lambda f: f)
    monkeypatch.setattr(torch, "compile", lambda f, fullgraph, dynamic=None: f)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: device)
    monkeypatch.setattr(fp4.Linear, "forward", recorded_forward)
    monkeypatch.setattr(torch.autograd, "backward", recorded_backward)
    return calls


@pytest.mark.parametrize("row", bench.ROWS)
def test_a_linear_is_timed_both_ways_on_more_inputs_than_the_cache_holds(row, calls):
    with OnTheCPU():
        times = bench.linear(64, 64, 32, row, CPU)
    assert times == dict(forward_ms=1., backward_ms=10., ms=11., called_ms=11)
    # Three times the cache are x and dy of three pairs.
    assert len(set(calls) - {"backward"}) == 3


def test_a_product_is_timed(calls):
    for row in ("bf16", "fp4"):
        with OnTheCPU():
            assert bench.product(64, 64, 32, row, CPU) == dict(ms=0)


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


def test_memory_running_out_is_a_result_and_other_errors_are_errors():
    def out_of_memory():
        raise torch.OutOfMemoryError("full")
    assert bench.measure_if_it_fits(out_of_memory) == {}
    assert bench.measure_if_it_fits(lambda: dict(ms=1)) == dict(ms=1)
    with pytest.raises(ZeroDivisionError):
        bench.measure_if_it_fits(lambda: 1 / 0)


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
                     "fp4/check.py", "fp4/recipes.py", "fp4/toolchain.py"):
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
    sources = set(build.__globals__["CUDA_SOURCES"])
    for capability in ((7, 5), (9, 0), (10, 0), (12, 0)):
        gemm = "auto" if capability == (7, 5) else "own"
        sources |= set(backend.select_backend(capability, gemm).sources)
    for name in sources:
        with open(os.path.join(ROOT, "fp4", "kernels", name)) as file:
            text = file.read()
        inside = text[text.index("\nnamespace {\n"):text.index("\n}  // namespace\n")]
        assert text.count("__global__") == inside.count("__global__") > 0, name
