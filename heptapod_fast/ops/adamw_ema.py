"""adamw_ema: one optimizer step for all parameters, with their averages, in one pass over memory.

    g  = grad_scale * grad                          grad_scale carries loss scaling and clipping
    m  = beta1 m + (1 - beta1) g
    v  = beta2 v + (1 - beta2) g^2
    p  = (1 - lr wd) p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
    e  = d e + (1 - d) p                            for every average e, with the new p
    copy = bfloat16(p)                              if copies are kept

Decoupled AdamW (Loshchilov and Hutter, "Decoupled weight decay regularization", ICLR 2019) in the
order of `torch.optim.AdamW`. A grad_scale of exactly 0 leaves everything bitwise as it was: that is
how a step with bad gradients is skipped without the host having to look at them.

Learning rate, step, gradient scale and decays are tensors on the parameters' device, so that one
captured CUDA graph serves every step. Bytes per parameter with k averages: 28 + 8 k, 2 more with a
copy, 2 fewer with bfloat16 gradients; on CUDA every four averages beyond the fourth read the
parameters again (4 bytes). Peer: apex's `fused_adam_swa` (one average and one weight decay).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from heptapod_fast.ops import dispatch, library, sharded


def adamw_ema(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    emas: Sequence[Sequence[Tensor]],
    *,
    lr: Tensor,
    step: Tensor,
    grad_scale: Tensor,
    ema_decays: Tensor,
    weight_decays: Sequence[float],
    beta1: float,
    beta2: float,
    eps: float,
    copies: Sequence[Tensor] | None = None,
    implementation: str = "reference",
) -> None:
    """Updates params, exp_avgs, exp_avg_sqs, every list of emas and copies in place.

    params, exp_avgs, exp_avg_sqs: n contiguous float32 tensors, shapes equal place by place; grads:
    likewise, all float32 or all bfloat16; emas: k >= 0 lists like params; copies: n bfloat16
    tensors or None. lr, step (1 at the first call) and grad_scale: 0-dim float32 on the params'
    device; ema_decays: (k,) float32 there, of any stride. weight_decays: n floats. DTensors are
    updated shard by shard; what belongs to one parameter has its mesh and placements, and no
    partial sums. implementation: "auto", "cuda", "cpu" or "reference". Raises ValueError on
    anything else, saying what is supported.
    """
    state = _Lists(
        list(params),
        list(grads),
        list(exp_avgs),
        list(exp_avg_sqs),
        [list(ema) for ema in emas],
        list(copies) if copies is not None else [],
    )
    scalars = _Scalars(lr, step, grad_scale, ema_decays)
    _check_lengths(state, weight_decays)
    state = _local(state)
    _check_tensors(state)
    _check_scalars(state, scalars, beta1, beta2)
    if not state.params:
        return
    first = state.params[0]
    chosen = dispatch.select("adamw_ema", first.device, first.dtype, implementation)
    with torch.no_grad():
        if chosen == "reference":
            _reference(state, scalars, weight_decays, beta1, beta2, eps)
            return
        averages = [average for ema in state.emas for average in ema]
        torch.ops.heptapod_fast.adamw_ema.default(
            state.params,
            state.grads,
            state.exp_avgs,
            state.exp_avg_sqs,
            averages,
            state.copies,
            lr,
            step,
            grad_scale,
            ema_decays.contiguous(),  # read as a plain array
            [float(decay) for decay in weight_decays],
            beta1,
            beta2,
            eps,
        )
        if not torch.compiler.is_compiling():
            # A graph that still needs the old values must find out.
            torch.autograd.graph.increment_version(
                [*state.params, *state.exp_avgs, *state.exp_avg_sqs, *averages, *state.copies]
            )


class _Lists(NamedTuple):
    """The tensors of an update: number i of every list belongs to parameter i."""

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    emas: list[list[Tensor]]
    copies: list[Tensor]  # empty where none are kept

    def named(self) -> dict[str, list[Tensor]]:
        """Every list under the name that errors call it by."""
        lists = {
            "params": self.params,
            "grads": self.grads,
            "exp_avgs": self.exp_avgs,
            "exp_avg_sqs": self.exp_avg_sqs,
        }
        lists |= {f"emas[{e}]": ema for e, ema in enumerate(self.emas)}
        if self.copies:
            lists["copies"] = self.copies
        return lists


class _Scalars(NamedTuple):
    """What every parameter shares, on the device."""

    lr: Tensor
    step: Tensor
    grad_scale: Tensor
    ema_decays: Tensor  # (k,)


def _local(state: _Lists) -> _Lists:
    """This rank's parts of DTensors; other tensors as they are."""
    kind = sharded.dtensor_class()
    named = state.named()
    if kind is None:
        return state
    if not any(isinstance(tensor, kind) for tensors in named.values() for tensor in tensors):
        return state
    params, grads, exp_avgs, exp_avg_sqs, *others = sharded.local_lists(named, "adamw_ema").values()
    count = len(state.emas)
    copies = others[count] if state.copies else []
    return _Lists(params, grads, exp_avgs, exp_avg_sqs, others[:count], copies)


def _reference(
    state: _Lists,
    scalars: _Scalars,
    weight_decays: Sequence[float],
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """The definition. Scalars in float64 until they meet a tensor: 1 - beta2^t loses five digits in
    float32 at the first step."""
    lr, step, grad_scale, ema_decays = scalars
    skip = grad_scale == 0
    step_size = (lr.double() / _bias_correction(beta1, step)).float()
    root_correction = _bias_correction(beta2, step).sqrt().float()
    for i, param in enumerate(state.params):
        exp_avg = state.exp_avgs[i]
        exp_avg_sq = state.exp_avg_sqs[i]
        grad = state.grads[i].float() * grad_scale
        mean = exp_avg.lerp(grad, 1 - beta1)
        square = (exp_avg_sq * beta2).addcmul_(grad, grad, value=1 - beta2)
        denominator = (square.sqrt() / root_correction).add_(eps)
        new = param * (1 - lr.double() * weight_decays[i]).float()
        new.addcdiv_(mean * step_size, denominator, value=-1)
        updates = [(exp_avg, mean), (exp_avg_sq, square), (param, new)]
        for ema, decay in zip(state.emas, ema_decays.unbind()):
            updates.append((ema[i], ema[i].lerp(new, 1 - decay)))
        if state.copies:
            updates.append((state.copies[i], new.to(torch.bfloat16)))
        for old, value in updates:
            old.copy_(torch.where(skip, old, value))


def _bias_correction(beta: float, step: Tensor) -> Tensor:
    """1 - beta^step in float64, without the cancellation."""
    return -torch.expm1(step.double() * (math.log(beta) if beta > 0 else -math.inf))


def _check_lengths(state: _Lists, weight_decays: Sequence[float]) -> None:
    count = len(state.params)
    lengths = {name: len(tensors) for name, tensors in state.named().items()}
    lengths["weight_decays"] = len(weight_decays)
    for name, length in lengths.items():
        if length != count:
            raise ValueError(
                f"adamw_ema takes lists of one length: {count} params, {length} {name}"
            )


def _check_tensors(state: _Lists) -> None:
    if not state.params:
        return
    device = state.params[0].device
    grad_dtype = torch.float32
    if state.grads[0].dtype == torch.bfloat16:
        grad_dtype = torch.bfloat16
    dtypes = {"grads": grad_dtype, "copies": torch.bfloat16}
    for name, tensors in state.named().items():
        dtype = dtypes.get(name, torch.float32)
        for i, (tensor, param) in enumerate(zip(tensors, state.params)):
            if (
                tensor.dtype != dtype
                or tensor.device != device
                or tensor.shape != param.shape
                or not tensor.is_contiguous()
            ):
                _refuse(name, i, tensor, param, device)


def _refuse(name: str, i: int, tensor: Tensor, param: Tensor, device: torch.device) -> None:
    wanted = {"grads": "float32 or bfloat16 (all alike)", "copies": "bfloat16"}
    layout = "contiguous" if tensor.is_contiguous() else "non-contiguous"
    raise ValueError(
        f"adamw_ema takes {name} contiguous, {wanted.get(name, 'float32')}, on "
        f"{device}, of the params' shapes; {name}[{i}] is {layout} {tensor.dtype} "
        f"{tuple(tensor.shape)} on {tensor.device}"
        + ("" if name == "params" else f", params[{i}] is {tuple(param.shape)}")
    )


def _check_scalars(state: _Lists, scalars: _Scalars, beta1: float, beta2: float) -> None:
    for name, tensor in scalars._asdict().items():
        if not torch.is_tensor(tensor):
            raise ValueError(
                f"adamw_ema takes {name} as a float32 tensor on the parameters' "
                f"device, got {type(tensor).__name__}"
            )
    device = state.params[0].device if state.params else scalars.lr.device
    for name, tensor in scalars._asdict().items():
        shape = (len(state.emas),) if name == "ema_decays" else ()
        if tensor.dtype != torch.float32 or tensor.device != device or tensor.shape != shape:
            raise ValueError(
                f"adamw_ema takes {name} as float32 of shape {shape} on {device}, got "
                f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
            )
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
        raise ValueError(f"adamw_ema takes betas in [0, 1), got {beta1} and {beta2}")


dispatch.register("adamw_ema", "cuda", library.check("cuda"))
dispatch.register("adamw_ema", "cpu", library.check("cpu"))
dispatch.register("adamw_ema", "reference", lambda device, dtype: None)

if library.available("cpu"):

    @torch.library.register_fake("heptapod_fast::adamw_ema")
    def _fake(*arguments: object) -> None:
        return None
