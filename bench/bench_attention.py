"""attention: packed self-attention, SAR's two streams, the local head, decoding, against peers.

    pytest bench/bench_attention.py --benchmark-only

Ours reads the packed projection and writes packed gradients. PyTorch's peers get q, k and v as
(B, H, N, D), contiguous, and masks as they are added to the scores: splitting, packing and
converting are not counted against them, although a model pays for it. Each SDPA backend is forced
and counts for itself (the default on Hopper is not always the fastest); one that refuses a shape
says why and is no peer there. FlexAttention is compiled, with its default block of 128 x 128, its
BlockMask made before; flash-attn reads the packed form too. A backward pass is timed alone.

Bytes: a forward pass reads q, k, v and writes out and the log-sum-exp; a backward pass reads all of
these and the gradient and writes three. FLOPs: 4 D for each pair of a query and a key that it sees,
10 D backward. Eager is left out at batch 256, where it is slow and shows nothing new.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench import harness
from heptapod_fast.ops import (
    CAUSAL,
    FULL,
    AttentionMask,
    Ends,
    Visible,
    attention,
    cross_attention,
)
from heptapod_fast.ops.masks import two_stream_mask

HEADS = {"B": (12, 64), "H": (16, 80), "L": (16, 64), "tiny": (2, 32)}
# Next-neighbor on a 16 x 16 grid goes through its 31 diagonals.
GROUPS = {"cuda": [min(i + 1, 31 - i, 16) for i in range(31)], "cpu": [1, 2, 3, 2]}
WINDOW = 16
BACKENDS = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
}
GATES = {
    "forward": (">= 1.2x best peer", ">= 1.45x best peer"),
    "backward": (
        ">= 1.5x best peer, 50% of copy bandwidth",
        ">= 2.2x best peer, 65% of copy bandwidth",
    ),
}


class Shape(NamedTuple):
    """visible: "full", "causal", "two streams", "local head" or "decoding"."""

    visible: str
    device: str
    size: str
    batch: int
    queries: int
    keys: int

    @property
    def crossed(self) -> bool:
        """Whether the queries come from somewhere else than keys and values."""
        return self.visible in ("local head", "decoding")


class Inputs(NamedTuple):
    """packed: (qkv,) or (q, kv); grad (B, N, H, D); ends: of the local head."""

    packed: tuple[Tensor, ...]
    grad: Tensor
    ends: Tensor | None = None


def inputs(shape: Shape) -> Inputs:
    """Random data. The local head's steps are antithetic, as in training."""
    heads, width = HEADS[shape.size]
    leaf = shape.visible != "decoding"

    def make(*middle):
        return torch.randn(
            shape.batch, *middle, heads, width, device=shape.device, dtype=torch.bfloat16
        )

    if not shape.crossed:
        return Inputs((make(shape.queries, 3).requires_grad_(),), make(shape.queries))
    given = tuple(x.requires_grad_(leaf) for x in (make(shape.queries), make(shape.keys, 2)))
    ends = None
    if shape.visible == "local head":
        window = min(WINDOW, shape.queries // 4)
        half = torch.randint(
            1,
            shape.keys + 1,
            (shape.batch // 2, shape.queries // window),
            device=shape.device,
            dtype=torch.int32,
        )
        ends = torch.cat((half, shape.keys + 1 - half)).repeat_interleave(window, dim=1)
    return Inputs(given, make(shape.queries), ends)


@functools.cache
def streams(device: str) -> AttentionMask:
    """SAR's mask, without a class element: 512 elements on a 16 x 16 grid."""
    return two_stream_mask(GROUPS[device], prefix=0).to(device)


def visible_of(shape: Shape, made: Inputs) -> Visible:
    """As our own operation takes it."""
    if shape.visible == "local head":
        return Ends(made.ends)
    if shape.visible == "two streams":
        return streams(shape.device)
    return FULL if shape.visible == "full" else CAUSAL


# --------------------------------------------------------------------------------------- contenders


def timed(function, arguments, grad, direction):
    """The call to be timed: "forward", "backward" alone, or "forward and backward"."""
    if direction == "forward":
        return functools.partial(function, *arguments)
    return harness.gradients(function, arguments, (grad,), both=direction != "backward")


def packed(shape, direction, implementation):
    """heptapod_fast's own operation."""

    def prepare(made):
        function = functools.partial(
            cross_attention if shape.crossed else attention,
            visible=visible_of(shape, made),
            implementation=implementation,
        )
        return timed(function, made.packed, made.grad, direction)

    return prepare


def flash_attn(shape, direction):
    """The package; it has no masks."""

    def prepare(made):
        try:
            import flash_attn as package
        except ImportError:
            raise harness.Missing(
                "flash-attn is not installed: pip install flash-attn --no-build-isolation"
            ) from None
        if shape.visible == "decoding":
            q, kv = made.packed
            return functools.partial(package.flash_attn_with_kvcache, q, *kv.unbind(2))
        function = functools.partial(
            package.flash_attn_qkvpacked_func, causal=shape.visible == "causal"
        )
        return timed(function, made.packed, made.grad, direction)

    return prepare


def split(shape, direction, make):
    """A peer that takes q, k, v (B, H, N, D); make(shape, made) returns its function."""

    def prepare(made):
        first, *rest = made.packed
        parts = (first, *rest[0].unbind(2)) if rest else first.unbind(2)
        heads = tuple(
            x.detach().transpose(1, 2).contiguous().requires_grad_(first.requires_grad)
            for x in parts
        )
        function = make(shape, made)
        with refusals():
            # The gradient in the layout that the peer gave its output, or it would copy.
            grad = torch.empty_like(function(*heads)).copy_(made.grad.transpose(1, 2))
            call = timed(function, heads, grad, direction)
            call()
        return call

    return prepare


def dense(shape, made) -> Tensor | None:
    """Booleans that broadcast to (B, H, N, M), or None."""
    if shape.visible == "two streams":
        return streams(shape.device).dense_NM[None, None]
    if shape.visible == "local head":
        return torch.arange(shape.keys, device=shape.device) < made.ends[:, None, :, None]
    return None


def sdpa(backend):
    def make(shape, made):
        seen = dense(shape, made)
        bias = None
        if seen is not None:
            bias = torch.zeros(seen.shape, device=shape.device, dtype=torch.bfloat16)
            bias.masked_fill_(~seen, float("-inf"))

        def function(q, k, v):
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(
                    q, k, v, attn_mask=bias, is_causal=shape.visible == "causal"
                )

        return function

    return make


REFUSALS = ("No available kernel", "No viable backend", "cuDNN Frontend error")


@contextlib.contextmanager
def refusals():
    """harness.Missing with PyTorch's reasons where a forced backend does not take the inputs."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            yield
        except RuntimeError as error:
            if not any(text in str(error) for text in REFUSALS):
                raise
            reasons = dict.fromkeys(str(each.message).split(" (Triggered")[0] for each in said)
            raise harness.Missing(f"refuses this: {' '.join(reasons) or error}"[:500]) from None


@functools.cache
def block_mask(visible: str, length: int, device: str):
    """FlexAttention's BlockMask, None for all pairs."""
    from torch.nn.attention.flex_attention import create_block_mask

    if visible == "full":
        return None
    if visible == "causal":

        def seen(b, h, i, j):
            return j <= i
    else:
        ranges = streams(device).ranges_N22.permute(1, 2, 0).contiguous()
        (first, end), (own_first, own_end) = ranges

        def seen(b, h, i, j):
            return ((j >= first[i]) & (j < end[i])) | ((j >= own_first[i]) & (j < own_end[i]))

    return create_block_mask(seen, None, None, length, length, device=device)


def flex(shape, made):
    """torch.compile of FlexAttention, as its users call it."""
    from torch.nn.attention.flex_attention import flex_attention

    return functools.partial(
        harness.compiled(flex_attention),
        block_mask=block_mask(shape.visible, shape.queries, shape.device),
    )


def contenders(shape, direction):
    """Ours first; peers that a mask or the device rules out are not listed."""
    masked = shape.visible in ("two streams", "local head")
    found = {"ours": packed(shape, direction, harness.fastest(shape.device))}
    if shape.batch <= 128:
        found["eager"] = packed(shape, direction, "reference")
    for name, backend in BACKENDS.items():
        if not masked if name == "sdpa flash" else shape.device == "cuda":
            found[name] = split(shape, direction, sdpa(backend))
    if shape.device == "cuda" and not shape.crossed:
        found["flex"] = split(shape, direction, flex)
    if not masked:
        found["flash-attn"] = flash_attn(shape, direction)
    return found


# -------------------------------------------------------------------------------------------- cases


def pairs(shape) -> float:
    """How many keys the queries of a sequence see together (of the local head: on average)."""
    if shape.visible == "causal":
        return shape.queries * (shape.queries + 1) / 2
    if shape.visible == "local head":
        return shape.queries * (shape.keys + 1) / 2
    if shape.visible == "two streams":
        return float(two_stream_mask(GROUPS[shape.device], prefix=0).dense_NM.sum())
    return shape.queries * shape.keys


def case(shape, direction, gate="", aim=""):
    heads, width = HEADS[shape.size]
    passes = {"forward": (1, 4), "backward": (2, 10), "forward and backward": (3, 14)}
    moves, multiplies = passes[direction]
    elements = moves * 2 * (shape.queries + shape.keys) * heads * width
    statistics = (2 if moves == 3 else 1) * heads * shape.queries
    length = f"{shape.queries} of {shape.keys}" if shape.crossed else shape.queries
    return harness.Case(
        "attention",
        f"{shape.visible} {direction}, {shape.size}, {shape.batch} x {length}, {heads} heads x "
        f"{width}",
        functools.partial(inputs, shape),
        contenders(shape, direction),
        bytes=shape.batch * (2 * elements + 4 * statistics),
        flops=multiplies * shape.batch * heads * width * pairs(shape),
        gate=gate,
        aim=aim,
    )


def cases(device):
    def plain(size, batch):
        lengths = (
            (("causal", 256), ("full", 257)) if device == "cuda" else (("causal", 16), ("full", 17))
        )
        return [
            case(Shape(visible, device, size, batch, length, length), direction, *gates)
            for visible, length in lengths
            for direction, gates in GATES.items()
        ]

    size, batch, length = ("B", 128, 256) if device == "cuda" else ("tiny", 2, 16)
    elements = 2 * sum(GROUPS[device])
    local = Shape("local head", device, size, batch, length, length)
    decoding = Shape("decoding", device, size, max(batch // 2, 2), 1, length + 1)
    found = plain(size, batch) + [
        case(
            Shape("two streams", device, size, batch, elements, elements),
            "forward and backward",
            ">= 2x flex",
            ">= 3x flex",
        ),
        case(local, "forward"),
        case(local, "backward"),
        case(decoding, "forward"),
    ]
    if device == "cuda":
        found += [*plain("B", 256), *plain("H", 128), *plain("H", 256), *plain("L", 128)]
    return found


def tunable(kernel: str, config: dict[str, int]) -> bool:
    """Whether a kernel is right with such tiles; bench/tune.py leaves all others out.

    Masks are scheduled in blocks of 64 keys forward, and of 64 queries backward.
    """
    apart = kernel.endswith(("_masked", "_tail"))
    if kernel.startswith("backward"):
        tiles = config["BLOCK_Q"] in (32, 64) + (128,) * (not apart), config["BLOCK_K"] in (64, 128)
    else:
        tiles = config["BLOCK_Q"] in (64, 128), config["BLOCK_K"] in (64,) + (128,) * (not apart)
    return all(tiles) and config["STAGES"] <= 4 and config["num_warps"] in (2, 4, 8)


bench_attention = harness.benchmark_of(cases)
