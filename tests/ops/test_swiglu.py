"""swiglu: the kernel against the reference and float64, and the operator."""

import pytest
import torch

from heptapod_fast.ops.swiglu import _backward_operator, _operator, swiglu
from tests.numerics import DEVICE, check_compiles, check_operator, compare, needs_triton


def draw(shape, dtype):
    make = lambda: torch.randn(shape, device=DEVICE).to(dtype).requires_grad_()
    return make(), make(), torch.randn(shape, device=DEVICE).to(dtype)


@needs_triton
@pytest.mark.parametrize("shape", [(3, 7), (2, 5, 64), (9, 2049)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernel_by_the_rule(shape, dtype):
    x, y, upstream = draw(shape, dtype)
    run = lambda implementation: lambda x, y: swiglu(x, y, implementation)
    compare(run("triton"), run("reference"), (x, y), [upstream])


@needs_triton
def test_operator():
    x, y, upstream = draw((4, 40), torch.float32)
    check_operator(_operator, x, y)
    check_operator(_backward_operator, upstream, x.detach(), y.detach())
    check_compiles(lambda x, y: swiglu(x, y, "triton"), (x, y), [upstream])


def test_refusals():
    with pytest.raises(ValueError, match="swiglu takes y like x"):
        swiglu(torch.ones(2, 3), torch.ones(2, 4))
