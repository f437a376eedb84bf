"""diffusion_loss: see `heptapod_fast.ops.diffusion_loss`. One kernel for noising and drawing times,
one forward, one backward, each in tiles of ROWS x BLOCK with a row per (token, repeat).

The noise is made again from its counter, which makes x_t redundant here: with e = eps_hat - eps,

    x_0 - x0_hat = sqrt(1 / abar_t - 1) e        mu - mu_hat = a_t sqrt(1 / abar_t - 1) e

so that nothing of the size of x_t / sqrt(abar_t), 20,000 at the last step, is subtracted, and
neither x_t nor (but at t = 0) x_0 is read. The likelihood of t = 0 is computed in tiles that have
such a row, one tile in 16 or so.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from heptapod_fast.kernels import offline, tuning
from heptapod_fast.kernels.randomness import (
    integer_below,
    noise_block,
    philox_words,
    repeat_rows,
    row_draws,
    row_normals,
    signed,
    sum_repeats,
)

FREE = ["time0", "time1", "noise0", "noise1", "steps"]


@triton.jit(do_not_specialize=FREE)
def _inputs(
    x0_ptr,
    index_ptr,
    slot_ptr,
    table_ptr,
    xt_ptr,
    t_ptr,
    rows,
    steps,
    time0,
    time1,
    noise0,
    noise1,
    CHANNELS: tl.constexpr,
    REPEAT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (channel < CHANNELS)[None, :]
    token, index, slot = row_draws(index_ptr, slot_ptr, row, rows, REPEAT)
    word, _, _, _ = philox_words(
        index, slot, tl.zeros_like(slot), time0.to(tl.uint32), time1.to(tl.uint32)
    )
    t = integer_below(word, steps)
    x0 = tl.load(x0_ptr + token[:, None] * CHANNELS + channel[None, :], mask=inside, other=0.0)
    noise = row_normals(index, slot, noise0.to(tl.uint32), noise1.to(tl.uint32), BLOCK)
    clean = tl.load(table_ptr + t)
    noisy = tl.load(table_ptr + steps + t)
    xt = clean[:, None] * x0 + noisy[:, None] * noise
    tl.store(xt_ptr + row[:, None] * CHANNELS + channel[None, :], xt, mask=inside)
    tl.store(t_ptr + row, t, mask=row < rows)


@triton.jit
def _log_sigmoid(x):
    """log sigmoid(x) and sigmoid(-x)."""
    small = tl.exp(-tl.abs(x))
    return tl.minimum(x, 0.0) - tl.log(1.0 + small), tl.where(x > 0, small, 1.0) / (1.0 + small)


@triton.jit
def _first_step(x0, centred, log_scale):
    """-log P of the discretised likelihood, and its derivative by log_scale.

    The CDF 0.5 (1 + tanh(y)) is sigmoid(2 y), and with A > B at the edges of the level
    P = sigmoid(A) sigmoid(-B) (1 - exp(B - A)), whose logarithm loses nothing in the tails. At the
    first and last level one factor is left. Beyond 30 deviations everything is 0 or 1.
    """
    inverse = tl.exp(-log_scale)
    a = tl.minimum(tl.maximum(inverse * (centred + 0.00392156862745098), -30.0), 30.0)
    b = tl.minimum(tl.maximum(inverse * (centred - 0.00392156862745098), -30.0), 30.0)
    upper = 1.5957691216057308 * (a + 0.044715 * a * a * a)
    lower = 1.5957691216057308 * (b + 0.044715 * b * b * b)
    upper_slope = -1.5957691216057308 * a * (1.0 + 0.134145 * a * a)
    lower_slope = -1.5957691216057308 * b * (1.0 + 0.134145 * b * b)
    log_upper, not_upper = _log_sigmoid(upper)
    log_not_lower, below = _log_sigmoid(-lower)
    fall = tl.exp(lower - upper)
    first = x0 < -0.999
    last = x0 > 0.999
    log_p = (
        tl.where(last, 0.0, log_upper)
        + tl.where(first, 0.0, log_not_lower)
        + tl.where(first | last, 0.0, tl.log(1.0 - fall))
    )
    slope = (
        tl.where(last, 0.0, not_upper * upper_slope)
        - tl.where(first, 0.0, below * lower_slope)
        + tl.where(first | last, 0.0, fall / (1.0 - fall) * (upper_slope - lower_slope))
    )
    floor: tl.constexpr = -27.631021115928547
    return -tl.maximum(log_p, floor), tl.where(log_p > floor, -slope, 0.0)


@triton.jit
def _bound(error, v, x0_ptr, x0_at, inside, t, table_ptr, steps):
    """Bits of the variational bound, elementwise, and their derivative by v."""
    row = table_ptr + t
    log_posterior = tl.load(row + 7 * steps)
    span = (tl.load(row + 6 * steps) - log_posterior)[:, None]
    shift = (tl.load(row + 4 * steps) * tl.load(row + 3 * steps))[:, None]
    rise = 0.5 * (v + 1.0) * span
    distance = (shift * tl.exp(-0.5 * log_posterior)[:, None]) * error
    spread = tl.exp(-rise) * (1.0 + distance * distance)
    value = 0.5 * (rise - 1.0 + spread)
    slope = 0.5 * (1.0 - spread)
    if tl.min(t, axis=0) == 0:
        x0 = tl.load(x0_ptr + x0_at, mask=inside, other=0.0)
        nll, by_scale = _first_step(x0, shift * error, 0.5 * (log_posterior[:, None] + rise))
        value = tl.where((t == 0)[:, None], nll, value)
        slope = tl.where((t == 0)[:, None], 0.5 * by_scale, slope)
    # A NaN must not end in a minimum or maximum, which on GPUs return the other number.
    value = tl.where(v == v, value, v)
    slope = tl.where(v == v, slope, v)
    return value * 1.4426950408889634, slope * (0.5 * 1.4426950408889634) * span


@triton.jit(do_not_specialize=FREE)
def _forward(
    prediction_ptr,
    x0_ptr,
    t_ptr,
    table_ptr,
    index_ptr,
    slot_ptr,
    loss_ptr,
    tokens,
    steps,
    noise0,
    noise1,
    BOUND: tl.constexpr,
    CHANNELS: tl.constexpr,
    REPEAT: tl.constexpr,
    REPEATS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    TOKENS: tl.constexpr = ROWS // REPEATS
    channel = tl.arange(0, BLOCK)
    total = tl.zeros((TOKENS,), tl.float32)
    for first in tl.range(0, REPEAT, REPEATS):
        row, valid = repeat_rows(first, tokens, REPEAT, REPEATS, ROWS)
        inside = valid[:, None] & (channel < CHANNELS)[None, :]
        token, index, slot = row_draws(index_ptr, slot_ptr, row, tokens * REPEAT, REPEAT)
        at = prediction_ptr + row[:, None] * (2 * CHANNELS) + channel[None, :]
        eps = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        noise = row_normals(index, slot, noise0.to(tl.uint32), noise1.to(tl.uint32), BLOCK)
        error = eps - noise
        loss = error * error
        if BOUND:
            v = tl.load(at + CHANNELS, mask=inside, other=0.0).to(tl.float32)
            t = tl.load(t_ptr + row)
            x0_at = token[:, None] * CHANNELS + channel[None, :]
            bits, _ = _bound(error, v, x0_ptr, x0_at, inside, t, table_ptr, steps)
            loss += bits
        total += sum_repeats(loss, inside, TOKENS, REPEATS)
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    tl.store(loss_ptr + token, total * (1.0 / (CHANNELS * REPEAT)), mask=token < tokens)


@triton.jit(do_not_specialize=FREE)
def _backward(
    grad_ptr,
    prediction_ptr,
    x0_ptr,
    t_ptr,
    table_ptr,
    index_ptr,
    slot_ptr,
    out_ptr,
    rows,
    steps,
    noise0,
    noise1,
    BOUND: tl.constexpr,
    CHANNELS: tl.constexpr,
    REPEAT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (channel < CHANNELS)[None, :]
    token, index, slot = row_draws(index_ptr, slot_ptr, row, rows, REPEAT)
    at = row[:, None] * (2 * CHANNELS) + channel[None, :]
    eps = tl.load(prediction_ptr + at, mask=inside, other=0.0).to(tl.float32)
    grad = (tl.load(grad_ptr + token) * (1.0 / (CHANNELS * REPEAT)))[:, None]
    noise = row_normals(index, slot, noise0.to(tl.uint32), noise1.to(tl.uint32), BLOCK)
    error = eps - noise
    tl.store(out_ptr + at, (2.0 * grad * error).to(out_ptr.dtype.element_ty), mask=inside)
    if BOUND:
        v = tl.load(prediction_ptr + at + CHANNELS, mask=inside, other=0.0).to(tl.float32)
        t = tl.load(t_ptr + row, mask=row < rows, other=0)
        x0_at = token[:, None] * CHANNELS + channel[None, :]
        _, slope = _bound(error, v, x0_ptr, x0_at, inside, t, table_ptr, steps)
        by_v = grad * slope
    else:
        by_v = tl.zeros((ROWS, BLOCK), tl.float32)
    tl.store(out_ptr + at + CHANNELS, by_v.to(out_ptr.dtype.element_ty), mask=inside)


def _tile(kernel: str, channels: int, device: torch.device) -> dict[str, int]:
    found = tuning.lookup("diffusion_loss", kernel, channels, device)
    return dict(found, BLOCK=noise_block(channels))


def inputs(
    x0: Tensor, index: Tensor, slot: Tensor, tables: Tensor, repeat: int, key: list[int]
) -> tuple[Tensor, Tensor]:
    """x0 (M, C) float32, index and slot (M,), tables (8, T), all contiguous; key: two words for the
    times, two for the noise -> x_t (M * repeat, C) float32, t (M * repeat,) int64."""
    channels, rows = x0.shape[1], x0.shape[0] * repeat
    xt = x0.new_empty(rows, channels)
    t = torch.empty(rows, dtype=torch.int64, device=x0.device)
    if rows:
        tile = _tile("inputs", channels, x0.device)
        _inputs[(triton.cdiv(rows, tile["ROWS"]),)](
            x0,
            index,
            slot,
            tables,
            xt,
            t,
            rows,
            tables.shape[1],
            *signed(key),
            CHANNELS=channels,
            REPEAT=repeat,
            **tile,
        )
    return xt, t


def forward(
    prediction: Tensor,
    x0: Tensor,
    t: Tensor,
    tables: Tensor,
    index: Tensor,
    slot: Tensor,
    repeat: int,
    key: list[int],
    bound: bool,
) -> Tensor:
    """prediction (M * repeat, 2C), the rest as `inputs` takes and gives it -> loss (M,) float32."""
    tokens, channels = x0.shape
    loss = x0.new_empty(tokens)
    if tokens:
        tile = _tile("forward", channels, x0.device)
        repeats = min(triton.next_power_of_2(repeat), tile["ROWS"])
        _forward[(triton.cdiv(tokens, tile["ROWS"] // repeats),)](
            prediction,
            x0,
            t,
            tables,
            index,
            slot,
            loss,
            tokens,
            tables.shape[1],
            *signed(key),
            BOUND=bound,
            CHANNELS=channels,
            REPEAT=repeat,
            REPEATS=repeats,
            **tile,
        )
    return loss


def backward(
    grad: Tensor,
    prediction: Tensor,
    x0: Tensor,
    t: Tensor,
    tables: Tensor,
    index: Tensor,
    slot: Tensor,
    repeat: int,
    key: list[int],
    bound: bool,
) -> Tensor:
    """grad (M,) float32, the rest as `forward` -> the gradient of the prediction, in its dtype."""
    out, channels, rows = torch.empty_like(prediction), x0.shape[1], prediction.shape[0]
    if rows:
        tile = _tile("backward", channels, x0.device)
        _backward[(triton.cdiv(rows, tile["ROWS"]),)](
            grad,
            prediction,
            x0,
            t,
            tables,
            index,
            slot,
            out,
            rows,
            tables.shape[1],
            *signed(key),
            BOUND=bound,
            CHANNELS=channels,
            REPEAT=repeat,
            **tile,
        )
    return out


def compile_cases(arch: str):
    """See offline.py."""
    pointers = dict(
        x0_ptr="*fp32",
        t_ptr="*i64",
        table_ptr="*fp32",
        index_ptr="*i64",
        slot_ptr="*i64",
        steps="i32",
        noise0="i32",
        noise1="i32",
    )
    for channels in (16, 48, 192, 768, 4096):
        tiles = {
            kernel: dict(
                tuning.config("diffusion_loss", kernel, channels, arch), BLOCK=noise_block(channels)
            )
            for kernel in ("inputs", "forward", "backward")
        }
        warps = {kernel: dict(num_warps=tile.pop("num_warps")) for kernel, tile in tiles.items()}
        shape = dict(CHANNELS=channels, REPEAT=4)
        yield offline.Case(
            f"diffusion_loss inputs, C = {channels}",
            _inputs,
            dict(pointers, xt_ptr="*fp32", rows="i32", time0="i32", time1="i32"),
            dict(tiles["inputs"], **shape),
            warps["inputs"],
            unaligned=FREE,
        )
        for dtype, bound in (("fp32", True), ("bf16", True), ("fp32", False)):
            what = f"C = {channels}, {dtype}{'' if bound else ', mse'}"
            types = dict(pointers, prediction_ptr=f"*{dtype}")
            yield offline.Case(
                f"diffusion_loss forward, {what}",
                _forward,
                dict(types, loss_ptr="*fp32", tokens="i32"),
                dict(
                    tiles["forward"], **shape, BOUND=bound, REPEATS=min(4, tiles["forward"]["ROWS"])
                ),
                warps["forward"],
                unaligned=FREE,
            )
            yield offline.Case(
                f"diffusion_loss backward, {what}",
                _backward,
                dict(types, grad_ptr="*fp32", out_ptr=f"*{dtype}", rows="i32"),
                dict(tiles["backward"], **shape, BOUND=bound),
                warps["backward"],
                unaligned=FREE,
            )
