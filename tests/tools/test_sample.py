"""tools/sample.py: help, what it writes, what it refuses."""

import re

import numpy as np
import pytest
from PIL import Image

from tests.running import command, refused, train_here

CONTRACT = (
    "classes count positions-per-step temperature diffusion-steps top-k top-p ema"
    " checkpoint seed out save-images save-npz"
).split()
SMALL = dict(image_size=12, patch_size=4, images=16)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run of 3x3 tokens, in a path with a space."""
    out = tmp_path_factory.mktemp("a run") / "é"
    train_here(out, **SMALL)
    return out


def test_help_lists_the_contract(trained):
    result = command("sample", trained, "--help")
    assert result.code == 0
    assert [name for name in CONTRACT if f"--{name} " not in result.out] == []


def test_a_grid_goes_where_it_is_told(trained, tmp_path):
    result = command("sample", trained, "--count", 6, "--out", tmp_path / "deep" / "grid.png")
    assert result.code == 0, result.err
    assert "6 images of 2 classes after 16 training images" in result.out
    assert "classes: 0 2-fold, 1 3-fold" in result.out
    assert "weights of ema-0.9999" in result.out
    with Image.open(tmp_path / "deep" / "grid.png") as image:
        assert image.size == (3 * 98 + 2, 2 * 98 + 2)


@pytest.mark.parametrize("flag, name", [("--out", "grid.jpg"), ("--save-npz", "arrays")])
def test_names_must_say_what_is_in_the_file(trained, tmp_path, flag, name):
    refused(command("sample", trained, flag, tmp_path / name), flag, "ends in")


def test_without_a_name_it_lies_with_the_run(trained):
    before = set((trained / "samples").iterdir())
    assert command("sample", trained, "--count", 2, "--seed", 7).code == 0
    new = {p.name for p in set((trained / "samples").iterdir()) - before}
    assert new == {"sample-step-00000002-seed7.png"}


def arrays(trained, folder, name, *words):
    result = command(
        "sample",
        trained,
        "--out",
        folder / "g.png",
        "--save-npz",
        folder / f"{name}.npz",
        "--device",
        "cpu",
        *words,
    )
    assert result.code == 0, result.err
    with np.load(folder / f"{name}.npz") as data:
        return data["arr_0"], data["labels"]


def test_arrays_are_what_evaluators_read(trained, tmp_path):
    pixels, labels = arrays(trained, tmp_path, "a", "--count", 5)
    assert pixels.shape == (5, 12, 12, 3) and pixels.dtype == np.uint8
    assert labels.tolist() == [0, 0, 0, 1, 1]


def test_samples_depend_on_the_seed_not_on_the_batch(trained, tmp_path):
    one, _ = arrays(trained, tmp_path, "a", "--count", 6, "--seed", 3)
    two, _ = arrays(trained, tmp_path, "b", "--count", 6, "--seed", 3, "--batch", 4)
    other, _ = arrays(trained, tmp_path, "c", "--count", 6, "--seed", 4)
    assert np.array_equal(one, two) and not np.array_equal(one, other)


def test_single_images_are_named_by_class(trained, tmp_path):
    folder = tmp_path / "single é"
    assert (
        command(
            "sample",
            trained,
            "--classes",
            "1,0",
            "--count",
            2,
            "--save-images",
            folder,
            "--out",
            tmp_path / "g.png",
        ).code
        == 0
    )
    names = sorted(p.name for p in folder.iterdir())
    assert names == ["000000-class1.png", "000001-class0.png"]


@pytest.mark.parametrize(
    "words, named",
    [
        (
            ("--classes", "0,2"),
            ("--classes 0,2", "'2' is no class", "2 (0 to 1): 0 2-fold, 1 3-fold"),
        ),
        (("--classes=-1",), ("--classes -1", "0 to 1")),
        (("--classes", "cat"), ("--classes cat",)),
        (("--count", 0), ("--count 0",)),
        (("--batch", 0), ("--batch 0",)),
        (("--ema", "0.5"), ("--ema 0.5", "ema-0.9999")),
        (("--checkpoint", 9), ("--checkpoint 9", "holds the steps 2")),
        (("--positions-per-step", 10), ("--positions-per-step 10", "1 to 9")),
        (("--top-p", 0), ("--top-p 0",)),
        (("--temperature", -1), ("--temperature -1",)),
        (("--guidance", 2), ("--guidance 2",)),
        (("--device", "tpu"), ("--device",)),
    ],
)
def test_what_cannot_be_is_refused_naming_the_flag(trained, words, named):
    refused(command("sample", trained, *words), *named)


def test_a_folder_that_is_no_run(tmp_path):
    refused(command("sample", tmp_path), "is not a run directory")
    refused(command("sample", tmp_path / "none"), "is not a run directory")


def test_a_picture_that_cannot_be_written(trained, tmp_path):
    (tmp_path / "file").write_text("")
    refused(command("sample", trained, "--count", 2, "--out", tmp_path / "file" / "g.png"), "file")


def test_synthetic_tokens_cannot_be_decoded(tmp_path):
    train_here(tmp_path, data="synthetic", logogram_count=None, num_classes=3, **SMALL)
    refused(command("sample", tmp_path), "synthetic")
    refused(command("evaluate", tmp_path, "--metrics", "symmetry"), "synthetic")


def test_a_damaged_newest_checkpoint_is_passed_over(tmp_path):
    train_here(tmp_path, **SMALL | {"images": 32})
    path = tmp_path / "checkpoints" / "step-00000004" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    result = command("sample", tmp_path, "--count", 2)
    assert result.code == 0 and re.search("after 16 training images", result.out)
    refused(command("sample", tmp_path, "--checkpoint", 4), "step-00000004", "model.safetensors")
