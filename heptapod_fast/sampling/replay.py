"""The steps of a sampler, recorded once and replayed: --cuda-graph of tools/sample.py.

A step of drawing launches hundreds of small kernels, and thousands where vectors are denoised. On a
GPU they are recorded in a CUDA graph at the fourth step, and replayed at all others. What must hold
for that: a step reads and writes tensors that stay where they are, and what changes from step to
step (its number, how much the caches hold) stands in tensors that are filled in before it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from heptapod_fast.graphs import Graphs, Work, side_stream
from heptapod_fast.rng import Rng, SteppedRng
from heptapod_fast.sampling.options import SampleOptions

logger = logging.getLogger(__name__)
WARM_UP = 3  # steps of a kind before it is recorded: kernels are loaded, tables made


class Recorder(Protocol):
    """What records and replays work: `graphs.Graphs`."""

    def __contains__(self, name: Hashable) -> bool: ...

    def warm_up(self, work: Work[None]) -> None: ...

    def capture(self, name: Hashable, work: Work[None]) -> None: ...

    def replay(self, name: Hashable) -> object: ...


def steps_for(options: SampleOptions, rng: Rng, steps: int, device: torch.device) -> Steps:
    """The steps of one call of a sampler, as --cuda-graph has it.

    Raises:
        ValueError: see `recorder_for`.
    """
    recorder = recorder_for(options, device)
    return Steps(rng, steps, device, recorder, must=options.cuda_graph == "on")


def recorder_for(options: SampleOptions, device: torch.device) -> Recorder | None:
    """What --cuda-graph comes to; None where every step is launched anew.

    Raises:
        ValueError: it is asked for where there is no GPU.
    """
    if options.cuda_graph == "on" and device.type != "cuda":
        raise ValueError(f"--cuda-graph on: CUDA graphs need a GPU, this samples on {device.type}")
    if options.cuda_graph == "off" or device.type != "cuda":
        return None
    return Graphs(device, side_stream(device))


class Steps:
    """Runs steps, and replays those that repeat. A recording that fails has executed nothing: the
    step is launched anew, and so are all that follow.

    Args:
        rng: draws of step s are those of rng.at(s).
        steps: how many there may be.
        device: of the tensors.
        recorder: see `recorder_for`.
        must: a recording that fails is an error.
    """

    def __init__(
        self,
        rng: Rng,
        steps: int,
        device: torch.device,
        recorder: Recorder | None,
        must: bool = False,
    ):
        self._rng = rng
        self._recorder = recorder
        self._must = must
        self._step_1 = torch.zeros(1, dtype=torch.int64, device=device)
        self._stepped = SteppedRng(rng.seed, step_1=self._step_1, steps=steps)
        self._runs: dict[Hashable, int] = {}

    def run(self, step: int, kind: Hashable, work: Callable[[Rng], None]) -> None:
        """Do the work of a step, with the source of its draws.

        kind: steps of one kind do the same on the same tensors, but for what stands in tensors;
            None for a step like no other.
        """
        if self._recorder is None or kind is None:
            work(self._rng.at(step))
            return
        self._step_1.fill_(step)
        runs = self._runs.get(kind, 0)
        self._runs[kind] = runs + 1
        if runs < WARM_UP:
            self._recorder.warm_up(lambda: work(self._stepped))
            return
        if kind not in self._recorder:
            try:
                self._recorder.capture(kind, lambda: work(self._stepped))
            except RuntimeError as error:
                self._give_up(error)
                work(self._rng.at(step))
                return
        self._recorder.replay(kind)

    def _give_up(self, error: RuntimeError) -> None:
        """ValueError where it must not fail."""
        # What broke the recording comes first; that its end failed then follows from it.
        cause = error.__context__ or error
        first_line = str(cause).strip().partition("\n")[0]
        what = f"a step of sampling cannot be recorded in a CUDA graph: {first_line}"
        if self._must:
            raise ValueError(f"--cuda-graph on: {what}. Take --cuda-graph off") from error
        self._recorder = None
        logger.warning("%s; sampling goes on without, slower (--cuda-graph off says so)", what)


class Entering:
    """What enters a network at the next step: tensors (B, M, ...) for M elements of each sequence.

    Those of one M always lie in the same memory, wherever the steps between have had other ones: a
    step that was recorded for M elements will look for them there.
    """

    def __init__(self, *values: Tensor):
        self._buffers: dict[int, tuple[Tensor, ...]] = {}
        self._count = 0
        self.put(*values)

    @property
    def count(self) -> int:
        """M."""
        return self._count

    def put(self, *values: Tensor) -> None:
        """Let these enter next."""
        self._count = values[0].shape[1]
        buffers = self._buffers.setdefault(self._count, values)
        for buffer, value in zip(buffers, values, strict=True):
            if buffer is not value:
                buffer.copy_(value)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._buffers[self._count])
