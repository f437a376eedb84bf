"""Measure a trained run's samples: `python tools/evaluate.py RUN_DIR --count 400`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from _cli import main, parse
from _sampling import SamplingArguments


@dataclass(frozen=True, kw_only=True)
class Arguments(SamplingArguments):
    """Sample from a run and compute metrics; writes RUN_DIR/evaluation.json and a grid."""

    count: int = 400
    """Samples in total, spread evenly over the classes."""
    metrics: str | None = None
    """Metrics separated by commas; default: what the data allows (symmetry for logograms)."""
    out: str | None = None
    """Where the numbers go; default: RUN_DIR/evaluation.json."""


def work() -> int:
    """Parse, load, sample, measure, write."""
    arguments = parse(Arguments)
    from heptapod_fast.evaluation import METRICS, MetricContext, make_metrics
    from heptapod_fast.pictures import save_grid
    from heptapod_fast.sampling.generate import spread
    from heptapod_fast.train.setup import open_images

    arguments.check_count(arguments.count)
    system = arguments.load()
    default = ["symmetry"] if system.config.data == "logograms" else []
    names = default if arguments.metrics is None else arguments.metrics.split(",")
    if not names:
        raise ValueError(
            f"--metrics is missing: none of this version's ({', '.join(METRICS)}) "
            f"applies by itself to --data {system.config.data}"
        )
    context = MetricContext(source=open_images(system.config), tokenizer=system.tokenizer)
    metrics = make_metrics(names, context)
    labels = spread(list(range(system.num_classes)), arguments.count)
    images = arguments.images(system, labels)
    results: dict[str, object] = {
        "images_seen": system.images_seen,
        "samples": arguments.count,
        "checkpoint": system.checkpoint.name,
        "seed": arguments.seed,
        "weights": arguments.ema or "first average",
        **asdict(arguments.options()),
    }
    for metric in metrics:
        metric.update(images, labels)
        results |= metric.compute()
    out = Path(arguments.out or Path(arguments.run) / "evaluation.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n")
    picked = [
        i for c in labels.unique()[:8].tolist() for i in (labels == c).nonzero()[:8, 0].tolist()
    ]
    save_grid(images[picked], out.with_suffix(".png"), columns=8)
    for name, value in results.items():
        print(f"{name:32} {value:.4f}" if isinstance(value, float) else f"{name:32} {value}")
    print(f"written: {out} and {out.with_suffix('.png')}")
    return 0


if __name__ == "__main__":
    main(work)
