"""Reading caches: what is in them, the three modes, the order, and every kind of damage."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
import zarr

import heptapod_fast.data.cache.reader as reader
from heptapod_fast.data.cache.check import find_damage
from heptapod_fast.data.cache.format import CacheError, open_cache
from heptapod_fast.data.cache.reader import CacheTokens, choose_mode
from heptapod_fast.data.files import find_images
from heptapod_fast.data.images import ImageFolder
from heptapod_fast.data.order import WindowedOrder
from heptapod_fast.rng import Rng
from heptapod_fast.tokenizers import KL16, PatchVQ, to_unit, token_spec
from tests.caches import CLASSES, contents, edit_manifest, sign, small_cache, small_tokenizer
from tests.tokenizers.reference import random_weights

COUNT = 70


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A cache of codes: 70 images in shards of 16 rows, two views. Nobody writes to it."""
    return small_cache(tmp_path_factory.mktemp("codes"))


@pytest.fixture(scope="module")
def kl16(tmp_path_factory):
    """A cache of moments from random weights, images of 32 pixels."""
    tokenizer = KL16(random_weights("kl16"), 32)
    tokenizer.chunk_pixels = 5 * 32**2
    path = tmp_path_factory.mktemp("kl16")
    return tokenizer, small_cache(path, tokenizer, count=20)


@pytest.fixture
def copy(made, tmp_path):
    """A copy of `made` that may be spoilt."""
    shutil.copytree(made.path, tmp_path / "c.zarr")
    return tmp_path / "c.zarr"


def pixels_of(cache, size=16):
    """(rows, 3, S, S) in [-1, 1] of every row."""
    folder = ImageFolder(cache.manifest["dataset"]["folder"], size, allow_upscale=True)
    order = cache.read_index("source_index").astype(np.int64)
    return to_unit(folder.images(torch.from_numpy(order)))


def test_plain_zarr_reads_it(made):
    group = zarr.open_group(made.path, mode="r")
    codes = group["codes"]
    assert codes.shape == (COUNT, 2, 16) and codes.dtype == np.uint16
    assert codes.shards == (16, 2, 16) and codes.chunks == (16, 2, 16)
    assert codes.fill_value == 65535 and codes.compressors == ()
    tokenizer, pixels = small_tokenizer(), pixels_of(made)
    assert np.array_equal(codes[:, 0], tokenizer.encode(pixels).numpy())
    assert np.array_equal(codes[:, 1], tokenizer.encode(pixels.flip(-1)).numpy())
    order, images = group["source_index"][:], find_images(made.path.parent / "images")
    files = images.files
    assert images.class_names == CLASSES
    assert sorted(order) == list(range(COUNT)) and list(order) != sorted(order)
    assert group["labels"][:].tolist() == [files[k][1] for k in order]


def test_shards_of_8192_rows_in_chunks_of_64(tmp_path):
    cache = small_cache(tmp_path, shard_rows=8192)
    array = zarr.open_group(cache.path, mode="r")["codes"]
    assert array.shards[0] == 8192 and array.chunks[0] == 64 and cache.shards == 1
    assert find_damage(cache) == []
    assert CacheTokens(cache, 0).batch(torch.arange(COUNT)).tokens.shape == (COUNT, 16)


def test_moments(kl16):
    tokenizer, cache = kl16
    group = zarr.open_group(cache.path, mode="r")
    assert group["mean"].shape == group["std"].shape == (20, 2, 16, 2, 2)
    assert group["mean"].dtype == np.float16 and np.isnan(group["std"].fill_value)
    pixels = pixels_of(cache, 32)
    for view, images in enumerate((pixels, pixels.flip(-1))):
        for name, values in zip(("mean", "std"), tokenizer.encode_moments(images), strict=True):
            stored = torch.from_numpy(group[name][:, view])
            torch.testing.assert_close(stored.float(), values, rtol=2e-3, atol=2e-3)
    statistics = cache.manifest["statistics"]["mean"]
    values = group["mean"][:].astype(np.float64)
    assert np.allclose(statistics["mean"], values.mean((0, 1, 3, 4)))
    assert np.allclose(statistics["std"], values.std((0, 1, 3, 4)))


def test_posterior_samples_are_drawn_for_every_visit(kl16):
    tokenizer, cache = kl16
    source, index = CacheTokens(cache, seed=4), torch.arange(20, 40)
    stored, labels = source.rows(index)
    batch = source.batch(index)
    expected = KL16.from_stored(cache.spec, stored, Rng(4), index)
    assert torch.equal(batch.tokens, expected) and batch.tokens.shape == (20, 4, 16)
    mean = KL16.from_stored(cache.spec, stored)
    assert (batch.tokens - mean).std() > 0.5 * 0.2325 * stored["std"].float().mean()
    # The same image an epoch earlier has the same moments and another sample.
    ids = source.sources(index)
    earlier = torch.arange(20)
    again = torch.tensor([source.sources(earlier).index(k) for k in ids])
    assert torch.equal(KL16.from_stored(cache.spec, source.rows(again)[0]), mean)
    assert not torch.equal(source.batch(again).tokens, batch.tokens)


def test_patches_come_back_as_they_were(tmp_path):
    cache = small_cache(tmp_path, small_tokenizer("patch"))
    source, index = CacheTokens(cache, seed=0), torch.arange(COUNT)
    folder = ImageFolder(tmp_path / "images", 16)
    images = to_unit(folder.images(torch.tensor(source.sources(index))))
    tokens = source.batch(index).tokens
    assert torch.allclose(tokens, small_tokenizer("patch").encode(images), atol=5e-4)
    assert list(cache.arrays) == ["mean"]


def test_codes_use_all_sixteen_bits():
    spec = token_spec("patch-vq", 8, 4, 65_000)
    codes = torch.tensor([[0, 32_768, 64_999, 40_000]])
    stored = torch.from_numpy(codes.numpy().astype("<u2").view(np.int16))
    assert torch.equal(PatchVQ.from_stored(spec, {"codes": stored}), codes)
    with pytest.raises(ValueError, match="--codes"):
        PatchVQ.stored_arrays(token_spec("patch-vq", 8, 4, 65_536))


def batches(source, first=0, count=2 * COUNT, size=10):
    """Everything that a source gives for a range of samples."""
    found = [source.batch(torch.arange(k, k + size)) for k in range(first, first + count, size)]
    return [torch.cat([getattr(b, part) for b in found]) for part in ("tokens", "labels", "index")]


@pytest.mark.parametrize("window", [2, 8])
def test_modes_give_the_same_batches(made, window, monkeypatch):
    monkeypatch.setattr(reader, "WINDOW", 16 * window)
    ram, stream = (CacheTokens(made, 7, flip=True, mode=mode) for mode in ("ram", "stream"))
    assert (ram.mode, stream.mode) == ("ram", "stream")
    expected = batches(ram)
    for got, wanted in zip(batches(stream), expected, strict=True):
        assert torch.equal(got, wanted)
    # In any pieces and any order: a rank's share, a batch across epochs, going back.
    for index in (torch.arange(35, 90), torch.tensor([139, 3, 70, 69, 100]), torch.arange(4)):
        for source in (ram, stream):
            got = source.batch(index)
            assert torch.equal(got.tokens, expected[0][index])
            assert torch.equal(got.labels, expected[1][index])


def test_every_epoch_shows_every_image_once(made, monkeypatch):
    monkeypatch.setattr(reader, "WINDOW", 32)
    source = CacheTokens(made, 7)
    epochs = [source.sources(torch.arange(e * COUNT, (e + 1) * COUNT)) for e in range(3)]
    assert all(sorted(epoch) == list(range(COUNT)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    files = find_images(made.path.parent / "images").files
    batch = source.batch(torch.arange(COUNT))
    assert batch.labels.tolist() == [files[k][1] for k in epochs[0]]


def test_flips_choose_the_view(made):
    plain, flipped = CacheTokens(made, 7), CacheTokens(made, 7, flip=True)
    index = torch.arange(COUNT)
    bits = Rng(7).bits("flip", index, 1)[:, 0] & 1
    views = torch.from_numpy(zarr.open_group(made.path, mode="r")["codes"][:].astype(np.int64))
    rows = torch.from_numpy(np.argsort(made.read_index("source_index")))[plain.sources(index)]
    assert torch.equal(plain.batch(index).tokens, views[rows, 0])
    assert torch.equal(flipped.batch(index).tokens, views[rows, bits]) and 0 < bits.sum() < COUNT
    assert plain.fingerprint != flipped.fingerprint


def test_flips_need_the_second_view(tmp_path):
    cache = small_cache(tmp_path, flip=False)
    assert cache.views == 1 and CacheTokens(cache, 0).batch(torch.arange(3)).tokens.shape == (3, 16)
    with pytest.raises(CacheError, match="--no-flip"):
        CacheTokens(cache, 0, flip=True)


def test_streaming_reads_one_window_ahead(made, monkeypatch):
    monkeypatch.setattr(reader, "WINDOW", 16)
    read = []
    monkeypatch.setattr(reader, "read_shards", lambda cache, hosts, shards: read.extend(shards))
    source = CacheTokens(made, 7, mode="stream")
    order = WindowedOrder([16, 16, 16, 16, 6], 7, 1)
    source.batch(torch.arange(4))
    source._reader._pool.submit(int).result()
    first, end = order.shards_at(0)
    second, _ = order.shards_at(end)
    assert read == [*first, *second]
    source.batch(torch.arange(4, 8))
    source._reader._pool.submit(int).result()
    assert len(read) == 2
    batches(source)
    assert len(source._reader._windows) <= 3  # two that a batch touches, and the next


def test_mode_follows_the_memory(made, monkeypatch):
    cpu = torch.device("cpu")
    assert choose_mode(made, cpu, "auto")[0] == "ram"
    monkeypatch.setattr(reader, "available_memory", lambda: made.nbytes)
    mode, why = choose_mode(made, cpu, "auto")
    assert mode == "stream" and "90% of the" in why
    assert choose_mode(made, cpu, "ram")[0] == "ram"
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 * made.nbytes, 0))
    cuda = torch.device("cuda")
    assert choose_mode(made, cuda, "auto", 7 * made.nbytes)[0] == "gpu"
    assert choose_mode(made, cuda, "auto", 9 * made.nbytes)[0] == "stream"
    with pytest.raises(ValueError, match="--cache-mode gpu: training runs on cpu"):
        choose_mode(made, cpu, "gpu")
    with pytest.raises(ValueError, match="expected one of auto, gpu, ram, stream"):
        choose_mode(made, cpu, "disk")


def test_shards_in_another_order_of_chunks(tmp_path):
    """What the specification allows other writers: chunks anywhere in the shard."""
    cache = small_cache(tmp_path, count=300, shard_rows=256)
    expected = batches(CacheTokens(cache, 0), count=300)
    file = cache.path / cache.shard_file("codes", 0)
    raw, size = file.read_bytes(), 64 * cache.row_bytes("codes")
    chunks = [raw[k * size : (k + 1) * size] for k in range(4)]
    import google_crc32c

    index = np.array([[(k + 1) % 4 * size, size] for k in range(4)], "<u8").tobytes()
    crc = google_crc32c.value(index).to_bytes(4, "little")
    file.write_bytes(chunks[3] + chunks[0] + chunks[1] + chunks[2] + index + crc)
    sign(cache.path)
    again = open_cache(cache.path)
    assert not again.in_row_order("codes", 0) and again.in_row_order("codes", 1)
    assert find_damage(again) == []
    for got, wanted in zip(batches(CacheTokens(again, 0), count=300), expected, strict=True):
        assert torch.equal(got, wanted)


# ------------------------------------------------------------------------------------------ damage

SHARD, MEANS = "codes/c/1/0/0", "mean/c/1/0/0/0/0"


def spoil(path, kind):
    file = path / SHARD
    if kind == "missing":
        file.unlink()
    elif kind == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "flipped":
        raw = bytearray(file.read_bytes())
        raw[77] ^= 1
        file.write_bytes(raw)
    elif kind == "swapped":
        other, mine = path / "codes/c/2/0/0", file.read_bytes()
        file.write_bytes(other.read_bytes())
        other.write_bytes(mine)
    elif kind == "index":
        raw = bytearray(file.read_bytes())
        raw[-12] ^= 1
        file.write_bytes(raw)
    elif kind == "partial":
        file.rename(file.with_suffix(".0a1b.partial"))


@pytest.mark.parametrize(
    "kind, words",
    [
        ("missing", "missing"),
        ("truncated", "bytes, expected"),
        ("empty", "0 bytes, expected"),
        ("flipped", "checksum"),
        ("swapped", "checksum"),
        ("index", "checksum"),
        ("partial", "missing"),
    ],
)
@pytest.mark.parametrize("mode", ["ram", "stream"])
def test_damaged_shards_are_refused(copy, kind, words, mode):
    spoil(copy, kind)
    with pytest.raises(CacheError, match=f"{SHARD}: .*{words}.*builds damaged shards again"):
        batches(CacheTokens(open_cache(copy), 0, mode=mode))
    found = find_damage(open_cache(copy, look=False))
    assert any(SHARD in text and words in text for text in found), found


def page_cache(path):
    """A cache whose shards are whole pages, as the real ones are: they are mapped."""
    return small_cache(path, small_tokenizer("patch"))


def test_what_was_checked_is_what_is_used(tmp_path, monkeypatch):
    """A file that is exchanged after it was mapped: the old one is read, and checked."""
    monkeypatch.setattr(reader, "WINDOW", 16)
    cache = page_cache(tmp_path)
    file = cache.path / cache.shard_file("mean", 1)
    whole = file.read_bytes()
    with open(file, "r+b") as stream:  # in place
        stream.seek(100)
        stream.write(b"x")
    source = CacheTokens(cache, 0, mode="stream")
    fresh = file.with_suffix(".new")
    fresh.write_bytes(whole)
    fresh.replace(file)
    with pytest.raises(CacheError, match="mean/c/1/0/0/0/0: checksum"):
        batches(source)
    batches(CacheTokens(cache, 0, mode="stream"))


@pytest.mark.parametrize("window", [1, 8])
def test_a_damaged_shard_stops_a_stream_where_it_comes(tmp_path, window, monkeypatch):
    monkeypatch.setattr(reader, "WINDOW", 16 * window)
    cache = page_cache(tmp_path)
    raw = bytearray((cache.path / MEANS).read_bytes())
    raw[77] ^= 1
    (cache.path / MEANS).write_bytes(raw)
    source = CacheTokens(cache, 7, mode="stream")
    with pytest.raises(CacheError, match=MEANS):
        batches(source)
    with pytest.raises(CacheError, match=MEANS):  # nor is it read at the second try
        batches(source)


@pytest.mark.parametrize("mode", ["ram", "stream"])
@pytest.mark.parametrize("kind", ["truncated", "flipped", "index"])
def test_mapped_shards(tmp_path, mode, kind):
    cache = page_cache(tmp_path)
    assert CacheTokens(cache, 0, mode=mode)._hosts["mean"].is_mapped
    file = cache.path / cache.shard_file("mean", 2)
    raw = bytearray(file.read_bytes())
    raw[{"flipped": 50, "index": -10, "truncated": 0}[kind]] ^= 4
    file.write_bytes(raw[:-9] if kind == "truncated" else raw)
    with pytest.raises(CacheError, match="mean/c/2/0/0/0/0"):
        batches(CacheTokens(cache, 0, mode=mode))


def test_lost_data_is_never_zeros(copy):
    (copy / SHARD).unlink()
    lost = zarr.open_group(copy, mode="r")["codes"][16:32]
    assert (lost == 65535).all()


def test_lost_moments_are_nan(kl16, tmp_path):
    shutil.copytree(kl16[1].path, tmp_path / "c.zarr")
    (tmp_path / "c.zarr/mean/c/0/0/0/0/0").unlink()
    lost = zarr.open_group(tmp_path / "c.zarr", mode="r")["mean"][:16]
    assert np.isnan(lost).all()


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda m: m.update(format=0), "build it anew with tools/cache.py"),
        (lambda m: m.update(format=2), "update heptapod_fast"),
        (lambda m: m.update(rows=71), "labels does not have 71 entries"),
        (lambda m: m.update(rows=100), "it lists no codes/c/5/0/0"),
        (lambda m: m.update(views=3), "it has 3 views, plain makes 1"),
        (lambda m: m["dataset"].update(class_names=[]), "make no sense"),
        (lambda m: m.pop("tokenizer"), "KeyError: 'tokenizer'"),
        (lambda m: m["tokenizer"].update(tokenizer="vq99"), "vq99"),
        (lambda m: m["files"].pop("labels/c/0"), "it lists no labels/c/0"),
        (lambda m: m["files"].update({"../x": {"bytes": 1, "crc32c": "0"}}), "outside the cache"),
        (lambda m: m.update(quarantine=[{"row": 99}]), "quarantine"),
        (lambda m: m.update(quarantine=[{"row": k} for k in range(70)]), "none of its images"),
        (lambda m: m["files"].pop("tokenizer.safetensors"), "it lists no tokenizer.safetensors"),
        (lambda m: m.update(sums=[]), "no sums of 5 shards"),
        (lambda m: m.update(shard_rows=0), "ZeroDivisionError"),
    ],
)
def test_manifests_that_cannot_be(copy, change, words):
    edit_manifest(copy, change)
    with pytest.raises(CacheError, match=words):
        open_cache(copy)


def test_a_manifest_that_was_edited(copy):
    text = (copy / "manifest.json").read_text()
    for old, new in (('"bee"', '"elk"'), ('"views": 2', '"views": 1'), ('"rows": 70', '"rows": 7')):
        (copy / "manifest.json").write_text(text.replace(old, new))
        with pytest.raises(CacheError, match="damaged .it is not what was written"):
            open_cache(copy)


def test_no_manifest(copy, tmp_path):
    (copy / "manifest.json").write_text("{")
    with pytest.raises(CacheError, match="damaged .*Expecting property name"):
        open_cache(copy)
    (copy / "manifest.json").unlink()
    with pytest.raises(CacheError, match="no finished cache.*tools/cache.py"):
        open_cache(copy)
    (copy / ".building").mkdir()
    with pytest.raises(CacheError, match="was interrupted: repeat the command"):
        open_cache(copy)
    with pytest.raises(FileNotFoundError, match="--data.*tools/cache.py"):
        open_cache(tmp_path / "nothing.zarr")


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("data_type", "float32", "expected data_type uint16, found float32"),
        ("shape", [70, 2, 25], r"expected shape \[70, 2, 16\], found \[70, 2, 25\]"),
        ("zarr_format", 2, "expected zarr_format 3, found 2"),
    ],
)
def test_arrays_of_another_kind(copy, key, value, words):
    file = copy / "codes" / "zarr.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(CacheError, match="zarr.json: .*(bytes|checksum)"):
        open_cache(copy)
    sign(copy)
    with pytest.raises(CacheError, match=words):
        open_cache(copy)


def test_arrays_of_the_other_byte_order(copy):
    file = copy / "codes" / "zarr.json"
    file.write_text(file.read_text().replace('"little"', '"big"'))
    sign(copy)
    with pytest.raises(CacheError, match="byte order"):
        open_cache(copy)


def test_labels_out_of_range(copy):
    labels = np.fromfile(copy / "labels/c/0", "<i4")
    labels[5] = 3
    labels.tofile(copy / "labels/c/0")
    with pytest.raises(CacheError, match="labels/c/0: checksum"):
        CacheTokens(open_cache(copy), 0)
    sign(copy)
    with pytest.raises(CacheError, match="labels are 0..3, expected 0..2"):
        CacheTokens(open_cache(copy), 0)
    assert find_damage(open_cache(copy)) == ["labels: 1 are outside 0..2, first that of row 5"]


def edit_shard(path, array, shard, change):
    """Change the values of a shard through zarr, and sign the cache again."""
    cache = open_cache(path)
    first, stop = cache.extent(shard)
    target = zarr.open_group(path, mode="r+")[array]
    values = target[first:stop]
    change(values)
    target[first:stop] = values
    sign(path)


def set_row(row, value):
    def change(values):
        values[row] = value

    return change


@pytest.mark.parametrize(
    "array, value, words",
    [
        ("mean", np.nan, "mean/c/1/0/0/0/0: rows 18 .1. not finite"),
        ("mean", np.inf, "mean/c/1/0/0/0/0: rows 18 .1. not finite"),
        ("std", 0.0, "std/c/1/0/0/0/0: rows 18 .1. constant"),
        ("mean", 0.25, "mean/c/1/0/0/0/0: rows 18 .1. constant"),
        ("std", np.linspace(-1, 1, 128).reshape(2, 16, 2, 2), "rows 18 .1. negative deviations"),
    ],
)
def test_values_that_cannot_be(kl16, tmp_path, array, value, words):
    shutil.copytree(kl16[1].path, tmp_path / "c.zarr")
    edit_shard(tmp_path / "c.zarr", array, 1, set_row(2, value))
    found = find_damage(open_cache(tmp_path / "c.zarr"))
    assert len(found) == 1 and re.search(words, found[0]), found


def test_tokens_that_are_not_finite_are_named_in_training(kl16, tmp_path):
    shutil.copytree(kl16[1].path, tmp_path / "c.zarr")
    edit_shard(tmp_path / "c.zarr", "mean", 1, set_row(2, np.nan))
    source = CacheTokens(open_cache(tmp_path / "c.zarr"), 0)
    bad = np.fromfile(tmp_path / "c.zarr/source_index/c/0", "<i4")[18]
    at = source.sources(torch.arange(20)).index(bad)
    for index in torch.arange(20).split(4):
        if at not in index:
            source.batch(index)
    source.check()
    for index in torch.arange(20).split(4):
        source.batch(index)
    with pytest.raises(CacheError, match=f"not finite.* sample {at} is image {bad} .*verify.py"):
        source.check()
    source.check()  # said once


def test_codes_that_cannot_be(copy):
    edit_shard(copy, "codes", 1, set_row(3, 300))
    assert find_damage(open_cache(copy)) == [f"{SHARD}: rows 19 (1) codes outside 0..299"]


def test_an_order_that_is_none(copy):
    order = np.fromfile(copy / "source_index/c/0", "<i4")
    order[0] = order[1]
    order.tofile(copy / "source_index/c/0")
    sign(copy)
    assert find_damage(open_cache(copy)) == ["source_index: not every image occurs once"]


def test_foreign_files_are_named(copy):
    (copy / "codes/c/9").mkdir()
    (copy / "codes/c/9/x").write_text("")
    assert find_damage(open_cache(copy)) == ["codes/c/9/x: not part of the cache"]


def test_a_whole_cache_has_no_find_damage(made, kl16):
    assert find_damage(made) == [] and find_damage(kl16[1]) == []
    assert not (made.path / ".building").exists()
    assert set(contents(made.path)) == {*made.manifest["files"], "manifest.json"}


def test_where_it_lies_does_not_matter(made, copy):
    assert open_cache(copy).fingerprint == made.fingerprint
    edit_shard(copy, "codes", 1, set_row(3, 0))
    assert open_cache(copy).fingerprint != made.fingerprint
