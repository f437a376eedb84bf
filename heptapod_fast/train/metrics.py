"""Numbers of a run: speed, FLOPs and their share of the peak, the progress line."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from heptapod_fast.progress import duration
from heptapod_fast.systems import Phase, System

# Dense bf16 peak in FLOP/s, from the vendors' datasheets. A device that is not listed gets no MFU.
PEAKS = {
    "NVIDIA H200": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
}

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


class Meter:
    """Collects device scalars without waiting for the device; `record` is the only wait.

    Args:
        total_images: of the run.
        peak: FLOP/s of one device, None where it is not known.
        ranks: devices that share the work.

    Attributes:
        flops: of one image in the phase at hand; the loop sets it when a phase begins.
    """

    def __init__(self, total_images: int, peak: float | None, ranks: int):
        self.total = total_images
        self.peak = peak
        self.ranks = ranks
        self.flops = 0.0
        self.loss: Tensor | float = 0.0
        self.norm: Tensor | float = 0.0
        self.steps = 0
        self.images = 0
        self.images_of_session = 0
        self.started = self.mark = time.monotonic()
        self.away = 0.0

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

    def pause(self, seconds: float) -> None:
        """Time spent on samples and checkpoints: no training rate."""
        self.away += seconds

    def record(self, images: int) -> dict[str, Any]:
        """Mean loss and rate since the last record; starts the next.

        images: trained on so far.
        """
        loss = float(self.loss) / max(self.steps, 1)
        norm = float(self.norm)
        now = time.monotonic()
        of_steps = now - self.mark - self.away
        rate = self.images / max(of_steps, 1e-9)
        self.images_of_session += self.images
        overall = self.images_of_session / max(now - self.started, 1e-9)
        left = max(self.total - images, 0)
        record = {
            "images": images,
            "loss": loss,
            "grad_norm": norm,
            "images_per_second": round(rate, 1),
            "seconds": round(now - self.started, 3),
            "step_seconds": round(of_steps, 3),
            "other_seconds": round(self.away, 3),
            "eta_seconds": round(left / max(overall, 1e-9), 1),
            "tflops": round(rate * self.flops / 1e12, 4),
        }
        if self.peak:
            record["mfu"] = round(rate * self.flops / (self.peak * self.ranks), 4)
        self.loss = 0.0
        self.steps = self.images = 0
        self.away = 0.0
        self.mark = now
        return record


def progress_line(record: dict[str, Any], total: int) -> str:
    """Fixed columns: images, loss, rate of learning, norm, speed, ETA."""
    images = record["images"]
    done = min(images / total, 1.0)
    columns = [
        f"images {images:>{len(f'{total:,}')},}/{total:,} ({done:4.0%})",
        f"loss {record['loss']:.4f}",
        f"lr {record['lr']:.2e}",
        f"norm {record['grad_norm']:6.3f}",
        f"{record['images_per_second']:>6,.0f} images/s",
    ]
    if "mfu" in record:
        columns.append(f"MFU {record['mfu']:.1%}")
    columns.append(f"ETA {duration(record['eta_seconds'])}")
    if record.get("skipped"):
        columns.append(f"skipped {record['skipped']}")
    return "  ".join(columns)
