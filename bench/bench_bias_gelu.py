"""bias_gelu (erf GELU of the Transformer's MLP, SiLU of the diffusion MLP) against its peers.

    pytest bench/bench_bias_gelu.py --benchmark-only

Bytes: 2 passes forward, 3 backward, of rows x width in bf16.
"""

import functools

import torch

from bench import harness
from heptapod_fast.ops.bias_gelu import bias_gelu
from heptapod_fast.ops.dropout_mask import DropoutMask

SHAPES = {
    "cuda": {"B": (128 * 257, 3072), "L": (128 * 257, 4096), "H": (64 * 257, 5120)},
    "cpu": {"tiny": (256, 512)},
}


def inputs(device, rows, width, drop):
    x = torch.randn(rows, width, device=device, dtype=torch.bfloat16, requires_grad=True)
    bias = torch.randn(width, device=device, requires_grad=True)
    mask = None
    if drop:
        keys = torch.randint(0, 2**32, (rows, 2), device=device)
        mask = DropoutMask(keys, torch.arange(rows, device=device), drop)
    return x, bias, mask, torch.randn_like(x)


def contender(implementation, activation, backward, wrap=lambda f: f):
    def prepare(made):
        x, bias, mask, upstream = made
        function = wrap(lambda x, bias: bias_gelu(x, bias, mask, activation, implementation))
        if backward:
            return harness.gradients(function, (x, bias), (upstream,), both=False)
        return functools.partial(function, x, bias)

    return prepare


def cases(device):
    found = []
    for size, (rows, width) in SHAPES[device].items():
        for activation, drop in (("gelu", 0.0), ("gelu", 0.1), ("silu", 0.0)):
            for backward in (False, True):
                direction = "backward" if backward else "forward"
                what = activation + (f" dropout {drop}" if drop else "")
                found.append(
                    harness.Case(
                        "bias_gelu",
                        f"{what} {direction}, {size}, {rows} x {width}",
                        functools.partial(inputs, device, rows, width, drop),
                        {
                            "ours": contender(harness.fastest(device), activation, backward),
                            "eager": contender("reference", activation, backward),
                            "compiled": contender(
                                "reference", activation, backward, harness.compiled
                            ),
                        },
                        bytes=(3 if backward else 2) * rows * width * 2,
                    )
                )
    return found


bench_bias_gelu = harness.benchmark_of(cases)
