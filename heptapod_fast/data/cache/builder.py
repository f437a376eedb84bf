"""Encoding images and writing shards.

A cache is built shard by shard. Which images a shard holds, and in which batches they are encoded,
follows from the plan alone: whichever process builds a shard, on one kind of processor its bytes
are the same. `site.py` keeps the books, so that a build that was killed goes on, with however many
processes.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from heptapod_fast.classes import as_text
from heptapod_fast.data.cache.format import FILLS, Cache, CacheError, open_array, open_cache
from heptapod_fast.data.cache.plan import Plan
from heptapod_fast.data.cache.site import Site, SiteState, lock_cache
from heptapod_fast.data.cache.statistics import channel_sums
from heptapod_fast.data.files import listing
from heptapod_fast.tokenizers import NO_CODE, StoredArray, to_unit
from heptapod_fast.world import processor_kind


def build_cache(
    path: str | Path,
    plan: Plan,
    threads: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Cache:
    """Builds a cache in this process, or goes on with one; raises as `lock_cache`, `Site` and
    `Builder` do."""
    with lock_cache(path):
        site = Site(path, plan)
        if site.begin() is not SiteState.COMPLETE:
            Builder(site, threads).build(site.missing(), progress)
            site.finish()
        return open_cache(path)


def hardware_of(device: torch.device) -> str:
    """What tokens are encoded on, as far as it decides their roundings: the GPU, or the
    instruction sets of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return processor_kind()


@dataclass(frozen=True)
class _Decoded:
    """A batch of images of a shard.

    Attributes:
        at: its first row in the shard.
        crops: (n, 3, side, side) uint8 for every side that views are cut out of.
        reasons: for every image None, or why it could not be read.
    """

    at: int
    crops: list[np.ndarray]
    reasons: list[str | None]


@dataclass(frozen=True)
class _Shard:
    """A shard in memory, while it is built.

    Attributes:
        number: of the shard. first: its first row in the cache.
        sources: (rows,) which files of the plan its rows are.
        arrays: (rows, V, *shape) by name; what nothing was written to holds the fill value.
        quarantine: row, source_index, path and reason of images that could not be read.
    """

    number: int
    first: int
    sources: np.ndarray
    arrays: dict[str, np.ndarray]
    quarantine: list[dict[str, Any]]


class Builder:
    """Builds shards of one cache; every process makes one.

    Args:
        site: the cache under construction.
        threads: that encode on a CPU, a batch each.

    Attributes:
        hardware: what the tokens are encoded on.
        seconds: that were waited for decoding, for encoding and for writing.
    """

    def __init__(self, site: Site, threads: int = 1) -> None:
        self.site = site
        self.plan = site.plan
        device = self.plan.tokenizer.device
        self.threads = threads if device.type == "cpu" else 1
        self.hardware = hardware_of(device)
        self.seconds = {"decoding": 0.0, "encoding": 0.0, "writing": 0.0}

    def build(self, shards: list[int], progress: Callable[[int, int], None] | None = None) -> None:
        """Encodes and writes shards.

        Raises:
            CacheError: more broken images than allowed, or tokens that are not finite.
            OSError: the machine cannot read images; finished shards stay.
        """
        total = sum(len(self._sources(shard)) for shard in shards)
        done = 0
        broken = self.site.broken()
        self.site.refuse_broken(broken)
        for number in shards:
            shard = self._empty_shard(number)
            for images in self._fill(shard):
                done += images
                if progress is not None:
                    progress(done, total)
            self._write(shard)
            broken += shard.quarantine
            self.site.refuse_broken(broken)

    def _sources(self, shard: int) -> np.ndarray:
        """Positions in `files` of the rows of a shard."""
        size = self.plan.shard_rows
        return self.plan.order[shard * size : (shard + 1) * size]

    def _empty_shard(self, number: int) -> _Shard:
        sources = self._sources(number)
        arrays = {
            name: np.full(
                (len(sources), self.plan.views, *array.shape), FILLS[array.dtype], array.dtype
            )
            for name, array in self.plan.stored.items()
        }
        return _Shard(number, number * self.plan.shard_rows, sources, arrays, [])

    # ---------------------------------------------------------------------- decoding and encoding

    def _fill(self, shard: _Shard) -> Iterator[int]:
        """Decodes and encodes the images of a shard; yields the number of images after every
        batch."""
        # A batch is encoded by one thread: how the work of a batch is spread over threads changes
        # roundings on a CPU, and bytes must not depend on the number of cores.
        pool = ThreadPoolExecutor(self.threads, initializer=torch.set_num_threads, initargs=(1,))
        with pool:
            ahead: deque[tuple[int, Future]] = deque()
            for batch in self._decoded(shard.sources):
                self._note_broken(shard, batch)
                work = pool.submit(self._encode, batch, shard)
                ahead.append((len(batch.reasons), work))
                if len(ahead) > self.threads:
                    yield self._wait_for(*ahead.popleft())
            for images, work in ahead:
                yield self._wait_for(images, work)

    def _wait_for(self, images: int, work: Future) -> int:
        begin = time.monotonic()
        work.result()
        self.seconds["encoding"] += time.monotonic() - begin
        return images

    def _decoded(self, sources: np.ndarray) -> Iterator[_Decoded]:
        """The images of a shard in batches, decoded one batch ahead."""
        plan = self.plan

        def decode(start: int) -> _Decoded:
            files = [plan.files[k][0] for k in sources[start : start + plan.batch]]
            return _Decoded(start, *plan.crops_of(files))

        with ThreadPoolExecutor(1) as pool:
            ahead = pool.submit(decode, 0)
            for start in range(0, len(sources), plan.batch):
                begin = time.monotonic()
                ready = ahead.result()
                self.seconds["decoding"] += time.monotonic() - begin
                if start + plan.batch < len(sources):
                    ahead = pool.submit(decode, start + plan.batch)
                yield ready

    def _note_broken(self, shard: _Shard, batch: _Decoded) -> None:
        for row, reason in enumerate(batch.reasons, batch.at):
            if reason is None:
                continue
            source = int(shard.sources[row])
            file = self.plan.files[source][0]
            shard.quarantine.append(
                {
                    "row": shard.first + row,
                    "source_index": source,
                    "path": as_text(file.inner),
                    "reason": reason,
                }
            )

    def _encode(self, batch: _Decoded, shard: _Shard) -> None:
        """Encodes a batch and keeps what is made of images that could be read."""
        plan = self.plan
        good = np.array([reason is None for reason in batch.reasons])
        if not good.any():
            return
        rows = batch.at + np.flatnonzero(good)
        # Always whole batches, unreadable images as they are: libraries choose algorithms by the
        # size of a batch, and an image's tokens must not depend on its neighbours.
        count = len(batch.reasons)
        crops = []
        for images in batch.crops:
            whole = torch.zeros(plan.batch, *images.shape[1:], dtype=torch.uint8)
            whole[:count] = torch.from_numpy(images)
            crops.append(to_unit(whole.to(plan.tokenizer.device)))
        views = plan.augmentation.cut(crops, plan.tokenizer.image_size)
        for view, pixels in enumerate(views):
            with torch.no_grad():
                stored = plan.tokenizer.to_stored(pixels.contiguous())
            for name, values in stored.items():
                array = shard.arrays[name]
                kept = values[:count].cpu().numpy()[good]
                with np.errstate(over="ignore"):  # `_refuse_bad` says it better
                    kept = kept.astype(array.dtype)
                self._refuse_bad(name, kept, shard.sources[rows])
                array[rows, view] = kept

    def _refuse_bad(self, name: str, values: np.ndarray, sources: np.ndarray) -> None:
        """CacheError for tokens that a cache must not hold, as they come from the tokenizer.

        values: (n, ...) of one stored array, in its dtype. sources: (n,) which files they are.
        """
        bad = _is_bad(values.reshape(len(values), -1), self.plan.stored[name])
        if not bad.any():
            return
        count = int(bad.sum())
        lines = (str(self.plan.files[source][0]) for source in sources[bad])
        raise CacheError(
            f"the tokenizer gives {name} that cannot be stored (not finite in "
            f"{values.dtype}) for {count} of {len(bad)} images: check "
            "--tokenizer-weights" + listing(lines, count, 10)
        )

    # ------------------------------------------------------------------------------------ writing

    def _write(self, shard: _Shard) -> None:
        """Writes a shard and its record.

        Raises:
            CacheError: the disk is full, or cannot be written.
        """
        begin = time.monotonic()
        broken = [entry["row"] - shard.first for entry in shard.quarantine]
        files = []
        sums = {}
        try:
            for name, values in shard.arrays.items():
                files.append(self._write_array(name, shard.number, shard.first, values))
                if self.plan.tokenizer.spec.kind == "continuous":
                    sums[name] = channel_sums(values, broken)
            self.site.keep_record(shard.number, files, shard.quarantine, sums, self.hardware)
        except OSError as error:
            raise CacheError(
                f"cannot write shard {shard.number} of {self.site.path}: {error}. Finished shards "
                "stay: repeat the command when there is room"
            ) from error
        self.seconds["writing"] += time.monotonic() - begin

    def _write_array(self, name: str, shard: int, first: int, values: np.ndarray) -> str:
        """Writes (rows, V, *shape) of one array; returns the file's path inside the cache."""
        import zarr

        file = f"{name}/c/{shard}" + "/0" * (values.ndim - 1)
        (self.site.path / file).unlink(missing_ok=True)  # zarr would read what is there first
        # Chunks of broken images alone hold nothing but the fill value, and would be left out.
        with zarr.config.set({"array.write_empty_chunks": True}):
            array = open_array(self.site.path / name, "r+")
            array[first : first + len(values)] = values
        return file


def _is_bad(values: np.ndarray, array: StoredArray) -> np.ndarray:
    """(n, values of an image) -> (n,) whether a cache must not hold them."""
    if array.dtype == "uint16":
        return (values == NO_CODE).any(1)
    bad = ~np.isfinite(values).all(1)
    if array.is_deviation:
        bad |= (values < 0).any(1)
    return bad
