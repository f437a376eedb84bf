"""Building a cache: where the time goes, from image files to shards on the disk.

    python bench/bench_cache.py [--full] [--out FILE.json]
    pytest bench/bench_cache.py --benchmark-only

The tokenizers have random weights, which cost what the published ones cost. Decoding, encoding and
writing overlap; the shares are of what the build waited for. `alone` are the rates of each part by
itself. Then a cache of random moments is verified completely. Without --full: few images, and of
the tokenizers only the one whose encoding is free.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import harness, timer  # noqa: E402
from bench.bench_decode import (  # noqa: E402
    PICTURES,
    as_row,
    data_parser,
    describe,
    write_pictures,
)
from heptapod_fast.data.cache.builder import Builder  # noqa: E402
from heptapod_fast.data.cache.check import find_damage  # noqa: E402
from heptapod_fast.data.cache.format import open_cache  # noqa: E402
from heptapod_fast.data.cache.plan import Plan  # noqa: E402
from heptapod_fast.data.cache.site import Site, lock_cache  # noqa: E402
from heptapod_fast.data.decoding import open_decoder  # noqa: E402
from heptapod_fast.data.files import find_images  # noqa: E402
from heptapod_fast.data.views import Views  # noqa: E402
from heptapod_fast.tokenizers import PRETRAINED, Patch, to_unit  # noqa: E402
from heptapod_fast.tokenizers.autoencoder import file_shapes  # noqa: E402
from heptapod_fast.world import choose_device  # noqa: E402

SIDE, ENCODED = 256, 8
SMALL = dict(tokenizers=("patch",), images=24, samples=2048)
FULL = dict(tokenizers=("kl16", "vq16", "patch"), images=64, samples=16384)


def tokenizer_of(name: str, device: torch.device):
    """kl16 or vq16 with small random weights; patch, whose encoding is free."""
    if name == "patch":
        return Patch(SIDE, 16)
    generator = torch.Generator().manual_seed(0)
    weights = {
        key: torch.randn(shape, generator=generator) * 0.02
        for key, shape in file_shapes(name).items()
    }
    return PRETRAINED[name](weights, SIDE).to(device)


def measure(
    name: str, folder: Path, device: torch.device, threads: int, count: int, progress=None
) -> dict:
    """Build one cache of the first `count` files: rates and shares."""
    images = find_images(folder)
    decoder = open_decoder("auto", device, threads)
    plan = Plan(
        replace(images, files=images.files[:count]),
        tokenizer_of(name, device),
        decoder,
        augmentation=Views(),
        batch=8,
        seed=0,
        shard_rows=8192,
        max_broken=0,
    )
    with tempfile.TemporaryDirectory() as out, lock_cache(Path(out) / "c.zarr"):
        site = Site(Path(out) / "c.zarr", plan)
        builder = Builder(site, threads)
        # Once, and no call of the timer: a cache can be built only once.
        begin = time.perf_counter()
        site.begin()
        builder.build(site.missing(), progress)
        built = time.perf_counter() - begin
        stored = site.finish().nbytes
    total = sum(builder.seconds.values())
    waited = {
        f"waited for {part}": f"{seconds / total:.1%}" for part, seconds in builder.seconds.items()
    }
    alone = parts_alone(plan, decoder, device)
    return {
        "images/s": round(count / built, 2),
        **waited,
        "decoding alone, images/s": round(count / alone["decoding"].median, 1),
        "encoding alone, images/s": round(ENCODED / alone["encoding"].median, 2),
        "writing alone, MB/s": round(stored / builder.seconds["writing"] / 1e6, 1),
        "preprocessing": decoder.preprocessing,
    }


def parts_alone(plan: Plan, decoder, device: torch.device) -> dict[str, timer.Timing]:
    """Decoding of all files, and encoding of one batch on all threads."""
    files = [file for file, _ in plan.files]
    pixels = np.empty((len(files), 3, SIDE, SIDE), np.uint8)
    decoder.decode(files, pixels)
    images = to_unit(torch.from_numpy(pixels[:ENCODED]).to(device))
    watches = {
        "decoding": timer.WallWatch(functools.partial(decoder.decode, files, pixels)),
        "encoding": timer.WallWatch(functools.partial(plan.tokenizer.encode, images), device.type),
    }
    return timer.in_turns(watches, rounds=2)


def verifying(samples: int) -> dict:
    """How fast a cache of random moments is checked."""
    from bench.loaders import CLASSES, Made, write_cache

    rng = np.random.default_rng(0)
    values = rng.standard_normal((samples, 2, 2, 16, 16, 16), np.float32).astype(np.float16)
    np.abs(values[:, :, 1], out=values[:, :, 1])
    with tempfile.TemporaryDirectory() as folder:
        made = Made(Path(folder), values, np.arange(samples) % CLASSES)
        write_cache(made, 8192)
        cache = open_cache(made.places["cache"])
        wrong = find_damage(cache)
        assert not wrong, wrong
        watches = {"verifying": timer.WallWatch(functools.partial(find_damage, cache))}
        seconds = timer.in_turns(watches, rounds=3)["verifying"].median
        return {
            "images/s": round(samples / seconds, 1),
            "MB": round(cache.nbytes / 1e6, 1),
            "GB/s": round(cache.nbytes / seconds / 1e9, 2),
        }


@pytest.mark.parametrize("name", ["patch", "kl16", "vq16"])
def bench_build(benchmark, name, tmp_path):
    write_pictures(PICTURES[0], tmp_path, ENCODED)
    found = benchmark.pedantic(measure, (name, tmp_path, torch.device("cpu"), 2, 8), rounds=1)
    benchmark.extra_info |= found
    assert found["images/s"] > 0


def main() -> None:
    """See the module's docstring."""
    options = parse()
    sizes = FULL if options.full else SMALL
    images = options.images or sizes["images"]
    samples = options.samples or sizes["samples"]
    device, threads = choose_device("auto"), os.cpu_count() or 1
    about = describe({"threads": threads, "images": images, "side": SIDE})
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write_pictures(PICTURES[0], Path(folder), images)
        for name in sizes["tokenizers"]:
            found = measure(name, Path(folder), device, threads, images)
            rows.append(as_row(f"building, {name}, {PICTURES[0]}", found))
            show(rows[-1])
    rows.append(as_row(f"verifying {samples:,} images of moments", verifying(samples)))
    show(rows[-1])
    if options.out:
        harness.write_results(options.out, rows, about)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = data_parser(__doc__)
    parser.add_argument("--images", type=int)
    parser.add_argument("--samples", type=int, help="of the cache that is verified")
    return parser.parse_args()


def show(row: dict) -> None:
    """A table of its own: what is measured of a cache has many names."""
    print(row["name"])
    for name, value in row["extra_info"].items():
        print(f"  {name:28}{value}", flush=True)


if __name__ == "__main__":
    main()
