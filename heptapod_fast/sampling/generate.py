"""Many samples, in batches."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from heptapod_fast.rng import Rng
from heptapod_fast.sampling.samplers import SampleOptions


def spread(classes: list[int], count: int) -> Tensor:
    """(count,) int64: `count` labels spread evenly over the classes, in their order."""
    return torch.tensor(
        [classes[i * len(classes) // count] for i in range(count)]
        if count >= len(classes)
        else classes[:count]
    )


def generate(
    system,
    classes: Tensor,
    rng: Rng,
    options: SampleOptions,
    batch: int = 256,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """classes (B,) int64 -> images (B, 3, H, W) float32 about in [-1, 1], on the CPU.

    system: as `load_run` returns it, with a tokenizer. Image i depends on its class, i and the rng,
    not on `batch`.
    """
    device = next(system.parameters()).device
    images = []
    for start in range(0, len(classes), batch):
        labels = classes[start : start + batch].to(device)
        index = torch.arange(start, start + len(labels), device=device)
        tokens = system.sample(labels, rng, options, index)
        images.append(system.tokenizer.decode(tokens).float().cpu())
        if progress is not None:
            progress(start + len(labels), len(classes))
    return torch.cat(images)
