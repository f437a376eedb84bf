"""tools/evaluate.py on one small run."""

import json
import time

import pytest
from PIL import Image

from tests.running import command, refused, train_here


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run of 24 px logograms."""
    out = tmp_path_factory.mktemp("run")
    train_here(out, images=32)
    return out


def test_help_lists_the_contract(trained):
    result = command("evaluate", trained, "--help")
    assert result.code == 0
    for name in ("count", "metrics", "ema", "checkpoint", "positions-per-step", "seed", "out"):
        assert f"--{name}" in result.out


def test_numbers_and_grid_are_written(trained, tmp_path):
    before = time.monotonic()
    result = command("evaluate", trained, "--count", 10, "--out", tmp_path / "deep" / "e.json")
    elapsed = time.monotonic() - before
    assert result.code == 0, result.err
    numbers = json.loads((tmp_path / "deep" / "e.json").read_text())
    assert 0 <= numbers["symmetry_accuracy"] <= 1 and numbers["samples"] == 10
    assert numbers["images_seen"] == 32 and numbers["checkpoint"] == "step-00000004"
    assert numbers["weights"] == "ema-0.9999"
    options = numbers["options"]
    assert options["temperature"] == 1.0 and options["positions_per_step"] == 1
    assert numbers["system"] == "heptapod" and "threads" in numbers["device"]
    seconds = numbers["sampling_seconds"]
    assert 0 < seconds <= elapsed
    assert numbers["samples_per_second"] == pytest.approx(10 / seconds, rel=0.01)
    assert "symmetry_accuracy" in result.out
    with Image.open(tmp_path / "deep" / "e.png") as grid:
        assert (
            grid.height > 2 * grid.width
        )  # a row for each of 5 classes, two samples in the fullest


def test_the_grid_has_a_row_of_each_class_however_samples_are_batched(trained, tmp_path):
    """The first eight of the ten samples of each class, from batches that cut through classes."""
    grids = []
    for batch in (9, 256):
        out = tmp_path / f"{batch}.json"
        words = ("--count", 50, "--batch", batch, "--out", out)
        assert command("evaluate", trained, *words).code == 0
        grids.append(out.with_suffix(".png").read_bytes())
    assert grids[0] == grids[1]
    with Image.open(tmp_path / "9.png") as grid:
        assert grid.width / grid.height == pytest.approx(8 / 5, rel=0.02)


def test_the_weights_that_were_sampled_are_recorded(trained, tmp_path):
    out = tmp_path / "e.json"
    result = command("evaluate", trained, "--count", 2, "--ema", "none", "--out", out)
    assert result.code == 0, result.err
    assert json.loads(out.read_text())["weights"] == "model"
    train_here(tmp_path / "run", images=8, ema=())
    assert command("evaluate", tmp_path / "run", "--count", 2, "--out", out).code == 0
    assert json.loads(out.read_text())["weights"] == "model"


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
