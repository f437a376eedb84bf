"""What a metric is, and what it may need beside the samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from heptapod_fast.data.sources import ImageSource
from heptapod_fast.systems.base import System
from heptapod_fast.tokenizers.base import Tokenizer

Progress = Callable[[int, int], None]


@runtime_checkable
class Metric(Protocol):
    """Collects samples, or looks at the system itself, then computes named numbers.

    A class says once, or an object by what it was asked for, whether it wants samples; where no
    metric does, none are drawn. A sketch of one that does not:

        class Depth:
            needs_samples = False

            def __init__(self, context: MetricContext, names: Sequence[str]):
                self._system = context.system

            def update(self, pixels: Tensor, labels: Tensor) -> None:
                pass  # never called

            def restart(self, system: System) -> None:
                self._system = system

            def compute(self) -> dict[str, Any]:
                return {"depth": len(self._system.blocks)}
    """

    @property
    def needs_samples(self) -> bool:
        """Whether `update` is called; without it `compute` has the context and the system alone."""
        ...

    def update(self, pixels: Tensor, labels: Tensor) -> None:
        """pixels: (B, 3, H, W) uint8, as samples are written; labels: (B,) int64 classes that the
        samples were asked for."""
        ...

    def restart(self, system: System) -> None:
        """Forget the samples; those that come are of this system."""
        ...

    def compute(self) -> dict[str, Any]:
        """The numbers over all samples so far, and what they were measured with; ValueError when
        samples are needed and there are none."""
        ...


def _no_progress(what: str, unit: str = "images") -> Progress:
    return lambda done, total: None


@dataclass(frozen=True)
class MetricContext:
    """What metrics may need beside the samples.

    Attributes:
        source: the training images.
        tokenizer: the samples' tokenizer; real images then go through it before they are looked
            for among samples, so that its error does not pass for novelty.
        system: that the samples are from.
        count: samples, or images that are looked at in their place.
        image_size: of the samples, in pixels.
        device: where networks run.
        reference: a folder or an .npz that samples are compared with; None for the source.
        extractor: the network of features: Inception, or a classifier of the source's images.
        inception: file of its weights.
        inception_sha256: how the file's hash begins; None for the published file's.
        folder: where what is trained on the way is kept.
        progress: what to call with (done, total), made for a named piece of work and what of it is
            counted, images unless it is said.
    """

    source: ImageSource | None = None
    tokenizer: Tokenizer | None = None
    system: System | None = None
    count: int = 400
    image_size: int = 0
    device: torch.device = torch.device("cpu")
    reference: str | None = None
    extractor: Literal["inception", "small"] = "inception"
    inception: str | None = None
    inception_sha256: str | None = None
    folder: str | None = None
    progress: Callable[..., Progress] = _no_progress
