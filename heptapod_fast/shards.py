"""Named tensors in safetensors files, written by all ranks together and read back by any number.

    NAME.safetensors                                       one file, where one is enough
    NAME-00001-of-00004.safetensors, NAME-00002-of-...     several: of several ranks, or of many GB

torch.distributed.checkpoint does the work: it spreads what several ranks have among them, cuts
DTensors at their shards, and says in the header of every file where its pieces begin. A file
without such a header, of whatever origin, is one that holds whole tensors.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from heptapod_fast.ops import sharded
from heptapod_fast.world import World

if TYPE_CHECKING:
    from torch.distributed.checkpoint import HuggingFaceStorageReader

SUFFIX = ".safetensors"
# A file is put together in memory before it is written.
FILE_BYTES = 2**30
_SHARD = re.compile(r"(?P<name>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})$")
_LENGTH_BYTES = 8  # of a header, at the beginning of a file

# Said once by every process that is the only one.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable")


def write(folder: Path, name: str, tensors: Mapping[str, Tensor], world: World) -> None:
    """Write tensors under a name. Collective call; every rank's tensors have the same names.

    Args:
        folder: exists; no files of this name are in it.
        tensors: DTensors, and plain ones that are alike on all ranks: each writes its `share`.
        world: the ranks that write, with a group of its own if another thread uses the main one.

    Raises:
        OSError: what went wrong, on every rank: all of them fail.
    """
    from torch.distributed import checkpoint

    parts = folder / f"{name}.parts"
    writer = checkpoint.HuggingFaceStorageWriter(
        str(parts), fqn_to_index_mapping=_file_numbers(tensors, world.size), save_distributed=True
    )
    # Where there is a GPU it would wait for the GPU's work even for tensors on the host.
    writer.per_thread_copy_ahead = 0
    mine = share(tensors, world)
    with _plain_errors():
        checkpoint.save(
            {key: tensor for key, tensor in tensors.items() if key in mine},
            storage_writer=writer,
            process_group=world.group,
            no_dist=world.size == 1,
        )
    with world.together():
        if world.main:
            _take_over(parts, folder, name)


@contextmanager
def _plain_errors() -> Iterator[None]:
    """The library's errors as OSError with their causes: their own text is an account of every rank
    with its stack, and they are no Exception."""
    from torch.distributed.checkpoint import CheckpointException

    try:
        yield
    except CheckpointException as error:
        causes = {str(cause) for cause, _ in error.failures.values()}
        raise OSError("; ".join(sorted(causes))) from error


def share(tensors: Mapping[str, Tensor], world: World) -> set[str]:
    """Names of the tensors that this rank writes: all that are sharded, and of the plain ones about
    as many bytes as every other rank."""
    mine = set()
    loads = [0] * world.size
    for key, tensor in tensors.items():
        rank = loads.index(min(loads))
        is_sharded = sharded.layout(tensor) is not None
        if is_sharded or rank == world.rank:
            mine.add(key)
        if not is_sharded:
            loads[rank] += tensor.numel() * tensor.element_size()
    return mine


def _file_numbers(tensors: Mapping[str, Tensor], ranks: int) -> dict[str, int]:
    """Which of its files every rank writes a tensor to, from 1 on: none grows much beyond
    FILE_BYTES."""
    numbers = {}
    number = 1
    filled = 0
    for key, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if filled and filled + size > FILE_BYTES * ranks:
            number += 1
            filled = 0
        numbers[key] = number
        filled += size
    return numbers


def _take_over(parts: Path, folder: Path, name: str) -> None:
    """Give the files that all ranks wrote their names."""
    found = sorted(parts.glob(f"*{SUFFIX}"))
    for number, path in enumerate(found, 1):
        _order_header(path)
        shard = "" if len(found) == 1 else f"-{number:05d}-of-{len(found):05d}"
        path.rename(folder / f"{name}{shard}{SUFFIX}")
    shutil.rmtree(parts)


def _order_header(path: Path) -> None:
    """Put the notes in a file's header in order. safetensors writes them in another one every time,
    and equal runs should make equal files."""
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > length:
            return
        file.seek(_LENGTH_BYTES)
        file.write(text.ljust(length))


def names(folder: Path) -> list[str]:
    """Names under which there are tensors, sorted."""
    return sorted({_name_of(path) for path in folder.glob(f"*{SUFFIX}")})


def files(folder: Path, name: str) -> list[Path]:
    """The files of a name, in order; none where there are none.

    Raises:
        ValueError: some of several are missing.
    """
    found = sorted(path for path in folder.glob(f"*{SUFFIX}") if _name_of(path) == name)
    shards = [_SHARD.match(path.name.removesuffix(SUFFIX)) for path in found]
    counts = {int(shard["count"]) for shard in shards if shard is not None}
    if counts and (len(counts) > 1 or len(found) != max(counts)):
        raise ValueError(
            f"{folder} holds {', '.join(path.name for path in found)}: expected all files of "
            f"{name}, {max(counts)} of one set"
        )
    return found


def siblings(path: Path) -> list[Path]:
    """The files of the name that one of them has; ValueError as `files`."""
    return files(path.parent, _name_of(path)) or [path]


def _name_of(path: Path) -> str:
    shard = _SHARD.match(path.name.removesuffix(SUFFIX))
    return path.name.removesuffix(SUFFIX) if shard is None else shard["name"]


def shapes(paths: Iterable[Path]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Full shape and dtype of every tensor in these files of one name."""
    described: dict[str, Any] = dict(_reader(list(paths)).read_metadata().state_dict_metadata)
    return {key: (about.size, about.properties.dtype) for key, about in described.items()}


def read(paths: Iterable[Path]) -> dict[str, Tensor]:
    """All tensors of these files of one name, whole, on the host."""
    paths = list(paths)
    found = {key: torch.empty(shape, dtype=dtype) for key, (shape, dtype) in shapes(paths).items()}
    read_into(paths, found)
    return found


def read_into(paths: Iterable[Path], tensors: Mapping[str, Tensor]) -> None:
    """Fill tensors from these files of one name: plain ones, and the shards that this rank holds of
    DTensors. Not collective.

    Args:
        tensors: names and full shapes are those in the files.
    """
    from torch.distributed import checkpoint

    with _plain_errors():
        checkpoint.load(dict(tensors), storage_reader=_reader(list(paths)), no_dist=True)


def _reader(paths: list[Path]) -> HuggingFaceStorageReader:
    """The library's reader, of these files alone and not of all that lie in the folder."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    reader = HuggingFaceStorageReader(str(paths[0].parent))
    listed = [str(path) for path in paths]
    reader.fs.ls = lambda path: listed  # type: ignore[method-assign]
    return reader
