"""Several ranks of one core each against one rank with all cores: images/s of whole training runs.

    python bench/ranks.py --size B --batch 8 --out bench/results/ranks-B-cpu.json

Runs of the same global batch through tools/train.py and torchrun, in turns: one process with as
many threads as there are ranks otherwise, then that many processes of one thread. Both do the same
arithmetic on the same cores; what is lost is what the ranks' messages are not hidden behind the
backward pass. The rate is that of the steps after the first progress line.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from bench import harness
from bench.timer import Timing

ROOT = Path(__file__).resolve().parent.parent
MODES = ("ddp", "fsdp")


def rate(words: list[str], ranks: int, threads: int) -> float:
    """images/s of one run, its first progress line left out."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--standalone"]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory() as folder:
        command = [*launcher, str(ROOT / "tools" / "train.py"), *words, "--out", folder]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}:\n{done.stdout}{done.stderr}")
        lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if "loss" in record]
    return statistics.median(record["images_per_second"] for record in records[1:])


def measure(options: argparse.Namespace) -> list[dict]:
    """Rows of a results file: one rank, and the others by mode."""
    batch = options.batch
    words = ["--size", options.size, "--data", "synthetic", "--device", "cpu"]
    words += ["--batch", str(batch), "--micro-batch", str(batch // options.ranks)]
    words += ["--images", str(batch * options.steps), "--log-every", str(batch)]
    words += ["--sample-every", "0", "--checkpoint-every", str(10**9)]
    kinds = {"one rank": (words, 1, options.ranks)}
    for mode in MODES:
        kinds[f"{options.ranks} ranks, {mode}"] = ([*words, "--parallel", mode], options.ranks, 1)
    rates: dict[str, list[float]] = {name: [] for name in kinds}
    for number in range(options.rounds):
        for name, kind in kinds.items():
            rates[name].append(rate(*kind))
            print(f"round {number + 1}: {name}: {rates[name][-1]:.2f} images/s", flush=True)
    return [row(name, rates, options) for name in kinds]


def row(name: str, rates: dict[str, list[float]], options: argparse.Namespace) -> dict:
    """As a results file has it."""
    of_one = rates["one rank"]
    ratios = [several / one for several, one in zip(rates[name], of_one, strict=True)]
    found = {
        "images/s": round(statistics.median(rates[name]), 2),
        "of one rank's": round(statistics.median(ratios), 3),
        "of one rank's, least": round(min(ratios), 3),
        "of one rank's, most": round(max(ratios), 3),
    }
    group = f"training, size {options.size}, batch {options.batch}, {options.ranks} cores"
    seconds = [options.batch / rate for rate in rates[name]]
    return {
        "name": f"{group}: {name}",
        "group": group,
        "extra_info": found,
        "stats": Timing(tuple(seconds), calls=options.steps - 1, cpu=0.0).stats,
    }


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5, help="of each run, the first left out")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = measure(options)
    for each in rows:
        print(each["name"], each["extra_info"])
    if options.out:
        harness.write_results(options.out, rows, harness.machine("cpu"))


if __name__ == "__main__":
    main()
