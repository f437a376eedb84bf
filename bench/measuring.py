"""All contenders of a case, in turns; one that fails says why and does not end the others."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from bench import timer
from bench.case import Case, Missing
from bench.timer import Timing

NO_TIME = "no time left"
ON_CUDA_ALONE = "torch.compile is compared on CUDA"
SECONDS_PER_CASE = {"cpu": 3.0, "cuda": 20.0}  # of samples, the warm-up aside


class DeviceLost(RuntimeError):
    """A kernel broke the CUDA context: nothing runs in this process any more."""


@dataclass(frozen=True)
class Result:
    """One contender of a case. timing: None if it did not run, and `why`. missing: it is not
    installed or refuses the shape, which is no fault; any other `why` is a failure."""

    contender: str
    timing: Timing | None
    why: str = ""
    missing: bool = False


def measure(
    case: Case,
    device: str,
    rounds: int | None = None,
    deadline: float = float("inf"),
    failed: Mapping[str, str] | None = None,
    announce: Callable[[str], None] = lambda contender: None,
) -> list[Result]:
    """Time the contenders of a case, in their order.

    Args:
        device: where the case's inputs are, "cpu" or "cuda".
        rounds: samples of each; by default what the device needs.
        deadline: on `time.monotonic()`; contenders that were not warm by then are left out.
        failed: contenders that are known to fail, with the reason: they are not tried.
        announce: called with the name of a contender before it is tried.

    Raises:
        DeviceLost: no further call can run in this process.
    """
    # Compiled functions keep the last case's tensors in cycles, and count recompilations.
    torch._dynamo.reset()
    gc.collect()
    try:
        made = case.inputs()
    except Exception as error:  # memory, say
        check_device(device, error)
        return [Result(name, None, f"inputs: {reason(error)}") for name in case.contenders]
    watches: dict[str, timer.Watch] = {}
    results: dict[str, Result] = {}
    for name, prepare in case.contenders.items():
        known = why_not(name, device, deadline, failed or {})
        if known is not None:
            results[name] = known
            continue
        announce(name)
        try:
            watches[name] = timer.watch(prepare(made), device)
        except Missing as error:
            results[name] = Result(name, None, str(error), missing=True)
        except Exception as error:  # a peer that breaks must not take the others with it
            check_device(device, error)
            results[name] = Result(name, None, reason(error))
    left = min(SECONDS_PER_CASE[device], deadline - time.monotonic())
    timings = timer.in_turns(watches, rounds or timer.ROUNDS[device], left)
    results |= {name: Result(name, timing) for name, timing in timings.items()}
    return [results[name] for name in case.contenders]


def why_not(name: str, device: str, deadline: float, failed: Mapping[str, str]) -> Result | None:
    """The result of a contender that is not even tried."""
    if name in failed:
        return Result(name, None, failed[name])
    if time.monotonic() > deadline:
        return Result(name, None, NO_TIME)
    if device == "cpu" and name.startswith("compiled"):
        return Result(name, None, ON_CUDA_ALONE, missing=True)
    return None


def check_device(device: str, error: Exception) -> None:
    """DeviceLost if the device answers no more; memory that a failure has left is given back."""
    if device != "cuda":
        return
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError as lost:
        raise DeviceLost(reason(error)) from lost


def reason(error: Exception) -> str:
    """The kind of an error and how it begins."""
    text = str(error).strip() or repr(error)
    return f"{type(error).__name__}: {text[:500]}"
