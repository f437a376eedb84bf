"""swiglu: silu(x) * y, the gate of LLaMA's MLP.

s   = sigmoid(x)
out = x * s * y
dx  = dout * y * s * (1 + x * (1 - s))
dy  = dout * x * s
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from heptapod_fast.ops import dispatch
from heptapod_fast.ops.checks import check_like, check_rows
from heptapod_fast.ops.operators import Context, Gradients, Inputs, differentiable, once, operator


def swiglu(x: Tensor, y: Tensor, implementation: str = "auto") -> Tensor:
    """x, y (..., F), float32 or bfloat16 -> silu(x) * y, of the same shape and dtype.

    implementation: "auto", "triton" or "reference".
    """
    check_rows("swiglu", x=x, y=y)
    check_like("swiglu", x, y=y)
    if dispatch.select("swiglu", x.device, x.dtype, implementation) == "reference":
        return F.silu(x) * y
    return _operator(x.contiguous(), y.contiguous())


# The operator and its gradient.


def _forward(x, y):
    from heptapod_fast.kernels import swiglu as kernels

    return kernels.forward(x, y)


def _backward(grad, x, y):
    from heptapod_fast.kernels import swiglu as kernels

    return kernels.backward(grad, x, y)


def _setup(ctx: Context, inputs: Inputs, output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _gradient(ctx: Context, grad: Tensor) -> Gradients:
    return _backward_operator(grad.contiguous(), *ctx.saved_tensors)


_operator = operator(
    "swiglu(Tensor x, Tensor y) -> Tensor", _forward, lambda x, y: torch.empty_like(x)
)
_backward_operator = operator(
    "swiglu_backward(Tensor grad, Tensor x, Tensor y) -> (Tensor, Tensor)",
    _backward,
    lambda grad, x, y: (torch.empty_like(x), torch.empty_like(y)),
)
differentiable(_operator, _gradient, _setup)
once(_backward_operator, "swiglu")
dispatch.register_triton("swiglu")
