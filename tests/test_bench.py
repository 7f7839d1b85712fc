"""The tables of fp4/bench.py from made-up times, its measurements without their clock on the CPU, and make's GPU targets."""
import glob, json, os, re, shutil, subprocess, sys, types
import pytest, torch
from torch.overrides import TorchFunctionMode
import fp4
from fp4 import bench
import sanitize

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")
RATIO = {"bf16": 1., "fp8": 0.8, "fp4": 0.6, "fp4-sr": 0.7}


def entry(M, N, K, row, ms):
    return {"tokens": M, "out": N, "in": K, "row": row, "forward_ms": ms / 4, "backward_ms": 3 * ms / 4, "ms": ms, "called_ms": ms + 1}

def widths(*ratios):
    """square layers, fp4 at these ratios to bf16; None: out of memory"""
    found = []
    for shape, ratio in zip(bench.WIDTHS, ratios, strict=True):
        for row in bench.ROWS:
            r = 1. if row == "bf16" else ratio
            found.append(entry(*shape, row, r) if r else dict(zip(("tokens", "out", "in", "row"), (*shape, row))))
    return found

@pytest.fixture
def found():
    shapes = dict.fromkeys(bench.SHAPES + bench.WIDTHS)
    return dict(gpu="NVIDIA H200", torch="2.11.0", date="2026-11-23",
        kernels=[dict(name="copy", ms=0.1, terabytes_per_s=4., of_copy=1.), dict(name="fold", ms=0.2, terabytes_per_s=3., of_copy=0.75)],
        products=[{"tokens": 16384, "out": 4096, "in": 4096, "row": row, "ms": RATIO[row]} for row in ("bf16", "fp8", "fp4")],
        where=[dict(name="quantise x", ms=0.125, least_ms=0.1), dict(name="everything else", ms=0.01, least_ms=None)],
        linears=[entry(*s, row, 2 * RATIO[row]) for s in shapes for row in bench.ROWS],
        steps=[dict(size=size, row=row, ms=100 * RATIO[row], tokens_per_s=8192 / RATIO[row], peak_gib=20 * RATIO[row])
               for size in bench.STEPS for row in bench.ROWS])


def cells(text): return [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines()]


# ---- tables

def test_a_table_is_markdown_with_aligned_columns():
    text = bench.table(["what", "ms"], [["copy", "0.1"], ["a long name", "12.25"]])
    assert text == "| what        |    ms |\n| ----------- | ----: |\n| copy        |   0.1 |\n| a long name | 12.25 |"


def test_each_linear_has_its_times_and_their_ratios_to_bf16(found):
    lines = {tuple(line[:2]): line[2:] for line in cells(bench.linear_table(found["linears"][:len(bench.ROWS)]))}
    assert lines["16384, 4096, 4096", "bf16"] == ["0.500", "1.500", "2.000", "1.00", "3.000", "1.00"]
    assert lines["", "fp4"] == ["0.300", "0.900", "1.200", "0.60", "2.200", "0.73"]


def test_a_step_has_its_ratio_of_time_and_of_memory_to_bf16(found):
    lines = {tuple(line[:2]): line[2:] for line in cells(bench.step_table(found["steps"][-len(bench.ROWS):]))}
    assert lines["800M, 16 x 512", "bf16"] == ["100.0", "1.00", "8,192", "20.00", "1.00"]
    assert lines["", "fp4"] == ["60.0", "0.60", "13,653", "12.00", "0.60"]


@pytest.mark.parametrize("lost", ["bf16", "fp4"])
def test_what_does_not_fit_into_memory_stays_in_every_table(found, lost):
    for part in ("linears", "steps", "products"):
        for e in found[part]:
            if e["row"] == lost:
                for key in set(e) & {"ms", "forward_ms", "backward_ms", "called_ms", "tokens_per_s", "peak_gib"}: del e[key]
    for name in ("linear", "step", "product"):
        head, _, *lines = cells(getattr(bench, name + "_table")(found[name + "s"]))
        mine = [line for line in lines if line[1] == lost]
        assert mine and all(line[2] == "out of memory" for line in mine)
        ratios = [i for i, title in enumerate(head) if title == "/ bf16"]
        assert all(line[i] == "" for line in (lines if lost == "bf16" else mine) for i in ratios)
    assert "out of memory" in bench.width_table(found["linears"])


@pytest.mark.parametrize("ratios, width", [
    ((3, 2, .9, .8, .7), 2048), ((.9, .9, .9, .9, .9), 512), ((3, 2, 1.5, 1.2, .99), 8192), ((3, 2, 1.5, 1.2, 1.), None),
    ((.9, 2, .9, 1.1, .9), 8192),                               # faster here and there does not count
    ((.9, .9, .9, .9, 1.1), None), ((3, .9, .9, .9, float("nan")), None), ((3, .9, .9, .9, None), None)])
def test_the_width_from_which_fp4_pays_is_the_smallest_from_which_it_stays_faster(ratios, width):
    assert bench.faster_from(widths(*ratios), "fp4") == width
    said = bench.break_even(widths(*ratios), "fp4")
    assert f"width of {width} on" in said if width else "not faster than bf16 at 8192" in said


def test_where_only_bf16_runs_out_of_memory_fp4_is_faster():
    found = [e if e["row"] != "bf16" or e["out"] < 8192 else {k: e[k] for k in ("tokens", "out", "in", "row")}
             for e in widths(3, 2, 1.5, .9, .9)]
    assert bench.faster_from(found, "fp4") == 4096


# ---- the README

def test_only_what_is_between_the_markers_is_rewritten():
    text = "before\n<!-- bench -->\nold | table\n<!-- /bench -->\nafter"
    once = bench.replaced(text, "new")
    assert once == "before\n<!-- bench -->\nnew\n<!-- /bench -->\nafter" and bench.replaced(once, "new") == once


@pytest.mark.parametrize("text", ["", "<!-- bench -->", "<!-- /bench --><!-- bench -->", 2 * "<!-- bench --><!-- /bench -->"])
def test_a_readme_without_its_markers_is_refused(text):
    with pytest.raises(ValueError, match="it needs one <!-- bench -->"): bench.replaced(text, "new")


@pytest.fixture
def measured(found, monkeypatch, tmp_path):
    """a GPU on which everything has been measured; main(*argv) -> exit code, README, results"""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: found["gpu"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(fp4, "build", lambda: "kernels")
    monkeypatch.setattr(bench, "kernels", lambda: found["kernels"])
    monkeypatch.setattr(bench, "each", lambda f, shapes, rows: found[f.__name__ + "s"])
    monkeypatch.setattr(bench, "steps", lambda sizes: [found["steps"]])
    monkeypatch.setattr(bench, "where", lambda M, N, K, rate, bandwidth: found["where"])
    monkeypatch.setattr(bench, "README", str(tmp_path / "README.md"))
    monkeypatch.setattr(bench, "RESULTS", str(tmp_path / "bench.json"))
    (tmp_path / "README.md").write_text("a\n<!-- bench -->\n<!-- /bench -->\nb\n")
    return lambda *argv: (bench.main(argv), (tmp_path / "README.md").read_text(), tmp_path / "bench.json")


def test_a_whole_run_rewrites_the_readme_and_keeps_every_number(measured, found):
    code, text, results = measured()
    assert code == 0 and text.startswith("a\n<!-- bench -->\n`make bench` on one NVIDIA H200") and text.endswith("<!-- /bench -->\nb\n")
    for table in (bench.step_table(found["steps"]), bench.kernel_table(found["kernels"]), bench.width_table(found["linears"]), bench.where_table(found["where"])):
        assert table in text
    saved = json.loads(results.read_text())
    assert all(saved[part] == found[part] for part in ("gpu", "kernels", "linears", "where", "steps")) and {"torch", "date"} < set(saved)
    assert not glob.glob(str(results.parent / "*.tmp"))


@pytest.mark.parametrize("argv", [("--quick",), ("--only", "kernels"), ("--only", "linears"), ("--only", "steps")])
def test_part_of_a_run_prints_and_rewrites_nothing(measured, argv, capsys):
    code, text, results = measured(*argv)
    assert code == 0 and text == "a\n<!-- bench -->\n<!-- /bench -->\nb\n" and not results.exists()
    assert "NVIDIA H200" in capsys.readouterr().out


def test_without_markers_the_numbers_are_kept_and_a_sentence_says_what_is_missing(measured, capsys):
    open(bench.README, "w").write("no markers")
    code, text, results = measured()
    assert code == 2 and text == "no markers" and results.exists()
    assert "README.md is as it was, because it needs one <!-- bench -->" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["-m", "fp4.bench"], ["tests/sanitize.py"]])
def test_without_a_gpu_a_sentence_and_exit_code_2(command):
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 2 and re.fullmatch(r"(bench|sanitize): torch sees no GPU here\n", done.stderr) and not done.stdout


def test_without_kernels_there_is_nothing_to_measure(measured, monkeypatch, capsys):
    monkeypatch.setattr(fp4, "build", lambda: "reference.py, which is slow")
    code, text, results = measured()
    assert code == 2 and not results.exists() and capsys.readouterr().err == "bench: the kernels did not build\n"


# ---- what is measured, on the CPU, without a clock

class OnTheCPU(TorchFunctionMode):
    """cuda means cpu"""
    def __torch_function__(self, f, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if "cuda" in str(kwargs.get("device")): kwargs["device"] = "cpu"
        return args[0] if f is torch.Tensor.cuda else f(*args, **kwargs)


@pytest.fixture
def seen(monkeypatch):
    """nothing is compiled or captured, and time is what was called: 1 ms a forward, 10 ms a backward"""
    seen, forward, backward = [], fp4.Linear.forward, torch.autograd.backward
    def milliseconds(f):
        start = len(seen)
        f()
        return sum(1 if isinstance(call, int) else 10 for call in seen[start:])
    monkeypatch.setattr(bench, "milliseconds", milliseconds)
    monkeypatch.setattr(bench, "captured", lambda f: f)
    monkeypatch.setattr(torch, "compile", lambda f, fullgraph, dynamic=None: f)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: types.SimpleNamespace(L2_cache_size=2 * 64 * (64 + 32)))
    monkeypatch.setattr(fp4.Linear, "forward", lambda self, x: seen.append(x.data_ptr()) or forward(self, x))
    monkeypatch.setattr(torch.autograd, "backward", lambda *args, **how: seen.append("backward") or backward(*args, **how))
    return seen


@pytest.mark.parametrize("row", bench.ROWS)
def test_a_linear_is_timed_forward_and_backward_on_more_inputs_than_the_cache_holds(row, seen):
    with OnTheCPU(): times = bench.linear(64, 64, 32, row)
    assert times == dict(forward_ms=1., backward_ms=10., ms=11., called_ms=11)
    assert len(set(seen) - {"backward"}) == 3                   # 3 caches are x and dy of 3 pairs


def test_a_product_is_timed(seen):
    for row in ("bf16", "fp4"):
        with OnTheCPU(): assert bench.product(64, 64, 32, row) == dict(ms=0)


@pytest.mark.parametrize("row", bench.ROWS)
def test_a_step_trains_and_quantises_the_weights_once(row, seen, monkeypatch):
    from model import SIZES
    monkeypatch.setitem(SIZES, "tiny", (1, 32, 1, 1e-2))
    monkeypatch.setattr(bench, "VOCABULARY", 64)
    count, models = [], []
    monkeypatch.setattr(torch, "compile", lambda f, fullgraph: models.append(f) or f)
    monkeypatch.setattr(fp4.Linear, "quantize_weight", lambda self, f=fp4.Linear.quantize_weight: (count.append(1), f(self))[1])
    with OnTheCPU():
        step = bench.training_step("tiny", row, 2, 32)
        before, start = models[0].blocks[0].mlp.proj.weight.clone(), len(count)
        step()
    assert not torch.equal(before, models[0].blocks[0].mlp.proj.weight)
    assert len(count) - start == (4 if row in ("fp4", "fp4-sr") else 0)


def test_memory_running_out_is_a_result_and_other_errors_are_errors():
    def oom(): raise torch.OutOfMemoryError("full")
    assert bench.fits(oom) == {} and bench.fits(lambda: dict(ms=1)) == dict(ms=1)
    with pytest.raises(ZeroDivisionError): bench.fits(lambda: 1 / 0)


# ---- make compile, make sanitize

@pytest.fixture
def compile(tmp_path):
    """make compile in a folder with these .cu files and an nvcc that writes down its arguments"""
    def run(*files, fails="nothing", nvcc=True):
        (tmp_path / "fp4").mkdir(), (tmp_path / "bin").mkdir()
        shutil.copy(os.path.join(ROOT, "Makefile"), tmp_path)
        for file in files: (tmp_path / "fp4" / file).touch()
        if nvcc:
            (tmp_path / "bin" / "nvcc").write_text(f'#!/bin/sh\necho "$@" >> log\ncase "$*" in *{fails}*) exit 1;; esac\n')
            (tmp_path / "bin" / "nvcc").chmod(0o755)
        for tool in ("make", "sh", "date", "nproc", "grep"): os.symlink(shutil.which(tool), tmp_path / "bin" / tool)
        done = subprocess.run(["make", "compile"], cwd=tmp_path, capture_output=True, text=True, env={"PATH": str(tmp_path / "bin")})
        log = (tmp_path / "log").read_text() if (tmp_path / "log").exists() else ""
        return done, {(os.path.basename(c), a, b) for a, b, c in re.findall(r"arch=compute_(\w+),code=sm_(\w+) -c (\S+)", log)}, log
    return run


def test_a_cu_named_after_a_machine_is_compiled_for_it_and_every_other_for_all(compile):
    done, jobs, log = compile("quantize.cu", "gemm_sm90.cu", "gemm_sm100.cu", "gemm_sm120.cu")
    want = {"quantize.cu": ["75", "80", "89", "90a", "100a", "120a"], "gemm_sm90.cu": ["90a"], "gemm_sm100.cu": ["100a", "103a"],
            "gemm_sm120.cu": ["120a", "121a"]}
    assert done.returncode == 0 and jobs == {(file, gpu, gpu) for file, gpus in want.items() for gpu in gpus}
    assert all("-Werror all-warnings" in line for line in log.splitlines())
    assert done.stdout.count(" s\n") == 11


def test_one_failed_compilation_fails_make_compile(compile):
    assert compile("quantize.cu", "gemm_sm90.cu", fails="sm_120a")[0].returncode == 2


def test_without_nvcc_make_compile_says_so(compile):
    done = compile("quantize.cu", nvcc=False)[0]
    assert done.returncode == 2 and "compile: there is no nvcc on the PATH" in done.stderr


def test_the_sanitizer_sees_every_op(monkeypatch):
    monkeypatch.setattr(fp4.product, "FORMAT", "fp8")
    ops = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("fp4::")}
    assert {name for name, _ in sanitize.calls(33, 160, torch.float32)} == ops - sanitize.NO_KERNEL


@pytest.mark.parametrize("format", ["fp8", "mxf4"])
def test_the_sanitizer_gives_the_product_operands_of_the_sizes_the_quantisers_make(monkeypatch, format):
    monkeypatch.setattr(fp4.product, "FORMAT", format)
    for M, K in sanitize.SHAPES:
        for right in (False, True):
            want = fp4.operand(torch.empty(0), M, K, format, right)
            assert [(t.shape, t.dtype) for t in sanitize.operand(M, K, right)] == [(t.shape, t.dtype) for t in want]


@pytest.mark.parametrize("M, K", sanitize.SHAPES)
def test_the_sanitizer_s_calls_are_calls_that_the_ops_take(M, K):
    for name, args in sanitize.calls(M, K, torch.bfloat16):
        on_a_gpu_only = name.startswith("fold") or name in ("quantize_backward", "requantize") and args[-1] != "packed"
        if not on_a_gpu_only: getattr(torch.ops.fp4, name)(*args)


def test_every_kernel_that_is_built_is_where_the_sanitizer_looks_in_an_unnamed_namespace():
    for path in re.findall(r"\w+\.cu\b", open(os.path.join(ROOT, "fp4", "build.py")).read()):
        text = open(os.path.join(ROOT, "fp4", path)).read()
        inside = text[text.index("\nnamespace {\n"):text.index("\n}  // namespace\n")]
        assert text.count("__global__") == inside.count("__global__") > 0, path
