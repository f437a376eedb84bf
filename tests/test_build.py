"""The build: what the library needs from PyTorch, and installs that have less than everything."""

import importlib.util
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
ALLOWED = ROOT / "tests" / "stable_abi_2_11.txt"
ARCHITECTURES = {"sm_80", "sm_90a"}
# Kernels that may use the stack, each with its reason. None does: no spills, no local arrays.
STACK: dict[str, str] = {}


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
    return [
        re.sub(r"@.*", "", re.sub(r"^[0-9a-f]+ ", "", line.strip()))
        for line in out.stdout.splitlines()
    ]


def allowed():
    """{library: C functions that it has in torch 2.11.0}."""
    found = {}
    for line in ALLOWED.read_text().splitlines():
        if line.startswith("["):
            names = found.setdefault(line.strip("[]"), set())
        elif line and not line.startswith("#"):
            names.add(line)
    return found


def of_torch(needed, kind):
    """PyTorch's C functions among the symbols of one kind, "U" (strong) or "w" (weak)."""
    return {name for name, k in needed.items() if k == kind and re.match(r"(aoti_)?torch_", name)}


def test_every_symbol_exists_in_the_oldest_supported_torch(needed):
    """Strong ones in every build of it, weak ones only where they need CUDA."""
    there = allowed()
    strong, weak = of_torch(needed, "U"), of_torch(needed, "w")
    assert len(there["libtorch_cpu.so"]) > 100 and strong
    assert not strong - there["libtorch_cpu.so"]
    assert not weak - there["libtorch_cuda.so"]
    # Newer headers use these unless TORCH_TARGET_VERSION says 2.11: the list must not know them.
    assert not there["libtorch_cpu.so"] & {"torch_exception_get_what", "torch_new_stable_ivalue"}


def test_only_the_stable_interface_is_used(needed):
    """No C++ symbol of torch, c10 or at: neither functions nor type information."""
    pattern = r"_Z.*(?<!\d)(3c10|2at|5torch)(?=\d)"
    assert re.match(pattern, "_ZN3c105ErrorD1Ev") and re.match(pattern, "_ZTIN5torch3jit6ObjectE")
    assert not [name for name in needed if re.match(pattern, name)]


def test_nothing_of_cuda_torch_is_needed_to_load(needed):
    """Strong symbols must come from the libraries that CPU builds of PyTorch have too."""
    there = set()
    for name in ("libtorch_cpu.so", "libc10.so"):
        there |= {line.split()[-1] for line in nm("--defined-only", TORCH / "lib" / name)}
    strong = of_torch(needed, "U")
    assert strong and not strong - there
    assert needed.get("aoti_torch_get_current_cuda_stream", "w") == "w"


def test_dependencies(needed):
    if shutil.which("readelf") is None:
        pytest.skip("readelf (binutils) is not installed")
    out = subprocess.run(
        ["readelf", "-d", str(library.PATH)], capture_output=True, text=True, check=True
    ).stdout
    libraries = re.findall(r"NEEDED.*\[(.*?)\]", out)
    # Without it weak CUDA symbols stay unresolved on GPU machines.
    assert "libtorch.so" in libraries
    assert not [name for name in libraries if "cuda" in name]
    assert "RPATH" not in out and "RUNPATH" not in out


@pytest.fixture(scope="module")
def cuobjdump(needed):
    """cuobjdump(flag): its output for the built library."""
    if not library.available("cuda"):
        pytest.skip(library.why_not("cuda"))
    spec = importlib.util.find_spec("triton")
    folders = [Path(spec.origin).parent / "backends/nvidia/bin"] if spec else []
    folders += [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"]
    found = [folder / "cuobjdump" for folder in folders if (folder / "cuobjdump").exists()]
    if not found:
        pytest.skip("cuobjdump is neither in CUDA's folder nor in triton's")
    return lambda flag: (
        subprocess.run(
            [found[0], flag, library.PATH], capture_output=True, text=True, check=True
        ).stdout
    )


def test_machine_code_for_every_architecture(cuobjdump):
    """Each .cu file for each of them, and PTX for chips that are neither."""
    files = len(list((ROOT / "csrc").glob("*.cu")))
    elves = re.findall(r"\.(sm_\w+)\.cubin", cuobjdump("--list-elf"))
    assert {arch: elves.count(arch) for arch in set(elves)} == dict.fromkeys(ARCHITECTURES, files)
    assert len(re.findall(r"\.sm_80\.ptx", cuobjdump("--list-ptx"))) == files


def test_the_optimizer_step_is_not_contracted(cuobjdump):
    """No product and sum became one instruction, nor may the assembler make them one.

    Otherwise the vector loop and the loop for the rest differ, and with them the bits of an update
    at different alignments. CMakeLists.txt says -fmad=false.
    """
    kernels = {}
    for part in cuobjdump("--dump-ptx").split(".entry ")[1:]:
        name, _, body = part.partition("(")
        kernels[name.strip()] = body
    steps = [
        body
        for name, body in kernels.items()
        if "adamw_ema_kernel" in name or "average_kernel" in name
    ]
    # Gradients of two dtypes with 0 to 4 averages; 1 to 4 further averages.
    assert len(steps) == 2 * 5 + 4
    for body in steps:
        assert re.search(r"\bmul\.rn\.f32\b", body)
        assert not re.search(r"\bfma\.rn\.f32\b", body)
        # Without ".rn" the assembler may contract.
        assert not re.search(r"\b(mul|add|sub)\.f32\b", body)


def test_no_kernel_spills(cuobjdump):
    """No bytes of stack or local memory in any kernel, and no kernel left out."""
    arch, usage = None, {}
    for line in cuobjdump("--dump-resource-usage").splitlines():
        if line.startswith("arch = "):
            arch = line.removeprefix("arch = ")
        elif match := re.match(r"\s*Function (\S+):", line):
            function = match[1]
        elif "STACK:" in line:
            numbers = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", line))
            usage[arch, function] = {name: int(value) for name, value in numbers.items()}
    sources = "".join(path.read_text() for path in (ROOT / "csrc").glob("*.cu"))
    kernels = set(re.findall(r"__global__ void (?:__launch_bounds__\(\w+\)\s+)?(\w+)\(", sources))
    assert len(kernels) >= 4
    for arch in ARCHITECTURES:
        names = {name for a, name in usage if a == arch}
        assert not {k for k in kernels if not any(k in name for name in names)}, arch
    spilling = {
        key: use
        for key, use in usage.items()
        if (use["STACK"] or use["LOCAL"]) and not any(name in key[1] for name in STACK)
    }
    assert not spilling


def run_python(code, folder, **environment):
    """Runs code in a new interpreter that sees `folder` first; returns the finished process."""
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder)} | environment,
        check=False,
    )


def test_the_library_loads_in_a_fresh_process(needed):
    done = run_python("from heptapod_fast.ops import library; print(library.status())", ROOT)
    assert done.stdout.startswith("compiled operators: loaded, CPU"), done.stdout + done.stderr


def test_everything_imports_and_runs_without_the_library(tmp_path):
    shutil.copytree(
        ROOT / "heptapod_fast",
        tmp_path / "heptapod_fast",
        ignore=shutil.ignore_patterns("*.so", "__pycache__", library._NOTE.name),
    )
    done = run_python(
        "import torch, heptapod_fast.ops as ops; from heptapod_fast.rng import Rng\n"
        "print(ops.library.status()); print(ops.library.available('cpu'))\n"
        "print(ops.dispatch.choose('adamw_ema', 'cpu', torch.float32))\n"
        "print(Rng(3).bits('s', torch.arange(2), 2).tolist())",
        tmp_path,
    )
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
    return subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=folder,
        capture_output=True,
        text=True,
        env=os.environ | environment,
        check=False,
    )


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
