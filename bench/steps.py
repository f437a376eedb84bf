"""Whole training steps as the loop runs them, prepared to be timed."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from bench.case import Case
from bench.timer import Call
from heptapod_fast import configure
from heptapod_fast.systems import build_system
from heptapod_fast.train.loop import training_step
from heptapod_fast.train.metrics import training_flops
from heptapod_fast.train.session import Session, prepare
from heptapod_fast.world import World

CLASSES = 1000  # where shapes alone are built


class Step(NamedTuple):
    """call: one optimizer step. flops: of its batch. lines: what the run says at its start."""

    call: Call
    session: Session
    batch: int
    flops: float
    lines: list[str]


def sized(size: str, batch: int, device: str, **flags: Any) -> dict[str, Any]:
    """Settings of a step of one micro-batch of a size: tiny on its logograms, others on synthetic
    tokens; with the kernels where there is a GPU."""
    settings: dict[str, Any] = dict(size=size, batch=batch, micro_batch=batch, device=device)
    settings |= {"logogram_count": 500} if size == "tiny" else {"data": "synthetic"}
    if device == "cuda":
        settings |= {"kernels": "triton", "attention": "triton"}
    return settings | flags


def flops_of(settings: dict[str, Any]) -> float:
    """FLOPs of a step in the first phase, without building anything but shapes."""
    config = configure(**settings)
    system = build_system(config, CLASSES, "meta", fill=False)
    phase = system.phase(0, config.recipe.images)
    return config.recipe.batch * training_flops(system, phase)


def ours(settings: dict[str, Any], made: object = None) -> Call:
    """The trainer's step as a contender of a case; nothing is compared, so that no inputs are
    shared."""
    return prepared_step(**settings).call


def case_of(name: str, settings: dict[str, Any], **others: Callable[[object], Call]) -> Case:
    """A step beside others. settings: flags of ours. others: contenders, by their names with _ for
    spaces."""
    size, batch = settings["size"], settings["batch"]
    contenders = {"ours": functools.partial(ours, settings)}
    contenders |= {other.replace("_", " "): prepare for other, prepare in others.items()}
    return Case(
        f"training step, {size}, batch {batch}",
        name,
        lambda: None,
        contenders,
        flops=flops_of(settings),
        images=batch,
    )


def prepared_step(size: str, device: str, world: World | None = None, **settings: Any) -> Step:
    """A run that is never saved. settings: flags of tools/train.py. world: of the ranks that share
    it; collective call then."""
    lines: list[str] = []
    if world is None:
        world = World(0, 1, torch.device(device))
    with tempfile.TemporaryDirectory() as folder:
        config = configure(size, device=device, out=folder, **settings)
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
