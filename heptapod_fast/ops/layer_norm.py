"""layer_norm: y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias over the last dimension.

Statistics are computed in float32 whatever the dtype of x. Weight and bias are float32 masters;
they follow the dtype of x.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-6) -> Tensor:
    """x (..., D), weight and bias (D,) or None -> (..., D) in x's dtype."""
    if weight is not None:
        weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
