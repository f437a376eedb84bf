"""Image files to pixels: DALI against Pillow, and torchvision where it is installed.

    python bench/bench_decode.py [--full] [--out FILE.json]
    pytest bench/bench_decode.py --benchmark-only

All decoders have the same number of threads and take turns in every round; a ratio is that of the
median rates. Files are read from the page cache.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.metadata
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from bench import harness, timer
from bench.case import Missing
from heptapod_fast.data.dali import DaliDecoder
from heptapod_fast.data.decoding import PillowDecoder
from heptapod_fast.data.logograms import Logograms, write_folder

SIDE, GATE, LEAST_PSNR = 256, 3.0, 40.0
SMALL, FULL = dict(files=24, rounds=5), dict(files=96, rounds=9)
ON_GPU = torch.cuda.is_available()
THREADS = [1, 2, 16] if ON_GPU else [1, 2]
PHOTOGRAPHS, LOGOGRAMS = "photographs, 500 x 375", "logograms, 256 x 256"
PICTURES = [PHOTOGRAPHS, LOGOGRAMS]
CONTENDERS = ["dali cpu", "dali cuda", "torchvision cpu"]
PACKAGES = (
    "torch",
    "numpy",
    "pillow",
    "zarr",
    "google-crc32c",
    "nvidia-dali-cuda130",
    "torchvision",
)


# ---------------------------------------------------------------------------------------- pictures


def photograph(
    width: int,
    height: int,
    seed: int = 0,
    octaves: int = 8,
    fall: float = 0.6,
    discs: int = 20,
    radii: tuple[int, int] = (4, 60),
) -> Image.Image:
    """Smooth noise of several octaves, falling off as in photographs, under hard-edged discs."""
    rng = np.random.default_rng(seed)
    total = np.zeros((height, width, 3))
    for octave in range(1, octaves + 1):
        for channel in range(3):
            noise = rng.normal(size=(2**octave, 2**octave)).astype(np.float32)
            grown = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
            total[..., channel] += np.asarray(grown) * 2.0 ** (-fall * octave)
    total -= total.min()
    image = Image.fromarray((total * (255 / total.max())).astype(np.uint8))
    for _ in range(discs):
        x, y, radius = rng.integers(0, width), rng.integers(0, height), rng.integers(*radii)
        colour = tuple(rng.integers(0, 256, 3).tolist())
        ImageDraw.Draw(image).ellipse((x - radius, y - radius, x + radius, y + radius), colour)
    return image


def write_pictures(name: str, folder: Path, files: int = FULL["files"]) -> list[Path]:
    """JPEG files: photographs of both orientations and qualities 90..95, or logograms."""
    if name == LOGOGRAMS:
        write_folder(Logograms(SIDE, files), folder / "set")
        return sorted(folder.rglob("*.jpg"))
    paths = [folder / f"{k}.jpg" for k in range(files)]
    for k, path in enumerate(paths):
        size = (500, 375) if k % 3 else (375, 500)
        photograph(*size, k).save(path, quality=90 + k % 6)
    return paths


# ---------------------------------------------------------------------------------------- decoders


class TorchvisionDecoder:
    """Decoding, bicubic resize with antialiasing and centre crop, as torchvision's users write it.

    It does not halve first, which these files do not need either.
    """

    def __init__(self, workers: int) -> None:
        try:
            from torchvision import io
            from torchvision.transforms.v2 import InterpolationMode, functional
        except (ImportError, RuntimeError) as error:  # built for another PyTorch
            raise Missing(f"torchvision cannot be used here: {error}") from error
        self.io, self.v2 = io, functional
        self.mode = InterpolationMode.BICUBIC
        self.pool = ThreadPoolExecutor(workers)

    def decode(self, paths, out):
        """Fill `out`; a reason for every file that is broken (None here: they would raise)."""
        return list(self.pool.map(self._decode_one, paths, out))

    def _decode_one(self, path, row):
        side = row.shape[-1]
        image = self.io.decode_jpeg(self.io.read_file(str(path)), self.io.ImageReadMode.RGB)
        image = self.v2.resize(image, [side], self.mode, antialias=True)
        row[...] = self.v2.center_crop(image, [side, side])


def open_contender(contender: str, threads: int):
    """A decoder; Missing where it cannot run."""
    kind, device = contender.split()
    if device == "cuda" and not ON_GPU:
        raise Missing("no CUDA device")
    if kind == "torchvision":
        return TorchvisionDecoder(threads)
    try:
        return DaliDecoder(device, threads)
    except ImportError as error:
        raise Missing(str(error)) from error


# --------------------------------------------------------------------------------------- measuring


def decode_all(decoder, paths, pixels) -> None:
    """The call to be timed."""
    reasons = decoder.decode(paths, pixels)
    assert not any(reasons), reasons


def compare(paths: list[Path], threads: int, names: list[str], rounds: int) -> dict[str, dict]:
    """{decoder: seconds per image and their quartiles, and what a results file says of it}."""
    torch.set_num_threads(1)  # the threads are the decoders' own
    decoders = {"pillow": PillowDecoder(threads)}
    decoders |= {name: open_contender(name, threads) for name in names}
    pixels = {name: np.zeros((len(paths), 3, SIDE, SIDE), np.uint8) for name in decoders}
    watches = {
        name: timer.WallWatch(functools.partial(decode_all, decoder, paths, pixels[name]))
        for name, decoder in decoders.items()
    }
    timings = timer.in_turns(watches, rounds)
    pillow = timings["pillow"]
    found = {}
    for name, timing in timings.items():
        extra = rates(timing, pillow, len(paths))
        if name != "pillow":
            extra["PSNR, dB"] = str(np.round(psnr(pixels[name], pixels["pillow"]), 1))
        if name == "dali cuda":
            is_met = "yes" if timer.ratio(pillow, timing)[0] >= GATE else "no"
            extra["gate"] = f"{GATE:g}x: {is_met}"
        found[name] = extra
    return found


def rates(timing: timer.Timing, pillow: timer.Timing, files: int) -> dict:
    """Images per second with quartiles, against Pillow, and CPU time."""
    low, high = timing.quartiles
    return {
        "images/s": round(files / timing.median, 1),
        "quartiles": [round(files / high, 1), round(files / low, 1)],
        "against pillow": round(timer.ratio(pillow, timing)[0], 3),
        "CPU ms per image": round(1e3 * timing.cpu / files, 3),
    }


def psnr(found: np.ndarray, reference: np.ndarray) -> float:
    """Of the file that differs most, in dB."""
    errors = np.square(found.astype(np.float32) - reference).mean((1, 2, 3))
    return 10 * np.log10(255**2 / errors.max()) if errors.any() else np.inf


def as_row(name: str, entry: dict) -> dict:
    """What was measured as pytest-benchmark stores it, for tools/report.py: seconds per image."""
    low, high = entry.get("quartiles", [entry["images/s"]] * 2)
    kept = {key: value for key, value in entry.items() if key != "quartiles"}
    return {
        "name": name,
        "extra_info": kept,
        "stats": {"median": 1 / entry["images/s"], "q1": 1 / high, "q3": 1 / low},
    }


# ----------------------------------------------------------------------------- two ways to run it


@pytest.fixture(scope="module", params=PICTURES)
def paths(request, tmp_path_factory):
    """One set of pictures."""
    folder = tmp_path_factory.mktemp("pictures")
    return request.param, write_pictures(request.param, folder, SMALL["files"])


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("threads", THREADS)
def bench_decode(benchmark, paths, threads, contender):
    name, files = paths
    benchmark.group = f"decode: {name}, {threads} threads"
    try:
        decoder = open_contender(contender, threads)
    except Missing as error:
        pytest.skip(str(error))
    found = compare(files, threads, [contender], SMALL["rounds"])
    benchmark.extra_info |= found[contender] | {"pillow images/s": found["pillow"]["images/s"]}
    is_ours = not contender.startswith("torchvision")
    assert not is_ours or float(found[contender]["PSNR, dB"]) >= LEAST_PSNR
    pixels = np.zeros((len(files), 3, SIDE, SIDE), np.uint8)
    benchmark.pedantic(decoder.decode, (files, pixels), rounds=3, iterations=1, warmup_rounds=1)


def main() -> None:
    """See the module's docstring."""
    parser = data_parser(__doc__)
    options = parser.parse_args()
    sizes = FULL if options.full else SMALL
    names, missing = available()
    rows = []
    print(f"{'':44}{'images/s':>10}{'quartiles':>18}{'pillow x':>10}{'CPU ms':>8}{'PSNR':>7}")
    with tempfile.TemporaryDirectory() as folder:
        for number, pictures in enumerate(PICTURES):
            place = Path(folder, str(number))
            place.mkdir()
            paths = write_pictures(pictures, place, sizes["files"])
            for threads in THREADS:
                for name, entry in compare(paths, threads, names, sizes["rounds"]).items():
                    rows.append(as_row(f"{pictures}, {threads} threads, {name}", entry))
                    print(line(rows[-1]["name"], entry), flush=True)
    for name, why in missing.items():
        print(f"not here: {name}: {why}")
    if options.out:
        about = describe({**sizes, "side": SIDE, "missing": missing})
        harness.write_results(options.out, rows, about)


def available() -> tuple[list[str], dict[str, str]]:
    """(contenders that run here, {the others: why not})."""
    names, missing = [], {}
    for name in CONTENDERS:
        try:
            open_contender(name, 1)
            names.append(name)
        except Missing as error:
            missing[name] = str(error)
    return names, missing


def line(name: str, entry: dict) -> str:
    """A row of the printed table."""
    low, high = entry["quartiles"]
    return (
        f"{name:44}{entry['images/s']:>10,.1f}{f'{low:,.1f}-{high:,.1f}':>18}"
        f"{entry['against pillow']:>10.2f}{entry['CPU ms per image']:>8.2f}"
        f"{entry.get('PSNR, dB', ''):>7}"
    )


def data_parser(described: str | None) -> argparse.ArgumentParser:
    """The flags that the benchmarks of data share."""
    parser = argparse.ArgumentParser(
        description=described, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--full", action="store_true", help="the sizes that bench/results has, for minutes"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE.json", help="write a file that tools/report.py reads"
    )
    return parser


def describe(settings: dict) -> dict:
    """The machine, the versions, the command and what it was told, as pytest-benchmark has it."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        **harness.machine(harness.device_here()),
        "cpus": os.cpu_count(),
        "load before": round(os.getloadavg()[0], 2),
        **versions,
        "command": " ".join(["python", *sys.argv]),
        **settings,
    }


if __name__ == "__main__":
    main()
