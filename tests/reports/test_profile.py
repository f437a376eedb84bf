"""Where the time of steps went, of torch.profiler's events; unions of intervals."""

import itertools
from types import SimpleNamespace

import pytest
from torch.autograd import DeviceType

from heptapod_fast.reports.profile import (
    Cost,
    Profile,
    costs,
    covered,
    idle_share,
    of_events,
    page,
    span,
)

POINTS = range(5)
INTERVALS = [(begin, end) for begin in POINTS for end in POINTS if begin <= end]


def cells_in(intervals) -> set[int]:
    """The unit cells that intervals with whole ends cover."""
    return {cell for begin, end in intervals for cell in range(begin, end)}


def test_a_union_of_intervals_counts_what_overlaps_once():
    """All triples of intervals on a line of four cells, in every order, against counting cells."""
    for intervals in itertools.product(INTERVALS, repeat=3):
        assert covered(intervals) == len(cells_in(intervals)), intervals
    assert covered([]) == covered([(3, 1)]) == 0.0
    assert covered(iter([(0.5, 1.25), (1.0, 2.0)])) == 1.5


def test_the_idle_share_is_what_no_interval_covers():
    """All pairs of intervals in all stretches of time, reaching over their ends too."""
    for first, last in INTERVALS:
        for intervals in itertools.product(INTERVALS, repeat=2):
            found = idle_share(intervals, (first, last))
            if first == last:
                assert found is None
                continue
            free = set(range(first, last)) - cells_in(intervals)
            assert found == pytest.approx(len(free) / (last - first)), (intervals, first, last)
    assert idle_share([], (0, 4)) == 1.0


def test_a_span_reaches_from_the_first_begin_to_the_last_end():
    assert span([(3, 4), (1, 9), (2, 5)]) == (1, 9)
    assert span([]) == (0, 0)


def test_costs_are_of_a_step_and_the_highest_comes_first():
    pieces = [("small", 1.0), ("large", 6.0), ("small", 3.0), ("large", 6.0)]
    assert costs(pieces, steps=2) == [Cost("large", 6.0, 1.0), Cost("small", 2.0, 1.0)]
    assert costs([("once", 3.0)], steps=2) == [Cost("once", 1.5, 0.5)]


# -------------------------------------------------------------------------- torch.profiler's events


def event(name, begin, end, device=DeviceType.CPU, annotation=False):
    """As torch.profiler has them, in microseconds."""
    time_range = SimpleNamespace(start=begin, end=end)
    return SimpleNamespace(
        name=name, time_range=time_range, device_type=device, is_user_annotation=annotation
    )


def average(key, host, device, own_host, own_device, count, where=DeviceType.CPU, annotation=False):
    """Averages by name, in microseconds."""
    return SimpleNamespace(
        key=key,
        cpu_time_total=host,
        device_time_total=device,
        self_cpu_time_total=own_host,
        self_device_time_total=own_device,
        count=count,
        device_type=where,
        is_user_annotation=annotation,
    )


GPU = DeviceType.CUDA
EVENTS = [
    event("forward", 0, 4000, annotation=True),
    event("aten::mm", 500, 3000),
    event("aten::t", 600, 700),  # within the other one
    event("backward", 5000, 9000, annotation=True),
    event("aten::mm", 5000, 9000),
    event("other", 0, 90_000, annotation=True),
    event("aten::late", 50_000, 60_000),  # after the last phase
    # On the GPU: two streams at once, a copy before and a memset behind; what an annotation spans
    # there is no work.
    event("forward", 10_000, 19_000, GPU, annotation=True),
    event("Memcpy HtoD (Pinned -> Device)", 9000, 10_000, GPU),
    event("gemm", 10_000, 14_000, GPU),
    event("norm", 12_000, 15_000, GPU),
    event("gemm", 17_000, 18_000, GPU),
    event("Memset (Device)", 18_000, 19_000, GPU),
]
AVERAGES = [
    average("forward", 4000, 6000, 100, 0, 2, annotation=True),
    average("backward", 4000, 2000, 100, 0, 2, annotation=True),
    average("forward", 0, 9000, 0, 9000, 2, GPU, annotation=True),
    average("other", 1, 1, 90_000, 90_000, 1, annotation=True),
    average("aten::mm", 6500, 5000, 6400, 5000, 2),
    average("aten::t", 100, 0, 100, 9000, 1),
    average("gemm", 0, 5000, 0, 5000, 2, GPU),
]


def test_on_a_gpu_it_is_idle_while_no_kernel_runs():
    found = of_events(EVENTS, AVERAGES, steps=2, on_gpu=True)
    # Kernels cover 10 to 15 and 17 to 18 of 9 to 19 ms.
    assert found.idle == pytest.approx(0.4)
    assert found.step_ms == 5.0
    assert found.kernels == [Cost("gemm", 2.5, 1.0), Cost("norm", 1.5, 0.5)]
    assert found.phases == {"forward": 3.0, "backward": 1.0}
    assert found.operators == [Cost("aten::t", 4.5, 0.5), Cost("aten::mm", 2.5, 1.0)]


def test_on_a_cpu_it_is_idle_while_no_operator_runs():
    found = of_events(EVENTS, AVERAGES, steps=2, on_gpu=False)
    # Operators cover 0.5 to 3 and 5 to 9 of 0 to 9 ms.
    assert found.idle == pytest.approx(2.5 / 9)
    assert found.step_ms == 4.5
    assert found.phases == {"forward": 2.0, "backward": 2.0}
    assert found.operators == [Cost("aten::mm", 3.2, 1.0), Cost("aten::t", 0.05, 0.5)]


# ----------------------------------------------------------------------------------------- the page


def test_the_page_has_a_table_for_what_is_known():
    kernels = [Cost("void f<(bool)1 | 2>(float *)", 1.0, 3.0), Cost("k" * 200, 0.5, 1.0)]
    operators = [Cost("heptapod_fast::layer_norm", 2.0, 0.5)]
    phases = {"optimizer": 1.0, "mine": 1.0, "forward": 2.0}
    text = page(Profile(4.0, phases, operators, kernels, 0.25, True), "Title", "About.", 25)
    for part in (
        "# Title\n\nAbout.",
        "Idle share: 25.0% of the step the GPU ran no kernel",
        "A step took 4.00 ms.",
        "| forward | 2.00 | 50% |\n| optimizer | 1.00 | 25% |\n| mine | 1.00 | 25% |",
        "| heptapod_fast::layer_norm | 2.000 | 50.0% | 0.5 |",
        "| void f<(bool)1 \\| 2>(float *) | 1.000 | 25.0% | 3 |",
        f"| {'k' * 87}... | ",
    ):
        assert part in text, part
    few = page(Profile(4.0, {}, [], kernels, None, True), "Title", "About.", 1)
    assert "kkk" not in few and "phase" not in few and "operator" not in few
    assert "Idle share: n/a" in few
    assert "in no operator" in page(Profile(4.0, {}, [], [], 0.5, False), "Title", "About.", 1)
