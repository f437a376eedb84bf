"""adaln (gated residual, LayerNorm, modulation of the diffusion MLP) against its peers.

    pytest bench/bench_adaln.py --benchmark-only

The chain: what one residual block computes between its products. The block: one residual block with
its modulation, fc1 and fc2, between the first and the last layer and under the last modulation,
as `diffusion_mlp` runs it. Bytes of the chain: 5 reads and 2 writes of rows x width in bf16
forward, 6 and 4 backward.
"""

import functools

import torch

from bench import harness
from bench.bench_diffusion_mlp import mlp_case
from heptapod_fast.ops.adaln import adaln

# Images x supervised tokens x noises, width of the diffusion MLP.
SHAPES = {
    "cuda": {"B": (128 * 128 * 4, 1024), "L": (128 * 128 * 4, 1280), "H": (64 * 128 * 4, 1536)},
    "cpu": {"tiny": (64, 32)},
}


def inputs(device, rows, width):
    def normal(*shape, dtype=torch.bfloat16):
        return torch.randn(shape, device=device, dtype=dtype, requires_grad=True)

    modulation = torch.randn(rows, 3 * width, device=device, dtype=torch.bfloat16)
    shift, scale, gate = (part.requires_grad_() for part in modulation.chunk(3, dim=1))
    vector = functools.partial(normal, width, dtype=torch.float32)
    arguments = (
        normal(rows, width),
        normal(rows, width),
        vector(),
        gate,
        shift,
        scale,
        vector(),
        vector(),
    )
    return arguments, (torch.randn_like(arguments[0]), torch.randn_like(arguments[0]))


def contender(implementation, backward, wrap=lambda f: f):
    def prepare(made):
        arguments, upstream = made
        function = wrap(lambda *arguments: adaln(*arguments, 1e-6, implementation))
        if backward:
            return harness.gradients(function, arguments, upstream, both=True)
        return functools.partial(function, *arguments)

    return prepare


def cases(device):
    found = []
    for size, (rows, width) in SHAPES[device].items():
        for backward in (False, True):
            direction = "forward and backward" if backward else "forward"
            found.append(
                harness.Case(
                    "adaln",
                    f"chain {direction}, {size}, {rows} x {width}",
                    functools.partial(inputs, device, rows, width),
                    {
                        "ours": contender(harness.fastest(device), backward),
                        "eager": contender("reference", backward),
                        "compiled": contender("reference", backward, harness.compiled),
                    },
                    bytes=(17 if backward else 7) * rows * width * 2,
                    gate=">= 1.15x compiled" if backward else "",
                    aim=">= 1.3x compiled" if backward else "",
                )
            )
        found.append(
            mlp_case(
                "adaln",
                f"one block forward and backward, {size}",
                device,
                rows,
                width,
                1,
                gate=">= 1.15x compiled",
                aim=">= 1.3x compiled",
            )
        )
    return found


bench_adaln = harness.benchmark_of(cases)
