"""Measure a trained run's samples: `python tools/evaluate.py RUN_DIR --count 400`."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from _cli import alike_on_all_ranks, main
from _sampling import SamplingArguments, parse_sampling, samples_of, started
from torch import Tensor

from heptapod_fast.config import flag
from heptapod_fast.evaluation import (
    DEFAULT_METRICS,
    METRICS,
    OF_TRAINING_IMAGES,
    Metric,
    MetricContext,
    make_metrics,
)
from heptapod_fast.evaluation.image_sets import ImageSet, open_images_at
from heptapod_fast.pictures import grid_of_pixels, save_png
from heptapod_fast.progress import Progress
from heptapod_fast.runs import LoadedRun
from heptapod_fast.sampling import SampleOptions
from heptapod_fast.sampling.generate import spread
from heptapod_fast.storage import write_json
from heptapod_fast.tokenizers import to_uint8
from heptapod_fast.world import World, device_name

GRID_CLASSES = 8
GRID_COLUMNS = 8


@dataclass(kw_only=True)
class Arguments(SamplingArguments):
    """Sample from a run and compute metrics; writes RUN_DIR/evaluation.json and a grid. Nothing is
    drawn for metrics that look at no samples."""

    count: int = 400
    """Samples in total, spread evenly over the classes; images, of metrics that look at images of
    the data in their place."""
    metrics: str | None = None
    """Metrics separated by commas: fid, sfid, kid, is, precision, recall, rfid, symmetry,
    relation, likelihood, loss, probe, attention; default: what the data allows without weights
    (symmetry for logograms, relation for pairs)."""
    reference: str | None = None
    """What samples are compared with: a folder of pictures, or an .npz with images (arr_0) or
    statistics (mu, sigma), as ADM's; default: the run's training images."""
    inception: str | None = None
    """File of Inception's weights, for fid and its relatives."""
    inception_sha256: str | None = None
    """How the SHA-256 of --inception begins, if it is not the published file."""
    extractor: Literal["inception", "small"] = "inception"
    """Network of features: Inception, or small, a classifier of the run's images that is trained in
    about a minute and kept in RUN_DIR; its numbers compare runs on the same data alone."""
    samples: str | None = None
    """Measure all of these instead of sampling: an .npz or a folder, as tools/sample.py writes
    them."""
    out: str | None = None
    """Where the numbers go; default: RUN_DIR/evaluation.json, or without samples
    RUN_DIR/evaluation-METRICS.json."""


def work() -> int:
    """Parse, load, sample, measure, write."""
    with alike_on_all_ranks():
        arguments, given = parse_sampling(Arguments)
        arguments.check_count(arguments.count)
        if arguments.samples is not None and given:
            raise ValueError(
                f"{', '.join(map(flag, given))} beside --samples {arguments.samples}: nothing is "
                "sampled then"
            )
    with started(arguments.device) as world:
        evaluate(arguments, given, world)
    return 0


def evaluate(arguments: Arguments, given: dict[str, Any], world: World) -> None:
    """Sample on all ranks, where a metric looks at samples; the main one measures, and writes and
    says what it found."""
    with world.together():
        loaded = arguments.load(world)
        options = loaded.system.settled(loaded.system.options(**given))
        metrics = metrics_of(arguments, loaded, world) if world.main else []
        looking = [metric for metric in metrics if metric.needs_samples]
        if world.main and not looking:
            refuse_samples_for_nobody(arguments, given)
        written = written_samples(arguments, loaded)
    asked = metric_names(arguments.metrics, loaded.config.data.data)
    # One rank has the metrics, and all have to draw.
    (needs_samples,) = world.any(bool(looking))
    if written is not None and not world.main:
        return  # there is nothing to share
    shown = None
    if needs_samples:
        labels, batches = written or drawn_samples(arguments, loaded, options, world)
        shown = show(labels, batches, looking)
    if not world.main:
        return
    results = {
        "system": loaded.config.system,
        "size": loaded.config.size,
        "device": device_name(world.device),
        "torch": torch.__version__,
        "images_seen": loaded.images_seen,
    }
    if shown is not None:
        results["samples"] = len(shown.labels)
    results |= {"checkpoint": loaded.checkpoint.name, "weights": loaded.weights}
    if shown is not None:
        results |= about_samples(arguments, options, shown)
    for metric in metrics:
        results |= metric.compute()
    if shown is not None:
        results["samples_per_class"] = of_each_class(shown.labels, loaded.class_names)
    # Numbers of samples, which reports and model cards show, are not replaced by others.
    name = "evaluation" if shown is not None else f"evaluation-{'-'.join(asked)}"
    out = Path(arguments.out or Path(arguments.run) / f"{name}.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, results)
    written_files = [out]
    if shown is not None:
        columns = min(GRID_COLUMNS, int(shown.labels.bincount().max()))
        written_files.append(out.with_suffix(".png"))
        save_png(grid_of_pixels(shown.pictures, columns), written_files[-1])
    say(results)
    print(f"written: {' and '.join(map(str, written_files))}")


def refuse_samples_for_nobody(arguments: Arguments, given: dict[str, Any]) -> None:
    """ValueError for flags that say how samples are drawn, or where they are, beside metrics none
    of which looks at any."""
    flags = list(map(flag, given))
    if arguments.samples is not None:
        flags.append("--samples")
    if flags:
        raise ValueError(
            f"{', '.join(flags)} beside --metrics {arguments.metrics}: nothing there looks at "
            f"samples, and none are drawn; leave {', '.join(flags)} out, or ask for a metric of "
            "samples too"
        )


def drawn_samples(
    arguments: Arguments, loaded: LoadedRun, options: SampleOptions, world: World
) -> tuple[Tensor, Iterator[tuple[Tensor, Tensor]]]:
    """(labels, batches) of --count samples."""
    labels = spread(list(range(len(loaded.class_names))), arguments.count)
    return labels, samples_of(loaded, labels, arguments, options, world, to_uint8)


class Shown(NamedTuple):
    """What is left of samples that metrics have looked at.

    labels: (N,) of all. pictures: (n, 3, H, W) uint8, those of the grid. seconds: that it took to
    draw or read them.
    """

    labels: Tensor
    pictures: Tensor
    seconds: float


def show(
    labels: Tensor, batches: Iterator[tuple[Tensor, Tensor]], metrics: Sequence[Metric]
) -> Shown | None:
    """Show samples to metrics; None on ranks that draw for the main one. labels: of all."""
    in_grid = some_of_each(labels)
    kept: dict[int, Tensor] = {}
    first = 0
    timed = Timed(batches)
    for batch_labels, pixels in timed:
        for metric in metrics:
            metric.update(pixels, batch_labels)
        # Copies: a part of a batch would keep all of it.
        for number in in_grid:
            if first <= number < first + len(pixels):
                kept[number] = pixels[number - first].clone()
        first += len(pixels)
    if not kept:
        return None
    pictures = torch.stack([kept[number] for number in in_grid])
    return Shown(labels, pictures, timed.seconds)


def about_samples(arguments: Arguments, options: SampleOptions, shown: Shown) -> dict[str, Any]:
    """Where the samples are from."""
    if arguments.samples is not None:
        return {"samples_from": arguments.samples}
    return {
        "seed": arguments.seed,
        "sampling_seconds": round(shown.seconds, 3),
        "samples_per_second": round(len(shown.labels) / shown.seconds, 3),
        "options": asdict(options),
    }


def say(results: dict[str, Any]) -> None:
    """One line for each number; a warning on stderr."""
    said = {name: value for name, value in results.items() if not isinstance(value, dict)}
    warning = said.pop("warning", None)
    for name, value in (said | results.get("options", {})).items():
        text = f"{value:.4f}" if isinstance(value, float) else value
        print(f"{name:32} {text}")
    if warning is not None:
        print(f"warning: {warning}", file=sys.stderr)


def of_each_class(labels: Tensor, names: Sequence[str]) -> dict[str, int]:
    """{class: how many samples}, of classes that have some."""
    counts = labels.bincount(minlength=len(names)).tolist()
    return {name: count for name, count in zip(names, counts, strict=True) if count}


def written_samples(
    arguments: Arguments, loaded: LoadedRun
) -> tuple[Tensor, Iterator[tuple[Tensor, Tensor]]] | None:
    """(labels, batches) of --samples, None without.

    Raises:
        ValueError: files that do not say of which class a sample is, or say one that is not there.
    """
    if arguments.samples is None:
        return None
    assert loaded.tokenizer is not None  # `SamplingArguments.load` has seen to it
    found = open_images_at(arguments.samples, loaded.tokenizer.image_size, "--samples")
    labels = found.labels
    classes = len(loaded.class_names)
    if not len(found):
        raise ValueError(f"--samples {arguments.samples} has statistics and no images")
    if labels is None:
        raise ValueError(
            f"--samples {arguments.samples} does not say the samples' classes: expected labels in "
            "the .npz, or names such as 000001-class3.png, as tools/sample.py writes them"
        )
    if int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise ValueError(
            f"--samples {arguments.samples} has class {int(labels.max())}, the run 0 to "
            f"{classes - 1}"
        )
    return labels, with_labels(found, labels)


def with_labels(images: ImageSet, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(labels, pixels), batch by batch."""
    first = 0
    for pixels in images.batches():
        yield labels[first : first + len(pixels)], pixels
        first += len(pixels)


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


def metrics_of(arguments: Arguments, loaded: LoadedRun, world: World) -> list[Metric]:
    """The metrics of --metrics, or those that the data allows.

    Raises:
        ValueError: there are none, or one lacks what it needs.
    """
    data = loaded.config.data.data
    names = metric_names(arguments.metrics, data)
    if not names:
        raise ValueError(
            f"--metrics is missing: for --data {data} say which, of {', '.join(METRICS)}; fid and "
            "its relatives need --inception FILE or --extractor small"
        )
    assert loaded.tokenizer is not None  # `SamplingArguments.load` has seen to it
    # All files of a folder are decoded once when it is opened: not where nobody looks at them.
    needs_images = arguments.reference is None or arguments.extractor == "small"
    source = None
    if needs_images or any(name in OF_TRAINING_IMAGES for name in names):
        source = arguments.training_images(loaded)
    context = MetricContext(
        source=source,
        tokenizer=loaded.tokenizer,
        system=loaded.system,
        count=arguments.count,
        image_size=loaded.tokenizer.image_size,
        device=world.device,
        reference=arguments.reference,
        extractor=arguments.extractor,
        inception=arguments.inception,
        inception_sha256=arguments.inception_sha256,
        folder=arguments.run,
        progress=Progress,
    )
    return make_metrics(names, context)


def metric_names(asked: str | None, data: str | None) -> list[str]:
    """--metrics, or what the data allows."""
    if asked is not None:
        return asked.split(",")
    return [DEFAULT_METRICS[data]] if data in DEFAULT_METRICS else []


def some_of_each(labels: Tensor) -> list[int]:
    """Samples for a grid: a row of each of the first classes."""
    return [
        sample
        for label in labels.unique()[:GRID_CLASSES].tolist()
        for sample in (labels == label).nonzero()[:GRID_COLUMNS, 0].tolist()
    ]


if __name__ == "__main__":
    main(work)
