"""How the time of a step grows: the page and the chart of what bench/growth.py has measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from heptapod_fast.reports.charts import save_growth
from heptapod_fast.reports.tables import table

FILES = "growth-*.json"
PAGE = "growth.md"
# How a page begins that may be overwritten.
MADE_HERE = "# How the time of a training step grows\n\nMade by `python tools/report.py"
ABOUT = f"""{MADE_HERE} bench/results` from
the files of `bench/growth.py`. One small network, of which one thing is varied at a time while the
others stay as they are; whole optimizer steps on synthetic tokens, one core for each rank, all
points in turns. "Time per FLOP" is the time of an image over its count of FLOPs, relative to the
first row of the table: 1 is a step whose time grows as the count does, less than 1 one that comes
to use the machine better, more one that spends time on what the count leaves out. The count is
that of `--dry-run`: products only, causal attention by half. Of several ranks it is the FLOPs of
one: 1 is perfect scaling.
"""


def report_growth(folder: Path) -> list[Path]:
    """growth.md in `folder`, with tables and a chart for each file of bench/growth.py there.

    Returns:
        The files written; [] where there is nothing to report.
    """
    parts = [ABOUT.rstrip()]
    written = []
    for path in sorted(folder.glob(FILES)):
        data = json.loads(path.read_text())
        chart = path.with_suffix(".png")
        sweeps = sweeps_of(data)
        save_growth({name: points_of(rows) for name, rows in sweeps.items()}, chart)
        parts += [title_of(path, data), f"![time per FLOP]({chart.name})"]
        parts += [sweep_table(name, rows) for name, rows in sweeps.items()]
        written.append(chart)
    if not written:
        return []
    page = folder / PAGE
    page.write_text("\n\n".join(parts) + "\n")
    return [page, *written]


def sweeps_of(data: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The rows of a file by what is varied, in its order."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in data["benchmarks"]:
        found.setdefault(row["group"], []).append(row)
    return found


def points_of(rows: list[dict[str, Any]]) -> list[tuple[float, float, float, float]]:
    """(what is varied, time per FLOP, its lower and its upper quartile) of every row."""
    found = []
    for row in rows:
        notes = row["extra_info"]
        low, high = notes["time per FLOP, quartiles"]
        found.append((notes["value"], notes["time per FLOP"], low, high))
    return found


def title_of(path: Path, data: Mapping[str, Any]) -> str:
    """Where a file was measured, and how."""
    about = data["machine_info"]
    network = ", ".join(f"{name} {value}" for name, value in about["network"].items())
    return (
        f"**{path.stem}**: {about['device']}, {about['cores']} cores, Python "
        f"{about['python_version']}, torch {about['torch']}; {data['datetime'][:10]}; "
        f"`{about['command']}`\n\nThe network: {network}."
    )


def sweep_table(name: str, rows: list[dict[str, Any]]) -> str:
    """Markdown of one sweep."""
    cells = []
    for row in rows:
        notes = row["extra_info"]
        cells.append(
            [
                row["name"],
                1e3 * row["stats"]["median"],
                notes["us an image"],
                notes["us an image, quartiles"],
                notes["MFLOP an image"],
                notes["time per FLOP"],
                notes["time per FLOP, quartiles"],
            ]
        )
    head = [name, "ms a step", "us an image", "quartiles", "MFLOP an image", "time per FLOP"]
    return table([*head, "quartiles"], cells, numbers=[1, 2, 4, 5])
