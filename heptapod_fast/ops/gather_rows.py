"""gather_rows, scatter_rows: move rows to and from packed form, each row at most once.

    gather_rows(x, index)[r]          = x[index[r]]
    scatter_rows(x, index, n)[i]      = x[r] where index[r] = i, else 0

They are each other's transpose. Because no index occurs twice, both directions of both are plain
copies: deterministic, without atomics. The caller guarantees uniqueness (grid.py does).
"""

from __future__ import annotations

import torch
from torch import Tensor


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_MD, index_R):
        ctx.save_for_backward(index_R)
        ctx.rows = x_MD.shape[0]
        return x_MD.index_select(0, index_R)

    @staticmethod
    def backward(ctx, grad_RD):
        (index_R,) = ctx.saved_tensors
        return scatter_rows(grad_RD, index_R, ctx.rows), None


class _ScatterRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_RD, index_R, rows):
        ctx.save_for_backward(index_R)
        return x_RD.new_zeros(rows, x_RD.shape[1]).index_copy_(0, index_R, x_RD)

    @staticmethod
    def backward(ctx, grad_MD):
        (index_R,) = ctx.saved_tensors
        return gather_rows(grad_MD, index_R), None, None


def gather_rows(x_MD: Tensor, index_R: Tensor) -> Tensor:
    """x (M, D), index (R,) int64 without repeats -> (R, D)."""
    return _GatherRows.apply(x_MD, index_R)


def scatter_rows(x_RD: Tensor, index_R: Tensor, rows: int) -> Tensor:
    """x (R, D), index (R,) int64 without repeats -> (rows, D), zero where no row was put."""
    return _ScatterRows.apply(x_RD, index_R, rows)
