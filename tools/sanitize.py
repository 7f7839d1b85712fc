"""
Every kernel on small ugly shapes, under NVIDIA's compute-sanitizer: bad addresses, races, memory read before written.

    make sanitize

First an error is planted, which memcheck and initcheck have to report; then every call must be clean. Only our kernels are
watched. Inputs are made on the CPU and outputs copied back to it: no kernel of torch writes what one of ours reads, and
initcheck sees an output that was not written whole. Not of Hopper's product, whose outputs TMA stores: with those
initcheck came to no end. test_kernels.py has it write into memory full of NaN.
"""
import glob, itertools, os, shutil, subprocess, sys, time
import torch

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, ".."))
import fp4
from fp4 import product, reference

ops = torch.ops.fp4
SHAPES = [(1, 32), (33, 160), (100, 544), (3, 1056)]
MANY_TILES = (300, 17000 // 32 * 32)                           # so wide that a block of threads of the backward quantisers takes three
OPTIONS = {"memcheck": ["--padding", "4096"], "racecheck": [], "initcheck": []}     # so that overruns hit no neighbour
PLANTED = {"memcheck": "Invalid __global__", "initcheck": "Uninitialized __global__"}
TMA = {"gemm", "quantize_gemm", "gemm_unrotate"}              # where the product is gemm_sm90.cu
NO_KERNEL = {"draw", "uniform", "mm_fp8"}                   # ops that are written in PyTorch


def operand(M, K, right=False):
    """any operand of the GPU's own product: codes and scale tiles, or FP8 tiles and their scales"""
    m, k = -(-M // 128), -(-K // 128)
    if product.FORMAT == "mxf4": return [torch.randint(256, shape, dtype=torch.uint8) for shape in ((M, K // 2), (m * k * 512,))]
    return torch.randint(256, (m, k, 128 * 128), dtype=torch.uint8), torch.rand(m, k, 4 if right else 128)


def calls(M, K, dtype):
    """op and its arguments, on the CPU"""
    x = torch.randn(M, K).to(dtype)
    codes, scales, mask = reference.quantize_forward(x, "floor")
    signs, seeds = reference.draw(x, x, 3)
    for scale in ("floor", "nearest"): yield "quantize_forward", (x, scale)
    for stochastic, turn, format in itertools.product((False, True), ("before", "after", "none"), ("packed", "fp8", "mxf4")):
        yield "quantize_backward", (x, signs, seeds[:2], stochastic, turn, turn, format)
        yield "requantize", (codes, scales, signs, seeds[2:], stochastic, turn, format)
    for out in (torch.float32, torch.bfloat16):
        yield "dequantize", (codes, scales, out)
        yield "unrotate", (x, mask, out)
        if product.FORMAT != "packed":                          # else a library multiplies
            for N in (32, 4096): yield "gemm_unrotate", (*operand(M, N), *operand(K, N, True), mask, 16 / 9, out)       # 4096: split
    if product.FORMAT != "packed":
        w = reference.quantize_forward(torch.randn(96, K), "floor")[:2]
        yield "gemm", (codes, scales, *w, 16 / 9, torch.float32)
        yield "quantize_gemm", (x, "floor", *w)
    yield "fold", (codes, scales, 16 / 9)


def run(tool, planted):
    """every call, or one with the error that this tool has to report"""
    to = lambda args: [a.cuda() if isinstance(a, torch.Tensor) else a for a in args]
    if planted and tool == "memcheck":
        x = torch.randn(64, 1024).cuda()
        x.untyped_storage().resize_(4096)                       # 64 rows, memory for one
        ops.quantize_forward(x, "floor")
    if planted and tool == "initcheck":
        ops.quantize_forward(torch.empty(64, 1024, device="cuda"), "floor")
    for M, K in (*SHAPES, MANY_TILES) if not planted else ():
        for dtype in (torch.float32, torch.bfloat16):
            for name, args in calls(M, K, dtype):
                if tool == "initcheck" and product.FORMAT == "fp8" and name in TMA: continue
                if (M, K) == MANY_TILES and (name not in ("quantize_backward", "requantize") or "before" not in args): continue
                out = getattr(ops, name)(*to(args))
                for t in out if isinstance(out, tuple | list) else [out]: t.cpu()
    torch.cuda.synchronize()


def watch(sanitizer, tool, planted=False):
    """run this file under the tool; is it clean, and what was said"""
    files = [os.path.basename(path).replace(".", "_") for path in glob.glob(os.path.join(HERE, "..", "fp4", "*.cu"))]
    ours = [word for name in files for word in ("--kernel-name", f"kernel_substring={name}")]       # of unnamed namespaces
    done = subprocess.run(
        [sanitizer, "--tool", tool, *OPTIONS[tool], "--error-exitcode", "1", "--report-api-errors", "no",
         "--target-processes", "application-only", *ours, sys.executable, __file__, "--under", tool, *["planted"] * planted],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})                  # each tensor its own allocation
    return done.returncode == 0 and "SUMMARY: 0 " in done.stdout, done.stdout


def main():
    path = os.environ["PATH"] + ":/usr/local/cuda/bin:/usr/local/cuda/compute-sanitizer"
    sanitizer = shutil.which("compute-sanitizer", path=path)
    problem = ("torch sees no GPU here" if not torch.cuda.is_available() else
               "there is no compute-sanitizer here; it comes with the CUDA toolkit" if not sanitizer else
               "the kernels did not build" if fp4.build().startswith("reference") else None)
    if problem:
        print(f"sanitize: {problem}", file=sys.stderr)
        return 2
    for tool, word in PLANTED.items():
        said = watch(sanitizer, tool, planted=True)[1]
        if word not in said:
            print(f"{said}\nsanitize: {tool} misses a planted error, so what it says would prove nothing", file=sys.stderr)
            return 1
        print(f"{tool} reports the planted error", flush=True)
    failed = False
    for tool in OPTIONS:
        start = time.time()
        clean, said = watch(sanitizer, tool)
        print(f"{tool}: {'clean' if clean else said}, {time.time() - start:.0f} s", flush=True)
        failed |= not clean
    return int(failed)


if __name__ == "__main__":
    if "--under" in sys.argv:
        fp4.build()
        run(sys.argv[2], "planted" in sys.argv)
    else: sys.exit(main())
