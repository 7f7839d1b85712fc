"""
On a Blackwell GPU: run every test of the FP4 products with the real instructions, time them, and write blackwell_report.md,
ready to be attached to an issue. Anywhere: what the datasheets promise.

    make blackwell-report                           # or python tests/blackwell_report.py
    python tests/blackwell_report.py --predict
"""
import datetime, os, pathlib, platform, re, statistics, subprocess, sys, tempfile
import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
SHAPES = [(16384, 4096, 4096), (16384, 11008, 4096), (16384, 4096, 11008), (4096, 4096, 16384), (32768, 2048, 2048), (32768, 640, 640)]
# dense TFLOP/s with FP32 sums in FP4, FP8 and BF16, and TB/s, as the vendor publishes them; FP8 and BF16 run at half rate on GeForce
GPUS = {"B200": (9000, 4500, 2250, 8.0), "RTX 5090": (1676, 419, 209.5, 1.79), "RTX PRO 6000": (2015, 1008, 504, 1.79)}


def predict(gpu, M, N, K):
    """of a product in FP4, FP8, BF16: ms of its operations at the peak rate, and of its bytes, read and written once"""
    *rates, bandwidth = GPUS[gpu]
    return [(2e-9 * M * N * K / rate, ((M + N) * K * bits / 8 + 2 * M * N) / bandwidth / 1e9) for rate, bits in zip(rates, (4.25, 8, 16))]


def predicted():
    lines = ["predicted, not measured: ms of a product [M, K] x [K, N] -> BF16, operands ready, at datasheet rates: of its operations, or (*) of its bytes", "",
             "| M, N, K | " + " | ".join(f"{gpu}: FP4 | FP8 | BF16" for gpu in GPUS) + " |", "|---" * (1 + 3 * len(GPUS)) + "|"]
    for shape in SHAPES:
        times = [f"{max(pair):.3f}" + "*" * (pair[1] > pair[0]) for gpu in GPUS for pair in predict(gpu, *shape)]
        lines.append(f"| {', '.join(map(str, shape))} | {' | '.join(times)} |")
    return lines


def milliseconds(f, n=30):
    for _ in range(3): f()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(n)]
    for start, stop in events: start.record(), f(), stop.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(stop) for start, stop in events)


def attempt(f):
    """ms and TFLOP, or what the library said"""
    try: return f"{milliseconds(f):.3f}"
    except RuntimeError as error: return str(error).splitlines()[0][:60]


def bench(kernel):
    """the product of the folder against BF16, FP8 and the library's NVFP4; a part of each result is checked against the definition"""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import test_blackwell as tests
    from fp4 import nvfp4, reference
    lines = ["| M, N, K | FP4, own | TFLOP/s | equal | FP4, library | FP8 | BF16 | FP4, own / BF16 |", "|---|---|---|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        library = tests.Library(tests.build(kernel, os.path.join(folder, "kernel.so")))
        for M, N, K in SHAPES:
            a, b = tests.packed(M, K, 127, 127), tests.packed(N, K, 127, 127)
            tiles, out = [library.swizzle(scales) for scales in (a[1], b[1])], torch.empty(M, N, device="cuda", dtype=torch.bfloat16)
            own = milliseconds(lambda: library.call("gemm", a[0], tiles[0], b[0], tiles[1], M, N, K, 1.0, out, True))
            some = torch.randint(M, (64,), device="cuda")
            equal = torch.equal(out[some], reference.gemm(a[0][some], a[1][some], *b, 1.0, torch.bfloat16))
            x, y = torch.randn(M, K, device="cuda", dtype=torch.bfloat16), torch.randn(N, K, device="cuda", dtype=torch.bfloat16)
            one = torch.ones((), device="cuda")
            x8, y8 = x.to(torch.float8_e4m3fn), y.to(torch.float8_e4m3fn)
            sixteen = milliseconds(lambda: x @ y.T)
            eight = attempt(lambda: torch._scaled_mm(x8, y8.T, one, one, out_dtype=torch.bfloat16))
            nv = attempt(lambda: nvfp4.gemm(*a, *b, 1.0, torch.bfloat16))
            lines.append(f"| {M}, {N}, {K} | {own:.3f} | {2e-9 * M * N * K / own:.0f} | {'yes' if equal else '**no**'} | {nv} | {eight} | {sixteen:.3f} | {own / sixteen:.2f} |")
    return lines


def tests():
    """what pytest says of tests/test_blackwell.py"""
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-rfEs", "--tb=short", "tests/test_blackwell.py"], cwd=ROOT, capture_output=True, text=True)
    return done.returncode == 0, done.stdout.splitlines()[-60:]


def main():
    if "--predict" in sys.argv:
        print("\n".join(predicted()))
        return
    major = torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else 0
    if major not in (10, 12):
        print(f"blackwell-report: this needs a Blackwell GPU (compute capability 10 or 12); torch sees {torch.cuda.get_device_name() if major else 'none'}", file=sys.stderr)
        sys.exit(2)
    kernel = {10: "gemm_sm100", 12: "gemm_sm120"}[major]
    output = lambda *command: subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    driver = output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()[:1]
    passed, said = tests()
    report = [f"# {kernel}.cu on {torch.cuda.get_device_name()}", "",
              f"{datetime.date.today()}, compute capability {torch.cuda.get_device_capability()}, driver {' '.join(driver)}, torch {torch.__version__}, "
              f"{re.findall('release [0-9.]+', output('nvcc', '--version'))}, {platform.platform()}, commit {output('git', 'describe', '--always', '--dirty')}", "",
              f"## Tests: {'passed' if passed else 'FAILED'}", "", "```", *said, "```", "", "## Speed, ms", "", *bench(kernel), "",
              "The library's time includes converting and arranging the scales; ours has them ready.", "", *predicted(), ""]
    (ROOT / "blackwell_report.md").write_text("\n".join(report))
    print("\n".join(report))
    sys.exit(not passed)


if __name__ == "__main__":
    main()
