"""What a cache of tokens will hold, fixed before the first image is encoded."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from heptapod_fast.data.cache.format import CHUNK_ROWS, FORMAT
from heptapod_fast.data.entries import Entry
from heptapod_fast.data.files import Files, ImageFiles, listing
from heptapod_fast.data.order import sample_ids
from heptapod_fast.data.pixels import Decoder
from heptapod_fast.data.views import Views
from heptapod_fast.tokenizers import StoredArray, Tokenizer


@dataclass
class Plan:
    """What a cache will hold; on one kind of processor equal plans give equal bytes.

    Attributes:
        images: the files, sorted, and their classes.
        tokenizer: ready to use, on its device.
        decoder: reads the images.
        augmentation: the views of every image.
        batch: images encoded at once.
        seed: of the order of the rows.
        shard_rows: rows of a shard.
        max_broken: images that may be left out because they cannot be read.
        order: (N,) int32; row r of the cache is image order[r] of `files`.

    Raises:
        ValueError: a setting is out of range; names the flag.
    """

    images: ImageFiles
    tokenizer: Tokenizer
    decoder: Decoder
    augmentation: Views
    batch: int
    seed: int
    shard_rows: int
    max_broken: int
    order: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        if self.shard_rows < 1 or self.shard_rows % self.chunk_rows:
            raise ValueError(
                f"--shard-rows {self.shard_rows}: expected up to {CHUNK_ROWS}, or a "
                f"multiple of {CHUNK_ROWS}"
            )
        for name, value, least in (
            ("--batch", self.batch, 1),
            ("--seed", self.seed, 0),
            ("--max-broken", self.max_broken, 0),
        ):
            if value < least:
                raise ValueError(f"{name} {value}: expected at least {least}")
        index = torch.arange(self.rows)
        self.order = sample_ids(index, self.rows, self.seed).numpy().astype("<i4")

    @property
    def folder(self) -> Path:
        """Of the images, or their archive."""
        return self.images.root

    @property
    def files(self) -> Files:
        """(file, label) of every image, sorted."""
        return self.images.files

    @property
    def class_names(self) -> tuple[str, ...]:
        """One name per class."""
        return self.images.class_names

    @property
    def rows(self) -> int:
        """N, one for every file."""
        return len(self.files)

    @property
    def chunk_rows(self) -> int:
        """Rows of a chunk."""
        return min(CHUNK_ROWS, self.shard_rows)

    @property
    def views(self) -> int:
        """V."""
        return self.augmentation.count

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.rows // self.shard_rows)

    @property
    def stored(self) -> dict[str, StoredArray]:
        """The sharded arrays by name, one view of one image of each."""
        return self.tokenizer.stored_arrays(self.tokenizer.spec)

    def crops_of(self, files: list[Entry]) -> tuple[list[np.ndarray], list[str | None]]:
        """The crops that views are cut out of, (n, 3, side, side) uint8 for every side, and for
        every file None or why it cannot be read: at one side is enough to leave it out."""
        sides = self.augmentation.sides(self.tokenizer.image_size)
        crops = [np.zeros((len(files), 3, side, side), np.uint8) for side in sides]
        reasons = [self.decoder.decode(files, crop) for crop in crops]
        of_files = zip(*reasons, strict=True)
        return crops, [next(filter(None, found), None) for found in of_files]

    def head(self) -> dict[str, Any]:
        """The manifest but for contents."""
        arrays = {
            name: {"dtype": array.dtype, "shape": [self.rows, self.views, *array.shape]}
            for name, array in self.stored.items()
        }
        return {
            "format": FORMAT,
            "made_by": "heptapod_fast",
            "rows": self.rows,
            "views": self.views,
            **self.augmentation.describe(),
            "shard_rows": self.shard_rows,
            "chunk_rows": self.chunk_rows,
            "arrays": arrays,
            "tokenizer": self.tokenizer.describe(),
            "preprocessing": self.decoder.preprocessing,
            "image_size": self.tokenizer.image_size,
            "dataset": {
                "folder": str(self.folder.resolve()),
                "files": self.rows,
                "fingerprint": self._fingerprint(),
                "class_names": list(self.class_names),
            },
            "order": {"kind": "philox4x64 argsort, epoch 0", "seed": self.seed},
            # `Site.finish` adds what each shard was encoded on.
            "encoding": {
                "batch": self.batch,
                "device": self.tokenizer.device.type,
                "torch": torch.__version__,
            },
        }

    def _fingerprint(self) -> str:
        """sha256 over relative path, label and bytes of every file."""
        digest = hashlib.sha256()
        for file, label in self.files:
            digest.update(os.fsencode(file.inner))
            digest.update(f"\0{label}\0{file.size()}\n".encode())
        return digest.hexdigest()


# ------------------------------------------------------------------------- comparing with another

_FLAGS = {
    "tokenizer": "--tokenizer, --tokenizer-weights, --patch-size, --codes or --image-size",
    "views": "--views or --flip",
    "augmentation": "--views or --crop-ranges",
    "shard_rows": "--shard-rows",
    "dataset": "the images of --data",
    "preprocessing": "--decoder",
    "order": "--seed",
    "encoding": "--batch or --device",
    "image_size": "--image-size",
}
# Where things lie may change; what shards were encoded on is known of those that are done.
_FREE = ("folder", "weights", "hardware")
# Differences of these entries are said in other words than their values.
_UNSAID = (*_FREE, "fingerprint", "weights_sha256", "class_names")


def changes(path: Path, before: dict[str, Any], now: dict[str, Any]) -> str:
    """What to say of a cache that was begun with other settings; empty if it was not.

    before, now: `Plan.head`, or a whole manifest.
    """
    changed = [key for key in now if _contents(before.get(key)) != _contents(now[key])]
    if not changed:
        return ""
    lines = [f"{_FLAGS.get(key, key)}: {_difference(before.get(key), now[key])}" for key in changed]
    return (
        f"{path} was begun with other settings; repeat them to go on, or remove it to begin "
        "anew" + listing(lines, len(lines), 20)
    )


def _contents(value: Any) -> Any:
    """An entry of a plan without what may change."""
    if not isinstance(value, dict):
        return value
    return {key: part for key, part in value.items() if key not in _FREE}


def _difference(before: Any, now: Any) -> str:
    """What differs between two entries of a plan."""
    if not isinstance(before, dict) or not isinstance(now, dict):
        return f"{json.dumps(now)}, was {json.dumps(before)}"
    parts = []
    if "class_names" in now:
        parts += _class_differences(before.get("class_names", []), now["class_names"])
    for key, value in now.items():
        if key not in _UNSAID and before.get(key) != value:
            parts.append(f"{key} {json.dumps(value)}, was {json.dumps(before.get(key))}")
    if parts:
        return "; ".join(parts)
    return "other file names, sizes or classes" if "class_names" in now else "other weights"


def _class_differences(before: list[str], now: list[str]) -> list[str]:
    """Classes that came and classes that went."""
    new = [name for name in now if name not in set(before)]
    missing = [name for name in before if name not in set(now)]
    found = []
    for word, names in (("new", new), ("missing", missing)):
        if names:
            more = ", ..." if len(names) > 5 else ""
            found.append(f"{len(names)} {word} classes ({', '.join(names[:5])}{more})")
    return found
