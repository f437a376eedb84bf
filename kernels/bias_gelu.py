"""bias_gelu: see `heptapod_fast.ops.bias_gelu`; docs/kernels/README.md builds it up from a plain
version.

Memory-bound: one read and one write forward, two reads and one write backward, all in tiles of
ROWS x BLOCK. The dropout mask is computed from its counters in both directions, never stored.

Backward: a program takes a contiguous slab of rows, adds up its bias gradients in registers and
writes one row of partials, which `columns.column_sum` adds up in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from heptapod_fast.kernels import tuning
from heptapod_fast.kernels.columns import column_sum
from heptapod_fast.kernels.memory import load_float32, store_rounded
from heptapod_fast.kernels.randomness import keep, mask_arguments, row_keys
from heptapod_fast.ops.dropout_mask import DropoutMask


@triton.jit
def _activate(
    u,  # tile of float32
    GELU: tl.constexpr,  # erf GELU; otherwise SiLU
):
    """act(u) and act'(u); what a caller does not use is not computed."""
    if GELU:
        # u Phi(u): Phi(u) = (1 + erf(u / sqrt(2))) / 2 and Phi'(u) = exp(-u^2 / 2) / sqrt(2 pi).
        cdf = 0.5 * (1.0 + tl.erf(u * 0.7071067811865476))
        value = u * cdf
        slope = cdf + u * 0.3989422804014327 * tl.exp(-0.5 * u * u)
    else:
        cdf = tl.sigmoid(u)
        value = u * cdf
        slope = cdf * (1.0 + u * (1.0 - cdf))
    return value, slope


@triton.jit
def _dropped(
    value,  # [ROWS, BLOCK] float32
    row,  # [ROWS] int64
    column,  # [BLOCK]
    key_ptr,  # (P, 2) int64
    counter_ptr,  # (N,) int64
    rows,  # R
    width,  # F
    rows_per_key,  # R / P
    counters,  # N
    scale,  # 1 / (1 - p)
    THRESHOLD: tl.constexpr,  # p * 2**32
):
    """keep / (1 - p) * value: the same for an activation and for its gradient."""
    # Rows past the end take the last row's key, so that the load stays within memory.
    known = tl.minimum(row, rows - 1)
    key0, key1, counter = row_keys(key_ptr, counter_ptr, known, rows_per_key, counters)
    kept = keep(key0[:, None], key1[:, None], counter[:, None], column[None, :], width, THRESHOLD)
    return tl.where(kept, value * scale, 0.0)


@triton.jit(do_not_specialize=["rows", "counters"])
def bias_gelu_forward_kernel(
    # read
    x_ptr,  # (R, F)
    bias_ptr,  # (F,) float32
    # written
    out_ptr,  # (R, F)
    # the dropout mask
    key_ptr,  # (P, 2) int64, None without dropout
    counter_ptr,  # (N,) int64, None without dropout
    # sizes
    rows,  # R
    width,  # F
    rows_per_key,  # R / P
    counters,  # N
    scale,  # 1 / (1 - p)
    # constants
    GELU: tl.constexpr,  # erf GELU; otherwise SiLU
    THRESHOLD: tl.constexpr,  # p * 2**32; 0 without dropout
    ROWS: tl.constexpr,  # rows of a tile
    BLOCK: tl.constexpr,  # columns of a tile
):
    """A tile of dropout(act(x + bias))."""
    # 64 bits: rows * width may be above 2**31 elements.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = (row < rows)[:, None] & (column < width)[None, :]  # [ROWS, BLOCK]
    at = row[:, None] * width + column[None, :]

    bias = tl.load(bias_ptr + column, mask=column < width, other=0.0)
    x = load_float32(x_ptr + at, inside)
    y, _ = _activate(x + bias[None, :], GELU)
    if THRESHOLD > 0:
        y = _dropped(
            y,
            row,
            column,
            key_ptr,
            counter_ptr,
            rows,
            width,
            rows_per_key,
            counters,
            scale,
            THRESHOLD,
        )
    store_rounded(out_ptr + at, y, inside)


@triton.jit(do_not_specialize=["rows", "slab", "counters"])
def bias_gelu_backward_kernel(
    # read
    grad_ptr,  # (R, F) the gradient of the result
    x_ptr,  # (R, F)
    bias_ptr,  # (F,) float32
    # written
    dx_ptr,  # (R, F)
    partial_ptr,  # (programs, F) float32, the sum of dx over each program's rows
    # the dropout mask
    key_ptr,  # (P, 2) int64, None without dropout
    counter_ptr,  # (N,) int64, None without dropout
    # sizes
    rows,  # R
    width,  # F
    slab,  # rows per program
    rows_per_key,  # R / P
    counters,  # N
    scale,  # 1 / (1 - p)
    # constants
    GELU: tl.constexpr,  # erf GELU; otherwise SiLU
    THRESHOLD: tl.constexpr,  # p * 2**32; 0 without dropout
    ROWS: tl.constexpr,  # rows of a tile
    BLOCK: tl.constexpr,  # columns of a tile
):
    """A slab of rows of some columns: dx, and its sum over the slab."""
    program = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    bias = tl.load(bias_ptr + column, mask=column < width, other=0.0)

    first = program.to(tl.int64) * slab
    last = tl.minimum(first + slab, rows)
    # One sum per place of the tile; they are joined after the loop, so that nothing crosses
    # threads within it.
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in tl.range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)  # [ROWS]
        inside = (row < last)[:, None] & (column < width)[None, :]  # [ROWS, BLOCK]
        at = row[:, None] * width + column[None, :]
        x = load_float32(x_ptr + at, inside)
        grad = load_float32(grad_ptr + at, inside)  # 0 outside, and so is dx
        _, slope = _activate(x + bias[None, :], GELU)
        dx = grad * slope
        if THRESHOLD > 0:
            dx = _dropped(
                dx,
                row,
                column,
                key_ptr,
                counter_ptr,
                rows,
                width,
                rows_per_key,
                counters,
                scale,
                THRESHOLD,
            )
        total += dx
        store_rounded(dx_ptr + at, dx, inside)
    partial = partial_ptr + program.to(tl.int64) * width + column
    tl.store(partial, tl.sum(total, axis=0), mask=column < width)


def forward(x: Tensor, bias: Tensor, mask: DropoutMask | None, activation: str) -> Tensor:
    """x (..., F) contiguous, bias (F,) float32 -> y in x's dtype."""
    out = torch.empty_like(x)
    width = x.shape[-1]
    rows = x.numel() // max(1, width)
    if rows == 0:
        return out
    tile = tuning.lookup("bias_gelu", "forward", width, x.device)
    grid = (triton.cdiv(rows, tile["ROWS"]), triton.cdiv(width, tile["BLOCK"]))
    bias_gelu_forward_kernel[grid](
        x,
        bias,
        out,
        rows=rows,
        width=width,
        GELU=activation == "gelu",
        **mask_arguments(mask, rows),
        **tile,
    )
    return out


def backward(
    grad: Tensor, x: Tensor, bias: Tensor, mask: DropoutMask | None, activation: str
) -> tuple[Tensor, Tensor]:
    """grad and x (..., F) contiguous -> dx in x's dtype, dbias (F,) float32."""
    dx = torch.empty_like(x)
    width = x.shape[-1]
    rows = x.numel() // max(1, width)
    if rows == 0:
        return dx, torch.zeros_like(bias)
    tile = dict(tuning.lookup("bias_gelu", "backward", width, x.device))
    programs = min(tile.pop("programs"), triton.cdiv(rows, tile["ROWS"]))
    partials = torch.empty(programs, width, dtype=torch.float32, device=x.device)
    bias_gelu_backward_kernel[(programs, triton.cdiv(width, tile["BLOCK"]))](
        grad,
        x,
        bias,
        dx,
        partials,
        rows=rows,
        width=width,
        slab=triton.cdiv(rows, programs),
        GELU=activation == "gelu",
        **mask_arguments(mask, rows),
        **tile,
    )
    return dx, column_sum(partials)
