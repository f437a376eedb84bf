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
    device; ema_decays: (k,) float32 there. weight_decays: n floats. DTensors are updated shard by
    shard; what belongs to one parameter has its mesh and placements, and no partial sums.
    implementation: "auto", "cuda", "cpu" or "reference". Raises ValueError on anything else, saying
    what is supported.
    """
    emas = [list(ema) for ema in emas]
    copies = list(copies) if copies is not None else []
    _validate_lengths(params, grads, exp_avgs, exp_avg_sqs, emas, copies, weight_decays)
    kind = sharded.dtensor_class()
    if kind is not None and _any_distributed(
        kind, params, grads, exp_avgs, exp_avg_sqs, copies, *emas
    ):
        names = _named(params, grads, exp_avgs, exp_avg_sqs, emas, copies)
        params, grads, exp_avgs, exp_avg_sqs, *emas = sharded.local_lists(
            names, "adamw_ema"
        ).values()
        copies = emas.pop() if copies else []
    _validate(params, grads, exp_avgs, exp_avg_sqs, emas, copies)
    _validate_scalars(params, len(emas), lr, step, grad_scale, ema_decays, beta1, beta2)
    if not params:
        return
    chosen = dispatch.choose("adamw_ema", params[0].device, params[0].dtype, implementation)
    with torch.no_grad():
        if chosen.implementation == "reference":
            _reference(
                params,
                grads,
                exp_avgs,
                exp_avg_sqs,
                emas,
                copies,
                lr,
                step,
                grad_scale,
                ema_decays,
                weight_decays,
                beta1,
                beta2,
                eps,
            )
        else:
            flat = [average for ema in emas for average in ema]
            torch.ops.heptapod_fast.adamw_ema.default(
                list(params),
                list(grads),
                list(exp_avgs),
                list(exp_avg_sqs),
                flat,
                copies,
                lr,
                step,
                grad_scale,
                ema_decays,
                [float(decay) for decay in weight_decays],
                beta1,
                beta2,
                eps,
            )
            if not torch.compiler.is_compiling():
                # A graph that still needs the old values must find out.
                torch.autograd.graph.increment_version(
                    [*params, *exp_avgs, *exp_avg_sqs, *flat, *copies]
                )


def _reference(
    params,
    grads,
    exp_avgs,
    exp_avg_sqs,
    emas,
    copies,
    lr,
    step,
    grad_scale,
    ema_decays,
    weight_decays,
    beta1,
    beta2,
    eps,
) -> None:
    """The definition. Scalars in float64 until they meet a tensor: 1 - beta2^t loses five digits in
    float32 at the first step."""
    skip = grad_scale == 0
    step_size = (lr.double() / _bias_correction(beta1, step)).float()
    root_correction = _bias_correction(beta2, step).sqrt().float()
    for i, param in enumerate(params):
        grad = grads[i].float() * grad_scale
        mean = exp_avgs[i].lerp(grad, 1 - beta1)
        square = (exp_avg_sqs[i] * beta2).addcmul_(grad, grad, value=1 - beta2)
        denominator = (square.sqrt() / root_correction).add_(eps)
        new = param * (1 - lr.double() * weight_decays[i]).float()
        new.addcdiv_(mean * step_size, denominator, value=-1)
        updates = [(exp_avgs[i], mean), (exp_avg_sqs[i], square), (param, new)]
        updates += [
            (ema[i], ema[i].lerp(new, 1 - decay)) for ema, decay in zip(emas, ema_decays.unbind())
        ]
        updates += [(copies[i], new.to(torch.bfloat16))] if copies else []
        for old, value in updates:
            old.copy_(torch.where(skip, old, value))


def _bias_correction(beta: float, step: Tensor) -> Tensor:
    """1 - beta^step in float64, without the cancellation."""
    return -torch.expm1(step.double() * (math.log(beta) if beta > 0 else -math.inf))


def _named(params, grads, exp_avgs, exp_avg_sqs, emas, copies) -> dict[str, Sequence[Tensor]]:
    """Every list of tensors under the name that error messages call it by."""
    lists = {"params": params, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    lists |= {f"emas[{e}]": ema for e, ema in enumerate(emas)}
    return lists | ({"copies": copies} if copies else {})


def _any_distributed(kind: type, *lists: Sequence[Tensor]) -> bool:
    return any(isinstance(tensor, kind) for tensors in lists for tensor in tensors)


def _validate_lengths(params, grads, exp_avgs, exp_avg_sqs, emas, copies, weight_decays) -> None:
    lists = _named(params, grads, exp_avgs, exp_avg_sqs, emas, copies)
    for name, tensors in (lists | {"weight_decays": weight_decays}).items():
        if len(tensors) != len(params):
            raise ValueError(
                f"adamw_ema takes lists of one length: {len(params)} params, {len(tensors)} {name}"
            )


def _validate(params, grads, exp_avgs, exp_avg_sqs, emas, copies) -> None:
    if not params:
        return
    device = params[0].device
    grad_dtype = grads[0].dtype if grads[0].dtype == torch.bfloat16 else torch.float32
    dtypes = {"grads": grad_dtype, "copies": torch.bfloat16}
    for name, tensors in _named(params, grads, exp_avgs, exp_avg_sqs, emas, copies).items():
        dtype = dtypes.get(name, torch.float32)
        for i, (tensor, param) in enumerate(zip(tensors, params)):
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


def _validate_scalars(params, count, lr, step, grad_scale, ema_decays, beta1, beta2) -> None:
    scalars = {
        "lr": (lr, ()),
        "step": (step, ()),
        "grad_scale": (grad_scale, ()),
        "ema_decays": (ema_decays, (count,)),
    }
    for name, (tensor, _) in scalars.items():
        if not torch.is_tensor(tensor):
            raise ValueError(
                f"adamw_ema takes {name} as a float32 tensor on the parameters' "
                f"device, got {type(tensor).__name__}"
            )
    device = params[0].device if params else lr.device
    for name, (tensor, shape) in scalars.items():
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
    def _fake(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        emas,
        copies,
        lr,
        step,
        grad_scale,
        ema_decays,
        weight_decays,
        beta1,
        beta2,
        eps,
    ) -> None:
        return None
