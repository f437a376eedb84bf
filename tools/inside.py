"""Look into a trained run: `python tools/inside.py RUN_DIR`."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _cli import main, parse
from _sampling import RunArguments, started

from heptapod_fast.data.tokens import Batch
from heptapod_fast.evaluation import MetricContext, make_metrics
from heptapod_fast.evaluation.image_sets import ImageSet
from heptapod_fast.evaluation.likelihood import images_of
from heptapod_fast.evaluation.maps import REFERENCES, maps_of, reference_positions
from heptapod_fast.evaluation.observing import BATCH, batches_of
from heptapod_fast.progress import Progress
from heptapod_fast.reports.charts import save_series
from heptapod_fast.reports.maps import save_maps
from heptapod_fast.runs import LoadedRun
from heptapod_fast.world import World, device_name

MEASURED = ("loss", "probe", "attention")
MAPS = "maps"
CHART = "inside.png"


@dataclass(kw_only=True)
class Arguments(RunArguments):
    """What a run has learned: losses of images that it has not seen by step and by degree of noise,
    linear probes of its layers, how far its attention reaches, and maps of what single tokens look
    at and are like."""

    what: str | None = None
    """Of loss, probe, attention, maps, separated by commas; default: all that the run allows."""
    count: int = 400
    """Images that losses and attention are measured on."""
    reference: str | None = None
    """Other images, with their classes: an .npz with labels, or files that tools/sample.py has
    named; default: fresh logograms, or the training images."""
    images: int = 4
    """Images that maps are drawn of."""
    seen: int | None = None
    """Tokens that the head is shown where maps are drawn; default: half of them."""
    out: str | None = None
    """Folder for the pictures and inside.json; default: RUN_DIR/inside."""


def work() -> int:
    """Parse, load, look, draw."""
    arguments = parse(Arguments)
    for flag, value, least in (("--count", arguments.count, 2), ("--images", arguments.images, 1)):
        if value < least:
            raise ValueError(f"{flag} {value}: expected at least {least}")
    if arguments.images > BATCH:
        raise ValueError(f"--images {arguments.images}: expected at most {BATCH}")
    with started(arguments.device) as world:
        if world.main:  # there is nothing to share
            look(arguments, world)
    return 0


def look(arguments: Arguments, world: World) -> None:
    """All that was asked for, or all that can be."""
    loaded = arguments.load(world)
    asked = (*MEASURED, MAPS) if arguments.what is None else tuple(arguments.what.split(","))
    unknown = [name for name in asked if name not in (*MEASURED, MAPS)]
    if unknown:
        raise ValueError(f"--what {','.join(unknown)}: choose among {', '.join((*MEASURED, MAPS))}")
    out = Path(arguments.out or Path(arguments.run) / "inside")
    out.mkdir(parents=True, exist_ok=True)
    context = context_of(arguments, loaded, world, asked)
    results: dict[str, Any] = {
        "system": loaded.config.system,
        "size": loaded.config.size,
        "device": device_name(world.device),
        "torch": torch.__version__,
        "images_seen": loaded.images_seen,
        "checkpoint": loaded.checkpoint.name,
        "weights": loaded.weights,
    }
    written = []
    for name in asked:
        work = measured if name in MEASURED else drawn
        try:
            numbers, paths = work(name, arguments, loaded, context, out)
        except ValueError as reason:
            if arguments.what is not None:
                raise
            print(f"left out: {name}: {reason}")
            continue
        results |= numbers
        written += paths
    panels = panels_of(results)
    if panels:
        save_series(panels, out / CHART)
        written.append(out / CHART)
    path = out / "inside.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    for name, value in results.items():
        if not isinstance(value, dict):
            text = f"{value:.4f}" if isinstance(value, float) else value
            print(f"{name:32} {text}")
    for file in [path, *written]:
        print(f"written: {file}")


def context_of(
    arguments: Arguments, loaded: LoadedRun, world: World, asked: Sequence[str]
) -> MetricContext:
    """What metrics may need."""
    assert loaded.tokenizer is not None  # `RunArguments.load` has seen to it
    # Probes are trained on the run's images, whatever they are tested on.
    needs_images = arguments.reference is None or "probe" in asked
    return MetricContext(
        source=arguments.training_images(loaded) if needs_images else None,
        tokenizer=loaded.tokenizer,
        system=loaded.system,
        count=arguments.count,
        image_size=loaded.tokenizer.image_size,
        device=world.device,
        reference=arguments.reference,
        folder=arguments.run,
        progress=Progress,
    )


Found = tuple[dict[str, Any], list[Path]]
Work = Callable[[str, Arguments, LoadedRun, MetricContext, Path], Found]


def measured(
    name: str, arguments: Arguments, loaded: LoadedRun, context: MetricContext, out: Path
) -> Found:
    """The numbers of a metric."""
    (metric,) = make_metrics([name], context)
    return metric.compute(), []


def drawn(
    name: str, arguments: Arguments, loaded: LoadedRun, context: MetricContext, out: Path
) -> Found:
    """Maps, as pictures."""
    system, tokenizer = loaded.system, loaded.tokenizer
    assert tokenizer is not None  # `RunArguments.load` has seen to it
    system.check_answers("look", "--what maps")
    seen = system.num_tokens // 2 if arguments.seen is None else arguments.seen
    if not 0 <= seen < system.num_tokens:
        raise ValueError(f"--seen {seen}: expected 0 to {system.num_tokens - 1} tokens")
    images: ImageSet = images_of(context, "maps")
    pixels, _, batch = next(batches_of(images, system, tokenizer, lambda done, total: None))
    shown = pixels[: arguments.images]
    few = len(shown) + len(shown) % 2  # even, as `maps_of` takes them
    batch = Batch(batch.tokens[:few], batch.labels[:few], batch.index[:few])
    positions = reference_positions(system.spec.grid)[:REFERENCES]
    paths = []
    for maps in maps_of(system, tokenizer, batch, positions, seen):
        path = out / f"{maps.name}.png"
        limits = (-1.0, 1.0) if maps.is_similarity else None
        values = maps.map_BRN[: len(shown)].float().cpu()
        save_maps(shown, values, positions, system.spec.grid, path, maps.title, limits)
        paths.append(path)
    return {}, paths


def panels_of(results: dict[str, Any]) -> dict[str, dict[str, tuple[list[Any], list[float]]]]:
    """What is charted, of what was measured."""
    panels: dict[str, dict[str, tuple[list[Any], list[float]]]] = {}
    if "probe_accuracies" in results:
        panels["linear probe, accuracy"] = {
            "layers": _line(results["probe_accuracies"], _short),
            "the images themselves": ([], [results["probe_accuracy_pixels"]]),
        }
    if "attention_distances" in results:
        panels["attention distance, tokens"] = {
            "mean of the heads": _line(results["attention_distances"], _short),
            "of even attention": _line(results["attention_distances_even"], _short),
        }
    if "held_out_loss_by_step" in results:
        panels["held-out loss by step"] = {
            "": _line(results["held_out_loss_by_step"], float),
        }
    if "held_out_loss_by_noise" in results:
        panels["held-out error by degree of noise"] = {
            "": _line(results["held_out_loss_by_noise"], float),
        }
    return panels


def _short(layer: str) -> str:
    """As it is written below a chart."""
    return layer.replace(".blocks.", " ").replace(".", " ")


def _line(values: dict[str, float], kind: Callable[[str], Any]) -> tuple[list[Any], list[float]]:
    return [kind(name) for name in values], list(values.values())


if __name__ == "__main__":
    main(work)
