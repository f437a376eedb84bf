"""A whole cache, checked in one pass over its bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from heptapod_fast.data.cache.format import (
    BUILDING,
    INDEX,
    MANIFEST,
    SHOWN,
    Cache,
    CacheError,
    check_metadata,
    size_damage,
)
from heptapod_fast.data.entries import is_debris
from heptapod_fast.tokenizers import NO_CODE, StoredArray

_READERS = 4
_ROWS = 64  # looked at together: what is worked on stays in the processor's caches
_EXPONENT = 0x7C00  # the five bits of a float16; all are set where it is infinite or NaN

# What is wrong, and for every row looked at whether it is wrong there.
Finding = tuple[str, np.ndarray]


def find_damage(cache: Cache, progress: Callable[[int, int], None] | None = None) -> list[str]:
    """Everything that is wrong with a cache (`open_cache(path, look=False)`); empty if nothing is.

    Every file is compared with the manifest, and what is stored is looked at: values that are not
    finite outside the rows of the quarantine (or finite inside), images whose tokens are all zero
    or all the same, negative deviations, codes beyond the vocabulary, labels out of range, an order
    that is no permutation, files that do not belong to the cache.

    progress: called as progress(shards done, shards in all), the shards of every array.
    """
    found = _damage_beside_shards(cache)
    jobs = [(array, shard) for array in cache.arrays for shard in range(cache.shards)]
    with ThreadPoolExecutor(_READERS) as pool:
        for done, wrong in enumerate(pool.map(lambda job: _shard_damage(cache, *job), jobs), 1):
            found += wrong
            if progress is not None:
                progress(done, len(jobs))
    return found + _foreign_files(cache)


def _damage_beside_shards(cache: Cache) -> list[str]:
    """What is wrong with the small files and what they say."""
    shards = {name for k in range(cache.shards) for name in cache.shard_files(k)}
    small = [name for name in cache.manifest["files"] if name not in shards]
    found = [text for name in small if (text := cache.file_damage(name))]
    if found:
        return found
    try:
        for array in (*cache.arrays, *INDEX):
            check_metadata(cache, array)
        return _index_damage(cache)
    except CacheError as error:
        return [str(error)]


def _index_damage(cache: Cache) -> list[str]:
    """What is wrong with labels and order."""
    labels, order = (cache.read_index(name) for name in INDEX)
    classes = len(cache.class_names)
    found = []
    bad = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(bad):
        found.append(f"labels: {len(bad)} are outside 0..{classes - 1}, first that of row {bad[0]}")
    if not np.array_equal(np.sort(order), np.arange(cache.rows)):
        found.append("source_index: not every image occurs once")
    return found


def _foreign_files(cache: Cache) -> list[str]:
    """Files that do not belong to the cache."""
    there = set()
    for path in cache.path.rglob("*"):
        inside = path.relative_to(cache.path)
        # File managers and network file systems leave files behind.
        is_foreign = any(is_debris(part) for part in inside.parts)
        if path.is_file() and not is_foreign and BUILDING not in inside.parts:
            there.add(inside.as_posix())
    extra = sorted(there - cache.manifest["files"].keys() - {MANIFEST})
    return [f"{name}: not part of the cache" for name in extra]


def _shard_damage(cache: Cache, array: str, shard: int) -> list[str]:
    """Reads a shard of one array once, for its checksum and its values."""
    import google_crc32c

    name = cache.shard_file(array, shard)
    expected = cache.manifest["files"][name]
    wrong = size_damage(cache.path, name, expected["bytes"])
    if wrong:
        return [wrong]
    first, stop = cache.extent(shard)
    rows = _Rows(cache, array, shard)
    is_ordered = cache.in_row_order(array, shard)
    checksum = 0
    with open(cache.path / name, "rb") as stream:
        for start in range(0, stop - first, _ROWS):
            count = min(_ROWS, stop - first - start)
            data = stream.read(count * cache.row_bytes(array))
            checksum = google_crc32c.extend(checksum, data)
            if is_ordered:
                rows.look(start, np.frombuffer(data, cache.dtype(array)))
        checksum = google_crc32c.extend(checksum, stream.read())
    if f"{checksum:08x}" != expected["crc32c"]:
        return [f"{name}: checksum does not match, the file was changed or damaged"]
    if not is_ordered:
        rows.look(0, cache.read_shard(array, shard))
    return [f"{name}: {_listed(bad)} {what}" for what, bad in rows.found.items()]


class _Rows:
    """The rows of one shard of one array, looked at a few at a time.

    Attributes:
        found: what is wrong -> the rows of the cache that it is wrong with.
    """

    def __init__(self, cache: Cache, array: str, shard: int) -> None:
        self.found: dict[str, list[int]] = {}
        self._stored = cache.stored[array]
        self._vocabulary = cache.spec.vocabulary
        values = math.prod(self._stored.shape)
        self._shape = (-1, cache.views, values)
        self._first, stop = cache.extent(shard)
        broken = [row for row in cache.broken_rows if self._first <= row < stop]
        self._broken = np.isin(np.arange(self._first, stop), broken)

    def look(self, start: int, values: np.ndarray) -> None:
        """values: of whole rows, the first of which is row `start` of the shard."""
        values = values.reshape(self._shape)
        broken = self._broken[start : start + len(values)]
        if self._stored.dtype == "uint16":
            findings = _code_findings(values, broken, self._vocabulary)
        else:
            findings = _float_findings(values, broken, self._stored)
        for what, bad in findings:
            if bad.any():
                rows = np.flatnonzero(bad) + self._first + start
                self.found.setdefault(what, []).extend(rows.tolist())


def _float_findings(
    values: np.ndarray, broken: np.ndarray, array: StoredArray
) -> Iterator[Finding]:
    """values: (n, V, values of a view) float16. broken: (n,) rows that must hold NaN."""
    bits = values.view("<u2")
    exponents = bits & np.uint16(_EXPONENT)
    is_wild = exponents.max(2).max(1) == _EXPONENT
    is_number = exponents.min(2).min(1) != _EXPONENT
    is_good = ~is_wild & ~broken
    yield "not finite", is_wild & ~broken
    yield "of images that could not be read hold numbers", is_number & broken
    if array.varies:
        same = (bits.max(2) == bits.min(2)).any(1)
        yield "constant (every value of the image is the same)", same & is_good
    if array.is_deviation:
        # As integers, float16 below zero are below zero.
        is_negative = values.view("<i2").min(2).min(1) < 0
        yield "negative deviations", is_negative & is_good


def _code_findings(values: np.ndarray, broken: np.ndarray, vocabulary: int) -> Iterator[Finding]:
    """values: (n, V, T) uint16. broken: (n,) rows that must hold no code."""
    is_outside = (values >= vocabulary).any((1, 2))
    is_code = (values != NO_CODE).any((1, 2))
    yield f"codes outside 0..{vocabulary - 1}", is_outside & ~broken
    yield "of images that could not be read hold codes", is_code & broken


def _listed(rows: list[int]) -> str:
    """The first rows, and how many there are."""
    shown = ", ".join(map(str, rows[:SHOWN]))
    more = ", ..." if len(rows) > SHOWN else ""
    return f"rows {shown}{more} ({len(rows)})"
