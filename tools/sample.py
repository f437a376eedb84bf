"""Sample from a trained run: `python tools/sample.py RUN_DIR --out grid.png`."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _cli import alike_on_all_ranks, main
from _sampling import SamplingArguments, parse_sampling, samples_of, started

from heptapod_fast.classes import chosen, numbered
from heptapod_fast.sampling.generate import spread
from heptapod_fast.sampling.outputs import COLUMNS, MOST_ROWS, Arrays, Grid, Output, Singles
from heptapod_fast.tokenizers import to_uint8
from heptapod_fast.world import World


@dataclass(kw_only=True)
class Arguments(SamplingArguments):
    """Sample images from a run's moving average."""

    classes: str | None = None
    """Classes separated by commas, by number or name (name:10 where names are numbers); default:
    all."""
    count: int | None = None
    """Images in total, spread evenly over the classes; default: 8 per class, of more than 64
    classes one."""
    out: str | None = None
    """Grid to write; default: RUN_DIR/samples/sample-STEP-SEED.png."""
    save_images: str | None = None
    """Folder for single PNG images."""
    save_npz: str | None = None
    """File for arr_0 (B, H, W, 3) uint8 and labels, as ADM's evaluator reads it."""


def work() -> int:
    """Parse, load, sample, write."""
    with alike_on_all_ranks():
        arguments, given = parse_sampling(Arguments)
        for flag, path, ending in (
            ("--out", arguments.out, ".png"),
            ("--save-npz", arguments.save_npz, ".npz"),
        ):
            if path is not None and not path.endswith(ending):
                raise ValueError(f"{flag} {path}: expected a name that ends in {ending}")
    with started(arguments.device) as world:
        sample(arguments, given, world)
    return 0


def sample(arguments: Arguments, given: dict[str, Any], world: World) -> None:
    """Sample on all ranks; the main one writes and says what was written."""
    with world.together():
        loaded = arguments.load(world)
        names = loaded.class_names
        options = loaded.system.options(**given)
        classes = list(range(len(names)))
        if arguments.classes is not None:
            classes = chosen(arguments.classes, names)
        per_class = 8 if len(classes) <= MOST_ROWS else 1
        count = per_class * len(classes) if arguments.count is None else arguments.count
        arguments.check_count(count)
    labels = spread(classes, count)
    columns = max(1, min(COLUMNS, -(-count // len(classes))))
    name = f"sample-{loaded.checkpoint.name}-seed{arguments.seed}.png"
    out = Path(arguments.out or Path(arguments.run) / "samples" / name)
    batches = samples_of(loaded, labels, arguments, options, world, to_uint8)
    outputs: list[Output] = [Grid(out, columns)]
    if arguments.save_images:
        outputs.append(Singles(Path(arguments.save_images)))
    if arguments.save_npz:
        outputs.append(Arrays(Path(arguments.save_npz), labels))
    with contextlib.ExitStack() as stack:
        with world.together():
            if world.main:
                for output in outputs:
                    stack.enter_context(output)
        for batch_labels, pixels in batches:
            for output in outputs:
                output.add(batch_labels, pixels)
    if not world.main:
        return
    print(
        f"{count:,} images of {len(set(labels.tolist()))} classes after "
        f"{loaded.images_seen:,} training images, weights of {loaded.weights}"
    )
    print(f"classes: {numbered(names)}")
    for output in outputs:
        print(output.said())


if __name__ == "__main__":
    main(work)
