"""tools/sample.py: help, what it writes, what it refuses."""

import re
import weakref

import numpy as np
import pytest
import torch
from PIL import Image

from heptapod_fast.data.images import ImageFolder
from heptapod_fast.sampling import outputs
from heptapod_fast.sampling.job import Job
from tests.running import command, finish, refused, start, torchrun, train_here

CONTRACT = (
    "classes count positions-per-step temperature diffusion-steps top-k top-p ema"
    " checkpoint seed out save-images save-npz save-tar"
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


@pytest.mark.parametrize(
    "flag, name", [("--out", "grid.jpg"), ("--save-npz", "arrays"), ("--save-tar", "a.zip")]
)
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


def test_classes_by_name_and_all_of_them(trained, tmp_path):
    npz = tmp_path / "s.npz"
    words = ["sample", trained, "--out", tmp_path / "g.png", "--save-npz", npz]
    assert command(*words, "--classes", "3-fold", "--count", 2).code == 0
    assert np.load(npz)["labels"].tolist() == [1, 1]
    assert command(*words).code == 0
    assert np.bincount(np.load(npz)["labels"]).tolist() == [8, 8]


def test_classes_one_by_one_are_those_of_one_call(trained, tmp_path):
    """(seed, class, number within the class) decides an image."""

    def images(*words):
        npz = tmp_path / "s.npz"
        result = command("sample", trained, "--out", tmp_path / "g.png", "--save-npz", npz, *words)
        assert result.code == 0, result.err
        return np.load(npz)["arr_0"].astype(int)

    both = images("--count", 6)
    for label, name in enumerate(("2-fold", "3-fold")):
        alone = images("--classes", name, "--count", 3)
        # Batches of another size may round a pixel the other way.
        assert np.abs(alone - both[3 * label : 3 * label + 3]).max() <= 1
    assert np.abs(both[:3] - both[3:]).max() > 1
    more = images("--count", 10)
    assert np.abs(more[[0, 1, 2, 5, 6, 7]] - both).max() <= 1


def everything(folder):
    """What a call has written, as bytes; of the archive its members, which carry the time."""
    found = {p.name: p.read_bytes() for p in folder.rglob("*.png")}
    with np.load(folder / "s.npz") as arrays:
        return found | {name: arrays[name].tobytes() for name in arrays.files}


def test_ranks_share_the_work_and_give_the_same_bytes(trained, tmp_path):
    words = ["--count", 7, "--batch", 2]

    def asked(folder):
        singles = ["--save-images", folder / "singles", "--save-npz", folder / "s.npz"]
        return [*words, "--out", folder / "grid.png", *singles]

    alone = command("sample", trained, *asked(tmp_path / "alone"))
    assert alone.code == 0, alone.err
    shared = finish(start("sample", trained, *asked(tmp_path / "shared"), launcher=torchrun(2)))
    assert shared.code == 0, shared.out
    assert shared.out.count("7 images of 2 classes") == 1
    expected = everything(tmp_path / "alone")
    assert len(expected) == 7 + 1 + 2
    assert everything(tmp_path / "shared") == expected


# ------------------------------------------------------------------------------------ going on


def all_outputs(folder):
    return [
        "--out",
        folder / "grid.png",
        "--save-npz",
        folder / "s.npz",
        "--save-tar",
        folder / "s.tar",
        "--save-images",
        folder / "singles",
    ]


def files_in(folder):
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


WORDS = ["--count", 18, "--batch", 4, "--seed", 5]


@pytest.fixture(scope="module")
def undisturbed(trained, tmp_path_factory):
    """Files of a job that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    result = command("sample", trained, *WORDS, *all_outputs(folder))
    assert result.code == 0, result.err
    return files_in(folder)


@pytest.fixture
def stopped(trained, tmp_path, monkeypatch):
    """A folder with what a job left that failed in its third batch."""
    with monkeypatch.context() as patch:
        patch.setenv("HEPTAPOD_FAULT", "raise@written=12")
        result = command("sample", trained, *WORDS, *all_outputs(tmp_path))
    assert result.code == 1
    assert "stopped after 8 of 18 images, which are kept: the same command" in result.err
    assert not [name for name in files_in(tmp_path) if name in ("s.npz", "s.tar", "grid.png")]
    return tmp_path


def test_a_job_goes_on_where_it_was_stopped(trained, stopped, undisturbed):
    result = command("sample", trained, *WORDS, *all_outputs(stopped))
    assert result.code == 0, result.err
    assert "going on after 8 of 18 images" in result.out and "18 images of 2 classes" in result.out
    assert files_in(stopped) == undisturbed


def test_two_ranks_go_on_with_what_one_began_and_one_ends_it(trained, stopped, undisturbed):
    words = [*WORDS, *all_outputs(stopped)]
    fault = "kill9@written=18"
    result = finish(start("sample", trained, *words, launcher=torchrun(2), HEPTAPOD_FAULT=fault))
    assert result.code != 0 and result.out.count("going on after 8 of 18") == 1, result.out
    result = command("sample", trained, *words)
    assert result.code == 0 and "going on after 16 of 18" in result.out
    assert files_in(stopped) == undisturbed


@pytest.mark.parametrize(
    "changed, text",
    [
        (["--seed", 6], "--seed is 6, there 5"),
        (["--batch", 8], "--batch is 8, there 4"),
        (["--classes", "1,0"], "--classes is [0, 1], whose order"),
        (["--temperature", 0.5], "--temperature is 0.5, there 1.0"),
        (["--count", 16], "--count is 16, there 18"),
        (["--ema", "none"], "--ema is model, whose weights"),
        (["--out", "other.png"], "--out is "),
    ],
)
def test_a_job_of_other_settings_is_refused(trained, stopped, changed, text, monkeypatch):
    monkeypatch.chdir(stopped)
    before = files_in(stopped)
    result = command("sample", trained.resolve(), *WORDS, *all_outputs(stopped), *changed)
    refused(result, text, "8 images are drawn", "--start-over")
    assert files_in(stopped) == before


def test_other_weights_of_the_same_name_are_another_job(stopped, undisturbed, tmp_path):
    """A run that was trained anew in its folder."""
    out = tmp_path / "another"
    train_here(out, **SMALL | {"seed": 1})
    refused(command("sample", out, *WORDS, *all_outputs(stopped)), "--ema is ema-0.9999, whose")
    again = command("sample", out, *WORDS, *all_outputs(stopped), "--start-over")
    assert again.code == 0, again.err
    assert not list(stopped.glob(".*"))


def test_the_grid_alone_is_no_job_to_go_on_with(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("HEPTAPOD_FAULT", "raise@written=8")
    result = command("sample", trained, *WORDS, "--out", tmp_path / "g.png")
    assert result.code == 1 and "stopped after" not in result.err
    assert files_in(tmp_path) == {}


def test_an_archive_of_arrays_is_numpys(tmp_path):
    labels = torch.tensor([0, 1, 1, 2, 2])
    pixels = torch.randint(256, (5, 3, 4, 4), dtype=torch.uint8)
    arrays = outputs.Arrays(tmp_path / "deep" / "a.npz", labels)
    with Job([arrays], 5):
        arrays.add(labels[:3], pixels[:3])
        arrays.add(labels[3:], pixels[3:])
    with np.load(tmp_path / "deep" / "a.npz") as found:
        assert found["arr_0"].dtype == np.uint8 and found["labels"].dtype == np.int64
        assert np.array_equal(found["arr_0"], pixels.permute(0, 2, 3, 1).numpy())
        assert found["labels"].tolist() == labels.tolist()


def test_an_archive_that_was_not_finished_leaves_nothing(tmp_path):
    labels = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(KeyboardInterrupt):
        arrays = outputs.Arrays(tmp_path / "a.npz", labels)
        with Job([arrays], 4):
            arrays.add(labels[:2], torch.zeros(2, 3, 4, 4, dtype=torch.uint8))
            raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_tar_of_samples_is_data_to_train_on(tmp_path):
    labels = torch.tensor([3, 0, 3])
    pixels = torch.randint(256, (3, 3, 8, 8), dtype=torch.uint8)
    files = []
    for name in ("a", "b"):
        path = tmp_path / name / "samples.tar"
        tar = outputs.Tarred(path)
        with Job([tar], 3):
            tar.add(labels[:2], pixels[:2])
            tar.add(labels[2:], pixels[2:])
            assert tar._archive.members == []  # nothing grows with the number of images
        files.append(path.read_bytes())
    assert files[0] == files[1] and not list(tmp_path.rglob(".*"))
    found = ImageFolder(tmp_path / "a" / "samples.tar", 8)
    assert found.class_names == ("0", "3") and found.labels.tolist() == [1, 0, 1]
    assert torch.equal(found.images(torch.arange(3)), pixels)
    with pytest.raises(KeyboardInterrupt):
        tar = outputs.Tarred(tmp_path / "broken.tar")
        with Job([tar], 3):
            tar.add(labels[:1], pixels[:1])
            raise KeyboardInterrupt
    assert not list(tmp_path.glob("*broken*"))


def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    """Batches are let go of once they are written; a grid keeps no more than it shows."""
    count = 40 * 32
    labels = torch.zeros(count, dtype=torch.int64)
    everywhere = [
        outputs.Grid(tmp_path / "g.png", 8),
        outputs.Singles(tmp_path / "singles", labels),
        outputs.Tarred(tmp_path / "a.tar"),
        outputs.Arrays(tmp_path / "a.npz", labels),
    ]
    kept = []
    with Job(everywhere, count):
        for _ in range(40):
            pixels = torch.zeros(32, 3, 4, 4, dtype=torch.uint8)
            for output in everywhere:
                output.add(labels[:32], pixels)
            kept.append(weakref.ref(pixels.untyped_storage()))
            pixels = None
            assert sum(storage() is not None for storage in kept) == 0
    assert "(the first 512 of 1,280 images)" in everywhere[0].said()
    assert len(list((tmp_path / "singles").iterdir())) == count
    with Image.open(tmp_path / "g.png") as grid:
        assert grid.size == (8 * 98 + 2, 64 * 98 + 2)


def test_a_thousand_classes_are_all_drawn(tmp_path, monkeypatch):
    """One of each, and the grid says what it shows."""
    out = tmp_path / "run"
    folder = tmp_path / "set"
    for number in range(66):
        (folder / f"c{number:02}").mkdir(parents=True)
        Image.new("RGB", (12, 12), (number, 0, 0)).save(folder / f"c{number:02}" / "x.png")
    train_here(out, **(SMALL | {"data": str(folder), "logogram_count": None, "image_size": 12}))
    npz = tmp_path / "s.npz"
    result = command("sample", out, "--save-npz", npz, "--out", tmp_path / "g.png")
    assert result.code == 0, result.err
    assert np.load(npz)["labels"].tolist() == list(range(66))
    assert "66 images of 66 classes" in result.out and "(the first 64 of 66 images)" in result.out
    assert "classes: 0 c00, 1 c01, 2 c02, 3 c03, 4 c04, 5 c05, ..., 65 c65" in result.out


# --------------------------------------------------------------------------------------- completion


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two pictures of the run's classes, in folders of their names."""
    folder = tmp_path_factory.mktemp("pictures")
    for number, name in enumerate(("2-fold", "3-fold")):
        (folder / name).mkdir()
        pixels = np.random.default_rng(number).integers(0, 256, (12, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name / "a.png")
    return folder


def test_a_folder_is_completed(trained, pictures, tmp_path):
    words = ["--complete", pictures, "--keep", "top-half", "--out", tmp_path / "g.png"]
    words += ["--batch", 1]  # the second image is not the first of its batch's originals
    result = command("sample", trained, *words, "--save-npz", tmp_path / "a.npz")
    assert result.code == 0, result.err
    assert "2 images of 2 classes" in result.out
    assert "given: 3 of 9 tokens (--keep top-half)" in result.out
    with Image.open(tmp_path / "g.png") as image:
        assert image.size == (3 * 98 + 2, 2 * 98 + 2)  # given, completed, original
    pasted = command("sample", trained, *words, "--paste", "--save-npz", tmp_path / "b.npz")
    assert pasted.code == 0, pasted.err
    with np.load(tmp_path / "a.npz") as plain, np.load(tmp_path / "b.npz") as with_pixels:
        assert plain["labels"].tolist() == [0, 1]
        for number, name in enumerate(("2-fold", "3-fold")):
            with Image.open(pictures / name / "a.png") as image:
                original = np.asarray(image)
            kept = with_pixels["arr_0"][number]
            assert np.array_equal(kept[:4], original[:4])  # a row of 3 tokens
            assert np.array_equal(kept[4:], plain["arr_0"][number][4:])
            assert not np.array_equal(plain["arr_0"][number][:4], original[:4])  # 16 codes


def test_one_picture_is_completed(trained, pictures, tmp_path):
    picture = pictures / "3-fold" / "a.png"
    words = ["--complete", picture, "--out", tmp_path / "g.png"]
    result = command("sample", trained, *words, "--classes", "3-fold")
    assert result.code == 0, result.err
    assert "1 images of 1 classes" in result.out and "given: 3 of 9" in result.out
    refused(command("sample", trained, *words), "its class is not known: say it with --classes")


def test_a_completion_goes_on_where_it_was_stopped(trained, pictures, tmp_path, monkeypatch):
    words = ["--complete", pictures, "--keep", "top-half", "--paste", "--batch", 1]
    result = command("sample", trained, *words, *all_outputs(tmp_path / "undisturbed"))
    assert result.code == 0, result.err
    with monkeypatch.context() as patch:
        patch.setenv("HEPTAPOD_FAULT", "raise@written=2")
        command("sample", trained, *words, *all_outputs(tmp_path / "run"))
    other = ["--keep", "left-half", *all_outputs(tmp_path / "run")]
    refused(command("sample", trained, *words, *other), "--complete is images")
    result = command("sample", trained, *words, *all_outputs(tmp_path / "run"))
    assert "going on after 1 of 2 images" in result.out
    assert files_in(tmp_path / "run") == files_in(tmp_path / "undisturbed")


@pytest.mark.parametrize(
    "words, text",
    [
        (["--keep", "centre"], "--keep and --paste are for --complete"),
        (["--paste"], "--keep and --paste are for --complete"),
        (["--complete", "{}", "--count", 3], "--count 3: --complete makes one image of each"),
        (["--complete", "{}", "--keep", "half"], "no such file; expected left-half"),
        (["--complete", "{}/nothing"], "--complete {}/nothing: "),
        (["--complete", "text.png", "--classes", 0], "--complete text.png: not an image"),
    ],
)
def test_completions_that_cannot_be(trained, pictures, tmp_path, monkeypatch, words, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.png").write_text("no picture")
    words = [str(word).format(pictures) for word in words]
    refused(command("sample", trained.resolve(), *words), text.format(pictures))


def test_a_picture_of_a_class_that_the_run_does_not_know(trained, pictures, tmp_path):
    folder = tmp_path / "others"
    for name in ("cats", "dogs"):
        (folder / name).mkdir(parents=True)
        (folder / name / "a.png").write_bytes((pictures / "2-fold" / "a.png").read_bytes())
    result = command("sample", trained, "--complete", folder)
    refused(result, "the run has no class 'cats'; its classes are 2-fold, 3-fold")
    assert command("sample", trained, "--complete", folder, "--classes", "0").code == 0


def test_a_run_of_a_fixed_order_completes_nothing(pictures, tmp_path):
    out = tmp_path / "raster"
    train_here(out, **SMALL, system="1d-raster", head_depth=None)
    result = command("sample", out, "--complete", pictures, "--keep", "left-half")
    refused(result, "1d-raster draws row by row")


def test_ranks_share_a_completion(trained, pictures, tmp_path):
    words = ["--complete", pictures, "--batch", 1, "--keep", "border"]
    alone = command("sample", trained, *words, "--out", tmp_path / "alone.png")
    assert alone.code == 0, alone.err
    many = [*words, "--out", tmp_path / "many.png"]
    shared = finish(start("sample", trained, *many, launcher=torchrun(2)))
    assert shared.code == 0, shared.out
    assert (tmp_path / "many.png").read_bytes() == (tmp_path / "alone.png").read_bytes()
