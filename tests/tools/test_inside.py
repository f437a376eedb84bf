"""tools/inside.py: pictures and numbers of a run, and what it refuses."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.running import NO_HEAD, command, refused, train_here

PICTURES = [
    "attention-backbone.png",
    "attention-head.png",
    "inside.png",
    "similarity-backbone.png",
    "similarity-head.png",
    "similarity-tokens.png",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of codes."""
    out = tmp_path_factory.mktemp("inside") / "run"
    train_here(out)
    return out


def test_all_there_is_to_see(trained):
    result = command("inside", trained, "--count", 8, "--images", 2)
    assert result.code == 0, result.err
    folder = trained / "inside"
    assert sorted(path.name for path in folder.glob("*.png")) == PICTURES
    found = json.loads((folder / "inside.json").read_text())
    assert found["held_out_images"] == 8
    assert list(found["probe_accuracies"]) == ["backbone.blocks.0", "head.blocks.0"]
    assert len(found["held_out_loss_by_step"]) == 36
    assert list(found["attention_distances"]) == ["backbone.blocks.0", "head.blocks.0"]
    for line in ("probe_accuracy  ", "attention_distance  ", "held_out_loss  ", "written: "):
        assert line in result.out
    for name in PICTURES:
        with Image.open(folder / name) as picture:
            assert len(picture.convert("RGB").getcolors(2**20)) > 20, name


def test_vectors_have_losses_by_noise_and_1d_no_head(tmp_path):
    run = tmp_path / "run"
    train_here(run, system="1d-raster", tokenizer="patch", codes=None, images=16, **NO_HEAD)
    out = tmp_path / "out"
    result = command("inside", run, "--what", "loss,maps", "--count", 4, "--out", out)
    assert result.code == 0, result.err
    found = json.loads((out / "inside.json").read_text())
    noises = found["held_out_loss_by_noise"]
    assert min(map(float, noises)) < 0.05 and max(map(float, noises)) > 0.95
    assert "probe_accuracy" not in found
    assert sorted(path.name for path in out.glob("*.png")) == [
        "attention-backbone.png",
        "inside.png",
        "similarity-backbone.png",
        "similarity-tokens.png",
    ]


def test_what_a_run_does_not_allow_is_left_out_and_said(tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    random = np.random.default_rng(0)
    for number in range(40):
        pixels = random.integers(0, 256, (24, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(pictures / f"{number}.png")
    run = tmp_path / "run"
    folder = {"data": str(pictures), "image_size": 24, "logogram_count": None}
    train_here(run, images=16, **folder)
    result = command("inside", run, "--count", 4, "--images", 1)
    assert result.code == 0, result.err
    assert "left out: probe: --metrics probe asks for the classes" in result.out
    assert "probe_accuracy" not in json.loads((run / "inside" / "inside.json").read_text())
    refused(command("inside", run, "--what", "probe"), "these are of one class")


@pytest.mark.parametrize(
    "words, named",
    [
        (("--what", "loss,dreams"), "--what dreams: choose among loss, probe, attention, maps"),
        (("--what", "maps", "--seen", "36"), "--seen 36: expected 0 to 35 tokens"),
        (("--count", "1"), "--count 1: expected at least 2"),
        (("--images", "0"), "--images 0: expected at least 1"),
        (("--images", "65"), "--images 65: expected at most 64"),
        (("--what", "loss", "--reference", "nowhere.npz"), "nowhere.npz: no such file"),
    ],
)
def test_what_cannot_be_is_refused(trained, words, named):
    refused(command("inside", trained, *words), named)


def test_a_run_without_images_shows_nothing(tmp_path):
    run = tmp_path / "run"
    train_here(run, data="synthetic", images=16, codes=None, logogram_count=None)
    refused(command("inside", run), "synthetic tokens")
