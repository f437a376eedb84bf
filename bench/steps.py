"""Whole training steps as the loop runs them, prepared to be timed."""

from __future__ import annotations

import functools
import tempfile
from typing import Any, NamedTuple

import torch

from bench.timer import Call
from heptapod_fast import configure
from heptapod_fast.train.loop import training_step
from heptapod_fast.train.metrics import training_flops
from heptapod_fast.train.session import Session, prepare
from heptapod_fast.world import World


class Step(NamedTuple):
    """call: one optimizer step. flops: of its batch. lines: what the run says at its start."""

    call: Call
    session: Session
    batch: int
    flops: float
    lines: list[str]


def prepared_step(size: str, device: str, **settings: Any) -> Step:
    """A run that is never saved. settings: flags of tools/train.py."""
    lines: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        config = configure(size, device=device, out=folder, **settings)
        world = World(0, 1, torch.device(device))
        session, state = prepare(config, world, lines.append)
    phase = session.system.phase(0, config.recipe.images)
    session.system.train()
    batch = config.recipe.batch
    return Step(
        functools.partial(training_step, session, state, phase),
        session,
        batch,
        batch * training_flops(session.system, phase),
        lines,
    )
