"""A cache of tokens against the layouts that others read: samples/s, CPU time, first batch, files.

    python bench/bench_loader.py [--full] [--out FILE.json] [--folder TMP]
    pytest bench/bench_loader.py --benchmark-only

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
import functools
import gc
import multiprocessing
import os
import resource
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from bench import harness, timer  # noqa: E402
from bench.bench_decode import data_parser, describe  # noqa: E402
from bench.loaders import BATCH, CONTENDERS, PEER, Made, make  # noqa: E402

# Seconds are those of one turn.
SMALL = dict(samples=4096, shard_rows=256, rounds=3, seconds=0.2)
FULL = dict(samples=16384, shard_rows=512, rounds=7, seconds=2.0)
# contender, what is compared, how many times better than PEER it has to be
GATES = (
    ("ours, ram", "samples/s", 30),
    ("ours, stream", "samples/s", 8),
    ("ours, ram", "CPU time", 100),
)
SHOWN = {"samples/s": "samples/s", "CPU time": "CPU ms per batch", "first batch": "first batch ms"}


# ---------------------------------------------------------------------------------------- measuring


class LoaderWatch:
    """A loader on the one timer: a sample opens it, and is the time of a batch over some seconds.

    The timer's own watches call a function again and again. A loader works ahead, in threads and
    workers, so that a single batch says nothing, and its CPU time is that of the workers too.

    turns: {quantity: its value in every turn}.
    """

    calls, launched = 1, None

    def __init__(self, made: Made, contender: Callable, device: str, seconds: float):
        self.made, self.contender, self.device = made, contender, device
        self.seconds = seconds
        self.turns: dict[str, list[float]] = {name: [] for name in SHOWN}

    def sample(self) -> float:
        """One turn: seconds of a batch."""
        gc.collect()
        begin = time.perf_counter()
        batches = self.contender(self.made, device=self.device)
        batch = next(batches)
        wait(self.device)
        first = time.perf_counter() - begin
        if len(batch) == 3:
            check(self.made, batch)
        for _ in range(8 if multiprocessing.active_children() else 2):
            next(batches)
        wait(self.device)
        seconds, cpu = self._steady(batches)
        batches.close()  # ends the workers; a thread that reads ahead comes to its end meanwhile
        time.sleep(0.1)
        assert not multiprocessing.active_children()
        self.turns["samples/s"].append(BATCH / seconds)
        self.turns["CPU time"].append(cpu * 1e3)
        self.turns["first batch"].append(first * 1e3)
        return seconds

    def _steady(self, batches) -> tuple[float, float]:
        """Seconds and CPU seconds of a batch, once the loader is under way."""
        before, begin = cpu_seconds(), time.perf_counter()
        count = 0
        while time.perf_counter() - begin < self.seconds:
            next(batches)
            count += 1
        wait(self.device)
        elapsed = time.perf_counter() - begin
        return elapsed / count, (cpu_seconds() - before) / count


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
    """For the device, if there is one."""
    if device == "cuda":
        torch.cuda.synchronize()


def measure(made: Made, device: str, rounds: int, seconds: float) -> dict[str, dict]:
    """contender -> {quantity: its values in every round}, the contenders in turns."""
    watches = {
        name: LoaderWatch(made, contender, device, seconds)
        for name, (_, contender) in CONTENDERS.items()
        if device == "cuda" or not name.startswith("ours, gpu")
    }
    timer.in_turns(watches, rounds)
    return {name: ready.turns for name, ready in watches.items()}


# ---------------------------------------------------------------------------------------- as rows


def summary(made: Made, found: dict[str, dict], device: str) -> list[dict]:
    """Rows as pytest-benchmark stores them (seconds per batch), for tools/report.py."""
    peer = {key: statistics.median(values) for key, values in found[PEER].items()}
    rows = []
    for name, values in found.items():
        times = [BATCH / rate for rate in values["samples/s"]]
        low, median, high = statistics.quantiles(times, n=4, method="inclusive")
        stats = dict(min=min(times), max=max(times), median=median, q1=low, q3=high)
        extra = extra_info(made, name, values, peer)
        rows.append(
            {
                "name": f"{name}, to {device}",
                "extra_info": extra,
                "stats": stats | {"rounds": len(times)},
            }
        )
    return rows


def extra_info(
    made: Made, name: str, values: dict[str, list[float]], peer: dict[str, float]
) -> dict:
    """Medians with their range, size on disk, and the ratios to PEER. peer: its medians."""
    middle = {key: statistics.median(each) for key, each in values.items()}
    better = {
        "samples/s": middle["samples/s"] / peer["samples/s"],
        "CPU time": peer["CPU time"] / middle["CPU time"],
    }
    extra = {}
    for key, shown in SHOWN.items():
        extra[shown] = short(middle[key])
        extra[f"{shown}, min and max"] = [short(min(values[key])), short(max(values[key]))]
    size, extra["files"] = disk(made.places[CONTENDERS[name][0]])
    extra["MB"] = round(size / 1e6, 1)
    for what, times in better.items():
        extra[f"times better than {PEER}, {what}"] = short(times)
    for contender, what, least in GATES:
        if contender == name:
            verdict = "pass" if better[what] >= least else "fail"
            extra[f"gate, {what} {least} times better"] = verdict
    return extra


def short(value: float) -> float:
    """Four digits that count."""
    return round(value) if value > 1000 else float(f"{value:.4g}")


def disk(folder: Path) -> tuple[int, int]:
    """(bytes, files) as they lie on the disk, whole blocks."""
    files = [path.stat() for path in folder.rglob("*") if path.is_file()]
    return sum(stat.st_blocks for stat in files) * 512, len(files)


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


# ------------------------------------------------------------------------------- two ways to run it


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    """To the CPU, and to a GPU where there is one."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return request.param


@pytest.fixture(scope="module")
def measured():
    """(the small data, a function device -> contender -> its row of `summary`)."""
    for name in ("zarr", "google_crc32c"):
        pytest.importorskip(
            name, reason=f"{name} is not installed: pip install {name.replace('_', '-')}"
        )
    with tempfile.TemporaryDirectory() as folder:
        made = make(Path(folder), SMALL["samples"], SMALL["shard_rows"])

        @functools.cache
        def rows(device: str) -> dict[str, dict]:
            found = measure(made, device, SMALL["rounds"], SMALL["seconds"])
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


def main() -> None:
    """See the module's docstring."""
    options = parse()
    about = describe(settings_of(options))
    torch.set_num_threads(options.threads)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # removes the folder
    rows = []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        made = make(Path(folder), options.samples, options.shard_rows)
        for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            found = measure(made, device, options.rounds, options.seconds)
            rows += summary(made, found, device)
    print(table(rows))
    if options.out:
        harness.write_results(options.out, rows, about)


def parse() -> argparse.Namespace:
    """The command line; what is not given is that of SMALL, or with --full of FULL."""
    parser = data_parser(__doc__)
    parser.add_argument("--samples", type=int)
    parser.add_argument("--shard-rows", type=int)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--seconds", type=float, help="of one turn")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch in this process")
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path(tempfile.gettempdir()),
        help="where a temporary folder is made and removed again",
    )
    options = parser.parse_args()
    for name, value in (FULL if options.full else SMALL).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.rounds < 2:
        parser.error(f"--rounds {options.rounds}: a median with a spread needs at least 2")
    return options


def settings_of(options: argparse.Namespace) -> dict:
    """What a results file says of the measurement."""
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch threads": options.threads,
        "samples": options.samples,
        "batch": BATCH,
        "shard rows": options.shard_rows,
        "rounds": options.rounds,
        "seconds per turn": options.seconds,
        "page cache": "warm: files just written, nothing dropped",
    }


if __name__ == "__main__":
    main()
