"""Which implementation of an operation runs: decided here, from device and dtype, and only here.

Each operation registers its implementations in order of preference, the plain-PyTorch reference
last. `choose` takes the first usable one, or the one asked for by name; asking for one that cannot
run is an error that says what to install. Nothing falls back in silence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

Check = Callable[[torch.device, torch.dtype], str | None]

_registry: dict[str, dict[str, tuple[Check, Check]]] = {}


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


def register(operation: str, name: str, check: Check,
             avoid: Check = lambda device, dtype: None) -> None:
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


def choose(operation: str, device: torch.device | str, dtype: torch.dtype,
           forced: str = "auto") -> Choice:
    """The implementation of `operation` for tensors of `dtype` on `device`.

    forced: "auto", or the name of an implementation. Raises ValueError for an unknown operation or
    name (with the names there are), `Unavailable` if the named one, or with "auto" every one,
    cannot run (with the reasons).
    """
    device = torch.device(device)
    names = implementations(operation)
    if forced != "auto":
        if forced not in names:
            raise ValueError(f"{operation} has no implementation {forced!r}; "
                             f"there are: auto, {', '.join(names)}")
        why_not = _registry[operation][forced][0](device, dtype)
        if why_not is not None:
            raise Unavailable(f"{operation}: {forced!r} was asked for and cannot run: {why_not}")
        return Choice(operation, forced, "asked for")
    skipped: list[str] = []
    for name in names:
        check, avoid = _registry[operation][name]
        why_not = check(device, dtype) or avoid(device, dtype)
        if why_not is None:
            first = f"preferred for {dtype} on {device.type}"
            return Choice(operation, name, "; ".join(skipped) or first)
        skipped.append(f"not {name}: {why_not}")
    raise Unavailable(f"{operation}: nothing can run {dtype} on {device.type}: "
                      f"{'; '.join(skipped)}")
