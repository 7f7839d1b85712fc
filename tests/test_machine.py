"""What is said about the device, on made-up machines. A sentence says what, why and what helps."""
import os
import re
import subprocess
import sys
import time

import pytest
import torch

from tools import machine
from tools.machine import TorchView

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")
ARCHITECTURES = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]
CPU_BUILD = TorchView("2.13.0+cpu", None, None, "Torch not compiled with CUDA enabled", None, [])
WORKS = TorchView("2.13.0+cu130", "13.0", None, "", (9, 0), ARCHITECTURES)
ROCM = TorchView("2.13.0+rocm7.2", None, "7.2", "", (9, 4), ["gfx942"])
TOO_OLD = ("The NVIDIA driver on your system is too old (found version 12040). Please update your "
           "GPU driver by downloading and installing a new version from the URL: ...")
# The files of a machine, in a folder that stands for its root.
PCI = {"sys/bus/pci/devices/0000:3b:00.0/vendor": "0x10de\n",
       "sys/bus/pci/devices/0000:3b:00.0/class": "0x030200\n"}
AMD_PCI = {"sys/bus/pci/devices/0000:3b:00.0/vendor": "0x1002\n",
           "sys/bus/pci/devices/0000:3b:00.0/class": "0x030000\n"}
NETWORK_CARD = {"sys/bus/pci/devices/0000:3c:00.0/vendor": "0x10de\n",
                "sys/bus/pci/devices/0000:3c:00.0/class": "0x020000\n"}
DRIVER = {"proc/driver/nvidia/version": "NVRM version: 550.54\n",
          "proc/driver/nvidia/gpus/0000:3b:00.0/information": "Model: NVIDIA H100\n"}
DEVICE = {"dev/nvidia0": "", "dev/nvidiactl": ""}
WSL = {"dev/dxg": "", "usr/lib/wsl/lib/libcuda.so.1": ""}


def broken(error):
    "torch with CUDA that says this error when it starts"
    return WORKS._replace(error=error, capability=None, architectures=[])


@pytest.fixture
def said(tmp_path):
    "said(files, view, **environment) -> the sentence of a machine that has these files"
    def sentence(files, view, **environment):
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return machine.unusable_gpu(str(tmp_path), environment, lambda: view)
    return sentence


# ---- a GPU that torch cannot use

@pytest.mark.parametrize("files, view, what, helps", [
    (PCI | DRIVER | DEVICE, CPU_BUILD, "this torch (2.13.0+cpu) is built without CUDA",
     "-m pip install --force-reinstall torch==2.13.0`"),
    (PCI, CPU_BUILD, "is built without CUDA", "pip install"),
    (WSL, CPU_BUILD, "is built without CUDA", "pip install"),
    (PCI | DRIVER | DEVICE, broken(TOO_OLD), "the NVIDIA driver is too old for this torch",
     "built for CUDA 13.0, the driver knows CUDA 12.4)"),
    (WSL, broken(TOO_OLD), "the NVIDIA driver is too old", "update the driver"),
    (PCI, broken("Found no NVIDIA driver on your system."), "its driver is not loaded", "install"),
    (PCI | DRIVER, broken("No CUDA GPUs are available"), "/dev/nvidia0 is missing", "--gpus all"),
    (PCI | DRIVER | DEVICE, broken("CUDA error 803: system has unsupported display driver / cuda "
                                   "driver combination"), "have different versions", "restart"),
    (PCI | DRIVER | DEVICE, broken("Unexpected error from cudaGetDeviceCount(). Error 802: system "
                                   "not yet initialized"), "does not run", "systemctl start"),
    (PCI | DRIVER | DEVICE, broken("Error 804: forward compatibility was attempted on non "
                                   "supported HW"), "too new for the NVIDIA driver", "update"),
    (PCI | DRIVER | DEVICE, broken("CUDA unknown error - this may be due to an incorrectly set up "
                                   "environment"), "does not answer", "restart the machine"),
    (PCI | DRIVER | DEVICE, broken("something new\nmore of it"), "(something new)", "`nvidia-smi`"),
    (PCI | DRIVER | DEVICE, WORKS._replace(capability=(6, 1)),
     "of compute capability 6.1, but this torch (2.13.0+cu130) has code only for sm_75, sm_80",
     "install an older torch"),
    (PCI | DRIVER | DEVICE, WORKS._replace(capability=(13, 0), architectures=["sm_75", "sm_90"]),
     "has code only for sm_75, sm_90", "install a newer torch"),
    (AMD_PCI, CPU_BUILD, "there is an AMD GPU, but only NVIDIA's are supported", "--device cpu"),
    ({}, ROCM, "there is an AMD GPU, but only NVIDIA's are supported", "--device cpu"),
    (PCI | DRIVER | DEVICE, ROCM, "(2.13.0+rocm7.2) is built without CUDA", "torch==2.13.0`"),
])
def test_a_gpu_that_torch_cannot_use_is_told_with_the_reason_and_the_mend(
        said, files, view, what, helps):
    sentence = said(files, view)
    assert what in sentence and helps in sentence
    assert sentence.startswith("there is an ") and "\n" not in sentence
    assert sentence.index(what) < sentence.index(helps)


@pytest.mark.parametrize("files, view", [
    ({}, CPU_BUILD), ({}, broken("Found no NVIDIA driver on your system.")),
    (NETWORK_CARD, CPU_BUILD), ({"dev/dxg": ""}, CPU_BUILD),
    (PCI | DRIVER | DEVICE, WORKS),
    (PCI | DRIVER | DEVICE, WORKS._replace(capability=(8, 9))),         # sm_86 runs on 8.9
    (PCI | DRIVER | DEVICE, WORKS._replace(capability=(12, 1))),
    (PCI | DRIVER | DEVICE, WORKS._replace(capability=(13, 0))),        # through compute_120
])
def test_nothing_is_said_where_there_is_no_gpu_or_it_can_be_used(said, files, view):
    assert said(files, view) == ""


def test_code_runs_on_the_gpus_that_cuda_says():
    # Code of a GPU runs on later ones of the same first number, and PTX on all later ones.
    gpus = [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0), (12, 1)]
    runs = {
        "sm_75": [(7, 5)], "sm_80": [(8, 0), (8, 6), (8, 9)], "sm_86": [(8, 6), (8, 9)],
        "sm_90": [(9, 0)], "sm_100": [(10, 0)], "sm_120": [(12, 0), (12, 1)],
        "compute_80": gpus[1:], "compute_120": gpus[-2:],
    }
    for architecture, expected in runs.items():
        assert [gpu for gpu in gpus if machine.runs_on(gpu, architecture)] == expected


@pytest.mark.parametrize("hidden", ["", "-1", " ", "none", "NoDevFiles"])
def test_nothing_is_said_where_the_user_hides_the_gpu(said, hidden):
    machine_files = PCI | DRIVER | DEVICE
    assert said(machine_files, CPU_BUILD, CUDA_VISIBLE_DEVICES=hidden) == ""
    assert said(machine_files, CPU_BUILD, CUDA_VISIBLE_DEVICES="0")


def test_a_variable_that_names_a_gpu_which_is_not_there_is_named(said):
    view = broken("No CUDA GPUs are available")
    sentence = said(PCI | DRIVER | DEVICE, view, CUDA_VISIBLE_DEVICES="3")
    assert "CUDA_VISIBLE_DEVICES=3 hides it: unset" in sentence
    assert "CUDA_VISIBLE_DEVICES" not in said(PCI | DRIVER | DEVICE, view)


def test_device_files_that_the_user_may_not_open_are_named(said, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: "nvidia0" not in path)
    sentence = said(PCI | DRIVER | DEVICE, broken("No CUDA GPUs are available"))
    assert re.search(r"may not open \S*/dev/nvidia0: .*usermod -aG GROUP", sentence)


def test_this_machine_answers_at_once_and_raises_nothing():
    start = time.perf_counter()
    for _ in range(10):
        assert isinstance(machine.unusable_gpu(), str)
    # A driver's program that hangs would take minutes; a busy machine may take a second.
    assert torch.cuda.is_available() or time.perf_counter() - start < 5


def test_torch_without_cuda_is_seen_as_it_is():
    view = machine.look_at_torch()
    assert view.version == torch.__version__ and view.cuda == torch.version.cuda
    assert (view.error == "") == torch.cuda.is_available()
    assert (view.capability is not None) == torch.cuda.is_available()


def test_whatever_torch_raises_or_warns_of_when_cuda_starts_is_an_answer(monkeypatch, recwarn):
    def init():
        import warnings
        warnings.warn("CUDA initialization: ...")
        raise KeyError("odd")
    monkeypatch.setattr(torch.cuda, "init", init)
    assert machine.look_at_torch().error == "'odd'" and not recwarn.list


def test_the_machine_knows_no_trainer():
    code = "import sys; from tools import machine; assert not {'quartet', 'model'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# ---- the device

@pytest.fixture
def gpu(monkeypatch):
    "gpu(name): torch sees a GPU of this name, of whose 80 GiB 40 were taken at the peak"
    def appear(name="NVIDIA H100 80GB HBM3", free=4 * 2 ** 30):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"{name}")
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 40 * 2 ** 30)
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 75 * 2 ** 30)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80 * 2 ** 30))
    return appear


def test_a_cpu_is_described_with_its_threads_and_has_no_peak():
    threads = torch.get_num_threads()
    assert machine.describe("cpu") == f"CPU, torch {torch.__version__}, {threads} threads"
    assert machine.peak_memory("cpu") == machine.utilisation("cpu", 1e12) == "n/a"


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_gpu_is_described_by_its_name(gpu, device):
    gpu()
    assert machine.describe(device) == f"NVIDIA H100 80GB HBM3, torch {torch.__version__}"
    assert machine.peak_memory(device) == "40.00 GiB"
    assert machine.utilisation(device, 0.412 * 989e12) == "41.2%"


@pytest.mark.parametrize("name, tflops", [
    ("NVIDIA H100 PCIe", 756), ("NVIDIA H200", 989), ("NVIDIA A100-SXM4-80GB", 312),
    ("NVIDIA A100 80GB PCIe", 312), ("NVIDIA B200", 2250), ("NVIDIA L40S", 362), ("NVIDIA L4", 121),
    ("NVIDIA GeForce RTX 4090", 165.2), ("NVIDIA GeForce RTX 3090", 71),
    ("NVIDIA GeForce RTX 5090", 209.5), ("NVIDIA H100 80GB HBM3", 989),
])
def test_the_peak_of_a_known_card_is_its_own(gpu, name, tflops):
    gpu(name)
    assert machine.utilisation("cuda", 0.5 * tflops * 1e12) == "50.0%"


@pytest.mark.parametrize("name", [
    "NVIDIA L40", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D",
    "NVIDIA GeForce RTX 3090 Ti", "NVIDIA H100 NVL", "NVIDIA GB200", "NVIDIA GH200 480GB",
    "Tesla T4",
])
def test_a_card_whose_name_only_contains_a_known_one_has_no_utilisation(gpu, name):
    gpu(name)
    assert machine.utilisation("cuda", 1e14) == "n/a"


# ---- memory that runs out

FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")


@pytest.mark.parametrize("batch, micro, helps", [
    (512, 64, "take --micro 32, the next that divides the batch of 512"),
    (8, 8, "take --micro 4,"), (6, 6, "take --micro 3,"), (9, 3, "take --micro 1,"),
    (7, 7, "take --micro 1,"), (60, 12, "take --micro 10,"),
    (8, 1, "take a --seq of less than 256, or a smaller --size"),
])
def test_memory_that_runs_out_names_the_next_smaller_microbatch_and_the_peak(
        gpu, batch, micro, helps):
    gpu()
    sentence = machine.out_of_memory(FULL, batch, micro, 256, "cuda")
    assert sentence.startswith("the GPU's memory (peak so far 40.00 GiB of 80.00 GiB) does not "
                               f"hold a microbatch of {micro} x 256 tokens: ")
    assert helps in sentence and "\n" not in sentence


def test_memory_that_other_programs_hold_is_told(gpu):
    gpu(free=0)
    assert "other programs hold 5.00 GiB, see nvidia-smi" in machine.out_of_memory(
        FULL, 8, 8, 256, "cuda")


def test_memory_that_runs_out_before_cuda_starts_is_told_without_a_peak(monkeypatch):
    def fail(device):
        raise RuntimeError("CUDA error: out of memory")
    monkeypatch.setattr(torch.cuda, "mem_get_info", fail)
    error = RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be ...")
    assert machine.is_out_of_memory(error)
    assert machine.out_of_memory(error, 8, 8, 256, "cuda") == (
        "the GPU's memory does not hold a microbatch of 8 x 256 tokens: take --micro 4, the next "
        "that divides the batch of 8, or a smaller --size")


def test_an_op_of_ours_without_room_for_its_result_is_out_of_memory():
    # what torch 2.11 and 2.13 make of it
    for text in ('torch_call_dispatcher( "aten::new_empty", "", stack.data(), TORCH_ABI_VERSION) '
                 "API call failed at ops.h, line 933",
                 'CUDA out of memory. (originally from torch_call_dispatcher("aten::new_empty"))'):
        assert machine.is_out_of_memory(RuntimeError(text))


def test_the_memory_of_a_cpu_runs_out_likewise():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2 ** 55)                            # 128 pebibytes
    for error in (raised.value, MemoryError()):
        assert machine.is_out_of_memory(error)
        assert machine.out_of_memory(error, 8, 8, 256, "cpu") == (
            "the machine's memory does not hold a microbatch of 8 x 256 tokens: take --micro 4, "
            "the next that divides the batch of 8, or a smaller --size")


def test_the_machine_s_memory_and_the_gpu_s_are_told_apart():
    sentence = machine.out_of_memory(MemoryError(), 8, 8, 256, "cuda")
    assert sentence.startswith("the machine's memory, not the GPU's, is used up (MemoryError): ")


@pytest.mark.parametrize("error", [
    RuntimeError("shapes differ"), ValueError("out of memory"), OSError("out of memory")])
def test_other_errors_are_not_about_memory(error):
    assert not machine.is_out_of_memory(error)


# ---- other errors

@pytest.mark.parametrize("error, what, helps", [
    ("CUDA error: no kernel image is available for execution on the device",
     "there is no code for this GPU", "remove fp4/build and run `make kernels`"),
    ("CUDA error: all CUDA-capable devices are busy or unavailable",
     "the GPU takes no further process", "--device cuda:1"),
    ("CUDA error: CUDA-capable device(s) is/are busy or unavailable",
     "the GPU takes no further process", "nvidia-smi"),
    ("CUDA error: uncorrectable ECC error encountered", "could not correct (ECC)", "--resume"),
    ("CUDA error: invalid device ordinal", "no GPU of this number", "`nvidia-smi -L`"),
    ("CUDA error: the provided PTX was compiled with an unsupported toolchain.",
     "newer than the NVIDIA driver", "update the driver"),
    ("CUDA driver version is insufficient for CUDA runtime version", "too old", "update"),
    ("Failed to initialize NVML: Driver/library version mismatch", "different versions", "restart"),
])
def test_an_error_of_cuda_that_the_user_can_mend_becomes_a_sentence(error, what, helps):
    sentence = machine.cuda_error(RuntimeError(f"{error}\nCUDA kernel errors might be ..."))
    assert what in sentence and helps in sentence and "\n" not in sentence
    assert sentence.index(what) < sentence.index(helps)


@pytest.mark.parametrize("error", [
    "CUDA error: an illegal memory access was encountered", "a kernel did not start",
    "CUDA error: device-side assert triggered", "CUDA error: unspecified launch failure",
    "mat1 and mat2 shapes cannot be multiplied", "version mismatch of a file", "unknown error"])
def test_a_fault_of_ours_stays_a_fault_of_ours(error):
    assert machine.cuda_error(RuntimeError(error)) == ""
