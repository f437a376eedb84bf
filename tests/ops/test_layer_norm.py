"""layer_norm against its definition in float64."""

import pytest
import torch

from heptapod_fast.ops import layer_norm


def exact(x, weight=None, bias=None, eps=1e-6):
    x = x.double()
    centred = x - x.mean(-1, keepdim=True)
    y = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return y if weight is None else y * weight.double() + bias.double()


def inputs(dtype=torch.float32, width=64):
    generator = torch.Generator().manual_seed(0)
    x = 3 + 2 * torch.randn(5, 7, width, generator=generator)
    return x.to(dtype), *torch.randn(2, width, generator=generator)


@pytest.mark.parametrize("affine", [True, False])
def test_definition(affine):
    x, weight, bias = inputs()
    arguments = (weight, bias) if affine else (None, None)
    torch.testing.assert_close(layer_norm(x, *arguments).double(),
                               exact(x, *(arguments if affine else ())), rtol=1e-4, atol=1e-5)


def test_eps_default_is_1e_minus_6():
    x = torch.tensor([[1e-3, -1e-3]])
    expected = 1e-3 / (1e-6 + 1e-6) ** 0.5
    torch.testing.assert_close(layer_norm(x, None, None), torch.tensor([[expected, -expected]]))


def test_bf16_has_float32_statistics_and_keeps_float32_parameters():
    x, weight, bias = inputs(torch.bfloat16)
    y = layer_norm(x + 256, weight, bias)
    expected = exact(x + 256, weight.bfloat16(), bias.bfloat16())
    assert y.dtype == torch.bfloat16
    # A rounding of the result, and one of the product inside it.
    assert float((y.double() - expected).abs().max()) < 2**-7 * float(expected.abs().max())


def test_gradients_by_finite_differences():
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    weight, bias = (torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(layer_norm, (x, weight, bias))
