"""Train a system: `python tools/train.py --size tiny`, or under torchrun on several GPUs.

The same command run again continues where it stopped.
"""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass, fields

from _cli import main, parse

from heptapod_fast.config import Config
from heptapod_fast.resolve import share_of_batch


@dataclass(frozen=True, kw_only=True)
class Arguments(Config):
    """Train an image autoregressive model."""

    dry_run: bool = False
    """Print the configuration and what follows from it (parameters, FLOPs, memory), and stop."""

    def config(self) -> Config:
        """The settings, resolved."""
        return Config(**{f.name: getattr(self, f.name) for f in fields(Config)}).resolve()


def work() -> int:
    """Parse, prepare, train."""
    arguments = parse(Arguments)
    config = arguments.config()
    if arguments.dry_run:
        from heptapod_fast.train.summary import summary

        print(summary(config))
        return 0
    from heptapod_fast.train import parallel

    world = parallel.start(config.device)
    try:
        return run(config, world)
    finally:
        parallel.stop(world)


def run(config: Config, world) -> int:
    """Claim the run directory, resume, train, say how it ended. What cannot run makes nothing."""
    from heptapod_fast.progress import duration
    from heptapod_fast.runs import RunDir
    from heptapod_fast.train.loop import train
    from heptapod_fast.train.setup import choose_operators, prepare

    def say(text: str) -> None:
        if world.main:
            print(text, flush=True)

    share_of_batch(config, world.size)
    choose_operators(config, world.device)
    directory = RunDir(config.run_dir())
    if world.main:
        changed = directory.claim(config)
        if changed:
            say(f"continuing with {'; '.join(changed)}")
    begin, seen = time.monotonic(), directory.finished(config.images)
    if seen:
        say(
            f"{directory.path} is finished: {seen:,} images. Sample from it with: "
            f"python tools/sample.py {directory.path}   or train on with a larger --images"
        )
        return 0
    session, resumed = prepare(config, world, say)
    if resumed:
        say(f"resumed   at {session.images:,} images (step {session.optimizer.step_count:,})")
    say(f"prepared  in {duration(time.monotonic() - begin)}")
    outcome = train(session)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # all is saved: impatience must not look like failure
    if outcome != "finished":
        why = (
            "stopped by a signal"
            if outcome == "stopped"
            else f"--minutes {config.minutes:g} are over"
        )
        say(f"{why} at {session.images:,} images, all saved; the same command continues")
    else:
        say(
            f"finished  {session.images:,} images in {duration(time.monotonic() - begin)}: "
            f"{directory.path}"
        )
    return 0


if __name__ == "__main__":
    main(work)
