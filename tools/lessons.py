"""
The lessons of fp4/kernels/lessons, compiled for this GPU, and timed beside the kernels that ship.

    make lessons                # rewrites the table of fp4/kernels/lessons/README.md
    python -m tools.lessons     # prints it only

A lesson is one .cu with one function for the host. It knows neither torch nor the ops: it takes
addresses, and is called through ctypes. tests/test_lessons.py compares what it computes with the
definition, on a GPU, and on a CPU with CUDA modelled.
"""
import ctypes
import datetime
import os
import sys
from typing import NamedTuple

from tools import cli


def parse(argv):
    parser = cli.Parser("python -m tools.lessons", __doc__)
    parser.add_argument("--write", action="store_true", help="rewrite the table of the README")
    return parser.parse_args(argv)


# torch takes seconds to import, so that --help and mistyped flags are answered here.
if __name__ == "__main__":
    cli.start(parse, "lessons", "tools.lessons")

import torch

from fp4 import ops, reference
from fp4.build import KERNELS, build, find_or_compile
from fp4.check import check
from tools import machine
from tools.bench import gpu_milliseconds
from tools.markdown import rewrite, table

FOLDER = os.path.join(KERNELS, "lessons")
README = os.path.join(FOLDER, "README.md")
COMMON = ("fp8_tiles.cu",)              # product_4 calls it
M, K = 16384, 4096                      # what is quantised
SIDE = 4096                             # of the matrices of a product


class Lesson(NamedTuple):
    """One file, and what it teaches."""
    name: str
    idea: str
    gpu: tuple = (7, 5)                 # the compute capability from which on it runs
    only: bool = False                  # there, and nowhere else
    takes_tiles: bool = False           # a product that is given room for FP8 tiles of both


LESSONS = (
    Lesson("quantize_1", "a thread a value, one thing after the other"),
    Lesson("quantize_2", "a block in the registers of one thread"),
    Lesson("quantize_3", "16 bytes at a time"),
    Lesson("quantize_4", "rows and columns through shared memory"),
    Lesson("product_1", "a thread an output"),
    Lesson("product_2", "share what is fetched"),
    Lesson("product_3", "MXFP4 as FP8 on tensor cores", (8, 9)),
    Lesson("product_4", "TMA and wgmma", (9, 0), only=True, takes_tiles=True),
)


def runs_on(lesson, capability):
    return capability == lesson.gpu if lesson.only else capability >= lesson.gpu


# ---- calling a lesson

def load():
    """Compiles the lessons of this GPU; returns the library and the lessons in it.

    Raises ValueError without a GPU, and RuntimeError or OSError if they do not compile.
    """
    check(torch.cuda.is_available(), machine.unusable_gpu() or "torch sees no GPU here")
    capability = torch.cuda.get_device_capability()
    lessons = [lesson for lesson in LESSONS if runs_on(lesson, capability)]
    return compile_for_gpu([lesson.name for lesson in lessons]), lessons


def compile_for_gpu(names):
    """The library of these files of the folder, for the GPU at hand."""
    major, minor = torch.cuda.get_device_capability()
    # The suffix a allows the instructions that only this architecture has.
    target = f"{major}{minor}a" if major >= 9 else f"{major}{minor}"
    sources = tuple(f"lessons/{name}.cu" for name in names)
    return ctypes.CDLL(find_or_compile((*sources, *COMMON), (), target))


def call(function, *args):
    """Calls a lesson; a tensor is its address, and the current stream comes last on a GPU."""
    converted = []
    for arg in args:
        is_tensor = isinstance(arg, torch.Tensor)
        converted.append(ctypes.c_void_p(arg.data_ptr()) if is_tensor else ctypes.c_int64(arg))
    stream = torch.cuda.current_stream().cuda_stream if args[0].is_cuda else None
    function(*converted, ctypes.c_void_p(stream))


def quantize(library, name, x, *more):
    """What `name` makes of x [M, K], and of more tensors after it: codes, scales and mask."""
    parts = (*ops.packed_shapes(x, *x.shape), ops.mask_shape(x))
    rotated = torch.empty_like(x)       # Only the first lesson has use for it.
    call(getattr(library, name), x, *more, *x.shape, *parts, rotated)
    return parts


def quantize_both_ways(library, name, dy, *random):
    """What `name` makes of dy, float32 [M, K]: codes and scales of it and of its transpose.

    random is the signs, and whatever else it draws from.
    """
    rows, columns = dy.shape
    parts = (*ops.packed_shapes(dy, rows, columns),
             *ops.packed_shapes(dy, columns, ops.pad_to_32(rows)))
    call(getattr(library, name), dy, rows, columns, *random, *parts)
    return parts


def multiply(library, name, a, b, takes_tiles=False):
    """The product a b.T, float32, of two Packed, as `name` computes it."""
    rows, columns, inner = len(a.codes), len(b.codes), 2 * a.codes.shape[1]
    y = torch.empty(rows, columns, device=a.codes.device)
    tiles = ()
    if takes_tiles:
        tiles = (*ops.operand_shapes(y, rows, inner, "fp8"),
                 *ops.operand_shapes(y, columns, inner, "fp8", is_right=True))
    call(getattr(library, name), *a, *b, rows, columns, inner, y, *tiles)
    return y


# ---- the table

def lines_of(lesson):
    with open(os.path.join(FOLDER, lesson.name + ".cu")) as file:
        return len(file.readlines())


def measure(library, lessons):
    """Yields (lesson, ms, the shipped kernel's ms, work) of each; work is in GB or TFLOP."""
    x = torch.randn(M, K, device="cuda")
    signs, seeds = reference.draw(x, x, 2)
    a, b = (ops.quantize_forward(torch.randn(SIDE, SIDE, device="cuda"), "floor")[0]
            for _ in range(2))
    packed = 1 / 2 + 1 / 32             # bytes a value: a code, and a scale for 32
    shipped = {
        "forward": gpu_milliseconds(lambda: ops.quantize_forward(x, "floor")),
        "backward": gpu_milliseconds(lambda: ops.quantize_backward(
            x, signs, seeds, False, "before", "before", "packed")),
        "product": gpu_milliseconds(lambda: ops.gemm(a, b, 1.0, torch.float32)),
    }
    for lesson in lessons:
        if is_product(lesson):
            ms = gpu_milliseconds(
                lambda: multiply(library, lesson.name, a, b, lesson.takes_tiles), 5)
            yield lesson, ms, shipped["product"], 2 * SIDE ** 3 / 1e12
        elif lesson.name == "quantize_4":
            ms = gpu_milliseconds(lambda: quantize_both_ways(library, lesson.name, x, signs))
            yield lesson, ms, shipped["backward"], M * K * (4 + 2 * packed) / 1e9
        else:
            ms = gpu_milliseconds(lambda: quantize(library, lesson.name, x))
            yield lesson, ms, shipped["forward"], M * K * (4 + packed + 1 / 8) / 1e9


def limits():
    """What this GPU can do: GB/s of a copy, and TFLOP/s of the library's FP8 product or None."""
    x = torch.randn(M, K, device="cuda")
    to = torch.empty_like(x)
    copy = 2 * x.nbytes / gpu_milliseconds(lambda: to.copy_(x)) / 1e6
    if torch.cuda.get_device_capability() < (8, 9):
        return copy, None
    a, b = (torch.randn(SIDE, SIDE, device="cuda").to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device="cuda")
    ms = gpu_milliseconds(lambda: torch._scaled_mm(a, b.T, one, one, out_dtype=torch.bfloat16))
    return copy, 2 * SIDE ** 3 / ms / 1e9


def share(value): return f"{value:.0%}" if value >= .1 else f"{value:.1%}"


def report(rows, copy, fp8):
    """The table as Markdown; rows are those of measure(), copy and fp8 those of limits()."""
    lines = []
    shipped = {}
    for lesson, ms, shipped_ms, work in rows:
        name = f"[{lesson.name}]({lesson.name}.cu)"
        limit = fp8 if is_product(lesson) else copy
        cells = timing(lesson, ms, work, limit)
        lines.append([name, lesson.idea, str(lines_of(lesson)), *cells[:2], share(shipped_ms / ms),
                      cells[2]])
        cells = timing(lesson, shipped_ms, work, limit)
        shipped[kind(lesson)] = [f"what ships: {kind(lesson)}", "", "", *cells[:2], "", cells[2]]
    lines += shipped.values()
    lines.append(["a copy", "", "", "", f"{copy:,.0f} GB/s", "", ""])
    if fp8:
        lines.append(["the library's FP8 product", "", "", "", f"{fp8:,.0f} TFLOP/s", "", ""])
    head = ["lesson", "idea", "lines", "ms", "rate", "of what ships", "of the limit"]
    title = (f"`make lessons` on one {torch.cuda.get_device_name()} (torch {torch.__version__}, "
             f"{datetime.date.today()})")
    return f"{title}\n\n{table(head, lines)}"


def is_product(lesson): return lesson.name.startswith("product")


def kind(lesson):
    """What a lesson computes, in words."""
    if is_product(lesson):
        return "product"
    return "both ways" if lesson.name == "quantize_4" else "forward"


def timing(lesson, ms, work, limit):
    """The cells of a time: ms, its rate, and the share of the limit, if there is one."""
    rate = 1000 * work / ms
    words = f"{rate:,.1f} TFLOP/s" if is_product(lesson) else f"{rate:,.0f} GB/s"
    return f"{ms:.3f}", words, share(rate / limit) if limit else ""


def main(argv):
    args = parse(argv)
    try:
        library, lessons = load()
    except (ValueError, RuntimeError, OSError) as reason:
        print("lessons:", reason, file=sys.stderr)
        return 2
    build()
    text = report(measure(library, lessons), *limits())
    print(text)
    if args.write:
        rewrite(README, text, "lessons")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
