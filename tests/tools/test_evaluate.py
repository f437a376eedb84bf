"""tools/evaluate.py, tools/report.py and tools/verify.py on one small run."""

import json

import pytest

from tests.running import command, refused, train_here


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run of 24 px logograms."""
    out = tmp_path_factory.mktemp("run")
    train_here(out, images=32)
    return out


def test_help_lists_the_contract():
    result = command("evaluate", "--help")
    assert result.code == 0
    for name in ("count", "metrics", "ema", "checkpoint", "positions-per-step", "seed", "out"):
        assert f"--{name}" in result.out


def test_numbers_and_grid_are_written(trained, tmp_path):
    result = command("evaluate", trained, "--count", 10, "--out", tmp_path / "deep" / "e.json")
    assert result.code == 0, result.err
    numbers = json.loads((tmp_path / "deep" / "e.json").read_text())
    assert 0 <= numbers["symmetry_accuracy"] <= 1 and numbers["samples"] == 10
    assert numbers["images_seen"] == 32 and numbers["checkpoint"] == "step-00000004"
    assert numbers["temperature"] == 1.0 and numbers["positions_per_step"] == 1
    assert (tmp_path / "deep" / "e.png").exists() and "symmetry_accuracy" in result.out


@pytest.mark.parametrize(
    "words, named",
    [
        (("--metrics", "fid,charm"), ("--metrics fid, charm", "symmetry")),
        (("--count", 0), ("--count 0",)),
        (("--batch", 0), ("--batch 0",)),
        (("--ema", "0.1"), ("--ema 0.1",)),
    ],
)
def test_what_cannot_be_is_refused(trained, words, named):
    refused(command("evaluate", trained, *words), *named)


def test_a_report_is_made_of_the_run(tmp_path):
    train_here(tmp_path, images=32)
    command("evaluate", tmp_path, "--count", 10)
    result = command("report", tmp_path)
    assert result.code == 0, result.err
    numbers = json.loads((tmp_path / "report.json").read_text())
    assert numbers["images"] == 32 and numbers["images_per_second_median"] > 0
    assert numbers["evaluation"]["samples"] == 10
    text = (tmp_path / "report.md").read_text()
    for part in ("32 of 32 images", "FLOPs: forward + backward", "loss.png", "evaluation.png"):
        assert part in text
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_records_without_a_loss_do_not_stop_a_report(tmp_path):
    train_here(tmp_path, images=32)
    with open(tmp_path / "metrics.jsonl", "a") as stream:
        stream.write(
            '{"images": 40, "checkpoint_failed": "full"}\n{"images": 40, "loss": null}\n'
            '{"images": 48, "lo'
        )
    assert command("report", tmp_path).code == 0
    assert json.loads((tmp_path / "report.json").read_text())["images"] == 32


def test_a_run_that_logged_nothing_has_no_report(tmp_path):
    train_here(tmp_path, images=16)
    (tmp_path / "metrics.jsonl").write_text("")
    refused(command("report", tmp_path), "metrics.jsonl has no record")
    (tmp_path / "metrics.jsonl").unlink()
    refused(command("report", tmp_path), "metrics.jsonl does not exist")
    refused(command("report", tmp_path / "none"), "is not a directory")
