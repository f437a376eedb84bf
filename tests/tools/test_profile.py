"""tools/profile.py: a trace and a table of a few steps, by torch.profiler or by nsys."""

import json
import re
import sys

import pytest
import torch

from bench import bench_bias_gelu
from tests.fake_nsys import STATS, install
from tests.running import ROOT, command, flags, refused


def test_a_trace_and_a_table_are_written(tmp_path):
    result = command("profile", *flags(), "--profile-steps", 2, "--profile-out", tmp_path / "p")
    assert result.code == 0, result.err
    text = (tmp_path / "p" / "profile.md").read_text()
    for phase in ("data", "forward", "backward", "optimizer"):
        assert f"| {phase} |" in text
    assert "images/s while profiled" in text and "| aten::" in text
    (idle,) = re.findall(r"Idle share: (\d+\.\d)% of the step in no operator", text)
    assert 0 < float(idle) < 100
    assert json.loads((tmp_path / "p" / "trace.json").read_text())["traceEvents"]
    assert f"written: {tmp_path / 'p' / 'profile.md'}" in result.out


def test_one_operation(tmp_path):
    result = command(
        "profile",
        "--size",
        "tiny",
        "--op",
        "bias_gelu",
        "--profile-steps",
        2,
        "--profile-out",
        tmp_path,
    )
    assert result.code == 0, result.err
    table = (tmp_path / "bias_gelu-0.txt").read_text()
    assert "aten::gelu" in table or "heptapod_fast::bias_gelu" in table
    assert json.loads((tmp_path / "bias_gelu-0.json").read_text())["traceEvents"]
    refused(command("profile", "--size", "tiny", "--op", "nothing"), "--op nothing", "bias_gelu")


def test_an_operation_without_a_case_for_the_device_is_refused(monkeypatch):
    monkeypatch.setattr(bench_bias_gelu, "cases", lambda device: [])
    words = ("--size", "tiny", "--op", "bias_gelu", "--device", "cpu")
    refused(command("profile", *words), "--op bias_gelu", "no case for --device cpu")


def test_help_and_refusals():
    assert "--profile-steps" in command("profile", "--help").out
    refused(command("profile", *flags(batch=9)), "--batch")
    refused(command("profile", *flags(), "--profile-steps", 0), "--profile-steps")


def test_backward_runs_where_its_range_is(tmp_path, monkeypatch):
    """On a GPU it would run in another thread, and its kernels would belong to no phase."""
    seen = []
    mode = torch._C._is_multithreading_enabled
    backward = torch.Tensor.backward

    def spy(self, *arguments, **options):
        seen.append(mode())
        return backward(self, *arguments, **options)

    monkeypatch.setattr(torch.Tensor, "backward", spy)
    words = (*flags(), "--profile-steps", 1, "--profile-out", tmp_path)
    assert command("profile", *words).code == 0
    assert len(seen) >= 2 and not any(seen)  # an estimate of memory has one of its own
    assert mode()


# -------------------------------------------------------------------------------------- under nsys


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """An nsys on PATH; this process sees a GPU, the one that nsys starts does not."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    return install(tmp_path, monkeypatch)


def test_it_runs_itself_under_nsys_and_reads_what_was_recorded(fake, tmp_path):
    out = tmp_path / "p"
    words = [*flags(device="auto"), "--profile-steps", "2", "--profile-out", str(out)]
    result = command("profile", *words)
    assert result.code == 0, result.err
    profiled, asked = fake.calls
    assert profiled["recorded"] == "1"
    assert profiled["words"][0] == "profile"
    assert {
        "--capture-range=cudaProfilerApi",
        "--capture-range-end=stop",
        "--trace=cuda,nvtx",
        f"--output={out / 'steps'}",
    } <= set(profiled["words"])
    again = [sys.executable, str(ROOT / "tools" / "profile.py"), *words]
    assert profiled["words"][-len(again) :] == again
    assert asked["words"][0] == "stats" and asked["words"][-1] == str(out / "steps.nsys-rep")
    assert "cuda_gpu_kern_sum,cuda_gpu_trace,nvtx_gpu_proj_sum" in asked["words"]
    # What was recorded: the steps after the unmeasured ones, phases and operators by name.
    for phase in ("data", "forward", "backward", "optimizer"):
        assert fake.ranges[phase] == 2
    assert any(name.startswith("aten::") for name in fake.ranges)
    text = (out / "profile.md").read_text()
    for part in (
        "# One training step: heptapod tiny, batch 8",
        "NVIDIA H200",
        "2 steps under nsys",
        "1,600 images/s while profiled.",  # 16 images in 10 ms
        "Idle share: 20.0% of the step the GPU ran no kernel",
        "| forward | 1.50 | 38% |",
        "| heptapod_fast::layer_norm | 1.000 | 20.0% | 1.5 |",
        "| void gemm<(int)128, float>(float *, int) | 3.000 | 60.0% | 1 |",
    ):
        assert part in text, part
        assert part in result.out
    assert not (out / "trace.json").exists()


def test_an_operation_is_recorded_case_by_case(fake, tmp_path):
    first, *others = [f"{case.operation}: {case.name}" for case in bench_bias_gelu.cases("cuda")]
    fake.stats.write_text(STATS.replace("layer_norm: forward, B, 32896 x 768", first))
    out = tmp_path / "p"
    words = ("--size", "tiny", "--op", "bias_gelu", "--profile-steps", 2, "--profile-out", out)
    result = command("profile", *words)
    assert result.code == 0, result.err
    for case in bench_bias_gelu.cases("cpu"):  # those of the process that saw no GPU
        assert fake.ranges[f"{case.operation}: {case.name}"] == 1
    text = (out / "profile.md").read_text()
    assert "# Operation bias_gelu" in text and "images/s" not in text
    assert f"| {first} | 2.00 | 100% |" in text
    assert "| void gemm<(int)128, float>(float *, int) | 3.000 | 60.0% | 1 |" in text


def test_nsys_off_and_a_cpu_take_torch_profiler(fake, tmp_path):
    words = (*flags(device="cpu"), "--profile-steps", 1, "--profile-out", tmp_path / "p")
    assert command("profile", *words).code == 0
    assert (tmp_path / "p" / "trace.json").exists()
    assert command("profile", *words, "--nsys", "off").code == 0
    refused(command("profile", *words, "--nsys", "on"), "--nsys on", "--device cuda")
    assert fake.calls == []


def test_asking_for_nsys_where_it_is_missing_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    refused(command("profile", *flags(), "--nsys", "on"), "Install NVIDIA Nsight Systems")


def test_what_fails_under_nsys_fails_here(fake, tmp_path):
    fake.stats.unlink()
    words = (*flags(device="auto"), "--profile-steps", 1, "--profile-out", tmp_path / "p")
    refused(command("profile", *words), "nsys stats failed")
    assert not (tmp_path / "p" / "profile.md").exists()


def test_steps_are_profiled_without_graphs(tmp_path, monkeypatch):
    """In a graph there are no ranges of phases and operators."""
    from heptapod_fast.train import session

    seen = []
    prepare = session.prepare
    monkeypatch.setattr(
        session,
        "prepare",
        lambda config, *given: seen.append(config.run.cuda_graph) or prepare(config, *given),
    )
    words = [*flags(), "--profile-out", tmp_path]
    assert command("profile", *words, "--profile-steps", 1).code == 0
    assert seen == ["off"]
