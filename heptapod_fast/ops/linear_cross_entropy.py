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

"chunked" does the like in plain PyTorch, where dW of a chunk is rounded to the dtype of z before it
is added up. It is what "auto" means where there are no kernels, and many codes and rows: 8
sequences of 256 codes out of 16384 are 33 million logits, which the reference keeps several times
over, in float32.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from heptapod_fast.ops import dispatch
from heptapod_fast.ops.checks import check_rows, check_shape, refusal
from heptapod_fast.ops.operators import (
    Context,
    Gradients,
    Inputs,
    differentiable,
    once,
    operator,
    second_derivative,
)

MOST_TARGETS = 64  # a patch of 8 x 8 codes
NO_INDEX = torch.iinfo(torch.int64).min  # -100 is out of range, not a target to be ignored
# "chunked" has this many bytes of logits at a time, in the dtype of z, and turns this many of them
# into float32 at a time. From MANY_CODES codes on it takes over where the reference would hold more
# float32 than that: at 16384 codes from 129 rows on.
MOST_HELD = 2**26
MOST_FLOATS = 2**21
MANY_CODES = 4096
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
    gradient. chunk: rows whose logits are held at a time (default: from the table of the kernels,
    what MOST_HELD allows for "chunked"). implementation: "auto", "triton", "chunked" or
    "reference". Raises ValueError on shapes, dtypes of targets or chunks that do not fit.
    """
    _check(z_RD, weight_VD, bias_V, target, row_weight_R, chunk)
    row_weight_R = None if row_weight_R is None else row_weight_R.detach()
    chosen = _select(z_RD, weight_VD, implementation)
    if chosen == "reference":
        return _reference(z_RD, weight_VD, bias_V, target, row_weight_R)
    gradients = torch.is_grad_enabled() and (
        z_RD.requires_grad or weight_VD.requires_grad or bias_V.requires_grad
    )
    if chosen == "chunked":
        with torch.autocast(z_RD.device.type, enabled=False):
            total, loss_R, *_ = _Chunked.apply(
                z_RD, weight_VD, bias_V, target, row_weight_R, chunk, gradients
            )
        return total, loss_R
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
        "linear_cross_entropy",
        z_RD.device,
        z_RD.dtype,
        implementation,
        {"triton": unsupported},
        passed_over(len(z_RD), codes),
    )


def passed_over(rows: int, codes: int) -> dict[str, str | None]:
    """What "auto" passes over for so many rows and codes, and why."""
    is_large = codes >= MANY_CODES and rows * codes > MOST_FLOATS
    return {"chunked": None if is_large else "logits are few enough to be held"}


def _reference(
    z_RD: Tensor, weight_VD: Tensor, bias_V: Tensor, target: Tensor, row_weight_R: Tensor | None
) -> tuple[Tensor, Tensor]:
    logits_RV = F.linear(z_RD, weight_VD.to(z_RD.dtype), bias_V.to(z_RD.dtype)).float()
    if target.dim() == 1:
        loss_R = F.cross_entropy(logits_RV, target, reduction="none", ignore_index=NO_INDEX)
    else:
        loss_R = logits_RV.logsumexp(1) - logits_RV.gather(1, target).mean(1)
    return _weighted_sum(loss_R, row_weight_R), loss_R.detach()


def _weighted_sum(loss_R: Tensor, row_weight_R: Tensor | None) -> Tensor:
    """Rows of weight 0 add nothing, whatever they hold: inf * 0 would be NaN."""
    if row_weight_R is None:
        return loss_R.sum()
    return torch.where(row_weight_R == 0, 0.0, loss_R * row_weight_R.float()).sum()


def _chunk_rows(rows: int, codes: int, dtype: torch.dtype, most: int | None) -> int:
    """Rows of a chunk: at most `most`, or what MOST_HELD allows, and all chunks alike, for a small
    one at the end would read the weight for few rows. In float32 there are two or more, so that
    not even few rows have all their logits in float32 at once."""
    if most is None:
        most = max(1, MOST_HELD // (codes * dtype.itemsize))
    chunks = -(-rows // most)
    if dtype == torch.float32:
        chunks = max(2, chunks)
    return max(1, -(-rows // max(1, chunks)))


def _losses(
    logits_CV: Tensor,
    target_CK: Tensor,
    row_weight_C: Tensor | None = None,
    dbias_V: Tensor | None = None,
) -> Tensor:
    """(C,) float32 losses of the rows of a chunk; softmax for few of them at a time.

    Given dbias_V, the logits become their gradient, weight * (softmax - hits), whose sum over rows
    is added to it before it is rounded.
    """
    few = max(1, MOST_FLOATS // logits_CV.shape[1])
    losses = []
    for first in range(0, len(logits_CV), few):
        part = slice(first, first + few)
        logits_SV = logits_CV[part]
        target_SK = target_CK[part]
        log_softmax_SV = torch.log_softmax(logits_SV, dim=1, dtype=torch.float32)
        losses.append(-log_softmax_SV.gather(1, target_SK).mean(1))
        if dbias_V is None:
            continue
        dlogits_SV = log_softmax_SV.exp_()  # in the memory of the logarithms
        share_SK = torch.full_like(target_SK, -1 / target_SK.shape[1], dtype=torch.float32)
        dlogits_SV.scatter_add_(1, target_SK, share_SK)
        if row_weight_C is not None:
            weight_S1 = row_weight_C[part, None].float()
            dlogits_SV.mul_(weight_S1).masked_fill_(weight_S1 == 0, 0.0)
        dbias_V += dlogits_SV.sum(0)
        logits_SV.copy_(dlogits_SV)
    return torch.cat(losses)


class _Chunked(torch.autograd.Function):
    """Loss and gradients together, some rows at a time."""

    @staticmethod
    def forward(z_RD, weight_VD, bias_V, target, row_weight_R, chunk, gradients):
        rows = len(z_RD)
        codes = len(weight_VD)
        dtype = z_RD.dtype
        weight_rounded_VD = weight_VD.to(dtype)
        bias_rounded_V = bias_V.to(dtype)
        target_RK = target if target.dim() == 2 else target[:, None]
        float32 = dict(dtype=torch.float32, device=z_RD.device)
        loss_R = torch.empty(rows, **float32)
        dz_RD = torch.empty_like(z_RD) if gradients else z_RD.new_empty(0)
        dweight_VD = torch.zeros(weight_VD.shape if gradients else 0, **float32)
        dbias_V = torch.zeros(codes if gradients else 0, **float32)

        size = _chunk_rows(rows, codes, dtype, chunk)
        for start in range(0, rows, size):
            part = slice(start, start + size)
            logits_CV = F.linear(z_RD[part], weight_rounded_VD, bias_rounded_V)
            if not gradients:
                loss_R[part] = _losses(logits_CV, target_RK[part])
                continue
            row_weight_C = None if row_weight_R is None else row_weight_R[part]
            loss_R[part] = _losses(logits_CV, target_RK[part], row_weight_C, dbias_V)
            # From here on the logits are dlogits.
            torch.mm(logits_CV, weight_rounded_VD, out=dz_RD[part])
            if dtype == torch.float32:
                dweight_VD.addmm_(logits_CV.t(), z_RD[part])
            else:
                dweight_VD += logits_CV.t() @ z_RD[part]

        total = _weighted_sum(loss_R, row_weight_R)
        return total, loss_R, dz_RD, dweight_VD, dbias_V

    @staticmethod
    def setup_context(ctx, inputs, output):
        z_RD, weight_VD, bias_V, *_ = inputs
        _, *others = output
        ctx.mark_non_differentiable(*others)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(z_RD, weight_VD, bias_V, *others[1:])

    @staticmethod
    def backward(ctx, grad_total, *_):
        if grad_total is None:
            return (None,) * 7
        *arguments, dz_RD, dweight_VD, dbias_V = ctx.saved_tensors
        gradients = (dz_RD, dweight_VD, dbias_V)
        scaled = [
            _ScaledOnce.apply(gradient, grad_total, argument) if is_wanted else None
            for gradient, argument, is_wanted in zip(
                gradients, arguments, ctx.needs_input_grad, strict=False
            )
        ]
        return *scaled, None, None, None, None


class _ScaledOnce(torch.autograd.Function):
    """A gradient times a factor, in the dtype of what it is the gradient of: an argument, so that a
    second derivative is refused, not forgotten."""

    @staticmethod
    def forward(gradient, factor, argument):
        return (gradient.float() * factor).to(argument.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        """Nothing is kept."""

    @staticmethod
    def backward(ctx, grad):
        raise second_derivative("linear_cross_entropy")


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
dispatch.register(
    "linear_cross_entropy", "triton", dispatch.triton_check, avoid=dispatch.avoid_interpreter
)
dispatch.register("linear_cross_entropy", "chunked", lambda device, dtype: None)
dispatch.register("linear_cross_entropy", "reference", lambda device, dtype: None)
