"""rms_norm and add_rms_norm: see `heptapod_fast.ops.rms_norm`. Memory-bound, one pass each.

A program takes a contiguous slab of rows, one row per step of a loop whose loads are pipelined
(`layer_norm` says why). Backward: the sum of dweight stays in float32 registers, one row of
partials per program, which `columns.column_sum` adds up in order.
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


@triton.jit(do_not_specialize=["rows", "slab", "counters"])
def rms_norm_forward_kernel(
    # read
    x_ptr,  # (R, D)
    branch_ptr,  # (R, D); None: the norm alone, no sum
    weight_ptr,  # (D,) float32
    # written
    sum_ptr,  # (R, D), None with the branch
    out_ptr,  # (R, D)
    scale_ptr,  # (R,) float32: 1 / root mean square
    # the dropout mask of the branch
    key_ptr,  # (P, 2) int64, None without dropout
    counter_ptr,  # (N,) int64, None without dropout
    # sizes
    rows,  # R
    slab,  # rows per program
    rows_per_key,  # R / P
    counters,  # N
    scale,  # 1 / (1 - p)
    eps,  # added to the mean square
    # constants
    THRESHOLD: tl.constexpr,  # p * 2**32; 0 without dropout
    WIDTH: tl.constexpr,  # D
    BLOCK: tl.constexpr,  # a power of 2, D or more
    STAGES: tl.constexpr,  # rows whose loads are under way
):
    """A slab of rows: sum = x + dropout(branch), stored and rounded, and its norm."""
    column = tl.arange(0, BLOCK)  # [BLOCK]
    inside = column < WIDTH
    weight = load_float32(weight_ptr + column, inside)
    first = tl.program_id(0) * slab
    for step in tl.range(0, tl.minimum(slab, rows - first), num_stages=STAGES):
        row = first + step
        at = row.to(tl.int64) * WIDTH + column  # 64 bits: rows * width may need them

        # The residual sum, rounded before its norm is taken: that is what the backward pass reads.
        x = load_float32(x_ptr + at, inside)
        if branch_ptr is not None:
            branch = load_float32(branch_ptr + at, inside)
            if THRESHOLD > 0:
                key0, key1, counter = row_keys(key_ptr, counter_ptr, row, rows_per_key, counters)
                kept = keep(key0, key1, counter, column, WIDTH, THRESHOLD)
                branch = tl.where(kept, branch * scale, 0.0)
            rounded = (x + branch).to(sum_ptr.dtype.element_ty)
            tl.store(sum_ptr + at, rounded, mask=inside)
            x = rounded.to(tl.float32)

        # The norm. Beyond the width x is 0.
        rms = tl.rsqrt(tl.sum(x * x) * (1.0 / WIDTH) + eps)
        tl.store(scale_ptr + row, rms)
        store_rounded(out_ptr + at, x * rms * weight, inside)


@triton.jit(do_not_specialize=["rows", "slab", "counters"])
def rms_norm_backward_kernel(
    # read
    grad_ptr,  # (R, D) the gradient of the norm
    grad_sum_ptr,  # (R, D) the gradient of the sum, or None
    sum_ptr,  # (R, D) what was normalised
    scale_ptr,  # (R,) float32: 1 / root mean square
    weight_ptr,  # (D,) float32
    # written
    dx_ptr,  # (R, D)
    dbranch_ptr,  # (R, D), None without dropout: it is dx
    partial_ptr,  # (programs, D) float32, the sum of dweight over each program's rows
    # the dropout mask of the branch
    key_ptr,  # (P, 2) int64, None without dropout
    counter_ptr,  # (N,) int64, None without dropout
    # sizes
    rows,  # R
    slab,  # rows per program
    rows_per_key,  # R / P
    counters,  # N
    scale,  # 1 / (1 - p)
    # constants
    THRESHOLD: tl.constexpr,  # p * 2**32; 0 without dropout
    WIDTH: tl.constexpr,  # D
    BLOCK: tl.constexpr,  # a power of 2, D or more
    STAGES: tl.constexpr,  # rows whose loads are under way
):
    """A slab of rows: dx and dbranch of each, and the sum of dweight over the slab."""
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)  # [BLOCK]
    inside = column < WIDTH
    weight = load_float32(weight_ptr + column, inside)
    dweight = tl.zeros((BLOCK,), tl.float32)
    first = program * slab
    for step in tl.range(0, tl.minimum(slab, rows - first), num_stages=STAGES):
        row = first + step
        at = row.to(tl.int64) * WIDTH + column
        grad = load_float32(grad_ptr + at, inside)
        rms = tl.load(scale_ptr + row)
        normal = load_float32(sum_ptr + at, inside) * rms
        dweight += grad * normal
        weighted = grad * weight
        mean = tl.sum(weighted * normal) * (1.0 / WIDTH)
        dx = rms * (weighted - normal * mean)
        if grad_sum_ptr is not None:
            dx += load_float32(grad_sum_ptr + at, inside)
        store_rounded(dx_ptr + at, dx, inside)
        if THRESHOLD > 0:
            key0, key1, counter = row_keys(key_ptr, counter_ptr, row, rows_per_key, counters)
            kept = keep(key0, key1, counter, column, WIDTH, THRESHOLD)
            store_rounded(dbranch_ptr + at, tl.where(kept, dx * scale, 0.0), inside)
    partial = partial_ptr + program.to(tl.int64) * WIDTH + column
    tl.store(partial, dweight, mask=inside)


def forward(
    x: Tensor, branch: Tensor | None, weight: Tensor, mask: DropoutMask | None, eps: float
) -> tuple[Tensor | None, Tensor, Tensor]:
    """x and branch (..., D) contiguous, weight (D,) float32 -> sum (None without a branch), y,
    (rows,) float32 1 / root mean square."""
    width = x.shape[-1]
    rows = x.numel() // max(1, width)
    total = None if branch is None else torch.empty_like(x)
    y = torch.empty_like(x)
    scales = torch.empty(rows, dtype=torch.float32, device=x.device)
    if rows:
        config = dict(tuning.lookup("rms_norm", "forward", width, x.device))
        slab = config.pop("rows")
        rms_norm_forward_kernel[(triton.cdiv(rows, slab),)](
            x,
            branch,
            weight,
            total,
            y,
            scales,
            rows=rows,
            slab=slab,
            eps=eps,
            WIDTH=width,
            BLOCK=triton.next_power_of_2(width),
            **mask_arguments(mask, rows),
            **config,
        )
    return total, y, scales


def backward(
    grad: Tensor,
    grad_sum: Tensor | None,
    total: Tensor,
    scales: Tensor,
    weight: Tensor,
    mask: DropoutMask | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of y and (or None) of the sum, the sum (..., D), all contiguous ->

    dx; dbranch, or an empty tensor without dropout (it is dx); dweight (D,) float32.
    """
    width = total.shape[-1]
    rows = total.numel() // max(1, width)
    dx = torch.empty_like(total)
    dbranch = total.new_empty(0) if mask is None else torch.empty_like(total)
    if rows == 0:
        return dx, dbranch, torch.zeros_like(weight)
    config = dict(tuning.lookup("rms_norm", "backward", width, total.device))
    slab = triton.cdiv(rows, config.pop("programs"))
    programs = triton.cdiv(rows, slab)  # as many as have rows
    partials = torch.empty(programs, width, dtype=torch.float32, device=total.device)
    rms_norm_backward_kernel[(programs,)](
        grad,
        grad_sum,
        total,
        scales,
        weight,
        dx,
        None if mask is None else dbranch,
        partials,
        rows=rows,
        slab=slab,
        WIDTH=width,
        BLOCK=triton.next_power_of_2(width),
        **mask_arguments(mask, rows),
        **config,
    )
    return dx, dbranch, column_sum(partials)
