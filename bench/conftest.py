"""Shared by all benchmarks: devices, timing that waits for the GPU, bandwidth and roofline."""

import statistics
import time

import pytest
import torch

from heptapod_fast.train.parallel import choose_device, device_name


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    """CPU at small shapes, and CUDA at real ones where there is a GPU."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return request.param


@pytest.fixture
def measure(device, benchmark):
    """measure(function, bytes_moved): times function() and records GB/s in benchmark.extra_info.

    bytes_moved is what the operation must read and write at least, the same for every contender, so
    that GB/s compares them. On CUDA the time is that of the GPU, from events around 20 calls; what
    pytest-benchmark prints there includes launches and one synchronisation per call.
    """

    def run(function, bytes_moved):
        for _ in range(3):
            function()
        if device == "cpu":
            benchmark(function)
            # --benchmark-disable runs the function once and keeps no statistics.
            seconds = benchmark.stats.stats.median if benchmark.stats else None
        else:
            benchmark(lambda: (function(), torch.cuda.synchronize()))
            seconds = _gpu_seconds(function)
        if seconds:
            if device == "cuda":
                benchmark.extra_info["GPU ms"] = round(seconds * 1e3, 4)
            benchmark.extra_info["GB/s"] = round(bytes_moved / seconds / 1e9, 2)

    return run


def _gpu_seconds(function, calls=20):
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        function()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


@pytest.fixture
def versus(device, benchmark):
    """versus(ours, peer, rounds): times both in turns, so that noise meets both alike.

    pytest-benchmark's row is `ours`; benchmark.extra_info gets the peer's median, the ratio of the
    medians and the quartiles of the ratios of each round.
    """

    def run(ours, peer, rounds=15):
        wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)

        def seconds(function):
            wait()
            begin = time.perf_counter()
            function()
            wait()
            return time.perf_counter() - begin

        for function in (ours, peer) * 2:
            function()
        pairs = [(seconds(peer), seconds(ours)) for _ in range(rounds)]
        theirs, mine = zip(*pairs, strict=True)
        low, _, high = statistics.quantiles([a / b for a, b in pairs], n=4)
        benchmark.extra_info["peer ms"] = round(statistics.median(theirs) * 1e3, 3)
        ratio = statistics.median(theirs) / statistics.median(mine)
        benchmark.extra_info["ratio"] = round(ratio, 3)
        benchmark.extra_info["ratio quartiles"] = [round(low, 3), round(high, 3)]
        benchmark.pedantic(lambda: (ours(), wait()), rounds=rounds, iterations=1)

    return run


def pytest_benchmark_update_machine_info(config, machine_info):
    """What the tables of tools/report.py say about the machine, and nothing else about it."""
    version = machine_info["python_version"]
    machine_info.clear()
    machine_info["python_version"] = version
    machine_info["device"] = device_name(choose_device("auto"))
    machine_info["torch"] = torch.__version__
    machine_info["command"] = " ".join(["pytest", *config.invocation_params.args])


def pytest_benchmark_update_json(config, benchmarks, output_json):
    """Keep the statistics, drop single timings: results are committed."""
    output_json["commit_info"] = {"id": output_json["commit_info"].get("id")}
    for entry in output_json["benchmarks"]:
        entry["stats"].pop("data", None)
