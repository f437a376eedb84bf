"""linear_cross_entropy: the weighted sum of cross-entropies of logits that are a linear layer.

    logits_r = z_r W^T + b
    loss_r   = logsumexp_v(logits_rv) - mean_k logits_r[target_rk]           in nats
    total    = sum_r weight_r * loss_r

    dlogits  = weight_r * (softmax(logits_r) - mean_k onehot(target_rk))
    dz       = dlogits W,   dW = dlogits^T z,   db = sum_r dlogits_r         times the total's own

K = 1 is the usual loss; NPP scores one set of logits against the K codes of a patch. The logits are
a product in the dtype of z, rounded once; softmax and loss are float32.

The kernels make the gradients together with the loss, chunk by chunk, so that no logits outlive
their chunk: dlogits are rounded to the dtype of z once, dW and db are float32 throughout and are
multiplied by the total's gradient in the backward pass. A target outside 0..V-1 raises in the
reference on CPU; the kernels take its logit for 0 and leave its onehot away, because finding out
would mean waiting for the device. There is no index to be ignored: give such rows the weight 0.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from heptapod_fast.ops import dispatch
from heptapod_fast.ops.checks import check_rows, check_shape, refusal
from heptapod_fast.ops.operators import Context, Gradients, Inputs, differentiable, once, operator

MOST_TARGETS = 64  # a patch of 8 x 8 codes
NO_INDEX = torch.iinfo(torch.int64).min  # -100 is out of range, not a target to be ignored
# kernels/configs/linear_cross_entropy.json
MAX_WIDTH = 65_536
MAX_CODES = 1_000_000


def linear_cross_entropy(
    z_RD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor,
    target: Tensor,
    row_weight_R: Tensor | None = None,
    chunk: int | None = None,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor]:
    """-> (total (), float32, differentiable in z, weight and bias; losses (R,), float32, without).

    z (R, D) float32 or bfloat16; weight (V, D) and bias (V,), which follow the dtype of z; target
    (R,) or (R, K) int64, K <= 64, repeats allowed; row_weight (R,): numbers without a gradient,
    None for 1. A row of weight 0 adds nothing, whatever it holds, and if it is finite it has no
    gradient. chunk: rows whose logits are held at a time (default: from the table), for the kernels
    alone. implementation: "auto", "triton" or "reference". Raises ValueError on shapes, dtypes of
    targets or chunks that do not fit.
    """
    _check(z_RD, weight_VD, bias_V, target, row_weight_R, chunk)
    row_weight_R = None if row_weight_R is None else row_weight_R.detach()
    if _select(z_RD, weight_VD, implementation) == "reference":
        return _reference(z_RD, weight_VD, bias_V, target, row_weight_R)
    gradients = torch.is_grad_enabled() and (
        z_RD.requires_grad or weight_VD.requires_grad or bias_V.requires_grad
    )
    total, loss_R, *_ = _operator(
        z_RD.contiguous(),
        weight_VD.contiguous(),
        bias_V.contiguous(),
        (target if target.dim() == 2 else target[:, None]).contiguous(),
        None if row_weight_R is None else row_weight_R.float().contiguous(),
        chunk,
        gradients,
    )
    return total, loss_R


def _check(
    z_RD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor,
    target: Tensor,
    row_weight_R: Tensor | None,
    chunk: int | None,
) -> None:
    name = "linear_cross_entropy"
    check_rows(name, z=z_RD, weight=weight_VD, bias=bias_V, target=target, row_weight=row_weight_R)
    rows = len(z_RD)
    if z_RD.dim() != 2 or weight_VD.dim() != 2 or z_RD.shape[1] != weight_VD.shape[1]:
        raise refusal(name, "z (R, D) and weight (V, D)", z_RD.shape, weight_VD.shape)
    check_shape(name, weight_VD.shape[:1], bias=bias_V)
    one_each = target.shape == (rows,)
    several = target.dim() == 2 and len(target) == rows and 1 <= target.shape[1] <= MOST_TARGETS
    if target.dtype != torch.int64 or not (one_each or several):
        targets = f"int64 targets ({rows},) or ({rows}, K) with K from 1 to {MOST_TARGETS}"
        raise refusal(name, targets, target)
    check_shape(name, (rows,), **{"row weights": row_weight_R})
    if chunk is not None and chunk < 1:
        raise ValueError(f"{name} works on chunks of at least 1 row, got {chunk}")


def _select(z_RD: Tensor, weight_VD: Tensor, implementation: str) -> str:
    codes, width = weight_VD.shape
    unsupported = None
    if width > MAX_WIDTH or codes > MAX_CODES:
        unsupported = (
            f"{codes} codes and width {width}, where {MAX_CODES} and {MAX_WIDTH} are the most"
        )
    return dispatch.select(
        "linear_cross_entropy", z_RD.device, z_RD.dtype, implementation, unsupported
    )


def _reference(
    z_RD: Tensor, weight_VD: Tensor, bias_V: Tensor, target: Tensor, row_weight_R: Tensor | None
) -> tuple[Tensor, Tensor]:
    logits_RV = F.linear(z_RD, weight_VD.to(z_RD.dtype), bias_V.to(z_RD.dtype)).float()
    if target.dim() == 1:
        loss_R = F.cross_entropy(logits_RV, target, reduction="none", ignore_index=NO_INDEX)
    else:
        loss_R = logits_RV.logsumexp(1) - logits_RV.gather(1, target).mean(1)
    if row_weight_R is None:
        return loss_R.sum(), loss_R.detach()
    weighted_R = torch.where(row_weight_R == 0, 0.0, loss_R * row_weight_R.float())
    return weighted_R.sum(), loss_R.detach()


# The operators: gradients are made with the loss and scaled when the total's own is known.


def _forward(z, weight, bias, target, row_weight, chunk, gradients):
    from heptapod_fast.kernels import linear_cross_entropy as kernels

    return kernels.forward(z, weight, bias, target, row_weight, chunk, gradients)


def _fake(z, weight, bias, target, row_weight, chunk, gradients):
    float32 = dict(dtype=torch.float32, device=z.device)
    total = torch.empty((), **float32)
    loss = torch.empty(z.shape[0], **float32)
    dz = torch.empty_like(z) if gradients else z.new_empty(0)
    dweight = torch.empty(weight.shape if gradients else 0, **float32)
    dbias = torch.empty(bias.shape if gradients else 0, **float32)
    return total, loss, dz, dweight, dbias


def _setup(ctx: Context, inputs: Inputs, output: Any) -> None:
    z, weight, bias, *_, ctx.gradients = inputs
    ctx.dtypes = weight.dtype, bias.dtype
    # Only the total has a gradient; the others come as None instead of as zeros to be made.
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(z, *output[2:])


def _gradient(ctx: Context, grad_total: Tensor | None, *_: None) -> Gradients:
    if not ctx.gradients:
        raise RuntimeError("linear_cross_entropy was told that no gradients are wanted")
    if grad_total is None:
        return (None,) * 7
    z, dz, dweight, dbias = ctx.saved_tensors
    z_wanted, weight_wanted, bias_wanted, *_ = ctx.needs_input_grad
    weight_dtype, bias_dtype = ctx.dtypes
    dz = _scale_operator(dz, grad_total, z) if z_wanted else None
    dweight = (dweight * grad_total).to(weight_dtype) if weight_wanted else None
    dbias = (dbias * grad_total).to(bias_dtype) if bias_wanted else None
    return dz, dweight, dbias, None, None, None, None


def _scale(x: Tensor, factor: Tensor, z: Tensor) -> Tensor:
    from heptapod_fast.kernels import linear_cross_entropy as kernels

    return kernels.scale(x, factor)


_scale_operator = operator(
    "linear_cross_entropy_backward(Tensor dz, Tensor grad, Tensor z) -> Tensor",
    _scale,
    lambda dz, grad, z: torch.empty_like(dz),
)
_operator = operator(
    "linear_cross_entropy(Tensor z, Tensor weight, Tensor bias, Tensor target, Tensor? row_weight, "
    "int? chunk, bool gradients) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _fake,
)
differentiable(_operator, _gradient, _setup)
# z is an argument so that a second derivative is refused instead of forgotten.
once(_scale_operator, "linear_cross_entropy")
dispatch.register_triton("linear_cross_entropy")
