"""Running a plan: every run once, however often the command is given."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heptapod_fast.ablations.plan import Plan, Row, slug
from heptapod_fast.progress import duration
from heptapod_fast.reports.run import evaluations_of
from heptapod_fast.runs import RunDir, RunError
from heptapod_fast.train.records import Record, read_metrics

RUNS, LOG = "runs", "log.txt"
SHOWN = 15  # last lines of the output of what failed

Say = Callable[[str], None]


class RunFailed(RunError):
    """A run ended with an error; says where its output is."""


@dataclass(frozen=True)
class Job:
    """One run of a row, with what is sampled from it.

    Attributes:
        row: that is trained.
        sampled: rows that are sampled from it, itself first.
        seed: of the run and its samples.
        folder: run directory.
    """

    row: Row
    sampled: tuple[Row, ...]
    seed: int
    folder: Path

    def evaluation(self, row: Row) -> Path:
        """Where the numbers of a row go."""
        return self.folder / f"evaluation-{slug(row.variant.name)}.json"


def jobs_of(plan: Plan, out: Path) -> list[Job]:
    """All runs: seed by seed, so that a first table is there early."""
    found = []
    for seed in plan.seeds:
        for row in plan.trained:
            name = row.variant.name
            also = [other for other in plan.rows if other.variant.of == name]
            folder = out / RUNS / f"{slug(name)}-seed{seed}"
            found.append(Job(row, (row, *also), seed, folder))
    return found


def words_of(flags: Mapping[str, Any]) -> list[str]:
    """Settings as they are typed."""
    words = []
    for name, value in flags.items():
        values = value if isinstance(value, (tuple, list)) else [value]
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{name.replace('_', '-')}")
        else:
            words += [flag, *(str(item) for item in values)]
    return words


def run_plan(
    plan: Plan,
    out: Path,
    tools: Path,
    say: Say,
    at_once: int = 1,
    launcher: tuple[str, ...] = (),
) -> None:
    """Train and measure what is not there yet.

    A run that was interrupted goes on from its checkpoint; numbers that were measured are kept.

    Args:
        tools: the folder of train.py and evaluate.py.
        at_once: runs that share the machine; threads are divided among them.
        launcher: what starts tools/train.py, as ("torchrun", "--nproc_per_node=8"); () for this
            interpreter alone.

    Raises:
        RunFailed: the first run that ended with an error; others that were running are finished.
    """
    jobs = jobs_of(plan, out)
    left = [job for job in jobs if not all(job.evaluation(row).exists() for row in job.sampled)]
    if len(left) < len(jobs):
        say(f"{len(jobs) - len(left)} of {len(jobs)} runs are done already")
    counting = _Counting(len(jobs), len(jobs) - len(left), left, say)
    threads = max(1, (os.cpu_count() or 1) // at_once)
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ} if at_once > 1 else None

    def work(job: Job) -> None:
        if counting.has_failed:
            return
        begin = time.monotonic()
        try:
            _run(training_words(plan, job, tools, launcher), job, environment)
            for row in job.sampled:
                if not job.evaluation(row).exists():
                    _run(measuring_words(plan, job, row, tools), job, environment)
                    refuse_unfinished(job, row)
        except RunFailed:
            counting.has_failed = True
            raise
        counting.done(job, time.monotonic() - begin)

    if at_once == 1:
        for job in left:
            work(job)
        return
    with ThreadPoolExecutor(at_once) as pool:
        for finished in [pool.submit(work, job) for job in left]:
            finished.result()


class _Counting:
    """How far all runs are, and when they will be done."""

    def __init__(self, total: int, done: int, left: list[Job], say: Say):
        self._total = total
        self._done = done
        self._say = say
        self._lock = threading.Lock()
        self._begin = time.monotonic()
        self._planned = sum(job.row.total_seconds for job in left)
        self._spent = 0.0
        self.has_failed = False

    def done(self, job: Job, seconds: float) -> None:
        """A run is finished."""
        with self._lock:
            self._done += 1
            self._spent += job.row.total_seconds
            passed = time.monotonic() - self._begin
            rest = passed * (self._planned / max(self._spent, 1e-9) - 1)
            left = f", about {duration(rest)} left" if self._done < self._total else ""
            self._say(
                f"[{self._done}/{self._total}] {job.row.variant.name}, seed {job.seed}: "
                f"{duration(seconds)}{left}"
            )


def training_words(plan: Plan, job: Job, tools: Path, launcher: tuple[str, ...] = ()) -> list[str]:
    """The command that trains a run, or goes on with it."""
    flags = dict(job.row.variant.flags)
    flags |= {"images": job.row.images, "seed": job.seed, "out": str(job.folder)}
    if plan.points > 1:
        flags |= measured_while_training(plan, job.row)
    start = launcher or (sys.executable,)
    return [*start, str(tools / "train.py"), *words_of(flags)]


def measured_while_training(plan: Plan, row: Row) -> dict[str, Any]:
    """Flags by which training takes the numbers of a plan's points but the last, which is measured
    when the run is done."""
    flags: dict[str, Any] = {"evaluate_every": -(-row.images // plan.points)}
    flags |= {"evaluate_metrics": ",".join(plan.metrics), "evaluate_count": plan.count}
    for name in ("inception", "reference"):
        if name in plan.evaluation:
            flags[f"evaluate_{name}"] = plan.evaluation[name]
    return flags


def measuring_words(plan: Plan, job: Job, row: Row, tools: Path) -> list[str]:
    """The command that measures a row."""
    flags = {"count": plan.count, "metrics": ",".join(plan.metrics), "seed": job.seed}
    flags |= {"out": str(job.evaluation(row)), **plan.evaluation, **row.variant.sampling}
    return [sys.executable, str(tools / "evaluate.py"), str(job.folder), *words_of(flags)]


def refuse_unfinished(job: Job, row: Row) -> None:
    """RunFailed where a run was stopped before all of its images, which is no error to it; what was
    measured of it is removed."""
    seen = json.loads(job.evaluation(row).read_text())["images_seen"]
    if seen < job.row.images:
        job.evaluation(row).unlink()
        raise RunFailed(
            f"{row.variant.name}, seed {job.seed} was stopped after {seen:,} of "
            f"{job.row.images:,} images: give the command again, and it goes on"
        )


def _run(words: list[str], job: Job, environment: Any) -> None:
    """A process whose output goes into the run's log."""
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    log = job.folder.parent / f"{job.folder.name}-{LOG}"
    with log.open("a") as file:
        file.write(f"$ {' '.join(words)}\n")
        file.flush()
        process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, env=environment)
        try:
            code = process.wait()
        except KeyboardInterrupt:
            process.wait()  # it was told too, and saves what there is
            raise
    if code:
        last = "\n".join(log.read_text().splitlines()[-SHOWN:])
        raise RunFailed(
            f"{job.row.variant.name}, seed {job.seed} ended with exit code {code}; all "
            f"of its output is in {log}, the end of which is:\n{last}"
        )


def points_of(job: Job, row: Row) -> list[Record]:
    """The numbers of a run of this row by how many images it had seen ("images"), its end last; []
    where the end is not there yet.

    Raises:
        ValueError: a metrics.jsonl that is broken; names the line.
    """
    end = results_of(job, row)
    if end is None:
        return []
    path = RunDir(job.folder).metrics
    # Rows that differ by how they are sampled have one run, which training measures in one way.
    records = read_metrics(path) if row is job.row and path.exists() else []
    earlier = [each for each in evaluations_of(records) if each["images"] < job.row.images]
    return [*earlier, {**end, "images": job.row.images}]


def results_of(job: Job, row: Row) -> dict[str, Any] | None:
    """The numbers of a row, None where they are not there yet."""
    path = job.evaluation(row)
    return json.loads(path.read_text()) if path.exists() else None
