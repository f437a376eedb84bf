"""The only place that knows how the work of a step is spread over ranks.

Data parallel in its plainest form: every rank holds the whole model, takes a contiguous block of
the global batch and adds its gradients to everybody's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from heptapod_fast.world import World


def gradients_of(parameters: Sequence[Tensor]) -> list[Tensor]:
    """The gradient of every parameter; zeros for one that the step did not use, as parts of a model
    that only other phases of training use."""
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
