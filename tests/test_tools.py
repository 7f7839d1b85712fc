"""Facts about the tools around the source: the reading budget, the sanitizer, the reports.

None of them needs a GPU here: what a GPU or NVIDIA's programs would say is made up.
"""
import subprocess
import types

import pytest
import torch

from data.files import UserError
from tools import blackwell_report, markdown, sanitize, style


def said(text, name="tools/x.py"):
    """The places and messages of one file, without the density that a short text cannot have."""
    found, _, _ = style.check_file(name, text)
    return [(place, message) for place, message in found if "tokens a code line" not in message]


def lines_said(text, name="tools/x.py"):
    return [int(place[1:]) for place, _ in said(text, name)]


# ---- the reading budget: columns and lines

def test_a_line_has_at_most_100_columns_but_for_tables_and_addresses_in_prose():
    text = "x" * 100 + "\n" + "x" * 101 + "\n" + "é" * 100 + "\n"
    for name in ("README.md", "Makefile"):
        assert lines_said(text, name) == [2]
    assert lines_said(f"a = '{'x' * 94}'\nb = '{'x' * 95}'\n") == [2]
    assert lines_said(f"a = '{'x' * 95}'\n", "tests/x.py") == [1]
    assert lines_said(f"int a; // {'x' * 94}\n", "fp4/kernels/a.cu") == [1]
    for wide in ("| a | ", "[a page](b) ", "https://a.b/c "):
        assert lines_said(wide + "x" * 100, "fp4/README.md") == []
        assert lines_said("# " + wide + "x" * 100) == [1]


def test_the_readme_has_at_most_180_lines():
    assert said("line\n" * 180, "README.md") == []
    assert said("line\n" * 181, "README.md") == [("", "1 lines over 180")]
    assert said("line\n" * 181, "fp4/README.md") == []


# ---- the reading budget: statements

@pytest.mark.parametrize("text, lines", [
    ("x = 1\ny = 2\n", []),
    ("x = 1; y = 2\n", [1]),
    ("if x:\n    y = 1\nelse:\n    y = 2\n", []),
    ("if x: y = 1\n", [1]),
    ("if x:\n    y = 1\nelse: y = 2\n", [3]),
    ("try:\n    f()\nexcept E: g()\n", [3]),
    ("try:\n    f()\nfinally: g()\n", [3]),
    ("for i in x: f()\n", [1]),
    ("def f(x): return x + 1\n", []),
    ("def f(x): return " + "x" * 71 + "\n", []),                       # 88 columns
    ("def f(x): return " + "x" * 72 + "\n", [1]),                      # 89
    ("def f(x): g(x)\n", [1]),
    ("class A: pass\n", [1]),
    ("f(), g()\n", [1]),
    ("x and f()\n", [1]),
    ("f() if x else g()\n", [1]),
    ("[f(i) for i in x]\n", [1]),
    ("f(x and y)\n", []),
    ("x = a if b else c\n", []),
    ("x = a if b else c if d else e\n", [1]),
    ("x = (a if b else c), (d if e else f)\n", []),
    ("x = {\n    'else: 1': 2,\n}\n", []),
    ('"""A docstring."""\n', []),
])
def test_a_line_has_one_statement(text, lines):
    assert lines_said(text) == lines


def test_tests_obey_columns_and_statements_only():
    long = "def f(" + ",\n      ".join(f"a{i}" for i in range(30)) + "):\n" + "    x = 1\n" * 60
    nested = "x = a if b else c if d else e\n"
    dense = "x = [a, b, c, d, e, f, g, h, i, j, k]\n"
    found, _, _ = style.check_file("tests/x.py", long + nested + dense * 99)
    assert found == []
    assert lines_said("x = 1; y = 2\n", "tests/x.py") == [1]


# ---- the reading budget: functions

def function_of(n_lines, name="f", head=""):
    return f"def {name}():\n{head}" + "    x = 1\n" * (n_lines - 1)


def test_a_function_has_at_most_40_lines_without_its_docstring():
    docstring = '    """Does it.\n\n    With care.\n    """\n'
    for head in ("", docstring):
        assert said(function_of(40, head=head)) == []
        assert said(function_of(41, head=head)) == [(":1", "f has 41 lines, 1 over 40")]
    in_a_class = "class A:\n" + "".join("    " + line for line in
                                        function_of(41).splitlines(keepends=True))
    assert lines_said(in_a_class) == [2]


def test_the_training_loop_alone_may_have_90_lines_and_any_number_of_names():
    names = "".join(f"    x{i} = 1\n" for i in range(16))
    assert said(function_of(74, "train_steps", names), "quartet.py") == []
    assert said(function_of(75, "train_steps", names), "quartet.py") == [
        (":1", "train_steps has 91 lines, 1 over 90")]
    assert len(said(function_of(74, "train_steps", names), "model.py")) == 2
    assert len(said(function_of(74, "train", names), "quartet.py")) == 2


@pytest.mark.parametrize("names, function", [
    ("a b c d e", "def f(a, /, b, *c, d, **e):\n    return a\n"),
    ("a b c", "def f():\n    a = 1\n    b, c = 1, 2\n"),
    ("a b", "def f():\n    a = 1\n    a = 2\n    b += 1\n"),
    ("a b c", "def f():\n    for a in x:\n        with y as b, z as c:\n            pass\n"),
    ("a b", "def f():\n    try:\n        a = 1\n    except E as b:\n        pass\n"),
    ("a g", "def f():\n    a = 1\n    def g(x, y):\n        z = 1\n"),
    ("a", "def f():\n    a = [i for i in x], {j: k for j, k in y}, lambda m: m\n"),
    ("a b", "def f():\n    if a := x:\n        b: int = 1\n"),
    ("", "def f(self, cls, ctx):\n    for _ in x:\n        y.z = w[0] = 1\n"),
])
def test_the_names_of_a_function_are_its_arguments_and_what_it_assigns(names, function):
    node, = style.ast.parse(function).body
    assert style.local_names(node) == set(names.split())


def test_a_function_has_at_most_15_names():
    arguments = ", ".join(f"a{i}" for i in range(10))
    body = "".join(f"    b{i} = 1\n" for i in range(5))
    assert said(f"def f({arguments}):\n{body}") == []
    (place, message), = said(f"def f({arguments}):\n{body}    b5 = 1\n")
    assert place == ":1" and message.startswith("f has 16 names, 1 over 15: a0, a1,")


# ---- the reading budget: density

@pytest.mark.parametrize("text, tokens, lines", [
    ("x = f(1)  # a comment\n\n\n", 6, 1),
    ("# a comment\nx = 1\n", 3, 1),
    ('"""\nA docstring of\na file.\n"""\nx = "a text"\n', 3, 1),
    ('def f():\n    """Does it."""\n    return 1\n', 7, 2),
    ('x = """three\nlines of\na text"""\n', 3, 1),
    ("x = f'{a + b} and {c!r:>{width}}'\n", 3, 1),
    ("f(a,\n  b)\n", 6, 2),
])
def test_tokens_are_counted_without_layout_comments_and_docstrings(text, tokens, lines):
    assert style.count_python(text) == (tokens, lines)


@pytest.mark.parametrize("name, limit", [
    ("tools/x.py", 13), ("fp4/reference.py", 15), ("fp4/emulate/baselines.py", 15)])
def test_a_file_has_at_most_13_tokens_a_line_of_code_and_one_of_formulas_15(name, limit):
    def line(n_tokens):
        return f"x = [{', '.join('a' * (n_tokens // 2 - 1))}]\n"

    at_the_limit = line(limit) * 9
    assert style.count_python(at_the_limit) == (9 * limit, 9)
    assert style.check_file(name, at_the_limit)[0] == []
    (place, message), = style.check_file(name, at_the_limit + line(limit + 2))[0]
    assert (place, message) == ("", f"{limit}.2 tokens a code line, 0.2 over {limit}")


def test_the_reading_path_has_a_limit_of_its_own(monkeypatch, capsys):
    texts = {name: style.ROOT.joinpath(name).read_text() for name in style.READING_PATH}
    total = sum(style.count_python(text)[0] for text in texts.values())
    monkeypatch.setattr(style, "EVERYTHING", style.READING_PATH)
    for limit, code in ((total, 0), (total - 7, 1)):
        monkeypatch.setattr(style, "READING_PATH_TOKENS", limit)
        assert style.main([]) == code
        assert (f"{total} tokens, at most {limit}" in capsys.readouterr().out)


def test_files_are_found_below_folders_and_nothing_that_was_generated(monkeypatch, tmp_path):
    monkeypatch.setattr(style, "ROOT", tmp_path)
    for name in ("a.py", "fp4/b.cu", "fp4/build/c.cpp", "fp4/d.so", "fp4/__pycache__/e.py",
                 "data/downloads/f.md", "Makefile", "tools/g.md", ".ci/run"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    found = style.find_files(["a.py", "fp4", "data", "tools", "Makefile", ".ci"])
    assert [str(path.relative_to(tmp_path)) for path in found] == [
        "a.py", "fp4/b.cu", "tools/g.md", "Makefile", ".ci/run"]
    for name in ("nothing", ".."):
        with pytest.raises(UserError, match="there is no .* in this tree"):
            list(style.find_files([name]))


def test_a_violation_is_printed_with_its_place_and_fails(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(style, "ROOT", tmp_path)
    (tmp_path / "a.py").write_text("x = 1\ny = 2; z = 3\n")
    assert style.main(["a.py"]) == 1
    out = capsys.readouterr().out.splitlines()
    assert out == [" lines  tokens  a line", "     2      10     5.0  a.py",
                   "a.py:2: two statements on a line", "style: 1 over a limit"]


# ---- the reading budget: C++

@pytest.mark.parametrize("code, lines", [
    ("int a = 1;\nint b = 2;\n", []),
    ("int a = 1; int b = 2;\n", [1]),
    ("for (int i = 0; i < 4; i++) {\n  g(i);\n}\n", []),
    ("for (int i = 0; i < 4; i++) g(i);\n", [1]),
    ("if (x) return;\n", [1]),
    ("if (x) {\n  return;\n} else {\n  g();\n}\n", []),
    ("} else g();\n", [1]),
    ("while (f(x, (y))) {\n}\n", []),
    ("while (f(x, (y))) g();\n", [1]),
    ("if constexpr (x) g();\n", [1]),
    ("int f(int x) { return x + 1; }\n", []),
    ("int f(int x) { g(x); return x + 1; }\n", [1]),
    ("int f(int x) { return " + "x" * 63 + "; }\n", []),               # 88 columns
    ("int f(int x) { return " + "x" * 64 + "; } int y;\n", [1]),       # 96
    ("g(), h();\n", [1]),
    ("g(a, h(b, c));\n", []),
    ("return g(), 1;\n", [1]),
    ("return {a, b};\n", []),
    ("return {f(a), b};\n", []),
    ("int a[2] = {f(1), 2};\n", []),
    ("x[0] = 1, x[1] = 2;\n", [1]),
    ("a ? b() : c();\n", [1]),
    ("x = a ? b : c;\n", []),
    ("x = a ? b : c ? d : e;\n", [1]),
    ("x = f(a ? b : c, d ? e : f);\n", []),
    ("// a; b; c, d;\nint a;  /* b; c; */\n", []),
    ('const char* s = "a; b; // c";\n', []),
    ("#define F(x) a; b; c;\nint a;\n", []),
    ("#define F(x) \\\n  a; b;\nint a; int b;\n", [3]),
])
def test_a_line_of_cpp_has_one_statement(code, lines):
    assert lines_said(code, "fp4/kernels/a.cu") == lines


@pytest.mark.parametrize("code, tokens, lines", [
    ("int a = 1;  // one\n\n", 5, 1),
    ("/* two\nlines */ a += b->c::d;\n", 8, 1),
    ('f("a // b", \'c\');\n', 7, 1),
    ("x <<= 0x1Fu; kernel<<<a, b>>>(c);\n", 14, 1),
    ("1.5e3f .5 1'000\n", 3, 1),
])
def test_tokens_of_cpp_are_counted_without_comments(code, tokens, lines):
    assert style.count_cpp(code) == (tokens, lines)


# ---- Markdown

def test_a_table_is_as_wide_as_its_widest_cell_in_each_column():
    lines = markdown.table(["", "a long title"], [["x", "1"], ["longer", "20"]]).splitlines()
    assert lines == ["|        | a long title |", "| ------ | -----------: |",
                     "| x      |            1 |", "| longer |           20 |"]
    assert markdown.table(["only"], [["1"]]) == "| only |\n| ---- |\n| 1    |"


def test_the_markers_of_other_names_are_left_alone():
    text = "<!-- a -->\n1\n<!-- /a -->\n<!-- b -->\n2\n<!-- /b -->\n"
    assert markdown.replaced(text, "new", "b") == text.replace("2", "new")
    for broken in (text + "<!-- b -->", text + "<!-- /b -->", text.replace("<!-- /b -->", "")):
        with pytest.raises(ValueError, match="needs one <!-- b --> and, below it, one <!-- /b -->"):
            markdown.replaced(broken, "new", "b")


# ---- the sanitizer

@pytest.fixture
def watched(monkeypatch):
    """A compute-sanitizer that answers by tool: {tool: (exit code, output)}, and its commands."""
    answers = {}
    commands = []

    def run(command, **options):
        commands.append(command)
        tool = command[command.index("--tool") + 1]
        is_planted = "--planted" in command
        code, output = answers[tool, is_planted]
        return types.SimpleNamespace(returncode=code, stdout=output)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(sanitize, "check_it_can_run", lambda sanitizer: None)
    for tool, report in sanitize.PLANTED.items():
        answers[tool, True] = (1, f"== {report} read of size 4\n== ERROR SUMMARY: 3 errors\n")
    for tool in sanitize.TOOLS:
        answers[tool, False] = (0, "== ERROR SUMMARY: 0 errors\n")
    return types.SimpleNamespace(answers=answers, commands=commands)


def test_every_tool_looks_at_everything_after_it_has_reported_a_planted_error(watched, capsys):
    assert sanitize.main([]) == 0
    run = [(command[command.index("--tool") + 1], "--planted" in command)
           for command in watched.commands]
    assert run == [("memcheck", True), ("initcheck", True),
                   ("memcheck", False), ("racecheck", False), ("initcheck", False)]
    assert [line.split(",")[0] for line in capsys.readouterr().out.splitlines()] == [
        "memcheck reports the planted error", "initcheck reports the planted error",
        "memcheck: clean", "racecheck: clean", "initcheck: clean"]
    for command in watched.commands:
        assert "kernel_substring=quantize_cu" in command
        under = command.index("--under")
        assert command[under + 1] == command[command.index("--tool") + 1]
        assert command[under - 2:under] == ["-m", "tools.sanitize"]


@pytest.mark.parametrize("tool", ["memcheck", "initcheck"])
def test_a_tool_that_misses_the_planted_error_proves_nothing(watched, capsys, tool):
    watched.answers[tool, True] = (1, "== Some other error\n== ERROR SUMMARY: 1 error\n")
    assert sanitize.main([]) == 1
    assert f"{tool} misses a planted error" in capsys.readouterr().err
    assert all("--planted" in command for command in watched.commands)


@pytest.mark.parametrize("answer", [
    (1, "== Race reported\n== RACECHECK SUMMARY: 1 hazard\n"),
    (0, "== Race reported\n== RACECHECK SUMMARY: 10 hazards\n"),
    (1, "== ERROR SUMMARY: 0 errors\n"),
    (0, "the program ended before the tool began\n"),
])
@pytest.mark.parametrize("tool", list(sanitize.TOOLS))
def test_a_report_of_any_tool_fails_and_is_printed(watched, capsys, tool, answer):
    watched.answers[tool, False] = answer
    assert sanitize.main([]) == 1
    out = capsys.readouterr().out
    assert f"{tool}: {answer[1]}" in out and out.count(": clean") == 2


def test_only_what_would_not_end_is_skipped():
    small, large = sanitize.SHAPES[0], sanitize.MANY_TILES
    before = ("x", sanitize.BEFORE, 0)
    after = ("x", 1 - sanitize.BEFORE, 0)

    def is_skipped(tool, operand_format, shape, name, arguments=before):
        return sanitize.is_skipped(tool, operand_format, shape, name, arguments)

    for tool in sanitize.TOOLS:
        for operand_format in ("fp8", "mxf4", "packed"):
            for name in ("gemm", "quantize_gemm", "gemm_unrotate"):
                assert is_skipped(tool, operand_format, small, name) == (
                    (tool, operand_format) == ("initcheck", "fp8"))
            for name in ("quantize_forward", "quantize_backward", "unrotate"):
                assert not is_skipped(tool, operand_format, small, name, after)
            for name in ("quantize_backward", "requantize_transposed"):
                assert not is_skipped(tool, operand_format, large, name)
                assert is_skipped(tool, operand_format, large, name, after)
            assert is_skipped(tool, operand_format, large, "quantize_forward")


def test_the_sanitizer_calls_each_variant_of_an_op():
    variants = {}
    for name, arguments in sanitize.calls(33, 160, torch.float32, "fp8"):
        plain = tuple(a for a in arguments if not isinstance(a, torch.Tensor))
        variants.setdefault(name, []).append(plain)
    dtypes = [(torch.float32,), (torch.bfloat16,)]
    assert variants["quantize_forward"] == [(scale,) for scale in range(len(sanitize.SCALES))]
    assert variants["dequantize"] == variants["unrotate"] == dtypes
    assert {plain[-1] for plain in variants["gemm_unrotate"]} == {torch.float32, torch.bfloat16}
    for name in ("quantize_backward", "requantize_transposed"):
        n = 2 * len(sanitize.SIGN_ORDERS) * len(sanitize.OPERAND_FORMATS)
        assert len(set(variants[name])) == len(variants[name]) == n


@pytest.mark.parametrize("has_gpu, sanitizer, is_compiled, words", [
    (False, "/bin/s", True, "torch sees no GPU here"),
    (True, None, True, "there is no compute-sanitizer here"),
    (True, "/bin/s", False, "the kernels did not build"),
    (True, "/bin/s", True, None),
])
def test_what_the_sanitizer_needs_is_said(monkeypatch, has_gpu, sanitizer, is_compiled, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(sanitize.fp4, "build",
                        lambda: types.SimpleNamespace(is_compiled=is_compiled))
    if words is None:
        sanitize.check_it_can_run(sanitizer)
        return
    with pytest.raises(UserError, match=words):
        sanitize.check_it_can_run(sanitizer)


# ---- the report on Blackwell

def test_a_prediction_is_the_operations_at_the_rate_and_the_bytes_at_the_bandwidth():
    sheet = blackwell_report.Datasheet(fp4=1000, fp8=500, bf16=250, bandwidth=2.0)
    M, N, K = 1000, 2000, 4000
    # 16e9 operations; bytes: 3000 x 4000 numbers are read, 2000 x 1000 of two bytes written
    expected = [(16e-3, (12e6 * bits / 8 + 4e6) / 2e12 * 1e3) for bits in (4.25, 8, 16)]
    for factor, (times, (compute, memory)) in enumerate(
            zip(blackwell_report.predict(sheet, M, N, K), expected)):
        assert times == pytest.approx((compute * 2 ** factor, memory))


def test_a_star_marks_a_prediction_that_the_bytes_determine(monkeypatch):
    sheet = blackwell_report.Datasheet(fp4=1000, fp8=500, bf16=250, bandwidth=2.0)
    monkeypatch.setattr(blackwell_report, "GPUS", {"A card": sheet})
    monkeypatch.setattr(blackwell_report, "SHAPES", [(4096, 4096, 4096), (4096, 4096, 16)])
    *_, first, second = blackwell_report.prediction_table()
    assert first == "| 4096, 4096, 4096 | 0.137 | 0.275 | 0.550 |"
    assert second == "| 4096, 4096, 16 | 0.017* | 0.017* | 0.017* |"


def test_the_table_of_speeds_says_rate_equality_and_the_ratio_to_bf16(monkeypatch):
    operands = object()

    def time_library(M, N, K, given):
        assert given is operands
        return "0.600", "out of memory", 2.0

    def compile_gemm(kernel, path):
        return f"{kernel} at {path}"

    fake = types.SimpleNamespace(Library=lambda path: path, compile_gemm=compile_gemm)
    monkeypatch.setitem(blackwell_report.sys.modules, "test_blackwell", fake)
    monkeypatch.setattr(blackwell_report, "SHAPES", [(1000, 2000, 500), (1000, 1000, 1000)])
    monkeypatch.setattr(blackwell_report, "time_own",
                        lambda library, M, N, K: (0.5, N == 2000, operands))
    monkeypatch.setattr(blackwell_report, "time_library", time_library)
    head, _, first, second = blackwell_report.speed_table("gemm_sm100")
    assert head.count("|") == first.count("|")
    assert first == "| 1000, 2000, 500 | 0.500 | 4 | yes | 0.600 | out of memory | 2.000 | 0.25 |"
    assert second == ("| 1000, 1000, 1000 | 0.500 | 4 | **no** | 0.600 | out of memory | 2.000 "
                      "| 0.25 |")


@pytest.mark.parametrize("passed", [True, False])
def test_the_report_says_whether_the_tests_passed_and_so_does_the_exit_code(
        monkeypatch, tmp_path, capsys, passed):
    monkeypatch.setattr(blackwell_report, "ROOT", tmp_path)
    monkeypatch.setattr(blackwell_report, "run_tests", lambda: (passed, ["what pytest said"]))
    monkeypatch.setattr(blackwell_report, "describe_machine", lambda: "the machine")
    monkeypatch.setattr(blackwell_report, "speed_table", lambda kernel: [f"speeds of {kernel}"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (12, 0))
    assert blackwell_report.main([]) == (0 if passed else 1)
    report = (tmp_path / "blackwell_report.md").read_text()
    assert capsys.readouterr().out == report + "\n"
    assert report.startswith("# gemm_sm120.cu on A card\n\nthe machine\n")
    assert f"## Tests: {'passed' if passed else 'FAILED'}\n\n```\nwhat pytest said\n" in report
    assert "speeds of gemm_sm120" in report and "predicted, not measured" in report


@pytest.mark.parametrize("capability, kernel", [
    ((10, 0), "gemm_sm100"), ((10, 3), "gemm_sm100"), ((12, 0), "gemm_sm120"), ((9, 0), None),
    ((11, 0), None), (None, None),
])
def test_the_report_is_for_blackwell_alone(monkeypatch, capability, kernel):
    reported = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(blackwell_report, "write_report",
                        lambda kernel: reported.append(kernel) or True)
    if kernel:
        assert blackwell_report.main([]) == 0
        assert reported == [kernel]
        return
    with pytest.raises(UserError, match=f"torch sees {'A card' if capability else 'none'}"):
        blackwell_report.main([])


def test_what_the_library_refuses_is_told_in_its_own_words(monkeypatch):
    from tools import bench
    monkeypatch.setattr(bench, "gpu_milliseconds", lambda f: f())

    def refuse():
        raise RuntimeError("not supported " + "x" * 99 + "\nmore of it")

    assert blackwell_report.time_or_error(lambda: 0.12345) == "0.123"
    assert blackwell_report.time_or_error(refuse) == ("not supported " + "x" * 99)[:60]


def test_style_leaves_a_readers_exercises_alone(tmp_path, monkeypatch):
    folder = tmp_path / "fp4" / "kernels" / "lessons"
    folder.mkdir(parents=True)
    for name in ("product_1.cu", "exercise_1.cu"):
        (folder / name).write_text("")
    monkeypatch.setattr(style, "ROOT", tmp_path)
    assert [file.name for file in style.find_files(["fp4"])] == ["product_1.cu"]
