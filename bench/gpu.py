"""Everything that only a GPU can settle, in sections that fit the time there is.

    python bench/gpu.py --out DIR [--sections NAME ...] [--minutes 9]
    python bench/gpu.py --list
    python bench/gpu.py --merge [FILE.json ...] [--out bench/results]

Needs one CUDA device, torch, triton, numpy, pytest and nvcc; it installs the project first if that
has not happened. Sections run by worth, each in a process of its own, and are skipped or cut off
when the minutes are over. Rows that the result files hold for the same GPU, versions and code are
not measured again, so that several runs add up. It writes DIR/gpu/GPU-DATE.json, DIR/GPU.md and
DIR/PENDING.md. `--merge` takes files measured elsewhere.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import platform
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench import gpu_report  # noqa: E402
from bench.gpu_sections import RESTART, SECTIONS, Work, run  # noqa: E402

LEAST = 40  # seconds; less goes into importing torch


def main() -> int:
    """See the module's docstring."""
    options = parse()
    if options.worker:
        state = json.loads(options.state.read_text())
        SECTIONS[options.worker](
            Work(
                options.rows,
                time.monotonic() + options.seconds,
                set(state["done"]),
                state["failed"],
            )
        )
        return 0
    if options.list:
        for name, section in SECTIONS.items():
            print(f"{name:28}{section.__doc__.splitlines()[0]}")
        return 0
    if options.merge is not None:
        for path in options.merge:
            merge(read(path), options.out)
    else:
        measure(options)
    gpu_report.write(options.out)
    print(f"written: {options.out / 'GPU.md'} and {options.out / 'PENDING.md'}")
    return 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Measure on a GPU.")
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
    for name, kind in (
        ("--worker", str),
        ("--rows", Path),
        ("--state", Path),
        ("--seconds", float),
    ):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    return parser.parse_args()


# -------------------------------------------------------------------------------------------- runs


def measure(options: argparse.Namespace) -> None:
    """Run sections until they or the minutes are over, keeping what each has written."""
    deadline = time.monotonic() + 60 * options.minutes
    import torch

    if not torch.cuda.is_available():
        raise SystemExit(
            "bench/gpu.py measures on a CUDA device and finds none. Without one: "
            "--list, --merge FILE, `pytest bench/ --benchmark-only`"
        )
    install(deadline)
    about = describe(torch)
    for name in options.sections or SECTIONS:
        known = {}
        if not options.sections:
            known = stored(name, about, (options.out, ROOT / "bench/results"))
        if known.get("status") == "done":
            print(f"{name}: measured already with this code, left out", flush=True)
            continue
        left = deadline - time.monotonic()
        if left < LEAST:
            print(f"{name}: no time left", flush=True)
            continue
        section = run_section(name, left, known.get("rows", []))
        merge({**about, "sections": {name: section}}, options.out)
        print(
            f"{name}: {section['status']}, {len(section['rows'])} rows in "
            f"{section['seconds']:.0f} s{section['why'] and ': ' + section['why'][-1500:]}",
            flush=True,
        )


# What has to hold before anything is measured, in a process that has not imported it yet.
READY = (
    "import importlib.util as u\nfrom heptapod_fast.ops import library\n"
    "print(library.status())\n"
    "assert u.find_spec('heptapod_fast.kernels') and library.available('cuda')"
)


def install(deadline: float) -> None:
    """Build and install this checkout unless it is; SystemExit says why it cannot be."""
    code, output = run([sys.executable, "-c", READY], deadline)
    if code:
        begin = time.monotonic()
        _, built = run(
            [
                sys.executable,
                "-m",
                "pip",
                "install",
                "--no-build-isolation",
                "--no-deps",
                "-q",
                "-e",
                ".",
            ],
            deadline,
        )
        code, output = run([sys.executable, "-c", READY], deadline)
        print(f"pip install -e .: {time.monotonic() - begin:.0f} s", flush=True)
        if code:
            raise SystemExit(
                f"the project cannot be installed here, so nothing is measured:\n"
                f"{built[-3000:]}\n{output[-2000:]}"
            )
    print(output.strip(), flush=True)


def run_section(name: str, seconds: float, rows: list[dict]) -> dict:
    """One section in processes of its own: {"status", "seconds", "rows", "why", "code"}.

    rows: those that earlier runs have measured and this one need not.
    """
    begin, deadline = time.monotonic(), time.monotonic() + seconds
    failed: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        written, state = Path(folder) / "rows.jsonl", Path(folder) / "state.json"
        written.touch()
        while True:
            state.write_text(
                json.dumps({"done": [r["case"] for r in rows if whole(r)], "failed": failed})
            )
            left = deadline - time.monotonic()
            code, output = run(
                [
                    sys.executable,
                    __file__,
                    "--worker",
                    name,
                    "--rows",
                    str(written),
                    "--state",
                    str(state),
                    "--seconds",
                    str(max(5.0, left - 15)),
                ],
                deadline,
            )
            found = [row for line in written.read_text().splitlines() if (row := parsed(line))]
            written.write_text("")
            rows = joined(rows, [row for row in found if "case" in row])
            broken = [row["failed"] for row in found if "failed" in row and "case" not in row]
            for case, contender, why in broken:
                failed.setdefault(case, {})[contender] = why
            if code != RESTART or not broken or deadline - time.monotonic() < LEAST:
                break
    status = "done" if code == 0 else "partial" if rows else "failed"
    return {
        "status": status,
        "seconds": round(time.monotonic() - begin, 1),
        "rows": rows,
        "why": "" if code == 0 else output.strip()[-3000:],
        "code": digest(name),
    }


def parsed(line: str) -> dict | None:
    """A row, or None for one that was torn off."""
    try:
        return json.loads(line)
    except ValueError:
        return None


def whole(row: dict) -> bool:
    """Whether a row need not be measured again: no contender was left out for want of time."""
    return not any(c["why"] == "no time left" for c in row.get("contenders", {}).values())


def joined(older: list[dict], newer: list[dict]) -> list[dict]:
    """Rows of two runs of one section; of two of the same case the newer one, a whole one first."""
    rows = {row["case"]: row for row in older}
    for row in newer:
        if row["case"] not in rows or whole(row) or not whole(rows[row["case"]]):
            rows[row["case"]] = row
    return list(rows.values())


def describe(torch) -> dict:
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


COMMON = (
    "heptapod_fast",
    "kernels",
    "csrc",
    "CMakeLists.txt",
    "setup.py",
    "bench/harness.py",
    "bench/gpu_sections.py",
)
BESIDE = {"adaln": ["diffusion_mlp"], "flow_loss": ["diffusion_loss"]}


def digest(section: str) -> str:
    """What identifies the code that a section measures."""
    paths = list(COMMON)
    if section.startswith("op-"):
        name = section[3:].removesuffix("-LH").removesuffix("-compiled")
        paths += [f"bench/bench_{each}.py" for each in [name, *BESIDE.get(name, [])]]
    elif section == "smoke" or section.startswith("tests"):
        paths += ["tests"]
    total = hashlib.sha256()
    for path in paths:
        for file in sorted((ROOT / path).rglob("*")) if (ROOT / path).is_dir() else [ROOT / path]:
            if file.suffix in (".py", ".cu", ".cuh", ".cpp", ".h", ".json", ".txt"):
                total.update(file.relative_to(ROOT).as_posix().encode() + file.read_bytes())
    return total.hexdigest()[:12]


# ------------------------------------------------------------------------------------------- files


def read(path: Path) -> dict:
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


def file_name(about: dict) -> str:
    """gpu/nvidia-h200-2026-11-22.json"""
    return f"gpu/{about['gpu'].lower().replace(' ', '-')}-{about['date']}.json"


def stored(name: str, about: dict, folders) -> dict:
    """A section as measured before with this code on this kind of GPU, the best there is."""
    found: dict = {}
    for folder in folders:
        for path in sorted((folder / "gpu").glob("*.json")):
            result = json.loads(path.read_text())
            section = result["sections"].get(name)
            if (
                section
                and section["code"] == digest(name)
                and result["gpu"] == about["gpu"]
                and result["versions"] == about["versions"]
                and found.get("status") != "done"
            ):
                found = {**section, "rows": joined(found.get("rows", []), section["rows"])}
    return found


def merge(result: dict, out: Path) -> None:
    """Add sections to DIR/gpu/GPU-DATE.json. Rows of the same code add up, other code replaces."""
    path = out / file_name(result)
    path.parent.mkdir(parents=True, exist_ok=True)
    all_ = json.loads(path.read_text()) if path.exists() else {**result, "sections": {}}
    for name, section in result["sections"].items():
        before = all_["sections"].get(name)
        if before and before["code"] == section["code"]:
            status = "done" if "done" in (before["status"], section["status"]) else "partial"
            rows = joined(before["rows"], section["rows"])
            section = {
                **section,
                "rows": rows,
                "status": status if rows else section["status"],
                "why": "" if status == "done" else section["why"],
            }
        all_["sections"][name] = section
    path.write_text(json.dumps(all_, indent=1) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
