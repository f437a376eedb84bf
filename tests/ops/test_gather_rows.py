"""gather_rows and scatter_rows: values, and that each is the other's transpose."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heptapod_fast.ops import gather_rows, scatter_rows


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


@pytest.mark.parametrize("operation", [
    lambda x: gather_rows(x, torch.tensor([3, 0, 2])),
    lambda x: scatter_rows(x, torch.tensor([6, 1, 4, 0]), 8)])
def test_gradients_by_finite_differences(operation):
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(operation, (x,))
    assert torch.autograd.gradgradcheck(operation, (x,))


def test_dtype_is_kept():
    x = torch.randn(4, 3).bfloat16()
    assert gather_rows(x, torch.tensor([1])).dtype == torch.bfloat16
    assert scatter_rows(x, torch.arange(4), 5).dtype == torch.bfloat16
