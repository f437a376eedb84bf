"""attention: packed self-attention, SAR's two streams, the local head, decoding, against peers.

    python bench/bench_attention.py
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
from bench.case import BACKWARD, BOTH, FORWARD, Case, Missing, compiled, fastest, one_pass
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
    FORWARD: (">= 1.2x best peer", ">= 1.45x best peer"),
    BACKWARD: (
        ">= 1.5x best peer, 50% of copy bandwidth",
        ">= 2.2x best peer, 65% of copy bandwidth",
    ),
}
# Passes over q, k, v and out; FLOPs of a pair, over the head width; reads or writes of statistics.
COSTS = {FORWARD: (1, 4, 1), BACKWARD: (2, 10, 1), BOTH: (3, 14, 2)}


# ------------------------------------------------------------------------------------------ inputs


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

    @property
    def masked(self) -> bool:
        """Whether it takes a mask beyond causal."""
        return self.visible in ("two streams", "local head")


class Inputs(NamedTuple):
    """packed: (qkv,) or (q, kv); grad (B, N, H, D); ends: of the local head."""

    packed: tuple[Tensor, ...]
    grad: Tensor
    ends: Tensor | None = None


def inputs(shape: Shape) -> Inputs:
    """Random data."""
    heads, width = HEADS[shape.size]

    def draw(*middle):
        form = (shape.batch, *middle, heads, width)
        return torch.randn(form, device=shape.device, dtype=torch.bfloat16)

    grad = draw(shape.queries)
    if not shape.crossed:
        return Inputs((draw(shape.queries, 3).requires_grad_(),), grad)
    is_trained = shape.visible != "decoding"
    q = draw(shape.queries).requires_grad_(is_trained)
    kv = draw(shape.keys, 2).requires_grad_(is_trained)
    ends = local_ends(shape) if shape.visible == "local head" else None
    return Inputs((q, kv), grad, ends)


def local_ends(shape: Shape) -> Tensor:
    """How many keys each query of the local head sees, (B, N): the same for all of a window, and
    antithetic, as in training."""
    window = min(WINDOW, shape.queries // 4)
    form = (shape.batch // 2, shape.queries // window)
    half = torch.randint(1, shape.keys + 1, form, device=shape.device, dtype=torch.int32)
    return torch.cat((half, shape.keys + 1 - half)).repeat_interleave(window, dim=1)


@functools.cache
def streams(device: str) -> AttentionMask:
    """SAR's mask for a device, made on the CPU: 512 elements on a 16 x 16 grid, or few."""
    return two_stream_mask(GROUPS[device], has_last_context=False)


# --------------------------------------------------------------------------------- ours, flash-attn


def visible_of(shape: Shape, made: Inputs) -> Visible:
    """As our own operation takes it."""
    if shape.visible == "local head":
        return Ends(made.ends)
    if shape.visible == "two streams":
        return streams(shape.device).to(shape.device)
    return FULL if shape.visible == "full" else CAUSAL


def own(shape: Shape, direction: str, implementation: str, made: Inputs):
    """heptapod_fast's own operation."""
    operation = cross_attention if shape.crossed else attention
    visible = visible_of(shape, made)
    function = functools.partial(operation, visible=visible, implementation=implementation)
    return one_pass(function, direction, (made.packed, (made.grad,)))


def flash_attn(shape: Shape, direction: str, made: Inputs):
    """The package; it has no masks."""
    try:
        import flash_attn as package
    except ImportError:
        raise Missing(
            "flash-attn is not installed: pip install flash-attn --no-build-isolation"
        ) from None
    if shape.visible == "decoding":
        q, kv = made.packed
        return functools.partial(package.flash_attn_with_kvcache, q, *kv.unbind(2))
    is_causal = shape.visible == "causal"
    function = functools.partial(package.flash_attn_qkvpacked_func, causal=is_causal)
    return one_pass(function, direction, (made.packed, (made.grad,)))


# ------------------------------------------------------------------- peers that take q, k, v apart


def apart(shape: Shape, direction: str, make, made: Inputs):
    """make(shape, made): a function of q, k, v, each (B, H, N, D)."""
    heads = split_heads(made.packed)
    function = make(shape, made)
    with refusals():
        # The gradient in the layout that the peer gave its output, or it would copy.
        grad = torch.empty_like(function(*heads)).copy_(made.grad.transpose(1, 2))
        call = one_pass(function, direction, (heads, (grad,)))
        call()
    return call


def split_heads(packed: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """(qkv,) or (q, kv) -> contiguous q, k, v (B, H, N, D), leaves of their own."""
    if len(packed) == 1:
        parts = packed[0].unbind(2)
    else:
        q, kv = packed
        parts = (q, *kv.unbind(2))
    is_trained = packed[0].requires_grad
    return tuple(
        part.detach().transpose(1, 2).contiguous().requires_grad_(is_trained) for part in parts
    )


def dense(shape: Shape, made: Inputs) -> Tensor | None:
    """Booleans that broadcast to (B, H, N, M), or None."""
    if shape.visible == "two streams":
        return streams(shape.device).dense_NM[None, None].to(shape.device)
    if shape.visible == "local head":
        return torch.arange(shape.keys, device=shape.device) < made.ends[:, None, :, None]
    return None


def sdpa(backend: SDPBackend, shape: Shape, made: Inputs):
    """PyTorch's scaled_dot_product_attention by one backend."""
    seen = dense(shape, made)
    bias = None
    if seen is not None:
        bias = torch.zeros(seen.shape, device=shape.device, dtype=torch.bfloat16)
        bias.masked_fill_(~seen, float("-inf"))
    is_causal = shape.visible == "causal"

    def function(q, k, v):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=is_causal)

    return function


REFUSALS = ("No available kernel", "No viable backend", "cuDNN Frontend error")


@contextlib.contextmanager
def refusals():
    """Missing with PyTorch's reasons where a forced backend does not take the inputs."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            yield
        except RuntimeError as error:
            if not any(text in str(error) for text in REFUSALS):
                raise
            reasons = dict.fromkeys(str(each.message).split(" (Triggered")[0] for each in said)
            raise Missing(f"refuses this: {' '.join(reasons) or error}"[:500]) from None


def flex(shape: Shape, made: Inputs):
    """torch.compile of FlexAttention, as its users call it."""
    from torch.nn.attention.flex_attention import flex_attention

    mask = block_mask(shape.visible, shape.queries, shape.device)
    return functools.partial(compiled(flex_attention), block_mask=mask)


@functools.cache
def block_mask(visible: str, length: int, device: str):
    """FlexAttention's BlockMask, None for all pairs."""
    from torch.nn.attention.flex_attention import create_block_mask

    if visible == "full":
        return None
    seen = flex_causal if visible == "causal" else flex_streams(device)
    return create_block_mask(seen, None, None, length, length, device=device)


def flex_causal(b, h, i, j):
    """Whether query i sees key j."""
    return j <= i


def flex_streams(device: str):
    """The same for SAR's mask."""
    ranges = streams(device).ranges_N22.to(device).permute(1, 2, 0).contiguous()
    (first, end), (own_first, own_end) = ranges

    def seen(b, h, i, j):
        in_context = (j >= first[i]) & (j < end[i])
        in_own = (j >= own_first[i]) & (j < own_end[i])
        return in_context | in_own

    return seen


# ------------------------------------------------------------------------------------------- cases


def takes(backend: str, shape: Shape) -> bool:
    """Whether an SDPA backend is worth listing: flash has no masks, the others are CUDA's."""
    if backend == "sdpa flash":
        return not shape.masked
    return shape.device == "cuda"


def contenders(shape: Shape, direction: str):
    """Ours first; peers that a mask or the device rules out are not listed."""
    found = {"ours": functools.partial(own, shape, direction, fastest(shape.device))}
    if shape.batch <= 128:
        found["eager"] = functools.partial(own, shape, direction, "reference")
    for name, backend in BACKENDS.items():
        if takes(name, shape):
            make = functools.partial(sdpa, backend)
            found[name] = functools.partial(apart, shape, direction, make)
    if shape.device == "cuda" and not shape.crossed:
        found["flex"] = functools.partial(apart, shape, direction, flex)
    if not shape.masked:
        found["flash-attn"] = functools.partial(flash_attn, shape, direction)
    return found


def pairs(shape: Shape) -> float:
    """How many keys the queries of a sequence see together (of the local head: on average)."""
    if shape.visible == "causal":
        return shape.queries * (shape.queries + 1) / 2
    if shape.visible == "local head":
        return shape.queries * (shape.keys + 1) / 2
    if shape.visible == "two streams":
        return float(streams(shape.device).dense_NM.sum())
    return shape.queries * shape.keys


def case(shape: Shape, direction: str, gate: str = "", aim: str = "") -> Case:
    """One shape, one way."""
    heads, width = HEADS[shape.size]
    passes, multiplies, statistics = COSTS[direction]
    elements = passes * 2 * (shape.queries + shape.keys) * heads * width
    log_sums = statistics * heads * shape.queries
    length = f"{shape.queries} of {shape.keys}" if shape.crossed else shape.queries
    return Case(
        "attention",
        f"{shape.visible} {direction}, {shape.size}, {shape.batch} x {length}, {heads} heads x "
        f"{width}",
        functools.partial(inputs, shape),
        contenders(shape, direction),
        bytes=shape.batch * (2 * elements + 4 * log_sums),
        flops=multiplies * shape.batch * heads * width * pairs(shape),
        gate=gate,
        aim=aim,
    )


def plain(device: str, size: str, batch: int) -> list[Case]:
    """Self-attention, causal and full, both ways."""
    length = 256 if device == "cuda" else 16
    shapes = [
        Shape("causal", device, size, batch, length, length),
        Shape("full", device, size, batch, length + 1, length + 1),
    ]
    return [case(shape, way, *gates) for shape in shapes for way, gates in GATES.items()]


def cases(device: str) -> list[Case]:
    """All kinds at the first size, self-attention at the others."""
    size, batch, length = ("B", 128, 256) if device == "cuda" else ("tiny", 2, 16)
    elements = streams(device).num_queries
    two_streams = Shape("two streams", device, size, batch, elements, elements)
    local = Shape("local head", device, size, batch, length, length)
    decoding = Shape("decoding", device, size, max(batch // 2, 2), 1, length + 1)
    found = [
        *plain(device, size, batch),
        case(two_streams, BOTH, ">= 2x flex", ">= 3x flex"),
        case(local, FORWARD),
        case(local, BACKWARD),
        case(decoding, FORWARD),
    ]
    # NPP's patches, four times as many codes each, on the same images.
    for patch in (2, 4, 8) if device == "cuda" else (2,):
        count = length // patch**2
        patches = Shape("causal", device, size, batch, count, count)
        found += [case(patches, FORWARD), case(patches, BACKWARD)]
    if device == "cuda":
        for size, batch in (("B", 256), ("H", 128), ("H", 256), ("L", 128)):
            found += plain(device, size, batch)
    return found


def tunable(kernel: str, config: dict[str, int]) -> bool:
    """Whether a kernel is right with such tiles; bench/tune.py leaves all others out.

    Masks are scheduled in blocks of 64 keys forward, and of 64 queries backward: a kernel that
    reads the schedule takes no larger tile.
    """
    is_scheduled = kernel.endswith(("_masked", "_tail"))
    if kernel.startswith("backward"):
        queries = (32, 64) if is_scheduled else (32, 64, 128)
        keys = (64, 128)
    else:
        queries = (64, 128)
        keys = (64,) if is_scheduled else (64, 128)
    fits = config["BLOCK_Q"] in queries and config["BLOCK_K"] in keys
    return fits and config["STAGES"] <= 4 and config["num_warps"] in (2, 4, 8)


bench_attention = harness.bench(cases)

if __name__ == "__main__":
    harness.main(cases)
