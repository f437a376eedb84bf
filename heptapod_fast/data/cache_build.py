"""What tools/cache.py does before and after a cache is built."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch

from heptapod_fast.data.cache_format import BUILDING, CODEBOOK, MANIFEST, open_cache
from heptapod_fast.data.cache_plan import Plan, check_images, fit_codebook
from heptapod_fast.data.cache_writer import PLAN
from heptapod_fast.data.decoding import open_decoder
from heptapod_fast.data.files import find_images
from heptapod_fast.progress import Progress
from heptapod_fast.tokenizers import (
    PRETRAINED,
    Tokenizer,
    hint,
    load_tokenizer,
    token_spec,
)


def prepare(given, world) -> Plan:
    """The plan of a cache from the settings of tools/cache.py; equal on all ranks.

    given: the fields of tools/cache.py. The main rank looks at every image's header, and fits a
    codebook where one is needed, which the others then read.

    Raises:
        FileNotFoundError, ValueError: settings, images or weights that cannot be used.
    """
    if given.patch_size is None and given.tokenizer not in PRETRAINED:
        given = replace(given, patch_size=16 if given.image_size >= 128 else 4)
    token_spec(given.tokenizer, given.image_size, given.patch_size, given.codes)
    _check_weights(given)
    folder, out = Path(given.data), Path(given.out)
    class_names, files = find_images(folder)
    decoder = open_decoder(given.decoder, world.device, threads_of(given, world))
    begun = any((out / name).exists() for name in (MANIFEST, f"{BUILDING}/{PLAN}"))
    if world.main and not begun:
        check_images(folder, files, given.image_size, given.max_broken, given.allow_upscale)
    if world.main and not begun:  # of a start that ended before there was a plan
        (out / BUILDING / CODEBOOK).unlink(missing_ok=True)
    codebook = next((path for path in (out / CODEBOOK, out / BUILDING / CODEBOOK)
                     if path.exists()), out / BUILDING / CODEBOOK)
    if world.main and given.tokenizer == "patch-vq" and not codebook.exists():
        if given.tokenizer_weights is not None:
            _load(given, given.tokenizer_weights).save(codebook)
        else:
            fit_codebook(files, decoder, given.image_size, given.patch_size, given.codes,
                         given.seed, Progress("fitting the codebook", "rounds")).save(codebook)
    world.barrier()
    weights = codebook if given.tokenizer == "patch-vq" else given.tokenizer_weights
    return Plan(folder, files, class_names, _load(given, weights).to(world.device), decoder,
                given.flip, given.batch, given.seed, given.shard_rows, given.max_broken)


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
    lines = [f"finished  {path}: {cache.rows - len(about['quarantine']):,} images, "
             f"{cache.views} view{'s' * (cache.views > 1)}, {cache.nbytes / 1e6:,.1f} MB, {took}"]
    if total:
        lines.append("time      " + ", ".join(f"{name} {part / total:.0%}"
                                              for name, part in seconds.items())
                     + " (what this process waited for; decoding, encoding and writing overlap)")
    for entry in about["quarantine"][:20]:
        lines.append(f"left out  {entry['path']}: {entry['reason']}")
    if len(about["quarantine"]) > 20:
        lines.append(f"left out  {len(about['quarantine'])} in all, listed in {path / MANIFEST}")
    lines.append(f"next      python tools/train.py --size SIZE --data {path}")
    return "\n".join(lines)
