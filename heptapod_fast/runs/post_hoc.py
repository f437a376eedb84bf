"""Averages of other lengths, made after training of the snapshots that `--ema post-hoc` keeps."""

from __future__ import annotations

import logging
from pathlib import Path

from torch import Tensor

from heptapod_fast import checkpoints
from heptapod_fast.averages import (
    LENGTHS,
    Profile,
    gamma_of,
    mismatch,
    power_name,
    rounding,
    shares,
)
from heptapod_fast.checkpoints import Checkpoint, CheckpointError
from heptapod_fast.runs.directory import RunError

logger = logging.getLogger(__name__)
WORST_MISMATCH = 0.15


def make_average(folder: Path, checkpoint: Checkpoint, length: float) -> dict[str, Tensor]:
    """The power-function average of a length at a checkpoint, float32.

    Args:
        folder: of the snapshots.

    Raises:
        RunError: of the snapshots there are only another average could be made.
    """
    before = [
        path for path in checkpoints.listed(folder) if checkpoints.step_of(path) < checkpoint.step
    ]
    found = [*filter(None, map(_whole, before)), checkpoint]
    sources = [(source, power_name(kept)) for source in found for kept in LENGTHS]
    profiles = [Profile(source.step, gamma_of(kept)) for source in found for kept in LENGTHS]
    wanted = Profile(checkpoint.step, gamma_of(length))
    parts = shares(profiles, wanted)
    off = mismatch(profiles, parts, wanted) + rounding(parts)
    if off > WORST_MISMATCH:
        raise RunError(
            f"--ema {length:g}: an average of that length cannot be made at step "
            f"{checkpoint.step} of the {len(found) - 1} snapshots before it in {folder} (it would "
            f"be {off:.0%} off). Take a length nearer to {LENGTHS[0]} or {LENGTHS[1]}, or a later "
            "checkpoint; more --ema-snapshots help another run"
        )
    total: dict[str, Tensor] = {}
    for (source, name), part in zip(sources, parts, strict=True):
        for key, value in source.read(name).items():
            add = value.float() * part
            total[key] = total[key] + add if key in total else add
    return total


def _whole(path: Path) -> Checkpoint | None:
    """A snapshot; None for a damaged one, which is said: others make up for it if they can."""
    try:
        return checkpoints.load(path)
    except CheckpointError as error:
        logger.warning("WARNING: %s; going on without this snapshot", error)
        return None
