"""dropout in one pass: read, hash, write. The mask is the one of `heptapod_fast.ops.dropout`.

Forward and backward are the same kernel; nothing is stored. One program handles one block of
columns of one row, so that the key and the row counter are scalars.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _dropout(x_ptr, out_ptr, key0_ptr, key1_ptr, counter_ptr, width, rows_per_key, counters,
             threshold, scale, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    key0 = tl.load(key0_ptr + row // rows_per_key).to(tl.uint32)
    key1 = tl.load(key1_ptr + row // rows_per_key).to(tl.uint32)
    counter = tl.load(counter_ptr + row % counters)
    element = (counter * width + column).to(tl.uint32)
    hashed = _mix(_mix(element ^ key0) ^ key1)
    x = tl.load(x_ptr + row * width + column, mask=inside, other=0.0).to(tl.float32)
    kept = hashed.to(tl.int64) >= threshold
    out = tl.where(kept, x * scale, 0.0)
    tl.store(out_ptr + row * width + column, out.to(out_ptr.dtype.element_ty), mask=inside)


def dropout(x: Tensor, key0: Tensor, key1: Tensor, counter: Tensor, p: float) -> Tensor:
    """x (..., D) contiguous; keys int64 with one value per `x.shape[0]`, counter int64 over the
    last row dimension. Returns a new tensor of x's dtype."""
    rows, width = x.numel() // x.shape[-1], x.shape[-1]
    out = torch.empty_like(x)
    block = min(1024, triton.next_power_of_2(width))
    grid = (rows, triton.cdiv(width, block))
    _dropout[grid](x, out, key0, key1, counter, width, rows // key0.numel(), counter.numel(),
                   round(p * 2**32), 1.0 / (1.0 - p), BLOCK=block)
    return out
