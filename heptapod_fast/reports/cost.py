"""What a run on ImageNet costs, modelled: time by FLOPs at a stated rate, and room on the disk.

python -m heptapod_fast.reports.cost bench/results/modelled-cost.json

Nothing here is measured. The time of a run is that of its products at SHARE of a device's dense
bf16 peak, on n devices 1 / n of it:

    days = FLOPs of an image x images / (SHARE x PEAK x devices) / 86,400

FLOPs are the repository's own count (train/metrics.py). Data, checkpoints and samples are taken to
cost no time. The page of the table (docs/recipe.md) says so where it shows it.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from heptapod_fast.averages import averages_of
from heptapod_fast.config import Config
from heptapod_fast.data.views import CROP_RANGES, Views
from heptapod_fast.reports.throughput import DEVICES, IMAGENET_IMAGES, SECONDS_PER_DAY
from heptapod_fast.systems import SYSTEMS, System, build_system, configure
from heptapod_fast.tokenizers import PRETRAINED, token_spec
from heptapod_fast.train.metrics import FLOPS_FORMULA, PEAKS, training_flops

COMMAND = "python -m heptapod_fast.reports.cost"
DEVICE = "NVIDIA H200"  # an H100 SXM has the same peak
SHARE = 0.6
CLASSES = 1000
IMAGE_SIZE = 256
SAMPLES = 50_000  # that FID is computed of
BYTES_PER_VALUE = {"float16": 2, "uint16": 2}
BYTES_PER_WEIGHT = 4  # of checkpoints: float32
MOMENTS = 2  # of AdamW
VIEWS = (Views("plain"), Views("flip"), Views("ten-crop", CROP_RANGES))
GB = 1e9


def modelled() -> dict[str, Any]:
    """Everything that the file holds; the same for the same code."""
    return {
        "command": COMMAND,
        "modelled": "not measured: FLOPs of the images / (share of the peak x devices)",
        "flops": FLOPS_FORMULA,
        "device": DEVICE,
        "peak_tflops": PEAKS[DEVICE] / 1e12,
        "share_of_peak": SHARE,
        "runs": [cost_of(config) for config in imagenet_runs()],
        "caches": [cache_of(name, views) for name in PRETRAINED for views in VIEWS],
        "samples_gb": SAMPLES * 3 * IMAGE_SIZE**2 / GB,
    }


def imagenet_runs() -> list[Config]:
    """The recipe of every size that is meant for ImageNet: those on tokens of published weights."""
    found = []
    for system, kind in SYSTEMS.items():
        for size in kind.Settings.SIZES:
            config = configure(size, system=system)
            if config.data.tokenizer in PRETRAINED:
                found.append(config)
    return found


def cost_of(config: Config) -> dict[str, Any]:
    """A row of the table of runs: one device, several, and a checkpoint."""
    system = build_system(config, CLASSES, "meta", fill=False)
    recipe = config.recipe
    flops = run_flops(system, recipe.images)
    seconds = seconds_at_the_share(flops)
    steps = -(-recipe.images // recipe.batch)
    parameters = sum(parameter.numel() for parameter in system.parameters())
    return {
        "system": f"`{config.system}`",
        "size": f"`{config.size}`",
        "parameters": parameters,
        "tokens": f"`{config.data.tokenizer}`",
        "epochs": recipe.images / IMAGENET_IMAGES,
        "batch": recipe.batch,
        "steps": steps,
        "gflop_per_image": flops / recipe.images / 1e9,
        "zflop": flops / 1e21,
        "images_per_second": recipe.images / seconds,
        "seconds_per_step": {str(devices): seconds / steps / devices for devices in DEVICES},
        "days": {str(devices): seconds / devices / SECONDS_PER_DAY for devices in DEVICES},
        "checkpoint_gb": checkpoint_bytes(config, parameters) / GB,
    }


def run_flops(system: System, images: int) -> float:
    """FLOPs of all images of a run, phase by phase."""
    return sum(
        (phase.end - phase.first) * training_flops(system, phase) for phase in system.phases(images)
    )


def seconds_at_the_share(flops: float) -> float:
    """Of one device."""
    return flops / (SHARE * PEAKS[DEVICE])


def checkpoint_bytes(config: Config, parameters: int) -> int:
    """Of the tensors of one checkpoint: weights, moments and averages."""
    averages = len(averages_of(config.recipe.ema or ()))
    return BYTES_PER_WEIGHT * parameters * (1 + MOMENTS + averages)


def cache_of(tokenizer: str, views: Views) -> dict[str, Any]:
    """A row of the table of caches."""
    stored = PRETRAINED[tokenizer].stored_arrays(token_spec(tokenizer, IMAGE_SIZE))
    of_a_view = sum(
        BYTES_PER_VALUE[array.dtype] * math.prod(array.shape) for array in stored.values()
    )
    of_an_image = of_a_view * views.count
    return {
        "tokens": f"`{tokenizer}`",
        "views": str(views),
        "view_count": views.count,
        "bytes_per_image": of_an_image,
        "gb": of_an_image * IMAGENET_IMAGES / GB,
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path, help="JSON file to write")
    path = parser.parse_args().path
    path.write_text(json.dumps(modelled(), indent=1) + "\n")
    print(f"written: {path}")


if __name__ == "__main__":
    main()
