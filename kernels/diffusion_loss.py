"""diffusion_loss: see `heptapod_fast.ops.diffusion_loss`; docs/kernels/README.md builds it up from
a plain version. One kernel for noising and drawing times, one forward, one backward, each in tiles
of ROWS x BLOCK with a row per (token, repeat).

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

from heptapod_fast.kernels import tuning
from heptapod_fast.kernels.memory import load_float32, store_rounded
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
from heptapod_fast.ops.diffusion_schedule import TABLES

# Keys and T may change without another compilation.
FREE = ["time0", "time1", "noise0", "noise1", "steps"]

# Rows of the tables.
RECIP_MINUS_ONE = tl.constexpr(TABLES.index("sqrt_recip_minus_one"))
MEAN_X0 = tl.constexpr(TABLES.index("mean_x0"))
LOG_BETA = tl.constexpr(TABLES.index("log_beta"))
LOG_POSTERIOR = tl.constexpr(TABLES.index("log_posterior"))

LOG2E = tl.constexpr(1.4426950408889634)  # nats -> bits
HALF_LEVEL = tl.constexpr(0.00392156862745098)  # 1 / 255: 256 levels on [-1, 1]
# The normal CDF is 0.5 (1 + tanh(y)) = sigmoid(2 y) with 2 y = CDF_SCALE (x + CDF_CUBE x^3).
CDF_SCALE = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)
CDF_CUBE = tl.constexpr(0.044715)
CDF_SLOPE = tl.constexpr(0.134145)  # 3 CDF_CUBE
LOG_FLOOR = tl.constexpr(-27.631021115928547)  # log 1e-12, the least likelihood


@triton.jit(do_not_specialize=FREE)
def diffusion_inputs_kernel(
    # read
    x0_ptr,  # (M, C) float32
    index_ptr,  # (M,) int64
    slot_ptr,  # (M,) int64
    table_ptr,  # (8, T) float32
    # written
    xt_ptr,  # (R, C) float32
    t_ptr,  # (R,) int64
    # sizes
    rows,  # R = M * REPEAT
    steps,  # T
    # Philox keys, int32 of the words' bits
    time0,
    time1,
    noise0,
    noise1,
    # constants
    CHANNELS: tl.constexpr,  # C
    REPEAT: tl.constexpr,  # rows per token
    ROWS: tl.constexpr,  # rows of a tile
    BLOCK: tl.constexpr,  # power of 2, at least C and 4
):
    """Some rows: t drawn, noise made, x_t and t written."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    channel = tl.arange(0, BLOCK)  # [BLOCK]
    inside = (row < rows)[:, None] & (channel < CHANNELS)[None, :]  # [ROWS, BLOCK]

    # A time for each row, from one word of its own stream.
    token, index, slot = row_draws(index_ptr, slot_ptr, row, rows, REPEAT)
    word, _, _, _ = philox_words(
        index, slot, tl.zeros_like(slot), time0.to(tl.uint32), time1.to(tl.uint32)
    )
    t = integer_below(word, steps)

    # x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps: the first two rows of the tables.
    x0_at = token[:, None] * CHANNELS + channel[None, :]
    x0 = tl.load(x0_ptr + x0_at, mask=inside, other=0.0)
    noise = row_normals(index, slot, noise0.to(tl.uint32), noise1.to(tl.uint32), BLOCK)
    clean = tl.load(table_ptr + t)
    noisy = tl.load(table_ptr + steps + t)
    xt = clean[:, None] * x0 + noisy[:, None] * noise
    tl.store(xt_ptr + row[:, None] * CHANNELS + channel[None, :], xt, mask=inside)
    tl.store(t_ptr + row, t, mask=row < rows)


@triton.jit
def _log_sigmoid(x):
    """log sigmoid(x) and sigmoid(-x), from an exponential that cannot overflow."""
    small = tl.exp(-tl.abs(x))
    log_sigmoid = tl.minimum(x, 0.0) - tl.log(1.0 + small)
    return log_sigmoid, tl.where(x > 0, small, 1.0) / (1.0 + small)


@triton.jit
def _first_step(
    # tiles of [ROWS, BLOCK]
    x0,
    centred,  # x_0 - mu_hat
    log_scale,  # log s
):
    """-log P of the discretised likelihood, and its derivative by log_scale.

    The CDF is a sigmoid, and with A > B at the edges of the level
    P = sigmoid(A) sigmoid(-B) (1 - exp(B - A)), whose logarithm loses nothing in the tails. At the
    first and last level one factor is left. Beyond 30 deviations everything is 0 or 1.
    """
    # The edges of the level in deviations from the mean, and the CDF's argument there.
    inverse = tl.exp(-log_scale)
    a = tl.minimum(tl.maximum(inverse * (centred + HALF_LEVEL), -30.0), 30.0)
    b = tl.minimum(tl.maximum(inverse * (centred - HALF_LEVEL), -30.0), 30.0)
    upper = CDF_SCALE * (a + CDF_CUBE * a * a * a)
    lower = CDF_SCALE * (b + CDF_CUBE * b * b * b)
    # Derivatives by log_scale: a and b shrink as the scale grows.
    upper_slope = -CDF_SCALE * a * (1.0 + CDF_SLOPE * a * a)
    lower_slope = -CDF_SCALE * b * (1.0 + CDF_SLOPE * b * b)

    # The three factors of P, those that the level has.
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
    # Below the floor the likelihood is constant, as the reference's clamp makes it.
    return -tl.maximum(log_p, LOG_FLOOR), tl.where(log_p > LOG_FLOOR, -slope, 0.0)


@triton.jit
def _bound(
    error,  # [ROWS, BLOCK] e = eps_hat - eps
    v,  # [ROWS, BLOCK] the variance channels
    x0_ptr,  # (M, C) float32
    x0_at,  # [ROWS, BLOCK] offsets
    inside,  # [ROWS, BLOCK]
    t,  # [ROWS]
    table_ptr,  # (8, T) float32
    steps,  # T
):
    """[ROWS, BLOCK] bits of the variational bound, and their derivative by v."""
    # Tables at each row's timestep, [ROWS, 1].
    row = table_ptr + t
    log_posterior = tl.load(row + LOG_POSTERIOR * steps)
    span = (tl.load(row + LOG_BETA * steps) - log_posterior)[:, None]
    shift = (tl.load(row + MEAN_X0 * steps) * tl.load(row + RECIP_MINUS_ONE * steps))[:, None]

    # t > 0: KL of two normal distributions. rise = log s^2 - log beta~_t; distance = (mu - mu_hat)
    # in deviations of the posterior.
    rise = 0.5 * (v + 1.0) * span
    distance = (shift * tl.exp(-0.5 * log_posterior)[:, None]) * error
    spread = tl.exp(-rise) * (1.0 + distance * distance)
    value = 0.5 * (rise - 1.0 + spread)
    slope = 0.5 * (1.0 - spread)

    # t = 0: the likelihood of the level, in tiles that have such a row.
    if tl.min(t, axis=0) == 0:
        x0 = tl.load(x0_ptr + x0_at, mask=inside, other=0.0)
        nll, by_scale = _first_step(x0, shift * error, 0.5 * (log_posterior[:, None] + rise))
        value = tl.where((t == 0)[:, None], nll, value)
        slope = tl.where((t == 0)[:, None], 0.5 * by_scale, slope)

    # A NaN must not end in a minimum or maximum, which on GPUs return the other number.
    value = tl.where(v == v, value, v)
    slope = tl.where(v == v, slope, v)
    # The value is in nats, the slope a derivative by rise; rise' = span / 2.
    return value * LOG2E, slope * (0.5 * LOG2E) * span


@triton.jit(do_not_specialize=FREE)
def diffusion_loss_forward_kernel(
    # read
    prediction_ptr,  # (R, 2C): eps_hat, v
    x0_ptr,  # (M, C) float32
    t_ptr,  # (R,) int64
    table_ptr,  # (8, T) float32
    index_ptr,  # (M,) int64
    slot_ptr,  # (M,) int64
    # written
    loss_ptr,  # (M,) float32
    # sizes
    tokens,  # M
    steps,  # T
    # Philox key, int32 of the words' bits
    noise0,
    noise1,
    # constants
    BOUND: tl.constexpr,  # whether the bound is added to the error
    CHANNELS: tl.constexpr,  # C
    REPEAT: tl.constexpr,  # rows per token
    REPEATS: tl.constexpr,  # rows per token in a tile
    ROWS: tl.constexpr,  # rows of a tile
    BLOCK: tl.constexpr,  # power of 2, at least C and 4
):
    """Some tokens: the mean of their repeats' squared errors, and with BOUND of their bounds."""
    # A program takes whole tokens, so that the mean over repeats needs no second pass.
    TOKENS: tl.constexpr = ROWS // REPEATS
    channel = tl.arange(0, BLOCK)  # [BLOCK]
    total = tl.zeros((TOKENS,), tl.float32)
    for first in tl.range(0, REPEAT, REPEATS):
        row, valid = repeat_rows(first, tokens, REPEAT, REPEATS, ROWS)  # [ROWS]
        inside = valid[:, None] & (channel < CHANNELS)[None, :]  # [ROWS, BLOCK]
        token, index, slot = row_draws(index_ptr, slot_ptr, row, tokens * REPEAT, REPEAT)

        # The squared error, against the noise made again.
        at = prediction_ptr + row[:, None] * (2 * CHANNELS) + channel[None, :]
        eps = load_float32(at, inside)
        noise = row_normals(index, slot, noise0.to(tl.uint32), noise1.to(tl.uint32), BLOCK)
        error = eps - noise
        loss = error * error

        if BOUND:
            v = load_float32(at + CHANNELS, inside)
            t = tl.load(t_ptr + row)
            x0_at = token[:, None] * CHANNELS + channel[None, :]
            bits, _ = _bound(error, v, x0_ptr, x0_at, inside, t, table_ptr, steps)
            loss += bits
        total += sum_repeats(loss, inside, TOKENS, REPEATS)
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)  # [TOKENS]
    tl.store(loss_ptr + token, total * (1.0 / (CHANNELS * REPEAT)), mask=token < tokens)


@triton.jit(do_not_specialize=FREE)
def diffusion_loss_backward_kernel(
    # read
    grad_ptr,  # (M,) float32
    prediction_ptr,  # (R, 2C): eps_hat, v
    x0_ptr,  # (M, C) float32
    t_ptr,  # (R,) int64
    table_ptr,  # (8, T) float32
    index_ptr,  # (M,) int64
    slot_ptr,  # (M,) int64
    # written
    out_ptr,  # (R, 2C), the gradient of the prediction
    # sizes
    rows,  # R = M * REPEAT
    steps,  # T
    # Philox key, int32 of the words' bits
    noise0,
    noise1,
    # constants
    BOUND: tl.constexpr,  # whether the bound is added to the error
    CHANNELS: tl.constexpr,  # C
    REPEAT: tl.constexpr,  # rows per token
    ROWS: tl.constexpr,  # rows of a tile
    BLOCK: tl.constexpr,  # power of 2, at least C and 4
):
    """Some rows: the gradient of both halves of the prediction."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    channel = tl.arange(0, BLOCK)  # [BLOCK]
    inside = (row < rows)[:, None] & (channel < CHANNELS)[None, :]  # [ROWS, BLOCK]
    token, index, slot = row_draws(index_ptr, slot_ptr, row, rows, REPEAT)

    # eps_hat: of the squared error alone, because the bound sees it detached.
    at = row[:, None] * (2 * CHANNELS) + channel[None, :]
    eps = load_float32(prediction_ptr + at, inside)
    grad = (tl.load(grad_ptr + token) * (1.0 / (CHANNELS * REPEAT)))[:, None]  # [ROWS, 1]
    noise = row_normals(index, slot, noise0.to(tl.uint32), noise1.to(tl.uint32), BLOCK)
    error = eps - noise
    store_rounded(out_ptr + at, 2.0 * grad * error, inside)

    # v: of the bound.
    if BOUND:
        v = load_float32(prediction_ptr + at + CHANNELS, inside)
        t = tl.load(t_ptr + row, mask=row < rows, other=0)
        x0_at = token[:, None] * CHANNELS + channel[None, :]
        _, slope = _bound(error, v, x0_ptr, x0_at, inside, t, table_ptr, steps)
        by_v = grad * slope
    else:
        by_v = tl.zeros((ROWS, BLOCK), tl.float32)
    store_rounded(out_ptr + at + CHANNELS, by_v, inside)


def _tile(kernel: str, channels: int, device: torch.device) -> dict[str, int]:
    """The table's configuration, and the tile's columns."""
    found = tuning.lookup("diffusion_loss", kernel, channels, device)
    return dict(found, BLOCK=noise_block(channels))


def inputs(
    x0: Tensor, index: Tensor, slot: Tensor, tables: Tensor, repeat: int, key: list[int]
) -> tuple[Tensor, Tensor]:
    """x0 (M, C) float32, index and slot (M,), tables (8, T), all contiguous; key: two words for the
    times, two for the noise -> x_t (M * repeat, C) float32, t (M * repeat,) int64."""
    tokens, channels = x0.shape
    rows = tokens * repeat
    xt = x0.new_empty(rows, channels)
    t = torch.empty(rows, dtype=torch.int64, device=x0.device)
    if rows:
        tile = _tile("inputs", channels, x0.device)
        diffusion_inputs_kernel[(triton.cdiv(rows, tile["ROWS"]),)](
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
        diffusion_loss_forward_kernel[(triton.cdiv(tokens, tile["ROWS"] // repeats),)](
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
    out = torch.empty_like(prediction)
    rows = prediction.shape[0]
    channels = x0.shape[1]
    if rows:
        tile = _tile("backward", channels, x0.device)
        diffusion_loss_backward_kernel[(triton.cdiv(rows, tile["ROWS"]),)](
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
