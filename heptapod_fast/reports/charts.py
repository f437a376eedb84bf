"""Charts, drawn by matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

BLUE = "#1f5fa8"
GREY = "#9aa5b1"
# Parts of a whole, the last one for what is left: what is useful in blue.
PARTS = (BLUE, "#5f9bd6", "#e08a2e", "#8e6bbf", "#3f9c6c", "#c23b4b", GREY)
# Of the whole; narrower parts have no room for a label.
LABELLED = 0.06


PANELS = 4  # side by side


def _figure(title: str, width: float, height: float) -> tuple[Any, Any]:
    """(figure, axes); no window system is needed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save_figure(figure: Any, path: str | Path) -> None:
    """As PNG; equal data makes an equal file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without the date and the version of matplotlib.
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
    save_figure(figure, path)


def save_panels(
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]], path: str | Path, x_label: str
) -> None:
    """A panel for each of several lines, {name: (x, y)}, at most `PANELS` beside each other."""
    from matplotlib.figure import Figure

    columns = min(PANELS, len(lines))
    rows = -(-len(lines) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.8 * rows), dpi=110, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in panels[len(lines) :]:
        axes.set_axis_off()
    for axes, (name, (x, y)) in zip(panels, lines.items(), strict=False):
        axes.plot(x, y, color=BLUE, marker="o", markersize=3)
        axes.set_title(name, loc="left")
        axes.set_xlabel(x_label)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.axhline(0, color=GREY, linewidth=1)  # which sizes are seen from; KID may be below
        axes.grid(axis="y", alpha=0.3)
        axes.tick_params(axis="x", rotation=45)
        axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)


def save_series(
    panels: Mapping[str, Mapping[str, tuple[Sequence[Any], Sequence[float]]]],
    path: str | Path,
    x_label: str = "",
) -> None:
    """A panel for each of several groups of lines, {title: {name: (x, y)}}, at most two beside each
    other. x: numbers, or words that are written below. A line of one value in y is that value all
    along."""
    from matplotlib.figure import Figure

    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.4 * columns, 3.2 * rows), dpi=110, layout="constrained")
    all_axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in all_axes[len(panels) :]:
        axes.set_axis_off()
    for axes, (title, lines) in zip(all_axes, panels.items(), strict=False):
        for name, (x, y) in lines.items():
            if len(y) == 1:
                axes.axhline(y[0], color=GREY, linewidth=1, label=name)
            else:
                axes.plot(x, y, marker="o", markersize=3, label=name)
            if x and isinstance(x[0], str):
                axes.tick_params(axis="x", rotation=90)
        axes.set_title(title, loc="left")
        axes.set_xlabel(x_label)
        axes.grid(axis="y", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if len(lines) > 1:
            axes.legend(frameon=False, fontsize=8)
    save_figure(figure, path)


def save_time_and_rate(
    seconds: Mapping[str, float],
    images: Sequence[float],
    rates: Sequence[float],
    path: str | Path,
    title: str,
) -> bool:
    """A stacked bar of what time went to, and below it images/s over images.

    Args:
        seconds: {what it went to: seconds}, at most as many as PARTS; empty: no bar.
        images, rates: a point each; fewer than two: no line.

    Returns:
        Whether there was anything to draw.
    """
    panels = []
    if sum(seconds.values()) > 0:
        panels.append((0.85, lambda axes: _draw_parts(axes, seconds, title)))
    if len(images) > 1:
        panels.append((2.2, lambda axes: _draw_rates(axes, images, rates)))
    if not panels:
        return False
    from matplotlib.figure import Figure

    heights = [height for height, _ in panels]
    figure = Figure(figsize=(8, 0.6 + 1.4 * sum(heights)), dpi=110, layout="constrained")
    all_axes = figure.subplots(len(panels), squeeze=False, height_ratios=heights)[:, 0]
    for axes, (_, draw) in zip(all_axes, panels, strict=True):
        draw(axes)
    save_figure(figure, path)
    return True


def _draw_parts(axes: Any, seconds: Mapping[str, float], title: str) -> None:
    """One horizontal bar of shares, with a legend below."""
    whole = sum(seconds.values())
    begin = 0.0
    for colour, (name, value) in zip(PARTS, seconds.items(), strict=False):
        part = value / whole
        label = f"{name} {part:.1%}"
        axes.barh([0], [part], left=begin, color=colour, edgecolor="white", label=label)
        if part >= LABELLED:
            middle = begin + part / 2
            axes.text(middle, 0, f"{part:.0%}", ha="center", va="center", color="white")
        begin += part
    axes.set_title(title, loc="left")
    axes.set_xlim(0, 1)
    axes.set_axis_off()
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=4, frameon=False, fontsize=8)


def _draw_rates(axes: Any, images: Sequence[float], rates: Sequence[float]) -> None:
    """Images/s over images, from zero on."""
    axes.plot(images, rates, color=BLUE)
    axes.set_title("images/s of the steps", loc="left")
    axes.set_xlabel("images")
    axes.set_ylabel("images/s")
    axes.set_xlim(0, max(images))
    axes.set_ylim(0, 1.1 * max(max(rates), 1e-9))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


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
    save_figure(figure, path)


def save_spreads(
    values: Mapping[str, Sequence[float]],
    path: str | Path,
    title: str,
    label: str,
    x: Sequence[float] | None = None,
    x_label: str = "",
) -> None:
    """Several values of each name as dots, and their mean: beside the names, or over x."""
    figure, axes = _figure(title, 8, 4 if x is not None else 0.9 + 0.4 * len(values))
    means = [sum(found) / len(found) for found in values.values()]
    if x is not None:
        axes.plot(x, means, color=BLUE)
        for position, found in zip(x, values.values(), strict=True):
            axes.plot([position] * len(found), found, "o", color=BLUE, alpha=0.5, markersize=4)
        axes.set_xticks(list(x), [f"{position:g}" for position in x])
        axes.set_xlabel(x_label)
        axes.set_ylabel(label)
        axes.grid(axis="y", alpha=0.3)
    else:
        rows = range(len(values))
        axes.barh(rows, means, color=GREY, alpha=0.5)
        for row, found in zip(rows, values.values(), strict=True):
            axes.plot(found, [row] * len(found), "o", color=BLUE, markersize=4)
        axes.set_yticks(list(rows), list(values))
        axes.invert_yaxis()
        axes.set_xlabel(label)
    save_figure(figure, path)


def save_growth(
    sweeps: Mapping[str, Sequence[tuple[float, float, float, float]]], path: str | Path
) -> None:
    """A panel for each sweep: time per FLOP over what is varied, with its quartiles.

    sweeps: {what is varied: (its value, time per FLOP, lower quartile, upper quartile) per point}.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3 * len(sweeps), 3), dpi=110, layout="constrained")
    panels = figure.subplots(1, len(sweeps), squeeze=False, sharey=True)[0]
    for axes, (name, points) in zip(panels, sweeps.items(), strict=True):
        values, times, lows, highs = zip(*points, strict=True)
        axes.axhline(1, color=GREY, linewidth=1)
        axes.fill_between(values, lows, highs, color=BLUE, alpha=0.2, linewidth=0)
        axes.plot(values, times, color=BLUE, marker="o")
        axes.set_xscale("log", base=2)
        axes.set_xticks(values, [f"{value:,}" for value in values], rotation=45)
        axes.minorticks_off()
        axes.set_title(name, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("time per FLOP, first point = 1")
    panels[0].set_ylim(bottom=0)
    save_figure(figure, path)
