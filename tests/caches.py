"""Small folders of images, the caches that are made from them, and ways to spoil those."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from heptapod_fast.data.cache.builder import build_cache
from heptapod_fast.data.cache.format import MANIFEST, seal
from heptapod_fast.data.cache.plan import Plan
from heptapod_fast.data.decoding import PillowDecoder
from heptapod_fast.data.files import find_images
from heptapod_fast.data.views import Views
from heptapod_fast.storage import checksum
from heptapod_fast.tokenizers import Patch, PatchVQ

CLASSES = ("ant", "bee", "cat")


def image_folder(path: Path, count: int = 70, size: int = 16) -> Path:
    """Random PNG images in three classes."""
    generator = np.random.default_rng(0)
    for k in range(count):
        file = path / CLASSES[k % 3] / f"{k:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(file)
    return path


def small_tokenizer(name: str = "patch-vq", size: int = 16, codes: int = 300):
    """A tokenizer with patches of 4 pixels; the codebook is random."""
    if name == "patch":
        return Patch(size, 4)
    generator = torch.Generator().manual_seed(1)
    return PatchVQ(torch.rand(codes, 48, generator=generator) * 2 - 1, size, 4)


def small_plan(folder: Path, tokenizer=None, **settings) -> Plan:
    """A plan with shards of 16 rows and both views."""
    values = dict(batch=5, seed=3, shard_rows=16, max_broken=0) | settings
    values["augmentation"] = Views("flip" if values.pop("flip", True) else "plain")
    return Plan(find_images(folder), tokenizer or small_tokenizer(), PillowDecoder(2), **values)


def small_cache(path: Path, tokenizer=None, count: int = 70, **settings):
    """A finished cache `path/c.zarr` of the images in `path/images`."""
    folder = path / "images"
    if not folder.exists():
        image_folder(folder, count)
    return build_cache(path / "c.zarr", small_plan(folder, tokenizer, **settings))


def contents(path: Path) -> dict[str, bytes]:
    """Every file of a cache."""
    return {
        p.relative_to(path).as_posix(): p.read_bytes()
        for p in sorted(path.rglob("*"))
        if p.is_file()
    }


def edit_manifest(path: Path, change) -> None:
    """Let `change(manifest)` change it in place."""
    manifest = json.loads((path / MANIFEST).read_text())
    change(manifest)
    (path / MANIFEST).write_text(json.dumps(seal(manifest)))


def sign(path: Path) -> None:
    """Make the manifest agree with the files, as whoever wrote wrong values would have it."""

    def change(manifest):
        for name in manifest["files"]:
            file = path / name
            manifest["files"][name] = {"bytes": file.stat().st_size, "crc32c": checksum(file)}

    edit_manifest(path, change)
