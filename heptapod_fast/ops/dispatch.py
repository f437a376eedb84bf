"""Which implementation of an operation runs: decided here, from device, dtype and shape.

Each operation registers its implementations in order of preference, the plain-PyTorch reference
last. `choose` takes the first usable one, or the one asked for by name; asking for one that cannot
run is an error that says what to install. Nothing falls back in silence.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.autograd import forward_ad

Check = Callable[[torch.device, torch.dtype], str | None]

_registry: dict[str, dict[str, tuple[Check, Check]]] = {}
_told: set[str] = set()


PLAIN = ("reference", "sdpa")  # PyTorch's own, differentiable in every way


class Unavailable(RuntimeError):
    """An implementation was asked for by name that cannot run here."""


@dataclass(frozen=True)
class Choice:
    """What runs, and why: `str(choice)` is the line to print at the start of a run."""

    operation: str
    implementation: str
    reason: str

    def __str__(self) -> str:
        return f"{self.operation}: {self.implementation} ({self.reason})"


def register(
    operation: str, name: str, check: Check, avoid: Check = lambda device, dtype: None
) -> None:
    """Adds an implementation behind those already registered for `operation`.

    check(device, dtype): None if it can run there, otherwise why not and what to install or change.
    avoid(device, dtype): None, or why it should not be taken unless asked for.
    Raises ValueError if the name is taken ("auto" always is).
    """
    entries = _registry.setdefault(operation, {})
    if name == "auto" or name in entries:
        raise ValueError(f"{operation} already has an implementation named {name!r}")
    entries[name] = check, avoid


def implementations(operation: str) -> tuple[str, ...]:
    """The names registered for `operation`, preferred ones first; ValueError if there is none."""
    if operation not in _registry:
        raise ValueError(f"no operation {operation!r}; known: {', '.join(sorted(_registry))}")
    return tuple(_registry[operation])


def operations(implementation: str) -> tuple[str, ...]:
    """The operations that have an implementation of this name, sorted."""
    return tuple(sorted(name for name, found in _registry.items() if implementation in found))


def choose(
    operation: str,
    device: torch.device | str,
    dtype: torch.dtype,
    forced: str = "auto",
    unsupported: Mapping[str, str | None] | None = None,
) -> Choice:
    """The implementation of `operation` for tensors of `dtype` on `device`.

    forced: "auto", or the name of an implementation. unsupported: {implementation: why it cannot
    take these tensors, or None}, for what depends on more than device and dtype. Raises ValueError
    for an unknown operation or name (with the names there are), `Unavailable` if the named one, or
    with "auto" every one, cannot run (with the reasons).
    """
    device = torch.device(device)
    names = implementations(operation)
    unsupported = unsupported or {}
    if forced != "auto":
        if forced not in names:
            raise ValueError(
                f"{operation} has no implementation {forced!r}; there are: auto, {', '.join(names)}"
            )
        why_not = _registry[operation][forced][0](device, dtype) or unsupported.get(forced)
        if why_not is not None:
            raise Unavailable(f"{operation}: {forced!r} was asked for and cannot run: {why_not}")
        return Choice(operation, forced, "asked for")
    skipped: list[str] = []
    for name in names:
        check, avoid = _registry[operation][name]
        why_not = check(device, dtype) or avoid(device, dtype) or unsupported.get(name)
        if why_not is None:
            first = f"preferred for {dtype} on {device.type}"
            return Choice(operation, name, "; ".join(skipped) or first)
        skipped.append(f"not {name}: {why_not}")
    raise Unavailable(
        f"{operation}: nothing can run {dtype} on {device.type}: {'; '.join(skipped)}"
    )


class Operators:
    """The `implementation` that each operation is called with, handed from the start of a run to
    whoever calls operations; immutable, so that all modules share one.

    asked: {operation: "auto" or the name of an implementation}; operations that are not in it get
    "auto", which a call resolves by its own tensors, as `select` says. choices: what that comes to
    for the tensors of the run, to be printed.
    """

    def __init__(self, asked: Mapping[str, str] | None = None, choices: Sequence[Choice] = ()):
        self._asked = dict(asked or {})
        self.choices = tuple(choices)

    def __getitem__(self, operation: str) -> str:
        return self._asked.get(operation, "auto")

    def __repr__(self) -> str:
        return f"Operators({self._asked})"

    def lines(self) -> list[str]:
        """What runs, and why; see `summary`."""
        return summary(self.choices)


AUTO = Operators()


def summary(choices: Sequence[Choice]) -> list[str]:
    """One line for all operations that run the same way for the same reason."""
    groups: dict[tuple[str, str], list[str]] = {}
    for choice in choices:
        groups.setdefault((choice.implementation, choice.reason), []).append(choice.operation)
    return [
        f"{', '.join(names)}: {implementation} ({reason})"
        for (implementation, reason), names in groups.items()
    ]


def select(
    operation: str,
    device: torch.device,
    dtype: torch.dtype,
    forced: str = "auto",
    unsupported: str | Mapping[str, str | None] | None = None,
    unwanted: Mapping[str, str | None] | None = None,
) -> str:
    """The name alone, for the call itself; torch.compile takes it for a constant.

    unsupported: why an implementation cannot take these arguments (layout, width), None if it can;
    a string speaks for all kernels. Then "auto" means the next one, and says so once;
    asking for it by name raises `Unavailable`. unwanted: {implementation: why "auto" passes it over
    for these arguments, or None}, of which nothing is said.
    """
    passed_over = unwanted if forced == "auto" else None
    choice = choose(operation, device, dtype, forced, passed_over)
    chosen = choice.implementation
    if chosen == "reference" and choice.reason != "asked for" and device.type == "cuda":
        _tell(f"{operation}: the plain-PyTorch reference runs, {choice.reason}")
    kernels = [name for name in implementations(operation) if name not in PLAIN]
    if forward_ad._current_level >= 0 and dtype.is_floating_point:
        # A kernel would pass a tangent over in silence; integers have none.
        unsupported = "kernels have no forward-mode derivatives; take implementation='reference'"
    if unsupported is None or isinstance(unsupported, str):
        unsupported = dict.fromkeys(kernels, unsupported)
    if unsupported.get(chosen) is None:
        return chosen
    message = f"{operation}: {chosen!r} cannot take these tensors: {unsupported[chosen]}"
    if choice.reason == "asked for":
        raise Unavailable(message)
    left = {**(unwanted or {}), **{k: why for k, why in unsupported.items() if why is not None}}
    instead = choose(operation, device, dtype, unsupported=left).implementation
    runs = "the plain-PyTorch reference" if instead == "reference" else instead
    _tell(f"{message}; {runs} runs instead")
    return instead


# What torch.compiler.assume_constant_result does; that imports torch._dynamo, two seconds of every
# start.
setattr(select, "_dynamo_marked_constant", True)  # noqa: B010


def _tell(message: str) -> None:
    if message not in _told:
        _told.add(message)
        warnings.warn(message, stacklevel=4)


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, which takes CPU tensors (for tests)."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def _missing_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if importlib.util.find_spec("heptapod_fast.kernels") is None:
        return "the kernels are not installed: pip install --no-build-isolation -e ."
    return None


_why_no_triton = _missing_triton()


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Of a CUDA device; that of the kernels where there is none, for questions without a GPU."""
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else (8, 0)


TRITON_DTYPES = (torch.float32, torch.bfloat16)


def triton_check(
    device: torch.device, dtype: torch.dtype, dtypes: tuple[torch.dtype, ...] = TRITON_DTYPES
) -> str | None:
    """A check for `register`: Triton is there, and the tensors suit its kernels."""
    if device.type != "cuda" and not (device.type == "cpu" and interpreted()):
        return f"runs on cuda tensors, these are on {device.type}"
    if device.type == "cuda" and capability(device) < (8, 0):
        return "needs compute capability 8.0 or newer, this GPU has {}.{}".format(
            *capability(device)
        )
    if dtype not in dtypes:
        return f"takes {' and '.join(str(d) for d in dtypes)}, these are {dtype}"
    return _why_no_triton


def avoid_interpreter(device: torch.device, dtype: torch.dtype) -> str | None:
    """For `register`: the interpreter is for tests, no choice."""
    return None if device.type == "cuda" else "the interpreter is for tests"


def register_triton(operation: str, cpu: Check | None = None) -> None:
    """Registers "triton" and, behind it, "reference".

    cpu: the check of a "cpu" between them, where the compiled library has one.
    """
    register(operation, "triton", triton_check, avoid=avoid_interpreter)
    if cpu is not None:
        register(operation, "cpu", cpu)
    register(operation, "reference", lambda device, dtype: None)
