"""One optimizer step over the global batch, as three functions over fixed buffers, and what runs
the two of the device for a session.

    load               the next micro-batch into the buffers            host and device
    forward_backward   its loss, and its gradient added to the others   device alone
    update             gradients of all ranks -> new weights            device alone

**Normalisation.** A step minimises sum(weight * loss) / sum(weight) over the supervised positions
of the *global* batch, so that neither ranks nor micro-batches change it (--steps mar draws per
micro-batch, and is the exception). The sum of weights is known only after the last micro-batch of
the last rank. So every micro-batch divides its total by the *expected* sum at once, gradients are
added up, and `update` corrects them all by expected / true, a factor of exactly 1 where steps are
antithetic:

    gradient = (expected / true) * sum over micro-batches of d(total / expected)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.profiler import record_function

from heptapod_fast.data.tokens import Batch, TokenSource
from heptapod_fast.rng import Rng
from heptapod_fast.systems import Phase
from heptapod_fast.tokenizers import TokenSpec
from heptapod_fast.train.optimizer import Optimizer
from heptapod_fast.train.parallelize import Model, Parallel
from heptapod_fast.world import World


@dataclass(frozen=True)
class Buffers:
    """Tensors that every step fills anew, at the same addresses.

    batch: one micro-batch. sums: (2,) float64, total and count of this rank's micro-batches so far.
    """

    batch: Batch
    sums: Tensor

    @classmethod
    def allocate(cls, spec: TokenSpec, micro_batch: int, device: torch.device) -> Buffers:
        """For micro-batches of so many sequences."""
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        return cls(Batch.zeros(spec, micro_batch, device), sums)


def load(source: TokenSource, first: int, buffers: Buffers) -> None:
    """Fill the buffers with the samples from global index `first` on."""
    fixed = buffers.batch
    batch = source.batch(torch.arange(first, first + len(fixed)))
    fixed.tokens.copy_(batch.tokens, non_blocking=True)
    fixed.labels.copy_(batch.labels, non_blocking=True)
    fixed.index.copy_(batch.index, non_blocking=True)


def forward_backward(
    model: Model, buffers: Buffers, rng: Rng, expected: float, phase: Phase
) -> None:
    """Add the gradient and the sums of the micro-batch in the buffers to those before it.

    model: `Parallel.model`, in the context of `Parallel.adding_up`.
    """
    with record_function("forward"):
        loss = model(buffers.batch, rng, phase)
    with record_function("backward"):
        (loss.total / expected).backward()
    buffers.sums[0] += loss.total.detach()
    buffers.sums[1] += loss.count


def update(
    optimizer: Optimizer, world: World, sums: Tensor, expected: float
) -> tuple[Tensor, Tensor]:
    """The optimizer's step, which `Optimizer.begin` has begun. Collective call.

    The gradients of all ranks are added up by then; `sums` are added up here.

    Returns:
        (mean loss of the global batch, norm of its gradient), both on the device.
    """
    world.sum(sums)
    total, count = sums.unbind()
    norm = optimizer.update((expected / count).float(), world)
    return total / count, norm


# --------------------------------------------------------------------------------------- executors


class Executor(Protocol):
    """Runs the device's part of a session's steps: operation by operation (`Eager`), or as graphs
    that were captured of it (`capture.Captured`)."""

    def forward_backward(self, phase: Phase, is_last: bool) -> None:
        """`forward_backward` of the micro-batch in the buffers. is_last: of the step."""
        ...

    def update(self, phase: Phase) -> tuple[Tensor, Tensor]:
        """`update`; what it returns is the caller's to keep. Collective call."""
        ...


@dataclass(frozen=True)
class Eager:
    """An executor that runs one operation after the other.

    batch: sequences of the global batch. The rest is the session's.
    """

    parallel: Parallel
    optimizer: Optimizer
    world: World
    buffers: Buffers
    rng: Rng
    batch: int

    def forward_backward(self, phase: Phase, is_last: bool) -> None:
        """See Executor.forward_backward."""
        with self.parallel.adding_up(is_last):
            forward_backward(
                self.parallel.model, self.buffers, self.rng, self._expected(phase), phase
            )

    def update(self, phase: Phase) -> tuple[Tensor, Tensor]:
        """See Executor.update."""
        return update(self.optimizer, self.world, self.buffers.sums, self._expected(phase))

    def _expected(self, phase: Phase) -> float:
        return self.parallel.system.expected_count(self.batch, phase)
