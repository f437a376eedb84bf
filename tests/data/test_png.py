"""Every kind of PNG: transparency over white, and pixels whatever the metadata."""

import functools
import itertools
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from heptapod_fast.data.decoding import open_decoder
from heptapod_fast.data.images import ImageFolder

SIDE = 8
SIGNATURE = b"\x89PNG\r\n\x1a\n"
GREY, RGB, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6
CHANNELS = {GREY: 1, RGB: 3, PALETTE: 1, GREY_ALPHA: 2, RGBA: 4}
DEPTHS = {
    GREY: (1, 2, 4, 8, 16),
    RGB: (8, 16),
    PALETTE: (1, 2, 4, 8),
    GREY_ALPHA: (8, 16),
    RGBA: (8, 16),
}
KINDS = [(kind, depth) for kind in DEPTHS for depth in DEPTHS[kind]]


def chunk(name: bytes, data: bytes, checksum: int | None = None) -> bytes:
    value = zlib.crc32(name + data) if checksum is None else checksum
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", value)


def encode(samples: np.ndarray, kind: int, depth: int, before: bytes = b"", after: bytes = b""):
    """(H, W, channels) numbers below 2^depth -> a PNG file, not interlaced, not filtered.

    before, after: chunks in front of the pixels and behind them.
    """
    height, width, _ = samples.shape
    bits = np.unpackbits(
        samples.astype(">u2").view(np.uint8).reshape(height, width, -1, 2), axis=-1
    )
    rows = np.packbits(bits[..., 16 - depth :].reshape(height, -1), axis=1)
    data = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    return (
        SIGNATURE
        + chunk(b"IHDR", header)
        + before
        + chunk(b"IDAT", zlib.compress(data))
        + after
        + chunk(b"IEND", b"")
    )


def to_8_bits(samples: np.ndarray, kind: int, depth: int) -> np.ndarray:
    """As this project promises: few bits are spread, grey of 16 rounded; of colour and alpha of 16
    Pillow keeps the upper 8."""
    if depth < 8:
        return samples * (255 // (2**depth - 1))
    if depth == 8:
        return samples
    return (samples + 128) // 257 if kind == GREY else samples // 256


def expected_of(samples, kind, depth, key, palette, alphas) -> np.ndarray:
    """(3, H, W), by the definitions of the format."""
    if kind == PALETTE:
        colour = palette[samples[..., 0]]
        alpha = alphas[samples[..., 0]]
    else:
        colours = 1 if kind in (GREY, GREY_ALPHA) else 3
        wide = to_8_bits(samples, kind, depth)
        colour = np.broadcast_to(wide[..., :colours], (SIDE, SIDE, 3))
        alpha = np.full((SIDE, SIDE), 255)
        if kind in (GREY_ALPHA, RGBA):
            alpha = wide[..., -1]
        elif key is not None:
            alpha = np.where((samples == key).all(-1), 0, 255)
    share = alpha[..., None] / 255
    return (colour * share + 255 * (1 - share)).transpose(2, 0, 1)


opened = functools.cache(functools.partial(open_decoder, workers=1))


def pixels_of(path, decoder: str) -> np.ndarray:
    try:
        found = opened(decoder)
    except ValueError as error:
        pytest.skip(str(error))
    return ImageFolder(path, SIDE, decoder=found).images(torch.tensor([0]))[0].numpy()


@pytest.mark.parametrize("decoder", ["pillow", "dali"])
@pytest.mark.parametrize("has_key", [True, False])
@pytest.mark.parametrize("kind, depth", KINDS)
def test_transparency_lies_over_white(tmp_path, kind, depth, has_key, decoder):
    if has_key and kind in (GREY_ALPHA, RGBA):
        pytest.skip("these have an alpha channel instead")
    most = 2**depth
    samples = torch.randint(most, (SIDE, SIDE, CHANNELS[kind])).numpy()
    palette = torch.randint(256, (most if depth <= 8 else 1, 3)).numpy()
    alphas = np.full(len(palette), 255)
    key = samples[3, 5].copy()
    chunks = b""
    if kind == PALETTE:
        chunks = chunk(b"PLTE", palette.astype(np.uint8).tobytes())
        if has_key:
            alphas = torch.randint(256, (len(palette),)).numpy()
            chunks += chunk(b"tRNS", alphas.astype(np.uint8).tobytes())
    elif has_key:
        # Neighbours of the transparent colour in the lowest bit alone are not it.
        samples[0, 0] = key
        samples[0, 1] = key
        samples[0, 1, -1] ^= 1
        chunks = chunk(b"tRNS", key.astype(">u2").tobytes())
    else:
        key = None
    (tmp_path / "x.png").write_bytes(encode(samples, kind, depth, chunks))
    expected = expected_of(samples, kind, depth, key, palette, alphas)
    found = pixels_of(tmp_path, decoder)
    assert np.abs(found - expected).max() <= 1
    if has_key and kind != PALETTE:
        assert (found[:, 0, 0] == 255).all() and (found[:, 3, 5] == 255).all()


@pytest.mark.parametrize("kind, depth", [(GREY, 2), (GREY, 4), (GREY, 8), (RGB, 8)])
def test_of_the_transparent_colour_only_the_bits_of_a_sample_count(tmp_path, kind, depth):
    """The file gives it 16 bits a sample, whatever the depth (PNG, section 11.3.2.1). Of black and
    white Pillow only tells whether they are 0."""
    samples = torch.randint(2**depth, (SIDE, SIDE, CHANNELS[kind])).numpy()
    key = samples[3, 5].copy()
    wide = (key + 7 * 2**depth).astype(">u2")
    raw = encode(samples, kind, depth, chunk(b"tRNS", wide.tobytes()))
    (tmp_path / "x.png").write_bytes(raw)
    expected = expected_of(samples, kind, depth, key, None, None)
    assert np.abs(pixels_of(tmp_path, "pillow") - expected).max() <= 1


def profile(size: int) -> bytes:
    return chunk(b"iCCP", b"a profile\0\0" + zlib.compress(bytes(size)))


METADATA = {
    "a profile of 3 MB": profile(3_000_000),
    "a compressed text of 3 MB": chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"x" * 3_000_000)),
    "an international text of 3 MB": chunk(
        b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(b"x" * 3_000_000)
    ),
    "70 MB of text": b"".join(chunk(b"tEXt", b"K%02d\0" % k + b"x" * 1_000_000) for k in range(70)),
    "a text called transparency": chunk(b"tEXt", b"transparency\0none"),
    "a profile packed in an unknown way": chunk(b"iCCP", b"a profile\0\7" + bytes(9)),
    "a text with a wrong checksum": chunk(b"tEXt", b"Comment\0hello", checksum=0),
    "a chromaticity that is cut": chunk(b"cHRM", bytes(7)),
    "a physical size that is cut": chunk(b"pHYs", b""),
}


@pytest.mark.parametrize("decoder", ["pillow", "dali"])
@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("what", METADATA)
def test_metadata_never_decides(tmp_path, what, place, decoder):
    samples = torch.randint(256, (SIDE, SIDE, 3)).numpy()
    (tmp_path / "x.png").write_bytes(encode(samples, RGB, 8, **{place: METADATA[what]}))
    assert np.array_equal(pixels_of(tmp_path, decoder), samples.transpose(2, 0, 1))


def test_metadata_and_transparency_together(tmp_path):
    samples = torch.randint(65536, (SIDE, SIDE, 1)).numpy()
    key = chunk(b"tRNS", samples[2, 2].astype(">u2").tobytes())
    (tmp_path / "x.png").write_bytes(encode(samples, GREY, 16, profile(2_000_000) + key))
    assert pixels_of(tmp_path, "pillow")[:, 2, 2].tolist() == [255] * 3


@pytest.mark.parametrize("decoder", ["pillow", "dali"])
def test_damaged_pixels_stay_damaged_whatever_the_metadata(tmp_path, decoder):
    samples = torch.randint(256, (SIDE, SIDE, 3)).numpy()
    raw = encode(samples, RGB, 8, profile(2_000_000))
    (tmp_path / "x.png").write_bytes(raw[:-40])
    with pytest.raises(ValueError, match="1 of 1 image files cannot be read"):
        pixels_of(tmp_path, decoder)


@pytest.mark.parametrize("size", [10, 200_000, 1_500_000])
def test_profiles_in_jpeg_files(tmp_path, size):
    Image.new("RGB", (SIDE, SIDE), (9, 99, 199)).save(
        tmp_path / "x.jpg", icc_profile=bytes(size), quality=95
    )
    found = pixels_of(tmp_path, "pillow")[:, 4, 4].astype(int)
    assert np.abs(found - (9, 99, 199)).max() <= 4


def test_every_kind_is_covered():
    """All that the format allows (PNG, table 11.1)."""
    allowed = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
    assert sorted(KINDS) == sorted(
        itertools.chain.from_iterable([(k, d) for d in depths] for k, depths in allowed.items())
    )
