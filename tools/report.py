"""Reports made from files: `tools/report.py RUN_DIR ...`, or `tools/report.py bench/results`.

A run: report.md, report.json and charts beside its metrics: how fast it was, what its time went to,
its loss. Several runs: these of each, and runs.md, runs.json and charts with all of them side by
side. bench/results: the tables in its README.md, and the rows and the chart in the project's
README. Another folder of benchmark results: the tables in its measured.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from _cli import main, parse, tyro

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Arguments:
    """Report on training runs, or on a folder of benchmark results."""

    paths: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """RUN_DIR, or several to compare; or a folder of pytest-benchmark JSON files."""
    out: str = "runs/side-by-side"
    """Folder for what compares several runs."""


def work() -> int:
    """Tell a run from a folder of results."""
    arguments = parse(Arguments)
    folders = [Path(path) for path in arguments.paths]
    from heptapod_fast.reports.bench import report_bench
    from heptapod_fast.reports.run import report_run
    from heptapod_fast.reports.side_by_side import report_runs

    if not folders:
        raise ValueError("name a RUN_DIR, several, or bench/results")
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{folder} is not a directory: expected RUN_DIR or bench/results"
            )
    if len(folders) > 1:
        written = report_runs(folders, Path(arguments.out))
    elif (folders[0] / "config.json").exists():
        written = [report_run(folders[0])]
    else:
        written = report_bench(folders[0], ROOT)
    for path in written:
        print(f"written: {path}")
    return 0


if __name__ == "__main__":
    main(work)
