"""Caches of tokens: a Zarr v3 group, a manifest, and shards that can be read without a library.

    CACHE.zarr/   mean, std   (N, V, C, H, W) float16     continuous tokens
                  codes       (N, V, T) uint16            discrete ones (`Tokenizer.stored_arrays`)
                  labels, source_index   (N,) int32
                  manifest.json           written last: a folder without it is no cache
                  tokenizer.safetensors   a fitted codebook (patch-vq)

N images in shuffled order (row r is image source_index[r] of the sorted files), V views (`Views`
says which), cut into shards of 8192 rows and chunks of 64, uncompressed. What was never written
reads as NaN, or as code 65535, never as zeros. Any Zarr library reads it.

One shard file is its chunks in order, then where each of them is (offset and length, 16 bytes) and
a checksum of that (zarr-specs, sharding codec 1.0). Chunks in ascending order without gaps are one
array in row order: such a file is mapped into memory as it is. The specification does not promise
that order, so that a file in another order is read through zarr.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from heptapod_fast.data.views import Views
from heptapod_fast.storage import checksum
from heptapod_fast.tokenizers import (
    NO_CODE,
    TOKENIZERS,
    StoredArray,
    Tokenizer,
    TokenSpec,
    token_spec,
)

FORMAT = 1
MANIFEST = "manifest.json"
GROUP = "zarr.json"  # of the whole cache, by which Zarr libraries know it
CODEBOOK = "tokenizer.safetensors"
BUILDING = ".building"  # the folder of a build that is not finished
SHARD_ROWS = 8192
CHUNK_ROWS = 64
INDEX = ("labels", "source_index")  # of all rows, one chunk each
FILLS = {"float16": float("nan"), "uint16": NO_CODE, "int32": -1}
SHOWN = 8  # damaged files that an error names
# After the chunks of a shard: offset and length of each as uint64, then a crc32c.
_PLACE_BYTES = 16
_INDEX_CRC_BYTES = 4


class CacheError(ValueError):
    """A cache that cannot be used; the message says which part of it and what to do."""


@dataclass(frozen=True)
class Cache:
    """An opened cache: its manifest, checked against itself and against the sizes of its files.

    Attributes:
        path: the folder.
        manifest: as read; `Plan.head` and `Site.finish` say what is in it.
    """

    path: Path
    manifest: dict[str, Any]

    @cached_property
    def spec(self) -> TokenSpec:
        """The tokens."""
        about = self.manifest["tokenizer"]
        return token_spec(
            about["tokenizer"], about["image_size"], about.get("patch_size"), about.get("codes")
        )

    @property
    def tokenizer(self) -> type[Tokenizer]:
        """The class of the tokenizer, which knows what is stored and makes tokens of it; no
        weights."""
        return TOKENIZERS[self.spec.name]

    @cached_property
    def stored(self) -> dict[str, StoredArray]:
        """The sharded arrays by name, one view of one image of each."""
        return self.tokenizer.stored_arrays(self.spec)

    @property
    def arrays(self) -> tuple[str, ...]:
        """Names of the sharded arrays."""
        return tuple(self.stored)

    @property
    def rows(self) -> int:
        """N, rows of every array, those of images that could not be read among them."""
        return self.manifest["rows"]

    @property
    def views(self) -> int:
        """V, views of every image."""
        return self.manifest["views"]

    @cached_property
    def augmentation(self) -> Views:
        """Which views they are."""
        return Views.described(self.manifest)

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.rows // self.manifest["shard_rows"])

    @property
    def class_names(self) -> tuple[str, ...]:
        """One name per class."""
        return tuple(self.manifest["dataset"]["class_names"])

    @property
    def broken_rows(self) -> list[int]:
        """Rows of images that could not be read, ascending."""
        return [entry["row"] for entry in self.manifest["quarantine"]]

    @property
    def hardware(self) -> list[str | None]:
        """What every shard was encoded on (see `Builder`); None for shards of before this was
        recorded."""
        recorded = self.manifest.get("encoding", {}).get("hardware")
        return [None] * self.shards if recorded is None else recorded

    @property
    def nbytes(self) -> int:
        """Bytes of all shards."""
        files = self.manifest["files"]
        return sum(entry["bytes"] for name, entry in files.items() if "/c/" in name)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over all that decides what is read: contents, rows left out, classes, tokenizer;
        not where it lies."""
        identity = [
            self.manifest["files"],
            self.broken_rows,
            self.manifest["dataset"]["class_names"],
            self.manifest["tokenizer"]["fingerprint"],
        ]
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    def extent(self, shard: int) -> tuple[int, int]:
        """First row of a shard and the row behind its last."""
        size = self.manifest["shard_rows"]
        return shard * size, min((shard + 1) * size, self.rows)

    def shard_file(self, array: str, shard: int) -> str:
        """Path of a shard inside the cache."""
        return f"{array}/c/{shard}" + "/0" * len(self.row_shape(array))

    def shard_files(self, shard: int) -> list[str]:
        """Files of one shard."""
        return [self.shard_file(array, shard) for array in self.arrays]

    def row_shape(self, array: str) -> tuple[int, ...]:
        """(V, ...), one row of an array."""
        return (self.views, *self.stored[array].shape)

    def dtype(self, array: str) -> np.dtype:
        """Of a sharded array, as it lies in its files."""
        return np.dtype(self.stored[array].dtype).newbyteorder("<")

    def row_bytes(self, array: str) -> int:
        """Bytes of one row of an array, all views."""
        return self.dtype(array).itemsize * math.prod(self.row_shape(array))

    def read_index(self, array: str) -> np.ndarray:
        """labels or source_index, (N,) int32, checked against the manifest.

        Raises:
            CacheError: the file is not what the manifest says.
        """
        self.verify([f"{array}/c/0"])
        return np.fromfile(self.path / array / "c" / "0", "<i4")

    def in_row_order(self, array: str, shard: int) -> bool:
        """Whether the chunks of a shard lie in the order of their rows without gaps."""
        chunk_rows = self.manifest["chunk_rows"]
        chunks = self.manifest["shard_rows"] // chunk_rows
        first, stop = self.extent(shard)
        used = -(-(stop - first) // chunk_rows)
        index_bytes = _PLACE_BYTES * chunks
        with open(self.path / self.shard_file(array, shard), "rb") as stream:
            size = stream.seek(0, 2)
            stream.seek(max(0, size - index_bytes - _INDEX_CRC_BYTES))
            places = np.frombuffer(stream.read(index_bytes), "<u8").reshape(-1, 2)[:used]
        if len(places) < used:
            return False
        offsets, lengths = places.T
        chunk_bytes = chunk_rows * self.row_bytes(array)
        expected = np.arange(used, dtype=np.uint64) * np.uint64(chunk_bytes)
        return bool((offsets == expected).all() and (lengths == chunk_bytes).all())

    def read_shard(self, array: str, shard: int) -> np.ndarray:
        """(rows, V, ...) of one shard, read through zarr."""
        first, stop = self.extent(shard)
        return np.asarray(open_array(self.path / array, "r")[first:stop])

    def verify(self, names: list[str]) -> None:
        """Reads files whole and compares them with the manifest (which also brings them into the
        page cache).

        Raises:
            CacheError: names every file that is missing or differs.
        """
        wrong = [text for name in names if (text := self.file_damage(name))]
        if wrong:
            raise CacheError(self.damage_message(wrong))

    def damage_message(self, wrong: list[str]) -> str:
        """What to say of damaged files."""
        more = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        return (
            f"{self.path} is damaged: {'; '.join(wrong[:SHOWN])}{more}. Restore these files "
            "from a copy, or repeat the command that made it: tools/cache.py builds damaged "
            "shards again"
        )

    def file_damage(self, name: str) -> str:
        """What is wrong with one file, by its bytes; empty if nothing is."""
        expected = self.manifest["files"][name]
        wrong = size_damage(self.path, name, expected["bytes"])
        if wrong:
            return wrong
        if checksum(self.path / name) != expected["crc32c"]:
            return f"{name}: checksum does not match, the file was changed or damaged"
        return ""


def size_damage(path: Path, name: str, expected: int) -> str:
    """What is wrong with the size of a file; empty if nothing is."""
    try:
        found = (path / name).stat().st_size
    except FileNotFoundError:
        return f"{name}: missing"
    if found == expected:
        return ""
    return f"{name}: {found:,} bytes, expected {expected:,}"


def open_array(path: Path, mode: Literal["r", "r+"]) -> Any:
    """A zarr array, to be read or written by rows."""
    import zarr

    return zarr.open_array(path, mode=mode)


# --------------------------------------------------------------------------------------- opening


def open_cache(path: str | Path, look: bool = True) -> Cache:
    """Opens a cache. Contents are verified when they are read (`Cache.verify`), not here.

    Args:
        path: the folder.
        look: at the files too, their sizes and descriptions, not at the manifest alone.

    Raises:
        FileNotFoundError: nothing is there.
        CacheError: no cache, an unfinished one, another format, or files that are missing, of
            other sizes, or described otherwise than the manifest does.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: no such cache; check --data, or build it: python "
            f"tools/cache.py --data IMAGE_FOLDER --out {path}"
        )
    cache = Cache(path, _read_manifest(path))
    if not look:
        return cache
    wrong = [
        text
        for name, entry in cache.manifest["files"].items()
        if (text := size_damage(path, name, entry["bytes"]))
    ]
    if wrong:
        raise CacheError(cache.damage_message(wrong))
    for array in (*cache.arrays, *INDEX):
        check_metadata(cache, array)
    return cache


def refuse_other(cache: Cache, asked: dict[str, Any]) -> None:
    """CacheError if a setting in `asked` (None: not asked for) is not what the cache has."""
    about = cache.manifest["tokenizer"]
    for name in ("tokenizer", "image_size", "patch_size", "codes"):
        wanted = asked[name]
        if wanted is None or name not in about or about[name] == wanted:
            continue
        flag = "--" + name.replace("_", "-")
        raise CacheError(
            f"{cache.path} was made with {flag} {about[name]}, this run asks for "
            f"{flag} {wanted}: leave {flag} out, or build another cache with "
            "tools/cache.py"
        )


def _read_manifest(path: Path) -> dict[str, Any]:
    """The manifest, checked against itself."""
    file = path / MANIFEST
    if not file.exists():
        what = "build one with tools/cache.py"
        if (path / BUILDING).exists():
            what = "its construction was interrupted: repeat the command that builds it, it goes on"
        raise CacheError(f"{path} is no finished cache, it has no {MANIFEST}; {what}")
    again = "restore it from a copy, or build the cache anew"
    try:
        manifest = json.loads(file.read_text())
        found = manifest["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise CacheError(f"{file} is damaged ({error}): {again}") from error
    if found != FORMAT:
        is_newer = isinstance(found, int) and found > FORMAT
        what = "update heptapod_fast" if is_newer else "build it anew with tools/cache.py"
        raise CacheError(f"{path} has cache format {found}, this version reads {FORMAT}: {what}")
    if seal(manifest)["seal"] != manifest.get("seal"):
        wrong = "it is not what was written"
    else:
        wrong = manifest_damage(manifest)
    if wrong:
        raise CacheError(f"{file} is damaged ({wrong}): {again}")
    return manifest


def seal(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest with a checksum of itself."""
    import google_crc32c

    rest = {key: value for key, value in manifest.items() if key != "seal"}
    text = json.dumps(rest, sort_keys=True).encode()
    return rest | {"seal": f"{google_crc32c.value(text):08x}"}


def manifest_damage(manifest: dict[str, Any]) -> str:
    """Why the manifest does not speak of one cache; empty if it does."""
    try:
        return _contradiction(Cache(Path("."), manifest))
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        return f"{type(error).__name__}: {error}"


def _contradiction(cache: Cache) -> str:
    """Where a manifest contradicts itself; raises all kinds of errors where entries are missing or
    of other types."""
    manifest = cache.manifest
    files = manifest["files"]
    missing = sorted(_needed_files(cache) - files.keys())
    if missing:
        return f"it lists no {', '.join(missing[:3])}"
    for name in files:
        if name.startswith("/") or ".." in Path(name).parts:
            return f"it names a file outside the cache, {name}"
    for name in INDEX:
        if files[f"{name}/c/0"]["bytes"] != 4 * cache.rows:
            return f"{name} does not have {cache.rows} entries"
    broken = cache.broken_rows
    is_ascending = sorted(set(broken)) == broken
    if not is_ascending or broken and not 0 <= broken[0] <= broken[-1] < cache.rows:
        return "its quarantine does not name rows in ascending order"
    if len(broken) >= cache.rows:
        return "none of its images could be read"
    if cache.views != cache.augmentation.count:
        return f"it has {cache.views} views, {cache.augmentation} makes {cache.augmentation.count}"
    if cache.rows < 1 or not cache.class_names or cache.shards < 1:
        return "its rows, views or classes make no sense"
    if len(manifest["sums"]) != cache.shards:
        return f"it has no sums of {cache.shards} shards"
    if len(cache.hardware) != cache.shards:
        return f"it does not say what {cache.shards} shards were encoded on"
    # Entries that only have to be there.
    _ = cache.fingerprint, manifest["preprocessing"], manifest["dataset"]["fingerprint"]
    return ""


def _needed_files(cache: Cache) -> set[str]:
    """Files without which there is no cache."""
    needed = {GROUP}
    needed |= {f"{array}/zarr.json" for array in (*cache.arrays, *INDEX)}
    needed |= {f"{array}/c/0" for array in INDEX}
    for shard in range(cache.shards):
        needed |= set(cache.shard_files(shard))
    if cache.tokenizer.has_codebook:
        needed.add(CODEBOOK)
    return needed


def check_metadata(cache: Cache, array: str) -> None:
    """An array's zarr.json must say what the manifest says, readers rely on either: CacheError if
    it does not."""
    file = cache.path / array / "zarr.json"
    cache.verify([f"{array}/zarr.json"])
    found = json.loads(file.read_text())
    dtype = "int32"
    shape: tuple[int, ...] = (cache.rows,)
    codecs = found.get("codecs")
    if array not in INDEX:
        dtype = cache.stored[array].dtype
        shape = (cache.rows, *cache.row_shape(array))
        if codecs and codecs[0].get("name") == "sharding_indexed":
            codecs = codecs[0]["configuration"]["codecs"]
    expected = {"zarr_format": 3, "node_type": "array", "shape": list(shape), "data_type": dtype}
    for key, value in expected.items():
        if found.get(key) != value:
            raise CacheError(
                f"{file}: expected {key} {value}, found {found.get(key)}; build the cache anew"
            )
    if codecs != [{"name": "bytes", "configuration": {"endian": "little"}}]:
        raise CacheError(
            f"{file}: expected plain values in little-endian byte order, found codecs "
            f"{codecs}; build the cache anew"
        )
