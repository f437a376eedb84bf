"""The table that comes of a plan's runs: Markdown, JSON and a chart, of what is there so far."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from heptapod_fast.ablations.plan import Ablation, Plan, Row
from heptapod_fast.ablations.running import jobs_of, results_of
from heptapod_fast.reports.charts import save_spreads
from heptapod_fast.reports.tables import show, table
from heptapod_fast.storage import write_json

PAGE, NUMBERS, CHART = "table.md", "table.json", "chart.png"
ALIKE = 0.02  # by which what is compared may differ without a word
# What of an evaluation stands in the table, in this order: (key, column, whether more is better).
COLUMNS = (
    ("relation_accuracy", "relation", True),
    ("sign_clarity", "signs", True),
    ("symmetry_accuracy", "symmetry", True),
    ("fid", "FID", False),
    ("inception_score", "IS", True),
    ("precision", "precision", True),
    ("recall", "recall", True),
    ("held_out_loss", "held-out loss", False),
    ("probe_accuracy", "probe", True),
    ("attention_distance", "attention distance", True),
)


def write_table(ablation: Ablation, plan: Plan, out: Path, say: Any) -> list[Path]:
    """table.md, table.json and chart.png in OUT; what is missing of the runs is said in them.

    Returns:
        The files written.
    """
    numbers = collected(plan, out)
    write_json(out / NUMBERS, {"plan": plan.name, "equal": plan.equal, "rows": numbers})
    shown = [column for column in COLUMNS if any(column[0] in row["mean"] for row in numbers)]
    page = [f"# {ablation.title}", ablation.about, _table(ablation, plan, numbers, shown)]
    page += differences(plan)
    missing = [row["name"] for row in numbers if len(row["seeds"]) < len(plan.seeds)]
    if missing:
        page.append(f"Not all seeds are there yet: {', '.join(missing)}.")
    written = [out / PAGE, out / NUMBERS]
    if shown and all(shown[0][0] in row["mean"] for row in numbers):
        save_chart(ablation, plan, numbers, shown[0], out / CHART)
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


def _table(
    ablation: Ablation,
    plan: Plan,
    numbers: list[dict[str, Any]],
    shown: list[tuple[str, str, bool]],
) -> str:
    head = ["", "parameters", "GFLOP an image", "images"]
    head += [name for _, name, _ in shown]
    head += [f"paper: {name}" for name in ablation.paper_columns]
    rows = []
    for row in numbers:
        cells = [
            row["name"],
            f"{row['parameters'] / 1e6:.3g} M",
            f"{row['flops_per_image'] / 1e9:.3g}",
            f"{row['images']:,}",
        ]
        cells += [with_spread(row, key) for key, _, _ in shown]
        paper = [show(value) for value in row["paper"]]
        cells += paper + [""] * (len(ablation.paper_columns) - len(paper))
        rows.append(cells)
    return table(head, rows, numbers=range(1, len(head)))


def with_spread(row: dict[str, Any], key: str) -> str:
    """Mean and deviation; empty where nothing was measured."""
    mean = row["mean"].get(key)
    if mean is None:
        return ""
    spread = row["deviation"][key]
    return show(mean) if spread is None else f"{show(mean)} ± {spread:.2g}"


def differences(plan: Plan) -> list[str]:
    """What is not alike within `ALIKE` among the rows that are trained, in words."""
    first, *others = plan.trained
    found = []
    for name, of in (
        ("parameters", lambda row: row.parameters),
        ("FLOPs of an image", lambda row: row.flops),
        ("compute of a run", lambda row: row.flops * row.images),
    ):
        ratios = {row.variant.name: of(row) / of(first) for row in others}
        apart = {row: ratio for row, ratio in ratios.items() if abs(ratio - 1) > ALIKE}
        if apart:
            said = ", ".join(f"{row} {ratio:.2f}" for row, ratio in apart.items())
            found.append(f"Not alike: {name}, {first.variant.name} = 1: {said}.")
    return found


def save_chart(
    ablation: Ablation,
    plan: Plan,
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
