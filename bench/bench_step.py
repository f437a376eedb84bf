"""Whole training steps as the loop runs them: images/s and TFLOP/s.

    python bench/bench_step.py
    pytest bench/bench_step.py --benchmark-only

Size tiny on CPU with both kinds of tokens, the local head and the baselines; size B on CUDA with
synthetic tokens. `bench/gpu.py` measures more on a GPU: sizes L and H, plain PyTorch, memory.

On a CPU a step takes turns with its FLOPs as square products in the activations' dtype: what this
machine can reach. "Ours is 0.4x" of them is a step at 40 % of that.
"""

import functools

import torch

from bench import harness
from bench.steps import case_of, flops_of
from heptapod_fast.world import choose_precision

SETTINGS = {
    "cpu": {
        "heptapod discrete": dict(tokenizer="patch-vq"),
        "heptapod continuous": dict(tokenizer="patch"),
        "heptapod local head": dict(tokenizer="patch-vq", head="local", window=9, density=8),
        "1d-raster discrete": dict(system="1d-raster", tokenizer="patch-vq"),
        "1d-random discrete": dict(system="1d-random", tokenizer="patch-vq"),
    },
    "cuda": {
        "heptapod B continuous": dict(tokenizer="kl16"),
        "heptapod B discrete": dict(tokenizer="vq16"),
    },
}
SHARED = {
    "cpu": dict(size="tiny", batch=64, logogram_count=2000),
    "cuda": dict(size="B", batch=128, data="synthetic"),
}


SIDE = 1024  # of square products


def square_products(flops, made=None):
    """So many FLOPs in products of square matrices, the last one of fewer rows."""
    dtype = choose_precision("auto", torch.device("cpu"))
    left, right = torch.randn(2, SIDE, SIDE).to(dtype).unbind()
    rows = round(flops / (2 * SIDE * SIDE))
    parts = [left] * (rows // SIDE) + [left[: rows % SIDE]]

    def call():
        for part in parts:
            part @ right

    return call


def case(device, name):
    """One configuration."""
    settings = SHARED[device] | SETTINGS[device][name] | dict(device=device)
    others = {}
    if device == "cpu":
        others["square_products"] = functools.partial(square_products, flops_of(settings))
    return case_of(name, settings, **others)


def tiny_cases(device):
    """On a CPU."""
    return [case("cpu", name) for name in SETTINGS["cpu"]] if device == "cpu" else []


def b_cases(device):
    """On a GPU."""
    return [case("cuda", name) for name in SETTINGS["cuda"]] if device == "cuda" else []


bench_tiny = harness.bench(tiny_cases)
bench_b = harness.bench(b_cases)

if __name__ == "__main__":
    harness.main(tiny_cases, b_cases)
