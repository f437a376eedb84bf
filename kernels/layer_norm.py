"""layer_norm and add_layer_norm: see `heptapod_fast.ops.layer_norm`. Memory-bound, one pass each.

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

from heptapod_fast.kernels import offline, tuning
from heptapod_fast.kernels.columns import column_sum
from heptapod_fast.kernels.randomness import keep, mask_arguments, row_keys
from heptapod_fast.ops.dropout_mask import DropoutMask


@triton.jit
def _load(ptr, column, WIDTH: tl.constexpr, FULL: tl.constexpr):
    """float32 values of some columns; FULL: all of them are below WIDTH."""
    if FULL:
        return tl.load(ptr + column).to(tl.float32)
    return tl.load(ptr + column, mask=column < WIDTH, other=0.0).to(tl.float32)


@triton.jit
def _store(ptr, column, value, WIDTH: tl.constexpr, FULL: tl.constexpr):
    if FULL:
        tl.store(ptr + column, value.to(ptr.dtype.element_ty))
    else:
        tl.store(ptr + column, value.to(ptr.dtype.element_ty), mask=column < WIDTH)


@triton.jit
def _fold(x, THREADS: tl.constexpr, VECTOR: tl.constexpr):
    """(columns,) -> (THREADS,): each thread adds up what it holds, so that parts can be added."""
    SIZE: tl.constexpr = min(VECTOR, x.shape[0] // THREADS)
    x = tl.reshape(x, (x.shape[0] // (THREADS * SIZE), THREADS, SIZE))
    return tl.sum(tl.sum(x, axis=2), axis=0)


@triton.jit
def _residual(
    x_ptr,
    branch_ptr,
    sum_ptr,
    shift,
    column,
    key0,
    key1,
    counter,
    scale,
    BIAS: tl.constexpr,
    THRESHOLD: tl.constexpr,
    WIDTH: tl.constexpr,
    FULL: tl.constexpr,
):
    """Some columns of the sum, stored and as stored; of x where there is no branch."""
    x = _load(x_ptr, column, WIDTH, FULL)
    if branch_ptr is not None:
        branch = _load(branch_ptr, column, WIDTH, FULL)
        if BIAS:
            branch += shift
        if THRESHOLD > 0:
            branch = tl.where(
                keep(key0, key1, counter, column, WIDTH, THRESHOLD), branch * scale, 0.0
            )
        rounded = (x + branch).to(sum_ptr.dtype.element_ty)
        _store(sum_ptr, column, rounded, WIDTH, FULL)
        x = rounded.to(tl.float32)
    return x


@triton.jit
def _centre(x, mean, column, WIDTH: tl.constexpr, FULL: tl.constexpr):
    x = x - mean
    return x if FULL else tl.where(column < WIDTH, x, 0.0)


@triton.jit(do_not_specialize=["rows", "slab", "counters"])
def _forward(
    x_ptr,
    branch_ptr,
    branch_bias_ptr,
    weight_ptr,
    bias_ptr,
    sum_ptr,
    out_ptr,
    stats_ptr,
    key_ptr,
    counter_ptr,
    rows,
    slab,
    rows_per_key,
    counters,
    scale,
    eps,
    BIAS: tl.constexpr,
    THRESHOLD: tl.constexpr,
    WIDTH: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    THREADS: tl.constexpr,
    STAGES: tl.constexpr,
):
    VECTOR: tl.constexpr = 128 // x_ptr.dtype.element_ty.primitive_bitwidth
    ALL: tl.constexpr = WIDTH == MAIN + REST
    FULL: tl.constexpr = ALL or REST > 0
    AFFINE: tl.constexpr = weight_ptr is not None
    columnM = tl.arange(0, MAIN)
    columnR = MAIN + tl.arange(0, max(REST, 1))
    shiftM = _load(branch_bias_ptr, columnM, WIDTH, FULL) if BIAS else 0.0
    shiftR = _load(branch_bias_ptr, columnR, WIDTH, ALL) if BIAS and REST > 0 else 0.0
    if AFFINE:
        weightM = _load(weight_ptr, columnM, WIDTH, FULL)
        biasM = _load(bias_ptr, columnM, WIDTH, FULL)
        if REST > 0:
            weightR = _load(weight_ptr, columnR, WIDTH, ALL)
            biasR = _load(bias_ptr, columnR, WIDTH, ALL)
    first = tl.program_id(0) * slab
    for step in tl.range(0, tl.minimum(slab, rows - first), num_stages=STAGES):
        row = first + step
        row64 = row.to(tl.int64)
        at = row64 * WIDTH
        key0, key1, counter = 0, 0, 0
        if THRESHOLD > 0:
            key0, key1, counter = row_keys(key_ptr, counter_ptr, row, rows_per_key, counters)
        branch_at = branch_ptr + at if branch_ptr is not None else None
        sum_at = sum_ptr + at if branch_ptr is not None else None
        xM = _residual(
            x_ptr + at,
            branch_at,
            sum_at,
            shiftM,
            columnM,
            key0,
            key1,
            counter,
            scale,
            BIAS,
            THRESHOLD,
            WIDTH,
            FULL,
        )
        total = _fold(xM, THREADS, VECTOR)
        if REST > 0:
            xR = _residual(
                x_ptr + at,
                branch_at,
                sum_at,
                shiftR,
                columnR,
                key0,
                key1,
                counter,
                scale,
                BIAS,
                THRESHOLD,
                WIDTH,
                ALL,
            )
            total += _fold(xR, THREADS, VECTOR)
        mean = tl.sum(total) * (1.0 / WIDTH)
        xM = _centre(xM, mean, columnM, WIDTH, FULL)
        square = _fold(xM * xM, THREADS, VECTOR)
        if REST > 0:
            xR = _centre(xR, mean, columnR, WIDTH, ALL)
            square += _fold(xR * xR, THREADS, VECTOR)
        rstd = tl.rsqrt(tl.sum(square) * (1.0 / WIDTH) + eps)
        tl.store(stats_ptr + 2 * row64, mean)
        tl.store(stats_ptr + 2 * row64 + 1, rstd)
        yM = xM * rstd
        if AFFINE:
            yM = yM * weightM + biasM
        _store(out_ptr + at, columnM, yM, WIDTH, FULL)
        if REST > 0:
            yR = xR * rstd
            if AFFINE:
                yR = yR * weightR + biasR
            _store(out_ptr + at, columnR, yR, WIDTH, ALL)


@triton.jit
def _read(
    grad_ptr,
    sum_ptr,
    weight,
    mean,
    rstd,
    column,
    AFFINE: tl.constexpr,
    WIDTH: tl.constexpr,
    FULL: tl.constexpr,
):
    """dy, weight * dy and the normalised row, some columns of them; dy is 0 beyond the width."""
    grad = _load(grad_ptr, column, WIDTH, FULL)
    normal = (_load(sum_ptr, column, WIDTH, FULL) - mean) * rstd
    return grad, grad * weight if AFFINE else grad, normal


@triton.jit
def _finish(
    weighted,
    normal,
    rstd,
    mean_g,
    mean_gn,
    grad_sum_ptr,
    dx_ptr,
    dbranch_ptr,
    column,
    key0,
    key1,
    counter,
    scale,
    THRESHOLD: tl.constexpr,
    WIDTH: tl.constexpr,
    FULL: tl.constexpr,
):
    """Stores some columns of dx, and of dbranch if there is dropout; returns dbranch."""
    dx = weighted * rstd - mean_g - normal * mean_gn
    if grad_sum_ptr is not None:
        dx += _load(grad_sum_ptr, column, WIDTH, FULL)
    _store(dx_ptr, column, dx, WIDTH, FULL)
    if THRESHOLD > 0:
        dx = tl.where(keep(key0, key1, counter, column, WIDTH, THRESHOLD), dx * scale, 0.0)
        _store(dbranch_ptr, column, dx, WIDTH, FULL)
    return dx


@triton.jit
def _store_sums(
    out_ptr,
    column,
    dweight,
    dbias,
    dbranch,
    AFFINE: tl.constexpr,
    BIAS: tl.constexpr,
    WIDTH: tl.constexpr,
    FULL: tl.constexpr,
):
    """One program's partial sums, those that exist, one after the other."""
    if AFFINE:
        _store(out_ptr, column, dweight, WIDTH, FULL)
        _store(out_ptr + WIDTH, column, dbias, WIDTH, FULL)
    if BIAS:
        _store(out_ptr + 2 * AFFINE * WIDTH, column, dbranch, WIDTH, FULL)


@triton.jit(do_not_specialize=["rows", "slab", "counters"])
def _backward(
    grad_ptr,
    grad_sum_ptr,
    sum_ptr,
    stats_ptr,
    weight_ptr,
    dx_ptr,
    dbranch_ptr,
    partial_ptr,
    key_ptr,
    counter_ptr,
    rows,
    slab,
    rows_per_key,
    counters,
    scale,
    BIAS: tl.constexpr,
    THRESHOLD: tl.constexpr,
    WIDTH: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    THREADS: tl.constexpr,
    STAGES: tl.constexpr,
):
    VECTOR: tl.constexpr = 128 // sum_ptr.dtype.element_ty.primitive_bitwidth
    ALL: tl.constexpr = WIDTH == MAIN + REST
    FULL: tl.constexpr = ALL or REST > 0
    AFFINE: tl.constexpr = weight_ptr is not None
    columnM = tl.arange(0, MAIN)
    columnR = MAIN + tl.arange(0, max(REST, 1))
    weightM = _load(weight_ptr, columnM, WIDTH, FULL) if AFFINE else 1.0
    weightR = _load(weight_ptr, columnR, WIDTH, ALL) if AFFINE and REST > 0 else 1.0
    dweightM = tl.zeros((MAIN,), tl.float32)
    dbiasM = tl.zeros((MAIN,), tl.float32)
    dbranchM = tl.zeros((MAIN,), tl.float32)
    dweightR = tl.zeros((max(REST, 1),), tl.float32)
    dbiasR = tl.zeros((max(REST, 1),), tl.float32)
    dbranchR = tl.zeros((max(REST, 1),), tl.float32)
    program = tl.program_id(0)
    first = program * slab
    for step in tl.range(0, tl.minimum(slab, rows - first), num_stages=STAGES):
        row = first + step
        row64 = row.to(tl.int64)
        at = row64 * WIDTH
        key0, key1, counter = 0, 0, 0
        if THRESHOLD > 0:
            key0, key1, counter = row_keys(key_ptr, counter_ptr, row, rows_per_key, counters)
        grad_sum_at = grad_sum_ptr + at if grad_sum_ptr is not None else None
        dbranch_at = dbranch_ptr + at if THRESHOLD > 0 else None
        mean = tl.load(stats_ptr + 2 * row64)
        rstd = tl.load(stats_ptr + 2 * row64 + 1)
        dyM, gM, nM = _read(
            grad_ptr + at, sum_ptr + at, weightM, mean, rstd, columnM, AFFINE, WIDTH, FULL
        )
        total_g = _fold(gM, THREADS, VECTOR)
        total_gn = _fold(gM * nM, THREADS, VECTOR)
        dweightM += dyM * nM
        dbiasM += dyM
        if REST > 0:
            dyR, gR, nR = _read(
                grad_ptr + at, sum_ptr + at, weightR, mean, rstd, columnR, AFFINE, WIDTH, ALL
            )
            total_g += _fold(gR, THREADS, VECTOR)
            total_gn += _fold(gR * nR, THREADS, VECTOR)
            dweightR += dyR * nR
            dbiasR += dyR
        # Joined, the two sums cross the warps together.
        mean_g, mean_gn = tl.split(tl.sum(tl.join(total_g, total_gn), axis=0))
        mean_g *= rstd * (1.0 / WIDTH)
        mean_gn *= rstd * (1.0 / WIDTH)
        dbranchM += _finish(
            gM,
            nM,
            rstd,
            mean_g,
            mean_gn,
            grad_sum_at,
            dx_ptr + at,
            dbranch_at,
            columnM,
            key0,
            key1,
            counter,
            scale,
            THRESHOLD,
            WIDTH,
            FULL,
        )
        if REST > 0:
            dbranchR += _finish(
                gR,
                nR,
                rstd,
                mean_g,
                mean_gn,
                grad_sum_at,
                dx_ptr + at,
                dbranch_at,
                columnR,
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
    _store_sums(out, columnM, dweightM, dbiasM, dbranchM, AFFINE, BIAS, WIDTH, FULL)
    if REST > 0:
        _store_sums(out, columnR, dweightR, dbiasR, dbranchR, AFFINE, BIAS, WIDTH, ALL)


def _tile(kernel: str, width: int, device: torch.device) -> tuple[int, dict]:
    """(rows or programs, constants) of the table's configuration."""
    return _constants(width, dict(tuning.lookup("layer_norm", kernel, width, device)))


def _constants(width: int, config: dict) -> tuple[int, dict]:
    threads = 32 * config["num_warps"]
    main, rest = max(triton.next_power_of_2(width), threads), 0
    # Two parts, if they come to fewer columns; each has at least one column per thread.
    small = max(triton.next_power_of_2(width - main // 2), threads)
    if main // 2 >= threads and main // 2 + small < main:
        main, rest = main // 2, small
    count = config.pop("rows", 0) or config.pop("programs")
    return count, dict(config, WIDTH=width, MAIN=main, REST=rest, THREADS=threads)


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


def _launch_forward(x, branch, branch_bias, weight, bias, mask, eps):
    width, y = x.shape[-1], torch.empty_like(x)
    total = None if branch is None else torch.empty_like(x)
    rows = x.numel() // max(1, width)
    stats = torch.empty(rows, 2, dtype=torch.float32, device=x.device)
    if rows:
        slab, constants = _tile("forward", width, x.device)
        _forward[(triton.cdiv(rows, slab),)](
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

    dx; dbranch, or an empty tensor without dropout (it is dx); sums over rows (S, D) float32:
    dweight and dbias if there is a weight, dbranch_bias if that is asked for.
    """
    width, dx = total.shape[-1], torch.empty_like(total)
    rows, sums = total.numel() // max(1, width), 2 * (weight is not None) + branch_bias
    dbranch = total.new_empty(0) if mask is None else torch.empty_like(total)
    if rows == 0:
        return dx, dbranch, torch.zeros(sums, width, dtype=torch.float32, device=total.device)
    programs, constants = _tile("backward", width, total.device)
    slab = triton.cdiv(rows, programs)
    programs = triton.cdiv(rows, slab)
    partials = torch.empty(programs, sums * width, dtype=torch.float32, device=total.device)
    _backward[(programs,)](
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
    return dx, dbranch, column_sum(partials).view(sums, width) if sums else partials.view(0, width)


_POINTERS = dict(
    x_ptr="*bf16",
    branch_ptr="*bf16",
    branch_bias_ptr="*fp32",
    weight_ptr="*fp32",
    bias_ptr="*fp32",
    sum_ptr="*bf16",
    out_ptr="*bf16",
    stats_ptr="*fp32",
    grad_ptr="*bf16",
    grad_sum_ptr="*bf16",
    dx_ptr="*bf16",
    dbranch_ptr="*bf16",
    partial_ptr="*fp32",
    key_ptr="*i64",
    counter_ptr="*i64",
)
_VALUES = dict(rows="i32", slab="i32", rows_per_key="i32", counters="i32", scale="fp32", eps="fp32")


def _case(
    name: str, kernel, width: int, config: dict, absent: tuple[str, ...], bias: bool, drop: float
) -> offline.Case:
    _, constants = _constants(width, dict(config))
    options = dict(num_warps=constants.pop("num_warps"))
    absent += () if drop else ("key_ptr", "counter_ptr")
    constants |= dict(BIAS=bias, THRESHOLD=round(drop * 2**32)) | dict.fromkeys(
        p for p in absent if p in kernel.arg_names
    )
    types = {
        n: t
        for n, t in (_POINTERS | _VALUES).items()
        if n in kernel.arg_names and n not in constants
    }
    return offline.Case(
        f"{name} {width}",
        kernel,
        types,
        constants,
        options,
        unaligned=("slab", "rows_per_key", "counters"),
    )


def compile_cases(arch: str):
    """See offline.py. The model's widths, the widest one, and one with a masked part."""
    none = ("branch_ptr", "branch_bias_ptr", "sum_ptr")
    for width in (768, 1024, 1280, 1536, 3000, 4096):
        there, back = (
            tuning.config("layer_norm", kernel, width, arch) for kernel in ("forward", "backward")
        )
        yield _case("add_layer_norm+dropout forward", _forward, width, there, (), True, 0.1)
        yield _case("add_layer_norm+dropout backward", _backward, width, back, (), True, 0.1)
        if width <= 1280:
            yield _case(
                "add_layer_norm backward", _backward, width, back, ("dbranch_ptr",), True, 0.0
            )
        if width == 1024:
            yield _case("layer_norm forward", _forward, width, there, none, False, 0.0)
            yield _case(
                "layer_norm backward",
                _backward,
                width,
                back,
                ("grad_sum_ptr", "dbranch_ptr"),
                False,
                0.0,
            )
            yield _case(
                "layer_norm without parameters backward",
                _backward,
                width,
                back,
                ("grad_sum_ptr", "dbranch_ptr", "weight_ptr", "partial_ptr"),
                False,
                0.0,
            )
