"""flow_loss: see `heptapod_fast.ops.flow_loss`. One kernel for noising and drawing times, one
forward, one backward, in tiles of ROWS x BLOCK with a row per (token, repeat). The noise is made
again from its counter.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from heptapod_fast.kernels import offline, tuning
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

KEYS = ["time0", "time1", "noise0", "noise1"]


@triton.jit(do_not_specialize=KEYS)
def _inputs(
    x0_ptr,
    index_ptr,
    slot_ptr,
    xt_ptr,
    time_ptr,
    rows,
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
    x0 = tl.load(x0_ptr + token[:, None] * CHANNELS + channel[None, :], mask=inside, other=0.0)
    word, _, _, _ = philox_words(
        index, slot, tl.zeros_like(slot), time0.to(tl.uint32), time1.to(tl.uint32)
    )
    time = uniform(word)
    noise = row_normals(index, slot, noise0.to(tl.uint32), noise1.to(tl.uint32), BLOCK)
    xt = (1.0 - time)[:, None] * x0 + time[:, None] * noise
    tl.store(xt_ptr + row[:, None] * CHANNELS + channel[None, :], xt, mask=inside)
    tl.store(time_ptr + row, time, mask=row < rows)


@triton.jit(do_not_specialize=KEYS)
def _forward(
    prediction_ptr,
    x0_ptr,
    index_ptr,
    slot_ptr,
    loss_ptr,
    tokens,
    noise0,
    noise1,
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
        guess = tl.load(
            prediction_ptr + row[:, None] * CHANNELS + channel[None, :], mask=inside, other=0.0
        ).to(tl.float32)
        x0 = tl.load(x0_ptr + token[:, None] * CHANNELS + channel[None, :], mask=inside, other=0.0)
        noise = row_normals(index, slot, noise0.to(tl.uint32), noise1.to(tl.uint32), BLOCK)
        error = guess - (noise - x0)
        total += sum_repeats(error * error, inside, TOKENS, REPEATS)
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    tl.store(loss_ptr + token, total * (1.0 / (CHANNELS * REPEAT)), mask=token < tokens)


@triton.jit(do_not_specialize=KEYS)
def _backward(
    grad_ptr,
    prediction_ptr,
    x0_ptr,
    index_ptr,
    slot_ptr,
    out_ptr,
    rows,
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
    at = row[:, None] * CHANNELS + channel[None, :]
    guess = tl.load(prediction_ptr + at, mask=inside, other=0.0).to(tl.float32)
    x0 = tl.load(x0_ptr + token[:, None] * CHANNELS + channel[None, :], mask=inside, other=0.0)
    grad = (tl.load(grad_ptr + token) * (2.0 / (CHANNELS * REPEAT)))[:, None]
    noise = row_normals(index, slot, noise0.to(tl.uint32), noise1.to(tl.uint32), BLOCK)
    out = grad * (guess - (noise - x0))
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside)


def _tile(kernel: str, channels: int, device: torch.device) -> dict[str, int]:
    found = tuning.lookup("flow_loss", kernel, channels, device)
    return dict(found, BLOCK=noise_block(channels))


def inputs(
    x0: Tensor, index: Tensor, slot: Tensor, repeat: int, key: list[int]
) -> tuple[Tensor, Tensor]:
    """x0 (M, C) float32, index and slot (M,), all contiguous; key: two words for the times, two for
    the noise -> x_t (M * repeat, C) and time (M * repeat,), float32."""
    channels, rows = x0.shape[1], x0.shape[0] * repeat
    xt, time = x0.new_empty(rows, channels), x0.new_empty(rows)
    if rows:
        tile = _tile("inputs", channels, x0.device)
        _inputs[(triton.cdiv(rows, tile["ROWS"]),)](
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
        _forward[(triton.cdiv(tokens, tile["ROWS"] // repeats),)](
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
    out, channels, rows = torch.empty_like(prediction), x0.shape[1], prediction.shape[0]
    if rows:
        tile = _tile("backward", channels, x0.device)
        _backward[(triton.cdiv(rows, tile["ROWS"]),)](
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


def compile_cases(arch: str):
    """See offline.py."""
    pointers = dict(x0_ptr="*fp32", index_ptr="*i64", slot_ptr="*i64", noise0="i32", noise1="i32")
    for channels in (16, 48, 192, 768, 4096):
        tiles = {
            kernel: dict(
                tuning.config("flow_loss", kernel, channels, arch), BLOCK=noise_block(channels)
            )
            for kernel in ("inputs", "forward", "backward")
        }
        warps = {kernel: dict(num_warps=tile.pop("num_warps")) for kernel, tile in tiles.items()}
        shape = dict(CHANNELS=channels, REPEAT=4)
        yield offline.Case(
            f"flow_loss inputs, C = {channels}",
            _inputs,
            dict(pointers, xt_ptr="*fp32", time_ptr="*fp32", rows="i32", time0="i32", time1="i32"),
            dict(tiles["inputs"], **shape),
            warps["inputs"],
            unaligned=KEYS,
        )
        for dtype in ("fp32", "bf16"):
            types = dict(pointers, prediction_ptr=f"*{dtype}")
            yield offline.Case(
                f"flow_loss forward, C = {channels}, {dtype}",
                _forward,
                dict(types, loss_ptr="*fp32", tokens="i32"),
                dict(tiles["forward"], **shape, REPEATS=min(4, tiles["forward"]["ROWS"])),
                warps["forward"],
                unaligned=KEYS,
            )
            yield offline.Case(
                f"flow_loss backward, C = {channels}, {dtype}",
                _backward,
                dict(types, grad_ptr="*fp32", out_ptr=f"*{dtype}", rows="i32"),
                dict(tiles["backward"], **shape),
                warps["backward"],
                unaligned=KEYS,
            )
