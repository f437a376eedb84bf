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

from heptapod_fast.kernels import offline


@triton.jit(do_not_specialize=["programs"])
def _column_sum(partial_ptr, out_ptr, programs, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(0, programs, ROWS):
        row = first + tl.arange(0, ROWS).to(tl.int64)
        mask = (row < programs)[:, None] & inside[None, :]
        total += tl.load(partial_ptr + row[:, None] * width + column[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + column, tl.sum(total, axis=0).to(out_ptr.dtype.element_ty), mask=inside)


# 56 registers on sm_90, eight 16-byte loads in flight per thread.
ROWS, BLOCK = 256, 16


def column_sum(partials: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """partials (P, W) float32 contiguous -> (W,)."""
    programs, width = partials.shape
    out = torch.empty(width, dtype=dtype, device=partials.device)
    _column_sum[(triton.cdiv(width, BLOCK),)](
        partials, out, programs, width, ROWS=ROWS, BLOCK=BLOCK, num_warps=4
    )
    return out


def compile_cases(arch: str):
    """See offline.py."""
    yield offline.Case(
        "column_sum",
        _column_sum,
        dict(partial_ptr="*fp32", out_ptr="*fp32", programs="i32", width="i32"),
        dict(ROWS=ROWS, BLOCK=BLOCK),
        dict(num_warps=4),
    )
