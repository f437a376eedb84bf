"""From a configuration to a finished run."""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass
from pathlib import Path

from heptapod_fast.config import Config
from heptapod_fast.progress import duration
from heptapod_fast.runs.directory import RunDir
from heptapod_fast.train.loop import train
from heptapod_fast.train.operators import choose_operators
from heptapod_fast.train.records import check_sinks
from heptapod_fast.train.session import Ending, Say, State, prepare
from heptapod_fast.world import World


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
    """
    begin = time.monotonic()
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
        return _run(config, world, say, directory, begin, ends_process)
    except BaseException:
        directory.withdraw()
        raise
    finally:
        # Also after an error: a process that goes on, as a notebook, may try again.
        directory.release()


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
