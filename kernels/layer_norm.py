"""layer_norm and add_layer_norm: see `heptapod_fast.ops.layer_norm`; docs/kernels/README.md builds
them up from a plain version. Memory-bound, one pass each.

A program takes a contiguous slab of rows, one row per step of a loop whose loads are pipelined
through shared memory (cp.async), so that the bytes in flight do not depend on registers. The width
is a constant of the compiled kernel: no masks where the tile fits, 16-byte accesses where the width
is a multiple of 8. Widths between two powers of two are covered by two parts, MAIN + REST columns
(1280 = 1024 + 256), because idle lanes would cost as many instructions as busy ones.

Backward: column sums stay in float32 registers, one row of partials per program, which
`columns.column_sum` adds up in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from heptapod_fast.kernels import tuning
from heptapod_fast.kernels.columns import column_sum
from heptapod_fast.kernels.randomness import keep, mask_arguments, row_keys
from heptapod_fast.ops.dropout_mask import DropoutMask

# Parts of a row.


@triton.jit
def _load(
    ptr,  # at the row's first element
    column,  # [columns] of the part
    WIDTH: tl.constexpr,  # D
    FULL: tl.constexpr,  # whether all of the columns are below D
):
    """float32 values of a part; 0 beyond the width."""
    if FULL:
        return tl.load(ptr + column).to(tl.float32)
    return tl.load(ptr + column, mask=column < WIDTH, other=0.0).to(tl.float32)


@triton.jit
def _store(
    ptr,  # at the row's first element
    column,  # [columns] of the part
    value,  # [columns] float32
    WIDTH: tl.constexpr,  # D
    FULL: tl.constexpr,  # whether all of the columns are below D
):
    """Rounds a part to the dtype of the memory."""
    if FULL:
        tl.store(ptr + column, value.to(ptr.dtype.element_ty))
    else:
        tl.store(ptr + column, value.to(ptr.dtype.element_ty), mask=column < WIDTH)


@triton.jit
def _fold(
    x,  # [columns]
    THREADS: tl.constexpr,  # threads of the program
    VECTOR: tl.constexpr,  # elements of a 16-byte access
):
    """[THREADS]: each thread adds up the elements that it holds.

    Nothing crosses threads yet, and both parts have this shape: their sums can be added before the
    one reduction across threads that a row needs.
    """
    SIZE: tl.constexpr = min(VECTOR, x.shape[0] // THREADS)
    x = tl.reshape(x, (x.shape[0] // (THREADS * SIZE), THREADS, SIZE))
    return tl.sum(tl.sum(x, axis=2), axis=0)


# Forward.


@triton.jit
def _residual(
    # all pointers at the row's first element
    x_ptr,
    branch_ptr,  # None: there is no sum, only a norm
    sum_ptr,  # None without a branch
    shift,  # [columns] float32, the branch's bias; not read without BIAS
    column,  # [columns] of the part
    # the row's dropout; not read without THRESHOLD
    key0,
    key1,
    counter,
    scale,  # 1 / (1 - p)
    BIAS: tl.constexpr,  # whether the branch has a bias
    THRESHOLD: tl.constexpr,  # p * 2**32; 0 without dropout
    WIDTH: tl.constexpr,  # D
    FULL: tl.constexpr,  # whether all of the columns are below D
):
    """[columns] float32 of the sum, which is stored; of x where there is no branch.

    The sum is rounded before its norm is taken: that is what the backward pass reads.
    """
    x = _load(x_ptr, column, WIDTH, FULL)
    if branch_ptr is not None:
        branch = _load(branch_ptr, column, WIDTH, FULL)
        if BIAS:
            branch += shift
        if THRESHOLD > 0:
            kept = keep(key0, key1, counter, column, WIDTH, THRESHOLD)
            branch = tl.where(kept, branch * scale, 0.0)
        rounded = (x + branch).to(sum_ptr.dtype.element_ty)
        _store(sum_ptr, column, rounded, WIDTH, FULL)
        x = rounded.to(tl.float32)
    return x


@triton.jit
def _centre(
    x,  # [columns] float32
    mean,  # scalar
    column,  # [columns] of the part
    WIDTH: tl.constexpr,  # D
    FULL: tl.constexpr,  # whether all of the columns are below D
):
    """x - mean, and 0 beyond the width, where the variance must see nothing."""
    x = x - mean
    return x if FULL else tl.where(column < WIDTH, x, 0.0)


@triton.jit(do_not_specialize=["rows", "slab", "counters"])
def layer_norm_forward_kernel(
    # read
    x_ptr,  # (R, D)
    branch_ptr,  # (R, D); None: the norm alone, no sum
    branch_bias_ptr,  # (D,) float32 or None
    weight_ptr,  # (D,) float32 or None
    bias_ptr,  # (D,) float32, None with the weight
    # written
    sum_ptr,  # (R, D), None with the branch
    out_ptr,  # (R, D)
    stats_ptr,  # (R, 2) float32: mean, 1 / standard deviation
    # the dropout mask of the branch
    key_ptr,  # (P, 2) int64, None without dropout
    counter_ptr,  # (N,) int64, None without dropout
    # sizes
    rows,  # R
    slab,  # rows per program
    rows_per_key,  # R / P
    counters,  # N
    scale,  # 1 / (1 - p)
    eps,  # added to the variance
    # constants
    BIAS: tl.constexpr,  # whether the branch has a bias
    THRESHOLD: tl.constexpr,  # p * 2**32; 0 without dropout
    WIDTH: tl.constexpr,  # D
    MAIN: tl.constexpr,  # columns of the first part, a power of 2
    REST: tl.constexpr,  # columns of the second part, a power of 2; 0: there is none
    THREADS: tl.constexpr,  # threads of the program
    STAGES: tl.constexpr,  # rows whose loads are under way
):
    """A slab of rows: sum = x + dropout(branch + branch_bias), stored and rounded, and its norm."""
    # What the two parts cover. With a second part the first one is always full.
    VECTOR: tl.constexpr = 128 // x_ptr.dtype.element_ty.primitive_bitwidth
    ALL: tl.constexpr = WIDTH == MAIN + REST
    FULL: tl.constexpr = ALL or REST > 0
    AFFINE: tl.constexpr = weight_ptr is not None
    column_main = tl.arange(0, MAIN)  # [MAIN]
    column_rest = MAIN + tl.arange(0, max(REST, 1))  # [REST]; a tile needs a column, used or not

    # Parameters are loaded once and stay in registers for all rows of the slab.
    shift_main = _load(branch_bias_ptr, column_main, WIDTH, FULL) if BIAS else 0.0
    shift_rest = _load(branch_bias_ptr, column_rest, WIDTH, ALL) if BIAS and REST > 0 else 0.0
    if AFFINE:
        weight_main = _load(weight_ptr, column_main, WIDTH, FULL)
        bias_main = _load(bias_ptr, column_main, WIDTH, FULL)
        if REST > 0:
            weight_rest = _load(weight_ptr, column_rest, WIDTH, ALL)
            bias_rest = _load(bias_ptr, column_rest, WIDTH, ALL)

    first = tl.program_id(0) * slab
    for step in tl.range(0, tl.minimum(slab, rows - first), num_stages=STAGES):
        # Where the row is, and its dropout.
        row = first + step
        row64 = row.to(tl.int64)  # 64 bits: rows * width may need them
        at = row64 * WIDTH
        key0 = 0  # passed on, but not read without dropout
        key1 = 0
        counter = 0
        if THRESHOLD > 0:
            key0, key1, counter = row_keys(key_ptr, counter_ptr, row, rows_per_key, counters)
        branch_at = branch_ptr + at if branch_ptr is not None else None
        sum_at = sum_ptr + at if branch_ptr is not None else None

        # The residual sum, and its mean.
        x_main = _residual(
            x_ptr + at,
            branch_at,
            sum_at,
            shift_main,
            column_main,
            key0,
            key1,
            counter,
            scale,
            BIAS,
            THRESHOLD,
            WIDTH,
            FULL,
        )
        total = _fold(x_main, THREADS, VECTOR)
        if REST > 0:
            x_rest = _residual(
                x_ptr + at,
                branch_at,
                sum_at,
                shift_rest,
                column_rest,
                key0,
                key1,
                counter,
                scale,
                BIAS,
                THRESHOLD,
                WIDTH,
                ALL,
            )
            total += _fold(x_rest, THREADS, VECTOR)
        mean = tl.sum(total) * (1.0 / WIDTH)

        # The variance from centred values: mean(x^2) - mean^2 cancels far from zero.
        x_main = _centre(x_main, mean, column_main, WIDTH, FULL)
        square = _fold(x_main * x_main, THREADS, VECTOR)
        if REST > 0:
            x_rest = _centre(x_rest, mean, column_rest, WIDTH, ALL)
            square += _fold(x_rest * x_rest, THREADS, VECTOR)
        rstd = tl.rsqrt(tl.sum(square) * (1.0 / WIDTH) + eps)
        tl.store(stats_ptr + 2 * row64, mean)
        tl.store(stats_ptr + 2 * row64 + 1, rstd)

        # The norm.
        y_main = x_main * rstd
        if AFFINE:
            y_main = y_main * weight_main + bias_main
        _store(out_ptr + at, column_main, y_main, WIDTH, FULL)
        if REST > 0:
            y_rest = x_rest * rstd
            if AFFINE:
                y_rest = y_rest * weight_rest + bias_rest
            _store(out_ptr + at, column_rest, y_rest, WIDTH, ALL)


# Backward.


@triton.jit
def _read(
    # pointers at the row's first element
    grad_ptr,
    sum_ptr,
    weight,  # [columns] float32; not read without AFFINE
    mean,  # scalar
    rstd,  # scalar
    column,  # [columns] of the part
    AFFINE: tl.constexpr,  # whether there is a weight
    WIDTH: tl.constexpr,  # D
    FULL: tl.constexpr,  # whether all of the columns are below D
):
    """[columns] of dy, of weight * dy and of the normalised row; dy is 0 beyond the width."""
    grad = _load(grad_ptr, column, WIDTH, FULL)
    normal = (_load(sum_ptr, column, WIDTH, FULL) - mean) * rstd
    weighted = grad * weight if AFFINE else grad
    return grad, weighted, normal


@triton.jit
def _finish(
    weighted,  # [columns] g = weight * dy
    normal,  # [columns] n
    rstd,  # scalar
    rstd_mean_g,  # scalar: rstd * mean(g)
    rstd_mean_gn,  # scalar: rstd * mean(g n)
    # pointers at the row's first element
    grad_sum_ptr,  # None: the sum has no gradient of its own
    dx_ptr,
    dbranch_ptr,  # None without dropout: dbranch is dx
    column,  # [columns] of the part
    # the row's dropout; not read without THRESHOLD
    key0,
    key1,
    counter,
    scale,  # 1 / (1 - p)
    THRESHOLD: tl.constexpr,  # p * 2**32; 0 without dropout
    WIDTH: tl.constexpr,  # D
    FULL: tl.constexpr,  # whether all of the columns are below D
):
    """Stores a part of dx, and of dbranch if there is dropout; returns dbranch, [columns]."""
    dx = weighted * rstd - rstd_mean_g - normal * rstd_mean_gn
    if grad_sum_ptr is not None:
        dx += _load(grad_sum_ptr, column, WIDTH, FULL)
    _store(dx_ptr, column, dx, WIDTH, FULL)
    dbranch = dx
    if THRESHOLD > 0:
        kept = keep(key0, key1, counter, column, WIDTH, THRESHOLD)
        dbranch = tl.where(kept, dx * scale, 0.0)
        _store(dbranch_ptr, column, dbranch, WIDTH, FULL)
    return dbranch


@triton.jit
def _store_sums(
    out_ptr,  # at this program's row of partials
    column,  # [columns] of the part
    dweight,  # [columns] float32
    dbias,  # [columns] float32
    dbranch,  # [columns] float32
    AFFINE: tl.constexpr,  # whether there are dweight and dbias
    BIAS: tl.constexpr,  # whether there is dbranch_bias
    WIDTH: tl.constexpr,  # D
    FULL: tl.constexpr,  # whether all of the columns are below D
):
    """One program's partial sums, those that exist, one after the other."""
    if AFFINE:
        _store(out_ptr, column, dweight, WIDTH, FULL)
        _store(out_ptr + WIDTH, column, dbias, WIDTH, FULL)
    if BIAS:
        _store(out_ptr + 2 * AFFINE * WIDTH, column, dbranch, WIDTH, FULL)


@triton.jit(do_not_specialize=["rows", "slab", "counters"])
def layer_norm_backward_kernel(
    # read
    grad_ptr,  # (R, D) the gradient of the norm
    grad_sum_ptr,  # (R, D) the gradient of the sum, or None
    sum_ptr,  # (R, D) what was normalised
    stats_ptr,  # (R, 2) float32: mean, 1 / standard deviation
    weight_ptr,  # (D,) float32 or None
    # written
    dx_ptr,  # (R, D)
    dbranch_ptr,  # (R, D), None without dropout: it is dx
    partial_ptr,  # (programs, 0 to 3 times D) float32 sums over each program's rows, or None
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
    BIAS: tl.constexpr,  # whether the branch has a bias
    THRESHOLD: tl.constexpr,  # p * 2**32; 0 without dropout
    WIDTH: tl.constexpr,  # D
    MAIN: tl.constexpr,  # columns of the first part, a power of 2
    REST: tl.constexpr,  # columns of the second part, a power of 2; 0: there is none
    THREADS: tl.constexpr,  # threads of the program
    STAGES: tl.constexpr,  # rows whose loads are under way
):
    """A slab of rows: dx and dbranch of each, and the sums over the slab."""
    # What the two parts cover, as in the forward pass.
    VECTOR: tl.constexpr = 128 // sum_ptr.dtype.element_ty.primitive_bitwidth
    ALL: tl.constexpr = WIDTH == MAIN + REST
    FULL: tl.constexpr = ALL or REST > 0
    AFFINE: tl.constexpr = weight_ptr is not None
    column_main = tl.arange(0, MAIN)  # [MAIN]
    column_rest = MAIN + tl.arange(0, max(REST, 1))  # [REST]
    weight_main = _load(weight_ptr, column_main, WIDTH, FULL) if AFFINE else 1.0
    weight_rest = _load(weight_ptr, column_rest, WIDTH, ALL) if AFFINE and REST > 0 else 1.0

    # Sums over this program's rows, in registers.
    dweight_main = tl.zeros((MAIN,), tl.float32)
    dbias_main = tl.zeros((MAIN,), tl.float32)
    dbranch_main = tl.zeros((MAIN,), tl.float32)
    dweight_rest = tl.zeros((max(REST, 1),), tl.float32)
    dbias_rest = tl.zeros((max(REST, 1),), tl.float32)
    dbranch_rest = tl.zeros((max(REST, 1),), tl.float32)

    program = tl.program_id(0)
    first = program * slab
    for step in tl.range(0, tl.minimum(slab, rows - first), num_stages=STAGES):
        # Where the row is, its dropout and its statistics.
        row = first + step
        row64 = row.to(tl.int64)  # 64 bits: rows * width may need them
        at = row64 * WIDTH
        key0 = 0  # passed on, but not read without dropout
        key1 = 0
        counter = 0
        if THRESHOLD > 0:
            key0, key1, counter = row_keys(key_ptr, counter_ptr, row, rows_per_key, counters)
        grad_sum_at = grad_sum_ptr + at if grad_sum_ptr is not None else None
        dbranch_at = dbranch_ptr + at if THRESHOLD > 0 else None
        mean = tl.load(stats_ptr + 2 * row64)
        rstd = tl.load(stats_ptr + 2 * row64 + 1)

        # g = weight * dy and n, and what the means of g and of g n need.
        dy_main, g_main, n_main = _read(
            grad_ptr + at, sum_ptr + at, weight_main, mean, rstd, column_main, AFFINE, WIDTH, FULL
        )
        total_g = _fold(g_main, THREADS, VECTOR)
        total_gn = _fold(g_main * n_main, THREADS, VECTOR)
        dweight_main += dy_main * n_main
        dbias_main += dy_main
        if REST > 0:
            dy_rest, g_rest, n_rest = _read(
                grad_ptr + at,
                sum_ptr + at,
                weight_rest,
                mean,
                rstd,
                column_rest,
                AFFINE,
                WIDTH,
                ALL,
            )
            total_g += _fold(g_rest, THREADS, VECTOR)
            total_gn += _fold(g_rest * n_rest, THREADS, VECTOR)
            dweight_rest += dy_rest * n_rest
            dbias_rest += dy_rest
        # Joined, the two sums cross the warps together.
        sum_g, sum_gn = tl.split(tl.sum(tl.join(total_g, total_gn), axis=0))
        # ds = rstd * (g - mean(g) - n * mean(g n)) + dsum, multiplied out.
        rstd_mean_g = sum_g * (rstd * (1.0 / WIDTH))
        rstd_mean_gn = sum_gn * (rstd * (1.0 / WIDTH))
        dbranch_main += _finish(
            g_main,
            n_main,
            rstd,
            rstd_mean_g,
            rstd_mean_gn,
            grad_sum_at,
            dx_ptr + at,
            dbranch_at,
            column_main,
            key0,
            key1,
            counter,
            scale,
            THRESHOLD,
            WIDTH,
            FULL,
        )
        if REST > 0:
            dbranch_rest += _finish(
                g_rest,
                n_rest,
                rstd,
                rstd_mean_g,
                rstd_mean_gn,
                grad_sum_at,
                dx_ptr + at,
                dbranch_at,
                column_rest,
                key0,
                key1,
                counter,
                scale,
                THRESHOLD,
                WIDTH,
                ALL,
            )

    SUMS: tl.constexpr = 2 * AFFINE + BIAS
    out = partial_ptr + program.to(tl.int64) * (SUMS * WIDTH) if SUMS > 0 else None
    _store_sums(out, column_main, dweight_main, dbias_main, dbranch_main, AFFINE, BIAS, WIDTH, FULL)
    if REST > 0:
        _store_sums(
            out, column_rest, dweight_rest, dbias_rest, dbranch_rest, AFFINE, BIAS, WIDTH, ALL
        )


# Launchers.


def _tile(kernel: str, width: int, device: torch.device) -> tuple[int, dict]:
    """(rows or programs, constants) of the table's configuration."""
    return split_width(width, tuning.lookup("layer_norm", kernel, width, device))


def split_width(width: int, config: dict[str, int]) -> tuple[int, dict[str, int]]:
    """A configuration -> its "rows" or "programs", and the constants of the kernel.

    Those are MAIN and REST, THREADS, WIDTH and what else the configuration holds. Each part has at
    least one column per thread; there are two if that makes fewer columns than one part.
    """
    threads = 32 * config["num_warps"]
    whole = max(triton.next_power_of_2(width), threads)
    half = whole // 2
    small = max(triton.next_power_of_2(width - half), threads)
    if half >= threads and half + small < whole:
        main = half
        rest = small
    else:
        main = whole
        rest = 0
    constants = dict(config, WIDTH=width, MAIN=main, REST=rest, THREADS=threads)
    count = constants.pop("rows") if "rows" in constants else constants.pop("programs")
    return count, constants


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """x (..., D) contiguous, weight and bias (D,) float32 -> y, stats (rows, 2): mean, 1 / std."""
    _, y, stats = _launch_forward(x, None, None, weight, bias, None, eps)
    return y, stats


def add_forward(
    x: Tensor,
    branch: Tensor,
    branch_bias: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: DropoutMask | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """x and branch (..., D) contiguous, parameters (D,) float32 -> sum, y, stats (rows, 2)."""
    return _launch_forward(x, branch, branch_bias, weight, bias, mask, eps)


def _launch_forward(
    x: Tensor,
    branch: Tensor | None,
    branch_bias: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: DropoutMask | None,
    eps: float,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """sum (None without a branch), y, stats (rows, 2)."""
    width = x.shape[-1]
    rows = x.numel() // max(1, width)
    total = None if branch is None else torch.empty_like(x)
    y = torch.empty_like(x)
    stats = torch.empty(rows, 2, dtype=torch.float32, device=x.device)
    if rows:
        slab, constants = _tile("forward", width, x.device)
        layer_norm_forward_kernel[(triton.cdiv(rows, slab),)](
            x,
            branch,
            branch_bias,
            weight,
            bias,
            total,
            y,
            stats,
            rows=rows,
            slab=slab,
            eps=eps,
            BIAS=branch_bias is not None,
            **mask_arguments(mask, rows),
            **constants,
        )
    return total, y, stats


def backward(
    grad: Tensor,
    grad_sum: Tensor | None,
    total: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    mask: DropoutMask | None,
    branch_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of y and (or None) of the sum, the sum (..., D), all contiguous ->

    dx; dbranch, or an empty tensor without dropout (it is dx); sums over rows (0 to 3, D) float32:
    dweight and dbias if there is a weight, dbranch_bias if that is asked for.
    """
    width = total.shape[-1]
    rows = total.numel() // max(1, width)
    sums = 2 * (weight is not None) + branch_bias
    dx = torch.empty_like(total)
    dbranch = total.new_empty(0) if mask is None else torch.empty_like(total)
    if rows == 0:
        return dx, dbranch, torch.zeros(sums, width, dtype=torch.float32, device=total.device)
    most, constants = _tile("backward", width, total.device)
    slab = triton.cdiv(rows, most)
    programs = triton.cdiv(rows, slab)  # as many as have rows
    partials = torch.empty(programs, sums * width, dtype=torch.float32, device=total.device)
    layer_norm_backward_kernel[(programs,)](
        grad,
        grad_sum,
        total,
        stats,
        weight,
        dx,
        None if mask is None else dbranch,
        partials if sums else None,
        rows=rows,
        slab=slab,
        BIAS=branch_bias,
        **mask_arguments(mask, rows),
        **constants,
    )
    if not sums:
        return dx, dbranch, partials.view(0, width)
    return dx, dbranch, column_sum(partials).view(sums, width)
