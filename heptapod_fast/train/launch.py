"""From a configuration to a finished run."""

from __future__ import annotations

import hashlib
import importlib.util
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from heptapod_fast.config import Config
from heptapod_fast.progress import duration
from heptapod_fast.runs.directory import RunDir, RunError
from heptapod_fast.train.loop import train
from heptapod_fast.train.operators import choose_operators
from heptapod_fast.train.records import check_sinks
from heptapod_fast.train.session import Ending, Say, State, prepare
from heptapod_fast.world import World

# How long a file of rank 0 may take until a network file system shows it to the others.
SECONDS_FOR_FILES = 10.0


@dataclass(frozen=True)
class Outcome:
    """What `launch` comes to. images: trained on so far, in all sessions. seconds: of this one."""

    ending: Ending
    directory: Path
    images: int
    seconds: float


def launch(config: Config, world: World, say: Say, *, ends_process: bool = False) -> Outcome:
    """Claim the run directory, continue where it stands, train, say how it ended.

    What cannot run makes nothing: settings are checked before anything is written, and a start that
    fails over its data takes back the directory that it made. It fails on all ranks or on none.
    Collective call.

    Args:
        config: resolved.
        world: the ranks that train.
        say: takes the lines that a user reads; called on every rank.
        ends_process: nothing comes after it: signals to stop are ignored once all is saved.

    Raises:
        ValueError, FileNotFoundError, RunError, CheckpointError, Unavailable: say what to change.
        OtherRankFailed: one of these on another rank, which says it.
        LostRank: another rank is gone without a word, or hangs.
    """
    with world.watched():
        return _launch(config, world, say, ends_process)


def _launch(config: Config, world: World, say: Say, ends_process: bool) -> Outcome:
    begin = time.monotonic()
    world.same(settings=config.to_json(), code=_code(), version_of_torch=torch.__version__)
    with world.together():
        config.split_batch(world.size)
        choose_operators(config, world.device)
        check_sinks(config.run.sinks)
    directory = RunDir.of(config)
    try:
        with world.together():
            if world.main:
                changed = directory.claim(config)
                if changed:
                    say(f"continuing with {'; '.join(changed)}")
        with world.together():
            _check_shared(directory, world)
        return _run(config, world, say, directory, begin, ends_process)
    except BaseException:
        directory.withdraw()
        raise
    finally:
        # Also after an error: a process that goes on, as a notebook, may try again.
        directory.release()


def _check_shared(directory: RunDir, world: World) -> None:
    """RunError if this rank does not see the directory that rank 0 has claimed: what it wrote of a
    checkpoint would lie elsewhere, and the checkpoint would lack it."""
    deadline = time.monotonic() + SECONDS_FOR_FILES
    while not directory.config.is_file():
        if time.monotonic() > deadline:
            raise RunError(
                f"rank {world.rank} does not find {directory.config}, which rank 0 does: --out "
                "must name a folder that all machines share"
            )
        time.sleep(0.1)


def _code() -> str:
    """A digest of the code of this package and its kernels."""
    digest = hashlib.sha256()
    for package in ("heptapod_fast", "heptapod_fast.kernels"):
        found = importlib.util.find_spec(package)
        if found is None or found.origin is None:
            continue
        folder = Path(found.origin).parent
        for path in sorted(folder.rglob("*.py")):
            digest.update(f"{path.relative_to(folder)}\n".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _run(
    config: Config, world: World, say: Say, directory: RunDir, begin: float, ends_process: bool
) -> Outcome:
    """`launch`, the directory being claimed."""
    seen = directory.finished(config.recipe.images)
    # All ranks or none: one that reads a damaged file must not be left alone.
    (is_unfinished,) = world.any(not seen)
    if not is_unfinished:
        say(
            f"{directory.path} is finished: {seen:,} images. Sample from it with: "
            f"python tools/sample.py {directory.path}   or train on with a larger --images"
        )
        return Outcome(Ending.ALREADY_FINISHED, directory.path, seen, time.monotonic() - begin)
    session, state = prepare(config, world, say, directory)
    if state.images:
        step = session.optimizer.step_count
        say(f"resumed   at {state.images:,} images (step {step:,})")
    say(f"prepared  in {duration(time.monotonic() - begin)}")
    ending = train(session, state)
    if ends_process:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # impatience must not look like failure
    seconds = time.monotonic() - begin
    say(_last_line(ending, config, directory, state, seconds))
    return Outcome(ending, directory.path, state.images, seconds)


def _last_line(
    ending: Ending, config: Config, directory: RunDir, state: State, seconds: float
) -> str:
    if ending is Ending.FINISHED:
        return f"finished  {state.images:,} images in {duration(seconds)}: {directory.path}"
    why = ending.value
    if ending is Ending.OUT_OF_TIME:
        why = f"--minutes {config.run.minutes:g} are over"
    return f"{why} at {state.images:,} images, all saved; the same command continues"
