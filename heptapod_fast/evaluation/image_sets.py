"""Images that samples are compared with, or samples that were written before: an .npz file as ADM
lays it out, a folder of pictures, or a set of training images. Read batch by batch, so that none
has to fit in memory.
"""

from __future__ import annotations

import hashlib
import os
import re
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Protocol

import numpy as np
import torch
from torch import Tensor

from heptapod_fast.data.sources import ImageSource

BATCH = 256
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_EXPECTED = "expected uint8 RGB images (N, {side}, {side}, 3), values 0 to 255, as ADM writes them"


class ImageSet(Protocol):
    """Images in a fixed order.

    Attributes:
        name: what it was read from.
        sha256: over the bytes of its files.
        labels: (N,) int64, None where the files do not say them.
    """

    name: str
    sha256: str
    labels: Tensor | None

    def __len__(self) -> int:
        """How many images; 0 where there are statistics alone."""
        ...

    def batches(self) -> Iterator[Tensor]:
        """(b, 3, H, W) uint8, one after the other."""
        ...

    def statistics(self, spatial: bool) -> tuple[np.ndarray, np.ndarray] | None:
        """Mean (F,) and covariance (F, F) of Inception's features where the set has them with it,
        of the pooled ones or of the spatial ones."""
        ...


def open_images_at(path: str, side: int, flag: str) -> ImageSet:
    """An .npz file or a folder of pictures.

    Args:
        side: height and width that the images must have.
        flag: what the path was given with, for messages.

    Raises:
        ValueError: nothing there, or images of another size or layout; says what was expected.
    """
    place = Path(path)
    if place.is_dir():
        return PictureFolder(place, side, flag)
    if place.is_file() and place.suffix == ".npz":
        return ArrayFile(place, side, flag)
    found = "this is another file" if place.is_file() else "no such file"
    raise ValueError(
        f"{flag} {path}: {found}; expected a folder of pictures, or an .npz file with arr_0 "
        "(N, H, W, 3) uint8 or with mu and sigma"
    )


class ArrayFile:
    """An .npz file: arr_0, and ADM's statistics mu, sigma, mu_s, sigma_s where it has them."""

    def __init__(self, path: Path, side: int, flag: str):
        self.name = str(path)
        self._path = path
        self._where = f"{flag} {path}"
        self.sha256 = _sha256_of([path])
        self._shape: tuple[int, ...] = (0,)
        try:
            with zipfile.ZipFile(path) as archive:
                self._members = {name.removesuffix(".npy") for name in archive.namelist()}
                if "arr_0" in self._members:
                    with archive.open("arr_0.npy") as stream:
                        self._shape = self._checked_header(stream, side)
            self.labels = self._read_labels()
        except (zipfile.BadZipFile, KeyError, zlib.error, EOFError) as error:
            raise ValueError(f"{self._where}: not an .npz file ({error})") from None
        if not self._members & {"arr_0", "mu"}:
            raise ValueError(
                f"{self._where} holds {', '.join(sorted(self._members)) or 'nothing'}; expected "
                "arr_0, images, or mu and sigma, statistics of Inception's features"
            )

    def _read_labels(self) -> Tensor | None:
        if "labels" not in self._members or not len(self):
            return None
        labels = self._array("labels")
        if labels.shape != self._shape[:1]:
            raise ValueError(
                f"{self._where}: labels are {labels.shape}, expected {self._shape[:1]}, one for "
                "each image"
            )
        return torch.from_numpy(labels.astype(np.int64))

    def _array(self, name: str) -> np.ndarray:
        try:
            with np.load(self._path, allow_pickle=False) as file:
                return file[name]
        except (ValueError, zlib.error) as error:
            raise ValueError(f"{self._where}: {name} cannot be read: {error}") from None

    def _checked_header(self, stream: IO[bytes], side: int) -> tuple[int, ...]:
        shape, dtype = _read_header(stream, self._where)
        if dtype == np.uint8 and shape[1:] == (side, side, 3) and shape[0]:
            return shape
        why = ""
        if dtype != np.uint8:
            why = ": round to whole numbers first"
        elif shape[1:] == (3, side, side):
            why = ": channels come last"
        elif len(shape) == 3 or shape[-1:] == (1,):
            why = ": grey images have to be made RGB"
        raise ValueError(
            f"{self._where}: arr_0 is {dtype} {shape}, {_EXPECTED.format(side=side)}{why}"
        )

    def __len__(self) -> int:
        return self._shape[0]

    def batches(self) -> Iterator[Tensor]:
        """See `ImageSet`."""
        if not len(self):
            return
        per_image = int(np.prod(self._shape[1:]))
        with zipfile.ZipFile(self._path) as archive, archive.open("arr_0.npy") as stream:
            _read_header(stream, self._where)
            for first in range(0, len(self), BATCH):
                count = min(BATCH, len(self) - first)
                data = stream.read(count * per_image)
                if len(data) != count * per_image:
                    raise ValueError(f"{self._where}: arr_0 ends after {first} images")
                pixels = torch.frombuffer(bytearray(data), dtype=torch.uint8)
                yield pixels.view(count, *self._shape[1:]).permute(0, 3, 1, 2).contiguous()

    def statistics(self, spatial: bool) -> tuple[np.ndarray, np.ndarray] | None:
        """See `ImageSet`."""
        mean, covariance = ("mu_s", "sigma_s") if spatial else ("mu", "sigma")
        if not {mean, covariance} <= self._members:
            return None
        mu, sigma = self._array(mean), self._array(covariance)
        if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
            raise ValueError(
                f"{self._where}: {mean} is {mu.shape} and {covariance} {sigma.shape}, expected "
                "(F,) and (F, F)"
            )
        return mu, sigma


def _read_header(stream: IO[bytes], where: str) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of an array in a file; what follows are its bytes."""
    try:
        version = np.lib.format.read_magic(stream)
    except ValueError as error:
        raise ValueError(f"{where}: arr_0 is no array ({error})") from None
    read = np.lib.format.read_array_header_1_0
    if version != (1, 0):
        read = np.lib.format.read_array_header_2_0
    shape, is_fortran, dtype = read(stream)
    if is_fortran:
        raise ValueError(f"{where}: arr_0 is in Fortran order; expected C order")
    return shape, dtype


class PictureFolder:
    """Pictures of a folder and its subfolders, in the order of their paths. Their labels are in
    their names where tools/sample.py --save-images has written them."""

    def __init__(self, folder: Path, side: int, flag: str):
        self.name = str(folder)
        self._side = side
        self._where = f"{flag} {folder}"
        self._paths = sorted(
            Path(place, name)
            for place, _, names in os.walk(folder)
            for name in names
            if name.lower().endswith(PICTURES) and not name.startswith(".")
        )
        if not self._paths:
            raise ValueError(f"{self._where}: no pictures ({', '.join(PICTURES)})")
        self._read(self._paths[0])  # a wrong size is said now
        classes = [re.search(r"-class(\d+)\.", path.name) for path in self._paths]
        self.labels: Tensor | None = None
        if all(classes):
            self.labels = torch.tensor([int(found[1]) for found in classes if found])
        self.sha256 = _sha256_of(self._paths)

    def __len__(self) -> int:
        return len(self._paths)

    def batches(self) -> Iterator[Tensor]:
        """See `ImageSet`."""
        for first in range(0, len(self), BATCH):
            pixels = [self._read(path) for path in self._paths[first : first + BATCH]]
            yield torch.stack(pixels)

    def _read(self, path: Path) -> Tensor:
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(path) as image:
                found = np.asarray(image.convert("RGB"))
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"{self._where}: {path} is no picture ({error})") from None
        side = self._side
        if found.shape[:2] != (side, side):
            height, width = found.shape[:2]
            raise ValueError(
                f"{self._where}: {path} has {width} x {height} pixels, expected {side} x {side}"
            )
        return torch.from_numpy(found.copy()).permute(2, 0, 1)

    def statistics(self, spatial: bool) -> None:
        """See `ImageSet`: it has none."""


@dataclass
class TrainingImages:
    """The images that a run is trained on; of more than `most`, so many at random, always the same:
    evenly spread ones would be all of one class where labels repeat."""

    source: ImageSource
    most: int = 50_000
    name: str = "the training images"

    def __post_init__(self) -> None:
        self.sha256 = self.source.fingerprint
        count = min(len(self.source), self.most)
        self._ids = chosen_at_random(len(self.source), count)
        self.labels: Tensor | None = self.source.labels[self._ids]

    def part(self, chosen: Tensor, name: str) -> TrainingImages:
        """Of its images those where (N,) booleans are True, under another name."""
        found = replace(self, name=name)
        found._ids = self._ids[chosen]
        found.labels = self.source.labels[found._ids]
        return found

    def __len__(self) -> int:
        return len(self._ids)

    def batches(self) -> Iterator[Tensor]:
        """See `ImageSet`."""
        for ids in self._ids.split(BATCH):
            yield self.source.images(ids)

    def statistics(self, spatial: bool) -> None:
        """See `ImageSet`: it has none."""


def chosen_at_random(total: int, count: int) -> Tensor:
    """(count,) different numbers below `total`, in their order; the same ones every time."""
    generator = torch.Generator().manual_seed(0)
    return torch.randperm(total, generator=generator)[:count].sort().values


def _sha256_of(paths: list[Path]) -> str:
    """Over the bytes of all files, in turn."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()
