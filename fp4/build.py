"""
Compile the kernels for the machine at hand, once, into fp4/build/. Without a compiler the definition runs.
"""
import contextlib, fcntl, functools, os, sys
import torch

HERE = os.path.dirname(os.path.abspath(__file__))


@functools.cache
def build():
    """load the kernels, compiled if they are not; returns, and prints once, which implementation runs"""
    from torch.utils import cpp_extension                       # here, because it looks for CUDA and warns
    folder = os.path.join(HERE, "build")
    try:
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, "flock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)                   # one process builds, the others wait ...
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(folder, "lock"))        # ... and what a killed one left cannot block torch
            os.environ["PATH"] = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]             # ninja
            cpp_extension.load("fp4_kernels", [os.path.join(HERE, f) for f in ("bind.cpp", "cpu.cpp")],
                build_directory=folder, is_python_module=False,
                extra_cflags=["-O3", "-march=native", "-ffp-contract=off"])
        how = "cpu.cpp (compiled, byte-equal to reference.py) on the CPU"
        if torch.cuda.is_available(): how += ", reference.py on the GPU, which is slow: it has no kernels yet"
    except (OSError, RuntimeError, ImportError) as error:      # no compiler, no ninja, nowhere to write, ...
        how = f"reference.py, 10 times slower, because the kernels did not build: {str(error).splitlines()[0]}"
    print("fp4 runs", how, file=sys.stderr)
    return how
