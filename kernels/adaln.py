"""adaln: see `heptapod_fast.ops.adaln`; docs/kernels/README.md builds it up from a plain version.

Memory-bound: 5 reads and 2 writes of (R, F) forward, 6 reads and 4 writes backward.

A program takes a contiguous slab of rows, one at a time, and keeps the parameters of its columns in
registers. In the backward pass it also adds up six sums over its rows there and writes them as one
row of partials, which `columns.column_sum` adds up in order. Modulation is read, and its gradients
are written, through row strides, so that all can be slices of one tensor.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from heptapod_fast.kernels import tuning
from heptapod_fast.kernels.columns import column_sum
from heptapod_fast.kernels.memory import load_float32, store_rounded
from heptapod_fast.ops.adaln_sums import Sums

SUMS = Sums._fields  # the order in which the backward pass writes its sums over rows


class Branch(NamedTuple):
    """What a residual block adds to its input: gate * (value + bias)."""

    value: Tensor  # (R, F)
    bias: Tensor  # (F,) float32
    gate: Tensor  # (R, F), rows with a stride


@triton.jit(do_not_specialize=["rows"])
def adaln_forward_kernel(
    # read
    x_ptr,  # (R, F)
    branch_ptr,  # (R, F), None in the first block
    branch_bias_ptr,  # (F,) float32, None in the first block
    gate_ptr,  # (R, F), rows gate_stride apart, None in the first block
    shift_ptr,  # (R, F), rows shift_stride apart
    scale_ptr,  # (R, F), rows scale_stride apart
    weight_ptr,  # (F,) float32, None after the last block
    bias_ptr,  # (F,) float32, None after the last block
    # written
    new_ptr,  # (R, F) the sum x', None in the first block
    out_ptr,  # (R, F) the modulated result v
    mean_ptr,  # (R,) float32, for the backward pass
    rstd_ptr,  # (R,) float32, 1 / standard deviation, for the backward pass
    # sizes
    rows,  # R
    width,  # F
    gate_stride,  # elements from one row to the next
    shift_stride,
    scale_stride,
    eps,  # added to the variance
    # constants
    BRANCH: tl.constexpr,  # whether there is a branch to be added
    AFFINE: tl.constexpr,  # whether there are weight and bias
    SLAB: tl.constexpr,  # rows per program
    BLOCK: tl.constexpr,  # power of 2, at least F
):
    """A slab of rows: x' = x + gate * (branch + branch_bias), v = n(x') * (1 + scale) + shift."""
    # Parameters are loaded once and stay in registers for all rows of the slab.
    column = tl.arange(0, BLOCK)  # [BLOCK]
    inside = column < width
    if AFFINE:
        weight = tl.load(weight_ptr + column, mask=inside, other=0.0)
        bias = tl.load(bias_ptr + column, mask=inside, other=0.0)
    if BRANCH:
        branch_bias = tl.load(branch_bias_ptr + column, mask=inside, other=0.0)

    # 64 bits: rows * width may be above 2**31 elements.
    first = tl.program_id(0).to(tl.int64) * SLAB
    last = tl.minimum(first + SLAB, rows)
    for row in tl.range(first, last):
        at = row * width + column  # [BLOCK]
        x = load_float32(x_ptr + at, inside)

        # The residual sum. Statistics are those of the rounded sum, because that is what the next
        # block and the backward pass read.
        if BRANCH:
            branch = load_float32(branch_ptr + at, inside)
            gate = load_float32(gate_ptr + row * gate_stride + column, inside)
            new = (x + gate * (branch + branch_bias)).to(new_ptr.dtype.element_ty)
            tl.store(new_ptr + at, new, mask=inside)
            x = new.to(tl.float32)
        shift = load_float32(shift_ptr + row * shift_stride + column, inside)
        scale = load_float32(scale_ptr + row * scale_stride + column, inside)

        # LayerNorm, the variance from centred values: mean(x^2) - mean^2 cancels.
        mean = tl.sum(x, axis=0) / width
        centred = tl.where(inside, x - mean, 0.0)
        rstd = tl.rsqrt(tl.sum(centred * centred, axis=0) / width + eps)
        value = centred * rstd
        if AFFINE:
            value = value * weight + bias

        # Modulation.
        value = value * (1.0 + scale) + shift
        store_rounded(out_ptr + at, value, inside)
        tl.store(mean_ptr + row, mean)
        tl.store(rstd_ptr + row, rstd)


@triton.jit(do_not_specialize=["rows", "slab"])
def adaln_backward_kernel(
    # gradients of the results
    dnew_ptr,  # (R, F) of x', None after the last block
    dout_ptr,  # (R, F) of v, rows dout_stride apart
    # what the forward pass read and kept
    x_ptr,  # (R, F) the sum x'
    branch_ptr,  # (R, F), None in the first block
    branch_bias_ptr,  # (F,) float32, None in the first block
    gate_ptr,  # (R, F), rows gate_stride apart, None in the first block
    scale_ptr,  # (R, F), rows scale_stride apart
    weight_ptr,  # (F,) float32, None after the last block
    bias_ptr,  # (F,) float32, None after the last block
    mean_ptr,  # (R,) float32
    rstd_ptr,  # (R,) float32
    # written
    dx_ptr,  # (R, F)
    dbranch_ptr,  # (R, F), None in the first block
    dgate_ptr,  # (R, F), rows dgate_stride apart, None in the first block
    dscale_ptr,  # (R, F), rows dscale_stride apart
    partial_ptr,  # (programs, 6 F) float32, the sums over each program's rows
    # sizes
    rows,  # R
    width,  # F
    slab,  # rows per program
    dout_stride,  # elements from one row to the next
    gate_stride,
    scale_stride,
    dgate_stride,
    dscale_stride,
    # constants
    DNEW: tl.constexpr,  # whether x' has a gradient of its own
    BRANCH: tl.constexpr,  # whether there was a branch
    AFFINE: tl.constexpr,  # whether there are weight and bias
    BLOCK: tl.constexpr,  # power of 2, at least F
):
    """A slab of rows: every gradient of each, and the sums of six of them over the slab."""
    column = tl.arange(0, BLOCK)  # [BLOCK]
    inside = column < width
    if AFFINE:
        weight = tl.load(weight_ptr + column, mask=inside, other=0.0)
        bias = tl.load(bias_ptr + column, mask=inside, other=0.0)

    # Sums over this program's rows, in registers: [BLOCK] each. Those without a gradient stay 0.
    gate_sum = tl.zeros((BLOCK,), tl.float32)
    branch_sum = tl.zeros((BLOCK,), tl.float32)
    weight_sum = tl.zeros((BLOCK,), tl.float32)
    bias_sum = tl.zeros((BLOCK,), tl.float32)
    shift_sum = tl.zeros((BLOCK,), tl.float32)
    scale_sum = tl.zeros((BLOCK,), tl.float32)

    first = tl.program_id(0) * slab
    last = tl.minimum(first + slab, rows)
    for index in tl.range(first, last):
        row = index + tl.full((), 0, tl.int64)  # 64 bits: rows * width may need them
        at = row * width + column  # [BLOCK]
        x = load_float32(x_ptr + at, inside)
        dout = load_float32(dout_ptr + row * dout_stride + column, inside)
        scale = load_float32(scale_ptr + row * scale_stride + column, inside)
        mean = tl.load(mean_ptr + index)
        rstd = tl.load(rstd_ptr + index)
        normal = (x - mean) * rstd

        # Back through the modulation, then through weight and bias.
        daffine = dout * (1.0 + scale)
        shift_sum += dout
        if AFFINE:
            dscale = dout * (normal * weight + bias)
            weight_sum += daffine * normal
            bias_sum += daffine
            dnormal = daffine * weight
        else:
            dscale = dout * normal
            dnormal = daffine
        scale_sum += dscale
        store_rounded(dscale_ptr + row * dscale_stride + column, dscale, inside)

        # Back through the normalisation. Outside the width dnormal is 0, so neither mean sees
        # those lanes.
        along = tl.sum(dnormal * normal, axis=0) / width
        dx = rstd * (dnormal - tl.sum(dnormal, axis=0) / width - normal * along)
        if DNEW:
            dx += load_float32(dnew_ptr + at, inside)
        store_rounded(dx_ptr + at, dx, inside)

        # Back through the residual sum.
        if BRANCH:
            branch = load_float32(branch_ptr + at, inside)
            gate = load_float32(gate_ptr + row * gate_stride + column, inside)
            # From the cache every time: registers are what bounds the programs in flight.
            branch_bias = tl.load(branch_bias_ptr + column, mask=inside, other=0.0)
            dbranch = gate * dx
            dgate = (branch + branch_bias) * dx
            branch_sum += dbranch
            gate_sum += dgate
            store_rounded(dbranch_ptr + at, dbranch, inside)
            store_rounded(dgate_ptr + row * dgate_stride + column, dgate, inside)

    # In the order of SUMS.
    partial_ptr += tl.program_id(0).to(tl.int64) * 6 * width + column
    tl.store(partial_ptr, gate_sum, mask=inside)
    tl.store(partial_ptr + width, branch_sum, mask=inside)
    tl.store(partial_ptr + 2 * width, weight_sum, mask=inside)
    tl.store(partial_ptr + 3 * width, bias_sum, mask=inside)
    tl.store(partial_ptr + 4 * width, shift_sum, mask=inside)
    tl.store(partial_ptr + 5 * width, scale_sum, mask=inside)


def forward(
    x: Tensor,
    branch: Branch | None,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """x and branch (R, F) contiguous, modulation with a row stride, parameters (F,) float32.

    Returns x_new (None without a branch: it is x), v, and statistics (2, R) float32.
    """
    rows, width = x.shape
    new = None if branch is None else torch.empty_like(x)
    out = torch.empty_like(x)
    stats = torch.empty(2, rows, dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return new, out, stats
    tile = tuning.lookup("adaln", "forward", width, x.device)
    added = branch or Branch(None, None, None)
    adaln_forward_kernel[(triton.cdiv(rows, tile["SLAB"]),)](
        x,
        added.value,
        added.bias,
        added.gate,
        shift,
        scale,
        weight,
        bias,
        new,
        out,
        stats[0],
        stats[1],
        rows,
        width,
        _row_stride(added.gate),
        _row_stride(shift),
        _row_stride(scale),
        eps,
        BRANCH=branch is not None,
        AFFINE=weight is not None,
        BLOCK=triton.next_power_of_2(width),
        **tile,
    )
    return new, out, stats


def backward(
    dnew: Tensor | None,
    dout: Tensor,
    x: Tensor,
    branch: Branch | None,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    dgate: Tensor | None = None,
    dscale: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor]:
    """x is forward's x_new. dgate, dscale: where to write them, with a row stride (None: new).

    dout may be a slice with a row stride: as the gradient of shift it can lie in its place already.
    Returns dx, dbranch, dgate (both None without a branch), dscale, and (6 F,) float32: the sums
    over rows of the gradients that SUMS names, zero where there is no such gradient.
    """
    rows, width = x.shape
    dx = torch.empty_like(x)
    dbranch = None if branch is None else torch.empty_like(x)
    if dscale is None:
        dscale = torch.empty_like(x)
    if dgate is None and branch is not None:
        dgate = torch.empty_like(x)
    if x.numel() == 0:
        sums = torch.zeros(6 * width, dtype=torch.float32, device=x.device)
        return dx, dbranch, dgate, dscale, sums
    tile = dict(tuning.lookup("adaln", "backward", width, x.device))
    programs = min(tile.pop("programs"), rows)
    partials = torch.empty(programs, 6 * width, dtype=torch.float32, device=x.device)
    added = branch or Branch(None, None, None)
    adaln_backward_kernel[(programs,)](
        dnew,
        dout,
        x,
        added.value,
        added.bias,
        added.gate,
        scale,
        weight,
        bias,
        stats[0],
        stats[1],
        dx,
        dbranch,
        dgate,
        dscale,
        partials,
        rows,
        width,
        triton.cdiv(rows, programs),
        _row_stride(dout),
        _row_stride(added.gate),
        _row_stride(scale),
        _row_stride(dgate),
        _row_stride(dscale),
        DNEW=dnew is not None,
        BRANCH=branch is not None,
        AFFINE=weight is not None,
        BLOCK=triton.next_power_of_2(width),
        **tile,
    )
    return dx, dbranch, dgate, dscale, column_sum(partials)


def _row_stride(x: Tensor | None) -> int:
    """Elements from one row to the next; 0 for a tensor that was left out."""
    return 0 if x is None else x.stride(0)
