"""tools/profile.py: a trace and a table of a few steps."""

import json

from tests.running import command, flags, refused


def test_a_trace_and_a_table_are_written(tmp_path):
    result = command("profile", *flags(), "--profile-steps", 2, "--profile-out", tmp_path / "p")
    assert result.code == 0, result.err
    text = (tmp_path / "p" / "profile.md").read_text()
    for phase in ("data", "forward", "backward", "optimizer"):
        assert f"| {phase} |" in text
    assert "images/s while profiled" in text and "| aten::" in text
    assert json.loads((tmp_path / "p" / "trace.json").read_text())["traceEvents"]


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
    assert "aten::gelu" in (tmp_path / "bias_gelu-0.txt").read_text()
    assert json.loads((tmp_path / "bias_gelu-0.json").read_text())["traceEvents"]
    refused(command("profile", "--size", "tiny", "--op", "nothing"), "--op nothing", "bias_gelu")


def test_help_and_refusals():
    assert "--profile-steps" in command("profile", "--help").out
    refused(command("profile", *flags(batch=9)), "--batch")
    refused(command("profile", *flags(), "--profile-steps", 0), "--profile-steps")
