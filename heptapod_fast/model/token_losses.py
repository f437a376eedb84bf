"""Token losses: the distribution of one token given one vector z of the head.

A token loss answers for everything that depends on the kind of distribution: how far a target is
from it (`loss`), how a token is drawn from it (`draw`), and what that costs (`flops`). Suffixes as
in docs/legend.md: R rows, D width of z, V codes, C channels of a continuous token, F width of the
diffusion MLP, T = 1000 diffusion steps.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heptapod_fast import ops
from heptapod_fast.model.layers import EPS, LayerNorm, Linear, Modules
from heptapod_fast.model.sampled_mlp import SampledMlp
from heptapod_fast.ops.dispatch import AUTO, Operators
from heptapod_fast.rng import Rng
from heptapod_fast.sampling import (
    DIFFUSION_STEPS,
    Denoiser,
    Path,
    SampleOptions,
    respaced_on,
    sample_codes,
)

# Times of flow matching in the features' units, which are timesteps.
TIME_SCALE = 1000.0


class Contrast(NamedTuple):
    """Guidance at the head: what it says of z is moved away from what it says of `z_RD`, by
    other + scale * (own - other). A scale of 1 changes nothing."""

    z_RD: Tensor
    scale: float

    def guided(self, own: Tensor, other: Tensor) -> Tensor:
        """Of two predictions of one shape."""
        return other + self.scale * (own - other)


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
        self,
        z_RD: Tensor,
        rng: Rng,
        index_R: Tensor,
        slot_R: Tensor,
        options: SampleOptions,
        contrast: Contrast | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """One token per row, (R,) codes or (R, C) float32, and its probability, (R,) or None where
        there is none. Draws are keyed as in `loss`. contrast: what to guide away from; None costs
        no pass."""

    def loss_at(
        self,
        z_RD: Tensor,
        target: Tensor,
        rng: Rng,
        index_R: Tensor,
        slot_R: Tensor,
        share: float,
    ) -> Tensor:
        """(R,) float32: `loss` at one degree of noise, 0 to 1 of the time from data to noise.

        Raises:
            ValueError: nothing is denoised here.
        """
        raise ValueError(f"{type(self).__name__} is no loss of denoising: it has no noise")

    # The samplers that `draw` takes, the default first.
    SAMPLERS: ClassVar[tuple[str, ...]] = ()

    def check_options(self, options: SampleOptions) -> None:
        """ValueError for a sampler that draws from another kind of distribution."""
        asked = options.diffusion_sampler
        if asked is not None and asked not in self.SAMPLERS:
            raise ValueError(
                f"--diffusion-sampler {asked}: tokens of this run are drawn by "
                f"{' or '.join(self.SAMPLERS) or 'none'}"
            )

    @abstractmethod
    def flops(self, rows: float) -> float:
        """Forward FLOPs of so many rows: products only, 2 per multiply-add."""


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
        self,
        z_RD: Tensor,
        rng: Rng,
        index_R: Tensor,
        slot_R: Tensor,
        options: SampleOptions,
        contrast: Contrast | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """See TokenLoss.draw."""
        uniform_R = rng.uniform("sample.token", index_R, 1, slot_R)[:, 0]
        logits_RV = self.logits(z_RD)
        if contrast is not None:
            logits_RV = contrast.guided(logits_RV, self.logits(contrast.z_RD))
        return sample_codes(logits_RV, uniform_R, options)

    def flops(self, rows: float) -> float:
        """One product to V logits."""
        return 2 * rows * self.output.weight.numel()


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


class Denoising(TokenLoss):
    """Continuous tokens: MAR's diffusion MLP (mar:models/diffloss.py), a network of a noisy token,
    a time and a condition, which the kinds of denoising share.

    Layers and initialisation as upstream; the work is arranged differently: the conditioning is
    projected once per token instead of once per noise, and SiLU(y) is taken once for all blocks.

    Class attributes:
        OUTPUTS: values that the network gives for every channel.

    Args:
        width: D.
        channels: C.
        blocks, mlp_width: residual blocks of the MLP, and F.
        repeat: fresh (time, noise) pairs per token.
        limit: tokens lie in [-limit, limit], which sampling makes use of; 0: not known.
    """

    OUTPUTS: ClassVar[int]

    def __init__(
        self,
        width: int,
        channels: int,
        *,
        blocks: int,
        mlp_width: int,
        repeat: int,
        limit: float = 0.0,
        operators: Operators = AUTO,
    ):
        super().__init__()
        self.operators = operators
        self.channels = channels
        self.repeat = repeat
        self.limit = limit
        self.time1 = Linear(256, mlp_width, init="normal")
        self.time2 = Linear(mlp_width, mlp_width, init="normal")
        self.condition = Linear(width, mlp_width)
        self.input = Linear(channels, mlp_width)
        self.blocks = Modules[ResBlock](ResBlock(mlp_width) for _ in range(blocks))
        self.modulation = Linear(mlp_width, 2 * mlp_width, init="zero")
        self.output = Linear(mlp_width, self.OUTPUTS * channels, init="zero")

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

    def mlp(self, xt_RC: Tensor, t_R: Tensor, time_TF: Tensor, condition_MF: Tensor) -> Tensor:
        """Noisy tokens and projected conditions -> (R, OUTPUTS * C) float32. t: the row of the
        table of embedded times. There are R / M rows in a row to each condition."""
        return ops.diffusion_mlp(
            xt_RC, t_R, time_TF, condition_MF, self.weights(), EPS, self.operators["diffusion_mlp"]
        )

    def embed(self, sinusoids: Tensor) -> Tensor:
        """(..., 256) features of times -> (..., F)."""
        return self.time2(F.silu(self.time1(sinusoids)))

    def predictor(
        self, z_RD: Tensor, time_TF: Tensor, contrast: Contrast | None
    ) -> Callable[[Tensor, int], Tensor]:
        """(x_t (R, C), row of the table of times) -> prediction (R, OUTPUTS * C), guided where
        there is a contrast, which is a second pass of the network."""
        condition_RF = self.condition(z_RD)
        run = SampledMlp(self.weights(), EPS)
        if contrast is None:
            return lambda x_RC, step: run(x_RC, time_TF[step] + condition_RF)
        conditions = torch.cat((condition_RF, self.condition(contrast.z_RD.to(z_RD.dtype))))

        def predict(x_RC: Tensor, step: int) -> Tensor:
            both = run(torch.cat((x_RC, x_RC)), time_TF[step] + conditions)
            return self.combine(contrast, *both.chunk(2))

        return predict

    def combine(self, contrast: Contrast, own: Tensor, other: Tensor) -> Tensor:
        """Two predictions -> one."""
        return contrast.guided(own, other)

    def times_embedded(self, rows: float) -> float:
        """Times that are embedded for so many rows; a table of all of them does not count."""
        return 0.0

    def flops(self, rows: float) -> float:
        """The condition's product once per row, all others once per (time, noise) pair."""
        once = (self.condition, self.time1, self.time2)
        layers = [m for m in self.modules() if isinstance(m, nn.Linear) and m not in once]
        per_repeat = sum(layer.weight.numel() for layer in layers)
        of_times = self.time1.weight.numel() + self.time2.weight.numel()
        embedding = 2 * self.times_embedded(rows) * of_times
        return embedding + 2 * rows * (self.repeat * per_repeat + self.condition.weight.numel())


class Diffusion(Denoising):
    """MAR's diffusion loss: 1000 timesteps, whose embeddings are one table.

    Args:
        width, channels, network: as of `Denoising`.
        bound: add the variational bound of the learned variance to the MSE.
    """

    OUTPUTS = 2  # the noise, and where its variance lies
    SAMPLERS = ("ddpm", "ddim")
    tables: Tensor
    sinusoids: Tensor

    def __init__(self, width: int, channels: int, *, bound: bool, **network: Any):
        super().__init__(width, channels, **network)
        self.bound = bound
        tables = ops.schedule_tables(ops.cosine_betas())
        self.register_buffer("tables", tables, persistent=False)
        times = torch.arange(len(tables[0])).float()
        self.register_buffer("sinusoids", timestep_features(times), persistent=False)

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

    def loss_at(
        self,
        z_RD: Tensor,
        target: Tensor,
        rng: Rng,
        index_R: Tensor,
        slot_R: Tensor,
        share: float,
    ) -> Tensor:
        """See TokenLoss.loss_at: the mean square error of the noise, without the bound."""
        last = self.tables.shape[1] - 1
        t_R = torch.full_like(index_R, round(share * last))
        noise_RC = rng.normal("diffusion.at", index_R, self.channels, slot_R)
        xt_RC = ops.add_noise(target.float(), noise_RC, t_R, self.tables)
        noise_hat_RC, _ = self.net(xt_RC, t_R, self.condition(z_RD)).float().chunk(2, dim=-1)
        return (noise_hat_RC - noise_RC).square().mean(-1)

    def net(self, xt_RC: Tensor, t_R: Tensor, condition_MF: Tensor) -> Tensor:
        """Noisy tokens, timesteps and projected conditions -> (R, 2C) float32: (eps_hat, v).

        There are R / M rows in a row to each condition.
        """
        return self.mlp(xt_RC, t_R, self.embed_time(condition_MF.dtype), condition_MF)

    def embed_time(self, dtype: torch.dtype) -> Tensor:
        """(T, F): the embedding of every timestep."""
        return self.embed(self.sinusoids.to(dtype))

    def draw(
        self,
        z_RD: Tensor,
        rng: Rng,
        index_R: Tensor,
        slot_R: Tensor,
        options: SampleOptions,
        contrast: Contrast | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """See TokenLoss.draw.

        The network runs in float32 here, whatever it was trained in: the first steps of the
        denoising multiply its errors by thousands (sampling/diffusion.py).
        """
        z_RD = z_RD.float()
        times = respaced_on(options.diffusion_steps or DIFFUSION_STEPS, z_RD.device)
        time_TF = self.embed(self.sinusoids[times])
        predict = self.predictor(z_RD, time_TF, contrast)
        denoiser = Denoiser(predict, rng, index_R, slot_R, options, self.limit)
        return denoiser.sample(self.channels), None

    def combine(self, contrast: Contrast, own: Tensor, other: Tensor) -> Tensor:
        """eps is guided, the learned variance is the own one (mar:models/diffloss.py,
        forward_with_cfg)."""
        own_eps, variance = own.chunk(2, dim=-1)
        other_eps, _ = other.chunk(2, dim=-1)
        return torch.cat((contrast.guided(own_eps, other_eps), variance), dim=-1)


class Flow(Denoising):
    """Flow matching: the velocity from data to noise along straight lines (ops/flow_loss.py), time
    uniform on (0, 1). Times are no table: every (time, noise) pair has one of its own."""

    OUTPUTS = 1
    SAMPLERS = ("euler", "heun")

    def loss(
        self,
        z_RD: Tensor,
        target: Tensor,
        rng: Rng,
        index_R: Tensor,
        slot_R: Tensor,
        weight_R: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See TokenLoss.loss; a row's loss is the mean over its (time, noise) pairs."""
        how = self.operators["flow_loss"]
        draws = ops.Draws(index_R, slot_R, self.repeat, rng.key("flow.time"), rng.key("flow.noise"))
        xt_RC, time_R = ops.flow_inputs(target, draws, how)
        prediction_RC = self.net(xt_RC, time_R, self.condition(z_RD))
        return weighted_sum(ops.flow_loss(prediction_RC, target, draws, how), weight_R)

    def loss_at(
        self,
        z_RD: Tensor,
        target: Tensor,
        rng: Rng,
        index_R: Tensor,
        slot_R: Tensor,
        share: float,
    ) -> Tensor:
        """See TokenLoss.loss_at."""
        noise_RC = rng.normal("flow.at", index_R, self.channels, slot_R)
        xt_RC = (1 - share) * target + share * noise_RC
        time_R = torch.full_like(noise_RC[:, 0], share)
        velocity_hat_RC = self.net(xt_RC, time_R, self.condition(z_RD)).float()
        return (velocity_hat_RC - (noise_RC - target)).square().mean(-1)

    def net(self, xt_RC: Tensor, time_R: Tensor, condition_MF: Tensor) -> Tensor:
        """Noisy tokens, times in (0, 1) and projected conditions -> (R, C) float32 velocities."""
        row_R = torch.arange(len(time_R), device=time_R.device)
        time_RF = self.embed_time(time_R, condition_MF.dtype)
        return self.mlp(xt_RC, row_R, time_RF, condition_MF)

    def embed_time(self, time_R: Tensor, dtype: torch.dtype) -> Tensor:
        """(R,) in [0, 1] -> (R, F); 1 has the features of timestep 1000."""
        return self.embed(timestep_features(TIME_SCALE * time_R).to(dtype))

    def draw(
        self,
        z_RD: Tensor,
        rng: Rng,
        index_R: Tensor,
        slot_R: Tensor,
        options: SampleOptions,
        contrast: Contrast | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """See TokenLoss.draw; float32, as Diffusion.draw."""
        z_RD = z_RD.float()
        path = Path(rng, index_R, slot_R, options, self.limit)
        time_TF = self.embed_time(path.times_on(z_RD.device), z_RD.dtype)
        return path.sample(self.predictor(z_RD, time_TF, contrast), self.channels), None

    def times_embedded(self, rows: float) -> float:
        """One for each pair."""
        return rows * self.repeat


def timestep_features(time: Tensor, size: int = 256) -> Tensor:
    """(...) float32 -> (..., size): cosines, then sines, of t * 10000^(-k / (size / 2))."""
    half = size // 2
    frequency = torch.exp(-math.log(10000.0) * torch.arange(half, device=time.device) / half)
    angle = time[..., None] * frequency
    return torch.cat((angle.cos(), angle.sin()), dim=-1)
