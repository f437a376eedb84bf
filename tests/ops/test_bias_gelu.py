"""bias_gelu: the reference against float64, the kernel against the reference, the operator."""

import math

import pytest
import torch

from heptapod_fast.ops import dispatch
from heptapod_fast.ops.bias_gelu import _backward_operator, _operator, bias_gelu
from heptapod_fast.ops.dropout_mask import DropoutMask
from tests.numerics import DEVICE, check_compiles, check_operator, compare, needs_cpu, needs_triton

SHAPES = [(3, 7), (2, 5, 64), (17, 130), (9, 513)]


def draw(shape, dtype, drop=0.0):
    x = (2 * torch.randn(shape, device=DEVICE)).to(dtype).requires_grad_()
    bias = torch.randn(shape[-1], device=DEVICE, requires_grad=True)
    upstream = torch.randn(shape, device=DEVICE).to(dtype)
    return x, bias, draw_mask(shape, drop), upstream


def draw_mask(shape, p):
    if not p:
        return None
    rows = math.prod(shape[:-1])
    sequences = shape[0]
    return DropoutMask(
        torch.randint(0, 2**32, (sequences, 2), device=DEVICE),
        torch.randint(0, 2**20, (rows // sequences,), device=DEVICE),
        p,
    )


@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_definition(activation):
    x, bias, _, _ = draw((4, 6), torch.float32)
    u = (x + bias).double()
    scale = 0.5 * (1 + torch.erf(u / math.sqrt(2))) if activation == "gelu" else torch.sigmoid(u)
    torch.testing.assert_close(
        bias_gelu(x, bias, activation=activation, implementation="reference").double(),
        u * scale,
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation, drop", [("gelu", 0.0), ("silu", 0.0), ("gelu", 0.1)])
def test_kernel_by_the_rule(kernel, shape, dtype, activation, drop):
    x, bias, mask, upstream = draw(shape, dtype, drop)

    def run(implementation):
        return lambda x, bias: bias_gelu(x, bias, mask, activation, implementation)

    compare(run(kernel), run("reference"), (x, bias), [upstream])


def test_kernel_drops_what_the_reference_drops(kernel):
    x, bias, mask, _ = draw((4, 8, 96), torch.float32, 0.4)
    # SiLU, because GELU rounds to 0 far below 0.
    found = bias_gelu(x, bias, mask, "silu", implementation=kernel)
    kept = mask.keep(32, 96).view(x.shape)
    assert torch.equal(found == 0, ~kept) and 0.3 < float((~kept).float().mean()) < 0.5


@needs_triton
def test_operator():
    x, bias, mask, upstream = draw((4, 5, 40), torch.float32, 0.2)
    for arguments in ((None, None, 0.0), (*mask.arrays(), mask.p)):
        check_operator(_operator, x, bias, *arguments, "gelu")
        check_operator(_backward_operator, upstream, x.detach(), bias.detach(), *arguments, "gelu")
    check_compiles(
        lambda x, bias: bias_gelu(x, bias, mask, implementation="triton"), (x, bias), [upstream]
    )


def test_no_rows(kernel):
    x, bias = torch.randn(0, 8, device=DEVICE), torch.ones(8, device=DEVICE, requires_grad=True)
    bias_gelu(x, bias, implementation=kernel).sum().backward()
    assert torch.equal(bias.grad, torch.zeros_like(bias))


@needs_triton
def test_widths_beyond_the_table_go_to_the_reference_or_are_refused():
    x, bias = torch.randn(1, 16_385, device=DEVICE), torch.randn(16_385, device=DEVICE)
    with pytest.raises(dispatch.Unavailable, match="16385 is above 16384"):
        bias_gelu(x, bias, implementation="triton")
    assert bias_gelu(x, bias).shape == x.shape


def test_refusals():
    x, bias, mask, _ = draw((4, 5, 8), torch.float32, 0.2)
    with pytest.raises(ValueError, match="gelu, silu"):
        bias_gelu(x, bias, activation="tanh")
    with pytest.raises(ValueError, match=r"bias of shape \(8,\)"):
        bias_gelu(x, bias[:4])
    with pytest.raises(ValueError, match="dividing 15 rows"):
        bias_gelu(x[:3], bias, mask)


@needs_cpu
@pytest.mark.parametrize("drop", [0.0, 0.2])
def test_compiled_operator(drop):
    x, bias, mask, upstream = draw((4, 5, 40), torch.float32, drop)
    parts = DropoutMask.parts(mask)
    check_operator(torch.ops.heptapod_fast.bias_gelu_cpu.default, x, bias, *parts, False)
    check_operator(
        torch.ops.heptapod_fast.bias_gelu_backward_cpu.default,
        upstream,
        x.detach(),
        bias.detach(),
        *parts,
        True,
    )
    check_compiles(
        lambda x, bias: bias_gelu(x, bias, mask, implementation="cpu"), (x, bias), [upstream]
    )


@needs_cpu
def test_compiled_operator_on_any_number_of_threads():
    """Sums over rows are taken in an order that follows from the shape alone."""
    x, bias, _, upstream = draw((301, 130), torch.float32)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            y = bias_gelu(x, bias, implementation="cpu")
            found.append([y, *torch.autograd.grad(y, (x, bias), upstream)])
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        assert all(map(torch.equal, found[0], others))


@needs_cpu
@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_compiled_operator_over_the_whole_range(activation):
    """To a few units in the last place, and the limits."""
    far = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 200.0, -200.0, torch.inf])
    x = torch.cat([torch.linspace(-16, 16, 20_001), far])[:, None].requires_grad_()
    bias = torch.zeros(1)
    y = bias_gelu(x, bias, activation=activation, implementation="cpu")
    (slope,) = torch.autograd.grad(y, x, torch.ones_like(y))
    u = x.detach().double().requires_grad_()
    exact = bias_gelu(u, bias.double(), activation=activation, implementation="reference")
    (exact_slope,) = torch.autograd.grad(exact, u, torch.ones_like(exact))
    torch.testing.assert_close(y[:-1].double(), exact[:-1], rtol=1e-6, atol=1e-10)
    torch.testing.assert_close(slope[:-1].double(), exact_slope[:-1], rtol=1e-6, atol=2e-7)
    assert y[-1] == torch.inf
    nan = torch.full((1, 1), torch.nan)
    assert bool(bias_gelu(nan, bias, activation=activation, implementation="cpu").isnan())


@needs_cpu
def test_compiled_operator_leaves_other_dtypes_to_the_reference():
    x, bias = torch.randn(3, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    assert torch.equal(bias_gelu(x, bias), bias_gelu(x, bias, implementation="reference"))
    with pytest.raises(dispatch.Unavailable, match="takes float32 and bfloat16"):
        bias_gelu(x, bias, implementation="cpu")


@needs_cpu
def test_compiled_operator_refuses_second_derivatives():
    x, bias, _, _ = draw((3, 4), torch.float32)
    (gradient,) = torch.autograd.grad(
        bias_gelu(x, bias, implementation="cpu").sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.sum().backward()
