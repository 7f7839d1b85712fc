"""
The lessons of fp4/kernels/lessons compute what the definition says, on a GPU, and on a CPU, where
models/cuda_on_cpu.h stands in for CUDA.

    python -m pytest tests/test_lessons.py -k "cpu and quantize_1"      # one lesson on a CPU
"""
import pytest
import torch

import test_cuda_on_cpu
from fp4 import reference
from fp4.ops import Packed
from operands import ugly_values
from test_cuda_on_cpu import needs_toolkit
from tools import lessons
from tools.lessons import COMMON, LESSONS

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
DEVICES = [pytest.param("cpu", marks=needs_toolkit), pytest.param("cuda", marks=gpu)]
FORWARD = [lesson.name for lesson in LESSONS if lesson.name in
           ("quantize_1", "quantize_2", "quantize_3")]
PRODUCTS = [lesson.name for lesson in LESSONS if lesson.name.startswith("product")]
SHAPES = [(1, 32), (33, 160), (130, 288), (257, 544)]


@pytest.fixture(scope="session")
def on_cpu(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lessons")
    test_cuda_on_cpu.write_translation(folder)
    sources = [f"lessons/{lesson.name}.cu" for lesson in LESSONS]
    objects = test_cuda_on_cpu.compile_missing(folder, [*sources, *COMMON], ("-g", "-O0"))
    return test_cuda_on_cpu.link(folder, objects)


@pytest.fixture(scope="session")
def on_cuda():
    library, its_lessons = lessons.load()
    return library, [lesson.name for lesson in its_lessons]


@pytest.fixture
def library(request):
    """a function: device, name of a lesson -> the library; skips what does not run there"""
    def find(device, name):
        if device == "cpu":
            return request.getfixturevalue("on_cpu")
        found, names = request.getfixturevalue("on_cuda")
        if name not in names:
            pytest.skip(f"this GPU does not run {name}")
        return found
    return find


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", FORWARD)
def test_a_forward_quantiser_gives_the_definitions_bytes(name, shape, device, library):
    x = ugly_values(*shape)
    got = lessons.quantize(library(device, name), name, x.to(device))
    for part, expected in zip(got, reference.quantize_forward(x, "floor"), strict=True):
        assert torch.equal(part.cpu(), expected)


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_backward_quantiser_quantize_4_gives_the_definitions_bytes(shape, device, library):
    dy = ugly_values(*shape)
    signs = torch.tensor([0x5A0F3C69])
    got = lessons.quantize_both_ways(library(device, "quantize_4"), "quantize_4", dy.to(device),
                                     signs.to(device))
    want = reference.quantize_backward(dy, signs, torch.zeros(2), False, "before", "before")
    for part, expected in zip(got, want, strict=True):
        assert torch.equal(part.cpu(), expected)


def packed_pair(rows, columns, inner):
    g = torch.Generator().manual_seed(inner)
    matrices = []
    for n in (rows, columns):
        sizes = torch.randint(-4, 4, (n, 1), generator=g).float().exp2()
        matrices.append(torch.randn(n, inner, generator=g) * sizes)
    pair = [Packed(*reference.quantize_forward(x, "floor")[:2]) for x in matrices]
    if inner > 32:
        for codes, scales in pair:
            codes[0, :16] = 0           # A block of zeros may have any scale.
            scales[0, 0] = 200
    return pair


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(1, 1, 32), (33, 70, 160), (130, 129, 288), (200, 64, 544)])
@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_is_the_definitions_but_for_the_rounding_of_its_sums(
        name, shape, device, library):
    a, b = packed_pair(*shape)
    on_device = [Packed(*(part.to(device) for part in operand)) for operand in (a, b)]
    takes_tiles = any(lesson.name == name and lesson.takes_tiles for lesson in LESSONS)
    got = lessons.multiply(library(device, name), name, *on_device, takes_tiles).cpu()
    exact = reference.gemm(*a, *b, 1.0, torch.float64)
    assert (got - exact).norm() <= 2 ** -13 * exact.norm()
    if name != "product_4":
        assert (got - exact).norm() <= 1e-6 * exact.norm()


def test_every_file_is_a_lesson_of_at_most_120_lines():
    paths = (test_cuda_on_cpu.KERNELS / "lessons").glob("*.cu")
    files = {path.stem for path in paths if not path.stem.startswith("exercise_")}
    assert files == {lesson.name for lesson in LESSONS}
    assert all(lessons.lines_of(lesson) <= 120 for lesson in LESSONS)


@pytest.mark.parametrize("capability, names", [
    ((7, 5), FORWARD + ["quantize_4", "product_1", "product_2"]),
    ((8, 9), FORWARD + ["quantize_4", "product_1", "product_2", "product_3"]),
    ((9, 0), [lesson.name for lesson in LESSONS]),
    ((12, 0), FORWARD + ["quantize_4", "product_1", "product_2", "product_3"]),
])
def test_a_gpu_has_the_lessons_whose_instructions_it_knows(capability, names):
    runs = [lesson.name for lesson in LESSONS if lessons.runs_on(lesson, capability)]
    assert runs == names


def test_the_table_has_a_rate_and_its_shares_of_what_ships_and_of_the_limit(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H300")
    by_name = {lesson.name: lesson for lesson in LESSONS}
    rows = [(by_name["quantize_1"], 2.0, 0.5, 0.3), (by_name["product_2"], 4.0, 1.0, 0.2)]
    text = lessons.report(rows, copy=600.0, fp8=500.0)
    assert text.startswith("`make lessons` on one NVIDIA H300 (torch ")
    cells = cells_of(text)
    assert cells["[quantize_1](quantize_1.cu)"] == [
        by_name["quantize_1"].idea, str(lessons.lines_of(by_name["quantize_1"])), "2.000",
        "150 GB/s", "25%", "25%"]
    assert cells["[product_2](product_2.cu)"][2:] == ["4.000", "50.0 TFLOP/s", "25%", "10%"]
    assert cells["what ships: forward"] == ["", "", "0.500", "600 GB/s", "", "100%"]
    assert cells["what ships: product"] == ["", "", "1.000", "200.0 TFLOP/s", "", "40%"]
    assert cells["a copy"][3] == "600 GB/s"
    assert cells["the library's FP8 product"][3] == "500 TFLOP/s"
    without_fp8 = cells_of(lessons.report(rows, copy=600.0, fp8=None))
    assert without_fp8["[product_2](product_2.cu)"][-1] == ""


def cells_of(text):
    """{the first cell of a line of a table: the others}"""
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return {first.strip(): [cell.strip() for cell in others] for first, *others in lines}


def test_without_a_gpu_a_sentence_and_exit_code_2(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert lessons.main([]) == 2
    assert capsys.readouterr().err.startswith("lessons: ")


def test_the_readme_has_a_link_to_each_lesson_and_the_markers_of_the_table():
    with open(lessons.README) as file:
        text = file.read()
    assert all(f"({lesson.name}.cu)" in text for lesson in LESSONS)
    assert text.count("<!-- lessons -->") == text.count("<!-- /lessons -->") == 1
