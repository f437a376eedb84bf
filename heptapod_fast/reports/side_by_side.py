"""Several training runs beside one another: a table, and their losses over images and over time."""

from __future__ import annotations

import json
from itertools import accumulate
from pathlib import Path
from typing import Any

from heptapod_fast.reports.charts import save_lines
from heptapod_fast.reports.run import losses_at, losses_of, report_run
from heptapod_fast.reports.tables import table
from heptapod_fast.reports.throughput import known
from heptapod_fast.runs import RunDir
from heptapod_fast.train.records import Record

POINTS = 4  # of the images that all runs have seen, at which losses are compared
# What an evaluation says besides its metrics.
NO_METRICS = ("sampling_seconds",)


def report_runs(folders: list[Path], out: Path) -> list[Path]:
    """Report on each run, and write runs.md, runs.json and charts of the losses to OUT.

    Returns:
        The pages written.

    Raises:
        ValueError: a run has logged nothing, or is named twice.
        RunError: a folder is no run directory.
    """
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ValueError("a run is named twice")
    pages = [report_run(folder) for folder in folders]
    names = names_of(folders)
    numbers = [json.loads((folder / "report.json").read_text()) for folder in folders]
    records = [losses_of(RunDir(folder)) for folder in folders]
    points = common_points(records)
    runs = {
        name: report | {"losses": losses_at(found, points)}
        for name, report, found in zip(names, numbers, records, strict=True)
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "runs.json").write_text(json.dumps(runs, indent=1) + "\n")
    charts = draw(dict(zip(names, records, strict=True)), out)
    page = out / "runs.md"
    shown = [f"![{chart.stem}]({chart.name})" for chart in charts]
    page.write_text("\n\n".join(["# Runs", runs_table(runs, points), *shown]) + "\n")
    return [*pages, page]


def names_of(folders: list[Path]) -> list[str]:
    """Names of the folders, whole paths where two have the same."""
    short = [folder.name for folder in folders]
    return short if len(set(short)) == len(short) else [str(folder) for folder in folders]


def common_points(records: list[list[Record]]) -> list[int]:
    """Numbers of images that every run has seen: quarters of what the shortest has."""
    shortest = min(found[-1]["images"] for found in records)
    return [shortest * point // POINTS for point in range(1, POINTS + 1)]


def runs_table(runs: dict[str, dict[str, Any]], points: list[int]) -> str:
    """A row for each run; metrics are those that any run was evaluated by."""
    metrics: dict[str, None] = {}
    for report in runs.values():
        metrics |= dict.fromkeys(metrics_of(report))
    rows = []
    for name, report in runs.items():
        speed = report.get("images_per_second_of_phases", report["images_per_second_median"])
        found = metrics_of(report)
        rows.append(
            [
                name,
                f"{report['system']} {report['size']}",
                report["settings"],
                report["images"],
                report.get("training_seconds"),
                speed,
                known(report, "mfu_median"),
                known(report, "goodput"),
                known(report, "memory_peak_gb"),
                *report["losses"].values(),
                *(found.get(metric) for metric in metrics),
            ]
        )
    head = ["run", "system", "beside the defaults", "images", "seconds of steps", "images/s"]
    head += ["MFU", "goodput", "memory peak GB"]
    head += [f"loss at {point:,}" for point in points]
    head += [metric.replace("_", " ") for metric in metrics]
    return table(head, rows, numbers=range(3, len(head)))


def metrics_of(report: dict[str, Any]) -> dict[str, float]:
    """The evaluation's numbers of the samples as a whole, not of single classes."""
    return {
        name: value
        for name, value in report.get("evaluation", {}).items()
        if isinstance(value, float) and "/" not in name and name not in NO_METRICS
    }


def draw(records: dict[str, list[Record]], out: Path) -> list[Path]:
    """Charts of the losses over images, and over the seconds of steps where all records have them;
    none of runs with a single record."""
    long_enough = {name: found for name, found in records.items() if len(found) > 1}
    if not long_enough:
        return []
    losses = {name: [record["loss"] for record in found] for name, found in long_enough.items()}
    over_images = {
        name: ([record["images"] for record in found], losses[name])
        for name, found in long_enough.items()
    }
    charts = [out / "loss-by-images.png"]
    save_lines(over_images, charts[0], "Training loss", "images", "loss")
    if all("step_seconds" in record for found in long_enough.values() for record in found):
        over_time = {
            name: (list(accumulate(record["step_seconds"] for record in found)), losses[name])
            for name, found in long_enough.items()
        }
        charts.append(out / "loss-by-seconds.png")
        save_lines(over_time, charts[1], "Training loss", "seconds of steps", "loss")
    return charts
