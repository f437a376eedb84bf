"""Metrics of samples, behind one interface; each is imported only when it is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from heptapod_fast.data.sources import ImageSource
from heptapod_fast.tokenizers.base import Tokenizer

__all__ = ["METRICS", "Metric", "MetricContext", "make_metrics"]


@runtime_checkable
class Metric(Protocol):
    """Collects samples, then computes named numbers. `name` is the metric's name on the command
    line."""

    name: str

    def update(self, images: Tensor, labels: Tensor) -> None:
        """images: (B, 3, H, W) float in [-1, 1] on any device; labels: (B,) int64 classes that the
        samples were asked for."""
        ...

    def compute(self) -> dict[str, float]:
        """The numbers over all samples so far; ValueError when there are none."""
        ...


@dataclass(frozen=True)
class MetricContext:
    """What metrics may need beside the samples.

    Attributes:
        source: the training images.
        tokenizer: the samples' tokenizer; real images then go through it before they are compared
            with samples, so that its error does not pass for novelty.
    """

    source: ImageSource | None = None
    tokenizer: Tokenizer | None = None


# Name -> module and class; the class takes the context.
METRICS: dict[str, tuple[str, str]] = {
    "symmetry": ("heptapod_fast.evaluation.symmetry", "SymmetryAccuracy"),
}


def make_metrics(names: Iterable[str], context: MetricContext) -> list[Metric]:
    """Metrics by name, in the given order.

    Raises:
        ValueError: an unknown name (the message lists all), or a context that lacks what a metric
            needs.
    """
    names = list(names)
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise ValueError(
            f"unknown --metrics {', '.join(unknown)}: choose among {', '.join(sorted(METRICS))}"
        )
    return [
        getattr(importlib.import_module(METRICS[name][0]), METRICS[name][1])(context)
        for name in names
    ]
