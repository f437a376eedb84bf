"""adaln: the reference against float64, the kernel against the reference, the operator."""

import pytest
import torch

from heptapod_fast.ops.adaln import MAX_WIDTH, _backward_operator, _operator, adaln
from tests.numerics import (
    DEVICE,
    check_compiles,
    check_operator,
    compare,
    needs_triton,
    poisoned,
)

EPS = 1e-6
PLACES = ["first", "middle", "last"]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def draw(rows, width, dtype, place="middle"):
    """Arguments of adaln; modulation in slices of one tensor, as the diffusion MLP has it."""

    def normal(*shape, dtype=dtype):
        return torch.randn(shape, device=DEVICE).to(dtype).requires_grad_()

    modulation = normal(rows, 4 * width).detach()
    gate, shift, scale = (
        modulation[:, k * width : (k + 1) * width].requires_grad_() for k in (3, 0, 1)
    )
    parameter = dict(dtype=torch.float32)
    added = normal(rows, width), normal(width, **parameter), gate
    affine = normal(width, **parameter), normal(width, **parameter)
    if place == "first":
        added = (None,) * 3
    if place == "last":
        affine = (None,) * 2
    return normal(rows, width), *added, shift, scale, *affine


def upstream(rows, width, dtype):
    return [torch.randn(rows, width, device=DEVICE).to(dtype) for _ in range(2)]


def run(implementation):
    return lambda *arguments: adaln(*arguments, EPS, implementation)


@pytest.mark.parametrize("place", PLACES)
def test_definition(place):
    arguments = [None if a is None else a.detach() for a in draw(5, 6, torch.float32, place)]
    x, branch, branch_bias, gate, shift, scale, weight, bias = (
        None if a is None else a.double() for a in arguments
    )
    new = x if branch is None else x + gate * (branch + branch_bias)
    centred = new - new.mean(1, keepdim=True)
    u = centred / (centred.square().mean(1, keepdim=True) + EPS).sqrt()
    u = u if weight is None else u * weight + bias
    found = adaln(*arguments, EPS, "reference")
    for a, b in zip(found, (new, u * (1 + scale) + shift), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@needs_triton
@pytest.mark.parametrize("rows, width", [(1, 7), (12, 16), (5, 130)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("place", PLACES)
def test_kernel_by_the_rule(rows, width, dtype, place):
    compare(
        run("triton"),
        run("reference"),
        draw(rows, width, dtype, place),
        upstream(rows, width, dtype),
    )


@needs_triton
def test_v_comes_from_the_rounded_sum():
    """The sum that is stored is all that the backward pass sees."""
    arguments = draw(9, 24, torch.bfloat16)
    new, v = run("triton")(*arguments)
    assert torch.equal(run("triton")(new, None, None, None, *arguments[4:])[1], v)


@needs_triton
@pytest.mark.parametrize("used", [0, 1])
def test_one_output_alone(used):
    """What only the other output depends on gets no gradient, or zeros."""
    arguments, (gradient, _) = draw(6, 16, torch.float32), upstream(6, 16, torch.float32)
    found, expected = (
        torch.autograd.grad(run(name)(*arguments)[used], arguments, gradient, allow_unused=True)
        for name in ("triton", "reference")
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b)


@needs_triton
def test_slabs_of_several_rows(monkeypatch):
    """More rows than programs, and a last slab that is not full."""
    from heptapod_fast.kernels import tuning

    monkeypatch.setattr(
        tuning,
        "lookup",
        lambda operation, kernel, size, device: {
            "forward": dict(SLAB=4),
            "backward": dict(programs=4),
        }[kernel],
    )
    compare(
        run("triton"),
        run("reference"),
        draw(14, 20, torch.float32),
        upstream(14, 20, torch.float32),
    )


@needs_triton
@pytest.mark.parametrize("place", PLACES)
def test_gradients_lie_in_slices_and_are_summed(place):
    """As the diffusion MLP calls it: dv read from its slot, dgate and dscale written to theirs."""
    from heptapod_fast.kernels import adaln as kernels

    rows, width = 9, 24
    x, branch, branch_bias, gate, shift, scale, weight, bias = (
        None if a is None else a.detach() for a in draw(rows, width, torch.float32, place)
    )
    dnew, dv = upstream(rows, width, torch.float32)
    added = None if branch is None else kernels.Branch(branch, branch_bias, gate)
    new, _, stats = kernels.forward(x, added, shift, scale, weight, bias, EPS)
    slots = torch.full((rows, 5 * width), 7.0, device=DEVICE)
    slot = lambda k: slots[:, k * width : (k + 1) * width]
    slot(1).copy_(dv)
    arguments = x if new is None else new, added, scale, weight, bias, stats
    with poisoned():
        kernels_own = kernels.backward(dnew, dv, *arguments)
        found = kernels.backward(dnew, slot(1), *arguments, slot(4) if added else None, slot(2))
    for a, b in zip(found, kernels_own, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    dx, dbranch, dgate, dscale, sums = kernels_own
    assert torch.equal(slot(1), dv) and torch.equal(slot(2), dscale)
    untouched = (0, 3) if added else (0, 3, 4)
    assert all(bool((slot(k) == 7).all()) for k in untouched)
    zero = torch.zeros(width, device=DEVICE)
    sums = dict(zip(kernels.SUMS, sums.view(6, width), strict=True))
    for name, part in (("gate", dgate), ("branch_bias", dbranch), ("shift", dv), ("scale", dscale)):
        torch.testing.assert_close(sums[name], zero if part is None else part.sum(0))
    if place == "last":
        assert torch.equal(sums["weight"], zero) and torch.equal(sums["bias"], zero)
    else:
        assert bool(sums["weight"].any()) and bool(sums["bias"].any())


@needs_triton
@pytest.mark.parametrize("place", PLACES)
def test_operator(place):
    arguments = draw(6, 16, torch.float32, place)
    both = upstream(6, 16, torch.float32)
    check_operator(_operator, *arguments, EPS)
    x, branch, branch_bias, gate, _, scale, weight, bias = (
        None if a is None else a.detach() for a in arguments
    )
    check_operator(
        _backward_operator,
        *both,
        x,
        branch,
        branch_bias,
        gate,
        scale,
        weight,
        bias,
        torch.rand(2, 6, device=DEVICE),
    )
    check_compiles(run("triton"), arguments, both)


@needs_triton
def test_no_rows():
    arguments = draw(0, 8, torch.float32)
    new, v = adaln(*arguments, EPS, "triton")
    (new.sum() + v.sum()).backward()
    assert torch.equal(arguments[6].grad, torch.zeros(8, device=DEVICE))


@needs_triton
def test_widths_reach_as_far_as_the_table():
    from heptapod_fast.kernels import tuning

    assert {tuning.largest("adaln", kernel) for kernel in ("forward", "backward")} == {MAX_WIDTH}


def test_refusals():
    x, branch, branch_bias, gate, shift, scale, weight, bias = draw(4, 8, torch.float32)
    with pytest.raises(ValueError, match="branch, branch_bias and gate together"):
        adaln(x, branch, None, gate, shift, scale, weight, bias)
    with pytest.raises(ValueError, match="weight and bias together"):
        adaln(x, branch, branch_bias, gate, shift, scale, weight, None)
    with pytest.raises(ValueError, match=r"shift like x, torch.float32 \(4, 8\)"):
        adaln(x, branch, branch_bias, gate, shift[:2], scale, weight, bias)
    with pytest.raises(ValueError, match="scale like x, .*bfloat16"):
        adaln(x, branch, branch_bias, gate, shift, scale.bfloat16(), weight, bias)
    with pytest.raises(ValueError, match=r"weight of shape \(8,\)"):
        adaln(x, branch, branch_bias, gate, shift, scale, weight[:4], bias)
    with pytest.raises(ValueError, match="two dimensions"):
        adaln(x[None], None, None, None, shift, scale, weight, bias)
