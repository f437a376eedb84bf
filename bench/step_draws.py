"""How supervised steps are drawn: spread of the loss and of the gradient, and time, of antithetic,
independent and MAR's draws.

    python tools/train.py --size tiny --images 110000 --out runs/codes
    python bench/step_draws.py runs/codes --out bench/results/step-draws-cpu.json

Of a trained run's weights, and of untrained ones. The same images every time, and other steps and
orders: what differs between two gradients is what was drawn. Spread of the gradient: the mean of
|g - mean|^2 over |mean|^2, the mean being that of all draws of all kinds whose expectation is the
same. Time: forward and backward pass, all kinds in turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from bench import harness
from bench.timer import Timing
from heptapod_fast import world as worlds
from heptapod_fast.data.tokens import Batch
from heptapod_fast.rng import Rng
from heptapod_fast.runs import load_run
from heptapod_fast.runs.data import open_images
from heptapod_fast.systems import System, build_system
from heptapod_fast.tokenizers import to_unit

KINDS = ("antithetic", "uniform", "mar")
SAME_MEAN = ("antithetic", "uniform")  # steps are uniform in both; MAR's are others


def gradient_of(system: System, batch: Batch, rng: Rng) -> tuple[float, float, Tensor]:
    """(loss, supervised positions, gradient of the mean loss as one vector)."""
    system.zero_grad()
    loss = system(batch, rng)
    loss.mean.backward()
    grads = [p.grad.flatten() for p in system.parameters() if p.grad is not None]
    return float(loss.mean.detach()), float(loss.count), torch.cat(grads)


def with_steps(system: System, kind: str, density: int) -> None:
    """Draw steps in another way from now on."""
    system.settings = replace(system.settings, steps=kind, density=density)


def measure(system: System, batch: Batch, density: int, draws: int, name: str) -> list[dict]:
    """A row for each kind."""
    losses: dict[str, list[float]] = {kind: [] for kind in KINDS}
    counts: dict[str, list[float]] = {kind: [] for kind in KINDS}
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    sums: dict[str, Tensor] = {}
    squares: dict[str, float] = dict.fromkeys(KINDS, 0.0)
    for draw in range(draws):
        for kind in KINDS:
            with_steps(system, kind, density)
            begin = time.perf_counter()
            loss, count, gradient = gradient_of(system, batch, Rng(1000 + draw))
            seconds[kind].append(time.perf_counter() - begin)
            losses[kind].append(loss)
            counts[kind].append(count)
            wide = gradient.double()
            sums[kind] = sums.get(kind, torch.zeros_like(wide)) + wide
            squares[kind] += float(wide.square().sum())
    rows = []
    for kind in KINDS:
        alike = SAME_MEAN if kind in SAME_MEAN else (kind,)
        mean = torch.stack([sums[other] for other in alike]).mean(0) / draws
        size = float(mean.square().sum())
        # E|g - m|^2 = E|g|^2 - 2 m . E g + |m|^2
        apart = squares[kind] / draws - 2 * float(mean @ sums[kind]) / draws + size
        found = {
            "spread of the gradient": round(apart / size, 4),
            "deviation of the loss": round(statistics.stdev(losses[kind]), 5),
            "supervised positions": round(statistics.fmean(counts[kind]), 1),
            "deviation of their number": round(statistics.stdev(counts[kind]), 2),
        }
        label = f"{kind} steps, {name}, density {density}"
        print(label, found, f"{1e3 * statistics.median(seconds[kind]):.1f} ms", flush=True)
        rows.append(
            {
                "name": label,
                "group": f"gradients of {len(batch)} logograms, {draws} draws",
                "extra_info": found,
                "stats": Timing(tuple(seconds[kind]), calls=1, cpu=0.0).stats,
            }
        )
    return rows


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN_DIR", help="of Heptapod, on images")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--draws", type=int, default=100)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    worlds.start("cpu")
    loaded = load_run(options.run, device="cpu", precision="fp32")
    images = open_images(loaded.config)
    if images is None or loaded.tokenizer is None:
        parser.error(f"{options.run}: expected a run on images")
    index = torch.arange(options.batch)
    tokens = loaded.tokenizer.encode(to_unit(images.images(index)))
    batch = Batch(tokens, images.labels[index], index)
    untrained = build_system(loaded.config, len(loaded.class_names), "cpu")
    rows = []
    for name, system in (("untrained", untrained), ("trained", loaded.system)):
        system.train().requires_grad_(True)
        for density in (1, 2):
            rows += measure(system, batch, density, options.draws, name)
    if options.out:
        harness.write_results(options.out, rows, harness.machine("cpu"))


if __name__ == "__main__":
    main()
