"""diffusion_mlp: MAR's SimpleMLPAdaLN (mar:models/diffloss.py), forward and backward in one piece.

    s    = SiLU(time[t] + condition[token])                        once for all blocks
    x_0  = xt Win^T + bin                                          float32, then rounded
    for every block:
        shift, scale, gate = s Wmod^T + bmod
        v    = LN(x) * (1 + scale) + shift                         LN with weight and bias
        x    = x + gate * (SiLU(v W1^T + b1) W2^T + b2)
    shift, scale = s Wlast^T + blast
    out  = (LN(x) * (1 + scale) + shift) Wout^T + bout             LN without; float32

Row r of R belongs to token r // repeat. time is a table of embeddings: of all timesteps (T = 1000,
diffusion), or of each row's own time (T = R, flow matching). out has as many columns as Wout has
rows, 2 C or C. The first layer works in float32 because at small t the noise is finer than bfloat16
resolves, the last because the loss is; the rest runs in the dtype of the condition. Parameters are
float32 masters and so are their gradients.

The kernels compute the modulation of all blocks in one product, and so its gradients, 60% of the
work; weight gradients come out of their products in float32; biases and affine parameters get their
gradients inside passes that are made anyway, in a fixed order. Per row and block 10 F bytes are
kept for the backward pass (x, v, two hidden tensors, the MLP's result; bfloat16) and 6 F of
modulation. Shapes: R rows, M tokens, C channels, T steps, width F, nb blocks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from heptapod_fast.ops import dispatch
from heptapod_fast.ops.adaln import MAX_WIDTH
from heptapod_fast.ops.adaln_sums import Sums
from heptapod_fast.ops.checks import check_dtype, check_rows, check_shape, refusal
from heptapod_fast.ops.diffusion_weights import BlockWeights, DiffusionWeights
from heptapod_fast.ops.operators import Context, Gradients, Inputs, differentiable, once, operator


def diffusion_mlp(
    xt_RC: Tensor,
    t_R: Tensor,
    time_TF: Tensor,
    condition_MF: Tensor,
    weights: DiffusionWeights,
    eps: float = 1e-6,
    implementation: str = "auto",
) -> Tensor:
    """Noisy tokens, timesteps, the table of their embeddings, conditions -> (R, outputs) float32.

    There are as many outputs as the output weight has rows.

    xt (R, C) float32, which gets no gradient; t (R,) int64 in 0..T-1, not checked; time (T, F) and
    condition (M, F) of one dtype, float32 or bfloat16, with R = M * repeat. implementation: "auto",
    "triton" (F <= 4096) or "reference". Raises ValueError on shapes or dtypes that do not fit.
    """
    _check(xt_RC, t_R, time_TF, condition_MF, weights)
    if _select(condition_MF, weights, implementation) == "reference":
        return reference(xt_RC, t_R, time_TF, condition_MF, weights, eps)
    flat = [parameter.contiguous() for parameter in weights.flat()]
    # Without a gradient nothing is kept for the backward pass.
    keep = torch.is_grad_enabled() and any(a.requires_grad for a in (time_TF, condition_MF, *flat))
    prediction, *_ = _operator(
        xt_RC.detach().contiguous(),
        t_R.contiguous(),
        time_TF.contiguous(),
        condition_MF.contiguous(),
        flat,
        eps,
        keep,
    )
    return prediction


def _select(condition_MF: Tensor, weights: DiffusionWeights, implementation: str) -> str:
    width = condition_MF.shape[1]
    parameter = weights.input_weight.dtype
    unsupported = None
    if width > MAX_WIDTH:
        unsupported = f"width {width} is above {MAX_WIDTH}"
    if parameter != torch.float32:
        unsupported = f"parameters are {parameter}, not torch.float32"
    return dispatch.select(
        "diffusion_mlp", condition_MF.device, condition_MF.dtype, implementation, unsupported
    )


def reference(
    xt_RC: Tensor,
    t_R: Tensor,
    time_TF: Tensor,
    condition_MF: Tensor,
    weights: DiffusionWeights,
    eps: float,
) -> Tensor:
    """The definition."""
    repeat = len(t_R) // max(1, len(condition_MF))
    y_RF = F.embedding(t_R, time_TF) + condition_MF.repeat_interleave(repeat, dim=0)
    silu_y = F.silu(y_RF)
    x_RF = F.linear(xt_RC, weights.input_weight, weights.input_bias).to(y_RF.dtype)
    for block in weights.blocks:
        modulation = _linear(silu_y, block.modulation_weight, block.modulation_bias)
        shift, scale, gate = modulation.chunk(3, dim=-1)
        norm_weight = block.norm_weight.to(x_RF.dtype)
        norm_bias = block.norm_bias.to(x_RF.dtype)
        normal = F.layer_norm(x_RF, x_RF.shape[-1:], norm_weight, norm_bias, eps)
        hidden = torch.addcmul(shift, normal, 1 + scale)
        hidden = F.silu(_linear(hidden, block.fc1_weight, block.fc1_bias))
        x_RF = torch.addcmul(x_RF, gate, _linear(hidden, block.fc2_weight, block.fc2_bias))
    modulation = _linear(silu_y, weights.modulation_weight, weights.modulation_bias)
    shift, scale = modulation.chunk(2, dim=-1)
    normal = F.layer_norm(x_RF, x_RF.shape[-1:], eps=eps)
    hidden = torch.addcmul(shift, normal, 1 + scale).to(weights.output_weight.dtype)
    return F.linear(hidden, weights.output_weight, weights.output_bias)


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, weight.to(x.dtype), bias.to(x.dtype))


def _check(
    xt: Tensor, t: Tensor, time: Tensor, condition: Tensor, weights: DiffusionWeights
) -> None:
    name = "diffusion_mlp"
    parameters = weights.named()
    check_rows(name, condition=condition, time=time, xt=xt, t=t, **parameters)
    width = condition.shape[-1]
    for parameter, shape in weights.shapes(width).items():
        check_shape(name, shape, **{parameter: parameters[parameter]})
    check_dtype(name, torch.int64, t=t)

    if condition.dim() != 2 or time.dim() != 2 or time.shape[1] != width:
        raise refusal(name, "time (T, F) and condition (M, F)", time.shape, condition.shape)
    if time.dtype != condition.dtype:
        raise refusal(name, "time and condition of one dtype", time.dtype, condition.dtype)

    rows = len(xt)
    tokens = len(condition)
    if t.shape != (rows,) or rows % max(1, tokens) or (rows and not tokens):
        wanted = "as many timesteps as rows of xt and a divisor of them of conditions"
        raise refusal(name, wanted, t.shape, rows, tokens)

    first = weights.input_weight
    last = weights.output_weight
    if xt.dim() != 2 or first.shape != (width, xt.shape[-1]) or last.shape[1:] != (width,):
        layers = "an input weight (F, C) and an output weight (outputs, F)"
        wanted = f"xt (R, C), {layers}, F = {width}"
        raise refusal(name, wanted, xt.shape, first.shape, last.shape)
    if xt.dtype != first.dtype:
        raise refusal(name, f"xt in the dtype of its weights, {first.dtype}", xt.dtype)


# The operator and its gradient.


# torch.mm(..., out=...) refuses factors that want a gradient.
@torch.no_grad()
def _forward(xt, t, time, condition, weights, eps, keep):
    from heptapod_fast.kernels import diffusion_mlp as kernels

    return kernels.forward(xt, t, time, condition, DiffusionWeights.of(weights), eps, keep)


def _forward_fake(xt, t, time, condition, weights, eps, keep):
    rows = xt.shape[0]
    width = condition.shape[1]
    of = DiffusionWeights.of(weights)
    prediction = xt.new_empty(rows, len(of.output_bias))
    if not keep:
        return [prediction]
    hidden = lambda: condition.new_empty(rows, width)
    norm = lambda: [hidden(), hidden(), xt.new_empty(2, rows)]  # x, v, stats
    mlp = lambda: [hidden(), hidden(), hidden()]  # a, g, h
    biases = [block.modulation_bias for block in of.blocks] + [of.modulation_bias]
    total = sum(len(bias) for bias in biases)
    saved = [hidden(), condition.new_empty(rows, total), condition.new_empty(total, width)]
    for _ in of.blocks:
        saved += [*norm(), *mlp()]
    return [prediction, *saved, *norm()]


@torch.no_grad()
def _backward(grad, xt, t, time, condition, weights, saved):
    from heptapod_fast.kernels import diffusion_mlp as kernels

    return kernels.backward(grad, xt, t, time, condition, DiffusionWeights.of(weights), saved)


def _backward_fake(grad, xt, t, time, condition, weights, saved):
    of = DiffusionWeights.of(weights)
    width = condition.shape[1]
    _, _, modulation_weight, *_ = saved
    ends = [of.input_weight, of.input_bias, of.output_weight, of.output_bias]
    products = []
    for block in of.blocks:
        products += [block.fc1_weight, block.fc1_bias, block.fc2_weight]
    return [
        torch.empty_like(time),
        torch.empty_like(condition),
        *(torch.empty_like(a) for a in ends),
        xt.new_empty(modulation_weight.shape),
        xt.new_empty(len(Sums._fields) * width * (len(of.blocks) + 1)),
        *(torch.empty_like(a) for a in products),
    ]


def _setup(ctx: Context, inputs: Inputs, output: Any) -> None:
    xt, t, time, condition, weights, _, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(xt, t, time, condition, *weights, *output[1:])
    ctx.weights = len(weights)


def _gradient(ctx: Context, grads: list[Tensor]) -> Gradients:
    xt, t, time, condition, *others = ctx.saved_tensors
    weights = others[: ctx.weights]
    saved = others[ctx.weights :]
    if not saved:
        raise RuntimeError(
            "diffusion_mlp ran with keep=False, which leaves nothing to differentiate"
        )
    dtime, dcondition, *found = _backward_operator(
        grads[0].contiguous(), xt, t, time, condition, weights, saved
    )
    dweights = _parameters(found, condition.shape[1])
    return None, None, dtime, dcondition, dweights, None, None


def _parameters(found: list[Tensor], width: int) -> list[Tensor]:
    """Gradients in the order of DiffusionWeights.flat(), cut out of what the kernels computed.

    found: as the kernels' `backward` returns it, without the gradients of time and condition.
    Layer i is block i, then the last layer. Its adaln sums what reaches its norm, its shift and
    scale, and what reaches the end of the block before it: that one's gate and fc2_bias.
    """
    input_weight, input_bias, output_weight, output_bias, modulation_weight, sums, *rest = found
    products = [rest[i : i + 3] for i in range(0, len(rest), 3)]
    count = len(products)
    of_layer = [Sums(*rows) for rows in sums.view(count + 1, len(Sums._fields), width)]
    modulation_weights = modulation_weight.split([3 * width] * count + [2 * width])
    # Shift and scale of a layer are followed by the gate that the next layer summed.
    modulation_biases = sums[Sums._fields.index("shift") * width :].split(len(Sums._fields) * width)

    blocks = []
    for i, (dfc1_weight, dfc1_bias, dfc2_weight) in enumerate(products):
        block = BlockWeights(
            norm_weight=of_layer[i].weight,
            norm_bias=of_layer[i].bias,
            fc1_weight=dfc1_weight,
            fc1_bias=dfc1_bias,
            fc2_weight=dfc2_weight,
            fc2_bias=of_layer[i + 1].branch_bias,
            modulation_weight=modulation_weights[i],
            modulation_bias=modulation_biases[i][: 3 * width],
        )
        blocks.append(block)
    return DiffusionWeights(
        input_weight=input_weight,
        input_bias=input_bias,
        modulation_weight=modulation_weights[count],
        modulation_bias=modulation_biases[count],
        output_weight=output_weight,
        output_bias=output_bias,
        blocks=tuple(blocks),
    ).flat()


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
