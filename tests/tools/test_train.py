"""tools/train.py: help, dry run, refusals, a whole run, running again."""

import json
import sys

import pytest
import torch

from heptapod_fast.data import Logograms, write_folder
from heptapod_fast.train.records import read_metrics
from tests.running import command, finish, flags, refused, start

CONTRACT = (
    "size system data tokenizer tokenizer-weights image-size patch-size head window density"
    " steps loss-weight head-depth images batch micro-batch lr-per-256 flip dropout seed"
    " out dry-run"
).split()
FOLDER = dict(tokenizer="patch-vq", image_size=12, patch_size=4, logogram_count=None, images=16)


@pytest.fixture
def pictures(tmp_path):
    """A folder with two classes of twelve images; spaces and other alphabets in its path."""
    folder = tmp_path / "my pictures é 文字"
    write_folder(Logograms(12, 24), folder, "png")
    return folder


def files_of(folder):
    """{file: (its number on the disk, its bytes)}: a file that is written anew gets another."""
    return {
        path: (path.stat().st_ino, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_kernel_that_cannot_run_is_refused_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    out = tmp_path / "run"
    result = command("train", *flags(out=out, device="cpu"), "--kernels", "triton")
    refused(result, "--kernels triton", "runs on cuda tensors", "Leave --kernels away")
    assert not out.exists()


@pytest.mark.parametrize(
    "name, why",
    [("triton", "runs on cuda tensors, these are on cpu"), ("flash", "pip install flash-attn")],
)
def test_an_attention_that_cannot_run_is_refused_and_a_dry_run_says_so(
    tmp_path, monkeypatch, name, why
):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    out = tmp_path / "run"
    result = command("train", *flags(out=out, device="cpu"), "--attention", name)
    refused(result, f"--attention {name}", why, "Leave --attention away")
    assert not out.exists()
    result = command("train", *flags(out=out, device="cpu"), "--attention", name, "--dry-run")
    assert result.code == 0 and "refused" in result.out and why in result.out


def test_help_lists_the_contract():
    result = command("train", "--help")
    assert result.code == 0
    assert [name for name in CONTRACT if f"--{name}" not in result.out] == []


def test_dry_run_needs_neither_data_nor_weights_and_writes_nothing(tmp_path):
    result = command(
        "train",
        "--size",
        "B",
        "--data",
        "/no/data",
        "--out",
        tmp_path / "run",
        "--dry-run",
        "--batch",
        8,
        "--recompute",
        "off",
    )
    assert result.code == 0, result.err
    for text in ("207,234,336", "FLOPs per image", "memory per rank", "learning rate", "--seed"):
        assert text in result.out
    assert not list(tmp_path.iterdir())


def test_a_run_writes_what_it_promises_and_a_finished_one_says_so(tmp_path):
    out = tmp_path / "run é 文"
    result = command("train", *flags(out=out, sample_every=32, images=64))
    assert result.code == 0, result.err
    lines = [line for line in result.out.splitlines() if line.startswith("images")]
    assert len(lines) == 8 and all("loss" in x and "lr" in x and "ETA" in x for x in lines)
    assert {"config.json", "metrics.jsonl", "samples", "checkpoints"} <= {
        p.name for p in out.iterdir()
    }
    assert json.loads((out / "config.json").read_text())["recipe"]["images"] == 64
    fields = {"images", "loss", "lr", "images_per_second", "eta_seconds", "step", "epoch"}
    assert all(fields <= record.keys() for record in read_metrics(out / "metrics.jsonl"))
    assert sorted(p.name for p in (out / "samples").iterdir()) == [
        "images-000000000032.png",
        "images-000000000064.png",
    ]
    before = files_of(out / "checkpoints")
    again = command("train", *flags(out=out, sample_every=32, images=64))
    assert again.code == 0
    assert "is finished: 64 images" in again.out
    assert files_of(out / "checkpoints") == before


def test_more_images_train_on(tmp_path):
    assert command("train", *flags(out=tmp_path, images=16)).code == 0
    result = command("train", *flags(out=tmp_path, images=32))
    assert result.code == 0 and "--images 32 (was 16)" in result.out
    assert "resumed   at 16 images" in result.out and "finished  32 images" in result.out


@pytest.mark.parametrize(
    "words, named",
    [
        (["--size", "huge"], "--size"),
        (["--size", "tiny", "--sise", "3"], "--sise"),
        (["--size", "tiny", "--images", "many"], "--images"),
        ([], "--size"),
    ],
)
def test_words_that_are_not_understood_are_named(words, named):
    refused(command("train", *words), named)


@pytest.mark.parametrize(
    "settings, named",
    [
        (dict(image_size=25), ("--image-size 25", "--patch-size")),
        (dict(head="local", window=16), ("--window 16", "1, 4, 9 tokens")),
        (dict(head="global", window=9), ("--window 9", "--head global")),
        (dict(batch=9), ("odd", "--batch")),
        (dict(micro_batch=3), ("--micro-batch 3", "2 and 4")),
        (
            dict(system="1d-raster"),
            ("--head-depth 1 belongs to --system heptapod", "--system 1d-raster has no such"),
        ),
        (dict(tokenizer="patch"), ("--codes 16", "patch")),
        (dict(data="synthetic"), ("--logogram-count",)),
        (dict(data="/no/such/folder", logogram_count=None), ("/no/such/folder", "--data")),
        (dict(data="cache.zarr", logogram_count=None), ("cache.zarr", "--data", "tools/cache.py")),
        (dict(size="B", head_depth=None, codes=None, logogram_count=None), ("--data is missing",)),
        (dict(num_classes=99), ("num_classes=99", "--num-classes")),
        (dict(adamw_ema="cuda"), ("cuda",)),
    ],
)
def test_settings_that_cannot_be_are_refused_naming_the_flag(tmp_path, settings, named):
    refused(command("train", *flags(**{"out": tmp_path / "run"} | settings)), *named)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused(tmp_path):
    refused(command("train", *flags(out=tmp_path / "run", device="cuda")), "--device cuda")


def test_a_folder_of_images_with_spaces_and_unicode_trains(tmp_path, pictures):
    result = command("train", *flags(out=tmp_path / "run", data=pictures, **FOLDER))
    assert result.code == 0, result.err
    assert "24 images, 2 classes" in result.out


def test_an_empty_folder_is_refused(tmp_path):
    (tmp_path / "void").mkdir()
    refused(
        command("train", *flags(out=tmp_path / "run", data=tmp_path / "void", **FOLDER)),
        "found no images",
        "--data",
    )


def test_an_unreadable_image_is_named_and_can_be_left_out(tmp_path, pictures):
    broken = sorted(pictures.rglob("*.png"))[3]
    broken.write_bytes(broken.read_bytes()[:60])
    words = flags(out=tmp_path / "run", data=pictures, **FOLDER)
    refused(command("train", *words), broken.name, "--max-broken")
    result = command("train", *words, "--max-broken", "1")
    assert result.code == 0 and "23 images" in result.out


def test_images_that_are_too_small_are_named(tmp_path, pictures):
    words = flags(out=tmp_path / "run", data=pictures, **FOLDER | {"image_size": 24})
    refused(command("train", *words), "--image-size 24", "12 x 12", "--allow-upscale")
    assert command("train", *words, "--allow-upscale").code == 0


def test_data_that_changed_is_refused_until_allowed(tmp_path, pictures):
    words = flags(out=tmp_path / "run", data=pictures, **FOLDER)
    assert command("train", *words).code == 0
    sorted(pictures.rglob("*.png"))[0].unlink()
    more = flags(out=tmp_path / "run", data=pictures, **FOLDER | {"images": 32})
    refused(command("train", *more), "other data", "my pictures", "--allow-data-change")
    assert command("train", *more, "--allow-data-change").code == 0


def test_a_class_that_was_renamed_is_refused_for_good(tmp_path, pictures):
    words = flags(out=tmp_path / "run", data=pictures, **FOLDER)
    assert command("train", *words).code == 0
    (pictures / "2-fold").rename(pictures / "two")
    more = flags(out=tmp_path / "run", data=pictures, **FOLDER | {"images": 32})
    result = command("train", *more, "--allow-data-change")
    refused(result, "class names", "--data")
    assert "--allow-data-change" not in result.err


def test_a_run_in_the_way_is_refused(tmp_path):
    assert command("train", *flags(out=tmp_path)).code == 0
    refused(command("train", *flags(out=tmp_path, width=64)), "--width 64 (was 32)", "--out")
    (tmp_path / "plain file").write_text("")
    refused(command("train", *flags(out=tmp_path / "plain file" / "run")), "plain file", "--out")


def test_a_damaged_checkpoint_is_reported_and_the_one_before_taken(tmp_path):
    assert command("train", *flags(out=tmp_path)).code == 0
    newest = tmp_path / "checkpoints" / "step-00000008"
    whole = {p.name: p.read_bytes() for p in newest.iterdir()}
    (newest / "optimizer.safetensors").write_bytes(whole["optimizer.safetensors"][:-1])
    result = command("train", *flags(out=tmp_path))
    assert result.code == 0 and "WARNING" in result.out and "optimizer.safetensors" in result.out
    assert "resumed   at 48 images" in result.out
    assert {p.name: p.read_bytes() for p in newest.iterdir()} == whole


def test_all_checkpoints_damaged_is_an_error(tmp_path):
    assert command("train", *flags(out=tmp_path)).code == 0
    for path in (tmp_path / "checkpoints").glob("step-*"):
        (path / "state.json").unlink()
    for _ in range(2):
        refused(command("train", *flags(out=tmp_path)), "no checkpoint in", "--out")


def test_a_small_run_does_not_wait_for_the_compiler(tmp_path):
    """torch._dynamo takes two seconds to import, more than such a run trains."""
    words = flags(out=tmp_path / "run", device="cpu", images=8)
    asks_at_the_end = (
        "import atexit, runpy, sys\n"
        "atexit.register(lambda: print('imported:', 'torch._dynamo' in sys.modules))\n"
        "sys.argv = sys.argv[1:]\n"
        "sys.path.insert(0, 'tools')\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    launcher = (sys.executable, "-c", asks_at_the_end)
    result = finish(start("train", *words, launcher=launcher))
    assert result.code == 0, result.out
    assert "imported: False" in result.out
