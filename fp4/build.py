"""
Compiles the kernels for the machine at hand, once, into fp4/build/. Without a compiler the
definition runs.

torch is imported inside the functions, so that `import fp4` stays cheap.
"""
import contextlib
import fcntl
import os
import sys

from .check import check

HERE = os.path.dirname(os.path.abspath(__file__))
KERNELS = os.path.join(HERE, "kernels")
CPU_SOURCES = ("bind.cpp", "cpu.cpp")
CUDA_SOURCES = ("quantize.cu", "elementwise.cu", "fp8_tiles.cu")

loaded = {}             # the gemm and the Backend of this process: the kernels load only once


def build(gemm="fp8"):
    """Loads the kernels, compiled if they are not yet, and returns the Backend that runs.

    The first call prints one line that says which implementation runs; later calls return the same.
    gemm chooses the product on Blackwell (backend.py). Raises ValueError when the kernels are
    loaded with another gemm already, because ops cannot be registered twice.
    """
    if not loaded:
        loaded[gemm] = load_or_fall_back(gemm)
        print("fp4 runs", loaded[gemm].description, file=sys.stderr)
    check(gemm in loaded, f"gemm {gemm!r} comes too late: this process has loaded the kernels for "
                          f"gemm {', '.join(loaded)}")
    return loaded[gemm]


def load_or_fall_back(gemm):
    from .backend import Backend

    try:
        return load_kernels(gemm)
    except (OSError, RuntimeError, ImportError) as error:   # no compiler, no ninja, no disk, ...
        reason = str(error).splitlines()[0]
        return Backend("reference.py, which is slow, because the kernels did not build: " + reason,
                       is_compiled=False)


def load_kernels(gemm):
    import torch
    from .backend import select_backend
    from .ops import library            # the schemas of the ops have to be there before the kernels

    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    backend = select_backend(capability, gemm)
    sources = CPU_SOURCES
    flags = backend.flags
    if capability is not None:
        sources = (*CPU_SOURCES, *CUDA_SOURCES, *backend.sources)
        flags = ("-DUSE_CUDA", *backend.flags)
    compile_and_load(sources, flags, backend.target)
    if backend.gemm is not None:
        library.impl("gemm", backend.gemm, "CUDA")
    return backend


def compile_and_load(sources, flags, target=""):
    """Compiles files of kernels/ into one library and loads it, which registers its ops."""
    from torch.utils import cpp_extension       # here, because it looks for CUDA and warns

    folder = os.path.join(HERE, "build")
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "flock"), "w") as lock:
        # One process builds and the others wait. torch has a lock of its own, a file: what a
        # killed process left of it must not block torch.
        fcntl.flock(lock, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(folder, "lock"))
        # ninja lies beside this Python when it was installed with pip.
        bin_folder = os.path.dirname(sys.executable)
        os.environ["PATH"] = bin_folder + os.pathsep + os.environ["PATH"]
        cpp_extension.load(
            "fp4_kernels",
            [os.path.join(KERNELS, source) for source in sources],
            build_directory=folder,
            is_python_module=False,
            extra_include_paths=[KERNELS],
            # A fused multiply-add would round differently from the definition.
            extra_cflags=["-O3", "-march=native", "-ffp-contract=off", *flags],
            extra_cuda_cflags=["-O3", "-fmad=false",
                               f"-gencode=arch=compute_{target},code=sm_{target}"],
        )
