"""The samples of a model card, drawn by the weights that it is about."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from heptapod_fast.pictures import grid_of_pixels, save_png
from heptapod_fast.progress import Progress
from heptapod_fast.rng import Rng
from heptapod_fast.runs import load_run
from heptapod_fast.runs.exported import ExportedFolder
from heptapod_fast.sampling.generate import generate, spread
from heptapod_fast.tokenizers import to_uint8

MOST = 64  # images
COLUMNS = 8
SEED = 0


@dataclass(frozen=True)
class Drawn:
    """What is in the grid.

    Attributes:
        classes: the labels of its images, row by row.
        columns: images a row.
        options: what they were drawn with, by name.
    """

    classes: list[int]
    columns: int
    options: dict[str, Any]


def draw_samples(folder: ExportedFolder, device: str, tokenizer_weights: str | None) -> Drawn:
    """Draw samples.png of a folder from what is in the folder, which proves that it can be read.

    Args:
        device: as of `load_run`.
        tokenizer_weights: published weights, where the tokenizer has such.

    Raises:
        RunError, FileNotFoundError, ValueError: as `load_run`.
    """
    loaded = load_run(
        folder.path, device=device, tokenizer_weights=tokenizer_weights, only_samples=True
    )
    classes, columns = plan(len(loaded.class_names))
    options = loaded.system.settled(loaded.system.options())
    batches = generate(
        loaded.system,
        loaded,
        torch.tensor(classes),
        Rng(SEED),
        options,
        progress=Progress("sampling"),
        finish=to_uint8,
    )
    pixels = torch.cat([part for _, part in batches])
    save_png(grid_of_pixels(pixels, columns), folder.samples)
    return Drawn(classes, columns, asdict(options))


def plan(num_classes: int) -> tuple[list[int], int]:
    """(labels, columns): as many of each class, at most 64 in all and 8 of one; of more than 64
    classes one each of 64 that are spread over them. Rows hold whole classes."""
    if num_classes > MOST:
        return spread(list(range(num_classes)), MOST).tolist(), COLUMNS
    of_each = min(COLUMNS, MOST // num_classes)
    classes = [label for label in range(num_classes) for _ in range(of_each)]
    return classes, of_each * (COLUMNS // of_each)
