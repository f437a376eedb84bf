"""Running a plan: every run once, however often the command is given."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any

import torch

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
    after_each: Callable[[], None] = lambda: None,
) -> None:
    """Train and measure what is not there yet.

    A run that was interrupted goes on from its checkpoint; numbers that were measured are kept.
    Told to stop (Ctrl-C, SIGTERM, SIGHUP), runs save what they have before this returns.

    Args:
        tools: the folder of train.py and evaluate.py.
        at_once: runs that share the machine; its threads, and its GPUs if there are several, are
            divided among them.
        launcher: what starts tools/train.py, as ("torchrun", "--nproc_per_node=8"); () for this
            interpreter alone.
        after_each: called when a run is done, by one thread at a time.

    Raises:
        RunFailed: the first run that ended with an error; others that were running are finished.
        KeyboardInterrupt: a signal asked to stop.
    """
    jobs = jobs_of(plan, out)
    left = [job for job in jobs if not is_done(job)]
    if len(left) < len(jobs):
        say(f"{len(jobs) - len(left)} of {len(jobs)} runs are done already")
    counting = _Counting(len(jobs), len(jobs) - len(left), left, say)
    processes = Processes()
    shares: SimpleQueue[dict[str, str]] = SimpleQueue()
    for share in shares_of_machine(at_once):
        shares.put(share)

    def work(job: Job) -> None:
        if counting.has_failed or processes.is_stopping:
            return
        share = shares.get()
        begin = time.monotonic()
        try:
            run_job(plan, job, tools, launcher, processes, share)
        except Stopping:
            return
        except BaseException:
            counting.has_failed = True
            raise
        finally:
            shares.put(share)
        counting.done(job, time.monotonic() - begin, after_each)

    with signals_stop(processes, say):
        work_off(work, left, at_once)
    if processes.is_stopping:
        raise KeyboardInterrupt("stopped: give the command again, and it goes on")


def work_off(work: Callable[[Job], None], jobs: list[Job], at_once: int) -> None:
    """So many jobs at a time; the first error, once all that had begun are over."""
    if at_once == 1:
        for job in jobs:
            work(job)
        return
    with ThreadPoolExecutor(at_once) as pool:
        running = [pool.submit(work, job) for job in jobs]
        errors = [finished.exception() for finished in as_completed(running)]
    for error in filter(None, errors):
        raise error


def run_job(
    plan: Plan,
    job: Job,
    tools: Path,
    launcher: tuple[str, ...],
    processes: Processes,
    share: dict[str, str],
) -> None:
    """Train a run, or go on with it, and measure the rows that are not measured yet."""
    _run(training_words(plan, job, tools, launcher), job, processes, share)
    for row in job.sampled:
        if results_of(job, row) is not None:
            continue
        _run(measuring_words(plan, job, row, tools), job, processes, share)
        refuse_unfinished(job, row)


def shares_of_machine(at_once: int) -> list[dict[str, str]]:
    """Environments of so many runs at once: their threads, and a GPU for each where there are
    several."""
    if at_once == 1:
        return [{}]
    threads = max(1, (os.cpu_count() or 1) // at_once)
    gpus = torch.cuda.device_count()
    every = ",".join(map(str, range(gpus)))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", every).split(",")
    found = []
    for number in range(at_once):
        share = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
        if gpus > 1:
            share["CUDA_VISIBLE_DEVICES"] = visible[number % gpus]
        found.append(share)
    return found


@contextmanager
def signals_stop(processes: Processes, say: Say) -> Iterator[None]:
    """Ctrl-C, SIGTERM and SIGHUP ask all runs to save and end; a second one ends them at once."""

    def stop(number: int, frame: Any) -> None:
        say(f"{signal.Signals(number).name}: runs save what they have; the same command goes on")
        processes.stop()

    asked = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, stop) for number in asked}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Processes:
    """The processes of runs. They are in sessions of their own, so that a signal of the terminal
    reaches them through `stop` alone: a second one would end them before they have saved."""

    def __init__(self) -> None:
        # A signal's handler may come while this very thread holds it.
        self._lock = threading.RLock()
        self._alive: set[subprocess.Popen[bytes]] = set()
        self.is_stopping = False

    def run(self, words: list[str], output: IO[str], share: Mapping[str, str]) -> int:
        """Run a command to its end.

        Returns:
            Its exit code.

        Raises:
            Stopping: no process begins any more.
        """
        with self._lock:
            if self.is_stopping:
                raise Stopping
            process = subprocess.Popen(
                words,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **share},
                start_new_session=True,
            )
            self._alive.add(process)
            if self.is_stopping:  # since the line above
                process.terminate()
        code = process.wait()
        with self._lock:
            self._alive.discard(process)
        return code

    def stop(self) -> None:
        """Ask all that run to save and end."""
        with self._lock:
            self.is_stopping = True
            for process in self._alive:
                process.terminate()


class Stopping(Exception):
    """All is being stopped: nothing begins any more."""


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

    def done(self, job: Job, seconds: float, then: Callable[[], None]) -> None:
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
            then()


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
    """RunFailed where a run was stopped before all of its images, which is no error to it."""
    if results_of(job, row) is not None:
        return
    found = _read(job.evaluation(row)) or {}
    raise RunFailed(
        f"{row.variant.name}, seed {job.seed} was stopped after {found.get('images_seen', 0):,} of "
        f"{job.row.images:,} images: give the command again, and it goes on"
    )


def _run(words: list[str], job: Job, processes: Processes, share: Mapping[str, str]) -> None:
    """A process whose output goes into the run's log.

    Raises:
        RunFailed: it ended with an error.
        Stopping: it was told to end.
    """
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    log = job.folder.parent / f"{job.folder.name}-{LOG}"
    with log.open("a") as file:
        file.write(f"$ {' '.join(words)}\n")
        file.flush()
        code = processes.run(words, file, share)
    if processes.is_stopping:
        raise Stopping
    if code:
        last = "\n".join(log.read_text().splitlines()[-SHOWN:])
        raise RunFailed(
            f"{job.row.variant.name}, seed {job.seed} ended with exit code {code}; all "
            f"of its output is in {log}, the end of which is:\n{last}"
        )


def is_done(job: Job) -> bool:
    """Whether all rows of a run are measured."""
    return all(results_of(job, row) is not None for row in job.sampled)


def results_of(job: Job, row: Row) -> dict[str, Any] | None:
    """The numbers of a row, None where they are not there yet: neither a file that was cut off nor
    the numbers of a run that was stopped on the way are any."""
    numbers = _read(job.evaluation(row))
    if numbers is None or numbers.get("images_seen", 0) < job.row.images:
        return None
    return numbers


def _read(path: Path) -> dict[str, Any] | None:
    """An evaluation; None where there is none, or a part of one."""
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def points_of(job: Job, row: Row) -> list[Record]:
    """The numbers of a run of this row by how many images it had seen ("images"), its end last; []
    where the end is not there yet.

    Raises:
        ValueError: a metrics.jsonl that is broken; names the line.
    """
    end = results_of(job, row)
    if end is None:
        return []
    # Rows that differ by how they are sampled have one run, which training measures in one way.
    records = records_of(job) if row is job.row else []
    earlier = [each for each in evaluations_of(records) if each["images"] < job.row.images]
    return [*earlier, {**end, "images": job.row.images}]


def records_of(job: Job) -> list[Record]:
    """What training has recorded; [] of a run that has not begun.

    Raises:
        ValueError: a metrics.jsonl that is broken; names the line.
    """
    path = RunDir(job.folder).metrics
    return read_metrics(path) if path.exists() else []
