"""GPU.md: every result, newest last."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.roofline import UNKNOWN, Ceilings
from bench.sections import SECTIONS
from bench.sections.ceilings import ceilings_in

Result = dict[str, Any]
HEAD = """# Measured on GPUs

Made by `python bench/gpu.py` from `gpu/*.json`. Times are medians of the device's time alone, with
nothing in the L2 cache, all contenders in turns; the share is that of the floor (bytes over
measured copy bandwidth, or FLOPs over the measured square product, whichever is longer). `as
launched` is the same ratio for single calls as eager mode launches them, the host's work
included."""


def gpu_page(results: Sequence[Result]) -> str:
    """The page. results: in the order of their dates."""
    lines = [HEAD]
    if not results:
        lines += ["", "Nothing has been measured on a GPU yet; see PENDING.md."]
    for result in results:
        versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
        lines += ["", f"## {result['gpu']}, {result['date']}", "", f"{versions}."]
        ceilings = ceilings_of(result, results)
        for name, section in result["sections"].items():
            lines += ["", f"### {name}", "", *section_lines(name, section, ceilings)]
    return "\n".join(lines) + "\n"


def section_lines(name: str, section: Result, ceilings: Ceilings) -> list[str]:
    """What became of a section, and its table."""
    lines = []
    if section["status"] != "done":
        why = section["why"].strip().splitlines()
        lines += [f"{section['status']}: {why[-1][:300]}" if why else section["status"], ""]
    if name not in SECTIONS:
        return [*lines, "This version has no such section."]
    return lines + SECTIONS[name].table(section["rows"], ceilings)


def ceilings_of(result: Result, results: Sequence[Result] = ()) -> Ceilings:
    """Those of the same file, or the newest of this kind of GPU."""
    same = [other for other in results if other["gpu"] == result["gpu"]]
    for source in (result, *reversed(same)):
        section = source["sections"].get("ceilings")
        found = ceilings_in(section["rows"]) if section else UNKNOWN
        if found != UNKNOWN:
            return found
    return UNKNOWN
