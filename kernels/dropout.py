"""dropout in one pass: read, hash, write. The mask is the one of `heptapod_fast.ops.dropout`.

Forward and backward are the same kernel; nothing is stored. One program handles one block of
columns of one row, so that the key and the row counter are scalars.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from heptapod_fast.kernels import offline
from heptapod_fast.kernels.randomness import keep, mask_arguments, row_keys
from heptapod_fast.ops.dropout_mask import DropoutMask


@triton.jit(do_not_specialize=["counters"])
def _dropout(
    x_ptr,
    out_ptr,
    key_ptr,
    counter_ptr,
    width,
    rows_per_key,
    counters,
    scale,
    THRESHOLD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    key0, key1, counter = row_keys(key_ptr, counter_ptr, row, rows_per_key, counters)
    kept = keep(key0, key1, counter, column, width, THRESHOLD)
    x = tl.load(x_ptr + row * width + column, mask=inside, other=0.0).to(tl.float32)
    out = tl.where(kept, x * scale, 0.0)
    tl.store(out_ptr + row * width + column, out.to(out_ptr.dtype.element_ty), mask=inside)


BLOCK = 1024


def dropout(x: Tensor, mask: DropoutMask) -> Tensor:
    """x (..., D) contiguous -> a new tensor of its shape and dtype."""
    width = x.shape[-1]
    rows, out = x.numel() // max(1, width), torch.empty_like(x)
    if x.numel():
        _dropout[(rows, triton.cdiv(width, BLOCK))](
            x, out, width=width, BLOCK=BLOCK, num_warps=4, **mask_arguments(mask, rows)
        )
    return out


def compile_cases(arch: str):
    """See offline.py."""
    types = dict(
        x_ptr="*bf16",
        out_ptr="*bf16",
        key_ptr="*i64",
        counter_ptr="*i64",
        width="i32",
        rows_per_key="i32",
        counters="i32",
        scale="fp32",
    )
    yield offline.Case(
        "dropout",
        _dropout,
        types,
        dict(THRESHOLD=round(0.1 * 2**32), BLOCK=BLOCK),
        dict(num_warps=4),
        unaligned=("rows_per_key", "counters"),
    )
