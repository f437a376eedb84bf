"""Reports made from files: `tools/report.py RUN_DIR`, or `tools/report.py bench/results`.

A run: report.md, report.json and loss.png beside its metrics. bench/results: the tables in its
README.md, and the rows and the chart in the project's README. Another folder of benchmark results:
the tables in its measured.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from _cli import main, parse, tyro

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Arguments:
    """Report on a training run, or on a folder of benchmark results."""

    path: tyro.conf.Positional[str]
    """RUN_DIR, or a folder of pytest-benchmark JSON files."""


def work() -> int:
    """Tell a run from a folder of results."""
    folder = Path(parse(Arguments).path)
    from heptapod_fast.reports.bench import report_bench
    from heptapod_fast.reports.run import report_run

    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a directory: expected RUN_DIR or bench/results")
    is_run = (folder / "config.json").exists()
    written = [report_run(folder)] if is_run else report_bench(folder, ROOT)
    for path in written:
        print(f"written: {path}")
    return 0


if __name__ == "__main__":
    main(work)
