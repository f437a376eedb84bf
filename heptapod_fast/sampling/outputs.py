"""Where samples go: a grid, single files, a tar file, one archive of arrays. Each takes batches as
they come, keeps no more in memory than it has to, and can go on where another process was stopped
(job.py)."""

from __future__ import annotations

import contextlib
import io
import re
import tarfile
import tempfile
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any, ClassVar, TypeAlias

import numpy as np
import torch
from torch import Tensor

from heptapod_fast.pictures import grid_of_pixels, png_bytes, save_png
from heptapod_fast.storage import sync

COLUMNS = 8
MOST_ROWS = 64
_NUMBERED = re.compile(r"\d{6,}-class\d+\.png")
OLDEST = (1980, 1, 1, 0, 0, 0)  # the time of a zip's members: the same images make the same bytes

# How far an output is, in what goes into JSON: enough to cut it back to there and go on.
Mark: TypeAlias = dict[str, Any]


class Output(ABC):
    """One of the things that a job writes, in this order:

        belong_to(job); begin(images, mark); add(...), mark(), add(...), mark(), ...;
        complete(); publish()

    Until `publish` it has another name. `close` may come at any time after `begin` and leaves all
    that the last `mark` speaks of, for a `begin` with that mark, also in another process; `discard`
    leaves nothing.

    Attributes:
        flag: of tools/sample.py, that asks for it.
        path: of the file or folder that it becomes.
        parts: files that it consists of until it is published.
    """

    flag: ClassVar[str]

    def __init__(self, path: Path) -> None:
        self.path = path
        self.parts: list[Path] = []

    @abstractmethod
    def belong_to(self, job: str) -> None:
        """Name the parts. job: letters that no other job has which writes to the same path."""

    @abstractmethod
    def begin(self, images: int, mark: Mark) -> None:
        """Be ready for the image number `images`.

        Args:
            mark: of when so many were in it; empty at the start.

        Raises:
            ValueError: what the mark speaks of is not there.
            OSError: nothing can be written there, which is said now and not after hours.
        """

    @abstractmethod
    def add(self, labels: Tensor, pixels: Tensor) -> None:
        """labels: (b,) int64. pixels: (b, 3, H, W) uint8."""

    @abstractmethod
    def mark(self) -> Mark:
        """How far it is, once all of that is on the disk."""

    @abstractmethod
    def complete(self) -> None:
        """Write what comes last. May be cut off and done again, after `begin` with the last
        mark."""

    @abstractmethod
    def publish(self) -> None:
        """Take the name that it was asked for under; nothing where that is done."""

    @abstractmethod
    def close(self) -> None:
        """Let go of what is open."""

    @abstractmethod
    def said(self) -> str:
        """What was written where."""

    def discard(self) -> None:
        """Remove the parts."""
        self.close()
        for part in self.parts:
            with contextlib.suppress(OSError):  # an error has led here, and is to be seen
                part.unlink(missing_ok=True)


def part_of(path: Path, job: str, ending: str = "part") -> Path:
    """A hidden file beside another one."""
    return path.with_name(f".{path.name}.{job}.{ending}")


def open_part(part: Path, length: int) -> IO[bytes]:
    """A file to append to, cut back to a length.

    Raises:
        ValueError: it is shorter; says what to do.
    """
    part.parent.mkdir(parents=True, exist_ok=True)
    if not length:
        return open(part, "w+b")
    found = part.stat().st_size if part.exists() else 0
    if found < length:
        raise ValueError(
            f"{part}: expected at least {length:,} bytes of the unfinished job, found {found:,}: "
            "put the file back, or begin anew with --start-over"
        )
    stream = open(part, "r+b")
    stream.truncate(length)
    stream.seek(length)
    return stream


def _check_writable(folder: Path) -> None:
    """Makes a folder; OSError if no file can be written there."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


class InOneFile(Output):
    """An output that is one file, appended to under another name."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._count = 0
        self._file: IO[bytes] | None = None

    @property
    def _stream(self) -> IO[bytes]:
        assert self._file is not None  # begun
        return self._file

    def belong_to(self, job: str) -> None:
        """See `Output`."""
        self.parts = [part_of(self.path, job)]

    def begin(self, images: int, mark: Mark) -> None:
        """See `Output`."""
        self._count = images
        self._file = open_part(self.parts[0], mark.get("bytes", 0))

    def mark(self) -> Mark:
        """See `Output`."""
        self._stream.flush()
        sync(self.parts[0])
        return {"bytes": self._stream.tell()}

    def publish(self) -> None:
        """See `Output`."""
        self.close()
        part = self.parts[0]
        if part.exists():
            part.replace(self.path)
            sync(self.path.parent)

    def close(self) -> None:
        """See `Output`."""
        if self._file is not None:
            # What the disk has no room for stands behind the last mark.
            with contextlib.suppress(OSError):
                self._file.close()


class Grid(InOneFile):
    """The first images as one picture: `MOST_ROWS` rows at most. Its parts are their pixels, and
    the picture."""

    flag = "--out"

    def __init__(self, path: Path, columns: int) -> None:
        super().__init__(path)
        self.columns = columns
        self._shape: list[int] = []  # of an image
        self._kept = 0

    def belong_to(self, job: str) -> None:
        """See `Output`."""
        self.parts = [part_of(self.path, job, "pixels"), part_of(self.path, job)]

    def begin(self, images: int, mark: Mark) -> None:
        """See `Output`."""
        super().begin(mark.get("seen", 0), mark)
        self._shape = mark.get("shape", [])
        self._kept = mark.get("kept", 0)

    def add(self, labels: Tensor, pixels: Tensor) -> None:
        """See `Output`."""
        self._count += len(pixels)
        self._shape = list(pixels.shape[1:])
        shown = pixels[: MOST_ROWS * self.columns - self._kept]
        self._stream.write(shown.contiguous().numpy().tobytes())
        self._kept += len(shown)

    def mark(self) -> Mark:
        """See `Output`."""
        more = {"seen": self._count, "kept": self._kept, "shape": self._shape}
        return super().mark() | more

    def complete(self) -> None:
        """See `Output`."""
        self._stream.seek(0)
        pixels = torch.frombuffer(bytearray(self._stream.read()), dtype=torch.uint8)
        sheet = grid_of_pixels(pixels.view(self._kept, *self._shape), self.columns)
        save_png(sheet, self.parts[1])

    def publish(self) -> None:
        """See `Output`."""
        self.close()
        pixels, picture = self.parts
        if picture.exists():
            picture.replace(self.path)
            sync(self.path.parent)
        pixels.unlink(missing_ok=True)

    def said(self) -> str:
        """See `Output`."""
        if self._kept == self._count:
            return f"grid: {self.path}"
        return f"grid: {self.path} (the first {self._kept} of {self._count:,} images)"


class Singles(Output):
    """A PNG file for every image, named by its number and class. They are whole from the start and
    keep their names; those behind the last mark are written again.

    Args:
        labels: (N,) of all images.
        replaces: remove numbered images of other samples that lie in the folder, which are else an
            error: whoever reads the folder could not tell them apart.
    """

    flag = "--save-images"

    def __init__(self, folder: Path, labels: Tensor, replaces: bool = False) -> None:
        super().__init__(folder)
        self._labels = labels.tolist()
        self._replaces = replaces
        self._count = 0
        self._unsynced: list[Path] = []

    def belong_to(self, job: str) -> None:
        """See `Output`."""

    def begin(self, images: int, mark: Mark) -> None:
        """See `Output`."""
        _check_writable(self.path)
        self._count = images
        self._refuse_others()
        there = {path.name.split("-class")[0] for path in self.path.iterdir()}
        missing = [name for name in map(_number, range(images)) if name not in there]
        if missing:
            raise ValueError(
                f"{self.path}: expected the first {images:,} images of the unfinished job, "
                f"{len(missing):,} are missing, such as {missing[0]}-class*.png: put them back, or "
                "begin anew with --start-over"
            )

    def _refuse_others(self) -> None:
        ours = {self._name(number, label) for number, label in enumerate(self._labels)}
        others = [path for path in self.path.iterdir() if _NUMBERED.fullmatch(path.name)]
        others = sorted(path for path in others if path.name not in ours)
        if self._replaces:
            for path in others:
                path.unlink()
        elif others:
            raise ValueError(
                f"--save-images {self.path}: expected an empty folder, or one of the same samples; "
                f"found {len(others):,} images of others, such as {others[0].name}: name another "
                "folder, or let them be removed with --start-over"
            )

    @staticmethod
    def _name(number: int, label: int) -> str:
        return f"{_number(number)}-class{label}.png"

    def add(self, labels: Tensor, pixels: Tensor) -> None:
        """See `Output`."""
        for image, label in images_of(labels, pixels):
            file = self.path / self._name(self._count, label)
            save_png(image, file)
            self._unsynced.append(file)
            self._count += 1

    def mark(self) -> Mark:
        """See `Output`."""
        for file in self._unsynced:
            sync(file)
        sync(self.path)
        self._unsynced.clear()
        return {}

    def complete(self) -> None:
        """See `Output`."""

    def publish(self) -> None:
        """See `Output`."""

    def close(self) -> None:
        """See `Output`."""

    def said(self) -> str:
        """See `Output`."""
        return f"single images: {self.path}"


class Tarred(InOneFile):
    """A .tar file with a PNG file and a .cls file, the class's number, of every image: what
    webdataset reads, and --data of tools/train.py. The same images make the same bytes."""

    flag = "--save-tar"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._archive: tarfile.TarFile | None = None

    def begin(self, images: int, mark: Mark) -> None:
        """See `Output`."""
        super().begin(images, mark)
        # It appends where the stream is.
        self._archive = tarfile.open(fileobj=self._stream, mode="w")  # noqa: SIM115

    def add(self, labels: Tensor, pixels: Tensor) -> None:
        """See `Output`."""
        for image, label in images_of(labels, pixels):
            self._put(f"{_number(self._count)}.png", png_bytes(image))
            self._put(f"{_number(self._count)}.cls", str(label).encode())
            self._count += 1

    def _put(self, name: str, data: bytes) -> None:
        """A file without an owner or a time."""
        assert self._archive is not None  # begun
        member = tarfile.TarInfo(name)
        member.size = len(data)
        self._archive.addfile(member, io.BytesIO(data))
        kept: list[tarfile.TarInfo] = self._archive.members  # type: ignore[attr-defined]
        kept.clear()  # of every file so far, which are many

    def complete(self) -> None:
        """See `Output`."""
        assert self._archive is not None  # begun
        self._archive.close()
        self._stream.flush()

    def said(self) -> str:
        """See `Output`."""
        return f"tar file: {self.path}"


class Arrays(InOneFile):
    """An .npz file with arr_0 (B, H, W, 3) uint8 and labels (B,) int64, as numpy writes it but for
    the time of its members, and image by image.

    The file is a zip: before a member's bytes stands a header with their checksum, which is known
    once all have come. So its room is kept free, the checksum so far is part of the mark, and
    `complete` writes the header.

    Args:
        labels: of all images.
    """

    flag = "--save-npz"

    def __init__(self, path: Path, labels: Tensor) -> None:
        super().__init__(path)
        self._labels = labels.numpy()
        self._checksum = 0

    def begin(self, images: int, mark: Mark) -> None:
        """See `Output`."""
        super().begin(images, mark)
        self._checksum = mark.get("crc32", 0)

    def mark(self) -> Mark:
        """See `Output`."""
        return super().mark() | {"crc32": self._checksum}

    def add(self, labels: Tensor, pixels: Tensor) -> None:
        """See `Output`."""
        images = pixels.permute(0, 2, 3, 1).contiguous().numpy()
        if self._stream.tell() == 0:
            self._stream.write(_zip_header(_member("arr_0.npy")))
            self._put(_array_header((len(self._labels), *images.shape[1:]), images.dtype))
        self._put(images.data)
        self._count += len(images)

    def _put(self, data: bytes | memoryview) -> None:
        self._stream.write(data)
        self._checksum = zlib.crc32(data, self._checksum)

    def complete(self) -> None:
        """See `Output`."""
        member = _member("arr_0.npy")
        end = self._stream.tell()
        member.file_size = end - len(_zip_header(member))
        member.compress_size = member.file_size
        member.CRC = self._checksum
        self._stream.seek(0)
        self._stream.write(_zip_header(member))
        self._stream.seek(end)
        # A zip that is written to a stream begins where that is, and ends with a list of members.
        with zipfile.ZipFile(self._stream, "w") as archive:
            archive.filelist.append(member)
            with archive.open(_member("labels.npy"), "w") as stream:
                np.lib.format.write_array(stream, self._labels, allow_pickle=False)
        self._stream.flush()

    def said(self) -> str:
        """See `Output`."""
        return f"arrays: {self.path}"


def _member(name: str) -> zipfile.ZipInfo:
    """A file of a zip, not compressed."""
    member = zipfile.ZipInfo(name, OLDEST)
    member.external_attr = 0o600 << 16  # as zipfile has it by default
    member.CRC = 0
    member.header_offset = 0
    return member


def _zip_header(member: zipfile.ZipInfo) -> bytes:
    """What stands before a member, with room for sizes beyond 4 GiB whatever they are."""
    return member.FileHeader(zip64=True)


def _array_header(shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    """What stands before the bytes of an array in a file of numpy's."""
    header = {
        "shape": shape,
        "fortran_order": False,
        "descr": np.lib.format.dtype_to_descr(dtype),
    }
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, header)
    return stream.getvalue()


def _number(image: int) -> str:
    """As it stands in the names of files."""
    return f"{image:06d}"


def images_of(labels: Tensor, pixels: Tensor) -> Iterable[tuple[Tensor, int]]:
    """((H, W, 3) uint8, label) of every image of a batch."""
    return zip(pixels.permute(0, 2, 3, 1).contiguous(), labels.tolist(), strict=True)
