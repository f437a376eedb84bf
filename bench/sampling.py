"""Images/s of sampling against positions at a step, with quality beside it; and against another
state of the code, in turns.

    python tools/train.py --size tiny --tokenizer patch-vq --images 110000 --out runs/discrete
    python tools/train.py --size tiny --tokenizer patch --images 110000 --out runs/continuous
    python bench/sampling.py runs/discrete runs/continuous --out bench/results/sampling-cpu.json

    git worktree add ../before COMMIT
    python bench/sampling.py runs/discrete runs/continuous --against ../before ...

    python bench/sampling.py --size B --tokens discrete --out bench/results/sampling-B-cpu.json

Without a run, --size times untrained weights on the tokens of 256 px, at 256, 64 and 16 steps.

Quality is the share of samples whose symmetry is that of their class (evaluation/symmetry.py). With
--against, each round runs both states one after the other, each in a process of its own, at one
position at a step, and the row says how many times faster this one is. The other state needs no
installation, but its compiled operators: build it, or copy heptapod_fast/*.so and _build_note.txt
where csrc/ is the same; else it runs without them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from bench import harness
from bench.sections.sampling import seconds_of as seconds_of_untrained
from bench.sections.sampling import untrained
from bench.timer import Timing
from heptapod_fast import world as worlds
from heptapod_fast.rng import Rng
from heptapod_fast.runs import LoadedRun, load_run

ROOT = Path(__file__).resolve().parent.parent
PER_STEP = (1, 2, 4, 9, 18, 36)  # positions
TOKENIZERS = {"discrete": "vq16", "continuous": "kl16"}
STEPS = (256, 64, 16)  # of an untrained size
SEEDS = (0, 1)
FIRST_FOLD = 2  # of class 0

# What both states run: it prints the seconds of each of several samplings, a first one left out.
TIMED = """
import json, sys, time
from inspect import signature
import torch
sys.path.insert(0, sys.argv[1])
from heptapod_fast import world as worlds
from heptapod_fast.rng import Rng
from heptapod_fast.runs import load_run
worlds.start("cpu")
settled = {"only_samples": True} if "only_samples" in signature(load_run).parameters else {}
loaded = load_run(sys.argv[2], device="cpu", **settled)
labels = torch.arange(int(sys.argv[3])) % len(loaded.class_names)
seconds = []
for _ in range(1 + int(sys.argv[4])):
    begin = time.perf_counter()
    loaded.sample(labels, Rng(0), loaded.system.options())
    seconds.append(time.perf_counter() - begin)
print(json.dumps(seconds[1:]))
"""


def table(loaded: LoadedRun, kind: str, count: int) -> list[dict]:
    """A row for each number of positions at a step that the run's grid has room for."""
    num_tokens = loaded.config.spec.num_tokens
    return [
        row(loaded, kind, count, positions) for positions in PER_STEP if positions <= num_tokens
    ]


def row(loaded: LoadedRun, kind: str, count: int, positions: int) -> dict:
    """So many positions at a step."""
    from heptapod_fast.evaluation.symmetry import read_symmetry

    labels = torch.arange(count) % len(loaded.class_names)
    options = loaded.system.options(positions_per_step=positions)
    seconds = []
    right = []
    for seed in SEEDS:
        begin = time.perf_counter()
        tokens = loaded.sample(labels, Rng(seed), options)
        seconds.append(time.perf_counter() - begin)
        fold, _ = read_symmetry(loaded.decode(tokens))
        right.append((fold - FIRST_FOLD == labels).float().mean())
    found = {
        "images/s": round(count / statistics.median(seconds), 1),
        "symmetry accuracy": round(float(torch.stack(right).mean()), 4),
    }
    return entry(f"sampling, {kind}, {positions} at a step", count, found, seconds)


def sized(size: str, batch: int, kinds: list[str]) -> list[dict]:
    """A row for each kind of tokens at each of `STEPS`, one batch each."""
    rows = []
    for kind in kinds:
        tokenizer = TOKENIZERS[kind]
        system = untrained(size, "cpu", tokenizer=tokenizer)
        num_tokens = system.num_tokens
        seconds_of_untrained(system, batch, positions_per_step=num_tokens)  # the first is slower
        for steps in STEPS:
            per_step = num_tokens // steps
            seconds, _ = seconds_of_untrained(system, batch, positions_per_step=per_step)
            found = {"seconds per image": round(seconds / batch, 3)}
            name = f"sampling, size {size}, {kind} tokens, {steps} steps"
            rows.append(entry(name, batch, found, [seconds]))
    return rows


def entry(name: str, count: int, found: dict, seconds: list[float]) -> dict:
    """A row of a results file, said."""
    print(name, found, flush=True)
    return {
        "name": name,
        "group": f"sampling of {count} images",
        "extra_info": found,
        "stats": Timing(tuple(seconds), calls=1, cpu=0.0).stats,
    }


def seconds_of(folder: Path, run: str, count: int, times: int) -> list[float]:
    """Of one state of the code."""
    words = [sys.executable, "-c", TIMED, str(folder), run, str(count), str(times)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"{folder}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def compared(run: str, kind: str, other: Path, name: str, options: argparse.Namespace) -> dict:
    """This state against another, in turns."""
    ours: list[float] = []
    theirs: list[float] = []
    ratios = []
    for number in range(options.rounds):
        before = seconds_of(other, run, options.count, times=2)
        now = seconds_of(ROOT, run, options.count, times=2)
        ours += now
        theirs += before
        ratios.append(statistics.median(before) / statistics.median(now))
        print(f"round {number + 1}: {ratios[-1]:.2f} times", flush=True)
    found = {
        "images/s": round(options.count / statistics.median(ours), 1),
        "before": round(options.count / statistics.median(theirs), 1),
        "times faster": round(statistics.median(ratios), 2),
        "least": round(min(ratios), 2),
        "most": round(max(ratios), 2),
    }
    label = f"sampling, {kind}, 1 at a step, against {name}"
    return entry(label, options.count, found, ours)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", metavar="RUN_DIR", nargs="*", help="of --data logograms")
    parser.add_argument("--size", help="time untrained weights of this size instead")
    parser.add_argument("--tokens", nargs="+", choices=TOKENIZERS, default=list(TOKENIZERS))
    parser.add_argument("--batch", type=int, default=8, help="images, of --size")
    parser.add_argument("--count", type=int, default=256, help="images, in one batch")
    parser.add_argument("--rounds", type=int, default=5, help="of --against")
    parser.add_argument(
        "--against",
        action="append",
        default=[],
        metavar="FOLDER",
        help="a checkout of another commit; may be said again",
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error(f"--rounds {options.rounds}: expected at least 2")
    if bool(options.runs) == bool(options.size):
        parser.error("name runs, or a --size without a run")
    rows = []
    worlds.start("cpu")
    if options.size:
        rows += sized(options.size, options.batch, options.tokens)
    for run in options.runs:
        loaded = load_run(run, device="cpu", only_samples=True)
        if loaded.config.data.data != "logograms":
            parser.error(f"{run}: expected a run of --data logograms")
        kind = f"{loaded.config.spec.kind} tokens"
        rows += table(loaded, kind, options.count)
        for folder in options.against:
            rows.append(compared(run, kind, Path(folder), commit_of(folder), options))
    if options.out:
        harness.write_results(options.out, rows, harness.machine("cpu"))


def commit_of(folder: str) -> str:
    """Its short name."""
    words = ["git", "-C", folder, "rev-parse", "--short", "HEAD"]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
