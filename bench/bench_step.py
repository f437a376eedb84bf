"""Whole training steps as the loop runs them: images/s, TFLOP/s and, where the peak is known, MFU.

`--size tiny` on CPU with both token kinds and the baselines, `--size B` on CUDA with synthetic
latents.
"""

import pytest
import torch

from heptapod_fast.config import Config
from heptapod_fast.resolve import share_of_batch
from heptapod_fast.train.loop import training_step
from heptapod_fast.train.metrics import peak_flops, training_flops
from heptapod_fast.train.parallel import World
from heptapod_fast.train.setup import prepare

CASES = {
    "heptapod discrete": dict(tokenizer="patch-vq"),
    "heptapod continuous": dict(tokenizer="patch"),
    "heptapod local head": dict(tokenizer="patch-vq", head="local", window=9, density=8),
    "1d-raster discrete": dict(system="1d-raster", tokenizer="patch-vq"),
    "1d-random discrete": dict(system="1d-random", tokenizer="patch-vq"),
}
CUDA_CASES = {
    "heptapod B continuous": dict(tokenizer="kl16"),
    "heptapod B discrete": dict(tokenizer="vq16"),
}


def steps(benchmark, config, device):
    """Benchmark one training step of a config."""
    run, _ = prepare(config, World(0, 1, torch.device(device)), lambda text: None)
    micro = share_of_batch(config, 1)
    run.system.train()

    def step():
        training_step(run, *micro)
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(step, rounds=20, iterations=1, warmup_rounds=3)
    seconds = benchmark.stats.stats.median if benchmark.stats else None
    if seconds:
        rate = config.batch / seconds
        benchmark.extra_info["images/s"] = round(rate, 1)
        benchmark.extra_info["TFLOP/s"] = round(rate * training_flops(run.system) / 1e12, 4)
        if peak_flops(run.world.device):
            share = rate * training_flops(run.system) / peak_flops(run.world.device)
            benchmark.extra_info["MFU"] = round(share, 4)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.benchmark(group="training step, tiny, batch 64")
def bench_tiny(benchmark, tmp_path, case):
    config = Config(
        size="tiny", device="cpu", logogram_count=2000, out=str(tmp_path), **CASES[case]
    ).resolve()
    steps(benchmark, config, "cpu")


@pytest.mark.parametrize("case", CUDA_CASES)
@pytest.mark.benchmark(group="training step, B, batch 128")
def bench_b(benchmark, tmp_path, case):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    config = Config(
        size="B", data="synthetic", batch=128, device="cuda", out=str(tmp_path), **CUDA_CASES[case]
    ).resolve()
    steps(benchmark, config, "cuda")
