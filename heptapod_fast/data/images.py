"""Image files of a folder or an archive as an `ImageSource`: decoded once into memory, or when they
are asked for."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from heptapod_fast.data.decoding import Decoder, PillowDecoder, read_sizes
from heptapod_fast.data.entries import Entry
from heptapod_fast.data.files import (
    PREPROCESSING,
    Files,
    find_images,
    listing,
    refuse_broken,
    refuse_small,
)
from heptapod_fast.data.sources import check_ids
from heptapod_fast.storage import available_memory

DECODE_BATCH = 64
Progress = Callable[[int, int], None]

logger = logging.getLogger(__name__)


class ImageFolder:
    """Images of a folder, or of a tar or zip of one: one class per subfolder, or one class for a
    flat folder.

    Which files are images, and of which classes, `find_images` says. All images are decoded at
    construction, which finds the broken ones and the fingerprint: RGB (grey, palette, CMYK and
    16-bit files are converted, transparency lies over white), no EXIF rotation, first frame of an
    animation, then `centre_crop`.

    Args:
        folder: the folder, ARCHIVE, or ARCHIVE/FOLDER.
        image_size: side of the decoded images, in pixels.
        max_broken: how many unreadable files may be left out before it is an error.
        decoder: default `PillowDecoder`.
        progress: called as progress(files done, files in all) while decoding.
        allow_upscale: enlarge small images by any factor; else by 1.25 at most, with a warning.
        listing_progress: called as progress(megabytes passed, megabytes in all) while the contents
            of an archive are read.
        in_memory: keep the pixels, for training; else images are decoded again each time that they
            are asked for, and memory does not grow with their number.

    Attributes:
        broken: (file, reason) of every file left out.
        notes: what a user should know of how the files were found.

    Raises:
        FileNotFoundError: the folder is missing or holds no images, or one of its classes none.
        ValueError: a layout that says nothing sure of classes, images too small, too many broken
            files, not enough memory.
        OSError: a folder that cannot be listed.
    """

    def __init__(
        self,
        folder: str | Path,
        image_size: int,
        max_broken: int = 0,
        decoder: Decoder | None = None,
        progress: Progress | None = None,
        allow_upscale: bool = False,
        listing_progress: Progress | None = None,
        in_memory: bool = True,
    ) -> None:
        if image_size < 1:
            raise ValueError(f"expected an --image-size of 1 or more, found {image_size}")
        self.folder = Path(folder)
        self.image_size = image_size
        found_files = find_images(self.folder, listing_progress)
        self.name = found_files.name or str(self.folder)
        self.class_names = found_files.class_names
        self.notes = found_files.notes
        files = found_files.files
        self._decoder = decoder or PillowDecoder()
        if in_memory:
            check_memory(len(files) * 3 * image_size**2, image_size, self.folder)
        sizes = read_sizes([file for file, _ in files])
        refuse_broken(self.folder, files, sizes, max_broken)
        refuse_small(self.folder, files, sizes, image_size, allow_upscale)
        self._pixels = self._room(len(files)) if in_memory else None
        found, digest = self._decode(files, progress)
        self.broken = refuse_broken(self.folder, files, found, max_broken)
        kept = [k for k, reason in enumerate(found) if not isinstance(reason, str)]
        if not kept:
            raise FileNotFoundError(
                f"{folder}: none of its {len(files)} images could be read "
                f"(first: {self.broken[0][1]}): choose another --data"
            )
        if self.broken:
            logger.warning(
                "%s: left out %d unreadable files, first %s (%s)",
                folder,
                len(self.broken),
                *self.broken[0],
            )
            if self._pixels is not None:
                for row, k in enumerate(kept):  # in place: a copy could need twice the memory
                    if row != k:
                        self._pixels[row] = self._pixels[k]
                self._pixels = self._pixels[: len(kept)]
        files = [files[k] for k in kept]
        self._entries = [file for file, _ in files]
        self.labels = torch.tensor([label for _, label in files], dtype=torch.int64)
        counts = self.labels.bincount(minlength=len(self.class_names)).tolist()
        bare = [name for name, n in zip(self.class_names, counts, strict=True) if n == 0]
        if bare:
            raise FileNotFoundError(
                f"{folder}: no readable image is left in {len(bare)} class "
                "folders of --data; mend or remove them" + listing(bare, len(bare), 20)
            )
        if self.broken:  # what was found on the way is of other names
            digest = self._digest_of_names(files)
            for ids in torch.arange(len(files)).split(DECODE_BATCH):
                digest.update(self.images(ids).numpy().data)
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.labels)

    def images(self, ids: Tensor) -> Tensor:
        """(B,) int64 -> (B, 3, H, W) uint8.

        Raises:
            IndexError: an id outside the set.
            ValueError, OSError: of images that are not in memory, a file that has changed since.
        """
        ids = check_ids(ids, len(self), self.name)
        if self._pixels is not None:
            return self._pixels[ids]
        pixels = self._room(len(ids))
        for rows, numbers in zip(pixels.split(DECODE_BATCH), ids.split(DECODE_BATCH), strict=True):
            batch = [self._entries[number] for number in numbers.tolist()]
            self._decode_again(batch, rows)
        return pixels

    def _room(self, count: int) -> Tensor:
        return torch.empty(count, 3, self.image_size, self.image_size, dtype=torch.uint8)

    def _decode_again(self, files: list[Entry], rows: Tensor) -> None:
        """Fills rows with images that could be read before."""
        reasons = self._decoder.decode(files, rows.numpy())
        for file, reason in zip(files, reasons, strict=True):
            if reason is not None:
                raise ValueError(
                    f"{file}: {reason}; it could be read when {self.folder} was opened: leave the "
                    "files of --data as they are until this is over"
                )

    def _decode(
        self, files: Files, progress: Progress | None
    ) -> tuple[list[str | None], hashlib._Hash]:
        """Fills the pixels, where they are kept; returns for every file None or the reason why it
        cannot be read, and the digest of the set if all can."""
        digest = self._digest_of_names(files)
        reasons: list[str | None] = []
        for start in range(0, len(files), DECODE_BATCH):
            batch = [file for file, _ in files[start : start + DECODE_BATCH]]
            if self._pixels is None:
                rows = self._room(len(batch))
            else:
                rows = self._pixels[start : start + DECODE_BATCH]
            reasons += self._decoder.decode(batch, rows.numpy())
            digest.update(rows.numpy().data)
            if progress is not None:
                progress(len(reasons), len(files))
        return reasons, digest

    def _digest_of_names(self, files: Files) -> hashlib._Hash:
        """Names and labels, behind which the decoded pixels come: a picture repainted in place is
        another set."""
        digest = hashlib.sha256(f"{PREPROCESSING}/{self.image_size}\n".encode())
        for file, label in files:
            digest.update(os.fsencode(file.inner))
            digest.update(f"\0{label}\n".encode())
        return digest


def check_memory(need: int, image_size: int, folder: Path) -> None:
    """Raises ValueError when `need` bytes of decoded images do not fit into memory."""
    free = available_memory()
    if free is not None and need > 0.9 * free:
        raise ValueError(
            f"{folder}: decoded at --image-size {image_size} the images take "
            f"{need / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are available: "
            "cache their tokens with tools/cache.py and train on the cache, or lower "
            "--image-size"
        )
