"""swiglu: see `heptapod_fast.ops.swiglu`. Memory-bound: two reads and one write forward, three
reads and two writes backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from heptapod_fast.kernels import tuning
from heptapod_fast.kernels.memory import load_float32, store_rounded


@triton.jit
def swiglu_forward_kernel(
    # read
    x_ptr,  # (elements,)
    y_ptr,  # (elements,)
    # written
    out_ptr,  # (elements,)
    # sizes
    elements,
    # constants
    BLOCK: tl.constexpr,  # elements of a program
):
    """A block of silu(x) * y."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = at < elements
    x = load_float32(x_ptr + at, inside)
    y = load_float32(y_ptr + at, inside)
    store_rounded(out_ptr + at, x * tl.sigmoid(x) * y, inside)


@triton.jit
def swiglu_backward_kernel(
    # read
    grad_ptr,  # (elements,) the gradient of the result
    x_ptr,  # (elements,)
    y_ptr,  # (elements,)
    # written
    dx_ptr,  # (elements,)
    dy_ptr,  # (elements,)
    # sizes
    elements,
    # constants
    BLOCK: tl.constexpr,  # elements of a program
):
    """A block of both gradients."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = at < elements
    grad = load_float32(grad_ptr + at, inside)
    x = load_float32(x_ptr + at, inside)
    y = load_float32(y_ptr + at, inside)
    sigmoid = tl.sigmoid(x)
    slope = sigmoid * (1.0 + x * (1.0 - sigmoid))
    store_rounded(dx_ptr + at, grad * y * slope, inside)
    store_rounded(dy_ptr + at, grad * x * sigmoid, inside)


def forward(x: Tensor, y: Tensor) -> Tensor:
    """x, y of one shape -> silu(x) * y."""
    out = torch.empty_like(x)
    config = tuning.lookup("swiglu", "forward", x.shape[-1], x.device)
    programs = triton.cdiv(x.numel(), config["BLOCK"])
    if programs:
        swiglu_forward_kernel[(programs,)](x, y, out, x.numel(), **config)
    return out


def backward(grad: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(dx, dy)."""
    dx, dy = torch.empty_like(x), torch.empty_like(y)
    config = tuning.lookup("swiglu", "backward", x.shape[-1], x.device)
    programs = triton.cdiv(x.numel(), config["BLOCK"])
    if programs:
        swiglu_backward_kernel[(programs,)](grad, x, y, dx, dy, x.numel(), **config)
    return dx, dy
