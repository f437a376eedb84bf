"""Grids of images and simple charts, written as PNG."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from heptapod_fast.tokenizers.base import to_uint8


def grid_of(images: Tensor, columns: int, gap: int = 2, least_side: int = 96) -> Tensor:
    """(B, 3, H, W) in [-1, 1] -> uint8 (height, width, 3) with `columns` images a row.

    Small images are enlarged by a whole factor until they measure `least_side` pixels.
    """
    pixels = to_uint8(images).cpu()
    factor = max(1, -(-least_side // pixels.shape[-1]))
    pixels = pixels.repeat_interleave(factor, -1).repeat_interleave(factor, -2)
    rows = -(-len(pixels) // columns)
    height, width = pixels.shape[-2] + gap, pixels.shape[-1] + gap
    sheet = torch.full((3, rows * height + gap, columns * width + gap), 255, dtype=torch.uint8)
    for i, image in enumerate(pixels):
        top, left = i // columns * height + gap, i % columns * width + gap
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


def save_grid(images: Tensor, path: str | Path, columns: int) -> None:
    """(B, 3, H, W) in [-1, 1] -> a PNG grid."""
    save_png(grid_of(images, columns), path)


def save_chart(
    x: list[float], y: list[float], path: str | Path, title: str, x_label: str, y_label: str
) -> None:
    """A line chart of y over x, 800 x 400 pixels. ValueError with fewer than two points."""
    from PIL import Image, ImageDraw, ImageFont

    if len(x) < 2:
        raise ValueError(f"{title}: a chart needs two points, got {len(x)}")
    width, height, left, right, top, bottom = 800, 400, 70, 20, 40, 50
    image = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(14)
    low_x, high_x, low_y, high_y = min(x), max(x), min(y), max(y)
    high_x, high_y = max(high_x, low_x + 1e-9), max(high_y, low_y + 1e-9)

    def place(px: float, py: float) -> tuple[float, float]:
        return (
            left + (px - low_x) / (high_x - low_x) * (width - left - right),
            height - bottom - (py - low_y) / (high_y - low_y) * (height - top - bottom),
        )

    for k in range(5):
        px, py = low_x + k / 4 * (high_x - low_x), low_y + k / 4 * (high_y - low_y)
        (tick_x, _), (_, tick_y) = place(px, low_y), place(low_x, py)
        draw.line((left, tick_y, width - right, tick_y), fill="#dddddd")
        draw.text((left - 6, tick_y), f"{py:.3g}", fill="black", font=font, anchor="rm")
        draw.text(
            (tick_x, height - bottom + 6),
            f"{px:,.0f}",
            fill="black",
            font=font,
            anchor="lt" if k == 0 else "rt" if k == 4 else "mt",
        )
    draw.line([place(a, b) for a, b in zip(x, y, strict=True)], fill="#1f5fa8", width=2)
    draw.text((left, 12), title, fill="black", font=font)
    draw.text((width - right, height - 8), x_label, fill="black", font=font, anchor="rb")
    draw.text((left - 6, 12), y_label, fill="black", font=font, anchor="ra")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
