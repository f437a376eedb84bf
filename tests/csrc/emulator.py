"""The CUDA operators on the CPU: csrc/*.cu, compiled by the host's C++ compiler and run as fibers.

The sources are compiled as they are, but for three rewritings (`rewritten`): launches, the argument
that travels by reference, and where operators are registered: under the CPU key of the namespace
`heptapod_emulated`, with the schemas of their C++ siblings. So the library lives beside the real
one in one process, and the two can be compared; `standing_in` puts its operators in the place of
the real library's CPU operators, for tests that call these. What is checked while they run, and
what cannot be seen this way, stands at the top of emulation/emulation.cpp.

Libraries are kept in build/emulation, by a hash of everything that they are made of.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc"
HEADERS = Path(__file__).resolve().parent / "emulation"
TORCH = Path(torch.__file__).parent
CACHE = ROOT / "build" / "emulation"

NAMESPACE = "heptapod_emulated"
OPERATORS = ("adamw_ema", "global_norm", "sum_of_squares", "philox")
ORDERS = ("ascending", "descending", "random")
WRAPPED = (
    "torch_get_mutable_data_ptr",
    "torch_get_const_data_ptr",
    "aoti_torch_create_device_guard",
    "aoti_torch_delete_device_guard",
    "aoti_torch_get_current_cuda_stream",
)

# As CMakeLists.txt has them. -O2: without it arrays in registers would be memory, and checked.
COMMON = (
    "-std=c++17",
    "-O2",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-Wno-unknown-pragmas",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
    "-DTORCH_STABLE_ONLY",
)
CHECKED = ("-fsanitize=thread",)  # its calls, not its library: see emulation.cpp
SANITIZED = ("-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")


class BuildFailed(RuntimeError):
    """The compiler's output."""


@dataclass(frozen=True)
class Edit:
    """A change of one file of csrc/: `old` stands in it exactly once."""

    file: str
    old: str
    new: str


def compiler() -> str | None:
    """The C++ compiler of $CXX, or the system's; None where there is none."""
    return shutil.which(os.environ.get("CXX", "c++"))


def why_not() -> str | None:
    """None if the emulation can be built here, otherwise what is missing."""
    if platform.system() != "Linux":
        return "the emulation of the CUDA operators needs Linux (mmap, dl_iterate_phdr)"
    if compiler() is None:
        return "the emulation of the CUDA operators needs a C++ compiler, such as g++"
    return None


# Sources.


def edited(edits: Sequence[Edit] = ()) -> dict[str, str]:
    """{name: text} of csrc/, changed."""
    texts = {path.name: path.read_text() for path in sorted(SOURCES.iterdir())}
    for edit in edits:
        count = texts[edit.file].count(edit.old)
        if count != 1:
            raise ValueError(f"{edit.old!r} stands {count} times in {edit.file}, not once")
        texts[edit.file] = texts[edit.file].replace(edit.old, edit.new)
    return texts


def rewritten(text: str) -> str:
    """A .cu file for a C++ compiler; lines keep their numbers."""
    # name<types><<<blocks, threads, bytes, stream>>>(arguments)
    launch = re.compile(r"(\w+)((?:<[^<>;{}()]*>)?)<<<(.*?)>>>\(", re.DOTALL)
    text = launch.sub(r'::emulation::launcher("\1", &\1\2, \3)(', text)
    # By value it would be copied, all 32 KB of it, by each thread.
    text = re.sub(r"(__grid_constant__\s+[\w:<>]+?)(\s+\w+\s*[,)])", r"\1&\2", text)
    return re.sub(
        r"STABLE_TORCH_LIBRARY_IMPL\(heptapod_fast, CUDA, (\w+)\)",
        rf"STABLE_TORCH_LIBRARY_IMPL({NAMESPACE}, CPU, \1)",
        text,
    )


def schemas(texts: dict[str, str]) -> str:
    """A file that defines the operators as the .cpp files do."""
    lines = ["#include <torch/csrc/stable/library.h>"]
    for name, text in texts.items():
        if name.endswith(".cpp"):
            found = re.findall(
                r"^STABLE_TORCH_LIBRARY_FRAGMENT\(.*?^}", text, re.DOTALL | re.MULTILINE
            )
            lines += [block.replace("(heptapod_fast,", f"({NAMESPACE},", 1) for block in found]
    return "\n".join(lines) + "\n"


def contraction(name: str) -> tuple[str, ...]:
    """Flags for what the build says about fused multiply-adds in one file.

    nvcc contracts unless it is told -fmad=false, so the emulation does where its processor can.
    Which of the possible contractions a compiler picks is its own choice.
    """
    build = (ROOT / "CMakeLists.txt").read_text()
    properties = re.findall(r"set_source_files_properties\((.*?)\)", build, re.DOTALL)
    if any(name in text and "-fmad=false" in text for text in properties):
        return ("-ffp-contract=off",)
    return ("-ffp-contract=fast", *(("-mfma",) if _has_fma() else ()))


@functools.cache
def _has_fma() -> bool:
    """Whether this is an x86 processor that has, and needs to be asked for, fused multiply-adds."""
    info = Path("/proc/cpuinfo")
    return info.exists() and " fma " in info.read_text()


# Building.


def library(edits: Sequence[Edit] = (), flags: Sequence[str] = CHECKED) -> Path:
    """The emulation as a shared library, of sources with some changes; built if it is not there.

    Raises:
        BuildFailed: the compiler refuses the sources.
    """
    texts = edited(edits)
    made_of = [
        *(f"{name}\n{text}" for name, text in texts.items()),
        *(path.read_text() for path in sorted(HEADERS.iterdir())),
        Path(__file__).read_text(),
        " ".join(flags),
        str(contraction("adamw_ema.cu")),
        torch.__version__,
        _version(),
    ]
    name = hashlib.sha256("\0".join(made_of).encode()).hexdigest()[:16]
    path = CACHE / f"{name}.so"
    if path.exists():
        return path
    CACHE.mkdir(parents=True, exist_ok=True)
    # Another worker of the same test run may be building it.
    with open(CACHE / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            _build(texts, flags, path)
    (CACHE / f"{name}.lock").unlink(missing_ok=True)
    return path


@functools.cache
def _version() -> str:
    done = subprocess.run([compiler(), "--version"], capture_output=True, text=True, check=True)
    return done.stdout


def _run(*words: str | Path) -> None:
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True)
    if done.returncode:
        raise BuildFailed(done.stderr)


def _build(texts: dict[str, str], flags: Sequence[str], path: Path) -> None:
    """Compiles in a folder of its own, and puts the library in its place at once."""
    folder = path.with_suffix(f".{os.getpid()}")
    folder.mkdir()
    try:
        units = {HEADERS / "emulation.cpp": (), folder / "schemas.cpp": ()}
        (folder / "schemas.cpp").write_text(schemas(texts))
        for name, text in texts.items():
            if name.endswith((".cu", ".cuh", ".h")):
                (folder / name).write_text(f'#line 1 "{SOURCES / name}"\n{rewritten(text)}')
            if name.endswith(".cu"):
                units[folder / name] = (*flags, *contraction(name))
        if "-fsanitize=thread" not in flags:
            units[HEADERS / "emulation.cpp"] = tuple(flags)
        _compile_and_link(units, folder, flags, folder / path.name)
        os.replace(folder / path.name, path)
    finally:
        shutil.rmtree(folder)


def _compile_and_link(
    units: dict[Path, tuple[str, ...]], folder: Path, flags: Sequence[str], path: Path
) -> None:
    includes = ["-I", HEADERS, "-I", folder, "-isystem", TORCH / "include"]
    includes += ["-isystem", TORCH / "include" / "torch" / "csrc" / "api" / "include"]
    jobs = []
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for source, own in units.items():
            words = (*COMMON, *own, *includes, "-x", "c++", "-c", source)
            words += ("-o", folder / f"{source.name}.o")
            jobs.append(pool.submit(_run, compiler(), *words))
    for job in jobs:
        job.result()
    objects = [folder / f"{source.name}.o" for source in units]
    sanitizers = [flag for flag in flags if flag != "-fsanitize=thread"]
    wraps = [f"-Wl,--wrap={name}" for name in WRAPPED]
    torch_library = ["-L", TORCH / "lib", "-ltorch_cpu", "-lc10"]
    _run(compiler(), "-shared", *objects, *sanitizers, *wraps, *torch_library, "-o", path)


# Running.


class Emulation:
    """A loaded library. Only one can be loaded in a process."""

    def __init__(self, path: Path):
        torch.ops.load_library(str(path))
        self._library = ctypes.CDLL(str(path))
        self._library.heptapod_emulation_order.argtypes = [ctypes.c_int, ctypes.c_uint64]
        self._library.heptapod_emulation_launches.restype = ctypes.c_uint64

    def order(self, name: str, seed: int = 0) -> None:
        """In which order threads and blocks run from now on: one of ORDERS."""
        self._library.heptapod_emulation_order(ORDERS.index(name), seed)

    def launches(self) -> int:
        """How many kernels have run."""
        return self._library.heptapod_emulation_launches()

    @contextlib.contextmanager
    def standing_in(self) -> Iterator[None]:
        """The operators of `heptapod_fast` on CPU tensors are these, for a while."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Warning only once for all operators")
            override = torch.library.Library("heptapod_fast", "IMPL")
            for name in OPERATORS:
                operator = getattr(getattr(torch.ops, NAMESPACE), name).default
                override.impl(name, operator, "CPU", allow_override=True)
        try:
            yield
        finally:
            override._destroy()


@functools.cache
def loaded() -> Emulation:
    """The emulation of csrc/ as it is."""
    return Emulation(library())
