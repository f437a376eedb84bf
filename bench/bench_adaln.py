"""adaln (gated residual, LayerNorm, modulation of the diffusion MLP) against its peers.

    python bench/bench_adaln.py
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
from bench.case import BOTH, FORWARD, Case, compiled, fastest, timed
from heptapod_fast.ops.adaln import adaln

# Images x supervised tokens x noises, width of the diffusion MLP.
SHAPES = {
    "cuda": {"B": (128 * 128 * 4, 1024), "L": (128 * 128 * 4, 1280), "H": (64 * 128 * 4, 1536)},
    "cpu": {"tiny": (64, 32)},
}
PASSES = {FORWARD: 7, BOTH: 17}
GOALS = dict(gate=">= 1.15x compiled", aim=">= 1.3x compiled")


def inputs(device, rows, width):
    """(arguments of adaln, gradients of its outputs); gate, shift and scale are parts of one
    tensor, as a product makes them."""

    def normal(*shape, dtype=torch.bfloat16):
        return torch.randn(shape, device=device, dtype=dtype, requires_grad=True)

    modulation = torch.randn(rows, 3 * width, device=device, dtype=torch.bfloat16)
    shift, scale, gate = (part.requires_grad_() for part in modulation.chunk(3, dim=1))
    x, branch = normal(rows, width), normal(rows, width)
    branch_bias, weight, bias = (normal(width, dtype=torch.float32) for _ in range(3))
    arguments = (x, branch, branch_bias, gate, shift, scale, weight, bias)
    return arguments, (torch.randn_like(x), torch.randn_like(x))


def candidates(device):
    """{name: function of the arguments}."""
    eager = functools.partial(adaln, eps=1e-6, implementation="reference")
    ours = functools.partial(adaln, eps=1e-6, implementation=fastest(device))
    return {"ours": ours, "eager": eager, "compiled": compiled(eager)}


def chain(device, size, direction, **goals):
    """adaln alone."""
    rows, width = SHAPES[device][size]
    return Case(
        "adaln",
        f"chain {direction}, {size}, {rows} x {width}",
        functools.partial(inputs, device, rows, width),
        timed(candidates(device), direction),
        bytes=PASSES[direction] * rows * width * 2,
        **goals,
    )


def cases(device):
    """The chain both ways and the block, for every size."""
    found = []
    for size, (rows, width) in SHAPES[device].items():
        found.append(chain(device, size, FORWARD))
        found.append(chain(device, size, BOTH, **GOALS))
        name = f"one block forward and backward, {size}"
        found.append(mlp_case("adaln", name, device, rows, width, blocks=1, **GOALS))
    return found


bench_adaln = harness.bench(cases)

if __name__ == "__main__":
    harness.main(cases)
