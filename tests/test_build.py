"""How the kernels are built: which compiler, which library, where, and what is said about it."""
import ctypes
import importlib
import logging
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils import cpp_extension

import fp4
from fp4 import toolchain

build = importlib.import_module("fp4.build")            # fp4.build is its function
ROOT = Path(__file__).resolve().parent.parent
FORK = multiprocessing.get_context("fork")
EVERY_NVCC = toolchain.every_nvcc()
NVCC_OF_PIP = [path for path in EVERY_NVCC if "/site-packages/nvidia/" in path]
READELF = shutil.which("readelf")

SOURCE = '#include "answer.h"\nextern "C" int answer() { return ANSWER; }\n'


def write_script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return path


@pytest.fixture
def tree(tmp_path, monkeypatch):
    "fp4/build.py sees the sources of a tiny library instead of the kernels"
    tree = tmp_path / "a project"       # Its path has a space.
    kernels = tree / "fp4" / "kernels"
    kernels.mkdir(parents=True)
    (kernels / "answer.h").write_text("#define ANSWER 42\n")
    (kernels / "answer.cpp").write_text(SOURCE)
    monkeypatch.setattr(build, "HERE", str(tree / "fp4"))
    monkeypatch.setattr(build, "KERNELS", str(kernels))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tree / "cache"))
    for name in ("TORCH_EXTENSIONS_DIR", "CXX", "CC"):
        monkeypatch.delenv(name, raising=False)
    return tree


def make():
    cpp_extension.JIT_EXTENSION_VERSIONER.entries.clear()       # as in a new process
    return build.find_or_compile(("answer.cpp",), ())


def answer(library): return ctypes.CDLL(library).answer()


def read_only(folder):
    "A file where the folder should be stops root as well, whom permissions do not."
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.touch()


# ---- which library

def test_a_library_does_not_wait_for_another_one(tree):
    signal.alarm(60)                        # It would wait for this test.
    with build.locked_place("another"):
        assert answer(make()) == 42
    signal.alarm(0)


def test_a_library_is_compiled_once_and_it_is_said_that_this_takes_a_while(tree, capfd):
    environment = dict(os.environ)
    library = make()
    assert answer(library) == 42
    assert os.environ == environment
    assert Path(library).parent.parent == tree / "fp4" / "build"
    said = capfd.readouterr()
    assert said.err == "fp4 compiles its kernels for this processor, which takes about 10 seconds\n"
    assert said.out == ""
    before = os.stat(library).st_mtime_ns
    assert make() == library and os.stat(library).st_mtime_ns == before
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("damage", ["truncated", "a flipped bit", "no checksum", "odd checksum"])
def test_a_damaged_library_is_made_once_more(tree, damage):
    library = Path(make())
    good = library.read_bytes()
    os.remove(library)                  # This process has loaded it: its file must not change.
    library.write_bytes(good)
    assert build.is_whole(str(library))
    if damage == "truncated":
        library.write_bytes(good[:5000])
    if damage == "a flipped bit":
        library.write_bytes(good[:5000] + bytes([good[5000] ^ 1]) + good[5001:])
    if damage == "no checksum":
        os.remove(f"{library}.sha256")
    if damage == "odd checksum":
        Path(f"{library}.sha256").write_bytes(b"\xff\xfe")
    assert not build.is_whole(str(library))
    assert make() == str(library) and library.read_bytes() == good
    assert build.is_whole(str(library))


def test_a_truncated_library_of_the_kernels_does_not_kill_the_process(tmp_path):
    fp4.build()
    copy = copy_of_fp4(tmp_path)
    shutil.copytree(ROOT / "fp4" / "build", copy / "build")
    libraries = list(copy.glob("build/kernels-*/*.so"))
    assert libraries
    for path in libraries:
        path.write_bytes(path.read_bytes()[:4096])
    done = start(tmp_path, CXX="/nonexistent/c++")
    assert done.returncode == 0 and done.stdout == "False\n"
    assert "no C++ compiler /nonexistent/c++" in done.stderr


def test_a_whole_library_is_loaded_without_torch_s_builder(tmp_path):
    fp4.build()
    code = ("import fp4, sys\n"
            "print(fp4.build().is_compiled, 'torch.utils.cpp_extension' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "True False\n" and done.stderr.count("\n") == 1


def test_a_change_of_a_source_or_a_header_makes_another_library(tree):
    first = make()
    (tree / "fp4" / "kernels" / "answer.h").write_text("#define ANSWER 43\n")
    second = make()
    assert second != first and answer(second) == 43
    (tree / "fp4" / "kernels" / "answer.cpp").write_text(SOURCE + "\n")
    assert make() not in (first, second)


@pytest.mark.parametrize("what", ["processor", "torch", "Python", "flags", "GPU"])
def test_another_machine_gets_another_library(tree, monkeypatch, what):
    def name(flags=(), target=""):
        return build.library_name(("answer.cpp",), flags, target)

    here = name()
    assert name() == here
    if what == "processor":
        flags = build.processor_features()
        monkeypatch.setattr(build, "processor_features", lambda: [*flags, "flags: avx1024"])
    if what == "torch":
        monkeypatch.setattr(torch, "__version__", "2.99.0")
    if what == "Python":
        monkeypatch.setattr(build.sysconfig, "get_config_var", lambda name: "cpython-399")
    if what == "flags":
        assert name(flags=("-DUSE_CUDA",)) != here
    elif what == "GPU":
        assert name(target="90a") != name(target="89") and "90a" in name(target="90a")
    else:
        assert name() != here


def test_the_processor_is_known_by_its_instructions():
    features = " ".join(build.processor_features())
    if os.path.exists("/proc/cpuinfo"):
        assert "flags" in features or "Features" in features
    else:
        assert features


# ---- where it lies

def test_a_read_only_installation_is_built_in_a_cache_of_the_user_s(tree, monkeypatch):
    read_only(tree / "fp4" / "build")
    assert make().startswith(str(tree / "cache" / "quartet"))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tree / "extensions"))
    library = make()                    # what is there already is taken, wherever it lies
    assert library.startswith(str(tree / "cache"))
    os.remove(library)
    assert make().startswith(str(tree / "extensions" / "fp4"))


def test_a_library_that_came_with_a_read_only_installation_is_loaded(tree, monkeypatch):
    library = make()

    def refuse(folder, exist_ok):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "makedirs", refuse)
    assert make() == library


def test_without_a_home_no_folder_called_tilde_is_made(tree, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)       # as for an unknown user
    assert build.places() == [str(tree / "fp4" / "build")]


def test_where_nothing_can_be_written_the_definition_runs_and_one_line_says_so(tree):
    read_only(tree / "fp4" / "build")
    read_only(tree / "cache")
    backend = build.load_or_fall_back("fp8")
    assert not backend.is_compiled
    assert backend.description.startswith("reference.py, which is slow, because the kernels did "
                                          "not build: there is no folder to write to (")
    assert "cache/quartet: Not a directory" in backend.description
    assert "TORCH_EXTENSIONS_DIR" in backend.description


@pytest.mark.skipif(READELF is None, reason="needs readelf")
def test_a_cpp_library_that_is_linked_statically_does_not_meet_torch_s(tree, monkeypatch):
    source = tree / "fp4" / "kernels" / "answer.cpp"
    source.write_text('#include <sstream>\nextern "C" int answer() {\n'
                      '  std::stringstream text;\n  text << 42;\n'
                      '  return text.str() == "42" ? 42 : 0;\n}\n')
    monkeypatch.setenv("CXX", "c++ -static-libstdc++")
    library = make()
    done = subprocess.run([READELF, "-W", "--dyn-syms", library], capture_output=True, text=True)
    symbols = [line for line in done.stdout.splitlines() if " UND " not in line]
    assert any("answer" in line for line in symbols) and answer(library) == 42
    assert not [line for line in symbols if "basic_ostream" in line or "_ZNSo" in line]


def wait_for(path):
    until = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_what_a_killed_build_leaves_does_not_stop_the_next(tree, monkeypatch):
    started = tree.parent / "started"
    slow = write_script(tree.parent / "slow", f"touch {started}; sleep 3; exit 1\n")
    monkeypatch.setenv("CXX", str(slow))
    child = FORK.Process(target=make)
    child.start()
    wait_for(started)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    lock, = tree.glob("fp4/build/kernels-*/lock")       # torch waits until this file is gone
    (lock.parent / "answer.o").write_bytes(b"half an object")
    monkeypatch.delenv("CXX")
    child = FORK.Process(target=make)
    child.start()
    child.join(timeout=30)
    child.kill()
    assert child.exitcode == 0 and answer(make()) == 42


def test_a_build_that_is_interrupted_leaves_nothing_that_is_loaded(tree, monkeypatch):
    environment = dict(os.environ)
    run_ninja = cpp_extension._run_ninja_build

    def interrupt(folder, *arguments, **options):
        run_ninja(folder, *arguments, **options)
        raise KeyboardInterrupt         # The library is there, but we do not know that it is whole.

    monkeypatch.setattr(cpp_extension, "_run_ninja_build", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make()
    assert os.environ == environment
    library, = tree.glob("fp4/build/kernels-*/*.so")
    assert not build.is_whole(str(library))


def test_of_two_processes_at_once_one_compiles_and_both_get_the_library(tree, monkeypatch):
    script = f'echo call >> {tree.parent}/log\nsleep 0.2\nexec c++ "$@"\n'
    monkeypatch.setenv("CXX", str(write_script(tree.parent / "logged", script)))
    results = FORK.Queue()
    children = [FORK.Process(target=lambda: results.put(make())) for _ in range(2)]
    for child in children:
        child.start()
    assert answer(results.get(timeout=20)) == 42
    assert results.get(timeout=20) == make()
    for child in children:
        child.join()
    assert (tree.parent / "log").read_text().count("call") == 2        # a compilation and a link


# ---- the compiler and its reason

def copy_of_fp4(folder):
    ignored = shutil.ignore_patterns("build", "__pycache__")
    return Path(shutil.copytree(ROOT / "fp4", folder / "fp4", ignore=ignored))


def start(folder, **environment):
    "is_compiled, as a process tells that starts in this folder"
    code = "import fp4; print(fp4.build().is_compiled)"
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True,
                          env={**kept, **environment})


def test_when_the_kernels_do_not_compile_one_line_says_where_and_why(tmp_path):
    copy = copy_of_fp4(tmp_path)
    source = copy / "kernels" / "cpu.cpp"
    source.write_text("\n\nint broken = not_declared;\n")
    (copy / "kernels" / "bind.cpp").write_text("")
    done = start(tmp_path)
    assert done.stdout == "False\n"
    last = done.stderr.splitlines()[-1]
    assert last.startswith("fp4 runs reference.py, which is slow, because the kernels did not "
                           f"build: {source}:"), done.stderr
    assert re.search(r"cpu\.cpp:3:\d+: error: .*not_declared", last)
    assert done.stderr.count("\n") == 2                 # with the line that says what is compiled


@pytest.mark.parametrize("output, reason", [
    ("In file included from a.cpp:1:\na.h:3:1: error: no b\nc.h:4:1: error: no d\n",
     "a.h:3:1: error: no b"),
    ("cc1plus: fatal error: error writing to /tmp/a.s: No space left on device\nnote: stop\n",
     "cc1plus: fatal error: error writing to /tmp/a.s: No space left on device"),
    ('fp4/kernels/a.cu(7): error: identifier "b" is undefined\n\n1 error detected\n',
     'fp4/kernels/a.cu(7): error: identifier "b" is undefined'),
    ("nvcc fatal   : Unsupported gpu architecture 'compute_120a'\n",
     "nvcc fatal   : Unsupported gpu architecture 'compute_120a'"),
    ("/usr/bin/ld: cannot find -lcudart: No such file\ncollect2: error: ld returned 1\n",
     "/usr/bin/ld: cannot find -lcudart: No such file"),
    ("a.o: in function `f':\na.cpp:(.text+0x9): undefined reference to `g'\ncollect2: error: ld\n",
     "a.cpp:(.text+0x9): undefined reference to `g'"),
])
def test_the_reason_is_the_line_that_names_the_error(output, reason):
    ninja = (f"Error building extension 'fp4_kernels': [1/2] c++ -c a.cpp\nFAILED: [code=1] a.o\n"
             f"c++ -c a.cpp\n{output}ninja: build stopped: subcommand failed.\n")
    assert toolchain.reason(ninja) == reason


@pytest.mark.parametrize("output, reason", [
    ("the licence has expired\nask for another\n", "the licence has expired"),
    ("", "ninja: build stopped: subcommand failed."),
])
def test_a_reason_without_a_mark_is_what_the_compiler_says_first(tree, monkeypatch, output, reason):
    (tree.parent / "output").write_text(output)
    script = f"cat {tree.parent}/output >&2; exit 3\n"
    monkeypatch.setenv("CXX", str(write_script(tree.parent / "compiler", script)))
    with pytest.raises(RuntimeError) as error:
        make()
    assert str(error.value) == reason
    assert not list(tree.glob("fp4/build/*/*.sha256"))


def test_a_library_that_does_not_load_is_told_with_the_symbol_that_it_lacks(tree, monkeypatch):
    lacking = 'int elsewhere();\nextern "C" int answer() { return elsewhere(); }\n'
    (tree / "fp4" / "kernels" / "answer.cpp").write_text(lacking)
    monkeypatch.setattr(build, "CPU_SOURCES", ("answer.cpp",))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    backend = build.load_or_fall_back("fp8")
    assert not backend.is_compiled
    assert re.search(r"did not build: .*\.so: undefined symbol: .*elsewhere", backend.description)


def test_a_compiler_behind_ccache_works(tree, monkeypatch):
    write_script(tree / "bin" / "ccache", f'echo "$@" >> "{tree}/log"\nexec "$@"\n')
    monkeypatch.setenv("PATH", str(tree / "bin"), prepend=os.pathsep)
    monkeypatch.setenv("CXX", "ccache g++ -m64")
    assert answer(make()) == 42
    assert all(line.startswith("g++ -m64 ") for line in (tree / "log").read_text().splitlines())
    variables = toolchain.environment(str(tree), target="")
    assert variables["CC"] == variables["CXX"]          # for nvcc


@pytest.fixture
def few_programs(tree, monkeypatch):
    "a PATH that has a compiler and little else; the folder of this Python, which is empty"
    (tree / "bin").mkdir()
    (tree / "python").mkdir()
    for name in ("c++", "as", "ld"):
        os.symlink(shutil.which(name), tree / "bin" / name)
    ninja = shutil.which("ninja") or os.path.join(os.path.dirname(sys.executable), "ninja")
    monkeypatch.setenv("PATH", str(tree / "bin"))
    monkeypatch.setattr(sys, "executable", str(tree / "python" / "python"))
    return tree / "python", ninja


def test_ninja_is_found_beside_python(few_programs):
    folder, ninja = few_programs
    os.symlink(ninja, folder / "ninja")
    assert answer(make()) == 42


def test_a_missing_ninja_is_one_sentence_with_the_remedy(few_programs):
    with pytest.raises(RuntimeError, match="^Ninja is required .*pip install ninja") as error:
        make()
    assert str(error.value).count("\n") == 0


def test_without_a_path_the_usual_compiler_is_found(monkeypatch):
    monkeypatch.delenv("PATH")
    monkeypatch.setenv("CXX", "")
    assert toolchain.find_cxx() == "c++"


def test_a_missing_compiler_is_named_before_it_is_said_that_it_compiles(tree, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    with pytest.raises(RuntimeError, match="no C\\+\\+ compiler /nonexistent/c\\+\\+: install g"):
        make()
    assert capsys.readouterr().err == ""


# ---- nvcc

def toolkit(folder, version, wheel=False):
    "a CUDA toolkit whose nvcc only tells its version, as NVIDIA's installer or pip lays it out"
    write_script(folder / "bin" / "nvcc",
                 f'[ "$1" = --dryrun ] && echo "#$ TOP={folder}/bin/.." >&2\n'
                 f'echo "Cuda compilation tools, release {version}, V{version}.88"\n')
    runtime = folder / ("lib" if wheel else "lib64") / "libcudart.so"
    runtime.parent.mkdir()
    runtime.with_name(f"libcudart.so.{version.split('.')[0]}").touch()
    if not wheel:
        runtime.touch()
    return str(folder / "bin" / "nvcc")


@pytest.fixture
def no_nvcc(tmp_path, monkeypatch):
    "a machine without any nvcc, whose packages for pip would lie in the folder that it gives"
    for name in ("CUDA_HOME", "CUDA_PATH", "CXX"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "bin").mkdir()
    for name in ("sh", "gcc", "g++", "c++", "as", "ld"):
        os.symlink(shutil.which(name), tmp_path / "bin" / name)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(toolchain, "USUAL_NVCC", str(tmp_path / "usual" / "bin" / "nvcc"))
    packages = tmp_path / "site-packages" / "nvidia"
    spec = SimpleNamespace(submodule_search_locations=[str(packages)])
    monkeypatch.setattr(toolchain.importlib.util, "find_spec",
                        lambda name: spec if packages.exists() else None)
    return packages


def test_the_nvcc_of_pip_s_packages_is_found(no_nvcc, tmp_path, monkeypatch):
    nvcc = toolkit(no_nvcc / "cu13", "13.0", wheel=True)
    assert toolchain.find_nvcc("13.0") == toolchain.find_nvcc() == nvcc
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    variables = toolchain.environment(str(tmp_path), target="90a")
    assert variables["CUDA_HOME"] == str(no_nvcc / "cu13")
    assert "CC" not in variables        # nvcc finds its C++ compiler itself
    runtime = no_nvcc / "cu13" / "lib" / "libcudart.so.13"
    assert os.path.samefile(tmp_path / "libcudart.so", runtime)


def test_an_nvcc_of_another_cuda_is_passed_over(no_nvcc, tmp_path, monkeypatch):
    old = toolkit(tmp_path / "usual", "12.0")
    wheel = toolkit(no_nvcc / "cu13", "13.0", wheel=True)
    assert toolchain.find_nvcc("13.0") == wheel
    assert toolchain.find_nvcc("12.8") == old
    assert toolchain.find_nvcc() == old
    script = write_script(tmp_path / "elsewhere" / "bin" / "nvcc", f'exec {old} "$@"\n')
    assert toolchain.cuda_home(script) == toolchain.cuda_home(old) == str(tmp_path / "usual")
    home = toolkit(tmp_path / "home", "13.1")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert toolchain.find_nvcc("13.0") == toolchain.find_nvcc() == home
    shutil.rmtree(no_nvcc)
    with pytest.raises(RuntimeError, match=r"for torch's CUDA 14.0 \(found: .*home/bin/nvcc of "
                                           r"CUDA 13.1, .*usual/bin/nvcc of CUDA 12.0\): install"):
        toolchain.find_nvcc("14.0")


def test_an_nvcc_that_cannot_be_found_is_one_sentence_with_the_remedy(no_nvcc):
    with pytest.raises(RuntimeError) as error:
        toolchain.find_nvcc("13.0")
    pinned = " ".join(f"{name}==13.0.*" for name in toolchain.WHEELS)
    assert str(error.value) == ("there is no nvcc for torch's CUDA 13.0 (found: none): install "
                                f"NVIDIA's CUDA toolkit 13.0, or `pip install {pinned}`")
    with pytest.raises(RuntimeError) as error:          # pip has no nvcc for CUDA 12
        toolchain.find_nvcc("12.8")
    assert str(error.value) == ("there is no nvcc for torch's CUDA 12.8 (found: none): install "
                                "NVIDIA's CUDA toolkit 12.8")


def test_only_a_gpu_without_nvcc_lacks_packages(no_nvcc, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert toolchain.missing_wheels() == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert toolchain.missing_wheels() == [f"{name}==13.0.*" for name in toolchain.WHEELS]
    toolkit(no_nvcc / "cu13", "13.0", wheel=True)
    assert toolchain.missing_wheels() == []
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert toolchain.missing_wheels() == []


def test_a_gpu_without_nvcc_falls_back_with_that_sentence(no_nvcc, tree, monkeypatch, capsys):
    (tree / "fp4" / "kernels" / "quantize.cu").touch()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    backend = build.load_or_fall_back("fp8")
    assert not backend.is_compiled
    sentence = "did not build: there is no nvcc for torch's CUDA 13.0 (found: none): install"
    assert sentence in backend.description
    assert capsys.readouterr().err == ""


def test_torch_s_builder_is_silent_where_there_is_nvcc_and_no_gpu(no_nvcc, monkeypatch, caplog):
    nvcc = toolkit(no_nvcc / "cu13", "13.0")
    monkeypatch.setenv("PATH", os.path.dirname(nvcc))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "_is_compiled", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delattr(torch.utils, "cpp_extension")
    monkeypatch.delitem(sys.modules, "torch.utils.cpp_extension")
    logger = logging.getLogger("torch.utils.cpp_extension")
    monkeypatch.setattr(logger, "handlers", [caplog.handler])
    with toolchain.cpp_extension({}) as module:
        assert module.CUDA_HOME == str(no_nvcc / "cu13")
    with toolchain.cpp_extension({"CUDA_HOME": "/another"}) as module:
        assert module.CUDA_HOME == "/another"
    assert caplog.text == "" and "CUDA_HOME" not in os.environ


def check_that_the_library_for_a_gpu_links(nvcc, tmp_path, monkeypatch):
    loaded = []
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)       # It would need a GPU.
    monkeypatch.setattr(toolchain, "find_nvcc", lambda cuda=None: nvcc)
    # Libraries that only a torch for CUDA has. It finds those first.
    for name in ("c10_cuda", "torch_cuda"):
        empty = ["g++", "-shared", "-x", "c++", os.devnull, "-o", tmp_path / f"lib{name}.so"]
        subprocess.run(empty, check=True)
    monkeypatch.setenv("LIBRARY_PATH", str(tmp_path))
    backend = importlib.import_module("fp4.backend").select_backend((9, 0))
    sources = (*build.CPU_SOURCES, *build.CUDA_SOURCES, *backend.sources)
    flags = ("-DUSE_CUDA", *backend.flags)
    cpp_extension.JIT_EXTENSION_VERSIONER.entries.clear()
    build.compile_library(str(tmp_path / "made"), sources, flags, backend.target, "kernels")
    assert loaded == [str(tmp_path / "made" / "made.so")]
    needs = subprocess.run([READELF, "-d", *loaded], capture_output=True, text=True).stdout
    assert "libcudart.so." in needs and "libtorch_cpu.so" in needs


@pytest.mark.slow
@pytest.mark.skipif(not EVERY_NVCC, reason="no nvcc")
def test_the_library_for_a_gpu_links(tmp_path, monkeypatch):
    check_that_the_library_for_a_gpu_links(toolchain.find_nvcc(), tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.skipif(not NVCC_OF_PIP, reason="nvcc is not installed with pip")
def test_the_nvcc_of_pip_s_packages_needs_no_toolkit(no_nvcc, tmp_path, monkeypatch):
    assert not shutil.which("nvcc")
    check_that_the_library_for_a_gpu_links(NVCC_OF_PIP[0], tmp_path, monkeypatch)


# ---- make

@pytest.fixture
def make_in(tmp_path):
    "make in a folder with this Makefile, whose Python writes down what it is asked"
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "requirements.txt").touch()
    (tmp_path / "data").mkdir()
    python = ('echo "$@" >> log\n'
              'case "$*" in\n'
              '*missing_wheels*) cat wheels;;\n'
              '*"pip install -q nvidia"*) echo no network >&2; exit 1;;\n'
              'esac\n')
    write_script(tmp_path / "fake-python", python)
    create = "mkdir -p .venv/bin && cp fake-python .venv/bin/python\n"
    write_script(tmp_path / "bin" / "python3", 'echo "$@" >> log\n' + create)

    def run(*arguments, wheels=""):
        (tmp_path / "wheels").write_text(wheels)
        (tmp_path / "log").write_text("")
        path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(["make", *arguments], cwd=tmp_path, capture_output=True, text=True,
                              env={"PATH": path, "HOME": str(tmp_path)})
        assert done.returncode == 0, done.stderr
        return done, (tmp_path / "log").read_text().splitlines()
    return run


def test_make_kernels_installs_nvcc_only_where_it_is_missing(make_in):
    done, log = make_in("kernels")
    assert "-m venv .venv" in log and "-m pip install -q -r requirements.txt" in log
    assert not any("nvidia" in line for line in log)
    done, log = make_in("kernels", wheels="nvidia-cuda-nvcc==13.0.* nvidia-nvvm==13.0.*\n")
    assert "-m pip install -q nvidia-cuda-nvcc==13.0.* nvidia-nvvm==13.0.*" in log
    assert log[-1] == "-c import fp4; fp4.build()"      # although pip failed
    assert "make kernels: installing nvidia-cuda-nvcc==13.0.*" in done.stdout
    done, log = make_in("kernels", "PYTHON=./fake-python", wheels="nvidia-cuda-nvcc==13.0.*\n")
    assert log == ["-c import fp4; fp4.build()"]        # a Python of yours is left as it is


def test_changed_requirements_are_installed(make_in, tmp_path):
    assert "-m pip install -q -r requirements.txt" in make_in("kernels")[1]
    assert "-m pip install -q -r requirements.txt" not in make_in("kernels")[1]
    later = time.time() + 10
    os.utime(tmp_path / "requirements.txt", (later, later))
    assert "-m pip install -q -r requirements.txt" in make_in("kernels")[1]


def test_make_clean_leaves_what_it_has_not_made(make_in, tmp_path):
    for folder in ("data/mine", "fp4/build", "out/run", "data/__pycache__"):
        (tmp_path / folder).mkdir(parents=True)
    _, log = make_in("clean")
    assert (tmp_path / "data" / "mine").exists() and (tmp_path / "out" / "run").exists()
    assert not (tmp_path / "fp4" / "build").exists()
    assert not (tmp_path / "data" / "__pycache__").exists()
    assert log == ["-B -m data.clean"]


# ---- what else makes another library

@pytest.mark.parametrize("flags", ["CXX_FLAGS", "NVCC_FLAGS", "LINK_FLAGS"])
def test_other_flags_of_a_compiler_make_another_library(tree, monkeypatch, flags):
    here = build.library_name(("answer.cpp",), (), "")
    monkeypatch.setattr(toolchain, flags, (*getattr(toolchain, flags), "-DOTHER"))
    assert build.library_name(("answer.cpp",), (), "") != here


@pytest.mark.parametrize("name", ["a.cpp", "a.cu", "a.cuh", "a.h", "models/a.cuh"])
def test_every_kind_of_source_makes_another_library(tree, name):
    path = tree / "fp4" / "kernels" / name
    found = {build.library_name(("answer.cpp",), (), "")}
    path.parent.mkdir(exist_ok=True)
    for text in ("one", "two"):
        path.write_text(text)
        found.add(build.library_name(("answer.cpp",), (), ""))
    assert len(found) == 3


def test_a_second_gemm_is_refused_in_a_sentence(monkeypatch):
    monkeypatch.setattr(build, "loaded", {"auto": object()})
    with pytest.raises(ValueError, match="'fp8' comes too late.*auto"):
        build.build("fp8")
