"""metrics.jsonl, the meter and the progress line."""

import json
import re
import resource
from pathlib import Path

import pytest
import torch

from heptapod_fast.train import metrics
from heptapod_fast.train.metrics import Meter, MetricsFile, progress_line, read_metrics


def silent(text):
    raise AssertionError(text)


def written(folder: Path, count: int) -> MetricsFile:
    file = MetricsFile(folder / "metrics.jsonl", silent)
    for k in range(1, count + 1):
        file.write({"images": 8 * k, "loss": float(k)})
    return file


def test_records_come_back(tmp_path):
    assert read_metrics(written(tmp_path, 3).path)[-1] == {"images": 24, "loss": 3.0}


def test_rewind_drops_what_will_be_written_again(tmp_path):
    file = written(tmp_path, 4)
    file.rewind(16)
    assert [r["images"] for r in read_metrics(file.path)] == [8, 16]
    file.rewind(0)
    assert file.path.read_text() == ""


def test_rewind_without_a_file(tmp_path):
    MetricsFile(tmp_path / "metrics.jsonl", silent).rewind(8)
    assert not list(tmp_path.iterdir())


def test_a_last_line_that_was_cut_off_is_left_out_and_mended(tmp_path):
    file = written(tmp_path, 2)
    with open(file.path, "a") as stream:
        stream.write('{"images": 24, "lo')
    assert len(read_metrics(file.path)) == 2
    file.rewind(100)
    file.write({"images": 24})
    assert [r["images"] for r in read_metrics(file.path)] == [8, 16, 24]


@pytest.mark.parametrize("line", [b'{"images": 8, "lo', b"\xff\xfe", b"[1, 2]", b'{"loss": 1.0}'])
def test_a_broken_line_in_the_middle_is_named(tmp_path, line):
    file = written(tmp_path, 2)
    lines = file.path.read_bytes().splitlines()
    file.path.write_bytes(b"\n".join([lines[0], line, lines[1], b""]))
    with pytest.raises(ValueError, match="metrics.jsonl:2 "):
        read_metrics(file.path)


def test_numbers_that_are_not_finite_stay_json(tmp_path):
    file = written(tmp_path, 1)
    file.write({"images": 16, "loss": float("nan"), "grad_norm": float("inf")})

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    last = json.loads(file.path.read_text().splitlines()[-1], parse_constant=refuse)
    assert last == {"images": 16, "loss": None, "grad_norm": None}


def test_a_full_disk_costs_whole_records_and_is_said_once(tmp_path):
    said = []
    file = MetricsFile(tmp_path / "metrics.jsonl", said.append)
    file.write({"images": 8, "text": "x" * 100})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.path.stat().st_size + 20, hard))
    try:
        for _ in range(2):
            file.write({"images": 16, "text": "x" * 100})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    file.write({"images": 24})
    assert [r["images"] for r in read_metrics(file.path)] == [8, 24]
    assert len(said) == 1 and "metrics.jsonl" in said[0]


@pytest.fixture
def clock(monkeypatch):
    """Time that only moves when told to."""
    now = [100.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    return now


def test_rates_leave_out_samples_and_checkpoints(clock):
    meter = Meter(total_images=1000, flops=2e9, peak=None, world_size=1)
    for loss in (1.0, 3.0):
        meter.add(torch.tensor(loss), torch.tensor(0.5), 100)
    clock[0] += 10
    meter.pause(6)
    record = meter.record(200)
    assert record["images_per_second"] == 50.0 and record["loss"] == 2.0
    assert record["seconds"] == 10.0 and record["other_seconds"] == 6.0
    assert record["eta_seconds"] == 40.0  # 800 images at 20 a second, pauses included
    assert record["tflops"] == pytest.approx(0.1) and "mfu" not in record


def test_a_record_starts_anew(clock):
    meter = Meter(1000, 1e9, None, 1)
    meter.add(torch.tensor(5.0), torch.tensor(1.0), 10)
    clock[0] += 1
    meter.record(10)
    meter.add(torch.tensor(1.0), torch.tensor(2.0), 10)
    clock[0] += 2
    record = meter.record(20)
    assert (record["loss"], record["grad_norm"], record["images_per_second"]) == (1.0, 2.0, 5.0)


def test_mfu_is_the_share_of_all_ranks_peak(clock):
    meter = Meter(1000, 1e12, peak=100e12, world_size=2)
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
    assert "MFU" not in line and "\n" not in line
    assert "MFU 41.0%" in progress_line(record | {"mfu": 0.41}, 180_000)
