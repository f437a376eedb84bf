"""rms_norm alone and behind the residual sum (with dropout) against its peers.

    python bench/bench_rms_norm.py
    pytest bench/bench_rms_norm.py --benchmark-only

Bytes: passes over rows x width in bf16 (rms_norm: 2 forward, 3 backward; add_rms_norm: 4 forward, 4
backward, 5 with dropout).
"""

import functools
import itertools

import torch

from bench import harness
from bench.case import BACKWARD, FORWARD, Case, compiled, fastest, timed
from heptapod_fast.ops.dropout_mask import DropoutMask
from heptapod_fast.ops.rms_norm import add_rms_norm, rms_norm

SHAPES = {
    "cuda": {"B": (128 * 256, 768), "L": (64 * 256, 1024), "XL": (32 * 256, 1280)},
    "cpu": {"tiny": (256, 128)},
}
# {what: (dropout, None: the norm alone; passes over memory)}
KINDS = {
    "rms_norm": (None, {FORWARD: 2, BACKWARD: 3}),
    "add_rms_norm": (0.0, {FORWARD: 4, BACKWARD: 4}),
    "add_rms_norm dropout 0.1": (0.1, {FORWARD: 4, BACKWARD: 5}),
}


def rows_of(device, rows, width):
    return torch.randn(rows, width, device=device, dtype=torch.bfloat16, requires_grad=True)


def inputs(device, rows, width, drop):
    """(arguments, gradients of the outputs)."""
    weight = torch.ones(width, device=device, requires_grad=True)
    x = rows_of(device, rows, width)
    if drop is None:
        return (x, weight), (torch.randn_like(x),)
    mask = None
    if drop:
        keys = torch.randint(0, 2**32, (rows, 2), device=device)
        mask = DropoutMask(keys, torch.arange(rows, device=device), drop)
    branch = rows_of(device, rows, width)
    return (x, branch, weight, mask), (torch.randn_like(x), torch.randn_like(x))


def candidates(device, drop):
    """{name: function of the arguments}."""
    function = rms_norm if drop is None else add_rms_norm
    eager = functools.partial(function, implementation="reference")
    ours = functools.partial(function, implementation=fastest(device))
    return {"ours": ours, "eager": eager, "compiled": compiled(eager)}


def case(device, size, kind, direction):
    """One kind at one size, one way."""
    rows, width = SHAPES[device][size]
    drop, passes = KINDS[kind]
    return Case(
        "rms_norm",
        f"{kind} {direction}, {size}, {rows} x {width}",
        functools.partial(inputs, device, rows, width, drop),
        timed(candidates(device, drop), direction),
        bytes=passes[direction] * rows * width * 2,
    )


def cases(device):
    """Every size, kind and direction."""
    return [
        case(device, *each)
        for each in itertools.product(SHAPES[device], KINDS, (FORWARD, BACKWARD))
    ]


bench_rms_norm = harness.bench(cases)

if __name__ == "__main__":
    harness.main(cases)
