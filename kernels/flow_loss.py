"""flow_loss: see `heptapod_fast.ops.flow_loss`; docs/kernels/README.md builds it up from a plain
version. One kernel for noising and drawing times, one forward, one backward, in tiles of ROWS x
BLOCK with a row per (token, repeat). The noise is made again from its counter.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from heptapod_fast.kernels import tuning
from heptapod_fast.kernels.memory import load_float32, store_rounded
from heptapod_fast.kernels.randomness import (
    noise_block,
    philox_words,
    repeat_rows,
    row_draws,
    row_normals,
    signed,
    sum_repeats,
    uniform,
)

# May change without another compilation.
KEYS = ["time0", "time1", "noise0", "noise1"]


@triton.jit(do_not_specialize=KEYS)
def flow_inputs_kernel(
    # read
    x0_ptr,  # (M, C) float32
    index_ptr,  # (M,) int64
    slot_ptr,  # (M,) int64
    # written
    xt_ptr,  # (R, C) float32
    time_ptr,  # (R,) float32
    # sizes
    rows,  # R = M * REPEAT
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
    """Some rows: time drawn, noise made, x_t and time written."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    channel = tl.arange(0, BLOCK)  # [BLOCK]
    inside = (row < rows)[:, None] & (channel < CHANNELS)[None, :]  # [ROWS, BLOCK]
    token, index, slot = row_draws(index_ptr, slot_ptr, row, rows, REPEAT)
    x0_at = token[:, None] * CHANNELS + channel[None, :]
    x0 = tl.load(x0_ptr + x0_at, mask=inside, other=0.0)

    # A time for each row, from one word of its own stream.
    word, _, _, _ = philox_words(
        index, slot, tl.zeros_like(slot), time0.to(tl.uint32), time1.to(tl.uint32)
    )
    time = uniform(word)  # [ROWS]

    # x_t = (1 - t) x_0 + t eps
    noise = row_normals(index, slot, noise0.to(tl.uint32), noise1.to(tl.uint32), BLOCK)
    xt = (1.0 - time)[:, None] * x0 + time[:, None] * noise
    tl.store(xt_ptr + row[:, None] * CHANNELS + channel[None, :], xt, mask=inside)
    tl.store(time_ptr + row, time, mask=row < rows)


@triton.jit(do_not_specialize=KEYS)
def flow_loss_forward_kernel(
    # read
    prediction_ptr,  # (R, C): v_hat
    x0_ptr,  # (M, C) float32
    index_ptr,  # (M,) int64
    slot_ptr,  # (M,) int64
    # written
    loss_ptr,  # (M,) float32
    # sizes
    tokens,  # M
    # Philox key, int32 of the words' bits
    noise0,
    noise1,
    # constants
    CHANNELS: tl.constexpr,  # C
    REPEAT: tl.constexpr,  # rows per token
    REPEATS: tl.constexpr,  # rows per token in a tile
    ROWS: tl.constexpr,  # rows of a tile
    BLOCK: tl.constexpr,  # power of 2, at least C and 4
):
    """Some tokens: the mean of their repeats' squared velocity errors."""
    # A program takes whole tokens, so that the mean over repeats needs no second pass.
    TOKENS: tl.constexpr = ROWS // REPEATS
    channel = tl.arange(0, BLOCK)  # [BLOCK]
    total = tl.zeros((TOKENS,), tl.float32)
    for first in tl.range(0, REPEAT, REPEATS):
        row, valid = repeat_rows(first, tokens, REPEAT, REPEATS, ROWS)  # [ROWS]
        inside = valid[:, None] & (channel < CHANNELS)[None, :]  # [ROWS, BLOCK]
        token, index, slot = row_draws(index_ptr, slot_ptr, row, tokens * REPEAT, REPEAT)
        guess_at = prediction_ptr + row[:, None] * CHANNELS + channel[None, :]
        guess = load_float32(guess_at, inside)
        x0_at = x0_ptr + token[:, None] * CHANNELS + channel[None, :]
        x0 = tl.load(x0_at, mask=inside, other=0.0)
        # The velocity, from the noise made again.
        noise = row_normals(index, slot, noise0.to(tl.uint32), noise1.to(tl.uint32), BLOCK)
        error = guess - (noise - x0)
        total += sum_repeats(error * error, inside, TOKENS, REPEATS)
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)  # [TOKENS]
    tl.store(loss_ptr + token, total * (1.0 / (CHANNELS * REPEAT)), mask=token < tokens)


@triton.jit(do_not_specialize=KEYS)
def flow_loss_backward_kernel(
    # read
    grad_ptr,  # (M,) float32
    prediction_ptr,  # (R, C): v_hat
    x0_ptr,  # (M, C) float32
    index_ptr,  # (M,) int64
    slot_ptr,  # (M,) int64
    # written
    out_ptr,  # (R, C), the gradient of the prediction
    # sizes
    rows,  # R = M * REPEAT
    # Philox key, int32 of the words' bits
    noise0,
    noise1,
    # constants
    CHANNELS: tl.constexpr,  # C
    REPEAT: tl.constexpr,  # rows per token
    ROWS: tl.constexpr,  # rows of a tile
    BLOCK: tl.constexpr,  # power of 2, at least C and 4
):
    """Some rows: the gradient of the predicted velocity."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    channel = tl.arange(0, BLOCK)  # [BLOCK]
    inside = (row < rows)[:, None] & (channel < CHANNELS)[None, :]  # [ROWS, BLOCK]
    token, index, slot = row_draws(index_ptr, slot_ptr, row, rows, REPEAT)
    at = row[:, None] * CHANNELS + channel[None, :]
    x0_at = token[:, None] * CHANNELS + channel[None, :]
    guess = load_float32(prediction_ptr + at, inside)
    x0 = tl.load(x0_ptr + x0_at, mask=inside, other=0.0)
    grad = (tl.load(grad_ptr + token) * (2.0 / (CHANNELS * REPEAT)))[:, None]  # [ROWS, 1]
    noise = row_normals(index, slot, noise0.to(tl.uint32), noise1.to(tl.uint32), BLOCK)
    out = grad * (guess - (noise - x0))
    store_rounded(out_ptr + at, out, inside)


def _tile(kernel: str, channels: int, device: torch.device) -> dict[str, int]:
    """The table's configuration, and the tile's columns."""
    found = tuning.lookup("flow_loss", kernel, channels, device)
    return dict(found, BLOCK=noise_block(channels))


def inputs(
    x0: Tensor, index: Tensor, slot: Tensor, repeat: int, key: list[int]
) -> tuple[Tensor, Tensor]:
    """x0 (M, C) float32, index and slot (M,), all contiguous; key: two words for the times, two for
    the noise -> x_t (M * repeat, C) and time (M * repeat,), float32."""
    tokens, channels = x0.shape
    rows = tokens * repeat
    xt = x0.new_empty(rows, channels)
    time = x0.new_empty(rows)
    if rows:
        tile = _tile("inputs", channels, x0.device)
        flow_inputs_kernel[(triton.cdiv(rows, tile["ROWS"]),)](
            x0, index, slot, xt, time, rows, *signed(key), CHANNELS=channels, REPEAT=repeat, **tile
        )
    return xt, time


def forward(
    prediction: Tensor, x0: Tensor, index: Tensor, slot: Tensor, repeat: int, key: list[int]
) -> Tensor:
    """prediction (M * repeat, C), the rest as `inputs` -> loss (M,) float32."""
    tokens, channels = x0.shape
    loss = x0.new_empty(tokens)
    if tokens:
        tile = _tile("forward", channels, x0.device)
        repeats = min(triton.next_power_of_2(repeat), tile["ROWS"])
        flow_loss_forward_kernel[(triton.cdiv(tokens, tile["ROWS"] // repeats),)](
            prediction,
            x0,
            index,
            slot,
            loss,
            tokens,
            *signed(key),
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
    index: Tensor,
    slot: Tensor,
    repeat: int,
    key: list[int],
) -> Tensor:
    """grad (M,) float32, the rest as `forward` -> the gradient of the prediction, in its dtype."""
    out = torch.empty_like(prediction)
    rows = prediction.shape[0]
    channels = x0.shape[1]
    if rows:
        tile = _tile("backward", channels, x0.device)
        flow_loss_backward_kernel[(triton.cdiv(rows, tile["ROWS"]),)](
            grad,
            prediction,
            x0,
            index,
            slot,
            out,
            rows,
            *signed(key),
            CHANNELS=channels,
            REPEAT=repeat,
            **tile,
        )
    return out
