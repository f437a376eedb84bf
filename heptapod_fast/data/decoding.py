"""Image files to square pixels with Pillow: the definition of what an image of a set looks like."""

from __future__ import annotations

import errno
import importlib.util
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import PIL
from PIL import Image, UnidentifiedImageError

from heptapod_fast.data.files import PREPROCESSING

if TYPE_CHECKING:
    import torch


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
_BLOCK = 4096  # files looked at together


class Decoder(Protocol):
    """Image files to pixels, several at a time.

    Attributes:
        preprocessing: names everything that the pixels depend on, the decoder included.
    """

    preprocessing: str

    def decode(self, paths: Sequence[Path], out: np.ndarray) -> list[str | None]:
        """Fills out, (n, 3, S, S) uint8, RGB; returns for every file None or the reason why it
        cannot be read, whose row is left alone. A file's pixels do not depend on the others."""
        ...


class PillowDecoder:
    """The reference, in worker threads (default: one for each CPU core)."""

    preprocessing = f"{PREPROCESSING}/pillow-{PIL.__version__}"

    def __init__(self, workers: int | None = None) -> None:
        self._pool = ThreadPoolExecutor(workers or os.cpu_count() or 1)

    def decode(self, paths: Sequence[Path], out: np.ndarray) -> list[str | None]:
        """See `Decoder.decode`."""

        def one(path: Path, row: np.ndarray) -> str | None:
            pixels = read(path, partial(crop_pixels, size=out.shape[-1]))
            if isinstance(pixels, str):
                return pixels
            row[...] = pixels
            return None

        return list(self._pool.map(one, paths, out))


def open_decoder(
    name: str, device: torch.device | str = "cpu", workers: int | None = None
) -> Decoder:
    """A decoder by name.

    Args:
        name: pillow, dali, or auto: DALI where it is installed (of photographs it decodes more a
            second than Pillow, see bench/results), else Pillow.
        device: where DALI decodes.
        workers: threads.

    Raises:
        ValueError: DALI was asked for and is not installed, or does not work here.
    """
    if name == "auto":
        nvidia = importlib.util.find_spec("nvidia")
        name = "dali" if nvidia and importlib.util.find_spec("nvidia.dali") else "pillow"
    if name == "pillow":
        return PillowDecoder(workers)
    from heptapod_fast.data.dali import DaliDecoder

    try:
        return DaliDecoder(device, workers)
    except ImportError as error:
        raise ValueError(f"--decoder dali: {error}") from error


def read_sizes(
    paths: Sequence[Path], progress: Callable[[int, int], None] | None = None
) -> list[tuple[int, int] | str]:
    """(width, height) of every file, from its header alone, or why it cannot be read."""
    found: list[tuple[int, int] | str] = []
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for start in range(0, len(paths), _BLOCK):
            found += pool.map(
                partial(read, use=lambda image: image.size), paths[start : start + _BLOCK]
            )
            if progress is not None:
                progress(len(found), len(paths))
    return found


def read(path: Path, use: Callable[[Image.Image], object]) -> object:
    """use(image), or a string, the reason why the file cannot be read.

    Raises:
        OSError, MemoryError: the machine failed, not the file (no memory, too many open files, an
            input/output error), or the file is gone since its folder was listed.
    """
    try:
        if path.stat().st_size == 0:
            return "the file is empty (0 bytes)"
        with Image.open(path) as image:
            return use(image)
    except UnidentifiedImageError:
        return "not an image that Pillow knows"
    except Image.DecompressionBombError as error:
        return f"too many pixels: {error}"
    except MemoryError:
        raise
    except OSError as error:
        if error.errno in _MACHINE or error.errno == errno.ENOENT and not os.path.lexists(path):
            raise
        return f"{type(error).__name__}: {error}"
    # Decoders answer damaged files with many kinds of exception; none may end a run of thousands.
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def crop_pixels(image: Image.Image, size: int) -> np.ndarray:
    """(3, size, size) uint8."""
    return np.asarray(centre_crop(to_rgb(image), size)).transpose(2, 0, 1)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any image that Pillow opens -> mode RGB, 8 bits; transparency lies over white.

    Raises:
        ValueError: pixels without an agreed range (32-bit integers above 65535, floating point).
    """
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range; convert the file to 8 bits")
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
    return image.convert("RGB")


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """The preprocessing of ADM (Dhariwal and Nichol 2021, guided-diffusion's `image_datasets.py`).

    Halves the image with a box filter while its shorter side is at least 2 * size, resizes it
    bicubically so that the shorter side is size, and cuts out the centre, size x size.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize(
        (round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC
    )
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))
