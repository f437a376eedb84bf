"""Check a run or a cache byte by byte: `python tools/verify.py RUN_DIR | CACHE.zarr`.

Exit code 1 on damage.
"""

from __future__ import annotations

from dataclasses import dataclass

from _cli import main, parse, tyro


@dataclass(frozen=True)
class Arguments:
    """Verify every checkpoint of a run against its manifest, and its settings and metrics; or every
    shard of a cache, and what is stored in it."""

    path: tyro.conf.Positional[str]
    """Run directory, or a cache (its name ends in .zarr)."""


def work() -> int:
    """Say what was checked and what is wrong."""
    path = parse(Arguments).path
    from heptapod_fast.config import is_cache

    return cache(path) if is_cache(path) else run(path)


def cache(path: str) -> int:
    """Check a cache of tokens."""
    from heptapod_fast.data.cache_check import problems
    from heptapod_fast.data.cache_format import open_cache
    from heptapod_fast.progress import Progress

    opened = open_cache(path, look=False)
    about, left_out = opened.manifest, opened.manifest["quarantine"]
    print(
        f"manifest.json: {opened.rows - len(left_out):,} images, {opened.views} view"
        f"{'s' * (opened.views > 1)}, "
        f"{len(opened.class_names)} classes, {about['tokenizer']['tokenizer']} at "
        f"{about['tokenizer']['image_size']} px, {opened.nbytes / 1e6:,.1f} MB, "
        f"shards: {opened.shards}"
    )
    for entry in left_out:
        print(f"left out: {entry['path']}: {entry['reason']}")
    wrong = problems(opened, Progress("verifying", "shards"))
    for text in wrong:
        print(f"damaged: {text}")
    print(
        f"{path}: "
        + (
            f"{len(wrong)} problems"
            if wrong
            else f"whole, {len(about['files'])} files as they were written"
        )
    )
    return int(bool(wrong))


def run(path: str) -> int:
    """Check a run directory."""
    from heptapod_fast.runs import RunDir, saved_tokenizer
    from heptapod_fast.train.checkpoint import listed, load, problems
    from heptapod_fast.train.metrics import read_metrics

    directory = RunDir(path)
    config, bad = directory.read_config(), 0
    print(f"config.json: {config.system} {config.size} on {config.data}")
    if directory.metrics.exists():
        print(f"metrics.jsonl: {len(read_metrics(directory.metrics)):,} records")
    found, good = listed(directory.checkpoints), []
    for path in found:
        wrong = problems(path)
        bad += bool(wrong)
        good += [] if wrong else [path]
        print(
            f"{path.name}: "
            + ("; ".join(wrong) if wrong else f"whole, {load(path).state['images']:,} images")
        )
    if not found:
        print("no checkpoints")
    if good:
        try:
            tokenizer = saved_tokenizer(config, directory, load(good[-1]))
            name = "none" if tokenizer is None else tokenizer.spec.name
            print(f"tokenizer: {name}, as in {good[-1].name}")
        except FileNotFoundError as error:  # of kl16 and vq16, which lie outside of the run
            print(f"tokenizer: not checked, {error}")
    return int(bad > 0 or not found)


if __name__ == "__main__":
    main(work)
