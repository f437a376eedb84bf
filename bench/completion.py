"""Completions of logograms that a run was not trained on: do they have the symmetry of their class?

    python tools/demo.py
    python bench/completion.py runs/demo --out bench/results/completion-cpu.json

For every part that --keep names, with one position at a step and with four: the share of completed
images whose symmetry is that of their class, by the reader that measures samples
(evaluation/symmetry.py), and whether the given tokens came back bit for bit. Time is that of all
images together, drawn once with each of two seeds.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from bench import harness
from bench.timer import Timing
from heptapod_fast.data.logograms import Logograms
from heptapod_fast.evaluation.symmetry import read_symmetry
from heptapod_fast.rng import Rng
from heptapod_fast.runs import LoadedRun, load_run
from heptapod_fast.sampling import Given
from heptapod_fast.sampling.completion import KEEPS, known_tokens
from heptapod_fast.tokenizers import to_unit

PER_STEP = (1, 4)  # positions
SEEDS = (0, 1)
OF_PICTURES = 991  # their seed; training has the run's own
FIRST_FOLD = 2  # of class 0


def measure(loaded: LoadedRun, count: int) -> list[dict]:
    """Rows of a results file."""
    tokenizer = loaded.tokenizer
    if loaded.config.data.data != "logograms" or tokenizer is None:
        raise SystemExit(f"a run of --data logograms is needed, this is {loaded.config.data.data}")
    size = tokenizer.image_size
    pictures = Logograms(size, count, OF_PICTURES, len(loaded.class_names))
    tokens = tokenizer.encode(to_unit(pictures.images(torch.arange(count))))
    rows = []
    for keep in KEEPS:
        given = Given(tokens, known_tokens(keep, tokenizer.spec, size))
        for per_step in PER_STEP:
            rows.append(row(loaded, given, pictures.labels, keep, per_step))
            print(rows[-1]["name"], rows[-1]["extra_info"], flush=True)
    return rows


def row(loaded: LoadedRun, given: Given, labels: torch.Tensor, keep: str, per_step: int) -> dict:
    """One part, so many positions at a step."""
    options = loaded.system.options(positions_per_step=per_step)
    known = given.known_N
    right, seconds = [], []
    are_unchanged = True
    for seed in SEEDS:
        begin = time.perf_counter()
        found = loaded.system.complete(given, labels, Rng(seed), options)
        seconds.append(time.perf_counter() - begin)
        are_unchanged &= torch.equal(found[:, known], given.tokens_BN[:, known])
        fold, _ = read_symmetry(loaded.decode(found))
        right.append((fold - FIRST_FOLD == labels).float().mean())
    return {
        "name": f"completion, {keep}, {per_step} at a step",
        "group": f"completion of {len(labels)} logograms",
        "extra_info": {
            "given tokens": given.num_known,
            "symmetry accuracy": round(float(torch.stack(right).mean()), 4),
            "given tokens unchanged": str(are_unchanged),
        },
        "stats": Timing(tuple(seconds), calls=1, cpu=0.0).stats,
    }


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN_DIR", help="of a system that completes")
    parser.add_argument("--count", type=int, default=400, help="pictures")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = measure(load_run(options.run, device="cpu"), options.count)
    if options.out:
        harness.write_results(options.out, rows, harness.machine("cpu"))


if __name__ == "__main__":
    main()
