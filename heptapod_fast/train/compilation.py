"""--compile: torch.compile of the units of a system, which are its blocks.

A block knows neither its place nor who sees whom, so that all blocks of a kind share one
compilation (two where the first is handed another residual stream than the others). Around our
kernels, which are opaque operators, it fuses what plain PyTorch does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from heptapod_fast.systems import System

# Every kind of block, every place that differs and every phase is a compilation, and one more than
# this is an error. PyTorch's own limit of 8 is for shapes that change without an end.
MOST_COMPILATIONS = 64


class Choice(NamedTuple):
    """Whether units are compiled, and why."""

    is_on: bool
    why: str

    def line(self) -> str:
        """For the start of a run."""
        return f"compile   {'on' if self.is_on else 'off'} ({self.why})"


def choose(asked: str, device: torch.device) -> Choice:
    """What --compile comes to. asked: "auto", "on" or "off"."""
    if asked != "auto":
        return Choice(asked == "on", "asked for" if asked == "on" else "not asked for")
    if device.type == "cuda":
        return Choice(True, "auto: a GPU")
    return Choice(False, f"auto: compiled for GPUs alone, this trains on {device.type}")


def apply(system: System, backend: str | Callable = "inductor") -> None:
    """Make training call compiled units, which are compiled when they are first called. After
    `recompute.apply`, before anything wraps the units.

    A unit stays the module that it is, and hooks of what wraps it act outside of what is compiled.

    Args:
        backend: of torch.compile.
    """
    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, MOST_COMPILATIONS)
    for unit in system.units():
        compiled = torch.compile(unit.forward, backend=backend, fullgraph=True, dynamic=False)
        # Of the instance: Module.__call__ finds it before that of the class.
        unit.forward = functools.partial(_in_training, unit.forward, compiled)


def _in_training(
    forward: Callable[..., Any], compiled: Callable[..., Any], /, *args: Any, **kwargs: Any
) -> Any:
    """compiled(*args, **kwargs), or what it was made of where no gradient is wanted: samplers call
    blocks with a cache that grows, of which every length would be a compilation."""
    call = compiled if torch.is_grad_enabled() else forward
    return call(*args, **kwargs)
