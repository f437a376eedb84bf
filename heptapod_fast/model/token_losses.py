"""Token losses: the distribution of one token given one vector z of the head.

Both classes answer `loss(z, target, ...) -> (total, loss_R)` and say how a token is drawn from z:
the weighted sum over rows, which is what gradients flow from, and the loss of each row for records.
Suffixes: R rows, D width of z, V codes, C channels of a continuous token, W width of the diffusion
MLP, T = 1000 diffusion steps.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heptapod_fast import ops
from heptapod_fast.model.transformer import EPS, LayerNorm, Linear
from heptapod_fast.ops.diffusion_mlp import (
    BlockWeights,
    DiffusionWeights,
    diffusion_mlp,
    reference_of_sum,
)
from heptapod_fast.rng import Rng


def weighted_sum(loss_R: Tensor, weight_R: Tensor | None) -> tuple[Tensor, Tensor]:
    """(sum of loss * weight, the losses without their graph); weight None: 1 everywhere."""
    total = loss_R.sum() if weight_R is None else (loss_R * weight_R).sum()
    return total, loss_R.detach()


class Categorical(nn.Module):
    """Discrete tokens: a linear layer to V logits, cross-entropy."""

    def __init__(self, width: int, vocabulary: int):
        super().__init__()
        self.output = Linear(width, vocabulary, init="normal")

    def loss(
        self,
        z_RD: Tensor,
        target_R: Tensor,
        rng: Rng,
        index_R: Tensor,
        slot_R: Tensor,
        weight_R: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Nats; rng, index and slot are not used."""
        return ops.linear_cross_entropy(
            z_RD, self.output.weight, self.output.bias, target_R, weight_R
        )

    def logits(self, z_RD: Tensor) -> Tensor:
        """(R, V) float32."""
        return self.output(z_RD).float()


class ResBlock(nn.Module):
    """Parameters of x + gate * MLP(LayerNorm(x) * (1 + scale) + shift), modulated by SiLU(y)."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = LayerNorm(width, eps=EPS)
        self.fc1 = Linear(width, width)
        self.fc2 = Linear(width, width)
        self.modulation = Linear(width, 3 * width, init="zero")

    def weights(self) -> BlockWeights:
        """What `ops.diffusion_mlp` takes."""
        layers = (self.norm, self.fc1, self.fc2, self.modulation)
        return BlockWeights(*(p for layer in layers for p in (layer.weight, layer.bias)))


class Diffusion(nn.Module):
    """Continuous tokens: MAR's diffusion MLP (mar:models/diffloss.py) and its loss.

    Layers and initialisation as upstream; the work is arranged differently: the conditioning is
    projected once per token instead of once per noise, SiLU(y) is taken once for all blocks, and
    timesteps are embedded through a table of the 1000 values.
    """

    def __init__(
        self, width: int, channels: int, blocks: int, mlp_width: int, repeat: int, bound: bool
    ):
        super().__init__()
        self.channels, self.repeat, self.bound = channels, repeat, bound
        self.time1 = Linear(256, mlp_width, init="normal")
        self.time2 = Linear(mlp_width, mlp_width, init="normal")
        self.condition = Linear(width, mlp_width)
        self.input = Linear(channels, mlp_width)
        self.blocks = nn.ModuleList(ResBlock(mlp_width) for _ in range(blocks))
        self.modulation = Linear(mlp_width, 2 * mlp_width, init="zero")
        self.output = Linear(mlp_width, 2 * channels, init="zero")
        tables = ops.schedule_tables(ops.cosine_betas())
        self.register_buffer("tables", tables, persistent=False)
        self.register_buffer("sinusoids", timestep_features(len(tables[0])), persistent=False)

    def loss(
        self,
        z_RD: Tensor,
        target_RC: Tensor,
        rng: Rng,
        index_R: Tensor,
        slot_R: Tensor,
        weight_R: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Mean over `repeat` fresh (timestep, noise) pairs per token.

        Draws are keyed by the global sample index and a slot that tells the rows of a sample apart.
        """
        draws = ops.Draws(
            index_R, slot_R, self.repeat, rng.key("diffusion.time"), rng.key("diffusion.noise")
        )
        xt, t = ops.diffusion_inputs(target_RC, draws, self.tables)
        prediction = self.net(xt, t, self.condition(z_RD))
        loss = ops.diffusion_loss(prediction, target_RC, xt, t, draws, self.tables, self.bound)
        return weighted_sum(loss, weight_R)

    def net(self, xt_RC: Tensor, t_R: Tensor, condition_MW: Tensor) -> Tensor:
        """Noisy tokens, timesteps and projected conditions -> (R, 2C) float32: (eps_hat, v).

        There are R / M rows in a row to each condition.
        """
        time_TW = self.embed_time(condition_MW.dtype)
        return diffusion_mlp(xt_RC, t_R, time_TW, condition_MW, self.weights(), EPS)

    def weights(self) -> DiffusionWeights:
        """What `ops.diffusion_mlp` takes."""
        layers = (self.input, self.modulation, self.output)
        return DiffusionWeights(
            *(p for layer in layers for p in (layer.weight, layer.bias)),
            tuple(block.weights() for block in self.blocks),
        )

    def embed_time(self, dtype: torch.dtype) -> Tensor:
        """(T, W): the embedding of every timestep."""
        return self.time2(F.silu(self.time1(self.sinusoids.to(dtype))))

    def run(self, xt_RC: Tensor, y_RW: Tensor) -> Tensor:
        """The MLP in plain PyTorch, given the sum of time embedding and condition: (R, 2C)."""
        return reference_of_sum(xt_RC, y_RW, self.weights(), EPS)


def timestep_features(steps: int, size: int = 256) -> Tensor:
    """(steps, size) float32: cosines, then sines, of t * 10000^(-k / (size / 2))."""
    half = size // 2
    frequency = torch.exp(-math.log(10000.0) * torch.arange(half) / half)
    angle = torch.arange(steps).float()[:, None] * frequency
    return torch.cat((angle.cos(), angle.sin()), dim=-1)
