"""What a cache of tokens will hold, fixed before the first image is encoded."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from heptapod_fast.data.cache_format import CHUNK_ROWS, FORMAT
from heptapod_fast.data.decoding import Decoder, read_sizes
from heptapod_fast.data.files import Files, listing, refuse_broken, refuse_small
from heptapod_fast.data.order import sample_ids
from heptapod_fast.tokenizers import PatchVQ, Tokenizer, stored_arrays, token_spec
from heptapod_fast.tokenizers.patch_vq import FIT_PATCHES


@dataclass
class Plan:
    """What a cache will hold; equal plans give equal bytes.

    Attributes:
        folder: the folder of images. files: its (path, label) pairs in sorted order.
        class_names: one name per class.
        tokenizer: ready to use, on its device.
        decoder: reads the images.
        flip: store a second, mirrored view.
        batch: images encoded at once.
        seed: of the order of the rows.
        shard_rows: rows of a shard.
        max_broken: images that may be left out because they cannot be read.
    """

    folder: Path
    files: Files
    class_names: tuple[str, ...]
    tokenizer: Tokenizer
    decoder: Decoder
    flip: bool
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
        index = torch.arange(len(self.files))
        self.order = sample_ids(index, len(index), self.seed).numpy().astype("<i4")

    @property
    def chunk_rows(self) -> int:
        """Rows of a chunk."""
        return min(CHUNK_ROWS, self.shard_rows)

    @property
    def views(self) -> int:
        """V."""
        return 2 if self.flip else 1

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-len(self.files) // self.shard_rows)

    def head(self) -> dict[str, Any]:
        """The manifest but for contents."""
        names, rows = stored_arrays(self.tokenizer.spec), len(self.files)
        return {
            "format": FORMAT,
            "made_by": "heptapod_fast",
            "rows": rows,
            "views": self.views,
            "shard_rows": self.shard_rows,
            "chunk_rows": self.chunk_rows,
            "arrays": {
                name: {"dtype": dtype, "shape": [rows, self.views, *shape]}
                for name, (dtype, shape) in names.items()
            },
            "tokenizer": self.tokenizer.describe(),
            "preprocessing": self.decoder.preprocessing,
            "image_size": self.tokenizer.image_size,
            "dataset": {
                "folder": str(self.folder.resolve()),
                "files": rows,
                "fingerprint": self._fingerprint(),
                "class_names": list(self.class_names),
            },
            "order": {"kind": "philox4x64 argsort, epoch 0", "seed": self.seed},
            "encoding": {
                "batch": self.batch,
                "device": self.tokenizer.device.type,
                "torch": torch.__version__,
            },
        }

    def _fingerprint(self) -> str:
        """sha256 over relative path, label and bytes of every file."""
        digest = hashlib.sha256()
        for path, label in self.files:
            digest.update(os.fsencode(path.relative_to(self.folder).as_posix()))
            digest.update(f"\0{label}\0{size_of(path)}\n".encode())
        return digest.hexdigest()


def size_of(path: Path) -> int:
    """Bytes of a file, -1 if there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return -1


def check_images(
    folder: Path,
    files: Files,
    image_size: int,
    max_broken: int,
    allow_upscale: bool,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Looks at the header of every file before hours are spent.

    Raises:
        ValueError: too many files that cannot be read, or images that are too small.
    """
    sizes = read_sizes([path for path, _ in files], progress)
    broken = refuse_broken(folder, files, sizes, max_broken)
    if len(broken) == len(files):
        raise ValueError(
            f"{folder}: none of its {len(files)} images can be read (first: "
            f"{broken[0][1]}): choose another --data"
        )
    refuse_small(folder, files, sizes, image_size, allow_upscale)


def fit_codebook(
    files: Files,
    decoder: Decoder,
    image_size: int,
    patch_size: int,
    codes: int | None,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> PatchVQ:
    """patch-vq's codebook from as many random images as `PatchVQ.fit` looks at.

    Raises:
        ValueError: no image of the sample can be read.
    """
    spec = token_spec("patch-vq", image_size, patch_size, codes)
    count = min(len(files), -(-FIT_PATCHES // spec.num_tokens))
    chosen = sample_ids(torch.arange(count), len(files), seed).sort().values.tolist()
    pixels = torch.empty(count, 3, image_size, image_size, dtype=torch.uint8)
    reasons = decoder.decode([files[k][0] for k in chosen], pixels.numpy())
    good = [k for k, reason in enumerate(reasons) if reason is None]
    if not good:
        raise ValueError(f"none of {count} images can be read (first: {reasons[0]}): check --data")
    return PatchVQ.fit(pixels[good], image_size, patch_size, spec.vocabulary, seed, progress)


_FLAGS = {
    "tokenizer": "--tokenizer, --tokenizer-weights, --patch-size, --codes or --image-size",
    "views": "--flip",
    "shard_rows": "--shard-rows",
    "dataset": "the images of --data",
    "preprocessing": "--decoder",
    "order": "--seed",
    "encoding": "--batch or --device",
    "image_size": "--image-size",
}


def changes(path: Path, before: dict, now: dict) -> str:
    """What to say of a cache that was begun with other settings; empty if it was not."""
    changed = [key for key in now if _contents(before.get(key)) != _contents(now[key])]
    if not changed:
        return ""
    lines = [f"{_FLAGS.get(key, key)}: {_difference(before.get(key), now[key])}" for key in changed]
    return (
        f"{path} was begun with other settings; repeat them to go on, or remove it to begin "
        "anew" + listing(lines, len(lines), 20)
    )


def _contents(value: Any) -> Any:
    """An entry of a plan without the places where things lie, which may change."""
    return (
        {key: part for key, part in value.items() if key not in ("folder", "weights")}
        if isinstance(value, dict)
        else value
    )


def _difference(before: Any, now: Any) -> str:
    """What differs between two entries of a plan."""
    if not isinstance(before, dict) or not isinstance(now, dict):
        return f"{json.dumps(now)}, was {json.dumps(before)}"
    parts = []
    if "class_names" in now:
        old, new = before.get("class_names", []), now["class_names"]
        for word, names in (
            ("new classes", [n for n in new if n not in set(old)]),
            ("missing classes", [n for n in old if n not in set(new)]),
        ):
            if names:
                parts.append(
                    f"{len(names)} {word} ({', '.join(names[:5])}"
                    f"{', ...' if len(names) > 5 else ''})"
                )
    for key, value in now.items():
        if key in ("folder", "weights", "fingerprint", "weights_sha256", "class_names"):
            continue
        if before.get(key) != value:
            parts.append(f"{key} {json.dumps(value)}, was {json.dumps(before.get(key))}")
    return "; ".join(parts) or (
        "other file names, sizes or classes" if "class_names" in now else "other weights"
    )
