"""PENDING.md: sections that no file settles, gates that are missed or unknown, configurations that
no GPU has chosen."""

from __future__ import annotations

import json
from collections.abc import Sequence

from bench.case import Case
from bench.pages.gpu_page import Result, ceilings_of
from bench.pages.judging import BEST, Judged, judged, standing
from bench.process import ROOT
from bench.sections import OPERATIONS, SECTIONS
from bench.sections.operations import Operation, cases_of
from bench.sections.work import case_name

CONFIGS = ROOT / "kernels" / "configs"
RESULTS = ROOT / "bench" / "results"
HEAD = """# Not settled on a GPU yet

Made by `python bench/gpu.py` from the files in `gpu/` (`python bench/gpu.py --list` names the
sections)."""
# What needs a GPU together with DALI or zarr: files, what they hold once it was measured, what to
# do.
DATA = [
    (
        "decode",
        ', dali cuda"',
        "DALI decoding on a GPU: never run; >= 3x Pillow at equal threads (`python "
        "bench/bench_decode.py --out bench/results/decode-NAME.json`)",
    ),
    (
        "loader",
        '"ours, gpu',
        "caches on the GPU: never run (`python bench/bench_loader.py --full --out "
        "bench/results/loader-NAME.json`)",
    ),
    (
        "cache",
        '"device": "NVIDIA',
        "building a cache on a GPU: never run (`python bench/bench_cache.py --full --out "
        "bench/results/cache-NAME.json`)",
    ),
]


def pending_page(results: Sequence[Result]) -> str:
    """The page. results: in the order of their dates."""
    lines = [HEAD]
    if not results:
        lines += ["", "No GPU has run this code so far; figures for one are models or absent."]
    parts = {
        "Sections never finished": open_sections(results),
        "Gates": open_gates(results),
        "Data": open_data(),
        "Configurations": open_configurations(),
    }
    for title, part in parts.items():
        if part:
            lines += ["", f"## {title}", "", *part]
    return "\n".join(lines) + "\n"


def open_sections(results: Sequence[Result]) -> list[str]:
    """Sections that no result has done."""
    done = {
        name
        for result in results
        for name, section in result["sections"].items()
        if section["status"] == "done"
    }
    return [
        f"- `{name}`: {section.about}" for name, section in SECTIONS.items() if name not in done
    ]


def open_gates(results: Sequence[Result]) -> list[str]:
    """Gates of the benchmarks' cases by their newest measurement."""
    newest = newest_measurements(results)
    lines = []
    for operation in OPERATIONS:
        for case in cases_of(operation):
            found = newest.get((operation, case_name(case)))
            if case.gate and (found is None or found.gate is not True):
                lines.append(gate_line(case, found))
    return lines


def newest_measurements(results: Sequence[Result]) -> dict[tuple[str, str], Judged]:
    """{(operation, case): its newest row, judged}"""
    newest = {}
    for result in results:
        ceilings = ceilings_of(result, results)
        for name, section in result["sections"].items():
            known = SECTIONS.get(name)
            if not isinstance(known, Operation):
                continue
            for row in section["rows"]:
                newest[known.operation, row["case"]] = judged(row, ceilings)
    return newest


def gate_line(case: Case, found: Judged | None) -> str:
    """A gate that is not met."""
    verdict = "not measured"
    if found is not None and found.seconds:
        verdict = "missed" if found.gate is False else "unknown"
    if found is not None and BEST in found.ratios:
        verdict += f" ({standing(found, case.gate)})"
    return f"- {case_name(case)}: {case.gate} ({verdict})"


def open_data() -> list[str]:
    """What scripts of its own measure."""
    lines = []
    for kind, mark, what in DATA:
        kept = "".join(path.read_text() for path in sorted(RESULTS.glob(f"{kind}*.json")))
        if mark not in kept:
            lines.append(f"- {what}")
    return lines


def open_configurations() -> list[str]:
    """Operations whose configurations no GPU has chosen."""
    paths = sorted(CONFIGS.glob("*.json"))
    untuned = [path.stem for path in paths if not json.loads(path.read_text())["tuned"]]
    lines = []
    if untuned:
        lines.append(
            "- chosen from registers and occupancy alone, `python bench/tune.py` has not "
            f"run: {', '.join(untuned)}"
        )
    lines.append(
        "- sm_80 and sm_100: compiled only (OFFLINE.md lists registers and spills), never tuned or "
        "run"
    )
    return lines
