"""From the settings of tools/cache.py to a finished cache, alone or together with other ranks."""

from __future__ import annotations

import os
import shlex
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from heptapod_fast.classes import numbered
from heptapod_fast.data.cache.builder import Builder
from heptapod_fast.data.cache.format import (
    BUILDING,
    CODEBOOK,
    MANIFEST,
    SHARD_ROWS,
    Cache,
    open_cache,
)
from heptapod_fast.data.cache.plan import Plan
from heptapod_fast.data.cache.site import PLAN_FILE, Site, SiteState, lock_cache
from heptapod_fast.data.decoding import open_decoder, read_sizes
from heptapod_fast.data.files import Files, find_images, refuse_broken, refuse_small
from heptapod_fast.data.order import sample_ids
from heptapod_fast.data.pixels import Decoder
from heptapod_fast.data.views import CROP_RANGES, Views
from heptapod_fast.progress import Progress, duration
from heptapod_fast.tokenizers import (
    FITTED,
    PRETRAINED,
    TOKENIZERS,
    Tokenizer,
    hint,
    load_tokenizer,
    token_spec,
)
from heptapod_fast.world import World

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class CacheSettings:
    """Encode a folder of images into a Zarr cache for tools/train.py --data CACHE.zarr."""

    data: str
    """Folder of images: one class per subfolder, or a flat folder, one class. Or a .tar or .zip of
    such a folder, not unpacked (ARCHIVE, or ARCHIVE/FOLDER for a folder inside of it)."""
    out: str
    """The cache, a folder whose name ends in .zarr."""
    tokenizer: Literal["kl16", "vq16", "patch", "patch-vq"]
    """Token kind: kl16 and patch are continuous, vq16 and patch-vq discrete."""
    tokenizer_weights: str | None = None
    """Published weights of kl16 or vq16; for patch-vq a fitted codebook (default: fit one)."""
    image_size: int = 256
    """Side of the images in pixels (ADM's centre crop)."""
    patch_size: int | None = None
    """Side of a patch in pixels (patch, patch-vq; default 16 from 128 pixels on, else 4)."""
    codes: int | None = None
    """Size of the patch-vq codebook."""
    views: Literal["plain", "flip", "ten-crop"] | None = None
    """What is stored of every image (default: plain): flip, its mirror image too; ten-crop, corners
    and centre, each also mirrored, of a larger crop, as LlamaGen trains on. Training draws one."""
    flip: bool = False
    """The same as --views flip."""
    crop_ranges: tuple[float, ...] | None = None
    """For ten-crop: how much larger than the image the crop is, ten views for each; default: 1.1
    and 1.05."""
    max_broken: int = 0
    """Unreadable images that may be left out; they are listed in the manifest."""
    allow_upscale: bool = False
    """Enlarge images that are far smaller than --image-size instead of refusing them."""
    decoder: Literal["auto", "pillow", "dali"] = "auto"
    """Reads the images: auto takes DALI where it is installed, else Pillow. It goes into the
    manifest; pixels differ by a rounding here and there."""
    workers: int | None = None
    """Threads per process that decode, and as many that encode on a CPU (default: its share of the
    cores). They do not change the bytes."""
    batch: int = 64
    """Images encoded at once."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What kl16 and vq16 compute in; bfloat16 moves latents by a few per cent of their spread."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to encode."""
    seed: int = 0
    """Seed of the order of the rows, and of patch-vq's codebook."""
    shard_rows: int = SHARD_ROWS
    """Images per shard, which one process builds; for small sets on many processes, fewer."""

    @property
    def folder(self) -> Path:
        """Of the images."""
        return Path(self.data)

    @property
    def path(self) -> Path:
        """Of the cache."""
        return Path(self.out)

    @property
    def augmentation(self) -> Views:
        """The views that are stored."""
        kind = self.views or ("flip" if self.flip else "plain")
        if kind == "ten-crop":
            return Views(kind, self.crop_ranges or CROP_RANGES)
        return Views(kind)

    @property
    def is_begun(self) -> bool:
        """Whether there is a plan, or more than that."""
        return (self.path / MANIFEST).exists() or (self.path / BUILDING / PLAN_FILE).exists()

    @property
    def fits_codebook(self) -> bool:
        """Whether a codebook is fitted on the images before they are encoded."""
        return self.tokenizer in FITTED and self.tokenizer_weights is None

    def with_patch_size(self) -> CacheSettings:
        """patch_size by the size of the images, for tokenizers that leave it open."""
        if self.patch_size is not None or self.tokenizer in PRETRAINED:
            return self
        return replace(self, patch_size=16 if self.image_size >= 128 else 4)


def make_cache(settings: CacheSettings, world: World, say: Say) -> None:
    """Builds a cache, or goes on with one. Collective call: every rank must reach it.

    The main rank locks the folder and keeps the books; shards are spread over all ranks.

    Args:
        say: takes lines to be printed; called on the main rank.

    Raises:
        FileNotFoundError, ValueError, CacheError: settings, images or weights that cannot be used,
            or a cache that cannot be gone on with.
    """
    begin = time.monotonic()
    settings = settings.with_patch_size()
    _check_settings(settings)
    threads = _threads_of(settings, world)
    images = find_images(settings.folder, _listing_progress(world))
    files = images.files
    if world.main:
        for line in [*images.notes, f"classes: {numbered(images.class_names)}"]:
            say(f"found     {line}")
    decoder = open_decoder(settings.decoder, world.device, threads)
    if world.main and not settings.is_begun:
        _check_images(settings, files)
    # Weights are read before the folder is made: a wrong name leaves nothing behind.
    tokenizer = None if settings.fits_codebook else _load(settings, settings.tokenizer_weights)
    lock = lock_cache(settings.path) if world.main else None
    if tokenizer is None:
        tokenizer = _fitted(settings, world, files, decoder)
    plan = Plan(
        images,
        tokenizer.to(world.device),
        decoder,
        settings.augmentation,
        settings.batch,
        settings.seed,
        settings.shard_rows,
        settings.max_broken,
    )
    site = Site(settings.path, plan)
    builder = Builder(site, threads)
    _build_together(site, builder, world, say)
    if lock is not None:
        lock.close()
        took = duration(time.monotonic() - begin)
        for line in _report(open_cache(settings.path), builder.seconds, took):
            say(line)


def _build_together(site: Site, builder: Builder, world: World, say: Say) -> None:
    """Everything between the lock and its release. Collective call."""
    plan = site.plan
    with world.together():
        is_mine_to_finish = world.main and site.begin() is not SiteState.COMPLETE
    if is_mine_to_finish:
        say(
            f"building  {site.path}: {plan.rows:,} images, {len(plan.class_names)} classes, "
            f"{plan.shards} shard{'s' * (plan.shards > 1)}"
        )
    # Nobody finishes a shard before everybody has seen what is missing.
    with world.together():
        missing = site.missing()
    if world.main and missing:
        _say_what_is_done(site, builder, plan.shards - len(missing), say)
    progress = _progress(world) if world.main else None
    # Not `together`: who fails here must not wait for those who have hours to go.
    builder.build(missing[world.rank :: world.size], progress)
    world.barrier()
    if is_mine_to_finish:
        site.finish()


def _listing_progress(world: World) -> Progress | None:
    return Progress("reading the archive's contents", "MiB") if world.main else None


def _progress(world: World) -> Progress:
    if world.size == 1:
        return Progress("encoding")
    return Progress(f"encoding, 1 of {world.size} parts")


def _say_what_is_done(site: Site, builder: Builder, done: int, say: Say) -> None:
    """How many shards are done, and whether those that follow may be rounded in another way."""
    if done:
        say(f"going on  {done} shards are done")
    for hardware, shards in site.hardware().items():
        if hardware == builder.hardware:
            continue
        where = hardware or "hardware that was not recorded"
        say(
            f"WARNING: {len(shards)} shards were encoded on {where}, the others will be on "
            f"{builder.hardware}: their tokens may be rounded in another way. The manifest will "
            "list what each shard was encoded on"
        )


# --------------------------------------------------------------------------- before there is a plan


def _check_settings(settings: CacheSettings) -> None:
    """Everything that can be said without looking at images.

    Raises:
        FileNotFoundError, ValueError: name the flag.
    """
    name = settings.tokenizer
    if settings.path.suffix != ".zarr":
        raise ValueError(
            f"--out {settings.out}: expected a name that ends in .zarr, by which other tools know "
            "what it is"
        )
    if settings.flip and settings.views not in (None, "flip"):
        raise ValueError(f"--flip and --views {settings.views}: give one of them")
    if settings.crop_ranges is not None and settings.augmentation.kind != "ten-crop":
        raise ValueError("--crop-ranges needs --views ten-crop")
    spec = token_spec(name, settings.image_size, settings.patch_size, settings.codes)
    TOKENIZERS[name].stored_arrays(spec)
    weights = settings.tokenizer_weights
    if name in PRETRAINED:
        if weights is None:
            raise ValueError(hint(name))
    else:
        if weights is not None and name not in FITTED:
            raise ValueError(f"--tokenizer-weights given, but --tokenizer {name} has no weights")
        if settings.dtype != "float32":
            raise ValueError(f"--dtype {settings.dtype}: --tokenizer {name} works in float32")
    if weights is not None and not Path(weights).exists():
        raise FileNotFoundError(f"{weights}: no such file; check --tokenizer-weights")
    if settings.path.resolve().is_relative_to(settings.folder.resolve()):
        raise ValueError(
            f"--out {settings.out} lies inside --data {settings.data}, where it would be "
            "taken for images: choose another place"
        )
    if settings.workers is not None and settings.workers < 1:
        raise ValueError(f"--workers {settings.workers}: expected at least 1")


def _threads_of(settings: CacheSettings, world: World) -> int:
    """--workers, or this process's share of the CPU cores."""
    if settings.workers is not None:
        return settings.workers
    return max(1, (os.cpu_count() or 1) // world.local_size)


def _check_images(settings: CacheSettings, files: Files) -> None:
    """Looks at the header of every file before hours are spent.

    Raises:
        ValueError: too many files that cannot be read, or images that are too small.
    """
    folder = settings.folder
    sizes = read_sizes([file for file, _ in files], Progress("looking at headers"))
    broken = refuse_broken(folder, files, sizes, settings.max_broken)
    if len(broken) == len(files):
        raise ValueError(
            f"{folder}: none of its {len(files)} images can be read (first: "
            f"{broken[0][1]}): choose another --data"
        )
    crop_range = max(settings.augmentation.crop_ranges, default=1.0)
    refuse_small(folder, files, sizes, settings.image_size, settings.allow_upscale, crop_range)


def _load(settings: CacheSettings, weights: str | Path | None) -> Tokenizer:
    sizes: dict[str, int | None] = {
        "image_size": settings.image_size,
        "patch_size": settings.patch_size,
    }
    if settings.tokenizer in FITTED:
        sizes["codes"] = settings.codes
    return load_tokenizer(settings.tokenizer, weights, getattr(torch, settings.dtype), **sizes)


def _fitted(settings: CacheSettings, world: World, files: Files, decoder: Decoder) -> Tokenizer:
    """A tokenizer with a codebook fitted on the images, by the main rank, or by an earlier start.
    Collective call."""
    finished = settings.path / CODEBOOK
    fresh = settings.path / BUILDING / CODEBOOK
    with world.together():
        if world.main and not settings.is_begun:
            fresh.unlink(missing_ok=True)  # of a start that ended before there was a plan
        if world.main and not finished.exists() and not fresh.exists():
            progress = Progress("fitting the codebook", "rounds")
            fit_codebook(settings, files, decoder, progress).save(fresh)
    return _load(settings, finished if finished.exists() else fresh)


def fit_codebook(
    settings: CacheSettings,
    files: Files,
    decoder: Decoder,
    progress: Callable[[int, int], None] | None = None,
) -> Tokenizer:
    """A codebook from as many random images as a fit looks at.

    Raises:
        ValueError: no image of the sample can be read.
    """
    name = settings.tokenizer
    side = settings.image_size
    spec = token_spec(name, side, settings.patch_size, settings.codes)
    count = min(len(files), FITTED[name].images_to_fit(spec))
    chosen = sample_ids(torch.arange(count), len(files), settings.seed).sort().values.tolist()
    pixels = torch.empty(count, 3, side, side, dtype=torch.uint8)
    reasons = decoder.decode([files[k][0] for k in chosen], pixels.numpy())
    good = [k for k, reason in enumerate(reasons) if reason is None]
    if not good:
        raise ValueError(f"none of {count} images can be read (first: {reasons[0]}): check --data")
    patch_size = settings.patch_size
    assert patch_size is not None  # `token_spec` refuses that
    return FITTED[name].fit(
        pixels[good], side, patch_size, spec.vocabulary, settings.seed, progress
    )


# ------------------------------------------------------------------------------------- at the end


def _report(cache: Cache, seconds: dict[str, float], took: str) -> list[str]:
    """What was built, where the time went, what to do next."""
    left_out = cache.manifest["quarantine"]
    views = f"{cache.views} view{'s' * (cache.views > 1)} ({cache.augmentation})"
    lines = [
        f"finished  {cache.path}: {cache.rows - len(left_out):,} images, {views}, "
        f"{cache.nbytes / 1e6:,.1f} MB, {took}"
    ]
    total = sum(seconds.values())
    if total:
        shares = ", ".join(f"{name} {part / total:.0%}" for name, part in seconds.items())
        lines.append(
            f"time      {shares} (what this process waited for; decoding and encoding overlap)"
        )
    kinds = Counter(cache.hardware)
    if len(kinds) > 1:
        parts = [f"{count} shards on {kind or 'unknown'}" for kind, count in kinds.items()]
        lines.append(f"encoded   {', '.join(parts)}: roundings may differ")
    for entry in left_out[:20]:
        lines.append(f"left out  {entry['path']}: {entry['reason']}")
    if len(left_out) > 20:
        lines.append(f"left out  {len(left_out)} in all, listed in {cache.path / MANIFEST}")
    quoted = shlex.quote(str(cache.path))
    lines.append(f"next      python tools/train.py --size SIZE --data {quoted}")
    return lines
