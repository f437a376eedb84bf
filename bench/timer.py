"""The one timer: several calls take turns, so that noise and changing clocks meet all alike.

A `Watch` warms one call up and takes one sample of it at a time; `in_turns` goes through all
watches once a round. On a CPU (and for whole steps on a GPU) a sample is what a clock on the wall
says. For an operation on a GPU it is the time of the device alone: see `DeviceWatch`.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

ROUNDS = {"cpu": 15, "cuda": 31}
FEWEST_ROUNDS = 5
SHORTEST_SAMPLE = 1e-3  # seconds on the wall: a shorter call is repeated within a sample
FLUSH_BYTES = 256 * 2**20  # several times the L2 cache of any GPU there is
FASTEST_CLOCK = 2e9  # cycles per second of an SM, at most

Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds per call.

    samples: one for every round. calls: how many calls a sample averages over. cpu: median of the
    CPU seconds of this process, all threads. launched: on a GPU, a call on its own as eager mode
    launches it, the host's work included; None elsewhere.
    """

    samples: tuple[float, ...]
    calls: int
    cpu: float
    launched: float | None = None

    @property
    def median(self) -> float:
        """Seconds of the middle sample."""
        return statistics.median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Seconds: the spread of the middle half of the samples."""
        if len(self.samples) == 1:
            return self.samples[0], self.samples[0]
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return low, high

    @property
    def stats(self) -> dict[str, float]:
        """As pytest-benchmark stores them, in seconds."""
        low, high = self.quartiles
        return {
            "min": min(self.samples),
            "max": max(self.samples),
            "median": self.median,
            "q1": low,
            "q3": high,
            "rounds": len(self.samples),
        }


class Watch(Protocol):
    """One call that is warm. calls: per sample. launched: see Timing."""

    calls: int
    launched: float | None

    def sample(self) -> float:
        """Seconds per call."""


class WallWatch:
    """A clock on the wall; on a GPU it waits for the device before and after."""

    launched = None

    def __init__(self, call: Call, device: str = "cpu"):
        self.call = call
        self.device = device
        self.calls = 1
        self.sample()  # compiles and allocates
        self.calls = max(1, math.ceil(SHORTEST_SAMPLE / self.sample()))

    def sample(self) -> float:
        """Seconds per call."""
        self._wait()
        begin = time.perf_counter()
        for _ in range(self.calls):
            self.call()
        self._wait()
        return (time.perf_counter() - begin) / self.calls

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


class DeviceWatch:
    """Time of the device between two events: no launches, and nothing left in the L2 cache.

    A sample queues four things: a kernel that holds the device until the host has queued the rest
    (else a short operation would be timed as long as its launch takes); a read of more memory than
    L2 holds (a read, because written lines would have to go back to memory while the call runs);
    an event, the call, and another event.
    """

    calls = 1

    def __init__(self, call: Call):
        self.call = call
        for _ in range(3):  # compiles, allocates, lets torch.compile settle
            call()
        torch.cuda.synchronize()
        self.launched = statistics.median(self._alone() for _ in range(5))
        self.hold_cycles = int(FASTEST_CLOCK * (1.5 * self._seconds_to_queue() + 1e-4))
        self.flush = _flush_buffer()

    def sample(self) -> float:
        """Seconds of one call."""
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(self.hold_cycles)
        self.flush.sum()
        start.record()
        self.call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def _alone(self) -> float:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        self.call()
        torch.cuda.synchronize()
        return time.perf_counter() - begin

    def _seconds_to_queue(self) -> float:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        self.call()
        queued = time.perf_counter() - begin
        torch.cuda.synchronize()
        return min(queued, 0.1)


_flush: torch.Tensor | None = None


def _flush_buffer() -> torch.Tensor:
    """One for all watches."""
    global _flush
    if _flush is None:
        _flush = torch.zeros(FLUSH_BYTES // 4, device="cuda")
    return _flush


def watch(call: Call, device: str) -> Watch:
    """A warm call: on "cuda" the time of the device alone, on "cpu" that on the wall."""
    return DeviceWatch(call) if device == "cuda" else WallWatch(call)


def in_turns(
    watches: Mapping[str, Watch], rounds: int, seconds: float = math.inf
) -> dict[str, Timing]:
    """Time every call once a round.

    Args:
        watches: {name: a call that is warm}.
        rounds: how many samples of each, at least 2.
        seconds: no new round after so many, once there are FEWEST_ROUNDS.
    """
    samples: dict[str, list[float]] = {name: [] for name in watches}
    busy: dict[str, list[float]] = {name: [] for name in watches}
    deadline = time.monotonic() + seconds
    for done in range(rounds):
        if done >= FEWEST_ROUNDS and time.monotonic() > deadline:
            break
        for name, ready in watches.items():
            before = time.process_time()
            samples[name].append(ready.sample())
            busy[name].append((time.process_time() - before) / ready.calls)
    return {
        name: Timing(
            tuple(samples[name]), ready.calls, statistics.median(busy[name]), ready.launched
        )
        for name, ready in watches.items()
    }


def ratio(slower: Timing, faster: Timing) -> tuple[float, tuple[float, float]]:
    """How many times as long the first takes: of the medians, and the quartiles of the rounds'."""
    pairs = zip(slower.samples, faster.samples, strict=True)
    low, _, high = statistics.quantiles([a / b for a, b in pairs], n=4, method="inclusive")
    return slower.median / faster.median, (low, high)
