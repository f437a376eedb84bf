"""--cuda-graph: the device's part of a step, recorded once and replayed.

A step launches thousands of kernels, each by some microseconds of Python. A graph is launched by
one call, so that the GPU does not wait for the host. What it needs is there without it: tensors
that do not move (`Buffers`, the optimizer's, gradients that are set to zero instead of dropped),
no value that the host reads or hands over in the middle of a step, and draws that are functions of
the samples' numbers among the buffers.

    load                                                      outside, by the host
    forward_backward   of a micro-batch that sends nothing,
                       and of the last one of a step          a graph each, replayed for each
    begin              scalars of the optimizer               outside, one small copy
    update                                                    a graph

Nothing depends on the capturing: the first steps of a phase run as ever (PyTorch asks for some on
a side stream, which load kernels and fill caches), then one is captured, and replayed at once,
for a capture executes nothing. Another phase has other shapes and numbers: its graphs are new.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from heptapod_fast.graphs import Graphs, Work
from heptapod_fast.runs.directory import RunError
from heptapod_fast.systems import Phase
from heptapod_fast.train.step import Eager, Executor

Say = Callable[[str], None]

# Steps before a capture. DDP looks at its messages in the first ten:
# docs.pytorch.org/docs/stable/notes/cuda.html#usage-with-distributeddataparallel
WARM_UP = 3
WARM_UP_OF_DDP = 11


# ------------------------------------------------------------------------------------- the decision


class Choice(NamedTuple):
    """Whether steps are captured, and why. is_asked_for: what cannot be is an error then."""

    is_on: bool
    why: str
    is_asked_for: bool = False

    def line(self) -> str:
        """For the start of a run."""
        return f"graph     {'on' if self.is_on else 'off'} ({self.why})"


def choose(asked: str, device: torch.device, mode: str) -> Choice:
    """What --cuda-graph comes to.

    Args:
        asked: "auto", "on" or "off".
        device: of the rank.
        mode: of `parallelize.Layout`.

    Raises:
        ValueError: it is asked for and cannot be.
    """
    if asked == "off":
        return Choice(False, "asked for")
    choice = Choice(True, "auto: one launch for a whole pass")
    if asked == "on":
        choice = Choice(True, "asked for", is_asked_for=True)
    return unless(choice, why_not(device, mode))


def why_not(device: torch.device, mode: str) -> str | None:
    """Why steps cannot be captured here; None where they can."""
    if device.type != "cuda":
        return f"CUDA graphs need a GPU, this trains on {device.type}"
    if mode in ("fsdp", "hsdp"):
        return (
            f"{mode} puts the weights of a block together and frees them again in every pass, in "
            "memory that the host chooses each time"
        )
    return None


def unless(choice: Choice, obstacle: str | None) -> Choice:
    """The choice, off where something stands in the way; ValueError where it was asked for."""
    if obstacle is None or not choice.is_on:
        return choice
    if choice.is_asked_for:
        raise ValueError(
            f"--cuda-graph on: {obstacle}. Take --cuda-graph auto, which goes without where it must"
        )
    return Choice(False, f"auto: {obstacle}")


def executor_of(eager: Eager, choice: Choice, device: torch.device, say: Say) -> Executor:
    """What runs the steps of a session.

    Raises:
        ValueError: capturing is asked for, and `Parallel.obstacle` stands in its way.
    """
    found = unless(choice, eager.parallel.obstacle)
    if found != choice:  # the line of the first choice was said already
        say(found.line())
    if not found.is_on:
        return eager
    return Captured(eager, Graphs(device), say, must=found.is_asked_for)


# ------------------------------------------------------------------------------------------ graphs


class Captured:
    """An `Executor` that captures the passes of an eager one.

    A capture that fails has executed nothing: the step goes on without graphs, and so do all that
    follow.

    Args:
        eager: what is captured.
        graphs: where to.
        say: takes the line of a failure.
        must: a failure is an error.
    """

    def __init__(self, eager: Eager, graphs: Graphs, say: Say, must: bool = False):
        self._eager = eager
        self._graphs = graphs
        self._say = say
        self._must = must
        self._warm_up = WARM_UP
        if eager.parallel.messages_settle:
            self._warm_up = WARM_UP_OF_DDP
        self._phase: Phase | None = None
        self._steps = 0  # of this phase, so far
        self._has_failed = False
        eager.optimizer.keep_gradients()

    def forward_backward(self, phase: Phase, is_last: bool) -> None:
        """See Executor.forward_backward."""
        if phase != self._phase:
            self._graphs.drop()
            self._phase = phase
            self._steps = 0
        name = ("forward_backward", is_last)
        self._run(name, lambda: self._eager.forward_backward(phase, is_last))

    def update(self, phase: Phase) -> tuple[Tensor, Tensor]:
        """See Executor.update."""
        loss, norm = self._run("update", lambda: self._eager.update(phase))
        self._steps += 1
        # The next replay overwrites them, and may do so in the middle of the next step.
        return loss.clone(), norm.clone()

    def _run(self, name: Hashable, work: Work[Any]) -> Any:
        if self._has_failed:
            return work()
        if self._steps < self._warm_up:
            return self._graphs.warm_up(work)
        if name not in self._graphs:
            try:
                self._graphs.capture(name, work)
            except RuntimeError as error:
                self._give_up(error)
                return work()
        return self._graphs.replay(name)

    def _give_up(self, error: RuntimeError) -> None:
        """RunError where it must not fail."""
        # What broke the capture comes first; that its end failed then follows from it.
        cause = error.__context__ or error
        first_line = str(cause).strip().partition("\n")[0]
        what = f"the step cannot be captured in a CUDA graph: {type(cause).__name__}: {first_line}"
        if self._must:
            raise RunError(f"--cuda-graph on: {what}. Take --cuda-graph off") from error
        self._has_failed = True
        self._graphs.drop()
        self._say(f"WARNING: {what}; training goes on without, slower (--cuda-graph off says so)")
