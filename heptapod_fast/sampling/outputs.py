"""Where samples go: a grid, single files, or one archive of arrays. Each takes batches as they come
and keeps no more than it has to."""

from __future__ import annotations

import io
import tarfile
import tempfile
import zipfile
from abc import ABC, abstractmethod
from pathlib import Path
from types import TracebackType
from typing import IO, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from heptapod_fast.pictures import grid_of_pixels, png_bytes, save_png

COLUMNS = 8
MOST_ROWS = 64


class Output(Protocol):
    """Takes batches between `__enter__` and `__exit__`, which finishes it, or removes what there is
    of it after an error."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def add(self, labels: Tensor, pixels: Tensor) -> None:
        """labels: (b,) int64. pixels: (b, 3, H, W) uint8."""
        ...

    def said(self) -> str:
        """What was written where."""
        ...


def _check_writable(folder: Path) -> None:
    """Makes a folder; OSError now, not after hours, if no file can be written there."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


class Grid:
    """The first images as one picture: `MOST_ROWS` rows at most."""

    def __init__(self, path: Path, columns: int) -> None:
        self.path = path
        self.columns = columns
        self._kept: list[Tensor] = []
        self._count = 0
        self._seen = 0

    def __enter__(self) -> Self:
        _check_writable(self.path.parent)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            save_png(grid_of_pixels(torch.cat(self._kept), self.columns), self.path)

    def add(self, labels: Tensor, pixels: Tensor) -> None:
        """See `Output`."""
        self._seen += len(pixels)
        room = MOST_ROWS * self.columns - self._count
        if room > 0:
            # A copy: a part of a batch would keep all of it.
            self._kept.append(pixels[:room].clone())
            self._count += len(self._kept[-1])

    def said(self) -> str:
        """See `Output`."""
        if self._count == self._seen:
            return f"grid: {self.path}"
        return f"grid: {self.path} (the first {self._count} of {self._seen:,} images)"


class Singles:
    """A PNG file for every image, named by its number and class."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._count = 0

    def __enter__(self) -> Self:
        _check_writable(self.folder)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Files are whole already."""

    def add(self, labels: Tensor, pixels: Tensor) -> None:
        """See `Output`."""
        images = pixels.permute(0, 2, 3, 1).contiguous()
        for image, label in zip(images, labels.tolist(), strict=True):
            save_png(image, self.folder / f"{self._count:06d}-class{label}.png")
            self._count += 1

    def said(self) -> str:
        """See `Output`."""
        return f"single images: {self.folder}"


class WholeFile(ABC):
    """A file that is there once all is in it, under another name until then."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.temporary = path.with_name(f".{path.name}.tmp")

    @abstractmethod
    def begin(self) -> None:
        """Open `temporary`."""

    @abstractmethod
    def end(self, is_whole: bool) -> None:
        """Close it. is_whole: nothing has failed, and what comes last is to be written."""

    def __enter__(self) -> Self:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.begin()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.end(is_whole=error is None)
            if error is None:
                self.temporary.replace(self.path)
        finally:
            self.temporary.unlink(missing_ok=True)


class Tarred(WholeFile):
    """A .tar file with a PNG file and a .cls file, the class's number, of every image: what
    webdataset reads, and --data of tools/train.py. The same images make the same bytes."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._archive: tarfile.TarFile | None = None
        self._count = 0

    def begin(self) -> None:
        """See `WholeFile`."""
        self._archive = tarfile.open(self.temporary, "w")  # noqa: SIM115  # closed by `end`

    def end(self, is_whole: bool) -> None:
        """See `WholeFile`."""
        assert self._archive is not None  # begun
        self._archive.close()

    def add(self, labels: Tensor, pixels: Tensor) -> None:
        """See `Output`."""
        images = pixels.permute(0, 2, 3, 1).contiguous()
        for image, label in zip(images, labels.tolist(), strict=True):
            self._put(f"{self._count:06d}.png", png_bytes(image))
            self._put(f"{self._count:06d}.cls", str(label).encode())
            self._count += 1

    def _put(self, name: str, data: bytes) -> None:
        """A file without an owner or a time."""
        assert self._archive is not None  # begun
        member = tarfile.TarInfo(name)
        member.size = len(data)
        self._archive.addfile(member, io.BytesIO(data))
        kept: list[tarfile.TarInfo] = self._archive.members  # type: ignore[attr-defined]
        kept.clear()  # of every file so far, which are many

    def said(self) -> str:
        """See `Output`."""
        return f"tar file: {self.path}"


class Arrays(WholeFile):
    """An .npz file with arr_0 (B, H, W, 3) uint8 and labels (B,) int64, as numpy writes it, but
    image by image."""

    def __init__(self, path: Path, labels: Tensor) -> None:
        super().__init__(path)
        self._labels = labels.numpy()
        self._archive: zipfile.ZipFile | None = None
        self._stream: IO[bytes] | None = None

    def begin(self) -> None:
        """See `WholeFile`."""
        self._archive = zipfile.ZipFile(self.temporary, "w")

    def end(self, is_whole: bool) -> None:
        """See `WholeFile`."""
        assert self._archive is not None  # begun
        with self._archive:
            if self._stream is not None:
                self._stream.close()
            if is_whole:
                with self._archive.open("labels.npy", "w") as stream:
                    np.lib.format.write_array(stream, self._labels, allow_pickle=False)

    def add(self, labels: Tensor, pixels: Tensor) -> None:
        """See `Output`."""
        images = pixels.permute(0, 2, 3, 1).contiguous().numpy()
        if self._stream is None:
            assert self._archive is not None  # begun
            self._stream = self._archive.open("arr_0.npy", "w", force_zip64=True)
            header = {
                "shape": (len(self._labels), *images.shape[1:]),
                "fortran_order": False,
                "descr": np.lib.format.dtype_to_descr(images.dtype),
            }
            np.lib.format.write_array_header_1_0(self._stream, header)
        self._stream.write(images.data)

    def said(self) -> str:
        """See `Output`."""
        return f"arrays: {self.path}"
