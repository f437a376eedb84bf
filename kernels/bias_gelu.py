"""bias_gelu: see `heptapod_fast.ops.bias_gelu`. Memory-bound: one read and one write forward, two
reads and one write backward, all in tiles of ROWS x BLOCK.

Backward: program p of P takes a contiguous slab of rows, adds up its bias gradients in registers
and writes one row of partials, which `columns.column_sum` adds up in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from heptapod_fast.kernels import offline, tuning
from heptapod_fast.kernels.columns import column_sum
from heptapod_fast.kernels.randomness import keep, mask_arguments, row_keys
from heptapod_fast.ops.dropout_mask import DropoutMask


@triton.jit
def _activate(u, GELU: tl.constexpr):
    """act(u) and act'(u)."""
    if GELU:
        cdf = 0.5 * (1.0 + tl.erf(u * 0.7071067811865476))
        value = u * cdf
        slope = cdf + u * 0.3989422804014327 * tl.exp(-0.5 * u * u)
    else:
        cdf = tl.sigmoid(u)
        value = u * cdf
        slope = cdf * (1.0 + u * (1.0 - cdf))
    return value, slope


@triton.jit(do_not_specialize=["rows", "counters"])
def _forward(
    x_ptr,
    bias_ptr,
    out_ptr,
    key_ptr,
    counter_ptr,
    rows,
    width,
    rows_per_key,
    counters,
    scale,
    GELU: tl.constexpr,
    THRESHOLD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    at = row[:, None] * width + column[None, :]
    bias = tl.load(bias_ptr + column, mask=column < width, other=0.0)
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    y, _ = _activate(x + bias[None, :], GELU)
    if THRESHOLD > 0:
        key0, key1, counter = row_keys(
            key_ptr, counter_ptr, tl.minimum(row, rows - 1), rows_per_key, counters
        )
        kept = keep(
            key0[:, None], key1[:, None], counter[:, None], column[None, :], width, THRESHOLD
        )
        y = tl.where(kept, y * scale, 0.0)
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "slab", "counters"])
def _backward(
    grad_ptr,
    x_ptr,
    bias_ptr,
    dx_ptr,
    partial_ptr,
    key_ptr,
    counter_ptr,
    rows,
    width,
    slab,
    rows_per_key,
    counters,
    scale,
    GELU: tl.constexpr,
    THRESHOLD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    bias = tl.load(bias_ptr + column, mask=column < width, other=0.0)
    first = program.to(tl.int64) * slab
    last = tl.minimum(first + slab, rows)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in tl.range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < last)[:, None] & (column < width)[None, :]
        at = row[:, None] * width + column[None, :]
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
        _, slope = _activate(x + bias[None, :], GELU)
        dx = grad * slope
        if THRESHOLD > 0:
            key0, key1, counter = row_keys(
                key_ptr, counter_ptr, tl.minimum(row, rows - 1), rows_per_key, counters
            )
            kept = keep(
                key0[:, None], key1[:, None], counter[:, None], column[None, :], width, THRESHOLD
            )
            dx = tl.where(kept, dx * scale, 0.0)
        total += dx
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    tl.store(
        partial_ptr + program.to(tl.int64) * width + column,
        tl.sum(total, axis=0),
        mask=column < width,
    )


def forward(x: Tensor, bias: Tensor, mask: DropoutMask | None, activation: str) -> Tensor:
    """x (..., F) contiguous, bias (F,) float32 -> y in x's dtype."""
    width, out = x.shape[-1], torch.empty_like(x)
    rows = x.numel() // max(1, width)
    if rows == 0:
        return out
    tile = dict(tuning.lookup("bias_gelu", "forward", width, x.device))
    grid = (triton.cdiv(rows, tile["ROWS"]), triton.cdiv(width, tile["BLOCK"]))
    _forward[grid](
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
    width, dx = x.shape[-1], torch.empty_like(x)
    rows = x.numel() // max(1, width)
    if rows == 0:
        return dx, torch.zeros_like(bias)
    tile = dict(tuning.lookup("bias_gelu", "backward", width, x.device))
    programs = min(tile.pop("programs"), triton.cdiv(rows, tile["ROWS"]))
    slab = triton.cdiv(rows, programs)
    partials = torch.empty(programs, width, dtype=torch.float32, device=x.device)
    _backward[(programs, triton.cdiv(width, tile["BLOCK"]))](
        grad,
        x,
        bias,
        dx,
        partials,
        rows=rows,
        width=width,
        slab=slab,
        GELU=activation == "gelu",
        **mask_arguments(mask, rows),
        **tile,
    )
    return dx, column_sum(partials)


def compile_cases(arch: str):
    """See offline.py."""
    mask = dict(
        key_ptr="*i64", counter_ptr="*i64", rows_per_key="i32", counters="i32", scale="fp32"
    )
    common = dict(x_ptr="*bf16", bias_ptr="*fp32", rows="i32", width="i32", **mask)
    for size, tile in tuning.buckets("bias_gelu", "forward", arch).items():
        tile = dict(tile)
        options = {key: tile.pop(key) for key in ("num_warps",)}
        for gelu, threshold in ((True, round(0.1 * 2**32)), (False, 0)):
            name = f"bias_{'gelu' if gelu else 'silu'}{'+dropout' if threshold else ''}"
            yield offline.Case(
                f"{name} forward <= {size}",
                _forward,
                dict(common, out_ptr="*bf16"),
                dict(tile, GELU=gelu, THRESHOLD=threshold),
                options,
            )
            back = dict(tuning.buckets("bias_gelu", "backward", arch)[size])
            back.pop("programs")
            yield offline.Case(
                f"{name} backward <= {size}",
                _backward,
                dict(common, grad_ptr="*bf16", dx_ptr="*bf16", partial_ptr="*fp32", slab="i32"),
                dict(
                    {k: v for k, v in back.items() if k != "num_warps"},
                    GELU=gelu,
                    THRESHOLD=threshold,
                ),
                dict(num_warps=back["num_warps"]),
                unaligned=("slab",),
            )
