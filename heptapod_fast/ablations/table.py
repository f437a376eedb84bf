"""The table that comes of a plan's runs: Markdown, JSON and a chart, of what is there so far."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from heptapod_fast.ablations.plan import Ablation, Plan, Row
from heptapod_fast.ablations.running import Job, jobs_of, points_of, records_of, results_of
from heptapod_fast.reports.compared import KEYS, compared_parts, save_compared_chart
from heptapod_fast.storage import write_json
from heptapod_fast.train.records import Record

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
        "x_label": ablation.x_label,
        "apart": list(ablation.apart),
        "command": plan.command,
        "begun": plan.begun,
        "rows": rows,
    }
    write_json(out / NUMBERS, data)
    page = [f"# {ablation.title}", ablation.about, *compared_parts(data)]
    written = [out / PAGE, out / NUMBERS]
    if save_compared_chart(data, out / CHART):
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
        for key in KEYS:
            values = [numbers[key] for numbers in results.values() if numbers.get(key) is not None]
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
                "seconds": mean_seconds([job for job in jobs if job.row is source]),
                "seeds": list(results),
                "values": by_key,
                "mean": {key: statistics.fmean(values) for key, values in by_key.items()},
                "deviation": {key: deviation(values) for key, values in by_key.items()},
                "curve": curve_of(jobs, row),
                "of_classes": of_classes(list(results.values())),
                "devices": sorted({machine_of(numbers) for numbers in results.values()}),
            }
        )
    return found


def mean_seconds(jobs: Sequence[Job]) -> float | None:
    """Of the optimizer steps of a run; None before they are there."""
    found = []
    for job in jobs:
        seconds = [record.get("step_seconds", 0.0) for record in records_of(job)]
        if seconds:
            found.append(sum(seconds))
    return statistics.fmean(found) if found else None


def of_classes(results: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Means over the seeds of numbers of single classes, {number: {class: mean}}; in evaluations
    they are called number/class."""
    found: dict[str, dict[str, float]] = {}
    first = results[0] if results else {}
    for name in first:
        key, _, of = name.partition("/")
        if of and all(isinstance(numbers.get(name), float) for numbers in results):
            mean = statistics.fmean(numbers[name] for numbers in results)
            found.setdefault(key, {})[of] = mean
    return found


def machine_of(numbers: dict[str, Any]) -> str:
    """Where a row was measured."""
    return f"{numbers['device']}, torch {numbers['torch']}"


def curve_of(jobs: Sequence[Job], row: Row) -> list[dict[str, Any]]:
    """The numbers of a row while it trains, [{"images": ..., key: [one of each seed]}], end last;
    [] where they were taken at the end alone."""
    of_seeds = [points_of(job, row) for job in jobs if row in job.sampled]
    by_images: dict[int, list[Record]] = {}
    for points in of_seeds:
        for point in points:
            by_images.setdefault(point["images"], []).append(point)
    seeds = sum(1 for points in of_seeds if points)  # that are done
    found = []
    for images, points in sorted(by_images.items()):
        values: dict[str, Any] = {"images": images}
        for key in KEYS:
            numbers = [point[key] for point in points if point.get(key) is not None]
            # A point that a seed lacks, as where a metric has failed, is no mean of the seeds.
            if len(numbers) == seeds:
                values[key] = numbers
        if len(values) > 1:
            found.append(values)
    return found if len(found) > 1 else []


def trained_row(plan: Plan, row: Row) -> Row:
    """The row whose runs are sampled for this one."""
    if row.variant.of is None:
        return row
    return next(other for other in plan.rows if other.variant.name == row.variant.of)


def deviation(values: Sequence[float]) -> float | None:
    """Of several, of the sample; None of one."""
    return statistics.stdev(values) if len(values) > 1 else None
