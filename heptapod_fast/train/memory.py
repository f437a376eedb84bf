"""How much memory training takes on a rank, counted before it starts.

`estimate` runs a forward and a backward pass of one micro-batch on fake tensors, which have shapes,
dtypes and a device but no memory, and a ledger adds up what is alive. So every tensor counts that
really is made: what the operators of the run keep, with the recomputation of the run, and the
temporaries of the backward pass. No system has to say what it keeps.

Exact up to rounding where PyTorch allocates: the CPU, and a GPU while nothing is compiled. Left out
are temporaries inside of one operation, the batch itself, the files that are put together while a
checkpoint is written, and on a GPU the CUDA context, the work space of cuBLAS and what the caching
allocator holds beyond what is asked for.
"""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from heptapod_fast.averages import averages_of
from heptapod_fast.config import Config
from heptapod_fast.data.tokens import Batch
from heptapod_fast.ops.dispatch import AUTO, Operators
from heptapod_fast.rng import Rng
from heptapod_fast.storage import available_memory
from heptapod_fast.systems import Phase, System, build_system
from heptapod_fast.train import recompute
from heptapod_fast.world import choose_precision

GB = 1e9
FLOAT32 = 4  # bytes
# Of a GPU's memory that training may fill: the allocator needs some air, CUDA has its own share.
SHARE_OF_GPU = 0.9
# Bytes that a step keeps or makes, for each FLOP of its forward pass: more than any system here
# comes to, whose tensors are results of products or lie beside them. Narrow fp32 ones have 0.4.
MOST_BYTES_PER_FLOP = 1.0
# Of the memory that training may fill: what stays below it fits, whatever else there is.
OBVIOUS_SHARE = 0.05


class NoEstimateError(RuntimeError):
    """A step cannot run on fake tensors: most often the host reads a value from the device."""


@dataclass(frozen=True)
class Work:
    """What the memory of a rank depends on.

    Attributes:
        config: resolved.
        num_classes: of the data.
        device: of the rank, one that this machine has.
        operators: as the system is built with.
        world_size: ranks.
        shards: ranks that hold one copy of the model together.
        is_captured: whether steps are captured in CUDA graphs.
    """

    config: Config
    num_classes: int
    device: torch.device
    operators: Operators = AUTO
    world_size: int = 1
    shards: int = 1
    is_captured: bool = False

    @property
    def keeps_gradients(self) -> bool:
        """Whether memory of all gradients stays during a step: earlier micro-batches have left
        theirs, or DDP has its messages there, or what is sharded is added to it, or a graph adds to
        gradients that stay."""
        micro_batches = self.config.split_batch(self.world_size).micro_batches
        return micro_batches > 1 or self.world_size > 1 or self.is_captured

    def system(self) -> System:
        """Of the run, on meta."""
        return build_system(self.config, self.num_classes, "meta", self.operators, fill=False)


class MemoryEstimate(NamedTuple):
    """Bytes of a step at its peak.

    per_parameter: bytes of weight, moments and averages of one parameter.
    fixed: these of all parameters, or of this rank's shards of them. They stay.
    casts: weights in bf16, which the backward pass of a product reads.
    activations: what else a forward pass of a micro-batch keeps for its backward pass.
    rest: what comes on top of these at the peak: gradients, and temporaries.
    copies: of the state, from which checkpoints are written while training goes on. They stay, on
        the host: 0 where the device is a GPU.
    """

    per_parameter: int
    fixed: int
    casts: int
    activations: int
    rest: int
    copies: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.fixed + self.casts + self.activations + self.rest + self.copies


# ---------------------------------------------------------------------------------------- counting


def estimate(work: Work, mode: str = "off") -> MemoryEstimate:
    """Of a training step with a mode of `recompute.MODES`; of several phases the largest.

    Raises:
        NoEstimateError: the step cannot be counted.
    """
    phases = work.system().phases(work.config.recipe.images)
    return max((_of_phase(work, mode, phase) for phase in phases), key=lambda found: found.total)


def _of_phase(work: Work, mode: str, phase: Phase) -> MemoryEstimate:
    try:
        step = _count_step(work, mode, phase)
    except Exception as error:  # whatever a system does that fake tensors cannot
        first_line = str(error).strip().partition("\n")[0]
        raise NoEstimateError(f"{type(error).__name__}: {first_line}") from error
    parameters = step.parameters
    per_parameter = bytes_per_parameter(len(averages_of(work.config.recipe.ema)))
    gradients = FLOAT32 * parameters // work.shards
    # Where nothing of them stays, gradients begin with the backward pass, and the ledger has them.
    kept_gradients = gradients if work.keeps_gradients else 0
    peak = max(step.peak + kept_gradients, gradients) + FLOAT32 * step.gathered
    return MemoryEstimate(
        per_parameter,
        per_parameter * parameters // work.shards,
        casts=step.casts,
        activations=step.kept - step.casts,
        rest=peak - step.kept,
        copies=_bytes_of_copies(work, per_parameter * parameters),
    )


def _bytes_of_copies(work: Work, state: int) -> int:
    """What a rank copies of the state of all parameters (saving.HostBuffers): its part."""
    is_on_the_host = work.device.type == "cpu"
    if not is_on_the_host or work.config.run.sync_checkpoints:
        return 0
    return state // work.world_size


def bytes_per_parameter(averages: int) -> int:
    """Weight, two moments, averages; all float32. Gradients come and go."""
    weight = average = FLOAT32
    moments = 2 * FLOAT32
    return weight + moments + averages * average


class _Step(NamedTuple):
    """parameters: their number. gathered: of these, how many a rank that holds shards puts together
    at a time. kept: bytes at the end of the forward pass, casts of weights among them. peak: the
    most bytes, gradients among them, parameters and batch not."""

    parameters: int
    gathered: int
    kept: int
    casts: int
    peak: int


def _count_step(work: Work, mode: str, phase: Phase) -> _Step:
    """Forward and backward pass of a micro-batch on fake tensors."""
    config = work.config
    split = config.split_batch(work.world_size)
    system = work.system()
    system.set_dtype(choose_precision(config.run.precision, work.device))
    recompute.apply(system, mode)
    # Masks of attention, which are made while a system is built, are real and meet fake tensors.
    with FakeTensorMode(allow_non_fake_inputs=True):
        system.to_empty(device=work.device)
        parameters = list(system.parameters())
        if work.keeps_gradients:
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter)
        batch = Batch.zeros(config.spec, split.micro_batch, work.device)
        ledger = Ledger(parameters)
        with ledger:
            loss = system.loss(batch, Rng(config.recipe.seed), phase)
            kept = ledger.bytes
            casts = ledger.bytes_of_casts
            (loss.total / system.expected_count(split.micro_batch, phase)).backward()
    gathered = _gathered(system) if work.shards > 1 else 0
    return _Step(_count(parameters), gathered, kept, casts, ledger.peak)


def _gathered(system: System) -> int:
    """Parameters outside of the units, which stay together from one end of a step to the other, and
    of two units: one that runs, one that comes next."""
    of_units = [_count(unit.parameters()) for unit in system.units()]
    outside = _count(system.parameters()) - sum(of_units)
    return outside + 2 * max(of_units, default=0)


def _count(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)


class Ledger(TorchDispatchMode):
    """Adds up the storages that operations make in its context, for as long as they live. What was
    there before does not count, and no storage twice.

    Attributes:
        bytes: alive now.
        peak: the most so far.

    Args:
        weights: of which casts are counted.
    """

    def __init__(self, weights: Iterable[Tensor] = ()):
        super().__init__()
        self.bytes = 0
        self.peak = 0
        self._alive: dict[int, int] = {}  # address of a storage's object -> bytes
        self._casts: set[int] = set()
        self._weights = {_address(weight) for weight in weights}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and enter what it made."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        made = [x for x in tree_leaves(result) if self._is_new(x)]
        if not made:
            return result
        # A result may be a view of an argument that was there before.
        given = {_address(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        is_cast = func is torch.ops.aten._to_copy.default and not given.isdisjoint(self._weights)
        for tensor in made:
            if _address(tensor) not in given:
                self._enter(tensor, is_cast)
        return result

    def _is_new(self, x: Any) -> bool:
        return isinstance(x, Tensor) and _address(x) not in self._alive

    @property
    def bytes_of_casts(self) -> int:
        """Of weights in another dtype, alive now."""
        return sum(self._alive[address] for address in self._casts)

    def _enter(self, tensor: Tensor, is_cast: bool) -> None:
        storage = tensor.untyped_storage()
        address = _address(tensor)
        if address in self._alive:
            return  # another view of it among the results of one operation
        self._alive[address] = storage.nbytes()
        self.bytes += storage.nbytes()
        self.peak = max(self.peak, self.bytes)
        if is_cast:
            self._casts.add(address)
        # Called when nothing holds the storage any more, neither here nor in autograd's graph.
        weakref.finalize(storage, self._leave, address)

    def _leave(self, address: int) -> None:
        self.bytes -= self._alive.pop(address)
        self._casts.discard(address)


def _address(tensor: Tensor) -> int:
    """Of the object that stands for the storage: fake storages have no data."""
    return tensor.untyped_storage()._cdata


# ---------------------------------------------------------------------------------------- deciding


class Fit(NamedTuple):
    """How a run fits into memory.

    mode: of `recompute.MODES`, and reason: why.
    estimate: with that mode; None where there is none.
    warning: what to change where it does not fit; "" where it does.
    bound: bytes that training does not come to, where there is no estimate.
    """

    mode: str
    reason: str
    estimate: MemoryEstimate | None
    warning: str = ""
    bound: int = sys.maxsize

    @property
    def bytes(self) -> int:
        """What to leave free for training; everything where nobody knows."""
        return self.bound if self.estimate is None else self.estimate.total

    def lines(self) -> list[str]:
        """What was decided, and why, for the start of a run."""
        lines = [f"recompute {self.mode} ({self.reason})"]
        if self.warning:
            lines.append(f"memory    {self.warning}")
        return lines


def obvious_fit(work: Work, limit: float) -> Fit | None:
    """`fit_into` without an estimate, which takes seconds: for a run that not even a bound brings
    near the limit. None for any other."""
    most = bound(work)
    if not math.isfinite(limit) or most > OBVIOUS_SHARE * limit:
        return None
    asked = work.config.run.recompute
    why = f"less than {_in_gb(most)} of {_in_gb(limit)}"
    if asked != "auto":
        why = f"asked for; {why}"
    return Fit(recompute.MODES[0] if asked == "auto" else asked, why, None, bound=most)


def bound(work: Work) -> int:
    """Bytes that no step of the run comes to, from its FLOPs and parameters alone."""
    system = work.system()
    parameters = _count(system.parameters())
    state = bytes_per_parameter(len(averages_of(work.config.recipe.ema))) * parameters
    gradients_and_casts = 2 * FLOAT32 * parameters
    micro_batch = work.config.split_batch(work.world_size).micro_batch
    flops = max(
        sum(system.flops_per_image(phase).values())
        for phase in system.phases(work.config.recipe.images)
    )
    of_step = math.ceil(MOST_BYTES_PER_FLOP * flops * micro_batch)
    return state + gradients_and_casts + of_step + _bytes_of_copies(work, state)


def fit_into(work: Work, limit: float) -> Fit:
    """The mode of --recompute and why: the one asked for, or of off, selective and full the first
    that fits.

    limit: bytes that training may take (`memory_limit`).
    """
    asked = work.config.run.recompute
    modes = recompute.MODES if asked == "auto" else (asked,)
    needs = []
    try:
        for mode in modes:
            found = estimate(work, mode)
            needs.append(f"{mode} needs {_in_gb(found.total)}")
            if found.total <= limit:
                break
        warning = "" if found.total <= limit else _warning(work, mode, found, limit)
    except NoEstimateError as error:
        return Fit(modes[0], f"no estimate of memory: {error}", None)
    why = "; ".join(needs)
    if math.isfinite(limit):
        why += f" of {_in_gb(limit)}"
    if asked != "auto":
        why = f"asked for; {why}"
    return Fit(mode, why, found, warning)


def _warning(work: Work, mode: str, found: MemoryEstimate, limit: float) -> str:
    micro_batch = work.config.split_batch(work.world_size).micro_batch
    fitting = fitting_micro_batch(work, mode, limit)
    what = f"--micro-batch {fitting} would fit" if fitting else "no --micro-batch would fit"
    return (
        f"a step with --micro-batch {micro_batch} and --recompute {mode} needs about "
        f"{_in_gb(found.total)}, training may take {_in_gb(limit)}: {what}"
    )


def fitting_micro_batch(work: Work, mode: str, limit: float) -> int | None:
    """The largest --micro-batch below the run's with which a step fits; None if there is none."""
    split = work.config.split_batch(work.world_size)
    multiple, _ = work.config.model.micro_batch_multiple()
    smaller = [
        size for size in range(multiple, split.micro_batch, multiple) if split.share % size == 0
    ]

    def fits(size: int) -> bool:
        changed = replace(work, config=work.config.replace(micro_batch=size))
        return estimate(changed, mode).total <= limit

    # By bisection: memory grows with the micro-batch.
    fitting = None
    while smaller:
        middle = len(smaller) // 2
        if fits(smaller[middle]):
            fitting = smaller[middle]
            smaller = smaller[middle + 1 :]
        else:
            smaller = smaller[:middle]
    return fitting


def memory_limit(device: torch.device, ranks_here: int = 1) -> float:
    """Bytes that training may take on a device; infinitely many if nobody knows.

    ranks_here: on this machine, which share its memory where they train on CPUs.
    """
    if device.type == "cuda":
        _, total = torch.cuda.mem_get_info(device)
        return SHARE_OF_GPU * total
    available = available_memory()
    return math.inf if available is None else available / ranks_here


def _in_gb(count: float) -> str:
    return f"{count / GB:.3g} GB"
