"""Bookkeeping of a cache that is being built: who may, the plan, what is done, and the end.

    CACHE.zarr/.building/   plan.json            what the cache will hold (`Plan.head`)
                            shard-00003.json     the record of a finished shard: its files with size
                                                 and checksum, images left out, sums of channels
                            .lock                held by the process that builds

A build goes on with the shards that have no record. The manifest is made from the plan and the
records, after every file was read back.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from heptapod_fast import faults
from heptapod_fast.data.cache_check import statistics
from heptapod_fast.data.cache_format import (
    BUILDING,
    CODEBOOK,
    FILLS,
    INDEX,
    MANIFEST,
    SHOWN,
    Cache,
    CacheError,
    manifest_problems,
    open_cache,
    seal,
)
from heptapod_fast.data.cache_plan import Plan, changes, size_of
from heptapod_fast.data.cache_repair import reopen
from heptapod_fast.data.files import listing
from heptapod_fast.storage import checksum, sync, write_json
from heptapod_fast.tokenizers import PatchVQ, stored_arrays

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
            raise CacheError(
                f"{path} is no cache but holds {', '.join(there[:5])}: choose another --out"
            )
        (path / BUILDING).mkdir(exist_ok=True)
        lock = open(path / BUILDING / ".lock", "a+")
    except OSError as error:
        raise CacheError(
            f"cannot write {path}: {error.strerror or error} (--out names another place)"
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise CacheError(
            f"{path} is being built by another process: wait for it or stop it, or "
            "choose another --out"
        ) from error
    return lock


class Site:
    """A cache under construction. `begin` and `finish` are for one of the processes that build it.

    Args:
        path: the cache, CACHE.zarr.
        plan: what it will hold.
    """

    def __init__(self, path: str | Path, plan: Plan) -> None:
        self.path, self.plan = Path(path), plan
        self.work = self.path / BUILDING
        self._broken: list[dict[str, Any]] = []

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
        if not file.exists():
            self._check_space()
            for entry in self.path.iterdir():
                if entry != self.work:  # of a start that was cut off before there was a plan
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            write_json(file, head)
        before = _read(file)
        changed = changes(self.path, before, head)
        if finished:  # what `claim` made, or a build that ended here left behind
            for left in self.work.glob("*.json"):
                left.unlink()
            lost = (
                []
                if changed
                else reopen(open_cache(self.path, look=False), self.work, PLAN, list(head))
            )
            if not lost:
                shutil.rmtree(self.work)
            finished = not lost
        if changed:
            raise CacheError(changed)
        if finished:
            return False
        for path in self.path.rglob("*.partial"):
            path.unlink()
        self._write_frame()
        self._try_again()
        return True

    def _try_again(self) -> None:
        """Forgets shards some of whose images could not be read then and can be read now."""
        side = self.plan.tokenizer.image_size
        for record in self._records():
            paths = [self.plan.files[e["source_index"]][0] for e in record["quarantine"]]
            reasons = self.plan.decoder.decode(
                paths, np.empty((len(paths), 3, side, side), np.uint8)
            )
            if None in reasons:
                self._record(record["shard"]).unlink()

    def _check_space(self) -> None:
        plan = self.plan
        need = 8 * len(plan.files) + plan.shards * plan.shard_rows * plan.views * sum(
            np.dtype(dtype).itemsize * math.prod(shape)
            for dtype, shape in stored_arrays(plan.tokenizer.spec).values()
        )
        free = shutil.disk_usage(self.path).free
        if need > free:
            raise CacheError(
                f"{self.path} will take {need / 1e9:.2f} GB, its disk has "
                f"{free / 1e9:.2f} GB free: choose another --out"
                + (", or leave --flip out" if plan.flip else "")
            )

    def _write_frame(self) -> None:
        """Everything but shards, from the plan, whatever was there."""
        import zarr

        plan, rows, fresh = self.plan, len(self.plan.files), self.work / "frame"
        shutil.rmtree(fresh, ignore_errors=True)
        group = zarr.open_group(fresh, mode="w", zarr_format=3)
        for name, (dtype, shape) in stored_arrays(plan.tokenizer.spec).items():
            tail = (plan.views, *shape)
            group.create_array(
                name,
                shape=(rows, *tail),
                dtype=dtype,
                compressors=None,
                shards=(plan.shard_rows, *tail),
                chunks=(plan.chunk_rows, *tail),
                fill_value=FILLS[dtype],
            )
        labels = np.array([label for _, label in plan.files], "<i4")[plan.order]
        for name, values in zip(INDEX, (labels, plan.order), strict=True):
            array = group.create_array(
                name,
                shape=(rows,),
                dtype="int32",
                compressors=None,
                chunks=(rows,),
                fill_value=FILLS["int32"],
            )
            array[:] = values
        if isinstance(plan.tokenizer, PatchVQ):
            plan.tokenizer.save(fresh / CODEBOOK)
        for file in sorted(path for path in fresh.rglob("*") if path.is_file()):
            target = self.path / file.relative_to(fresh)
            target.parent.mkdir(parents=True, exist_ok=True)
            sync(file)
            file.replace(target)
        shutil.rmtree(fresh)

    def missing(self) -> list[int]:
        """Shards that are not done, in order.

        Raises:
            CacheError: there is neither a plan nor a finished cache.
        """
        if (self.path / MANIFEST).exists():
            return []
        if not (self.work / PLAN).exists():
            raise CacheError(
                f"{self.path} is not there for every rank: --out must name a folder "
                "that all machines share"
            )
        done = {record["shard"] for record in self._records()}
        return [shard for shard in range(self.plan.shards) if shard not in done]

    def _record(self, shard: int) -> Path:
        return self.work / f"shard-{shard:05d}.json"

    def _records(self) -> Iterator[dict[str, Any]]:
        """Records of finished shards, in order; one that cannot be read is none."""
        for file in sorted(self.work.glob("shard-*.json")):
            with contextlib.suppress(CacheError):
                record = _read(file)
                if record.keys() >= {"shard", "files", "quarantine", "sums"}:
                    yield record

    def _refuse_broken(self) -> None:
        if len(self._broken) > self.plan.max_broken:
            lines = (f"{entry['path']}: {entry['reason']}" for entry in self._broken)
            raise CacheError(
                f"{self.plan.folder}: {len(self._broken)} images so far cannot be read, "
                f"--max-broken allows {self.plan.max_broken}. Mend them, or raise --max-broken to "
                "go on without them, and repeat the command" + listing(lines, len(self._broken), 20)
            )

    def finish(self) -> Cache:
        """Reads every file back, writes the manifest, removes the records.

        Raises:
            CacheError: a file is not what was written, too many broken images, or shards missing.
        """
        missing = self.missing()
        if missing:
            raise CacheError(f"{self.path}: shards {missing[:SHOWN]} are missing")
        records = list(self._records())
        self._broken = [entry for record in records for entry in record["quarantine"]]
        self._refuse_broken()
        self._refuse_bare()
        self._write_frame()
        files = {name: entry for record in records for name, entry in record["files"].items()}
        small = [
            "zarr.json",
            *(f"{name}/zarr.json" for name in (*stored_arrays(self.plan.tokenizer.spec), *INDEX)),
            *(f"{name}/c/0" for name in INDEX),
        ]
        small += [CODEBOOK] if (self.path / CODEBOOK).exists() else []
        for name in small:
            sync(self.path / name)
            files[name] = {"bytes": size_of(self.path / name), "crc32c": checksum(self.path / name)}
        manifest = seal(
            _read(self.work / PLAN)
            | {
                "quarantine": self._broken,
                "statistics": statistics(records),
                "sums": [record["sums"] for record in records],
                "files": dict(sorted(files.items())),
            }
        )
        wrong = manifest_problems(manifest)
        if wrong:
            raise CacheError(f"{self.path} cannot be finished: {wrong}")
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
                self._record(record["shard"]).unlink()
            wrong += bad
        if wrong:
            raise CacheError(
                f"{self.path}: {'; '.join(wrong[:SHOWN])}: not what was written. "
                "Check the disk; repeating the command builds these shards again"
            )

    def _refuse_bare(self) -> None:
        """A class without a single image would go unnoticed until samples are looked at."""
        labels = np.array([label for _, label in self.plan.files])
        good = np.delete(labels, [entry["source_index"] for entry in self._broken])
        bare = sorted(set(range(len(self.plan.class_names))) - set(good.tolist()))
        if bare:
            raise CacheError(
                f"{self.plan.folder}: no readable image is left in {len(bare)} class "
                "folders of --data; mend them and repeat the command, or remove them "
                "and begin anew" + listing((self.plan.class_names[k] for k in bare), len(bare), 20)
            )


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except ValueError as error:
        raise CacheError(
            f"{file} is damaged ({error}): restore it from a copy, or remove the "
            "cache and begin anew"
        ) from error
    if not isinstance(found, dict):
        raise CacheError(f"{file} is damaged: remove the cache and begin anew")
    return found
