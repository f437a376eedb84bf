"""Measure a trained run's samples: `python tools/evaluate.py RUN_DIR --count 400`."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from _cli import alike_on_all_ranks, main
from _sampling import SamplingArguments, parse_sampling, samples_of, started
from torch import Tensor

from heptapod_fast.evaluation import METRICS, Metric, MetricContext, make_metrics
from heptapod_fast.pictures import save_grid
from heptapod_fast.runs import LoadedRun
from heptapod_fast.runs.data import open_images
from heptapod_fast.sampling.generate import spread
from heptapod_fast.world import World, device_name

GRID_CLASSES = 8
GRID_COLUMNS = 8


@dataclass(kw_only=True)
class Arguments(SamplingArguments):
    """Sample from a run and compute metrics; writes RUN_DIR/evaluation.json and a grid."""

    count: int = 400
    """Samples in total, spread evenly over the classes."""
    metrics: str | None = None
    """Metrics separated by commas; default: what the data allows (symmetry for logograms)."""
    out: str | None = None
    """Where the numbers go; default: RUN_DIR/evaluation.json."""


def work() -> int:
    """Parse, load, sample, measure, write."""
    with alike_on_all_ranks():
        arguments, given = parse_sampling(Arguments)
        arguments.check_count(arguments.count)
    with started(arguments.device) as world:
        evaluate(arguments, given, world)
    return 0


def evaluate(arguments: Arguments, given: dict[str, Any], world: World) -> None:
    """Sample on all ranks; the main one measures, and writes and says what it found."""
    with world.together():
        loaded = arguments.load(world)
        options = loaded.system.settled(loaded.system.options(**given))
        metrics = metrics_of(arguments.metrics, loaded) if world.main else []
    labels = spread(list(range(len(loaded.class_names))), arguments.count)
    shown = set(some_of_each(labels))
    grid = []
    first = 0
    drawn = Timed(samples_of(loaded, labels, arguments, options, world))
    for batch_labels, images in drawn:
        for metric in metrics:
            metric.update(images, batch_labels)
        grid += [image for i, image in enumerate(images, first) if i in shown]
        first += len(images)
    if not world.main:
        return
    results: dict[str, object] = {
        "system": loaded.config.system,
        "size": loaded.config.size,
        "device": device_name(world.device),
        "torch": torch.__version__,
        "images_seen": loaded.images_seen,
        "samples": arguments.count,
        "checkpoint": loaded.checkpoint.name,
        "seed": arguments.seed,
        "weights": loaded.weights,
        "sampling_seconds": round(drawn.seconds, 3),
        "samples_per_second": round(arguments.count / drawn.seconds, 3),
        "options": asdict(options),
    }
    for metric in metrics:
        results |= metric.compute()
    out = Path(arguments.out or Path(arguments.run) / "evaluation.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n")
    columns = min(GRID_COLUMNS, int(labels.bincount().max()))
    save_grid(torch.stack(grid), out.with_suffix(".png"), columns)
    del results["options"]  # said one by one
    for name, value in (results | asdict(options)).items():
        text = f"{value:.4f}" if isinstance(value, float) else value
        print(f"{name:32} {text}")
    print(f"written: {out} and {out.with_suffix('.png')}")


class Timed:
    """What an iterator yields, and how long it took to come.

    Attributes:
        seconds: until the last item, without what was done between them.
    """

    def __init__(self, items: Iterator[tuple[Tensor, Tensor]]):
        self._items = items
        self.seconds = 0.0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        before = time.monotonic()
        try:
            return next(self._items)
        finally:
            self.seconds += time.monotonic() - before


def metrics_of(asked: str | None, loaded: LoadedRun) -> list[Metric]:
    """The metrics of --metrics, or those that the data allows.

    Raises:
        ValueError: there are none.
    """
    names = metric_names(asked, loaded.config.data.data)
    if not names:
        raise ValueError(
            f"--metrics is missing: there is no metric yet for --data {loaded.config.data.data}; "
            f"{', '.join(METRICS)} measures samples of logograms"
        )
    context = MetricContext(source=open_images(loaded.config), tokenizer=loaded.tokenizer)
    return make_metrics(names, context)


def metric_names(asked: str | None, data: str | None) -> list[str]:
    """--metrics, or what the data allows."""
    if asked is not None:
        return asked.split(",")
    return ["symmetry"] if data == "logograms" else []


def some_of_each(labels: Tensor) -> list[int]:
    """Samples for a grid: a row of each of the first classes."""
    return [
        sample
        for label in labels.unique()[:GRID_CLASSES].tolist()
        for sample in (labels == label).nonzero()[:GRID_COLUMNS, 0].tolist()
    ]


if __name__ == "__main__":
    main(work)
