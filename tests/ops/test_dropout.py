"""dropout: the rate, what the mask depends on, and that the backward pass uses the same one."""

import pytest
import torch

from heptapod_fast.ops import DropoutMask, dropout
from heptapod_fast.ops.dropout import _operator
from heptapod_fast.ops.dropout_mask import keep_mask
from heptapod_fast.rng import Rng
from tests.numerics import DEVICE, check_compiles, check_operator, needs_triton


def draw_mask(batch, length, p, seed=0):
    return DropoutMask(Rng(seed).bits("k", torch.arange(batch), 2), torch.arange(length), p)


def correlation(a, b):
    return float(torch.corrcoef(torch.stack((a.flatten().double(), b.flatten().double())))[0, 1])


def mix(x):
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = ((x ^ x >> shift) * factor) % 2**32
    return x ^ x >> 16


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_rate_and_scale(p):
    x = torch.ones(16, 50, 128)
    y = dropout(x, draw_mask(16, 50, p))
    kept = y != 0
    assert float(kept.double().mean()) == pytest.approx(1 - p, abs=0.005)
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 1 / (1 - p)))
    for dims in ((1, 2), (0, 2), (0, 1)):
        assert float((kept.double().mean(dims) - (1 - p)).abs().max()) < 0.1


@pytest.mark.parametrize("p", [0.0, 2**-32, 0.3, 0.5, 0.9, 1 - 2**-40])
@pytest.mark.parametrize("key0", [0, 0xDEADBEEF])
@pytest.mark.parametrize("counter", [0, 2**29 - 1, 2**31 + 5, 2**32 - 1, 2**40 + 3])
def test_mask_is_the_documented_hash(counter, key0, p):
    key1, width = 0x12345678, 70
    mask = keep_mask(*(torch.tensor(word) for word in (key0, key1, counter)), width, p)
    element = [(counter * width + column) % 2**32 for column in range(width)]
    assert mask.tolist() == [mix(mix(e ^ key0) ^ key1) >= round(p * 2**32) for e in element]


def test_mask_depends_on_keys_rows_and_columns():
    one = torch.tensor(1), torch.tensor(2)
    base = keep_mask(*one, torch.arange(200), 200, 0.5)
    others = [
        keep_mask(torch.tensor(3), one[1], torch.arange(200), 200, 0.5),
        keep_mask(one[0], torch.tensor(3), torch.arange(200), 200, 0.5),
        keep_mask(*one, torch.arange(200, 400), 200, 0.5),
        base.roll(1, 0),
        base.roll(1, 1),
        base.t(),
    ]
    for other in others:
        assert abs(correlation(base, other)) < 0.03


def test_backward_has_the_same_mask():
    x = torch.randn(4, 6, 10, requires_grad=True)
    y = dropout(x, draw_mask(4, 6, 0.4))
    y.backward(torch.ones_like(y))
    torch.testing.assert_close(x.grad, (y != 0) / 0.6)
    # A gradient without strides of its own, as that of a sum.
    again = x.detach().clone().requires_grad_()
    dropout(again, draw_mask(4, 6, 0.4)).sum().backward()
    assert torch.equal(again.grad, x.grad)


def test_gradients_by_finite_differences():
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x: dropout(x, draw_mask(2, 3, 0.4), implementation="reference"), (x,)
    )


def test_p_zero_returns_the_input_itself():
    x = torch.randn(2, 3, 4)
    assert dropout(x, draw_mask(2, 3, 0.0)) is x and dropout(x, None) is x


def test_masks_that_do_not_fit_are_refused():
    x, mask = torch.randn(2, 3, 4), draw_mask(2, 3, 0.5)
    with pytest.raises(ValueError, match="dividing 4 rows"):
        dropout(x[:, :2], mask)
    with pytest.raises(ValueError, match="0 <= p < 1"):
        dropout(x, mask._replace(p=1.0))
    with pytest.raises(ValueError, match=r"int64.*torch.int32"):
        dropout(x, mask._replace(key_P2=mask.key_P2.int()))


def on_device(shape, p, packed=False):
    keys = torch.randint(0, 2**32, (shape[0], 2), device=DEVICE)
    counter = torch.randint(0, 2**20, shape[:1] if packed else shape[1:-1], device=DEVICE)
    return torch.randn(shape, device=DEVICE), DropoutMask(keys, counter, p)


@needs_triton
@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 4, 1030), (6, 33), (1, 1, 1), (5, 2, 64)])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_kernel_equals_reference(shape, p):
    x, mask = on_device(shape, p, packed=len(shape) == 2)
    expected = dropout(x, mask, implementation="reference")
    assert torch.equal(dropout(x, mask, implementation="triton"), expected)


@needs_triton
@pytest.mark.parametrize("packed", [False, True])
def test_kernel_reads_the_keys_of_a_table(packed):
    """As the model calls it: keys are columns of a (P, sites, 2) table, strided views."""
    keys = torch.randint(0, 2**32, (3, 4, 2), device=DEVICE)
    element = torch.arange(5, device=DEVICE)
    x = torch.randn(3, 5, 16, device=DEVICE)
    if packed:
        sequence = torch.tensor([2, 0, 1, 2], device=DEVICE)
        element = torch.tensor([1, 4, 0, 3], device=DEVICE)
        keys, x = keys[sequence], x[sequence, element]
    for site in range(4):
        mask = DropoutMask(keys[:, site], element, 0.5)
        expected = dropout(x, mask, implementation="reference")
        assert torch.equal(dropout(x, mask, implementation="triton"), expected)


@needs_triton
def test_operator():
    x, mask = on_device((3, 5, 24), 0.3)
    check_operator(_operator, x.requires_grad_(), *mask.arrays(), mask.p)
    check_compiles(lambda x: dropout(x, mask, implementation="triton"), (x,), [torch.randn_like(x)])
