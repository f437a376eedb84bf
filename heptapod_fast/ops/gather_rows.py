"""gather_rows, scatter_rows: move rows to and from packed form, each row at most once.

    gather_rows(x, index)[r]          = x[index[r]]
    scatter_rows(x, index, n)[i]      = x[r] where index[r] = i, else 0

They are each other's transpose. Because no index occurs twice, both directions of both are plain
copies: deterministic, without atomics. The caller guarantees uniqueness (grid.py does). An index
out of range raises in the reference on CPU; the kernels read zeros for it and write nothing.

The kernel of scatter_rows goes over the rows of the result, through the inverse of the index, and
so writes zeros and rows in one pass. Gathering inside the product that follows was decided against,
modelled: the gather moves 50/67/84 MB at B/L/H, batch 128 (12/16/20 us at 4.3 TB/s), the projection
behind it is 25/44/68 us of cuBLAS, so a product of our own had to reach 68/73/77% of cuBLAS through
row pointers, which rule out bulk copies, only to break even, over at most 0.05% of a step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from heptapod_fast.ops import dispatch
from heptapod_fast.ops.checks import check_rows, refusal
from heptapod_fast.ops.operators import Context, Gradients, Inputs, differentiable, operator

MAX_WIDTH = 65_536  # kernels/configs/gather_rows.json


def gather_rows(x_MD: Tensor, index_R: Tensor, implementation: str = "auto") -> Tensor:
    """x (M, D), index (R,) int64 without repeats -> (R, D), contiguous.

    x may be a slice whose last dimension is contiguous. Kernels take float32 and bfloat16, the
    reference any dtype. implementation: "auto", "triton" or "reference". Raises ValueError on other
    shapes or another dtype of the index.
    """
    _check("gather_rows", x_MD, index_R)
    if _select("gather_rows", x_MD, implementation) == "reference":
        return _GatherRows.apply(x_MD, index_R)
    return _gather(_rows(x_MD), index_R.contiguous())


def scatter_rows(x_RD: Tensor, index_R: Tensor, rows: int, implementation: str = "auto") -> Tensor:
    """x (R, D), index (R,) int64 without repeats -> (rows, D), zero where no row was put.

    See gather_rows; also raises ValueError if x has not as many rows as the index.
    """
    _check("scatter_rows", x_RD, index_R)
    if len(x_RD) != len(index_R) or rows < 0:
        wanted = "as many rows as indices and a number of rows to make"
        found = f"{len(x_RD)} rows, {len(index_R)} indices, rows={rows}"
        raise refusal("scatter_rows", wanted, found)
    if _select("scatter_rows", x_RD, implementation) == "reference":
        return _ScatterRows.apply(x_RD, index_R, rows)
    return _scatter(_rows(x_RD), index_R.contiguous(), rows)


def _check(name: str, x: Tensor, index: Tensor) -> None:
    check_rows(name, x=x, index=index)
    if x.dim() != 2 or index.dim() != 1 or index.dtype != torch.int64:
        raise refusal(name, "rows (M, D) and an int64 index (R,)", x.shape, index)


def _select(name: str, x: Tensor, implementation: str) -> str:
    width = x.shape[1]
    unsupported = None
    if width > MAX_WIDTH:
        unsupported = f"rows are {width} wide, at most {MAX_WIDTH} fit"
    return dispatch.select(name, x.device, x.dtype, implementation, unsupported)


def _rows(x: Tensor) -> Tensor:
    """x as kernels read it: each row contiguous."""
    return x if x.stride(1) == 1 else x.contiguous()


# The references, each with the other as its gradient.


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_MD, index_R):
        ctx.save_for_backward(index_R)
        ctx.rows = x_MD.shape[0]
        return x_MD.index_select(0, index_R)

    @staticmethod
    def backward(ctx, grad_RD):
        (index_R,) = ctx.saved_tensors
        return _ScatterRows.apply(grad_RD, index_R, ctx.rows), None


class _ScatterRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_RD, index_R, rows):
        ctx.save_for_backward(index_R)
        return x_RD.new_zeros(rows, x_RD.shape[1]).index_copy_(0, index_R, x_RD)

    @staticmethod
    def backward(ctx, grad_MD):
        (index_R,) = ctx.saved_tensors
        return _GatherRows.apply(grad_MD, index_R), None, None


# The operators, each with the other as its gradient.


def _gather_kernel(x: Tensor, index: Tensor) -> Tensor:
    from heptapod_fast.kernels import gather_rows as kernels

    return kernels.gather(x, index)


def _scatter_kernel(x: Tensor, index: Tensor, rows: int) -> Tensor:
    from heptapod_fast.kernels import gather_rows as kernels

    return kernels.scatter(x, index, rows)


def _gather_setup(ctx: Context, inputs: Inputs, output: Any) -> None:
    x, index = inputs
    ctx.save_for_backward(index)
    ctx.rows = x.shape[0]


def _gather_gradient(ctx: Context, grad: Tensor) -> Gradients:
    return _scatter(_rows(grad), *ctx.saved_tensors, ctx.rows), None


def _scatter_setup(ctx: Context, inputs: Inputs, output: Any) -> None:
    ctx.save_for_backward(inputs[1])


def _scatter_gradient(ctx: Context, grad: Tensor) -> Gradients:
    return _gather(_rows(grad), *ctx.saved_tensors), None, None


_gather = operator(
    "gather_rows(Tensor x, Tensor index) -> Tensor",
    _gather_kernel,
    lambda x, index: x.new_empty(index.shape[0], x.shape[1]),
    strided=("x",),
)
_scatter = operator(
    "scatter_rows(Tensor x, Tensor index, SymInt rows) -> Tensor",
    _scatter_kernel,
    lambda x, index, rows: x.new_empty(rows, x.shape[1]),
    strided=("x",),
)
differentiable(_gather, _gather_gradient, _gather_setup)
differentiable(_scatter, _scatter_gradient, _scatter_setup)
for name in ("gather_rows", "scatter_rows"):
    dispatch.register_triton(name)
