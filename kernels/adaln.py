"""adaln: see `heptapod_fast.ops.adaln`. Memory-bound: 5 reads and 2 writes of (R, W) forward, 6
reads and 4 writes backward.

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

from heptapod_fast.kernels import offline, tuning
from heptapod_fast.kernels.columns import column_sum

SUMS = ("gate", "branch_bias", "weight", "bias", "shift", "scale")


class Branch(NamedTuple):
    """What a residual block adds to its input: gate * (value + bias)."""

    value: Tensor
    bias: Tensor
    gate: Tensor


@triton.jit(do_not_specialize=["rows"])
def _forward(
    x_ptr,
    branch_ptr,
    branch_bias_ptr,
    gate_ptr,
    shift_ptr,
    scale_ptr,
    weight_ptr,
    bias_ptr,
    new_ptr,
    out_ptr,
    mean_ptr,
    rstd_ptr,
    rows,
    width,
    gate_stride,
    shift_stride,
    scale_stride,
    eps,
    BRANCH: tl.constexpr,
    AFFINE: tl.constexpr,
    SLAB: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column = tl.arange(0, BLOCK)
    inside = column < width
    if AFFINE:
        weight = tl.load(weight_ptr + column, mask=inside, other=0.0)
        bias = tl.load(bias_ptr + column, mask=inside, other=0.0)
    if BRANCH:
        branch_bias = tl.load(branch_bias_ptr + column, mask=inside, other=0.0)
    first = tl.program_id(0).to(tl.int64) * SLAB
    for row in tl.range(first, tl.minimum(first + SLAB, rows)):
        at = row * width + column
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if BRANCH:
            branch = tl.load(branch_ptr + at, mask=inside, other=0.0).to(tl.float32)
            gate = tl.load(gate_ptr + row * gate_stride + column, mask=inside, other=0.0).to(
                tl.float32
            )
            new = (x + gate * (branch + branch_bias)).to(new_ptr.dtype.element_ty)
            tl.store(new_ptr + at, new, mask=inside)
            x = new.to(tl.float32)
        shift = tl.load(shift_ptr + row * shift_stride + column, mask=inside, other=0.0).to(
            tl.float32
        )
        scale = tl.load(scale_ptr + row * scale_stride + column, mask=inside, other=0.0).to(
            tl.float32
        )
        mean = tl.sum(x, axis=0) / width
        centred = tl.where(inside, x - mean, 0.0)
        rstd = tl.rsqrt(tl.sum(centred * centred, axis=0) / width + eps)
        value = centred * rstd
        if AFFINE:
            value = value * weight + bias
        value = value * (1.0 + scale) + shift
        tl.store(out_ptr + at, value.to(out_ptr.dtype.element_ty), mask=inside)
        tl.store(mean_ptr + row, mean)
        tl.store(rstd_ptr + row, rstd)


@triton.jit(do_not_specialize=["rows", "slab"])
def _backward(
    dnew_ptr,
    dout_ptr,
    x_ptr,
    branch_ptr,
    branch_bias_ptr,
    gate_ptr,
    scale_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    dbranch_ptr,
    dgate_ptr,
    dscale_ptr,
    partial_ptr,
    rows,
    width,
    slab,
    dout_stride,
    gate_stride,
    scale_stride,
    dgate_stride,
    dscale_stride,
    DNEW: tl.constexpr,
    BRANCH: tl.constexpr,
    AFFINE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column = tl.arange(0, BLOCK)
    inside = column < width
    if AFFINE:
        weight = tl.load(weight_ptr + column, mask=inside, other=0.0)
        bias = tl.load(bias_ptr + column, mask=inside, other=0.0)
    gate_sum = tl.zeros((BLOCK,), tl.float32)
    branch_sum = tl.zeros((BLOCK,), tl.float32)
    weight_sum = tl.zeros((BLOCK,), tl.float32)
    bias_sum = tl.zeros((BLOCK,), tl.float32)
    shift_sum = tl.zeros((BLOCK,), tl.float32)
    scale_sum = tl.zeros((BLOCK,), tl.float32)
    first = tl.program_id(0) * slab
    for index in tl.range(first, tl.minimum(first + slab, rows)):
        row = index + tl.full((), 0, tl.int64)  # 64 bits: rows * width may need them
        at = row * width + column
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        dout = tl.load(dout_ptr + row * dout_stride + column, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(scale_ptr + row * scale_stride + column, mask=inside, other=0.0).to(
            tl.float32
        )
        mean = tl.load(mean_ptr + index)
        rstd = tl.load(rstd_ptr + index)
        normal = (x - mean) * rstd
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
        tl.store(
            dscale_ptr + row * dscale_stride + column,
            dscale.to(dscale_ptr.dtype.element_ty),
            mask=inside,
        )
        # Outside the width dnormal is 0, so neither mean sees those lanes.
        along = tl.sum(dnormal * normal, axis=0) / width
        dx = rstd * (dnormal - tl.sum(dnormal, axis=0) / width - normal * along)
        if DNEW:
            dx += tl.load(dnew_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        if BRANCH:
            branch = tl.load(branch_ptr + at, mask=inside, other=0.0).to(tl.float32)
            gate = tl.load(gate_ptr + row * gate_stride + column, mask=inside, other=0.0).to(
                tl.float32
            )
            # From the cache every time: registers are what bounds the programs in flight.
            branch_bias = tl.load(branch_bias_ptr + column, mask=inside, other=0.0)
            dbranch = gate * dx
            dgate = (branch + branch_bias) * dx
            branch_sum += dbranch
            gate_sum += dgate
            tl.store(dbranch_ptr + at, dbranch.to(dbranch_ptr.dtype.element_ty), mask=inside)
            tl.store(
                dgate_ptr + row * dgate_stride + column,
                dgate.to(dgate_ptr.dtype.element_ty),
                mask=inside,
            )
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
    """x and branch (R, W) contiguous, modulation with a row stride, parameters (W,) float32.

    Returns x_new (None without a branch: it is x), v, and statistics (2, R) float32.
    """
    rows, width = x.shape
    new, out = None if branch is None else torch.empty_like(x), torch.empty_like(x)
    stats = torch.empty(2, rows, dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return new, out, stats
    tile = dict(tuning.lookup("adaln", "forward", width, x.device))
    value, branch_bias, gate = branch or (None, None, None)
    _forward[(triton.cdiv(rows, tile["SLAB"]),)](
        x,
        value,
        branch_bias,
        gate,
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
        _stride(gate),
        shift.stride(0),
        scale.stride(0),
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
):
    """x is forward's x_new. dgate, dscale: where to write them, with a row stride (None: new).

    dout may be a slice with a row stride: as the gradient of shift it can lie in its place already.
    Returns dx, dbranch, dgate (both None without a branch), dscale, and (6 W,) float32: the sums
    over rows of the gradients that SUMS names, zero where there is no such gradient.
    """
    rows, width = x.shape
    dx = torch.empty_like(x)
    dscale = torch.empty_like(x) if dscale is None else dscale
    value, branch_bias, gate = branch or (None, None, None)
    dbranch = None if branch is None else torch.empty_like(x)
    dgate = torch.empty_like(x) if branch is not None and dgate is None else dgate
    if x.numel() == 0:
        sums = torch.zeros(6 * width, dtype=torch.float32, device=x.device)
        return dx, dbranch, dgate, dscale, sums
    tile = dict(tuning.lookup("adaln", "backward", width, x.device))
    programs = min(tile.pop("programs"), rows)
    partials = torch.empty(programs, 6 * width, dtype=torch.float32, device=x.device)
    _backward[(programs,)](
        dnew,
        dout,
        x,
        value,
        branch_bias,
        gate,
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
        dout.stride(0),
        _stride(gate),
        scale.stride(0),
        _stride(dgate),
        dscale.stride(0),
        DNEW=dnew is not None,
        BRANCH=branch is not None,
        AFFINE=weight is not None,
        BLOCK=triton.next_power_of_2(width),
        **tile,
    )
    return dx, dbranch, dgate, dscale, column_sum(partials)


def _stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


def compile_cases(arch: str):
    """The three places of a block chain: first (no branch), middle, last (no parameters)."""
    for kernel in ("forward", "backward"):
        for size, tile in tuning.buckets("adaln", kernel, arch).items():
            for place in ("first", "middle", "last"):
                yield _compile_case(kernel, size, dict(tile), place)


def _compile_case(kernel: str, size: int, tile: dict, place: str) -> offline.Case:
    options = {key: tile.pop(key) for key in ("num_warps", "maxnreg") if key in tile}
    tile.pop("programs", None)
    flags = dict(
        BRANCH=place != "first", AFFINE=place != "last", BLOCK=triton.next_power_of_2(size)
    )
    absent = []
    if place == "first":
        absent = ["branch", "branch_bias", "gate", "new", "dbranch", "dgate"]
    elif place == "last":
        absent = ["weight", "bias", "dnew"]
    function = _forward if kernel == "forward" else _backward
    types, constexprs = {}, flags | tile
    if kernel == "backward":
        constexprs["DNEW"] = place != "last"
    float32 = ("branch_bias", "weight", "bias", "mean", "rstd", "partial")
    for name in function.arg_names:
        if name in constexprs:
            continue
        if name.endswith("_ptr") and name[:-4] in absent:
            constexprs[name] = None
        elif name.endswith("_ptr"):
            types[name] = "*fp32" if name[:-4] in float32 else "*bf16"
        else:
            types[name] = "fp32" if name == "eps" else "i32"
    return offline.Case(
        f"adaln {place} {kernel} <= {size}",
        function,
        types,
        constexprs,
        options,
        unaligned=("slab",),
    )
