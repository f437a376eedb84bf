"""The meter and the progress line."""

import re

import pytest
import torch

from heptapod_fast.systems import Phase
from heptapod_fast.train import metrics
from heptapod_fast.train.metrics import Meter, progress_line, training_flops


@pytest.fixture
def clock(monkeypatch):
    """Time that only moves when told to."""
    now = [100.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    return now


def test_rates_leave_out_samples_and_checkpoints(clock):
    meter = Meter(total_images=1000, peak=None, ranks=1)
    meter.flops = 2e9
    for loss in (1.0, 3.0):
        meter.add(torch.tensor(loss), torch.tensor(0.5), 100)
    clock[0] += 4
    with meter.time("checkpoint"):
        clock[0] += 5
    with meter.time("sampling"):
        clock[0] += 1
    record = meter.record(200)
    assert record["images_per_second"] == 50.0
    assert record["loss"] == 2.0
    assert record["seconds"] == 10.0
    assert record["step_seconds"] == 4.0
    assert record["other_seconds"] == 6.0
    assert record["eta_seconds"] == 40.0  # 800 images at 20 a second, pauses included
    assert record["tflops"] == pytest.approx(0.1)
    assert "mfu" not in record


def test_a_record_starts_anew(clock):
    meter = Meter(1000, None, 1)
    meter.add(torch.tensor(5.0), torch.tensor(1.0), 10)
    clock[0] += 1
    meter.record(10)
    meter.add(torch.tensor(1.0), torch.tensor(2.0), 10)
    clock[0] += 2
    record = meter.record(20)
    assert record["loss"] == 1.0
    assert record["grad_norm"] == 2.0
    assert record["images_per_second"] == 5.0


def test_the_rate_of_a_slow_run_keeps_its_digits(clock):
    meter = Meter(1000, None, 1)
    meter.add(torch.tensor(5.0), torch.tensor(1.0), 8)
    clock[0] += 9.4
    record = meter.record(8)
    assert record["images_per_second"] == pytest.approx(8 / 9.4, rel=1e-4)
    record |= {"lr": 1e-3}
    assert " 0.85 images/s" in progress_line(record, 1000)


def test_the_time_is_split_into_its_parts(clock):
    """What nobody times is a step's; each record counts anew."""
    meter = Meter(1000, None, 1)
    for length, part in enumerate(metrics.PARTS, 1):
        for _ in range(2):
            with meter.time(part):
                clock[0] += length
    clock[0] += 0.25
    expected = {
        "data_seconds": 2.0,
        "forward_backward_seconds": 4.0,
        "optimizer_seconds": 6.0,
        "checkpoint_seconds": 8.0,
        "sampling_seconds": 10.0,
        "step_seconds": 12.25,
        "other_seconds": 18.0,
    }
    record = meter.record(10)
    assert {name: record[name] for name in expected} == expected
    clock[0] += 0.5
    assert meter.times() == dict.fromkeys(expected, 0.0) | {"step_seconds": 0.5}
    with pytest.raises(KeyError):
        meter.time("holidays")


class Stream:
    """A GPU's stream as events see it: work is queued by a host that runs ahead."""

    def __init__(self, clock):
        self.clock = clock  # the host's
        self.busy_until = 0.0
        self.waits = 0

    def launch(self, seconds):
        """Queue work; the host does not wait."""
        self.busy_until = max(self.busy_until, self.clock[0]) + seconds

    def event(self, enable_timing):
        """Stands in for torch.cuda.Event."""
        assert enable_timing
        return Event(self)


class Event:
    """Over when all that was queued before it is."""

    def __init__(self, stream):
        self.stream = stream

    def record(self):
        self.at = max(self.stream.busy_until, self.stream.clock[0])

    def synchronize(self):
        self.stream.waits += 1
        self.stream.clock[0] = max(self.stream.clock[0], self.at)

    def elapsed_time(self, end):
        assert self.stream.clock[0] >= end.at, "not over yet"
        return 1000 * (end.at - self.at)


@pytest.fixture
def stream(clock, monkeypatch):
    """A stream in the GPU's place."""
    made = Stream(clock)
    monkeypatch.setattr(torch.cuda, "Event", made.event)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3_500_000_000)
    return made


def step(meter, stream, data=0.0, forward_backward=0.0, optimizer=0.0):
    """data: seconds of the host; the others are queued at once."""
    with meter.time("data"):
        stream.clock[0] += data
    with meter.time("forward_backward"):
        stream.launch(forward_backward)
    with meter.time("optimizer"):
        stream.launch(optimizer)


def test_on_a_gpu_nothing_waits_before_the_record(clock, stream):
    meter = Meter(1000, None, 1, "cuda")
    for _ in range(3):
        step(meter, stream, forward_backward=4, optimizer=1)
    assert clock[0] == 100.0 and stream.waits == 0
    record = meter.record(30)
    assert stream.waits > 0
    assert record["forward_backward_seconds"] == 12.0
    assert record["optimizer_seconds"] == 3.0
    assert record["data_seconds"] == 0.0
    assert record["step_seconds"] == 15.0
    assert record["memory_peak_gb"] == 3.5
    step(meter, stream, forward_backward=2)
    assert meter.record(40)["forward_backward_seconds"] == 2.0


def test_a_gpu_waits_for_data_only_when_it_has_nothing_to_do(clock, stream):
    meter = Meter(1000, None, 1, "cuda")
    step(meter, stream, data=2, forward_backward=5)  # the first batch: all of it is waiting
    step(meter, stream, data=4, forward_backward=5)  # behind the first step
    step(meter, stream, data=9, forward_backward=5)  # 4 + 9 after the first one began, which ends
    record = meter.record(30)  # with the second after 5 + 5
    assert record["data_seconds"] == 2.0 + 3.0
    assert record["forward_backward_seconds"] == 15.0
    assert record["step_seconds"] == 20.0


def test_memory_on_a_cpu_is_the_process(monkeypatch):
    """In KiB on Linux, in bytes on macOS."""

    class Usage:
        ru_maxrss = 2_000_000

    monkeypatch.setattr(metrics.resource, "getrusage", lambda who: Usage)
    monkeypatch.setattr(metrics.sys, "platform", "linux")
    assert metrics.memory_peak(torch.device("cpu")) == 2_048_000_000
    monkeypatch.setattr(metrics.sys, "platform", "darwin")
    assert metrics.memory_peak(torch.device("cpu")) == 2_000_000


def test_mfu_is_the_share_of_all_ranks_peak(clock):
    meter = Meter(1000, peak=100e12, ranks=2)
    meter.flops = 1e12
    meter.add(torch.tensor(1.0), torch.tensor(1.0), 20)
    clock[0] += 1
    assert meter.record(20)["mfu"] == 0.1


def test_an_unknown_device_has_no_peak(monkeypatch):
    assert metrics.peak_flops(torch.device("cpu")) is None
    for name, peak in (("NVIDIA GeForce 256", None), ("NVIDIA H200", 989e12)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert metrics.peak_flops(torch.device("cuda", 0)) == peak


def test_progress_line_has_every_field():
    record = {
        "images": 1600,
        "loss": 4.25,
        "lr": 2e-3,
        "grad_norm": 0.5,
        "eta_seconds": 3725,
        "images_per_second": 612.4,
    }
    line = progress_line(record, 180_000)
    parts = (
        r"images +1,600/180,000 \( +1%\)",
        r"loss 4\.2500",
        r"lr 2\.00e-03",
        r"norm +0\.500",
        r"612 images/s",
        r"ETA 1:02:05$",
    )
    assert re.search(".*".join(parts), line), line
    assert "MFU" not in line
    assert "\n" not in line
    assert "MFU 41.0%" in progress_line(record | {"mfu": 0.41}, 180_000)
    assert "skipped" not in progress_line(record | {"skipped": 0}, 180_000)
    assert progress_line(record | {"skipped": 3}, 180_000).endswith("skipped 3")


def test_training_costs_three_forward_passes(make_system):
    system = make_system()
    forward = sum(system.flops_per_image(None).values())
    assert training_flops(system, Phase(0, 8)) == 3 * forward
