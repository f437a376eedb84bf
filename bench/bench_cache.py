"""Building a cache: where the time goes, from image files to shards on the disk.

    pytest bench/bench_cache.py --benchmark-only
    python bench/bench_cache.py --out FILE.json

The tokenizers have random weights, which cost what the published ones cost. Decoding, encoding and
writing overlap; the shares are of what the build waited for. `alone` are the rates of each part by
itself. Then a cache of random moments is verified completely.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.bench_decode import PICTURES, as_row, describe, write_pictures  # noqa: E402
from heptapod_fast.data.cache.builder import Builder  # noqa: E402
from heptapod_fast.data.cache.check import find_damage  # noqa: E402
from heptapod_fast.data.cache.format import open_cache  # noqa: E402
from heptapod_fast.data.cache.plan import Plan  # noqa: E402
from heptapod_fast.data.cache.site import Site, lock_cache  # noqa: E402
from heptapod_fast.data.decoding import open_decoder  # noqa: E402
from heptapod_fast.data.files import find_images  # noqa: E402
from heptapod_fast.tokenizers import PRETRAINED, Patch, to_unit  # noqa: E402
from heptapod_fast.tokenizers.autoencoder import file_shapes  # noqa: E402
from heptapod_fast.world import choose_device  # noqa: E402

SIDE = 256


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
    names, files = find_images(folder)
    decoder = open_decoder("auto", device, threads)
    plan = Plan(
        folder,
        files[:count],
        names,
        tokenizer_of(name, device),
        decoder,
        flip=False,
        batch=8,
        seed=0,
        shard_rows=8192,
        max_broken=0,
    )
    with tempfile.TemporaryDirectory() as out, lock_cache(Path(out) / "c.zarr"):
        site = Site(Path(out) / "c.zarr", plan)
        builder = Builder(site, threads)
        begin = time.perf_counter()
        site.begin()
        builder.build(site.missing(), progress)
        built = time.perf_counter() - begin
        cache = site.finish()
        total = sum(builder.seconds.values())
        writing = builder.seconds["writing"]
        pixels = np.empty((count, 3, SIDE, SIDE), np.uint8)
        begin = time.perf_counter()
        decoder.decode([path for path, _ in plan.files], pixels)
        decoding = time.perf_counter() - begin
        return {
            "images/s": round(count / built, 2),
            **{
                f"waited for {part}": f"{seconds / total:.1%}"
                for part, seconds in builder.seconds.items()
            },
            "decoding alone, images/s": round(count / decoding, 1),
            "encoding alone, images/s": round(_encoding(plan, pixels, device), 2),
            "writing alone, MB/s": round(cache.nbytes / writing / 1e6, 1),
            "preprocessing": decoder.preprocessing,
        }


def _encoding(plan: Plan, pixels: np.ndarray, device: torch.device) -> float:
    """Images a second of the tokenizer, one batch at a time on all threads."""
    images = to_unit(torch.from_numpy(pixels[:8]).to(device))
    plan.tokenizer.encode(images)
    begin = time.perf_counter()
    for _ in range(2):
        plan.tokenizer.encode(images)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 16 / (time.perf_counter() - begin)


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
        begin = time.perf_counter()
        wrong = find_damage(cache)
        seconds = time.perf_counter() - begin
        assert not wrong, wrong
        return {
            "images/s": round(samples / seconds, 1),
            "MB": round(cache.nbytes / 1e6, 1),
            "GB/s": round(cache.nbytes / seconds / 1e9, 2),
        }


@pytest.mark.parametrize("name", ["patch", "kl16", "vq16"])
def bench_build(benchmark, name, tmp_path):
    write_pictures(PICTURES[0], tmp_path)
    found = benchmark.pedantic(measure, (name, tmp_path, torch.device("cpu"), 2, 8), rounds=1)
    benchmark.extra_info |= found
    assert found["images/s"] > 0


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description="Measure building a cache.")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--samples", type=int, default=16384, help="of the cache that is verified")
    options = parser.parse_args()
    device, threads = choose_device("auto"), os.cpu_count() or 1
    about = describe({"threads": threads, "images": options.images, "side": SIDE})
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write_pictures(PICTURES[0], Path(folder))
        for name in ("kl16", "vq16", "patch"):
            found = measure(name, Path(folder), device, threads, options.images)
            rows.append(as_row(f"building, {name}, {PICTURES[0]}", found))
            print(rows[-1]["name"], json.dumps(found), flush=True)
    checked = verifying(options.samples)
    rows.append(as_row(f"verifying {options.samples:,} images of moments", checked))
    print(rows[-1]["name"], json.dumps(checked))
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


if __name__ == "__main__":
    main()
