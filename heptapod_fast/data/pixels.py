"""Image files to square pixels with Pillow: the definition of what an image of a set looks like.

Every decoder builds on it (`decoding.py`, `dali.py`). Pillow is imported where it is used, so that
training on tokens needs no image library.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, BinaryIO, Protocol, TypeVar

import numpy as np

from heptapod_fast.data import png
from heptapod_fast.data.entries import Readable

if TYPE_CHECKING:
    from PIL import Image
    from PIL.ImageFile import ImageFile

Result = TypeVar("Result")

# Errors of the machine, not of a file: no image may be left out for them.
_MACHINE = {
    errno.EIO,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.EINTR,
    errno.EAGAIN,
    errno.ENXIO,
    errno.ENODEV,
    errno.EHOSTDOWN,
}


class Decoder(Protocol):
    """Image files to pixels, several at a time.

    Attributes:
        preprocessing: names everything that the pixels depend on, the decoder included.
    """

    preprocessing: str

    def decode(self, files: Sequence[Readable], out: np.ndarray) -> list[str | None]:
        """Fills out, (n, 3, S, S) uint8, RGB; returns for every file None or the reason why it
        cannot be read, whose row is left alone. A file's pixels do not depend on the others."""
        ...


def read(file: Readable, use: Callable[[ImageFile], Result]) -> Result | str:
    """use(image), or a string, the reason why the file cannot be read.

    Raises:
        OSError, MemoryError: the machine failed, not the file (no memory, too many open files, an
            input/output error), or the file is gone since its folder was listed.
    """
    try:
        with file.open("rb") as stream:
            if stream.seek(0, os.SEEK_END) == 0:
                return "the file is empty (0 bytes)"
            found = _read_stream(stream, use)
            if isinstance(found, str) and (pixels_alone := png.without_metadata(stream)):
                # Pillow refuses a PNG for its metadata: large, or damaged. Pixels decide.
                found = _read_stream(pixels_alone, use)
            return found
    except OSError as error:
        is_gone = error.errno == errno.ENOENT and not os.path.lexists(error.filename or "")
        if is_gone or error.errno in _MACHINE:
            raise
        return f"{type(error).__name__}: {error}"
    except ValueError as error:  # of an archive that is damaged at this file
        return str(error)


def _read_stream(stream: BinaryIO, use: Callable[[ImageFile], Result]) -> Result | str:
    from PIL import Image, UnidentifiedImageError

    stream.seek(0)
    try:
        with Image.open(stream) as image:
            return use(image)
    except UnidentifiedImageError:
        return "not an image that Pillow knows"
    except Image.DecompressionBombError as error:
        return f"too many pixels: {error}"
    except MemoryError:
        raise
    except OSError as error:
        if error.errno in _MACHINE:
            raise
        return f"{type(error).__name__}: {error}"
    # Decoders answer damaged files with many kinds of exception; none may end a run of thousands.
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def crop_pixels(image: Image.Image, size: int) -> np.ndarray:
    """(3, size, size) uint8."""
    return np.asarray(centre_crop(to_rgb(image), size)).transpose(2, 0, 1)


def decode_with_pillow(file: Readable, row: np.ndarray) -> str | None:
    """Fills row, (3, S, S) uint8; returns None, or why the file cannot be read."""

    def fill(image: Image.Image) -> None:
        row[...] = crop_pixels(image, row.shape[-1])

    return read(file, fill)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any image that Pillow opens -> mode RGB, 8 bits; transparency lies over white.

    Raises:
        ValueError: pixels without an agreed range (32-bit integers above 65535, floating point).
    """
    from PIL import Image

    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range; convert the file to 8 bits")
    see_through = png.transparent_pixels(image)
    if see_through is not None:
        # What follows is told nothing of a colour that Pillow may look for in vain.
        del image.info["transparency"]
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow's own conversion clips these at 255 instead of scaling them.
        deep = np.asarray(image).astype(np.int64)
        if deep.min() < 0 or deep.max() > 65535:
            raise ValueError(
                f"integer pixels of {deep.min()}..{deep.max()} have no agreed range; "
                "convert the file to 8 or 16 bits"
            )
        image = Image.fromarray(((deep + 128) // 257).astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    image = image.convert("RGB")
    if see_through is not None:
        image.paste("white", mask=Image.fromarray(see_through))
    return image


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """The preprocessing of ADM (Dhariwal and Nichol 2021, guided-diffusion's `image_datasets.py`).

    Halves the image with a box filter while its shorter side is at least 2 * size, resizes it
    bicubically so that the shorter side is size, and cuts out the centre, size x size.
    """
    from PIL.Image import Resampling

    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Resampling.BOX)
    scale = size / min(image.size)
    resized = (round(image.width * scale), round(image.height * scale))
    image = image.resize(resized, Resampling.BICUBIC)
    left = (image.width - size) // 2
    top = (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))
