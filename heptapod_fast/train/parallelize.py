"""The only place that knows how the work of a step is spread over ranks.

Data parallel in its plainest form: every rank holds the whole model, takes a contiguous block of
the global batch and adds its gradients to everybody's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from heptapod_fast.world import World


def sum_gradients(world: World, parameters: Sequence[Tensor]) -> None:
    """Add up the gradients of all ranks, in place and in one message. Collective call.

    Sums, not means: every rank has divided its loss by the expected count of the global batch.
    """
    if world.size == 1:
        return
    flat = torch.cat([parameter.grad.flatten() for parameter in parameters])
    world.sum(flat)
    parts = flat.split([parameter.numel() for parameter in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.grad.copy_(part.view_as(parameter))
