"""Charts, drawn by matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

BLUE = "#1f5fa8"
GREY = "#9aa5b1"


def _figure(title: str, width: float, height: float) -> tuple[Any, Any]:
    """(figure, axes); no window system is needed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Any, path: str | Path) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without the date and the version of matplotlib: equal data makes an equal file.
    figure.savefig(path, metadata={"Software": None})


def save_line(
    x: Sequence[float],
    y: Sequence[float],
    path: str | Path,
    title: str,
    x_label: str,
    y_label: str,
) -> None:
    """A line chart of y over x. ValueError with fewer than two points."""
    save_lines({"": (x, y)}, path, title, x_label, y_label)


def save_lines(
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    path: str | Path,
    title: str,
    x_label: str,
    y_label: str,
) -> None:
    """A chart of several lines, {name: (x, y)}; one alone has no legend. ValueError where one has
    fewer than two points."""
    figure, axes = _figure(title, 8, 4)
    for name, (x, y) in lines.items():
        if len(x) < 2:
            raise ValueError(f"{title}: a chart needs two points, got {len(x)}")
        only = {"color": BLUE} if len(lines) == 1 else {}
        axes.plot(x, y, label=name, **only)
    if len(lines) > 1:
        axes.legend(frameon=False)
    axes.grid(axis="y", alpha=0.3)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.margins(x=0)
    _save(figure, path)


def save_bars(
    names: Sequence[str],
    values: Sequence[float],
    path: str | Path,
    title: str,
    label: str,
    highlighted: Sequence[bool],
    logarithmic: bool = False,
) -> None:
    """Horizontal bars, the first on top. highlighted: which ones are in colour."""
    figure, axes = _figure(title, 8, 0.9 + 0.33 * len(names))
    colours = [BLUE if chosen else GREY for chosen in highlighted]
    bars = axes.barh(names, values, color=colours)
    axes.bar_label(bars, labels=[f" {value:,.0f}" for value in values])
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.spines["left"].set_visible(False)
    axes.tick_params(left=False)
    if logarithmic:
        axes.set_xscale("log")
    else:
        axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.margins(x=0.12)
    _save(figure, path)
