"""rotary: the reference against complex numbers, the kernel against float64, the table."""

import math

import pytest
import torch

from heptapod_fast.ops import dispatch
from heptapod_fast.ops.rotary import _operator, grid_table, rotary
from tests.numerics import DEVICE, check_compiles, check_operator, compare, needs_triton

SHAPES = [(2, 5, 2, 8), (1, 17, 3, 64), (2, 3, 20, 32), (1, 4, 1, 100)]  # B, N, H, E


def draw(shape, dtype):
    batch, elements, heads, width = shape
    qkv = torch.randn(batch, elements, 3, heads, width, device=DEVICE).to(dtype).requires_grad_()
    angle = torch.randn(elements, width // 2, device=DEVICE) * 3
    table = torch.stack((angle.cos(), angle.sin()), dim=-1)
    table[0] = 0  # a class slot
    return qkv, table, torch.randn(qkv.shape, device=DEVICE).to(dtype)


def test_definition():
    """A product of complex numbers, pairs of adjacent channels."""
    qkv, table, _ = draw((2, 5, 2, 8), torch.float32)
    found = rotary(qkv, table, "reference")
    pairs = torch.view_as_complex(qkv.detach().unflatten(-1, (-1, 2)).contiguous())
    factor = torch.view_as_complex(table.contiguous())
    expected = torch.view_as_real(pairs * factor[None, :, None, None]).flatten(-2)
    torch.testing.assert_close(found[:, :, :2], expected[:, :, :2])
    assert torch.equal(found[:, :, 2], qkv[:, :, 2])
    assert not found[:, 0, :2].any()


@needs_triton
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernel_by_the_rule(shape, dtype):
    qkv, table, upstream = draw(shape, dtype)

    def run(how):
        return lambda qkv: rotary(qkv, table.to(qkv.device), how)

    compare(run("triton"), run("reference"), (qkv,), [upstream])


@needs_triton
def test_operator():
    qkv, table, upstream = draw((2, 3, 2, 8), torch.float32)
    for back in (False, True):
        check_operator(_operator, qkv, table, back)
    check_compiles(lambda qkv: rotary(qkv, table, "triton"), (qkv,), [upstream])


@needs_triton
def test_a_second_derivative_is_another_rotation():
    qkv, table, upstream = draw((1, 3, 1, 4), torch.float32)
    (grad,) = torch.autograd.grad(
        rotary(qkv.square(), table, "triton"), qkv, upstream, create_graph=True
    )
    (second,) = torch.autograd.grad(grad.sum(), qkv)
    (expected,) = torch.autograd.grad(
        rotary(qkv.square(), table, "reference"), qkv, upstream, create_graph=True
    )
    (expected_second,) = torch.autograd.grad(expected.sum(), qkv)
    torch.testing.assert_close(second, expected_second)


@pytest.mark.parametrize("side, width", [(1, 4), (3, 8), (16, 64), (4, 12)])
def test_the_table_of_a_grid(side, width):
    """Upstream's formula, entry by entry: rows first, frequencies over half of the head."""
    table = grid_table(side, width)
    assert table.shape == (1 + side * side, width // 2, 2) and not table[0].any()
    for y in range(side):
        for x in range(side):
            for pair in range(width // 2):
                quarter = width // 4
                at, number = (y, pair) if pair < quarter else (x, pair - quarter)
                angle = at * 10_000.0 ** (-2 * number / (width // 2))
                found = table[1 + y * side + x, pair].tolist()
                assert found == pytest.approx([math.cos(angle), math.sin(angle)], abs=1e-5)


def test_refusals():
    qkv, table, _ = draw((2, 5, 2, 8), torch.float32)
    for bad, other in ((qkv[:, :, :2], table), (qkv, table[:4]), (qkv[..., :7], table)):
        with pytest.raises(ValueError, match=r"rotary takes qkv \(B, N, 3, H, E\)"):
            rotary(bad, other)
    with pytest.raises(ValueError, match="multiple of 4"):
        grid_table(4, 6)


@needs_triton
def test_widths_beyond_the_table_go_to_the_reference_or_are_refused():
    qkv, table, _ = draw((1, 2, 1, 130), torch.float32)
    with pytest.raises(dispatch.Unavailable, match="130 wide, at most 128"):
        rotary(qkv, table, "triton")
    assert rotary(qkv, table).shape == qkv.shape
