"""gather_rows and scatter_rows: values, each the other's transpose, kernels, operators."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heptapod_fast.ops import gather_rows, scatter_rows
from heptapod_fast.ops.gather_rows import _gather, _scatter
from tests.numerics import DEVICE, check_compiles, check_operator, needs_triton, poisoned

# Rows of the large side, rows of the index, width.
SHAPES = [(20, 13, 40), (9, 9, 300), (7, 1, 3), (1, 1, 257), (5, 0, 16), (30, 17, 768)]


def draw(rows, count, width, dtype=torch.float32):
    """x (rows, width), y (count, width) and an index of `count` different rows, out of order."""
    index = torch.randperm(rows, device=DEVICE)[:count]
    x, y = (torch.randn(n, width, device=DEVICE).to(dtype) for n in (rows, count))
    return x, y, index


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 20), width=st.integers(1, 5), data=st.data())
def test_values_and_adjoint(rows, width, data):
    count = data.draw(st.integers(0, rows))
    index = torch.randperm(rows, generator=torch.Generator().manual_seed(rows))[:count]
    x, y = torch.randn(rows, width).double(), torch.randn(count, width).double()
    gathered, scattered = gather_rows(x, index), scatter_rows(y, index, rows)
    assert torch.equal(gathered, x[index])
    expected = torch.zeros(rows, width).double()
    for r, i in enumerate(index.tolist()):
        expected[i] = y[r]
    assert torch.equal(scattered, expected)
    torch.testing.assert_close((gathered * y).sum(), (x * scattered).sum())


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: gather_rows(x, torch.tensor([3, 0, 2])),
        lambda x: scatter_rows(x, torch.tensor([6, 1, 4, 0]), 8),
    ],
)
def test_gradients_by_finite_differences(operation):
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(operation, (x,))
    assert torch.autograd.gradgradcheck(operation, (x,))


def test_dtype_is_kept():
    x = torch.randn(4, 3).bfloat16()
    assert gather_rows(x, torch.tensor([1])).dtype == torch.bfloat16
    assert scatter_rows(x, torch.arange(4), 5).dtype == torch.bfloat16


@needs_triton
@pytest.mark.parametrize("rows, count, width", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_copy_what_the_reference_copies(rows, count, width, dtype):
    x, y, index = draw(rows, count, width, dtype)

    def run(implementation):
        leaves = [t.clone().requires_grad_() for t in (x, y)]
        gathered = gather_rows(leaves[0], index, implementation)
        scattered = scatter_rows(leaves[1], index, rows, implementation)
        return gathered, scattered, *torch.autograd.grad((gathered, scattered), leaves, (y, x))

    with poisoned():
        found = run("triton")
    for a, b in zip(found, run("reference"), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


@needs_triton
def test_slices_are_read_in_place():
    x, y, index = draw(12, 5, 80)
    wide = torch.randn(12, 100, device=DEVICE)
    wide[:, 10:90] = x
    view = wide[:, 10:90]
    assert torch.equal(gather_rows(view, index, "triton"), x[index])
    tall = torch.stack((y, y + 1), dim=1).flatten(0, 1)
    expected = scatter_rows(y, index, 12, "reference")
    assert torch.equal(scatter_rows(tall[::2], index, 12, "triton"), expected)
    # Columns apart, and gradients that are one number for all.
    assert torch.equal(gather_rows(x.t().contiguous().t(), index, "triton"), x[index])
    x.requires_grad_()
    gather_rows(x, index, "triton").sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x).index_fill(0, index, 1.0))


@needs_triton
def test_an_index_out_of_range_touches_nothing():
    x, y, _ = draw(6, 3, 8)
    index = torch.tensor([2, 6, -1], device=DEVICE)
    assert torch.equal(gather_rows(x, index, "triton"), torch.stack((x[2], 0 * x[2], 0 * x[2])))
    assert torch.equal(
        scatter_rows(y, index, 6, "triton"),
        torch.zeros(6, 8, device=DEVICE).index_copy(0, index[:1], y[:1]),
    )


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operators(dtype):
    x, y, index = draw(9, 4, 20, dtype)
    check_operator(_gather, x.requires_grad_(), index)
    check_operator(_gather, x.detach()[:, 4:12], index)
    check_operator(_scatter, y.requires_grad_(), index, 9)
    check_compiles(
        lambda x, y: (gather_rows(x, index, "triton"), scatter_rows(y, index, 9, "triton")),
        (x, y),
        [torch.randn_like(y), torch.randn_like(x)],
    )


@needs_triton
def test_gradients_of_gradients():
    x, _, index = draw(6, 4, 8)
    x.requires_grad_()

    def twice(implementation):
        first = gather_rows(x, index, implementation).square().sum()
        (grad,) = torch.autograd.grad(first, x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), x)[0]

    assert torch.equal(twice("triton"), twice("reference"))


def test_refusals():
    x, y, index = draw(6, 3, 8)
    with pytest.raises(ValueError, match=r"gather_rows takes rows \(M, D\) and an int64 index"):
        gather_rows(x[None], index)
    with pytest.raises(ValueError, match=r"torch.int32 \(3,\)"):
        scatter_rows(y, index.int(), 6)
    with pytest.raises(ValueError, match="got 6 rows, 3 indices, rows=6"):
        scatter_rows(x, index, 6)
