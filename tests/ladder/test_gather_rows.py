"""gather_rows and scatter_rows from a plain kernel up, one row per program.

Each step is a whole kernel, tested against the reference in heptapod_fast/ops/gather_rows.py. Its
docstring says which idea it adds and where kernels/gather_rows.py has it. docs/kernels/README.md
tells the story in words.
"""

import pytest
import torch

from heptapod_fast.ops import gather_rows, scatter_rows
from tests.numerics import DEVICE

pytest.importorskip("triton")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402


@triton.jit
def gather_kernel(
    x_ptr,  # (M, D)
    index_ptr,  # (R,) int64: which row of x
    out_ptr,  # (R, D)
    width,  # D
    BLOCK: tl.constexpr,  # power of 2, at least D
):
    """Step 1: a program copies the row that its index names.

    The index is data that the kernel reads, so the number of rows does not depend on it, and the
    host never waits to learn how many there are.

    The real kernel (copy_rows_kernel) does the same for a tile of several rows, so that many loads
    are under way before the first store.
    """
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)  # [BLOCK]
    inside = column < width
    source = tl.load(index_ptr + row)
    x = tl.load(x_ptr + source * width + column, mask=inside)
    tl.store(out_ptr + row * width + column, x, mask=inside)


@triton.jit
def invert_kernel(
    index_ptr,  # (R,) int64 without repeats
    inverse_ptr,  # (M,) int64, -1 everywhere before the launch
):
    """Step 2: who writes to row i of the result? The inverse of the index knows.

    inverse[index[r]] = r; rows that nobody writes to stay at -1. Because no index occurs twice, no
    two programs write to one place.

    The real kernel (invert_index_kernel) does the same for 1024 indices per program.
    """
    row = tl.program_id(0)
    tl.store(inverse_ptr + tl.load(index_ptr + row), row)


@triton.jit
def scatter_kernel(
    x_ptr,  # (R, D)
    inverse_ptr,  # (M,) int64: which row of x, or -1
    out_ptr,  # (M, D)
    width,  # D
    BLOCK: tl.constexpr,  # power of 2, at least D
):
    """Step 3: scattering is gathering through the inverse, with zeros where there is nothing.

    The plain way is to fill the result with zeros and then write rows into it: those rows are
    written twice. Here every row of the result is written once, a copy or zeros. It is also the
    backward pass of gathering, and gathering that of scattering: neither needs atomics.

    The real kernel is the one of step 1, which reads zeros for a source out of range.
    """
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)  # [BLOCK]
    inside = column < width
    source = tl.load(inverse_ptr + row)
    x = tl.load(x_ptr + source * width + column, mask=inside & (source >= 0), other=0.0)
    tl.store(out_ptr + row * width + column, x, mask=inside)


# Rows of the large tensor, rows of the packed one, width.
SHAPES = [(1, 1, 1), (9, 4, 7), (6, 6, 64), (12, 5, 100)]


def gathered(x, index):
    """By step 1."""
    out = torch.full((len(index), x.shape[1]), torch.nan, device=DEVICE)
    block = triton.next_power_of_2(x.shape[1])
    gather_kernel[(len(index),)](x, index, out, x.shape[1], BLOCK=block)
    return out


def inverted(index, rows):
    """By step 2."""
    inverse = torch.full((rows,), -1, device=DEVICE)
    invert_kernel[(len(index),)](index, inverse)
    return inverse


def scattered(x, index, rows):
    """By steps 2 and 3."""
    out = torch.full((rows, x.shape[1]), torch.nan, device=DEVICE)
    block = triton.next_power_of_2(x.shape[1])
    scatter_kernel[(rows,)](x, inverted(index, rows), out, x.shape[1], BLOCK=block)
    return out


@pytest.mark.parametrize("rows, packed, width", SHAPES)
def test_step_1_a_copy_of_the_named_row(rows, packed, width):
    x = torch.randn(rows, width, device=DEVICE)
    index = torch.randperm(rows, device=DEVICE)[:packed]
    assert torch.equal(gathered(x, index), gather_rows(x, index, "reference"))


@pytest.mark.parametrize("rows, packed, width", SHAPES)
def test_step_2_the_inverse_of_an_index(rows, packed, width):
    index = torch.randperm(rows, device=DEVICE)[:packed]
    inverse = inverted(index, rows)
    assert torch.equal(inverse[index], torch.arange(packed, device=DEVICE))
    assert int((inverse == -1).sum()) == rows - packed


@pytest.mark.parametrize("rows, packed, width", SHAPES)
def test_step_3_scattering_gathers_through_the_inverse(rows, packed, width):
    x = torch.randn(packed, width, device=DEVICE)
    index = torch.randperm(rows, device=DEVICE)[:packed]
    assert torch.equal(scattered(x, index, rows), scatter_rows(x, index, rows, "reference"))


@pytest.mark.parametrize("rows, packed, width", SHAPES)
def test_each_is_the_others_backward_pass(rows, packed, width):
    index = torch.randperm(rows, device=DEVICE)[:packed]
    grad = torch.randn(packed, width, device=DEVICE)
    x = torch.randn(rows, width, device=DEVICE, requires_grad=True)
    (expected,) = torch.autograd.grad(gather_rows(x, index, "reference"), x, grad)
    assert torch.equal(scattered(grad, index, rows), expected)

    grad = torch.randn(rows, width, device=DEVICE)
    x = torch.randn(packed, width, device=DEVICE, requires_grad=True)
    (expected,) = torch.autograd.grad(scatter_rows(x, index, rows, "reference"), x, grad)
    assert torch.equal(gathered(grad, index), expected)
