"""Checking what goes into a cache, and a whole cache in one pass over its bytes."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from heptapod_fast.data.cache_format import (
    BUILDING,
    INDEX,
    MANIFEST,
    SHOWN,
    Cache,
    CacheError,
    check_metadata,
    size_problem,
)
from heptapod_fast.data.files import listing
from heptapod_fast.tokenizers import NO_CODE

READERS = 4
_ROWS = 64


def problems(cache: Cache, progress: Callable[[int, int], None] | None = None) -> list[str]:
    """Everything that is wrong with a cache (`open_cache(path, look=False)`); empty if nothing is.

    Every file is compared with the manifest, and what is stored is looked at: values that are not
    finite outside the rows of the quarantine (or finite inside), images whose tokens are all zero
    or all the same, negative deviations, codes beyond the vocabulary, labels out of range, an order
    that is no permutation, files that do not belong to the cache.
    """
    files = cache.manifest["files"]
    small = [name for name in files if not name.startswith(tuple(f"{a}/c/" for a in cache.arrays))]
    found = [text for name in small if (text := cache.problem(name))]
    if not found:
        try:
            for array in (*cache.arrays, *INDEX):
                check_metadata(cache, array)
            found += _index_problems(cache)
        except CacheError as error:
            found.append(str(error))
    jobs = [(array, shard) for array in cache.arrays for shard in range(cache.shards)]
    with ThreadPoolExecutor(READERS) as pool:
        for done, wrong in enumerate(pool.map(lambda job: _shard_problems(cache, *job), jobs), 1):
            found += wrong
            if progress is not None:
                progress(done, len(jobs))
    # File managers and network file systems leave hidden files behind.
    there = {
        path.relative_to(cache.path).as_posix()
        for path in cache.path.rglob("*")
        if path.is_file()
        and not path.name.startswith(".")
        and BUILDING not in path.relative_to(cache.path).parts
    }
    extra = sorted(there - files.keys() - {MANIFEST})
    return found + [f"{name}: not part of the cache" for name in extra]


def _index_problems(cache: Cache) -> list[str]:
    labels, order = (cache.read_index(name) for name in INDEX)
    classes, found = len(cache.class_names), []
    bad = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(bad):
        found.append(f"labels: {len(bad)} are outside 0..{classes - 1}, first that of row {bad[0]}")
    if not np.array_equal(np.sort(order), np.arange(cache.rows)):
        found.append("source_index: not every image occurs once")
    return found


def _shard_problems(cache: Cache, array: str, shard: int) -> list[str]:
    import google_crc32c

    name = cache.shard_file(array, shard)
    expected, (first, stop) = cache.manifest["files"][name], cache.extent(shard)
    wrong = size_problem(cache.path, name, expected["bytes"])
    if wrong:
        return [wrong]
    broken = np.zeros(stop - first, bool)
    broken[[e["row"] - first for e in cache.manifest["quarantine"] if first <= e["row"] < stop]] = (
        True
    )
    checksum, found = 0, {}

    def look(start: int, values: np.ndarray) -> None:
        values = values.reshape(-1, cache.views, math.prod(cache.row_shape(array)[1:]))
        out = broken[start : start + len(values)]
        kinds = (
            _code_problems(values, out, cache.spec.vocabulary)
            if array == "codes"
            else _float_problems(values, out, array, cache.spec.name)
        )
        for what, bad in kinds:
            found.setdefault(what, []).extend((np.flatnonzero(bad) + first + start).tolist())

    ordered = cache.in_row_order(array, shard)
    with open(cache.path / name, "rb") as stream:
        for start in range(0, stop - first, _ROWS):  # what is worked on stays in the caches
            rows = min(_ROWS, stop - first - start)
            data = stream.read(rows * cache.row_bytes(array))
            checksum = google_crc32c.extend(checksum, data)
            if ordered:
                look(start, np.frombuffer(data, cache.dtype(array)))
        checksum = google_crc32c.extend(checksum, stream.read())
    if f"{checksum:08x}" != expected["crc32c"]:
        return [f"{name}: checksum does not match, the file was changed or damaged"]
    if not ordered:
        look(0, cache.read_shard(array, shard))
    return [f"{name}: {_rows(rows)} {what}" for what, rows in found.items() if rows]


def _float_problems(
    values: np.ndarray, broken: np.ndarray, array: str, tokenizer: str
) -> list[tuple[str, np.ndarray]]:
    """(what is wrong, the rows it is wrong with)."""
    # float16 is infinite or NaN where all five bits of the exponent are set.
    bits = values.view("<u2")
    exponents = bits & np.uint16(0x7C00)
    wild = exponents.max(2).max(1) == 0x7C00
    found = [
        ("not finite", wild & ~broken),
        (
            "of images that could not be read hold numbers",
            (exponents.min(2).min(1) != 0x7C00) & broken,
        ),
    ]
    if tokenizer == "kl16":
        same = (bits.max(2) == bits.min(2)).any(1)
        found.append(("constant (every value of the image is the same)", same & ~wild & ~broken))
    if array == "std":
        negative = values.view("<i2").min(2).min(1) < 0
        found.append(("negative deviations", negative & ~wild & ~broken))
    return found


def _code_problems(
    values: np.ndarray, broken: np.ndarray, vocabulary: int
) -> list[tuple[str, np.ndarray]]:
    return [
        (f"codes outside 0..{vocabulary - 1}", (values >= vocabulary).any((1, 2)) & ~broken),
        ("of images that could not be read hold codes", (values != NO_CODE).any((1, 2)) & broken),
    ]


def _rows(rows: list[int]) -> str:
    shown = ", ".join(map(str, rows[:SHOWN]))
    return f"rows {shown}{', ...' if len(rows) > SHOWN else ''} ({len(rows)})"


def refuse_bad(name: str, values: np.ndarray, paths: list[Path]) -> None:
    """CacheError for tokens that a cache must not hold, as they come from the tokenizer.

    values: (n, ...) of one stored array, in its dtype, of the images in `paths`.
    """
    flat = values.reshape(len(values), -1)
    if name == "codes":
        bad = (flat == NO_CODE).any(1)
    else:
        bad = ~np.isfinite(flat).all(1) | (name == "std") & (flat < 0).any(1)
    if bad.any():
        lines = (str(paths[k]) for k in np.flatnonzero(bad))
        raise CacheError(
            f"the tokenizer gives {name} that cannot be stored (not finite in "
            f"{values.dtype}) for {bad.sum()} of {len(bad)} images: check "
            "--tokenizer-weights" + listing(lines, int(bad.sum()), 10)
        )


def channel_sums(values: np.ndarray, broken: list[int]) -> dict[str, Any]:
    """Number of values of a channel, their sum and the sum of their squares in float64, of
    (rows, V, C, H, W) without the rows in `broken`; a few rows at a time."""
    kept = np.delete(np.arange(len(values)), broken)
    total = np.zeros((2, values.shape[2]))
    for start in range(0, len(kept), 64):
        part = values[kept[start : start + 64]].astype(np.float64)
        total[0] += part.sum((0, 1, 3, 4))
        total[1] += np.square(part, out=part).sum((0, 1, 3, 4))
    count = len(kept) * values[:1, :, 0].size
    return {"count": count, "sum": total[0].tolist(), "squares": total[1].tolist()}


def statistics(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Per array the mean and the standard deviation of every channel, float64, from the sums in
    the records of the shards."""
    found = {}
    for name in records[0]["sums"]:
        parts = [record["sums"][name] for record in records]
        count = sum(part["count"] for part in parts)
        mean = np.sum([part["sum"] for part in parts], axis=0) / max(count, 1)
        square = np.sum([part["squares"] for part in parts], axis=0) / max(count, 1)
        found[name] = {
            "mean": mean.tolist(),
            "std": np.sqrt(np.maximum(square - mean**2, 0.0)).tolist(),
        }
    return found
