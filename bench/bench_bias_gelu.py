"""bias_gelu (erf GELU of the Transformer's MLP, SiLU of the diffusion MLP) against its peers.

    python bench/bench_bias_gelu.py
    pytest bench/bench_bias_gelu.py --benchmark-only

Bytes: 2 passes forward, 3 backward, of rows x width in bf16.
"""

import functools
import itertools

import torch

from bench import harness
from bench.case import BACKWARD, FORWARD, Case, compiled, fastest, timed
from heptapod_fast.ops.bias_gelu import bias_gelu
from heptapod_fast.ops.dropout_mask import DropoutMask

SHAPES = {
    "cuda": {"B": (128 * 257, 3072), "L": (128 * 257, 4096), "H": (64 * 257, 5120)},
    "cpu": {"tiny": (64 * 2 * 37, 512)},  # of the embedded default: batch, density, tokens and [S]
}
# {what: (activation, dropout)}
KINDS = {
    "gelu": ("gelu", 0.0),
    "gelu dropout 0.1": ("gelu", 0.1),
    "silu": ("silu", 0.0),
}
PASSES = {FORWARD: 2, BACKWARD: 3}


def inputs(device, rows, width, drop):
    """(arguments of bias_gelu, gradients of its output)."""
    x = torch.randn(rows, width, device=device, dtype=torch.bfloat16, requires_grad=True)
    bias = torch.randn(width, device=device, requires_grad=True)
    mask = None
    if drop:
        keys = torch.randint(0, 2**32, (rows, 2), device=device)
        mask = DropoutMask(keys, torch.arange(rows, device=device), drop)
    return (x, bias, mask), (torch.randn_like(x),)


def candidates(device, activation):
    """{name: function of the arguments}."""
    eager = functools.partial(bias_gelu, activation=activation, implementation="reference")
    ours = functools.partial(bias_gelu, activation=activation, implementation=fastest(device))
    return {"ours": ours, "eager": eager, "compiled": compiled(eager)}


def case(device, size, kind, direction):
    """One kind at one size, one way."""
    rows, width = SHAPES[device][size]
    activation, drop = KINDS[kind]
    return Case(
        "bias_gelu",
        f"{kind} {direction}, {size}, {rows} x {width}",
        functools.partial(inputs, device, rows, width, drop),
        timed(candidates(device, activation), direction),
        bytes=PASSES[direction] * rows * width * 2,
    )


def cases(device):
    """Every size, kind and direction."""
    return [
        case(device, *each)
        for each in itertools.product(SHAPES[device], KINDS, (FORWARD, BACKWARD))
    ]


bench_bias_gelu = harness.bench(cases)

if __name__ == "__main__":
    harness.main(cases)
