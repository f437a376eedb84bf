"""Measure a trained run's samples: `python tools/evaluate.py RUN_DIR --count 400`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

import tyro
from _cli import main, parse

from heptapod_fast.sampling import SampleOptions


@dataclass(frozen=True, kw_only=True)
class Arguments(SampleOptions):
    """Sample from a run and compute metrics; writes RUN_DIR/evaluation.json and a grid."""

    run: tyro.conf.Positional[str]
    """Run directory."""
    count: int = 400
    """Samples in total, spread evenly over the classes."""
    metrics: str | None = None
    """Metrics separated by commas; default: what the data allows (symmetry for logograms)."""
    ema: str | None = None
    """Moving average by name or decay, "none" for the raw weights; default: the run's first."""
    checkpoint: int | None = None
    """Step of the checkpoint; default: the newest."""
    seed: int = 0
    """Seed of the samples."""
    batch: int = 256
    """Images per batch; does not change what comes out."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to sample."""
    out: str | None = None
    """Where the numbers go; default: RUN_DIR/evaluation.json."""


def work() -> int:
    """Parse, load, sample, measure, write."""
    arguments = parse(Arguments)
    from heptapod_fast.evaluation import METRICS, MetricContext, make_metrics
    from heptapod_fast.pictures import save_grid
    from heptapod_fast.progress import Progress
    from heptapod_fast.rng import Rng
    from heptapod_fast.runs import load_run
    from heptapod_fast.sampling.generate import generate, spread
    from heptapod_fast.train.setup import open_images

    if arguments.count < 1 or arguments.batch < 1:
        raise ValueError(f"--count {arguments.count}, --batch {arguments.batch}: expected at "
                         "least 1")
    system = load_run(arguments.run, arguments.checkpoint, arguments.ema, arguments.device)
    default = ["symmetry"] if system.config.data == "logograms" else []
    names = default if arguments.metrics is None else arguments.metrics.split(",")
    if not names:
        raise ValueError(f"--metrics is missing: none of this version's ({', '.join(METRICS)}) "
                         f"applies by itself to --data {system.config.data}")
    if system.tokenizer is None:
        raise ValueError(f"{arguments.run} was trained on synthetic tokens: nothing can be decoded")
    context = MetricContext(source=open_images(system.config), tokenizer=system.tokenizer)
    metrics = make_metrics(names, context)
    labels = spread(list(range(system.num_classes)), arguments.count)
    options = SampleOptions(**{f.name: getattr(arguments, f.name) for f in fields(SampleOptions)})
    images = generate(system, labels, Rng(arguments.seed), options, arguments.batch,
                      Progress("sampling"))
    results: dict[str, object] = {"images_seen": system.images_seen, "samples": arguments.count,
                                  "checkpoint": system.checkpoint.name, "seed": arguments.seed,
                                  "weights": arguments.ema or "first average", **asdict(options)}
    for metric in metrics:
        metric.update(images, labels)
        results |= metric.compute()
    out = Path(arguments.out or Path(arguments.run) / "evaluation.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n")
    picked = [i for c in labels.unique()[:8].tolist()
              for i in (labels == c).nonzero()[:8, 0].tolist()]
    save_grid(images[picked], out.with_suffix(".png"), columns=8)
    for name, value in results.items():
        print(f"{name:32} {value:.4f}" if isinstance(value, float) else f"{name:32} {value}")
    print(f"written: {out} and {out.with_suffix('.png')}")
    return 0


if __name__ == "__main__":
    main(work)
