"""What tools/sample.py needs to complete images: reads them, and finds their classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from heptapod_fast.data.decoding import PillowDecoder
from heptapod_fast.data.entries import FolderFile
from heptapod_fast.data.images import ImageFolder
from heptapod_fast.runs import LoadedRun
from heptapod_fast.sampling import Given
from heptapod_fast.sampling.completion import area_of, beside_each_other, known_tokens
from heptapod_fast.tokenizers import Tokenizer, to_unit

ENCODE_BATCH = 64


class Originals(NamedTuple):
    """Images that are completed.

    pixels: (B, 3, H, W) uint8. labels: (B,) int64. given: their tokens. area_HW: bool, the pixels
    that are given.
    """

    pixels: Tensor
    labels: Tensor
    given: Given
    area_HW: Tensor

    def pasted(self, first: int, completed: Tensor) -> Tensor:
        """Images from number `first` on, with the given pixels in place of the tokenizer's."""
        return torch.where(self.area_HW, self._like(first, completed), completed)

    def beside(self, first: int, completed: Tensor) -> Tensor:
        """See `beside_each_other`."""
        return beside_each_other(self._like(first, completed), completed, self.area_HW)

    def _like(self, first: int, completed: Tensor) -> Tensor:
        return self.pixels[first : first + len(completed)]


def read_originals(
    loaded: LoadedRun, path: str, keep: str, classes: Sequence[int] | None
) -> Originals:
    """The images of --complete, a file or a folder, as the run's data would have them.

    Args:
        classes: what --classes says; the class of all images, where no folder says it.

    Raises:
        ValueError, FileNotFoundError: no image, or of no class that the run knows; a mask that does
            not fit.
    """
    tokenizer = loaded.tokenizer
    assert tokenizer is not None  # `SamplingArguments.load` has seen to it
    size = tokenizer.image_size
    known_N = known_tokens(keep, tokenizer.spec, size)
    place = Path(path)
    if place.is_file():
        pixels = _read_file(place, size)
        labels = torch.full((1,), _class_of_all(path, loaded.class_names, classes))
    else:
        folder = _read_folder(place, size)
        pixels = folder.images(torch.arange(len(folder)))
        labels = _labels_of(folder, path, loaded.class_names, classes)
    given = Given(_encoded(tokenizer, pixels), known_N)
    loaded.system.check_given(given, len(labels))
    return Originals(pixels, labels, given, area_of(known_N, size))


def _read_folder(path: Path, size: int) -> ImageFolder:
    try:
        return ImageFolder(path, size)
    except (ValueError, OSError) as error:  # in the words of training's --data
        raise ValueError(f"--complete {path}: {error}") from None


def _read_file(path: Path, size: int) -> Tensor:
    pixels = np.empty((1, 3, size, size), dtype=np.uint8)
    file = FolderFile(path.parent, path.name)
    (reason,) = PillowDecoder().decode([file], pixels)
    if reason is not None:
        raise ValueError(f"--complete {path}: {reason}")
    return torch.from_numpy(pixels)


def _labels_of(
    folder: ImageFolder, path: str, names: Sequence[str], classes: Sequence[int] | None
) -> Tensor:
    """Of images in class folders by the folders' names, else of all of them alike."""
    has_classes = len(folder.class_names) > 1 or folder.class_names[0] in names
    if not has_classes or classes is not None:
        return torch.full((len(folder),), _class_of_all(path, names, classes))
    unknown = [name for name in folder.class_names if name not in names]
    if unknown:
        raise ValueError(
            f"--complete {path}: the run has no class {unknown[0]!r}; its classes are "
            f"{', '.join(names[:20])}; or say one for all images with --classes"
        )
    numbers = torch.tensor([list(names).index(name) for name in folder.class_names])
    return numbers[folder.labels]


def _class_of_all(path: str, names: Sequence[str], classes: Sequence[int] | None) -> int:
    if classes is None and len(names) == 1:
        return 0
    if classes is None or len(classes) != 1:
        raise ValueError(
            f"--complete {path}: its class is not known: say it with --classes, one of "
            f"{', '.join(names[:20])}"
        )
    return classes[0]


def _encoded(tokenizer: Tokenizer, pixels: Tensor) -> Tensor:
    parts = [
        tokenizer.encode(to_unit(part).to(tokenizer.device)).cpu()
        for part in pixels.split(ENCODE_BATCH)
    ]
    return torch.cat(parts)
