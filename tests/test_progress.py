"""Progress: lines in a log, a bar on a terminal, nothing for what is over at once."""

import io

import pytest

from heptapod_fast import progress
from heptapod_fast.progress import Progress, duration, speed


class Clock:
    """time.monotonic under the test's control."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


class Terminal(io.StringIO):
    """Where a user sits."""

    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


@pytest.mark.parametrize(
    "seconds, text",
    [(0, "0:00"), (7.4, "0:07"), (754, "12:34"), (11045, "3:04:05"), (-3, "0:00")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_a_line_every_few_seconds_and_one_at_the_end(clock, capsys):
    report = Progress("decoding", seconds=2.0)
    for done in range(1, 11):
        clock.now += 0.5
        report(done, 10)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "decoding: 4/10 images (40%)  2.0 images/s  ETA 0:03",
        "decoding: 8/10 images (80%)  2.0 images/s  ETA 0:01",
        "decoding: 10/10 images (100%)  2.0 images/s  took 0:05",
    ]


def test_what_was_done_before_says_nothing_about_the_rate(clock, capsys):
    report = Progress("sampling", seconds=2.0, before=60)
    clock.now += 2
    report(70, 100)
    expected = "sampling: 70/100 images (70%)  5.0 images/s  ETA 0:06\n"
    assert capsys.readouterr().out == expected


def test_what_is_over_at_once_says_nothing(clock, capsys):
    report = Progress("decoding", seconds=2.0)
    clock.now += 0.1
    report(10, 10)
    assert capsys.readouterr().out == ""


def test_a_bar_on_a_terminal(clock, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    report = Progress("decoding", "files", seconds=2.0)
    clock.now += 3
    report(3, 10)
    clock.now += 3
    report(10, 10)
    shown = terminal.getvalue()
    assert "decoding" in shown
    assert "10/10" in shown
    assert "files" in shown
    # The cursor, hidden while the bar was drawn, is back.
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")


def test_lines_where_rich_is_missing(clock, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setattr(progress.importlib.util, "find_spec", lambda name: None)
    report = Progress("decoding", seconds=2.0)
    clock.now += 3
    report(3, 10)
    assert terminal.getvalue() == "decoding: 3/10 images (30%)  1.0 images/s  ETA 0:07\n"


@pytest.mark.parametrize(
    ("rate", "text"),
    [(12_345.6, "12,346"), (612.4, "612"), (3.44, "3.4"), (0.846, "0.85"), (0.0, "0.00")],
)
def test_slow_rates_are_no_zeros(rate, text):
    assert speed(rate) == text
