"""Builds the compiled operators (csrc/) with CMake and puts the library beside the package.

The package works without them, more slowly, so a machine without CMake or a compiler still
installs: one line says what is missing, and `heptapod_fast.ops.library.status()` repeats it later.

Environment:
    HEPTAPOD_CUDA=0             leave the CUDA operators out although nvcc is there
    HEPTAPOD_REQUIRE_LIBRARY=1  anything less than what this machine's compilers allow is an error
    CUDA_HOME                   where nvcc is, if neither on PATH nor in /usr/local/cuda
    MAX_JOBS                    compilers run at the same time (default: one per core, at most 8)
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
LIBRARY, NOTE = "libheptapod_fast.so", "_build_note.txt"


class BuildFailed(Exception):
    """Holds one line that says why."""


def find_torch() -> Path:
    """Folder of the installed torch, found without importing it (seconds)."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise BuildFailed("torch is not visible to the build; use pip's --no-build-isolation")
    return Path(spec.submodule_search_locations[0])


def find_cmake() -> str:
    """CMake of the system, or of pip's `cmake` package."""
    beside = Path(sysconfig.get_path("scripts")) / "cmake"
    found = shutil.which("cmake") or (str(beside) if beside.exists() else None)
    if found is None:
        raise BuildFailed("CMake was not found (pip install cmake)")
    return found


def cuda_is_unwanted() -> bool:
    return os.environ.get("HEPTAPOD_CUDA", "1").lower() in ("0", "off", "false", "no")


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME, PATH or the usual folder; None where there is none or it is unwanted."""
    if cuda_is_unwanted():
        return None
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")):
        if home and Path(home, "bin", "nvcc").exists():
            return str(Path(home, "bin", "nvcc"))
    usual = Path("/usr/local/cuda/bin/nvcc")
    return shutil.which("nvcc") or (str(usual) if usual.exists() else None)


def run_logged(command: list[str], log: Path) -> None:
    """Runs a command; on failure prints its output and raises with its first error line."""
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    with log.open("a") as file:
        file.write(done.stdout)
    if done.returncode:
        sys.stderr.write(done.stdout)
        lines = [line.strip() for line in done.stdout.splitlines()]
        # CMake says "CMake Error at FILE:" and puts the reason on a later line.
        told = [line for line in lines if "error" in line.lower() and not line.endswith(":")]
        first = (told or [line for line in lines if line] or ["no output"])[0]
        raise BuildFailed(f"{first[:300]} (all of it: {log})")


def build_with_cmake(torch_dir: Path, nvcc: str | None) -> Path:
    """Configures and builds; returns the library's path. Keeps objects between calls."""
    cmake = find_cmake()
    version = torch_dir / "version.py"
    tag = f"{torch_dir} {version.read_text() if version.exists() else ''} {nvcc} {cmake}"
    kind = "cuda" if nvcc else "cpu"
    folder = ROOT / "build" / f"{kind}-{hashlib.sha256(tag.encode()).hexdigest()[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "log.txt"
    log.write_text("")
    configure = [
        cmake,
        "-S",
        str(ROOT),
        "-B",
        str(folder),
        f"-DTORCH_DIR={torch_dir}",
        "-DCMAKE_BUILD_TYPE=Release",
        f"-DHEPTAPOD_CUDA={'ON' if nvcc else 'OFF'}",
    ]
    configure += [f"-DCMAKE_CUDA_COMPILER={nvcc}"] if nvcc else []
    if shutil.which("ninja") and not (folder / "Makefile").exists():
        configure += ["-G", "Ninja"]
    run_logged(configure, log)
    jobs = os.environ.get("MAX_JOBS") or str(min(os.cpu_count() or 1, 8))
    run_logged([cmake, "--build", str(folder), "-j", jobs], log)
    return folder / LIBRARY


def build_best() -> tuple[Path | None, str]:
    """(library or None, one line that says what is missing from it or "")."""
    nvcc = find_nvcc()
    try:
        torch_dir = find_torch()
        find_cmake()
    except BuildFailed as error:
        return None, str(error)
    why = "HEPTAPOD_CUDA=0" if cuda_is_unwanted() else "nvcc was not found"
    if nvcc:
        try:
            return build_with_cmake(torch_dir, nvcc), ""
        except BuildFailed as error:
            why = f"the CUDA build failed: {error}"
    try:
        return build_with_cmake(torch_dir, None), f"CUDA left out: {why}"
    except BuildFailed as error:
        return None, f"the C++ build failed: {error}"


class BuildLibrary(build_ext):
    """Replaces setuptools' compiler run by CMake's; the result is no Python extension module."""

    def folder(self) -> Path:
        if self.inplace or getattr(self, "editable_mode", False):
            return ROOT / "heptapod_fast"
        return Path(self.build_lib) / "heptapod_fast"

    def run(self) -> None:
        library, note = build_best()
        failed = library is None or "failed" in note
        if failed and os.environ.get("HEPTAPOD_REQUIRE_LIBRARY", "0") not in ("", "0"):
            raise SystemExit(f"heptapod_fast: HEPTAPOD_REQUIRE_LIBRARY is set, but {note}")
        folder = self.folder()
        folder.mkdir(parents=True, exist_ok=True)
        for name in (LIBRARY, NOTE):
            (folder / name).unlink(missing_ok=True)
        if library is not None:
            shutil.copy2(library, folder / LIBRARY)
        if note:
            (folder / NOTE).write_text(note + "\n")
        what = "built" if library is not None else "skipped"
        print(
            f"heptapod_fast: compiled operators {what}{': ' if note else ''}{note}", file=sys.stderr
        )

    def get_outputs(self) -> list[str]:
        return [
            str(self.folder() / name) for name in (LIBRARY, NOTE) if (self.folder() / name).exists()
        ]

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_source_files(self) -> list[str]:
        return []


# The extension carries no sources: its presence makes setuptools call build_ext and tag the wheel
# with the platform.
setup(
    ext_modules=[Extension("heptapod_fast._library", sources=[])],
    cmdclass={"build_ext": BuildLibrary},
)
