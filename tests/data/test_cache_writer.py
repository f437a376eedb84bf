"""Building caches: the same bytes whatever happens on the way, and what is refused."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
import zarr

from heptapod_fast.data.cache.builder import Builder, build_cache
from heptapod_fast.data.cache.check import find_damage
from heptapod_fast.data.cache.format import BUILDING, CacheError, open_cache
from heptapod_fast.data.cache.making import CacheSettings, fit_codebook
from heptapod_fast.data.cache.reader import CacheTokens
from heptapod_fast.data.cache.site import Site, SiteState, lock_cache
from heptapod_fast.data.decoding import PillowDecoder
from heptapod_fast.data.files import find_images
from heptapod_fast.tokenizers import KL16
from tests.caches import contents, image_folder, small_cache, small_plan, small_tokenizer
from tests.tokenizers.reference import random_weights


class Stop(Exception):
    """Ends a build."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return image_folder(tmp_path_factory.mktemp("set") / "images")


@pytest.fixture(scope="module")
def undisturbed(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("undisturbed") / "c.zarr"
    build_cache(path, small_plan(folder))
    return contents(path)


def stop_after(monkeypatch, name, count):
    """The method `name` of the builder, or of the site, fails at its call number `count`."""
    owner = Builder if hasattr(Builder, name) else Site
    real = getattr(owner, name)
    calls = []

    def method(*arguments):
        calls.append(1)
        if len(calls) == count:
            raise Stop
        return real(*arguments)

    monkeypatch.setattr(owner, name, method)


def shards_built(monkeypatch):
    """The shards that are built from now on, in order."""
    built = []
    real = Builder._empty_shard
    monkeypatch.setattr(
        Builder, "_empty_shard", lambda self, shard: built.append(shard) or real(self, shard)
    )
    return built


def begin(monkeypatch, path, plan, name="_write", count=3):
    """A build that ends in the middle."""
    with monkeypatch.context() as patch:
        stop_after(patch, name, count)
        with pytest.raises(Stop):
            build_cache(path, plan)


@pytest.mark.parametrize(
    "where, count",
    [
        ("_write", 1),
        ("_write", 4),
        ("_encode", 9),
        ("_write_frame", 1),
        ("finish", 1),
        ("_verify", 1),
    ],
)
def test_a_build_goes_on_where_it_stopped(folder, tmp_path, undisturbed, where, count, monkeypatch):
    begin(monkeypatch, tmp_path / "c.zarr", small_plan(folder), where, count)
    (tmp_path / "c.zarr" / ".x.0a.partial").write_text("half a file")
    encoded = shards_built(monkeypatch)
    build_cache(tmp_path / "c.zarr", small_plan(folder))
    assert contents(tmp_path / "c.zarr") == undisturbed
    done = {"_write": count - 1, "_encode": 2, "_write_frame": 0}.get(where, 5)
    assert encoded == list(range(done, 5))


def test_several_builders_share_the_shards(folder, tmp_path, undisturbed):
    path = tmp_path / "c.zarr"
    sites = [Site(path, small_plan(folder)) for _ in range(3)]
    with lock_cache(path):
        sites[0].begin()
        missing = sites[0].missing()
        for k, site in enumerate(sites):
            Builder(site).build(missing[k::3])
        sites[0].finish()
    assert contents(path) == undisturbed


def test_a_site_says_how_far_it_is(folder, tmp_path, monkeypatch):
    path = tmp_path / "c.zarr"
    plan = small_plan(folder)

    def state():
        with lock_cache(path):
            return Site(path, plan).begin()

    assert state() is SiteState.NEW
    assert state() is SiteState.UNFINISHED
    build_cache(path, plan)
    assert state() is SiteState.COMPLETE
    (path / "codes/c/2/0/0").unlink()
    assert state() is SiteState.DAMAGED
    assert state() is SiteState.UNFINISHED
    assert Site(path, plan).missing() == [2]


def test_a_finished_cache_is_left_alone(folder, tmp_path, undisturbed):
    path = tmp_path / "c.zarr"
    build_cache(path, small_plan(folder))
    before = {p: p.stat().st_mtime_ns for p in path.rglob("*") if p.is_file()}
    build_cache(path, small_plan(folder))
    assert {p: p.stat().st_mtime_ns for p in path.rglob("*") if p.is_file()} == before
    # Killed between the manifest and the end.
    (path / BUILDING).mkdir()
    (path / BUILDING / "shard-00000.json").write_text("{}")
    build_cache(path, small_plan(folder))
    assert contents(path) == undisturbed


@pytest.mark.parametrize(
    "settings, flag",
    [
        (dict(flip=False), "--flip: 1, was 2"),
        (dict(seed=4), "--seed"),
        (dict(batch=6), "--batch"),
        (dict(shard_rows=32), "--shard-rows: 32, was 16"),
        (dict(tokenizer=small_tokenizer("patch")), "--tokenizer"),
        (dict(tokenizer=small_tokenizer(codes=301)), "--codes"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_other_settings_are_refused(folder, tmp_path, settings, flag, finished, monkeypatch):
    path = tmp_path / "c.zarr"
    if finished:
        build_cache(path, small_plan(folder))
    else:
        begin(monkeypatch, path, small_plan(folder))
    with pytest.raises(CacheError, match="begun with other settings") as caught:
        build_cache(path, small_plan(folder, **settings))
    assert flag in str(caught.value) and "remove it" in str(caught.value)


def test_other_images_are_refused(tmp_path, monkeypatch):
    folder = image_folder(tmp_path / "images", 20)
    begin(monkeypatch, tmp_path / "c.zarr", small_plan(folder), "_write", 2)
    shutil.copy(folder / "ant/000.png", folder / "ant/zzz.png")
    with pytest.raises(CacheError, match="the images of --data"):
        build_cache(tmp_path / "c.zarr", small_plan(folder))
    (folder / "ant/zzz.png").unlink()
    # A set that has moved is the same set.
    folder.rename(tmp_path / "elsewhere")
    build_cache(tmp_path / "c.zarr", small_plan(tmp_path / "elsewhere"))


def test_a_folder_that_is_something_else(folder, tmp_path):
    (tmp_path / "c.zarr").mkdir()
    (tmp_path / "c.zarr" / "thesis.tex").write_text("precious")
    with pytest.raises(CacheError, match="holds thesis.tex: choose another --out"):
        build_cache(tmp_path / "c.zarr", small_plan(folder))
    (tmp_path / "file.zarr").write_text("")
    with pytest.raises(CacheError, match="cannot write .*--out"):
        build_cache(tmp_path / "file.zarr", small_plan(folder))


def test_one_process_at_a_time(folder, tmp_path):
    with (
        lock_cache(tmp_path / "c.zarr"),
        pytest.raises(CacheError, match="built by another process"),
    ):
        lock_cache(tmp_path / "c.zarr")
    lock_cache(tmp_path / "c.zarr").close()


def test_a_disk_that_is_too_small(folder, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(CacheError, match="will take 0.00 GB.*0.00 GB free: choose another --out"):
        build_cache(tmp_path / "c.zarr", small_plan(folder))


# ------------------------------------------------------------------------------- broken images


def spoil(folder, number, kind="truncated"):
    """Damage one image; returns its path inside the folder."""
    file = find_images(folder).files[number][0]
    path = folder / file.inner
    raw = path.read_bytes()
    path.write_bytes({"truncated": raw[: len(raw) // 2], "empty": b"", "page": b"<html>"}[kind])
    return file.inner


def test_broken_images_are_left_out_one_by_one(tmp_path):
    folder = image_folder(tmp_path / "images", 40)
    whole = small_cache(tmp_path / "whole", count=40)
    names = [spoil(folder, k, kind) for k, kind in ((3, "truncated"), (17, "empty"), (18, "page"))]
    cache = build_cache(tmp_path / "c.zarr", small_plan(folder, max_broken=3))
    left_out = cache.manifest["quarantine"]
    assert sorted(entry["path"] for entry in left_out) == sorted(names)
    assert sorted(entry["source_index"] for entry in left_out) == [3, 17, 18]
    assert all(entry["reason"] for entry in left_out)
    rows = [entry["row"] for entry in left_out]
    codes, before = (zarr.open_group(c.path, mode="r")["codes"][:] for c in (cache, whole))
    assert (codes[rows] == 65535).all() and rows == sorted(rows)
    # Their neighbours lose nothing.
    assert np.array_equal(np.delete(codes, rows, 0), np.delete(before, rows, 0))
    assert find_damage(cache) == []
    source = CacheTokens(cache, 0)
    assert source.num_images == 37
    seen = source.sources(torch.arange(37))
    assert sorted(seen) == [k for k in range(40) if k not in (3, 17, 18)]
    assert source.batch(torch.arange(74)).tokens.max() < 300


def test_rows_of_broken_images_must_hold_nothing(tmp_path):
    folder = image_folder(tmp_path / "images", 40)
    spoil(folder, 3)
    cache = build_cache(tmp_path / "c.zarr", small_plan(folder, max_broken=1))
    row = cache.manifest["quarantine"][0]["row"]
    zarr.open_group(cache.path, mode="r+")["codes"][row] = 0
    from tests.caches import sign

    sign(cache.path)
    assert "hold codes" in find_damage(open_cache(cache.path))[0]


def test_a_chunk_of_broken_images_is_written(tmp_path):
    """All values are the fill value there, which zarr leaves out unless it is told otherwise."""
    folder = image_folder(tmp_path / "images", 140)
    plan = small_plan(folder, shard_rows=128, max_broken=64)
    for k in plan.order[64:128]:
        spoil(folder, k)
    cache = build_cache(tmp_path / "c.zarr", small_plan(folder, shard_rows=128, max_broken=64))
    assert cache.in_row_order("codes", 0) and find_damage(cache) == []
    assert CacheTokens(cache, 0).batch(torch.arange(76)).tokens.max() < 300


def test_too_many_broken_images(tmp_path, undisturbed):
    folder = image_folder(tmp_path / "images", 40)
    names = [spoil(folder, k) for k in (3, 17, 18)]
    with pytest.raises(CacheError, match="--max-broken allows 2") as caught:
        build_cache(tmp_path / "c.zarr", small_plan(folder, max_broken=2))
    assert "truncated" in str(caught.value) and any(name in str(caught.value) for name in names)
    with pytest.raises(CacheError, match="--max-broken allows 2"):  # not to be worn down
        build_cache(tmp_path / "c.zarr", small_plan(folder, max_broken=2))
    cache = build_cache(tmp_path / "c.zarr", small_plan(folder, max_broken=3))
    assert len(cache.manifest["quarantine"]) == 3


# --------------------------------------------------------------------------------- bad tokens


class Broken:
    """A tokenizer whose tokens of bright images are not what they should be."""

    def __init__(self, tokenizer, value):
        self.tokenizer, self.value = tokenizer, value

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def to_stored(self, images):
        stored = self.tokenizer.to_stored(images)
        stored["mean"][images.mean((1, 2, 3)) > 0] = self.value
        return stored


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_tokens_that_are_not_finite_are_an_error(folder, tmp_path, value):
    plan = small_plan(folder, Broken(small_tokenizer("patch"), value))
    with pytest.raises(CacheError, match="not finite in float16.*--tokenizer-weights") as caught:
        build_cache(tmp_path / "c.zarr", plan)
    assert ".png" in str(caught.value)
    assert not (tmp_path / "c.zarr" / "manifest.json").exists()


def test_shards_that_are_lost_before_the_end_are_built_again(
    folder, tmp_path, undisturbed, monkeypatch
):
    path = tmp_path / "c.zarr"
    begin(monkeypatch, path, small_plan(folder), "finish", 1)
    raw = bytearray((path / "codes/c/2/0/0").read_bytes())
    raw[5] ^= 1
    (path / "codes/c/2/0/0").write_bytes(raw)
    (path / "codes/c/4/0/0").unlink()
    with pytest.raises(CacheError, match="codes/c/2/0/0: checksum.*codes/c/4/0/0: missing"):
        build_cache(path, small_plan(folder))
    build_cache(path, small_plan(folder))
    assert contents(path) == undisturbed


@pytest.mark.parametrize("tokenizer", ["patch", "patch-vq"])
def test_damaged_shards_of_a_finished_cache_are_built_again(
    folder, tmp_path, tokenizer, monkeypatch
):
    path, plan = tmp_path / "c.zarr", small_plan(folder, small_tokenizer(tokenizer))
    tail = "/0/0/0/0" if tokenizer == "patch" else "/0/0"
    shards = path / ("mean/c" if tokenizer == "patch" else "codes/c")
    build_cache(path, plan)
    before = contents(path)
    raw = bytearray((shards / f"1{tail}").read_bytes())
    raw[40] ^= 8
    (shards / f"1{tail}").write_bytes(raw)
    (shards / f"3{tail}").unlink()
    built = shards_built(monkeypatch)
    begin(monkeypatch, path, plan, "_write", 2)  # killed once more on the way
    with pytest.raises(CacheError, match="was interrupted: repeat the command"):
        open_cache(path)
    build_cache(path, plan)
    assert built == [1, 3, 3] and contents(path) == before
    (path / "labels/c/0").write_bytes(b"")
    with pytest.raises(CacheError, match="beyond its shards: labels/c/0: 0 bytes"):
        build_cache(path, plan)
    (path / "labels/c/0").write_bytes(before["labels/c/0"])
    build_cache(path, plan)
    assert contents(path) == before


def test_batches_are_whole_whatever_is_broken(tmp_path):
    """The last batch of a shard and one with holes are as large as all others."""
    tokenizer, sizes = small_tokenizer(), []
    real = tokenizer.encode
    tokenizer.encode = lambda images: sizes.append(len(images)) or real(images)
    folder = image_folder(tmp_path / "images", 17)
    spoil(folder, 3)
    build_cache(tmp_path / "c.zarr", small_plan(folder, tokenizer, max_broken=1))
    assert set(sizes) == {5}


def test_threads_do_not_change_the_bytes(tmp_path):
    """Float32 convolutions round differently in another number of threads; a batch has one."""
    folder, threads = image_folder(tmp_path / "images", 20, 32), torch.get_num_threads()
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            tokenizer = KL16(random_weights("kl16"), 32)
            build_cache(tmp_path / f"{count}.zarr", small_plan(folder, tokenizer), 3 - count)
            found.append(contents(tmp_path / f"{count}.zarr"))
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1]


def test_codebooks(tmp_path):
    folder = image_folder(tmp_path / "images", 12)
    files = find_images(folder).files
    spoil(folder, 3)
    settings = CacheSettings(
        data=str(folder),
        out="c.zarr",
        tokenizer="patch-vq",
        image_size=16,
        patch_size=4,
        codes=20,
        seed=1,
    )
    codebook = fit_codebook(settings, files, PillowDecoder())
    assert codebook.spec.vocabulary == 20
    cache = build_cache(tmp_path / "c.zarr", small_plan(folder, codebook, max_broken=1))
    assert "tokenizer.safetensors" in cache.manifest["files"]
    for k in range(12):
        if k != 3:
            spoil(folder, k)
    with pytest.raises(ValueError, match="none of 12 images can be read .*check --data"):
        fit_codebook(settings, files, PillowDecoder())


@pytest.mark.parametrize(
    "name",
    ["labels/c/0", "source_index/c/0", "codes/zarr.json", "zarr.json", "tokenizer.safetensors"],
)
@pytest.mark.parametrize("data", [bytes(280), b"", None])
def test_what_is_spoilt_during_a_build_is_written_again(
    folder, tmp_path, undisturbed, name, data, monkeypatch
):
    path = tmp_path / "c.zarr"
    begin(monkeypatch, path, small_plan(folder))
    (path / name).unlink()
    if data is not None:
        (path / name).write_bytes(data)
    build_cache(path, small_plan(folder))
    assert contents(path) == undisturbed


@pytest.mark.parametrize("spoil_shard", [lambda raw: raw[:-40], lambda raw: raw[:-5] + b"12345"])
def test_shards_that_zarr_cannot_read_are_built_again(
    folder, tmp_path, undisturbed, spoil_shard, monkeypatch
):
    path = tmp_path / "c.zarr"
    begin(monkeypatch, path, small_plan(folder))
    file = path / "codes/c/1/0/0"
    file.write_bytes(spoil_shard(file.read_bytes()))
    (path / BUILDING / "shard-00001.json").unlink()
    (path / BUILDING / "shard-00000.json").write_text("{")
    build_cache(path, small_plan(folder))
    assert contents(path) == undisturbed
    file.write_bytes(spoil_shard(file.read_bytes()))
    build_cache(path, small_plan(folder))
    assert contents(path) == undisturbed


def test_a_damaged_plan(folder, tmp_path, monkeypatch):
    begin(monkeypatch, tmp_path / "c.zarr", small_plan(folder))
    (tmp_path / "c.zarr" / BUILDING / "plan.json").write_text("")
    with pytest.raises(CacheError, match="plan.json is damaged"):
        build_cache(tmp_path / "c.zarr", small_plan(folder))


def test_images_that_are_away_for_a_while(tmp_path, monkeypatch):
    """A disk that is not there is no broken image; nor is one that was written again."""
    folder = image_folder(tmp_path / "images", 40)
    plan = small_plan(folder, max_broken=40)
    folder.rename(tmp_path / "away")
    with pytest.raises(FileNotFoundError):
        build_cache(tmp_path / "c.zarr", plan)
    (tmp_path / "away").rename(folder)
    path = folder / plan.files[plan.order[20]][0].inner
    raw = path.read_bytes()
    path.write_bytes(bytes(len(raw)))
    begin(monkeypatch, tmp_path / "d.zarr", small_plan(folder, max_broken=1))
    path.write_bytes(raw)
    cache = build_cache(tmp_path / "d.zarr", small_plan(folder, max_broken=1))
    assert cache.manifest["quarantine"] == []


@pytest.mark.parametrize(
    "error", [OSError(5, "Input/output error"), MemoryError(), OSError(24, "Too many open files")]
)
def test_a_machine_that_fails_breaks_no_images(folder, tmp_path, undisturbed, error, monkeypatch):
    from PIL import Image

    real, calls = Image.open, []

    def failing(path):
        calls.append(path)
        if len(calls) == 30:
            raise error
        return real(path)

    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", failing)
        with pytest.raises(type(error)):
            build_cache(tmp_path / "c.zarr", small_plan(folder, max_broken=9))
    build_cache(tmp_path / "c.zarr", small_plan(folder))
    assert contents(tmp_path / "c.zarr") == undisturbed


def test_classes_and_sets_without_a_readable_image(tmp_path):
    folder = image_folder(tmp_path / "images", 12)
    files = find_images(folder).files
    for k, (_, label) in enumerate(files):
        if label == 1:
            spoil(folder, k)
    with pytest.raises(CacheError, match="(?s)no readable image is left in 1 class folders.*bee"):
        build_cache(tmp_path / "c.zarr", small_plan(folder, max_broken=12))
    for k, (_, label) in enumerate(files):
        if label != 1:
            spoil(folder, k)
    with pytest.raises(CacheError, match="no readable image is left in 3 class folders"):
        build_cache(tmp_path / "d.zarr", small_plan(folder, max_broken=12))
    assert not list(tmp_path.glob("*.zarr/manifest.json"))


def test_names_that_are_no_text(tmp_path):
    folder = image_folder(tmp_path / "images", 12)
    with open(os.fsencode(folder / "ant") + b"/\xe9.png", "wb") as stream:
        stream.write(b"no image")
    cache = build_cache(tmp_path / "c.zarr", small_plan(folder, max_broken=1))
    assert cache.manifest["quarantine"][0]["path"] == "ant/\\xe9.png"


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(shard_rows=100), "--shard-rows 100"),
        (dict(max_broken=-1), "--max-broken -1"),
        (dict(seed=-1), "--seed -1"),
        (dict(shard_rows=0), "--shard-rows 0"),
        (dict(batch=0), "--batch 0"),
    ],
)
def test_plans_that_cannot_be(folder, settings, words):
    with pytest.raises(ValueError, match=words):
        small_plan(folder, **settings)


def test_the_manifest_says_what_was_done(folder, tmp_path):
    build_cache(tmp_path / "c.zarr", small_plan(folder))
    manifest = json.loads((tmp_path / "c.zarr" / "manifest.json").read_text())
    assert manifest["rows"] == 70 and manifest["views"] == 2 and manifest["order"]["seed"] == 3
    assert manifest["encoding"]["batch"] == 5 and manifest["encoding"]["device"] == "cpu"
    assert manifest["dataset"]["class_names"] == ["ant", "bee", "cat"]
    assert len(manifest["dataset"]["fingerprint"]) == 64
    assert manifest["preprocessing"].startswith("adm-crop-1/")
    assert manifest["tokenizer"]["fingerprint"] == small_tokenizer().fingerprint
