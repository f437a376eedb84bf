"""Grids of images, written as PNG."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from torch import Tensor

from heptapod_fast.tokenizers.base import to_uint8


def grid_of(images: Tensor, columns: int, gap: int = 2, least_side: int = 96) -> Tensor:
    """(B, 3, H, W) in [-1, 1] -> uint8 (height, width, 3); see `grid_of_pixels`."""
    return grid_of_pixels(to_uint8(images).cpu(), columns, gap, least_side)


def grid_of_pixels(pixels: Tensor, columns: int, gap: int = 2, least_side: int = 96) -> Tensor:
    """(B, 3, H, W) uint8 -> uint8 (height, width, 3) with `columns` images a row.

    Small images are enlarged by a whole factor until they measure `least_side` pixels.
    """
    factor = max(1, -(-least_side // pixels.shape[-1]))
    pixels = pixels.repeat_interleave(factor, -1).repeat_interleave(factor, -2)
    rows = -(-len(pixels) // columns)
    height = pixels.shape[-2] + gap
    width = pixels.shape[-1] + gap
    sheet = torch.full((3, rows * height + gap, columns * width + gap), 255, dtype=torch.uint8)
    for number, image in enumerate(pixels):
        row, column = divmod(number, columns)
        top = row * height + gap
        left = column * width + gap
        sheet[:, top : top + image.shape[-2], left : left + image.shape[-1]] = image
    return sheet.permute(1, 2, 0).contiguous()


def save_png(pixels: Tensor, path: str | Path) -> None:
    """uint8 (height, width, 3) -> a PNG file, whole or not there."""
    from PIL import Image

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        Image.fromarray(pixels.numpy()).save(temporary, format="PNG")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def png_bytes(pixels: Tensor) -> bytes:
    """uint8 (height, width, 3) -> a PNG file's bytes."""
    from PIL import Image

    data = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(data, format="PNG")
    return data.getvalue()


def save_grid(images: Tensor, path: str | Path, columns: int) -> None:
    """(B, 3, H, W) in [-1, 1] -> a PNG grid."""
    save_png(grid_of(images, columns), path)
