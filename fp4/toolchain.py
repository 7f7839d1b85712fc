"""
What torch.utils.cpp_extension.load does not do itself: finds compilers that suit torch, is silent,
and says in one line why a compiler failed.

nvcc, NVIDIA's compiler, comes with the CUDA toolkit, and since CUDA 13 also as a package for pip,
which needs no toolkit. torch is imported inside the functions, so that kernels can be compiled,
though not run, without it.
"""
import contextlib
import importlib.util
import logging
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

USUAL_NVCC = "/usr/local/cuda/bin/nvcc"
# nvcc and what it reads: its second half, its headers, the runtime's, and <nv/target>. They must
# be of one version, which the packages themselves do not ask for.
WHEELS = ("nvidia-cuda-nvcc", "nvidia-nvvm", "nvidia-cuda-crt", "nvidia-cuda-runtime",
          "nvidia-cuda-cccl")
FIRST_CUDA_WITH_WHEELS = 13             # The package for CUDA 12 holds only a part of nvcc.

# A fused multiply-add would round differently from the definition.
CXX_FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fopenmp-simd")
NVCC_FLAGS = ("-std=c++17", "-O3", "-fmad=false")
# -L. is for a link that environment() puts into the folder. A compiler may link the C++ library
# statically. Its symbols must not be seen by torch's own copy then: the two would share parts of
# each other, and the first error message that holds a number would end the process.
LINK_FLAGS = ("-L.", "-Wl,--exclude-libs,libstdc++.a")
# The line that says what is wrong: as compilers, assemblers and linkers mark it; or what follows
# ninja's FAILED and the command; or the first.
REASONS = (r"^(.*(?:error\s*:|fatal\s*:|cannot find|undefined reference).*)$",
           r"^FAILED: .*\n.*\n(.*)$",
           r"^(.*)$")


def gencode(target): return f"-gencode=arch=compute_{target},code=sm_{target}"


def find_cxx():
    """Returns the C++ compiler as CXX has it, so that it may be several words."""
    cxx = os.environ.get("CXX", "").strip() or "c++"
    program = cxx.split()[0]
    if not shutil.which(program):
        raise RuntimeError(f"there is no C++ compiler {program}: install g++, or set CXX")
    return cxx


# ---- nvcc

def find_nvcc(cuda=None):
    """Returns the path of an nvcc that suits torch.

    cuda  the CUDA version of torch, such as "13.0", whose first number has to agree; None: any
    Raises RuntimeError, which says what was found and what to do.
    """
    found = every_nvcc()
    for path in found:
        if cuda is None or major(release(path)) == major(cuda):
            return path
    if cuda is None:
        raise RuntimeError("there is no nvcc: install NVIDIA's CUDA toolkit")
    others = ", ".join(f"{path} of CUDA {release(path)}" for path in found) or "none"
    pip = f", or `pip install {' '.join(wheels_for(cuda))}`" if wheels_for(cuda) else ""
    raise RuntimeError(f"there is no nvcc for torch's CUDA {cuda} (found: {others}): install "
                       f"NVIDIA's CUDA toolkit {cuda}{pip}")


def every_nvcc():
    """The paths of all nvcc: the user's choice, the toolkit's, and pip's, the newest first."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or os.devnull
    packages = importlib.util.find_spec("nvidia")
    folders = packages.submodule_search_locations if packages else []
    of_pip = [str(path) for folder in folders for path in Path(folder).glob("cu*/bin/nvcc")]
    places = [os.path.join(home, "bin", "nvcc"), shutil.which("nvcc"), USUAL_NVCC,
              *sorted(of_pip, reverse=True)]
    return [path for path in places if path and os.access(path, os.X_OK)]


def release(nvcc):
    """The CUDA version of an nvcc, such as "13.0"."""
    done = subprocess.run([nvcc, "--version"], capture_output=True, text=True)
    match = re.search(r"release (\d+\.\d+)", done.stdout)
    return match.group(1) if match else "unknown"


def major(version): return version.split(".")[0]


def wheels_for(cuda):
    """What pip has to install to get the nvcc of a CUDA version; nothing, if there is none."""
    has_wheels = int(major(cuda)) >= FIRST_CUDA_WITH_WHEELS
    return [f"{name}=={cuda}.*" for name in WHEELS if has_wheels]


def missing_wheels():
    """What pip has to install to compile for this machine's GPU, if anything. The Makefile asks."""
    import torch

    cuda = torch.version.cuda
    if cuda is None or not torch.cuda.is_available():
        return []
    try:
        find_nvcc(cuda)
        return []
    except RuntimeError:
        return wheels_for(cuda)


def cuda_home(nvcc):
    """The folder of an nvcc's toolkit. nvcc may be a script that starts it, so nvcc is asked."""
    dry_run = [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull]
    said = subprocess.run(dry_run, capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.*)$", said, re.M)
    return os.path.realpath(top.group(1) if top else os.path.join(os.path.dirname(nvcc), ".."))


# ---- what torch is told

def environment(folder, target):
    """Returns the environment variables for a build in this folder, and puts what they need there.

    target  the GPU's architecture, such as 90a, or "" for none
    Raises RuntimeError if a compiler is missing.
    """
    import torch

    # pip puts ninja beside Python.
    path = [os.environ.get("PATH", os.defpath), os.path.dirname(sys.executable), folder]
    cxx = find_cxx()
    if len(cxx.split()) > 1:            # torch takes "ccache g++" for the name of a program.
        script = Path(folder, "cxx-of-environment")
        script.write_text(f'#!/bin/sh\nexec {cxx} "$@"\n')
        script.chmod(0o755)
        cxx = script.name
    variables = {"PATH": os.pathsep.join(path), "LC_ALL": "C", "CXX": cxx,
                 "TORCH_DONT_CHECK_COMPILER_ABI": "1", "TORCH_NO_COMPILER_WRAPPER": "1"}
    if os.environ.get("CXX"):
        variables["CC"] = cxx           # which torch lets nvcc call
    if target:
        home = cuda_home(find_nvcc(torch.version.cuda))
        variables["CUDA_HOME"] = home
        # torch links to libcudart.so, and pip's package has only a libcudart.so.13.
        for runtime in sorted(Path(home).glob("lib*/libcudart.so*"))[:1]:
            os.symlink(runtime, os.path.join(folder, "libcudart.so"))
    return variables


@contextlib.contextmanager
def cpp_extension(variables):
    """Gives torch's module of this name; meanwhile these environment variables are set.

    It does not warn, and its RuntimeError is one line that says why a compiler failed.
    """
    logger = logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            from torch.utils import cpp_extension
            # It has looked for CUDA when it was imported, which may be long ago.
            cpp_extension.CUDA_HOME = variables.get("CUDA_HOME", cpp_extension.CUDA_HOME)
            yield cpp_extension
    except RuntimeError as error:
        raise RuntimeError(reason(str(error))) from None
    finally:
        logger.setLevel(level)
        for name, value in before.items():
            del os.environ[name]
            if value is not None:
                os.environ[name] = value


def reason(output):
    """The line of ninja's output that says why a compiler failed."""
    found = (re.search(pattern, output, re.M) for pattern in REASONS)
    return next(match.group(1).strip() for match in found if match)
