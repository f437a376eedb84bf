"""rms_norm, alone and behind a residual sum: the two places of a pre-norm LLaMA block.

    s = x + keep / (1 - p) * branch                  the residual stream, rounded to x's dtype
    n = s * r,   r = 1 / sqrt(mean(s^2) + eps)       over the last dimension, in float32
    y = n * weight                                   rounded once

    ds      = r * (g - n * mean(g * n)) + dsum,   g = weight * dy
    dbranch = keep / (1 - p) * ds
    dweight = sum over rows of dy * n

No mean is subtracted and there are no biases (Zhang and Sennrich 2019, as LLaMA has it:
llamagen:autoregressive/models/gpt.py, RMSNorm). y is computed from the rounded sum. Under autocast
upstream rounds n before it is multiplied by the weight; here the product is rounded, once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from heptapod_fast.ops import dispatch
from heptapod_fast.ops.checks import at_least_float32, check_like, check_rows, check_shape
from heptapod_fast.ops.dropout_mask import DropoutMask
from heptapod_fast.ops.operators import Context, Gradients, Inputs, differentiable, once, operator

MAX_WIDTH = 4096  # kernels/configs/rms_norm.json


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5, implementation: str = "auto") -> Tensor:
    """x (..., D) floating, weight (D,) float32 -> as x.

    implementation: "auto", "triton" (float32 or bfloat16, D up to MAX_WIDTH) or "reference". Raises
    ValueError if the weight does not fit.
    """
    check_rows("rms_norm", x=x, weight=weight)
    check_shape("rms_norm", x.shape[-1:], weight=weight)
    if _select(x, implementation) == "reference":
        return _reference(x, weight, eps)
    y, _ = _operator(x.contiguous(), weight.float().contiguous(), eps)
    return y


def add_rms_norm(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    mask: DropoutMask | None = None,
    eps: float = 1e-5,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(sum, rms_norm(sum)) with sum = x + dropout(branch), both as x.

    x, branch (..., D) of one dtype; weight (D,) float32; mask: dropout over the rows of branch.
    implementation: as for `rms_norm`. Raises ValueError if shapes, dtypes or the mask do not fit.
    """
    name = "add_rms_norm"
    check_rows(name, x=x, branch=branch, weight=weight, **DropoutMask.named(mask))
    check_shape(name, x.shape[-1:], weight=weight)
    check_like(name, x, branch=branch)
    mask = DropoutMask.checked(mask, name, x)
    if _select(x, implementation) == "reference":
        total = x + (branch if mask is None else mask.apply(branch))
        return total, _reference(total, weight, eps)
    total, y, _ = _add_operator(
        x.contiguous(),
        branch.contiguous(),
        weight.float().contiguous(),
        *DropoutMask.parts(mask),
        eps,
    )
    return total, y


def _select(x: Tensor, implementation: str) -> str:
    width = x.shape[-1]
    why = f"rows are {width} wide, at most {MAX_WIDTH} fit" if width > MAX_WIDTH else None
    return dispatch.select("rms_norm", x.device, x.dtype, implementation, why)


def _reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = at_least_float32(x)
    scale = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (wide * scale * weight).to(x.dtype)


# The operators and their gradients.


def _forward(x, weight, eps):
    from heptapod_fast.kernels import rms_norm as kernels

    _, y, scales = kernels.forward(x, None, weight, None, eps)
    return y, scales


def _add_forward(x, branch, weight, key, counter, p, eps):
    from heptapod_fast.kernels import rms_norm as kernels

    return kernels.forward(x, branch, weight, DropoutMask.of(key, counter, p), eps)


def _backward(grad, grad_sum, total, scales, weight, key, counter, p):
    from heptapod_fast.kernels import rms_norm as kernels

    mask = DropoutMask.of(key, counter, p)
    return kernels.backward(grad, grad_sum, total, scales, weight, mask)


def _scales_like(x: Tensor) -> Tensor:
    return x.new_empty(x.numel() // max(1, x.shape[-1]), dtype=torch.float32)


def _fake_backward(grad, grad_sum, total, scales, weight, key, counter, p):
    dbranch = total.new_empty(0) if key is None else torch.empty_like(total)
    return torch.empty_like(total), dbranch, torch.empty_like(weight)


def _setup(ctx: Context, inputs: Inputs, output: Any) -> None:
    x, weight, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, output[1], weight)


def _gradient(ctx: Context, grad: Tensor | None, _: None) -> Gradients:
    if grad is None:
        return None, None, None
    none = DropoutMask.parts(None)
    dx, _, dweight = _backward_operator(grad.contiguous(), None, *ctx.saved_tensors, *none)
    return dx, dweight, None


def _add_setup(ctx: Context, inputs: Inputs, output: Any) -> None:
    _, _, weight, key, counter, ctx.p, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[0], output[2], weight, key, counter)


def _add_gradient(ctx: Context, grad_sum: Tensor | None, grad: Tensor | None, _: None) -> Gradients:
    total, scales, weight, key, counter = ctx.saved_tensors
    if grad is None and grad_sum is None:
        return (None,) * 7
    # A sum without its norm is rare (no block does it): it need not be fast.
    grad = torch.zeros_like(total) if grad is None else grad.contiguous()
    grad_sum = None if grad_sum is None else grad_sum.contiguous()
    dx, dbranch, dweight = _backward_operator(
        grad, grad_sum, total, scales, weight, key, counter, ctx.p
    )
    if key is None:
        dbranch = dx  # without dropout they are the same
    return dx, dbranch, dweight, None, None, None, None


_operator = operator(
    "rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)",
    _forward,
    lambda x, *_: (torch.empty_like(x), _scales_like(x)),
)
_add_operator = operator(
    "add_rms_norm(Tensor x, Tensor branch, Tensor weight, Tensor? key, Tensor? counter, float p, "
    "float eps) -> (Tensor, Tensor, Tensor)",
    _add_forward,
    lambda x, *_: (torch.empty_like(x), torch.empty_like(x), _scales_like(x)),
)
_backward_operator = operator(
    "rms_norm_backward(Tensor grad, Tensor? grad_sum, Tensor total, Tensor scales, Tensor weight, "
    "Tensor? key, Tensor? counter, float p) -> (Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)
differentiable(_operator, _gradient, _setup)
differentiable(_add_operator, _add_gradient, _add_setup)
once(_backward_operator, "rms_norm")
dispatch.register_triton("rms_norm")
