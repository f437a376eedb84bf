"""diffusion_mlp, the whole MLP of the diffusion loss, forward and backward, against its peers.

    python bench/bench_diffusion_mlp.py
    pytest bench/bench_diffusion_mlp.py --benchmark-only

FLOPs: per row and block 10 W^2 (modulation 6, fc1 2, fc2 2), 4 W^2 of the last modulation and 6 C W
of the first and last layer (2C results), twice as much again for the gradients. Bytes: what a block
keeps for its backward pass, written and read once. Rows are those of 32 images.
"""

import functools

import torch

from bench import harness
from bench.case import BOTH, Case, compiled, fastest, timed
from heptapod_fast.ops.diffusion_mlp import BlockWeights, DiffusionWeights, diffusion_mlp

CHANNELS, STEPS, REPEAT = 16, 1000, 4
EPS = 1e-6
# Rows, width, blocks.
SHAPES = {
    "cuda": {
        "B": (32 * 128 * 4, 1024, 6),
        "L": (32 * 128 * 4, 1280, 8),
        "H": (32 * 128 * 4, 1536, 12),
    },
    "cpu": {"tiny": (64, 32, 2)},
}


def inputs(device, rows, width, blocks):
    """(arguments of `mlp`, gradients of its output)."""

    def normal(*shape, dtype=torch.float32, scale=1.0):
        return (scale * torch.randn(shape, device=device)).to(dtype).requires_grad_()

    def layer(outputs, fan_in):
        return normal(outputs, fan_in, scale=fan_in**-0.5), normal(outputs)

    def block():
        norm = normal(width), normal(width)
        products = layer(width, width) + layer(width, width) + layer(3 * width, width)
        return BlockWeights(*norm, *products)

    weights = DiffusionWeights(
        *layer(width, CHANNELS),
        *layer(2 * width, width),
        *layer(2 * CHANNELS, width),
        tuple(block() for _ in range(blocks)),
    )
    xt = torch.randn(rows, CHANNELS, device=device)
    t = torch.randint(STEPS, (rows,), device=device)
    time = normal(STEPS, width, dtype=torch.bfloat16)
    condition = normal(rows // REPEAT, width, dtype=torch.bfloat16)
    upstream = torch.randn(rows, 2 * CHANNELS, device=device)
    return (xt, t, time, condition, *weights.flat()), (upstream,)


def mlp(xt, t, time, condition, *flat, implementation):
    """diffusion_mlp, its weights one by one, so that autograd sees them."""
    weights = DiffusionWeights.of(flat)
    return diffusion_mlp(xt, t, time, condition, weights, EPS, implementation)


def candidates(device):
    """{name: function of the arguments}."""
    eager = functools.partial(mlp, implementation="reference")
    ours = functools.partial(mlp, implementation=fastest(device))
    return {"ours": ours, "eager": eager, "compiled": compiled(eager)}


def mlp_case(operation, name, device, rows, width, blocks, **goals):
    """Forward and backward of an MLP of so many blocks."""
    plural = "s" if blocks > 1 else ""
    return Case(
        operation,
        f"{name}, {rows} x {width}, {blocks} block{plural}",
        functools.partial(inputs, device, rows, width, blocks),
        timed(candidates(device), BOTH),
        bytes=blocks * 16 * rows * width * 2,
        flops=3 * rows * ((10 * blocks + 4) * width**2 + 6 * CHANNELS * width),
        **goals,
    )


def cases(device):
    """Every size."""
    goals = dict(gate=">= 1.15x compiled", aim=">= 1.3x compiled")
    return [
        mlp_case("diffusion_mlp", f"forward and backward, {size}", device, *shape, **goals)
        for size, shape in SHAPES[device].items()
    ]


bench_diffusion_mlp = harness.bench(cases)

if __name__ == "__main__":
    harness.main(cases)
