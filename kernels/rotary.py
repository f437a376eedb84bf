"""rotary: see `heptapod_fast.ops.rotary`. Memory-bound: packed queries, keys and values are read
once and written once, in either direction; the table stays in the caches."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from heptapod_fast.kernels import tuning
from heptapod_fast.kernels.memory import load_float32, store_rounded


@triton.jit
def rotary_kernel(
    # read
    x_ptr,  # (B, N, 3, H, E) queries, keys, values, or their gradients
    table_ptr,  # (N, E / 2, 2) float32: cos and sin
    # written
    out_ptr,  # (B, N, 3, H, E)
    # sizes
    elements,  # N
    HEADS: tl.constexpr,  # H
    WIDTH: tl.constexpr,  # E
    # constants
    BACK: tl.constexpr,  # turn by the negative angle, as gradients are
    PAIRS: tl.constexpr,  # a power of 2, E / 2 or more
    ROWS: tl.constexpr,  # heads of a tile
):
    """Some heads of the queries, keys or values of one element; values are copied."""
    element = tl.program_id(0).to(tl.int64)  # of all sequences: b * N + n
    kind = tl.program_id(1)  # 0 queries, 1 keys, 2 values
    head = tl.program_id(2) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    pair = tl.arange(0, PAIRS)  # [PAIRS]
    inside = (head < HEADS)[:, None] & (pair < WIDTH // 2)[None, :]  # [ROWS, PAIRS]
    at = (element * 3 + kind) * (HEADS * WIDTH) + head[:, None] * WIDTH + 2 * pair[None, :]

    even = load_float32(x_ptr + at, inside)
    odd = load_float32(x_ptr + at + 1, inside)
    if kind < 2:
        # The same for all heads of an element.
        angle = (element % elements) * WIDTH + 2 * pair  # [PAIRS]
        known = pair < WIDTH // 2
        cos = load_float32(table_ptr + angle, known)[None, :]
        sin = load_float32(table_ptr + angle + 1, known)[None, :]
        if BACK:
            sin = -sin
        turned = even * cos - odd * sin
        odd = even * sin + odd * cos
        even = turned
    store_rounded(out_ptr + at, even, inside)
    store_rounded(out_ptr + at + 1, odd, inside)


def rotate(x: Tensor, table: Tensor, back: bool) -> Tensor:
    """x (B, N, 3, H, E) contiguous, table (N, E / 2, 2) float32 contiguous -> as x.

    back: by the negative angle.
    """
    out = torch.empty_like(x)
    batch, elements, _, heads, width = x.shape
    if x.numel():
        config = tuning.lookup("rotary", "rotate", width, x.device)
        grid = (batch * elements, 3, triton.cdiv(heads, config["ROWS"]))
        rotary_kernel[grid](
            x,
            table,
            out,
            elements,
            HEADS=heads,
            WIDTH=width,
            BACK=back,
            PAIRS=triton.next_power_of_2(width // 2),
            **config,
        )
    return out
