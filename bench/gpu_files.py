"""The files of bench/gpu.py: DIR/gpu/GPU-DATE.json, which several runs add to.

    {"gpu", "date", "multiprocessors", "versions", "command",
     "sections": {name: {"status", "seconds", "rows", "why", "code"}}}

A section is "done", "partial" (some rows) or "failed" (none). `code` identifies what it measured.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.measuring import NO_TIME
from bench.process import ROOT
from bench.sections.work import Row, Section

Result = dict[str, Any]
DONE, PARTIAL, FAILED = "done", "partial", "failed"
# The code that every figure depends on.
COMMON = (
    "heptapod_fast",
    "kernels",
    "csrc",
    "CMakeLists.txt",
    "setup.py",
    "bench/case.py",
    "bench/measuring.py",
    "bench/timer.py",
)
SUFFIXES = (".py", ".cu", ".cuh", ".cpp", ".h", ".json", ".txt")


def read(path: Path) -> Result:
    """A result file; SystemExit says what is wrong with it."""
    try:
        result = json.loads(path.read_text())
        missing = {"gpu", "date", "versions", "sections"} - result.keys()
    except (OSError, ValueError, AttributeError) as error:
        raise SystemExit(f"--merge {path}: not a result of bench/gpu.py: {error}") from None
    if missing:
        raise SystemExit(
            f"--merge {path}: not a result of bench/gpu.py, it lacks {', '.join(sorted(missing))}"
        )
    return result


def read_all(out: Path) -> list[Result]:
    """All results of a folder, by date."""
    results = [json.loads(path.read_text()) for path in (out / "gpu").glob("*.json")]
    return sorted(results, key=lambda result: (result["date"], result["gpu"]))


def path_of(result: Result, out: Path) -> Path:
    """DIR/gpu/nvidia-h200-2026-11-22.json"""
    gpu = result["gpu"].lower().replace(" ", "-")
    return out / "gpu" / f"{gpu}-{result['date']}.json"


# ------------------------------------------------------------------------------------ adding up


def merge(result: Result, out: Path) -> None:
    """Add sections to the file of their GPU and date."""
    path = path_of(result, out)
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = {**result, "sections": {}}
    if path.exists():
        whole = json.loads(path.read_text())
    for name, section in result["sections"].items():
        before = whole["sections"].get(name)
        whole["sections"][name] = section if before is None else merged(before, section)
    path.write_text(json.dumps(whole, indent=1) + "\n")


def merged(before: Result, after: Result) -> Result:
    """Two runs of a section: rows of the same code add up, other code replaces."""
    if before["code"] != after["code"]:
        return after
    rows = joined(before["rows"], after["rows"])
    if not rows:
        return after
    is_done = DONE in (before["status"], after["status"])
    return {
        **after,
        "rows": rows,
        "status": DONE if is_done else PARTIAL,
        "why": "" if is_done else after["why"],
    }


def joined(older: list[Row], newer: list[Row]) -> list[Row]:
    """Rows of two runs; of two of the same case the newer one, but a whole one first."""
    rows = {row["case"]: row for row in older}
    for row in newer:
        before = rows.get(row["case"])
        if before is None or is_whole(row) or not is_whole(before):
            rows[row["case"]] = row
    return list(rows.values())


def is_whole(row: Row) -> bool:
    """Whether a row need not be measured again: no contender was left out for want of time."""
    return all(contender["why"] != NO_TIME for contender in row.get("contenders", {}).values())


def stored(section: Section, about: Result, folders: Iterable[Path]) -> Result:
    """A section as measured before with this code on this kind of GPU; {} if it was not."""
    code = digest(section)
    found: Result = {}
    for folder in folders:
        for result in read_all(folder):
            known = result["sections"].get(section.name)
            is_same = result["gpu"] == about["gpu"] and result["versions"] == about["versions"]
            if known is None or known["code"] != code or not is_same:
                continue
            found = merged(found, known) if found else known
    return found


# ------------------------------------------------------------------------------- what was measured


def digest(section: Section) -> str:
    """Identifies the code that a section measures."""
    total = hashlib.sha256()
    for place in (*COMMON, *section.code):
        for file in files_below(ROOT / place):
            total.update(file.relative_to(ROOT).as_posix().encode())
            total.update(file.read_bytes())
    return total.hexdigest()[:12]


def files_below(path: Path) -> list[Path]:
    """A file, or the sources in a folder."""
    if not path.is_dir():
        return [path]
    return [file for file in sorted(path.rglob("*")) if file.suffix in SUFFIXES]
