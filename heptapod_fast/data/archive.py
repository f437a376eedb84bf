"""Images in archives, read where they are: tar (also a tar of tars, as ImageNet comes) and zip.

An archive stands for the folder that it unpacks to; `ARCHIVE/FOLDER` names a folder in it. Its
table of contents is read once; after that every file is one seek and one read, from any thread.
Compressed tars cannot be read that way and are refused with what to do.
"""

from __future__ import annotations

import io
import posixpath
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
    for candidate in (path, *path.parents):
        if not is_archive(candidate.name) and not candidate.name.endswith(COMPRESSED):
            continue
        if not candidate.is_file():
            continue
        if candidate.name.endswith(COMPRESSED):
            raise ArchiveError(
                f"{candidate}: a compressed tar cannot be read in place, and images gain nothing "
                f"from it: unpack it to a plain .tar (as with gunzip {candidate}), or to a folder"
            )
        inside = path.relative_to(candidate).as_posix()
        return candidate, "" if inside == "." else inside
    return None


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
    files = _files(str(path), str(path), 0, path.stat().st_size, progress)
    if not folder:
        return _contents(files)
    inside = f"{folder}/"
    below = [
        replace(file, inner=file.inner.removeprefix(inside))
        for file in files
        if file.inner.startswith(inside)
    ]
    if not below:
        raise FileNotFoundError(f"{path} holds no folder {folder}; check --data")
    return _contents(below)


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
    files = _files(archive, str(entry), base, entry.size(), None)
    return [replace(file, inner=f"{folder}/{file.inner}") for file in files]


def _contents(files: list[TarFile | ZipFile]) -> Contents:
    folders = {file.inner.split("/", 1)[0] for file in files if "/" in file.inner}
    return Contents(list(files), folders)


def _files(
    archive: str, name: str, base: int, length: int, progress: Progress | None
) -> list[TarFile | ZipFile]:
    """The files of an archive that is `length` bytes at `base` of the file `archive`.

    name: of this archive, for messages; its ending says which kind it is.
    """
    with open(archive, "rb") as stream:
        window = io.BufferedReader(_Window(stream, base, length))
        try:
            if name.lower().endswith(".zip"):
                return list(_zip_files(window, archive, name, base))
            return _tar_files(window, archive, name, base, length, progress)
        except (tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
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


def _tar_files(
    stream: BinaryIO,
    archive: str,
    name: str,
    base: int,
    length: int,
    progress: Progress | None,
) -> list[TarFile | ZipFile]:
    """In a tar a file may be there twice, and then the last one counts, as when it is unpacked."""
    found: dict[str, TarFile | ZipFile] = {}
    links: dict[str, str] = {}
    with tarfile.open(fileobj=stream, mode="r:") as tar:
        for count, info in enumerate(_members(tar), 1):
            if progress is not None and count % _OFTEN == 0:
                progress(min(info.offset, length) // 2**20, length // 2**20)
            inner = _inner(info.name, name)
            if info.isdir() or _is_hidden(inner):
                continue
            if info.issym():
                links[inner] = posixpath.join(posixpath.dirname(inner), info.linkname)
            elif info.islnk():
                links[inner] = info.linkname
            elif info.issparse():
                raise ArchiveError(f"{name}: {inner} is stored as a sparse file; unpack the tar")
            elif info.isfile():
                links.pop(inner, None)
                found[inner] = TarFile(archive, inner, base + info.offset_data, info.size)
    if progress is not None:
        progress(length // 2**20, length // 2**20)
    for inner, target in links.items():
        found[inner] = replace(_linked(found, links, target, f"{name}: {inner}"), inner=inner)
    return list(found.values())


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while (info := tar.next()) is not None:
        # It keeps every member: gigabytes for a million images.
        tar.members = []  # type: ignore[attr-defined]
        yield info


def _linked(
    found: dict[str, TarFile | ZipFile], links: dict[str, str], target: str, who: str
) -> TarFile | ZipFile:
    """The file that a link leads to, over other links."""
    for _ in range(len(links) + 1):
        target = posixpath.normpath(target)
        if target in found:
            return found[target]
        if target not in links:
            break
        target = links[target]
    raise ArchiveError(f"{who} is a link to {target}, which is not in the archive; unpack the tar")


def _inner(path: str, archive: str) -> str:
    """A path in an archive as it is below the folder which that is unpacked to."""
    inner = posixpath.normpath(path.lstrip("/"))
    if inner.startswith(".."):
        raise ArchiveError(f"{archive} holds {path}, which would be outside of it when unpacked")
    return inner


def _is_hidden(inner: str) -> bool:
    return any(is_debris(part) for part in inner.split("/"))


# -------------------------------------------------------------------------------------------- zip


def _zip_files(stream: BinaryIO, archive: str, name: str, base: int) -> Iterator[ZipFile]:
    with zipfile.ZipFile(stream) as table:
        entries = table.infolist()
    for info in entries:
        inner = _inner(_zip_name(info), name)
        if info.is_dir() or _is_hidden(inner):
            continue
        if info.flag_bits & 1:
            raise ArchiveError(f"{name}: {inner} is encrypted; unpack the zip")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ArchiveError(
                f"{name}: {inner} is compressed with method {info.compress_type}, only stored (0) "
                "and deflated (8) files are read in place; unpack the zip"
            )
        yield ZipFile(
            archive,
            inner,
            base + info.header_offset,
            info.compress_size,
            info.file_size,
            info.compress_type == zipfile.ZIP_DEFLATED,
            info.CRC,
        )


def _zip_name(info: zipfile.ZipInfo) -> str:
    """Names that are not marked as UTF-8 may be it all the same, as macOS writes them."""
    is_marked = bool(info.flag_bits & 0x800)
    if is_marked:
        return info.filename
    try:
        return info.filename.encode("cp437").decode("utf-8")
    except UnicodeError:
        return info.filename
