"""layer_norm, alone and behind a residual sum: the two places of a pre-norm Transformer block.

    s = x + keep / (1 - p) * (branch + branch_bias)      the residual stream, rounded to x's dtype
    n = (s - mean(s)) * r,   r = 1 / sqrt(var(s) + eps)  over the last dimension, in float32
    y = n * weight + bias

    ds      = r * (g - mean(g) - n * mean(g * n)) + dsum,   g = weight * dy
    dbranch = keep / (1 - p) * ds
    dweight, dbias, dbranch_bias = sums over rows of dy * n, dy and dbranch: two stages, float32

y is computed from the rounded sum, which is all that the backward pass keeps besides the float32
mean and r of every row. Weight and biases are float32 masters; the reference casts them to x's
dtype, the kernels compute in float32 and round once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from heptapod_fast.ops import dispatch, library
from heptapod_fast.ops.checks import check_like, check_rows, check_shape, check_together
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

MAX_WIDTH = 4096


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-6,
    implementation: str = "auto",
) -> Tensor:
    """x (..., D) float32 or bfloat16, weight and bias (D,) float32 or both None -> as x.

    implementation: "auto", "triton" (D up to MAX_WIDTH), "cpu" or "reference" (any floating dtype).
    Raises ValueError if the parameters do not fit.
    """
    check_rows("layer_norm", x=x, weight=weight, bias=bias)
    _check_parameters("layer_norm", x, weight, bias)
    chosen = _select(x, implementation)
    if chosen == "reference":
        return _reference(x, weight, bias, eps)
    run = _cpu_operator if chosen == "cpu" else _operator
    y, _ = run(x.contiguous(), _master(weight), _master(bias), eps)
    return y


def add_layer_norm(
    x: Tensor,
    branch: Tensor,
    branch_bias: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: DropoutMask | None = None,
    eps: float = 1e-6,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(sum, layer_norm(sum)) with sum = x + dropout(branch + branch_bias), both as x.

    x, branch (..., D) of one dtype, float32 or bfloat16; branch_bias (D,) float32 or None; weight
    and bias (D,) float32 or both None; mask: dropout over the rows of branch. implementation:
    "auto", "triton" (D up to MAX_WIDTH), "cpu" or "reference". Raises ValueError if shapes, dtypes
    or the mask do not fit.
    """
    name = "add_layer_norm"
    parameters = dict(branch_bias=branch_bias, weight=weight, bias=bias)
    check_rows(name, x=x, branch=branch, **parameters, **DropoutMask.named(mask))
    _check_parameters(name, x, weight, bias)
    check_like(name, x, branch=branch)
    check_shape(name, x.shape[-1:], branch_bias=branch_bias)
    mask = DropoutMask.checked(mask, name, x)
    chosen = _select(x, implementation)
    if chosen == "reference":
        branch = branch if branch_bias is None else branch + branch_bias.to(x.dtype)
        total = x + (branch if mask is None else mask.apply(branch))
        return total, _reference(total, weight, bias, eps)
    run = _cpu_add_operator if chosen == "cpu" else _add_operator
    total, y, _ = run(
        x.contiguous(),
        branch.contiguous(),
        _master(branch_bias),
        _master(weight),
        _master(bias),
        *DropoutMask.parts(mask),
        eps,
    )
    return total, y


def _check_parameters(
    operation: str, x: Tensor, weight: Tensor | None, bias: Tensor | None
) -> None:
    check_together(operation, weight=weight, bias=bias)
    check_shape(operation, x.shape[-1:], weight=weight, bias=bias)


def _select(x: Tensor, implementation: str) -> str:
    width = x.shape[-1]
    why = f"rows are {width} wide, at most {MAX_WIDTH} fit" if width > MAX_WIDTH else None
    return dispatch.select("layer_norm", x.device, x.dtype, implementation, {"triton": why})


def _reference(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    if weight is not None and bias is not None:
        weight = weight.to(x.dtype)
        bias = bias.to(x.dtype)
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def _master(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.float().contiguous()


# The operators and their gradients.


def _forward(x, weight, bias, eps):
    from heptapod_fast.kernels import layer_norm as kernels

    return kernels.forward(x, weight, bias, eps)


def _add_forward(x, branch, branch_bias, weight, bias, key, counter, p, eps):
    from heptapod_fast.kernels import layer_norm as kernels

    return kernels.add_forward(
        x, branch, branch_bias, weight, bias, DropoutMask.of(key, counter, p), eps
    )


def _backward(grad, grad_sum, total, stats, weight, key, counter, p, branch_bias):
    from heptapod_fast.kernels import layer_norm as kernels

    return kernels.backward(
        grad, grad_sum, total, stats, weight, DropoutMask.of(key, counter, p), branch_bias
    )


def _stats_like(x: Tensor) -> Tensor:
    return x.new_empty((x.numel() // max(1, x.shape[-1]), 2), dtype=torch.float32)


def _fake(x, *_):
    return torch.empty_like(x), _stats_like(x)


def _fake_add(x, *_):
    return torch.empty_like(x), torch.empty_like(x), _stats_like(x)


def _fake_backward(grad, grad_sum, total, stats, weight, key, counter, p, branch_bias):
    sums = 2 * (weight is not None) + branch_bias
    dbranch = total.new_empty(0) if key is None else torch.empty_like(total)
    return (
        torch.empty_like(total),
        dbranch,
        total.new_empty((sums, total.shape[-1]), dtype=torch.float32),
    )


def _setup(ctx: Context, inputs: Inputs, output: Any) -> None:
    x, weight, _, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, output[1], weight)


def _gradient_by(backward_operator: Callable[..., Any]) -> Callable[..., Gradients]:
    """The gradient of `layer_norm`'s operator, of the kernels or of the compiled library."""

    def gradient(ctx: Context, grad: Tensor | None, _: None) -> Gradients:
        if grad is None:
            return None, None, None, None
        x, stats, weight = ctx.saved_tensors
        dx, _, sums = backward_operator(
            grad.contiguous(), None, x, stats, weight, *DropoutMask.parts(None), False
        )
        dweight, dbias = (None, None) if weight is None else sums.unbind()
        return dx, dweight, dbias, None

    return gradient


def _add_setup(ctx: Context, inputs: Inputs, output: Any) -> None:
    _, _, branch_bias, weight, _, key, counter, ctx.p, _ = inputs
    ctx.branch_bias = branch_bias is not None
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[0], output[2], weight, key, counter)


def _add_gradient_by(backward_operator: Callable[..., Any]) -> Callable[..., Gradients]:
    """The same of `add_layer_norm`'s."""

    def gradient(ctx: Context, grad_sum: Tensor | None, grad: Tensor | None, _: None) -> Gradients:
        total, stats, weight, key, counter = ctx.saved_tensors
        if grad is None and grad_sum is None:
            return (None,) * 9
        # A sum without its norm is rare (no block does it): it need not be fast.
        grad = torch.zeros_like(total) if grad is None else grad.contiguous()
        grad_sum = None if grad_sum is None else grad_sum.contiguous()
        dx, dbranch, sums = backward_operator(
            grad, grad_sum, total, stats, weight, key, counter, ctx.p, ctx.branch_bias
        )
        if key is None:
            dbranch = dx  # without dropout they are the same
        rows = list(sums.unbind())
        dbranch_bias = rows.pop() if ctx.branch_bias else None
        dweight, dbias = rows or (None, None)
        return dx, dbranch, dbranch_bias, dweight, dbias, None, None, None, None

    return gradient


_operator = operator(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor)",
    _forward,
    _fake,
)
_add_operator = operator(
    "add_layer_norm(Tensor x, Tensor branch, Tensor? branch_bias, Tensor? weight, Tensor? bias, "
    "Tensor? key, Tensor? counter, float p, float eps) -> (Tensor, Tensor, Tensor)",
    _add_forward,
    _fake_add,
)
_backward_operator = operator(
    "layer_norm_backward(Tensor grad, Tensor? grad_sum, Tensor total, Tensor stats, "
    "Tensor? weight, Tensor? key, Tensor? counter, float p, bool branch_bias) "
    "-> (Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)
differentiable(_operator, _gradient_by(_backward_operator), _setup)
differentiable(_add_operator, _add_gradient_by(_backward_operator), _add_setup)
once(_backward_operator, "layer_norm")
if library.available("cpu"):
    _cpu_operator = compiled("layer_norm_cpu", _fake)
    _cpu_add_operator = compiled("add_layer_norm_cpu", _fake_add)
    _cpu_backward_operator = compiled("layer_norm_backward_cpu", _fake_backward)
    differentiable(_cpu_operator, _gradient_by(_cpu_backward_operator), _setup)
    differentiable(_cpu_add_operator, _add_gradient_by(_cpu_backward_operator), _add_setup)
    once(_cpu_backward_operator, "layer_norm")
dispatch.register_triton("layer_norm", cpu=library.takes_rows)
