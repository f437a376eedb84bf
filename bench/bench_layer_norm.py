"""layer_norm alone and behind the residual sum (branch bias, dropout) against its peers.

    python bench/bench_layer_norm.py
    pytest bench/bench_layer_norm.py --benchmark-only

Bytes: passes over rows x width in bf16 (layer_norm: 2 forward, 3 backward; add_layer_norm: 4
forward, 4 backward, 5 with dropout) and 8 bytes of statistics per row.
"""

import functools
import itertools

import torch

from bench import harness
from bench.case import BACKWARD, FORWARD, Case, Missing, compiled, fastest, timed
from heptapod_fast.ops.dropout_mask import DropoutMask
from heptapod_fast.ops.layer_norm import add_layer_norm, layer_norm

SHAPES = {
    "cuda": {"B": (128 * 257, 768), "L": (128 * 257, 1024), "H": (64 * 257, 1280)},
    "cpu": {"tiny": (64 * 2 * 37, 128)},  # of the embedded default: batch, density, tokens and [S]
}
EPS = 1e-6
# {what: (dropout, {direction: passes over rows x width})}
KINDS = {
    "layer_norm": (None, {FORWARD: 2, BACKWARD: 3}),
    "add_layer_norm": (0.0, {FORWARD: 4, BACKWARD: 4}),
    "add_layer_norm dropout 0.1": (0.1, {FORWARD: 4, BACKWARD: 5}),
}


def norm_inputs(device, rows, width):
    """(arguments of layer_norm, gradients of its outputs)."""
    x = torch.randn(rows, width, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(width, device=device, requires_grad=True)
    bias = torch.randn(width, device=device, requires_grad=True)
    return (x, weight, bias), (torch.randn_like(x),)


def sum_inputs(device, rows, width, drop):
    """(arguments of add_layer_norm, gradients of its outputs)."""
    (x, *parameters), _ = norm_inputs(device, rows, width)
    branch = torch.randn_like(x, requires_grad=True)
    branch_bias = torch.randn(width, device=device, requires_grad=True)
    mask = None
    if drop:
        keys = torch.randint(0, 2**32, (rows, 2), device=device)
        mask = DropoutMask(keys, torch.arange(rows, device=device), drop)
    arguments = (x, branch, branch_bias, *parameters, mask)
    return arguments, (torch.randn_like(x), torch.randn_like(x))


def liger(x, weight, bias):
    """Liger's kernels, which take parameters of x's dtype; the reference makes the same casts."""
    try:
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction
    except ImportError:
        raise Missing("Liger is not installed: pip install liger-kernel") from None
    return LigerLayerNormFunction.apply(x, weight.to(x.dtype), bias.to(x.dtype), EPS)


def candidates(device, drop):
    """{name: function of the arguments}."""
    operation = layer_norm if drop is None else add_layer_norm
    eager = functools.partial(operation, eps=EPS, implementation="reference")
    found = {
        "ours": functools.partial(operation, eps=EPS, implementation=fastest(device)),
        "eager": eager,
        "compiled": compiled(eager),
    }
    if operation is layer_norm:
        found["liger"] = liger
    return found


def case(device, size, kind, direction):
    """One kind at one size, one way."""
    rows, width = SHAPES[device][size]
    drop, passes = KINDS[kind]
    inputs = functools.partial(norm_inputs, device, rows, width)
    if drop is not None:
        inputs = functools.partial(sum_inputs, device, rows, width, drop)
    return Case(
        "layer_norm",
        f"{kind} {direction}, {size}, {rows} x {width}",
        inputs,
        timed(candidates(device, drop), direction),
        bytes=passes[direction] * rows * width * 2 + 8 * rows,
        gate=">= 75% of copy bandwidth" if direction == BACKWARD else "",
        aim=">= 90% of copy bandwidth" if direction == BACKWARD else "",
    )


def cases(device):
    """Every size, kind and direction."""
    return [
        case(device, *each)
        for each in itertools.product(SHAPES[device], KINDS, (FORWARD, BACKWARD))
    ]


bench_layer_norm = harness.bench(cases)

if __name__ == "__main__":
    harness.main(cases)
