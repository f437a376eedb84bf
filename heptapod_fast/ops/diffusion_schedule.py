"""The noise schedule of diffusion: its betas, and what losses and kernels read of it by timestep.

ops/diffusion_loss.py has the formulas; 1,000 steps of the cosine schedule are MAR's
(mar:diffusion/gaussian_diffusion.py).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

STEPS = 1000


class Tables(NamedTuple):
    """What the losses need of the schedule, (T,) float32 each; rows of the (8, T) `tables`."""

    sqrt_abar: Tensor
    sqrt_one_minus_abar: Tensor
    sqrt_recip_abar: Tensor  # sqrt(1 / abar)
    sqrt_recip_minus_one: Tensor  # sqrt(1 / abar - 1)
    mean_x0: Tensor  # a_t
    mean_xt: Tensor  # b_t
    log_beta: Tensor
    log_posterior: Tensor  # log beta~_t


TABLES = Tables._fields


def cosine_betas(steps: int = STEPS) -> Tensor:
    """(steps,) float64: beta of the cosine schedule, capped at 0.999."""
    time = torch.arange(steps + 1, dtype=torch.float64) / steps
    abar = torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - abar[1:] / abar[:-1]).clamp(max=0.999)


def schedule_tables(betas: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """(T,) float64 betas -> (8, T) in `dtype`, rows as Tables names them."""
    alphas = 1 - betas
    abar = alphas.cumprod(0)
    previous = torch.cat((torch.ones(1, dtype=abar.dtype), abar[:-1]))
    posterior = betas * (1 - previous) / (1 - abar)
    # beta~_0 is 0; its logarithm is clipped to the next one's.
    clipped = torch.cat((posterior[1:2], posterior[1:])) if len(betas) > 1 else betas
    tables = Tables(
        sqrt_abar=abar.sqrt(),
        sqrt_one_minus_abar=(1 - abar).sqrt(),
        sqrt_recip_abar=(1 / abar).sqrt(),
        sqrt_recip_minus_one=(1 / abar - 1).sqrt(),
        mean_x0=betas * previous.sqrt() / (1 - abar),
        mean_xt=(1 - previous) * alphas.sqrt() / (1 - abar),
        log_beta=betas.log(),
        log_posterior=clipped.log(),
    )
    return torch.stack(tables).to(dtype)


def add_noise(x0_RC: Tensor, noise_RC: Tensor, t_R: Tensor, tables: Tensor) -> Tensor:
    """x_t (R, C) float32 from x_0 and eps (R, C) float32 and t (R,) int64."""
    rows = Tables(*tables)  # (T,) each
    return rows.sqrt_abar[t_R, None] * x0_RC + rows.sqrt_one_minus_abar[t_R, None] * noise_RC
