"""Sampling at size B: steps launched one kernel at a time, and replayed from a CUDA graph."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

from bench.measuring import reason
from bench.roofline import Ceilings
from bench.sections.work import Row, Work
from heptapod_fast.rng import Rng
from heptapod_fast.systems import System, build_system, configure

CLASSES = 1000
TOKENIZERS = {"codes": "vq16", "vectors": "kl16"}
BATCHES = (1, 8, 64)
ROUNDS = 3
HEAD = ["tokens", "batch", "steps", "launched, images/s", "replayed", "times", "same tokens"]


def untrained(size: str, device: str, **flags: Any) -> System:
    """A system of random weights, whose speed is that of a trained one."""
    flags = dict(size=size, data="synthetic", device=device) | flags
    config = configure(**flags)
    system = build_system(config, CLASSES, torch.device(device)).eval().requires_grad_(False)
    system.settle_dtype(torch.bfloat16)
    return system


def seconds_of(system: System, batch: int, **options: Any) -> tuple[float, torch.Tensor]:
    """(seconds, tokens) of one batch."""
    classes = torch.arange(batch) % CLASSES
    is_cuda = next(system.parameters()).is_cuda
    begin = time.perf_counter()
    tokens = system.sample(classes, Rng(0), system.options(**options))
    if is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begin, tokens


@dataclass(frozen=True)
class Sampling:
    """Codes and vectors, at 256 and 16 steps, for several batches."""

    name: str = "sampling-B"
    about: str = "Sampling at size B, launched and replayed from CUDA graphs; the same tokens."
    code: tuple[str, ...] = ("bench/sections/sampling.py",)

    def measure(self, work: Work) -> None:
        """See Section.measure. What cannot be recorded is a row too."""
        systems: dict[str, System] = {}
        for kind, batch, per_step in product(TOKENIZERS, BATCHES, (1, 16)):
            case = f"{kind}, batch {batch}, {256 // per_step} steps"
            if not work.wants(case):
                continue
            try:
                if kind not in systems:
                    systems[kind] = untrained("B", "cuda", tokenizer=TOKENIZERS[kind])
                work.emit(compared(case, systems[kind], batch, per_step))
            except Exception as error:
                work.emit({"case": case, "failed": reason(error)})

    def table(self, rows: list[Row], ceilings: Ceilings) -> list[str]:
        """See Section.table."""
        found = ["| " + " | ".join(HEAD) + " |", "|---|---:|---:|---:|---:|---:|---|"]
        for row in rows:
            kind, batch, steps = row["case"].split(", ")
            words = [kind, batch.removeprefix("batch "), steps.removesuffix(" steps")]
            if "failed" in row:
                words += ["", "", "", row["failed"]]
            else:
                launched, replayed = row["images"] / row["off"], row["images"] / row["on"]
                words += [f"{launched:.2f}", f"{replayed:.2f}", f"{row['off'] / row['on']:.2f}"]
                words.append("yes" if row["equal"] else "NO")
            found.append("| " + " | ".join(words) + " |")
        return found


def compared(case: str, system: System, batch: int, per_step: int) -> Row:
    """In turns: medians of a few, after a first one of each."""
    seconds: dict[str, list[float]] = {"off": [], "on": []}
    tokens = {}
    for number in range(1 + ROUNDS):
        for graph, found in seconds.items():
            took, tokens[graph] = seconds_of(
                system, batch, positions_per_step=per_step, cuda_graph=graph
            )
            if number:
                found.append(took)
    return {
        "case": case,
        "images": batch,
        "equal": bool(torch.equal(tokens["off"], tokens["on"])),
        **{graph: statistics.median(found) for graph, found in seconds.items()},
    }
