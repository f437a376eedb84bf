"""The CUDA operators on the CPU: csrc/*.cu, compiled by the host's C++ compiler and run as fibers.

The sources are compiled as they are, but for three rewritings (`rewritten`): launches, the argument
that travels by reference, and where operators are registered: under the CPU key of the namespace
`heptapod_emulated`, with the schemas of their C++ siblings. So the library lives beside the real
one in one process, and the two can be compared; `standing_in` puts its operators in the place of
the real library's CPU operators, for tests that call these. What is checked while they run, and
what cannot be seen this way, stands at the top of emulation/emulation.cpp.

Libraries are kept in build/emulation, by a hash of everything that they are made of, until
`make clean`.
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
import tempfile
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

# As CMakeLists.txt has them, but for the optimization.
COMMON = (
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-Wno-unknown-pragmas",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
    "-DTORCH_STABLE_ONLY",
)
# Without it arrays in registers would be memory, and checked; more of it takes longer to compile.
# The second is when g++ contracts.
OPTIMIZED = ("-O1", "-fexpensive-optimizations")
CHECKED = ("-fsanitize=thread",)  # its calls, not its library: see emulation.cpp
SANITIZERS = "HEPTAPOD_EMULATION_SANITIZERS"  # environment: 1 for these flags instead
SANITIZED = ("-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")


class BuildFailed(RuntimeError):
    """The compiler's output."""


@dataclass(frozen=True)
class Edit:
    """A change of one file of csrc/, or of CMakeLists.txt: `old` stands in it exactly once."""

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
    """{name: text} of csrc/ and of CMakeLists.txt, changed."""
    paths = [*sorted(SOURCES.iterdir()), ROOT / "CMakeLists.txt"]
    texts = {path.name: path.read_text() for path in paths}
    for edit in edits:
        count = texts[edit.file].count(edit.old)
        if count != 1:
            raise ValueError(f"{edit.old!r} stands {count} times in {edit.file}, not once")
        texts[edit.file] = texts[edit.file].replace(edit.old, edit.new)
    return texts


# name<types><<<blocks, threads, bytes, stream>>>(
_LAUNCH = re.compile(r"(\w+)((?:<[^<>;{}()]*>)?)<<<(.*?)>>>\(", re.DOTALL)
_BOUNDS = re.compile(r"__launch_bounds__\((\w+)\)\s+(\w+)\(")
_MOST_THREADS = "1024"  # of a block, where a kernel names no bounds


def rewritten(text: str) -> str:
    """A .cu file for a C++ compiler; lines keep their numbers."""
    bounds = {kernel: threads for threads, kernel in _BOUNDS.findall(text)}

    def launch(found: re.Match) -> str:
        name, types, configuration = found.groups()
        most = bounds.get(name, _MOST_THREADS)
        return f'::emulation::launcher("{name}", {most}, &{name}{types}, {configuration})('

    text = _LAUNCH.sub(launch, text)
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


def contraction(name: str, build: str) -> tuple[str, ...]:
    """Flags for what CMakeLists.txt (its text) says about fused multiply-adds in one file.

    nvcc contracts unless it is told -fmad=false, so the emulation does where its processor can.
    Which of the possible contractions a compiler picks is its own choice.
    """
    properties = re.findall(r"set_source_files_properties\((.*?)\)", build, re.DOTALL)
    if any(name in text and "-fmad=false" in text for text in properties):
        return ("-ffp-contract=off",)
    return ("-ffp-contract=fast", "-mfma") if has_fma() else ("-ffp-contract=fast",)


@functools.cache
def has_fma() -> bool:
    """Whether this is an x86 processor with fused multiply-adds: the compiler has to be told."""
    info = Path("/proc/cpuinfo")
    return info.exists() and " fma " in info.read_text()


# Building.


def library(edits: Sequence[Edit] = (), flags: Sequence[str] = CHECKED) -> Path:
    """The emulation as a shared library, of sources with some changes; built if it is not there.

    Raises:
        BuildFailed: the compiler refuses the sources.
    """
    texts = edited(edits)
    units = [_Unit(HEADERS / "emulation.cpp", None, ("-O2", *_without_checks(flags)))]
    units.append(_Unit(Path("schemas.cpp"), schemas(texts), ()))
    for name, text in texts.items():
        if name.endswith(".cu"):
            own = contraction(name, texts["CMakeLists.txt"])
            units.append(_Unit(Path(name), rewritten(text), (*OPTIMIZED, *flags, *own)))
    headers = {
        name: rewritten(text) for name, text in texts.items() if name.endswith((".cuh", ".h"))
    }
    keys = [_key(unit, headers) for unit in units]
    path = CACHE / f"{_hash(*keys, *flags, *WRAPPED)}.so"
    with _alone(path):
        if not path.exists():
            with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = list(pool.map(_object, units, keys, [headers] * len(units)))
            _link(objects, flags, path)
    return path


@dataclass(frozen=True)
class _Unit:
    """A file to compile: where it is, or its text, and its flags."""

    path: Path
    text: str | None
    flags: tuple[str, ...]


def _without_checks(flags: Sequence[str]) -> tuple[str, ...]:
    """Flags for what must not be checked itself."""
    return tuple(flag for flag in flags if flag not in CHECKED)


def _hash(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def _key(unit: _Unit, headers: dict[str, str]) -> str:
    """A hash of everything that an object file is made of."""
    text = unit.path.read_text() if unit.text is None else unit.text
    own_headers = [path.read_text() for path in sorted(HEADERS.glob("*.h"))]
    of_csrc = [headers[name] for name in sorted(included(text, headers))]
    flags = (*unit.flags, *COMMON)
    return _hash(text, *flags, *own_headers, *of_csrc, torch.__version__, _version())


def included(text: str, headers: dict[str, str]) -> set[str]:
    """The headers of csrc/ that a text includes, and those that these include."""
    names = set(re.findall(r'#include "(.*?)"', text)) & headers.keys()
    deeper = [included(headers[name], headers) for name in names]
    return names.union(*deeper)


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """No other process makes this file meanwhile: workers of one test run want the same ones."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@functools.cache
def _version() -> str:
    return _run(compiler(), "--version")


def _run(*words: str | Path) -> str:
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True)
    if done.returncode:
        raise BuildFailed(done.stderr)
    return done.stdout


def _object(unit: _Unit, key: str, headers: dict[str, str]) -> Path:
    """The compiled unit."""
    path = CACHE / f"{key}.o"
    with _alone(path), tempfile.TemporaryDirectory(dir=CACHE) as name:
        if path.exists():
            return path
        folder = Path(name)
        source = unit.path
        if unit.text is not None:
            source = folder / unit.path.name
            source.write_text(_numbered(unit.path.name, unit.text))
        for header, text in headers.items():
            (folder / header).write_text(_numbered(header, text))
        words = [*COMMON, *unit.flags, "-I", HEADERS, "-I", folder]
        words += ["-isystem", TORCH / "include", "-x", "c++", "-c", source]
        _run(compiler(), *words, "-o", folder / "object.o")
        os.replace(folder / "object.o", path)
    return path


def _numbered(name: str, text: str) -> str:
    """The text, for messages that name the file in csrc/."""
    return f'#line 1 "{SOURCES / name}"\n{text}'


def _link(objects: Sequence[Path], flags: Sequence[str], path: Path) -> None:
    """Puts the library in its place at once."""
    made = path.with_suffix(f".{os.getpid()}")
    wraps = [f"-Wl,--wrap={name}" for name in WRAPPED]
    torch_library = ["-L", TORCH / "lib", "-ltorch_cpu", "-lc10"]
    words = ["-shared", *objects, *_without_checks(flags), *wraps, *torch_library]
    _run(compiler(), *words, "-o", made)
    os.replace(made, path)


# Running.


class Emulation:
    """A loaded library. Only one can be loaded in a process."""

    def __init__(self, path: Path):
        torch.ops.load_library(str(path))
        self._library = ctypes.CDLL(str(path))
        self._library.heptapod_emulation_order.argtypes = [ctypes.c_int, ctypes.c_uint64]
        self._library.heptapod_emulation_only_last.argtypes = [ctypes.c_int64]
        self._library.heptapod_emulation_launches.restype = ctypes.c_uint64

    def order(self, name: str, seed: int = 0) -> None:
        """In which order threads and blocks run from now on: one of ORDERS."""
        self._library.heptapod_emulation_order(ORDERS.index(name), seed)

    @contextlib.contextmanager
    def only_last(self, blocks: int) -> Iterator[None]:
        """Of each grid the last blocks alone are run, for a while: for the ends of huge tensors."""
        self._library.heptapod_emulation_only_last(blocks)
        try:
            yield
        finally:
            self._library.heptapod_emulation_only_last(2**31 - 1)

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
    """The emulation of csrc/ as it is; with the sanitizers where the environment asks for them."""
    sanitized = os.environ.get(SANITIZERS, "0") not in ("", "0")
    return Emulation(library(flags=SANITIZED if sanitized else CHECKED))


@contextlib.contextmanager
def running(name: str) -> Iterator[str]:
    """The implementation to ask an operation for: `name` itself, but for "emulated", which is
    "cpu" while the emulation stands in for it."""
    if name != "emulated":
        yield name
        return
    with loaded().standing_in():
        yield "cpu"
