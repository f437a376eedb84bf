"""Token losses: the distribution of one token given one vector z of the head.

A token loss answers for everything that depends on the kind of distribution: how far a target is
from it (`loss`), how a token is drawn from it (`draw`), and what that costs (`flops`,
`saved_values`). Suffixes as in docs/legend.md: R rows, D width of z, V codes, C channels of a
continuous token, F width of the diffusion MLP, T = 1000 diffusion steps.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heptapod_fast import ops
from heptapod_fast.model.layers import EPS, LayerNorm, Linear, Modules
from heptapod_fast.ops.diffusion_mlp import reference_of_sum
from heptapod_fast.ops.dispatch import AUTO, Operators
from heptapod_fast.rng import Rng
from heptapod_fast.sampling import (
    DIFFUSION_STEPS,
    Denoiser,
    SampleOptions,
    respaced,
    sample_codes,
)


class TokenLoss(nn.Module, ABC):
    """What every token loss answers."""

    @abstractmethod
    def loss(
        self,
        z_RD: Tensor,
        target: Tensor,
        rng: Rng,
        index_R: Tensor,
        slot_R: Tensor,
        weight_R: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Rows against their targets.

        Args:
            z_RD: the head's vectors.
            target: (R,) codes or (R, C) vectors.
            rng, index_R, slot_R: draws are keyed by the global sample index of a row, and by a slot
                that tells the rows of one sample apart.
            weight_R: weights without a gradient; None: 1 everywhere.

        Returns:
            (the weighted sum over rows, which gradients flow from; (R,) losses without a graph).
        """

    @abstractmethod
    def draw(
        self, z_RD: Tensor, rng: Rng, index_R: Tensor, slot_R: Tensor, options: SampleOptions
    ) -> tuple[Tensor, Tensor | None]:
        """One token per row, (R,) codes or (R, C) float32, and its probability, (R,) or None where
        there is none. Draws are keyed as in `loss`."""

    @abstractmethod
    def flops(self, rows: float) -> float:
        """Forward FLOPs of so many rows: products only, 2 per multiply-add."""

    @abstractmethod
    def saved_values(self, rows: float) -> float:
        """Values of so many rows that are kept for the backward pass."""


def weighted_sum(loss_R: Tensor, weight_R: Tensor | None) -> tuple[Tensor, Tensor]:
    """(sum of loss * weight, the losses without their graph); weight None: 1 everywhere."""
    total = loss_R.sum() if weight_R is None else (loss_R * weight_R).sum()
    return total, loss_R.detach()


class Categorical(TokenLoss):
    """Discrete tokens: a linear layer to V logits, cross-entropy in nats."""

    def __init__(self, width: int, vocabulary: int, operators: Operators = AUTO):
        super().__init__()
        self.operators = operators
        self.output = Linear(width, vocabulary, init="normal")

    def loss(
        self,
        z_RD: Tensor,
        target: Tensor,
        rng: Rng,
        index_R: Tensor,
        slot_R: Tensor,
        weight_R: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See TokenLoss.loss; rng, index and slot are not used."""
        return ops.linear_cross_entropy(
            z_RD,
            self.output.weight,
            self.output.bias,
            target,
            weight_R,
            implementation=self.operators["linear_cross_entropy"],
        )

    def logits(self, z_RD: Tensor) -> Tensor:
        """(R, V) float32."""
        return self.output(z_RD).float()

    def draw(
        self, z_RD: Tensor, rng: Rng, index_R: Tensor, slot_R: Tensor, options: SampleOptions
    ) -> tuple[Tensor, Tensor | None]:
        """See TokenLoss.draw."""
        uniform_R = rng.uniform("sample.token", index_R, 1, slot_R)[:, 0]
        return sample_codes(self.logits(z_RD), uniform_R, options)

    def flops(self, rows: float) -> float:
        """One product to V logits."""
        return 2 * rows * self.output.weight.numel()

    def saved_values(self, rows: float) -> float:
        """Logits, their exponentials, and the gradient."""
        return 3 * rows * len(self.output.weight)


class ResBlock(nn.Module):
    """Parameters of x + gate * MLP(LayerNorm(x) * (1 + scale) + shift), modulated by SiLU(y)."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = LayerNorm(width)
        self.fc1 = Linear(width, width)
        self.fc2 = Linear(width, width)
        self.modulation = Linear(width, 3 * width, init="zero")

    def weights(self) -> ops.BlockWeights:
        """What `ops.diffusion_mlp` takes."""
        return ops.BlockWeights(
            self.norm.weight,
            self.norm.bias,
            self.fc1.weight,
            self.fc1.bias,
            self.fc2.weight,
            self.fc2.bias,
            self.modulation.weight,
            self.modulation.bias,
        )


class Diffusion(TokenLoss):
    """Continuous tokens: MAR's diffusion MLP (mar:models/diffloss.py) and its loss.

    Layers and initialisation as upstream; the work is arranged differently: the conditioning is
    projected once per token instead of once per noise, SiLU(y) is taken once for all blocks, and
    timesteps are embedded through a table of the 1000 values.

    Args:
        width: D.
        channels: C.
        blocks, mlp_width: residual blocks of the MLP, and F.
        repeat: fresh (timestep, noise) pairs per token.
        bound: add the variational bound of the learned variance to the MSE.
        limit: tokens lie in [-limit, limit], which sampling makes use of; 0: not known.
    """

    tables: Tensor
    sinusoids: Tensor

    def __init__(
        self,
        width: int,
        channels: int,
        *,
        blocks: int,
        mlp_width: int,
        repeat: int,
        bound: bool,
        limit: float = 0.0,
        operators: Operators = AUTO,
    ):
        super().__init__()
        self.operators = operators
        self.channels = channels
        self.repeat = repeat
        self.bound = bound
        self.limit = limit
        self.time1 = Linear(256, mlp_width, init="normal")
        self.time2 = Linear(mlp_width, mlp_width, init="normal")
        self.condition = Linear(width, mlp_width)
        self.input = Linear(channels, mlp_width)
        self.blocks = Modules[ResBlock](ResBlock(mlp_width) for _ in range(blocks))
        self.modulation = Linear(mlp_width, 2 * mlp_width, init="zero")
        self.output = Linear(mlp_width, 2 * channels, init="zero")
        tables = ops.schedule_tables(ops.cosine_betas())
        self.register_buffer("tables", tables, persistent=False)
        self.register_buffer("sinusoids", timestep_features(len(tables[0])), persistent=False)

    def loss(
        self,
        z_RD: Tensor,
        target: Tensor,
        rng: Rng,
        index_R: Tensor,
        slot_R: Tensor,
        weight_R: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See TokenLoss.loss; a row's loss is the mean over its (timestep, noise) pairs."""
        how = self.operators["diffusion_loss"]
        draws = ops.Draws(
            index_R, slot_R, self.repeat, rng.key("diffusion.time"), rng.key("diffusion.noise")
        )
        xt, t = ops.diffusion_inputs(target, draws, self.tables, how)
        prediction = self.net(xt, t, self.condition(z_RD))
        loss_R = ops.diffusion_loss(prediction, target, xt, t, draws, self.tables, self.bound, how)
        return weighted_sum(loss_R, weight_R)

    def net(self, xt_RC: Tensor, t_R: Tensor, condition_MF: Tensor) -> Tensor:
        """Noisy tokens, timesteps and projected conditions -> (R, 2C) float32: (eps_hat, v).

        There are R / M rows in a row to each condition.
        """
        time_TF = self.embed_time(condition_MF.dtype)
        return ops.diffusion_mlp(
            xt_RC, t_R, time_TF, condition_MF, self.weights(), EPS, self.operators["diffusion_mlp"]
        )

    def weights(self) -> ops.DiffusionWeights:
        """What `ops.diffusion_mlp` takes."""
        return ops.DiffusionWeights(
            self.input.weight,
            self.input.bias,
            self.modulation.weight,
            self.modulation.bias,
            self.output.weight,
            self.output.bias,
            tuple(block.weights() for block in self.blocks),
        )

    def embed_time(self, dtype: torch.dtype) -> Tensor:
        """(T, F): the embedding of every timestep."""
        return self.time2(F.silu(self.time1(self.sinusoids.to(dtype))))

    def draw(
        self, z_RD: Tensor, rng: Rng, index_R: Tensor, slot_R: Tensor, options: SampleOptions
    ) -> tuple[Tensor, Tensor | None]:
        """See TokenLoss.draw.

        The network runs in float32 here, whatever it was trained in: the first steps of the
        denoising multiply its errors by thousands (sampling/diffusion.py).
        """
        z_RD = z_RD.float()
        times = respaced(options.diffusion_steps or DIFFUSION_STEPS).to(z_RD.device)
        condition_RF = self.condition(z_RD)
        time_TF = self.embed_time(z_RD.dtype)[times]

        def predict(x_RC: Tensor, step: int) -> Tensor:
            return self.run(x_RC, time_TF[step] + condition_RF)

        denoiser = Denoiser(predict, rng, index_R, slot_R, options, self.limit)
        return denoiser.sample(self.channels), None

    def run(self, xt_RC: Tensor, y_RF: Tensor) -> Tensor:
        """The MLP in plain PyTorch, given the sum of time embedding and condition: (R, 2C)."""
        return reference_of_sum(xt_RC, y_RF, self.weights(), EPS)

    def flops(self, rows: float) -> float:
        """The condition's product once per row, all others once per (timestep, noise) pair; the
        table of times once per step, which does not count."""
        once = (self.condition, self.time1, self.time2)
        layers = [m for m in self.modules() if isinstance(m, nn.Linear) and m not in once]
        per_repeat = sum(layer.weight.numel() for layer in layers)
        return 2 * rows * (self.repeat * per_repeat + self.condition.weight.numel())

    def saved_values(self, rows: float) -> float:
        """9 F per block and 6 F beside them, for each (timestep, noise) pair."""
        mlp_width = len(self.input.weight)
        return rows * self.repeat * mlp_width * (9 * len(self.blocks) + 6)


def timestep_features(steps: int, size: int = 256) -> Tensor:
    """(steps, size) float32: cosines, then sines, of t * 10000^(-k / (size / 2))."""
    half = size // 2
    frequency = torch.exp(-math.log(10000.0) * torch.arange(half) / half)
    angle = torch.arange(steps).float()[:, None] * frequency
    return torch.cat((angle.cos(), angle.sin()), dim=-1)
