"""
Compile the kernels for the machine at hand, once, into fp4/build/. Without a compiler the definition runs.
"""
import contextlib, fcntl, functools, os, sys
import torch
from . import product

HERE = os.path.dirname(os.path.abspath(__file__))
lib = torch.library.Library("fp4", "IMPL")


@functools.cache
def build():
    """load the kernels, compiled if they are not; returns, and prints once, which implementation runs"""
    try:
        if torch.cuda.is_available():
            capability = torch.cuda.get_device_capability()
            files, flags = product.own(capability)
            compile_and_load(["bind.cpp", "cpu.cpp", "quantize.cu", "unrotate.cu", "fold.cu", *files], ["-DUSE_CUDA", *flags],
                             "{0}{1}".format(*capability) + "a" * (bool(files) and capability >= (9, 0)))
            how = f"quantize.cu and {product.choose(capability, lib)} on the GPU, cpu.cpp on the CPU"
        else:
            compile_and_load(["bind.cpp", "cpu.cpp"], [])
            how = "cpu.cpp (compiled, byte-equal to reference.py)"
    except (OSError, RuntimeError, ImportError) as error:      # no compiler, no ninja, nowhere to write, ...
        how = f"reference.py, which is slow, because the kernels did not build: {str(error).splitlines()[0]}"
    print("fp4 runs", how, file=sys.stderr)
    return how


def compile_and_load(sources, flags, target=""):
    from torch.utils import cpp_extension                      # here, because it looks for CUDA and warns
    folder = os.path.join(HERE, "build")
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "flock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)                       # one process builds, the others wait ...
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(folder, "lock"))            # ... and what a killed one left cannot block torch
        os.environ["PATH"] = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]                 # ninja
        cpp_extension.load("fp4_kernels", [os.path.join(HERE, f) for f in sources], build_directory=folder,
                           is_python_module=False, extra_cflags=["-O3", "-march=native", "-ffp-contract=off", *flags],
                           extra_cuda_cflags=["-O3", "-fmad=false", f"-gencode=arch=compute_{target},code=sm_{target}"])
