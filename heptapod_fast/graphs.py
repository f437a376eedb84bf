"""CUDA graphs: work of a device that is recorded once and replayed."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import torch

Result = TypeVar("Result")
Work = Callable[[], Result]


@contextmanager
def beside(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """A block on a side stream: after all that the current one was given before, and before all
    that it is given next. None: where there are no streams."""
    if stream is None:
        yield
        return
    current = torch.cuda.current_stream(stream.device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        yield
    current.wait_stream(stream)


@lru_cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream of a device for those who record often: cuBLAS keeps a workspace for each that it
    has worked on."""
    return torch.cuda.Stream(device)


class Recorded(NamedTuple):
    """A graph and the tensors that it writes anew whenever it is replayed."""

    graph: torch.cuda.CUDAGraph
    result: Any


class Graphs:
    """CUDA graphs that share one pool of memory, and the side stream that they are captured on.

    They have to be replayed in the order in which they were captured: one may use what the one
    before it has left.
    """

    def __init__(self, device: torch.device, stream: torch.cuda.Stream | None = None):
        self._device = device
        self._stream = torch.cuda.Stream(device) if stream is None else stream
        self._pool = torch.cuda.graph_pool_handle()
        self._recorded: dict[Hashable, Recorded] = {}

    def __contains__(self, name: Hashable) -> bool:
        return name in self._recorded

    def warm_up(self, work: Work[Result]) -> Result:
        """Run something on the stream of the captures."""
        with beside(self._stream):
            return work()

    def capture(self, name: Hashable, work: Work[object]) -> None:
        """Record what `work` launches, without running it. RuntimeError: it cannot be recorded."""
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(self._device)
        # Other threads, such as those that read data or write a checkpoint, go on meanwhile.
        recording = torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        )
        try:
            with recording:
                result = work()
        except BaseException:
            # Where the end of a capture fails, torch.cuda.graph stays on its stream.
            torch.cuda.set_stream(current)
            raise
        self._recorded[name] = Recorded(graph, result)

    def replay(self, name: Hashable) -> Any:
        """Run what was recorded; its result is overwritten by the next time."""
        recorded = self._recorded[name]
        recorded.graph.replay()
        return recorded.result

    def drop(self) -> None:
        """Forget all graphs, and their memory."""
        self._recorded.clear()
        self._pool = torch.cuda.graph_pool_handle()
