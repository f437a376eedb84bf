"""The views that a cache keeps, and which of them training sees."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from heptapod_fast.data.cache.builder import build_cache
from heptapod_fast.data.cache.format import CacheError, open_cache
from heptapod_fast.data.cache.plan import Plan
from heptapod_fast.data.cache.reader import CacheTokens
from heptapod_fast.data.decoding import PillowDecoder
from heptapod_fast.data.files import find_images
from heptapod_fast.data.pixels import centre_crop
from heptapod_fast.data.views import Views
from heptapod_fast.rng import Rng
from tests.caches import edit_manifest, image_folder, small_tokenizer
from tests.running import command, refused

SIZE = 16
# 21 and 19 pixels leave odd borders, 5 and 3, of which torchvision rounds the half to even.
CROPS = Views("ten-crop", (1.32, 1.2))


def ten_crops(image: Image.Image, size: int) -> list[Image.Image]:
    """torchvision's TenCrop, written down from its documentation: corners, centre, then those of
    the mirrored image."""
    found = []
    for whole in (image, image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)):
        width, height = whole.size
        for left, top in (
            (0, 0),
            (width - size, 0),
            (0, height - size),
            (width - size, height - size),
            (int(round((width - size) / 2.0)), int(round((height - size) / 2.0))),
        ):
            found.append(whole.crop((left, top, left + size, top + size)))
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A cache of pixels with 20 views of images that are 30 x 30."""
    path = tmp_path_factory.mktemp("crops")
    folder = image_folder(path / "images", 40, size=30)
    images = find_images(folder)
    plan = Plan(images, small_tokenizer("patch", SIZE), PillowDecoder(2), CROPS, 5, 3, 16, 0)
    return build_cache(path / "c.zarr", plan)


def expected_views(made, row: int) -> np.ndarray:
    """(V, 3, S, S) in [-1, 1], from the file."""
    number = int(made.read_index("source_index")[row])
    file = find_images(made.path.parent / "images").files[number][0]
    views = []
    with Image.open(str(file)) as image:
        for side in (21, 19):  # int(16 * 1.32), int(16 * 1.2)
            views += ten_crops(centre_crop(image.convert("RGB"), side), SIZE)
    pixels = np.stack([np.asarray(view).transpose(2, 0, 1) for view in views])
    return pixels.astype(np.float32) / 127.5 - 1


def test_the_crops_are_llamagens(made):
    assert made.views == 20 and str(made.augmentation) == "ten-crop at 1.32 and 1.2"
    tokenizer = small_tokenizer("patch", SIZE)
    for row in (0, 7, 39):
        stored = torch.from_numpy(made.read_shard("mean", row // 16)[row % 16].astype(np.float32))
        tokens = made.tokenizer.from_stored(
            made.spec, {"mean": stored}, Rng(0), torch.arange(len(stored))
        )
        found = tokenizer.decode(tokens).numpy()
        assert np.abs(found - expected_views(made, row)).max() < 2e-3  # stored in float16


def test_training_draws_every_view_alike_and_by_the_counter(made):
    source = CacheTokens(made, 7, flip=True)
    index = torch.arange(20_000)
    rows, places = source._draw(index)
    view = places - rows * 20
    counts = view.bincount(minlength=20)
    # 1000 each; the deviation of a count is 31.
    assert len(counts) == 20 and (counts - 1000).abs().max() < 200
    again = CacheTokens(made, 7, flip=True)._draw(index[500:600])[1]
    assert torch.equal(again, places[500:600])
    assert not torch.equal(CacheTokens(made, 8, flip=True)._draw(index)[1], places)


def test_without_a_plain_view_there_is_no_training_on_it(made):
    with pytest.raises(CacheError, match="no plain view.*--flip"):
        CacheTokens(made, 7)


def test_a_manifest_with_another_number_of_views(made, tmp_path):
    shutil.copytree(made.path, tmp_path / "c.zarr")
    edit_manifest(tmp_path / "c.zarr", lambda m: m["augmentation"].update(crop_ranges=[1.5]))
    with pytest.raises(CacheError, match="damaged.*20 views"):
        open_cache(tmp_path / "c.zarr")


def test_views_on_the_command_line(tmp_path):
    folder = image_folder(tmp_path / "images", 12, size=20)
    words = ["cache", "--data", folder, "--tokenizer", "patch-vq", "--image-size", SIZE]
    words += ["--codes", 8, "--decoder", "pillow", "--out", tmp_path / "c.zarr"]
    refused(command(*words, "--views", "ten-crop", "--flip"), "--flip", "give one")
    refused(command(*words, "--crop-ranges", 1.1), "--crop-ranges needs --views ten-crop")
    refused(command(*words, "--views", "ten-crop", "--crop-ranges", 0.9), "--crop-ranges 0.9")
    refused(command(*words, "--views", "ten-crop", "--crop-ranges", 1.1, 1.1), "different numbers")
    refused(command(*words, "--views", "flip", "--crop-ranges", 1.1, 1.05), "--crop-ranges needs")
    result = command(*words, "--views", "ten-crop", "--crop-ranges", 1.9)
    refused(result, "--image-size 16, of which --crop-ranges 1.9 makes 30", "--image-size to 13 ")
    result = command(*words, "--views", "ten-crop", "--crop-ranges", 1.25)
    assert result.code == 0, result.err
    assert "10 views (ten-crop at 1.25)" in result.out
    refused(command(*words, "--views", "flip"), "--views", "begun with other settings")
    assert command("verify", tmp_path / "c.zarr").code == 0
    train = ["train", "--size", "tiny", "--data", tmp_path / "c.zarr", "--width", 32, "--heads", 2]
    train += ["--depth", 1, "--head-depth", 1, "--batch", 8, "--images", 16, "--device", "cpu"]
    train += ["--out", tmp_path / "run", "--sample-every", 0]
    result = command(*train)
    assert result.code == 0, result.err
    assert "one of 10 views (ten-crop at 1.25) at a time" in result.out


@pytest.mark.parametrize("size", [16, 256, 384])
@pytest.mark.parametrize("ranges", [(1.1,), (1.1, 1.05), (1.0,)])
def test_sides_and_counts(size, ranges):
    views = Views("ten-crop", ranges)
    assert views.sides(size) == tuple(int(size * r) for r in ranges)
    assert views.count == 10 * len(ranges)
    crops = [torch.rand(2, 3, side, side) for side in views.sides(size)]
    found = list(views.cut(crops, size))
    assert len(found) == views.count and all(v.shape == (2, 3, size, size) for v in found)


class Partial(PillowDecoder):
    """A decoder that fails at one size alone."""

    def decode(self, files, out):
        reasons = super().decode(files, out)
        if out.shape[-1] == 20:
            reasons[0] = "the second size fails"
        return reasons


def test_a_file_that_fails_at_one_size_is_left_out(tmp_path):
    images = find_images(image_folder(tmp_path / "images", 16, size=30))
    crops = Views("ten-crop", (1.5, 1.25))
    plan = Plan(images, small_tokenizer("patch", SIZE), Partial(1), crops, 8, 3, 16, 2)
    cache = build_cache(tmp_path / "c.zarr", plan)
    reasons = [entry["reason"] for entry in cache.manifest["quarantine"]]
    assert reasons == ["the second size fails"] * 2
    # Tried again at all sizes, they are as broken as before.
    assert build_cache(tmp_path / "c.zarr", plan).fingerprint == cache.fingerprint
