"""Everything that only a GPU can settle, in sections that fit the time there is.

    python bench/gpu.py --out DIR [--sections NAME ...] [--minutes 9]
    python bench/gpu.py --list
    python bench/gpu.py --merge [FILE.json ...] [--out bench/results]

Needs one CUDA device, torch, triton, numpy, pytest and nvcc. Sections run by worth, each in a
process of its own, and are skipped or cut off when the minutes are over; sections that the result
file already holds for the same GPU and the same code are left out, so that several runs add up. It
writes DIR/gpu/GPU-DATE.json, DIR/GPU.md and DIR/PENDING.md. `--merge` takes files measured
elsewhere.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench import gpu_report  # noqa: E402
from bench.gpu_sections import SECTIONS, work  # noqa: E402


def main() -> int:
    """See the module's docstring."""
    options = parse()
    if options.worker:
        work(options.worker, options.rows, options.seconds)
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
    parser.add_argument("--sections", nargs="+", choices=list(SECTIONS), metavar="NAME",
                        help="these, done before or not; --list names them")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--list", action="store_true", help="name the sections and stop")
    parser.add_argument("--merge", type=Path, nargs="*", metavar="FILE",
                        help="add result files measured elsewhere (none: write the pages anew); "
                             "no GPU needed")
    parser.add_argument("--worker", choices=list(SECTIONS), help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    return parser.parse_args()


def read(path: Path) -> dict:
    """A result file; SystemExit says what is wrong with it."""
    try:
        result = json.loads(path.read_text())
        missing = {"gpu", "date", "versions", "code", "sections"} - result.keys()
    except (OSError, ValueError, AttributeError) as error:
        raise SystemExit(f"--merge {path}: not a result of bench/gpu.py: {error}") from None
    if missing:
        raise SystemExit(f"--merge {path}: not a result of bench/gpu.py, it lacks "
                         f"{', '.join(sorted(missing))}")
    return result


def measure(options: argparse.Namespace) -> None:
    """Run sections until they or the minutes are over, keeping what each has written."""
    deadline = time.monotonic() + 60 * options.minutes
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("bench/gpu.py measures on a CUDA device and finds none. Without one: "
                         "--list, --merge FILE, `pytest bench/ --benchmark-only`")
    about = describe(torch)
    known = stored(options.out, about) | stored(ROOT / "bench/results", about)
    merge({**about, "sections": {}}, options.out)
    for name in options.sections or SECTIONS:
        left = deadline - time.monotonic()
        if not options.sections and known.get(name, {}).get("status") == "done":
            print(f"{name}: measured already with this code, left out", flush=True)
            continue
        if left < 20:
            print(f"{name}: no time left", flush=True)
            continue
        section = run_section(name, left)
        print(f"{name}: {section['status']}, {len(section['rows'])} rows in "
              f"{section['seconds']:.0f} s{section['why'] and ': ' + section['why'][-1500:]}",
              flush=True)
        merge({**about, "sections": {name: section}}, options.out)


def run_section(name: str, seconds: float) -> dict:
    """One section in a process of its own: {"status", "seconds", "rows", "why"}."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        rows.touch()
        command = [sys.executable, __file__, "--worker", name, "--rows", str(rows), "--seconds",
                   str(max(10.0, seconds - 10))]
        try:
            done = subprocess.run(command, cwd=ROOT, text=True, errors="replace", timeout=seconds,
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                  env={**os.environ, "PYTHONPATH": str(ROOT)})
            output, code = done.stdout, done.returncode
        except subprocess.TimeoutExpired:
            output, code = "out of time", 124
        found = [json.loads(line) for line in rows.read_text().splitlines() if line.endswith("}")]
    status = "done" if code == 0 else "partial" if found else "failed"
    why = "" if code == 0 else output.replace(str(ROOT), ".").strip()[-3000:]
    return {"status": status, "seconds": round(time.monotonic() - begin, 1), "rows": found,
            "why": why}


def describe(torch) -> dict:
    """The machine, the versions and the code that a result belongs to."""
    import triton

    return {"gpu": torch.cuda.get_device_name(), "date": datetime.date.today().isoformat(),
            "multiprocessors": torch.cuda.get_device_properties(0).multi_processor_count,
            "versions": {"python": platform.python_version(), "torch": torch.__version__,
                         "triton": triton.__version__, "cuda": torch.version.cuda},
            "code": digest(), "command": "python bench/gpu.py"}


def digest() -> str:
    """What identifies the code that was measured."""
    total = hashlib.sha256()
    for folder in ("heptapod_fast", "kernels", "csrc", "bench"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cu", ".cpp", ".h", ".json") and "results" not in path.parts:
                total.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return total.hexdigest()[:12]


def file_name(about: dict) -> str:
    """gpu/nvidia-h200-2026-11-22.json"""
    return f"gpu/{about['gpu'].lower().replace(' ', '-')}-{about['date']}.json"


def stored(out: Path, about: dict) -> dict:
    """Sections measured before with this code on this kind of GPU."""
    found = {}
    for path in sorted((out / "gpu").glob("*.json")):
        result = json.loads(path.read_text())
        if result["gpu"] == about["gpu"]:
            found |= {name: section for name, section in result["sections"].items()
                      if section["code"] == about["code"]}
    return found


def merge(result: dict, out: Path) -> None:
    """Add sections to DIR/gpu/GPU-DATE.json; a newer measurement replaces an older one."""
    path = out / file_name(result)
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = json.loads(path.read_text()) if path.exists() else {**result, "sections": {}}
    for name, section in result["sections"].items():
        section.setdefault("code", result["code"])
        before = whole["sections"].get(name)
        # A section that was cut off does not replace a whole one of the same code.
        if not (before and before["status"] == "done" and section["status"] != "done"
                and before["code"] == section["code"]):
            whole["sections"][name] = section
    path.write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
