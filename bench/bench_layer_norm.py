"""layer_norm alone and behind the residual sum (branch bias, dropout) against its peers.

    pytest bench/bench_layer_norm.py --benchmark-only

Bytes: passes over rows x width in bf16 (layer_norm: 2 forward, 3 backward; add_layer_norm: 4
forward, 4 backward, 5 with dropout) and 8 bytes of statistics per row.
"""

import functools

import torch

from bench import harness
from heptapod_fast.ops.dropout_mask import DropoutMask
from heptapod_fast.ops.layer_norm import add_layer_norm, layer_norm

SHAPES = {
    "cuda": {"B": (128 * 257, 768), "L": (128 * 257, 1024), "H": (64 * 257, 1280)},
    "cpu": {"tiny": (64, 96)},
}
EPS = 1e-6


def norm_inputs(device, rows, width):
    """(arguments of layer_norm, gradients of its outputs)."""
    x = torch.randn(rows, width, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight, bias = (torch.randn(width, device=device, requires_grad=True) for _ in range(2))
    return (x, weight, bias), (torch.randn_like(x),)


def sum_inputs(device, rows, width, drop):
    """(arguments of add_layer_norm, gradients of its outputs)."""
    x, branch = (
        torch.randn(rows, width, device=device, dtype=torch.bfloat16, requires_grad=True)
        for _ in range(2)
    )
    parameters = (torch.randn(width, device=device, requires_grad=True) for _ in range(3))
    mask = None
    if drop:
        keys = torch.randint(0, 2**32, (rows, 2), device=device)
        mask = DropoutMask(keys, torch.arange(rows, device=device), drop)
    return (x, branch, *parameters, mask), (torch.randn_like(x), torch.randn_like(x))


def contender(operation, implementation, backward, wrap=lambda f: f):
    def prepare(made):
        arguments, upstream = made
        function = wrap(functools.partial(operation, eps=EPS, implementation=implementation))
        if backward:
            return harness.gradients(function, arguments, upstream, both=False)
        return functools.partial(function, *arguments)

    return prepare


def liger(backward):
    def prepare(made):
        try:
            from liger_kernel.ops.layer_norm import LigerLayerNormFunction
        except ImportError:
            raise harness.Missing("Liger is not installed: pip install liger-kernel") from None
        arguments, upstream = made

        def function(x, weight, bias):
            # Its kernels take parameters of x's dtype; the reference makes the same casts.
            return LigerLayerNormFunction.apply(x, weight.to(x.dtype), bias.to(x.dtype), EPS)

        if backward:
            return harness.gradients(function, arguments, upstream, both=False)
        return functools.partial(function, *arguments)

    return prepare


def contenders(device, operation, backward):
    return {
        "ours": contender(operation, harness.fastest(device), backward),
        "eager": contender(operation, "reference", backward),
        "compiled": contender(operation, "reference", backward, harness.compiled),
    }


def cases(device):
    found = []
    for size, (rows, width) in SHAPES[device].items():
        kinds = [
            ("layer_norm", layer_norm, functools.partial(norm_inputs, device, rows, width), 2, 3)
        ]
        for drop in (0.0, 0.1):
            kinds.append(
                (
                    f"add_layer_norm{f' dropout {drop}' if drop else ''}",
                    add_layer_norm,
                    functools.partial(sum_inputs, device, rows, width, drop),
                    4,
                    5 if drop else 4,
                )
            )
        for what, operation, inputs, forward_passes, backward_passes in kinds:
            for backward in (False, True):
                passes = backward_passes if backward else forward_passes
                peers = contenders(device, operation, backward)
                if operation is layer_norm:
                    peers["liger"] = liger(backward)
                direction = "backward" if backward else "forward"
                found.append(
                    harness.Case(
                        "layer_norm",
                        f"{what} {direction}, {size}, {rows} x {width}",
                        inputs,
                        peers,
                        bytes=passes * rows * width * 2 + 8 * rows,
                        gate=">= 75% of copy bandwidth" if backward else "",
                        aim=">= 90% of copy bandwidth" if backward else "",
                    )
                )
    return found


bench_layer_norm = harness.benchmark_of(cases)
