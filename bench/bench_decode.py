"""Image files to pixels: DALI against Pillow, and torchvision where it is installed.

    pytest bench/bench_decode.py --benchmark-only
    python bench/bench_decode.py --out FILE.json

All decoders have the same number of threads and take turns in every round; a ratio is that of the
median rates. Files are read from the page cache.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.harness import Missing  # noqa: E402
from heptapod_fast.data.dali import DaliDecoder  # noqa: E402
from heptapod_fast.data.decoding import PillowDecoder  # noqa: E402
from heptapod_fast.data.logograms import Logograms, write_folder  # noqa: E402
from heptapod_fast.world import choose_device, device_name  # noqa: E402

SIDE, FILES, ROUNDS, GATE = 256, 96, 9, 3.0
ON_GPU = torch.cuda.is_available()
THREADS = [1, 2, 16] if ON_GPU else [1, 2]
PICTURES = ["photographs, 500 x 375", "logograms, 256 x 256"]
CONTENDERS = ["dali cpu", "dali cuda", "torchvision cpu"]


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


def write_pictures(name: str, folder: Path) -> list[Path]:
    """`FILES` JPEG files: photographs of both orientations and qualities 90..95, or logograms."""
    if name == PICTURES[1]:
        write_folder(Logograms(SIDE, FILES), folder / "set")
        return sorted(folder.rglob("*.jpg"))
    paths = [folder / f"{k}.jpg" for k in range(FILES)]
    for k, path in enumerate(paths):
        size = (500, 375) if k % 3 else (375, 500)
        photograph(*size, k).save(path, quality=90 + k % 6)
    return paths


class TorchvisionDecoder:
    """Decoding, bicubic resize with antialiasing and centre crop, as torchvision's users write it.

    It does not halve first, which these files do not need either.
    """

    def __init__(self, workers: int) -> None:
        try:
            from torchvision import io
            from torchvision.transforms.v2 import InterpolationMode, functional
        except ImportError as error:
            raise Missing("torchvision is not installed: pip install torchvision") from error
        self.io, self.v2, self.mode = io, functional, InterpolationMode.BICUBIC
        self.pool = ThreadPoolExecutor(workers)

    def decode(self, paths, out):
        def one(path, row):
            image = self.io.decode_jpeg(self.io.read_file(str(path)), self.io.ImageReadMode.RGB)
            image = self.v2.resize(image, [row.shape[-1]], self.mode, antialias=True)
            row[...] = self.v2.center_crop(image, [row.shape[-1]] * 2)

        return list(self.pool.map(one, paths, out))


def make(contender: str, threads: int):
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


def compare(paths: list[Path], threads: int, names: list[str], rounds: int = ROUNDS) -> dict:
    """{decoder: images/s with quartiles and against Pillow, CPU time, least PSNR of a file}."""
    torch.set_num_threads(1)  # the threads are the decoders' own
    decoders = {"pillow": PillowDecoder(threads)} | {name: make(name, threads) for name in names}
    out = {name: np.zeros((len(paths), 3, SIDE, SIDE), np.uint8) for name in decoders}
    rates: dict[str, list[float]] = {name: [] for name in decoders}
    used: dict[str, list[float]] = {name: [] for name in decoders}
    for turn in range(rounds + 1):
        for name, decoder in decoders.items():
            begin, busy = time.perf_counter(), time.process_time()
            reasons = decoder.decode(paths, out[name])
            if turn:  # the first one warms up
                used[name].append((time.process_time() - busy) / len(paths))
                rates[name].append(len(paths) / (time.perf_counter() - begin))
            assert not any(reasons), reasons
    reference, result = statistics.median(rates["pillow"]), {}
    for name, found in rates.items():
        low, middle, high = statistics.quantiles(found, n=4)
        result[name] = {
            "images/s": round(middle, 1),
            "quartiles": [round(low, 1), round(high, 1)],
            "against pillow": round(middle / reference, 3),
            "CPU ms per image": round(1e3 * statistics.median(used[name]), 3),
        }
        errors = np.square(out[name].astype(np.float32) - out["pillow"]).mean((1, 2, 3))
        if name != "pillow":
            least = 10 * np.log10(255**2 / errors.max()) if errors.any() else np.inf
            result[name]["PSNR, dB"] = str(np.round(least, 1))
        if name == "dali cuda":
            result[name]["gate"] = f"{GATE:g}x: {'yes' if middle >= GATE * reference else 'no'}"
    return result


@pytest.fixture(scope="module", params=PICTURES)
def paths(request, tmp_path_factory):
    """One set of pictures."""
    return request.param, write_pictures(request.param, tmp_path_factory.mktemp("pictures"))


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("threads", THREADS)
def bench_decode(benchmark, paths, threads, contender):
    name, files = paths
    benchmark.group = f"decode: {name}, {threads} threads"
    try:
        decoder = make(contender, threads)
    except Missing as error:
        pytest.skip(str(error))
    found = compare(files, threads, [contender], rounds=5)
    benchmark.extra_info |= found[contender] | {"pillow images/s": found["pillow"]["images/s"]}
    assert float(found[contender]["PSNR, dB"]) >= 40 or contender.startswith("torchvision")
    out = np.zeros((len(files), 3, SIDE, SIDE), np.uint8)
    benchmark.pedantic(decoder.decode, (files, out), rounds=3, iterations=1, warmup_rounds=1)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description="Measure decoding.")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    options = parser.parse_args()
    names, missing = [], {}
    for name in CONTENDERS:
        try:
            make(name, 1)
            names.append(name)
        except Missing as error:
            missing[name] = str(error)
    about = describe({"files": FILES, "side": SIDE, "rounds": ROUNDS, "missing": missing})
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for k, pictures in enumerate(PICTURES):
            Path(folder, str(k)).mkdir()
            paths = write_pictures(pictures, Path(folder, str(k)))
            for threads in THREADS:
                for name, entry in compare(paths, threads, names).items():
                    rows.append(as_row(f"{pictures}, {threads} threads, {name}", entry))
                    print(rows[-1]["name"], json.dumps(entry))
    options.out.write_text(
        json.dumps(
            {
                "datetime": datetime.datetime.now().isoformat(timespec="seconds"),
                "machine_info": about,
                "benchmarks": rows,
            },
            indent=1,
        )
        + "\n"
    )


def describe(settings: dict) -> dict:
    """The machine, the versions, the command and what it was told, as pytest-benchmark has it."""
    versions = {}
    for name in ("torch", "numpy", "pillow", "zarr", "nvidia-dali-cuda130", "torchvision"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "device": device_name(choose_device("auto")),
        "cpus": os.cpu_count(),
        "load before": round(os.getloadavg()[0], 2),
        "python_version": platform.python_version(),
        **versions,
        "command": " ".join(["python", *sys.argv]),
        **settings,
    }


def as_row(name: str, entry: dict) -> dict:
    """What was measured as pytest-benchmark stores it, for tools/report.py: seconds per image."""
    low, high = entry.get("quartiles", [entry["images/s"]] * 2)
    kept = {key: value for key, value in entry.items() if key != "quartiles"}
    return {
        "name": name,
        "extra_info": kept,
        "stats": {"median": 1 / entry["images/s"], "q1": 1 / high, "q3": 1 / low},
    }


if __name__ == "__main__":
    main()
