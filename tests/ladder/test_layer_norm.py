"""layer_norm and add_layer_norm from a plain kernel up, one row per program, float32.

Each step is a whole kernel, tested against the reference in heptapod_fast/ops/layer_norm.py. Its
docstring says which idea it adds and where kernels/layer_norm.py has it. docs/kernels/README.md
tells the story in words.
"""

import pytest
import torch
from torch import Tensor

from heptapod_fast.ops import add_layer_norm, layer_norm
from tests.numerics import DEVICE

pytest.importorskip("triton")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

EPS = 1e-6


@triton.jit
def norm_kernel(
    x_ptr,  # (R, D)
    weight_ptr,  # (D,)
    bias_ptr,  # (D,)
    y_ptr,  # (R, D)
    width,  # D
    eps,
    BLOCK: tl.constexpr,  # power of 2, at least D
):
    """Step 1: a row is read once, and everything happens in registers.

    A tile has a power of 2 of columns; those beyond the width are masked when they are read and
    written, and zeroed again after the mean is taken off. The variance is the mean of centred
    squares, because mean(x^2) - mean^2 cancels where the mean is large.

    The real kernel (layer_norm_forward_kernel) does the same. Beyond it: a program takes several
    rows with the loads of the next ones under way, the width is a constant, and a row is two parts
    whose sizes are powers of 2, so that 1280 columns are 1024 + 256 and not 2048.
    """
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)  # [BLOCK]
    inside = column < width
    x = tl.load(x_ptr + row * width + column, mask=inside, other=0.0)

    mean = tl.sum(x, axis=0) / width
    centred = tl.where(inside, x - mean, 0.0)
    variance = tl.sum(centred * centred, axis=0) / width
    normal = centred / tl.sqrt(variance + eps)

    weight = tl.load(weight_ptr + column, mask=inside, other=0.0)
    bias = tl.load(bias_ptr + column, mask=inside, other=0.0)
    tl.store(y_ptr + row * width + column, normal * weight + bias, mask=inside)


@triton.jit
def add_norm_kernel(
    x_ptr,  # (R, D) the residual stream
    branch_ptr,  # (R, D) what a block adds to it
    branch_bias_ptr,  # (D,)
    weight_ptr,  # (D,)
    bias_ptr,  # (D,)
    sum_ptr,  # (R, D)
    y_ptr,  # (R, D)
    stats_ptr,  # (R, 2)
    width,  # D
    eps,
    BLOCK: tl.constexpr,  # power of 2, at least D
):
    """Step 2: the residual sum in the same pass, and the statistics kept.

    Sum, bias and norm would read and write the stream three times; here it is read once and written
    once, beside the norm. Mean and 1 / standard deviation are two numbers per row that the backward
    pass need not compute again.

    The real kernel adds dropout of the branch (tests/ladder/test_bias_gelu.py makes such a mask),
    and rounds the sum before its norm is taken: the backward pass finds the rounded one.
    """
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)  # [BLOCK]
    inside = column < width
    at = row * width + column

    x = tl.load(x_ptr + at, mask=inside, other=0.0)
    branch = tl.load(branch_ptr + at, mask=inside, other=0.0)
    branch_bias = tl.load(branch_bias_ptr + column, mask=inside, other=0.0)
    total = x + branch + branch_bias
    tl.store(sum_ptr + at, total, mask=inside)

    mean = tl.sum(total, axis=0) / width
    centred = tl.where(inside, total - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / width + eps)
    tl.store(stats_ptr + 2 * row, mean)
    tl.store(stats_ptr + 2 * row + 1, rstd)

    weight = tl.load(weight_ptr + column, mask=inside, other=0.0)
    bias = tl.load(bias_ptr + column, mask=inside, other=0.0)
    tl.store(y_ptr + at, centred * rstd * weight + bias, mask=inside)


@triton.jit
def norm_backward_kernel(
    grad_ptr,  # (R, D) the gradient of y
    grad_sum_ptr,  # (R, D) the gradient of the sum, from the blocks that follow
    sum_ptr,  # (R, D)
    stats_ptr,  # (R, 2)
    weight_ptr,  # (D,)
    dx_ptr,  # (R, D), which is the gradient of the branch too
    partial_ptr,  # (programs, 3, D): dweight, dbias, dbranch_bias of a program's rows
    rows,  # R
    width,  # D
    slab,  # rows per program
    BLOCK: tl.constexpr,  # power of 2, at least D
):
    """Step 3: the backward pass, with the sums over rows on the way.

    Along a row, with n the normalised row and g = weight * dy:

        dx = (g - mean(g) - n mean(g n)) / std + dsum

    Parameters get sums over all rows. Added up by atomics, their bits would depend on who comes
    first; instead a program takes a slab of rows in order, keeps its sums in registers and writes
    one row of partials, and a second small pass adds those up in order: the same bits every time.

    The real kernel (layer_norm_backward_kernel) does the same, and columns.py is the second pass.
    Beyond it: dbranch of its own under dropout, sums only where they are asked for, and the two
    means of a row in one reduction across threads.
    """
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)  # [BLOCK]
    inside = column < width
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0)
    dweight = tl.zeros((BLOCK,), tl.float32)
    dbias = tl.zeros((BLOCK,), tl.float32)
    dbranch_bias = tl.zeros((BLOCK,), tl.float32)

    first = program * slab
    for row in tl.range(first, tl.minimum(first + slab, rows)):
        at = row * width + column
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0)
        total = tl.load(sum_ptr + at, mask=inside, other=0.0)
        mean = tl.load(stats_ptr + 2 * row)
        rstd = tl.load(stats_ptr + 2 * row + 1)
        normal = (total - mean) * rstd
        dweight += grad * normal
        dbias += grad

        weighted = grad * weight  # 0 beyond the width, so neither mean sees those columns
        mean_g = tl.sum(weighted, axis=0) / width
        mean_gn = tl.sum(weighted * normal, axis=0) / width
        dx = (weighted - mean_g - normal * mean_gn) * rstd
        dx += tl.load(grad_sum_ptr + at, mask=inside, other=0.0)
        tl.store(dx_ptr + at, dx, mask=inside)
        dbranch_bias += tl.where(inside, dx, 0.0)

    partial = partial_ptr + program * 3 * width + column
    tl.store(partial, dweight, mask=inside)
    tl.store(partial + width, dbias, mask=inside)
    tl.store(partial + 2 * width, dbranch_bias, mask=inside)


def draw(rows: int, width: int) -> tuple[Tensor, ...]:
    """x and branch (R, D), branch_bias, weight and bias (D,); far from zero, as streams are."""
    x, branch = 3 + 2 * torch.randn(2, rows, width, device=DEVICE)
    return x, branch, *torch.randn(3, width, device=DEVICE)


SHAPES = [(1, 1), (5, 7), (6, 64), (4, 100)]


@pytest.mark.parametrize("rows, width", SHAPES)
def test_step_1_a_row_in_registers(rows, width):
    x, _, _, weight, bias = draw(rows, width)
    y = torch.full_like(x, torch.nan)
    block = triton.next_power_of_2(width)
    norm_kernel[(rows,)](x, weight, bias, y, width, EPS, BLOCK=block)
    expected = layer_norm(x, weight, bias, EPS, "reference")
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


def launch_add_norm(x, branch, branch_bias, weight, bias) -> tuple[Tensor, Tensor, Tensor]:
    """sum, y and statistics by step 2."""
    rows, width = x.shape
    total = torch.full_like(x, torch.nan)
    y = torch.full_like(x, torch.nan)
    stats = torch.full((rows, 2), torch.nan, device=DEVICE)
    block = triton.next_power_of_2(width)
    add_norm_kernel[(rows,)](
        x, branch, branch_bias, weight, bias, total, y, stats, width, EPS, BLOCK=block
    )
    return total, y, stats


@pytest.mark.parametrize("rows, width", SHAPES)
def test_step_2_the_residual_sum_in_the_same_pass(rows, width):
    arguments = draw(rows, width)
    total, y, stats = launch_add_norm(*arguments)
    expected_total, expected_y = add_layer_norm(*arguments, None, EPS, "reference")
    torch.testing.assert_close(total, expected_total)
    torch.testing.assert_close(y, expected_y, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(stats[:, 0], expected_total.mean(1))
    variance = expected_total.var(1, correction=0)
    torch.testing.assert_close(stats[:, 1], (variance + EPS).rsqrt(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("programs", [1, 3])
@pytest.mark.parametrize("rows, width", SHAPES)
def test_step_3_gradients_and_their_sums_over_rows(rows, width, programs):
    arguments = draw(rows, width)
    grad_sum, grad = torch.randn(2, rows, width, device=DEVICE)

    # In float64: at width 1 the normed value is 0, and float32 has noise times 1 / sqrt(eps) there.
    leaves = [each.double().requires_grad_() for each in arguments]
    outputs = add_layer_norm(*leaves, None, EPS, "reference")
    expected = torch.autograd.grad(outputs, leaves, (grad_sum.double(), grad.double()))

    total, _, stats = launch_add_norm(*arguments)
    _, _, _, weight, _ = arguments
    dx = torch.full_like(total, torch.nan)
    partials = torch.full((programs, 3, width), torch.nan, device=DEVICE)
    norm_backward_kernel[(programs,)](
        grad,
        grad_sum,
        total,
        stats,
        weight,
        dx,
        partials,
        rows,
        width,
        triton.cdiv(rows, programs),
        BLOCK=triton.next_power_of_2(width),
    )
    dweight, dbias, dbranch_bias = partials.sum(0)
    found = (dx, dx, dbranch_bias, dweight, dbias)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)
