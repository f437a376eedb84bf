"""Many samples, in batches, on one process or several."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from heptapod_fast.rng import Rng
from heptapod_fast.sampling.completion import Given
from heptapod_fast.sampling.options import SampleOptions
from heptapod_fast.world import ALONE, World

_NUMBERS = 2**32  # images of one class that have keys of their own


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

    def complete(
        self,
        given: Given,
        classes: Tensor,
        rng: Rng,
        options: SampleOptions | None = None,
        index: Tensor | None = None,
    ) -> Tensor:
        """The same of images of which a part is given."""
        ...


class Decoder(Protocol):
    """What makes images of tokens: a tokenizer."""

    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens -> (B, 3, H, W)."""
        ...


def spread(classes: list[int], count: int) -> Tensor:
    """(count,) int64: `count` labels spread evenly over the classes, in their order."""
    return torch.tensor([classes[i * len(classes) // count] for i in range(count)])


def keys(labels: Tensor) -> Tensor:
    """(B,) labels -> (B,) int64 keys of the draws: the label, and how many of the same label stand
    before it. With the seed they decide an image, whatever else is sampled in the same call."""
    order = labels.argsort(stable=True)
    ranked = labels[order]
    first_of_class = torch.searchsorted(ranked, ranked)
    number = torch.empty_like(labels)
    number[order] = torch.arange(len(labels)) - first_of_class
    return labels * _NUMBERS + number


def generate(
    system: Sampler,
    tokenizer: Decoder,
    classes: Tensor,
    rng: Rng,
    options: SampleOptions | None = None,
    batch: int = 256,
    progress: Callable[[int, int], None] | None = None,
    finish: Callable[[Tensor], Tensor] = Tensor.float,
    world: World | None = None,
    given: Given | None = None,
    start: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """(labels, images) of one batch after the other: (b,) int64, and (b, 3, H, W) on the CPU.

    An image depends on the rng, its class, and its number within the class (`keys`), not on what
    else is asked for. Batches of another size or another composition may move its last bits, as
    matrix products round by their shapes.

    Args:
        classes: labels of all images.
        progress: called as progress(images done, images in all), on the main rank.
        finish: what is done to (b, 3, H, W) float images on the device before they come here.
        world: ranks that share the work, a batch each in turn, so that every number of them makes
            the same batches and the same bits. All batches come out on the main rank, none on the
            others. Collective: every rank must go through all that comes.
        given: of all images, tokens that are not drawn.
        start: the first image that comes, the others are there: the same bits as if all did.

    Raises:
        ValueError: `start` is within a batch.
    """
    if start % batch and start != len(classes):
        raise ValueError(f"image {start} is not the first one of a batch of {batch}")
    index = keys(classes)
    starts = range(start, len(classes), batch)
    world = ALONE if world is None else world
    for first in range(0, len(starts), world.size):
        turn = starts[first : first + world.size]
        # A rank for which no batch is left makes the last one too: it has to wait for it anyway.
        mine = turn[min(world.rank, len(turn) - 1)]
        these = slice(mine, mine + batch)
        if given is None:
            tokens = system.sample(classes[these], rng, options, index[these])
        else:
            part = Given(given.tokens_BN[these], given.known_N)
            tokens = system.complete(part, classes[these], rng, options, index[these])
        images = finish(tokenizer.decode(tokens))
        for begin, whole in zip(turn, _gathered(images, batch, world), strict=False):
            labels = classes[begin : begin + batch]
            yield labels, whole[: len(labels)].cpu()
            if progress is not None:
                progress(begin + len(labels), len(classes))


def _gathered(images: Tensor, batch: int, world: World) -> list[Tensor]:
    """The batches of all ranks, in order, on the main one; elsewhere an empty list. The last batch
    is shorter than the others, where ranks can only send what is of one shape."""
    if world.size > 1 and len(images) < batch:
        filling = images.new_zeros(batch - len(images), *images.shape[1:])
        images = torch.cat((images, filling))
    return world.gather(images)


def together(batches: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """The images of all batches of `generate`, for as many as are looked at together."""
    return torch.cat([images for _, images in batches])
