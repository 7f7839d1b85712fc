"""
What is said about the machine: the device's name, peak and memory; and, in one sentence each, why
torch cannot use a GPU that is there, where memory ran out, and what an error of CUDA means for the
user. It knows no trainer.
"""
import contextlib
import glob
import os
import re
import sys
import warnings
from typing import NamedTuple

import torch

from data.files import UserError, check
from tools import cli

# Dense BF16 TFLOP/s by the vendors' datasheets.
PEAK_TFLOPS = {
    "H100 PCIe": 756, "H100": 989, "H200": 989, "A100": 312, "B200": 2250, "L40S": 362, "L4": 121,
    "RTX 5090": 209.5, "RTX 4090": 165.2, "RTX 3090": 71,
}
# Another card follows these names: an RTX 4090 Laptop GPU is none of the above.
OTHER_CARD = r"(?! (?:NVL|Ti|D|Laptop)\b)"

NVIDIA = "0x10de"                       # as the PCI bus names the makers
AMD = "0x1002"
# Whoever sets CUDA_VISIBLE_DEVICES to one of these wants no GPU.
NO_GPU_WANTED = ("", "-1", "none", "NoDevFiles")

# What CUDA says (a regular expression) -> what it means, and what helps.
CUDA_ERRORS = {
    r"driver on your system is too old|driver version is insufficient":
        "the NVIDIA driver is too old for this torch: update the driver, or install a torch that "
        "is built for an older CUDA (https://pytorch.org has the commands)",
    r"Found no NVIDIA driver":
        "no NVIDIA driver is found here: install it, or start the container with --gpus all",
    r"driver combination|[Dd]river/library version mismatch":
        "the parts of the NVIDIA driver have different versions, as after an update: restart the "
        "machine, or the container",
    r"forward compatibility was attempted":
        "the CUDA libraries here are too new for the NVIDIA driver: update the driver, or take "
        "the folder cuda/compat out of LD_LIBRARY_PATH",
    r"system not yet initialized":
        "the service that connects the GPUs does not run: `sudo systemctl start "
        "nvidia-fabricmanager`",
    r"busy or unavailable":
        "the GPU takes no further process, because another one has it for itself, or it is set "
        "to prohibited: `nvidia-smi` shows both; wait, choose another GPU with --device cuda:1, "
        "or let it be shared with `sudo nvidia-smi -c 0`",
    r"no kernel image is available":
        "there is no code for this GPU: remove fp4/build and run `make kernels`, for the kernels "
        "there may be another GPU's; if that does not help, install the newest torch",
    r"unsupported toolchain":
        "the kernels were compiled by a CUDA toolkit that is newer than the NVIDIA driver: update "
        "the driver, or remove fp4/build and compile with an older toolkit",
    r"[Uu]ncorrectable ECC error":
        "the GPU's memory has an error that it could not correct (ECC): `sudo nvidia-smi -r` or a "
        "restart resets it, and --resume goes on; if it comes again, the card is broken",
    r"invalid device ordinal":
        "there is no GPU of this number: `nvidia-smi -L` lists them, from 0 on",
    r"CUDA driver initialization failed|CUDA unknown error|CUDA error: unknown error":
        "the NVIDIA driver does not answer, as after a machine slept: restart the machine",
}


# ---- the device

def resolve_device(device):
    """The device of a flag, checked, such as "cuda:1"; None: a GPU if there is one that torch can
    use."""
    is_usable = torch.cuda.is_available() and not unusable_gpu()
    if device is None:
        return "cuda" if is_usable else "cpu"
    is_known = re.fullmatch(r"cpu|cuda(:\d{1,3})?", device)
    check(is_known, f"device {device!r} is not cpu, cuda or cuda:NUMBER")
    if device == "cpu":
        return device
    check(is_usable, f"device {device}: {unusable_gpu() or 'torch sees no GPU here'}")
    check(device == "cuda" or not cli.is_one_of_many(),
          f"device {device}: torchrun gives each process a GPU of its own; give --device cuda")
    n_gpus = torch.cuda.device_count()
    check(int(device[5:] or 0) < n_gpus, f"device {device}: there are {n_gpus} GPUs, from 0 on")
    return device


def device_name(device):
    """The name of a device, which is given as "cpu", "cuda" or "cuda:1"."""
    return "CPU" if device == "cpu" else torch.cuda.get_device_name(device)


def describe(device, n=1):
    """The device, of which there are n, and what else the speed and the last bits of a loss depend
    on."""
    name = device_name(device) if n == 1 else f"{n} x {device_name(device)}"
    parts = [name, f"torch {torch.__version__}"]
    if device == "cpu":
        parts.append(f"{torch.get_num_threads()} threads")
    return ", ".join(parts)


def utilisation(device, flops_per_second):
    """The share of the device's peak BF16 rate, such as 41.2%; n/a where the peak is not known."""
    name = device_name(device)
    for known, tflops in PEAK_TFLOPS.items():
        if re.search(rf"\b{known}\b{OTHER_CARD}", name):
            return f"{flops_per_second / (1e12 * tflops):.1%}"
    return "n/a"


def synchronize(device):
    """Wait until the device has done what it was told."""
    if device != "cpu":
        torch.cuda.synchronize(device)


def forget_peak_memory(device):
    """Let peak_memory() begin anew."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device):
    """The most memory that tensors on the device have taken so far, such as 7.59 GiB, or n/a."""
    if device == "cpu":
        return "n/a"
    return gibibytes(torch.cuda.max_memory_allocated(device))


def gibibytes(n_bytes): return f"{n_bytes / 2 ** 30:.2f} GiB"


# ---- a GPU that is there, but cannot be used

def tell_why_on_cpu():
    """Print a sentence to stderr if a program runs on the CPU beside a GPU that cannot be used."""
    reason = unusable_gpu()
    if reason:
        print(f"quartet: on the CPU, because {reason}", file=sys.stderr)


class TorchView(NamedTuple):
    """What torch says of itself and of the GPU."""
    version: str                        # such as 2.13.0+cpu
    cuda: str | None                    # the CUDA that it is built for
    hip: str | None                     # the same for AMD's GPUs
    error: str                          # why CUDA does not start; "" if it does
    capability: tuple | None            # the GPU's compute capability
    architectures: list                 # for which torch has code, such as sm_90


def look_at_torch():
    error = ""
    capability = None
    architectures = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")         # What they warn of is said in our words.
            torch.cuda.init()
            capability = torch.cuda.get_device_capability()
            architectures = torch.cuda.get_arch_list()
    except Exception as problem:        # Of any kind: that CUDA does not start is an answer.
        error = str(problem) or type(problem).__name__
    return TorchView(torch.__version__, torch.version.cuda, torch.version.hip, error, capability,
                     architectures)


def unusable_gpu(root="/", environ=os.environ, look=look_at_torch):
    """A sentence if there is a GPU that torch cannot use: why, and what helps. Otherwise "".

    Nothing is said when CUDA_VISIBLE_DEVICES hides all GPUs. A GPU is noticed by files, which
    answer at once where a driver's program may hang. The arguments are there for the tests.
    """
    if environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in NO_GPU_WANTED:
        return ""
    view = look()
    if not view.error and not view.hip:
        return missing_code(view)
    if has_nvidia_gpu(root):
        return "there is an NVIDIA GPU, but " + why_unusable(view, root, environ)
    if not view.error or is_on_pci(root, AMD):
        return "there is an AMD GPU, but only NVIDIA's are supported: --device cpu works"
    return ""


def missing_code(view):
    """A sentence if torch starts, but has no code for the GPU; otherwise ""."""
    if not view.architectures or any(runs_on(view.capability, a) for a in view.architectures):
        return ""
    major, minor = view.capability
    # The names are sorted by age.
    wanted = "an older" if view.capability < version_of(view.architectures[0]) else "a newer"
    return (f"there is an NVIDIA GPU of compute capability {major}.{minor}, but this torch "
            f"({view.version}) has code only for {', '.join(view.architectures)}: install {wanted} "
            "torch, or give --device cpu")


def runs_on(capability, architecture):
    """Whether code for an architecture, such as sm_86 or compute_90, runs on a GPU."""
    major, minor = version_of(architecture)
    if architecture.startswith("compute"):          # The driver compiles it for later GPUs.
        return (major, minor) <= capability
    return major == capability[0] and minor <= capability[1]


def version_of(architecture):
    number = re.sub(r"\D", "", architecture)
    return int(number[:-1]), int(number[-1])


def why_unusable(view, root, environ):
    if not view.cuda:
        version = view.version.split("+")[0]
        return (f"this torch ({view.version}) is built without CUDA: install a build with it, "
                f"`{sys.executable} -m pip install --force-reinstall torch=={version}` "
                "(https://pytorch.org has the commands for other systems)")
    in_wsl = os.path.exists(os.path.join(root, "dev/dxg"))
    device_files = files(root, "dev/nvidia[0-9]*") + files(root, "dev/nvidiactl")
    if not device_files and not in_wsl:
        if files(root, "proc/driver/nvidia/version"):
            return ("/dev/nvidia0 is missing: start the container with --gpus all (apptainer: "
                    "--nv); outside a container, `sudo nvidia-smi` makes it")
        return "its driver is not loaded: install it (https://www.nvidia.com/drivers) and restart"
    for path in device_files:
        if not os.access(path, os.R_OK | os.W_OK):
            return (f"this user may not open {path}: become a member of its group, which "
                    f"`ls -l {path}` shows, with `sudo usermod -aG GROUP $USER`, and log in again")
    known = cuda_error(view.error)
    if known:
        return f"{known} ({versions(view)})"
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return (f"CUDA_VISIBLE_DEVICES={visible} hides it: unset that variable, or name a GPU that "
                "`nvidia-smi -L` lists")
    return (f"torch cannot use it ({first_line(view.error)}): see whether `nvidia-smi` lists it, "
            "and restart the machine if it does not")


def versions(view):
    found = re.search(r"found version (\d+)", view.error)      # 12040 is 12.4
    number = int(found[1]) if found else 0
    driver = f", the driver knows CUDA {number // 1000}.{number % 1000 // 10}" if found else ""
    return f"torch {view.version} is built for CUDA {view.cuda}{driver}"


def has_nvidia_gpu(root):
    patterns = "proc/driver/nvidia/gpus/*", "dev/nvidia[0-9]*", "usr/lib/wsl/lib/libcuda.so*"
    return any(files(root, pattern) for pattern in patterns) or is_on_pci(root, NVIDIA)


def is_on_pci(root, vendor):
    """Whether a graphics card of this maker is plugged in."""
    for path in files(root, "sys/bus/pci/devices/*/vendor"):
        pci_class = os.path.join(os.path.dirname(path), "class")
        if read(path) == vendor and read(pci_class).startswith("0x03"):
            return True
    return False


def files(root, pattern): return sorted(glob.glob(os.path.join(root, pattern)))


def read(path):
    try:
        with open(path) as file:
            return file.read().strip()
    except OSError:
        return ""


# ---- errors of a running program

@contextlib.contextmanager
def errors_in_words(cfg):
    """Makes a UserError of what torch says when memory runs out or a GPU does not answer.

    cfg     has batch, micro, seq and device, as out_of_memory() explains them
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        sentence = cuda_error(error)
        if is_out_of_memory(error):
            sentence = out_of_memory(error, cfg.batch, cfg.micro, cfg.seq, cfg.device)
        if not sentence:
            raise
        raise UserError(sentence)


def cuda_error(error):
    """What an error of CUDA means, and what helps, in one sentence; "" if it is not known here."""
    for pattern, sentence in CUDA_ERRORS.items():
        if re.search(pattern, str(error)):
            return sentence
    return ""


def is_out_of_memory(error):
    """Whether an exception says that the memory of the GPU or of the machine is used up."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # An op of ours that finds no room for its result is the last of these, in torch 2.11.
    words = ("CUDA error: out of memory|CUDA out of memory|CUBLAS_STATUS_ALLOC_FAILED|"
             "can't allocate memory|bad_alloc|aten::new_empty.* API call failed")
    return isinstance(error, RuntimeError) and bool(re.search(words, str(error)))


def out_of_memory(error, batch, micro, seq, device):
    """The sentence about memory that ran out, which names what needs less.

    batch, micro    sequences in a step and in a microbatch
    seq             tokens in a sequence
    """
    is_on_host = isinstance(error, MemoryError) or "can't allocate" in str(error)
    is_on_gpu = device != "cpu" and not is_on_host
    if device != "cpu" and is_on_host:
        return (f"the machine's memory, not the GPU's, is used up ({first_line(error)}): end other "
                "programs, or take a smaller --size or corpus")
    memory = f"the GPU's memory{memory_taken(device)}" if is_on_gpu else "the machine's memory"
    too_large = f"{memory} does not hold a microbatch of {micro} x {seq} tokens"
    if micro == 1:
        return f"{too_large}: take a --seq of less than {seq}, or a smaller --size"
    # More microbatches in a step, so many that they are equal; at most thousands more are tried.
    n_now = batch // micro
    n_more = range(n_now + 1, n_now + 10_000)
    smaller = next((batch // n for n in n_more if batch % n == 0), 1)
    return (f"{too_large}: take --micro {smaller}, the next that divides the batch of {batch}, or "
            "a smaller --size")


def memory_taken(device):
    """How much of the GPU's memory this process took, in parentheses, and others if it is much."""
    try:
        free, total = torch.cuda.mem_get_info(device)
    except RuntimeError:                # CUDA itself had no room to start.
        return ""
    others = total - free - torch.cuda.memory_reserved(device)
    # This process's code and CUDA's own data are among them, up to a gibibyte.
    seen = f"; other programs hold {gibibytes(others)}, see nvidia-smi" if others > 2 ** 31 else ""
    return f" (peak so far {peak_memory(device)} of {gibibytes(total)}{seen})"


def first_line(error):
    """The first line of an error's text, or its name if it has none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
