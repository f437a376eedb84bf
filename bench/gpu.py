"""Everything that only a GPU can settle, in sections that fit the time there is.

    python bench/gpu.py --out DIR [--sections NAME ...] [--minutes 9]
    python bench/gpu.py --list
    python bench/gpu.py --merge [FILE.json ...] [--out bench/results]

Needs one CUDA device, torch, triton, numpy and nvcc; tests need pytest and hypothesis. It installs
the project first if that has not happened. Sections (bench/sections) run by worth, each in a
process of its own, and are skipped or cut off when the minutes are over. Rows that the result files
hold for the same GPU, versions and code are not measured again, so that several runs add up. It
writes DIR/gpu/GPU-DATE.json, DIR/GPU.md and DIR/PENDING.md. `--merge` takes files measured
elsewhere.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

from bench import gpu_files
from bench.gpu_files import DONE, FAILED, PARTIAL, Result
from bench.pages.gpu_page import gpu_page
from bench.pages.pending_page import pending_page
from bench.process import CUT_OFF, ROOT, run
from bench.sections import SECTIONS
from bench.sections.work import OutOfTime, Row, Section, Unavailable, Work

LEAST = 40.0  # seconds that are worth a process: importing torch takes some of them
MARGIN = 15.0  # seconds before the deadline at which a section stops by itself
OUT_OF_TIME, UNAVAILABLE = 75, 69  # exit codes of a section's process
TEXT_KEPT = 3000  # characters of what a process has said


def main() -> int:
    """See the module's docstring."""
    options = parse()
    if options.worker:
        return work(options)
    if options.list:
        for section in SECTIONS.values():
            print(f"{section.name:28}{section.about}")
        return 0
    if options.merge is not None:
        for path in options.merge:
            gpu_files.merge(gpu_files.read(path), options.out)
    else:
        measure(options)
    write_pages(options.out)
    return 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results", metavar="DIR")
    parser.add_argument(
        "--sections",
        nargs="+",
        choices=list(SECTIONS),
        metavar="NAME",
        help="these, done before or not; --list names them",
    )
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--list", action="store_true", help="name the sections and stop")
    parser.add_argument(
        "--merge",
        type=Path,
        nargs="*",
        metavar="FILE",
        help="add result files measured elsewhere (none: write the pages anew); no GPU needed",
    )
    # A section's own process: bench/gpu.py calls itself.
    parser.add_argument("--worker", choices=list(SECTIONS), help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--state", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    return parser.parse_args()


def write_pages(out: Path) -> None:
    """DIR/GPU.md and DIR/PENDING.md."""
    results = gpu_files.read_all(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "GPU.md").write_text(gpu_page(results))
    (out / "PENDING.md").write_text(pending_page(results))
    print(f"written: {out / 'GPU.md'} and {out / 'PENDING.md'}")


# ------------------------------------------------------------------------------------ all sections


def measure(options: argparse.Namespace) -> None:
    """Run sections until they or the minutes are over, keeping what each has written."""
    deadline = time.monotonic() + 60 * options.minutes
    if not torch.cuda.is_available():
        raise SystemExit(
            "bench/gpu.py measures on a CUDA device and finds none. Without one: --list, --merge "
            "FILE, `python bench/bench_NAME.py`"
        )
    install(deadline)
    about = describe()
    for name in options.sections or SECTIONS:
        section = SECTIONS[name]
        known: Result = {}
        if not options.sections:
            known = gpu_files.stored(section, about, (options.out, ROOT / "bench/results"))
        if known.get("status") == DONE:
            print(f"{name}: measured already with this code, left out", flush=True)
            continue
        left = deadline - time.monotonic()
        if left < LEAST:
            print(f"{name}: no time left", flush=True)
            continue
        found = run_section(section, left, known.get("rows", []))
        gpu_files.merge({**about, "sections": {name: found}}, options.out)
        print(f"{name}: {found['status']}, {len(found['rows'])} rows, {found['seconds']:.0f} s")
        print(found["why"][-1500:], end="\n" if found["why"] else "", flush=True)


# What has to hold before anything is measured, in a process that has not imported it yet.
READY = (
    "import importlib.util as u\nfrom heptapod_fast.ops import library\n"
    "print(library.status())\n"
    "assert u.find_spec('heptapod_fast.kernels') and library.available('cuda')"
)
INSTALL = ("-m", "pip", "install", "--no-build-isolation", "--no-deps", "-q", "-e", ".")


def install(deadline: float) -> None:
    """Build and install this checkout unless it is; SystemExit says why it cannot be."""
    code, said = run([sys.executable, "-c", READY], deadline)
    if code != 0:
        begin = time.monotonic()
        _, built = run([sys.executable, *INSTALL], deadline)
        code, said = run([sys.executable, "-c", READY], deadline)
        print(f"pip install -e .: {time.monotonic() - begin:.0f} s", flush=True)
        if code != 0:
            raise SystemExit(
                "the project cannot be installed here, so nothing is measured:\n"
                f"{built[-TEXT_KEPT:]}\n{said[-TEXT_KEPT:]}"
            )
    print(said.strip(), flush=True)


def describe() -> Result:
    """The machine and the versions that a result belongs to."""
    import triton

    return {
        "gpu": torch.cuda.get_device_name(),
        "date": datetime.date.today().isoformat(),
        "multiprocessors": torch.cuda.get_device_properties(0).multi_processor_count,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "cuda": torch.version.cuda,
        },
        "command": "python bench/gpu.py",
    }


# ------------------------------------------------------------------------------------- one section


class Attempt(NamedTuple):
    """What a section's process left behind. trying: the (case, contender) at which it died, None
    if it ended by itself or ran out of time."""

    code: int
    rows: list[Row]
    trying: tuple[str, str] | None
    output: str


def run_section(section: Section, seconds: float, rows: list[Row]) -> Result:
    """One section, as a result file holds it.

    A contender that ends the process (a broken CUDA context, a crash) is left out, and another
    process goes on.

    rows: those that earlier runs have measured and this one need not.
    """
    begin = time.monotonic()
    deadline = begin + seconds
    failed: dict[str, dict[str, str]] = {}
    while True:
        attempt = one_process(section, rows, failed, deadline)
        rows = gpu_files.joined(rows, attempt.rows)
        if attempt.trying is None or deadline - time.monotonic() < LEAST:
            break
        case, contender = attempt.trying
        failed.setdefault(case, {})[contender] = last_line(attempt.output)
    is_done = attempt.code == 0
    incomplete = PARTIAL if rows else FAILED
    return {
        "status": DONE if is_done else incomplete,
        "seconds": round(time.monotonic() - begin, 1),
        "rows": rows,
        "why": "" if is_done else attempt.output.strip()[-TEXT_KEPT:],
        "code": gpu_files.digest(section),
    }


def one_process(
    section: Section, rows: list[Row], failed: dict[str, dict[str, str]], deadline: float
) -> Attempt:
    """Run a section's process; it is killed at the deadline and should stop before."""
    done = [row["case"] for row in rows if gpu_files.is_whole(row)]
    left = max(5.0, deadline - time.monotonic() - MARGIN)
    with tempfile.TemporaryDirectory() as folder:
        written, state = Path(folder) / "rows.jsonl", Path(folder) / "state.json"
        written.touch()
        state.write_text(json.dumps({"done": done, "failed": failed}))
        command = [sys.executable, __file__, "--worker", section.name, "--seconds", str(left)]
        command += ["--rows", str(written), "--state", str(state)]
        code, output = run(command, deadline)
        lines = [parsed(line) for line in written.read_text().splitlines()]
    found = [line for line in lines if line is not None]
    trying = None
    if found and "trying" in found[-1] and code not in (0, OUT_OF_TIME, CUT_OFF):
        trying = tuple(found[-1]["trying"])
    return Attempt(code, [line for line in found if "case" in line], trying, output)


def parsed(line: str) -> Row | None:
    """A row, or None for one that was torn off."""
    try:
        return json.loads(line)
    except ValueError:
        return None


def last_line(output: str) -> str:
    """How a process ended."""
    lines = output.strip().splitlines()
    return lines[-1][:500] if lines else "the process ended without a word"


def work(options: argparse.Namespace) -> int:
    """The section's own process. Returns its exit code."""
    state = json.loads(options.state.read_text())
    deadline = time.monotonic() + options.seconds
    given = Work(options.rows, deadline, set(state["done"]), state["failed"])
    try:
        SECTIONS[options.worker].measure(given)
    except OutOfTime:
        print("out of time")
        return OUT_OF_TIME
    except Unavailable as error:
        print(error)
        return UNAVAILABLE
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
