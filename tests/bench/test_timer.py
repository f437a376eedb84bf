"""The one timer: candidates take turns, samples are seconds of one call."""

import pytest
import torch

from bench import timer


class Scripted:
    """A watch whose samples are given; it notes when it is asked."""

    launched = None

    def __init__(self, name, samples, asked, calls=1):
        self.name, self.samples, self.asked, self.calls = name, list(samples), asked, calls

    def sample(self):
        self.asked.append(self.name)
        return self.samples.pop(0)


def test_candidates_take_turns():
    asked = []
    watches = {name: Scripted(name, [1.0, 2.0, 4.0], asked) for name in "abc"}
    timings = timer.in_turns(watches, rounds=3)
    assert asked == list("abcabcabc")
    assert timings["b"].samples == (1.0, 2.0, 4.0)
    assert timings["b"].median == 2.0
    assert timings["b"].quartiles == (1.5, 3.0)


def test_no_new_round_after_the_time_given_but_a_few_there_are_always():
    asked = []
    watches = {"a": Scripted("a", [1.0] * 100, asked)}
    timings = timer.in_turns(watches, rounds=100, seconds=-1.0)
    assert len(timings["a"].samples) == timer.FEWEST_ROUNDS
    assert len(timer.in_turns({"a": Scripted("a", [1.0] * 3, asked)}, 3, -1.0)["a"].samples) == 3


def test_a_ratio_is_that_of_the_medians_with_the_spread_of_the_rounds():
    slower = timer.Timing((2.0, 4.0, 9.0), 1, 0.0)
    faster = timer.Timing((1.0, 2.0, 3.0), 1, 0.0)
    times, (low, high) = timer.ratio(slower, faster)
    assert times == 2.0
    assert (low, high) == (2.0, 2.5)


class Clock:
    """Stands in for the clocks of the machine; calls move it on."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(timer.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(timer.time, "process_time", lambda: 2 * self.now)

    def call_of(self, seconds):
        def call():
            self.now += seconds

        return call


@pytest.mark.parametrize("seconds, calls", [(0.3e-3, 4), (1e-2, 1)])
def test_a_short_call_is_repeated_and_a_sample_is_one_call_of_it(monkeypatch, seconds, calls):
    clock = Clock(monkeypatch)
    ready = timer.watch(clock.call_of(seconds), "cpu")
    assert isinstance(ready, timer.WallWatch)
    assert ready.calls == calls and ready.launched is None
    before = clock.now
    assert ready.sample() == pytest.approx(seconds)
    assert clock.now - before == pytest.approx(calls * seconds)


def test_cpu_seconds_are_those_of_one_call(monkeypatch):
    ready = timer.WallWatch(Clock(monkeypatch).call_of(0.3e-3))
    timing = timer.in_turns({"a": ready}, 3)["a"]
    assert timing.cpu == pytest.approx(0.6e-3)  # two threads
    assert timing.calls == 4


class Event:
    """Stands in for torch.cuda.Event; elapsed_time is in milliseconds."""

    def __init__(self, queue):
        self.queue = queue

    def record(self):
        self.queue.append("event")

    def synchronize(self):
        self.queue.append("wait")

    def elapsed_time(self, end):
        return 2.0


class Flush:
    """Stands in for the memory that is read."""

    def __init__(self, queue):
        self.queue = queue

    def sum(self):
        self.queue.append("read")


def test_on_a_gpu_a_call_stands_between_two_events_behind_a_full_queue(monkeypatch):
    queue = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event(queue))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: queue.append(cycles))
    monkeypatch.setattr(timer, "_flush", Flush(queue))
    clock = Clock(monkeypatch)
    busy = clock.call_of(1e-3)  # the host's work

    def call():
        queue.append("call")
        busy()

    ready = timer.watch(call, "cuda")
    assert ready.launched == pytest.approx(1e-3)
    queue.clear()
    assert ready.sample() == pytest.approx(2e-3)
    hold, *rest = queue
    assert rest == ["read", "event", "call", "event", "wait"]
    assert hold / timer.FASTEST_CLOCK > 1e-3  # the host is done before the device goes on


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_device_is_timed_without_launches_and_without_its_cache():
    source = torch.randn(2**20, device="cuda")
    target = torch.empty_like(source)
    ready = timer.watch(lambda: target.copy_(source), "cuda")
    timing = timer.in_turns({"copy": ready}, 15)["copy"]
    bandwidth = 2 * source.nbytes / timing.median
    assert isinstance(ready, timer.DeviceWatch)
    # 8 MB fit into L2, from which they would come several times as fast as from memory.
    assert 1e11 < bandwidth < 2e13
    assert timing.launched > 0
