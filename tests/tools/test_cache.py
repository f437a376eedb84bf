"""tools/cache.py as a user meets it: from a folder to samples, and what it refuses."""

import subprocess
import sys

import numpy as np
import pytest
import zarr
from PIL import Image

from heptapod_fast.data import Logograms, write_folder
from heptapod_fast.data.cache.format import open_cache
from tests.caches import CLASSES, image_folder
from tests.running import ROOT, command, environment, refused


@pytest.fixture
def folder(tmp_path):
    return image_folder(tmp_path / "images", 30)


def cache(folder, out, *words, tokenizer="patch-vq", size=16):
    return command(
        "cache",
        "--data",
        folder,
        "--out",
        out,
        "--tokenizer",
        tokenizer,
        "--image-size",
        size,
        *words,
    )


def test_from_a_folder_to_samples(folder, tmp_path):
    out, run = tmp_path / "c.zarr", tmp_path / "run"
    done = cache(folder, out, "--flip", "--codes", 20)
    assert done.code == 0, done.err
    assert "building  " in done.out and "30 images, 2 views" in done.out
    assert f"python tools/train.py --size SIZE --data {out}" in done.out
    for part in ("decoding", "encoding", "writing"):
        assert part in done.out
    checked = command("verify", out)
    assert checked.code == 0 and "whole, 8 files as they were written" in checked.out
    again = cache(folder, out, "--flip", "--codes", 20)
    assert again.code == 0 and "building" not in again.out and "finished" in again.out
    trained = command(
        "train",
        "--size",
        "tiny",
        "--data",
        out,
        "--out",
        run,
        "--images",
        64,
        "--batch",
        32,
        "--sample-every",
        0,
        "--device",
        "cpu",
    )
    assert trained.code == 0, trained.err
    sampled = command("sample", run, "--count", 6, "--out", tmp_path / "grid.png")
    assert sampled.code == 0 and CLASSES[0] in sampled.out, sampled.err
    refused(command("evaluate", run), "--metrics is missing")
    refused(command("evaluate", run, "--metrics", "symmetry"), "logograms")


@pytest.mark.parametrize(
    "tokenizer, words, text",
    [
        ("kl16", [], "--tokenizer kl16 needs --tokenizer-weights FILE"),
        ("kl16", ["--tokenizer-weights", "no.ckpt"], "no.ckpt: no such file"),
        ("kl16", ["--patch-size", 4], "fixed patch size of 16"),
        ("patch", ["--tokenizer-weights", "x"], "--tokenizer patch has no weights"),
        ("patch", ["--codes", 5], "--codes 5 has no meaning"),
        ("patch-vq", ["--patch-size", 5], "not a multiple of the patch size 5"),
        ("patch-vq", ["--codes", 70_000], "--codes"),
        ("patch-vq", ["--dtype", "bfloat16"], "--dtype bfloat16: --tokenizer patch-vq works in"),
        ("patch-vq", ["--workers", 0], "--workers 0: expected at least 1"),
        ("patch-vq", ["--batch", 0], "--batch 0: expected at least 1"),
        ("patch-vq", ["--image-size", 64], "too small for --image-size 64"),
    ],
)
def test_settings_that_are_refused(folder, tmp_path, tokenizer, words, text):
    refused(cache(folder, tmp_path / "c.zarr", *words, tokenizer=tokenizer), text)
    # Only a plan can say no to these.
    assert not (tmp_path / "c.zarr").exists() or "--batch" in words


def test_names_that_are_refused(folder, tmp_path):
    refused(cache(folder, tmp_path / "cache"), "expected a name that ends in .zarr")
    refused(
        cache(tmp_path / "nothing", tmp_path / "c.zarr"), "no such folder or archive; check --data"
    )
    (tmp_path / "file").write_text("")
    refused(cache(folder, tmp_path / "file" / "c.zarr"), "cannot write", "--out")
    refused(cache(folder, folder / "c.zarr"), "lies inside --data", "choose another place")


# ---------------------------------------------------------- folders that are not what they were


def test_missing_empty_and_renamed_class_folders(folder, tmp_path):
    out = tmp_path / "c.zarr"
    assert cache(folder, out).code == 0
    (folder / "bee").rename(folder / "wasp")
    refused(
        cache(folder, out), "the images of --data: 1 new classes (wasp); 1 missing classes (bee)"
    )
    (folder / "wasp").rename(folder / "bee")
    (folder / "dog").mkdir()
    refused(cache(folder, tmp_path / "d.zarr"), "1 class folders of --data hold no images", "dog")
    (folder / "dog").rmdir()
    for path in (folder / "cat").iterdir():
        path.unlink()
    (folder / "cat").rmdir()
    refused(cache(folder, out), "the images of --data: 1 missing classes (cat); files 20, was 30")


def test_an_image_more(folder, tmp_path):
    out = tmp_path / "c.zarr"
    assert cache(folder, out).code == 0
    Image.new("RGB", (16, 16)).save(folder / "ant" / "new.png")
    refused(cache(folder, out), "the images of --data: files 31, was 30")
    assert not (out / ".building").exists()
    (folder / "ant" / "new.png").unlink()
    Image.new("RGB", (20, 20)).save(folder / "ant" / "000.png")
    refused(cache(folder, out), "the images of --data: other file names, sizes or classes")


# ------------------------------------------------------------------------- broken and odd images


def odd_images(folder):
    """One of every kind that can be read, beside the others; returns how many."""
    pixels = np.random.default_rng(1).integers(0, 256, (40, 24, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image.convert("L").save(folder / "ant" / "grey.jpg")
    image.convert("CMYK").save(folder / "ant" / "cmyk.jpg")
    image.save(folder / "ant" / "png.JPEG", format="png")
    image.convert("P").save(folder / "ant" / "palette.png")
    image.convert("LA").save(folder / "ant" / "alpha.png")
    Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 257).save(folder / "ant" / "deep.png")
    image.save(folder / "ant" / "p.webp")
    image.save(folder / "ant" / "progressive.jpg", progressive=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(folder / "ant" / "turned.jpg", exif=exif)
    image.save(folder / "ant" / "größe 画像 🙂.png")
    return 10


@pytest.fixture(params=["pillow", "dali"])
def decoder(request):
    if request.param == "dali":
        pytest.importorskip("nvidia.dali")
    return request.param


def test_odd_images(folder, tmp_path, decoder):
    count = odd_images(folder)
    done = cache(folder, tmp_path / "c.zarr", "--decoder", decoder, tokenizer="patch")
    assert done.code == 0 and f"{30 + count} images" in done.out, done.err
    opened = open_cache(tmp_path / "c.zarr")
    assert f"/{decoder}-" in opened.manifest["preprocessing"]
    assert np.isfinite(zarr.open_group(opened.path, mode="r")["mean"][:]).all()


def test_decoders_agree(folder, tmp_path):
    pytest.importorskip("nvidia.dali")
    odd_images(folder)
    found = {}
    for name in ("dali", "pillow"):
        assert (
            cache(
                folder, tmp_path / f"{name}.zarr", "--decoder", name, "--flip", tokenizer="patch"
            ).code
            == 0
        )
        found[name] = zarr.open_group(tmp_path / f"{name}.zarr", mode="r")["mean"][:]
    assert np.abs(found["dali"] - found["pillow"]).max() < 0.02


def test_dali_that_is_not_there(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    refused(cache(folder, tmp_path / "c.zarr", "--decoder", "dali"), "heptapod_fast[dali]")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cache(folder, tmp_path / "c.zarr").code == 0


def broken_images(folder):
    """One of every kind that cannot be read; returns their names."""
    whole = folder / "bee" / "whole.jpg"
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(whole)
    raw = whole.read_bytes()
    whole.unlink()
    kinds = {
        "empty.jpg": b"",
        "stub.jpg": raw[:20],
        "page.jpg": b"<!DOCTYPE html><p>404",
        "half.jpg": raw[: len(raw) // 2],
        "text.png": b"hello",
    }
    for name, data in kinds.items():
        (folder / "bee" / name).write_bytes(data)
    (folder / "bee" / "gone.jpg").symlink_to("nowhere.jpg")
    return [*kinds, "gone.jpg"]


def test_broken_images(folder, tmp_path, decoder):
    names, made = broken_images(folder), tmp_path / "c.zarr"
    choice = ("--decoder", decoder, "--max-broken")
    refused(
        cache(folder, made, *choice, 0),
        "cannot be read, --max-broken allows 0",
        *(name for name in names if name != "half.jpg"),
    )
    assert cache(folder, made, *choice, len(names) - 1).code == 1
    done = cache(folder, made, *choice, len(names))
    assert done.code == 0, done.err
    assert all(f"left out  bee/{name}: " in done.out for name in names)
    assert "30 images" in done.out
    checked = command("verify", tmp_path / "c.zarr")
    assert checked.code == 0 and all(f"left out: bee/{name}" in checked.out for name in names)
    trained = command(
        "train",
        "--size",
        "tiny",
        "--data",
        tmp_path / "c.zarr",
        "--out",
        tmp_path / "run",
        "--images",
        32,
        "--batch",
        16,
        "--sample-every",
        0,
    )
    assert trained.code == 0 and "30 images, 3 classes" in trained.out, trained.err


def test_nothing_but_broken_images(tmp_path):
    folder = image_folder(tmp_path / "images", 6)
    for path in folder.rglob("*.png"):
        path.write_bytes(b"x")
    refused(cache(folder, tmp_path / "c.zarr", "--max-broken", 6), "none of its 6 images")


@pytest.mark.slow
def test_the_documented_sequence(tmp_path):
    """The README's: logograms of 256 pixels as JPEG -> cache -> training -> samples. Of 400 instead
    of 2,000, with fewer codes, one step, two samples: the commands are the same."""
    write_folder(Logograms(256, 400), tmp_path / "logograms")
    python = sys.executable

    def run(*words):
        done = subprocess.run(
            [python, *map(str, words)],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=environment(),
            timeout=500,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    out = run(
        "tools/cache.py",
        "--data",
        tmp_path / "logograms",
        "--image-size",
        256,
        "--tokenizer",
        "patch-vq",
        "--codes",
        64,
        "--out",
        tmp_path / "logograms.zarr",
    )
    assert "400 images" in out
    assert "whole" in run("tools/verify.py", tmp_path / "logograms.zarr")
    out = run(
        "tools/train.py",
        "--size",
        "tiny",
        "--data",
        tmp_path / "logograms.zarr",
        "--images",
        64,
        "--sample-every",
        0,
        "--out",
        tmp_path / "run",
        "--device",
        "cpu",
    )
    assert "400 images, 8 classes" in out and "finished" in out
    out = run("tools/sample.py", tmp_path / "run", "--count", 2, "--out", tmp_path / "grid.png")
    assert "2 images" in out
    with Image.open(tmp_path / "grid.png") as grid:
        assert min(grid.size) >= 256
