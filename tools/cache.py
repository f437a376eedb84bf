"""Tokens of a folder of images, made once: `python tools/cache.py --data FOLDER --out CACHE.zarr`.

Under torchrun every process builds its share of the shards. The same command run again continues
where it stopped, with as many processes as it likes, and ends with the same bytes.
"""

from __future__ import annotations

import sys
from datetime import timedelta

from _cli import main, parse

from heptapod_fast import world as worlds
from heptapod_fast.data.cache.making import CacheSettings, make_cache


def say(line: str) -> None:
    """Print a line at once: builds take hours, and logs are read meanwhile."""
    print(line, flush=True)


def work() -> int:
    """Parse, build, say what was built."""
    settings = parse(CacheSettings)
    # A rank with a shard more than the others may have hours to go.
    world = worlds.start(settings.device, patience=timedelta(days=7))
    try:
        make_cache(settings, world, say)
    except KeyboardInterrupt:
        print("interrupted: finished shards stay, the same command goes on", file=sys.stderr)
        return 130
    finally:
        worlds.stop(world)
    return 0


if __name__ == "__main__":
    main(work)
