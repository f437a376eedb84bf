"""SAR's groups and masks as the code makes them: the picture of docs/sar.md.

python -m heptapod_fast.reports.groups docs/images/sar.png [--side 6]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from heptapod_fast.grid import GROUPINGS, Groups
from heptapod_fast.ops import AttentionMask
from heptapod_fast.ops.masks import group_mask, two_stream_mask


def save_groups(path: str | Path, side: int) -> None:
    """Every grouping of a grid of side x side tokens, and below it who sees whom in training."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 7.4), dpi=110, layout="constrained")
    panels = figure.subplots(2, len(GROUPINGS))
    for column, (name, make) in enumerate(GROUPINGS.items()):
        groups = make(side, side)
        _draw_groups(panels[0, column], name, groups)
        _draw_mask(panels[1, column], groups)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})


def _draw_groups(axes: Any, name: str, groups: Groups) -> None:
    """The number of its group in every cell."""
    group_HW = groups.group_N.view(groups.height, groups.width)
    axes.imshow(group_HW, cmap="viridis")
    last = len(groups.sizes) - 1
    for row in range(groups.height):
        for column in range(groups.width):
            number = int(group_HW[row, column])
            is_dark = number < last / 2
            color = "white" if is_dark else "black"
            axes.text(column, row, str(number + 1), ha="center", va="center", color=color)
    axes.set_title(f"{name}, {len(groups.sizes)} steps", loc="left")
    axes.set_xticks([])
    axes.set_yticks([])


def _draw_mask(axes: Any, groups: Groups) -> None:
    """Queries down, keys across; dark: seen."""
    can_shift = len(set(groups.sizes)) == 1
    if can_shift:
        mask: AttentionMask = group_mask(list(groups.sizes))
        title = "one stream (shift)"
    else:
        mask = two_stream_mask(list(groups.sizes), 1, has_last_context=False)
        title = "class and context | generation"
    seen_NM = mask.dense_NM.to(torch.float32)
    axes.imshow(seen_NM, cmap="Greys", vmin=0, vmax=1.3, interpolation="nearest")
    if not can_shift:
        context = len(seen_NM) - len(groups.order_N)
        axes.axhline(context - 0.5, color="tab:red", linewidth=1)
        axes.axvline(context - 0.5, color="tab:red", linewidth=1)
    axes.set_title(title, loc="left")
    axes.set_xlabel("keys")
    axes.set_ylabel("queries")
    axes.set_xticks([])
    axes.set_yticks([])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", help="PNG file to write")
    parser.add_argument("--side", type=int, default=6, help="side of the grid")
    options = parser.parse_args()
    save_groups(options.path, options.side)
    print(f"written: {options.path}")


if __name__ == "__main__":
    main()
