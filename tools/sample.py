"""Sample from a trained run: `python tools/sample.py RUN_DIR --out grid.png`."""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from _cli import alike_on_all_ranks, main
from _completion import Originals, read_originals
from _sampling import SamplingArguments, parse_sampling, samples_of, started
from torch import Tensor

from heptapod_fast.classes import chosen, numbered
from heptapod_fast.config import flag
from heptapod_fast.runs import LoadedRun
from heptapod_fast.sampling import SampleOptions
from heptapod_fast.sampling.generate import spread
from heptapod_fast.sampling.job import Job, digest
from heptapod_fast.sampling.outputs import (
    COLUMNS,
    MOST_ROWS,
    Arrays,
    Grid,
    Output,
    Singles,
    Tarred,
    part_of,
)
from heptapod_fast.tokenizers import to_uint8
from heptapod_fast.world import World


@dataclass(kw_only=True)
class Arguments(SamplingArguments):
    """Sample images from a run's moving average. With --save-npz, --save-tar or --save-images, a
    command that was stopped goes on where it is given again."""

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
    start_over: bool = False
    """Remove what an unfinished job has left at the same files, in place of going on with it."""


def work() -> int:
    """Parse, load, sample, write."""
    with alike_on_all_ranks():
        arguments, given = parse_sampling(Arguments)
        if arguments.complete is None and (arguments.paste or arguments.keep is not None):
            raise ValueError("--keep and --paste are for --complete IMAGE_OR_FOLDER")
        for name, path, ending in (
            ("--out", arguments.out, ".png"),
            ("--save-npz", arguments.save_npz, ".npz"),
            ("--save-tar", arguments.save_tar, ".tar"),
        ):
            if path is not None and not path.endswith(ending):
                raise ValueError(f"{name} {path}: expected a name that ends in {ending}")
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
    grid = Grid(out, columns)
    others = outputs_beside_the_grid(arguments, labels)
    with world.together():
        job = Job([grid, *others], len(labels))
        if others and world.main:
            journal = part_of(Path(os.path.abspath(others[0].path)), "job", "journal")
            settings = settings_of(arguments, loaded, options, labels, originals)
            for output in (grid, *others):
                settings[output.flag] = os.path.relpath(output.path, journal.parent)
            job = Job([grid, *others], len(labels), settings, journal, arguments.start_over, warn)
    with contextlib.ExitStack() as stack:
        with world.together():
            if world.main:
                stack.enter_context(job)
        # The journal is where the main rank is.
        done = int(world.sum(torch.tensor(job.done, device=world.device)))
        if done and world.main:
            print(f"going on after {done:,} of {len(labels):,} images", flush=True)
        batches = samples_of(loaded, labels, arguments, options, world, to_uint8, tokens, done)
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
            job.record(done)
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


def outputs_beside_the_grid(arguments: Arguments, labels: Tensor) -> list[Output]:
    """Those that were asked for. labels: of all images."""
    found: list[Output] = []
    if arguments.save_npz:
        found.append(Arrays(Path(arguments.save_npz), labels))
    if arguments.save_tar:
        found.append(Tarred(Path(arguments.save_tar)))
    if arguments.save_images:
        found.append(Singles(Path(arguments.save_images), labels, arguments.start_over))
    return found


def settings_of(
    arguments: Arguments,
    loaded: LoadedRun,
    options: SampleOptions,
    labels: Tensor,
    originals: Originals | None,
) -> dict[str, Any]:
    """All that the bytes of a job's images depend on, by the flags that say it. --batch is among
    it: batches of another size may move last bits."""
    tokenizer = loaded.tokenizer
    assert tokenizer is not None  # `SamplingArguments.load` has seen to it
    weights = digest(loaded.system.state_dict())
    found = {
        "the version of torch": torch.__version__,
        "--device": loaded.device.type,
        "--checkpoint": loaded.checkpoint.name,
        "--ema": f"{loaded.weights}, whose weights have the hash {weights}",
        "the tokenizer": tokenizer.fingerprint,
        "--seed": arguments.seed,
        "--batch": arguments.batch,
        "--count": len(labels),
        "--classes": f"{labels.unique().tolist()}, whose order has the hash {digest({'': labels})}",
        "--complete": None,
        "--paste": arguments.paste,
    }
    for name, value in asdict(loaded.system.settled(options)).items():
        if name != "cuda_graph":  # which changes no bit
            found[flag(name)] = value
    if originals is not None:
        parts = {
            "pixels": originals.pixels,
            "tokens": originals.given.tokens_BN,
            "known": originals.given.known_N,
        }
        found["--complete"] = f"images and parts of them that have the hash {digest(parts)}"
    return found


def warn(text: str) -> None:
    """A line beside what the tool says."""
    print(text, file=sys.stderr, flush=True)


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
