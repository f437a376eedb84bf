"""Whole training steps as the loop runs them: images/s and TFLOP/s.

    python bench/bench_step.py
    pytest bench/bench_step.py --benchmark-only

Size tiny on CPU with both kinds of tokens, the local head and the baselines; size B on CUDA with
synthetic tokens. `bench/gpu.py` measures more on a GPU: sizes L and H, plain PyTorch, memory.
"""

from bench import harness
from bench.steps import case_of

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


def case(device, name):
    """One configuration."""
    return case_of(name, SHARED[device] | SETTINGS[device][name] | dict(device=device))


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
