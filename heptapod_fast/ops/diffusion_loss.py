"""diffusion_loss: noising, and the MSE plus variational bound of a learned-range diffusion model.

Notation of Nichol and Dhariwal 2021, constants as in MAR (mar:models/diffloss.py,
diffusion/gaussian_diffusion.py): epsilon prediction, learned-range variance, MSE + VB. Everything
is float32 (the bound at t = 999 is 720 times the MSE), C channels, one row per (token, repeat):

    x_t     = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps                                        (noise)
    mse     = mean_c (eps - eps_hat)^2
    x0_hat  = x_t / sqrt(abar_t) - sqrt(1 / abar_t - 1) eps_hat
    mu      = a_t x0 + b_t x_t         a_t = beta_t sqrt(abar_{t-1}) / (1 - abar_t)
                                       b_t = (1 - abar_{t-1}) sqrt(alpha_t) / (1 - abar_t)
    log s^2 = f log beta_t + (1 - f) log beta~_t        f = (v + 1) / 2, not clamped
    vb      = mean_c KL( N(mu, beta~_t) || N(mu_hat, s^2) ) / ln 2                         for t > 0
            = mean_c -log P_discretised(x_0 | mu_hat, s) / ln 2                            for t = 0
    loss    = mse + vb

eps_hat is detached in vb, so that the bound trains the variance channels only. The t = 0 term takes
x_0 for a pixel in [-1, 1] with 256 levels even where it is a latent: MAR does, and published
weights were trained that way.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

STEPS = 1000
TABLES = ("sqrt_abar", "sqrt_one_minus_abar", "sqrt_recip_abar", "sqrt_recip_minus_one",
          "mean_x0", "mean_xt", "log_beta", "log_posterior")


def cosine_betas(steps: int = STEPS) -> Tensor:
    """(steps,) float64: beta of the cosine schedule, capped at 0.999."""
    time = torch.arange(steps + 1, dtype=torch.float64) / steps
    abar = torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - abar[1:] / abar[:-1]).clamp(max=0.999)


def schedule_tables(betas: Tensor) -> Tensor:
    """(T,) float64 betas -> (8, T) float32, rows named by TABLES (see the module's docstring)."""
    alphas = 1 - betas
    abar = alphas.cumprod(0)
    previous = torch.cat((torch.ones(1, dtype=abar.dtype), abar[:-1]))
    posterior = betas * (1 - previous) / (1 - abar)
    # beta~_0 is 0; its logarithm is clipped to the next one's.
    clipped = torch.cat((posterior[1:2], posterior[1:])) if len(betas) > 1 else betas
    rows = (abar.sqrt(), (1 - abar).sqrt(), (1 / abar).sqrt(), (1 / abar - 1).sqrt(),
            betas * previous.sqrt() / (1 - abar), (1 - previous) * alphas.sqrt() / (1 - abar),
            betas.log(), clipped.log())
    return torch.stack(rows).float()


def add_noise(x0_RC: Tensor, noise_RC: Tensor, t_R: Tensor, tables: Tensor) -> Tensor:
    """x_t (R, C) float32 from x_0 and eps (R, C) float32 and t (R,) int64."""
    return tables[0][t_R, None] * x0_RC + tables[1][t_R, None] * noise_RC


def diffusion_loss(prediction_RK: Tensor, x0_RC: Tensor, xt_RC: Tensor, noise_RC: Tensor,
                   t_R: Tensor, tables: Tensor, bound: bool = True) -> Tensor:
    """prediction (R, 2C) = (eps_hat, v); x0, xt, noise (R, C) float32; t (R,) -> (R,) float32.

    bound False leaves the VB away: the plain MSE.
    """
    eps_RC, v_RC = prediction_RK.float().chunk(2, dim=-1)
    loss_R = (noise_RC - eps_RC).square().mean(-1)
    if not bound:
        return loss_R
    return loss_R + variational_bound(eps_RC.detach(), v_RC, x0_RC, xt_RC, t_R, tables)


def variational_bound(eps_RC: Tensor, v_RC: Tensor, x0_RC: Tensor, xt_RC: Tensor, t_R: Tensor,
                      tables: Tensor) -> Tensor:
    """(R,) bits per channel: KL for t > 0, discretised negative log-likelihood at t = 0."""
    row = tables[:, t_R, None].unbind(0)
    _, _, recip, recip_minus_one, mean_x0, mean_xt, log_beta, log_posterior = row
    x0_hat = recip * xt_RC - recip_minus_one * eps_RC
    mean_hat = mean_x0 * x0_hat + mean_xt * xt_RC
    mean = mean_x0 * x0_RC + mean_xt * xt_RC
    share = (v_RC + 1) / 2
    log_var = share * log_beta + (1 - share) * log_posterior
    kl = 0.5 * (-1 + log_var - log_posterior + (log_posterior - log_var).exp()
                + (mean - mean_hat).square() * (-log_var).exp())
    nll = -discretised_log_likelihood(x0_RC, mean_hat, 0.5 * log_var)
    return torch.where((t_R == 0)[:, None], nll, kl).mean(-1) / math.log(2.0)


def discretised_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """log P of x in [-1, 1] rounded to 256 levels under N(mean, exp(log_scale)^2), elementwise.

    The normal CDF is the tanh approximation that the published models were trained with
    (mar:diffusion/diffusion_utils.py:47-73); probabilities are kept above 1e-12.
    """
    centred, inverse = x - mean, (-log_scale).exp()
    upper = _normal_cdf(inverse * (centred + 1 / 255))
    lower = _normal_cdf(inverse * (centred - 1 / 255))
    probability = torch.where(x < -0.999, upper,
                              torch.where(x > 0.999, 1 - lower, upper - lower))
    return probability.clamp(min=1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
