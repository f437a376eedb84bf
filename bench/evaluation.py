"""The memory that tools/evaluate.py's FID and its relatives take, beyond the networks, of as many
images as published numbers are of: 50,000 samples of 256 px against 10,000 images, as ADM's file.

    python bench/evaluation.py --out bench/results/evaluation-memory-cpu.json

Images come from .npz files that are written for it (12 GB in --folder, removed at the end), and go
through the metric as samples do. The network is not Inception, which takes hours for them on a CPU,
but as many numbers an image (2,048 pooled, 2,023 spatial, 1,008 logits), made of its thumbnail; so
time is that of files and formulas, and memory is what images and features need. It is read from
/proc (VmRSS, VmHWM), so that this runs on Linux alone. Of the time, most goes into precision and
recall, whose distances between 50,000 samples are 2.5 billion.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import harness
from bench.timer import Timing
from heptapod_fast import world as worlds
from heptapod_fast.evaluation import MetricContext
from heptapod_fast.evaluation.extractors import Features, load_torch_fidelity
from heptapod_fast.evaluation.fidelity import Fidelity
from heptapod_fast.evaluation.image_sets import open_images_at
from heptapod_fast.sampling.job import Job
from heptapod_fast.sampling.outputs import Arrays

METRICS = ("fid", "sfid", "is", "kid", "precision", "recall")
POOLED, SPATIAL, LOGITS = 2048, 7 * 17 * 17, 1008  # numbers an image, of Inception
THUMBNAIL = 8  # pixels a side
TILES = 64  # random images that the others are shifts of
BATCH = 256
STATUS = Path("/proc/self/status")


class Light:
    """As many features as Inception has, of an image's thumbnail; `Extractor`."""

    name = "light"
    sha256 = "0"
    knows_statistics = False

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        width = 3 * THUMBNAIL**2
        count = POOLED + SPATIAL + LOGITS
        self._weight = torch.randn(width, count, generator=generator) / width**0.5

    def __call__(self, pixels: Tensor) -> Features:
        """See `Extractor`."""
        small = F.adaptive_avg_pool2d(pixels.float() / 127.5 - 1, THUMBNAIL)
        # Not linear, so that the covariance of many features of few pixels has no zeros.
        found = torch.sin(8 * small.flatten(1) @ self._weight)
        return Features(*(part.contiguous() for part in found.split((POOLED, SPATIAL, LOGITS), 1)))


def write_images(path: Path, count: int, side: int, seed: int) -> None:
    """An .npz of random tiles, each time shifted by other numbers of pixels."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(TILES, 3, 16, 16, generator=generator)
    tiles = (255 * F.interpolate(coarse, side, mode="bilinear")).to(torch.uint8)
    arrays = Arrays(path, torch.zeros(count, dtype=torch.int64))
    with Job([arrays], count):
        for first in range(0, count, BATCH):
            number = min(BATCH, count - first)
            shifts = torch.randint(side, (number, 2), generator=generator).tolist()
            batch = [
                tiles[(first + k) % TILES].roll(shift, (1, 2)) for k, shift in enumerate(shifts)
            ]
            arrays.add(torch.zeros(number), torch.stack(batch))


def memory(name: str) -> int:
    """Bytes of this process: VmRSS, what is in memory now, or VmHWM, its peak."""
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def forget_peak() -> None:
    """The peak is counted from now on."""
    Path("/proc/self/clear_refs").write_text("5")


def measure(
    folder: Path, count: int, of_reference: int, side: int, names: Sequence[str]
) -> list[dict]:
    """A row of a results file."""
    samples, reference = folder / "samples.npz", folder / "reference.npz"
    write_images(samples, count, side, seed=0)
    write_images(reference, of_reference, side, seed=1)
    load_torch_fidelity()
    context = MetricContext(count=count, image_size=side, reference=str(reference))
    extractor = Light()
    forget_peak()
    before = memory("VmRSS")
    begin = time.perf_counter()
    metric = Fidelity(context, names, extractor)
    for pixels in open_images_at(str(samples), side, "--samples").batches():
        metric.update(pixels, torch.zeros(len(pixels)))
    while_looking = memory("VmHWM") - before
    numbers = metric.compute()
    seconds = time.perf_counter() - begin
    found = {
        "GB beyond the networks": round((memory("VmHWM") - before) / 1e9, 2),
        "GB until all samples were seen": round(while_looking / 1e9, 2),
        "GB of pixels": round((count + of_reference) * 3 * side**2 / 1e9, 2),
        "metrics": ", ".join(names),
        "network": "none: as many numbers an image as Inception's",
    }
    print(found, {name: value for name, value in numbers.items() if isinstance(value, float)})
    return [
        {
            "name": f"{count:,} samples of {side} px against {of_reference:,} images",
            "group": "memory of an evaluation",
            "extra_info": found,
            "stats": Timing((seconds,), calls=1, cpu=0.0).stats,
        }
    ]


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=50_000, help="samples")
    parser.add_argument("--reference", type=int, default=10_000, help="images of it")
    parser.add_argument("--side", type=int, default=256, help="pixels")
    parser.add_argument("--metrics", default=",".join(METRICS))
    parser.add_argument("--folder", type=Path, help="for the images; default: a temporary one")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    worlds.start("cpu")  # as the tool does, which keeps memory that was freed
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        names = options.metrics.split(",")
        rows = measure(Path(folder), options.count, options.reference, options.side, names)
    if options.out:
        harness.write_results(options.out, rows, harness.machine("cpu"))


if __name__ == "__main__":
    main()
