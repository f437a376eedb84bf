"""The only place that knows how the work of a step is spread over ranks.

Every rank takes a contiguous block of the global batch. What it holds of the model is one of

    single   all of it: there is one rank
    ddp      all of it, as every other rank does; gradients are added up while the backward pass
             goes on (DistributedDataParallel)
    fsdp     a part of every tensor: weights, gradients, moments and averages are spread over all
             ranks, and a block's weights are put together while it runs (fully_shard)
    hsdp     the same over a group of ranks, such as those of one machine; the groups are copies of
             each other

All give the same weights up to the rounding of sums. Gradients are added up, never averaged: every
rank has divided its loss by the expected count of the global batch (step.py).
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from heptapod_fast.config import Config
from heptapod_fast.data.tokens import Batch
from heptapod_fast.graphs import beside
from heptapod_fast.ops import sharded
from heptapod_fast.rng import Rng
from heptapod_fast.systems import Loss, Phase, System
from heptapod_fast.train import memory
from heptapod_fast.world import World

Model = Callable[[Batch, Rng, Phase], Loss]

# ------------------------------------------------------------------------------------- the decision


@dataclass(frozen=True)
class Layout:
    """How a run is spread.

    mode: see above. shards: ranks that hold one copy of the model together. why: for the user.
    """

    mode: str
    shards: int
    why: str


def choose_layout(work: memory.Work, world: World) -> Layout:
    """What --parallel and --shard-ranks come to among these ranks.

    Raises:
        ValueError: the ranks cannot be grouped so; names the flag.
    """
    run = work.config.run
    if run.shard_ranks is not None and run.parallel != "hsdp":
        raise ValueError(
            f"--shard-ranks {run.shard_ranks} is for --parallel hsdp, this is {run.parallel}"
        )
    if world.size == 1:
        return Layout("single", 1, "one rank")
    mode: str = run.parallel
    why = "asked for"
    if mode == "auto":
        mode, why = _fitting_mode(work, world)
    if mode == "ddp":
        return Layout(mode, 1, why)
    if mode == "fsdp":
        return Layout(mode, world.size, why)
    return Layout(mode, _shards_of_a_copy(work.config, world), why)


def _fitting_mode(work: memory.Work, world: World) -> tuple[str, str]:
    """ddp where the whole state fits on a device: it sends least."""
    if world.device.type != "cuda":
        return "ddp", "auto: a copy on every rank"
    limit = memory.memory_limit(world.device)
    try:
        needed = memory.estimate(work).total
    except memory.NoEstimateError as error:
        return "ddp", f"auto: no estimate of memory: {error}"
    sizes = f"{needed / memory.GB:.3g} GB of {limit / memory.GB:.3g} GB"
    if needed <= limit:
        return "ddp", f"auto: with a copy on every rank it needs {sizes}"
    is_one_machine = world.local_size in (1, world.size)
    return "fsdp" if is_one_machine else "hsdp", f"auto: with a copy on every rank {sizes}"


def _shards_of_a_copy(config: Config, world: World) -> int:
    shards = config.run.shard_ranks
    if shards is None:
        shards = world.local_size
    if world.size % shards:
        raise ValueError(
            f"--shard-ranks {shards} does not divide {world.size} ranks: every group of that many "
            "holds one copy"
        )
    return shards


# ---------------------------------------------------------------------------------------- the modes


class Parallel:
    """A system among its ranks; this class is of one rank alone.

    Attributes:
        model: what steps call in the system's place, so that the hooks of wrappers fire.
        groups: of ranks that send messages to each other, beside the main one.
        messages_settle: whether the first steps decide how gradients are sent later.
        obstacle: why its steps cannot be captured in a graph, besides what follows from the mode.
    """

    messages_settle = False
    obstacle: str | None = None

    def __init__(self, system: System):
        self.system = system
        self.groups: list[dist.ProcessGroup] = []
        self.model: Model = system

    def adding_up(self, is_last: bool) -> AbstractContextManager[object]:
        """The context of a micro-batch's forward and backward pass. is_last: of the step, after
        which the gradients of all ranks are there."""
        return nullcontext()

    @contextmanager
    def whole(self, tensors: Sequence[Tensor]) -> Iterator[System]:
        """A system that this rank can use without the others, with these tensors for parameters,
        in the order of `system.parameters()`. Collective call."""
        parameters = list(self.system.parameters())
        live = [parameter.data for parameter in parameters]
        for parameter, tensor in zip(parameters, tensors, strict=True):
            parameter.data = tensor.detach()
        try:
            yield self.system
        finally:
            for parameter, data in zip(parameters, live, strict=True):
                parameter.data = data


class Replicated(Parallel):
    """ddp.

    Args:
        phases: of the training.
    """

    messages_settle = True

    def __init__(self, system: System, phases: Sequence[Phase]):
        super().__init__(system)
        leaves_out = [phase for phase in phases if _unused_in(system, phase)]
        if leaves_out:
            names = ", ".join(_unused_in(system, leaves_out[0]))
            self.obstacle = (
                f"the host of ddp looks for parameters that a phase leaves out ({names})"
            )
        self.wrapped = torch.nn.parallel.DistributedDataParallel(
            system,
            gradient_as_bucket_view=True,
            find_unused_parameters=bool(leaves_out),
            **_WITHOUT_BUFFERS,
        )
        self.wrapped.register_comm_hook(None, _sum_bucket)
        self.model = self.wrapped
        if not leaves_out:
            # After its first pass DDP cuts its messages anew, in the order in which gradients came.
            # Sums of three ranks and more depend on the cut: a resumed run would differ in last
            # bits from one that went through. So the first pass is one that does not count.
            _smallest_pass(self.model, system, phases[0])
            _drop_gradients(system)

    def adding_up(self, is_last: bool) -> AbstractContextManager[object]:
        """Only the last micro-batch of a step sends."""
        return nullcontext() if is_last else self.wrapped.no_sync()


# Buffers are constants, alike on all ranks. The name of that switch depends on the version.
_OF_DDP = inspect.signature(torch.nn.parallel.DistributedDataParallel).parameters
_SYNC = "forward_sync_buffers" if "forward_sync_buffers" in _OF_DDP else "broadcast_buffers"
_WITHOUT_BUFFERS: dict[str, Any] = {_SYNC: False}


def _smallest_pass(model: Model, system: System, phase: Phase) -> None:
    """Forward and backward pass of as few sequences of zeros as a micro-batch can have."""
    device = next(system.parameters()).device
    few, _ = system.settings.micro_batch_multiple()
    with _nothing_compiled():  # for this shape alone
        loss = model(Batch.zeros(system.spec, few, device), Rng(0), phase)
        loss.total.backward()


def _nothing_compiled() -> AbstractContextManager[object]:
    """Compiled units run as they are written. Where the compiler was not imported there are none,
    and asking for it would import it, in two seconds."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def _unused_in(system: System, phase: Phase) -> list[str]:
    """The parameters that a phase leaves out."""
    _smallest_pass(system, system, phase)
    names = [name for name, parameter in system.named_parameters() if parameter.grad is None]
    _drop_gradients(system)
    return names


def _drop_gradients(system: System) -> None:
    for parameter in system.parameters():
        parameter.grad = None


# Without annotations: DDP compares them with types, and here they are strings.
def _sum_bucket(state, bucket):
    """DDP's own hook without its division by the number of ranks: a dist.GradBucket -> a future of
    its sum over ranks."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


class Sharded(Parallel):
    """fsdp and hsdp. Every micro-batch sends its gradients: those of the whole model would not fit.

    Args:
        blank: makes a system of this kind with parameters that nobody has filled.
    """

    def __init__(self, system: System, layout: Layout, world: World, blank: Callable[[], System]):
        from torch.distributed.fsdp import fully_shard

        super().__init__(system)
        self.blank = blank
        mesh = _mesh(layout, world)
        self.groups = mesh.get_all_groups()
        for unit in [*system.units(), system]:
            wrapped = fully_shard(unit, mesh=mesh)
            wrapped.set_gradient_divide_factor(1.0)
            # A factor of 1 as a plain sum: not every backend has scaled sums.
            wrapped.set_force_sum_reduction_for_comms(True)

    @contextmanager
    def whole(self, tensors: Sequence[Tensor]) -> Iterator[System]:
        """See Parallel.whole; a copy in full that is dropped afterwards."""
        copy = self.blank()
        copy.train(self.system.training)
        with torch.no_grad():
            for parameter, tensor in zip(copy.parameters(), tensors, strict=True):
                parameter.copy_(sharded.whole(tensor))
        yield copy


def _mesh(layout: Layout, world: World) -> torch.distributed.DeviceMesh:
    shape: tuple[int, ...] = (layout.shards,)
    names: tuple[str, ...] = ("shard",)
    if layout.mode == "hsdp":
        shape = (world.size // layout.shards, layout.shards)
        names = ("replicate", "shard")
    return torch.distributed.init_device_mesh(world.device.type, shape, mesh_dim_names=names)


def spread(
    system: System,
    layout: Layout,
    world: World,
    phases: Sequence[Phase],
    blank: Callable[[], System],
) -> Parallel:
    """Put a filled system among its ranks. Collective call.

    Args:
        phases: see Replicated.
        blank: see Sharded.
    """
    if layout.mode == "single":
        return Parallel(system)
    if layout.mode == "ddp":
        # DDP adds up gradients on the stream that it was made on, and the default stream cannot
        # take part in a capture (see capture.py).
        is_cuda = world.device.type == "cuda"
        with beside(torch.cuda.Stream(world.device) if is_cuda else None):
            return Replicated(system, phases)
    return Sharded(system, layout, world, blank)


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
