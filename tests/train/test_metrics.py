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
    clock[0] += 10
    meter.pause(6)
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
