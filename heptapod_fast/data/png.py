"""What Pillow lacks for PNG files: pixels whatever the metadata, every transparent colour."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# A chunk is its length, a name of four letters, the data and a checksum (PNG, section 5.3).
_LENGTH_BYTES = 4
_NAME_BYTES = 4
_CHECKSUM_BYTES = 4
# Grey samples of few bits -> what Pillow multiplies them by to fill eight.
_SCALES = {"L": 1, "L;2": 85, "L;4": 17}


def without_metadata(stream: BinaryIO) -> io.BytesIO | None:
    """A PNG file with the chunks alone that decide its pixels; None if that is no other file.

    Pillow refuses a file for a profile or a text that is large when unpacked (1 MB), or damaged,
    to be safe from those who mean harm. Whoever never looks at them has nothing to fear.
    """
    stream.seek(0)
    if stream.read(len(_SIGNATURE)) != _SIGNATURE:
        return None
    stream.seek(0)
    data = stream.read()
    kept = [_SIGNATURE]
    has_dropped = False
    at = len(_SIGNATURE)
    while at < len(data):
        length = int.from_bytes(data[at : at + _LENGTH_BYTES], "big")
        name = data[at + _LENGTH_BYTES : at + _LENGTH_BYTES + _NAME_BYTES]
        end = at + _LENGTH_BYTES + _NAME_BYTES + length + _CHECKSUM_BYTES
        # The names of chunks that a picture cannot do without begin with a capital letter.
        if name[:1].isupper() or name == b"tRNS":
            kept.append(data[at:end])
        else:
            has_dropped = True
        at = end
    return io.BytesIO(b"".join(kept)) if has_dropped else None


def transparent_pixels(image: Image.Image) -> np.ndarray | None:
    """(H, W) bool, the pixels of the one colour that a grey or RGB PNG calls transparent; None for
    other images, and where there is no such colour.

    Pillow compares that colour as it stands in the file with pixels that it has scaled to eight
    bits, and finds it only where they have eight in the file.
    """
    key = image.info.get("transparency")
    if image.format != "PNG" or image.mode not in ("1", "L", "I;16", "RGB") or key is None:
        return None
    # Until the pixels are read, `tile` says how they lie in the file.
    rawmode = image.tile[0].args  # type: ignore[attr-defined]
    if rawmode == "RGB;16B":
        return (_wide(image) == np.array(key)).all(-1)
    if image.mode == "RGB":
        # Of numbers below 2^16 in the file the bits count that a sample has.
        return (np.asarray(image) == np.array(key) % 256).all(-1)
    if image.mode == "I;16":
        return np.asarray(image) == key
    if image.mode == "1":
        return np.asarray(image) == bool(key)
    scale = _SCALES[rawmode]
    levels = 255 // scale + 1
    return np.asarray(image) == key % levels * scale


def _wide(image: Image.Image) -> np.ndarray:
    """(H, W, 3) of an RGB file with 16 bits a sample, of which Pillow keeps the upper eight."""
    from PIL import Image

    stream = image.fp  # type: ignore[attr-defined]
    stream.seek(0)
    data = stream.read()
    with Image.open(io.BytesIO(data)) as twin:
        upper = np.asarray(twin).astype(np.int64)
    with Image.open(io.BytesIO(data)) as twin:
        # Read as if the bytes were the other way round, the lower ones are kept.
        twin.tile = [twin.tile[0]._replace(args="RGB;16L")]
        lower = np.asarray(twin).astype(np.int64)
    return upper * 256 + lower
