"""Pictures of maps over the grid of tokens, drawn by matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from heptapod_fast.reports.charts import save_figure

RED = "#d62728"
NOTHING = "#d9d9d9"  # where a map says nothing
SIDE = 1.5  # of a panel, in inches


def save_maps(
    pixels: Tensor,
    map_BRN: Tensor,
    positions: Sequence[int],
    grid: int,
    path: str | Path,
    title: str,
    limits: tuple[float, float] | None = None,
) -> None:
    """A row for each image: itself, with the R tokens in red, then their maps, one beside the
    other.

    Args:
        pixels: (B, 3, H, W) uint8.
        map_BRN: a value for each of N = grid x grid tokens; NaN: grey.
        limits: of the colours; None: each map from 0 to its largest value.
    """
    from matplotlib.figure import Figure

    images, references, _ = map_BRN.shape
    size = (SIDE * (references + 1), SIDE * images + 0.4)
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    panels = figure.subplots(images, references + 1, squeeze=False)
    for image, row in enumerate(panels):
        _draw_image(row[0], pixels[image], grid)
        for number, position in enumerate(positions):
            _mark(row[0], position, grid, str(number + 1))
            values = map_BRN[image, number].view(grid, grid)
            _draw_map(row[number + 1], values, limits)
            _mark(row[number + 1], position, grid, str(number + 1))
    save_figure(figure, path)


def _bare(axes: Any) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def _draw_image(axes: Any, pixels: Tensor, grid: int) -> None:
    """In units of tokens, so that what is drawn over it is placed by them."""
    edges = (-0.5, grid - 0.5, grid - 0.5, -0.5)
    axes.imshow(pixels.permute(1, 2, 0).numpy(), extent=edges, interpolation="nearest")
    _bare(axes)


def _draw_map(axes: Any, values: Tensor, limits: tuple[float, float] | None) -> None:
    from matplotlib import colormaps

    colours = colormaps["viridis"].with_extremes(bad=NOTHING)
    if limits is None:
        is_there = ~values.isnan()
        highest = float(values[is_there].max()) if bool(is_there.any()) else 1.0
        limits = (0.0, max(highest, 1e-9))
    axes.imshow(values.numpy(), cmap=colours, vmin=limits[0], vmax=limits[1])
    _bare(axes)


def _mark(axes: Any, position: int, grid: int, name: str) -> None:
    """A red box around a token, with its number."""
    from matplotlib.patches import Rectangle

    row, column = divmod(position, grid)
    corner = (column - 0.5, row - 0.5)
    axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=RED, linewidth=1.5))
    axes.text(column, row, name, color=RED, ha="center", va="center", fontsize=7)
