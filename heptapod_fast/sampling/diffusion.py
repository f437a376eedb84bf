"""Drawing vectors by denoising: DDPM with the learned variance, and DDIM. Suffixes: R rows,
C channels."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from heptapod_fast import ops
from heptapod_fast.rng import Rng
from heptapod_fast.sampling.options import DIFFUSION_STEPS, SampleOptions

NOISES = 10  # steps whose noise is drawn together


class Scheduled(NamedTuple):
    """One timestep's constants, as `ops.schedule_tables` has them."""

    sqrt_abar: float
    sqrt_noise: float
    recip: float
    recip_minus_one: float
    mean_x0: float
    mean_xt: float
    log_beta: float
    log_posterior: float


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


@lru_cache
def respaced_on(steps: int, device: torch.device) -> Tensor:
    """`respaced` on a device, once: a copy to it cannot be recorded (sampling/replay.py)."""
    return respaced(steps).to(device)


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
        # Numbers of the host: a step takes them along without a look at the device.
        schedule = [Scheduled(*row) for row in respaced_tables(steps).t().tolist()]
        x_RC = self.rng.normal("sample.start", self.index_R, channels, self.slot_R)
        if self.options.diffusion_sampler == "ddim":
            x_RC = x_RC * self.options.temperature
            for step in reversed(range(steps)):
                x_RC = self._ddim(self.predict(x_RC, step), x_RC, schedule[step], step == 0)
            return x_RC
        for group in reversed(range(-(-steps // NOISES))):
            noise_RSC = self._noises(group, channels)
            first = group * NOISES
            for step in reversed(range(first, min(first + NOISES, steps))):
                noise_RC = None if step == 0 else noise_RSC[:, step - first]
                x_RC = self._ddpm(self.predict(x_RC, step), x_RC, schedule[step], noise_RC)
        return x_RC

    def _noises(self, group: int, channels: int) -> Tensor:
        """Of `NOISES` steps at once, for they are many small draws otherwise: (R, S, C)."""
        stream = f"sample.noises.{group}"
        noise_RK = self.rng.normal(stream, self.index_R, NOISES * channels, self.slot_R)
        return noise_RK.unflatten(1, (NOISES, channels))

    def _data(self, eps_RC: Tensor, x_RC: Tensor, of: Scheduled) -> Tensor:
        """What x_0 would be if eps were the noise in x_t."""
        x0_RC = torch.sub(of.recip * x_RC, eps_RC, alpha=of.recip_minus_one)
        return x0_RC.clamp_(-self.limit, self.limit) if self.limit else x0_RC

    def _ddim(self, prediction_RK: Tensor, x_RC: Tensor, of: Scheduled, is_last: bool) -> Tensor:
        """x_{t-1} from x_t and the network's (eps, v), without noise."""
        eps_RC, _ = prediction_RK.chunk(2, dim=-1)
        x0_RC = self._data(eps_RC, x_RC, of)
        if is_last:
            return x0_RC
        if self.limit:
            eps_RC = (x_RC - of.sqrt_abar * x0_RC) / of.sqrt_noise
        # sqrt(abar) and 1 - abar of the previous step, from the definitions of mean_x0 and
        # mean_xt; abar / (1 - beta) would lose all digits where beta is near 1.
        signal = of.mean_x0 * of.sqrt_noise**2 / math.exp(of.log_beta)
        noise = of.mean_xt * of.sqrt_noise**2 * signal / of.sqrt_abar
        return signal * x0_RC + math.sqrt(noise) * eps_RC

    def _ddpm(
        self, prediction_RK: Tensor, x_RC: Tensor, of: Scheduled, noise_RC: Tensor | None
    ) -> Tensor:
        """x_{t-1} from x_t and the network's (eps, v); noise: None in the last step."""
        eps_RC, v_RC = prediction_RK.chunk(2, dim=-1)
        x0_RC = self._data(eps_RC, x_RC, of)
        mean_RC = torch.add(of.mean_x0 * x0_RC, x_RC, alpha=of.mean_xt)
        if noise_RC is None:
            return mean_RC
        # The log variance lies between those of beta and of the posterior, at (v + 1) / 2; sigma is
        # the root of the variance.
        half_way = 0.25 * (of.log_beta + of.log_posterior)
        half_span = 0.25 * (of.log_beta - of.log_posterior)
        sigma_RC = (half_span * v_RC).add_(half_way).exp_()
        return mean_RC.addcmul_(sigma_RC, noise_RC, value=self.options.temperature)


def respaced_tables(steps: int) -> Tensor:
    """(8, steps) float32: `ops.schedule_tables` of the schedule that `respaced` picks out."""
    abar = (1 - ops.cosine_betas()).cumprod(0)[respaced(steps)]
    previous = torch.cat((torch.ones(1, dtype=abar.dtype), abar[:-1]))
    return ops.schedule_tables(1 - abar / previous)
