"""The table that comes of a plan's runs: Markdown, JSON and a chart, of what is there so far."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from heptapod_fast.ablations.plan import Ablation, Plan, Row
from heptapod_fast.ablations.running import jobs_of, results_of
from heptapod_fast.reports.charts import save_spreads
from heptapod_fast.reports.compared import COLUMNS, compared_parts, shown_columns
from heptapod_fast.storage import write_json

PAGE, NUMBERS, CHART = "table.md", "table.json", "chart.png"


def write_table(ablation: Ablation, plan: Plan, out: Path) -> list[Path]:
    """table.md, table.json and chart.png in OUT; what is missing of the runs is said in them.

    Returns:
        The files written.
    """
    rows = collected(plan, out)
    data = {
        "title": ablation.title,
        "about": ablation.about,
        "name": plan.name,
        "equal": plan.equal,
        "seeds": list(plan.seeds),
        "paper_columns": list(ablation.paper_columns),
        "command": plan.command,
        "begun": plan.begun,
        "rows": rows,
    }
    write_json(out / NUMBERS, data)
    page = [f"# {ablation.title}", ablation.about, *compared_parts(data)]
    written = [out / PAGE, out / NUMBERS]
    shown = shown_columns(rows)
    if shown and all(shown[0][0] in row["mean"] for row in rows):
        save_chart(ablation, rows, shown[0], out / CHART)
        page.append(f"![{ablation.title}]({CHART})")
        written.append(out / CHART)
    (out / PAGE).write_text("\n\n".join(page) + "\n")
    return written


def collected(plan: Plan, out: Path) -> list[dict[str, Any]]:
    """For each row its configuration, and mean, deviation and single numbers over the seeds."""
    jobs = jobs_of(plan, out)
    found = []
    for row in plan.rows:
        results = {}
        for job in jobs:
            numbers = results_of(job, row) if row in job.sampled else None
            if numbers is not None:
                results[job.seed] = numbers
        source = trained_row(plan, row)
        by_key: dict[str, list[float]] = {}
        for key, _, _ in COLUMNS:
            values = [numbers[key] for numbers in results.values() if key in numbers]
            if values:
                by_key[key] = values
        found.append(
            {
                "name": row.variant.name,
                "is_trained": row.variant.of is None,
                "flags": dict(row.variant.flags),
                "sampling": dict(row.variant.sampling),
                "x": row.variant.x,
                "paper": list(row.variant.paper),
                "parameters": source.parameters,
                "flops_per_image": source.flops,
                "images": source.images,
                "seconds_planned": source.total_seconds,
                "seeds": list(results),
                "values": by_key,
                "mean": {key: statistics.fmean(values) for key, values in by_key.items()},
                "deviation": {key: deviation(values) for key, values in by_key.items()},
                "device": next((r["device"] for r in results.values()), None),
            }
        )
    return found


def trained_row(plan: Plan, row: Row) -> Row:
    """The row whose runs are sampled for this one."""
    if row.variant.of is None:
        return row
    return next(other for other in plan.rows if other.variant.name == row.variant.of)


def deviation(values: Sequence[float]) -> float | None:
    """Of several, of the sample; None of one."""
    return statistics.stdev(values) if len(values) > 1 else None


def save_chart(
    ablation: Ablation,
    numbers: list[dict[str, Any]],
    column: tuple[str, str, bool],
    path: Path,
) -> None:
    """The first metric, with all seeds."""
    key, name, is_more_better = column
    direction = "more" if is_more_better else "less"
    values = {row["name"]: row["values"][key] for row in numbers}
    positions = [row["x"] for row in numbers]
    has_axis = bool(ablation.x_label) and None not in positions
    save_spreads(
        values,
        path,
        title=ablation.title,
        label=f"{name} ({direction} is better)",
        x=positions if has_axis else None,
        x_label=ablation.x_label,
    )
