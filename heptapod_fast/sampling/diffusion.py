"""Drawing vectors by denoising: DDPM with the learned variance, and DDIM. Suffixes: R rows,
C channels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from heptapod_fast import ops
from heptapod_fast.rng import Rng
from heptapod_fast.sampling.options import DIFFUSION_STEPS, SampleOptions


def respaced(steps: int) -> Tensor:
    """(steps,) int64: evenly spaced timesteps from 0 to 999 (one step: 999), as MAR's respacing."""
    if steps == 1:
        return torch.tensor([ops.STEPS - 1])
    # Adding the stride up and rounding gives upstream's list; round(i * stride) may differ by one.
    stride = (ops.STEPS - 1) / (steps - 1)
    current = 0.0
    chosen = []
    for _ in range(steps):
        chosen.append(round(current))
        current += stride
    return torch.tensor(chosen)


@dataclass(frozen=True)
class Denoiser:
    """Turns noise into vectors, one timestep after the other.

    predict: (x_t (R, C), number of the step) -> (eps_hat, v) (R, 2C) float32, the network.
    rng, index_R, slot_R: noise is keyed by them and by the number of the step.
    limit: the estimate of x_0 is clipped to [-limit, limit] at every step (0: never). Where tokens
        have a known range this is what keeps the first steps from diverging: they multiply the
        error of eps_hat by up to 20,000 (mar:models/diffloss.py samples latents, without a limit).
    """

    predict: Callable[[Tensor, int], Tensor]
    rng: Rng
    index_R: Tensor
    slot_R: Tensor
    options: SampleOptions
    limit: float = 0.0

    def sample(self, channels: int) -> Tensor:
        """(R, C) float32.

        ddpm: x' = mean + temperature * sigma * noise, sigma from the learned range. ddim: eta = 0;
        temperature scales the initial noise only.
        """
        steps = self.options.diffusion_steps or DIFFUSION_STEPS
        tables = respaced_tables(steps).to(self.index_R.device)
        x_RC = self.rng.normal("sample.start", self.index_R, channels, self.slot_R)
        if self.options.diffusion_sampler == "ddim":
            x_RC = x_RC * self.options.temperature
        for step in reversed(range(tables.shape[1])):
            prediction_RK = self.predict(x_RC, step)
            x_RC = self._previous(prediction_RK, x_RC, tables[:, step], step)
        return x_RC

    def _previous(self, prediction_RK: Tensor, x_RC: Tensor, table: Tensor, step: int) -> Tensor:
        """x_{t-1} from x_t and the network's (eps, v); table: the schedule's row of this step."""
        (
            sqrt_abar,
            sqrt_noise,
            recip,
            recip_minus_one,
            mean_x0,
            mean_xt,
            log_beta,
            log_posterior,
        ) = table
        eps_RC, v_RC = prediction_RK.chunk(2, dim=-1)
        x0_RC = recip * x_RC - recip_minus_one * eps_RC
        if self.limit:
            x0_RC = x0_RC.clamp(-self.limit, self.limit)
            eps_RC = (x_RC - sqrt_abar * x0_RC) / sqrt_noise
        if self.options.diffusion_sampler == "ddim":
            if step == 0:
                return x0_RC
            # sqrt(abar) and 1 - abar of the previous step, from the definitions of mean_x0 and
            # mean_xt; abar / (1 - beta) would lose all digits where beta is near 1.
            signal = mean_x0 * sqrt_noise.square() / log_beta.exp()
            noise = mean_xt * sqrt_noise.square() * signal / sqrt_abar
            return signal * x0_RC + noise.sqrt() * eps_RC
        mean_RC = mean_x0 * x0_RC + mean_xt * x_RC
        if step == 0:
            return mean_RC
        share_RC = (v_RC + 1) / 2
        log_variance_RC = share_RC * log_beta + (1 - share_RC) * log_posterior
        sigma_RC = (0.5 * log_variance_RC).exp()
        channels = x_RC.shape[-1]
        noise_RC = self.rng.normal(f"sample.noise.{step}", self.index_R, channels, self.slot_R)
        return mean_RC + self.options.temperature * sigma_RC * noise_RC


def respaced_tables(steps: int) -> Tensor:
    """(8, steps) float32: `ops.schedule_tables` of the schedule that `respaced` picks out."""
    abar = (1 - ops.cosine_betas()).cumprod(0)[respaced(steps)]
    previous = torch.cat((torch.ones(1, dtype=abar.dtype), abar[:-1]))
    return ops.schedule_tables(1 - abar / previous)
