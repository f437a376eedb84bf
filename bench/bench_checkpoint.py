"""Checkpoints that are written while training goes on: how long training waits for one.

    python bench/bench_checkpoint.py --size B --out bench/results/checkpoint-B-cpu.json
    pytest bench/bench_checkpoint.py --benchmark-only                    size tiny, in seconds

The state is that of a whole run: weights, moments, averages. In turns: `begin`, after which
training goes on, against copying the same bytes once, tensor by tensor, into memory that is there
already. Also how long the first `begin` takes, which allocates its buffers, how long the thread
then writes, and the most memory of the process before and after all of it.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
import time
from pathlib import Path

import torch

from bench import harness
from bench.timer import Timing
from heptapod_fast.systems import build_system, configure
from heptapod_fast.train.optimizer import Optimizer
from heptapod_fast.train.saving import Saver
from heptapod_fast.world import ALONE

ROUNDS = 5
CLASSES = 1000


def measure(size: str, rounds: int = ROUNDS) -> tuple[dict[str, float], list[float]]:
    """(seconds and GB of the checkpoints of a size's default system, seconds that training waited,
    round by round)."""
    config = configure(size, data="synthetic", num_classes=CLASSES)
    optimizer = Optimizer(build_system(config, CLASSES), config.recipe)
    files = optimizer.files()
    tensors = [tensor for named in files.values() for tensor in named.values()]
    count = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    copies = [torch.zeros_like(tensor) for tensor in tensors]  # zeros: their pages are there
    saver = Saver(ALONE)
    before = memory_peak()
    waited, copied, written = [], [], []
    with tempfile.TemporaryDirectory() as folder:

        def save(step: int) -> None:
            begin = time.perf_counter()
            saver.begin(Path(folder), files, {"step": step}, 1)
            waited.append(time.perf_counter() - begin)
            saver.settle()
            written.append(time.perf_counter() - begin - waited[-1])

        save(0)
        first = waited.pop()
        del written[:]
        for step in range(1, rounds + 1):
            copied.append(seconds_of_copy(tensors, copies))
            save(step)
    ratios = [one / other for one, other in zip(waited, copied, strict=True)]
    found = {
        "state, GB": round(count / 1e9, 3),
        "training waits, s": round(statistics.median(waited), 4),
        "copying the bytes, s": round(statistics.median(copied), 4),
        "ratio": round(statistics.median(ratios), 3),
        "ratio, least": round(min(ratios), 3),
        "ratio, most": round(max(ratios), 3),
        "first time, s": round(first, 3),
        "writing beside training, s": round(statistics.median(written), 3),
        "memory more at the peak, GB": round((memory_peak() - before) / 1e9, 3),
    }
    return found, waited


def seconds_of_copy(tensors: list[torch.Tensor], copies: list[torch.Tensor]) -> float:
    """Once through all of them."""
    begin = time.perf_counter()
    for copy, tensor in zip(copies, tensors, strict=True):
        copy.copy_(tensor)
    return time.perf_counter() - begin


def memory_peak() -> int:
    """Bytes of this process, so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def bench_begin(benchmark):
    found, _ = benchmark.pedantic(measure, ("tiny", 2), rounds=1)
    benchmark.extra_info |= found
    assert found["ratio"] > 0


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found, waited = measure(options.size, options.rounds)
    name = f"checkpoint of size {options.size}"
    print(name)
    for key, value in found.items():
        print(f"  {key:28}{value}", flush=True)
    if options.out:
        row = {
            "name": name,
            "group": "checkpoints beside training",
            "extra_info": found,
            "stats": Timing(tuple(waited), calls=1, cpu=0.0).stats,
        }
        harness.write_results(options.out, [row], harness.machine("cpu"))


if __name__ == "__main__":
    main()
