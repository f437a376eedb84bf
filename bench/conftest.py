"""Shared by all benchmarks: devices, timing that waits for the GPU, bandwidth and roofline."""

import pytest
import torch


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
            benchmark.extra_info["gpu"] = torch.cuda.get_device_name()
        benchmark.extra_info["threads"] = torch.get_num_threads()
        benchmark.extra_info["torch"] = torch.__version__
        if seconds:
            benchmark.extra_info["ms"] = round(seconds * 1e3, 4)
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
