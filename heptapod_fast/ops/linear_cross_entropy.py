"""linear_cross_entropy: loss_r = logsumexp_v(z_r . W_v + b_v) - (z_r . W_y + b_y).

The logits are a product in the dtype of z; softmax statistics and the loss are float32.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def linear_cross_entropy(z_RD: Tensor, weight_VD: Tensor, bias_V: Tensor,
                         target_R: Tensor) -> Tensor:
    """z (R, D), weight (V, D), bias (V,), target (R,) int64 -> (R,) float32 loss in nats."""
    logits_RV = F.linear(z_RD, weight_VD.to(z_RD.dtype), bias_V.to(z_RD.dtype))
    return F.cross_entropy(logits_RV.float(), target_R, reduction="none")
