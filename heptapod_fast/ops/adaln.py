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

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from heptapod_fast.ops import dispatch
from heptapod_fast.ops.adaln_sums import Sums
from heptapod_fast.ops.checks import check_like, check_rows, check_shape, check_together, refusal
from heptapod_fast.ops.operators import Context, Gradients, Inputs, differentiable, once, operator

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
    """x, branch, gate, shift, scale (R, F) of one dtype, the others (F,) float32 -> (x', v) (R, F).

    gate, shift and scale may be slices of a wider tensor. branch, branch_bias and gate are all None
    where nothing is added: x' is x then. weight and bias are both None without affine parameters.
    implementation: "auto", "triton" (float32 and bfloat16, F <= 4096) or "reference". Raises
    ValueError on shapes, dtypes or a choice of None that do not fit.
    """
    _check(x, branch, branch_bias, gate, shift, scale, weight, bias)
    width = x.shape[1]
    unsupported = None if width <= MAX_WIDTH else f"width {width} is above {MAX_WIDTH}"
    chosen = dispatch.select("adaln", x.device, x.dtype, implementation, unsupported)
    if chosen == "reference":
        return reference(x, branch, branch_bias, gate, shift, scale, weight, bias, eps)
    x = x.contiguous()
    new, v, _ = _operator(
        x,
        _contiguous(branch),
        _contiguous(branch_bias),
        _contiguous_rows(gate),
        _contiguous_rows(shift),
        _contiguous_rows(scale),
        _contiguous(weight),
        _contiguous(bias),
        eps,
    )
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
        assert branch_bias is not None and gate is not None  # _check saw to it
        x = torch.addcmul(x, gate, branch + branch_bias.to(x.dtype))
    if weight is not None and bias is not None:
        weight = weight.to(x.dtype)
        bias = bias.to(x.dtype)
    normal = F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return x, torch.addcmul(shift, normal, 1 + scale)


def _check(
    x: Tensor,
    branch: Tensor | None,
    branch_bias: Tensor | None,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
) -> None:
    name = "adaln"
    others = dict(branch=branch, gate=gate, shift=shift, scale=scale)
    vectors = dict(branch_bias=branch_bias, weight=weight, bias=bias)
    check_rows(name, x=x, **others, **vectors)
    check_together(name, branch=branch, branch_bias=branch_bias, gate=gate)
    check_together(name, weight=weight, bias=bias)
    if x.dim() != 2:
        raise refusal(name, "x of two dimensions", x.shape)
    check_like(name, x, **others)
    for vector_name, vector in vectors.items():
        check_shape(name, x.shape[1:], **{vector_name: vector})


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _contiguous_rows(x: Tensor | None) -> Tensor | None:
    """x with each row contiguous: the kernels take any stride between rows."""
    return x if x is None or x.stride(1) == 1 else x.contiguous()


# The operator and its gradient.


def _branch(branch, branch_bias, gate):
    """The kernels' Branch, or None."""
    from heptapod_fast.kernels.adaln import Branch

    return None if branch is None else Branch(branch, branch_bias.float(), gate)


def _float(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.float()


def _forward(x, branch, branch_bias, gate, shift, scale, weight, bias, eps):
    from heptapod_fast.kernels import adaln as kernels

    added = _branch(branch, branch_bias, gate)
    new, v, stats = kernels.forward(x, added, shift, scale, _float(weight), _float(bias), eps)
    # An operator may not return its argument.
    return x.new_empty(0) if new is None else new, v, stats


def _forward_fake(x, branch, branch_bias, gate, shift, scale, weight, bias, eps):
    new = x.new_empty(0) if branch is None else torch.empty_like(x)
    stats = x.new_empty(2, x.shape[0], dtype=torch.float32)
    return new, torch.empty_like(x), stats


def _backward(dnew, dv, x, branch, branch_bias, gate, scale, weight, bias, stats):
    from heptapod_fast.kernels import adaln as kernels

    added = _branch(branch, branch_bias, gate)
    dx, dbranch, dgate, dscale, sums = kernels.backward(
        dnew, dv, x, added, scale, _float(weight), _float(bias), stats
    )
    if branch is None:
        dbranch = x.new_empty(0)
        dgate = x.new_empty(0)
    return dx, dbranch, dgate, dscale, sums.view(len(Sums._fields), -1)


def _backward_fake(dnew, dv, x, branch, *_):
    like = x if branch is not None else x.new_empty(0)
    sums = x.new_empty(len(Sums._fields), x.shape[1], dtype=torch.float32)
    return (
        torch.empty_like(x),
        torch.empty_like(like),
        torch.empty_like(like),
        torch.empty_like(x),
        sums,
    )


def _setup(ctx: Context, inputs: Inputs, output: Any) -> None:
    x, branch, branch_bias, gate, _, scale, weight, bias, _ = inputs
    new, _, stats = output
    added = x if branch is None else new
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(stats)
    ctx.save_for_backward(added, branch, branch_bias, gate, scale, weight, bias, stats)


def _gradient(ctx: Context, dnew: Tensor | None, dv: Tensor | None, _: None) -> Gradients:
    x, branch, branch_bias, gate, scale, weight, bias, stats = ctx.saved_tensors
    dv = torch.zeros_like(x) if dv is None else dv.contiguous()
    # Without a branch x' is x itself and not this operator's result: autograd adds its gradient.
    dnew = None if dnew is None or branch is None else dnew.contiguous()
    dx, dbranch, dgate, dscale, sums = _backward_operator(
        dnew, dv, x, branch, branch_bias, gate, scale, weight, bias, stats
    )
    sums = Sums(*sums)
    dbranch_bias = None
    if branch is None:
        dbranch = None
        dgate = None
    else:
        dbranch_bias = sums.branch_bias.to(branch_bias.dtype)
    dweight = None if weight is None else sums.weight.to(weight.dtype)
    dbias = None if weight is None else sums.bias.to(bias.dtype)
    return dx, dbranch, dbranch_bias, dgate, dv, dscale, dweight, dbias, None


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
