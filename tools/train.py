"""Train a system: `python tools/train.py --size tiny`, or under torchrun on several GPUs.

The same command run again continues where it stopped.
"""

from __future__ import annotations

from dataclasses import dataclass

from _cli import alike_on_all_ranks, main, rank
from _training import parse_training

from heptapod_fast.config import Config
from heptapod_fast.launchers import find_ranks


@dataclass(kw_only=True)
class Arguments:
    """Train an image autoregressive model. With --size, --help shows its defaults."""

    dry_run: bool = False
    """Print the configuration and what follows from it (parameters, FLOPs, memory), and stop."""


def work() -> int:
    """Parse, train."""
    with alike_on_all_ranks():
        arguments, config = parse_training(Arguments)
        config = config.resolve()
        if arguments.dry_run:
            print_dry_run(config)
            return 0
    from heptapod_fast import world as worlds
    from heptapod_fast.train.launch import launch

    world = worlds.start(config.run.device)

    def say(text: str) -> None:
        if world.main:
            print(text, flush=True)

    try:
        launch(config, world, say, ends_process=True)
    except worlds.LostRank:
        raise  # to leave the others in order would mean to wait for the one that is lost
    except BaseException:
        worlds.stop(world)
        raise
    worlds.stop(world)
    return 0


def print_dry_run(config: Config) -> None:
    """On one rank for all that torchrun started. Nothing here makes them meet: a dry run may be on
    a machine without the devices of the run."""
    from heptapod_fast.train.dry_run import dry_run

    text = dry_run(config, world_size=find_ranks().size)
    if rank() == 0:
        print(text)


if __name__ == "__main__":
    main(work)
