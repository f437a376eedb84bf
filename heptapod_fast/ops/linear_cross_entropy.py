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

import torch
import torch.nn.functional as F
from torch import Tensor

from heptapod_fast.ops import dispatch
from heptapod_fast.ops.checks import check_rows
from heptapod_fast.ops.operators import differentiable, once, operator

MOST_TARGETS = 16
NO_INDEX = torch.iinfo(torch.int64).min  # -100 is out of range, not a target to be ignored
MAX_WIDTH, MAX_CODES = 65_536, 1_000_000  # kernels/configs/linear_cross_entropy.json


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
    (R,) or (R, K) int64, K <= 16, repeats allowed; row_weight (R,): numbers without a gradient,
    None for 1. A row of weight 0 adds nothing, whatever it holds, and if it is finite it
    has no gradient. chunk: rows whose logits are held at a time
    (default: from the table), for the kernels alone. implementation: "auto", "triton" or
    "reference". Raises ValueError on shapes, dtypes of targets or chunks that do not fit.
    """
    _check(z_RD, weight_VD, bias_V, target, row_weight_R, chunk)
    row_weight_R = None if row_weight_R is None else row_weight_R.detach()
    unsupported = None
    if z_RD.shape[1] > MAX_WIDTH or len(weight_VD) > MAX_CODES:
        unsupported = (
            f"{len(weight_VD)} codes and width {z_RD.shape[1]}, where {MAX_CODES} and "
            f"{MAX_WIDTH} are the most"
        )
    if (
        dispatch.select(
            "linear_cross_entropy", z_RD.device, z_RD.dtype, implementation, unsupported
        )
        == "reference"
    ):
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


def _check(z_RD, weight_VD, bias_V, target, row_weight_R, chunk) -> None:
    name = "linear_cross_entropy"
    check_rows(name, z=z_RD, weight=weight_VD, bias=bias_V, target=target, row_weight=row_weight_R)
    rows = len(z_RD)
    if z_RD.dim() != 2 or weight_VD.dim() != 2 or z_RD.shape[1] != weight_VD.shape[1]:
        raise ValueError(
            f"{name} takes z (R, D) and weight (V, D), got {tuple(z_RD.shape)} and "
            f"{tuple(weight_VD.shape)}"
        )
    if bias_V.shape != weight_VD.shape[:1]:
        raise ValueError(
            f"{name} takes a bias of shape {tuple(weight_VD.shape[:1])}, got {tuple(bias_V.shape)}"
        )
    if (
        target.dtype != torch.int64
        or target.dim() not in (1, 2)
        or len(target) != rows
        or target.dim() == 2
        and not 1 <= target.shape[1] <= MOST_TARGETS
    ):
        raise ValueError(
            f"{name} takes int64 targets ({rows},) or ({rows}, K) with K from 1 to "
            f"{MOST_TARGETS}, got {target.dtype} {tuple(target.shape)}"
        )
    if row_weight_R is not None and row_weight_R.shape != (rows,):
        raise ValueError(
            f"{name} takes row weights of shape ({rows},), got {tuple(row_weight_R.shape)}"
        )
    if chunk is not None and chunk < 1:
        raise ValueError(f"{name} works on chunks of at least 1 row, got {chunk}")


def _reference(z_RD, weight_VD, bias_V, target, row_weight_R) -> tuple[Tensor, Tensor]:
    logits_RV = F.linear(z_RD, weight_VD.to(z_RD.dtype), bias_V.to(z_RD.dtype)).float()
    if target.dim() == 1:
        loss_R = F.cross_entropy(logits_RV, target, reduction="none", ignore_index=NO_INDEX)
    else:
        loss_R = logits_RV.logsumexp(1) - logits_RV.gather(1, target).mean(1)
    if row_weight_R is None:
        return loss_R.sum(), loss_R.detach()
    weighted_R = torch.where(row_weight_R == 0, 0.0, loss_R * row_weight_R.float())
    return weighted_R.sum(), loss_R.detach()


def _forward(z, weight, bias, target, row_weight, chunk, gradients):
    from heptapod_fast.kernels import linear_cross_entropy as kernels

    return kernels.forward(z, weight, bias, target, row_weight, chunk, gradients)


def _fake(z, weight, bias, target, row_weight, chunk, gradients):
    single = dict(dtype=torch.float32, device=z.device)
    made = [z.new_empty(0), torch.empty(0, **single), torch.empty(0, **single)]
    if gradients:
        made = [
            torch.empty_like(z),
            torch.empty(weight.shape, **single),
            torch.empty(bias.shape, **single),
        ]
    return torch.empty((), **single), torch.empty(z.shape[0], **single), *made


def _setup(ctx, inputs, output) -> None:
    z, weight, bias, *_, ctx.gradients = inputs
    ctx.dtypes = weight.dtype, bias.dtype
    # Only the total has a gradient; the others come as None instead of as zeros to be made.
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(z, *output[2:])


def _gradient(ctx, grad_total: Tensor | None, *_):
    if not ctx.gradients:
        raise RuntimeError("linear_cross_entropy was told that no gradients are wanted")
    if grad_total is None:
        return (None,) * 7
    z, dz, dweight, dbias = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    return (
        _scale_operator(dz, grad_total, z) if wanted[0] else None,
        (dweight * grad_total).to(ctx.dtypes[0]) if wanted[1] else None,
        (dbias * grad_total).to(ctx.dtypes[1]) if wanted[2] else None,
        None,
        None,
        None,
        None,
    )


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
