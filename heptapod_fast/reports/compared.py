"""Tables of runs that were trained to be compared (heptapod_fast/ablations), from their JSON."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

from heptapod_fast.reports.charts import save_series, save_spreads
from heptapod_fast.reports.tables import show, table

ALIKE = 0.02  # by which what is compared may differ without a word
# What of an evaluation stands in the table, in this order: (key, column, whether more is better;
# None where neither is).
COLUMNS: tuple[tuple[str, str, bool | None], ...] = (
    ("relation_accuracy", "relation", True),
    ("sign_clarity", "signs", True),
    ("symmetry_accuracy", "symmetry", True),
    ("fid", "FID", False),
    ("inception_score", "IS", True),
    ("precision", "precision", True),
    ("recall", "recall", True),
    ("held_out_loss", "held-out loss", False),
    ("probe_accuracy", "probe", True),
    ("attention_distance", "attention distance", None),
)
# What a number is to be held against, which stands behind it: (key, what it is of).
BESIDE = {
    "relation_accuracy": ("relation_by_chance", "chance"),
    "probe_accuracy": ("probe_accuracy_pixels", "pixels"),
    "attention_distance": ("attention_distance_even", "even"),
}
# What curves stand over, by what the rows have alike.
_COSTS = {
    "images": "images",
    "compute": "TFLOP of training",
    "time": "seconds of training",
}
KEYS = (*(key for key, _, _ in COLUMNS), *(key for key, _ in BESIDE.values()))


def shown_columns(data: dict[str, Any]) -> list[tuple[str, str, bool | None]]:
    """Of `COLUMNS` those that any row was measured by, and rows can be compared by."""
    measured = {key for row in data["rows"] for key in row["mean"]}
    return [column for column in COLUMNS if column[0] in measured - set(data["apart"])]


def compared_parts(data: dict[str, Any]) -> list[str]:
    """Markdown: the table, what is not alike, what is missing, and where the numbers come from.

    data: as `ablations.write_table` writes it.
    """
    rows = data["rows"]
    parts = [compared_table(data), *differences(data)]
    missing = [row["name"] for row in rows if len(row["seeds"]) < len(data["seeds"])]
    if missing:
        parts.append(f"Not all seeds are there yet: {', '.join(missing)}.")
    count = len(data["seeds"])
    seeds = "one seed" if count == 1 else f"mean ± deviation of {count} seeds"
    devices = sorted({device for row in rows for device in row["devices"]}) or ["no run yet"]
    parts.append(f"*{seeds}; `{data['command']}`, begun {data['begun']}, {'; '.join(devices)}.*")
    return parts


def compared_table(data: dict[str, Any]) -> str:
    """A row for each configuration: what it costs, what was measured, what a paper has."""
    rows, paper_columns = data["rows"], data["paper_columns"]
    shown = shown_columns(data)
    of_time = ["ms an image", "seconds"] if data["equal"] == "time" else []
    head = ["", "parameters", "GFLOP an image", "images", *of_time]
    head += [name for _, name, _ in shown]
    head += [f"paper: {name}" for name in paper_columns]
    lines = []
    for row in rows:
        cells = [
            row["name"],
            f"{row['parameters'] / 1e6:.3g} M",
            f"{row['flops_per_image'] / 1e9:.3g}",
            f"{row['images']:,}",
        ]
        seconds = row["seconds"]
        if of_time and seconds is not None:
            cells += [show(1e3 * seconds / row["images"]), show(seconds)]
        elif of_time:
            cells += ["", ""]
        cells += [with_spread(row, key) for key, _, _ in shown]
        paper = [show(value) for value in row["paper"]]
        cells += paper + [""] * (len(paper_columns) - len(paper))
        lines.append(cells)
    return table(head, lines, numbers=range(1, len(head)))


def save_compared_chart(data: dict[str, Any], path: Path) -> bool:
    """Curves over training where numbers were taken on the way, else the first metric of all rows
    with its seeds.

    Returns:
        Whether there is a chart: False as long as rows have no numbers.
    """
    rows = data["rows"]
    shown = shown_columns(data)
    if not shown or any(shown[0][0] not in row["mean"] for row in rows):
        return False
    if all(row["curve"] for row in rows if row["is_trained"]):
        _save_curves(data, path)
        return True
    key, name, is_more_better = shown[0]
    positions = [row["x"] for row in rows]
    has_axis = bool(data["x_label"]) and None not in positions
    save_spreads(
        {row["name"]: row["values"][key] for row in rows},
        path,
        title=data["title"],
        label=_with_direction(name, is_more_better),
        x=positions if has_axis else None,
        x_label=data["x_label"],
    )
    return True


def _save_curves(data: dict[str, Any], path: Path) -> None:
    """A panel for each metric, its mean over the seeds; over images, or over what they cost."""
    rows = [row for row in data["rows"] if row["is_trained"]]
    panels = {}
    for key, name, is_more_better in shown_columns(data):
        lines = {}
        for row in rows:
            points = [point for point in row["curve"] if key in point]
            x = [point["images"] * _cost_of_image(data, row) for point in points]
            lines[row["name"]] = (x, [fmean(point[key]) for point in points])
        panels[_with_direction(name, is_more_better)] = lines
    save_series(panels, path, _COSTS[data["equal"]])


def _cost_of_image(data: dict[str, Any], row: dict[str, Any]) -> float:
    """In units of `_COSTS`."""
    if data["equal"] == "compute":
        return float(row["flops_per_image"]) / 1e12
    if data["equal"] == "time":
        return float(row["seconds"]) / float(row["images"])
    return 1.0


def _with_direction(name: str, is_more_better: bool | None) -> str:
    if is_more_better is None:
        return name
    direction = "more" if is_more_better else "less"
    return f"{name} ({direction} is better)"


def with_spread(row: dict[str, Any], key: str) -> str:
    """Mean and deviation, and what they are to be held against; empty where nothing was
    measured."""
    mean = row["mean"].get(key)
    if mean is None:
        return ""
    text = show(mean)
    spread = row["deviation"][key]
    if spread is not None:
        text += f" ± {spread:.2g}"
    beside, of = BESIDE.get(key, ("", ""))
    if beside in row["mean"]:
        text += f" ({of} {show(row['mean'][beside])})"
    return text


def differences(data: dict[str, Any]) -> list[str]:
    """What differs by more than `ALIKE` from the first row, in words."""
    first, *others = [row for row in data["rows"] if row["is_trained"]]
    compared: list[tuple[str, Callable[[dict[str, Any]], float]]] = [
        ("parameters", lambda row: row["parameters"]),
        ("FLOPs of an image", lambda row: row["flops_per_image"]),
        ("compute of a run", lambda row: row["flops_per_image"] * row["images"]),
    ]
    has_seconds = all(row["seconds"] for row in (first, *others))
    if data["equal"] == "time" and has_seconds:
        compared.append(("seconds of a run", lambda row: row["seconds"]))
    found = []
    for name, of in compared:
        ratios = {row["name"]: of(row) / of(first) for row in others}
        apart = {row: ratio for row, ratio in ratios.items() if abs(ratio - 1) > ALIKE}
        if apart:
            said = ", ".join(f"{row} {ratio:.2f}" for row, ratio in apart.items())
            found.append(f"Not alike: {name}, {first['name']} = 1: {said}.")
    return found
