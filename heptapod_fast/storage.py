"""Files that are whole or not there: locks, checksums, flushing, and writing at once."""

from __future__ import annotations

import argparse
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

BLOCK = 2**22


def read_numbers(path: Path) -> object:
    """What `torch.save` wrote: tensors and plain containers alone, on the CPU; nothing in the file
    is executed. Raises anything where it holds something else, or garbage."""
    import torch

    # Training scripts store their arguments beside the weights; a Namespace only holds values.
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True)


class InUseError(OSError):
    """Another process holds a lock."""


def write_numbers(value: object, path: Path) -> None:
    """What `read_numbers` and other code read: tensors and plain containers, as PyTorch saves them.
    For what leaves the project; it keeps its own in safetensors."""
    import torch

    torch.save(value, path)


def lock(file: IO[str]) -> str:
    """Lock an open file for this process, until it is closed or the process ends.

    Returns:
        What to warn of: the file system has no locks, and the caller goes on without. Else empty.

    Raises:
        InUseError: another process holds the lock.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise InUseError(error.errno, error.strerror) from error
        # Lustre mounted without flock, some NFS: ENOSYS, ENOLCK, EOPNOTSUPP, EINVAL, EIO ...
        folder = Path(file.name).parent
        return (
            f"{folder} cannot be locked, its file system ({file_system(folder)}) has no locks "
            f"({error.strerror}): going on without. See to it that no other process writes here"
        )
    return ""


def file_system(path: Path) -> str:
    """The kind of the file system that a path is on, such as ext4, nfs4 or lustre."""
    try:
        mounts = Path("/proc/mounts").read_text().splitlines()
    except OSError:
        return "of unknown kind"
    there = path.resolve()
    kind = "of unknown kind"
    longest = 0
    for line in mounts:
        _, place, name, *_ = line.split(" ")
        place = place.replace("\\040", " ")
        # The last of several mounts on one place is the one that is seen.
        if there.is_relative_to(place) and len(place) >= longest:
            kind = name
            longest = len(place)
    return kind


def checksum(path: Path) -> str:
    """crc32c of a file, eight hexadecimal digits."""
    import google_crc32c

    value = 0
    with open(path, "rb") as stream:
        while chunk := stream.read(BLOCK):
            value = google_crc32c.extend(value, chunk)
    return f"{value:08x}"


def sha256(path: Path) -> str:
    """SHA-256 of a file, 64 hexadecimal digits, as `sha256sum` prints it."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def readable(path: Path) -> None:
    """The permissions that the umask gives new files (safetensors makes private ones)."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def write_json(path: Path, value: Any) -> None:
    """Write JSON at once or not at all, and flush it."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        temporary.write_text(json.dumps(value, indent=1) + "\n")
        sync(temporary)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, `.NAME.unfinished` beside `path`. At the end its files are flushed and it
    becomes `path`; after an error nothing is left of it.

    Args:
        path: not there yet, or an empty folder.

    Raises:
        OSError: it cannot be written, or something was put there meanwhile.
    """
    path = Path(os.path.abspath(path))
    unfinished = path.with_name(f".{path.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        for file in unfinished.iterdir():
            sync(file)
        sync(unfinished)
        os.replace(unfinished, path)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    sync(path.parent)


def available_memory() -> int | None:
    """Bytes that can be had without swapping, the container's limit included; None if unknown."""
    found = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    except OSError:
        pass
    try:
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            used = int((group / "memory.current").read_text())
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            # Cached file pages count as used but make room when asked.
            cached = int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0))
            found.append(int(limit) - used + cached)
    except (OSError, ValueError):
        pass
    return min(found) if found else None
