"""diffusion_loss: noising, and the MSE plus variational bound of a learned-range diffusion model.

Notation of Nichol and Dhariwal 2021, constants as in MAR (mar:models/diffloss.py,
diffusion/gaussian_diffusion.py): epsilon prediction, learned-range variance, MSE + VB. Everything
is float32 (the bound at t = 999 is 720 times the MSE), C channels, one row per (token, repeat),
t and eps drawn as `philox.Draws` says:

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

eps is never stored: the kernels make it again from its counter, forward and backward. Shapes: M
tokens, R = M * repeat rows (row m * repeat + k is the k-th of token m), C channels, K = 2C, T
steps.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from heptapod_fast.ops import dispatch
from heptapod_fast.ops.checks import at_least_float32, refusal
from heptapod_fast.ops.diffusion_schedule import TABLES, Tables, add_noise
from heptapod_fast.ops.operators import Context, Gradients, Inputs, differentiable, once, operator
from heptapod_fast.ops.philox import Draws, to_integer

WIDEST = 4096  # channels; kernels/configs/diffusion_loss.json and flow_loss.json


def diffusion_inputs(
    x0_MC: Tensor, draws: Draws, tables: Tensor, implementation: str = "auto"
) -> tuple[Tensor, Tensor]:
    """x0 (M, C), tables (8, T) float32 -> x_t (R, C) float32 and t (R,) int64.

    No gradient flows to x0. implementation: "auto", "triton" or "reference". Raises ValueError on
    draws or tables that do not fit.
    """
    _check("diffusion_inputs", x0_MC, draws, tables)
    x0_MC = at_least_float32(x0_MC.detach())
    chosen = select_by_channels("diffusion_loss", x0_MC, x0_MC.shape[1], implementation)
    if chosen == "reference":
        t_R = to_integer(draws.times(), tables.shape[1])
        noise_RC = draws.noise(x0_MC.shape[1], x0_MC.dtype)
        x0_RC = x0_MC.repeat_interleave(draws.repeat, dim=0)
        return add_noise(x0_RC, noise_RC, t_R, tables), t_R
    return _inputs_operator(
        x0_MC.contiguous(),
        *draws.arrays(),
        tables.contiguous(),
        draws.repeat,
        [*draws.time_key, *draws.noise_key],
    )


def diffusion_loss(
    prediction_RK: Tensor,
    x0_MC: Tensor,
    xt_RC: Tensor,
    t_R: Tensor,
    draws: Draws,
    tables: Tensor,
    bound: bool = True,
    implementation: str = "auto",
) -> Tensor:
    """The mean over its repeats of each token's loss, (M,) float32.

    prediction (R, 2C) = (eps_hat, v), float32 or bfloat16; x0 (M, C); x_t (R, C) and t (R,) as
    `diffusion_inputs` made them of the same draws (the kernels make the noise again and need no
    x_t); tables (8, T) float32. bound False leaves the VB away: the plain MSE. The gradient flows
    to the prediction alone, in its dtype. implementation: "auto", "triton" or "reference". Raises
    ValueError on shapes, draws or tables that do not fit.
    """
    _check("diffusion_loss", x0_MC, draws, tables)
    _check_rows(prediction_RK, x0_MC, xt_RC, t_R, draws)
    channels = x0_MC.shape[1]
    x0_MC = at_least_float32(x0_MC.detach())
    chosen = select_by_channels("diffusion_loss", prediction_RK, x0_MC.shape[1], implementation)
    if chosen == "reference":
        prediction = at_least_float32(prediction_RK)
        noise_RC = draws.noise(channels, prediction.dtype)
        x0_RC = x0_MC.repeat_interleave(draws.repeat, dim=0)
        loss_R = row_losses(prediction, x0_RC, xt_RC.detach(), noise_RC, t_R, tables, bound)
        return loss_R.view(-1, draws.repeat).mean(1)
    return _operator(
        prediction_RK.contiguous(),
        x0_MC.contiguous(),
        t_R.contiguous(),
        tables.contiguous(),
        *draws.arrays(),
        draws.repeat,
        list(draws.noise_key),
        bound,
    )


def row_losses(
    prediction_RK: Tensor,
    x0_RC: Tensor,
    xt_RC: Tensor,
    noise_RC: Tensor,
    t_R: Tensor,
    tables: Tensor,
    bound: bool = True,
) -> Tensor:
    """The reference, given its draws: prediction (R, 2C) = (eps_hat, v); x0, xt, noise (R, C)
    float32; t (R,) -> (R,) float32. bound False: the plain MSE."""
    eps_RC, v_RC = at_least_float32(prediction_RK).chunk(2, dim=-1)
    loss_R = (noise_RC - eps_RC).square().mean(-1)
    if not bound:
        return loss_R
    return loss_R + variational_bound(eps_RC.detach(), v_RC, x0_RC, xt_RC, t_R, tables)


def variational_bound(
    eps_RC: Tensor, v_RC: Tensor, x0_RC: Tensor, xt_RC: Tensor, t_R: Tensor, tables: Tensor
) -> Tensor:
    """(R,) bits per channel: KL for t > 0, discretised negative log-likelihood at t = 0."""
    at_t = Tables(*tables[:, t_R, None])  # (R, 1) each
    x0_hat = at_t.sqrt_recip_abar * xt_RC - at_t.sqrt_recip_minus_one * eps_RC
    mean_hat = at_t.mean_x0 * x0_hat + at_t.mean_xt * xt_RC
    mean = at_t.mean_x0 * x0_RC + at_t.mean_xt * xt_RC
    share = (v_RC + 1) / 2
    log_var = share * at_t.log_beta + (1 - share) * at_t.log_posterior
    kl = 0.5 * (
        -1
        + log_var
        - at_t.log_posterior
        + (at_t.log_posterior - log_var).exp()
        + (mean - mean_hat).square() * (-log_var).exp()
    )
    nll = -discretised_log_likelihood(x0_RC, mean_hat, 0.5 * log_var)
    return torch.where((t_R == 0)[:, None], nll, kl).mean(-1) / math.log(2.0)


def discretised_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """log P of x in [-1, 1] rounded to 256 levels under N(mean, exp(log_scale)^2), elementwise.

    The normal CDF is the tanh approximation that the published models were trained with
    (mar:diffusion/diffusion_utils.py:47-73); probabilities are kept above 1e-12.
    """
    centred = x - mean
    inverse = (-log_scale).exp()
    upper = _normal_cdf(inverse * (centred + 1 / 255))
    lower = _normal_cdf(inverse * (centred - 1 / 255))
    # The lowest level reaches down to -infinity, the highest up to infinity.
    probability = torch.where(x > 0.999, 1 - lower, upper - lower)
    probability = torch.where(x < -0.999, upper, probability)
    return probability.clamp(min=1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def select_by_channels(operation: str, x: Tensor, channels: int, implementation: str) -> str:
    """Which implementation takes so many channels, here and in flow_loss; x: whose device and dtype
    decide."""
    wide = None if channels <= WIDEST else f"{channels} channels, the kernels take {WIDEST}"
    return dispatch.select(operation, x.device, x.dtype, implementation, wide)


def _check(operation: str, x0_MC: Tensor, draws: Draws, tables: Tensor) -> None:
    draws.check(operation, x0_MC)
    if tables.dim() != 2 or len(tables) != len(TABLES) or tables.dtype != torch.float32:
        raise refusal(operation, f"float32 tables of shape ({len(TABLES)}, T)", tables)


def _check_rows(
    prediction_RK: Tensor, x0_MC: Tensor, xt_RC: Tensor, t_R: Tensor, draws: Draws
) -> None:
    tokens, channels = x0_MC.shape
    rows = tokens * draws.repeat
    shapes = prediction_RK.shape, xt_RC.shape, t_R.shape
    wanted = (rows, 2 * channels), (rows, channels), (rows,)
    if shapes != wanted or t_R.dtype != torch.int64:
        what = f"prediction {wanted[0]}, x_t {wanted[1]} and int64 t {wanted[2]}"
        what += f" for {tokens} tokens and repeat = {draws.repeat}"
        raise refusal("diffusion_loss", what, prediction_RK.shape, xt_RC.shape, t_R)


# The operators and their gradient.


def _inputs(x0, index, slot, tables, repeat, key):
    from heptapod_fast.kernels import diffusion_loss as kernels

    return kernels.inputs(x0, index, slot, tables, repeat, key)


def _forward(*arguments):
    from heptapod_fast.kernels import diffusion_loss as kernels

    return kernels.forward(*arguments)


def _backward(*arguments):
    from heptapod_fast.kernels import diffusion_loss as kernels

    return kernels.backward(*arguments)


def _fake_inputs(x0, index, slot, tables, repeat, key):
    rows = x0.shape[0] * repeat
    return x0.new_empty(rows, x0.shape[1]), index.new_empty(rows)


def _setup(ctx: Context, inputs: Inputs, output: Any) -> None:
    *tensors, ctx.repeat, ctx.key, ctx.bound = inputs
    ctx.save_for_backward(*tensors)


def _gradient(ctx: Context, grad: Tensor) -> Gradients:
    dprediction = _backward_operator(
        grad.contiguous(), *ctx.saved_tensors, ctx.repeat, ctx.key, ctx.bound
    )
    return dprediction, *[None] * 8  # no other argument has a gradient


_arguments = (
    "Tensor prediction, Tensor x0, Tensor t, Tensor tables, Tensor index, Tensor slot, "
    "int repeat, int[] key, bool bound"
)
_inputs_operator = operator(
    "diffusion_inputs(Tensor x0, Tensor index, Tensor slot, Tensor tables, int repeat, int[] key) "
    "-> (Tensor, Tensor)",
    _inputs,
    _fake_inputs,
)
_operator = operator(
    f"diffusion_loss({_arguments}) -> Tensor",
    _forward,
    lambda prediction, x0, *_: x0.new_empty(x0.shape[0]),
)
_backward_operator = operator(
    f"diffusion_loss_backward(Tensor grad, {_arguments}) -> Tensor",
    _backward,
    lambda grad, prediction, *_: torch.empty_like(prediction),
)
differentiable(_operator, _gradient, _setup)
once(_backward_operator, "diffusion_loss")
dispatch.register_triton("diffusion_loss")
