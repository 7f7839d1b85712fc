"""
Is an exercise of fp4/kernels/lessons/exercises.md right? Skipped as long as it has no file.

    python -m pytest tests/test_exercises.py -k exercise_1
"""
import pytest
import torch

import test_cuda_on_cpu
from fp4 import reference
from fp4.ops import Packed
from operands import ugly_values
from test_cuda_on_cpu import KERNELS, needs_toolkit
from test_lessons import packed_pair
from tools import lessons

pytestmark = [pytest.mark.slow, needs_toolkit]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(33, 160), (257, 544)]
PRODUCT_SHAPES = [(33, 70, 160), (200, 129, 544)]


@pytest.fixture
def solution(request, tmp_path):
    """the library of the exercise that the test is named after"""
    name = "exercise_" + request.function.__name__.split("_")[2]
    source = f"lessons/{name}.cu"
    if not (KERNELS / source).exists():
        pytest.skip(f"there is no {name}.cu")
    if DEVICE == "cuda":
        return lessons.compile_for_gpu([name])
    test_cuda_on_cpu.write_translation(tmp_path)
    objects = test_cuda_on_cpu.compile_missing(tmp_path, [source, *lessons.COMMON], ("-g", "-O0"))
    return test_cuda_on_cpu.link(tmp_path, objects)


def same(got, want):
    for part, expected in zip(got, want, strict=True):
        assert torch.equal(part.cpu(), expected)


def forward(solution, name, x, *more):
    """what a forward quantiser makes of x [M, K], with arguments after it"""
    on_device = (part.to(DEVICE) for part in (x, *more))
    return lessons.quantize(solution, name, *on_device)


@pytest.mark.parametrize("shape", SHAPES)
def test_exercise_1_takes_the_nearest_power_of_two(solution, shape):
    x = ugly_values(*shape)
    same(forward(solution, "exercise_1", x), reference.quantize_forward(x, "nearest"))


@pytest.mark.parametrize("shape", SHAPES)
def test_exercise_2_rotates_runs_of_16(solution, shape, monkeypatch):
    def rotated(v):
        for stride in (1, 2, 4, 8):
            a, b = v.unflatten(-1, (-1, 2, stride)).unbind(-2)
            v = torch.stack((a + b, a - b), -2).flatten(-3)
        return v / 4

    x = ugly_values(*shape)
    got = forward(solution, "exercise_2", x)
    monkeypatch.setattr(reference, "hadamard", rotated)
    same(got, reference.quantize_forward(x, "floor"))


@pytest.mark.parametrize("shape", SHAPES)
def test_exercise_3_reads_bf16(solution, shape):
    x = ugly_values(*shape).bfloat16()
    same(forward(solution, "exercise_3", x), reference.quantize_forward(x, "floor"))


@pytest.mark.parametrize("shape", SHAPES)
def test_exercise_4_rounds_stochastically(solution, shape):
    dy = ugly_values(*shape)
    signs, seeds = reference.draw(dy, dy, 2)
    on_device = (part.to(DEVICE) for part in (dy, signs, seeds))
    outputs = lessons.quantize_both_ways(solution, "exercise_4", *on_device)
    same(outputs, reference.quantize_backward(dy, signs, seeds, True, "before", "before"))


@pytest.mark.parametrize("shape", SHAPES)
def test_exercise_5_has_blocks_of_16_with_a_scale_in_fp8(solution, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x[1, :16] = 0
    rows, columns = shape
    codes = torch.empty(rows, columns // 2, dtype=torch.uint8, device=DEVICE)
    scales = torch.empty(rows, columns // 16, dtype=torch.uint8, device=DEVICE)
    lessons.call(solution.exercise_5, x.to(DEVICE), rows, columns, codes, scales)
    blocks = x.unflatten(-1, (-1, 16))
    scale = (blocks.abs().amax(-1) / 6).to(torch.float8_e4m3fn)
    u = torch.where(scale.float()[..., None] == 0, 0., blocks / scale.float()[..., None])
    code = reference.round_nearest(u).flatten(-2).to(torch.uint8)
    same([codes, scales], [code[:, 0::2] | code[:, 1::2] << 4, scale.view(torch.uint8)])


def check_product(solution, name, shape, tolerance, takes_tiles=False):
    a, b = packed_pair(*shape)
    on_device = [Packed(*(part.to(DEVICE) for part in operand)) for operand in (a, b)]
    got = lessons.multiply(solution, name, *on_device, takes_tiles).cpu()
    exact = reference.gemm(*a, *b, 1.0, torch.float64)
    assert (got - exact).norm() <= tolerance * exact.norm()


@pytest.mark.parametrize("shape", PRODUCT_SHAPES)
def test_exercise_6_is_a_product(solution, shape):
    check_product(solution, "exercise_6", shape, 1e-6)


@pytest.mark.parametrize("shape", PRODUCT_SHAPES)
def test_exercise_7_is_a_product(solution, shape):
    if DEVICE == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("it needs a Hopper GPU, or none")
    check_product(solution, "exercise_7", shape, 2 ** -13, takes_tiles=True)


@pytest.mark.parametrize("shape", SHAPES)
def test_exercise_8_normalises_before_it_quantises(solution, shape):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=g)
    gain = torch.randn(shape[1], generator=g)
    codes, scales, _ = forward(solution, "exercise_8", x, gain)
    normal = x * (x.double().square().mean(-1, keepdim=True) + 1e-5).rsqrt().float() * gain
    want = reference.quantize_forward(normal, "floor")
    # The order of the sum over a row is yours, and decides about the last bit.
    for got, expected in zip((codes, scales), want):
        assert (got.cpu() != expected).float().mean() <= 1e-3
