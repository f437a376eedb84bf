"""rms_norm and add_rms_norm: the reference against the formula, the kernels against float64."""

import math

import pytest
import torch

from heptapod_fast.ops import dispatch
from heptapod_fast.ops.dropout_mask import DropoutMask
from heptapod_fast.ops.rms_norm import (
    _add_operator,
    _backward_operator,
    _operator,
    add_rms_norm,
    rms_norm,
)
from tests.numerics import DEVICE, check_compiles, check_operator, compare, needs_triton

SHAPES = [(3, 7), (2, 5, 64), (17, 130), (4, 1536)]


def draw(shape, dtype, drop=0.0):
    """x, branch, weight, mask, gradients of sum and norm."""
    x, branch = (torch.randn(shape, device=DEVICE).to(dtype).requires_grad_() for _ in range(2))
    weight = (1 + 0.3 * torch.randn(shape[-1], device=DEVICE)).requires_grad_()
    mask = None
    if drop:
        rows = math.prod(shape[:-1])
        keys = torch.randint(0, 2**32, (shape[0], 2), device=DEVICE)
        counters = torch.randint(0, 2**20, (rows // shape[0],), device=DEVICE)
        mask = DropoutMask(keys, counters, drop)
    upstream = [torch.randn(shape, device=DEVICE).to(dtype) for _ in range(2)]
    return x, branch, weight, mask, upstream


def test_definition():
    x, branch, weight, _, _ = draw((4, 6), torch.float32)
    total, y = add_rms_norm(x, branch, weight, eps=0.1, implementation="reference")
    for row, found in zip(total.double(), y.double(), strict=True):
        mean_square = sum(float(value) ** 2 for value in row) / 6
        expected = row / math.sqrt(mean_square + 0.1) * weight.double()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(total, x + branch)
    torch.testing.assert_close(rms_norm(total, weight, 0.1, "reference"), y)


@needs_triton
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("drop", [None, 0.0, 0.2])
def test_kernels_by_the_rule(shape, dtype, drop):
    """drop None: the norm alone."""
    x, branch, weight, mask, upstream = draw(shape, dtype, drop or 0.0)
    if drop is None:

        def run(how):
            return lambda x, weight: rms_norm(x, weight, implementation=how)

        compare(run("triton"), run("reference"), (x, weight), upstream[:1])
        return

    def run_sum(how):
        return lambda x, branch, weight: add_rms_norm(x, branch, weight, mask, implementation=how)

    compare(run_sum("triton"), run_sum("reference"), (x, branch, weight), upstream)


@needs_triton
@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_one_of_the_two_gradients(wanted):
    """A sum without its norm, or a norm whose sum nobody uses."""
    x, branch, weight, mask, upstream = draw((3, 4, 40), torch.float32, 0.2)
    gradients = []
    for how in ("triton", "reference"):
        outputs = add_rms_norm(x, branch, weight, mask, implementation=how)
        pairs = [(o, g) for o, g, w in zip(outputs, upstream, wanted, strict=True) if w]
        gradients.append(
            torch.autograd.grad(
                [o for o, _ in pairs], (x, branch), [g for _, g in pairs], retain_graph=True
            )
        )
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@needs_triton
def test_slabs_of_several_rows(monkeypatch):
    """4, 4, 2 rows a program forward, 3, 3, 3, 1 backward."""
    from heptapod_fast.kernels import rms_norm as kernels

    def lookup(operation, kernel, width, device):
        shared = {"num_warps": 1, "STAGES": 2}
        return shared | ({"rows": 4} if kernel == "forward" else {"programs": 4})

    monkeypatch.setattr(kernels.tuning, "lookup", lookup)
    x, branch, weight, mask, upstream = draw((5, 2, 20), torch.float32, 0.2)
    compare(
        lambda *a: add_rms_norm(*a, mask, implementation="triton"),
        lambda *a: add_rms_norm(*a, mask, implementation="reference"),
        (x, branch, weight),
        upstream,
    )


@needs_triton
def test_operators():
    x, branch, weight, mask, (grad_sum, grad) = draw((2, 3, 40), torch.float32, 0.2)
    scales = torch.rand(6, device=DEVICE) + 0.5
    w = weight.detach()
    check_operator(_operator, x, weight, 1e-5)
    for key in ((None, None, 0.0), (*mask.arrays(), mask.p)):
        check_operator(_add_operator, x, branch, weight, *key, 1e-5)
        check_operator(_backward_operator, grad, grad_sum, x.detach(), scales, w, *key)
    check_compiles(
        lambda x, branch, weight: add_rms_norm(x, branch, weight, mask, implementation="triton"),
        (x, branch, weight),
        [grad_sum, grad],
    )


@needs_triton
def test_no_rows():
    x = torch.randn(0, 8, device=DEVICE, requires_grad=True)
    weight = torch.ones(8, device=DEVICE, requires_grad=True)
    rms_norm(x, weight, implementation="triton").sum().backward()
    assert torch.equal(weight.grad, torch.zeros_like(weight))


@needs_triton
def test_widths_beyond_the_table_go_to_the_reference_or_are_refused():
    x, weight = torch.randn(1, 4097, device=DEVICE), torch.ones(4097, device=DEVICE)
    with pytest.raises(dispatch.Unavailable, match="4097 wide, at most 4096"):
        rms_norm(x, weight, implementation="triton")
    assert rms_norm(x, weight).shape == x.shape


def test_refusals():
    x, branch, weight, mask, _ = draw((4, 5, 8), torch.float32, 0.2)
    with pytest.raises(ValueError, match=r"weight of shape \(8,\)"):
        rms_norm(x, weight[:4])
    with pytest.raises(ValueError, match="branch like x"):
        add_rms_norm(x, branch[:2], weight)
    with pytest.raises(ValueError, match="dividing 15 rows"):
        add_rms_norm(x[:3], branch[:3], weight, mask)
