"""Images in archives, read where they are: tar (also a tar of tars, as ImageNet comes) and zip.

An archive stands for the folder that it unpacks to; `ARCHIVE/FOLDER` names a folder in it. Its
table of contents is read once; after that every file is one seek and one read, from any thread.
Compressed tars cannot be read that way and are refused with what to do.
"""

from __future__ import annotations

import contextlib
import io
import posixpath
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Literal

from heptapod_fast.data.entries import Contents, Entry, is_debris

SUFFIXES = (".tar", ".zip")
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")
Progress = Callable[[int, int], None]
_OFTEN = 1000  # files between two calls of progress
# The header before every file of a zip (APPNOTE 4.3.7): 26 bytes, then the lengths of the name and
# of the extra field, which stand between it and the data.
_ZIP_HEADER = struct.Struct("<4s22xHH")
_ZIP_MARK = b"PK\x03\x04"
# How compressed files begin: gzip, bzip2, xz, zstd.
_PACKED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
_BLOCK = tarfile.BLOCKSIZE


class ArchiveError(ValueError):
    """An archive that cannot be used; says what to do."""


@dataclass(frozen=True, slots=True)
class TarFile:
    """A file in a tar, which lies there as it is.

    Attributes:
        archive: the file on the disk that holds it, the outermost one.
        inner: see `Entry`.
        offset: of its first byte in the archive. length: in bytes.
    """

    archive: str
    inner: str
    offset: int
    length: int

    def __str__(self) -> str:
        return f"{self.archive}/{self.inner}"

    def open(self, mode: Literal["rb"] = "rb", /) -> BinaryIO:
        """See `Readable`."""
        with open(self.archive, mode) as stream:
            return io.BytesIO(_read(stream, self, self.offset, self.length))

    def size(self) -> int:
        """See `Entry`."""
        return self.length


@dataclass(frozen=True, slots=True)
class ZipFile:
    """A file in a zip, stored or deflated.

    Attributes:
        archive, inner: as of `TarFile`.
        header: where its header begins in the archive.
        packed: bytes that it takes there. length: its own.
        is_deflated: else it is stored as it is.
        checksum: its crc32.
    """

    archive: str
    inner: str
    header: int
    packed: int
    length: int
    is_deflated: bool
    checksum: int

    def __str__(self) -> str:
        return f"{self.archive}/{self.inner}"

    def open(self, mode: Literal["rb"] = "rb", /) -> BinaryIO:
        """See `Readable`.

        Raises:
            ValueError: what is there is not what the table of contents says.
        """
        with open(self.archive, mode) as stream:
            packed = _read(stream, self, self._first_byte(stream), self.packed)
        data = packed
        if self.is_deflated:
            try:
                # No zlib header in front; not a byte more is unpacked than the file should have.
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, self.length + 1)
            except zlib.error as error:
                raise ValueError(f"damaged in its archive ({error})") from error
        if len(data) != self.length or zlib.crc32(data) != self.checksum:
            raise ValueError("damaged in its archive (the checksum does not match)")
        return io.BytesIO(data)

    def size(self) -> int:
        """See `Entry`."""
        return self.length

    def _first_byte(self, stream: BinaryIO) -> int:
        header = _read(stream, self, self.header, _ZIP_HEADER.size)
        mark, name_length, extra_length = _ZIP_HEADER.unpack(header)
        if mark != _ZIP_MARK:
            raise ValueError("damaged in its archive (no file begins where it should)")
        return self.header + _ZIP_HEADER.size + name_length + extra_length


@dataclass(frozen=True, slots=True)
class BrokenLink:
    """A link that leads nowhere: there, and not to be read, as in a folder."""

    archive: str
    inner: str
    target: str

    def __str__(self) -> str:
        return f"{self.archive}/{self.inner}"

    def open(self, mode: Literal["rb"] = "rb", /) -> BinaryIO:
        """See `Readable`.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"a link to {self.target}, which is not in the archive")

    def size(self) -> int:
        """See `Entry`."""
        return -1


Member = TarFile | ZipFile | BrokenLink


def _read(stream: BinaryIO, file: TarFile | ZipFile, offset: int, length: int) -> bytes:
    stream.seek(offset)
    data = stream.read(length)
    if len(data) != length:
        raise ValueError(f"{file.archive} ends in the middle of it: the archive was cut short")
    return data


def split(path: Path) -> tuple[Path, str] | None:
    """(archive, folder inside it) of ARCHIVE or ARCHIVE/FOLDER; None for what names no archive.

    Raises:
        ArchiveError: a compressed tar.
    """
    path = Path(posixpath.normpath(path))
    for candidate in (path, *path.parents):
        named_so = is_archive(candidate.name) or is_compressed(candidate.name)
        if not named_so or not candidate.is_file():
            continue
        if is_compressed(candidate.name):
            raise compressed_tar(str(candidate))
        inside = path.relative_to(candidate).as_posix()
        return candidate, "" if inside == "." else inside
    return None


def is_compressed(name: str) -> bool:
    """Whether a file of this name is a compressed tar."""
    return name.lower().endswith(COMPRESSED)


def compressed_tar(name: str) -> ArchiveError:
    """What to say of a compressed tar."""
    return ArchiveError(
        f"{name}: a compressed tar cannot be read in place, and images gain nothing from it: "
        f"unpack it to a plain .tar (as with gunzip {name}), or to a folder"
    )


def is_archive(name: str) -> bool:
    """Whether a file of this name is read as an archive."""
    return name.lower().endswith(SUFFIXES)


def list_archive(path: Path, folder: str = "", progress: Progress | None = None) -> Contents:
    """Everything in an archive, or below one of its folders.

    Args:
        folder: path of the folder inside, "" for all.
        progress: called as progress(megabytes passed, megabytes in all) while a tar is gone
            through.

    Raises:
        FileNotFoundError: there is no such folder in it.
        ArchiveError: damaged, or with something in it that cannot be read in place; the message
            names it.
    """
    found = _table(str(path), str(path), 0, path.stat().st_size, progress)
    if not folder:
        return found.contents()
    inside = f"{folder}/"
    below = _Table(
        {
            name.removeprefix(inside): replace(file, inner=name.removeprefix(inside))
            for name, file in found.files.items()
            if name.startswith(inside)
        },
        {name.removeprefix(inside) for name in found.folders if name.startswith(inside)},
    )
    if not below.files and folder not in found.folders:
        raise FileNotFoundError(f"{path} holds no folder {folder}; check --data")
    return below.contents()


def expand(entry: Entry) -> list[Entry]:
    """The files of an archive that lies in a folder or in a tar, below a folder that is named like
    the archive, without its ending.

    Raises:
        ArchiveError: as `list_archive`; also an archive inside of a zip.
    """
    if isinstance(entry, ZipFile):
        raise ArchiveError(
            f"{entry}: an archive inside of a zip cannot be read in place: unpack the zip"
        )
    archive = str(entry)
    base = 0
    if isinstance(entry, TarFile):
        archive = entry.archive
        base = entry.offset
    folder = entry.inner[: entry.inner.rindex(".")]
    files = _table(archive, str(entry), base, entry.size(), None).files
    return [replace(file, inner=f"{folder}/{file.inner}") for file in files.values()]


@dataclass(frozen=True)
class _Table:
    """What is in an archive: files by their paths, and folders that it names, empty ones too."""

    files: dict[str, Member]
    folders: set[str]

    def contents(self) -> Contents:
        """As of a folder."""
        paths = [*self.folders, *(name for name in self.files if "/" in name)]
        return Contents(
            list(self.files.values()), {path.split("/", 1)[0] for path in paths if path}
        )


def _table(archive: str, name: str, base: int, length: int, progress: Progress | None) -> _Table:
    """The contents of an archive that is `length` bytes at `base` of the file `archive`.

    name: of this archive, for messages; its ending says which kind it is.
    """
    with open(archive, "rb") as stream:
        window = io.BufferedReader(_Window(stream, base, length))
        try:
            if name.lower().endswith(".zip"):
                return _zip_table(window, archive, name, base)
            return _tar_table(window, archive, name, base, length, progress)
        except (tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
            window.seek(0)
            if window.read(8).startswith(_PACKED):
                raise compressed_tar(name) from error
            raise ArchiveError(f"{name} is damaged or no such archive: {error}") from error


class _Window(io.RawIOBase):
    """A part of a file, as a file of its own."""

    def __init__(self, stream: BinaryIO, start: int, length: int) -> None:
        self._stream = stream
        self._start = start
        self._length = length
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        origins = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}
        self._at = origins[whence] + offset
        return self._at

    def readinto(self, buffer: bytearray | memoryview, /) -> int:  # type: ignore[override]
        count = min(len(buffer), max(0, self._length - self._at))
        self._stream.seek(self._start + self._at)
        # Through a view: a part of a bytearray would be a copy.
        found = self._stream.readinto(memoryview(buffer)[:count])  # type: ignore[attr-defined]
        self._at += found
        return found


# -------------------------------------------------------------------------------------------- tar


def _tar_table(
    stream: BinaryIO,
    archive: str,
    name: str,
    base: int,
    length: int,
    progress: Progress | None,
) -> _Table:
    """In a tar a file may be there twice, and then the last one counts, as when it is unpacked."""
    table = _Table({}, set())
    links: dict[str, str] = {}
    with tarfile.open(fileobj=stream, mode="r:") as tar:
        for count, info in enumerate(_members(tar), 1):
            if progress is not None and count % _OFTEN == 0:
                progress(min(info.offset, length) // 2**20, length // 2**20)
            inner = _inner(info.name, name)
            if _is_hidden(inner):
                continue
            if info.isdir():
                table.folders.add(inner)
            elif info.issym():
                links[inner] = posixpath.join(posixpath.dirname(inner), info.linkname)
            elif info.islnk():
                links[inner] = _inner(info.linkname, name)
            elif info.issparse():
                raise ArchiveError(f"{name}: {inner} is stored as a sparse file; unpack the tar")
            elif info.isfile():
                links.pop(inner, None)
                table.files[inner] = TarFile(archive, inner, base + info.offset_data, info.size)
        _check_end(stream, tar.offset, name)
    if progress is not None:
        progress(length // 2**20, length // 2**20)
    _follow(links, table, archive)
    return table


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while (info := tar.next()) is not None:
        # It keeps every member: gigabytes for a million images.
        tar.members = []  # type: ignore[attr-defined]
        yield info


def _check_end(stream: BinaryIO, offset: int, name: str) -> None:
    """ArchiveError unless a tar ends where its members do, in zeros: Python's tarfile takes a
    damaged header, or the end of the file, for the end of the archive."""
    stream.seek(offset)
    mark = stream.read(_BLOCK)
    if len(mark) < _BLOCK:
        raise ArchiveError(
            f"{name} ends at byte {offset + len(mark):,} without the mark of an end: it was cut "
            "short; copy or download it again"
        )
    if any(mark):
        raise ArchiveError(
            f"{name} is damaged at byte {offset:,}: no file begins there, and the rest cannot be "
            "found; copy or download it again"
        )
    while rest := stream.read(2**20):
        if rest.strip(b"\0"):
            raise ArchiveError(
                f"{name} goes on behind its end, as archives do that were joined with cat: join "
                "them with tar --concatenate, or put them into one folder"
            )


def _follow(links: dict[str, str], table: _Table, archive: str) -> None:
    """Adds what links lead to: files, and all that is in folders."""
    for inner, target in links.items():
        file = _linked(table.files, links, target)
        if file is not None:
            table.files[inner] = replace(file, inner=inner)
            continue
        below = f"{posixpath.normpath(target)}/"
        copies = {
            name.replace(below, f"{inner}/", 1): member
            for name, member in table.files.items()
            if name.startswith(below)
        }
        for name, member in copies.items():
            table.files[name] = replace(member, inner=name)
        if not copies:
            table.files[inner] = BrokenLink(archive, inner, target)


def _linked(files: dict[str, Member], links: dict[str, str], target: str) -> Member | None:
    """The file that a link leads to, over other links; None where it leads to no file."""
    for _ in range(len(links) + 1):
        target = posixpath.normpath(target)
        if target in files and target not in links:
            return files[target]
        if target not in links:
            return None
        target = links[target]
    return None


def _inner(path: str, archive: str) -> str:
    """A path in an archive as it is below the folder which that is unpacked to."""
    inner = posixpath.normpath(path.lstrip("/"))
    if inner == ".." or inner.startswith("../"):
        raise ArchiveError(f"{archive} holds {path}, which would be outside of it when unpacked")
    return inner


def _is_hidden(inner: str) -> bool:
    return any(is_debris(part) for part in inner.split("/"))


# -------------------------------------------------------------------------------------------- zip


def _zip_table(stream: BinaryIO, archive: str, name: str, base: int) -> _Table:
    """As in a tar, the last one of two files of a name counts."""
    with zipfile.ZipFile(stream) as contents:
        entries = contents.infolist()
    table = _Table({}, set())
    for info in entries:
        inner = _inner(_zip_name(info), name)
        if _is_hidden(inner):
            continue
        if info.is_dir():
            table.folders.add(inner)
            continue
        _refuse_unreadable(info, f"{name}: {inner}")
        table.files[inner] = ZipFile(
            archive,
            inner,
            base + info.header_offset,
            info.compress_size,
            info.file_size,
            info.compress_type == zipfile.ZIP_DEFLATED,
            info.CRC,
        )
    return table


def _refuse_unreadable(info: zipfile.ZipInfo, what: str) -> None:
    """ArchiveError for what cannot be read in place."""
    if info.flag_bits & 1:
        raise ArchiveError(f"{what} is encrypted; unpack the zip")
    if stat.S_ISLNK(info.external_attr >> 16):
        raise ArchiveError(f"{what} is a link; unpack the zip")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ArchiveError(
            f"{what} is compressed with method {info.compress_type}, only stored (0) and deflated "
            "(8) files are read in place; unpack the zip"
        )


def _zip_name(info: zipfile.ZipInfo) -> str:
    """Names that are not marked as UTF-8 may be it all the same, as macOS writes them; Windows
    separates folders in its own way."""
    name = info.filename
    is_marked = bool(info.flag_bits & 0x800)
    if not is_marked:
        with contextlib.suppress(UnicodeError):
            name = name.encode("cp437").decode("utf-8")
    is_windows = info.create_system == 0
    return name.replace("\\", "/") if is_windows else name
