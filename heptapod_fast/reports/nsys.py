"""Nsight Systems (nsys): records a command, and what its tables say of the GPU.

nsys writes a report, `nsys stats` makes tables of it. Its tables come as CSV on stdout, one after
the other, each between a line that says what is processed and an empty line. What they are called
and what their columns are: https://docs.nvidia.com/nsight-systems/AnalysisGuide
"""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from heptapod_fast.reports.profile import (
    PHASES,
    Cost,
    Interval,
    Profile,
    costliest_first,
    idle_share,
    span,
)

CHOICES = ("auto", "on", "off")
# Set for the command that is recorded. nsys sets a variable of its own, but only when its recording
# begins, which is after the command's start.
RECORDED = "HEPTAPOD_RECORDED_BY_NSYS"
OF_NSYS = "NSYS_PROFILING_SESSION_ID"
RECORDING = (
    # From cudaProfilerStart to cudaProfilerStop: the steps without what comes before.
    "--capture-range=cudaProfilerApi",
    "--capture-range-end=stop",  # the default ends the command there
    "--trace=cuda,nvtx",
    "--cuda-graph-trace=node",  # the kernels of a CUDA graph, not the graph as one
    "--sample=none",
    "--cpuctxsw=none",
    "--force-overwrite=true",
)
REPORTS = ("cuda_gpu_kern_sum", "cuda_gpu_trace", "nvtx_gpu_proj_sum")
# The columns that are read of each.
KERNELS = ("Total Time (ns)", "Instances", "Name")
TRACE = ("Start (ns)", "Duration (ns)", "GrdX", "Name")
RANGES = ("Range", "Total Proj Time (ns)", "Range Instances")
# Ranges of the project's own operators, by the beginning of their names.
OPERATORS = "heptapod_fast::"
NS_PER_MS = 1e6

Row = dict[str, str]


# ------------------------------------------------------------------------------------------ whether


def is_recorded(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether nsys records this process, started by `record` or by hand."""
    return RECORDED in environment or OF_NSYS in environment


def is_wanted(choice: str, on_gpu: bool) -> bool:
    """Whether to record with nsys. choice: of --nsys.

    Raises:
        ValueError: it is asked for and cannot be; says what to install or to change.
    """
    is_there = shutil.which("nsys") is not None
    if choice == "auto":
        return is_there and on_gpu
    if choice == "off":
        return False
    if not is_there:
        raise ValueError(
            "--nsys on: there is no nsys on PATH. Install NVIDIA Nsight Systems (package "
            "nsight-systems-cli of NVIDIA's repository for apt, or "
            "https://developer.nvidia.com/nsight-systems/get-started), or take --nsys off"
        )
    if not on_gpu:
        raise ValueError(
            "--nsys on: nsys records what a GPU does, and the device is a CPU: take --device cuda, "
            "or --nsys off"
        )
    return True


# ------------------------------------------------------------------------------------------ running


def record(command: Sequence[str], report: Path) -> None:
    """Run a command under nsys, which writes `report` (.nsys-rep).

    Raises:
        OSError: the command or nsys failed; they have said why.
    """
    report.parent.mkdir(parents=True, exist_ok=True)
    report.unlink(missing_ok=True)
    output = f"--output={report.with_suffix('')}"
    done = subprocess.run(
        ["nsys", "profile", *RECORDING, output, *command], env=os.environ | {RECORDED: "1"}
    )
    if done.returncode != 0:
        raise OSError(f"nsys profile ended with code {done.returncode}: the reason stands above")
    if not report.exists():
        raise OSError(f"nsys wrote no {report}: it saw no step on a GPU; take --nsys off")


def stats(report: Path) -> str:
    """The tables of REPORTS as `nsys stats` prints them.

    Raises:
        OSError: it failed; with what it said.
    """
    # Made anew: an export of an earlier report may lie there.
    options = ["--format", "csv", "--force-export=true"]
    done = subprocess.run(
        ["nsys", "stats", "--report", ",".join(REPORTS), *options, str(report)],
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise OSError(f"nsys stats failed on {report}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


# ------------------------------------------------------------------------------------------ reading


def read_table(text: str, columns: Sequence[str]) -> list[Row]:
    """The rows of the table that has these columns among others; [] where there is none, as where
    nsys found nothing to put into it."""
    lines = text.splitlines()
    for number, line in enumerate(lines):
        head = cells(line)
        if set(columns) <= set(head):
            return rows_below(head, lines[number + 1 :])
    return []


def rows_below(head: Sequence[str], lines: Sequence[str]) -> list[Row]:
    """The lines up to the first that is no row of the table."""
    rows = []
    for line in lines:
        values = cells(line)
        if len(values) != len(head):
            break
        rows.append(dict(zip(head, values, strict=True)))
    return rows


def cells(line: str) -> list[str]:
    """Of a line of CSV; names of kernels have commas, and are quoted then."""
    return next(csv.reader([line]), [])


def of_stats(text: str, steps: int, phases: Sequence[str] = PHASES) -> Profile:
    """Of what `stats` returned for so many steps. phases: names of ranges that count as such.

    Raises:
        ValueError: there is no kernel in it.
    """
    trace = read_table(text, TRACE)
    measured = span(map(times_of, trace))
    kernels = [row for row in trace if row["GrdX"]]  # copies have no grid
    if not kernels:
        raise ValueError(
            "nsys recorded no kernel; take --nsys off. It said:\n" + text.strip()[-1000:]
        )
    in_ranges = time_of_ranges(read_table(text, RANGES), steps)
    return Profile(
        step_ms=(measured[1] - measured[0]) / NS_PER_MS / steps,
        phases={cost.name: cost.ms for cost in in_ranges if cost.name in phases},
        operators=[cost for cost in in_ranges if cost.name.startswith(OPERATORS)],
        kernels=costliest_first(
            Cost(
                row["Name"],
                float(row["Total Time (ns)"]) / NS_PER_MS / steps,
                int(row["Instances"]) / steps,
            )
            for row in read_table(text, KERNELS)
        ),
        idle=idle_share(map(times_of, kernels), measured),
        on_gpu=True,
    )


def times_of(row: Row) -> Interval:
    """(begin, end) of a row of cuda_gpu_trace, in nanoseconds."""
    begin = float(row["Start (ns)"])
    return begin, begin + float(row["Duration (ns)"])


def time_of_ranges(rows: Sequence[Row], steps: int) -> list[Cost]:
    """What the GPU did for the NVTX ranges of each name, the costliest first."""
    total: dict[str, list[float]] = {}
    for row in rows:
        found = total.setdefault(name_of_range(row["Range"]), [0.0, 0.0])
        found[0] += float(row["Total Proj Time (ns)"]) / NS_PER_MS / steps
        found[1] += int(row["Range Instances"]) / steps
    return costliest_first(Cost(name, ms, calls) for name, (ms, calls) in total.items())


def name_of_range(text: str) -> str:
    """ "forward" of ":forward, op_id = 12": nsys puts a domain in front, PyTorch numbers behind,
    which tell the calls apart."""
    return re.sub(r"(, (seq|op_id) = \d+)+$", "", text.removeprefix(":"))
