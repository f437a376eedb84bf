"""DALI against Pillow: equal pixels, the same good and bad files, no file costs another."""

import struct
import sys
import types
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFile

import heptapod_fast.data.dali as dali
from bench import bench_decode
from heptapod_fast.data import ImageFolder, Logograms, write_folder
from heptapod_fast.data.decoding import PREPROCESSING, PillowDecoder
from heptapod_fast.data.pixels import crop_pixels

SIDE = 64
# 0, 1, 2 and 3 halvings; odd and even; exact; smaller than SIDE; both orientations.
SIZES = [
    (64, 64),
    (65, 64),
    (100, 75),
    (75, 101),
    (127, 127),
    (128, 150),
    (129, 131),
    (257, 193),
    (255, 256),
    (300, 511),
    (512, 513),
    (777, 600),
    (52, 60),
    (61, 50),
    (64, 127),
    (300, 64),
]
ENCODINGS = {
    "4:4:4": dict(format="JPEG", quality=93, subsampling=0),
    "4:2:2": dict(format="JPEG", quality=90, subsampling=1),
    "4:2:0": dict(format="JPEG", quality=90, subsampling=2),
    "progressive": dict(format="JPEG", quality=90, progressive=True),
    "restarts": dict(format="JPEG", quality=75, restart_marker_rows=1),
    "grey": dict(format="JPEG", quality=90, mode="L"),
    "png": dict(format="PNG"),
    "png grey": dict(format="PNG", mode="L"),
}


def photograph(width, height, seed=0):
    """A small one."""
    return bench_decode.photograph(width, height, seed, octaves=6, fall=1.0, discs=8, radii=(3, 30))


def sharp(width, height, seed=0):
    """A checkerboard of single pixels up to the border, lines of one pixel, text, big squares."""
    y, x = np.mgrid[:height, :width]
    inner = (abs(x - width / 2) < width / 4) & (abs(y - height / 2) < height / 4)
    board = np.where(inner, (x // 8 + y // 8) % 2, (x + y) % 2) * 255
    image = Image.fromarray(board.astype(np.uint8)).convert("RGB")
    draw = ImageDraw.Draw(image)
    for k in range(0, width, 13):
        draw.line((k, 0, k + height // 3, height), fill=(255, (k + seed) % 256, 0))
    for k in range(6):
        draw.text((3 + 3 * k, 3 + 12 * k), "Heptapod 0123", fill=(0, 0, 255))
    return image


def write(path, image, mode="RGB", **options):
    image.convert(mode).save(path, **options)
    return path


def psnr(a, b):
    error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return 10 * np.log10(255**2 / error) if error else np.inf


def decode(decoder, paths, side=SIDE):
    out = np.full((len(paths), 3, side, side), 7, np.uint8)
    return decoder.decode(paths, out), out


def agree(decoder, paths, least=50.0):
    """Both decoders say the same of every file, and give the same pixels; returns the reasons."""
    (ours, got), (theirs, expected) = decode(decoder, paths), decode(PillowDecoder(1), paths)
    assert ours == theirs
    assert (got[[reason is not None for reason in ours]] == 7).all()
    for path, a, b in zip(paths, got, expected, strict=True):
        assert psnr(a, b) >= least, path
    return ours


def needs_dali():
    return pytest.importorskip("nvidia.dali", reason=f"DALI is not installed: {dali.INSTALL}")


@pytest.fixture(scope="module")
def decoder():
    needs_dali()
    return dali.DaliDecoder(workers=2)


@pytest.fixture
def by_dali(monkeypatch):
    """From here on nothing may be left to Pillow."""

    def refuse(*_, **__):
        raise AssertionError("left to Pillow")

    monkeypatch.setattr(dali, "crop_pixels", refuse)
    monkeypatch.setattr(dali, "_fits", lambda image, size: False)


class Broken:
    """A pipeline that fails."""

    def run(self, files):
        raise RuntimeError("the GPU has fallen off the bus")


@pytest.fixture
def by_pillow():
    """A decoder whose DALI fails."""
    needs_dali()
    found = dali.DaliDecoder(workers=1)
    found._pipelines.get()
    found._pipelines.put(Broken())
    return found


def test_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(ImportError, match=r'pip install "heptapod_fast\[dali\]"'):
        dali.DaliDecoder()


def test_other_versions_say_what_to_install(monkeypatch):
    fake = types.ModuleType("nvidia.dali")
    fake.__version__, fake.fn, fake.types = "0.1.2", types.ModuleType("fn"), None
    fake.Pipeline = lambda batch_size, num_threads, device_id: None  # none of today's settings
    parent = types.ModuleType("nvidia")
    parent.dali = fake
    monkeypatch.setitem(sys.modules, "nvidia", parent)
    monkeypatch.setitem(sys.modules, "nvidia.dali", fake)
    with pytest.raises(ValueError, match=r"(?s)DALI 0\.1\.2 does not fit.*exec_.*pip install"):
        dali.DaliDecoder()


def test_devices_that_are_not_there():
    with pytest.raises(ValueError, match="cuda:99.*device='cpu'"):
        dali.DaliDecoder(torch.device("cuda:99"))
    with pytest.raises(ValueError, match="cpu or cuda, not on meta"):
        dali.DaliDecoder("meta")


@pytest.mark.parametrize("content", [photograph, sharp])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_pixels_equal_pillows(decoder, by_dali, tmp_path, monkeypatch, content, encoding):
    monkeypatch.setattr(ImageFile, "MAXBLOCK", 2**24)
    sizes = SIZES if encoding in ("4:2:0", "png") else SIZES[2::5]
    paths = [write(tmp_path / f"{w}x{h}", content(w, h), **ENCODINGS[encoding]) for w, h in sizes]
    assert agree(decoder, paths) == [None] * len(paths)


@pytest.mark.parametrize("side", [48, 128, 160])
def test_logograms(decoder, by_dali, tmp_path, side):
    write_folder(Logograms(side, 8), tmp_path / "set")
    paths = sorted((tmp_path / "set").rglob("*.jpg"))
    assert len(paths) == 8 and agree(decoder, paths) == [None] * 8


def test_without_a_resize_the_pixels_are_the_same(decoder, by_dali, tmp_path):
    """DALI's own part, decoding, is exact; a wrong IDCT or upsampling shows here."""
    shapes = {
        "grey": (64, 64),
        "4:2:0": (70, 64),
        "progressive": (64, 70),
        "png": (64, 64),
        "4:2:2": (128, 200),
    }
    paths = [
        write(tmp_path / name.replace(":", ""), sharp(*shape, 3), **ENCODINGS[name])
        for name, shape in shapes.items()
    ]
    assert np.array_equal(decode(decoder, paths)[1], decode(PillowDecoder(1), paths)[1])


def test_pillow_decodes_what_is_not_resized(decoder, tmp_path, monkeypatch):
    taken = []
    monkeypatch.setattr(
        dali,
        "crop_pixels",
        lambda image, size: taken.append(image.size) or crop_pixels(image, size),
    )
    paths = [write(tmp_path / f"{w}.jpg", photograph(w, h)) for w, h in ((64, 70), (65, 70))]
    agree(decoder, paths)
    assert taken == [(64, 70)]


@pytest.mark.parametrize("content", [photograph, sharp])
def test_the_resize_of_the_gpu_on_the_cpu(content):
    for width, height in SIZES:
        image = content(width, height)
        got = dali.crop(torch.from_numpy(np.array(image)), SIDE).numpy()
        assert psnr(got, crop_pixels(image, SIDE)) >= 55, (width, height)


def test_exif_orientation_is_left_alone(decoder, by_dali, tmp_path):
    exif = Image.Exif()
    exif[0x112] = 6
    path = write(tmp_path / "x.jpg", photograph(90, 64), quality=95, exif=exif)
    assert agree(decoder, [path]) == [None]


def deep_png(path):
    """RGB of 16 bits per channel, which Pillow reads and does not write."""
    pixels = np.random.default_rng(0).integers(0, 2**16, (80, 70, 3)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    parts = (
        (b"IHDR", struct.pack(">IIBBBBB", 70, 80, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    )
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
            for kind, body in parts
        )
    )
    return path


def test_what_dali_cannot_do_equally_is_pillows(by_pillow, tmp_path):
    """Bit for bit, and without asking a DALI that fails on everything."""
    image, small = photograph(150, 100), photograph(70, 66, 1)
    alpha = image.copy()
    alpha.putalpha(Image.linear_gradient("L").resize(image.size))
    paths = [deep_png(tmp_path / "deep.png")]
    for name, mode in [
        ("p.png", "P"),
        ("p.gif", "P"),
        ("one.png", "1"),
        ("grey.tif", "L"),
        ("x.bmp", "RGB"),
        ("x.webp", "RGB"),
        ("x.ppm", "RGB"),
        ("x.tif", "RGB"),
        ("cmyk.jpg", "CMYK"),
        ("i16.png", "I;16"),
    ]:
        paths.append(write(tmp_path / name, image.convert("L") if mode == "I;16" else image, mode))
    for name, picture, options in [
        ("alpha.png", alpha, {}),
        ("la.png", alpha.convert("LA"), {}),
        ("key.png", small, dict(transparency=small.getpixel((0, 0)))),
        ("moving.png", image, dict(save_all=True, append_images=[image.rotate(90)])),
        ("rgb.jpg", image, dict(keep_rgb=True)),
        ("tall.jpg", photograph(70, 141), {}),
        ("halved.png", sharp(143, 286), {}),
    ]:
        picture.save(tmp_path / name, **options)
        paths.append(tmp_path / name)
    whole = write(tmp_path / "whole.jpg", image).read_bytes()
    for name, data in [("no_end.jpg", whole[:-2]), ("longer.jpg", whole + b"\0" * 30)]:
        (tmp_path / name).write_bytes(data)
        paths.append(tmp_path / name)
    (ours, got), (theirs, expected) = decode(by_pillow, paths), decode(PillowDecoder(1), paths)
    assert ours == theirs == [None] * len(paths)
    assert np.array_equal(got, expected)
    with pytest.raises(RuntimeError, match="stopped decoding on cpu.*off the bus"):
        by_pillow.decode([tmp_path / "whole.jpg"], np.empty((1, 3, SIDE, SIDE), np.uint8))


def test_big_images_are_pillows(decoder, by_dali, tmp_path, monkeypatch):
    path = write(tmp_path / "x.jpg", photograph(90, 80))
    monkeypatch.setattr(dali, "MOST_PIXELS", 90 * 80)
    assert decode(decoder, [path])[0] == [None]
    monkeypatch.setattr(dali, "MOST_PIXELS", 90 * 80 - 1)
    assert "left to Pillow" in decode(decoder, [path])[0][0]


def test_what_dali_refuses_pillow_decides(by_pillow, monkeypatch, tmp_path, caplog):
    """DALI wants a PNG's end, Pillow does not: no file may be bad for one decoder alone; and it
    is said, as is a resize that fails, so that no run passes by DALI in silence."""
    path = write(tmp_path / "x.png", photograph(90, 80))
    path.write_bytes(path.read_bytes()[:-12])
    decoder = dali.DaliDecoder(workers=1)
    assert agree(decoder, [path]) == [None]
    assert "Pillow has read it, DALI cannot" in caplog.text and str(path) in caplog.text
    monkeypatch.setattr(by_pillow, "_check_alive", lambda *_: None)
    assert agree(by_pillow, [path]) == [None]
    monkeypatch.setattr(dali, "_crop_on_cpu", Broken.run)
    with pytest.raises(RuntimeError, match="off the bus"):
        decode(decoder, [write(tmp_path / "x.png", photograph(90, 80))])


def broken_files(folder):
    """One of every kind."""
    jpeg = write(folder / "good.jpg", photograph(150, 120), quality=92).read_bytes()
    progressive = write(folder / "p.jpg", photograph(150, 120), progressive=True).read_bytes()
    png = write(folder / "good.png", photograph(90, 80)).read_bytes()
    (folder / "folder.jpg").mkdir()
    (folder / "link.jpg").symlink_to(folder / "nowhere.jpg")
    files = {
        "empty.jpg": b"",
        "html.jpg": b"<!DOCTYPE html><html><body>404</body></html>",
        "text.png": b"not an image",
        "twenty.jpg": jpeg[:20],
        "signature.png": png[:8],
        "flipped.png": png[:900] + bytes([png[900] ^ 8]) + png[901:],
    }
    for share in (5, 30, 50, 90, 99):
        files[f"cut{share}.jpg"] = jpeg[: len(jpeg) * share // 100]
        files[f"cut{share}p.jpg"] = progressive[: len(progressive) * share // 100]
        files[f"cut{share}.png"] = png[: len(png) * share // 100]
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return [folder / name for name in files] + [folder / "folder.jpg", folder / "link.jpg"]


def test_a_file_that_is_gone_is_no_broken_image(decoder, tmp_path):
    for one in (decoder, PillowDecoder(1)):
        with pytest.raises(FileNotFoundError, match="missing.jpg"):
            decode(one, [tmp_path / "missing.jpg"])


def test_broken_files_cost_no_other_and_decoding_goes_on(decoder, tmp_path):
    bad = broken_files(tmp_path)
    good = [write(tmp_path / f"{k}.jpg", photograph(80 + k, 90, k)) for k in range(4)]
    expected = decode(PillowDecoder(1), good)[1]
    mixed = [path for k, path in enumerate(bad) for path in (good[k % 4], path)]
    reasons = agree(decoder, mixed)
    assert all(reasons[1::2]) and not any(reasons[::2]), [
        path for path, reason in zip(bad, reasons[1::2], strict=True) if not reason
    ]
    for _ in range(12):
        assert decode(decoder, mixed)[0] == reasons
        found, pixels = decode(decoder, good)
        assert found == [None] * 4
        assert min(map(psnr, pixels, expected)) >= 50


def test_damaged_files_are_good_or_bad_for_both(decoder, tmp_path):
    """Bytes turned over, zeroed or lost anywhere, markers in the middle of a scan."""
    rng, paths, inside = np.random.default_rng(3), [], []
    image = photograph(120, 90)
    for encoding in ("4:2:0", "restarts", "progressive", "grey", "png"):
        data = write(tmp_path / "whole", image, **ENCODINGS[encoding]).read_bytes()
        for k in range(45):
            at = int(rng.integers(len(data) // (2 if k % 3 else 20), len(data)))
            cases = (
                data[:at] + rng.bytes(8) + data[at + 8 :],
                data[:at] + data[at + 60 :],
                data[:at] + b"\xff\xd9",
                data[:at] + bytes(20) + data[at + 20 :],
                data[:at] + bytes([data[at] ^ 1 << k % 8]) + data[at + 1 :],
            )
            path = tmp_path / f"{encoding.replace(':', '')}-{k}"
            path.write_bytes(cases[k % 5])
            paths.append(path)
        if encoding == "4:2:0":
            at = len(data) // 2
            inside = [tmp_path / "inside"]
            inside[0].write_bytes(data[:at] + b"\x12\x34\x56\x78\x9a" + data[at + 5 :])
    reasons = agree(decoder, paths)
    assert 40 < sum(reason is None for reason in reasons) < len(reasons) - 40
    assert agree(decoder, inside) == [None]


def test_pixels_depend_on_nothing_but_the_file(tmp_path):
    needs_dali()
    paths = [write(tmp_path / f"{k}.jpg", photograph(90 + 7 * k, 100, k)) for k in range(9)]
    paths += broken_files(tmp_path) + [write(tmp_path / "a.gif", photograph(80, 90))]
    reasons, pixels = decode(dali.DaliDecoder(workers=1), paths)
    for workers, order in ((1, slice(None)), (3, slice(None, None, -1)), (2, slice(0, 4))):
        again = decode(dali.DaliDecoder(workers=workers), paths[order])
        assert again[0] == reasons[order] and np.array_equal(again[1], pixels[order])


def test_image_folder_takes_it(decoder, tmp_path):
    write(tmp_path / "x.jpg", photograph(90, 80))
    version = needs_dali().__version__
    assert decoder.preprocessing == f"{PREPROCESSING}/dali-{version}-cpu"
    source = ImageFolder(tmp_path, SIDE, decoder=decoder)
    pillow = ImageFolder(tmp_path, SIDE)
    assert source.fingerprint != pillow.fingerprint
    ids = torch.arange(1)
    assert psnr(source.images(ids).numpy(), pillow.images(ids).numpy()) >= 50


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("content", [photograph, sharp])
def test_gpu(tmp_path, content):
    needs_dali()
    on_gpu = dali.DaliDecoder("cuda", workers=4)
    paths = [
        write(tmp_path / f"{name[:3]}{w}x{h}".replace(":", ""), content(w, h), **options)
        for name, options in ENCODINGS.items()
        for w, h in SIZES
    ]
    assert agree(on_gpu, paths, least=40) == [None] * len(paths)
    first = decode(on_gpu, paths)[1]
    assert np.array_equal(decode(on_gpu, paths[::-1])[1], first[::-1])
    agree(on_gpu, broken_files(tmp_path), least=40)
