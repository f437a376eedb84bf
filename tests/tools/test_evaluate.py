"""tools/evaluate.py on one small run."""

import json
import time

import numpy as np
import pytest
from PIL import Image

from heptapod_fast.evaluation import small
from heptapod_fast.evaluation.extractors import Features
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
        (("--metrics", "far,charm"), ("--metrics far, charm", "symmetry")),
        (("--metrics", "fid"), ("--inception is missing", "--extractor small")),
        (("--samples", "gone.npz", "--temperature", 0.9), ("--temperature beside --samples",)),
        (("--samples", "gone.npz"), ("--samples gone.npz: no such file",)),
        (("--count", 0), ("--count 0",)),
        (("--batch", 0), ("--batch 0",)),
        (("--ema", "0.1"), ("--ema 0.1",)),
    ],
)
def test_what_cannot_be_is_refused(trained, words, named):
    refused(command("evaluate", trained, *words), *named)


def test_fidelity_of_a_run_and_of_what_it_wrote(trained, tmp_path, monkeypatch):
    """The same numbers whether samples are drawn, or read from an .npz or a folder."""
    monkeypatch.setattr(small, "STEPS", 20)
    monkeypatch.setattr(small, "BATCH", 16)
    written = ("--save-npz", tmp_path / "s.npz", "--save-images", tmp_path / "pngs")
    sampled = command("sample", trained, "--count", 30, "--out", tmp_path / "g.png", *written)
    assert sampled.code == 0, sampled.err
    words = ("--metrics", "fid,is,kid,precision,symmetry", "--extractor", "small", "--count", 30)
    results = []
    for name, more in (
        ("drawn", ()),
        ("npz", ("--samples", tmp_path / "s.npz")),
        ("pngs", ("--samples", tmp_path / "pngs")),
    ):
        out = tmp_path / f"{name}.json"
        result = command("evaluate", trained, *words, *more, "--out", out)
        assert result.code == 0, result.err
        assert "warning: 30 samples: below 2,048" in result.err
        results.append(json.loads(out.read_text()))
    drawn, npz, pngs = results
    measured = ("fid", "inception_score", "kid", "precision", "symmetry_accuracy", "copy_distance")
    for name in measured:
        assert drawn[name] == npz[name] == pngs[name]
    assert drawn["samples_per_class"] == npz["samples_per_class"] == pngs["samples_per_class"]
    assert sum(drawn["samples_per_class"].values()) == 30
    assert npz["samples_from"] == str(tmp_path / "s.npz") and "seed" not in npz
    assert drawn["extractor"] == "small" and len(drawn["extractor_sha256"]) == 64
    assert (trained / "extractor-small.safetensors").is_file()
    assert (tmp_path / "npz.png").read_bytes() == (tmp_path / "drawn.png").read_bytes()


def test_samples_without_classes_or_of_others_are_refused(trained, tmp_path):
    images = np.zeros((2, 24, 24, 3), np.uint8)
    np.savez(tmp_path / "bare.npz", arr_0=images)
    np.savez(tmp_path / "other.npz", arr_0=images, labels=np.array([0, 7]))
    for name, text in (("bare", "does not say the samples' classes"), ("other", "has class 7")):
        refused(command("evaluate", trained, "--samples", tmp_path / f"{name}.npz"), text)


def test_a_grid_has_a_row_of_each_class_whatever_the_order_of_the_file(trained, tmp_path):
    """A grey value for each class, classes in turn."""
    labels = np.arange(20) % 5
    images = np.broadcast_to(40 * labels[:, None, None, None], (20, 24, 24, 3)).astype(np.uint8)
    np.savez(tmp_path / "s.npz", arr_0=images, labels=labels)
    out = tmp_path / "e.json"
    result = command("evaluate", trained, "--samples", tmp_path / "s.npz", "--out", out)
    assert result.code == 0, result.err
    with Image.open(tmp_path / "e.png") as grid:
        pixels = np.asarray(grid)
    side = 98
    for row in range(5):
        for column in range(4):
            assert (pixels[row * side + 50, column * side + 50] == 40 * row).all()


def test_images_that_nobody_looks_at_are_not_opened(trained, tmp_path, monkeypatch):
    """A run's data need not be where its samples are measured."""
    gone = lambda config: pytest.fail("opened")
    images = np.random.default_rng(0).integers(0, 255, (6, 24, 24, 3), dtype=np.uint8)
    np.savez(tmp_path / "s.npz", arr_0=images, labels=np.arange(6) % 5)
    words = ("--samples", tmp_path / "s.npz", "--reference", tmp_path / "s.npz")
    monkeypatch.setattr("heptapod_fast.runs.data.open_images", gone)
    monkeypatch.setattr("heptapod_fast.evaluation.fidelity.extractor_of", lambda context: Means())
    out = tmp_path / "e.json"
    result = command("evaluate", trained, "--metrics", "fid", *words, "--out", out)
    assert result.code == 0, result.err
    assert abs(json.loads(out.read_text())["fid"]) < 1e-6


class Means:
    """An extractor of means over the image."""

    name = "means"
    sha256 = "0"
    knows_statistics = True

    def __call__(self, pixels):
        values = pixels.float().mean((2, 3))
        return Features(values, values, values)
