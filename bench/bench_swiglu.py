"""swiglu (the gate of LLaMA's MLP) against its peers.

    python bench/bench_swiglu.py
    pytest bench/bench_swiglu.py --benchmark-only

Bytes: 3 passes forward, 5 backward, of rows x width in bf16.
"""

import functools
import itertools

import torch

from bench import harness
from bench.case import BACKWARD, FORWARD, Case, compiled, fastest, timed
from heptapod_fast.ops.swiglu import swiglu

SHAPES = {
    "cuda": {"B": (128 * 256, 2048), "L": (64 * 256, 2816), "XL": (32 * 256, 3584)},
    "cpu": {"tiny": (256, 512)},
}
PASSES = {FORWARD: 3, BACKWARD: 5}


def inputs(device, rows, width):
    """(arguments of swiglu, gradients of its output)."""
    make = functools.partial(torch.randn, rows, width, device=device, dtype=torch.bfloat16)
    return (make(requires_grad=True), make(requires_grad=True)), (make(),)


def candidates(device):
    """{name: function of the arguments}."""
    eager = functools.partial(swiglu, implementation="reference")
    ours = functools.partial(swiglu, implementation=fastest(device))
    return {"ours": ours, "eager": eager, "compiled": compiled(eager)}


def case(device, size, direction):
    """One size, one way."""
    rows, width = SHAPES[device][size]
    return Case(
        "swiglu",
        f"{direction}, {size}, {rows} x {width}",
        functools.partial(inputs, device, rows, width),
        timed(candidates(device), direction),
        bytes=PASSES[direction] * rows * width * 2,
    )


def cases(device):
    """Every size and direction."""
    return [case(device, *each) for each in itertools.product(SHAPES[device], (FORWARD, BACKWARD))]


bench_swiglu = harness.bench(cases)

if __name__ == "__main__":
    harness.main(cases)
