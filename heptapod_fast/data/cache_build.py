"""What tools/cache.py does before and after a cache is built."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path

import torch

from heptapod_fast.data.cache_format import BUILDING, CODEBOOK, MANIFEST, open_cache
from heptapod_fast.data.cache_plan import Plan, check_images, fit_codebook
from heptapod_fast.data.cache_site import PLAN
from heptapod_fast.data.decoding import Decoder, open_decoder
from heptapod_fast.data.files import Files, find_images
from heptapod_fast.progress import Progress
from heptapod_fast.tokenizers import (
    PRETRAINED,
    Tokenizer,
    hint,
    load_tokenizer,
    stored_arrays,
    token_spec,
)


@dataclass(frozen=True)
class Found:
    """What a cache will be built from. tokenizer: None for a codebook still to be fitted."""

    class_names: tuple[str, ...]
    files: Files
    decoder: Decoder
    tokenizer: Tokenizer | None


def look(given, world) -> Found:
    """Opens everything that the settings of tools/cache.py name; makes nothing.

    given: the fields of tools/cache.py. The main rank looks at every image's header, unless the
    cache was begun before.

    Raises:
        FileNotFoundError, ValueError: settings, images or weights that cannot be used.
    """
    stored_arrays(token_spec(given.tokenizer, given.image_size, given.patch_size, given.codes))
    _check_weights(given)
    if Path(given.out).resolve().is_relative_to(Path(given.data).resolve()):
        raise ValueError(
            f"--out {given.out} lies inside --data {given.data}, where it would be "
            "taken for images: choose another place"
        )
    class_names, files = find_images(Path(given.data))
    decoder = open_decoder(given.decoder, world.device, threads_of(given, world))
    begun = any((Path(given.out) / name).exists() for name in (MANIFEST, f"{BUILDING}/{PLAN}"))
    if world.main and not begun:
        check_images(
            Path(given.data),
            files,
            given.image_size,
            given.max_broken,
            given.allow_upscale,
            Progress("looking at headers"),
        )
    fitted = given.tokenizer == "patch-vq" and given.tokenizer_weights is None
    tokenizer = None if fitted else _load(given, given.tokenizer_weights)
    return Found(class_names, files, decoder, tokenizer)


def make_plan(given, world, found: Found) -> Plan:
    """The plan, equal on all ranks. The main rank, which has claimed the folder, fits a codebook
    where one is needed, and the others read it."""
    out, tokenizer = Path(given.out), found.tokenizer
    if tokenizer is None:
        fresh = out / BUILDING / CODEBOOK
        if world.main and not (out / BUILDING / PLAN).exists():
            fresh.unlink(missing_ok=True)  # of a start that ended before there was a plan
        there = [path for path in (out / CODEBOOK, fresh) if path.exists()]
        if world.main and not there:
            fit_codebook(
                found.files,
                found.decoder,
                given.image_size,
                given.patch_size,
                given.codes,
                given.seed,
                Progress("fitting the codebook", "rounds"),
            ).save(fresh)
        world.barrier()
        tokenizer = _load(given, (there or [fresh])[0])
    return Plan(
        Path(given.data),
        found.files,
        found.class_names,
        tokenizer.to(world.device),
        found.decoder,
        given.flip,
        given.batch,
        given.seed,
        given.shard_rows,
        given.max_broken,
    )


def _check_weights(given) -> None:
    weights = given.tokenizer_weights
    if given.tokenizer == "patch" and weights is not None:
        raise ValueError("--tokenizer-weights given, but --tokenizer patch has no weights")
    if given.tokenizer in PRETRAINED and weights is None:
        raise ValueError(hint(given.tokenizer))
    if weights is not None and not Path(weights).exists():
        raise FileNotFoundError(f"{weights}: no such file; check --tokenizer-weights")
    if given.dtype != "float32" and given.tokenizer not in PRETRAINED:
        raise ValueError(f"--dtype {given.dtype}: --tokenizer {given.tokenizer} works in float32")


def _load(given, weights: str | Path | None) -> Tokenizer:
    settings = dict(image_size=given.image_size, patch_size=given.patch_size)
    if given.tokenizer == "patch-vq":
        settings["codes"] = given.codes
    return load_tokenizer(given.tokenizer, weights, getattr(torch, given.dtype), **settings)


def threads_of(given, world) -> int:
    """--workers, or this process's share of the CPU cores."""
    if given.workers is not None and given.workers < 1:
        raise ValueError(f"--workers {given.workers}: expected at least 1")
    return given.workers or max(1, (os.cpu_count() or 1) // world.local[1])


def report(path: Path, seconds: dict[str, float], took: str) -> str:
    """The lines at the end: what was built, where the time went, what to do next."""
    cache = open_cache(path)
    about, total = cache.manifest, sum(seconds.values())
    lines = [
        f"finished  {path}: {cache.rows - len(about['quarantine']):,} images, "
        f"{cache.views} view{'s' * (cache.views > 1)}, {cache.nbytes / 1e6:,.1f} MB, {took}"
    ]
    if total:
        lines.append(
            "time      "
            + ", ".join(f"{name} {part / total:.0%}" for name, part in seconds.items())
            + " (what this process waited for; decoding and encoding overlap)"
        )
    for entry in about["quarantine"][:20]:
        lines.append(f"left out  {entry['path']}: {entry['reason']}")
    if len(about["quarantine"]) > 20:
        lines.append(f"left out  {len(about['quarantine'])} in all, listed in {path / MANIFEST}")
    lines.append(f"next      python tools/train.py --size SIZE --data {shlex.quote(str(path))}")
    return "\n".join(lines)
