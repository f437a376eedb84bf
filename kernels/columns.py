"""Column sums in two stages, the same bits every time: no atomics, a fixed order of addition.

Stage one belongs to the kernels: program p adds up its own rows, in order, and writes one float32
row of `partials`. Stage two is here. The number of programs comes from the tuning table, never from
the number of multiprocessors, so that one table gives one result.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from heptapod_fast.kernels.memory import store_rounded

# Of a tile: 56 registers on sm_90, eight 16-byte loads in flight per thread.
ROWS = 256
BLOCK = 16


@triton.jit(do_not_specialize=["programs"])
def column_sum_kernel(
    partial_ptr,  # (programs, width) float32
    out_ptr,  # (width,)
    programs,
    width,
    ROWS: tl.constexpr,  # rows of a tile
    BLOCK: tl.constexpr,  # columns of a tile, those of one program
):
    """Some columns: the sum over all programs, in order."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = column < width
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(0, programs, ROWS):
        row = first + tl.arange(0, ROWS).to(tl.int64)  # [ROWS]
        mask = (row < programs)[:, None] & inside[None, :]  # [ROWS, BLOCK]
        total += tl.load(partial_ptr + row[:, None] * width + column[None, :], mask=mask, other=0.0)
    store_rounded(out_ptr + column, tl.sum(total, axis=0), inside)


def column_sum(partials: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """partials (programs, width) float32 contiguous -> (width,)."""
    programs, width = partials.shape
    out = torch.empty(width, dtype=dtype, device=partials.device)
    column_sum_kernel[(triton.cdiv(width, BLOCK),)](
        partials, out, programs, width, ROWS=ROWS, BLOCK=BLOCK, num_warps=4
    )
    return out
