"""
Run every kernel on small ugly shapes under NVIDIA's compute-sanitizer, which reports bad addresses,
races, and memory that is read before it is written.

    make sanitize                                   # or python -m tools.sanitize

First an error is planted, which memcheck and initcheck have to report; then every call must be
clean. Only our kernels are watched. Inputs are made on the CPU and outputs are copied back to it,
so no kernel of torch writes what one of ours reads, and initcheck sees an output that was not
written in full. It does not watch Hopper's GEMM, whose outputs TMA stores: with those initcheck
came to no end. test_kernels.py has that GEMM write into memory full of NaN instead.
"""
import itertools
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))                   # python tools/sanitize.py has to find fp4, too

from data.files import check
from tools import cli


def parse(argv):
    parser = cli.Parser("python -m tools.sanitize", __doc__)
    parser.add_argument("--under", metavar="TOOL",
                        help="what the watched process does; it is started by itself")
    parser.add_argument("--planted", action="store_true", help="and whether it makes an error")
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli.start(parse, "sanitize", "tools.sanitize")

import torch

import fp4
from fp4 import reference
from fp4.emulate import columns
from fp4.ops import OPERAND_FORMATS, SCALES, SIGN_ORDERS

SHAPES = [(1, 32), (33, 160), (100, 544), (3, 1056)]
# This one is so wide that a CUDA block of the backward quantisers takes three tiles.
MANY_TILES = (300, 17000 // 32 * 32)
TOOLS = {
    "memcheck": ["--padding", "4096"],          # so that overruns hit no neighbour
    "racecheck": [],
    "initcheck": [],
}
PLANTED = {"memcheck": "Invalid __global__", "initcheck": "Uninitialized __global__"}
# Where the GEMM is gemm_sm90.cu.
USES_TMA = {"gemm", "quantize_gemm", "gemm_unrotate", "gemm_operands"}
# Ops that are written in PyTorch.
NO_KERNEL = {"draw", "words", "uniform", "mm_fp8", "quantize_gemm_stored"}
FLOOR = SCALES.index("floor")                   # an op takes the numbers of words
BEFORE = SIGN_ORDERS.index("before")
TILES = (columns.FORMATS.index("fp8_left"), columns.FORMATS.index("fp8_right"))
ALPHA = 16 / 9
# Rows whose quantisers, compiled for their columns alone, use all kernels of quantize_columns.cu.
COLUMN_ROWS = [fp4.RECIPES["quartet2"], fp4.RECIPES["nvfp4"],
               fp4.recipe("fp4", rotation="64", rounding="eden")]


# ---- what is called

def operand(M, K, operand_format, is_right=False):
    """Returns a random operand of the GPU's own GEMM: values and scales in its format."""
    tiles_down = (M + 127) // 128
    tiles_across = (K + 127) // 128
    if operand_format == "mxf4":
        codes = torch.randint(256, (M, K // 2), dtype=torch.uint8)
        scales = torch.randint(256, (tiles_down * tiles_across * 512,), dtype=torch.uint8)
        return codes, scales
    values = torch.randint(256, (tiles_down, tiles_across, 128 * 128), dtype=torch.uint8)
    return values, torch.rand(tiles_down, tiles_across, 4 if is_right else 128)


def calls(M, K, dtype, operand_format):
    """Yields ops by name, with their arguments on the CPU.

    operand_format is the backend's; if it is "packed" the GEMM is a library's and not called.
    """
    x = torch.randn(M, K).to(dtype)
    codes, scales, mask = reference.quantize_forward(x, "floor")
    for scale in range(len(SCALES)):
        yield "quantize_forward", (x, scale)
    yield from backward_calls(x, codes, scales)
    for out_dtype in (torch.float32, torch.bfloat16):
        yield "dequantize", (codes, scales, out_dtype)
        yield "unrotate", (x, mask, out_dtype)
        yield "matvec", (codes[:8], scales[:8], codes, scales, out_dtype)
    if operand_format != "packed":
        yield from gemm_calls(x, codes, scales, mask, operand_format)
    yield "packed_to_fp8", (codes, scales, ALPHA)


def backward_calls(x, codes, scales):
    signs, seeds = reference.draw(x, x, 3)
    orders = range(len(SIGN_ORDERS))
    formats = range(len(OPERAND_FORMATS))
    for variant in itertools.product((False, True), orders, formats):
        stochastic, order, operand_format = variant
        yield "quantize_backward", (x, signs, seeds[:2], stochastic, order, order, operand_format)
        yield "requantize_transposed", (codes, scales, signs, seeds[2:], *variant)


def gemm_calls(x, codes, scales, mask, operand_format):
    M, K = x.shape
    for out_dtype in (torch.float32, torch.bfloat16):
        for inner in (32, 4096):                # with 4096 Hopper's GEMM splits the sum
            a = operand(M, inner, operand_format)
            b = operand(K, inner, operand_format, is_right=True)
            yield "gemm_unrotate", (*a, *b, mask, ALPHA, out_dtype)
            yield "gemm_operands", (*a, *b, M, K, ALPHA, out_dtype)
    w_codes, w_scales, _ = reference.quantize_forward(torch.randn(96, K), "floor")
    yield "gemm", (codes, scales, w_codes, w_scales, ALPHA, torch.float32)
    yield "quantize_gemm", (x, FLOOR, w_codes, w_scales)


def column_calls(M, K, dtype):
    """Yields the ops of COLUMN_ROWS, with their arguments on the CPU."""
    x = torch.randn(M, K).to(dtype)
    words = torch.randint(-2 ** 63, 2 ** 63 - 1, (3,))
    random = words.split((2, 1))                # the signs, and a seed
    by_row = torch.rand(M, 1)
    product = columns.pad_to_blocks(x, COLUMN_ROWS[0].dgrad)
    mask = torch.randint(2 ** 31, (M, product.shape[1] // 32), dtype=torch.int32)
    packed = reference.quantize_forward(x, "floor")[:2]
    for row in COLUMN_ROWS:
        columns.prepare(row)
        for spec, square in columns.quantizers_of(row):
            ops = columns.ops[columns.columns_name(spec, square)]
            for out_dtype in (dtype, torch.uint8) if spec.is_packed else (dtype,):
                yield ops.quantize, (x, None, None, *random, False, out_dtype)
                yield ops.quantize, (x, None, by_row, *random, True, out_dtype)
                if not square:
                    yield ops.quantize, (*packed, by_row, *random, True, out_dtype)
            yield ops.unrotate, (product, by_row, by_row[:1], mask, random[0], torch.float32)


def tile_calls(M, K, dtype):
    """Yields those of them that write FP8 tiles, which only a GPU does."""
    x = torch.randn(M, K).to(dtype)
    random = torch.randint(-2 ** 63, 2 ** 63 - 1, (3,)).split((2, 1))
    for row in COLUMN_ROWS:
        for spec, square in columns.quantizers_of(row):
            quantize = columns.ops[columns.columns_name(spec, square)].quantize
            for operand_format in TILES if spec.is_packed else ():
                yield quantize, (x, None, None, *random, True, torch.uint8, operand_format)


# ---- in the process that is watched

def plant_error(tool):
    """Makes the error that the tool has to report."""
    if tool == "memcheck":
        x = torch.randn(64, 1024).cuda()
        x.untyped_storage().resize_(4096)       # 64 rows, but memory for one
    else:
        x = torch.empty(64, 1024, device="cuda")
    torch.ops.fp4.quantize_forward(x, FLOOR)


def call_everything(tool, operand_format):
    for M, K in (*SHAPES, MANY_TILES):
        for dtype in (torch.float32, torch.bfloat16):
            for name, arguments in calls(M, K, dtype, operand_format):
                if is_skipped(tool, operand_format, (M, K), name, arguments):
                    continue
                call_on_gpu(getattr(torch.ops.fp4, name), arguments)
    for M, K in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            for op, arguments in (*column_calls(M, K, dtype), *tile_calls(M, K, dtype)):
                call_on_gpu(op, arguments)


def call_on_gpu(op, arguments):
    on_gpu = [a.cuda() if isinstance(a, torch.Tensor) else a for a in arguments]
    results = op(*on_gpu)
    if isinstance(results, torch.Tensor):
        results = [results]
    for tensor in results:
        tensor.cpu()


def is_skipped(tool, operand_format, shape, name, arguments):
    if tool == "initcheck" and operand_format == "fp8" and name in USES_TMA:
        return True
    if shape != MANY_TILES:
        return False
    if name not in ("quantize_backward", "requantize_transposed"):
        return True
    sign_order = arguments[-2]
    return sign_order != BEFORE


def run_under(tool, is_planted):
    """Does the work of the process that compute-sanitizer watches."""
    operand_format = fp4.build().operand_format
    if is_planted:
        plant_error(tool)
    else:
        call_everything(tool, operand_format)
    torch.cuda.synchronize()


# ---- in the process that watches

def watch(sanitizer, tool, planted=False):
    """Runs this file under the tool. Returns whether it is clean, and the output."""
    only_ours = []
    for path in ROOT.glob("fp4/kernels/*.cu"):
        # The name of a kernel in an unnamed namespace contains the name of its file.
        only_ours += ["--kernel-name", f"kernel_substring={path.name.replace('.', '_')}"]
    mode = ["--planted"] if planted else []
    # Each tensor gets an allocation of its own.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    process = subprocess.run(
        [sanitizer, "--tool", tool, *TOOLS[tool], "--error-exitcode", "1",
         "--report-api-errors", "no", "--target-processes", "application-only", *only_ours,
         sys.executable, "-m", "tools.sanitize", "--under", tool, *mode],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=environment)
    is_clean = process.returncode == 0 and "SUMMARY: 0 " in process.stdout
    return is_clean, process.stdout


def check_it_can_run(sanitizer):
    """Raises UserError if something is missing."""
    check(torch.cuda.is_available(), "torch sees no GPU here")
    check(sanitizer, "there is no compute-sanitizer here; it comes with the CUDA toolkit")
    check(fp4.build().is_compiled, "the kernels did not build")


def main(argv):
    args = parse(argv)
    if args.under:
        run_under(args.under, args.planted)
        return 0
    path = os.environ["PATH"] + ":/usr/local/cuda/bin:/usr/local/cuda/compute-sanitizer"
    sanitizer = shutil.which("compute-sanitizer", path=path)
    check_it_can_run(sanitizer)
    for tool, report in PLANTED.items():
        _, output = watch(sanitizer, tool, planted=True)
        if report not in output:
            print(output, file=sys.stderr)
            print(f"sanitize: {tool} misses a planted error, so what it says would prove nothing",
                  file=sys.stderr)
            return 1
        print(f"{tool} reports the planted error", flush=True)
    failed = False
    for tool in TOOLS:
        start = time.time()
        is_clean, output = watch(sanitizer, tool)
        outcome = "clean" if is_clean else output
        print(f"{tool}: {outcome}, {time.time() - start:.0f} s", flush=True)
        failed |= not is_clean
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(cli.run(main, sys.argv[1:], "sanitize", go_on=""))
