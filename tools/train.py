"""Train a system: `python tools/train.py --size tiny`, or under torchrun on several GPUs.

The same command run again continues where it stopped.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from _cli import main
from _training import parse_training


@dataclass
class Own:
    """Flags of this tool alone."""

    dry_run: bool = field(
        default=False,
        metadata={
            "help": "Print the configuration and what follows from it (parameters, FLOPs, memory), "
            "and stop."
        },
    )


def work() -> int:
    """Parse, train."""
    arguments, config = parse_training(
        Own, "Train an image autoregressive model. With --size, --help shows its defaults."
    )
    config = config.resolve()
    if arguments.dry_run:
        from heptapod_fast.train.dry_run import dry_run

        print(dry_run(config))
        return 0
    from heptapod_fast import world as worlds
    from heptapod_fast.train.launch import launch

    world = worlds.start(config.run.device)

    def say(text: str) -> None:
        if world.main:
            print(text, flush=True)

    try:
        launch(config, world, say, ends_process=True)
    finally:
        worlds.stop(world)
    return 0


if __name__ == "__main__":
    main(work)
