"""A bench file's one call, in two forms: `bench` for pytest, `main` for the file as a script.

    bench_layer_norm = harness.bench(cases)

    if __name__ == "__main__":
        harness.main(cases)

cases(device) lists what is measured on "cpu" (small shapes, which show that everything works) and
on "cuda" (the shapes of the models).
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import figures, roofline
from bench.case import Case
from bench.measuring import Result, measure
from bench.process import ROOT
from heptapod_fast.world import choose_device, device_name

Cases = Callable[[str], list[Case]]


def device_here() -> str:
    """ "cuda" where there is a GPU, else "cpu"."""
    return choose_device("auto").type


# --------------------------------------------------------------------------------------- a script


def main(*lists: Cases) -> None:
    """Measure the cases of a bench file and print a table; the command line picks some."""
    described = sys.modules[lists[0].__module__].__doc__
    options = parser(described).parse_args()
    device = device_asked(options)
    report([case for cases in lists for case in cases(device)], device, options)


def main_of_sizes(cases_of: Callable[[str, str, int], list[Case]], batch: dict[str, int]) -> None:
    """As `main`, for steps of a model of a size and a batch that the command line names.

    cases_of: (device, size, batch) -> cases. batch: {device: images of a step}.
    """
    described = sys.modules[cases_of.__module__].__doc__
    flags = parser(described)
    flags.add_argument("--size", help="of the model: B, L, ... (default: B on a GPU, else tiny)")
    flags.add_argument("--batch", type=int, help="images of a step")
    options = flags.parse_args()
    device = device_asked(options)
    size = options.size or default_size(device)
    report(cases_of(device, size, options.batch or batch[device]), device, options)


def device_asked(options: argparse.Namespace) -> str:
    """--device, "auto" being the one that is there."""
    return device_here() if options.device == "auto" else options.device


def report(cases: Sequence[Case], device: str, options: argparse.Namespace) -> None:
    """Measure the cases that the command line picks; print a table, and write a file if asked."""
    chosen = [case for case in cases if options.only in f"{case.operation}: {case.name}"]
    if not chosen:
        raise SystemExit(f"--only {options.only!r}: no case has that in its name")
    rows = run(chosen, device, options.rounds)
    if options.out is not None:
        write_results(options.out, rows, machine(device))


def default_size(device: str) -> str:
    """Of a model whose steps are measured."""
    return "B" if device == "cuda" else "tiny"


def _rounds(text: str) -> int:
    """Of the command line: quartiles need two."""
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"expected 2 or more, found {text}")
    return int(text)


def parser(described: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """The flags that all bench files share. described: the docstring of the file."""
    columns = "\n".join(f"  {name:10}{what}" for name, what in figures.COLUMNS.items())
    found = argparse.ArgumentParser(
        description=described,
        epilog=f"columns of the table:\n{columns}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="cpu: small shapes"
    )
    found.add_argument("--only", default="", metavar="TEXT", help="cases with this in their names")
    found.add_argument("--rounds", type=_rounds, help="samples of each contender, 2 or more")
    found.add_argument(
        "--out", type=Path, metavar="FILE.json", help="write a file that tools/report.py reads"
    )
    found.set_defaults(**defaults)
    return found


def run(cases: Sequence[Case], device: str, rounds: int | None = None) -> list[dict]:
    """Measure and print, case by case. Returns the rows of a results file."""
    name = device_name(torch.device(device))
    print(f"{name}, torch {torch.__version__}")
    ceilings = roofline.ceilings(device)
    if ceilings.copy:
        print(
            f"measured ceilings: copy {ceilings.copy / 1e9:,.0f} GB/s, "
            f"product {ceilings.product / 1e12:,.0f} TFLOP/s"
        )
    rows: list[dict] = []
    everything: list[Result] = []
    table = figures.Table(cases, ceilings)
    title = ""
    for case in cases:
        results = measure(case, device, rounds)
        if title != case.operation:
            title = case.operation
            print(f"\n{table.heading(title)}")
        print("\n".join(table.lines(case, results)), flush=True)
        everything += results
        rows += rows_of(case, results)
    print("\n".join(["", *figures.missing_lines(everything)]).rstrip())
    return rows


def rows_of(case: Case, results: list[Result]) -> list[dict]:
    """The contenders of a case that ran, as a results file stores them."""
    ours = figures.timing_of_ours(results)
    return [
        figures.row(
            f"{case.operation}: {entry_name(case, each.contender)}", case, each.timing, ours
        )
        for each in results
        if each.timing is not None
    ]


def entry_name(case: Case, contender: str) -> str:
    """Case and contender; the case alone where nothing is compared."""
    return case.name if len(case.contenders) == 1 else f"{case.name}, {contender}"


def machine(device: str) -> dict[str, Any]:
    """What results say about where they come from; files of the project as seen from its root."""
    words = [word.removeprefix(f"{ROOT}/") for word in sys.argv]
    return {
        "python_version": platform.python_version(),
        "device": device_name(torch.device(device)),
        "torch": torch.__version__,
        "command": " ".join(["python", *words]),
    }


def write_results(path: Path, rows: list[dict], about: dict[str, Any]) -> None:
    """A file as pytest-benchmark writes it, with what tools/report.py reads."""
    result = {
        "datetime": datetime.datetime.now().isoformat(timespec="seconds"),
        "machine_info": about,
        "benchmarks": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {path}")


# ----------------------------------------------------------------------------------------- pytest


class Player:
    """pytest-benchmark's clock, which plays samples that the timer has taken.

    A row of pytest-benchmark is one contender, and would be timed by itself. Here all contenders of
    a case were timed in turns; each round of pytest-benchmark then moves this clock on by one of
    the samples.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.waiting: list[float] = []

    def __call__(self) -> float:
        return self.now

    def load(self, samples: Sequence[float]) -> None:
        """The samples to be played."""
        self.waiting = list(samples)

    def play(self) -> None:
        """What pytest-benchmark believes to be the function that it times."""
        if self.waiting:
            self.now += self.waiting.pop(0)


PLAYER = Player()


@functools.lru_cache(maxsize=1)
def latest(case: Case, device: str) -> list[Result]:
    """The contenders of a case are rows that follow each other: measured once, together."""
    return measure(case, device)


def bench(cases: Cases) -> Callable:
    """The pytest function of a bench file; bench/conftest.py gives it case and contender."""

    def one_row(benchmark, skip, case: Case, contender: str) -> None:
        benchmark.group = f"{case.operation}: {case.name}"
        results = latest(case, device_here())
        (found,) = (each for each in results if each.contender == contender)
        if found.missing:
            skip(found.why)
        assert found.timing is not None, f"{case.name}, {contender}: {found.why}"
        PLAYER.load(found.timing.samples)
        benchmark.pedantic(PLAYER.play, rounds=len(found.timing.samples), iterations=1)
        ours = figures.timing_of_ours(results)
        benchmark.extra_info |= figures.extra_info(case, found.timing, ours)

    one_row.cases = cases
    return one_row
