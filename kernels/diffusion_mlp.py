"""diffusion_mlp: see `heptapod_fast.ops.diffusion_mlp`; docs/kernels/README.md says how it is
composed. cuBLAS products and kernels between them.

The first and the last layer are products in float32 whose results or factors are bfloat16
otherwise. A float32 number is the sum of three bfloat16 ones, and products of those are exact in a
float32 accumulator, so both layers run on tensor cores without losing float32's precision, and
without a float32 copy of anything that has R x F elements.

Modulation of all blocks is one (R, (3 nb + 2) F) tensor: shift, scale and gate of every block, then
shift and scale of the last layer. So is its gradient, every part of which is written in its place
by the kernel or the product that computes it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from heptapod_fast.kernels import adaln, bias_gelu, tuning
from heptapod_fast.kernels.memory import load_float32, store_rounded
from heptapod_fast.kernels.products import mm_float
from heptapod_fast.ops.diffusion_weights import BlockWeights, DiffusionWeights

# Kernels: SiLU(time + condition) of every row, and its gradients.


@triton.jit(do_not_specialize=["rows"])
def silu_sum_kernel(
    # read
    time_ptr,  # (T, F) embeddings of the timesteps
    t_ptr,  # (R,) int64
    condition_ptr,  # (M, F)
    # written
    out_ptr,  # (R, F)
    # sizes
    rows,  # R
    width,  # F
    repeat,  # R / M
    # constants
    ROWS: tl.constexpr,  # rows of a tile
    BLOCK: tl.constexpr,  # columns of a tile
):
    """out[r] = SiLU(time[t[r]] + condition[r // repeat])."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = (row < rows)[:, None] & (column < width)[None, :]  # [ROWS, BLOCK]
    t = tl.load(t_ptr + row, mask=row < rows, other=0)
    y = load_float32(time_ptr + t[:, None] * width + column[None, :], inside)
    y += load_float32(condition_ptr + (row // repeat)[:, None] * width + column[None, :], inside)
    store_rounded(out_ptr + row[:, None] * width + column[None, :], y * tl.sigmoid(y), inside)


@triton.jit
def _slope(y):
    """SiLU'(y)."""
    share = tl.sigmoid(y)
    return share * (1.0 + y * (1.0 - share))


@triton.jit(do_not_specialize=["tokens"])
def condition_gradient_kernel(
    # read
    ds_ptr,  # (R, F) the gradient of SiLU(y)
    time_ptr,  # (T, F)
    t_ptr,  # (R,) int64
    condition_ptr,  # (M, F)
    # written
    out_ptr,  # (M, F)
    # sizes
    tokens,  # M
    width,  # F
    repeat,  # R / M
    # constants
    ROWS: tl.constexpr,  # tokens of a tile
    BLOCK: tl.constexpr,  # columns of a tile
):
    """Of each token the sum over its repeats, in order."""
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = (token < tokens)[:, None] & (column < width)[None, :]  # [ROWS, BLOCK]
    at = token[:, None] * width + column[None, :]
    condition = load_float32(condition_ptr + at, inside)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for k in tl.range(0, repeat):
        row = token * repeat + k  # [ROWS]
        t = tl.load(t_ptr + row, mask=token < tokens, other=0)
        time = load_float32(time_ptr + t[:, None] * width + column[None, :], inside)
        ds = load_float32(ds_ptr + row[:, None] * width + column[None, :], inside)
        total += ds * _slope(time + condition)
    store_rounded(out_ptr + at, total, inside)


@triton.jit
def time_gradient_kernel(
    # read
    ds_ptr,  # (R, F) the gradient of SiLU(y)
    time_ptr,  # (T, F)
    order_ptr,  # (R,) int64: the rows, sorted by timestep
    bound_ptr,  # (T + 1,) int32: where each timestep begins in that order
    condition_ptr,  # (M, F)
    # written
    out_ptr,  # (T, F)
    # sizes
    width,  # F
    repeat,  # R / M
    # constants
    ROWS: tl.constexpr,  # rows of a tile
    BLOCK: tl.constexpr,  # columns of a tile
):
    """Of each timestep the sum over the rows that drew it, in order; 0 where none did."""
    t = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = column < width
    time = load_float32(time_ptr + t * width + column, inside)
    last = tl.load(bound_ptr + t + 1)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in tl.range(tl.load(bound_ptr + t), last, ROWS):
        index = start + tl.arange(0, ROWS)  # [ROWS]
        row = tl.load(order_ptr + index, mask=index < last, other=0)
        mask = (index < last)[:, None] & inside[None, :]  # [ROWS, BLOCK]
        ds = load_float32(ds_ptr + row[:, None] * width + column[None, :], mask)
        token = row // repeat
        condition = load_float32(condition_ptr + token[:, None] * width + column[None, :], mask)
        total += ds * _slope(time[None, :] + condition)
    store_rounded(out_ptr + t * width + column, tl.sum(total, axis=0), inside)


def silu_sum(time_TF: Tensor, t_R: Tensor, condition_MF: Tensor) -> Tensor:
    """SiLU(time[t] + condition[r // repeat]): (R, F), all contiguous."""
    rows = len(t_R)
    width = time_TF.shape[1]
    out = time_TF.new_empty(rows, width)
    if out.numel():
        tile = tuning.lookup("adaln", "silu_sum", width, out.device)
        grid = (triton.cdiv(rows, tile["ROWS"]), triton.cdiv(width, tile["BLOCK"]))
        repeat = rows // len(condition_MF)
        silu_sum_kernel[grid](time_TF, t_R, condition_MF, out, rows, width, repeat, **tile)
    return out


def silu_sum_backward(
    ds_RF: Tensor, time_TF: Tensor, t_R: Tensor, condition_MF: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of time and condition, added up in the order of the rows."""
    rows = len(t_R)
    steps = len(time_TF)
    tokens, width = condition_MF.shape
    dtime = torch.empty_like(time_TF)
    dcondition = torch.empty_like(condition_MF)
    if ds_RF.numel() == 0:
        return dtime.zero_(), dcondition.zero_()
    repeat = rows // tokens
    tile = tuning.lookup("adaln", "condition_gradient", width, ds_RF.device)
    grid = (triton.cdiv(tokens, tile["ROWS"]), triton.cdiv(width, tile["BLOCK"]))
    condition_gradient_kernel[grid](
        ds_RF, time_TF, t_R, condition_MF, dcondition, tokens, width, repeat, **tile
    )
    # Rows by timestep: a sort and a search instead of a histogram, which would wait or use atomics.
    ordered, order_R = torch.sort(t_R.int(), stable=True)
    every = torch.arange(steps + 1, dtype=torch.int32, device=t_R.device)
    bounds = torch.searchsorted(ordered, every, out_int32=True)
    tile = tuning.lookup("adaln", "time_gradient", width, ds_RF.device)
    time_gradient_kernel[(steps, triton.cdiv(width, tile["BLOCK"]))](
        ds_RF, time_TF, order_R, bounds, condition_MF, dtime, width, repeat, **tile
    )
    return dtime, dcondition


# Products with float32's precision on bfloat16's tensor cores.


def split(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x float32 as a sum of three bfloat16 tensors, exact but for numbers near the smallest."""
    pieces = []
    for _ in range(3):
        pieces.append(x.bfloat16())
        x = x - pieces[-1].float()
    return tuple(pieces)


def mm_rounded(a_MK: Tensor, b_KN: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """a @ b of float32 matrices with float32's precision, rounded once to `dtype`.

    For bfloat16 six of the nine products of pieces are taken; the others are below 2**-24. They are
    one product with a longer inner dimension, which adds them up in the accumulator.
    """
    if dtype == torch.float32:
        return torch.mm(a_MK, b_KN, out=out)
    extra = -a_MK.shape[1] % 4  # rows of the factor then are multiples of 16 bytes
    a1, a2, a3 = split(F.pad(a_MK, (0, extra)))
    b1, b2, b3 = split(F.pad(b_KN, (0, 0, 0, extra)))
    a = torch.cat((a1, a1, a1, a2, a2, a3), 1)
    b = torch.cat((b1, b2, b3, b1, b2, b1))
    return torch.mm(a, b, out=out)


def _input(xt_RC: Tensor, weight_FC: Tensor, bias_F: Tensor, dtype: torch.dtype) -> Tensor:
    """xt @ weight^T + bias as float32 has it, rounded to dtype: (R, F)."""
    if dtype == torch.float32:
        return torch.addmm(bias_F, xt_RC, weight_FC.t())
    # A column of ones takes the bias into the product, where it is not rounded first.
    with_ones = torch.cat((xt_RC, torch.ones_like(xt_RC[:, :1])), 1)
    with_bias = torch.cat((weight_FC.t(), bias_F[None]))
    return mm_rounded(with_ones, with_bias, dtype)


def _input_backward(dx_RF: Tensor, xt_RC: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the first layer's weight and bias, float32."""
    if dx_RF.dtype == torch.float32:
        return torch.mm(dx_RF.t(), xt_RC), dx_RF.sum(0)
    channels = xt_RC.shape[1]
    # Columns of ones give the bias gradient in the same pass; with them the rows are multiples of
    # 16 bytes.
    ones = xt_RC.new_ones(len(xt_RC), 8 - 3 * channels % 8, dtype=torch.bfloat16)
    found = mm_float(dx_RF.t(), torch.cat((*split(xt_RC), ones), 1))
    weight = found[:, : 3 * channels].unflatten(1, (3, channels)).sum(1)
    bias = found[:, 3 * channels].clone()
    return weight, bias


def _output(v_RF: Tensor, weight_KF: Tensor, bias_K: Tensor) -> Tensor:
    """v @ weight^T + bias in float32: (R, K)."""
    if v_RF.dtype == torch.float32:
        return torch.addmm(bias_K, v_RF, weight_KF.t())
    found = mm_float(v_RF, torch.cat(split(weight_KF)).t())
    return found.unflatten(1, (3, -1)).sum(1) + bias_K


def _output_backward(grad_RK: Tensor, v_RF: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the last layer's weight and bias, float32."""
    if v_RF.dtype == torch.float32:
        return torch.mm(grad_RK.t(), v_RF), grad_RK.sum(0)
    found = mm_float(torch.cat(split(grad_RK), 1).t(), v_RF)
    return found.unflatten(0, (3, -1)).sum(0), grad_RK.sum(0)


# Modulation of all layers in one tensor.

SHIFT, SCALE, GATE = 0, 1, 2  # the parts of a layer; the last layer has no gate


def _slot(all_RK: Tensor, layer: int, part: int, width: int) -> Tensor:
    """One part of one layer's modulation or of its gradient: (R, F), a view."""
    first = (3 * layer + part) * width
    return all_RK[:, first : first + width]


def _modulation_weights(weights: DiffusionWeights, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weights ((3 nb + 2) F, F) and biases of the modulation of all blocks and the last layer."""
    layers = [*weights.blocks, weights]
    parts = [layer.modulation_weight for layer in layers]
    sizes = [len(part) for part in parts]
    first = parts[0]
    all_weights = torch.empty(sum(sizes), first.shape[1], dtype=dtype, device=first.device)
    for place, part in zip(all_weights.split(sizes), parts, strict=True):
        place.copy_(part)
    all_biases = torch.cat([layer.modulation_bias for layer in layers]).to(dtype)
    return all_weights, all_biases


def _affine(weights: DiffusionWeights, layer: int) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias of a layer's norm; the last layer has none."""
    if layer == len(weights.blocks):
        return None, None
    block = weights.blocks[layer]
    return block.norm_weight, block.norm_bias


# What the forward pass keeps.


class Layer(NamedTuple):
    """Of a block, or of the last layer, which has no MLP."""

    x: Tensor  # (R, F) what is normalised
    v: Tensor  # (R, F) the modulated norm
    stats: Tensor  # (2, R) float32
    a: Tensor | None = None  # (R, F) v W1^T
    g: Tensor | None = None  # (R, F) SiLU(a + b1)
    h: Tensor | None = None  # (R, F) g W2^T


class Saved(NamedTuple):
    """`flat` of the operator's list."""

    s: Tensor  # (R, F) SiLU(y)
    modulation: Tensor  # (R, (3 nb + 2) F)
    modulation_weight: Tensor  # ((3 nb + 2) F, F)
    layers: list[Layer]  # nb blocks and the last layer

    @classmethod
    def of(cls, flat: list[Tensor], blocks: int) -> Saved:
        """From the list that `forward` returned after the prediction."""
        shared = len(cls._fields) - 1
        per_block = len(Layer._fields)
        starts = [shared + per_block * i for i in range(blocks + 1)]
        layers = [Layer(*flat[start : start + per_block]) for start in starts]
        return cls(*flat[:shared], layers)


def forward(
    xt: Tensor,
    t: Tensor,
    time: Tensor,
    condition: Tensor,
    weights: DiffusionWeights,
    eps: float,
    keep: bool,
) -> list[Tensor]:
    """The prediction (R, 2C) float32 and, if `keep`, what `Saved` names; arrays contiguous."""
    width = condition.shape[1]
    dtype = condition.dtype
    saved = []

    def normalised(x, branch, layer):
        """The sum of x and branch, and its modulated norm."""
        shift = _slot(modulation, layer, SHIFT, width)
        scale = _slot(modulation, layer, SCALE, width)
        new, v, stats = adaln.forward(x, branch, shift, scale, *_affine(weights, layer), eps)
        x = x if new is None else new
        if keep:
            saved.extend((x, v, stats))
        return x, v

    s = silu_sum(time, t, condition)
    modulation_weight, modulation_bias = _modulation_weights(weights, dtype)
    modulation = torch.addmm(modulation_bias, s, modulation_weight.t())
    if keep:
        saved.extend((s, modulation, modulation_weight))

    # A block's gate, bias and residual sum wait for the next layer's norm, which reads x anyway.
    x = _input(xt, weights.input_weight, weights.input_bias, dtype)
    branch = None
    for i, block in enumerate(weights.blocks):
        x, v = normalised(x, branch, i)
        a = torch.mm(v, block.fc1_weight.to(dtype).t())
        g = bias_gelu.forward(a, block.fc1_bias, None, "silu")
        h = torch.mm(g, block.fc2_weight.to(dtype).t())
        if keep:
            saved.extend((a, g, h))
        branch = adaln.Branch(h, block.fc2_bias, _slot(modulation, i, GATE, width))
    _, v = normalised(x, branch, len(weights.blocks))
    return [_output(v, weights.output_weight, weights.output_bias), *saved]


def backward(
    grad: Tensor,
    xt: Tensor,
    t: Tensor,
    time: Tensor,
    condition: Tensor,
    weights: DiffusionWeights,
    saved: list[Tensor],
) -> list[Tensor]:
    """Gradients of time and condition in their dtype, then of parameters in float32.

    These are: the first layer's weight and bias, the last layer's, all modulation weights as one
    ((3 nb + 2) F, F) tensor, ((nb + 1) * 6 F,) sums as adaln.SUMS orders them for every adaln, and
    fc1's weight, fc1's bias and fc2's weight of every block. No two share memory.
    """
    width = condition.shape[1]
    blocks = len(weights.blocks)
    kept = Saved.of(saved, blocks)
    dmodulation = torch.empty_like(kept.modulation)

    # v = normal * (1 + scale) + shift: the gradient of v is that of shift, so it is written there.
    doutput = _output_backward(grad, kept.layers[blocks].v)
    dv = _slot(dmodulation, blocks, SHIFT, width)
    mm_rounded(grad, weights.output_weight, condition.dtype, out=dv)

    dx = None
    sums = []
    products = []
    for i in reversed(range(blocks + 1)):
        # The norm of layer i, and the residual sum with the block before it.
        branch = None
        dgate = None
        if i > 0:
            gate = _slot(kept.modulation, i - 1, GATE, width)
            branch = adaln.Branch(kept.layers[i - 1].h, weights.blocks[i - 1].fc2_bias, gate)
            dgate = _slot(dmodulation, i - 1, GATE, width)
        dx, dh, _, _, found = adaln.backward(
            dx,
            dv,
            kept.layers[i].x,
            branch,
            _slot(kept.modulation, i, SCALE, width),
            *_affine(weights, i),
            kept.layers[i].stats,
            dgate,
            _slot(dmodulation, i, SCALE, width),
        )
        sums.insert(0, found)
        # The MLP of the block before.
        if i > 0:
            dv = _slot(dmodulation, i - 1, SHIFT, width)
            found = _mlp_backward(dh, weights.blocks[i - 1], kept.layers[i - 1], dv)
            products = found + products

    dinput = _input_backward(dx, xt)
    ds = torch.mm(dmodulation, kept.modulation_weight)
    dtime, dcondition = silu_sum_backward(ds, time, t, condition)
    dmodulation_weight = mm_float(dmodulation.t(), kept.s)
    return [
        dtime,
        dcondition,
        *dinput,
        *doutput,
        dmodulation_weight,
        torch.cat(sums),
        *products,
    ]


def _mlp_backward(dh: Tensor, block: BlockWeights, kept: Layer, dv: Tensor) -> list[Tensor]:
    """Gradients of fc1's weight and bias and of fc2's weight; that of v is written into dv."""
    dg = torch.mm(dh, block.fc2_weight.to(dh.dtype))
    da, dfc1_bias = bias_gelu.backward(dg, kept.a, block.fc1_bias, None, "silu")
    torch.mm(da, block.fc1_weight.to(dh.dtype), out=dv)
    dfc1_weight = mm_float(da.t(), kept.v)
    dfc2_weight = mm_float(dh.t(), kept.g)
    return [dfc1_weight, dfc1_bias, dfc2_weight]
