"""swiglu: silu(gate) * value, what stands between the products of a LLaMA MLP.

    y      = gate * sigmoid(gate) * value
    dgate  = dy * value * sigmoid(gate) * (1 + gate * (1 - sigmoid(gate)))
    dvalue = dy * silu(gate)

gate and value are the two products of one input (w1 and w3 of
llamagen:autoregressive/models/gpt.py, FeedForward).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from heptapod_fast.ops import dispatch
from heptapod_fast.ops.checks import check_like


def swiglu(gate: Tensor, value: Tensor, implementation: str = "auto") -> Tensor:
    """gate, value (..., F) of one floating dtype -> the same.

    implementation: "auto" or "reference". Raises ValueError if they are not alike.
    """
    check_like("swiglu", gate, value=value)
    dispatch.select("swiglu", gate.device, gate.dtype, implementation)
    return F.silu(gate) * value


dispatch.register("swiglu", "reference", lambda device, dtype: None)
