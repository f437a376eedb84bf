"""bias_gelu: the reference against float64, the kernel against the reference, the operator."""

import math

import pytest
import torch

from heptapod_fast.ops import dispatch
from heptapod_fast.ops.bias_gelu import _backward_operator, _operator, bias_gelu
from heptapod_fast.ops.dropout_mask import DropoutMask
from tests.numerics import DEVICE, check_compiles, check_operator, compare, needs_triton

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


@needs_triton
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation, drop", [("gelu", 0.0), ("silu", 0.0), ("gelu", 0.1)])
def test_kernel_by_the_rule(shape, dtype, activation, drop):
    x, bias, mask, upstream = draw(shape, dtype, drop)

    def run(implementation):
        return lambda x, bias: bias_gelu(x, bias, mask, activation, implementation)

    compare(run("triton"), run("reference"), (x, bias), [upstream])


@needs_triton
def test_kernel_drops_what_the_reference_drops():
    x, bias, mask, _ = draw((4, 8, 96), torch.float32, 0.4)
    # SiLU, because GELU rounds to 0 far below 0.
    found = bias_gelu(x, bias, mask, "silu", implementation="triton")
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


@needs_triton
def test_no_rows():
    x, bias = torch.randn(0, 8, device=DEVICE), torch.ones(8, device=DEVICE, requires_grad=True)
    bias_gelu(x, bias, implementation="triton").sum().backward()
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
