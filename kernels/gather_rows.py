"""gather_rows, scatter_rows: see `heptapod_fast.ops.gather_rows`; docs/kernels/README.md builds
them up from a plain version.

Copies in tiles of ROWS x BLOCK, one read and one write per row; a program's loads of 16 bytes are
all under way before it stores. Scattering is gathering through the inverse of the index, which
writes every row of the result once, zeros included.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from heptapod_fast.kernels import tuning

INVERT_BLOCK = 1024


@triton.jit(do_not_specialize=["rows", "limit"])
def copy_rows_kernel(
    x_ptr,  # (limit, D), rows `stride` apart
    source_ptr,  # (R,) int64 or int32: which row of x
    out_ptr,  # (R, D)
    rows,  # R
    limit,  # rows of x
    width,  # D
    stride,  # elements from one row of x to the next
    ROWS: tl.constexpr,  # rows of a tile
    BLOCK: tl.constexpr,  # columns of a tile
):
    """out[r] = x[source[r]] where 0 <= source[r] < limit, else 0."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    live = row < rows
    source = tl.load(source_ptr + row, mask=live, other=-1).to(tl.int64)
    there = (source >= 0) & (source < limit)
    inside = (column < width)[None, :]
    read = there[:, None] & inside  # [ROWS, BLOCK]
    x = tl.load(x_ptr + source[:, None] * stride + column[None, :], mask=read, other=0.0)
    written = live[:, None] & inside  # [ROWS, BLOCK]
    tl.store(out_ptr + row[:, None] * width + column[None, :], x, mask=written)


@triton.jit(do_not_specialize=["limit", "count"])
def invert_index_kernel(
    index_ptr,  # (count,) int64 without repeats
    inverse_ptr,  # (limit,) int32, -1 everywhere before the launch
    count,
    limit,
    BLOCK: tl.constexpr,  # indices of a program
):
    """inverse[index[r]] = r."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    index = tl.load(index_ptr + at, mask=at < count, other=-1)
    tl.store(inverse_ptr + index, at, mask=(index >= 0) & (index < limit))


def _copied(x: Tensor, source: Tensor, kernel: str) -> Tensor:
    """x[source], zeros where the source is no row of x; kernel: which configurations."""
    rows = len(source)
    width = x.shape[1]
    out = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    if out.numel():
        tile = tuning.lookup("gather_rows", kernel, width, x.device)
        grid = (triton.cdiv(rows, tile["ROWS"]), triton.cdiv(width, tile["BLOCK"]))
        copy_rows_kernel[grid](x, source, out, rows, len(x), width, x.stride(0), **tile)
    return out


def gather(x: Tensor, index: Tensor) -> Tensor:
    """x (M, D) with contiguous rows, index (R,) int64 -> x[index], contiguous."""
    return _copied(x, index, "gather")


def scatter(x: Tensor, index: Tensor, rows: int) -> Tensor:
    """x (R, D) with contiguous rows, index (R,) int64 -> (rows, D), zero where no row was put."""
    inverse = torch.full((rows,), -1, dtype=torch.int32, device=x.device)
    if len(index) and rows:
        invert_index_kernel[(triton.cdiv(len(index), INVERT_BLOCK),)](
            index, inverse, len(index), rows, BLOCK=INVERT_BLOCK, num_warps=4
        )
    return _copied(x, inverse, "scatter")
