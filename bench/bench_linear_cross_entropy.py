"""linear_cross_entropy (the output layer of discrete tokens, V = 16384) against its peers.

    python bench/bench_linear_cross_entropy.py
    pytest bench/bench_linear_cross_entropy.py --benchmark-only

Forward and backward pass, float32 masters and bf16 activations as in training, all rows of weight
1. FLOPs: three products of R x V x D, which is what a gradient takes when no logits are made twice.
Bytes: z and its gradient in bf16, the weight and its gradient in float32; logits need not be moved.
Peers take the masters and round them as part of the call. Packages that are compared where they are
installed: liger-kernel, cut-cross-entropy, quack-kernels (which has no bias), and PyTorch's own
chunked form.
"""

import functools

import torch
import torch.nn.functional as F

from bench import harness
from bench.case import BOTH, Case, Missing, compiled, fastest, timed
from heptapod_fast.ops.linear_cross_entropy import linear_cross_entropy

# Rows of a batch of 128 (128 x 128.5), width, codes. On a CPU "ours" goes in chunks where there are
# many codes, and is the reference where there are few.
ROWS, CODES = 128 * 128 + 64, 16_384
SHAPES = {
    "cuda": {"B": (ROWS, 768, CODES), "L": (ROWS, 1024, CODES), "H": (ROWS, 1280, CODES)},
    "cpu": {"tiny": (48, 32, 128), "many codes": (1024, 256, CODES)},
}


def inputs(device, rows, width, codes, targets=1):
    """(z, weight, bias, target), the gradient of the loss.

    Logits are of unit size, as at the start of training, where no softmax is sharp.
    """
    z = torch.randn(rows, width, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(codes, width, device=device) * width**-0.5).requires_grad_()
    bias = torch.zeros(codes, device=device, requires_grad=True)
    shape = (rows,) if targets == 1 else (rows, targets)
    target = torch.randint(codes, shape, device=device)
    return (z, weight, bias, target), (torch.tensor(1.0 / rows, device=device),)


def total(z, weight, bias, target, implementation):
    """Our operation's sum over rows."""
    return linear_cross_entropy(z, weight, bias, target, implementation=implementation)[0]


def without_gradient(function, *arguments):
    """As an evaluation calls it."""
    with torch.no_grad():
        return function(*arguments)


# ------------------------------------------------------------------------------------------ peers


def liger(z, weight, bias, target):
    """Liger's chunked loss."""
    try:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction
    except ImportError as error:
        raise Missing("liger-kernel is not installed: pip install liger-kernel") from error
    found = LigerFusedLinearCrossEntropyFunction.apply(
        z, weight.to(z.dtype), target, bias.to(z.dtype), None, -100, 0.0, 0.0, "sum"
    )
    return found[0] if isinstance(found, tuple) else found


def cut(z, weight, bias, target):
    """Apple's, which makes the logits twice."""
    try:
        from cut_cross_entropy import linear_cross_entropy as function
    except ImportError as error:
        raise Missing(
            "cut-cross-entropy is not installed: pip install cut-cross-entropy"
        ) from error
    return function(z, weight.to(z.dtype), target, bias=bias.to(z.dtype), reduction="sum")


def quack(z, weight, bias, target):
    """quack's chunked loss, which has no bias: it gets the gradient of a zero."""
    try:
        from quack.linear_cross_entropy import chunked_linear_cross_entropy as function
    except ImportError as error:
        raise Missing("quack-kernels is not installed: pip install quack-kernels") from error
    found = function(z, weight.to(z.dtype), target, chunk_size=4096, reduction="sum")
    return found + 0.0 * bias[0]


def torch_chunked(z, weight, bias, target):
    """PyTorch's own."""
    if not hasattr(F, "linear_cross_entropy") or not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise Missing(
            f"PyTorch {torch.__version__} has no chunked linear_cross_entropy: "
            "pip install 'torch>=2.13'"
        )
    options = torch.nn.LinearCrossEntropyOptions(allow_retain_graph=True)
    return F.linear_cross_entropy(
        z,
        weight.to(z.dtype),
        target,
        linear_bias=bias.to(z.dtype),
        reduction="sum",
        options=options,
    )


PEERS = {
    "liger": liger,
    "cut-cross-entropy": cut,
    "quack (no bias)": quack,
    "torch chunked": torch_chunked,
}

# ------------------------------------------------------------------------------------------ cases


def candidates(device):
    """{name: function of the arguments}; packages are in PEERS."""
    eager = functools.partial(total, implementation="reference")
    ours = functools.partial(total, implementation=fastest(device))
    return {"ours": ours, "eager": eager, "compiled": compiled(eager)}


def evaluated(functions):
    """The same without gradients."""
    return {
        name: functools.partial(without_gradient, function) for name, function in functions.items()
    }


def training(device, size, rows, name, targets=1, peers=None, **goals):
    """Forward and backward pass. peers: functions beside `candidates`."""
    _, width, codes = SHAPES[device][size]
    return Case(
        "linear_cross_entropy",
        f"{name}, {size}, {rows} x {width} x {codes}",
        functools.partial(inputs, device, rows, width, codes, targets),
        timed(candidates(device) | (peers or {}), BOTH),
        bytes=2 * rows * width * 2 + 2 * codes * width * 4,
        flops=6.0 * rows * codes * width,
        gate=">= 1.1x best peer",
        **goals,
    )


def evaluation(device, size):
    """The loss alone."""
    rows, width, codes = SHAPES[device][size]
    return Case(
        "linear_cross_entropy",
        f"loss alone, {size}, {rows} x {width} x {codes}",
        functools.partial(inputs, device, rows, width, codes),
        timed(evaluated(candidates(device)), "forward"),
        bytes=rows * width * 2 + codes * width * 4,
        flops=2.0 * rows * codes * width,
    )


def cases(device):
    """Training and the loss alone at every size; four targets per row at the first one."""
    found = []
    aim = ">= 1.25x best peer"
    for size, (rows, *_) in SHAPES[device].items():
        found.append(training(device, size, rows, "forward and backward", peers=PEERS, aim=aim))
        found.append(evaluation(device, size))
    first, (rows, *_) = next(iter(SHAPES[device].items()))
    name = "4 targets, forward and backward"
    found.append(training(device, first, rows // 4, name, targets=4))
    return found


bench_linear_cross_entropy = harness.bench(cases)

if __name__ == "__main__":
    harness.main(cases)
