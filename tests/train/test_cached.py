"""Training from a cache: what follows from it, what is refused, the same bytes in every mode."""

import json
import shutil

import numpy as np
import pytest
import torch
import zarr

from heptapod_fast import configure, load_run
from heptapod_fast.data.cache.format import CacheError, open_cache
from heptapod_fast.rng import Rng
from heptapod_fast.runs import RunError
from heptapod_fast.runs.data import open_tokens
from heptapod_fast.tokenizers import KL16, PatchVQ, load_tokenizer
from heptapod_fast.train.session import Ending
from heptapod_fast.world import World
from tests.caches import CLASSES, edit_manifest, sign, small_cache, small_tokenizer
from tests.running import (
    command,
    final_files,
    flags,
    refused,
    start_here,
    tiny_config,
    train_here,
)
from tests.tokenizers.reference import random_weights

CACHED = dict(codes=None, logogram_count=None)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return small_cache(tmp_path_factory.mktemp("made")).path


@pytest.fixture
def copy(made, tmp_path):
    shutil.copytree(made, tmp_path / "c.zarr")
    return tmp_path / "c.zarr"


@pytest.fixture(scope="module")
def moments(tmp_path_factory):
    """(a cache of moments, the file of its weights)."""
    path = tmp_path_factory.mktemp("moments")
    torch.save({"model": random_weights("kl16")}, path / "kl16.ckpt")
    tokenizer = KL16.load(path / "kl16.ckpt", 32)
    return small_cache(path, tokenizer, count=12).path, path / "kl16.ckpt"


def test_settings_follow_the_cache(made):
    config = configure("tiny", data=str(made))
    data = config.data
    assert (data.tokenizer, data.image_size, data.patch_size) == ("patch-vq", 16, 4)
    assert data.codes == 300 and data.flip
    assert config.resolve() == config
    assert not configure("tiny", data=str(made), flip=False).data.flip
    with pytest.raises(FileNotFoundError, match="tools/cache.py"):
        configure("B", data="nothing.zarr")


def test_a_run_from_a_cache(made, tmp_path):
    lines = []
    session, _, ending = train_here(
        tmp_path, data=str(made), sample_every=64, say=lines.append, **CACHED
    )
    assert ending is Ending.FINISHED and session.source.num_images == 70
    assert any("cache     ram:" in line for line in lines), lines
    assert any("70 images, 3 classes, flip on" in line for line in lines), lines
    assert list((tmp_path / "samples").glob("*.png"))
    loaded = load_run(tmp_path)
    assert loaded.class_names == CLASSES
    tokens = loaded.sample(torch.tensor([0, 1]), Rng(0))
    assert loaded.decode(tokens).shape == (2, 3, 16, 16)
    assert command("verify", tmp_path).code == 0


@pytest.fixture(scope="module")
def plain(made, tmp_path_factory):
    """The files of a run to which nothing happened."""
    out = tmp_path_factory.mktemp("plain")
    train_here(out, data=str(made), **CACHED)
    return final_files(out)


def test_the_mode_does_not_change_a_run(made, tmp_path, plain):
    train_here(tmp_path, data=str(made), cache_mode="stream", **CACHED)
    assert final_files(tmp_path) == plain


def test_interrupted_runs_end_alike(made, tmp_path, plain):
    train_here(tmp_path, data=str(made), stop_at=24, **CACHED)
    train_here(tmp_path, data=str(made), cache_mode="stream", **CACHED)
    assert final_files(tmp_path) == plain


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(codes=16), "made with --codes 300, this run asks for --codes 16"),
        (dict(image_size=32), "made with --image-size 16, this run asks for --image-size 32"),
        (dict(patch_size=2), "made with --patch-size 4, this run asks for --patch-size 2"),
        (dict(tokenizer="patch"), "made with --tokenizer patch-vq, this run asks for .* patch"),
        (dict(tokenizer_weights="x.safetensors"), "has its own codebook"),
        (dict(cache_mode="gpu"), "--cache-mode gpu: training runs on cpu"),
    ],
)
def test_caches_that_do_not_fit(made, tmp_path, settings, words):
    values = dict(data=str(made), codes=None, logogram_count=None) | settings
    with pytest.raises(ValueError, match=words):
        start_here(tmp_path, **values)


def test_no_mirrored_view(tmp_path):
    cache = small_cache(tmp_path, flip=False)
    values = dict(data=str(cache.path), **CACHED)
    with pytest.raises(CacheError, match="--no-flip"):
        start_here(tmp_path / "run", flip=True, **values)
    session, _ = start_here(tmp_path / "run", **values)
    assert not session.config.data.flip


def edit(path, row, value):
    zarr.open_group(path, mode="r+")["codes"][row] = value
    sign(path)


def test_a_cache_that_changed_since_the_checkpoint(copy, tmp_path):
    out = tmp_path / "run"
    train_here(out, data=str(copy), images=16, **CACHED)
    edit(copy, 3, 7)
    with pytest.raises(RunError, match="trained on other data: --data .* --allow-data-change"):
        start_here(out, data=str(copy), images=32, **CACHED)
    _, state = start_here(out, data=str(copy), images=32, allow_data_change=True, **CACHED)
    assert state.images == 16


def test_classes_that_changed_since_the_checkpoint(copy, tmp_path):
    out = tmp_path / "run"
    train_here(out, data=str(copy), images=16, **CACHED)
    edit_manifest(copy, lambda m: m["dataset"].update(class_names=["bee", "ant", "cat"]))
    with pytest.raises(RunError, match="class names"):
        start_here(out, data=str(copy), images=32, allow_data_change=True, **CACHED)


def test_another_codebook_in_the_cache(copy, tmp_path):
    out = tmp_path / "run"
    train_here(out, data=str(copy), images=16, **CACHED)
    shutil.rmtree(copy)
    small_cache(tmp_path, small_tokenizer(codes=301))
    with pytest.raises(CacheError, match="--codes 301, this run asks for --codes 300"):
        start_here(out, data=str(copy), images=32, codes=300, logogram_count=None)


@pytest.mark.parametrize(
    "change, words",
    [
        (
            lambda m: m.update(preprocessing="resize-9/x"),
            "preprocessing resize-9/x, this version has",
        ),
        (
            lambda m: m["tokenizer"].update(scale=0.18215),
            "scale of tokens of 0.18215, this version",
        ),
    ],
)
def test_what_this_version_would_do_otherwise(copy, tmp_path, monkeypatch, change, words):
    monkeypatch.setattr(PatchVQ, "constants", {"scale": 0.2325})  # as kl16 has one
    edit_manifest(copy, change)
    with pytest.raises(CacheError, match=words):
        start_here(tmp_path / "run", data=str(copy), **CACHED)


def test_a_cache_that_was_built_anew_before_the_first_checkpoint(tmp_path):
    """The run keeps the codebook that it trains with."""
    cache, out = small_cache(tmp_path), tmp_path / "run"
    start_here(out, data=str(cache.path), **CACHED)
    before = load_tokenizer("patch-vq", out / "tokenizer.safetensors").fingerprint
    shutil.rmtree(cache.path)
    tokenizer = small_tokenizer()
    tokenizer.codebook_VE = tokenizer.codebook_VE.flip(0).contiguous()
    cache = small_cache(tmp_path, tokenizer)
    train_here(out, data=str(cache.path), images=16, **CACHED)
    kept = load_tokenizer("patch-vq", out / "tokenizer.safetensors").fingerprint
    assert kept == cache.manifest["tokenizer"]["fingerprint"] != before
    assert load_run(out).tokenizer.fingerprint == kept
    # After one, it does not let go of its own.
    shutil.rmtree(cache.path)
    small_cache(tmp_path)
    with pytest.raises(RunError, match="other data and tokenizer"):
        start_here(out, data=str(cache.path), images=32, **CACHED)
    assert load_run(out).tokenizer.fingerprint == kept


def test_a_cache_that_moved(copy, tmp_path, monkeypatch):
    out = tmp_path / "run"
    train_here(out, data=str(copy), images=16, **CACHED)
    copy.rename(tmp_path / "moved.zarr")
    monkeypatch.chdir(tmp_path)
    for images, data in ((32, "moved.zarr/"), (48, "./moved.zarr")):
        _, state, _ = train_here(out, data=data, images=images, **CACHED)
        assert state.images == images
    one, two = (configure("tiny", data=d) for d in ("moved.zarr", "./moved.zarr/"))
    assert one.run_dir() == two.run_dir()
    (tmp_path / "images").mkdir()
    with pytest.raises(RunError, match="other settings: --data"):
        start_here(
            out,
            data=str(tmp_path / "images"),
            tokenizer="patch-vq",
            codes=300,
            image_size=16,
            flip=True,
            logogram_count=None,
        )


@pytest.mark.parametrize(
    "ours, theirs, mode",
    [("auto", True, "stream"), ("auto", False, "ram"), ("stream", False, "stream")],
)
def test_ranks_agree_on_the_mode(made, tmp_path, ours, theirs, mode):
    """Every rank takes part in every question, in the same order."""
    asked = []

    class Two(World):
        def any(self, *flags):
            asked.append(len(flags))
            is_about_the_mode = len(flags) == 1
            return tuple(flag or (theirs and is_about_the_mode) for flag in flags)

    config = tiny_config(tmp_path, data=str(made), cache_mode=ours, **CACHED)
    world = Two(0, 1, torch.device("cpu"))
    source = open_tokens(config, world, None, None, open_cache(made), reserved=0)
    assert source.mode == mode
    # Whether choosing the mode failed (here, on rank 0), the mode, whether reading failed.
    assert asked == [2, 1, 2]


def test_a_damaged_codebook(copy, tmp_path):
    raw = bytearray((copy / "tokenizer.safetensors").read_bytes())
    raw[-3] ^= 1
    (copy / "tokenizer.safetensors").write_bytes(raw)
    with pytest.raises(CacheError, match="tokenizer.safetensors: checksum"):
        start_here(tmp_path / "run", data=str(copy), **CACHED)


def test_damage_ends_a_run_with_one_line(copy, tmp_path):
    (copy / "codes/c/1/0/0").write_bytes(b"")
    words = flags(out=tmp_path / "run", data=copy, **CACHED)
    refused(command("train", *words), "codes/c/1/0/0: 0 bytes, expected", "builds damaged")


def test_tokens_that_are_not_finite_end_a_run(tmp_path):
    cache = small_cache(tmp_path, small_tokenizer("patch"))
    zarr.open_group(cache.path, mode="r+")["mean"][3] = np.nan
    sign(cache.path)
    words = flags(out=tmp_path / "run", data=cache.path, **CACHED)
    refused(command("train", *words), "mean is not finite", "verify.py")


SMALL = dict(CACHED, image_size=None)


def test_moments_train_without_their_weights(moments, tmp_path):
    cache, weights = moments
    shutil.copytree(cache, tmp_path / "c.zarr")
    edit_manifest(
        tmp_path / "c.zarr", lambda m: m["tokenizer"].update(weights="/nowhere/kl16.ckpt")
    )
    values = dict(data=str(tmp_path / "c.zarr"), images=16, sample_every=16, **SMALL)
    lines = []
    session, _, ending = train_here(tmp_path / "run", say=lines.append, **values)
    assert ending is Ending.FINISHED and session.tokenizer is None
    assert any("no sample grids" in line and "--tokenizer-weights" in line for line in lines), lines
    assert not list((tmp_path / "run" / "samples").iterdir())
    sample = (
        "sample",
        tmp_path / "run",
        "--count",
        4,
        "--positions-per-step",
        4,
        "--diffusion-steps",
        4,
    )
    refused(command(*sample), "/nowhere/kl16.ckpt", "--tokenizer-weights")
    done = command(*sample, "--tokenizer-weights", weights)
    assert done.code == 0, done.err
    other = random_weights("kl16") | {"quant_conv.bias": torch.ones(32)}
    torch.save(other, tmp_path / "other.ckpt")
    refused(command(*sample, "--tokenizer-weights", tmp_path / "other.ckpt"), "not the weights")
    refused(
        command(
            "train",
            *flags(out=tmp_path / "new", **values),
            "--tokenizer-weights",
            tmp_path / "other.ckpt",
        ),
        "not the weights that",
        "without sample grids",
    )
    checked = command("verify", tmp_path / "run")
    assert checked.code == 0 and "not checked, /nowhere/kl16.ckpt: no such file" in checked.out
    # Something else at the place that the cache remembers is as good as nothing.
    for name in ("other.ckpt", "no.ckpt"):
        (tmp_path / "no.ckpt").write_bytes(b"nothing")
        edit_manifest(
            tmp_path / "c.zarr",
            lambda m, name=name: m["tokenizer"].update(weights=str(tmp_path / name)),
        )
        session, _ = start_here(tmp_path / name.removesuffix(".ckpt"), **values)
        assert session.tokenizer is None


def test_moments_find_their_weights(moments, tmp_path):
    cache, weights = moments
    session, _ = start_here(tmp_path / "run", data=str(cache), images=16, **SMALL)
    assert isinstance(session.tokenizer, KL16) and session.tokenizer.source == weights
    about = json.loads((tmp_path / "run" / "tokenizer.json").read_text())
    assert about["weights"] == str(weights) and about["fingerprint"] == session.tokenizer_id
    batch = session.source.batch(torch.arange(12))
    assert batch.tokens.shape == (12, 4, 16) and batch.tokens.isfinite().all()


def test_a_dry_run_of_a_cache(made):
    done = command("train", "--size", "tiny", "--data", made, "--dry-run")
    assert done.code == 0 and "3 (of the cache)" in done.out, done.out + done.err
    assert "16 = (16 / 4)^2" in done.out
    refused(
        command("train", "--size", "tiny", "--data", made, "--dry-run", "--tokenizer", "kl16"),
        "made with --tokenizer patch-vq, this run asks for --tokenizer kl16",
    )


def test_the_scale_of_kl16_is_a_constant_of_this_version():
    """MAR multiplies its latents by 0.2325 (mar:engine_mar.py)."""
    assert KL16.constants == {"scale": 0.2325}
