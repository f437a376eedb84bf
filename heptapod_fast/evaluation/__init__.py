"""Metrics of samples, behind one interface; each is imported only when it is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Iterable

from heptapod_fast.evaluation.context import Metric, MetricContext

__all__ = [
    "DEFAULT_METRICS",
    "METRICS",
    "OF_TRAINING_IMAGES",
    "Metric",
    "MetricContext",
    "make_metrics",
]

_FIDELITY = ("heptapod_fast.evaluation.fidelity", "Fidelity")

# Name -> module and class; the class takes the context, and which of its names were asked for.
METRICS: dict[str, tuple[str, str]] = {
    "symmetry": ("heptapod_fast.evaluation.symmetry", "SymmetryAccuracy"),
    "relation": ("heptapod_fast.evaluation.relation", "RelationAccuracy"),
    "likelihood": ("heptapod_fast.evaluation.likelihood", "Likelihood"),
    "loss": ("heptapod_fast.evaluation.held_out", "HeldOutLoss"),
    "probe": ("heptapod_fast.evaluation.probe", "Probe"),
    "attention": ("heptapod_fast.evaluation.attention_distance", "AttentionDistance"),
    "fid": _FIDELITY,
    "sfid": _FIDELITY,
    "kid": _FIDELITY,
    "is": _FIDELITY,
    "precision": _FIDELITY,
    "recall": _FIDELITY,
    "rfid": _FIDELITY,
}


# Those that look at the training images, whatever they are compared with.
OF_TRAINING_IMAGES = ("symmetry", "relation", "probe")
# What samples are measured by where nothing else is said, by the name of embedded data.
DEFAULT_METRICS = {"logograms": "symmetry", "pairs": "relation"}


def make_metrics(names: Iterable[str], context: MetricContext) -> list[Metric]:
    """Metrics by name. Those of one class share an object, as they share its work.

    Raises:
        ValueError: an unknown name (the message lists all), or a context that lacks what a metric
            needs.
        ImportError: a package is missing; says which, and how to get it.
    """
    names = list(names)
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise ValueError(
            f"unknown --metrics {', '.join(unknown)}: choose among {', '.join(sorted(METRICS))}"
        )
    of_class: dict[tuple[str, str], list[str]] = {}
    for name in names:
        of_class.setdefault(METRICS[name], []).append(name)
    return [
        getattr(importlib.import_module(module), kind)(context, wanted)
        for (module, kind), wanted in of_class.items()
    ]
