"""A cache of tokens against the layouts that others read: samples/s, CPU time, first batch, files.

    pytest bench/bench_loader.py --benchmark-only                    4,096 samples, under a minute
    python bench/bench_loader.py --out FILE.json [--samples 16384] [--folder TMP]

The same random kl16 moments (mean and std of 16 x 16 x 16, two views) in three layouts, all read to
a batch of 256: mean, std and labels as tensors on the CPU; on CUDA measured once more to the
device, the peers through pinned memory. The first batch of every loader is compared with what was
written.

    ours, ram | stream | gpu    CacheTokens.rows; "ours, ram, tokens" is CacheTokens.batch, which
                                also draws the tokens from the posterior
    MAR npz                     one npz per image in class folders, float32 (32, 16, 16) for each of
                                two views, one of them read (mar:util/loader.py), DataLoader
    tar                         WebDataset's layout and its shuffle buffer of 1000: tars of .npy
                                (float16, both views) and .cls, read in sequence
    zarr rows | shards          our cache through zarr: 256 random rows (sorted, which zarr likes
                                best), or shard by shard, shuffled inside of each

Stream reads ahead by windows of 8 shards and begins again with every epoch, so that shards are made
small here (512 rows, not 8192): an epoch of 16,384 samples is four windows, each of them read and
verified every time it comes.

Contenders run in turns, so that noise meets all alike. A turn opens the loader (first batch: from
before that, opening, verification and the start of workers included), reads two batches, or eight
where workers have some prepared by then, and measures the next ones for some seconds. CPU time is
that of this process and its workers, user and system, from Linux's /proc. Everything is in the page
cache: the files were just written, nothing is dropped.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import gc
import json
import multiprocessing
import os
import platform
import resource
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from bench.loaders import BATCH, CONTENDERS, PEER, Made, make  # noqa: E402
from heptapod_fast.world import device_name  # noqa: E402

SMALL = dict(samples=4096, shard_rows=256)
# contender, what is compared, how many times better than PEER it has to be
GATES = (
    ("ours, ram", "samples/s", 30),
    ("ours, stream", "samples/s", 8),
    ("ours, ram", "CPU time", 100),
)
SHOWN = {"samples/s": "samples/s", "CPU time": "CPU ms per batch", "first batch": "first batch ms"}


# ---------------------------------------------------------------------------------------- measuring


def cpu_seconds() -> float:
    """User and system time of this process and of its workers so far."""
    used, ticks = resource.getrusage(resource.RUSAGE_SELF), 0
    for worker in multiprocessing.active_children():
        # utime and stime; the name before them is in brackets and may hold spaces.
        fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return used.ru_utime + used.ru_stime + ticks / os.sysconf("SC_CLK_TCK")


def check(made: Made, batch: tuple) -> None:
    """AssertionError unless the rows of a batch are rows that were written, with their labels."""
    mean, std, labels = (part.cpu().numpy() for part in batch)
    assert mean.shape == std.shape == (BATCH, 16, 16, 16) and labels.shape == (BATCH,)
    mean, std = mean.astype(np.float16), std.astype(np.float16)
    found = [made.known[row.tobytes()] for row in np.ascontiguousarray(mean[:, 0, 0, :8])]
    image, view = np.divmod(found, 2)
    assert len(set(image)) == BATCH and 0.2 < view.mean() < 0.8
    assert (mean == made.values[image, view, 0]).all() and (labels == made.labels[image]).all()
    assert (std == made.values[image, view, 1]).all()


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def turn(made: Made, contender: Callable, device: str, seconds: float) -> dict[str, float]:
    """One turn of a contender: samples/s, CPU time (ms per batch) and first batch (ms)."""
    gc.collect()
    begin = time.perf_counter()
    batches = contender(made, device=device)
    batch = next(batches)
    wait(device)
    first = time.perf_counter() - begin
    if len(batch) == 3:
        check(made, batch)
    for _ in range(8 if multiprocessing.active_children() else 2):
        batch = next(batches)
    wait(device)
    cpu, begin, count = cpu_seconds(), time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        batch = next(batches)
        count += 1
    wait(device)
    elapsed = time.perf_counter() - begin
    cpu = cpu_seconds() - cpu
    batches.close()  # ends the workers; a thread that reads ahead comes to its end meanwhile
    time.sleep(0.1)
    assert not multiprocessing.active_children()
    return {
        "samples/s": count * BATCH / elapsed,
        "CPU time": cpu / count * 1e3,
        "first batch": first * 1e3,
    }


def measure(made: Made, device: str, rounds: int, seconds: float) -> dict[str, dict]:
    """contender -> {quantity: its values in every round}, the contenders in turns."""
    there = {
        name: contender
        for name, (_, contender) in CONTENDERS.items()
        if device == "cuda" or not name.startswith("ours, gpu")
    }
    found = {name: [] for name in there}
    for number in range(rounds):
        for name, contender in there.items():
            found[name].append(turn(made, contender, device, seconds))
        print(f"{device}: round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    return {
        name: {key: [turn[key] for turn in turns] for key in turns[0]}
        for name, turns in found.items()
    }


def disk(folder: Path) -> tuple[int, int]:
    """(bytes, files) as they lie on the disk, whole blocks."""
    files = [path.stat() for path in folder.rglob("*") if path.is_file()]
    return sum(stat.st_blocks for stat in files) * 512, len(files)


def summary(made: Made, found: dict[str, dict], device: str) -> list[dict]:
    """Rows as pytest-benchmark stores them (seconds per batch), for tools/report.py."""

    def short(values: list[float]) -> list[float]:
        return [round(value) if value > 1000 else float(f"{value:.4g}") for value in values]

    rows, peer = [], {key: statistics.median(v) for key, v in found[PEER].items()}
    for name, values in found.items():
        middle = {key: statistics.median(v) for key, v in values.items()}
        better = {
            "samples/s": middle["samples/s"] / peer["samples/s"],
            "CPU time": peer["CPU time"] / middle["CPU time"],
        }
        extra = {}
        for key, shown in SHOWN.items():
            (extra[shown],) = short([middle[key]])
            extra[f"{shown}, min and max"] = short([min(values[key]), max(values[key])])
        size, extra["files"] = disk(made.places[CONTENDERS[name][0]])
        extra["MB"] = round(size / 1e6, 1)
        extra |= {
            f"times better than {PEER}, {what}": short([ratio])[0] for what, ratio in better.items()
        }
        extra |= {
            f"gate, {what} {least} times better": "pass" if better[what] >= least else "fail"
            for contender, what, least in GATES
            if contender == name
        }
        times = [BATCH / rate for rate in values["samples/s"]]
        low, median, high = statistics.quantiles(times, n=4, method="inclusive")
        rows.append(
            {
                "name": f"{name}, to {device}",
                "extra_info": extra,
                "stats": {
                    "min": min(times),
                    "max": max(times),
                    "median": median,
                    "q1": low,
                    "q3": high,
                    "rounds": len(times),
                },
            }
        )
    return rows


# ------------------------------------------------------------------------------- two ways to run it


@pytest.fixture(scope="module")
def measured():
    """(the small data, a function device -> contender -> its row of `summary`)."""
    for name in ("zarr", "google_crc32c"):
        pytest.importorskip(
            name, reason=f"{name} is not installed: pip install {name.replace('_', '-')}"
        )
    with tempfile.TemporaryDirectory() as folder:
        made = make(Path(folder), **SMALL)

        @functools.cache
        def rows(device: str) -> dict[str, dict]:
            found = measure(made, device, rounds=3, seconds=0.2)
            return dict(zip(found, summary(made, found, device), strict=True))

        yield made, rows


@pytest.mark.parametrize("name", CONTENDERS)
@pytest.mark.benchmark(group="loader, 4 batches of 256 kl16 moments")
def bench_loader(benchmark, measured, device, name):
    if device == "cpu" and name.startswith("ours, gpu"):
        pytest.skip("mode gpu needs a CUDA device")
    made, rows = measured
    batches = CONTENDERS[name][1](made, device=device)
    # Several at once: workers hand their batches over together.
    benchmark.pedantic(
        lambda: ([next(batches) for _ in range(4)], wait(device)),
        rounds=3,
        iterations=1,
        warmup_rounds=1,
    )
    batches.close()
    benchmark.extra_info |= rows(device)[name]["extra_info"]


def describe(options: argparse.Namespace, load: tuple) -> dict:
    """The machine and the settings."""
    versions = {name: metadata.version(name) for name in ("numpy", "zarr", "google-crc32c")}
    return {
        "device": device_name(torch.device("cpu")),
        "cpus": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch threads": torch.get_num_threads(),
        "load before": [round(v, 2) for v in load],
        "python_version": platform.python_version(),
        "torch": torch.__version__,
        **versions,
        "command": " ".join(["python", "bench/bench_loader.py", *sys.argv[1:]]),
        "samples": options.samples,
        "batch": BATCH,
        "shard rows": options.shard_rows,
        "rounds": options.rounds,
        "seconds per turn": options.seconds,
        "page cache": "warm: files just written, nothing dropped",
    }


def table(rows: list[dict]) -> str:
    """What the command prints."""
    lines = [
        f"{'':32}{'samples/s':>12}{'min .. max':>22}{'CPU ms':>9}{'first ms':>10}{'MB':>9}"
        f"{'files':>8}{'rate x':>8}{'CPU x':>8}"
    ]
    for row in rows:
        extra = row["extra_info"]
        rate, cpu, first = (extra[shown] for shown in SHOWN.values())
        low, high = extra["samples/s, min and max"]
        better = [extra[f"times better than {PEER}, {what}"] for what in ("samples/s", "CPU time")]
        lines.append(
            f"{row['name']:32}{rate:>12,.0f}{f'{low:,.0f} .. {high:,.0f}':>22}{cpu:>9.2f}"
            f"{first:>10.1f}{extra['MB']:>9,.1f}{extra['files']:>8,}{better[0]:>8.2f}"
            f"{better[1]:>8.2f}"
        )
        lines += [f"    {key}: {value}" for key, value in extra.items() if key.startswith("gate")]
    return "\n".join(lines)


def main() -> None:
    """The full measurement."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    parser.add_argument("--samples", type=int, default=16384)
    parser.add_argument("--shard-rows", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=2.0, help="of one turn")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch in this process")
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path(tempfile.gettempdir()),
        help="where a temporary folder is made and removed again",
    )
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error(f"--rounds {options.rounds}: a median with a spread needs at least 2")
    load = os.getloadavg()
    torch.set_num_threads(options.threads)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # removes the folder
    rows = []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        made = make(Path(folder), options.samples, options.shard_rows)
        for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            found = measure(made, device, options.rounds, options.seconds)
            rows += summary(made, found, device)
        about = describe(options, load)
    result = {
        "datetime": datetime.datetime.now().isoformat(timespec="seconds"),
        "machine_info": about,
        "benchmarks": rows,
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(rows))
    print(f"written: {options.out}")


if __name__ == "__main__":
    main()
