"""Averages of other lengths, made after training of the snapshots that `--ema post-hoc` keeps."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from heptapod_fast import checkpoints
from heptapod_fast.averages import (
    LENGTHS,
    Profile,
    gamma_of,
    mismatch,
    power_name,
    shares,
)
from heptapod_fast.checkpoints import Checkpoint
from heptapod_fast.runs.directory import RunError

WORST_MISMATCH = 0.15


def make_average(folder: Path, checkpoint: Checkpoint, length: float) -> dict[str, Tensor]:
    """The power-function average of a length at a checkpoint, float32.

    Args:
        folder: of the snapshots.

    Raises:
        RunError: snapshots are missing without which it would be another average.
        CheckpointError: one is damaged.
    """
    sources: list[tuple[Checkpoint, str]] = []
    profiles: list[Profile] = []
    before = [
        path for path in checkpoints.listed(folder) if checkpoints.step_of(path) < checkpoint.step
    ]
    for source in [*map(checkpoints.load, before), checkpoint]:
        for kept in LENGTHS:
            sources.append((source, power_name(kept)))
            profiles.append(Profile(source.step, gamma_of(kept)))
    wanted = Profile(checkpoint.step, gamma_of(length))
    parts = shares(profiles, wanted)
    off = mismatch(profiles, parts, wanted)
    if off > WORST_MISMATCH:
        raise RunError(
            f"--ema {length:g}: of the {len(before)} snapshots in {folder} an average of that "
            f"length can be made only {off:.0%} off: take one of {LENGTHS[0]} to {LENGTHS[1]}, "
            "restore what is missing, or train with more --ema-snapshots"
        )
    total: dict[str, Tensor] = {}
    for (source, name), part in zip(sources, parts, strict=True):
        for key, value in source.read(name).items():
            add = value.float() * part
            total[key] = total[key] + add if key in total else add
    return total
