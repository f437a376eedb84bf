"""Finds and loads the compiled operators (csrc/), once, when this module is imported.

The library reaches PyTorch through the LibTorch stable ABI only, so one file serves every
PyTorch >= 2.11, with CUDA or without. Where it is missing, or was built for something else, nothing
fails: `status` says why in one line and every operation keeps its plain-PyTorch reference.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from pathlib import Path

import torch

from heptapod_fast.ops import dispatch

_PACKAGE = Path(__file__).resolve().parents[1]
PATH = _PACKAGE / "libheptapod_fast.so"
_NOTE = _PACKAGE / "_build_note.txt"
_HOW = "install with nvcc, CMake and a C++ compiler: pip install --no-build-isolation -e ."


def _note() -> str:
    """What setup.py had to say about the last build; "" if nothing."""
    return _NOTE.read_text().strip() if _NOTE.exists() else ""


def _load(path: Path) -> tuple[str, str]:
    """(what the library holds or "", why it is not loaded or ""); never raises."""
    if not path.exists():
        return "", f"not built: {_note() or 'no build has run'}; {_HOW}"
    try:
        torch.ops.load_library(str(path))
        describe = ctypes.CDLL(str(path)).heptapod_build_info
        describe.restype = ctypes.c_char_p
        return describe().decode(), ""
    except (OSError, RuntimeError, AttributeError) as error:
        first = str(error).strip().splitlines()[0]
        return "", (
            f"not loaded: {path.name} does not fit torch {torch.__version__} ({first}); "
            f"build it again: pip install --no-build-isolation -e ."
        )


_holds, _missing = _load(PATH)


def status() -> str:
    """One line for the start of a run: what is loaded, or why nothing is and what to install."""
    if _missing:
        return f"compiled operators: {_missing}"
    return f"compiled operators: loaded, {_holds}" + (f" ({_note()})" if _note() else "")


def why_not(device_type: str) -> str | None:
    """None if the operators for "cpu" or "cuda" are loaded, else one line with what to do."""
    if _missing:
        return f"the compiled operators are {_missing}"
    if device_type == "cpu" or (device_type == "cuda" and "CUDA" in _holds):
        return None
    if device_type == "cuda":
        return f"the compiled operators hold no CUDA code ({_note() or _holds}); {_HOW}"
    return f"the compiled operators know cpu and cuda, not {device_type}"


def oldest_capability() -> tuple[int, int]:
    """The lowest compute capability that the loaded library has CUDA code for.

    Its PTX, of the lowest architecture too, serves every later GPU.
    """
    architectures = re.findall(r"sm_(\d+)(\d)", _holds)
    return min((int(major), int(minor)) for major, minor in architectures)


def _too_old(device: torch.device) -> str | None:
    """None if the library has code for this GPU, else what it has code for."""
    major, minor = dispatch.capability(device)
    if (major, minor) >= oldest_capability():
        return None
    oldest = "{}.{}".format(*oldest_capability())
    return (
        f"the compiled operators ({_holds}) hold no code for GPUs older than compute capability "
        f"{oldest}, this GPU has {major}.{minor}; CMakeLists.txt names the architectures"
    )


def check(device_type: str) -> Callable[[torch.device, torch.dtype], str | None]:
    """A check for `dispatch.register`: tensors on that device, operators for it loaded."""

    def usable(device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type != device_type:
            return f"runs on {device_type} tensors, these are on {device.type}"
        missing = why_not(device_type)
        if missing is None and device_type == "cuda":
            return _too_old(device)
        return missing

    return usable


def takes_rows(device: torch.device, dtype: torch.dtype) -> str | None:
    """A check for `dispatch.register`: the operators of csrc/rows.h can take such tensors."""
    if dtype not in (torch.float32, torch.bfloat16):
        return f"takes float32 and bfloat16, these are {dtype}"
    return check("cpu")(device, dtype)


def available(device_type: str) -> bool:
    """Whether the compiled operators for tensors on "cpu" or "cuda" are loaded."""
    return why_not(device_type) is None
