"""FID of a run's samples while it trained, and what it is to be compared with: of real images, and
of real images through the tokenizer.

    python tools/train.py --size tiny --images 110000 --evaluate-every 10000 \\
        --evaluate-metrics fid,symmetry --evaluate-count 2048 --out runs/codes
    python bench/fid_curve.py runs/codes --out bench/results/evaluations/fid-curve.json

All by the run's small extractor (evaluation/small.py), against its training images.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from bench import harness
from heptapod_fast.data.embedded import EmbeddedImages
from heptapod_fast.data.sources import ImageSource
from heptapod_fast.evaluation import MetricContext, make_metrics
from heptapod_fast.evaluation.image_sets import TrainingImages
from heptapod_fast.evaluation.symmetry import through
from heptapod_fast.reports.run import evaluations_of
from heptapod_fast.runs import RunDir, load_run
from heptapod_fast.runs.data import open_images
from heptapod_fast.storage import write_json
from heptapod_fast.tokenizers import Tokenizer, to_uint8, to_unit
from heptapod_fast.world import device_name

COUNT = 2048


def fid_of(context: MetricContext, images: ImageSource, tokenizer: Tokenizer | None) -> float:
    """Of `COUNT` real images, through a tokenizer where one is given."""
    (metric,) = make_metrics(["fid"], context)
    chosen = TrainingImages(images, most=COUNT)
    assert chosen.labels is not None
    first = 0
    for pixels in chosen.batches():
        shown = to_uint8(through(tokenizer, to_unit(pixels)))
        metric.update(shown, chosen.labels[first : first + len(pixels)])
        first += len(pixels)
    return float(metric.compute()["fid"])


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN_DIR", help="of embedded images, with --evaluate-every")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    loaded = load_run(options.run, device="cpu")
    source = open_images(loaded.config)
    if not isinstance(source, EmbeddedImages):
        parser.error(f"{options.run}: expected a run of embedded images")
    context = MetricContext(
        source=source,
        image_size=source.image_size,
        device=torch.device("cpu"),
        extractor="small",
        folder=options.run,
        count=COUNT,
    )
    fresh = source.fresh(COUNT)
    lines = RunDir(options.run).metrics.read_text().splitlines()
    records = [json.loads(line) for line in lines]
    found: dict[str, Any] = {
        "device": device_name(torch.device("cpu")),
        "torch": torch.__version__,
        "command": harness.machine("cpu")["command"],
        "training_images": {"fid": fid_of(context, source, None)},
        "fresh_images": {"fid": fid_of(context, fresh, None)},
        "through_the_tokenizer": {"fid": fid_of(context, fresh, loaded.tokenizer)},
        "samples": evaluations_of(records),
    }
    print(json.dumps(found, indent=1))
    if options.out:
        write_json(options.out, found)


if __name__ == "__main__":
    main()
