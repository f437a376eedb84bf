"""Progress of everything that takes longer than a breath."""

from __future__ import annotations

import atexit
import importlib.util
import sys
import time
from typing import Any


def duration(seconds: float) -> str:
    """Seconds as 0:07, 12:34 or 3:04:05."""
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def speed(rate: float) -> str:
    """Things per second as 1,234, 12, 3.4 or 0.85."""
    if rate >= 10:
        return f"{rate:,.0f}"
    return f"{rate:.1f}" if rate >= 1 else f"{rate:.2f}"


class Progress:
    """Callable `progress(done, total)` that shows how far it is, the rate and the time left.

    On a terminal a bar (rich); elsewhere (logs, torchrun) a line every `seconds`. Nothing is shown
    of work that ends within `seconds`, except its end if anything came before it.

    Args:
        what: as "decoding".
        unit: what is counted.
        seconds: between two lines.
        before: how many were done already, which says nothing about the rate.
    """

    def __init__(self, what: str, unit: str = "images", seconds: float = 2.0, before: int = 0):
        self.what = what
        self.unit = unit
        self.seconds = seconds
        self.before = before
        self.start = self.last = time.monotonic()
        self.shown = False
        # The core runs where nothing but torch is installed; lines serve there too.
        self.live = sys.stdout.isatty() and importlib.util.find_spec("rich") is not None
        self._bar: Any = None
        self._task: Any = None

    def __call__(self, done: int, total: int) -> None:
        """Say that `done` of `total` are done."""
        now = time.monotonic()
        is_over = done >= total
        is_due = now - self.last >= self.seconds or (is_over and self.shown)
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total)
            if is_over:
                self._close_bar()
            return
        if not is_due:
            return
        self.last = now
        self.shown = True
        if self.live and not is_over:
            self._open_bar(done, total)
        else:
            print(self._line(done, total, now - self.start), flush=True)

    def _open_bar(self, done: int, total: int) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as Bar

        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(self.unit),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self._task = self._bar.add_task(self.what, total=total, completed=done)
        self._bar.start()
        # Work that ends in an error leaves no bar behind, which would hide the cursor.
        atexit.register(self._close_bar)

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
            atexit.unregister(self._close_bar)

    def _line(self, done: int, total: int, elapsed: float) -> str:
        rate = (done - self.before) / max(elapsed, 1e-9)
        end = f"took {duration(elapsed)}"
        if done < total:
            end = f"ETA {duration((total - done) / max(rate, 1e-9))}"
        share = 100 * done / max(total, 1)
        return (
            f"{self.what}: {done:,}/{total:,} {self.unit} ({share:.0f}%)  {speed(rate)} "
            f"{self.unit}/s  {end}"
        )
