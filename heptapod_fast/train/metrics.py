"""Numbers of a run: speed, what its time went to, FLOPs and their share of the peak, memory, the
progress line."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from heptapod_fast.progress import duration, speed
from heptapod_fast.systems import Phase, System

# Dense bf16 peak in FLOP/s, from the vendors' datasheets. A device that is not listed gets no MFU.
PEAKS = {
    "NVIDIA H200": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
}

# What the loop's time goes to, by the names that it hands to `Meter.time`. The parts of a step are
# timed by the device's clock, for the host runs ahead of it; the others are waits of the host.
OF_STEPS = ("data", "forward_backward", "optimizer")
BETWEEN_STEPS = ("checkpoint", "sampling")
PARTS = (*OF_STEPS, *BETWEEN_STEPS)

FLOPS_FORMULA = (
    "forward + backward = 3 x forward; products only (2 per multiply-add), causal "
    "attention by half, supervised rows only, no recompute"
)


def training_flops(system: System, phase: Phase | None = None) -> float:
    """FLOPs of one image's forward and backward pass; see FLOPS_FORMULA."""
    return 3 * sum(system.flops_per_image(phase).values())


def peak_flops(device: torch.device) -> float | None:
    """bf16 peak of the device, None where it is not known."""
    if device.type != "cuda":
        return None
    return PEAKS.get(torch.cuda.get_device_name(device))


def memory_peak(device: torch.device) -> int:
    """Bytes, the most that this process has held at once: of a GPU its tensors, on a CPU all of its
    resident memory, the data included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): bytes there, KiB on Linux
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class Clock(Protocol):
    """Adds up the seconds of blocks of code."""

    def running(self) -> AbstractContextManager[None]:
        """Add the time of a block."""
        ...

    def take(self) -> float:
        """The seconds so far; from here on they count anew."""
        ...


class HostClock:
    """The time that the host spends in the blocks."""

    def __init__(self) -> None:
        self._seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """See Clock.running."""
        begin = time.monotonic()
        yield
        self._seconds += time.monotonic() - begin

    def take(self) -> float:
        """See Clock.take."""
        seconds = self._seconds
        self._seconds = 0.0
        return seconds


class DeviceClock:
    """The time that a GPU's stream spends between the begin and the end of the blocks.

    The host runs ahead of the GPU. So it only puts two events into the stream, which are read when
    all is done: nothing waits. A block in which the host waits for data counts as long as the GPU
    stands still for it, and not at all while work from before keeps the GPU busy.
    """

    def __init__(self) -> None:
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """See Clock.running."""
        begin = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        begin.record()
        yield
        end.record()
        self._events.append((begin, end))

    def take(self) -> float:
        """See Clock.take. Waits for the last block."""
        if self._events:
            _, last = self._events[-1]
            last.synchronize()
        milliseconds = sum(begin.elapsed_time(end) for begin, end in self._events)
        self._events = []
        return milliseconds / 1000


class Meter:
    """Collects device scalars without waiting for the device; `record` is the only wait.

    Args:
        total_images: of the run.
        peak: FLOP/s of one device, None where it is not known.
        ranks: devices that share the work.
        device: of this rank.

    Attributes:
        flops: of one image in the phase at hand; the loop sets it when a phase begins.
    """

    def __init__(
        self,
        total_images: int,
        peak: float | None,
        ranks: int,
        device: torch.device | str = "cpu",
    ):
        self.total = total_images
        self.peak = peak
        self.ranks = ranks
        self.device = torch.device(device)
        self.flops = 0.0
        self.loss: Tensor | float = 0.0
        self.norm: Tensor | float = 0.0
        self.steps = 0
        self.images = 0
        self.images_of_session = 0
        of_steps = DeviceClock if self.device.type == "cuda" else HostClock
        self.clocks: dict[str, Clock] = {part: of_steps() for part in OF_STEPS}
        self.clocks |= {part: HostClock() for part in BETWEEN_STEPS}
        self.started = self.mark = time.monotonic()

    def add(self, loss: Tensor, norm: Tensor, images: int) -> None:
        """One step's loss and gradient norm."""
        self.loss = self.loss + loss.detach()
        self.norm = norm
        self.steps += 1
        self.images += images

    @property
    def is_first_step(self) -> bool:
        """Whether one step was added in this session, and no more."""
        return self.images_of_session == 0 and self.steps == 1

    def time(self, part: str) -> AbstractContextManager[None]:
        """Count the time of a block as that of one of PARTS."""
        return self.clocks[part].running()

    def times(self) -> dict[str, float]:
        """Seconds since the last call, by their names in records: of steps, of what lies between
        them ("other"), and of each part. Waits for the device.

        Those of steps are what the others leave of the clock's, so that nothing is forgotten; a
        rate by them leaves out checkpoints and samples.
        """
        of_parts = {part: clock.take() for part, clock in self.clocks.items()}
        now = time.monotonic()
        other = sum(of_parts[part] for part in BETWEEN_STEPS)
        seconds = {"step": now - self.mark - other, "other": other, **of_parts}
        self.mark = now
        return {f"{name}_seconds": value for name, value in seconds.items()}

    def record(self, images: int) -> dict[str, Any]:
        """Mean loss, rate and times since the last record; starts the next.

        images: trained on so far.
        """
        loss = float(self.loss) / max(self.steps, 1)
        norm = float(self.norm)
        times = self.times()
        rate = self.images / max(times["step_seconds"], 1e-9)
        self.images_of_session += self.images
        seconds = self.mark - self.started
        overall = self.images_of_session / max(seconds, 1e-9)
        left = max(self.total - images, 0)
        record = {
            "images": images,
            "loss": loss,
            "grad_norm": norm,
            "images_per_second": float(f"{rate:.5g}"),
            "seconds": round(seconds, 3),
            **to_milliseconds(times),
            "eta_seconds": round(left / max(overall, 1e-9), 1),
            "tflops": float(f"{rate * self.flops / 1e12:.5g}"),
            "memory_peak_gb": round(memory_peak(self.device) / 1e9, 3),
        }
        if self.peak:
            record["mfu"] = round(rate * self.flops / (self.peak * self.ranks), 4)
        self.loss = 0.0
        self.steps = self.images = 0
        return record


def to_milliseconds(seconds: Mapping[str, float]) -> dict[str, float]:
    """The same, as exact as records have it."""
    return {name: round(value, 3) for name, value in seconds.items()}


def progress_line(record: dict[str, Any], total: int) -> str:
    """Fixed columns: images, loss, rate of learning, norm, speed, ETA."""
    images = record["images"]
    done = min(images / total, 1.0)
    columns = [
        f"images {images:>{len(f'{total:,}')},}/{total:,} ({done:4.0%})",
        f"loss {record['loss']:.4f}",
        f"lr {record['lr']:.2e}",
        f"norm {record['grad_norm']:6.3f}",
        f"{speed(record['images_per_second']):>6} images/s",
    ]
    if "mfu" in record:
        columns.append(f"MFU {record['mfu']:.1%}")
    columns.append(f"ETA {duration(record['eta_seconds'])}")
    if record.get("skipped"):
        columns.append(f"skipped {record['skipped']}")
    return "  ".join(columns)
