"""diffusion_mlp: MAR's SimpleMLPAdaLN (mar:models/diffloss.py), forward and backward in one piece.

    s    = SiLU(time[t] + condition[token])                        once for all blocks
    x_0  = xt Win^T + bin                                          float32, then rounded
    for every block:
        shift, scale, gate = s Wmod^T + bmod
        v    = LN(x) * (1 + scale) + shift                         LN with weight and bias
        x    = x + gate * (SiLU(v W1^T + b1) W2^T + b2)
    shift, scale = s Wlast^T + blast
    out  = (LN(x) * (1 + scale) + shift) Wout^T + bout             LN without; float32

Row r of R belongs to token r // repeat. The first layer works in float32 because at small t the
noise is finer than bfloat16 resolves, the last because the loss is; the rest runs in the dtype of
the condition. Parameters are float32 masters and so are their gradients.

The kernels compute the modulation of all blocks in one product, and so its gradients, 60% of the
work; weight gradients come out of their products in float32; biases and affine parameters get their
gradients inside passes that are made anyway, in a fixed order. Per row and block 10 W bytes are
kept for the backward pass (x, v, two hidden tensors, the MLP's result; bfloat16) and 6 W of
modulation.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from heptapod_fast.ops import dispatch
from heptapod_fast.ops.adaln import MAX_WIDTH
from heptapod_fast.ops.checks import check_rows
from heptapod_fast.ops.diffusion_weights import BlockWeights, DiffusionWeights
from heptapod_fast.ops.operators import differentiable, once, operator


def diffusion_mlp(
    xt_RC: Tensor,
    t_R: Tensor,
    time_TW: Tensor,
    condition_MW: Tensor,
    weights: DiffusionWeights,
    eps: float = 1e-6,
    implementation: str = "auto",
) -> Tensor:
    """Noisy tokens, timesteps, the table of their embeddings, conditions -> (R, 2C) float32.

    xt (R, C) float32, which gets no gradient; t (R,) int64 in 0..T-1, not checked; time (T, W) and
    condition (M, W) of one dtype, float32 or bfloat16, with R = M * repeat. implementation: "auto",
    "triton" (W <= 4096) or "reference". Raises ValueError on shapes or dtypes that do not fit.
    """
    _check(xt_RC, t_R, time_TW, condition_MW, weights)
    width, parameter, unsupported = condition_MW.shape[1], weights.input_weight.dtype, None
    if width > MAX_WIDTH:
        unsupported = f"width {width} is above {MAX_WIDTH}"
    if parameter != torch.float32:
        unsupported = f"parameters are {parameter}, not torch.float32"
    chosen = dispatch.select(
        "diffusion_mlp", condition_MW.device, condition_MW.dtype, implementation, unsupported
    )
    if chosen == "reference":
        return reference(xt_RC, t_R, time_TW, condition_MW, weights, eps)
    flat = [parameter.contiguous() for parameter in weights.flat()]
    keep = torch.is_grad_enabled() and any(a.requires_grad for a in (time_TW, condition_MW, *flat))
    return _operator(
        xt_RC.detach().contiguous(),
        t_R.contiguous(),
        time_TW.contiguous(),
        condition_MW.contiguous(),
        flat,
        eps,
        keep,
    )[0]


def reference(
    xt_RC: Tensor,
    t_R: Tensor,
    time_TW: Tensor,
    condition_MW: Tensor,
    weights: DiffusionWeights,
    eps: float,
) -> Tensor:
    """The definition."""
    repeat = len(t_R) // max(1, len(condition_MW))
    y_RW = F.embedding(t_R, time_TW) + condition_MW.repeat_interleave(repeat, dim=0)
    return reference_of_sum(xt_RC, y_RW, weights, eps)


def reference_of_sum(xt_RC: Tensor, y_RW: Tensor, weights: DiffusionWeights, eps: float) -> Tensor:
    """The same, given the sum of time embedding and condition of every row."""
    silu_y = F.silu(y_RW)
    x_RW = F.linear(xt_RC, weights.input_weight, weights.input_bias).to(y_RW.dtype)
    for block in weights.blocks:
        modulation = _linear(silu_y, block.modulation_weight, block.modulation_bias)
        shift, scale, gate = modulation.chunk(3, dim=-1)
        normal = F.layer_norm(
            x_RW,
            x_RW.shape[-1:],
            block.norm_weight.to(x_RW.dtype),
            block.norm_bias.to(x_RW.dtype),
            eps,
        )
        hidden = torch.addcmul(shift, normal, 1 + scale)
        hidden = F.silu(_linear(hidden, block.fc1_weight, block.fc1_bias))
        x_RW = torch.addcmul(x_RW, gate, _linear(hidden, block.fc2_weight, block.fc2_bias))
    modulation = _linear(silu_y, weights.modulation_weight, weights.modulation_bias)
    shift, scale = modulation.chunk(2, dim=-1)
    hidden = torch.addcmul(shift, F.layer_norm(x_RW, x_RW.shape[-1:], eps=eps), 1 + scale)
    return F.linear(
        hidden.to(weights.output_weight.dtype), weights.output_weight, weights.output_bias
    )


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, weight.to(x.dtype), bias.to(x.dtype))


def _check_weights(xt, t, time, condition, weights) -> None:
    names = [
        *weights._fields[:-1],
        *(
            f"blocks[{i}].{name}"
            for i in range(len(weights.blocks))
            for name in BlockWeights._fields
        ),
    ]
    check_rows(
        "diffusion_mlp",
        condition=condition,
        time=time,
        xt=xt,
        t=t,
        **dict(zip(names, weights.flat())),
    )
    width = condition.shape[-1]
    sizes = dict(
        norm_weight=(width,),
        norm_bias=(width,),
        fc1_bias=(width,),
        fc2_bias=(width,),
        fc1_weight=(width, width),
        fc2_weight=(width, width),
        input_bias=(width,),
        output_bias=weights.output_weight.shape[:1],
    )
    for name, tensor in zip(names, weights.flat()):
        parts = 3 if name.startswith("blocks") else 2
        modulation = dict(
            modulation_weight=(parts * width, width), modulation_bias=(parts * width,)
        )
        wanted = (sizes | modulation).get(name.split(".")[-1])
        if wanted is not None and tensor.shape != wanted:
            raise ValueError(
                f"diffusion_mlp takes {name} of shape {tuple(wanted)}, got {tuple(tensor.shape)}"
            )
    if t.dtype != torch.int64:
        raise ValueError(f"diffusion_mlp takes t as int64, got {t.dtype}")


def _check(xt, t, time, condition, weights) -> None:
    _check_weights(xt, t, time, condition, weights)
    rows, tokens, width = len(xt), len(condition), condition.shape[-1]
    if condition.dim() != 2 or time.dim() != 2 or time.shape[1] != width:
        raise ValueError(
            f"diffusion_mlp takes time (T, W) and condition (M, W); got "
            f"{tuple(time.shape)} and {tuple(condition.shape)}"
        )
    if time.dtype != condition.dtype:
        raise ValueError(
            f"diffusion_mlp takes time and condition of one dtype; got {time.dtype} "
            f"and {condition.dtype}"
        )
    if t.shape != (rows,) or rows % max(1, tokens) or (rows and not tokens):
        raise ValueError(
            f"diffusion_mlp takes as many timesteps as rows of xt and a divisor of "
            f"them of conditions; got {tuple(t.shape)}, {rows} and {tokens}"
        )
    channels, first, last = xt.shape[-1], weights.input_weight, weights.output_weight
    if xt.dim() != 2 or first.shape != (width, channels) or last.shape[1:] != (width,):
        raise ValueError(
            f"diffusion_mlp takes xt (R, C), an input weight (W, C) and an output "
            f"weight (2 C, W), W = {width}; got {tuple(xt.shape)}, "
            f"{tuple(first.shape)} and {tuple(last.shape)}"
        )
    if xt.dtype != first.dtype:
        raise ValueError(
            f"diffusion_mlp takes xt in the dtype of its weights, {first.dtype}; got {xt.dtype}"
        )


# torch.mm(..., out=...) refuses factors that want a gradient.
@torch.no_grad()
def _forward(xt, t, time, condition, weights, eps, keep):
    from heptapod_fast.kernels import diffusion_mlp as kernels

    return kernels.forward(xt, t, time, condition, DiffusionWeights.of(weights), eps, keep)


def _forward_fake(xt, t, time, condition, weights, eps, keep):
    rows, width, of = xt.shape[0], condition.shape[1], DiffusionWeights.of(weights)
    prediction = xt.new_empty(rows, len(of.output_bias))
    if not keep:
        return [prediction]
    total = sum(len(layer.modulation_bias) for layer in (*of.blocks, of))
    hidden = lambda count: [condition.new_empty(rows, width) for _ in range(count)]
    stats = lambda: xt.new_empty(2, rows)
    saved = [*hidden(1), condition.new_empty(rows, total), condition.new_empty(total, width)]
    for _ in of.blocks:
        saved += [*hidden(2), stats(), *hidden(3)]
    return [prediction, *saved, *hidden(2), stats()]


@torch.no_grad()
def _backward(grad, xt, t, time, condition, weights, saved):
    from heptapod_fast.kernels import diffusion_mlp as kernels

    return kernels.backward(grad, xt, t, time, condition, DiffusionWeights.of(weights), saved)


def _backward_fake(grad, xt, t, time, condition, weights, saved):
    of, width = DiffusionWeights.of(weights), condition.shape[1]
    first = [of.input_weight, of.input_bias, of.output_weight, of.output_bias]
    sums = xt.new_empty(6 * width * (len(of.blocks) + 1))
    products = [
        tensor
        for block in of.blocks
        for tensor in (block.fc1_weight, block.fc1_bias, block.fc2_weight)
    ]
    return [
        torch.empty_like(time),
        torch.empty_like(condition),
        *(torch.empty_like(a) for a in first),
        xt.new_empty(saved[2].shape),
        sums,
        *(torch.empty_like(a) for a in products),
    ]


def _setup(ctx, inputs, output) -> None:
    xt, t, time, condition, weights, _, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(xt, t, time, condition, *weights, *output[1:])
    ctx.weights = len(weights)


def _gradient(ctx, grads):
    xt, t, time, condition, *others = ctx.saved_tensors
    weights, saved = others[: ctx.weights], others[ctx.weights :]
    if not saved:
        raise RuntimeError(
            "diffusion_mlp ran with keep=False, which leaves nothing to differentiate"
        )
    dtime, dcondition, *found = _backward_operator(
        grads[0].contiguous(), xt, t, time, condition, weights, saved
    )
    return None, None, dtime, dcondition, _parameters(found, condition.shape[1]), None, None


def _parameters(found: list[Tensor], width: int) -> list[Tensor]:
    """Gradients in the order of DiffusionWeights.flat(), cut out of what the kernels computed.

    The sums of two neighbouring adaln are gate, branch_bias, weight, bias, shift, scale of the
    first, then of the second: a block's shift and scale lie next to its gate, which the next adaln
    computes.
    """
    *ends, modulation, sums = found[:6]
    products, flat = found[6:], []
    count = len(products) // 3
    for i in range(count):
        part = sums[6 * i * width :]
        dfc1, dfc1_bias, dfc2 = products[3 * i : 3 * i + 3]
        flat += [
            part[2 * width : 3 * width],
            part[3 * width : 4 * width],
            dfc1,
            dfc1_bias,
            dfc2,
            part[7 * width : 8 * width],
            modulation[3 * i * width : 3 * (i + 1) * width],
            part[4 * width : 7 * width],
        ]
    last = [modulation[3 * count * width :], sums[(6 * count + 4) * width :]]
    return [*ends[:2], *last, *ends[2:], *flat]


_operator = operator(
    "diffusion_mlp(Tensor xt, Tensor t, Tensor time, Tensor condition, Tensor[] weights, float eps,"
    " bool keep) -> Tensor[]",
    _forward,
    _forward_fake,
)
_backward_operator = operator(
    "diffusion_mlp_backward(Tensor grad, Tensor xt, Tensor t, Tensor time, Tensor condition, "
    "Tensor[] weights, Tensor[] saved) -> Tensor[]",
    _backward,
    _backward_fake,
)
differentiable(_operator, _gradient, _setup)
once(_backward_operator, "diffusion_mlp")
dispatch.register_triton("diffusion_mlp")
