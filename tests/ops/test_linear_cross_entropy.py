"""linear_cross_entropy: the definition in float64, kernels against reference, operator."""

import functools
import importlib

import pytest
import torch

from heptapod_fast.ops import dispatch, linear_cross_entropy
from heptapod_fast.ops.linear_cross_entropy import MOST_HELD, _operator
from tests.numerics import (
    DEVICE,
    Allocations,
    check_compiles,
    check_operator,
    compare,
    needs_triton,
)

operation = importlib.import_module("heptapod_fast.ops.linear_cross_entropy")

# Rows, width, codes, targets per row, chunk. bf16 with an even number of codes takes the kernel
# that holds a row, the rest the one that works in blocks of 1024 codes and 4 rows.
SHAPES = [
    (9, 8, 64, 1, None),
    (1, 16, 1000, 1, None),
    (11, 8, 130, 4, 4),
    (5, 24, 13, 16, 2),
    (3, 8, 70, 64, 2),
    (7, 8, 2050, 2, 4),
    (6, 8, 1101, 1, 6),
]


def inputs(scale=1.0, rows=9, width=8, codes=13, targets=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    z, weight = (
        scale * torch.randn(shape, generator=generator) for shape in ((rows, width), (codes, width))
    )
    bias = torch.randn(codes, generator=generator)
    target = torch.randint(codes, (rows, targets), generator=generator)
    z, weight, bias, target = (x.to(DEVICE) for x in (z.to(dtype), weight, bias, target))
    return z, weight, bias, target[:, 0] if targets == 1 else target


def draw(rows, width, codes, targets, dtype):
    """Leaves, targets with a repeat, row weights with zeros."""
    *leaves, target = inputs(1.0, rows, width, codes, targets, dtype)
    if targets > 1:
        target[:, 1] = target[:, 0]
    row_weight = torch.rand(rows, device=DEVICE) * (torch.arange(rows, device=DEVICE) % 4 != 2)
    return *(leaf.requires_grad_() for leaf in leaves), target, row_weight


def exact(z, weight, bias, target, row_weight=None):
    """(total, losses), written out in float64."""
    logits = z.double() @ weight.double().t() + bias.double()
    peak = logits.amax(1, keepdim=True)
    total = peak[:, 0] + (logits - peak).exp().sum(1).log()
    chosen = torch.stack([logits[r][t].mean() for r, t in enumerate(target.view(len(z), -1))])
    loss = total - chosen
    return (loss if row_weight is None else loss * row_weight).sum(), loss


def gradients(function, arguments, row_weight):
    *tensors, target = arguments
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    (3 * function(*leaves, target, row_weight)[0]).backward()
    return [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("targets", [1, 4])
def test_values(targets):
    for scale in (0.1, 1.0, 30.0):
        arguments = inputs(scale, targets=targets)
        total, loss = linear_cross_entropy(*arguments, implementation="reference")
        assert total.dtype == loss.dtype == torch.float32
        assert total.shape == () and loss.shape == (9,)
        expected, losses = exact(*arguments)
        torch.testing.assert_close(loss.double(), losses, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(total.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("targets", [1, 4])
def test_gradients(targets):
    weights = torch.arange(9.0, device=DEVICE)
    ours, theirs = (
        gradients(f, inputs(targets=targets), weights) for f in (linear_cross_entropy, exact)
    )
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "implementation", ["reference", "chunked", pytest.param("triton", marks=needs_triton)]
)
def test_bf16_keeps_float32_masters_and_statistics(implementation):
    z, weight, bias, target = inputs(codes=14)
    total, loss = linear_cross_entropy(
        z.bfloat16(), weight, bias, target, implementation=implementation
    )
    _, rounded = exact(z.bfloat16(), weight.bfloat16(), bias.bfloat16(), target)
    assert total.dtype == loss.dtype == torch.float32
    # Each of the two logits may be half a bf16 step off; the sums over codes are exact beside it.
    assert float((loss.double() - rounded).abs().max()) < 2 * 2**-8 * 16
    masters = gradients(
        lambda z, w, b, t, r: linear_cross_entropy(
            z.bfloat16(), w, b, t, r, implementation=implementation
        ),
        (z, weight, bias, target),
        None,
    )
    assert all(g.dtype == torch.float32 for g in masters)
    if implementation == "triton":  # not rounded to bf16 on the way
        assert all(bool((g != g.bfloat16()).any()) for g in masters[1:])


@needs_triton
@pytest.mark.parametrize("rows, width, codes, targets, chunk", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weighted", [False, True])
def test_kernel_by_the_rule(rows, width, codes, targets, chunk, dtype, weighted):
    *leaves, target, row_weight = draw(rows, width, codes, targets, dtype)
    row_weight = row_weight if weighted else None

    def run(implementation):
        return lambda *leaves: linear_cross_entropy(
            *leaves, target, row_weight, chunk, implementation
        )

    upstream = [torch.tensor(1.7, device=DEVICE), None]
    compare(
        run("triton"),
        run("reference"),
        leaves,
        upstream,
        exact=lambda *leaves: exact(*leaves, target, row_weight),
    )


@pytest.mark.parametrize("rows, width, codes, targets, chunk", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weighted", [False, True])
def test_chunked_by_the_rule(monkeypatch, rows, width, codes, targets, chunk, dtype, weighted):
    monkeypatch.setattr(operation, "MOST_FLOATS", 3 * codes)  # softmax of 3 rows at a time
    *leaves, target, row_weight = draw(rows, width, codes, targets, dtype)
    row_weight = row_weight if weighted else None

    def run(implementation):
        return lambda *leaves: linear_cross_entropy(
            *leaves, target, row_weight, chunk, implementation
        )

    compare(
        run("chunked"),
        run("reference"),
        leaves,
        [torch.tensor(1.7, device=DEVICE), None],
        exact=lambda *leaves: exact(*leaves, target, row_weight),
    )


def largest_allocation(function, *arguments):
    """Bytes of the largest tensor made by a forward and a backward pass."""
    with Allocations() as seen:
        total, _ = function(*arguments)
        total.backward()
    return seen.largest


@pytest.mark.parametrize("rows", [256, 2048])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_logits_are_never_held_in_float32(dtype, rows):
    """At LlamaGen's 16384 codes, of one image of 256 tokens and of eight."""
    codes = 16_384
    *leaves, target = inputs(rows=rows, codes=codes, dtype=dtype)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    in_float32 = 4 * rows * codes
    largest = largest_allocation(linear_cross_entropy, *leaves, target)
    assert largest <= min(MOST_HELD, in_float32 // 2)
    reference = functools.partial(linear_cross_entropy, implementation="reference")
    assert largest_allocation(reference, *leaves, target) == in_float32


@needs_triton
def test_kernels_never_hold_many_logits(monkeypatch):
    from heptapod_fast.kernels import linear_cross_entropy as kernels

    # As in a large batch, where programs are few beside rows.
    plan = kernels._plan
    monkeypatch.setattr(kernels, "_plan", lambda logits: (*plan(logits)[:2], 2))
    rows, codes = 24, 16_384
    z, weight, bias, target = inputs(rows=rows, codes=codes, dtype=torch.bfloat16)
    with Allocations() as seen:
        kernels.forward(z, weight, bias, target[:, None], None, 8, True)
    assert seen.largest < 4 * rows * codes


def test_many_logits_are_done_in_chunks(monkeypatch):
    *leaves, target, row_weight = draw(9, 8, 64, 1, torch.float32)

    def grad_of_z(implementation, chunk=None):
        total, _ = linear_cross_entropy(*leaves, target, row_weight, chunk, implementation)
        (grad,) = torch.autograd.grad(total, leaves[0], create_graph=True)
        return grad

    # Only the reference's gradient has a gradient of its own.
    monkeypatch.setattr(operation, "MANY_CODES", 64)
    monkeypatch.setattr(operation, "MOST_FLOATS", 9 * 64)
    assert has_second_derivative(grad_of_z("auto"))
    monkeypatch.setattr(operation, "MANY_CODES", 65)
    monkeypatch.setattr(operation, "MOST_FLOATS", 9 * 64 - 1)
    assert has_second_derivative(grad_of_z("auto"))
    monkeypatch.setattr(operation, "MANY_CODES", 64)
    assert not has_second_derivative(grad_of_z("auto"))
    assert has_second_derivative(grad_of_z("reference"))
    assert torch.equal(grad_of_z("auto"), grad_of_z("chunked", 5))


def has_second_derivative(grad):
    try:
        grad.sum().backward()
    except RuntimeError as error:
        assert "differentiable once" in str(error)
        return False
    return True


def test_many_logits_with_tangents_are_the_reference(monkeypatch):
    monkeypatch.setattr(operation, "MANY_CODES", 13)
    monkeypatch.setattr(operation, "MOST_FLOATS", 8)
    monkeypatch.setattr(dispatch, "_told", set())
    z, weight, bias, target = inputs()
    with pytest.warns(UserWarning, match="no forward-mode derivatives.* reference runs instead"):
        _, derivative = torch.func.jvp(
            lambda z: linear_cross_entropy(z, weight, bias, target)[0], (z,), (torch.ones_like(z),)
        )
    leaf = z.clone().requires_grad_()
    linear_cross_entropy(leaf, weight, bias, target)[0].backward()
    torch.testing.assert_close(derivative, leaf.grad.sum(), rtol=1e-4, atol=1e-4)


def test_chunked_losses_alone_when_no_gradient_is_wanted():
    z, weight, bias, target = inputs(codes=64)
    alone = linear_cross_entropy(z, weight, bias, target, None, 4, "chunked")
    full = linear_cross_entropy(z.requires_grad_(), weight, bias, target, None, 4, "chunked")
    assert not alone[0].requires_grad and full[0].requires_grad and not full[1].requires_grad
    assert all(torch.equal(a, b) for a, b in zip(alone, full))


def test_chunked_no_rows_and_rows_of_weight_zero():
    z, weight, bias, target, row_weight = draw(9, 8, 64, 1, torch.float32)
    z = z.detach()
    z[row_weight == 0] = 3e38
    leaves = [z.requires_grad_(), weight, bias]
    total, _ = linear_cross_entropy(*leaves, target, row_weight, 4, "chunked")
    total.backward()
    assert bool(total.isfinite())
    assert torch.equal(z.grad[row_weight == 0], torch.zeros_like(z[row_weight == 0]))
    total, loss = linear_cross_entropy(z[:0], weight, bias, target[:0], None, 4, "chunked")
    weight.grad = None
    total.backward()
    assert float(total.detach()) == 0 and loss.shape == (0,)
    assert torch.equal(weight.grad, torch.zeros_like(weight))


@pytest.mark.parametrize("leaf", [0, 1, 2])
def test_chunked_second_derivatives_are_refused(leaf):
    *leaves, target, _ = draw(9, 8, 64, 1, torch.float32)
    leaves = [each if i == leaf else each.detach() for i, each in enumerate(leaves)]
    total, _ = linear_cross_entropy(*leaves, target, None, 4, "chunked")
    (grad,) = torch.autograd.grad(total, leaves[leaf], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once.*reference"):
        grad.sum().backward()


def test_chunked_under_autocast_and_functional_gradients():
    z, weight, bias, target = inputs(codes=64)

    def total(z):
        return linear_cross_entropy(z, weight, bias, target, None, 4, "chunked")[0]

    expected = torch.func.grad(total)(z)
    leaf = z.clone().requires_grad_()
    with torch.autocast(DEVICE, torch.bfloat16):
        total(leaf).backward()
    assert torch.equal(leaf.grad, expected)


def test_chunked_compiles():
    *leaves, target, row_weight = draw(9, 8, 64, 2, torch.float32)
    check_compiles(
        lambda *leaves: linear_cross_entropy(*leaves, target, row_weight, 4, "chunked"),
        leaves,
        [torch.tensor(0.5, device=DEVICE), None],
    )


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows, codes, targets, chunk", [(11, 64, 1, None), (13, 130, 3, 7)])
def test_programs_of_several_rows(monkeypatch, dtype, rows, codes, targets, chunk):
    """As large batches have them: the next row on its way, bias gradients over rows."""
    from heptapod_fast.kernels import linear_cross_entropy as kernels

    plan = kernels._plan
    monkeypatch.setattr(kernels, "_plan", lambda logits: (*plan(logits)[:2], 2))
    *leaves, target, row_weight = draw(rows, 8, codes, targets, dtype)

    def run(implementation):
        return lambda *leaves: linear_cross_entropy(
            *leaves, target, row_weight, chunk, implementation
        )

    compare(
        run("triton"),
        run("reference"),
        leaves,
        [torch.tensor(1.7, device=DEVICE), None],
        exact=lambda *leaves: exact(*leaves, target, row_weight),
    )


@needs_triton
@pytest.mark.parametrize("rows, chunk", [(13, None), (17, 14)])
def test_programs_without_rows_leave_no_sums(monkeypatch, rows, chunk):
    """13 rows in 10 slabs of 2 leave three programs idle; their sums are added up all the same."""
    from heptapod_fast.kernels import tuning

    table = tuning.table("linear_cross_entropy")["sm_90"]["blocks"]
    for config in table.values():
        monkeypatch.setitem(config, "programs", 10)
        monkeypatch.setitem(config, "ROWS", 1)
    *leaves, target, row_weight = draw(rows, 8, 11, 1, torch.float32)
    compare(
        lambda *x: linear_cross_entropy(*x, target, row_weight, chunk, "triton")[0],
        lambda *x: linear_cross_entropy(*x, target, row_weight, None, "reference")[0],
        leaves,
        [torch.tensor(0.7, device=DEVICE)],
    )


@needs_triton
def test_the_gradient_of_the_total_is_not_rounded():
    """On a GPU PyTorch rounds a factor in device memory to the dtype of what it multiplies."""
    *leaves, target, _ = draw(9, 8, 64, 1, torch.bfloat16)
    total, _ = linear_cross_entropy(*leaves, target, implementation="triton")
    (dz,) = torch.autograd.grad(total, leaves[0], retain_graph=True)
    factor = 1 / 3.0
    (scaled,) = torch.autograd.grad(total, leaves[0], torch.tensor(factor, device=DEVICE))
    assert torch.equal(scaled, (dz.float() * torch.tensor(factor)).bfloat16())


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_weight_zero_change_nothing(dtype):
    z, weight, bias, target, row_weight = draw(9, 8, 64, 1, dtype)
    z = z.detach()
    z[row_weight == 0] = 3e38
    total, loss = linear_cross_entropy(
        z.requires_grad_(), weight, bias, target, row_weight, implementation="triton"
    )
    total.backward()
    kept = row_weight > 0
    assert 0 < int(kept.sum()) < 9 and not bool(loss.isfinite().all())
    assert torch.equal(z.grad[~kept], torch.zeros_like(z.grad[~kept]))
    found = [total.detach(), z.grad[kept], weight.grad, bias.grad]
    leaves = [x.detach()[kept] if x is z else x.detach() for x in (z, weight, bias)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    alone, _ = linear_cross_entropy(
        *leaves, target[kept], row_weight[kept], implementation="triton"
    )
    alone.backward()
    for a, b in zip(found, [alone.detach(), *(leaf.grad for leaf in leaves)]):
        torch.testing.assert_close(a, b)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_targets_out_of_range_count_for_nothing(dtype):
    z, weight, bias, target, _ = draw(4, 8, 64, 1, dtype)
    target[1], target[2] = -100, 2**32 + 5
    total, loss = linear_cross_entropy(z, weight, bias, target, implementation="triton")
    total.backward()
    logits = z.double() @ weight.to(dtype).double().t() + bias.double()
    torch.testing.assert_close(loss[1:3].double(), logits[1:3].logsumexp(1), rtol=0.01, atol=0.01)
    expected = (logits[1:3].softmax(1) @ weight.double()).to(dtype)
    torch.testing.assert_close(z.grad[1:3], expected, rtol=0.02, atol=0.02)


@needs_triton
def test_large_and_odd_vocabularies_go_in_blocks():
    from heptapod_fast.kernels import linear_cross_entropy as kernels

    for codes, dtype, kernel in (
        (16384, torch.bfloat16, kernels.cross_entropy_rows_kernel),
        (12, torch.bfloat16, kernels.cross_entropy_rows_kernel),
        (13, torch.bfloat16, kernels.cross_entropy_blocks_kernel),
        (40_000, torch.bfloat16, kernels.cross_entropy_blocks_kernel),
        (16384, torch.float32, kernels.cross_entropy_blocks_kernel),
    ):
        found, tile, programs = kernels._plan(torch.empty(3, codes, dtype=dtype, device=DEVICE))
        assert found is kernel and 1 <= programs <= 3 and "programs" not in tile


@needs_triton
def test_chunks_are_alike():
    from heptapod_fast.kernels.linear_cross_entropy import chunk_rows

    assert chunk_rows(16448, 5632) == 5504 and chunk_rows(9, 4) == 4 and chunk_rows(9, 9) == 9
    assert chunk_rows(1000, 4096) == 1024


@needs_triton
def test_losses_alone_when_no_gradient_is_wanted():
    arguments = inputs(codes=64, dtype=torch.bfloat16)
    _, weight, *_ = arguments
    alone = linear_cross_entropy(*arguments, implementation="triton")
    weight.requires_grad_()
    with torch.no_grad():
        without = linear_cross_entropy(*arguments, implementation="triton")
    full = linear_cross_entropy(*arguments, implementation="triton")
    assert full[0].requires_grad and not full[1].requires_grad
    for result in (alone, without):
        assert not result[0].requires_grad
        assert all(torch.equal(a, b) for a, b in zip(result, full))
    # A second backward pass of the same graph finds the gradients as they were.
    first, second = (torch.autograd.grad(full[0], weight, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operator(dtype):
    *leaves, target, row_weight = draw(6, 8, 64, 2, dtype)
    check_operator(_operator, *leaves, target, row_weight, 4, True)
    check_operator(_operator, *(leaf.detach() for leaf in leaves), target, None, None, False)
    check_compiles(
        lambda *leaves: linear_cross_entropy(*leaves, target, row_weight, implementation="triton"),
        leaves,
        [torch.tensor(0.5, device=DEVICE), None],
    )
    with torch.no_grad():
        check_compiles(
            lambda z, w, b: linear_cross_entropy(z, w, b, target, implementation="triton"), leaves
        )


@needs_triton
def test_no_rows():
    leaves = [x.requires_grad_() for x in inputs(rows=9)[:3]]
    target = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    total, loss = linear_cross_entropy(leaves[0][:0], *leaves[1:], target, implementation="triton")
    total.backward()
    assert float(total.detach()) == 0 and loss.shape == (0,)
    assert all(torch.equal(leaf.grad, torch.zeros_like(leaf)) for leaf in leaves)


def test_refusals():
    z, weight, bias, target = inputs()
    with pytest.raises(ValueError, match=r"z \(R, D\) and weight \(V, D\), got \(9, 7\)"):
        linear_cross_entropy(z[:, :7], weight, bias, target)
    with pytest.raises(ValueError, match=r"bias of shape \(13,\), got \(12,\)"):
        linear_cross_entropy(z, weight, bias[:12], target)
    for wrong in (target.int(), target[:8], target[:, None].repeat(1, 65), target[:, None][:, :0]):
        with pytest.raises(ValueError, match=r"\(9,\) or \(9, K\) with K from 1 to 64, got"):
            linear_cross_entropy(z, weight, bias, wrong)
    with pytest.raises(ValueError, match=r"row weights of shape \(9,\), got \(1,\)"):
        linear_cross_entropy(z, weight, bias, target, torch.ones(1))
    with pytest.raises(ValueError, match="at least 1 row, got 0"):
        linear_cross_entropy(z, weight, bias, target, chunk=0)
