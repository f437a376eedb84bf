"""What is said about the measurements of a case: rows of a table, and rows of a results file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench import timer
from bench.case import Case
from bench.measuring import Result
from bench.roofline import UNKNOWN, Ceilings
from bench.timer import Timing

OURS = "ours"
COLUMNS = {
    "us": "microseconds of one call, the median of its samples",
    "spread": "the middle half of the samples, as a share of the median",
    "GB/s": "the bytes that any implementation must move, over the time",
    "TFLOP/s": "the FLOPs that any implementation must compute, over the time",
    "images/s": "images of a call, over the time",
    "roofline": "the least time that bytes and FLOPs take on this GPU, over the time",
    "ours is": "how many times as fast ours is, and the middle half of the rounds",
}
NAME_WIDTH, CELL_WIDTH, LAST_WIDTH = 36, 10, 22


def rates(case: Case, seconds: float) -> dict[str, float]:
    """GB/s, TFLOP/s and images/s, where the case knows them."""
    found = {}
    if case.bytes:
        found["GB/s"] = case.bytes / seconds / 1e9
    if case.flops:
        found["TFLOP/s"] = case.flops / seconds / 1e12
    if case.images:
        found["images/s"] = case.images / seconds
    return found


def extra_info(case: Case, timing: Timing, ours: Timing | None) -> dict[str, Any]:
    """What a results file keeps beside the statistics of a contender."""
    digits = {"GB/s": 1, "TFLOP/s": 4, "images/s": 1}
    found: dict[str, Any] = {"us": round(timing.median * 1e6, 2)}
    for name, rate in rates(case, timing.median).items():
        found[name] = round(rate, digits[name])
    found["calls per sample"] = timing.calls
    if timing.launched is not None:
        found["us as launched"] = round(timing.launched * 1e6, 1)
    if ours is not None and ours is not timing:
        times, quartiles = timer.ratio(timing, ours)
        found["ours is faster"] = round(times, 3)
        found["ours is faster, quartiles"] = [round(each, 3) for each in quartiles]
    return found


def row(name: str, case: Case, timing: Timing, ours: Timing | None) -> dict[str, Any]:
    """A benchmark as pytest-benchmark stores it, for tools/report.py: seconds per call."""
    return {
        "name": name,
        "group": f"{case.operation}: {case.name}",
        "extra_info": extra_info(case, timing, ours),
        "stats": timing.stats,
    }


def timing_of_ours(results: list[Result]) -> Timing | None:
    """None if ours did not run, or is no contender."""
    for result in results:
        if result.contender == OURS:
            return result.timing
    return None


class Table:
    """Lines of text for cases that share columns; those that none of them fills are left out."""

    def __init__(self, cases: Sequence[Case], ceilings: Ceilings = UNKNOWN):
        self.ceilings = ceilings
        known = {"us", "spread"}
        for case in cases:
            known |= rates(case, 1.0).keys()
            if ceilings.floor(case.bytes, case.flops):
                known.add("roofline")
            if OURS in case.contenders and len(case.contenders) > 1:
                known.add("ours is")
        self.columns = [column for column in COLUMNS if column in known]

    def line(self, name: str, cells: dict[str, str]) -> str:
        """A name and its figures. cells: {column: text}."""
        text = name.ljust(NAME_WIDTH)
        for column in self.columns:
            width = LAST_WIDTH if column == "ours is" else CELL_WIDTH
            text += cells.get(column, "").rjust(width)
        return text.rstrip()

    def heading(self, title: str) -> str:
        """The names of the columns."""
        return self.line(title, {column: column for column in self.columns})

    def lines(self, case: Case, results: list[Result]) -> list[str]:
        """A case by its name, and a line for every contender that ran or broke."""
        ours = timing_of_ours(results)
        found = [case.name]
        for result in results:
            name = f"  {result.contender}"
            if result.timing is not None:
                found.append(self.line(name, self.cells(case, result.timing, ours)))
            elif not result.missing:
                found.append(f"{name}: FAILED, {result.why}")
        return found

    def cells(self, case: Case, timing: Timing, ours: Timing | None) -> dict[str, str]:
        """{column: text} of one contender."""
        seconds = timing.median
        low, high = timing.quartiles
        cells = {"us": f"{seconds * 1e6:,.1f}", "spread": f"{(high - low) / seconds:.0%}"}
        for name, rate in rates(case, seconds).items():
            cells[name] = f"{rate:,.0f}" if rate > 1000 else f"{rate:.3g}"
        floor = self.ceilings.floor(case.bytes, case.flops)
        if floor:
            cells["roofline"] = f"{floor / seconds:.0%}"
        if ours is not None and ours is not timing:
            times, (first, last) = timer.ratio(timing, ours)
            cells["ours is"] = f"{times:.2f}x ({first:.2f}-{last:.2f})"
        return cells


def missing_lines(results: list[Result]) -> list[str]:
    """Peers that are not here, each once."""
    found = {result.contender: result.why for result in results if result.missing}
    return [f"not here: {name}: {why}" for name, why in found.items()]
