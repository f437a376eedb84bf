"""Where the time of some steps went, whoever recorded it: phases, operators, kernels, and how long
the device stood still. torch.profiler's events are read here, nsys's tables in nsys.py."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType

from heptapod_fast.reports.tables import share, table

# The parts of a step, by the names under which train/loop.py and train/step.py record them.
PHASES = ("data", "forward", "backward", "optimizer")
# What a GPU does besides kernels, as torch.profiler calls it.
COPIES = ("Memcpy", "Memset")
NAME_LENGTH = 90  # C++ names of kernels are long

Interval = tuple[float, float]  # (begin, end)


class Cost(NamedTuple):
    """What something took of a step on average. calls: of it in a step."""

    name: str
    ms: float
    calls: float


@dataclass(frozen=True)
class Profile:
    """Where the time of a step went, on average.

    Attributes:
        step_ms: of a step.
        phases: {phase: ms}; on a GPU its time.
        operators: the costliest first; empty where nobody recorded them.
        kernels: the costliest first; empty on a CPU.
        idle: the share of the time in which the device stood still; None where it is not known.
        on_gpu: whether the device is a GPU.
    """

    step_ms: float
    phases: dict[str, float]
    operators: list[Cost]
    kernels: list[Cost]
    idle: float | None
    on_gpu: bool


# ---------------------------------------------------------------------------------------- intervals


def covered(intervals: Iterable[Interval]) -> float:
    """The length of the union of intervals: what several cover at once counts once. Those that end
    before they begin have none."""
    total = 0.0
    reached = float("-inf")
    for begin, end in sorted(intervals):
        total += max(end - max(begin, reached), 0.0)
        reached = max(reached, end)
    return total


def span(intervals: Iterable[Interval]) -> Interval:
    """From the first begin to the last end; (0, 0) of none."""
    found = list(intervals)
    if not found:
        return 0.0, 0.0
    return min(begin for begin, _ in found), max(end for _, end in found)


def idle_share(busy: Iterable[Interval], within: Interval) -> float | None:
    """The share of an interval that none of the others covers; None of one without length."""
    first, last = within
    if last <= first:
        return None
    inside = [(max(begin, first), min(end, last)) for begin, end in busy]
    return 1.0 - covered(inside) / (last - first)


# ----------------------------------------------------------------------------------- torch.profiler


def of_torch(profiler: torch.profiler.profile, steps: int, on_gpu: bool) -> Profile:
    """Of a profiler that saw so many steps."""
    return of_events(profiler.events(), profiler.key_averages(), steps, on_gpu)


def of_events(events: Iterable[Any], averages: Iterable[Any], steps: int, on_gpu: bool) -> Profile:
    """Of torch.profiler's events and of their averages by name, whose times are microseconds.

    A GPU is busy while a kernel runs; measured is from the first thing that it does to the last. A
    CPU is busy while it is in an operator; measured is from the first phase to the last.
    """
    on_host = [event for event in events if event.device_type == DeviceType.CPU]
    on_device = [event for event in events if event.device_type != DeviceType.CPU]
    averages = [event for event in averages if event.device_type == DeviceType.CPU]
    phase_events = [event for event in on_host if event.name in PHASES]
    work = [event for event in on_device if not event.is_user_annotation]
    kernel_events = [event for event in work if not event.name.startswith(COPIES)]
    operator_events = [event for event in on_host if not event.is_user_annotation]
    busy = kernel_events if on_gpu else operator_events
    measured = span(map(times_of, work if on_gpu else phase_events))
    phases = {
        event.key: (event.device_time_total if on_gpu else event.cpu_time_total) / steps / 1000
        for event in averages
        if event.key in PHASES
    }
    operators = [
        Cost(
            event.key,
            (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / steps / 1000,
            event.count / steps,
        )
        for event in averages
        if not event.is_user_annotation
    ]
    kernels = costs(((event.name, duration_of(event) / 1000) for event in kernel_events), steps)
    return Profile(
        step_ms=(measured[1] - measured[0]) / steps / 1000,
        phases=phases,
        operators=costliest_first(operators),
        kernels=kernels,
        idle=idle_share(map(times_of, busy), measured),
        on_gpu=on_gpu,
    )


def times_of(event: Any) -> Interval:
    """(begin, end) of an event of torch.profiler, in microseconds."""
    return event.time_range.start, event.time_range.end


def duration_of(event: Any) -> float:
    """Microseconds of an event of torch.profiler."""
    begin, end = times_of(event)
    return end - begin


def costs(pieces: Iterable[tuple[str, float]], steps: int) -> list[Cost]:
    """Of (name, ms) of every call in so many steps, the costliest name first."""
    calls: dict[str, list[float]] = {}
    for name, ms in pieces:
        calls.setdefault(name, []).append(ms)
    return costliest_first(
        Cost(name, sum(found) / steps, len(found) / steps) for name, found in calls.items()
    )


def costliest_first(found: Iterable[Cost]) -> list[Cost]:
    """Sorted by time."""
    return sorted(found, key=lambda cost: cost.ms, reverse=True)


# ----------------------------------------------------------------------------------------- the page


def page(profile: Profile, title: str, about: str, most: int) -> str:
    """Markdown. most: rows of a table."""
    parts = [f"# {title}", about, idle_sentence(profile)]
    if profile.phases:
        parts.append(phases_table(profile))
    if profile.operators:
        parts.append(costs_table("operator", profile.operators[:most], profile.step_ms))
    if profile.kernels:
        parts.append(costs_table("kernel", profile.kernels[:most], profile.step_ms))
    return "\n\n".join(parts) + "\n"


def idle_sentence(profile: Profile) -> str:
    """The idle share, and what it means."""
    if profile.idle is None:
        return "Idle share: n/a, nothing was recorded."
    words = "of the step in no operator: Python and the launching of operators"
    if profile.on_gpu:
        words = "of the step the GPU ran no kernel; one that only copies counts as idle"
    return f"Idle share: {share(profile.idle)} {words}. A step took {profile.step_ms:.2f} ms."


def phases_table(profile: Profile) -> str:
    """Time of each phase and its share of them all."""
    total = max(sum(profile.phases.values()), 1e-9)
    rows = [
        [name, f"{profile.phases[name]:.2f}", f"{profile.phases[name] / total:.0%}"]
        for name in sorted_phases(profile.phases)
    ]
    return table(["phase", "ms", "share"], rows, numbers=[1, 2])


def sorted_phases(phases: Mapping[str, float]) -> list[str]:
    """In the order of a step; others behind."""
    known = [name for name in PHASES if name in phases]
    return [*known, *(name for name in phases if name not in PHASES)]


def costs_table(what: str, found: Sequence[Cost], step_ms: float) -> str:
    """A row for each, its own time, its share of the step."""
    rows = [
        [
            shortened(cost.name),
            f"{cost.ms:.3f}",
            share(cost.ms / max(step_ms, 1e-9)),
            f"{cost.calls:g}",
        ]
        for cost in found
    ]
    return table([what, "own ms", "share", "calls"], rows, numbers=[1, 2, 3])


def shortened(name: str) -> str:
    """A name that fits into a cell of a Markdown table."""
    cut = name if len(name) <= NAME_LENGTH else f"{name[: NAME_LENGTH - 3]}..."
    return cut.replace("|", "\\|")
