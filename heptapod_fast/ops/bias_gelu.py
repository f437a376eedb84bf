"""bias_gelu: dropout(act(x + bias)), what stands between the two products of an MLP.

    u   = x + b_column
    y   = keep / (1 - p) * act(u)            act = erf GELU, u * Phi(u), or SiLU, u * sigmoid(u)
    dx  = keep / (1 - p) * act'(u) * dy
    db  = sum over rows of dx                two stages, float32, in a fixed order

Kernels compute in float32 and round once. Only x is kept for the backward pass: the mask and the
activation are computed again. cuBLASLt's fused GELU is the tanh form, which is another function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from heptapod_fast.ops import dispatch, library
from heptapod_fast.ops.checks import check_rows, check_shape
from heptapod_fast.ops.dropout_mask import DropoutMask
from heptapod_fast.ops.operators import (
    Context,
    Gradients,
    Inputs,
    compiled,
    differentiable,
    once,
    operator,
)

MAX_WIDTH = 16_384  # kernels/configs/bias_gelu.json
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "silu": F.silu}


def bias_gelu(
    x: Tensor,
    bias: Tensor,
    mask: DropoutMask | None = None,
    activation: str = "gelu",
    implementation: str = "auto",
) -> Tensor:
    """x (..., F) float32 or bfloat16, bias (F,) float32 -> the shape and dtype of x.

    mask: dropout over the rows of x. activation: "gelu" or "silu". implementation: "auto",
    "triton", "cpu" or "reference". Raises ValueError on another activation or a bias or mask that
    does not fit.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"bias_gelu knows {', '.join(ACTIVATIONS)}, not {activation!r}")
    check_rows("bias_gelu", x=x, bias=bias, **DropoutMask.named(mask))
    check_shape("bias_gelu", x.shape[-1:], bias=bias)
    mask = DropoutMask.checked(mask, "bias_gelu", x)
    unsupported = f"width {len(bias)} is above {MAX_WIDTH}" if len(bias) > MAX_WIDTH else None
    chosen = dispatch.select(
        "bias_gelu", x.device, x.dtype, implementation, {"triton": unsupported}
    )
    if chosen == "reference":
        y = ACTIVATIONS[activation](x + bias.to(x.dtype))
        return y if mask is None else mask.apply(y)
    arguments = x.contiguous(), bias.float().contiguous(), *DropoutMask.parts(mask)
    if chosen == "cpu":
        return _cpu_operator(*arguments, activation == "silu")
    return _operator(*arguments, activation)


# The operator and its gradient.


def _forward(x, bias, key, counter, p, activation):
    from heptapod_fast.kernels import bias_gelu as kernels

    return kernels.forward(x, bias, DropoutMask.of(key, counter, p), activation)


def _backward(grad, x, bias, key, counter, p, activation):
    from heptapod_fast.kernels import bias_gelu as kernels

    return kernels.backward(grad, x, bias, DropoutMask.of(key, counter, p), activation)


def _setup(ctx: Context, inputs: Inputs, output: Any) -> None:
    x, bias, key, counter, ctx.p, ctx.activation = inputs
    ctx.save_for_backward(x, bias, key, counter)


def _gradient_by(backward_operator: Callable[..., Any]) -> Callable[..., Gradients]:
    """The gradient of one of the two operators. Of the activation each has its own kind."""

    def gradient(ctx: Context, grad: Tensor) -> Gradients:
        dx, dbias = backward_operator(grad.contiguous(), *ctx.saved_tensors, ctx.p, ctx.activation)
        return dx, dbias, None, None, None, None

    return gradient


_operator = operator(
    "bias_gelu(Tensor x, Tensor bias, Tensor? key, Tensor? counter, float p, str activation) "
    "-> Tensor",
    _forward,
    lambda x, *_: torch.empty_like(x),
)
_backward_operator = operator(
    "bias_gelu_backward(Tensor grad, Tensor x, Tensor bias, Tensor? key, Tensor? counter, float p, "
    "str activation) -> (Tensor, Tensor)",
    _backward,
    lambda grad, x, bias, *_: (torch.empty_like(x), torch.empty_like(bias)),
)
differentiable(_operator, _gradient_by(_backward_operator), _setup)
once(_backward_operator, "bias_gelu")
if library.available("cpu"):
    _cpu_operator = compiled("bias_gelu_cpu", lambda x, *_: torch.empty_like(x))
    _cpu_backward_operator = compiled(
        "bias_gelu_backward_cpu",
        lambda grad, x, bias, *_: (torch.empty_like(x), torch.empty_like(bias)),
    )
    differentiable(_cpu_operator, _gradient_by(_cpu_backward_operator), _setup)
    once(_cpu_backward_operator, "bias_gelu")
dispatch.register_triton("bias_gelu", cpu=library.takes_rows)
