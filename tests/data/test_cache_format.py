"""What lies on the disk, byte for byte; what each shard was encoded on; caches of before that."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import heptapod_fast.data.cache.builder as builder
from heptapod_fast.data.cache.builder import build_cache
from heptapod_fast.data.cache.check import find_damage
from heptapod_fast.data.cache.format import BUILDING, CacheError, open_cache
from heptapod_fast.data.cache.making import CacheSettings, make_cache
from heptapod_fast.data.cache.reader import CacheTokens
from heptapod_fast.data.cache.site import Site, lock_cache
from heptapod_fast.storage import checksum
from heptapod_fast.tokenizers import Patch, PatchVQ
from heptapod_fast.world import processor_kind
from tests.caches import (
    CLASSES,
    contents,
    edit_manifest,
    image_folder,
    small_cache,
    small_plan,
)
from tests.running import CPU, command, refused

LEVELS = 16


def grey_folder(path: Path) -> Path:
    """40 images of 16 x 16 pixels in patches of 4 x 4 equal ones, 16 levels of grey."""
    patches = np.arange(16)
    for k in range(40):
        levels = (5 * k + 3 * patches + k * patches) % LEVELS
        image = (17 * levels).astype(np.uint8).reshape(4, 4).repeat(4, 0).repeat(4, 1)
        file = path / CLASSES[k % 3] / f"{k:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file)
    return path


def grey_tokenizer(name: str) -> Patch | PatchVQ:
    """The pixels as they are, or a code for each level of grey: exact on every machine."""
    if name == "patch":
        return Patch(16, 4)
    greys = torch.arange(LEVELS) * (2 / (LEVELS - 1)) - 1
    return PatchVQ(greys[:, None].expand(-1, 48), 16, 4)


def grey_plan(folder, name="patch-vq"):
    return small_plan(folder, grey_tokenizer(name))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return grey_folder(tmp_path_factory.mktemp("set") / "images")


# ------------------------------------------------------------------------------------------- bytes

# file -> (bytes, crc32c)
INDEX = {"labels/c/0": (160, "0977fd32"), "source_index/c/0": (160, "437cd20a")}
KNOWN = {
    "patch": INDEX
    | {
        "mean/c/0/0/0/0/0": (49172, "16bf32c8"),
        "mean/c/1/0/0/0/0": (49172, "5e1d837b"),
        "mean/c/2/0/0/0/0": (49172, "73a9096b"),
    },
    "patch-vq": INDEX
    | {
        "codes/c/0/0/0": (1044, "6b9ce2d6"),
        "codes/c/1/0/0": (1044, "6503b4c6"),
        "codes/c/2/0/0": (1044, "502272a5"),
    },
}


@pytest.mark.parametrize("name", KNOWN)
def test_not_a_byte_changes(folder, tmp_path, name):
    """Earlier builds are gone on with, and earlier caches are read: the same plan must give the
    same shards for good."""
    cache = build_cache(tmp_path / "c.zarr", grey_plan(folder, name))
    found = {
        file: (len(data), checksum(cache.path / file))
        for file, data in contents(cache.path).items()
        if "/c/" in file
    }
    assert found == KNOWN[name]


def test_a_manifest_has_these_entries(folder, tmp_path):
    manifest = build_cache(tmp_path / "c.zarr", grey_plan(folder)).manifest
    assert manifest["format"] == 1
    assert set(manifest) == {
        "format",
        "made_by",
        "rows",
        "views",
        "shard_rows",
        "chunk_rows",
        "arrays",
        "tokenizer",
        "preprocessing",
        "image_size",
        "dataset",
        "order",
        "encoding",
        "quarantine",
        "statistics",
        "sums",
        "files",
        "seal",
    }
    assert set(manifest["encoding"]) == {"batch", "device", "torch", "hardware"}
    assert manifest["arrays"] == {"codes": {"dtype": "uint16", "shape": [40, 2, 16]}}


# ---------------------------------------------------------------------------------------- hardware


def stop_at_shard(path, plan, number):
    """A build that ends before this shard."""
    with lock_cache(path):
        site = Site(path, plan)
        site.begin()
        builder.Builder(site).build(list(range(number)))


def settings_of(folder, out):
    """Of a build that makes what `grey_plan` does."""
    grey_tokenizer("patch-vq").save(out.parent / "codebook.safetensors")
    return CacheSettings(
        data=str(folder),
        out=str(out),
        tokenizer="patch-vq",
        tokenizer_weights=str(out.parent / "codebook.safetensors"),
        image_size=16,
        codes=LEVELS,
        flip=True,
        decoder="pillow",
        workers=1,
        batch=5,
        seed=3,
        shard_rows=16,
        device="cpu",
    )


def test_a_cache_says_what_it_was_encoded_on(folder, tmp_path):
    cache = build_cache(tmp_path / "c.zarr", grey_plan(folder))
    assert cache.manifest["encoding"]["hardware"] == [processor_kind()] * 3
    assert cache.hardware == [processor_kind()] * 3


def test_a_build_that_goes_on_elsewhere_says_so(folder, tmp_path, monkeypatch):
    path = tmp_path / "c.zarr"
    with monkeypatch.context() as patch:
        patch.setattr(builder, "processor_kind", lambda: "another kind")
        stop_at_shard(path, grey_plan(folder), 2)
    lines = []
    make_cache(settings_of(folder, path), CPU, lines.append)
    (said,) = [line for line in lines if line.startswith("WARNING")]
    assert "2 shards were encoded on another kind" in said and processor_kind() in said
    assert any(line.startswith("encoded   2 shards on another kind, 1 ") for line in lines), lines
    cache = open_cache(path)
    assert cache.hardware == ["another kind", "another kind", processor_kind()]
    assert find_damage(cache) == []
    checked = command("verify", path)
    assert checked.code == 0
    assert "encoded on: another kind, shards: 2" in checked.out


def test_a_build_that_goes_on_where_it_was_says_nothing(folder, tmp_path):
    path = tmp_path / "c.zarr"
    stop_at_shard(path, grey_plan(folder), 2)
    lines = []
    make_cache(settings_of(folder, path), CPU, lines.append)
    assert "going on  2 shards are done" in lines
    assert not [line for line in lines if "WARNING" in line]


def test_a_shard_that_is_built_again_elsewhere(folder, tmp_path, monkeypatch):
    path = tmp_path / "c.zarr"
    build_cache(path, grey_plan(folder))
    (path / "codes/c/1/0/0").unlink()
    monkeypatch.setattr(builder, "processor_kind", lambda: "another kind")
    cache = build_cache(path, grey_plan(folder))
    assert cache.hardware == [processor_kind(), "another kind", processor_kind()]


@pytest.mark.parametrize("hardware", [["AVX2"], [], 7])
def test_hardware_that_is_not_of_the_shards(folder, tmp_path, hardware):
    path = tmp_path / "c.zarr"
    build_cache(path, grey_plan(folder))
    edit_manifest(path, lambda m: m["encoding"].update(hardware=hardware))
    with pytest.raises(CacheError, match="manifest.json is damaged"):
        open_cache(path)


# ------------------------------------------------------------------- caches of before this was said


@pytest.fixture
def earlier(folder, tmp_path):
    """A finished cache whose manifest does not say what it was encoded on."""
    path = tmp_path / "c.zarr"
    build_cache(path, grey_plan(folder))
    edit_manifest(path, lambda m: m["encoding"].pop("hardware"))
    return path


def test_earlier_caches_are_read(folder, earlier, tmp_path):
    cache = open_cache(earlier)
    assert cache.hardware == [None] * 3
    assert find_damage(cache) == []
    now = build_cache(tmp_path / "now.zarr", grey_plan(folder))
    assert cache.fingerprint == now.fingerprint
    index = torch.arange(40)
    expected = CacheTokens(now, 3, flip=True).batch(index).tokens
    assert torch.equal(CacheTokens(cache, 3, flip=True).batch(index).tokens, expected)


def test_earlier_caches_are_mended(folder, earlier):
    before = contents(earlier)
    assert contents(build_cache(earlier, grey_plan(folder)).path) == before
    (earlier / "codes/c/1/0/0").unlink()
    cache = build_cache(earlier, grey_plan(folder))
    assert cache.hardware == [None, processor_kind(), None]
    assert cache.fingerprint == open_cache(earlier).fingerprint
    after = contents(earlier)
    assert {name for name in after if after[name] != before[name]} == {"manifest.json"}


def test_earlier_builds_are_gone_on_with(folder, tmp_path):
    path = tmp_path / "c.zarr"
    stop_at_shard(path, grey_plan(folder), 2)
    for file in (path / BUILDING).glob("shard-*.json"):
        record = json.loads(file.read_text())
        record.pop("hardware")
        file.write_text(json.dumps(record))
    cache = build_cache(path, grey_plan(folder))
    assert cache.hardware == [None, None, processor_kind()]
    assert find_damage(cache) == []


@pytest.mark.parametrize("name", ["set_v2", "set.zarr.old"])
def test_a_cache_is_known_by_what_lies_in_it(tmp_path, name):
    """Renamed, it trains and verifies; without its manifest it is said what is missing."""
    made = small_cache(tmp_path)
    cache = made.path.rename(tmp_path / name)
    words = ["--size", "tiny", "--data", cache, "--width", 32, "--heads", 2, "--depth", 1]
    words += ["--head-depth", 1, "--batch", 8, "--images", 16, "--device", "cpu"]
    result = command("train", *words, "--out", tmp_path / "run", "--sample-every", 0)
    assert result.code == 0, result.err
    assert command("verify", cache).code == 0
    (cache / "manifest.json").unlink()
    refused(command("train", *words, "--out", tmp_path / "run2"), "it has no manifest.json")


DEBRIS = (".DS_Store", "._zarr.json", "Thumbs.db", "__MACOSX/x", ".ipynb_checkpoints/x.json")


def test_what_file_managers_leave_in_a_cache_is_nobodys(tmp_path):
    folder = image_folder(tmp_path / "images", 20)
    place = tmp_path / "c.zarr"
    for name in DEBRIS:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text("?")
    made = build_cache(place, small_plan(folder))
    for name in DEBRIS:
        for at in (place, place / "codes" / "c"):
            (at / name).parent.mkdir(parents=True, exist_ok=True)
            (at / name).write_text("?")
    assert open_cache(place).fingerprint == made.fingerprint
    assert find_damage(made) == []
    assert build_cache(place, small_plan(folder)).fingerprint == made.fingerprint
    (place / "extra.txt").write_text("?")
    assert find_damage(made) == ["extra.txt: not part of the cache"]
