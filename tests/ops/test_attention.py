"""attention against float64, causal and masked, full and cached, in both implementations."""

import pytest
import torch

from heptapod_fast.ops import attention, causal_mask

IMPLEMENTATIONS = ["reference", "sdpa"]


def qkv(n, m, dtype=torch.float32, batch=2, heads=3, dim=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, n, heads, dim), (batch, m, heads, dim), (batch, m, heads, dim))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def exact(q, k, v, visible=None):
    """Attention from its definition, one query at a time, in float64."""
    q, k, v = q.double(), k.double(), v.double()
    out = torch.zeros_like(q)
    for b, i, h in [(b, i, h) for b in range(q.shape[0]) for i in range(q.shape[1])
                    for h in range(q.shape[2])]:
        scores = k[b, :, h] @ q[b, i, h] / q.shape[-1] ** 0.5
        weight = scores.exp() if visible is None else scores.exp() * visible[b, h, i]
        out[b, i, h] = (weight / weight.sum()) @ v[b, :, h]
    return out


def causal_visible(n, m):
    return torch.tensor([[[[float(j <= i + m - n) for j in range(m)] for i in range(n)]]])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("n, m", [(1, 1), (5, 5), (1, 7), (3, 7)])
def test_causal_also_with_cached_keys(n, m, implementation):
    q, k, v = qkv(n, m)
    out = attention(q, k, v, causal=True, implementation=implementation)
    expected = exact(q, k, v, causal_visible(n, m).expand(2, 3, -1, -1))
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("n, m", [(4, 4), (2, 6), (6, 2)])
def test_bidirectional(n, m, implementation):
    q, k, v = qkv(n, m)
    out = attention(q, k, v, implementation=implementation)
    torch.testing.assert_close(out.double(), exact(q, k, v), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_mask(implementation):
    q, k, v = qkv(4, 6)
    mask = torch.rand(2, 1, 4, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[..., 0] = True
    out = attention(q, k, v, mask=mask, implementation=implementation)
    expected = exact(q, k, v, mask.double().expand(2, 3, -1, -1))
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_by_finite_differences(causal):
    q, k, v = (x.requires_grad_() for x in qkv(3, 4, torch.float64, batch=1, heads=2, dim=3))
    assert torch.autograd.gradcheck(lambda *x: attention(*x, causal=causal), (q, k, v))


@pytest.mark.parametrize("causal", [False, True])
def test_sdpa_has_the_gradients_of_the_reference(causal):
    grads = []
    for implementation in IMPLEMENTATIONS:
        inputs = [x.requires_grad_() for x in qkv(6, 6)]
        attention(*inputs, causal=causal, implementation=implementation).square().sum().backward()
        grads.append([x.grad for x in inputs])
    for ours, theirs in zip(*grads):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_bf16_sdpa_errs_at_most_twice_as_much_as_the_reference(causal):
    q, k, v = qkv(32, 32, torch.bfloat16, dim=16)
    visible = causal_visible(32, 32).expand(2, 3, -1, -1) if causal else None
    expected = exact(q, k, v, visible)
    error = {}
    for name in IMPLEMENTATIONS:
        out = attention(q, k, v, causal=causal, implementation=name)
        assert out.dtype == torch.bfloat16
        error[name] = float((out.double() - expected).abs().max())
    rounding = float(expected.abs().max()) * 2**-8
    assert error["sdpa"] <= 2 * error["reference"] + rounding
    assert error["reference"] < 4 * rounding


def test_causal_mask():
    device = torch.device("cpu")
    assert causal_mask(2, 4, device).tolist() == [[True, True, True, False], [True] * 4]
    assert causal_mask(1, 4, device) is None
