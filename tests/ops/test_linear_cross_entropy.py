"""linear_cross_entropy against its definition in float64, values and gradients."""

import torch

from heptapod_fast.ops import linear_cross_entropy


def inputs(scale=1.0):
    generator = torch.Generator().manual_seed(0)
    z, weight = (scale * torch.randn(shape, generator=generator) for shape in ((9, 8), (13, 8)))
    bias = torch.randn(13, generator=generator)
    return z, weight, bias, torch.randint(13, (9,), generator=generator)


def exact(z, weight, bias, target):
    logits = z.double() @ weight.double().t() + bias.double()
    peak = logits.amax(1, keepdim=True)
    total = peak[:, 0] + (logits - peak).exp().sum(1).log()
    return total - logits[torch.arange(len(z)), target]


def gradients(function, arguments):
    *tensors, target = arguments
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    weights = torch.arange(1.0, len(target) + 1)
    (function(*leaves, target) * weights).sum().backward()
    return [leaf.grad for leaf in leaves]


def test_values():
    for scale in (0.1, 1.0, 30.0):
        arguments = inputs(scale)
        out = linear_cross_entropy(*arguments)
        assert out.dtype == torch.float32 and out.shape == (9,)
        torch.testing.assert_close(out.double(), exact(*arguments), rtol=1e-4, atol=1e-4)


def test_gradients():
    ours, theirs = (gradients(f, inputs()) for f in (linear_cross_entropy, exact))
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_bf16_keeps_float32_masters_and_statistics():
    z, weight, bias, target = inputs()
    out = linear_cross_entropy(z.bfloat16(), weight, bias, target)
    rounded = exact(z.bfloat16(), weight.bfloat16(), bias.bfloat16(), target)
    assert out.dtype == torch.float32
    # Each of the two logits may be half a bf16 step off; the sums over codes are exact beside it.
    assert float((out.double() - rounded).abs().max()) < 2 * 2**-8 * 16
    masters = gradients(lambda z, w, b, t: linear_cross_entropy(z.bfloat16(), w, b, t),
                        (z, weight, bias, target))
    assert all(g.dtype == torch.float32 for g in masters)
