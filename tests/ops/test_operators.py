"""What all registered operators share: they take tensors in any layout, on any device."""

import pytest
import torch

from tests.numerics import DEVICE, needs_triton

OPS = torch.ops.heptapod_fast


def randn(*shape, dtype=torch.bfloat16, seed=0):
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return made.to(device=DEVICE, dtype=dtype)


def inside(x, dim):
    """The same values as a part of a larger tensor."""
    return torch.cat((x, torch.full_like(x, float("nan"))), dim).narrow(dim, 0, x.shape[dim])


@needs_triton
@pytest.mark.parametrize("dim", [1, 2, 3])
def test_a_gradient_may_be_part_of_a_larger_tensor(dim):
    """As torch.compile hands it over: it keeps the order of the strides alone."""
    qkv, grad = randn(2, 20, 3, 2, 32), randn(2, 20, 2, 32, seed=1)
    rest = (True, 0, None, None, None)
    out, lse = OPS.attention(qkv, *rest)
    expected = OPS.attention_backward(grad, qkv, out, lse, *rest)
    found = OPS.attention_backward(inside(grad, dim), qkv, inside(out, dim), lse, *rest)
    assert torch.equal(found, expected)
    q, kv = qkv[:, :, 0], qkv[:, :, 1:]
    cross = (grad, q, kv, out, lse, True, None, None, None, None)
    expected = OPS.cross_attention_backward(*cross)
    found = OPS.cross_attention_backward(grad, inside(q, dim), inside(kv, dim + 1), *cross[3:])
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@needs_triton
def test_rows_may_be_part_of_a_larger_tensor():
    x, dy = randn(6, 48), randn(6, 48, seed=1)
    weight, bias = randn(48, dtype=torch.float32), randn(48, dtype=torch.float32)
    y, stats = OPS.layer_norm(x, weight, bias, 1e-6)
    expected = OPS.layer_norm_backward(dy, None, x, stats, weight, None, None, 0.0, False)
    assert torch.equal(OPS.layer_norm(inside(x, 1), weight, bias, 1e-6)[0], y)
    found = OPS.layer_norm_backward(
        inside(dy, 1), None, inside(x, 1), stats, weight, None, None, 0.0, False
    )
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    # Rows with a stride are read in place, rows whose elements lie apart are not.
    shift, scale = randn(6, 48, seed=2), randn(6, 48, seed=3)
    plain = (x, None, None, None, shift, scale, weight, bias, 1e-6)
    expected = OPS.adaln(*plain)[1]
    for other in (inside(shift, 1), torch.stack((shift, shift), -1)[..., 0]):
        assert torch.equal(OPS.adaln(*plain[:4], other, *plain[5:])[1], expected)


@needs_triton
@pytest.mark.parametrize("dim", [1, 2])
def test_compiled_code_may_place_a_gradient_inside_another_tensor(dim):
    """A gradient that is also half of a concatenation, which inductor writes in place."""
    qkv, other = randn(2, 20, 3, 2, 32), randn(2, 20, 2, 32, seed=1)
    rest = (True, 0, None, None, None)
    out, lse = OPS.attention(qkv, *rest)

    def function(other):
        grad = other.sin()
        return (
            torch.cat((grad, other.cos()), dim),
            OPS.attention_backward(grad, qkv, out, lse, *rest),
        )

    torch._dynamo.reset()
    try:
        found = torch.compile(function, fullgraph=True)(other)
    except Exception as error:
        if "compiler" in str(error).lower() or "g++" in str(error):
            pytest.skip("no C++ compiler for inductor")
        raise
    for a, b in zip(found, function(other), strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=0.05, atol=0.05)
