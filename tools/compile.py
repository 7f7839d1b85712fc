"""
Compile every kernel for every GPU that it is meant for: `make compile`. Needs nvcc, but no GPU
and no torch. Nothing is kept: this shows that the sources compile without a warning.
"""
import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fp4.build import column_flags
from fp4.recipes import EDEN, SQUARE_46, STOCHASTIC
from fp4.toolchain import NVCC_FLAGS, find_nvcc, gencode

ROOT = Path(__file__).resolve().parent.parent
# A kernel whose name ends in an architecture is for that one; any other is for all of these.
EVERY_GPU = ("75", "80", "89", "90", "90a", "100", "100a", "120", "120a")
BY_ARCHITECTURE = {"sm90": ("90a",), "sm100": ("100a", "103a"), "sm120": ("120a", "121a")}
LESSONS = {"product_3": ("89", "90a", "120a"), "product_4": ("90a",)}
EVERY_LESSON = ("75", "90a", "120a")    # any other
# quantize_columns.cu is compiled for one GemmSpec at a time: for every GPU for that which uses the
# most of it, and for one GPU for others that use the rest.
COLUMN_FLAGS = column_flags(EDEN, False)
OTHER_COLUMN_FLAGS = {"90a": [column_flags(SQUARE_46, True), column_flags(STOCHASTIC, False)]}


def main(argv):
    argparse.ArgumentParser("compile", description=__doc__).parse_args(argv)    # only --help
    try:
        nvcc = find_nvcc()
    except RuntimeError as error:
        print("compile:", error, file=sys.stderr)
        return 2
    paths = [*ROOT.glob("fp4/kernels/*.cu"), *ROOT.glob("fp4/kernels/lessons/[!e]*.cu")]
    jobs = [(nvcc, path, gpu, flags) for path in sorted(paths) for gpu in gpus_of(path)
            for flags in flags_of(path, gpu)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(compile_kernel, jobs))
    return 0 if all(results) else 1


def gpus_of(path):
    """The GPUs that a .cu is for."""
    if path.parent.name == "lessons":
        return LESSONS.get(path.stem, EVERY_LESSON)
    return BY_ARCHITECTURE.get(path.stem.split("_")[-1], EVERY_GPU)


def flags_of(path, gpu):
    """The flags with which a .cu is compiled for a GPU, once with each item."""
    if path.stem != "quantize_columns":
        return [()]
    return [COLUMN_FLAGS, *OTHER_COLUMN_FLAGS.get(gpu, [])]


def compile_kernel(job):
    nvcc, path, gpu, flags = job
    name = path.relative_to(ROOT)
    start = time.perf_counter()
    command = [nvcc, *NVCC_FLAGS, *flags, "-Werror", "all-warnings", gencode(gpu),
               "-c", str(name), "-o", os.devnull]
    succeeded = subprocess.run(command, cwd=ROOT).returncode == 0
    outcome = f"{time.perf_counter() - start:.0f} s" if succeeded else "failed"
    print(f"{name} for sm_{gpu}: {outcome}", flush=True)
    return succeeded


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
