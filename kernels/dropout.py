"""dropout in one pass: read, hash, write. The mask is the one of `heptapod_fast.ops.dropout_mask`.

Forward and backward are the same kernel; nothing is stored. One program handles one block of
columns of one row, so that the key and the row counter are scalars.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from heptapod_fast.kernels.memory import load_float32, store_rounded
from heptapod_fast.kernels.randomness import keep, mask_arguments, row_keys
from heptapod_fast.ops.dropout_mask import DropoutMask

BLOCK = 1024


@triton.jit(do_not_specialize=["counters"])
def dropout_kernel(
    x_ptr,  # (R, D)
    out_ptr,  # (R, D)
    key_ptr,  # (P, 2) int64
    counter_ptr,  # (N,) int64
    width,  # D
    rows_per_key,  # R / P
    counters,  # N
    scale,  # 1 / (1 - p)
    THRESHOLD: tl.constexpr,  # p * 2**32
    BLOCK: tl.constexpr,  # columns of a program
):
    """Some columns of one row: x * scale where it is kept, else 0."""
    row = tl.program_id(0).to(tl.int64)  # 64 bits: rows * width may need them
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = column < width
    key0, key1, counter = row_keys(key_ptr, counter_ptr, row, rows_per_key, counters)
    kept = keep(key0, key1, counter, column, width, THRESHOLD)
    x = load_float32(x_ptr + row * width + column, inside)
    out = tl.where(kept, x * scale, 0.0)
    store_rounded(out_ptr + row * width + column, out, inside)


def dropout(x: Tensor, mask: DropoutMask) -> Tensor:
    """x (..., D) contiguous -> a new tensor of its shape and dtype."""
    out = torch.empty_like(x)
    width = x.shape[-1]
    rows = x.numel() // max(1, width)
    if x.numel():
        dropout_kernel[(rows, triton.cdiv(width, BLOCK))](
            x, out, width=width, BLOCK=BLOCK, num_warps=4, **mask_arguments(mask, rows)
        )
    return out
