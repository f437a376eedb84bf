"""What a section is, and what it is given while it runs."""

from __future__ import annotations

import functools
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from bench.case import Case
from bench.harness import device_here
from bench.measuring import NO_TIME, Result, measure
from bench.roofline import Ceilings

Row = dict[str, Any]


class OutOfTime(Exception):
    """The section has to end; what it has written stays, and another run goes on from there."""


class Unavailable(Exception):
    """Something that the section needs is not installed; says what to install."""


class Section(Protocol):
    """One thing that only a GPU can settle.

    Attributes:
        name: for `--sections`, and in result files.
        about: one line.
        code: files and folders of the checkout, beside the package and the timer, that its figures
            depend on: when they change, it is measured again.
    """

    name: str
    about: str
    code: tuple[str, ...]

    def measure(self, work: Work) -> None:
        """Write rows. Runs in a process of its own, which may be killed at any time."""

    def table(self, rows: list[Row], ceilings: Ceilings) -> list[str]:
        """Markdown of its rows."""


@dataclass
class Work:
    """Where a section writes to, until when, and what it need not do again.

    rows: a file, one JSON object a line. deadline: on `time.monotonic()`. done: names of rows that
    exist. failed: {case: {contender: why}} of contenders that ended an earlier process.
    """

    rows: Path
    deadline: float
    done: set[str] = field(default_factory=set)
    failed: dict[str, dict[str, str]] = field(default_factory=dict)

    def emit(self, row: Row) -> None:
        """Append one line at once: what was measured before a crash stays."""
        with self.rows.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def wants(self, name: str) -> bool:
        """Whether a row is still to be made; OutOfTime when there is no time for it."""
        if name in self.done:
            return False
        if time.monotonic() > self.deadline:
            raise OutOfTime
        return True

    def measure(self, case: Case) -> None:
        """One row with all contenders of a case.

        Each is announced in a line {"trying": [case, contender]}: should it end this process, the
        next one leaves it out.
        """
        name = case_name(case)
        if not self.wants(name):
            return
        results = measure(
            case,
            device_here(),
            deadline=self.deadline,
            failed=self.failed.get(name),
            announce=functools.partial(self._announce, name),
        )
        self.emit(
            {
                "case": name,
                "bytes": case.bytes,
                "flops": case.flops,
                "gate": case.gate,
                "aim": case.aim,
                "contenders": {result.contender: entry(result) for result in results},
            }
        )
        if any(result.why == NO_TIME for result in results):
            raise OutOfTime

    def _announce(self, case: str, contender: str) -> None:
        self.emit({"trying": [case, contender]})


def entry(result: Result) -> Row:
    """A contender in a row. launched: seconds as eager mode launches it, the host's work too."""
    timing = result.timing
    return {
        "contender": result.contender,
        "seconds": timing.median if timing else None,
        "quartiles": timing.quartiles if timing else None,
        "launched": timing.launched if timing else None,
        "why": result.why,
        "missing": result.missing,
    }


def case_name(case: Case) -> str:
    """The name of a case within its section: gather_rows measures scatter_rows too."""
    return f"{case.operation}: {case.name}"
