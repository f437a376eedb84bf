"""The report of one training run: what it was, its throughput, its loss, its evaluation."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from heptapod_fast.config import Config, flag
from heptapod_fast.config.settings import as_typed
from heptapod_fast.progress import duration
from heptapod_fast.reports.charts import save_line, save_panels
from heptapod_fast.reports.tables import properties, table
from heptapod_fast.reports.throughput import throughput, throughput_section
from heptapod_fast.runs import RunDir
from heptapod_fast.systems import configure
from heptapod_fast.train.records import OF_SAMPLES, Record, read_metrics

SPREADS = ("_deviation", "_error")  # how numbers end that no chart shows
LOSS_POINTS = 8  # of the images that the run is meant to see, at which its loss is told
# What report.md has tables of its own for.
IN_TABLES = (
    "images_per_second_median",
    "images_per_second_per_device",
    "images_per_second_of_wall_time",
    "tokens_per_second",
    "tokens_per_second_per_device",
    "tflops_median",
    "tflops_per_device",
    "mfu_median",
    "peak_tflops",
    "memory_peak_gb",
    "wall_seconds",
    "wall_seconds_of",
    "goodput",
    "projected_days",
    "loss_by_images",
    "evaluation",
    "evaluations",
)


class NothingLogged(ValueError):
    """A run of which there is nothing to report yet."""


def report_run(folder: Path) -> Path:
    """Write report.md, report.json and charts beside the metrics of a run.

    Returns:
        The path of report.md.

    Raises:
        ValueError: the run has logged nothing.
        RunError: it is no run directory.
    """
    run = RunDir(folder)
    config = run.read_config()
    history = history_of(run)
    records = history.records
    numbers = numbers_of(config, history)
    evaluation = evaluation_of(run)
    if evaluation is not None:
        numbers["evaluation"] = evaluation
    (folder / "report.json").write_text(json.dumps(numbers, indent=1) + "\n")

    name = f"{config.system} {config.size}"
    last = records[-1]
    parts = [
        f"# {name} on {config.data.data}",
        f"{last['images']:,} of {config.recipe.images:,} images, last session "
        f"{duration(last['seconds'])}.",
        properties(numbers, leave_out=IN_TABLES),
        *throughput_section(numbers, history.lines, history.sessions, folder, name),
        *loss_section(numbers, records, folder, name),
        *evaluations_section(numbers["evaluations"], folder),
    ]
    if evaluation is not None:
        parts += [
            "## Evaluation",
            properties(evaluation, leave_out=("samples_per_class",)),
        ]
        if "samples" in evaluation:  # there are none where no metric looks at any
            parts.append("![samples](evaluation.png)")
    page = folder / "report.md"
    page.write_text("\n\n".join(parts) + "\n")
    return page


@dataclass(frozen=True)
class History:
    """What a run has logged.

    Attributes:
        records: of progress lines, with a loss.
        lines: with a rate.
        samples: what --evaluate-every measured, see `evaluations_of`.
        sessions: what each start ran on, and how long it took.
    """

    records: list[Record]
    lines: list[Record]
    samples: list[dict[str, Any]]
    sessions: list[Record]


def history_of(run: RunDir, images: int | None = None) -> History:
    """What a run has logged up to so many training images; None for all.

    Raises:
        NothingLogged: nothing at all, or nothing so early.
        ValueError: records that cannot be read.
    """
    everything = losses_of(run)
    logged = read_metrics(run.metrics)
    # Runs of early versions have none.
    sessions = read_metrics(run.sessions) if run.sessions.exists() else []
    if images is not None:
        everything = [record for record in everything if record["images"] <= images]
        logged = [record for record in logged if record["images"] <= images]
        # One that begins there has done nothing for these images.
        sessions = [session for session in sessions if session["images"] < images]
    if not everything:
        raise NothingLogged(f"{run.metrics} has no record with a loss up to {images:,} images")
    return History(
        records=everything,
        lines=[record for record in logged if "images_per_second" in record],
        samples=evaluations_of(logged),
        sessions=sessions,
    )


def numbers_of(config: Config, history: History) -> dict[str, Any]:
    """The figures of a run by name, from what it has logged."""
    numbers = figures(config, history.records, history.sessions)
    numbers |= throughput(config, history.lines, history.sessions)
    points = loss_points(config.recipe.images, history.records[-1]["images"])
    numbers["loss_by_images"] = losses_at(history.records, points)
    numbers["evaluations"] = history.samples
    return numbers


def evaluation_of(run: RunDir) -> dict[str, Any] | None:
    """What tools/evaluate.py found and wrote into the run; None where it did not."""
    file = run.path / "evaluation.json"
    if not file.exists():
        return None
    try:
        found = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} cannot be read: {error}; mend or remove it") from error
    return found


def loss_section(
    numbers: dict[str, Any], records: list[Record], folder: Path, name: str
) -> list[str]:
    """Paragraphs of Markdown; the curve is written to `folder`."""
    rows = [(int(images), loss) for images, loss in numbers["loss_by_images"].items()]
    parts = ["## Loss", table(["images", "loss"], rows, numbers=[0, 1])]
    if len(records) > 1:
        images = [record["images"] for record in records]
        losses = [record["loss"] for record in records]
        save_line(images, losses, folder / "loss.png", f"{name}: training loss", "images", "loss")
        parts.append("![loss](loss.png)")
    return parts


def evaluations_of(records: list[Record]) -> list[dict[str, Any]]:
    """What --evaluate-every measured: {"images": ..., a number by its name, ...} each time."""
    found = []
    for record in records:
        numbers = {
            name.removeprefix(OF_SAMPLES): value
            for name, value in record.items()
            if name.startswith(OF_SAMPLES)
        }
        if numbers:
            found.append({"images": record["images"], **numbers})
    return found


def evaluations_section(evaluations: list[dict[str, Any]], folder: Path) -> list[str]:
    """Paragraphs of Markdown on them, and a chart in `folder`; [] without any."""
    if not evaluations:
        return []
    names = list(dict.fromkeys(name for each in evaluations for name in each))
    rows = [[each.get(name) for name in names] for each in evaluations]
    parts = ["## Samples while it trained", table(names, rows)]
    lines = {}
    shown = [name for name in names if not name.endswith(SPREADS) and name != "images"]
    for name in shown:
        points = [each for each in evaluations if each.get(name) is not None]
        if len(points) > 1:
            lines[name] = ([p["images"] for p in points], [p[name] for p in points])
    if lines:
        save_panels(lines, folder / "evaluations.png", "images")
        parts.append("![numbers of samples over images](evaluations.png)")
    return parts


def loss_points(planned: int, seen: int) -> list[int]:
    """Numbers of images: even parts of those planned, as far as the run came, and its end."""
    even = [planned * point // LOSS_POINTS for point in range(1, LOSS_POINTS + 1)]
    return [*(images for images in even if images < seen), seen]


def losses_at(records: list[Record], points: list[int]) -> dict[str, float]:
    """{number of images: loss of the first progress line from there on}."""
    return {
        str(point): next(record["loss"] for record in records if record["images"] >= point)
        for point in points
    }


def losses_of(run: RunDir) -> list[Record]:
    """The records of a run's progress lines.

    Raises:
        NothingLogged: there are none.
        ValueError: records that cannot be read.
    """
    if not run.metrics.exists():
        raise NothingLogged(f"{run.metrics} does not exist yet: the run has logged nothing")
    records = [record for record in read_metrics(run.metrics) if record.get("loss") is not None]
    if not records:
        raise NothingLogged(f"{run.metrics} has no record with a loss")
    return records


def figures(config: Config, records: list[Record], sessions: list[Record]) -> dict[str, Any]:
    """What is said of a run besides its throughput, by name."""
    last = records[-1]
    rates = [record["images_per_second"] for record in records]
    numbers: dict[str, Any] = {
        "system": config.system,
        "size": config.size,
        "data": config.data.data,
        "tokenizer": config.data.tokenizer,
        "image_size": config.data.image_size,
        "batch": config.recipe.batch,
        "seed": config.recipe.seed,
        "settings": settings_beside_the_size(config),
    }
    for name in ("device", "ranks", "torch", "activations"):
        seen = {str(session[name]) for session in sessions}
        numbers[name] = ", ".join(sorted(seen))
    numbers |= {
        "images": last["images"],
        "steps": last["step"],
        "epochs": last["epoch"],
        "loss": last["loss"],
        "images_per_second_range": [min(rates), max(rates)],
        "skipped_steps": last["skipped"],
    }
    if all("step_seconds" in record for record in records):  # not in records of older versions
        seconds = sum(record["step_seconds"] for record in records)
        numbers["training_seconds"] = round(seconds, 1)
    by_phase = rates_of_phases(records)
    if len(by_phase) > 1:
        numbers["images_per_second_of_phases"] = by_phase
    return numbers


def settings_beside_the_size(config: Config) -> str:
    """The flags that make this run of its size and system, as they are typed."""
    plain = configure(config.size, config.system)
    words = []
    for name, value, *_ in config.differences(plain):
        if name in ("out", "num_classes"):  # where it is, and what the data says
            continue
        if isinstance(value, bool):
            words.append(flag(name) if value else f"--no-{flag(name).removeprefix('--')}")
        elif value is not None:
            typed = shlex.quote(value) if isinstance(value, str) else as_typed(value)
            words.append(f"{flag(name)} {typed}")
    return " ".join(words)


def rates_of_phases(records: list[Record]) -> dict[str, float]:
    """{name of a phase: median rate of its progress lines}, in their order."""
    rates: dict[str, list[float]] = {}
    for record in records:
        rates.setdefault(record.get("phase", ""), []).append(record["images_per_second"])
    return {phase: median(found) for phase, found in rates.items()}
