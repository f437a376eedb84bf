"""Attention at length: the backward pass repeats its bits a thousand times, ten thousand random
shapes agree with float32.

Without a GPU a few of each show that these tests are right.
"""

import random

import pytest
import torch

from heptapod_fast.ops import CAUSAL, FULL, AttentionMask, Ends, attention, cross_attention
from heptapod_fast.ops.masks import two_stream_mask
from tests.numerics import needs_triton, poisoned

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [needs_triton] + [pytest.mark.gpu] * (DEVICE == "cuda")
RUNS, SHAPES = (1000, 2000) if DEVICE == "cuda" else (2, 4)
BATCH = 128 if DEVICE == "cuda" else 1
KINDS = ["full", "causal", "mask", "ends", "decode"]
SAR = [min(i + 1, 31 - i, 16) for i in range(31)]


def leaf(*shape):
    return torch.randn(shape, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)


@pytest.mark.parametrize(
    "length, heads, width, kind",
    [(256, 12, 64, "causal"), (257, 12, 64, "full"), (257, 16, 80, "full"), (512, 12, 64, "mask")],
)
def test_the_backward_pass_repeats_its_bits(length, heads, width, kind):
    sar = two_stream_mask(SAR, has_last_context=False)
    visible = {"full": FULL, "causal": CAUSAL, "mask": sar.to(DEVICE)}[kind]
    qkv = leaf(BATCH, length, 3, heads if DEVICE == "cuda" else 1, width)
    out = attention(qkv, visible, "triton")
    grad = torch.randn_like(out)
    first = None
    for _ in range(RUNS):
        (found,) = torch.autograd.grad(out, qkv, grad, retain_graph=True)
        if first is None:
            first, differs = found, torch.zeros((), device=DEVICE, dtype=torch.bool)
        # One answer at the end: the runs follow each other as in training.
        differs |= (found.view(torch.int16) != first.view(torch.int16)).any()
    assert not differs and first.isfinite().all()


def random_case(kind, rng):
    """(function, its inputs) of a random shape."""
    most, usual = (1024, [256, 257]) if DEVICE == "cuda" else (130, [])
    n, m = (rng.choice([rng.randint(1, most), rng.randint(1, 80), *usual]) for _ in range(2))
    batch, heads, width = rng.randint(1, 3), rng.randint(1, 3), rng.choice([64, 80])
    seed = rng.randrange(2**31)
    if kind in ("full", "causal"):
        visible = CAUSAL if kind == "causal" else FULL
        return (lambda x, how: attention(x, visible, how), (leaf(batch, n, 3, heads, width),))
    if kind == "ends":
        visible = Ends(torch.randint(1, m + 1, (batch, n), device=DEVICE))
    elif kind == "decode":
        n, visible = min(n, m), CAUSAL
    else:
        generator = torch.Generator().manual_seed(seed)
        ranges = torch.randint(0, m + 1, (n, 4), generator=generator).sort(1).values
        ranges[:, 0], ranges[:, 3] = ranges[:, 0].clamp(max=m - 1), m
        ranges[:, 1] = torch.maximum(ranges[:, 1], ranges[:, 0] + 1)
        visible = AttentionMask.from_ranges(ranges.view(n, 2, 2), m).to(DEVICE)
    return (
        lambda q, kv, how: cross_attention(q, kv, visible, how),
        (leaf(batch, n, heads, width), leaf(batch, m, 2, heads, width)),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_random_shapes_agree_with_float32(kind):
    rng = random.Random(kind)
    torch.manual_seed(0)
    for _ in range(SHAPES):
        function, inputs = random_case(kind, rng)
        exact = [x.detach().float().requires_grad_() for x in inputs]
        with poisoned():
            out = function(*inputs, "triton")
            grad = torch.randn_like(out)
            found = out, *torch.autograd.grad(out, inputs, grad)
        wanted = function(*exact, "reference")
        wanted = wanted, *torch.autograd.grad(wanted, exact, grad.float())
        for a, b in zip(found, wanted, strict=True):
            error = (a.float() - b).norm() / (b.norm() + 1e-3 * b.numel() ** 0.5)
            shapes = [tuple(x.shape) for x in inputs]
            assert float(error.detach()) < 0.02, f"{kind} {shapes}: {error}"
