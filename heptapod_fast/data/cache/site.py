"""Bookkeeping of a cache that is being built: who may, the plan, what is done, the end, repairs.

    CACHE.zarr/.building/   plan.json            what the cache will hold (`Plan.head`)
                            shard-00003.json     the record of a finished shard: its files with size
                                                 and checksum, images left out, sums of channels,
                                                 what it was encoded on
                            .lock                held by the process that builds

A build goes on with the shards that have no record. The manifest is made from the plan and the
records, after every file was read back. A finished cache with damaged shards is taken apart into a
plan and records again, and lacks nothing but those shards.
"""

from __future__ import annotations

import contextlib
import enum
import json
import logging
import math
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import numpy as np

from heptapod_fast import faults, storage
from heptapod_fast.data.cache.format import (
    BUILDING,
    CODEBOOK,
    FILLS,
    GROUP,
    INDEX,
    MANIFEST,
    SHOWN,
    Cache,
    CacheError,
    manifest_damage,
    open_cache,
    seal,
)
from heptapod_fast.data.cache.plan import Plan, changes
from heptapod_fast.data.cache.statistics import statistics
from heptapod_fast.data.entries import is_debris
from heptapod_fast.data.files import listing
from heptapod_fast.storage import InUseError, checksum, sync, write_json

logger = logging.getLogger(__name__)
PLAN_FILE = "plan.json"
_READERS = 4  # threads that read files back


def lock_cache(path: str | Path) -> IO[str]:
    """Makes a folder for a cache, or takes over an unfinished one, and locks it until the file that
    is returned is closed, or the process ends. For one process of those that build.

    Raises:
        CacheError: another process builds here, the folder is something else or cannot be written.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        there = sorted(
            p.name for p in path.iterdir() if p.name == BUILDING or not is_debris(p.name)
        )
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
        warning = storage.lock(lock)
    except InUseError as error:
        lock.close()
        raise CacheError(
            f"{path} is being built by another process: wait for it or stop it, or "
            "choose another --out"
        ) from error
    if warning:
        logger.warning("WARNING: %s", warning)
    return lock


class SiteState(enum.Enum):
    """How far a cache is."""

    NEW = "there is no plan"
    UNFINISHED = "there is a plan, but no manifest"
    COMPLETE = "there is a manifest, and every file is as it says"
    DAMAGED = "there is a manifest, and shards are not as it says"


class Site:
    """A cache under construction. `begin` and `finish` are for one of the processes that build it,
    which has locked it.

    Args:
        path: the cache, CACHE.zarr.
        plan: what it will hold.
    """

    def __init__(self, path: str | Path, plan: Plan) -> None:
        self.path = Path(path)
        self.plan = plan
        self.work = self.path / BUILDING

    # ------------------------------------------------------------------------------- the beginning

    def begin(self) -> SiteState:
        """Writes the plan, or compares it with the one that is there. A finished cache is read
        whole, and what is damaged is to be built again.

        Returns:
            What was found; COMPLETE: nothing is left to do.

        Raises:
            CacheError: the plan was another one, the disk is too small, or damage that building
                shards cannot mend.
        """
        head = json.loads(json.dumps(self.plan.head()))  # as it reads from a file
        self._refuse_other_plan(head)
        state, damaged = self._survey()
        match state:
            case SiteState.COMPLETE:
                shutil.rmtree(self.work)
                return state
            case SiteState.DAMAGED:
                self._reopen(head, damaged)
            case SiteState.NEW:
                self._check_space()
                self._clear()
                write_json(self.work / PLAN_FILE, head)
        for path in self.path.rglob("*.partial"):
            path.unlink()
        self._write_frame()
        self._forget_readable()
        return state

    def _refuse_other_plan(self, head: dict[str, Any]) -> None:
        """CacheError if the cache was begun, or finished, with another plan."""
        is_finished = (self.path / MANIFEST).exists()
        file = self.path / MANIFEST if is_finished else self.work / PLAN_FILE
        if not file.exists():
            return
        changed = changes(self.path, _read(file), head)
        if changed:
            if is_finished:
                shutil.rmtree(self.work)  # which the lock has made
            raise CacheError(changed)

    def _survey(self) -> tuple[SiteState, list[int]]:
        """The state, and the shards that are damaged; reads a finished cache whole.

        Raises:
            CacheError: other files are damaged, which no shard can replace.
        """
        if not (self.path / MANIFEST).exists():
            is_begun = (self.work / PLAN_FILE).exists()
            return SiteState.UNFINISHED if is_begun else SiteState.NEW, []
        # Of a build that ended between the manifest and its clearing up, or of a repair that had
        # not yet taken the manifest away.
        for left in self.work.glob("*.json"):
            left.unlink()
        cache = open_cache(self.path, look=False)
        names = list(cache.manifest["files"])
        with ThreadPoolExecutor(_READERS) as pool:
            texts = pool.map(cache.file_damage, names)
            wrong = {name: text for name, text in zip(names, texts, strict=True) if text}
        damaged = [k for k in range(cache.shards) if wrong.keys() & set(cache.shard_files(k))]
        replaced = {name for shard in damaged for name in cache.shard_files(shard)}
        others = sorted(wrong.keys() - replaced)
        if others:
            raise CacheError(
                f"{self.path} is damaged beyond its shards: "
                f"{'; '.join(wrong[name] for name in others[:SHOWN])}. Restore "
                "these files from a copy, or remove it and build it anew"
            )
        return SiteState.DAMAGED if damaged else SiteState.COMPLETE, damaged

    def _reopen(self, head: dict[str, Any], damaged: list[int]) -> None:
        """Takes a finished cache back to an unfinished one that lacks its damaged shards alone: the
        manifest becomes the plan and the records of the others."""
        cache = open_cache(self.path, look=False)
        for shard in range(cache.shards):
            if shard not in damaged:
                write_json(self._record_file(shard), _record_of(cache, shard))
        write_json(self.work / PLAN_FILE, {key: cache.manifest[key] for key in head})
        # Last: whoever is killed before it finds a finished, damaged cache again.
        (self.path / MANIFEST).unlink()

    def _clear(self) -> None:
        """Removes what a start left that was cut off before there was a plan."""
        for entry in self.path.iterdir():
            if entry == self.work:
                continue
            if entry.is_dir():
                shutil.rmtree(entry)
            else:
                entry.unlink()

    def _check_space(self) -> None:
        plan = self.plan
        row_bytes = plan.views * sum(
            np.dtype(array.dtype).itemsize * math.prod(array.shape)
            for array in plan.stored.values()
        )
        index_bytes = 4 * len(INDEX) * plan.rows
        need = index_bytes + plan.shards * plan.shard_rows * row_bytes
        free = shutil.disk_usage(self.path).free
        if need > free:
            advice = ", or keep fewer --views" if plan.views > 1 else ""
            raise CacheError(
                f"{self.path} will take {need / 1e9:.2f} GB, its disk has "
                f"{free / 1e9:.2f} GB free: choose another --out{advice}"
            )

    def _write_frame(self) -> None:
        """Everything but shards, from the plan, whatever was there."""
        import zarr

        plan = self.plan
        fresh = self.work / "frame"
        shutil.rmtree(fresh, ignore_errors=True)
        group = zarr.open_group(fresh, mode="w", zarr_format=3)
        for name, array in plan.stored.items():
            row_shape = (plan.views, *array.shape)
            group.create_array(
                name,
                shape=(plan.rows, *row_shape),
                dtype=array.dtype,
                compressors=None,
                shards=(plan.shard_rows, *row_shape),
                chunks=(plan.chunk_rows, *row_shape),
                fill_value=FILLS[array.dtype],
            )
        labels = np.array([label for _, label in plan.files], "<i4")
        for name, values in zip(INDEX, (labels[plan.order], plan.order), strict=True):
            index = group.create_array(
                name,
                shape=(plan.rows,),
                dtype="int32",
                compressors=None,
                chunks=(plan.rows,),
                fill_value=FILLS["int32"],
            )
            index[:] = values
        if plan.tokenizer.has_codebook:
            plan.tokenizer.save(fresh / CODEBOOK)
        for file in sorted(path for path in fresh.rglob("*") if path.is_file()):
            target = self.path / file.relative_to(fresh)
            target.parent.mkdir(parents=True, exist_ok=True)
            sync(file)
            file.replace(target)
        shutil.rmtree(fresh)

    def _forget_readable(self) -> None:
        """Forgets shards some of whose images could not be read then and can be read now."""
        for record in self.records():
            files = [self.plan.files[e["source_index"]][0] for e in record["quarantine"]]
            if None in self.plan.crops_of(files)[1]:
                self._record_file(record["shard"]).unlink()

    # ------------------------------------------------------------------------------ what is done

    def missing(self) -> list[int]:
        """Shards that are not done, in order.

        Raises:
            CacheError: there is neither a plan nor a finished cache.
        """
        if (self.path / MANIFEST).exists():
            return []
        if not (self.work / PLAN_FILE).exists():
            raise CacheError(
                f"{self.path} is not there for every rank: --out must name a folder "
                "that all machines share"
            )
        done = {record["shard"] for record in self.records()}
        return [shard for shard in range(self.plan.shards) if shard not in done]

    def records(self) -> Iterator[dict[str, Any]]:
        """Records of finished shards, in order; one that cannot be read is none."""
        for file in sorted(self.work.glob("shard-*.json")):
            with contextlib.suppress(CacheError):
                record = _read(file)
                if record.keys() >= {"shard", "files", "quarantine", "sums"}:
                    yield record

    def broken(self) -> list[dict[str, Any]]:
        """Images that finished shards have left out, as the manifest will list them."""
        return [entry for record in self.records() for entry in record["quarantine"]]

    def hardware(self) -> dict[str | None, list[int]]:
        """What finished shards were encoded on -> which these are; None: not recorded."""
        found: dict[str | None, list[int]] = {}
        for record in self.records():
            found.setdefault(record.get("hardware"), []).append(record["shard"])
        return found

    def keep_record(
        self,
        shard: int,
        files: list[str],
        quarantine: list[dict[str, Any]],
        sums: dict[str, Any],
        hardware: str,
    ) -> None:
        """Notes that a shard is done, once its files are on the disk.

        Args:
            files: its files, as paths inside the cache.
            quarantine: row, source_index, path and reason of every image that was left out.
            sums: of the channels of every array that has some.
            hardware: what it was encoded on.
        """
        record = {
            "shard": shard,
            "files": {name: self._entry(name) for name in files},
            "quarantine": quarantine,
            "sums": sums,
            "hardware": hardware,
        }
        faults.point(f"shard={shard}")
        write_json(self._record_file(shard), record)

    def refuse_broken(self, broken: list[dict[str, Any]]) -> None:
        """CacheError for more images that could not be read than may be left out."""
        if len(broken) <= self.plan.max_broken:
            return
        lines = (f"{entry['path']}: {entry['reason']}" for entry in broken)
        raise CacheError(
            f"{self.plan.folder}: {len(broken)} images so far cannot be read, "
            f"--max-broken allows {self.plan.max_broken}. Mend them, or raise --max-broken to "
            "go on without them, and repeat the command" + listing(lines, len(broken), 20)
        )

    def _record_file(self, shard: int) -> Path:
        return self.work / f"shard-{shard:05d}.json"

    def _entry(self, name: str) -> dict[str, Any]:
        """What the manifest says of a file, flushed to the disk first."""
        file = self.path / name
        sync(file)
        sync(file.parent)
        return {"bytes": file.stat().st_size, "crc32c": checksum(file)}

    # ------------------------------------------------------------------------------------ the end

    def finish(self) -> Cache:
        """Reads every file back, writes the manifest, removes the records.

        Raises:
            CacheError: a file is not what was written, too many broken images, or shards missing.
        """
        missing = self.missing()
        if missing:
            raise CacheError(f"{self.path}: shards {missing[:SHOWN]} are missing")
        records = list(self.records())
        broken = self.broken()
        self.refuse_broken(broken)
        self._refuse_bare(broken)
        self._write_frame()
        files = {name: entry for record in records for name, entry in record["files"].items()}
        files |= {name: self._entry(name) for name in self._frame_files()}
        manifest = _read(self.work / PLAN_FILE) | {
            "quarantine": broken,
            "statistics": statistics(records),
            "sums": [record["sums"] for record in records],
            "files": dict(sorted(files.items())),
        }
        manifest["encoding"]["hardware"] = [record.get("hardware") for record in records]
        manifest = seal(manifest)
        wrong = manifest_damage(manifest)
        if wrong:
            raise CacheError(f"{self.path} cannot be finished: {wrong}")
        self._verify(Cache(self.path, manifest), records)
        faults.point("manifest")
        write_json(self.path / MANIFEST, manifest)
        shutil.rmtree(self.work)
        return open_cache(self.path)

    def _frame_files(self) -> list[str]:
        """What `_write_frame` writes."""
        names = [GROUP]
        names += [f"{array}/zarr.json" for array in (*self.plan.stored, *INDEX)]
        names += [f"{array}/c/0" for array in INDEX]
        if self.plan.tokenizer.has_codebook:
            names.append(CODEBOOK)
        return names

    def _verify(self, cache: Cache, records: list[dict[str, Any]]) -> None:
        """A shard that was lost since it was written must be built again, not left out."""
        wrong = []
        for record in records:
            bad = [text for name in record["files"] if (text := cache.file_damage(name))]
            if bad:
                self._record_file(record["shard"]).unlink()
            wrong += bad
        if wrong:
            raise CacheError(
                f"{self.path}: {'; '.join(wrong[:SHOWN])}: not what was written. "
                "Check the disk; repeating the command builds these shards again"
            )

    def _refuse_bare(self, broken: list[dict[str, Any]]) -> None:
        """A class without a single image would go unnoticed until samples are looked at."""
        labels = np.array([label for _, label in self.plan.files])
        good = np.delete(labels, [entry["source_index"] for entry in broken])
        bare = sorted(set(range(len(self.plan.class_names))) - set(good.tolist()))
        if bare:
            names = (self.plan.class_names[label] for label in bare)
            raise CacheError(
                f"{self.plan.folder}: no readable image is left in {len(bare)} class "
                "folders of --data; mend them and repeat the command, or remove them "
                "and begin anew" + listing(names, len(bare), 20)
            )


def _record_of(cache: Cache, shard: int) -> dict[str, Any]:
    """The record that a shard of a finished cache had."""
    first, stop = cache.extent(shard)
    quarantine = [e for e in cache.manifest["quarantine"] if first <= e["row"] < stop]
    return {
        "shard": shard,
        "files": {name: cache.manifest["files"][name] for name in cache.shard_files(shard)},
        "quarantine": quarantine,
        "sums": cache.manifest["sums"][shard],
        "hardware": cache.hardware[shard],
    }


def _read(file: Path) -> dict[str, Any]:
    """A JSON object; CacheError if the file holds something else."""
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
