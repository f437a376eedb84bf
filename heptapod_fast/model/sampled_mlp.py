"""The diffusion MLP as sampling runs it: float32, hundreds of times for each token, few rows.

The same function as `ops.diffusion_mlp` (tests hold it to that), arranged for a call that costs
more than its arithmetic. Suffixes: R rows, C channels, F width, K columns of all modulations.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from heptapod_fast.ops import DiffusionWeights

ROWS = 4096  # that are computed at once


class SampledMlp:
    """Weights put together for one token's steps: the modulations of all blocks are one product,
    and the 1 that is added to a scale is part of its bias."""

    def __init__(self, weights: DiffusionWeights, eps: float):
        self.weights = weights
        self.eps = eps
        self.width = len(weights.input_bias)
        products = [block.modulation_weight for block in weights.blocks]
        self.modulation_weight = torch.cat([*products, weights.modulation_weight])
        biases = [block.modulation_bias for block in weights.blocks]
        with_ones = [self._with_one(bias) for bias in (*biases, weights.modulation_bias)]
        self.modulation_bias = torch.cat(with_ones)

    def _with_one(self, bias: Tensor) -> Tensor:
        """Shift, scale + 1, and the gate where there is one."""
        one = torch.zeros_like(bias)
        one[self.width : 2 * self.width] = 1
        return bias + one

    def __call__(self, xt_RC: Tensor, y_RF: Tensor) -> Tensor:
        """Noisy tokens, and the sum of time embedding and condition -> (R, outputs) float32."""
        if len(xt_RC) > ROWS:  # the modulations of all blocks are wide
            parts = zip(xt_RC.split(ROWS), y_RF.split(ROWS), strict=True)
            return torch.cat([self(xt, y) for xt, y in parts])
        weights = self.weights
        width = (self.width,)
        modulation_RK = F.linear(F.silu(y_RF), self.modulation_weight, self.modulation_bias)
        *modulations, last_shift, last_scale = modulation_RK.split(self.width, dim=-1)
        x_RF = F.linear(xt_RC, weights.input_weight, weights.input_bias)
        for number, block in enumerate(weights.blocks):
            shift, scale, gate = modulations[3 * number : 3 * number + 3]
            normal = F.layer_norm(x_RF, width, block.norm_weight, block.norm_bias, self.eps)
            hidden = torch.addcmul(shift, normal, scale)
            hidden = F.silu(F.linear(hidden, block.fc1_weight, block.fc1_bias), inplace=True)
            x_RF.addcmul_(gate, F.linear(hidden, block.fc2_weight, block.fc2_bias))
        normal = F.layer_norm(x_RF, width, eps=self.eps)
        hidden = torch.addcmul(last_shift, normal, last_scale)
        return F.linear(hidden, weights.output_weight, weights.output_bias)
