"""What a folder or an archive holds: files by their paths inside it.

Everything else asks entries, never the file system, so that a set of images is the same set whether
it lies in a folder or, not unpacked, in an archive.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, Protocol

# What file managers and notebooks leave beside pictures; dot files are left out as well.
_DEBRIS = {"__MACOSX", "Thumbs.db", "desktop.ini"}


class Readable(Protocol):
    """The bytes of a file: an entry, or a `pathlib.Path`."""

    def open(self, mode: Literal["rb"] = ..., /) -> BinaryIO:
        """Its bytes, from the first one on."""
        ...


class Entry(Readable, Protocol):
    """A file of a folder or an archive. As text it says where it is, for messages.

    Attributes:
        inner: its path inside, parts separated by "/"; of an archive's file, the path that it has
            in a folder which the archive is unpacked to. Bytes that are no UTF-8 are surrogates
            (`os.fsdecode`).
    """

    @property
    def inner(self) -> str: ...

    def size(self) -> int:
        """Bytes, -1 where the file is gone."""
        ...


@dataclass(frozen=True, slots=True)
class FolderFile:
    """A file of a folder."""

    folder: Path
    inner: str

    def __str__(self) -> str:
        return os.path.join(self.folder, self.inner)

    def open(self, mode: Literal["rb"] = "rb", /) -> BinaryIO:
        """See `Readable`."""
        return open(str(self), mode)

    def size(self) -> int:
        """See `Entry`."""
        try:
            return os.stat(str(self)).st_size
        except OSError:
            return -1


@dataclass(frozen=True)
class Contents:
    """Everything below a root but debris, in no order.

    Attributes:
        files: all files.
        folders: names of the folders in the root itself, empty ones among them.
    """

    files: list[Entry]
    folders: set[str]


def is_debris(name: str) -> bool:
    """Whether a file or folder of this name is nobody's data: hidden, or what file managers and
    notebooks leave (.DS_Store, ._x, __MACOSX, Thumbs.db, .ipynb_checkpoints)."""
    return name.startswith(".") or name in _DEBRIS


def by_parts(entry: Entry) -> list[str]:
    """The order of files: part by part, as a sorted list of `pathlib.Path`."""
    return entry.inner.split("/")


def list_folder(folder: Path) -> Contents:
    """Everything in a folder. Links are followed; below every folder of the root, each real folder
    is visited once.

    Raises:
        OSError: a folder that cannot be listed; names it.
    """
    files: list[Entry] = []
    folders = set()
    seen: set[tuple[int, int]] = set()
    for name, is_folder in _names(folder):
        if is_folder:
            folders.add(name)
            seen.clear()
            files += (FolderFile(folder, inner) for inner in _walk(folder, name, seen))
        else:
            files.append(FolderFile(folder, name))
    return Contents(files, folders)


def _walk(root: Path, start: str, seen: set[tuple[int, int]]) -> Iterable[str]:
    """Paths inside `root` of the files below one of its folders.

    seen: device and number of every folder visited so far, by which loops of links are found.
    """
    waiting = [start]
    while waiting:
        inner = waiting.pop()
        folder = root / inner
        there = os.stat(folder)
        identity = (there.st_dev, there.st_ino)
        if identity in seen:
            continue
        seen.add(identity)
        for name, is_folder in _names(folder):
            path = f"{inner}/{name}"
            if is_folder:
                waiting.append(path)
            else:
                yield path


def _names(folder: Path) -> list[tuple[str, bool]]:
    """(name, whether it is a folder) of everything in a folder but debris, sorted.

    Raises:
        OSError: nobody may take a folder that cannot be listed for an empty one.
    """
    found = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if not is_debris(entry.name):
                    found.append((entry.name, entry.is_dir()))
    except OSError as error:
        at = "" if error.filename in (None, str(folder)) else f" (at {error.filename})"
        raise type(error)(
            error.errno,
            f"cannot list {folder}{at}: {error.strerror}; its images would be missing from --data: "
            "make it readable, or move it away",
        ) from error
    return sorted(found)
