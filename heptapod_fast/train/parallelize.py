"""The only place that knows how the work of a step is spread over ranks.

Data parallel in its plainest form: every rank holds the whole model, takes a contiguous block of
the global batch and adds its gradients to everybody's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from heptapod_fast.data.tokens import Batch
from heptapod_fast.rng import Rng
from heptapod_fast.systems import Loss, Phase, System
from heptapod_fast.world import World

Model = Callable[[Batch, Rng, Phase], Loss]


def wrap(system: System) -> Model:
    """What training steps call in the system's place.

    Data parallel in its plainest form needs no wrapper: it is the system itself. Wrappers that
    shard, compile or capture it belong here; steps call what comes out, never the system, so that
    a wrapper's hooks fire.
    """
    return system


def gradients_of(parameters: Sequence[Tensor]) -> list[Tensor]:
    """The gradient of every parameter; zeros for one that the step did not use, as parts of a model
    that only other phases of training use.

    The optimizer treats such a parameter like any other: its moments fade and weight decay acts on
    it, on every rank alike. A system that wants a part left alone in a phase has to say so in
    `decays`, or train it in every phase.
    """
    found = []
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        found.append(parameter.grad)
    return found


def sum_gradients(world: World, parameters: Sequence[Tensor]) -> None:
    """Add up the gradients of all ranks, in place and in one message. Collective call.

    Sums, not means: every rank has divided its loss by the expected count of the global batch.
    """
    if world.size == 1:
        return
    gradients = gradients_of(parameters)
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    world.sum(flat)
    parts = flat.split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))
