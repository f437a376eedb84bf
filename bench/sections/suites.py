"""Tests that a GPU changes, run there by pytest."""

from __future__ import annotations

import importlib.util
import re
import sys
import time
from dataclasses import dataclass

from bench.process import CUT_OFF, run
from bench.roofline import Ceilings
from bench.sections.work import OutOfTime, Row, Unavailable, Work

NEEDED = ("pytest", "hypothesis")
PYTEST = ("-m", "pytest", "-q", "-rfE", "--tb=short", "-p", "no:cacheprovider")
OUTPUT_KEPT = 12_000  # characters


@dataclass(frozen=True)
class Suite:
    """One run of pytest, one row. arguments: of pytest. seconds: the most it may take."""

    name: str
    about: str
    arguments: tuple[str, ...]
    seconds: float
    code: tuple[str, ...] = ("tests",)

    def measure(self, work: Work) -> None:
        """See Section.measure. A run that was cut off is no row of its own."""
        if not work.wants(self.name):
            return
        for package in NEEDED:
            if importlib.util.find_spec(package) is None:
                raise Unavailable(f"{package} is not installed: pip install {package}")
        command = [sys.executable, *PYTEST, *self.arguments]
        if importlib.util.find_spec("xdist"):
            command += ["-n", "8"]
        begin = time.monotonic()
        code, output = run(command, min(work.deadline, begin + self.seconds))
        row = {
            "case": self.name,
            "passed": code == 0,
            "summary": summary(output),
            "output": "" if code == 0 else output[-OUTPUT_KEPT:],
            "seconds": round(time.monotonic() - begin, 1),
        }
        if code == CUT_OFF:
            work.emit(row | {"case": f"{self.name}, cut off", "summary": "out of time"})
            raise OutOfTime
        work.emit(row)

    def table(self, rows: list[Row], ceilings: Ceilings) -> list[str]:
        """See Section.table."""
        verdicts = {True: "passed", False: "FAILED"}
        return [f"- {row['case']}: {verdicts[row['passed']]}, {row['summary']}" for row in rows]


def summary(output: str) -> str:
    """pytest's last line: how many passed and failed."""
    counts = [line for line in output.splitlines() if re.search(r"\d (passed|failed|error)", line)]
    return counts[-1].strip("= ") if counts else ""


SMOKE = Suite(
    "smoke",
    "tests/gpu and the shortest test of every operation on this GPU.",
    (
        "tests/gpu",
        "tests/ops",
        "-k",
        "gpu or no_rows or test_kernel_by_the_rule or test_kernels_by_the_rule",
        "--maxfail=10",
    ),
    seconds=210,
)
ATTENTION = Suite(
    "tests-attention",
    "Every test of attention: a kernel for each width and mask, which take long to compile.",
    ("tests/ops/test_attention.py", "--maxfail=40"),
    seconds=300,
)
ALL = Suite(
    "tests",
    "Every test that a GPU changes: operators, kernels, whole systems; attention's are apart.",
    (
        "tests/gpu",
        "tests/ops",
        "tests/systems/test_kernels.py",
        "--ignore=tests/ops/test_attention.py",
        "--ignore=tests/ops/test_offline.py",
        "--maxfail=40",
    ),
    seconds=300,
)
LADDER = Suite(
    "ladder",
    "The plain kernels of tests/ladder: they compile here and agree with the references.",
    ("tests/ladder", "--maxfail=20"),
    seconds=240,
)
