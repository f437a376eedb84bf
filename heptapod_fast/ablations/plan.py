"""What is compared, and how long each of it trains: decided once, before anything runs."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from heptapod_fast.config import Config, flag
from heptapod_fast.data.embedded import EMBEDDED_SETS
from heptapod_fast.storage import write_json
from heptapod_fast.systems import Phase, build_system, configure
from heptapod_fast.train.loop import training_step
from heptapod_fast.train.metrics import training_flops
from heptapod_fast.train.session import Session, State, prepare
from heptapod_fast.world import World

PLAN = "plan.json"
STEPS = 8  # that are timed
WARM_UP = 3
TURNS = 3  # in which all rows are timed where time divides the images: other work comes and goes
CLASSES = 1000  # where a configuration does not say: what is counted hardly depends on it
SMALL_SET = 512  # images of an embedded set, where steps are timed: a step does not see how many

Equal = Literal["images", "compute", "time"]


@dataclass(frozen=True)
class Variant:
    """A row of the table.

    Attributes:
        name: of the row, and of its runs.
        flags: of tools/train.py, beside those that all rows have.
        sampling: flags of tools/evaluate.py.
        of: the row whose runs are sampled, where this one differs by `sampling` alone.
        x: where the row stands on the chart's axis, if that is one of numbers.
        paper: the paper's figures, by the columns of `Ablation.paper_columns`.
    """

    name: str
    flags: Mapping[str, Any] = field(default_factory=dict)
    sampling: Mapping[str, Any] = field(default_factory=dict)
    of: str | None = None
    x: float | None = None
    paper: tuple[float | str, ...] = ()


@dataclass(frozen=True)
class Scale:
    """How large everything is.

    Attributes:
        size: of the systems.
        tokens: of an image.
        depth: blocks of backbone and head of Heptapod at this size.
        has_patches: tokens are patches of pixels, not those of published tokenizers.
        data_of_vectors: what rows of vectors are trained on, if it is not what all are.
    """

    size: str
    tokens: int
    depth: int
    has_patches: bool
    data_of_vectors: str | None = None


@dataclass(frozen=True)
class Ablation:
    """A table of a paper.

    Attributes:
        title: of the table.
        about: what is compared and what the paper found, in a sentence or two.
        variants: the rows at a scale.
        flags: of tools/train.py, for all rows; those of the command line come after them.
        x_label: of the chart, where rows stand at numbers.
        paper_columns: of the paper's figures.
        points: of a run, its end among them, that are measured: with more than one the chart shows
            curves over training.
        apart: numbers by which rows cannot be compared, by their names in an evaluation.
    """

    title: str
    about: str
    variants: Callable[[Scale], list[Variant]]
    flags: Mapping[str, Any] = field(default_factory=dict)
    x_label: str = ""
    paper_columns: tuple[str, ...] = ()
    points: int = 1
    apart: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """A variant, decided.

    Attributes:
        variant: see `Variant`; its flags with those that all rows have.
        images: that it trains on.
        parameters: of the system.
        flops: of one image's forward and backward pass, averaged over the phases of training.
        seconds: of one image, measured before the start.
    """

    variant: Variant
    images: int
    parameters: int
    flops: float
    seconds: float

    @property
    def total_seconds(self) -> float:
        """Of one run."""
        return self.images * self.seconds


@dataclass(frozen=True)
class Plan:
    """All runs of an ablation.

    Attributes:
        name: of the ablation.
        rows: one for each variant.
        seeds: every variant is trained with each.
        equal: what the rows have alike.
        metrics: that samples are measured by.
        count: samples that are measured.
        points: of a run, its end among them, that are measured.
        evaluation: more flags of tools/evaluate.py, as --extractor.
        asked: what decides all of this, by the flags that say it.
        command: that made the plan.
        begun: the day.
    """

    name: str
    rows: tuple[Row, ...]
    seeds: tuple[int, ...]
    equal: Equal
    metrics: tuple[str, ...]
    count: int
    points: int
    evaluation: dict[str, Any]
    asked: dict[str, Any]
    command: str
    begun: str

    @property
    def trained(self) -> list[Row]:
        """Rows with runs of their own."""
        return [row for row in self.rows if row.variant.of is None]

    @property
    def total_seconds(self) -> float:
        """Of training, one run after the other."""
        return len(self.seeds) * sum(row.total_seconds for row in self.trained)


def make_rows(
    ablation: Ablation,
    scale: Scale,
    flags: Mapping[str, Any],
    *,
    images: int | None,
    minutes: float | None,
    equal: Equal,
    device: torch.device,
    say: Callable[[str], None],
) -> tuple[Row, ...]:
    """Build every variant, time a few of its steps, and divide the images.

    Args:
        flags: of tools/train.py, for all rows.
        images, minutes: of a run of the first row: how many, or as many as it trains on in that
            time. Of the others as many, or as many as cost or take the same, as `equal` says.

    Raises:
        ValueError: what a configuration refuses, naming the row; flags that rows differ by.
    """
    variants = ablation.variants(scale)
    check_variants(variants, flags)
    measured = []
    for variant in variants:
        settings = {"size": scale.size, **ablation.flags, **flags, **variant.flags}
        row = measured_row(replace(variant, flags=settings), device)
        if variant.of is None:
            say(
                f"{variant.name:24} {row.parameters / 1e6:7.2f} M parameters  "
                f"{row.flops / 1e9:8.3f} GFLOP and {1e3 * row.seconds:8.3f} ms an image"
            )
        measured.append(row)
    if equal == "time":
        measured = timed_in_turns(measured, TURNS - 1, device)
    first = measured[0]
    first_images = images
    if first_images is None:
        assert minutes is not None  # the command line sees to it
        first_images = int(60 * minutes / first.seconds)
    rows = tuple(
        replace(row, images=int(first_images * share_of_images(row, first, equal)))
        for row in measured
    )
    for row in rows:
        check_row(row)
    return rows


def measured_row(variant: Variant, device: torch.device) -> Row:
    """What a variant costs, as yet without images."""
    if variant.of is not None:
        return Row(variant, images=0, parameters=0, flops=0.0, seconds=0.0)
    try:
        parameters, seconds = timed(variant.flags, device)
        flops = flops_per_image(configure(**variant.flags))
    except ValueError as error:
        raise ValueError(f"{variant.name}: {error}") from None
    return Row(variant, images=0, parameters=parameters, flops=flops, seconds=seconds)


def timed_in_turns(rows: list[Row], turns: int, device: torch.device) -> list[Row]:
    """All rows again, one after the other, so many times; each with the shortest of its times."""
    for _ in range(turns):
        for number, row in enumerate(rows):
            if row.variant.of is None:
                _, seconds = timed(row.variant.flags, device)
                rows[number] = replace(row, seconds=min(row.seconds, seconds))
    return rows


def share_of_images(row: Row, first: Row, equal: Equal) -> float:
    """Of those of the first row."""
    if equal == "images" or row.variant.of is not None:
        return 1.0
    if equal == "compute":
        return first.flops / row.flops
    return first.seconds / row.seconds


def check_row(row: Row) -> None:
    """ValueError for a row that cannot train on so many images."""
    if row.variant.of is not None:
        return
    try:
        config = configure(**row.variant.flags, images=row.images)
        build_system(config, CLASSES, "meta", fill=False).phases(row.images)
    except ValueError as error:
        raise ValueError(
            f"{row.variant.name}, which would train on {row.images:,} images: {error}"
        ) from None


def check_variants(variants: list[Variant], flags: Mapping[str, Any]) -> None:
    """ValueError for rows that cannot be told apart, or whose differences the flags would undo."""
    for variant in variants:
        taken = [name for name in flags if name in variant.flags and name != "data"]
        if taken:
            raise ValueError(
                f"{flag(taken[0])} behind the --: rows of this table differ by it "
                f"({variant.name}); leave it out"
            )
    names = [slug(variant.name) for variant in variants]
    twice = [variant.name for variant in variants if names.count(slug(variant.name)) > 1]
    if twice:
        raise ValueError(
            f"rows of one name, {', '.join(twice)}: the sizes are too small to tell them apart"
        )


def slug(name: str) -> str:
    """A row's name as a file's."""
    words = "".join(letter if letter.isalnum() else " " for letter in name)
    return "-".join(words.split())


def flops_per_image(config: Config) -> float:
    """Of a forward and backward pass, averaged over the images of all phases."""
    classes = config.data.num_classes or CLASSES
    system = build_system(config, classes, "meta", fill=False)
    total = config.recipe.images
    work = 0.0
    for phase in system.phases(total):
        work += (min(phase.end, total) - phase.first) * training_flops(system, phase)
    return work / total


def timed(settings: Mapping[str, Any], device: torch.device) -> tuple[int, float]:
    """(parameters, seconds of one image): the median of a few steps of each phase, averaged over
    the images."""
    few = dict(settings)
    if few.get("data") in EMBEDDED_SETS:
        few["logogram_count"] = SMALL_SET
    with tempfile.TemporaryDirectory() as folder:
        config = configure(**few, out=folder)
        session, state = prepare(config, World(0, 1, device), lambda text: None)
    session.system.train()
    total = config.recipe.images
    seconds = 0.0
    for phase in session.system.phases(total):
        share = (min(phase.end, total) - phase.first) / total
        seconds += share * _seconds_of_step(session, state, phase)
    parameters = sum(value.numel() for value in session.system.parameters())
    if device.type == "cuda":
        del session, state
        torch.cuda.empty_cache()  # runs are other processes, and need the room
    return parameters, seconds / config.recipe.batch


def _seconds_of_step(session: Session, state: State, phase: Phase) -> float:
    """The median of a few."""
    found = []
    for _ in range(WARM_UP + STEPS):
        begin = time.perf_counter()
        loss, _ = training_step(session, state, phase)
        loss.item()
        found.append(time.perf_counter() - begin)
    return statistics.median(found[WARM_UP:])


def write_plan(plan: Plan, folder: Path) -> None:
    """plan.json."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / PLAN, asdict(plan))


def read_plan(folder: Path) -> Plan | None:
    """The plan that a folder was begun with; None where there is none.

    Raises:
        ValueError: a file that is none.
    """
    path = folder / PLAN
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text())
        rows = []
        for row in found.pop("rows"):
            variant = row.pop("variant")
            variant["paper"] = tuple(variant["paper"])
            rows.append(Row(Variant(**variant), **row))
        for name in ("seeds", "metrics"):
            found[name] = tuple(found[name])
        return Plan(rows=tuple(rows), **found)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is no plan of an ablation ({error}): move it away to begin anew"
        ) from None
