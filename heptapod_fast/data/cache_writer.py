"""Building a cache of tokens from a folder of images.

A cache is built shard by shard. Which images a shard holds, and in which batches they are encoded,
follows from the plan alone (`.building/plan.json`): whichever process builds a shard, its bytes
are the same. A shard is done when its record (`.building/shard-N.json`) is there, written after its
arrays; killed and started again, with however many processes, the build goes on with the shards
that have none. The manifest is made from the records, after every file was read back.
"""

from __future__ import annotations

import fcntl
import json
import math
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from heptapod_fast import faults
from heptapod_fast.data.cache_check import refuse_bad, statistics
from heptapod_fast.data.cache_format import (
    BUILDING,
    CODEBOOK,
    FILLS,
    INDEX,
    MANIFEST,
    SHOWN,
    Cache,
    CacheError,
    open_cache,
)
from heptapod_fast.data.cache_plan import Plan, changes, size_of
from heptapod_fast.data.cache_repair import reopen
from heptapod_fast.data.files import listing
from heptapod_fast.storage import checksum, sync, write_json
from heptapod_fast.tokenizers import PatchVQ, stored_arrays, to_stored, to_unit

PLAN = "plan.json"


def claim(path: str | Path) -> IO[str]:
    """Makes a folder for a cache, or takes over an unfinished one, and locks it until the file that
    is returned is closed, or the process ends. For one process of those that build.

    Raises:
        CacheError: another process builds here, the folder is something else or cannot be written.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        there = sorted(p.name for p in path.iterdir())
        if there and BUILDING not in there and MANIFEST not in there:
            raise CacheError(f"{path} is no cache but holds {', '.join(there[:5])}: choose another "
                             "--out")
        (path / BUILDING).mkdir(exist_ok=True)
        lock = open(path / BUILDING / ".lock", "a+")
    except OSError as error:
        raise CacheError(f"cannot write {path}: {error.strerror or error} (--out names another "
                         "place)") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise CacheError(f"{path} is being built by another process: wait for it or stop it, or "
                         "choose another --out") from error
    return lock


def build_cache(path: str | Path, plan: Plan, threads: int = 1,
                progress: Callable[[int, int], None] | None = None) -> Cache:
    """Builds a cache in this process, or goes on with one; raises as `claim` and `Builder` do."""
    with claim(path):
        builder = Builder(path, plan, threads)
        if builder.begin():
            builder.build(builder.missing(), progress)
            builder.finish()
        return open_cache(path)


class Builder:
    """Writes one cache. Every process makes one; `begin` and `finish` are for one of them alone.

    Args:
        path: the cache, CACHE.zarr.
        plan: what it will hold.
        threads: that encode on a CPU, a batch each.

    Attributes:
        seconds: that were waited for decoding, for encoding and for writing.
    """

    def __init__(self, path: str | Path, plan: Plan, threads: int = 1) -> None:
        self.path, self.plan = Path(path), plan
        self.threads = threads if plan.tokenizer.device.type == "cpu" else 1
        self.work = self.path / BUILDING
        self.seconds = {"decoding": 0.0, "encoding": 0.0, "writing": 0.0}

    def begin(self) -> bool:
        """Writes the plan, or compares it with the one that is there; the caller has claimed the
        folder. A finished cache is read whole, and what is damaged is to be built again.

        Returns:
            Whether anything is left to do.

        Raises:
            CacheError: the plan was another one, the disk is too small, or damage that building
                shards cannot mend.
        """
        head = json.loads(json.dumps(self.plan.head()))
        finished = (self.path / MANIFEST).exists()
        file = self.path / MANIFEST if finished else self.work / PLAN
        if file.exists():
            before = json.loads(file.read_text())
            changed = changes(self.path, before, head)
            if finished:  # what `claim` made, or a build that ended here left behind
                for left in self.work.glob("*.json"):
                    left.unlink()
                lost = [] if changed else reopen(Cache(self.path, before), self.work, PLAN,
                                                 list(head))
                if not lost:
                    shutil.rmtree(self.work)
                finished = not lost
            if changed:
                raise CacheError(changed)
            for path in self.path.rglob("*.partial"):
                path.unlink()
        else:
            self._check_space()
            self._create_arrays()
            write_json(file, head)
        return not finished

    def _check_space(self) -> None:
        plan = self.plan
        need = 8 * len(plan.files) + plan.shards * plan.shard_rows * plan.views * sum(
            np.dtype(dtype).itemsize * math.prod(shape)
            for dtype, shape in stored_arrays(plan.tokenizer.spec).values())
        free = shutil.disk_usage(self.path).free
        if need > free:
            raise CacheError(f"{self.path} will take {need / 1e9:.2f} GB, its disk has "
                             f"{free / 1e9:.2f} GB free: choose another --out, or leave --flip out")

    def _create_arrays(self) -> None:
        import zarr

        plan, rows = self.plan, len(self.plan.files)
        for entry in self.path.iterdir():
            if entry != self.work:  # of a start that was cut off before there was a plan
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        group = zarr.open_group(self.path, mode="a", zarr_format=3)
        for name, (dtype, shape) in stored_arrays(plan.tokenizer.spec).items():
            tail = (plan.views, *shape)
            group.create_array(name, shape=(rows, *tail), dtype=dtype, compressors=None,
                               shards=(plan.shard_rows, *tail), chunks=(plan.chunk_rows, *tail),
                               fill_value=FILLS[dtype])
        labels = np.array([label for _, label in plan.files], "<i4")[plan.order]
        for name, values in zip(INDEX, (labels, plan.order), strict=True):
            array = group.create_array(name, shape=(rows,), dtype="int32", compressors=None,
                                       chunks=(rows,), fill_value=FILLS["int32"])
            array[:] = values
        if isinstance(plan.tokenizer, PatchVQ):
            plan.tokenizer.save(self.path / CODEBOOK)

    def missing(self) -> list[int]:
        """Shards that are not done, in order."""
        done = {record["shard"] for record in self._records()}
        return [shard for shard in range(self.plan.shards) if shard not in done]

    def build(self, shards: list[int], progress: Callable[[int, int], None] | None = None) -> None:
        """Encodes and writes shards.

        Raises:
            CacheError: more broken images than allowed, or tokens that are not finite.
            OSError: a full disk, say; finished shards stay.
        """
        total = sum(len(self._rows(shard)) for shard in shards)
        done = 0
        for shard in shards:
            for images in self._build_shard(shard):
                done += images
                if progress is not None:
                    progress(done, total)
            self._refuse_broken()

    def _rows(self, shard: int) -> np.ndarray:
        """Positions in `files` of the rows of a shard."""
        size = self.plan.shard_rows
        return self.plan.order[shard * size:(shard + 1) * size]

    def _build_shard(self, shard: int) -> Iterator[int]:
        """Yields the number of images after every batch."""
        plan, sources = self.plan, self._rows(shard)
        first, names = shard * plan.shard_rows, stored_arrays(plan.tokenizer.spec)
        arrays = {name: np.full((len(sources), plan.views, *shape), FILLS[dtype], dtype)
                  for name, (dtype, shape) in names.items()}
        broken: list[dict[str, Any]] = []
        # A batch is encoded by one thread: how the work of a batch is spread over threads changes
        # roundings on a CPU, and bytes must not depend on the number of cores.
        with ThreadPoolExecutor(self.threads, initializer=torch.set_num_threads,
                                initargs=(1,)) as pool:
            ahead: deque[tuple[int, Future]] = deque()
            for at, images, reasons in self._decoded(sources):
                good = np.array([reason is None for reason in reasons])
                for k in np.flatnonzero(~good):
                    path = plan.files[sources[at + k]][0].relative_to(plan.folder).as_posix()
                    broken.append({"row": int(first + at + k), "path": path,
                                   "source_index": int(sources[at + k]), "reason": reasons[k]})
                ahead.append((len(reasons), pool.submit(self._encode, images, good, arrays, at,
                                                        sources)))
                if len(ahead) > self.threads:
                    yield self._encoded(*ahead.popleft())
            for entry in ahead:
                yield self._encoded(*entry)
        begin = time.monotonic()
        try:
            self._write(shard, first, arrays, broken)
        except OSError as error:
            raise CacheError(f"cannot write shard {shard} of {self.path}: {error}. Finished shards "
                             "stay: repeat the command when there is room") from error
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
            paths = [plan.files[k][0] for k in sources[start:start + plan.batch]]
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

    def _encode(self, images: np.ndarray, good: np.ndarray, arrays: dict[str, np.ndarray],
                at: int, sources: np.ndarray) -> None:
        """Encodes a batch whose images lie from row `at` on in the shard; keeps the good ones."""
        tokenizer, rows = self.plan.tokenizer, at + np.flatnonzero(good)
        if not good.any():
            return
        # Always whole batches, unreadable images as they are: libraries choose algorithms by the
        # size of a batch, and an image's tokens must not depend on its neighbours.
        whole = torch.zeros(self.plan.batch, *images.shape[1:], dtype=torch.uint8)
        whole[:len(images)] = torch.from_numpy(images)
        pixels = to_unit(whole.to(tokenizer.device))
        for view in range(self.plan.views):
            with torch.no_grad():
                stored = to_stored(tokenizer, pixels.flip(-1) if view else pixels)
            for name, values in stored.items():
                with np.errstate(over="ignore"):  # said below
                    values = values[:len(images)].cpu().numpy()[good].astype(arrays[name].dtype)
                refuse_bad(name, values, [self.plan.files[sources[r]][0] for r in rows])
                arrays[name][rows, view] = values

    def _write(self, shard: int, first: int, arrays: dict[str, np.ndarray],
               broken: list[dict[str, Any]]) -> None:
        import zarr

        group, files, sums = zarr.open_group(self.path, mode="r+"), {}, {}
        for name, values in arrays.items():
            with zarr.config.set({"array.write_empty_chunks": True}):  # of broken images alone
                group[name][first:first + len(values)] = values
            file = f"{name}/c/{shard}" + "/0" * (values.ndim - 1)
            sync(self.path / file)
            sync((self.path / file).parent)
            files[file] = {"bytes": size_of(self.path / file), "crc32c": checksum(self.path / file)}
            if name != "codes":
                kept = np.delete(values, [entry["row"] - first for entry in broken], axis=0)
                kept = kept.astype(np.float64).swapaxes(0, 2).reshape(values.shape[2], -1)
                sums[name] = {"count": kept.shape[1], "sum": kept.sum(1).tolist(),
                              "squares": np.square(kept).sum(1).tolist()}
        faults.point(f"shard={shard}")
        write_json(self.work / f"shard-{shard:05d}.json",
                   {"shard": shard, "files": files, "quarantine": broken, "sums": sums})

    def _records(self) -> Iterator[dict[str, Any]]:
        """Records of finished shards, in order."""
        for file in sorted(self.work.glob("shard-*.json")):
            yield json.loads(file.read_text())

    def _refuse_broken(self) -> None:
        broken = [entry for record in self._records() for entry in record["quarantine"]]
        if len(broken) > self.plan.max_broken:
            lines = (f"{entry['path']}: {entry['reason']}" for entry in broken)
            raise CacheError(
                f"{self.plan.folder}: {len(broken)} images so far cannot be read, --max-broken "
                f"allows {self.plan.max_broken}. Repeat the command with a larger --max-broken to "
                "go on without them; or mend them, remove "
                f"{self.path} and begin anew" + listing(lines, len(broken), 20))

    def finish(self) -> Cache:
        """Reads every file back, writes the manifest, removes the records.

        Raises:
            CacheError: a file is not what was written, too many broken images, or shards missing.
        """
        missing = self.missing()
        if missing:
            raise CacheError(f"{self.path}: shards {missing[:SHOWN]} are missing")
        self._refuse_broken()
        records = list(self._records())
        files = {name: entry for record in records for name, entry in record["files"].items()}
        small = ["zarr.json", *(f"{name}/zarr.json" for name in
                                (*stored_arrays(self.plan.tokenizer.spec), *INDEX)),
                 *(f"{name}/c/0" for name in INDEX)]
        small += [CODEBOOK] if (self.path / CODEBOOK).exists() else []
        for name in small:
            sync(self.path / name)
            files[name] = {"bytes": size_of(self.path / name),
                           "crc32c": checksum(self.path / name)}
        manifest = json.loads((self.work / PLAN).read_text())
        manifest |= {"quarantine": [e for record in records for e in record["quarantine"]],
                     "statistics": statistics(records),
                     "sums": [record["sums"] for record in records],
                     "files": dict(sorted(files.items()))}
        self._verify(Cache(self.path, manifest), records)
        faults.point("manifest")
        write_json(self.path / MANIFEST, manifest)
        shutil.rmtree(self.work)
        return open_cache(self.path)

    def _verify(self, cache: Cache, records: list[dict[str, Any]]) -> None:
        """A shard that was lost since it was written must be built again, not left out."""
        wrong = []
        for record in records:
            bad = [text for name in record["files"] if (text := cache.problem(name))]
            if bad:
                (self.work / f"shard-{record['shard']:05d}.json").unlink()
            wrong += bad
        if wrong:
            raise CacheError(f"{self.path}: {'; '.join(wrong[:SHOWN])}: not what was written. "
                             "Check the disk; repeating the command builds these shards again")
