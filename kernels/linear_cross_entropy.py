"""linear_cross_entropy: see `heptapod_fast.ops.linear_cross_entropy`. Rows in chunks; per chunk

    logits = z W^T + b                       cuBLAS, rounded once to the dtype of z
    logits <- weight * (softmax - hits)      one kernel: one read, one write, in place
    dz = dlogits W, dW += dlogits^T z        cuBLAS, dW in float32 inside the product

The kernel `_rows` holds a whole row of logits in the registers of one program, with the next row on
its way, and the column sums of its rows (the bias gradient) beside it: one program fills a
multiprocessor. It reads bfloat16 in pairs, because the compiler would give each element of a row
that it carries into the next iteration a register of its own. `_blocks` is for all else (float32,
an odd number of codes, rows that do not fit): an online maximum and sum, then a second read. Both
add the bias gradient up in float32, before dlogits are rounded, in a fixed order.

The table's chunks fill the multiprocessors of an A100 (sm_80) and an H100 or H200 (sm_90) once with
128 x 256 tiles of dz, the product whose sum over V is long and whose result is small.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from heptapod_fast.kernels import offline, tuning
from heptapod_fast.kernels.columns import column_sum
from heptapod_fast.kernels.products import addmm_float_, mm_float

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(float("-inf"))
TWO_LOWEST = tl.constexpr(0xFF80FF80 - 2**32)  # the bits of -inf as bfloat16, twice


@triton.jit
def _code(at, inside, columns):
    """Targets from memory as int32; -1, which matches no column, where out of range."""
    target = tl.load(at, mask=inside, other=-1)
    return tl.where((target >= 0) & (target < columns), target, -1).to(tl.int32)


@triton.jit
def _chosen(logits_ptr, target_ptr, row, last, columns, K: tl.constexpr):
    """The mean of the K target logits of a row; 0 for a row past the end."""
    total = 0.0
    for k in tl.range(K):
        code = _code(target_ptr + row * K + k, row < last, columns)
        x = tl.load(logits_ptr + row * columns + code, mask=code >= 0, other=0.0)
        total += x.to(tl.float32)
    return total / K


@triton.jit(do_not_specialize=["rows", "slab"])
def _rows(
    logits_ptr,
    pair_ptr,
    target_ptr,
    weight_ptr,
    loss_ptr,
    weighted_ptr,
    partial_ptr,
    rows,
    columns,
    slab,
    K: tl.constexpr,
    GRADIENT: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = (column < columns) | WHOLE
    pair = tl.arange(0, BLOCK // 2)
    pair_inside = (2 * pair < columns) | WHOLE
    first = program.to(tl.int64) * slab
    last = tl.minimum(first + slab, rows)
    total = tl.zeros((BLOCK,), tl.float32)
    following = tl.load(
        pair_ptr + first * (columns // 2) + pair,
        mask=pair_inside & (first < last),
        other=TWO_LOWEST,
    )
    chosen = _chosen(logits_ptr, target_ptr, first, last, columns, K)
    for row in tl.range(first, last):
        # The lower half of a pair is the element before.
        x = tl.interleave(
            (following << 16).to(tl.float32, bitcast=True),
            (following & -65536).to(tl.float32, bitcast=True),
        )
        loss = -chosen
        # The next row, and its target logits before this program overwrites them.
        following = tl.load(
            pair_ptr + (row + 1) * (columns // 2) + pair,
            mask=pair_inside & (row + 1 < last),
            other=TWO_LOWEST,
        )
        chosen = _chosen(logits_ptr, target_ptr, row + 1, last, columns, K)
        peak = tl.max(x, axis=0)
        power = tl.exp2(x * LOG2E - peak * LOG2E)
        mass = tl.sum(power, axis=0)
        weight = 1.0
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + row)
        loss += peak + tl.log(mass)
        tl.store(loss_ptr + row, loss)
        tl.store(weighted_ptr + row, tl.where(weight == 0.0, 0.0, loss * weight))
        if GRADIENT:
            gradient = power * (weight / mass)
            for k in tl.range(K):
                code = _code(target_ptr + row * K + k, True, columns)
                gradient -= tl.where(column == code, weight / K, 0.0)
            gradient = tl.where(weight == 0.0, 0.0, gradient)
            total += gradient
            tl.store(
                logits_ptr + row * columns + column,
                gradient.to(logits_ptr.dtype.element_ty),
                mask=inside,
            )
    if GRADIENT:
        tl.store(partial_ptr + program.to(tl.int64) * columns + column, total, mask=inside)


@triton.jit
def _tile(
    logits_ptr,
    target_ptr,
    row,
    column,
    last,
    columns,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(offsets, inside, logits in float32, share of the targets) of a tile."""
    live = row < last
    at = row[:, None] * columns + column[None, :]
    inside = live[:, None] & (column < columns)[None, :]
    x = tl.load(logits_ptr + at, mask=inside, other=0.0).to(tl.float32)
    # Rows past the end count as zeros, so that they make no NaN.
    x = tl.where((column < columns)[None, :], x, LOWEST)
    hits = tl.zeros((ROWS, BLOCK), tl.float32)
    for k in tl.range(K):
        code = _code(target_ptr + row * K + k, live, columns)
        hits += tl.where(column[None, :] == code[:, None], 1.0 / K, 0.0)
    return at, inside, x, hits


@triton.jit(do_not_specialize=["rows", "slab"])
def _blocks(
    logits_ptr,
    target_ptr,
    weight_ptr,
    loss_ptr,
    weighted_ptr,
    partial_ptr,
    rows,
    columns,
    slab,
    K: tl.constexpr,
    GRADIENT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    first = program * slab
    last = tl.minimum(first + slab, rows)
    if GRADIENT:
        if first >= last:  # no rows are left for this program, yet its sums are added up
            for left in tl.range(0, columns, BLOCK):
                column = left + tl.arange(0, BLOCK)
                tl.store(
                    partial_ptr + program * columns + column,
                    tl.zeros((BLOCK,), tl.float32),
                    mask=column < columns,
                )
    for start in tl.range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        live = row < last
        weight = tl.full((ROWS,), 1.0, tl.float32)
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + row, mask=live, other=0.0)
        peak = tl.full((ROWS,), LOWEST, tl.float32)
        mass = tl.zeros((ROWS,), tl.float32)
        chosen = tl.zeros((ROWS,), tl.float32)
        for left in tl.range(0, columns, BLOCK):
            column = left + tl.arange(0, BLOCK)
            _, _, x, hits = _tile(
                logits_ptr, target_ptr, row, column, last, columns, K, ROWS, BLOCK
            )
            chosen += tl.sum(tl.where(hits > 0, x, 0.0) * hits, axis=1)
            higher = tl.maximum(peak, tl.max(x, axis=1))
            mass = mass * tl.exp2((peak - higher) * LOG2E) + tl.sum(
                tl.exp2((x - higher[:, None]) * LOG2E), axis=1
            )
            peak = higher
        loss = peak + tl.log(mass) - chosen
        tl.store(loss_ptr + row, loss, mask=live)
        tl.store(weighted_ptr + row, tl.where(weight == 0.0, 0.0, loss * weight), mask=live)
        if GRADIENT:
            for left in tl.range(0, columns, BLOCK):
                column = left + tl.arange(0, BLOCK)
                at, inside, x, hits = _tile(
                    logits_ptr, target_ptr, row, column, last, columns, K, ROWS, BLOCK
                )
                power = tl.exp2((x - peak[:, None]) * LOG2E)
                gradient = power * (weight / mass)[:, None] - hits * weight[:, None]
                gradient = tl.where(inside & (weight != 0.0)[:, None], gradient, 0.0)
                tl.store(logits_ptr + at, gradient.to(logits_ptr.dtype.element_ty), mask=inside)
                sums = partial_ptr + program * columns + column
                before = tl.load(sums, mask=(column < columns) & (start > first), other=0.0)
                tl.store(sums, before + tl.sum(gradient, axis=0), mask=column < columns)
            # The next rows' sums may be read by other threads than wrote these.
            tl.debug_barrier()


@triton.jit(do_not_specialize=["count"])
def _scale(x_ptr, factor_ptr, out_ptr, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < count, other=0.0).to(tl.float32)
    out = x * tl.load(factor_ptr)
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=at < count)


SCALE_BLOCK = 2048


def scale(x: Tensor, factor: Tensor) -> Tensor:
    """x times a 0-dim float32 tensor, rounded once; PyTorch would round a factor on the device to
    the dtype of x first."""
    out = torch.empty_like(x)
    if x.numel():
        _scale[(triton.cdiv(x.numel(), SCALE_BLOCK),)](
            x, factor, out, x.numel(), BLOCK=SCALE_BLOCK, num_warps=8
        )
    return out


def _plan(logits: Tensor) -> tuple[object, dict, int]:
    """(kernel, its configuration, number of programs) for a chunk of logits."""
    rows, columns = logits.shape
    fits = columns % 2 == 0 and columns <= tuning.largest("linear_cross_entropy", "rows")
    if logits.dtype == torch.bfloat16 and fits:
        tile = dict(tuning.lookup("linear_cross_entropy", "rows", columns, logits.device))
        tile["BLOCK"] = triton.next_power_of_2(columns)
        tile["WHOLE"] = tile["BLOCK"] == columns
        return _rows, tile, min(tile.pop("programs"), rows)
    tile = dict(tuning.lookup("linear_cross_entropy", "blocks", columns, logits.device))
    return _blocks, tile, min(tile.pop("programs"), triton.cdiv(rows, tile["ROWS"]))


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
    (rows, width), columns = z.shape, len(weight)
    single = dict(dtype=torch.float32, device=z.device)
    # What remains where there are no rows; otherwise products and sums take their place.
    shapes = ((columns, width), (columns,)) if gradients and rows == 0 else ((0,), (0,))
    dweight, dbias = (torch.zeros(shape, **single) for shape in shapes)
    dz = torch.empty_like(z) if gradients else z.new_empty(0)
    loss, weighted = torch.empty(rows, **single), torch.empty(rows, **single)
    if rows == 0:
        return weighted.sum(), loss, dz, dweight, dbias
    if chunk is None:
        chunk = tuning.lookup("linear_cross_entropy", "chunk", width, z.device)["rows"]
    chunk = chunk_rows(rows, chunk)
    weight, bias = weight.to(z.dtype), bias.to(z.dtype)
    logits = torch.empty(min(chunk, rows), columns, dtype=z.dtype, device=z.device)
    kernel, tile, programs = _plan(logits)
    partials = torch.empty(
        triton.cdiv(rows, chunk) if gradients else 0, programs, columns, **single
    )
    for i, start in enumerate(range(0, rows, chunk)):
        part = slice(start, min(start + chunk, rows))
        count = part.stop - start
        logits = logits[:count]
        torch.addmm(bias, z[part], weight.t(), out=logits)
        views = (logits, logits.view(torch.int32)) if kernel is _rows else (logits,)
        kernel[(programs,)](
            *views,
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
            torch.mm(logits, weight, out=dz[part])
            if i == 0:
                dweight = mm_float(logits.t(), z[part])
            else:
                addmm_float_(dweight, logits.t(), z[part])
    if gradients:
        dbias = column_sum(partials.flatten(0, 1))
    return weighted.sum(), loss, dz, dweight, dbias


# (targets, gradient, row weights, whether the row fills the block)
VARIANTS = (
    (1, True, False, True),
    (1, True, True, True),
    (4, True, True, True),
    (16, True, False, True),
    (1, False, False, True),
    (1, True, False, False),
)


def compile_cases(arch: str):
    """See offline.py."""
    for size, tile in tuning.buckets("linear_cross_entropy", "rows", arch).items():
        largest = size == tuning.largest("linear_cross_entropy", "rows")
        for *variant, whole in VARIANTS if largest else VARIANTS[:1]:
            name = f"rows of {size}{'' if whole else ', partly filled'}"
            # 16 warps can have 128 registers each, which only Blackwell's compiler finds too few.
            tight = largest and arch == "sm_100" and variant[0] > 1
            yield _case(
                name,
                _rows,
                dict(tile, BLOCK=size, WHOLE=whole),
                dict(logits_ptr="*bf16", pair_ptr="*i32"),
                *variant,
                spill=48 if tight else 0,
            )
    (tile,) = tuning.buckets("linear_cross_entropy", "blocks", arch).values()
    for dtype in ("bf16", "fp32"):
        for *variant, whole in VARIANTS:
            if whole:
                # Triton 3.6 spills an address or two with several targets; 3.7 none.
                yield _case(
                    f"blocks {dtype}",
                    _blocks,
                    tile,
                    dict(logits_ptr=f"*{dtype}"),
                    *variant,
                    spill=16 if variant[0] > 1 else 0,
                )

    yield offline.Case(
        "linear_cross_entropy scale",
        _scale,
        dict(x_ptr="*bf16", factor_ptr="*fp32", out_ptr="*bf16", count="i32"),
        dict(BLOCK=SCALE_BLOCK),
        dict(num_warps=8),
    )


def _case(
    name: str,
    kernel: object,
    tile: dict,
    types: dict,
    targets: int,
    gradient: bool,
    weighted: bool,
    spill: int = 0,
) -> offline.Case:
    types = dict(
        types,
        target_ptr="*i64",
        loss_ptr="*fp32",
        weighted_ptr="*fp32",
        rows="i32",
        columns="i32",
        slab="i32",
    )
    constants = {key: value for key, value in tile.items() if key not in ("programs", "num_warps")}
    constants |= dict(K=targets, GRADIENT=gradient)
    for pointer, there in (("weight_ptr", weighted), ("partial_ptr", gradient)):
        (types if there else constants)[pointer] = "*fp32" if there else None
    return offline.Case(
        f"linear_cross_entropy {name}, {targets} targets{', weights' if weighted else ''}"
        f"{'' if gradient else ', loss alone'}",
        kernel,
        types,
        constants,
        dict(num_warps=tile["num_warps"]),
        unaligned=("slab", "rows"),
        spill=spill,
        why="no registers are left" if spill else "",
    )
