"""Images of which a part is given: which tokens that are, and what they cover.

A system whose order is random has seen every set of tokens before every other token. So it goes on
from any part of an image: what is given comes first in the order, the rest is drawn after it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from heptapod_fast.tokenizers import TokenSpec


class Given(NamedTuple):
    """Tokens that are there already.

    tokens_BN: in raster order, (B, N) int64 or (B, N, C) float32; those that are not known are not
        read.
    known_N: (N,) bool, the same positions in every sequence: at least one, and not all.
    """

    tokens_BN: Tensor
    known_N: Tensor

    def check(self, spec: TokenSpec, batch: int) -> None:
        """ValueError unless these are tokens of so many sequences."""
        tokens = self.tokens_BN
        shape: tuple[int, ...] = (batch, spec.num_tokens)
        if spec.kind == "continuous":
            shape = (*shape, spec.channels)
        if tokens.shape != shape:
            raise ValueError(f"given tokens are {tuple(tokens.shape)}, expected {shape}")
        if self.known_N.shape != (spec.num_tokens,) or self.known_N.dtype != torch.bool:
            raise ValueError(
                f"known tokens are {self.known_N.dtype} {tuple(self.known_N.shape)}, expected "
                f"bool ({spec.num_tokens},)"
            )
        if not 0 < self.num_known < spec.num_tokens:
            raise ValueError(
                f"{self.num_known} of {spec.num_tokens} tokens are given: expected some, and some "
                "left to draw"
            )
        if spec.kind == "discrete" and not _in_range(tokens[:, self.known_N], spec.vocabulary):
            raise ValueError(f"given codes: expected 0 to {spec.vocabulary - 1}")

    @property
    def num_known(self) -> int:
        """Of a sequence's tokens."""
        return int(self.known_N.sum())


def _in_range(codes: Tensor, vocabulary: int) -> bool:
    return bool(((codes >= 0) & (codes < vocabulary)).all())


# ----------------------------------------------------------------------------------- what is given


def _is_central(row: Tensor, column: Tensor, grid: int) -> Tensor:
    """The middle half of rows and columns, but not the outermost."""
    first = max(1, grid // 4)
    last = grid - first
    return (row >= first) & (row < last) & (column >= first) & (column < last)


# {name: which positions it gives, from every position's row and column, each (grid, grid)}
PARTS: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "left-half": lambda row, column, grid: column < grid // 2,
    "right-half": lambda row, column, grid: column >= grid // 2,
    "top-half": lambda row, column, grid: row < grid // 2,
    "bottom-half": lambda row, column, grid: row >= grid // 2,
    "centre": _is_central,
    "border": lambda row, column, grid: ~_is_central(row, column, grid),
}
KEEPS = tuple(PARTS)


def known_tokens(keep: str, spec: TokenSpec, image_size: int) -> Tensor:
    """(N,) bool: the tokens that `keep` says are given.

    Args:
        keep: one of KEEPS, or an image file, white where the image is given: of a pixel for every
            token, or of the images' size, where a token is given if all of its area is.

    Raises:
        ValueError: no such file, a mask of another size, or one that gives all tokens or none.
    """
    grid = spec.grid
    if keep in PARTS:
        places = torch.arange(grid)
        row, column = torch.meshgrid(places, places, indexing="ij")
        known = PARTS[keep](row, column, grid)
    else:
        known = _read_mask(keep, grid, image_size)
    count = int(known.sum())
    if not 0 < count < spec.num_tokens:
        raise ValueError(
            f"--keep {keep} gives {count} of the {spec.num_tokens} tokens: expected some, and some "
            "left to draw"
        )
    return known.flatten()


def _read_mask(path: str, grid: int, image_size: int) -> Tensor:
    """(grid, grid) bool."""
    from PIL import Image, UnidentifiedImageError

    expected = (
        f"expected {', '.join(KEEPS)}, or an image, white where the images are given, of "
        f"{grid} x {grid} pixels (a pixel for each token) or {image_size} x {image_size}"
    )
    if not Path(path).is_file():
        raise ValueError(f"--keep {path}: no such file; {expected}")
    try:
        with Image.open(path) as image:
            values = torch.tensor(list(image.convert("L").tobytes())).view(image.height, -1)
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"--keep {path}: not an image ({error}); {expected}") from None
    white = values >= 128
    if values.shape == (grid, grid):
        return white
    if values.shape == (image_size, image_size):
        side = image_size // grid
        return white.view(grid, side, grid, side).all(3).all(1)
    height, width = values.shape
    raise ValueError(f"--keep {path} has {width} x {height} pixels; {expected}")


def area_of(known_N: Tensor, image_size: int) -> Tensor:
    """The pixels of the known tokens, (H, W) bool."""
    grid = round(len(known_N) ** 0.5)
    side = image_size // grid
    known = known_N.view(grid, grid)
    return known.repeat_interleave(side, 0).repeat_interleave(side, 1)


GREY = 128


def beside_each_other(originals: Tensor, completed: Tensor, area_HW: Tensor) -> Tensor:
    """For a grid of 3 columns: what was given, what came out, what the rest of it was.

    originals, completed: (B, 3, H, W) uint8 -> (3 B, 3, H, W).
    """
    given = torch.where(area_HW, originals, torch.full_like(originals, GREY))
    return torch.stack((given, completed, originals), dim=1).flatten(0, 1)
