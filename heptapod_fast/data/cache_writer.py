"""Building a cache of tokens from a folder of images.

A cache is built shard by shard. Which images a shard holds, and in which batches they are encoded,
follows from the plan alone: whichever process builds a shard, its bytes are the same. cache_site.py
keeps the books, so that a build that was killed goes on, with however many processes.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from heptapod_fast import faults
from heptapod_fast.data.cache_check import channel_sums, refuse_bad
from heptapod_fast.data.cache_format import FILLS, Cache, CacheError, open_cache
from heptapod_fast.data.cache_plan import Plan, size_of
from heptapod_fast.data.cache_site import Site, claim
from heptapod_fast.storage import checksum, sync, write_json
from heptapod_fast.tokenizers import stored_arrays, to_stored, to_unit


def build_cache(
    path: str | Path,
    plan: Plan,
    threads: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Cache:
    """Builds a cache in this process, or goes on with one; raises as `claim` and `Builder` do."""
    with claim(path):
        builder = Builder(path, plan, threads)
        if builder.begin():
            builder.build(builder.missing(), progress)
            builder.finish()
        return open_cache(path)


class Builder(Site):
    """Writes the shards of one cache; every process makes one.

    Args:
        path: the cache, CACHE.zarr.
        plan: what it will hold.
        threads: that encode on a CPU, a batch each.

    Attributes:
        seconds: that were waited for decoding, for encoding and for writing.
    """

    def __init__(self, path: str | Path, plan: Plan, threads: int = 1) -> None:
        super().__init__(path, plan)
        self.threads = threads if plan.tokenizer.device.type == "cpu" else 1
        self.seconds = {"decoding": 0.0, "encoding": 0.0, "writing": 0.0}

    def build(self, shards: list[int], progress: Callable[[int, int], None] | None = None) -> None:
        """Encodes and writes shards.

        Raises:
            CacheError: more broken images than allowed, or tokens that are not finite.
            OSError: the machine cannot read images; finished shards stay.
        """
        total = sum(len(self._rows(shard)) for shard in shards)
        done, self._broken = 0, [e for record in self._records() for e in record["quarantine"]]
        self._refuse_broken()
        for shard in shards:
            for images in self._build_shard(shard):
                done += images
                if progress is not None:
                    progress(done, total)
            self._refuse_broken()

    def _rows(self, shard: int) -> np.ndarray:
        """Positions in `files` of the rows of a shard."""
        size = self.plan.shard_rows
        return self.plan.order[shard * size : (shard + 1) * size]

    def _build_shard(self, shard: int) -> Iterator[int]:
        """Yields the number of images after every batch."""
        plan, sources = self.plan, self._rows(shard)
        first, names = shard * plan.shard_rows, stored_arrays(plan.tokenizer.spec)
        arrays = {
            name: np.full((len(sources), plan.views, *shape), FILLS[dtype], dtype)
            for name, (dtype, shape) in names.items()
        }
        broken: list[dict[str, Any]] = []
        # A batch is encoded by one thread: how the work of a batch is spread over threads changes
        # roundings on a CPU, and bytes must not depend on the number of cores.
        with ThreadPoolExecutor(
            self.threads, initializer=torch.set_num_threads, initargs=(1,)
        ) as pool:
            ahead: deque[tuple[int, Future]] = deque()
            for at, images, reasons in self._decoded(sources):
                good = np.array([reason is None for reason in reasons])
                for k in np.flatnonzero(~good):
                    path = plan.files[sources[at + k]][0].relative_to(plan.folder)
                    broken.append(
                        {
                            "row": int(first + at + k),
                            "source_index": int(sources[at + k]),
                            "path": os.fsencode(path).decode(errors="backslashreplace"),
                            "reason": reasons[k],
                        }
                    )
                ahead.append(
                    (len(reasons), pool.submit(self._encode, images, good, arrays, at, sources))
                )
                if len(ahead) > self.threads:
                    yield self._encoded(*ahead.popleft())
            for entry in ahead:
                yield self._encoded(*entry)
        begin = time.monotonic()
        try:
            self._write(shard, first, arrays, broken)
        except OSError as error:
            raise CacheError(
                f"cannot write shard {shard} of {self.path}: {error}. Finished shards "
                "stay: repeat the command when there is room"
            ) from error
        self.seconds["writing"] += time.monotonic() - begin

    def _encoded(self, images: int, work: Future) -> int:
        begin = time.monotonic()
        work.result()
        self.seconds["encoding"] += time.monotonic() - begin
        return images

    def _decoded(self, sources: np.ndarray) -> Iterator[tuple[int, np.ndarray, list]]:
        """(place in the shard, images (n, 3, S, S) uint8, reasons), decoded one batch ahead."""
        plan, side = self.plan, self.plan.tokenizer.image_size

        def decode(start: int) -> tuple[int, np.ndarray, list]:
            paths = [plan.files[k][0] for k in sources[start : start + plan.batch]]
            images = np.zeros((len(paths), 3, side, side), np.uint8)
            return start, images, plan.decoder.decode(paths, images)

        with ThreadPoolExecutor(1) as pool:
            ahead = pool.submit(decode, 0)
            for start in range(0, len(sources), plan.batch):
                begin = time.monotonic()
                ready = ahead.result()
                self.seconds["decoding"] += time.monotonic() - begin
                if start + plan.batch < len(sources):
                    ahead = pool.submit(decode, start + plan.batch)
                yield ready

    def _encode(
        self,
        images: np.ndarray,
        good: np.ndarray,
        arrays: dict[str, np.ndarray],
        at: int,
        sources: np.ndarray,
    ) -> None:
        """Encodes a batch whose images lie from row `at` on in the shard; keeps the good ones."""
        tokenizer, rows = self.plan.tokenizer, at + np.flatnonzero(good)
        if not good.any():
            return
        # Always whole batches, unreadable images as they are: libraries choose algorithms by the
        # size of a batch, and an image's tokens must not depend on its neighbours.
        whole = torch.zeros(self.plan.batch, *images.shape[1:], dtype=torch.uint8)
        whole[: len(images)] = torch.from_numpy(images)
        pixels = to_unit(whole.to(tokenizer.device))
        for view in range(self.plan.views):
            with torch.no_grad():
                stored = to_stored(tokenizer, pixels.flip(-1) if view else pixels)
            for name, values in stored.items():
                with np.errstate(over="ignore"):  # said below
                    values = values[: len(images)].cpu().numpy()[good].astype(arrays[name].dtype)
                refuse_bad(name, values, [self.plan.files[sources[r]][0] for r in rows])
                arrays[name][rows, view] = values

    def _write(
        self, shard: int, first: int, arrays: dict[str, np.ndarray], broken: list[dict[str, Any]]
    ) -> None:
        import zarr

        group, files, sums = zarr.open_group(self.path, mode="r+"), {}, {}
        for name, values in arrays.items():
            file = f"{name}/c/{shard}" + "/0" * (values.ndim - 1)
            (self.path / file).unlink(missing_ok=True)  # zarr would read what is there first
            with zarr.config.set({"array.write_empty_chunks": True}):  # of broken images alone
                group[name][first : first + len(values)] = values
            sync(self.path / file)
            sync((self.path / file).parent)
            files[file] = {"bytes": size_of(self.path / file), "crc32c": checksum(self.path / file)}
            if name != "codes":
                sums[name] = channel_sums(values, [entry["row"] - first for entry in broken])
        faults.point(f"shard={shard}")
        self._broken += broken
        write_json(
            self._record(shard),
            {"shard": shard, "files": files, "quarantine": broken, "sums": sums},
        )
