"""Decoders by name, and what can be learned from a file's header alone."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from heptapod_fast.data.dali import DaliDecoder
from heptapod_fast.data.entries import Readable
from heptapod_fast.data.files import PREPROCESSING
from heptapod_fast.data.pixels import Decoder, decode_with_pillow, read

if TYPE_CHECKING:
    import torch
    from PIL import Image

_BLOCK = 4096  # files looked at together


class PillowDecoder:
    """The reference, in worker threads (default: one for each CPU core)."""

    def __init__(self, workers: int | None = None) -> None:
        import PIL

        self.preprocessing = f"{PREPROCESSING}/pillow-{PIL.__version__}"
        self._pool = ThreadPoolExecutor(workers or os.cpu_count() or 1)

    def decode(self, files: Sequence[Readable], out: np.ndarray) -> list[str | None]:
        """See `Decoder.decode`."""
        return list(self._pool.map(decode_with_pillow, files, out))


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
        name = "dali" if _dali_is_installed() else "pillow"
    if name == "pillow":
        return PillowDecoder(workers)
    try:
        return DaliDecoder(device, workers)
    except ImportError as error:
        raise ValueError(f"--decoder dali: {error}") from error


def _dali_is_installed() -> bool:
    # Without its parent package, find_spec raises instead of answering.
    if importlib.util.find_spec("nvidia") is None:
        return False
    return importlib.util.find_spec("nvidia.dali") is not None


def read_sizes(
    files: Sequence[Readable], progress: Callable[[int, int], None] | None = None
) -> list[tuple[int, int] | str]:
    """(width, height) of every file, from its header alone, or why it cannot be read."""

    def size(image: Image.Image) -> tuple[int, int]:
        return image.size

    found: list[tuple[int, int] | str] = []
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for start in range(0, len(files), _BLOCK):
            found += pool.map(partial(read, use=size), files[start : start + _BLOCK])
            if progress is not None:
                progress(len(found), len(files))
    return found
