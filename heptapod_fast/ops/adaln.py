"""adaln: gated residual, LayerNorm and modulation, what stands between the products of a DiT block.

    x'  = x + gate * (branch + branch_bias)                 rounded to the dtype of x
    n   = (x' - mean(x')) / sqrt(var(x') + eps)             statistics in float32
    u   = n * weight + bias
    v   = u * (1 + scale) + shift

    du  = dv * (1 + scale)      dshift = dv      dscale = dv * u
    dn  = du * weight           dweight, dbias = sums over rows of du * n, du
    dx  = dx' + rstd * (dn - mean(dn) - n * mean(dn * n))
    dbranch = gate * dx         dgate = (branch + branch_bias) * dx
    dbranch_bias = sum over rows of dbranch

gate, shift and scale differ from row to row (adaLN-Zero of Peebles and Xie 2023, as in
mar:models/diffloss.py). One pass over memory in each direction; kernels compute in float32 and
round once. Sums over rows are float32 in a fixed order, in two stages. The gradients of gate, shift
and scale are summed over rows in the same pass: whoever computes modulation by a product has its
bias gradient at hand (`ops.diffusion_mlp` does).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from heptapod_fast.ops import dispatch
from heptapod_fast.ops.checks import check_rows
from heptapod_fast.ops.operators import differentiable, once, operator

MAX_WIDTH = 4096  # columns that a program of the kernels holds in registers


def adaln(
    x: Tensor,
    branch: Tensor | None,
    branch_bias: Tensor | None,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-6,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor]:
    """x, branch, gate, shift, scale (R, W) of one dtype, the others (W,) float32 -> (x', v) (R, W).

    gate, shift and scale may be slices of a wider tensor. branch, branch_bias and gate are all None
    where nothing is added: x' is x then. weight and bias are both None without affine parameters.
    implementation: "auto", "triton" (float32 and bfloat16, W <= 4096) or "reference". Raises
    ValueError on shapes, dtypes or a choice of None that do not fit.
    """
    _check(x, branch, branch_bias, gate, shift, scale, weight, bias)
    width = x.shape[1]
    unsupported = None if width <= MAX_WIDTH else f"width {width} is above {MAX_WIDTH}"
    if dispatch.select("adaln", x.device, x.dtype, implementation, unsupported) == "reference":
        return reference(x, branch, branch_bias, gate, shift, scale, weight, bias, eps)
    branch, branch_bias, weight, bias = (
        None if a is None else a.contiguous() for a in (branch, branch_bias, weight, bias)
    )
    gate, shift, scale = (
        a if a is None or a.stride(1) == 1 else a.contiguous() for a in (gate, shift, scale)
    )
    x = x.contiguous()
    new, v, _ = _operator(x, branch, branch_bias, gate, shift, scale, weight, bias, eps)
    return (x if branch is None else new), v


def reference(
    x: Tensor,
    branch: Tensor | None,
    branch_bias: Tensor | None,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The definition, in the dtype of x."""
    if branch is not None:
        x = torch.addcmul(x, gate, branch + branch_bias.to(x.dtype))
    if weight is not None:
        weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    normal = F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return x, torch.addcmul(shift, normal, 1 + scale)


def _check(x, branch, branch_bias, gate, shift, scale, weight, bias) -> None:
    check_rows(
        "adaln",
        x=x,
        branch=branch,
        branch_bias=branch_bias,
        gate=gate,
        shift=shift,
        scale=scale,
        weight=weight,
        bias=bias,
    )
    for names, arguments in (
        ("branch, branch_bias and gate", (branch, branch_bias, gate)),
        ("weight and bias", (weight, bias)),
    ):
        if len({a is None for a in arguments}) > 1:
            raise ValueError(f"adaln takes {names} together or not at all")
    if x.dim() != 2:
        raise ValueError(f"adaln takes x of two dimensions, got {tuple(x.shape)}")
    for name, a in (("branch", branch), ("gate", gate), ("shift", shift), ("scale", scale)):
        if a is not None and (a.shape != x.shape or a.dtype != x.dtype):
            raise ValueError(
                f"adaln takes {name} like x, {x.dtype} {tuple(x.shape)}; got "
                f"{a.dtype} {tuple(a.shape)}"
            )
    for name, a in (("branch_bias", branch_bias), ("weight", weight), ("bias", bias)):
        if a is not None and a.shape != x.shape[1:]:
            raise ValueError(
                f"adaln takes {name} of shape {tuple(x.shape[1:])}; got {tuple(a.shape)}"
            )


def _branch(branch, branch_bias, gate):
    from heptapod_fast.kernels.adaln import Branch

    return None if branch is None else Branch(branch, branch_bias.float(), gate)


def _float(*parameters):
    return (None if p is None else p.float() for p in parameters)


def _forward(x, branch, branch_bias, gate, shift, scale, weight, bias, eps):
    from heptapod_fast.kernels import adaln as kernels

    new, v, stats = kernels.forward(
        x, _branch(branch, branch_bias, gate), shift, scale, *_float(weight, bias), eps
    )
    # An operator may not return its argument.
    return x.new_empty(0) if new is None else new, v, stats


def _forward_fake(x, branch, branch_bias, gate, shift, scale, weight, bias, eps):
    new = x.new_empty(0) if branch is None else torch.empty_like(x)
    return new, torch.empty_like(x), x.new_empty(2, x.shape[0], dtype=torch.float32)


def _backward(dnew, dv, x, branch, branch_bias, gate, scale, weight, bias, stats):
    from heptapod_fast.kernels import adaln as kernels

    dx, dbranch, dgate, dscale, sums = kernels.backward(
        dnew, dv, x, _branch(branch, branch_bias, gate), scale, *_float(weight, bias), stats
    )
    if branch is None:
        dbranch, dgate = x.new_empty(0), x.new_empty(0)
    return dx, dbranch, dgate, dscale, sums.view(6, -1)


def _backward_fake(dnew, dv, x, branch, *_):
    like = x if branch is not None else x.new_empty(0)
    return (
        torch.empty_like(x),
        torch.empty_like(like),
        torch.empty_like(like),
        torch.empty_like(x),
        x.new_empty(6, x.shape[1], dtype=torch.float32),
    )


def _setup(ctx, inputs, output) -> None:
    x, branch, branch_bias, gate, _, scale, weight, bias, _ = inputs
    new, _, stats = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(stats)
    ctx.save_for_backward(
        x if branch is None else new, branch, branch_bias, gate, scale, weight, bias, stats
    )


def _gradient(ctx, dnew, dv, _):
    x, branch, branch_bias, gate, scale, weight, bias, stats = ctx.saved_tensors
    dv = torch.zeros_like(x) if dv is None else dv.contiguous()
    dnew = None if dnew is None or branch is None else dnew.contiguous()
    dx, dbranch, dgate, dscale, sums = _backward_operator(
        dnew, dv, x, branch, branch_bias, gate, scale, weight, bias, stats
    )
    added = (None,) * 3
    if branch is not None:
        added = dbranch, sums[1].to(branch_bias.dtype), dgate
    affine = (None,) * 2 if weight is None else (sums[2].to(weight.dtype), sums[3].to(bias.dtype))
    return dx, *added, dv, dscale, *affine, None


_operator = operator(
    "adaln(Tensor x, Tensor? branch, Tensor? branch_bias, Tensor? gate, Tensor shift, Tensor scale,"
    " Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    strided=("gate", "shift", "scale"),
)
_backward_operator = operator(
    "adaln_backward(Tensor? dnew, Tensor dv, Tensor x, Tensor? branch, Tensor? branch_bias, "
    "Tensor? gate, Tensor scale, Tensor? weight, Tensor? bias, Tensor stats) -> (Tensor, Tensor, "
    "Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
    strided=("gate", "scale"),
)
differentiable(_operator, _gradient, _setup)
once(_backward_operator, "adaln")
dispatch.register_triton("adaln")
