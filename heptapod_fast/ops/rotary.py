"""rotary: rotary position embedding of packed queries and keys; values pass through.

    (a, b)  an adjacent pair of channels (2i, 2i + 1) of a head's query or key at element n
    a' = a cos(n, i) - b sin(n, i)
    b' = a sin(n, i) + b cos(n, i)

The backward pass is the rotation by the negative angle. The table says cos and sin themselves, not
angles: LlamaGen's class slot has cos = sin = 0, so that its query and key vanish, which is no
rotation at all and part of what its published weights know
(llamagen:autoregressive/models/gpt.py, precompute_freqs_cis_2d; apply_rotary_emb).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from heptapod_fast.ops import dispatch
from heptapod_fast.ops.checks import at_least_float32, refusal
from heptapod_fast.ops.operators import Context, Gradients, Inputs, differentiable, operator

MAX_WIDTH = 128  # kernels/configs/rotary.json


def rotary(qkv: Tensor, table: Tensor, implementation: str = "auto") -> Tensor:
    """Packed queries, keys and values with the first two rotated.

    Args:
        qkv: (B, N, 3, H, E) floating, E even.
        table: (N, E / 2, 2) float32, cos and sin of every element and pair of channels.
        implementation: "auto", "triton" (E up to MAX_WIDTH) or "reference".

    Returns:
        As qkv.

    Raises:
        ValueError: shapes that do not fit.
    """
    is_packed = qkv.dim() == 5 and qkv.shape[2] == 3 and qkv.shape[-1] % 2 == 0
    if not is_packed or table.shape != (qkv.shape[1], qkv.shape[-1] // 2, 2):
        expected = "qkv (B, N, 3, H, E) with E even and a table (N, E / 2, 2)"
        raise refusal("rotary", expected, qkv.shape, table.shape)
    width = qkv.shape[-1]
    unsupported = None
    if width > MAX_WIDTH:
        unsupported = f"heads are {width} wide, at most {MAX_WIDTH} fit"
    if dispatch.select("rotary", qkv.device, qkv.dtype, implementation, unsupported) == "reference":
        return _reference(qkv, table)
    return _operator(qkv.contiguous(), table.float().contiguous(), False)


def grid_table(side: int, head_width: int, base: float = 10_000.0) -> Tensor:
    """(1 + side * side, E / 2, 2) float32: cos and sin of LlamaGen's 2D embedding.

    Row 0, of the class slot, is all zero. Row 1 + y * side + x turns the first E / 4 pairs by y and
    the others by x, pair i of either half at the frequency base^(-2i / (E / 2)).

    Raises:
        ValueError: E is not a multiple of 4.
    """
    if head_width % 4:
        raise ValueError(
            f"heads are {head_width} wide; rotary embedding in two dimensions needs a multiple of 4"
        )
    half = head_width // 2
    frequency = base ** (-torch.arange(0, half, 2, dtype=torch.float32) / half)
    angle = torch.arange(side, dtype=torch.float32)[:, None] * frequency
    by_row = angle[:, None].expand(side, side, -1)
    by_column = angle[None].expand(side, side, -1)
    angles = torch.cat((by_row, by_column), dim=-1).flatten(0, 1)
    table = torch.stack((angles.cos(), angles.sin()), dim=-1)
    return torch.cat((torch.zeros(1, *table.shape[1:]), table))


def _reference(qkv: Tensor, table: Tensor) -> Tensor:
    cos, sin = table[None, :, None, None].unbind(-1)
    turned = at_least_float32(qkv[:, :, :2])
    even, odd = turned.unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
    return torch.cat((rotated.to(qkv.dtype), qkv[:, :, 2:]), dim=2)


# The operator, whose gradient is the rotation back.


def _kernel(x: Tensor, table: Tensor, back: bool) -> Tensor:
    from heptapod_fast.kernels import rotary as kernels

    return kernels.rotate(x, table, back)


def _setup(ctx: Context, inputs: Inputs, output: Any) -> None:
    _, table, ctx.back = inputs
    ctx.save_for_backward(table)


def _gradient(ctx: Context, grad: Tensor) -> Gradients:
    (table,) = ctx.saved_tensors
    return _operator(grad.contiguous(), table, not ctx.back), None, None


_operator = operator(
    "rotary(Tensor x, Tensor table, bool back) -> Tensor",
    _kernel,
    lambda x, table, back: torch.empty_like(x),
)
differentiable(_operator, _gradient, _setup)
dispatch.register_triton("rotary")
