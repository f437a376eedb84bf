"""flow_loss: noising, and the velocity error of flow matching along straight lines.

    x_t  = (1 - t) x_0 + t eps         t uniform on (0, 1), eps standard normal (`philox.Draws`)
    v    = eps - x_0                   the velocity of x_t
    loss = mean_c (v_hat - v)^2        then the mean over a token's repeats
    dv_hat = 2 (v_hat - v) / C / repeat * dloss

(Lipman et al. 2023; rectified flow, Liu et al. 2023, with time running from data to noise.)
Everything is float32. eps is never stored: the kernels make it again from its counter. Shapes: M
tokens, R = M * repeat rows (row m * repeat + k is the k-th of token m), C channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from heptapod_fast.ops import dispatch
from heptapod_fast.ops.checks import at_least_float32, refusal
from heptapod_fast.ops.diffusion_loss import select_by_channels
from heptapod_fast.ops.operators import Context, Gradients, Inputs, differentiable, once, operator
from heptapod_fast.ops.philox import Draws, to_uniform


def flow_inputs(x0_MC: Tensor, draws: Draws, implementation: str = "auto") -> tuple[Tensor, Tensor]:
    """x0 (M, C) -> x_t (R, C) and time (R,) in (0, 1), both float32.

    No gradient flows to x0. implementation: "auto", "triton" or "reference". Raises ValueError on
    draws that do not fit.
    """
    draws.check("flow_inputs", x0_MC)
    x0_MC = at_least_float32(x0_MC.detach())
    chosen = select_by_channels("flow_loss", x0_MC, x0_MC.shape[1], implementation)
    if chosen == "reference":
        time_R = to_uniform(draws.times())
        noise_RC = draws.noise(x0_MC.shape[1], x0_MC.dtype)
        x0_RC = x0_MC.repeat_interleave(draws.repeat, dim=0)
        return (1 - time_R)[:, None] * x0_RC + time_R[:, None] * noise_RC, time_R
    return _inputs_operator(
        x0_MC.contiguous(), *draws.arrays(), draws.repeat, [*draws.time_key, *draws.noise_key]
    )


def flow_loss(
    prediction_RC: Tensor, x0_MC: Tensor, draws: Draws, implementation: str = "auto"
) -> Tensor:
    """The mean over its repeats of each token's loss, (M,) float32.

    prediction (R, C) = v_hat, float32 or bfloat16; x0 (M, C); the draws that made x_t. The gradient
    flows to the prediction alone, in its dtype. implementation: "auto", "triton" or "reference".
    Raises ValueError on shapes or draws that do not fit.
    """
    draws.check("flow_loss", x0_MC)
    tokens, channels = x0_MC.shape
    rows = tokens * draws.repeat
    if prediction_RC.shape != (rows, channels):
        wanted = f"a prediction of shape ({rows}, {channels}) for {tokens} tokens and repeat = "
        raise refusal("flow_loss", f"{wanted}{draws.repeat}", prediction_RC.shape)
    x0_MC = at_least_float32(x0_MC.detach())
    chosen = select_by_channels("flow_loss", prediction_RC, x0_MC.shape[1], implementation)
    if chosen == "reference":
        prediction = at_least_float32(prediction_RC)
        noise_RC = draws.noise(channels, prediction.dtype)
        velocity = noise_RC - x0_MC.repeat_interleave(draws.repeat, dim=0)
        loss_R = (prediction - velocity).square().mean(-1)
        return loss_R.view(-1, draws.repeat).mean(1)
    return _operator(
        prediction_RC.contiguous(),
        x0_MC.contiguous(),
        *draws.arrays(),
        draws.repeat,
        list(draws.noise_key),
    )


# The operators and their gradient.


def _inputs(*arguments):
    from heptapod_fast.kernels import flow_loss as kernels

    return kernels.inputs(*arguments)


def _forward(*arguments):
    from heptapod_fast.kernels import flow_loss as kernels

    return kernels.forward(*arguments)


def _backward(*arguments):
    from heptapod_fast.kernels import flow_loss as kernels

    return kernels.backward(*arguments)


def _fake_inputs(x0, index, slot, repeat, key):
    rows = x0.shape[0] * repeat
    return x0.new_empty(rows, x0.shape[1]), x0.new_empty(rows)


def _setup(ctx: Context, inputs: Inputs, output: Any) -> None:
    *tensors, ctx.repeat, ctx.key = inputs
    ctx.save_for_backward(*tensors)


def _gradient(ctx: Context, grad: Tensor) -> Gradients:
    dprediction = _backward_operator(grad.contiguous(), *ctx.saved_tensors, ctx.repeat, ctx.key)
    return dprediction, *[None] * 5  # no other argument has a gradient


_arguments = "Tensor prediction, Tensor x0, Tensor index, Tensor slot, int repeat, int[] key"
_inputs_operator = operator(
    "flow_inputs(Tensor x0, Tensor index, Tensor slot, int repeat, int[] key) -> (Tensor, Tensor)",
    _inputs,
    _fake_inputs,
)
_operator = operator(
    f"flow_loss({_arguments}) -> Tensor",
    _forward,
    lambda prediction, x0, *_: x0.new_empty(x0.shape[0]),
)
_backward_operator = operator(
    f"flow_loss_backward(Tensor grad, {_arguments}) -> Tensor",
    _backward,
    lambda grad, prediction, *_: torch.empty_like(prediction),
)
differentiable(_operator, _gradient, _setup)
once(_backward_operator, "flow_loss")
dispatch.register_triton("flow_loss")
