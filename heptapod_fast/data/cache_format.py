"""Caches of tokens: a Zarr v3 group, a manifest, and shards that can be read without a library.

    CACHE.zarr/   mean, std   (N, V, C, H, W) float16     continuous tokens
                  codes       (N, V, T) uint16            discrete ones (see tokenizers/cached.py)
                  labels, source_index   (N,) int32
                  manifest.json           written last: a folder without it is no cache
                  tokenizer.safetensors   a fitted codebook (patch-vq)

N images in shuffled order (row r is image source_index[r] of the sorted files), V views (the second
one mirrored), cut into shards of 8192 rows and chunks of 64, uncompressed. What was never written
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
from typing import Any

import numpy as np

from heptapod_fast.storage import checksum
from heptapod_fast.tokenizers import TokenSpec, stored_arrays, token_spec

FORMAT = 1
MANIFEST, CODEBOOK, BUILDING = "manifest.json", "tokenizer.safetensors", ".building"
SHARD_ROWS, CHUNK_ROWS = 8192, 64
INDEX = ("labels", "source_index")  # of all rows, one chunk each
FILLS = {"float16": float("nan"), "uint16": 65535, "int32": -1}
SHOWN = 8


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
    def rows(self) -> int:
        """N, rows of every array, those of images that could not be read among them."""
        return self.manifest["rows"]

    @property
    def views(self) -> int:
        """V: 2 with mirrored images, else 1."""
        return self.manifest["views"]

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.rows // self.manifest["shard_rows"])

    @property
    def class_names(self) -> tuple[str, ...]:
        """One name per class."""
        return tuple(self.manifest["dataset"]["class_names"])

    @property
    def arrays(self) -> tuple[str, ...]:
        """Names of the sharded arrays."""
        return tuple(stored_arrays(self.spec))

    @property
    def nbytes(self) -> int:
        """Bytes of all shards."""
        files = self.manifest["files"]
        return sum(entry["bytes"] for name, entry in files.items() if "/c/" in name)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over all that decides what is read: contents, rows left out, classes, tokenizer;
        not where it lies."""
        about = self.manifest
        identity = [
            about["files"],
            [entry["row"] for entry in about["quarantine"]],
            about["dataset"]["class_names"],
            about["tokenizer"]["fingerprint"],
        ]
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    def extent(self, shard: int) -> tuple[int, int]:
        """First row of a shard and the row behind its last."""
        size = self.manifest["shard_rows"]
        return shard * size, min((shard + 1) * size, self.rows)

    def shard_file(self, array: str, shard: int) -> str:
        """Path of a shard inside the cache."""
        return f"{array}/c/{shard}" + "/0" * (len(self.row_shape(array)))

    def row_shape(self, array: str) -> tuple[int, ...]:
        """(V, ...), one row of an array."""
        return (self.views, *stored_arrays(self.spec)[array][1])

    def dtype(self, array: str) -> np.dtype:
        """Of a sharded array, as it lies in its files."""
        return np.dtype(stored_arrays(self.spec)[array][0]).newbyteorder("<")

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
        about, (first, stop) = self.manifest, self.extent(shard)
        chunk_bytes = about["chunk_rows"] * self.row_bytes(array)
        chunks = about["shard_rows"] // about["chunk_rows"]
        used = -(-(stop - first) // about["chunk_rows"])
        with open(self.path / self.shard_file(array, shard), "rb") as stream:
            stream.seek(max(0, stream.seek(0, 2) - 16 * chunks - 4))
            places = np.frombuffer(stream.read(16 * chunks), "<u8").reshape(-1, 2)[:used]
        return bool(
            len(places) == used
            and (places[:, 0] == np.arange(used) * np.uint64(chunk_bytes)).all()
            and (places[:, 1] == chunk_bytes).all()
        )

    def read_shard(self, array: str, shard: int) -> np.ndarray:
        """(rows, V, ...) of one shard, read through zarr."""
        import zarr

        first, stop = self.extent(shard)
        return zarr.open_group(self.path, mode="r")[array][first:stop]

    def verify(self, names: list[str]) -> None:
        """Reads files whole and compares them with the manifest (which also brings them into the
        page cache).

        Raises:
            CacheError: names every file that is missing or differs.
        """
        wrong = [text for name in names if (text := self.problem(name))]
        if wrong:
            raise CacheError(self.damage(wrong))

    def damage(self, wrong: list[str]) -> str:
        """What to say of damaged files."""
        more = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        return (
            f"{self.path} is damaged: {'; '.join(wrong[:SHOWN])}{more}. Restore these files "
            "from a copy, or repeat the command that made it: tools/cache.py builds damaged "
            "shards again"
        )

    def problem(self, name: str) -> str:
        """What is wrong with one file, by its bytes; empty if nothing is."""
        wrong = size_problem(self.path, name, self.manifest["files"][name]["bytes"])
        if not wrong and checksum(self.path / name) != self.manifest["files"][name]["crc32c"]:
            return f"{name}: checksum does not match, the file was changed or damaged"
        return wrong

    def shard_files(self, shard: int) -> list[str]:
        """Files of one shard."""
        return [self.shard_file(array, shard) for array in self.arrays]


def refuse_other(cache: Cache, asked: dict[str, Any]) -> None:
    """CacheError if a setting in `asked` (None: not asked for) is not what the cache has."""
    about = cache.manifest["tokenizer"]
    for name in ("tokenizer", "image_size", "patch_size", "codes"):
        wanted, flag = asked[name], "--" + name.replace("_", "-")
        if wanted is not None and name in about and about[name] != wanted:
            raise CacheError(
                f"{cache.path} was made with {flag} {about[name]}, this run asks for "
                f"{flag} {wanted}: leave {flag} out, or build another cache with "
                "tools/cache.py"
            )


def size_problem(path: Path, name: str, expected: int) -> str:
    """What is wrong with the size of a file; empty if nothing is."""
    try:
        found = (path / name).stat().st_size
    except FileNotFoundError:
        return f"{name}: missing"
    return "" if found == expected else f"{name}: {found:,} bytes, expected {expected:,}"


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
        if (text := size_problem(path, name, entry["bytes"]))
    ]
    if wrong:
        raise CacheError(cache.damage(wrong))
    for array in (*cache.arrays, *INDEX):
        check_metadata(cache, array)
    return cache


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    if not file.exists():
        what = (
            "its construction was interrupted: repeat the command that builds it, it goes on"
            if (path / BUILDING).exists()
            else "build one with tools/cache.py"
        )
        raise CacheError(f"{path} is no finished cache, it has no {MANIFEST}; {what}")
    try:
        manifest = json.loads(file.read_text())
        found = manifest["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise CacheError(
            f"{file} is damaged ({error}): restore it from a copy, or build the cache anew"
        ) from error
    if found != FORMAT:
        what = (
            "update heptapod_fast"
            if isinstance(found, int) and found > FORMAT
            else "build it anew with tools/cache.py"
        )
        raise CacheError(f"{path} has cache format {found}, this version reads {FORMAT}: {what}")
    wrong = (
        manifest_problems(manifest)
        if seal(manifest)["seal"] == manifest.get("seal")
        else "it is not what was written"
    )
    if wrong:
        raise CacheError(
            f"{file} is damaged ({wrong}): restore it from a copy, or build the cache anew"
        )
    return manifest


def seal(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest with a checksum of itself."""
    import google_crc32c

    rest = {key: value for key, value in manifest.items() if key != "seal"}
    text = json.dumps(rest, sort_keys=True).encode()
    return rest | {"seal": f"{google_crc32c.value(text):08x}"}


def manifest_problems(manifest: dict[str, Any]) -> str:
    """Whether the manifest speaks of one cache; empty if it does."""
    try:
        about = Cache(Path("."), manifest)
        rows, shards = about.rows, about.shards
        needed = {
            about.shard_file(array, shard) for array in about.arrays for shard in range(shards)
        }
        needed |= {f"{array}/c/0" for array in INDEX}
        needed |= {f"{array}/zarr.json" for array in (*about.arrays, *INDEX)} | {"zarr.json"}
        needed |= {CODEBOOK} if about.spec.name == "patch-vq" else set()
        missing = sorted(needed - manifest["files"].keys())
        if missing:
            return f"it lists no {', '.join(missing[:3])}"
        for name in manifest["files"]:
            if name.startswith("/") or ".." in Path(name).parts:
                return f"it names a file outside the cache, {name}"
        for name in INDEX:
            if manifest["files"][f"{name}/c/0"]["bytes"] != 4 * rows:
                return f"{name} does not have {rows} entries"
        broken = [entry["row"] for entry in manifest["quarantine"]]
        if sorted(set(broken)) != broken or broken and not 0 <= broken[0] <= broken[-1] < rows:
            return "its quarantine does not name rows in ascending order"
        if len(broken) >= rows:
            return "none of its images could be read"
        if rows < 1 or about.views not in (1, 2) or not about.class_names or shards < 1:
            return "its rows, views or classes make no sense"
        if len(manifest["sums"]) != shards:
            return f"it has no sums of {shards} shards"
        _ = about.fingerprint, manifest["preprocessing"], manifest["dataset"]["fingerprint"]
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def check_metadata(cache: Cache, array: str) -> None:
    """An array's zarr.json must say what the manifest says, readers rely on either: CacheError if
    it does not."""
    file = cache.path / array / "zarr.json"
    cache.verify([f"{array}/zarr.json"])
    found = json.loads(file.read_text())
    dtype, shape = "int32", (cache.rows,)
    if array not in INDEX:
        dtype = stored_arrays(cache.spec)[array][0]
        shape = (cache.rows, *cache.row_shape(array))
    expected = {"zarr_format": 3, "node_type": "array", "shape": list(shape), "data_type": dtype}
    for key, value in expected.items():
        if found.get(key) != value:
            raise CacheError(
                f"{file}: expected {key} {value}, found {found.get(key)}; build the cache anew"
            )
    codecs = found.get("codecs")
    if array not in INDEX and codecs and codecs[0].get("name") == "sharding_indexed":
        codecs = codecs[0]["configuration"]["codecs"]
    if codecs != [{"name": "bytes", "configuration": {"endian": "little"}}]:
        raise CacheError(
            f"{file}: expected plain values in little-endian byte order, found codecs "
            f"{codecs}; build the cache anew"
        )
