"""Tokens of a folder of images, made once: `python tools/cache.py --data FOLDER --out CACHE.zarr`.

Under torchrun every process builds its share of the shards. The same command run again continues
where it stopped, with as many processes as it likes, and ends with the same bytes.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Literal

from _cli import main, parse


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Encode a folder of images into a Zarr cache for tools/train.py --data CACHE.zarr."""

    data: str
    """Folder of images: one class per subfolder, or a flat folder, one class."""
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
    flip: bool = False
    """Store mirror images as a second view, for training with --flip."""
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
    shard_rows: int = 8192
    """Images per shard, which one process builds; for small sets on many processes, fewer."""


def work() -> int:
    """Parse, build, say what was built."""
    arguments = parse(Arguments)
    if arguments.patch_size is None and arguments.tokenizer in ("patch", "patch-vq"):
        arguments = replace(arguments, patch_size=16 if arguments.image_size >= 128 else 4)
    from heptapod_fast.train import parallel

    # A rank with a shard more than the others may have hours to go.
    world = parallel.start(arguments.device, patience=timedelta(days=7))
    try:
        return build(arguments, world)
    except KeyboardInterrupt:
        print("interrupted: finished shards stay, the same command goes on", file=sys.stderr)
        return 130
    finally:
        parallel.stop(world)


def build(given: Arguments, world) -> int:
    """Claim the folder, agree on a plan, build this process's shards, finish."""
    from heptapod_fast.data.cache_build import look, make_plan, report, threads_of
    from heptapod_fast.data.cache_site import claim
    from heptapod_fast.data.cache_writer import Builder
    from heptapod_fast.progress import Progress, duration

    if not given.out.rstrip("/").endswith(".zarr"):
        raise ValueError(
            f"--out {given.out}: expected a name that ends in .zarr, by which "
            "tools/train.py --data knows caches"
        )
    begin, path, found = time.monotonic(), Path(given.out), look(given, world)
    lock = claim(path) if world.main else None
    plan = make_plan(given, world, found)
    builder = Builder(path, plan, threads_of(given, world))
    if world.main and builder.begin():
        print(
            f"building  {path}: {len(plan.files):,} images, {len(plan.class_names)} classes, "
            f"{plan.shards} shard{'s' * (plan.shards > 1)}",
            flush=True,
        )
    world.barrier()
    missing = builder.missing()
    world.barrier()  # nobody finishes a shard before everybody has seen what is missing
    if missing and world.main and len(missing) < plan.shards:
        print(f"going on  {plan.shards - len(missing)} shards are done", flush=True)
    builder.build(
        missing[world.rank :: world.size],
        Progress("encoding" if world.size == 1 else f"encoding, 1 of {world.size} parts")
        if world.main
        else None,
    )
    world.barrier()
    if world.main:
        if builder.work.exists():
            builder.finish()
        lock.close()
        print(report(path, builder.seconds, duration(time.monotonic() - begin)), flush=True)
    return 0


if __name__ == "__main__":
    main(work)
