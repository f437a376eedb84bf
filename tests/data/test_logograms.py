"""Logograms: purity, balance, ranges, and the form itself against a direct formula."""

import math

import pytest
import torch
from PIL import Image

from heptapod_fast.data import ImageFolder, ImageSource, Logograms, logogram_classes, write_folder


def test_is_an_image_source():
    source = Logograms(24, 10)
    assert isinstance(source, ImageSource)
    assert len(source) == 10 and source.image_size == 24
    images = source.images(torch.tensor([3, 3, 0]))
    assert images.shape == (3, 3, 24, 24) and images.dtype == torch.uint8
    assert torch.equal(images[0], images[1]) and not torch.equal(images[0], images[2])


@pytest.mark.parametrize("size, classes", [(16, 3), (24, 5), (32, 7), (64, 8), (256, 8)])
def test_number_of_classes(size, classes):
    assert logogram_classes(size) == classes
    assert Logograms(size, 20).class_names == tuple(f"{c + 2}-fold" for c in range(classes))


def test_pixels_follow_the_formula():
    source = Logograms(24, 40, seed=5)
    form = source.parameters(torch.tensor([17]))
    expected = torch.empty(24, 24)
    for row in range(24):
        for column in range(24):
            x, y = (column + 0.5) / 12 - 1, (row + 0.5) / 12 - 1
            wave = math.cos(form["fold"] * (math.atan2(y, x) - form["phase"]))
            d = math.hypot(x, y) - (form["radius"] + form["amplitude"] * wave)
            expected[row, column] = 255 * math.exp(-d * d / (2 * form["stroke"] ** 2))
    image = source.images(torch.tensor([17]))[0]
    assert (image.float() - expected).abs().max() <= 0.51
    assert torch.equal(image[0], image[1]) and torch.equal(image[0], image[2])


def test_an_image_does_not_depend_on_its_batch():
    source = Logograms(24, 3000)
    together = source.images(torch.arange(3000))
    some = torch.randperm(3000, generator=torch.Generator().manual_seed(0))[:200]
    alone = torch.cat([source.images(k[None]) for k in some])
    assert torch.equal(together[some], alone)


def test_an_image_does_not_depend_on_the_count():
    ids = torch.arange(20)
    assert torch.equal(Logograms(24, 20).images(ids), Logograms(24, 5000).images(ids))


def test_balanced_classes_and_ranges():
    source = Logograms(24, 5001)
    counts = source.labels.bincount()
    assert counts.max() - counts.min() <= 1
    form = source.parameters(torch.arange(5001))
    assert torch.equal(form["fold"], source.labels + 2)
    for name, low, high in (
        ("radius", 0.5, 0.7),
        ("amplitude", 0.05, 0.15),
        ("stroke", 0.08, 0.13),
    ):
        assert low <= form[name].min() < low + 0.01 * (high - low) + 1e-9
        assert high - 0.01 * (high - low) - 1e-9 < form[name].max() <= high
    turns = form["phase"] * form["fold"] / (2 * math.pi)
    assert 0 <= turns.min() < 0.01 and 0.99 < turns.max() < 1


def test_seed_changes_images_and_fingerprint():
    one, other = Logograms(24, 10, seed=0), Logograms(24, 10, seed=1)
    ids = torch.arange(10)
    assert not torch.equal(one.images(ids), other.images(ids))
    prints = {
        one.fingerprint,
        other.fingerprint,
        Logograms(24, 11).fingerprint,
        Logograms(32, 10).fingerprint,
        Logograms(24, 10, num_classes=3).fingerprint,
    }
    assert len(prints) == 5 and all(len(p) == 64 for p in prints)
    assert Logograms(24, 10).fingerprint == one.fingerprint


def test_refusals():
    with pytest.raises(ValueError, match="--image-size"):
        Logograms(8, 10)
    with pytest.raises(ValueError, match=r"1\.\.5 classes.*found num_classes=6"):
        Logograms(24, 10, num_classes=6)
    with pytest.raises(ValueError, match="count=0"):
        Logograms(24, 0)
    for bad in ([10], [-1]):
        with pytest.raises(IndexError, match=r"0\.\.9"):
            Logograms(24, 10).images(torch.tensor(bad))


@pytest.mark.parametrize("format, tolerance", [("png", 0), ("jpeg", 12), ("webp", 12)])
def test_written_folder_is_read_back(tmp_path, format, tolerance):
    source = Logograms(24, 11)
    assert write_folder(source, tmp_path / "set", format=format) == 11
    folder = ImageFolder(tmp_path / "set", 24)
    assert folder.class_names == source.class_names
    order = source.labels.argsort(stable=True)
    assert torch.equal(folder.labels, source.labels[order])
    read = folder.images(torch.arange(11)).float()
    assert (read - source.images(order).float()).abs().mean() <= tolerance / 4
    assert (read - source.images(order).float()).abs().max() <= tolerance * 4
    with Image.open(next((tmp_path / "set" / "2-fold").iterdir())) as image:
        assert image.format == format.upper() and image.size == (24, 24)


def test_write_folder_refuses(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="not empty"):
        write_folder(Logograms(24, 2), tmp_path)
    with pytest.raises(ValueError, match="jpeg, png, webp"):
        write_folder(Logograms(24, 2), tmp_path / "new", format="xyz")
