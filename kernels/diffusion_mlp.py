"""diffusion_mlp: see `heptapod_fast.ops.diffusion_mlp`. cuBLAS products and kernels between them.

The first and the last layer are products in float32 whose results or factors are bfloat16
otherwise. A float32 number is the sum of three bfloat16 ones, and products of those are exact in a
float32 accumulator, so both layers run on tensor cores without losing float32's precision, and
without a float32 copy of anything that has R x W elements.

Modulation of all blocks is one (R, (3 nb + 2) W) tensor: shift, scale and gate of every block, then
shift and scale of the last layer. So is its gradient, every part of which is written in its place
by the kernel or the product that computes it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from heptapod_fast.kernels import adaln, bias_gelu, offline, tuning
from heptapod_fast.kernels.products import mm_float
from heptapod_fast.ops.diffusion_weights import DiffusionWeights

SHARED, PER_BLOCK, LAST = 3, 6, 3  # tensors that `forward` keeps


@triton.jit(do_not_specialize=["rows"])
def _silu_sum(
    time_ptr,
    t_ptr,
    condition_ptr,
    out_ptr,
    rows,
    width,
    repeat,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    t = tl.load(t_ptr + row, mask=row < rows, other=0)
    y = tl.load(time_ptr + t[:, None] * width + column[None, :], mask=inside, other=0.0).to(
        tl.float32
    )
    y += tl.load(
        condition_ptr + (row // repeat)[:, None] * width + column[None, :], mask=inside, other=0.0
    ).to(tl.float32)
    tl.store(
        out_ptr + row[:, None] * width + column[None, :],
        (y * tl.sigmoid(y)).to(out_ptr.dtype.element_ty),
        mask=inside,
    )


@triton.jit
def _slope(y):
    """SiLU'(y)."""
    share = tl.sigmoid(y)
    return share * (1.0 + y * (1.0 - share))


@triton.jit(do_not_specialize=["tokens"])
def _condition_gradient(
    ds_ptr,
    time_ptr,
    t_ptr,
    condition_ptr,
    out_ptr,
    tokens,
    width,
    repeat,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (token < tokens)[:, None] & (column < width)[None, :]
    at = token[:, None] * width + column[None, :]
    condition = tl.load(condition_ptr + at, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for k in tl.range(0, repeat):
        row = token * repeat + k
        t = tl.load(t_ptr + row, mask=token < tokens, other=0)
        time = tl.load(time_ptr + t[:, None] * width + column[None, :], mask=inside, other=0.0).to(
            tl.float32
        )
        ds = tl.load(ds_ptr + row[:, None] * width + column[None, :], mask=inside, other=0.0).to(
            tl.float32
        )
        total += ds * _slope(time + condition)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _time_gradient(
    ds_ptr,
    time_ptr,
    order_ptr,
    bound_ptr,
    condition_ptr,
    out_ptr,
    width,
    repeat,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    time = tl.load(time_ptr + t * width + column, mask=inside, other=0.0).to(tl.float32)
    last = tl.load(bound_ptr + t + 1)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in tl.range(tl.load(bound_ptr + t), last, ROWS):
        index = start + tl.arange(0, ROWS)
        row = tl.load(order_ptr + index, mask=index < last, other=0)
        mask = (index < last)[:, None] & inside[None, :]
        ds = tl.load(ds_ptr + row[:, None] * width + column[None, :], mask=mask, other=0.0).to(
            tl.float32
        )
        condition = tl.load(
            condition_ptr + (row // repeat)[:, None] * width + column[None, :], mask=mask, other=0.0
        ).to(tl.float32)
        total += ds * _slope(time[None, :] + condition)
    tl.store(
        out_ptr + t * width + column,
        tl.sum(total, axis=0).to(out_ptr.dtype.element_ty),
        mask=inside,
    )


def silu_sum(time_TW: Tensor, t_R: Tensor, condition_MW: Tensor) -> Tensor:
    """SiLU(time[t] + condition[r // repeat]): (R, W), all contiguous."""
    rows, width = len(t_R), time_TW.shape[1]
    out = time_TW.new_empty(rows, width)
    if out.numel():
        tile = dict(tuning.lookup("adaln", "silu_sum", width, out.device))
        grid = (triton.cdiv(rows, tile["ROWS"]), triton.cdiv(width, tile["BLOCK"]))
        _silu_sum[grid](
            time_TW, t_R, condition_MW, out, rows, width, rows // len(condition_MW), **tile
        )
    return out


def silu_sum_backward(
    ds_RW: Tensor, time_TW: Tensor, t_R: Tensor, condition_MW: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of time and condition, added up in the order of the rows."""
    rows, (tokens, width) = len(t_R), condition_MW.shape
    dtime, dcondition = torch.empty_like(time_TW), torch.empty_like(condition_MW)
    if ds_RW.numel() == 0:
        return dtime.zero_(), dcondition.zero_()
    tile = dict(tuning.lookup("adaln", "condition_gradient", width, ds_RW.device))
    grid = (triton.cdiv(tokens, tile["ROWS"]), triton.cdiv(width, tile["BLOCK"]))
    _condition_gradient[grid](
        ds_RW, time_TW, t_R, condition_MW, dcondition, tokens, width, rows // tokens, **tile
    )
    # Rows by timestep: a sort and a search instead of a histogram, which would wait or use atomics.
    steps = len(time_TW)
    ordered, order_R = torch.sort(t_R.int(), stable=True)
    every = torch.arange(steps + 1, dtype=torch.int32, device=t_R.device)
    bounds = torch.searchsorted(ordered, every, out_int32=True)
    tile = dict(tuning.lookup("adaln", "time_gradient", width, ds_RW.device))
    _time_gradient[(steps, triton.cdiv(width, tile["BLOCK"]))](
        ds_RW, time_TW, order_R, bounds, condition_MW, dtime, width, rows // tokens, **tile
    )
    return dtime, dcondition


def split(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x float32 as a sum of three bfloat16 tensors, exact but for numbers near the smallest."""
    pieces = []
    for _ in range(3):
        pieces.append(x.bfloat16())
        x = x - pieces[-1].float()
    return tuple(pieces)


def mm_rounded(a_MK: Tensor, b_KN: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """a @ b of float32 matrices with float32's precision, rounded once to `dtype`.

    For bfloat16 six of the nine products of pieces are taken; the others are below 2**-24.
    """
    if dtype == torch.float32:
        return torch.mm(a_MK, b_KN, out=out)
    extra = -a_MK.shape[1] % 4  # rows of the factor then are multiples of 16 bytes
    a1, a2, a3 = split(F.pad(a_MK, (0, extra)))
    b1, b2, b3 = split(F.pad(b_KN, (0, 0, 0, extra)))
    return torch.mm(
        torch.cat((a1, a1, a1, a2, a2, a3), 1), torch.cat((b1, b2, b3, b1, b2, b1)), out=out
    )


def _input(xt_RC: Tensor, weight_WC: Tensor, bias_W: Tensor, dtype: torch.dtype) -> Tensor:
    """xt @ weight^T + bias as float32 has it, rounded to dtype: (R, W)."""
    if dtype == torch.float32:
        return torch.addmm(bias_W, xt_RC, weight_WC.t())
    return mm_rounded(
        torch.cat((xt_RC, torch.ones_like(xt_RC[:, :1])), 1),
        torch.cat((weight_WC.t(), bias_W[None])),
        dtype,
    )


def _input_backward(dx_RW: Tensor, xt_RC: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the first layer's weight and bias, float32."""
    if dx_RW.dtype == torch.float32:
        return torch.mm(dx_RW.t(), xt_RC), dx_RW.sum(0)
    channels = xt_RC.shape[1]
    # Columns of ones give the bias gradient in the same pass.
    ones = xt_RC.new_ones(len(xt_RC), 8 - 3 * channels % 8, dtype=torch.bfloat16)
    found = mm_float(dx_RW.t(), torch.cat((*split(xt_RC), ones), 1))
    weight = found[:, : 3 * channels].unflatten(1, (3, channels)).sum(1)
    return weight, found[:, 3 * channels].clone()


def _output(v_RW: Tensor, weight_KW: Tensor, bias_K: Tensor) -> Tensor:
    """v @ weight^T + bias in float32: (R, K)."""
    if v_RW.dtype == torch.float32:
        return torch.addmm(bias_K, v_RW, weight_KW.t())
    found = mm_float(v_RW, torch.cat(split(weight_KW)).t())
    return found.unflatten(1, (3, -1)).sum(1) + bias_K


def _output_backward(grad_RK: Tensor, v_RW: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the last layer's weight and bias, float32."""
    if v_RW.dtype == torch.float32:
        return torch.mm(grad_RK.t(), v_RW), grad_RK.sum(0)
    found = mm_float(torch.cat(split(grad_RK), 1).t(), v_RW)
    return found.unflatten(0, (3, -1)).sum(0), grad_RK.sum(0)


def _modulation(weights: DiffusionWeights, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weights ((3 nb + 2) W, W) and biases of the modulation of all blocks and the last layer."""
    layers = [*weights.blocks, weights]
    weight = [layer.modulation_weight for layer in layers]
    bias = [layer.modulation_bias for layer in layers]
    out = torch.empty(
        sum(map(len, weight)), weight[0].shape[1], dtype=dtype, device=weight[0].device
    )
    for part, value in zip(out.split([len(w) for w in weight]), weight, strict=True):
        part.copy_(value)
    return out, torch.cat(bias).to(dtype)


def _slot(all_RK: Tensor, k: int, width: int) -> Tensor:
    """Part k of modulation or its gradient: (R, W), a view."""
    return all_RK[:, k * width : (k + 1) * width]


def _affine(weights: DiffusionWeights, i: int) -> tuple[Tensor | None, Tensor | None]:
    if i == len(weights.blocks):
        return None, None
    return weights.blocks[i].norm_weight, weights.blocks[i].norm_bias


def forward(
    xt: Tensor,
    t: Tensor,
    time: Tensor,
    condition: Tensor,
    weights: DiffusionWeights,
    eps: float,
    keep: bool,
) -> list[Tensor]:
    """The prediction (R, 2C) float32 and, if `keep`, what `backward` needs; arrays contiguous.

    Kept are SiLU(y), modulation and its weights, PER_BLOCK tensors for each block (x, v, statistics
    and the MLP's two hidden tensors and result) and LAST for the last layer.
    """
    width, dtype = condition.shape[1], condition.dtype
    s = silu_sum(time, t, condition)
    modulation_weight, modulation_bias = _modulation(weights, dtype)
    modulation = torch.addmm(modulation_bias, s, modulation_weight.t())
    saved = [s, modulation, modulation_weight] if keep else []
    x, branch = _input(xt, weights.input_weight, weights.input_bias, dtype), None
    for i in range(len(weights.blocks) + 1):
        shift, scale = _slot(modulation, 3 * i, width), _slot(modulation, 3 * i + 1, width)
        new, v, stats = adaln.forward(x, branch, shift, scale, *_affine(weights, i), eps)
        x = x if new is None else new
        if keep:
            saved += [x, v, stats]
        if i == len(weights.blocks):
            break
        block = weights.blocks[i]
        a = torch.mm(v, block.fc1_weight.to(dtype).t())
        g = bias_gelu.forward(a, block.fc1_bias, None, "silu")
        h = torch.mm(g, block.fc2_weight.to(dtype).t())
        if keep:
            saved += [a, g, h]
        branch = adaln.Branch(h, block.fc2_bias, _slot(modulation, 3 * i + 2, width))
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
    ((3 nb + 2) W, W) tensor, ((nb + 1) * 6 W,) sums as adaln.SUMS orders them for every adaln, and
    fc1's weight, fc1's bias and fc2's weight of every block. No two share memory.
    """
    width, dtype, count = condition.shape[1], condition.dtype, len(weights.blocks)
    s, modulation, modulation_weight = saved[:SHARED]
    places = [saved[SHARED + PER_BLOCK * i :][:PER_BLOCK] for i in range(count + 1)]
    dmodulation = torch.empty_like(modulation)
    dlast = _output_backward(grad, places[-1][1])
    mm_rounded(grad, weights.output_weight, dtype, out=_slot(dmodulation, 3 * count, width))
    dx, sums, products = None, [], []
    for i in reversed(range(count + 1)):
        x, _, stats = places[i][:3]
        branch = dgate = None
        if i > 0:
            branch = adaln.Branch(
                places[i - 1][5],
                weights.blocks[i - 1].fc2_bias,
                _slot(modulation, 3 * i - 1, width),
            )
            dgate = _slot(dmodulation, 3 * i - 1, width)
        dx, dh, _, _, found = adaln.backward(
            dx,
            _slot(dmodulation, 3 * i, width),
            x,
            branch,
            _slot(modulation, 3 * i + 1, width),
            *_affine(weights, i),
            stats,
            dgate,
            _slot(dmodulation, 3 * i + 1, width),
        )
        sums.insert(0, found)
        if i > 0:
            _, v, _, a, g, _ = places[i - 1]
            products = (
                _mlp_backward(
                    dh, weights.blocks[i - 1], v, a, g, _slot(dmodulation, 3 * i - 3, width)
                )
                + products
            )
    dfirst = _input_backward(dx, xt)
    dtime, dcondition = silu_sum_backward(
        torch.mm(dmodulation, modulation_weight), time, t, condition
    )
    return [
        dtime,
        dcondition,
        *dfirst,
        *dlast,
        mm_float(dmodulation.t(), s),
        torch.cat(sums),
        *products,
    ]


def _mlp_backward(dh: Tensor, block, v: Tensor, a: Tensor, g: Tensor, dv: Tensor) -> list[Tensor]:
    """Gradients of fc1's weight and bias and of fc2's weight; that of v is written into dv."""
    dg = torch.mm(dh, block.fc2_weight.to(dh.dtype))
    da, dbias = bias_gelu.backward(dg, a, block.fc1_bias, None, "silu")
    torch.mm(da, block.fc1_weight.to(dh.dtype), out=dv)
    return [mm_float(da.t(), v), dbias, mm_float(dh.t(), g)]


def compile_cases(arch: str):
    """See offline.py."""
    common = dict(
        time_ptr="*bf16", condition_ptr="*bf16", out_ptr="*bf16", width="i32", repeat="i32"
    )
    rows = dict(t_ptr="*i64")
    for name, kernel, types in (
        ("silu_sum", _silu_sum, rows | dict(rows="i32")),
        ("condition_gradient", _condition_gradient, rows | dict(ds_ptr="*bf16", tokens="i32")),
        ("time_gradient", _time_gradient, dict(ds_ptr="*bf16", order_ptr="*i64", bound_ptr="*i32")),
    ):
        for size, tile in tuning.buckets("adaln", name, arch).items():
            tile = dict(tile)
            options = dict(num_warps=tile.pop("num_warps"))
            yield offline.Case(
                f"diffusion_mlp {name} <= {size}",
                kernel,
                common | types,
                tile,
                options,
                unaligned=("repeat",),
            )
