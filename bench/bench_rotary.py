"""rotary (two-dimensional rotary embedding of packed queries and keys) against its peers.

    python bench/bench_rotary.py
    pytest bench/bench_rotary.py --benchmark-only

Bytes: queries, keys and values read once and written once, in either direction.
"""

import functools
import itertools

import torch

from bench import harness
from bench.case import BACKWARD, FORWARD, Case, compiled, fastest, timed
from heptapod_fast.ops.rotary import grid_table, rotary

# Sequences, side of the grid, heads, width of a head.
SHAPES = {
    "cuda": {"B": (128, 16, 12, 64), "L": (64, 16, 16, 64), "XL": (32, 16, 20, 64)},
    "cpu": {"tiny": (8, 6, 4, 32)},
}


def inputs(device, batch, side, heads, width):
    """(arguments of rotary, gradients of its output)."""
    table = grid_table(side, width)[:-1].to(device)
    shape = (batch, len(table), 3, heads, width)
    qkv = torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True)
    return (qkv, table), (torch.randn_like(qkv),)


def candidates(device):
    """{name: function of the arguments}."""
    eager = functools.partial(rotary, implementation="reference")
    ours = functools.partial(rotary, implementation=fastest(device))
    return {"ours": ours, "eager": eager, "compiled": compiled(eager)}


def case(device, size, direction):
    """One size, one way."""
    batch, side, heads, width = SHAPES[device][size]
    elements = batch * side**2
    return Case(
        "rotary",
        f"{direction}, {size}, {elements} x {heads} x {width}",
        functools.partial(inputs, device, batch, side, heads, width),
        timed(candidates(device), direction),
        bytes=2 * elements * 3 * heads * width * 2,
    )


def cases(device):
    """Every size and direction."""
    return [case(device, *each) for each in itertools.product(SHAPES[device], (FORWARD, BACKWARD))]


bench_rotary = harness.bench(cases)

if __name__ == "__main__":
    harness.main(cases)
