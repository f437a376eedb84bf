"""Check a run, a cache or an exported folder byte by byte:
`python tools/verify.py RUN_DIR | CACHE.zarr | FOLDER`.

Exit code 1 on damage.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from _cli import main, parse, tyro

from heptapod_fast import checkpoints
from heptapod_fast.checkpoints import Checkpoint
from heptapod_fast.config import Config, is_cache
from heptapod_fast.data.cache import Cache, open_cache
from heptapod_fast.data.cache.check import find_damage
from heptapod_fast.progress import Progress
from heptapod_fast.runs import RunDir
from heptapod_fast.runs.exported import ExportedFolder
from heptapod_fast.runs.tokenizer import saved_tokenizer
from heptapod_fast.train.records import read_metrics


@dataclass(frozen=True)
class Arguments:
    """Verify every checkpoint of a run against its manifest, and its settings and metrics; or every
    shard of a cache, and what is stored in it; or every file of a folder of tools/export.py."""

    path: tyro.conf.Positional[str]
    """Run directory, a cache (its name ends in .zarr), or a folder of tools/export.py."""


def work() -> int:
    """Say what was checked and what is wrong."""
    path = parse(Arguments).path
    if is_cache(path):
        is_whole = verify_cache(path)
    elif ExportedFolder(path).is_there():
        is_whole = verify_exported(path)
    else:
        is_whole = verify_run(path)
    return 0 if is_whole else 1


# ----------------------------------------------------------------------------------------- a cache


def verify_cache(path: str) -> bool:
    """Check a cache of tokens; says whether it is whole."""
    cache = open_cache(path, look=False)
    describe_cache(cache)
    wrong = find_damage(cache, Progress("verifying", "shards"))
    for text in wrong:
        print(f"damaged: {text}")
    if wrong:
        print(f"{path}: {len(wrong)} problems")
    else:
        print(f"{path}: whole, {len(cache.manifest['files'])} files as they were written")
    return not wrong


def describe_cache(cache: Cache) -> None:
    """What a manifest says of its cache."""
    about = cache.manifest["tokenizer"]
    left_out = cache.manifest["quarantine"]
    print(
        f"manifest.json: {cache.rows - len(left_out):,} images, {cache.views} view"
        f"{'s' * (cache.views > 1)}, {len(cache.class_names)} classes, {about['tokenizer']} at "
        f"{about['image_size']} px, {cache.nbytes / 1e6:,.1f} MB, shards: {cache.shards}"
    )
    for hardware, shards in Counter(cache.hardware).items():
        print(f"encoded on: {hardware or 'not recorded'}, shards: {shards}")
    for entry in left_out:
        print(f"left out: {entry['path']}: {entry['reason']}")


# ----------------------------------------------------------------------------- an exported folder


def verify_exported(path: str) -> bool:
    """Check a folder of tools/export.py; says whether it is whole."""
    folder = ExportedFolder(path)
    index = folder.read_index()
    print(
        f"export.json: {index.system} {index.size}, {index.weights} of {index.checkpoint}, "
        f"{index.images_seen:,} images"
    )
    wrong = folder.damage(index)
    for text in wrong:
        print(f"damaged: {text}")
    if not wrong:
        print(f"{path}: whole, {len(index.files)} files as they were written")
    return not wrong


# ------------------------------------------------------------------------------------------- a run


def verify_run(path: str) -> bool:
    """Check a run directory; says whether it is whole."""
    run = RunDir(path)
    config = run.read_config()
    print(f"config.json: {config.system} {config.size} on {config.data.data}")
    if run.metrics.exists():
        print(f"metrics.jsonl: {len(read_metrics(run.metrics)):,} records")
    has_whole_snapshots = verify_snapshots(run)
    found = checkpoints.listed(run.checkpoints)
    if not found:
        print("no checkpoints")
        return False
    whole = []
    for folder in found:
        wrong = checkpoints.damage(folder)
        if wrong:
            print(f"{folder.name}: {'; '.join(wrong)}")
            continue
        checkpoint = checkpoints.load(folder)
        print(f"{folder.name}: whole, {checkpoint.state['images']:,} images")
        whole.append(checkpoint)
    if whole:
        verify_tokenizer(config, run, whole[-1])
    return len(whole) == len(found) and has_whole_snapshots


def verify_snapshots(run: RunDir) -> bool:
    """Check what `--ema post-hoc` keeps; says whether it is whole."""
    found = checkpoints.listed(run.averages)
    damaged = {folder: checkpoints.damage(folder) for folder in found}
    for folder, wrong in damaged.items():
        if wrong:
            print(f"averages/{folder.name}: {'; '.join(wrong)}")
    if found and not any(damaged.values()):
        print(f"averages: {len(found)} snapshots, whole")
    return not any(damaged.values())


def verify_tokenizer(config: Config, run: RunDir, checkpoint: Checkpoint) -> None:
    """Check that the tokenizer is the one that a checkpoint was trained with.

    Raises:
        RunError: it is another one.
    """
    try:
        tokenizer = saved_tokenizer(config, run, checkpoint.state["tokenizer"], checkpoint.path)
    except FileNotFoundError as error:  # of kl16 and vq16, whose weights lie outside of the run
        print(f"tokenizer: not checked, {error}")
        return
    name = "none" if tokenizer is None else tokenizer.spec.name
    print(f"tokenizer: {name}, as in {checkpoint.path.name}")


if __name__ == "__main__":
    main(work)
