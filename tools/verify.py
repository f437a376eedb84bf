"""Check a run directory byte by byte: `python tools/verify.py RUN_DIR`. Exit code 1 on damage."""

from __future__ import annotations

from dataclasses import dataclass

import tyro
from _cli import main, parse


@dataclass(frozen=True)
class Arguments:
    """Verify every checkpoint of a run against its manifest, and its settings and metrics."""

    run: tyro.conf.Positional[str]
    """Run directory."""


def work() -> int:
    """Say what was checked and what is wrong."""
    arguments = parse(Arguments)
    from heptapod_fast.runs import RunDir, saved_tokenizer
    from heptapod_fast.train.checkpoint import listed, load, problems
    from heptapod_fast.train.metrics import read_metrics

    run = RunDir(arguments.run)
    config, bad = run.read_config(), 0
    print(f"config.json: {config.system} {config.size} on {config.data}")
    if run.metrics.exists():
        print(f"metrics.jsonl: {len(read_metrics(run.metrics)):,} records")
    found, good = listed(run.checkpoints), []
    for path in found:
        wrong = problems(path)
        bad += bool(wrong)
        good += [] if wrong else [path]
        print(f"{path.name}: " + ("; ".join(wrong) if wrong else
                                  f"whole, {load(path).state['images']:,} images"))
    if not found:
        print("no checkpoints")
    if good:
        tokenizer = saved_tokenizer(config, run, load(good[-1]))
        name = "none" if tokenizer is None else tokenizer.spec.name
        print(f"tokenizer: {name}, as in {good[-1].name}")
    return int(bad > 0 or not found)


if __name__ == "__main__":
    main(work)
