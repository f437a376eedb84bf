"""gather_rows, scatter_rows: see `heptapod_fast.ops.gather_rows`. Copies in tiles of ROWS x BLOCK,
one read and one write per row; a program's loads of 16 bytes are all under way before it stores.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from heptapod_fast.kernels import offline, tuning


@triton.jit(do_not_specialize=["rows", "limit"])
def _copy(
    x_ptr, source_ptr, out_ptr, rows, limit, width, stride, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """out[r] = x[source[r]] where 0 <= source[r] < limit, else 0."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = row < rows
    source = tl.load(source_ptr + row, mask=live, other=-1).to(tl.int64)
    there = (source >= 0) & (source < limit)
    inside = (column < width)[None, :]
    x = tl.load(
        x_ptr + source[:, None] * stride + column[None, :], mask=there[:, None] & inside, other=0.0
    )
    tl.store(out_ptr + row[:, None] * width + column[None, :], x, mask=live[:, None] & inside)


@triton.jit(do_not_specialize=["limit", "count"])
def _invert(index_ptr, inverse_ptr, count, limit, BLOCK: tl.constexpr):
    """inverse[index[r]] = r."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    index = tl.load(index_ptr + at, mask=at < count, other=-1)
    tl.store(inverse_ptr + index, at, mask=(index >= 0) & (index < limit))


INVERT_BLOCK = 1024


def _copied(x: Tensor, source: Tensor, kernel: str) -> Tensor:
    rows, width = len(source), x.shape[1]
    out = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    if out.numel():
        tile = dict(tuning.lookup("gather_rows", kernel, width, x.device))
        grid = (triton.cdiv(rows, tile["ROWS"]), triton.cdiv(width, tile["BLOCK"]))
        _copy[grid](x, source, out, rows, len(x), width, x.stride(0), **tile)
    return out


def gather(x: Tensor, index: Tensor) -> Tensor:
    """x (M, D) with contiguous rows, index (R,) int64 -> x[index], contiguous."""
    return _copied(x, index, "gather")


def scatter(x: Tensor, index: Tensor, rows: int) -> Tensor:
    """x (R, D) with contiguous rows, index (R,) int64 -> (rows, D), zero where no row was put."""
    inverse = torch.full((rows,), -1, dtype=torch.int32, device=x.device)
    if len(index) and rows:
        _invert[(triton.cdiv(len(index), INVERT_BLOCK),)](
            index, inverse, len(index), rows, BLOCK=INVERT_BLOCK, num_warps=4
        )
    return _copied(x, inverse, "scatter")


def compile_cases(arch: str):
    """See offline.py."""
    for kernel, source in (("gather", "*i64"), ("scatter", "*i32")):
        for size, tile in tuning.buckets("gather_rows", kernel, arch).items():
            for dtype in ("bf16", "fp32"):
                yield offline.Case(
                    f"gather_rows {kernel} {dtype} <= {size}",
                    _copy,
                    dict(
                        x_ptr=f"*{dtype}",
                        source_ptr=source,
                        out_ptr=f"*{dtype}",
                        rows="i32",
                        limit="i32",
                        width="i32",
                        stride="i32",
                    ),
                    {key: value for key, value in tile.items() if key != "num_warps"},
                    dict(num_warps=tile["num_warps"]),
                    unaligned=("rows", "limit"),
                )
    yield offline.Case(
        "gather_rows invert",
        _invert,
        dict(index_ptr="*i64", inverse_ptr="*i32", count="i32", limit="i32"),
        dict(BLOCK=INVERT_BLOCK),
        dict(num_warps=4),
        unaligned=("count", "limit"),
    )
