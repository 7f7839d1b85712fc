"""Which product a GPU runs, which it can be made to run, and how the library is asked for one."""
import importlib
import os
import re
import types

import pytest
import torch

from fp4 import backend, ops, reference

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")
TURING = (7, 5)
AMPERE = (8, 0)
RTX_30 = (8, 6)
ADA = (8, 9)
HOPPER = (9, 0)
BLACKWELL = (10, 0)
RTX_50 = (12, 0)
GPUS = [TURING, AMPERE, RTX_30, ADA, HOPPER, BLACKWELL, (10, 3), RTX_50, (12, 1)]


# ---- which one runs

@pytest.mark.parametrize("capability, gemm, same_as", [
    ((7, 0), "auto", "fp32"), (TURING, "auto", "fp32"),
    (AMPERE, "auto", "bf16"), (RTX_30, "auto", "bf16"),
    (ADA, "auto", "fp8"), (HOPPER, "auto", "own"),
    (BLACKWELL, "auto", "fp8"), ((11, 0), "auto", "fp8"), ((12, 1), "auto", "fp8"),
])
def test_auto_is_the_usual_product_of_the_gpu(capability, gemm, same_as):
    assert backend.select_backend(capability) == backend.select_backend(capability, gemm)
    assert backend.select_backend(capability) == backend.select_backend(capability, same_as)


@pytest.mark.parametrize("capability, gemm, target, flags, files, function", [
    (TURING, "auto", "75", ["-DGEMM_FP32"], ["gemm_fp32.cu"], None),
    (AMPERE, "auto", "80", [], [], "gemm_on_bf16"),
    (ADA, "auto", "89", [], [], "gemm_on_fp8"),
    (HOPPER, "auto", "90a", ["-DGEMM_SM90"], ["gemm_sm90.cu"], None),
    (HOPPER, "own", "90a", ["-DGEMM_SM90"], ["gemm_sm90.cu"], None),
    ((10, 3), "auto", "103", [], [], "gemm_on_fp8"),
    (BLACKWELL, "own", "100a", ["-DGEMM_MXF4=gemm_sm100"], ["gemm_sm100.cu", "scale_tiles.cu"],
     None),
    ((12, 1), "own", "121a", ["-DGEMM_MXF4=gemm_sm120"], ["gemm_sm120.cu", "scale_tiles.cu"], None),
    (RTX_50, "library", "120", [], [], "gemm_on_nvfp4"),
    (BLACKWELL, "library", "100", [], [], "gemm_on_nvfp4"),
    # What an older GPU runs, on Hopper: its operands are packed.
    (HOPPER, "fp8", "90", [], [], "gemm_on_fp8"),
    (HOPPER, "bf16", "90", [], [], "gemm_on_bf16"),
    (HOPPER, "fp32", "90", ["-DGEMM_FP32"], ["gemm_fp32.cu"], None),
    (ADA, "bf16", "89", [], [], "gemm_on_bf16"),
    (RTX_50, "fp32", "120", ["-DGEMM_FP32"], ["gemm_fp32.cu"], None),
])
def test_each_gpu_is_given_its_product(capability, gemm, target, flags, files, function,
                                       monkeypatch):
    registered = []
    compiled = []

    def impl(op, function, device):
        registered.append((op, function.__name__, device))

    build = importlib.import_module("fp4.build")          # fp4.build is its function
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: capability)
    monkeypatch.setattr(ops, "library", types.SimpleNamespace(impl=impl))
    monkeypatch.setattr(build, "compile_and_load", lambda *arguments: compiled.append(arguments))

    loaded = build.load_kernels(gemm)
    sources, compiler_flags, compiled_target = compiled[0]
    assert list(loaded.sources) == files and set(files) < set(sources)
    assert list(compiler_flags) == ["-DUSE_CUDA", *flags]
    assert compiled_target == target
    assert registered == ([("gemm", function, "CUDA")] if function else [])
    own_format = {"gemm_sm90.cu": "fp8", "gemm_sm100.cu": "mxf4", "gemm_sm120.cu": "mxf4"}
    assert loaded.operand_format == own_format.get(files[0] if files else "", "packed")


def test_only_what_lies_on_a_gpu_has_its_format():
    on_cpu = types.SimpleNamespace(is_cuda=False)
    on_gpu = types.SimpleNamespace(is_cuda=True)
    for capability, expected in ((HOPPER, "fp8"), (ADA, "packed"), (None, "packed")):
        chosen = backend.select_backend(capability)
        assert chosen.format_for(on_cpu) == "packed"
        assert chosen.format_for(on_gpu) == expected


@pytest.mark.parametrize("capability", GPUS)
def test_what_a_gpu_runs_is_written_into_its_log(capability):
    words = {"fp8": "FP8 tensor cores (the library's)", "bf16": "BF16 tensor cores (the library's)",
             "fp32": "FP32 (gemm_fp32.cu", "own": "gemm_sm", "library": "FP4 tensor cores (the"}
    descriptions = set()
    for gemm, part in words.items():
        try:
            description = backend.select_backend(capability, gemm).description
        except ValueError:
            continue
        assert part in description and "\n" not in description
        descriptions.add(description)
        # Our own products have been run on Hopper alone.
        is_untested = capability != HOPPER and gemm in ("fp32", "own")
        assert (backend.UNTESTED in description) == is_untested
    assert len(descriptions) == {7: 1, 8: 2 + (capability == ADA), 9: 4}.get(capability[0], 5)


@pytest.mark.parametrize("capability, gemm, needs, usual", [
    (RTX_30, "fp8", "8.9 (Ada) or more", "'bf16'"),
    (TURING, "bf16", "8.0 (Ampere) or more", "'fp32'"),
    (TURING, "own", "9.0 (Hopper), 10.x or 12.x (Blackwell)", "'fp32'"),
    (AMPERE, "own", "9.0 (Hopper), 10.x or 12.x (Blackwell)", "'bf16'"),
    (ADA, "library", "10.x or 12.x (Blackwell)", "'fp8'"),
    (HOPPER, "library", "10.x or 12.x (Blackwell)", "'own'"),
])
def test_a_product_that_the_gpu_does_not_have_is_refused_in_a_sentence(
        capability, gemm, needs, usual):
    major, minor = capability
    sentence = (f"gemm '{gemm}' needs a GPU of compute capability {needs}, and this "
                f"one has {major}.{minor}: choose auto, which means {usual} here")
    with pytest.raises(ValueError, match=re.escape(sentence)):
        backend.select_backend(capability, gemm)


def test_a_product_that_does_not_exist_is_refused_and_the_others_are_named():
    sentence = "gemm 'fp4' is not one of auto, fp8, bf16, fp32, own, library"
    for capability in (None, HOPPER):
        with pytest.raises(ValueError, match=sentence):
            backend.select_backend(capability, "fp4")


def test_the_cpu_has_one_product():
    for gemm in backend.GEMMS:
        assert backend.select_backend(None, gemm) == backend.select_backend(None)


def test_every_product_can_be_compiled_for_its_gpu():
    """A source is compiled with the instructions of one architecture only where it needs them."""
    for capability in GPUS:
        for gemm in backend.GEMMS[1:]:
            try:
                chosen = backend.select_backend(capability, gemm)
            except ValueError:
                continue
            for name in chosen.sources:
                assert os.path.exists(os.path.join(ROOT, "fp4", "kernels", name))
            needs_one_architecture = any(re.search(r"sm\d", name) for name in chosen.sources)
            assert chosen.target.endswith("a") == needs_one_architecture
            assert chosen.target.rstrip("a") == "".join(map(str, capability))


# ---- the products of the library, here on the CPU

def packed_to_fp8(codes, scales, alpha):
    "packed [M, K] -> E4M3 [M, K] and float32 [M, 1], as the kernel of this name"
    values = reference.dequantize(codes, scales, torch.float64)
    largest = values.abs().amax(1, True).clamp(min=2. ** -100)
    row_scales = 2. ** (torch.floor(torch.log2(largest)) - 8)
    return (values / row_scales).to(torch.float8_e4m3fn), (alpha * row_scales).float()


def scaled_mm(a, b, a_scales, b_scales, out_dtype, use_fast_accum):
    "torch._scaled_mm as it is on every GPU but Hopper"
    assert not use_fast_accum           # which sums in fewer bits
    scales_rows = a_scales.numel() > 1 or b_scales.numel() > 1
    if scales_rows and out_dtype != torch.bfloat16:
        raise ValueError("Only bf16 high precision output types are supported for row-wise scaling")
    if b.shape[0] % 16 or b.shape[1] % 16:
        raise ValueError("mat2 must be divisible by 16")
    product = a.double() @ b.double() * a_scales.double() * b_scales.double()
    return product.float().to(out_dtype)


def mm(a, b, out_dtype):
    assert a.dtype == b.dtype == torch.bfloat16
    return (a.double() @ b.double()).to(out_dtype)


@pytest.fixture
def library(monkeypatch):
    monkeypatch.setattr(torch.ops.fp4, "packed_to_fp8", packed_to_fp8, raising=False)
    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    monkeypatch.setattr(torch, "mm", mm)


@pytest.mark.parametrize("product", [backend.gemm_on_fp8, backend.gemm_on_bf16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("M, N, K", [(1, 32, 32), (33, 64, 96), (3, 40, 544)])
def test_a_product_of_the_library_is_the_one_of_the_definition(
        library, product, dtype, M, N, K):
    torch.manual_seed(K)
    a, b = (reference.quantize_forward(torch.randn(rows, K), "floor")[:2] for rows in (M, N))
    got = product(*a, *b, 16 / 9, dtype)
    exact = reference.gemm(*a, *b, 16 / 9, torch.float32)
    ulp = 2 ** -22 if dtype == torch.float32 else 2 ** -8
    assert got.shape == (M, N) and got.dtype == dtype and got.is_contiguous()
    assert (got.double() - exact.double()).abs().le(ulp * exact.abs()).all()


@pytest.mark.parametrize("product", [
    backend.gemm_on_fp8, backend.gemm_on_bf16, backend.gemm_on_nvfp4])
def test_the_library_is_asked_for_no_other_dtype_than_a_compiled_product_makes(library, product):
    a = reference.quantize_forward(torch.randn(32, 64), "floor")[:2]
    with pytest.raises(RuntimeError, match="dtype must be float32 or bfloat16"):
        product(*a, *a, 1.0, torch.float16)
