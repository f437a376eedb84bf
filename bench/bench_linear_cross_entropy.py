"""linear_cross_entropy (the output layer of discrete tokens, V = 16384) against its peers.

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
from heptapod_fast.ops.linear_cross_entropy import linear_cross_entropy

VOCABULARY = {"cuda": 16384, "cpu": 128}
# Rows of a batch of 128 (128 x 128.5) and width.
SHAPES = {
    "cuda": {"B": (128 * 128 + 64, 768), "L": (128 * 128 + 64, 1024), "H": (128 * 128 + 64, 1280)},
    "cpu": {"tiny": (48, 32)},
}


def inputs(device, rows, width, targets=1):
    """Logits of unit size, as at the start of training, where no softmax is sharp."""
    codes = VOCABULARY[device]
    z = torch.randn(rows, width, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(codes, width, device=device) * width**-0.5).requires_grad_()
    bias = torch.zeros(codes, device=device, requires_grad=True)
    shape = (rows,) if targets == 1 else (rows, targets)
    return z, weight, bias, torch.randint(codes, shape, device=device)


def ours(implementation):
    def total(z, weight, bias, target):
        return linear_cross_entropy(z, weight, bias, target, implementation=implementation)[0]

    return total


def import_or_say(package, load):
    """load(), or harness.Missing with what to install."""
    try:
        return load()
    except ImportError as error:
        raise harness.Missing(f"{package} is not installed: pip install {package}") from error


def liger():
    def load():
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

        return LigerFusedLinearCrossEntropyFunction

    function = import_or_say("liger-kernel", load)

    def total(z, weight, bias, target):
        found = function.apply(
            z, weight.to(z.dtype), target, bias.to(z.dtype), None, -100, 0.0, 0.0, "sum"
        )
        return found[0] if isinstance(found, tuple) else found

    return total


def cut():
    def load():
        from cut_cross_entropy import linear_cross_entropy as function

        return function

    function = import_or_say("cut-cross-entropy", load)
    return lambda z, weight, bias, target: function(
        z, weight.to(z.dtype), target, bias=bias.to(z.dtype), reduction="sum"
    )


def quack():
    def load():
        from quack.linear_cross_entropy import chunked_linear_cross_entropy as function

        return function

    function = import_or_say("quack-kernels", load)
    return lambda z, weight, bias, target: function(
        z, weight.to(z.dtype), target, chunk_size=4096, reduction="sum"
    )


def chunked():
    if not hasattr(F, "linear_cross_entropy") or not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise harness.Missing(
            f"PyTorch {torch.__version__} has no chunked linear_cross_entropy: "
            "pip install 'torch>=2.13'"
        )
    options = torch.nn.LinearCrossEntropyOptions(allow_retain_graph=True)
    return lambda z, weight, bias, target: F.linear_cross_entropy(
        z,
        weight.to(z.dtype),
        target,
        linear_bias=bias.to(z.dtype),
        reduction="sum",
        options=options,
    )


def contender(make, leaves=3):
    """leaves: how many of z, weight and bias the peer has gradients for."""

    def prepare(made):
        function, (*tensors, target) = make(), made
        upstream = torch.tensor(1.0 / len(target), device=target.device)

        def total(*wanted):
            return function(*wanted, *tensors[leaves:], target)

        return harness.gradients(total, tuple(tensors[:leaves]), (upstream,), both=True)

    return prepare


def evaluation(make):
    def prepare(made):
        function = make()

        def call():
            with torch.no_grad():
                return function(*made)

        return call

    return prepare


def cases(device):
    implementations = {
        "ours": lambda: ours("triton" if device == "cuda" else "auto"),
        "eager": lambda: ours("reference"),
        "compiled": lambda: harness.compiled(ours("reference")),
    }
    found = []
    for size, (rows, width) in SHAPES[device].items():
        codes = VOCABULARY[device]
        moved = 2 * rows * width * 2 + 2 * codes * width * 4
        peers = {
            "liger": contender(liger),
            "cut-cross-entropy": contender(cut),
            "quack (no bias)": contender(quack, 2),
            "torch chunked": contender(chunked),
        }
        found.append(
            harness.Case(
                "linear_cross_entropy",
                f"forward and backward, {size}, {rows} x {width} x {codes}",
                functools.partial(inputs, device, rows, width),
                {name: contender(make) for name, make in implementations.items()} | peers,
                bytes=moved,
                flops=6.0 * rows * codes * width,
                gate=">= 1.1x best peer",
                aim=">= 1.25x best peer",
            )
        )
        found.append(
            harness.Case(
                "linear_cross_entropy",
                f"loss alone, {size}, {rows} x {width} x {codes}",
                functools.partial(inputs, device, rows, width),
                {name: evaluation(make) for name, make in implementations.items()},
                bytes=rows * width * 2 + codes * width * 4,
                flops=2.0 * rows * codes * width,
            )
        )
    size, (rows, width) = next(iter(SHAPES[device].items()))
    rows = rows // 4
    found.append(
        harness.Case(
            "linear_cross_entropy",
            f"4 targets, forward and backward, {size}, {rows} x {width} x {codes}",
            functools.partial(inputs, device, rows, width, 4),
            {name: contender(make) for name, make in implementations.items()},
            bytes=2 * rows * width * 2 + 2 * codes * width * 4,
            flops=6.0 * rows * codes * width,
            gate=">= 1.1x best peer",
        )
    )
    return found


bench_linear_cross_entropy = harness.benchmark_of(cases)
