"""Progress lines for everything that takes longer than a breath."""

from __future__ import annotations

import sys
import time


def duration(seconds: float) -> str:
    """Seconds as 0:07, 12:34 or 3:04:05."""
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Progress:
    """Callable `progress(done, total)` that prints a line now and then, with rate and ETA.

    On a terminal the line is overwritten in place; elsewhere (logs, torchrun) a new one is written
    every `seconds`. Nothing is printed for work that ends within `seconds`, except the last line if
    any came before it.
    """

    def __init__(self, what: str, unit: str = "images", seconds: float = 2.0):
        self.what, self.unit, self.seconds = what, unit, seconds
        self.start = self.last = time.monotonic()
        self.lines = 0
        self.live = sys.stdout.isatty()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        finished = done >= total
        if now - self.last < (0.2 if self.live else self.seconds) and not (finished and self.lines):
            return
        self.last = now
        self.lines += 1
        rate = done / max(now - self.start, 1e-9)
        eta = duration((total - done) / max(rate, 1e-9))
        text = (
            f"{self.what}: {done:,}/{total:,} {self.unit} ({100 * done / max(total, 1):.0f}%)  "
            f"{rate:,.0f} {self.unit}/s  "
            + (f"took {duration(now - self.start)}" if finished else f"ETA {eta}")
        )
        if self.live:
            print(f"\r\x1b[2K{text}", end="\n" if finished else "", flush=True)
        else:
            print(text, flush=True)
