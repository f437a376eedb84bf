"""adaln from a plain kernel up, one row per program, float32.

Each step is a whole kernel, tested against the reference in heptapod_fast/ops/adaln.py. Its
docstring says which idea it adds and where kernels/adaln.py has it. docs/kernels/README.md tells
the story in words. tests/ladder/test_layer_norm.py comes first.
"""

import pytest
import torch

from heptapod_fast.ops import adaln
from tests.numerics import DEVICE

pytest.importorskip("triton")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

EPS = 1e-6


@triton.jit
def modulated_norm_kernel(
    x_ptr,  # (R, F)
    weight_ptr,  # (F,)
    bias_ptr,  # (F,)
    modulation_ptr,  # (R, 3 F): shift, scale and gate of each row
    v_ptr,  # (R, F)
    width,  # F
    eps,
    BLOCK: tl.constexpr,  # power of 2, at least F
):
    """Step 1: a norm whose result is scaled and shifted by numbers of its own row.

    Modulation comes out of one product as a (R, 3 F) tensor. The kernel reads shift and scale from
    their columns of it: cutting them out first would be a copy of each.

    The real kernel (adaln_forward_kernel) takes a stride for each of them instead of the factor 3,
    so that they can be columns of any tensor: in the diffusion MLP of one that holds the modulation
    of all blocks.
    """
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)  # [BLOCK]
    inside = column < width
    x = tl.load(x_ptr + row * width + column, mask=inside, other=0.0)
    mean = tl.sum(x, axis=0) / width
    centred = tl.where(inside, x - mean, 0.0)
    normal = centred / tl.sqrt(tl.sum(centred * centred, axis=0) / width + eps)

    weight = tl.load(weight_ptr + column, mask=inside, other=0.0)
    bias = tl.load(bias_ptr + column, mask=inside, other=0.0)
    modulation = modulation_ptr + row * 3 * width + column
    shift = tl.load(modulation, mask=inside, other=0.0)
    scale = tl.load(modulation + width, mask=inside, other=0.0)
    v = (normal * weight + bias) * (1.0 + scale) + shift
    tl.store(v_ptr + row * width + column, v, mask=inside)


@triton.jit
def gated_norm_kernel(
    x_ptr,  # (R, F)
    branch_ptr,  # (R, F) the block before, without its bias
    branch_bias_ptr,  # (F,)
    gate_ptr,  # (R, F) the gate of the block before
    weight_ptr,  # (F,)
    bias_ptr,  # (F,)
    modulation_ptr,  # (R, 3 F): shift, scale and gate of this block
    new_ptr,  # (R, F) x + gate * (branch + branch_bias)
    v_ptr,  # (R, F)
    width,  # F
    eps,
    BLOCK: tl.constexpr,  # power of 2, at least F
):
    """Step 2: the end of one block and the start of the next are one pass.

    A block ends with bias, gate and residual sum, and the next one begins with the norm of that
    sum. Between the products of a chain of blocks this kernel is all there is: five reads and two
    writes of (R, F).

    The real kernel leaves the first half out for the first block, weight and bias for the last
    layer, and keeps the statistics of the norm.
    """
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)  # [BLOCK]
    inside = column < width
    at = row * width + column
    x = tl.load(x_ptr + at, mask=inside, other=0.0)
    branch = tl.load(branch_ptr + at, mask=inside, other=0.0)
    branch_bias = tl.load(branch_bias_ptr + column, mask=inside, other=0.0)
    gate = tl.load(gate_ptr + at, mask=inside, other=0.0)
    new = x + gate * (branch + branch_bias)
    tl.store(new_ptr + at, new, mask=inside)

    mean = tl.sum(new, axis=0) / width
    centred = tl.where(inside, new - mean, 0.0)
    normal = centred / tl.sqrt(tl.sum(centred * centred, axis=0) / width + eps)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0)
    bias = tl.load(bias_ptr + column, mask=inside, other=0.0)
    modulation = modulation_ptr + row * 3 * width + column
    shift = tl.load(modulation, mask=inside, other=0.0)
    scale = tl.load(modulation + width, mask=inside, other=0.0)
    v = (normal * weight + bias) * (1.0 + scale) + shift
    tl.store(v_ptr + at, v, mask=inside)


@triton.jit
def gated_norm_backward_kernel(
    dnew_ptr,  # (R, F) the gradient of the sum, from the blocks that follow
    dv_ptr,  # (R, F)
    new_ptr,  # (R, F)
    branch_ptr,  # (R, F)
    branch_bias_ptr,  # (F,)
    gate_ptr,  # (R, F)
    weight_ptr,  # (F,)
    bias_ptr,  # (F,)
    modulation_ptr,  # (R, 3 F)
    dx_ptr,  # (R, F)
    dbranch_ptr,  # (R, F)
    dgate_ptr,  # (R, F)
    dscale_ptr,  # (R, F)
    affine_ptr,  # (R, 2, F): what the row adds to the gradients of weight and bias
    width,  # F
    eps,
    BLOCK: tl.constexpr,  # power of 2, at least F
):
    """Step 3: all gradients of a row from one reading of it.

    The gradient of shift is dv itself, and so it has no store: whoever makes dv writes it where the
    gradient of shift belongs. The norm's statistics are computed again here; the sums of the
    parameters' gradients over rows are left to PyTorch.

    The real kernel (adaln_backward_kernel) reads the statistics, writes dgate and dscale through
    strides into the gradient of the whole modulation, and adds up six sums over its rows, three of
    which are the modulation's bias gradient, so that no pass over (R, 3 F) is made for it.
    """
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)  # [BLOCK]
    inside = column < width
    at = row * width + column
    new = tl.load(new_ptr + at, mask=inside, other=0.0)
    mean = tl.sum(new, axis=0) / width
    centred = tl.where(inside, new - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / width + eps)
    normal = centred * rstd

    # Back through the modulation, weight and bias.
    dv = tl.load(dv_ptr + at, mask=inside, other=0.0)
    scale = tl.load(modulation_ptr + row * 3 * width + width + column, mask=inside, other=0.0)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0)
    bias = tl.load(bias_ptr + column, mask=inside, other=0.0)
    tl.store(dscale_ptr + at, dv * (normal * weight + bias), mask=inside)
    daffine = dv * (1.0 + scale)
    tl.store(affine_ptr + row * 2 * width + column, daffine * normal, mask=inside)
    tl.store(affine_ptr + row * 2 * width + width + column, daffine, mask=inside)

    # Back through the norm, and the sum's own gradient.
    dnormal = daffine * weight
    along = tl.sum(dnormal * normal, axis=0) / width
    dx = (dnormal - tl.sum(dnormal, axis=0) / width - normal * along) * rstd
    dx += tl.load(dnew_ptr + at, mask=inside, other=0.0)
    tl.store(dx_ptr + at, dx, mask=inside)

    # Back through the gated branch.
    branch = tl.load(branch_ptr + at, mask=inside, other=0.0)
    branch += tl.load(branch_bias_ptr + column, mask=inside, other=0.0)
    gate = tl.load(gate_ptr + at, mask=inside, other=0.0)
    tl.store(dbranch_ptr + at, gate * dx, mask=inside)
    tl.store(dgate_ptr + at, branch * dx, mask=inside)


SHAPES = [(1, 3), (5, 7), (4, 64), (3, 100)]


def draw(rows, width):
    """x, branch, branch_bias, gate, weight, bias, modulation."""
    x, branch, gate = torch.randn(3, rows, width, device=DEVICE)
    branch_bias, weight, bias = torch.randn(3, width, device=DEVICE)
    modulation = torch.randn(rows, 3 * width, device=DEVICE)
    return x, branch, branch_bias, gate, weight, bias, modulation


def unwritten(x, count):
    """Tensors like x, full of NaN."""
    return [torch.full_like(x, torch.nan) for _ in range(count)]


@pytest.mark.parametrize("rows, width", SHAPES)
def test_step_1_modulation_from_its_columns(rows, width):
    x, _, _, _, weight, bias, modulation = draw(rows, width)
    (v,) = unwritten(x, 1)
    block = triton.next_power_of_2(width)
    modulated_norm_kernel[(rows,)](x, weight, bias, modulation, v, width, EPS, BLOCK=block)
    shift, scale, _ = modulation.chunk(3, dim=1)
    _, expected = adaln(x, None, None, None, shift, scale, weight, bias, EPS, "reference")
    torch.testing.assert_close(v, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows, width", SHAPES)
def test_step_2_the_gated_sum_in_the_same_pass(rows, width):
    *arguments, modulation = draw(rows, width)
    new, v = unwritten(arguments[0], 2)
    block = triton.next_power_of_2(width)
    gated_norm_kernel[(rows,)](*arguments, modulation, new, v, width, EPS, BLOCK=block)
    *before, weight, bias = arguments
    shift, scale, _ = modulation.chunk(3, dim=1)
    expected_new, expected_v = adaln(*before, shift, scale, weight, bias, EPS, "reference")
    torch.testing.assert_close(new, expected_new)
    torch.testing.assert_close(v, expected_v, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows, width", SHAPES)
def test_step_3_all_gradients_of_a_row(rows, width):
    *before, weight, bias, modulation = draw(rows, width)
    shift, scale, _ = modulation.chunk(3, dim=1)
    dnew, dv = torch.randn(2, rows, width, device=DEVICE)

    leaves = [each.clone().requires_grad_() for each in (*before, shift, scale, weight, bias)]
    new, v = adaln(*leaves, EPS, "reference")
    expected = torch.autograd.grad((new, v), leaves, (dnew, dv))

    _, *branch = before
    dx, dbranch, dgate, dscale = unwritten(new, 4)
    affine = torch.full((rows, 2, width), torch.nan, device=DEVICE)
    gated_norm_backward_kernel[(rows,)](
        dnew,
        dv,
        new.detach(),
        *branch,
        weight,
        bias,
        modulation,
        dx,
        dbranch,
        dgate,
        dscale,
        affine,
        width,
        EPS,
        BLOCK=triton.next_power_of_2(width),
    )
    dweight, dbias = affine.sum(0)
    found = (dx, dbranch, dbranch.sum(0), dgate, dv, dscale, dweight, dbias)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
