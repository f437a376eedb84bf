"""Many samples, in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from heptapod_fast.rng import Rng
from heptapod_fast.sampling.options import SampleOptions


class Sampler(Protocol):
    """What samples: a system (systems/base.py)."""

    def sample(
        self,
        classes: Tensor,
        rng: Rng,
        options: SampleOptions | None = None,
        index: Tensor | None = None,
    ) -> Tensor:
        """Tokens of images of these classes."""
        ...


class Decoder(Protocol):
    """What makes images of tokens: a tokenizer."""

    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens -> (B, 3, H, W)."""
        ...


def spread(classes: list[int], count: int) -> Tensor:
    """(count,) int64: `count` labels spread evenly over the classes, in their order."""
    if count < len(classes):
        return torch.tensor(classes[:count])
    return torch.tensor([classes[i * len(classes) // count] for i in range(count)])


def generate(
    system: Sampler,
    tokenizer: Decoder,
    classes: Tensor,
    rng: Rng,
    options: SampleOptions | None = None,
    batch: int = 256,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """(labels, images) of one batch after the other: (b,) int64, and (b, 3, H, W) float32 on the
    CPU.

    Image i depends on its class, i and the rng, not on `batch`.
    """
    for start in range(0, len(classes), batch):
        labels = classes[start : start + batch]
        index = torch.arange(start, start + len(labels))
        tokens = system.sample(labels, rng, options, index)
        yield labels, tokenizer.decode(tokens).float().cpu()
        if progress is not None:
            progress(start + len(labels), len(classes))


def together(batches: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """The images of all batches of `generate`, for as many as are looked at together."""
    return torch.cat([images for _, images in batches])
