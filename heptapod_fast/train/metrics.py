"""Numbers of a run: the progress line, metrics.jsonl, FLOPs and their share of the peak."""

from __future__ import annotations

import errno
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from heptapod_fast.progress import duration

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


def training_flops(system) -> float:
    """FLOPs of one image's forward and backward pass; see FLOPS_FORMULA."""
    return 3 * sum(system.flops_per_image().values())


def peak_flops(device: torch.device) -> float | None:
    """bf16 peak of the device, None where it is not known."""
    if device.type != "cuda":
        return None
    return PEAKS.get(torch.cuda.get_device_name(device))


class MetricsFile:
    """metrics.jsonl: one JSON object a line. A full disk costs records, never the run."""

    def __init__(self, path: Path, say):
        self.path, self.say, self.failed = path, say, False

    def rewind(self, images: int) -> None:
        """Drop records behind `images`: the run continues from there and will write them again."""
        if not self.path.exists():
            return
        kept = [r for r in read_metrics(self.path) if r["images"] <= images]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(r) + "\n" for r in kept))
        temporary.rename(self.path)

    def write(self, record: dict[str, Any]) -> None:
        """Append one record; numbers that are not finite become null, which JSON has."""
        finite = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in record.items()
        }
        try:
            append(self.path, (json.dumps(finite) + "\n").encode())
        except OSError as error:
            if not self.failed:
                self.say(
                    f"WARNING: cannot write {self.path}: {error}; records are lost until it works"
                )
            self.failed = True
        else:
            self.failed = False


def append(path: Path, data: bytes) -> None:
    """Add to the end of a file, all or nothing: half a line would spoil the next one."""
    with open(path, "ab", buffering=0) as stream:
        before = stream.seek(0, os.SEEK_END)
        try:
            if stream.write(data) < len(data):
                raise OSError(errno.ENOSPC, "the disk is full", str(path))
        except OSError:
            stream.truncate(before)
            raise


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All records; a last line cut off by a crash is left out. ValueError names a broken line."""
    records, lines = [], path.read_text(errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or "images" not in record:
                raise ValueError('it has no "images"')
            records.append(record)
        except ValueError as error:
            if number < len(lines):
                raise ValueError(
                    f"{path}:{number} is not a record of a run: {error}; mend or remove that line"
                ) from error
    return records


class Meter:
    """Collects device scalars without waiting for the device; `record` is the only wait."""

    def __init__(self, total_images: int, flops: float, peak: float | None, world_size: int):
        self.total, self.flops, self.peak, self.ranks = total_images, flops, peak, world_size
        self.loss: Tensor | float = 0.0
        self.norm: Tensor | float = 0.0
        self.steps = self.images = 0
        self.started = self.mark = time.monotonic()
        self.away = self.run_images = 0.0

    def add(self, loss: Tensor, norm: Tensor, images: int) -> None:
        """One step's loss and gradient norm."""
        self.loss, self.norm = self.loss + loss.detach(), norm
        self.steps, self.images = self.steps + 1, self.images + images

    def pause(self, seconds: float) -> None:
        """Time spent on samples and checkpoints: no training rate."""
        self.away += seconds

    def record(self, images: int) -> dict[str, Any]:
        """Mean loss and rate since the last record; starts the next."""
        loss, norm = float(self.loss) / max(self.steps, 1), float(self.norm)
        now = time.monotonic()
        rate = self.images / max(now - self.mark - self.away, 1e-9)
        self.run_images += self.images
        overall = self.run_images / max(now - self.started, 1e-9)
        record = {
            "images": images,
            "loss": loss,
            "grad_norm": norm,
            "images_per_second": round(rate, 1),
            "seconds": round(now - self.started, 3),
            "other_seconds": round(self.away, 3),
            "eta_seconds": round(max(self.total - images, 0) / max(overall, 1e-9), 1),
        }
        record["tflops"] = round(rate * self.flops / 1e12, 4)
        if self.peak:
            record["mfu"] = round(rate * self.flops / (self.peak * self.ranks), 4)
        self.loss, self.steps, self.images, self.away, self.mark = 0.0, 0, 0, 0.0, now
        return record


def progress_line(record: dict[str, Any], total: int) -> str:
    """Fixed columns: images, loss, rate of learning, norm, speed, ETA."""
    images = record["images"]
    done = min(images / total, 1.0)
    mfu = f"  MFU {record['mfu']:.1%}" if "mfu" in record else ""
    count = f"{images:>{len(f'{total:,}')},}/{total:,} ({done:4.0%})"
    return (
        f"images {count}  loss {record['loss']:.4f}  lr {record['lr']:.2e}  "
        f"norm {record['grad_norm']:6.3f}  {record['images_per_second']:>6,.0f} images/s{mfu}  "
        f"ETA {duration(record['eta_seconds'])}"
        + (f"  skipped {record['skipped']}" if record.get("skipped") else "")
    )
