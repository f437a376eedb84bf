"""dropout: x * keep / (1 - p), with a mask that is computed where it is needed and never stored
(dropout_mask.py says how).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from heptapod_fast.ops import dispatch
from heptapod_fast.ops.checks import check_rows
from heptapod_fast.ops.dropout_mask import DropoutMask
from heptapod_fast.ops.operators import Context, Gradients, Inputs, differentiable, operator


def dropout(x: Tensor, mask: DropoutMask | None, implementation: str = "auto") -> Tensor:
    """x (..., D), mask over its rows (None or p = 0: x itself) -> the same shape and dtype.

    implementation: "auto", "triton" or "reference". Raises ValueError if the mask does not fit.
    """
    if mask is None or mask.p == 0.0:
        return x
    check_rows("dropout", x=x, **DropoutMask.named(mask))
    mask.check("dropout", x.numel() // max(1, x.shape[-1]))
    if dispatch.select("dropout", x.device, x.dtype, implementation) == "reference":
        return mask.apply(x)
    return _operator(x.contiguous(), *mask.arrays(), mask.p)


# The operator, whose gradient is itself.


def _kernel(x: Tensor, key_P2: Tensor, counter_N: Tensor, p: float) -> Tensor:
    from heptapod_fast.kernels.dropout import dropout as run

    return run(x, DropoutMask(key_P2, counter_N, p))


def _setup(ctx: Context, inputs: Inputs, output: Any) -> None:
    _, key_P2, counter_N, ctx.p = inputs
    ctx.save_for_backward(key_P2, counter_N)


def _backward(ctx: Context, grad: Tensor) -> Gradients:
    return _operator(grad.contiguous(), *ctx.saved_tensors, ctx.p), None, None, None


_operator = operator(
    "dropout(Tensor x, Tensor key, Tensor counter, float p) -> Tensor",
    _kernel,
    lambda x, key, counter, p: torch.empty_like(x),
)
differentiable(_operator, _backward, _setup)
dispatch.register_triton("dropout")
