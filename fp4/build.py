"""
Compiles the kernels for the machine at hand, once, and loads them: torch.utils.cpp_extension.load.
Without a compiler the definition runs.

A library lies in a folder of fp4/build/, or of a cache of the user's if that cannot be written. The
folder's name has a digest of all that the library depends on, and beside it lies a checksum of its
bytes, because a library that is made for another processor, or is cut off, kills the process that
loads it. Where a whole one lies, nothing else is needed to load it, neither ninja nor a compiler.

torch is imported inside the functions, so that `import fp4` stays cheap.
"""
import contextlib
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from . import toolchain
from .check import check

HERE = os.path.dirname(os.path.abspath(__file__))
KERNELS = os.path.join(HERE, "kernels")
CPU_SOURCES = ("bind.cpp", "cpu.cpp")
CUDA_SOURCES = ("quantize.cu", "elementwise.cu", "matvec.cu", "fp8_tiles.cu")
COLUMN_CPU_SOURCES = ("columns_bind.cpp", "columns_cpu.cpp")        # of a GemmSpec: load_columns()
COLUMN_CUDA_SOURCES = ("quantize_columns.cu",)
SOURCE_SUFFIXES = (".cpp", ".cu", ".cuh", ".h")
CHECKSUM = ".sha256"                    # what is added to the path of a library for its checksum

loaded = {}             # the gemm and the Backend of this process: the kernels load only once


def build(gemm="auto"):
    """Loads the kernels, compiled if they are not yet, and returns the Backend that runs.

    The first call prints one line that says which implementation runs; later calls return the same.
    gemm chooses the product of a GPU (backend.py). Raises ValueError when the kernels are
    loaded with another gemm already, because ops cannot be registered twice.
    """
    if not loaded:
        loaded[gemm] = load_or_fall_back(gemm)
        print("fp4 runs", loaded[gemm].description, file=sys.stderr)
    check(gemm in loaded, f"gemm {gemm!r} comes too late: this process has loaded the kernels for "
                          f"gemm {', '.join(loaded)}")
    return loaded[gemm]


# What is raised when there is no compiler, or it fails, or the disk is full, ...
BUILD_ERRORS = (OSError, RuntimeError, ImportError, subprocess.SubprocessError)


def load_or_fall_back(gemm):
    from .backend import Backend

    try:
        return load_kernels(gemm)
    except BUILD_ERRORS as error:
        return Backend("reference.py, which is slow, because the kernels did not build: "
                       + first_line(error), is_compiled=False)


def first_line(error):
    """The line that says why a library was not built or loaded."""
    # torch says only that a library does not load, and gives the loader's reason as the cause.
    reason = error.__cause__ or error
    lines = str(reason).splitlines() or [type(reason).__name__]
    return lines[0]


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


def load_columns(spec, square):
    """Loads the ops of one GemmSpec, which emulate/columns.py defines. Raises a BUILD_ERRORS.

    square      whether its blocks are square
    """
    import torch

    sources = COLUMN_CPU_SOURCES
    flags = column_flags(spec, square)
    target = ""
    if torch.cuda.is_available():
        sources = (*COLUMN_CPU_SOURCES, *COLUMN_CUDA_SOURCES)
        flags = ("-DUSE_CUDA", *flags)
        major, minor = torch.cuda.get_device_capability()
        target = f"{major}{minor}"
    compile_and_load(sources, flags, target, f"the quantiser {columns_name(spec, square)}")


def columns_name(spec, square):
    """Returns a name for the quantiser of a GemmSpec, such as nvfp4_absmax_128_before_eden."""
    columns = (spec.format, spec.scale, spec.rotation, spec.signs, spec.rounding)
    words = [str(column).replace("-", "_") for column in columns]
    if spec.multiplier != 1:
        words.append(f"times_{spec.multiplier}".replace(".", "_"))
    return "_".join(words + ["square"] * square)


def column_flags(spec, square):
    """Returns the macros that kernels/columns.cuh reads."""
    macros = dict(FORMAT=spec.format, SCALE=spec.scale.replace("-", "_"), ROTATION=spec.rotation,
                  SIGNS=spec.signs, ROUNDING=spec.rounding, MULTIPLIER=spec.multiplier,
                  SQUARE=int(square), NAME=columns_name(spec, square))
    return tuple(f"-DCOLUMN_{macro}={value}" for macro, value in macros.items())


def compile_and_load(sources, flags, target="", subject="its kernels"):
    """Loads the library of these files of kernels/, which registers its ops."""
    import torch

    torch.ops.load_library(find_or_compile(sources, flags, target, subject))


def find_or_compile(sources, flags, target="", subject="its kernels"):
    """Returns the path of the library of these files of kernels/, compiled if it is not yet.

    subject is what the line says that is printed before it is compiled.
    """
    name = library_name(sources, flags, target)
    for place in places():
        library = os.path.join(place, name, name + ".so")
        if is_whole(library):
            return library
    with locked_place(name) as place:
        library = os.path.join(place, name, name + ".so")
        if not is_whole(library):       # Another process may have compiled it meanwhile.
            compile_library(os.path.dirname(library), sources, flags, target, subject)
            Path(library + CHECKSUM).write_bytes(checksum(library))
    return library


def compile_library(folder, sources, flags, target, subject):
    """Compiles files of kernels/ to FOLDER/FOLDER.so. torch's load() loads it, too."""
    # A damaged library, or what a killed build left: objects cut off, and a file that locks torch.
    if os.path.isdir(folder):
        shutil.rmtree(folder)
    os.makedirs(folder)
    environment = toolchain.environment(folder, target)
    machine = f"this processor and its GPU (sm_{target})" if target else "this processor"
    duration = "half a minute" if CUDA_SOURCES[0] in sources else "10 seconds"
    print(f"fp4 compiles {subject} for {machine}, which takes about {duration}", file=sys.stderr)
    with toolchain.cpp_extension(environment) as cpp_extension:
        cpp_extension.load(
            os.path.basename(folder),
            [os.path.join(KERNELS, source) for source in sources],
            build_directory=folder,
            is_python_module=False,
            extra_include_paths=[KERNELS],
            extra_cflags=[*toolchain.CXX_FLAGS, *flags],
            extra_cuda_cflags=[*toolchain.NVCC_FLAGS, toolchain.gencode(target), *flags],
            extra_ldflags=[*toolchain.LINK_FLAGS],
        )


# ---- which library

def library_name(sources, flags, target):
    """A name with a digest of what the library is made of and of what it is made for.

    So it is made anew after a change of the sources, and for another torch. And for another
    processor, because -march=native uses instructions that a neighbour may not have.
    """
    import torch

    made_for = (sources, flags, toolchain.CXX_FLAGS, toolchain.NVCC_FLAGS, toolchain.LINK_FLAGS,
                target, torch.__version__, sysconfig.get_config_var("SOABI"), platform.libc_ver(),
                processor_features())
    digest = hashlib.sha256(repr(made_for).encode())
    for path in sorted(Path(KERNELS).rglob("*")):
        is_used = path.parent.name != "lessons" or f"lessons/{path.name}" in sources
        if path.suffix in SOURCE_SUFFIXES and path.is_file() and is_used:
            digest.update(path.name.encode())
            digest.update(path.read_bytes())
    return f"kernels-{target or 'cpu'}-{digest.hexdigest()[:16]}"


def processor_features():
    """What tells this processor's instructions from another's."""
    names = ("flags", "Features", "features", "isa")    # x86, ARM, IBM Z, RISC-V
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        return sorted({line for line in file if line.startswith(names)})
    return platform.machine(), platform.processor()


def is_whole(library):
    """Is the library there, with the bytes that the compiler wrote?"""
    try:
        return Path(library + CHECKSUM).read_bytes() == checksum(library)
    except OSError:
        return False


def checksum(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest().encode()


# ---- where it lies

def places():
    """The folders that a library may lie in; a later one is for where the earlier are read-only."""
    folders = [os.path.join(HERE, "build")]
    if os.environ.get("TORCH_EXTENSIONS_DIR"):
        folders.append(os.path.abspath(os.path.join(os.environ["TORCH_EXTENSIONS_DIR"], "fp4")))
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if os.path.isabs(cache):            # It is not where nobody knows the home of this user.
        folders.append(os.path.join(cache, "quartet"))
    return folders


@contextlib.contextmanager
def locked_place(name):
    """Gives the first place that can be written. One process at a time has it for a library of this
    name; the others wait here."""
    problems = []
    for place in places():
        try:
            os.makedirs(place, exist_ok=True)
            lock = open(os.path.join(place, f"{name}.lock"), "w")
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            problems.append(f"{place}: {error.strerror}")
            continue
        with lock:                      # which is given back when it is closed
            yield place
        return
    raise OSError(f"there is no folder to write to ({'; '.join(problems)}); set "
                  "TORCH_EXTENSIONS_DIR to one")
