"""Folders of images: layouts, pixel formats, sizes, and every kind of bad input."""

import hashlib
import logging
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import heptapod_fast.data.images as images_module
from heptapod_fast.data import ImageFolder, ImageSource
from heptapod_fast.data.decoding import PillowDecoder
from heptapod_fast.data.files import PREPROCESSING
from heptapod_fast.data.pixels import centre_crop


def picture(width=16, height=16, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def save(path, image=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or picture()).save(path, **options)
    return path


def one(folder, size=16, **options):
    """The pixels (3, H, W) of the only image of a folder."""
    source = ImageFolder(folder, size, **options)
    assert len(source) == 1
    return source.images(torch.tensor([0]))[0]


def plain(value, mode="RGB", size=(16, 16)):
    return Image.new(mode, size, value)


def test_classes_are_sorted_subfolders_searched_at_any_depth(tmp_path):
    save(tmp_path / "b" / "x.png", picture(seed=1))
    save(tmp_path / "a" / "deep" / "deeper" / "y.PNG", picture(seed=2))
    save(tmp_path / "a" / "z.Png", picture(seed=3))
    (tmp_path / "readme.txt").write_text("ignored")
    (tmp_path / "a" / "notes.md").write_text("ignored")
    save(tmp_path / ".hidden" / "h.png")
    save(tmp_path / "a" / "._z.png")
    save(tmp_path / "a" / ".thumbs" / "t.png")
    calls = []
    source = ImageFolder(tmp_path, 16, progress=lambda *at: calls.append(at))
    assert isinstance(source, ImageSource)
    assert source.class_names == ("a", "b") and source.labels.tolist() == [0, 0, 1]
    assert source.name == tmp_path.name and source.broken == []
    expected = [np.asarray(picture(seed=s)).transpose(2, 0, 1) for s in (2, 3, 1)]
    assert np.array_equal(source.images(torch.arange(3)).numpy(), np.stack(expected))
    assert calls == [(3, 3)]
    with pytest.raises(IndexError, match=r"0\.\.2"):
        source.images(torch.tensor([3]))


def test_flat_folder_is_one_class_and_odd_names_work(tmp_path):
    folder = tmp_path / "größe und 画像"
    save(folder / "ein bild é 🙂.png", picture(seed=1))
    save(folder / "b.jpeg", picture(seed=2))
    (folder / "empty").mkdir()
    source = ImageFolder(folder, 16)
    assert source.class_names == ("größe und 画像",) and source.labels.tolist() == [0, 0]


@pytest.mark.parametrize(
    "extension", ["jpg", "jpeg", "png", "bmp", "webp", "gif", "tif", "tiff", "ppm", "JPG", "Tiff"]
)
def test_extensions(tmp_path, extension):
    save(tmp_path / f"x.{extension}", plain((200, 30, 90)))
    got = one(tmp_path)[:, 8, 8].float() - torch.tensor([200.0, 30.0, 90.0])
    assert got.abs().max() <= 4


def test_layout_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder.*--data"):
        ImageFolder(tmp_path / "missing", 16)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="found no images.*--data"):
        ImageFolder(tmp_path / "empty", 16)
    with pytest.raises(ValueError, match="found a file"):
        ImageFolder(save(tmp_path / "x.png"), 16)
    mixed = tmp_path / "mixed"
    save(mixed / "top.png")
    save(mixed / "cats" / "c.png")
    with pytest.raises(ValueError, match=r"top\.png.*cats"):
        ImageFolder(mixed, 16)
    bare = tmp_path / "bare"
    save(bare / "cats" / "c.png")
    (bare / "dogs" / "inner").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="(?s)1 class folders of --data hold.*dogs"):
        ImageFolder(bare, 16)


def test_link_loops_end(tmp_path):
    save(tmp_path / "a" / "x.png")
    (tmp_path / "a" / "again").symlink_to(tmp_path / "a", target_is_directory=True)
    assert len(ImageFolder(tmp_path, 16)) == 1


def test_a_class_that_is_a_link_to_another_has_its_images(tmp_path):
    """Each real folder counts once in a class, not once in the set."""
    save(tmp_path / "a" / "deep" / "x.png")
    (tmp_path / "b").symlink_to(tmp_path / "a", target_is_directory=True)
    assert ImageFolder(tmp_path, 16).labels.tolist() == [0, 1]


def test_cmyk_and_grey_jpeg(tmp_path):
    save(tmp_path / "c" / "x.jpg", plain((0, 255, 255, 0), "CMYK"), quality=95)
    save(tmp_path / "g" / "x.jpg", plain(77, "L"), quality=95)
    cmyk, grey = ImageFolder(tmp_path, 16).images(torch.tensor([0, 1]))[:, :, 8, 8].tolist()
    assert cmyk[0] > 240 and max(cmyk[1:]) < 15
    assert grey == [77, 77, 77]


def test_16_bit_is_scaled_not_clipped(tmp_path):
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    save(tmp_path / "png" / "x.png", Image.fromarray(ramp))
    save(tmp_path / "tif" / "x.tif", Image.fromarray(ramp))
    (tmp_path / "ppm").mkdir()
    # A portable grey map, which Pillow opens with 32-bit integers.
    (tmp_path / "ppm" / "x.ppm").write_bytes(b"P5 16 16 65535\n" + ramp.astype(">u2").tobytes())
    expected = np.arange(256).reshape(16, 16)
    for image in ImageFolder(tmp_path, 16).images(torch.arange(3)).numpy():
        assert np.array_equal(image, np.stack([expected] * 3))


def test_16_bit_colour_png(tmp_path):
    pixels = np.full((16, 16, 3), (65535, 32896, 0), dtype=">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", 16, 16, 16, 2, 0, 0, 0)
    (tmp_path / "x.png").write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )
    assert one(tmp_path)[:, 3, 3].tolist() == [255, 128, 0]


def test_float_tiff_is_refused_with_its_reason(tmp_path):
    save(tmp_path / "x.tif", Image.fromarray(np.ones((16, 16), dtype=np.float32)))
    with pytest.raises(ValueError, match="floating-point"):
        ImageFolder(tmp_path, 16)


def test_transparency_lies_over_white(tmp_path):
    save(tmp_path / "rgba" / "x.png", plain((255, 0, 0, 0), "RGBA"))
    save(tmp_path / "rgba50" / "x.png", plain((0, 0, 0, 128), "RGBA"))
    save(tmp_path / "la" / "x.png", plain((10, 0), "LA"))
    palette = plain(0, "P")
    palette.putpalette([9, 9, 9, 200, 0, 0])
    save(tmp_path / "palette" / "x.png", palette, transparency=0)
    opaque = plain(1, "P")
    opaque.putpalette([9, 9, 9, 200, 0, 0])
    save(tmp_path / "popaque" / "x.png", opaque)
    save(tmp_path / "rgbkey" / "x.png", plain((1, 2, 3)), transparency=(1, 2, 3))
    source = ImageFolder(tmp_path, 16)
    got = {
        name: source.images(torch.tensor([k]))[0, :, 5, 5].tolist()
        for k, name in enumerate(source.class_names)
    }
    assert got == {
        "rgba": [255] * 3,
        "rgba50": [127] * 3,
        "la": [255] * 3,
        "palette": [255] * 3,
        "popaque": [200, 0, 0],
        "rgbkey": [255] * 3,
    }


def test_exif_rotation_is_ignored(tmp_path):
    image = Image.new("RGB", (32, 16), "black")
    image.paste("white", (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = 6
    save(tmp_path / "x.jpg", image, exif=exif, quality=95)
    got = one(tmp_path)
    # The centre of the stored picture: left half white. Rotated, the top would be white.
    assert got[:, :, :6].min() > 240 and got[:, :, 10:].max() < 15


def test_first_frame_of_an_animation(tmp_path):
    save(tmp_path / "x.gif", plain("red"), save_all=True, append_images=[plain("blue")])
    assert one(tmp_path)[:, 4, 4].tolist() == [255, 0, 0]


def test_centre_crop_halves_with_a_box_then_resizes_bicubically():
    image = picture(200, 133, seed=4)
    got = centre_crop(image, 32)
    step = image.resize((100, 66), Image.Resampling.BOX)
    step = step.resize((50, 33), Image.Resampling.BOX)
    step = step.resize((round(50 * 32 / 33), 32), Image.Resampling.BICUBIC)
    assert np.array_equal(got, np.asarray(step)[:, 8:40])
    # Exactly twice the size is still halved, which makes the result a plain average.
    double = picture(64, 64, seed=5)
    assert np.array_equal(centre_crop(double, 32), double.resize((32, 32), Image.Resampling.BOX))
    assert np.array_equal(centre_crop(picture(32, 32), 32), picture(32, 32))
    assert centre_crop(picture(33, 500), 32).size == (32, 32)


def test_small_images_are_enlarged_a_little_with_one_warning(tmp_path, caplog):
    save(tmp_path / "a.png", picture(28, 30))
    save(tmp_path / "b.png", picture(40, 26))
    save(tmp_path / "c.png", picture(32, 32))
    with caplog.at_level(logging.WARNING):
        source = ImageFolder(tmp_path, 32)
    assert len(source) == 3 and len(caplog.records) == 1
    text = caplog.text
    assert "2 of 3" in text and "b.png" in text and "40 x 26" in text and "--image-size" in text


def test_too_small_images_are_listed(tmp_path):
    for k in range(12):
        save(tmp_path / f"{k:02}.png", picture(40, 20))
    save(tmp_path / "fine.png", picture(32, 32))
    with pytest.raises(ValueError) as error:
        ImageFolder(tmp_path, 32)
    text = str(error.value)
    assert "12 of 13" in text and "--image-size 32" in text and "--allow-upscale" in text
    assert "--image-size to 25" in text
    assert text.count("40 x 20") == 10 and "2 more" in text and "fine.png" not in text
    assert len(ImageFolder(tmp_path, 32, allow_upscale=True)) == 13
    assert len(ImageFolder(tmp_path, 25)) == 13


def spoil(folder):
    """One good image and four bad files; returns the names of the bad ones."""
    save(folder / "good.png", picture(seed=9))
    whole = save(folder / "truncated.jpg", picture(64, 64)).read_bytes()
    (folder / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "zero.png").write_bytes(b"")
    (folder / "html.jpg").write_text("<html>404</html>")
    (folder / "aaa.png").write_bytes(whole[:20])
    return {"truncated.jpg", "zero.png", "html.jpg", "aaa.png"}


def test_broken_files_are_an_error(tmp_path):
    bad = spoil(tmp_path)
    with pytest.raises(ValueError) as error:
        ImageFolder(tmp_path, 16)
    text = str(error.value)
    assert "of 5 image files" in text and "--max-broken" in text
    # What the headers show is reported before anything is decoded.
    assert all(name in text for name in bad - {"truncated.jpg"}) and "0 bytes" in text
    with pytest.raises(ValueError, match="4 of 5.*--max-broken allows 3"):
        ImageFolder(tmp_path, 16, max_broken=3)


def test_broken_files_can_be_left_out(tmp_path, caplog):
    bad = spoil(tmp_path)
    with caplog.at_level(logging.WARNING):
        source = ImageFolder(tmp_path, 16, max_broken=4)
    assert {file.inner for file, _ in source.broken} == bad
    assert all(reason for _, reason in source.broken)
    assert len(source) == 1 and "left out 4" in caplog.text
    expected = np.asarray(picture(seed=9)).transpose(2, 0, 1)
    assert np.array_equal(source.images(torch.tensor([0]))[0].numpy(), expected)


def test_long_lists_of_broken_files_are_cut(tmp_path):
    for k in range(25):
        save(tmp_path / f"{k:02}.png").write_bytes(b"")
    with pytest.raises(ValueError, match="25 of 25") as error:
        ImageFolder(tmp_path, 16)
    assert str(error.value).count("0 bytes") == 20 and "5 more" in str(error.value)
    with pytest.raises(FileNotFoundError, match="none of its 25"):
        ImageFolder(tmp_path, 16, max_broken=100)


def test_a_class_whose_images_are_all_broken_is_named(tmp_path):
    save(tmp_path / "cats" / "c.png")
    save(tmp_path / "dogs" / "d.png").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="(?s)no readable image.*dogs"):
        ImageFolder(tmp_path, 16, max_broken=1)


def test_decompression_bomb_is_a_reason(tmp_path, monkeypatch):
    save(tmp_path / "big.png", picture(64, 64))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match="too many pixels"):
        ImageFolder(tmp_path, 16)


def test_memory_is_checked_before_decoding(tmp_path, monkeypatch):
    for k in range(3):
        save(tmp_path / f"{k}.png").write_bytes(b"")
    monkeypatch.setattr(images_module, "available_memory", lambda: 10**9)
    with pytest.raises(ValueError, match=r"--image-size 20000.*3\.6 GB.*1\.0 GB"):
        ImageFolder(tmp_path, 20000)
    monkeypatch.undo()
    assert images_module.available_memory() is None or images_module.available_memory() > 10**6


def test_fingerprint(tmp_path):
    save(tmp_path / "one" / "a" / "x.png", picture(seed=1))
    save(tmp_path / "two" / "a" / "x.png", picture(seed=1))
    first, twin = ImageFolder(tmp_path / "one", 16), ImageFolder(tmp_path / "two", 16)
    assert first.fingerprint == twin.fingerprint and len(first.fingerprint) == 64
    assert ImageFolder(tmp_path / "one", 8).fingerprint != first.fingerprint
    save(tmp_path / "two" / "a" / "y.png", picture(seed=1))
    assert ImageFolder(tmp_path / "two", 16).fingerprint != first.fingerprint


@pytest.mark.parametrize("in_memory", [True, False])
def test_the_fingerprint_is_of_names_labels_and_pixels(tmp_path, in_memory):
    """Of the files that can be read; 70 of them, more than are decoded at once."""
    for k in range(70):
        save(tmp_path / f"c{k % 2}" / f"{k:02}.png", picture(20, 24, seed=k))
    for name in ("00.png", "70.png"):
        (tmp_path / "c0" / name).write_bytes(b"nothing")
    source = ImageFolder(tmp_path, 16, max_broken=2, in_memory=in_memory)
    assert len(source) == 69
    by_hand = hashlib.sha256(f"{PREPROCESSING}/16\n".encode())
    paths = sorted(p for p in tmp_path.rglob("*.png") if p.stat().st_size > 10)
    for path in paths:
        by_hand.update(f"{path.parent.name}/{path.name}\0{path.parent.name[1]}\n".encode())
    for path in paths:
        with Image.open(path) as image:
            pixels = np.asarray(centre_crop(image, 16))
            by_hand.update(pixels.transpose(2, 0, 1).tobytes())
    assert source.fingerprint == by_hand.hexdigest()


def test_images_on_demand_are_those_in_memory(tmp_path):
    for k in range(70):
        save(tmp_path / f"c{k % 2}" / f"{k:02}.png", picture(20, 24, seed=k))
    (tmp_path / "c0" / "00.png").write_bytes(b"nothing")
    kept, again = (ImageFolder(tmp_path, 16, 1, in_memory=kept) for kept in (True, False))
    assert isinstance(again, ImageSource) and again._pixels is None
    assert again.fingerprint == kept.fingerprint and again.broken == kept.broken
    assert torch.equal(again.labels, kept.labels)
    ids = torch.randint(69, (150,))
    assert torch.equal(again.images(ids), kept.images(ids))
    assert again.images(torch.tensor([], dtype=torch.int64)).shape == (0, 3, 16, 16)
    with pytest.raises(IndexError, match=r"0\.\.68"):
        again.images(torch.tensor([69]))


def test_images_on_demand_need_no_memory_for_all(tmp_path, monkeypatch):
    save(tmp_path / "x.png")
    monkeypatch.setattr(images_module, "available_memory", lambda: 100)
    with pytest.raises(ValueError, match="GB are available"):
        ImageFolder(tmp_path, 16)
    assert len(ImageFolder(tmp_path, 16, in_memory=False)) == 1


def test_a_file_that_changes_while_it_is_looked_at(tmp_path):
    path = save(tmp_path / "x.png")
    source = ImageFolder(tmp_path, 16, in_memory=False)
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="x.png: .*; it could be read when .* was opened"):
        source.images(torch.tensor([0]))


def test_a_picture_repainted_in_place_changes_the_fingerprint(tmp_path):
    path = tmp_path / "a" / "x.bmp"
    save(path, picture(seed=1))
    before, size = ImageFolder(tmp_path, 16).fingerprint, path.stat().st_size
    save(path, picture(seed=2))
    assert path.stat().st_size == size and ImageFolder(tmp_path, 16).fingerprint != before


def test_workers_do_not_change_the_result(tmp_path):
    for k in range(30):
        save(tmp_path / f"c{k % 3}" / f"{k}.png", picture(20, 24, seed=k))
    single, many = (ImageFolder(tmp_path, 16, decoder=PillowDecoder(n)) for n in (1, 8))
    ids = torch.arange(30)
    assert torch.equal(single.images(ids), many.images(ids))
    assert torch.equal(single.labels, many.labels)
