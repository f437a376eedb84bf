"""Taking a finished cache back to an unfinished one that lacks nothing but its damaged shards."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from heptapod_fast.data.cache_format import MANIFEST, SHOWN, Cache, CacheError
from heptapod_fast.storage import write_json

READERS = 4


def reopen(cache: Cache, work: Path, plan: str, head: list[str]) -> list[int]:
    """Reads a finished cache whole. Where shards are damaged, the manifest is taken apart into the
    plan and the records of the others (see cache_site.py), and removed.

    Args:
        cache: opened without a look at its files.
        work: folder of plan and records. plan: name of the plan there. head: its entries.

    Returns:
        The damaged shards; [] if the cache is whole, and nothing was changed.

    Raises:
        CacheError: other files are damaged, which no shard can replace.
    """
    names = list(cache.manifest["files"])
    with ThreadPoolExecutor(READERS) as pool:
        wrong = {
            name: text
            for name, text in zip(names, pool.map(cache.problem, names), strict=True)
            if text
        }
    shards = {shard: cache.shard_files(shard) for shard in range(cache.shards)}
    lost = [shard for shard, files in shards.items() if any(name in wrong for name in files)]
    others = wrong.keys() - {name for files in shards.values() for name in files}
    if others:
        raise CacheError(
            f"{cache.path} is damaged beyond its shards: "
            f"{'; '.join(wrong[name] for name in sorted(others)[:SHOWN])}. Restore "
            "these files from a copy, or remove it and build it anew"
        )
    if not lost:
        return []
    for shard, files in shards.items():
        if shard not in lost:
            write_json(work / f"shard-{shard:05d}.json", _record(cache, shard, files))
    write_json(work / plan, {key: cache.manifest[key] for key in head})
    (cache.path / MANIFEST).unlink()
    return lost


def _record(cache: Cache, shard: int, files: list[str]) -> dict[str, Any]:
    first, stop = cache.extent(shard)
    return {
        "shard": shard,
        "files": {name: cache.manifest["files"][name] for name in files},
        "quarantine": [
            entry for entry in cache.manifest["quarantine"] if first <= entry["row"] < stop
        ],
        "sums": cache.manifest["sums"][shard],
    }
