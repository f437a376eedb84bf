"""Sample from a trained run: `python tools/sample.py RUN_DIR --out grid.png`."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _cli import alike_on_all_ranks, main
from _completion import Originals, read_originals
from _sampling import SamplingArguments, parse_sampling, samples_of, started
from torch import Tensor

from heptapod_fast.classes import chosen, numbered
from heptapod_fast.sampling.generate import spread
from heptapod_fast.sampling.outputs import COLUMNS, MOST_ROWS, Arrays, Grid, Output, Singles, Tarred
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
    save_tar: str | None = None
    """File for PNG images and their classes (.cls), as webdataset and --data read it."""
    save_npz: str | None = None
    """File for arr_0 (B, H, W, 3) uint8 and labels, as ADM's evaluator reads it."""
    complete: str | None = None
    """Image, or folder of images, of which a part is kept and the rest drawn; classes are those of
    its subfolders, or --classes."""
    keep: str | None = None
    """What --complete keeps: left-half (the default), right-half, top-half, bottom-half, centre,
    border, or an image, white where images are kept, of their size or with a pixel for each
    token."""
    paste: bool = False
    """Put the pixels that were kept into what --complete makes, in place of the tokenizer's."""


def work() -> int:
    """Parse, load, sample, write."""
    with alike_on_all_ranks():
        arguments, given = parse_sampling(Arguments)
        if arguments.complete is None and (arguments.paste or arguments.keep is not None):
            raise ValueError("--keep and --paste are for --complete IMAGE_OR_FOLDER")
        for flag, path, ending in (
            ("--out", arguments.out, ".png"),
            ("--save-npz", arguments.save_npz, ".npz"),
            ("--save-tar", arguments.save_tar, ".tar"),
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
        keep = arguments.keep or "left-half"
        classes = None if arguments.classes is None else chosen(arguments.classes, names)
        originals = None
        if arguments.complete is not None:
            originals = read_originals(loaded, arguments.complete, keep, classes)
        labels, columns = _labels_and_columns(arguments, originals, classes, len(names))
        arguments.check_count(len(labels))
    name = f"sample-{loaded.checkpoint.name}-seed{arguments.seed}.png"
    if originals is not None:
        name = f"completed-{loaded.checkpoint.name}-seed{arguments.seed}.png"
    out = Path(arguments.out or Path(arguments.run) / "samples" / name)
    tokens = None if originals is None else originals.given
    batches = samples_of(loaded, labels, arguments, options, world, to_uint8, tokens)
    grid = Grid(out, columns)
    others: list[Output] = []
    if arguments.save_images:
        others.append(Singles(Path(arguments.save_images)))
    if arguments.save_tar:
        others.append(Tarred(Path(arguments.save_tar)))
    if arguments.save_npz:
        others.append(Arrays(Path(arguments.save_npz), labels))
    with contextlib.ExitStack() as stack:
        with world.together():
            if world.main:
                for output in (grid, *others):
                    stack.enter_context(output)
        done = 0
        for batch_labels, pixels in batches:
            shown = pixels
            if originals is not None:
                if arguments.paste:
                    pixels = originals.pasted(done, pixels)
                shown = originals.beside(done, pixels)
            grid.add(batch_labels, shown)
            for output in others:
                output.add(batch_labels, pixels)
            done += len(pixels)
    if not world.main:
        return
    print(
        f"{len(labels):,} images of {len(set(labels.tolist()))} classes after "
        f"{loaded.images_seen:,} training images, weights of {loaded.weights}"
    )
    print(f"classes: {numbered(names)}")
    if originals is not None:
        known = originals.given
        print(
            f"given: {known.num_known} of {len(known.known_N)} tokens (--keep {keep}); "
            "the grid has given, completed, original beside each other"
        )
    for output in (grid, *others):
        print(output.said())


def _labels_and_columns(
    arguments: Arguments, originals: Originals | None, classes: list[int] | None, num_classes: int
) -> tuple[Tensor, int]:
    """(the label of every image, columns of the grid).

    Raises:
        ValueError: --count and --complete.
    """
    if originals is not None:
        if arguments.count is not None:
            raise ValueError(
                f"--count {arguments.count}: --complete makes one image of each that it is given"
            )
        return originals.labels, 3
    if classes is None:
        classes = list(range(num_classes))
    per_class = 8 if len(classes) <= MOST_ROWS else 1
    count = per_class * len(classes) if arguments.count is None else arguments.count
    arguments.check_count(count)
    return spread(classes, count), max(1, min(COLUMNS, -(-count // len(classes))))


if __name__ == "__main__":
    main(work)
