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

from torch import Tensor

from heptapod_fast.ops import dispatch
from heptapod_fast.ops.checks import at_least_float32, check_like, check_rows, check_shape
from heptapod_fast.ops.dropout_mask import DropoutMask


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5, implementation: str = "auto") -> Tensor:
    """x (..., D) floating, weight (D,) float32 -> as x.

    implementation: "auto" or "reference". Raises ValueError if the weight does not fit.
    """
    check_rows("rms_norm", x=x, weight=weight)
    check_shape("rms_norm", x.shape[-1:], weight=weight)
    dispatch.select("rms_norm", x.device, x.dtype, implementation)
    return _reference(x, weight, eps)


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
    dispatch.select("rms_norm", x.device, x.dtype, implementation)
    total = x + (branch if mask is None else mask.apply(branch))
    return total, _reference(total, weight, eps)


def _reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = at_least_float32(x)
    scale = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (wide * scale * weight).to(x.dtype)


dispatch.register("rms_norm", "reference", lambda device, dtype: None)
