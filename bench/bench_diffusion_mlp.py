"""diffusion_mlp, the whole MLP of the diffusion loss, forward and backward, against its peers.

    pytest bench/bench_diffusion_mlp.py --benchmark-only

Flops: per row and block 10 W^2 (modulation 6, fc1 2, fc2 2), 4 W^2 of the last modulation and 6 C W
of the first and last layer (2C results), twice as much again for the gradients. Rows are those of
32 images, so that graphs of many calls by three contenders fit into the memory of one GPU.
"""

import functools

import torch

from bench import harness
from heptapod_fast.ops.diffusion_mlp import BlockWeights, DiffusionWeights, diffusion_mlp

CHANNELS, STEPS, REPEAT = 16, 1000, 4
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
    def normal(*shape, dtype=torch.float32, scale=1.0):
        return (scale * torch.randn(shape, device=device)).to(dtype).requires_grad_()

    def layer(outputs, fan_in):
        return normal(outputs, fan_in, scale=fan_in**-0.5), normal(outputs)

    weights = DiffusionWeights(
        *layer(width, CHANNELS),
        *layer(2 * width, width),
        *layer(2 * CHANNELS, width),
        tuple(
            BlockWeights(
                normal(width),
                normal(width),
                *layer(width, width),
                *layer(width, width),
                *layer(3 * width, width),
            )
            for _ in range(blocks)
        ),
    )
    arguments = (
        normal(STEPS, width, dtype=torch.bfloat16),
        normal(rows // REPEAT, width, dtype=torch.bfloat16),
        *weights.flat(),
    )
    return (
        torch.randn(rows, CHANNELS, device=device),
        torch.randint(STEPS, (rows,), device=device),
        arguments,
        torch.randn(rows, 2 * CHANNELS, device=device),
    )


def contender(implementation, wrap=lambda f: f):
    def prepare(made):
        xt, t, arguments, upstream = made
        function = wrap(
            lambda time, condition, *flat: diffusion_mlp(
                xt, t, time, condition, DiffusionWeights.of(flat), 1e-6, implementation
            )
        )
        return harness.gradients(function, arguments, (upstream,), both=True)

    return prepare


def mlp_case(operation, name, device, rows, width, blocks, **goals):
    """Forward and backward of an MLP of so many blocks."""
    flops = 3 * rows * ((10 * blocks + 4) * width**2 + 6 * CHANNELS * width)
    return harness.Case(
        operation,
        f"{name}, {rows} x {width}, {blocks} block{'s' * (blocks > 1)}",
        functools.partial(inputs, device, rows, width, blocks),
        {
            "ours": contender(harness.fastest(device)),
            "eager": contender("reference"),
            "compiled": contender("reference", harness.compiled),
        },
        # What a block keeps is written and read once: it says when inputs exceed the L2 cache.
        bytes=blocks * 16 * rows * width * 2,
        flops=flops,
        **goals,
    )


def cases(device):
    return [
        mlp_case(
            "diffusion_mlp",
            f"forward and backward, {size}",
            device,
            *shape,
            gate=">= 1.15x compiled",
            aim=">= 1.3x compiled",
        )
        for size, shape in SHAPES[device].items()
    ]


bench_diffusion_mlp = harness.benchmark_of(cases)
