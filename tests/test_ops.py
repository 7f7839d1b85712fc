"""Facts about the ops as torch sees them: what numbers mean, and that calls leak no memory."""
import ctypes
import gc
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fp4
from fp4 import ops, reference, stored_weight
from fp4.ops import OPERAND_FORMATS, SCALES, SIGN_ORDERS

ROOT = Path(__file__).resolve().parent.parent
BACKEND = fp4.build()
raw = torch.ops.fp4
needs_kernels = pytest.mark.skipif(not BACKEND.is_compiled, reason="no compiler on this machine")

torch.manual_seed(0)
X = torch.randn(40, 64)
DY = torch.randn(40, 32)
SIGNS, SEEDS = ops.draw(X, X, 4)
PACKED, MASK = ops.quantize_forward(X, "floor")                 # [40, 64]
RIGHT, _ = ops.quantize_forward(torch.randn(64, 64), "floor")


# ---- the numbers of words

def test_no_op_takes_or_returns_a_string():
    """Each would be leaked: see SCALES in fp4/ops.py."""
    schemas = [s for s in torch._C._jit_get_all_schemas() if s.name.startswith("fp4::")]
    assert len(schemas) > 8
    for schema in schemas:
        types = {str(argument.type) for argument in (*schema.arguments, *schema.returns)}
        assert types <= {"Tensor", "int", "float", "bool", "number"}, schema


def values_of_enum(name):
    text = (ROOT / "fp4" / "kernels" / "ops.h").read_text()
    body = re.search(rf"enum class {name} {{(.*?)}};", text, re.S)[1]
    return re.findall(r"^ *(\w+),", body, re.M)


def test_the_words_of_the_ops_are_the_enums_of_the_kernels_in_the_same_order():
    assert tuple(values_of_enum("SignOrder")) == SIGN_ORDERS
    formats = values_of_enum("OperandFormat")
    assert formats == [*OPERAND_FORMATS[:-1], "fp8_left", "fp8_right"]
    assert OPERAND_FORMATS[-1] == "fp8"


@needs_kernels
@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("order", range(len(SIGN_ORDERS)))
def test_the_kernels_and_the_definition_read_the_same_numbers(stochastic, order):
    pairs = [
        (raw.quantize_forward, ops.quantize_forward_by_definition, (X, order % 2)),
        (raw.quantize_backward, ops.quantize_backward_by_definition,
         (X, SIGNS, SEEDS[:2], stochastic, order, 2 - order, 0)),
        (raw.requantize_transposed, ops.requantize_transposed_by_definition,
         (*PACKED, SIGNS, SEEDS[2:3], stochastic, order, 0)),
    ]
    for kernel, definition, arguments in pairs:
        for got, want in zip(kernel(*arguments), definition(*arguments), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("number", [-1, 3])
def test_a_number_without_a_word_is_an_error_not_a_wrong_result(number):
    calls = [
        ("quantize_forward", (X, number)),
        ("quantize_backward", (X, SIGNS, SEEDS[:2], False, number, 0, 0)),
        ("quantize_backward", (X, SIGNS, SEEDS[:2], False, 0, number, 0)),
        ("quantize_backward", (X, SIGNS, SEEDS[:2], False, 0, 0, number)),
        ("requantize_transposed", (*PACKED, SIGNS, SEEDS[:1], False, number, 0)),
        ("requantize_transposed", (*PACKED, SIGNS, SEEDS[:1], False, 0, number)),
    ]
    for name, arguments in calls:
        with pytest.raises((ValueError, RuntimeError), match=f"must be 0 .*got {number}|{number} "
                                                             "is not the number of one of"):
            getattr(raw, name)(*arguments)
        with pytest.raises(ValueError, match=f"{number} is not the number of one of"):
            getattr(ops, f"{name}_by_definition")(*arguments)


def test_a_word_that_no_list_has_is_refused_with_those_that_it_has():
    calls = [
        (lambda: ops.quantize_forward(X, "ceil"), SCALES),
        (lambda: ops.quantize_gemm(X, "ceil", PACKED), SCALES),
        (lambda: ops.quantize_backward(X, SIGNS, SEEDS[:2], False, "up", "none", "packed"),
         SIGN_ORDERS),
        (lambda: ops.requantize_transposed(PACKED, SIGNS, SEEDS[:1], False, "none", "bf16"),
         OPERAND_FORMATS),
    ]
    for call, words in calls:
        with pytest.raises(ValueError, match=f"is not one of {', '.join(words)}"):
            call()
    with pytest.raises(ValueError, match="floor or nearest, got ceil"):
        reference.quantize_forward(X, "ceil")


# ---- what torch.compile is told

def shapes_and_dtypes(result):
    result = [result] if isinstance(result, torch.Tensor) else result
    return [(list(t.shape), t.dtype) for t in result]


def called(op, *arguments):
    return shapes_and_dtypes(getattr(raw, op)(*arguments))


def on_meta(*arguments):
    return [a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments]


BF16_X = torch.randn(70, 96).bfloat16()
TALL, TALL_MASK = ops.quantize_forward(torch.randn(160, 96), "floor")
WEIGHT = torch.randn(160, 96)
STORED = stored_weight.parts(stored_weight.quantize(WEIGHT, "nearest"))


@pytest.mark.parametrize("op, arguments", [
    ("quantize_forward", (BF16_X, 0)),
    ("quantize_backward", (BF16_X, SIGNS, SEEDS[:2], False, 0, 0, 0)),
    ("requantize_transposed", (*TALL, SIGNS, SEEDS[:1], False, 0, 0)),
    ("draw", (BF16_X, X, 3)),
    ("dequantize", (*TALL, torch.bfloat16)),
    ("dequantize", (*TALL, torch.float32)),
    ("gemm", (*ops.quantize_forward(BF16_X, "floor")[0], *TALL, 1.0, torch.bfloat16)),
    ("matvec", (*(tensor[:8].contiguous() for tensor in TALL), *TALL, torch.bfloat16)),
    ("unrotate", (torch.randn(160, 96), TALL_MASK, torch.bfloat16)),
    ("quantize_gemm", (BF16_X, 1, *TALL)),
    ("quantize_gemm", (BF16_X.float(), 1, *TALL)),
    ("quantize_gemm_stored", (BF16_X, 1, WEIGHT, *STORED)),
    ("gemm_unrotate", (*TALL, *TALL, torch.zeros(160, 5, dtype=torch.int32), 16 / 9,
                       torch.bfloat16)),
])
def test_torch_compile_is_told_the_shapes_and_dtypes_that_come_out(op, arguments):
    assert called(op, *on_meta(*arguments)) == called(op, *arguments)


@pytest.mark.parametrize("number, rows, columns, transposed", [
    # dy [70, 96]; dy.T [96, 96], whose 70 are padded; a packed [160, 96] transposed, [96, 160]
    (1, [([70, 48], torch.uint8), ([512], torch.uint8)],
     [([96, 48], torch.uint8), ([512], torch.uint8)],
     [([96, 80], torch.uint8), ([1024], torch.uint8)]),
    (2, [([1, 1, 16384], torch.uint8), ([1, 1, 128], torch.float32)],
     [([1, 1, 16384], torch.uint8), ([1, 1, 128], torch.float32)],
     [([1, 2, 16384], torch.uint8), ([1, 2, 4], torch.float32)]),
], ids=OPERAND_FORMATS[1:])
def test_torch_compile_is_told_the_shapes_of_the_operands_in_tiles(
        number, rows, columns, transposed):
    dy = on_meta(BF16_X, SIGNS, SEEDS[:2])
    assert called("quantize_backward", *dy, False, 0, 0, number) == [*rows, *columns]
    w = on_meta(*TALL, SIGNS, SEEDS[:1])
    assert called("requantize_transposed", *w, False, 0, number) == transposed
    wide = torch.empty(300, 544, device="meta")
    tiles = called("quantize_backward", wide, *dy[1:], False, 0, 0, number)
    if number == 1:                             # 3 x 5 tiles of scales, and 5 x 3
        assert tiles[1] == tiles[3] == ([15 * 512], torch.uint8)
    else:
        assert tiles[0] == ([3, 5, 16384], torch.uint8) and tiles[2][0] == [5, 3, 16384]


# ---- what the wrappers hand on

def test_a_fused_op_is_the_two_ops_that_it_stands_for():
    packed, mask = ops.quantize_forward(X, "nearest")
    y, again, again_mask = ops.quantize_gemm(X, "nearest", RIGHT)
    assert torch.equal(y, ops.gemm(packed, RIGHT, 1.0, torch.float32))
    assert torch.equal(again.codes, packed.codes) and torch.equal(again.scales, packed.scales)
    assert torch.equal(again_mask, mask)
    assert not torch.equal(mask, MASK)          # "nearest" is not "floor"
    product = ops.gemm(PACKED, RIGHT, 16 / 9, torch.float32)
    assert torch.equal(ops.gemm_unrotate(PACKED, RIGHT, MASK, 16 / 9, torch.float32),
                       ops.unrotate(product, MASK, torch.float32))


def test_the_product_of_packed_matrices_is_that_of_their_values_times_alpha():
    a = reference.dequantize(*PACKED, torch.float64)
    b = reference.dequantize(*RIGHT, torch.float64)
    for implementation in (reference, raw):
        for dtype in (torch.float32, torch.bfloat16):
            got = implementation.gemm(*PACKED, *RIGHT, .25, dtype)
            assert torch.equal(got, (.25 * a @ b.T).float().to(dtype))     # The sums are exact.


# ---- memory

class MallInfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
        "fordblks", "keepcost")]


def bytes_in_use():
    """What malloc has handed out and not got back, in this process."""
    info = ctypes.CDLL(None).mallinfo2
    info.restype = MallInfo
    now = info()
    return now.uordblks + now.hblkhd


def bytes_lost_per_call(call, calls=1000):
    """The least of three series of calls, because other threads and caches allocate, too."""
    for _ in range(10):
        call()
    gc.collect()
    lost = []
    for _ in range(3):
        before = bytes_in_use()
        for _ in range(calls):
            call()
        lost.append((bytes_in_use() - before) / calls)
    return min(lost)


CALLS = {
    "quantize_forward": lambda: ops.quantize_forward(X, "nearest"),
    "quantize_backward": lambda: ops.quantize_backward(
        X, SIGNS, SEEDS[:2], True, "before", "after", "packed"),
    "requantize_transposed": lambda: ops.requantize_transposed(
        PACKED, SIGNS, SEEDS[:1], True, "none", "packed"),
    "draw": lambda: ops.draw(X, X, 4),
    "dequantize": lambda: ops.dequantize(PACKED, torch.bfloat16),
    "gemm": lambda: ops.gemm(PACKED, PACKED, 16 / 9, torch.float32),
    "quantize_gemm": lambda: ops.quantize_gemm(X, "nearest", PACKED),
    "unrotate": lambda: ops.unrotate(X, MASK, torch.float32),
    "gemm_unrotate": lambda: ops.gemm_unrotate(
        PACKED, RIGHT, MASK, 16 / 9, torch.float32),
}


needs_mallinfo = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"),
                                    reason="this C library cannot count its memory")


@needs_mallinfo
@pytest.mark.parametrize("name", CALLS)
def test_a_thousand_calls_of_an_op_lose_no_memory(name):
    assert bytes_lost_per_call(CALLS[name]) < 8


@needs_mallinfo
@pytest.mark.parametrize("precision, compiled", [
    ("fp4-sr", False), ("fp4-fwd", False), ("fp4-sr", True)])
def test_passes_through_a_layer_lose_no_memory(precision, compiled):
    layer = fp4.Linear(64, 32, fp4.recipe(precision))
    fp4.quantize_weights(layer)
    torch.compiler.reset()
    run = torch.compile(layer, fullgraph=True) if compiled else layer
    x = X.clone().requires_grad_()

    def step():
        x.grad = None
        layer.weight.grad = None
        run(x).backward(DY)
        fp4.quantize_weights(layer)

    assert bytes_lost_per_call(step, 100) < 40


@pytest.mark.slow
def test_the_memory_of_a_training_run_stays_flat_within_5_percent(tmp_path):
    """Two hundred steps of the tiny model. Each calls every op as often as with a larger batch."""
    text = tmp_path / "text.py"
    text.write_text("".join(f"def f{i}(x):\n    return x + {i}\n\n" for i in range(2999)))
    command = [sys.executable, "quartet.py", "--size", "tiny", "--steps", "200", "--eval_every",
               "200", "--batch", "2", "--data", str(text), "--vocab", "320",
               "--sample_tokens", "0", "--out", str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    resident = {}
    for line in process.stdout:
        step = re.match(r"step +(\d+)/200", line)
        if step:
            pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
            resident[int(step[1])] = pages
    assert process.wait() == 0
    # The first steps compile.
    assert resident[199] <= 1.05 * resident[50], resident
