"""What every benchmark of an operation is made of, for pytest and for bench/gpu.py alike.

A `Case` is one operation at one shape with its contenders. On CUDA a contender is captured into a
CUDA graph of many calls over inputs that together exceed the L2 cache several times, and the graphs
of all contenders are replayed in turns, so that clocks and noise meet all alike. On CPU the same
functions run at small shapes: that shows that they work, not how fast they are.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

L2_MULTIPLE = 3
L2_BYTES = 60 * 2**20
CALLS_PER_GRAPH = 20


class Missing(RuntimeError):
    """A peer is not installed, or cannot run here; str(error) says what to install."""


class CaptureFailed(RuntimeError):
    """A contender cannot be captured. The process is of no use for further captures then: PyTorch's
    allocator goes on believing that one is under way."""

    def __init__(self, contender: str, why: str):
        super().__init__(why)
        self.contender = contender


NO_TIME = "no time left"


def fastest(device: str) -> str:
    """What "ours" asks for: on CUDA the kernel by name, because a fallback is no measurement."""
    return "triton" if device == "cuda" else "auto"


@dataclass(frozen=True)
class Case:
    """One operation at one shape.

    operation: its name ("layer_norm"). name: what tells the cases of an operation apart ("backward,
    B, 32,896 x 768"). inputs(): one fresh set of inputs on the device, random data. contenders:
    {"ours": f, "eager": f, "compiled": f, ...}; f(inputs) does what should not be timed (a forward
    pass, an allocation) and returns a function without arguments, one call to be timed; it raises
    `Missing` where the peer is not there. bytes, flops: what any implementation must at least move
    and multiply. modelled: a floor in seconds to print beside the measurement, if there is one.
    gate, aim: the ratio against the best peer, or the share of the ceiling, that this has to reach.
    """

    operation: str
    name: str
    inputs: Callable[[], Any]
    contenders: dict[str, Callable[[Any], Callable[[], Any]]]
    bytes: float = 0.0
    flops: float = 0.0
    gate: str = ""
    aim: str = ""


def gradients(function: Callable, inputs: tuple, upstream: tuple, both: bool) -> Callable[[], Any]:
    """A call that runs the backward pass alone, or forward and backward (`both`).

    inputs: arguments of `function`, those that require gradients get them; upstream: gradients of
    its outputs.
    """
    wanted = [x for x in inputs if torch.is_tensor(x) and x.requires_grad]

    def forward():
        outputs = function(*inputs)
        return (outputs,) if torch.is_tensor(outputs) else tuple(outputs)

    if both:
        return lambda: torch.autograd.grad(forward(), wanted, upstream)
    outputs = forward()
    return lambda: torch.autograd.grad(outputs, wanted, upstream, retain_graph=True)


def compiled(function: Callable) -> Callable:
    """torch.compile of a reference, static shapes; one compilation serves all sets of inputs."""
    # A backward pass that is repeated must not give its saved tensors away.
    torch._functorch.config.donated_buffer = False
    return torch.compile(function, dynamic=False)


@dataclass
class Result:
    """Seconds per call of one contender in one case; `why` if it did not run.

    missing: it is not installed, which is no fault; otherwise a `why` is a failure.
    """

    contender: str
    seconds: float | None
    quartiles: tuple[float, float] | None = None
    ungraphed: float | None = None
    why: str = ""
    missing: bool = False


def measure(
    case: Case,
    rounds: int = 21,
    deadline: float = float("inf"),
    failed: dict[str, str] | None = None,
) -> list[Result]:
    """Every contender of a case, interleaved; a contender that fails says why and is left out.

    failed: contenders that are known to fail, with the reason. Raises CaptureFailed.
    """
    gc.collect()  # compiled functions keep the last case's tensors in cycles
    ready, results = {}, []
    for name, contender in case.contenders.items():
        if name in (failed or {}):
            results.append(Result(name, None, why=failed[name]))
            continue
        if time.monotonic() > deadline:
            results.append(Result(name, None, why=NO_TIME))
            continue
        try:
            ready[name] = _prepare(case, contender)
        except Missing as error:
            results.append(Result(name, None, why=str(error), missing=True))
        except CaptureFailed as error:
            raise CaptureFailed(name, str(error)) from error
        except Exception as error:  # a peer that breaks must not take the others with it
            results.append(Result(name, None, why=_reason(error)))
            with contextlib.suppress(RuntimeError):
                torch.cuda.empty_cache()
    times = {name: [] for name in ready}
    for _ in range(rounds):
        for name, (replay, calls, _) in ready.items():
            times[name].append(_seconds(replay) / calls)
    for name, samples in times.items():
        low, middle, high = statistics.quantiles(samples, n=4)
        results.append(Result(name, middle, (low, high), ready[name][2]))
    return results


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or repr(error))[:500]}"


def _prepare(case: Case, contender: Callable) -> tuple[Callable, int, float | None]:
    """(a function that makes `calls` calls, calls, seconds of one call without a graph)."""
    torch._dynamo.reset()
    if not torch.cuda.is_available():
        call = contender(case.inputs())
        call()
        return call, 1, None
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    # About half of a case's bytes are inputs; outputs share one place in the graph's memory.
    sets = round(0.5 + L2_MULTIPLE * L2_BYTES / max(case.bytes / 2, 1))
    sets = max(1, min(CALLS_PER_GRAPH, sets))
    # Autograd runs a backward pass on the stream of its forward pass: all on the capturing one.
    with torch.cuda.stream(stream):
        calls = [contender(case.inputs()) for _ in range(sets)]
        for call in calls * (1 if sets > 2 else 3):
            call()
    stream.synchronize()
    with torch.cuda.stream(stream):
        ungraphed = _ungraphed(calls)
    total = max(sets, CALLS_PER_GRAPH // sets * sets)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            for i in range(total):
                calls[i % sets]()
    except Exception as error:
        raise CaptureFailed("", f"cannot be captured, {_reason(error)}") from error
    graph.replay()
    return graph.replay, total, ungraphed


def _ungraphed(calls: list[Callable]) -> float:
    """Median seconds of one call as eager mode launches it, the host's work included."""
    samples = []
    for call in (calls * 5)[:10]:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        torch.cuda.synchronize()
        samples.append(time.perf_counter() - begin)
    return statistics.median(samples)


def _seconds(replay: Callable) -> float:
    if not torch.cuda.is_available():
        begin = time.perf_counter()
        replay()
        return time.perf_counter() - begin
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def benchmark_of(cases: Callable[[str], list[Case]]):
    """The pytest function of a bench file: `bench_x = harness.benchmark_of(cases)`.

    pytest-benchmark's row is one contender of one case; extra_info gets GPU time, GB/s, TFLOP/s.
    """
    import pytest

    device = "cuda" if torch.cuda.is_available() else "cpu"
    listed = [(case, name) for case in cases(device) for name in case.contenders]
    names = [f"{case.name}, {name}" for case, name in listed]

    @pytest.mark.parametrize("case, contender", listed, ids=names)
    def bench(benchmark, case, contender):
        benchmark.group = f"{case.operation}: {case.name}"
        if contender == "compiled" and device == "cpu":
            pytest.skip("torch.compile is a peer on CUDA")
        try:
            replay, calls, ungraphed = _prepare(case, case.contenders[contender])
        except Missing as error:
            pytest.skip(str(error))
        rounds = 30 if device == "cuda" else 5

        def once():
            replay()
            if device == "cuda":
                torch.cuda.synchronize()

        benchmark.pedantic(once, rounds=rounds, iterations=1, warmup_rounds=5 if rounds > 5 else 1)
        if benchmark.stats:
            benchmark.extra_info |= rates(case, benchmark.stats.stats.median / calls)
            benchmark.extra_info["calls per round"] = calls
            if ungraphed is not None:
                benchmark.extra_info["us without a graph"] = round(ungraphed * 1e6, 1)

    return bench


def rates(case: Case, seconds: float) -> dict[str, float]:
    """us per call and, where the case knows them, GB/s and TFLOP/s."""
    found = {"us": round(seconds * 1e6, 2)}
    if case.bytes:
        found["GB/s"] = round(case.bytes / seconds / 1e9, 1)
    if case.flops:
        found["TFLOP/s"] = round(case.flops / seconds / 1e12, 2)
    return found
