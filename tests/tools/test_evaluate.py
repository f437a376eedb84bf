"""tools/evaluate.py on one small run."""

import json
import time

import numpy as np
import pytest
from PIL import Image

from heptapod_fast.data import ImageFolder, Logograms
from heptapod_fast.data.logograms import write_folder
from heptapod_fast.evaluation import small
from heptapod_fast.evaluation.extractors import Features
from heptapod_fast.reports.run import report_run
from heptapod_fast.runs import load_run
from tests.running import command, finish, refused, start, torchrun, train_here


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


def test_nothing_is_drawn_for_metrics_that_look_at_no_samples(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(type(load_run(trained).system), "sample", None)
    out = tmp_path / "e.json"
    words = ("--metrics", "likelihood", "--count", 20)
    result = command("evaluate", trained, *words, "--out", out)
    assert result.code == 0, result.err
    numbers = json.loads(out.read_text())
    assert numbers["likelihood_images"] == 20 and numbers["checkpoint"] == "step-00000004"
    of_samples = ("samples", "seed", "options", "sampling_seconds", "samples_per_class")
    assert [name for name in of_samples if name in numbers] == []
    assert [path.name for path in tmp_path.iterdir()] == ["e.json"]
    assert f"written: {out}\n" in result.out
    assert command("evaluate", trained, *words).code == 0
    assert "](evaluation.png)" not in report_run(trained).read_text()


def test_the_floor_of_the_tokenizer_needs_no_samples(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(type(load_run(trained).system), "sample", None)
    monkeypatch.setattr(small, "STEPS", 5)
    out = tmp_path / "e.json"
    words = ("--metrics", "likelihood,rfid", "--extractor", "small", "--count", 20)
    result = command("evaluate", trained, *words, "--out", out)
    assert result.code == 0, result.err
    numbers = json.loads(out.read_text())
    assert numbers["rfid"] > 0 and numbers["bits_per_token"] > 0 and "samples" not in numbers
    assert numbers["rfid_images"] == 64 and numbers["extractor"] == "small"


@pytest.mark.parametrize("flag, value", [("--samples", "s.npz"), ("--temperature", 0.9)])
def test_samples_that_nobody_looks_at_are_refused(trained, flag, value):
    result = command("evaluate", trained, "--metrics", "likelihood", flag, value)
    refused(result, f"{flag} beside --metrics likelihood: nothing there looks at samples")


def test_written_samples_beside_metrics_of_the_system_alone(trained, tmp_path):
    """Each looks at what it is about: the samples of the file, the logograms of the data."""
    images = np.random.default_rng(0).integers(0, 255, (6, 24, 24, 3), dtype=np.uint8)
    np.savez(tmp_path / "s.npz", arr_0=images, labels=np.arange(6) % 5)
    out = tmp_path / "e.json"
    words = ("--metrics", "likelihood,symmetry", "--samples", tmp_path / "s.npz", "--count", 20)
    result = command("evaluate", trained, *words, "--out", out)
    assert result.code == 0, result.err
    numbers = json.loads(out.read_text())
    assert numbers["samples"] == 6 and numbers["likelihood_images"] == 20
    assert out.with_suffix(".png").is_file()


@pytest.mark.parametrize("metrics", ["likelihood", "symmetry,likelihood"])
def test_ranks_agree_whether_samples_are_drawn(trained, tmp_path, metrics):
    """Only one of them has the metrics."""
    words = ("--metrics", metrics, "--count", 20)
    alone = command("evaluate", trained, *words, "--out", tmp_path / "alone.json")
    assert alone.code == 0, alone.err
    words = (*words, "--out", tmp_path / "two.json")
    result = finish(start("evaluate", trained, *words, launcher=torchrun(2)), seconds=120)
    assert result.code == 0, result.out
    bits = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("alone", "two")]
    assert bits[0]["bits_per_token"] == bits[1]["bits_per_token"]


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


def test_a_folder_of_training_images_is_not_kept_in_memory(tmp_path, monkeypatch):
    """The numbers are those of images in memory."""
    write_folder(Logograms(24, 40), tmp_path / "set")
    run = tmp_path / "run"
    data = dict(data=str(tmp_path / "set"), logogram_count=None, image_size=24)
    train_here(run, images=16, **data)
    monkeypatch.setattr(small, "STEPS", 5)
    monkeypatch.setattr(small, "BATCH", 8)
    opened = []
    init = ImageFolder.__init__
    results = []
    for kept in (False, True):

        def spy(self, *words, kept=kept, **settings):
            opened.append(settings["in_memory"])
            init(self, *words, **settings | {"in_memory": kept})

        monkeypatch.setattr(ImageFolder, "__init__", spy)
        words = ("--metrics", "fid,likelihood", "--extractor", "small", "--count", 20)
        result = command("evaluate", run, *words, "--out", tmp_path / "e.json")
        assert result.code == 0, result.err
        results.append(json.loads((tmp_path / "e.json").read_text()))
    assert opened == [False, False]
    for name in ("fid", "bits_per_token", "extractor_sha256", "reference_sha256"):
        assert results[0][name] == results[1][name]
    assert results[0]["reference_images"] == 40


class Means:
    """An extractor of means over the image."""

    name = "means"
    sha256 = "0"
    knows_statistics = True

    def __call__(self, pixels):
        values = pixels.float().mean((2, 3))
        return Features(values, values, values)
