"""
On a Blackwell GPU: run every test of the FP4 GEMMs with the real instructions, time them, and write
blackwell_report.md, ready to be attached to an issue. Anywhere: print what the datasheets promise.

    make blackwell-report                           # or python -m tools.blackwell_report
    python -m tools.blackwell_report --predict

torch is imported only where a GPU is needed, so that --predict answers at once.
"""
import datetime
import os
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))           # python tools/blackwell_report.py has to find fp4, too

from data.files import check
from tools import cli

# M, N, K
SHAPES = [
    (16384, 4096, 4096),
    (16384, 11008, 4096),
    (16384, 4096, 11008),
    (4096, 4096, 16384),
    (32768, 2048, 2048),
    (32768, 640, 640),
]


class Datasheet(NamedTuple):
    """Dense TFLOP/s with FP32 sums, and TB/s of memory, as the vendor publishes them."""
    fp4: float
    fp8: float
    bf16: float
    bandwidth: float


# FP8 and BF16 with FP32 sums run at half rate on GeForce.
GPUS = {
    "B200": Datasheet(9000, 4500, 2250, 8.0),
    "RTX 5090": Datasheet(1676, 419, 209.5, 1.79),
    "RTX PRO 6000": Datasheet(2015, 1008, 504, 1.79),
}


# ---- predictions

def predict(datasheet, M, N, K):
    """Predicts a product [M, K] x [K, N] -> BF16 in FP4, FP8 and BF16.

    Returns three pairs of milliseconds: of the operations at the peak rate, and of the bytes, each
    read or written once. An FP4 number has 4.25 bits, its share of the block's scale included.
    """
    times = []
    for rate, bits in ((datasheet.fp4, 4.25), (datasheet.fp8, 8), (datasheet.bf16, 16)):
        moved = (M + N) * K * bits / 8 + 2 * M * N
        times.append((2e-9 * M * N * K / rate, moved / datasheet.bandwidth / 1e9))
    return times


def prediction_table():
    """Returns the lines of a Markdown table; a star marks a time that the bytes determine."""
    formats = " | ".join(f"{gpu}: FP4 | FP8 | BF16" for gpu in GPUS)
    lines = [
        "predicted, not measured: ms of a product [M, K] x [K, N] -> BF16, operands ready, at",
        "datasheet rates: of its operations, or (*) of its bytes",
        "",
        f"| M, N, K | {formats} |",
        "|---" * (1 + 3 * len(GPUS)) + "|",
    ]
    for shape in SHAPES:
        cells = [", ".join(map(str, shape))]
        for datasheet in GPUS.values():
            for compute, memory in predict(datasheet, *shape):
                star = "*" if memory > compute else ""
                cells.append(f"{max(compute, memory):.3f}{star}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


# ---- measurements

def time_or_error(f):
    """Returns the milliseconds of f as text, or the first line of what the library said."""
    from tools.bench import gpu_milliseconds
    try:
        return f"{gpu_milliseconds(f):.3f}"
    except RuntimeError as error:
        return str(error).splitlines()[0][:60]


def time_own(library, M, N, K):
    """Times the GEMM of ours and checks 64 rows of its result against the definition.

    Returns milliseconds, whether the rows are equal, and the operands: codes and scales of a and b.
    """
    import torch
    from fp4 import reference
    from test_blackwell import packed
    from tools.bench import gpu_milliseconds

    a, a_scales = packed(M, K, 127, 127)
    b, b_scales = packed(N, K, 127, 127)
    a_tiles = library.swizzle(a_scales)
    b_tiles = library.swizzle(b_scales)
    out = torch.empty(M, N, device="cuda", dtype=torch.bfloat16)

    def multiply():
        library.call("gemm", a, a_tiles, b, b_tiles, M, N, K, 1.0, out, True)

    milliseconds = gpu_milliseconds(multiply)
    rows = torch.randint(M, (64,), device="cuda")
    expected = reference.gemm(a[rows], a_scales[rows], b, b_scales, 1.0, torch.bfloat16)
    return milliseconds, torch.equal(out[rows], expected), (a, a_scales, b, b_scales)


def time_library(M, N, K, operands):
    """Times the library's products in NVFP4, FP8 and BF16, in this order; the last is a number."""
    import torch
    from fp4.backend import gemm_on_nvfp4
    from tools.bench import gpu_milliseconds

    x = torch.randn(M, K, device="cuda", dtype=torch.bfloat16)
    y = torch.randn(N, K, device="cuda", dtype=torch.bfloat16)
    x_fp8 = x.to(torch.float8_e4m3fn)
    y_fp8 = y.to(torch.float8_e4m3fn)
    scale = torch.ones((), device="cuda")

    def multiply_fp8():
        return torch._scaled_mm(x_fp8, y_fp8.T, scale, scale, out_dtype=torch.bfloat16)

    bf16 = gpu_milliseconds(lambda: x @ y.T)
    fp8 = time_or_error(multiply_fp8)
    nvfp4 = time_or_error(lambda: gemm_on_nvfp4(*operands, 1.0, torch.bfloat16))
    return nvfp4, fp8, bf16


def speed_table(kernel):
    """Returns the lines of a Markdown table: our GEMM beside the library's NVFP4, FP8 and BF16."""
    sys.path.insert(0, str(ROOT / "tests"))
    import test_blackwell

    lines = [
        "| M, N, K | FP4, own | TFLOP/s | equal | FP4, library | FP8 | BF16 | FP4, own / BF16 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.so")
        library = test_blackwell.Library(test_blackwell.compile_gemm(kernel, path))
        for M, N, K in SHAPES:
            own, is_equal, operands = time_own(library, M, N, K)
            nvfp4, fp8, bf16 = time_library(M, N, K, operands)
            cells = [
                f"{M}, {N}, {K}",
                f"{own:.3f}",
                f"{2e-9 * M * N * K / own:.0f}",
                "yes" if is_equal else "**no**",
                nvfp4,
                fp8,
                f"{bf16:.3f}",
                f"{own / bf16:.2f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


# ---- the report

def run_tests():
    """Runs tests/test_blackwell.py; returns whether it passed, and the last lines of its output."""
    process = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rfEs", "--tb=short", "tests/test_blackwell.py"],
        cwd=ROOT, capture_output=True, text=True)
    return process.returncode == 0, process.stdout.splitlines()[-60:]


def output_of(*command):
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return process.stdout.strip()


def describe_machine():
    """Returns one line: date, GPU, driver, versions, commit."""
    import torch

    from tools.run import git_commit

    drivers = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    driver = " ".join(drivers.splitlines()[:1])
    compiler = re.findall("release [0-9.]+", output_of("nvcc", "--version"))
    return (f"{datetime.date.today()}, compute capability {torch.cuda.get_device_capability()}, "
            f"driver {driver}, torch {torch.__version__}, {compiler}, {platform.platform()}, "
            f"commit {git_commit()}")


def write_report(kernel):
    """Tests and times the kernel, writes blackwell_report.md; returns whether the tests passed."""
    import torch

    passed, output = run_tests()
    report = [
        f"# {kernel}.cu on {torch.cuda.get_device_name()}",
        "",
        describe_machine(),
        "",
        f"## Tests: {'passed' if passed else 'FAILED'}",
        "",
        "```",
        *output,
        "```",
        "",
        "## Speed, ms",
        "",
        *speed_table(kernel),
        "",
        "The library's time includes converting and arranging the scales; ours has them ready.",
        "",
        *prediction_table(),
        "",
    ]
    (ROOT / "blackwell_report.md").write_text("\n".join(report))
    print("\n".join(report))
    return passed


def parse(argv):
    parser = cli.Parser("python -m tools.blackwell_report", __doc__)
    parser.add_argument("--predict", action="store_true",
                        help="print what the datasheets promise, and measure nothing")
    return parser.parse_args(argv)


def main(argv):
    if parse(argv).predict:
        print("\n".join(prediction_table()))
        return 0
    import torch

    name = "none"
    major = 0
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        major = torch.cuda.get_device_capability()[0]
    kernel = {10: "gemm_sm100", 12: "gemm_sm120"}.get(major)
    check(kernel, "this needs a Blackwell GPU (compute capability 10 or 12); "
                  f"torch sees {name}")
    return 0 if write_report(kernel) else 1


if __name__ == "__main__":
    sys.exit(cli.run(main, sys.argv[1:], "blackwell-report", go_on=""))
