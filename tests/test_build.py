"""The build: what the library needs from PyTorch, and installs that have less than everything."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from heptapod_fast.ops import library

ROOT = Path(__file__).resolve().parents[1]
TORCH = Path(torch.__file__).parent
# Used by the headers of torch 2.13 when no target version is set; absent from torch 2.11.
TOO_NEW = {"torch_exception_get_what", "torch_exception_get_what_without_backtrace",
           "torch_new_stable_ivalue"}


@pytest.fixture(scope="module")
def needed():
    """{symbol: "U" or "w"} of what the built library expects others to define."""
    if not library.PATH.exists():
        pytest.skip(library.status())
    return dict(reversed(line.split()) for line in nm("--undefined-only", library.PATH))


def nm(which, path):
    """`nm -D` lines without addresses and symbol versions."""
    if shutil.which("nm") is None:
        pytest.skip("nm (binutils) is not installed")
    out = subprocess.run(["nm", "-D", which, str(path)], capture_output=True, text=True, check=True)
    return [re.sub(r"@.*", "", re.sub(r"^[0-9a-f]+ ", "", line.strip()))
            for line in out.stdout.splitlines()]


def newer_than_2_11():
    """Functions the installed PyTorch's C headers declare for releases after 2.11 only."""
    found, depth, since = set(), 0, None
    for header in (TORCH / "include/torch/csrc/stable/c").glob("*.h"):
        for line in header.read_text().splitlines():
            if re.match(r"#\s*if", line):
                depth += 1
                version = re.search(r"FEATURE_VERSION >= TORCH_VERSION_2_(\d+)_0", line)
                if version and int(version[1]) > 11 and since is None:
                    since = depth
            elif re.match(r"#\s*endif", line):
                since = None if since == depth else since
                depth -= 1
            elif since is not None:
                found |= set(re.findall(r"\b((?:aoti_)?torch_\w+)\s*\(", line))
    return found


def test_no_symbol_is_newer_than_the_oldest_supported_torch(needed):
    newer = newer_than_2_11() | TOO_NEW
    assert not newer & set(needed)
    if torch.__version__ >= "2.13":
        assert len(newer) > len(TOO_NEW), "the headers' version guards were not recognised"


def test_only_the_stable_interface_is_used(needed):
    torch_cpp = [name for name in needed if re.match(r"_ZN?K?(3c10|2at|5torch)", name)]
    assert not torch_cpp


def test_nothing_of_cuda_torch_is_needed_to_load(needed):
    """Strong symbols must come from the libraries that CPU builds of PyTorch have too."""
    there = set()
    for name in ("libtorch_cpu.so", "libc10.so"):
        there |= {line.split()[-1] for line in nm("--defined-only", TORCH / "lib" / name)}
    strong = {name for name, kind in needed.items()
              if kind == "U" and re.match(r"(aoti_)?torch_", name)}
    assert strong and not strong - there
    assert needed.get("aoti_torch_get_current_cuda_stream", "w") == "w"


def test_dependencies(needed):
    if shutil.which("readelf") is None:
        pytest.skip("readelf (binutils) is not installed")
    out = subprocess.run(["readelf", "-d", str(library.PATH)], capture_output=True, text=True,
                         check=True).stdout
    libraries = re.findall(r"NEEDED.*\[(.*?)\]", out)
    # Without it weak CUDA symbols stay unresolved on GPU machines.
    assert "libtorch.so" in libraries
    assert not [name for name in libraries if "cuda" in name]
    assert "RPATH" not in out and "RUNPATH" not in out


def run_python(code, folder, **environment):
    """Runs code in a new interpreter that sees `folder` first; returns the finished process."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder,
                          env=os.environ | {"PYTHONPATH": str(folder)} | environment, check=False)


def test_the_library_loads_in_a_fresh_process(needed):
    done = run_python("from heptapod_fast.ops import library; print(library.status())", ROOT)
    assert done.stdout.startswith("compiled operators: loaded, CPU"), done.stdout + done.stderr


def test_everything_imports_and_runs_without_the_library(tmp_path):
    shutil.copytree(ROOT / "heptapod_fast", tmp_path / "heptapod_fast",
                    ignore=shutil.ignore_patterns("*.so", "__pycache__", library._NOTE.name))
    done = run_python(
        "import torch, heptapod_fast.ops as ops; from heptapod_fast.rng import Rng\n"
        "print(ops.library.status()); print(ops.library.available('cpu'))\n"
        "print(ops.dispatch.choose('adamw_ema', 'cpu', torch.float32))\n"
        "print(Rng(3).bits('s', torch.arange(2), 2).tolist())", tmp_path)
    assert done.returncode == 0, done.stderr
    status, available, choice, bits = done.stdout.splitlines()
    assert status.startswith("compiled operators: not built") and available == "False"
    assert choice.startswith("adamw_ema: reference (not cuda")
    from heptapod_fast.rng import Rng
    assert bits == str(Rng(3).bits("s", torch.arange(2), 2).tolist())


@pytest.fixture
def sources(tmp_path):
    """A copy of what a build reads, without results of earlier builds."""
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    (tmp_path / "heptapod_fast").mkdir()
    return tmp_path


def build(folder, **environment):
    return subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=folder,
                          capture_output=True, text=True, env=os.environ | environment, check=False)


def test_a_failed_build_still_installs_and_says_why(sources):
    pytest.importorskip("setuptools")
    if shutil.which("cmake") is None:
        pytest.skip("CMake is not installed")
    broken = {"HEPTAPOD_CUDA": "0", "CXX": "/bin/false", "HEPTAPOD_REQUIRE_LIBRARY": "0"}
    done = build(sources, **broken)
    assert done.returncode == 0, done.stderr
    note = (sources / "heptapod_fast" / library._NOTE.name).read_text()
    assert note.startswith("the C++ build failed: ") and note.count("\n") == 1
    assert not (sources / "heptapod_fast" / library.PATH.name).exists()
    done = build(sources, **broken | {"HEPTAPOD_REQUIRE_LIBRARY": "1"})
    assert done.returncode != 0 and "HEPTAPOD_REQUIRE_LIBRARY" in done.stderr


@pytest.mark.slow
def test_a_failed_cuda_build_falls_back_to_cpu_and_shows_the_error(sources):
    pytest.importorskip("setuptools")
    if shutil.which("cmake") is None or shutil.which("c++") is None:
        pytest.skip("CMake or a C++ compiler is not installed")
    if shutil.which("nvcc") is None and not Path("/usr/local/cuda/bin/nvcc").exists():
        pytest.skip("nvcc is not installed")
    (sources / "csrc" / "broken.cu").write_text("__global__ void f() { no_such_name(); }\n")
    done = build(sources, HEPTAPOD_CUDA="1", HEPTAPOD_REQUIRE_LIBRARY="0")
    assert done.returncode == 0 and "no_such_name" in done.stderr
    assert (sources / "heptapod_fast" / library.PATH.name).exists()
    note = (sources / "heptapod_fast" / library._NOTE.name).read_text()
    assert note.startswith("CUDA left out: the CUDA build failed: ") and "no_such_name" in note
