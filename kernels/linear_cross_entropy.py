"""linear_cross_entropy: see `heptapod_fast.ops.linear_cross_entropy`; docs/kernels/README.md builds
it up from a plain version. Rows in chunks; per chunk

    logits = z W^T + b                       cuBLAS, rounded once to the dtype of z
    logits <- weight * (softmax - hits)      one kernel: one read, one write, in place
    dz = dlogits W, dW += dlogits^T z        cuBLAS, dW in float32 inside the product

`cross_entropy_rows_kernel` holds a whole row of logits in the registers of one program, with the
next row on its way, and the column sums of its rows (the bias gradient) beside it: one program
fills a multiprocessor. It reads bfloat16 in pairs, because the compiler would give each element of
a row that it carries into the next iteration a register of its own. `cross_entropy_blocks_kernel`
is for all else (float32, an odd number of codes, rows that do not fit): an online maximum and sum,
then a second read. Both add the bias gradient up in float32, before dlogits are rounded, in a fixed
order.

The table's chunks fill the multiprocessors of an A100 (sm_80) and an H100 or H200 (sm_90) once with
128 x 256 tiles of dz, the product whose sum over V is long and whose result is small.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from heptapod_fast.kernels import tuning
from heptapod_fast.kernels.columns import column_sum
from heptapod_fast.kernels.memory import load_float32, store_rounded
from heptapod_fast.kernels.products import addmm_float_, mm_float

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(float("-inf"))
TWO_LOWEST = tl.constexpr(0xFF80FF80 - 2**32)  # the bits of -inf as bfloat16, twice

SCALE_BLOCK = 2048


@triton.jit
def _code(
    at,  # pointers into the targets, a scalar or [ROWS]
    inside,  # which of them may be read
    columns,  # V
):
    """Targets as int32; -1, which matches no column, for those out of range."""
    target = tl.load(at, mask=inside, other=-1)
    return tl.where((target >= 0) & (target < columns), target, -1).to(tl.int32)


# A whole row in registers.


@triton.jit
def _chosen(
    logits_ptr,  # (R, V)
    target_ptr,  # (R, K) int64
    row,  # scalar
    last,  # the row after the last one
    columns,  # V
    K: tl.constexpr,  # targets of a row
):
    """The mean of the K target logits of a row; 0 for a row past the end."""
    total = 0.0
    for k in tl.range(K):
        code = _code(target_ptr + row * K + k, row < last, columns)
        x = tl.load(logits_ptr + row * columns + code, mask=code >= 0, other=0.0)
        total += x.to(tl.float32)
    return total / K


@triton.jit(do_not_specialize=["rows", "slab"])
def cross_entropy_rows_kernel(
    # read, and with GRADIENT overwritten
    logits_ptr,  # (R, V) bfloat16, V even
    pair_ptr,  # the same memory as (R, V / 2) int32
    # read
    target_ptr,  # (R, K) int64
    weight_ptr,  # (R,) float32, None for 1
    # written
    loss_ptr,  # (R,) float32
    weighted_ptr,  # (R,) float32, loss * weight
    partial_ptr,  # (programs, V) float32 sums of the gradient over rows, None without GRADIENT
    # sizes
    rows,  # R
    columns,  # V
    slab,  # rows per program
    # constants
    K: tl.constexpr,  # targets of a row
    GRADIENT: tl.constexpr,  # whether the logits become their gradient
    WHOLE: tl.constexpr,  # whether V is BLOCK
    BLOCK: tl.constexpr,  # power of 2, at least V
):
    """A slab of rows, each whole in registers while the next one is on its way: losses, and with
    GRADIENT the logits' gradient in their place.
    """
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)  # [BLOCK]
    inside = (column < columns) | WHOLE
    pair = tl.arange(0, BLOCK // 2)  # [BLOCK // 2]
    pair_inside = (2 * pair < columns) | WHOLE

    first = program.to(tl.int64) * slab  # 64 bits: rows * columns may need them
    last = tl.minimum(first + slab, rows)
    total = tl.zeros((BLOCK,), tl.float32)

    # Start loading the first row. Columns beyond V become -inf, which adds nothing to a softmax.
    following = tl.load(
        pair_ptr + first * (columns // 2) + pair,
        mask=pair_inside & (first < last),
        other=TWO_LOWEST,
    )
    chosen = _chosen(logits_ptr, target_ptr, first, last, columns, K)
    for row in tl.range(first, last):
        # Pairs to float32, which has the bits of bfloat16 on top. The lower half of a pair is the
        # element before.
        even = (following << 16).to(tl.float32, bitcast=True)  # [BLOCK // 2]
        odd = (following & -65536).to(tl.float32, bitcast=True)  # [BLOCK // 2]
        x = tl.interleave(even, odd)  # [BLOCK]
        loss = -chosen

        # The next row, and its target logits before this program overwrites them.
        following = tl.load(
            pair_ptr + (row + 1) * (columns // 2) + pair,
            mask=pair_inside & (row + 1 < last),
            other=TWO_LOWEST,
        )
        chosen = _chosen(logits_ptr, target_ptr, row + 1, last, columns, K)

        # Softmax and loss.
        peak = tl.max(x, axis=0)
        power = tl.exp2(x * LOG2E - peak * LOG2E)  # [BLOCK]
        mass = tl.sum(power, axis=0)
        weight = 1.0
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + row)
        loss += peak + tl.log(mass)
        tl.store(loss_ptr + row, loss)
        # A row of weight 0 adds nothing, whatever it holds: inf * 0 would be NaN.
        tl.store(weighted_ptr + row, tl.where(weight == 0.0, 0.0, loss * weight))

        # weight * (softmax - hits), in place of the logits.
        if GRADIENT:
            gradient = power * (weight / mass)  # [BLOCK]
            for k in tl.range(K):
                code = _code(target_ptr + row * K + k, True, columns)
                gradient -= tl.where(column == code, weight / K, 0.0)
            gradient = tl.where(weight == 0.0, 0.0, gradient)
            total += gradient
            store_rounded(logits_ptr + row * columns + column, gradient, inside)
    if GRADIENT:
        tl.store(partial_ptr + program.to(tl.int64) * columns + column, total, mask=inside)


# Blocks of columns.


@triton.jit
def _tile(
    logits_ptr,  # (R, V)
    target_ptr,  # (R, K) int64
    row,  # [ROWS]
    column,  # [BLOCK]
    last,  # the row after the last one
    columns,  # V
    K: tl.constexpr,  # targets of a row
    ROWS: tl.constexpr,  # rows of a tile
    BLOCK: tl.constexpr,  # columns of a tile
):
    """[ROWS, BLOCK] each: offsets, what is inside, logits in float32, share of the targets."""
    live = row < last
    at = row[:, None] * columns + column[None, :]
    inside = live[:, None] & (column < columns)[None, :]
    x = load_float32(logits_ptr + at, inside)
    # Rows past the end count as zeros, so that they make no NaN.
    x = tl.where((column < columns)[None, :], x, LOWEST)
    hits = tl.zeros((ROWS, BLOCK), tl.float32)
    for k in tl.range(K):
        code = _code(target_ptr + row * K + k, live, columns)
        hits += tl.where(column[None, :] == code[:, None], 1.0 / K, 0.0)
    return at, inside, x, hits


@triton.jit(do_not_specialize=["rows", "slab"])
def cross_entropy_blocks_kernel(
    # read, and with GRADIENT overwritten
    logits_ptr,  # (R, V)
    # read
    target_ptr,  # (R, K) int64
    weight_ptr,  # (R,) float32, None for 1
    # written
    loss_ptr,  # (R,) float32
    weighted_ptr,  # (R,) float32, loss * weight
    partial_ptr,  # (programs, V) float32 sums of the gradient over rows, None without GRADIENT
    # sizes
    rows,  # R
    columns,  # V
    slab,  # rows per program
    # constants
    K: tl.constexpr,  # targets of a row
    GRADIENT: tl.constexpr,  # whether the logits become their gradient
    ROWS: tl.constexpr,  # rows of a tile
    BLOCK: tl.constexpr,  # columns of a tile
):
    """A slab of rows, some at a time, in blocks of columns that are read twice: losses, and with
    GRADIENT the logits' gradient in their place.
    """
    program = tl.program_id(0).to(tl.int64)  # 64 bits: rows * columns may need them
    first = program * slab
    last = tl.minimum(first + slab, rows)

    if GRADIENT:
        if first >= last:  # no rows are left for this program, yet its sums are added up
            for left in tl.range(0, columns, BLOCK):
                column = left + tl.arange(0, BLOCK)  # [BLOCK]
                tl.store(
                    partial_ptr + program * columns + column,
                    tl.zeros((BLOCK,), tl.float32),
                    mask=column < columns,
                )

    for start in tl.range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)  # [ROWS]
        live = row < last
        weight = tl.full((ROWS,), 1.0, tl.float32)
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + row, mask=live, other=0.0)

        # First read: maximum and sum of exponentials so far. When the maximum rises, what was added
        # up below the old one is scaled down.
        peak = tl.full((ROWS,), LOWEST, tl.float32)
        mass = tl.zeros((ROWS,), tl.float32)
        chosen = tl.zeros((ROWS,), tl.float32)
        for left in tl.range(0, columns, BLOCK):
            column = left + tl.arange(0, BLOCK)  # [BLOCK]
            _, _, x, hits = _tile(
                logits_ptr, target_ptr, row, column, last, columns, K, ROWS, BLOCK
            )
            # Where nothing is hit x may be -inf, and -inf * 0 is NaN.
            chosen += tl.sum(tl.where(hits > 0, x, 0.0) * hits, axis=1)
            higher = tl.maximum(peak, tl.max(x, axis=1))
            mass = mass * tl.exp2((peak - higher) * LOG2E)
            mass += tl.sum(tl.exp2((x - higher[:, None]) * LOG2E), axis=1)
            peak = higher
        loss = peak + tl.log(mass) - chosen
        tl.store(loss_ptr + row, loss, mask=live)
        # A row of weight 0 adds nothing, whatever it holds: inf * 0 would be NaN.
        tl.store(weighted_ptr + row, tl.where(weight == 0.0, 0.0, loss * weight), mask=live)

        # Second read: weight * (softmax - hits), in place of the logits, and its sums over rows.
        if GRADIENT:
            for left in tl.range(0, columns, BLOCK):
                column = left + tl.arange(0, BLOCK)  # [BLOCK]
                at, inside, x, hits = _tile(
                    logits_ptr, target_ptr, row, column, last, columns, K, ROWS, BLOCK
                )
                power = tl.exp2((x - peak[:, None]) * LOG2E)
                gradient = power * (weight / mass)[:, None] - hits * weight[:, None]
                gradient = tl.where(inside & (weight != 0.0)[:, None], gradient, 0.0)
                store_rounded(logits_ptr + at, gradient, inside)
                # The sums do not fit into registers: they wait in memory between tiles of rows.
                sums = partial_ptr + program * columns + column
                before = tl.load(sums, mask=(column < columns) & (start > first), other=0.0)
                tl.store(sums, before + tl.sum(gradient, axis=0), mask=column < columns)
            # The next rows' sums may be read by other threads than wrote these.
            tl.debug_barrier()


# The gradient of the total.


@triton.jit(do_not_specialize=["count"])
def scale_kernel(
    x_ptr,  # (count,)
    factor_ptr,  # () float32
    out_ptr,  # (count,)
    count,
    BLOCK: tl.constexpr,  # elements of a program
):
    """out = x * factor, rounded once."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = at < count
    out = load_float32(x_ptr + at, inside) * tl.load(factor_ptr)
    store_rounded(out_ptr + at, out, inside)


def scale(x: Tensor, factor: Tensor) -> Tensor:
    """x times a 0-dim float32 tensor, rounded once; PyTorch would round a factor on the device to
    the dtype of x first."""
    out = torch.empty_like(x)
    if x.numel():
        scale_kernel[(triton.cdiv(x.numel(), SCALE_BLOCK),)](
            x, factor, out, x.numel(), BLOCK=SCALE_BLOCK, num_warps=8
        )
    return out


# Launchers.


def _plan(logits: Tensor) -> tuple[object, dict, int]:
    """(kernel, its configuration, number of programs) for a chunk of logits."""
    rows, columns = logits.shape
    fits = columns % 2 == 0 and columns <= tuning.largest("linear_cross_entropy", "rows")
    if logits.dtype == torch.bfloat16 and fits:
        tile = dict(tuning.lookup("linear_cross_entropy", "rows", columns, logits.device))
        tile["BLOCK"] = triton.next_power_of_2(columns)
        tile["WHOLE"] = tile["BLOCK"] == columns
        programs = min(tile.pop("programs"), rows)
        return cross_entropy_rows_kernel, tile, programs
    tile = dict(tuning.lookup("linear_cross_entropy", "blocks", columns, logits.device))
    programs = min(tile.pop("programs"), triton.cdiv(rows, tile["ROWS"]))
    return cross_entropy_blocks_kernel, tile, programs


def chunk_rows(rows: int, most: int) -> int:
    """Rows per chunk: at most `most`, alike in size, a multiple of 64 where `most` allows it."""
    alike = triton.cdiv(rows, triton.cdiv(rows, most))
    return min(most, 64 * triton.cdiv(alike, 64))


def forward(
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor,
    row_weight: Tensor | None,
    chunk: int | None,
    gradients: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """z (R, D), weight (V, D), bias (V,), target (R, K) int64, row_weight (R,) float32, contiguous.

    -> total (), losses (R,), dz (R, D), dweight (V, D), dbias (V,), gradients of the total; all
    float32, dz in z's dtype. gradients=False: the last three are empty. chunk None: from the table.
    """
    rows, width = z.shape
    columns = len(weight)
    float32 = dict(dtype=torch.float32, device=z.device)
    loss = torch.empty(rows, **float32)
    weighted = torch.empty(rows, **float32)
    dz = torch.empty_like(z) if gradients else z.new_empty(0)
    dweight = torch.empty(0, **float32)
    dbias = torch.empty(0, **float32)
    if rows == 0:
        if gradients:
            dweight = torch.zeros(columns, width, **float32)
            dbias = torch.zeros(columns, **float32)
        return weighted.sum(), loss, dz, dweight, dbias

    # One buffer of logits for all chunks, and one row of partials for each program of each chunk.
    if chunk is None:
        chunk = tuning.lookup("linear_cross_entropy", "chunk", width, z.device)["rows"]
    chunk = chunk_rows(rows, chunk)
    weight = weight.to(z.dtype)
    bias = bias.to(z.dtype)
    logits = torch.empty(min(chunk, rows), columns, dtype=z.dtype, device=z.device)
    kernel, tile, programs = _plan(logits)
    chunks = triton.cdiv(rows, chunk) if gradients else 0
    partials = torch.empty(chunks, programs, columns, **float32)

    for i, start in enumerate(range(0, rows, chunk)):
        part = slice(start, min(start + chunk, rows))
        count = part.stop - start
        logits = logits[:count]
        torch.addmm(bias, z[part], weight.t(), out=logits)
        arguments = [logits]
        if kernel is cross_entropy_rows_kernel:
            arguments.append(logits.view(torch.int32))
        kernel[(programs,)](
            *arguments,
            target[part],
            None if row_weight is None else row_weight[part],
            loss[part],
            weighted[part],
            partials[i] if gradients else None,
            count,
            columns,
            triton.cdiv(count, programs),
            K=target.shape[1],
            GRADIENT=gradients,
            **tile,
        )
        if gradients:
            # From here on the logits are dlogits.
            torch.mm(logits, weight, out=dz[part])
            if i == 0:
                dweight = mm_float(logits.t(), z[part])
            else:
                addmm_float_(dweight, logits.t(), z[part])
    if gradients:
        dbias = column_sum(partials.flatten(0, 1))
    return weighted.sum(), loss, dz, dweight, dbias
