"""Image sets that need no files, by name."""

from __future__ import annotations

from typing import Protocol, Self, runtime_checkable

from heptapod_fast.data.logograms import Logograms
from heptapod_fast.data.pairs import Pairs
from heptapod_fast.data.sources import ImageSource


@runtime_checkable
class EmbeddedImages(ImageSource, Protocol):
    """A set that is drawn, and of which there are always more."""

    def fresh(self, count: int) -> Self:
        """So many other images of the same distribution: what nothing was trained on."""
        ...


EMBEDDED_SETS: dict[str, type[Logograms] | type[Pairs]] = {"logograms": Logograms, "pairs": Pairs}


def embedded_images(
    name: str, image_size: int, count: int, seed: int = 0, num_classes: int | None = None
) -> EmbeddedImages:
    """One of `EMBEDDED_SETS`; arguments as of its class.

    Raises:
        ValueError: a setting is out of range; the message names its flag.
    """
    return EMBEDDED_SETS[name](image_size, count, seed, num_classes)
