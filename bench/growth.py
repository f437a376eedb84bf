"""How the time of a training step grows: with batch, density, tokens and ranks.

    python bench/growth.py --out bench/results/growth-cpu.json
    python bench/growth.py --quick

One small network, of which one thing is varied at a time, the others as at the base point. Every
point is a whole optimizer step of the trainer on synthetic tokens, on one core for each rank. All
points take turns: each is timed once a round. Time is set against the count of FLOPs: "time per
FLOP" is that of a point over that of the first point of its row, so that 1 is a step whose time
grows as the count does. Of several ranks the FLOPs are those of one: 1 is perfect scaling.
tools/report.py makes the tables and the chart.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from bench import harness, timer
from bench.steps import Step, prepared_step
from bench.timer import Timing, WallWatch
from heptapod_fast.world import World

CPU = torch.device("cpu")
PATCH = 4  # pixels
ROUNDS = 21
SECONDS = 200.0  # no new round after so many; warming up aside
STOP = 0  # what rank 1 is told in the end
MICROSECONDS = 1e6
MEGA = 1e6


@dataclass(frozen=True)
class Point:
    """One configuration.

    Attributes:
        side: of the grid of tokens.
        batch: images of a step, of all ranks together.
    """

    side: int = 16
    batch: int = 8
    density: int = 1
    ranks: int = 1

    @property
    def tokens(self) -> int:
        """Of an image."""
        return self.side**2


BASE = Point()
# What is varied: the name in tables -> points, of which the first is what others are compared with.
SWEEPS: dict[str, list[Point]] = {
    "batch": [Point(batch=batch) for batch in (4, 8, 16, 32)],
    "density": [Point(density=density) for density in (1, 2, 4, 8)],
    "tokens": [Point(side=side) for side in (6, 8, 12, 16, 24, 32)],
    "ranks": [Point(ranks=ranks) for ranks in (1, 2)],
}
QUICK: dict[str, list[Point]] = {
    "batch": [Point(side=3, batch=4), Point(side=3, batch=8)],
    "density": [Point(side=3, density=1), Point(side=3, density=2)],
    "tokens": [Point(side=3), Point(side=4)],
    "ranks": [Point(side=3, ranks=1), Point(side=3, ranks=2)],
}
NETWORK: dict[str, Any] = dict(width=128, heads=4, depth=2, head_depth=2, codes=128)


def settings_of(point: Point) -> dict[str, Any]:
    """Flags of tools/train.py."""
    return NETWORK | dict(
        size="tiny",
        data="synthetic",
        tokenizer="patch-vq",
        image_size=PATCH * point.side,
        patch_size=PATCH,
        batch=point.batch,
        micro_batch=point.batch // point.ranks,
        density=point.density,
        recompute="off",
        device="cpu",
    )


def points_of(sweeps: Mapping[str, Sequence[Point]]) -> list[Point]:
    """Every point once, in a fixed order; the base point belongs to several sweeps."""
    return list(dict.fromkeys(point for points in sweeps.values() for point in points))


# -------------------------------------------------------------------------------------- measuring


def measured(
    sweeps: Mapping[str, Sequence[Point]], rounds: int, seconds: float
) -> tuple[dict[Point, Timing], dict[Point, float]]:
    """(seconds of a step, FLOPs of a step of all ranks), by point. Starts rank 1, and ends it."""
    points = points_of(sweeps)
    torch.set_num_threads(1)
    with two_ranks(points) as world:
        steps = prepared(points, world)
        shared = [point for point in points if point.ranks > 1]
        watches = {}
        for point, step in steps.items():
            call = step.call
            if point.ranks > 1:
                call = Together(shared.index(point) + 1, step)
            watches[point] = WallWatch(call)
        timings = timer.in_turns(watches, rounds, seconds)
    return timings, {point: step.flops for point, step in steps.items()}


def prepared(points: Sequence[Point], world: World) -> dict[Point, Step]:
    """Steps that this rank takes part in. Collective call."""
    worlds = {1: None, world.size: world}
    mine = [point for point in points if world.main or point.ranks > 1]
    return {point: prepared_step(**settings_of(point), world=worlds[point.ranks]) for point in mine}


class Together:
    """A step that rank 1 is told to take too: it sleeps while others are timed.

    number: of the point among those of several ranks, from 1 on.
    """

    def __init__(self, number: int, step: Step):
        self.number = number
        self.step = step

    def __call__(self) -> object:
        tell(self.number)
        return self.step.call()


def tell(number: int) -> int:
    """What rank 0 says, on both. Collective call."""
    told = torch.tensor([number])
    dist.broadcast(told, src=0)
    return int(told)


@contextmanager
def two_ranks(points: Sequence[Point]) -> Iterator[World]:
    """This process as rank 0 of two; the other one ends with the block."""
    with tempfile.TemporaryDirectory() as folder:
        meeting = f"file://{folder}/ranks"
        # Spawned: a fork of a process whose threads have started may hang.
        other = multiprocessing.spawn(rank_1, (points, meeting), nprocs=1, join=False)
        try:
            yield joined(0, meeting)
            tell(STOP)
            other.join()
        finally:
            dist.destroy_process_group()
            for process in other.processes:
                process.terminate()


def joined(rank: int, meeting: str) -> World:
    """This process among the two."""
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    return World(rank, 2, CPU, local_rank=rank, local_size=2)


def rank_1(_: int, points: Sequence[Point], meeting: str) -> None:
    """The other process: takes the steps that it is told to take."""
    torch.set_num_threads(1)
    steps = list(prepared(points, joined(1, meeting)).values())
    while (number := tell(STOP)) != STOP:
        steps[number - 1].call()
    dist.destroy_process_group()


# ------------------------------------------------------------------------------------- arithmetic


def label_of(sweep: str, point: Point) -> str:
    """What a point is called within its sweep."""
    if sweep == "tokens":
        return f"{point.side} x {point.side} tokens"
    value = getattr(point, sweep)
    if sweep == "ranks":
        return f"{value} rank{'s' * (value > 1)}"
    return f"{sweep} {value}"


def per_flop(point: Point, timing: Timing, flops: float) -> list[float]:
    """Seconds per FLOP of one rank, round by round."""
    return [sample / (flops / point.ranks) for sample in timing.samples]


def relative(
    point: Point,
    first: Point,
    timings: Mapping[Point, Timing],
    flops: Mapping[Point, float],
) -> tuple[float, tuple[float, float]]:
    """How many times as long a FLOP takes as at the first point of the sweep: of the medians, and
    the quartiles of the rounds'."""
    here = per_flop(point, timings[point], flops[point])
    there = per_flop(first, timings[first], flops[first])
    rounds = [a / b for a, b in zip(here, there, strict=True)]
    low, _, high = statistics.quantiles(rounds, n=4, method="inclusive")
    return statistics.median(here) / statistics.median(there), (low, high)


def rows(
    sweeps: Mapping[str, Sequence[Point]],
    timings: Mapping[Point, Timing],
    flops: Mapping[Point, float],
) -> list[dict[str, Any]]:
    """Benchmarks as a results file holds them, sweep by sweep; stats are seconds per step."""
    found = []
    for sweep, points in sweeps.items():
        for point in points:
            timing = timings[point]
            low, high = timing.quartiles
            times, quartiles = relative(point, points[0], timings, flops)
            found.append(
                {
                    "name": label_of(sweep, point),
                    "group": sweep,
                    "extra_info": {
                        "value": point.tokens if sweep == "tokens" else getattr(point, sweep),
                        "us an image": timing.median / point.batch * MICROSECONDS,
                        "us an image, quartiles": [
                            low / point.batch * MICROSECONDS,
                            high / point.batch * MICROSECONDS,
                        ],
                        "MFLOP an image": flops[point] / point.batch / MEGA,
                        "time per FLOP": times,
                        "time per FLOP, quartiles": list(quartiles),
                    },
                    "stats": timing.stats,
                }
            )
    return found


# ----------------------------------------------------------------------------------- command line


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """Lines of text."""
    lines = [
        f"{'':20}{'us an image':>14}{'MFLOP an image':>16}{'time per FLOP':>15}{'quartiles':>16}"
    ]
    for row in found:
        notes = row["extra_info"]
        low, high = notes["time per FLOP, quartiles"]
        lines.append(
            f"{row['name']:20}{notes['us an image']:14,.0f}{notes['MFLOP an image']:16,.1f}"
            f"{notes['time per FLOP']:15.2f}{f'{low:.2f}-{high:.2f}':>16}"
        )
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="samples of each point, from 2")
    parser.add_argument("--quick", action="store_true", help="tiny points: shows that it works")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="for tools/report.py")
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error(f"--rounds {options.rounds}: quartiles need at least 2")
    sweeps = QUICK if options.quick else SWEEPS
    found = rows(sweeps, *measured(sweeps, options.rounds, SECONDS))
    print(table(found))
    if options.out is not None:
        about = harness.machine("cpu") | {"cores": os.cpu_count(), "network": NETWORK}
        harness.write_results(options.out, found, about)


if __name__ == "__main__":
    main()
