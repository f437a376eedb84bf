"""diffusion_mlp: the reference against float64, the kernels against the reference, the operator."""

import pytest
import torch
import torch.nn.functional as F

from heptapod_fast.ops.diffusion_mlp import (
    BlockWeights,
    DiffusionWeights,
    _backward_operator,
    _operator,
    diffusion_mlp,
)
from tests.numerics import (
    DEVICE,
    assert_within_rule,
    check_compiles,
    check_operator,
    compare,
    double,
    fresh,
    needs_triton,
    poisoned,
)
from tests.numerics import run as run_both

C, EPS = 3, 1e-6


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def normal(*shape, dtype=torch.float32, scale=1.0):
    return (scale * torch.randn(shape, device=DEVICE)).to(dtype).requires_grad_()


def draw_weights(width, blocks, channels=C):
    def layer(outputs, inputs):
        return normal(outputs, inputs, scale=inputs**-0.5), normal(outputs, scale=0.5)

    block = lambda: BlockWeights(
        normal(width),
        normal(width),
        *layer(width, width),
        *layer(width, width),
        *layer(3 * width, width),
    )
    return DiffusionWeights(
        *layer(width, channels),
        *layer(2 * width, width),
        *layer(2 * channels, width),
        tuple(block() for _ in range(blocks)),
    )


def draw(rows=12, width=16, repeat=4, dtype=torch.float32, blocks=2, steps=7):
    """(arguments of `run`, gradient of the prediction)."""
    xt = normal(rows, C).detach()
    t = torch.randint(steps, (rows,), device=DEVICE)
    made = (xt, t, normal(steps, width, dtype=dtype), normal(rows // repeat, width, dtype=dtype))
    return (*made, *draw_weights(width, blocks).flat()), torch.randn(rows, 2 * C, device=DEVICE)


def run(implementation):
    return lambda xt, t, time, condition, *flat: diffusion_mlp(
        xt, t, time, condition, DiffusionWeights.of(flat), EPS, implementation
    )


def test_definition():
    """MAR's SimpleMLPAdaLN written out, every row with its own embedding and condition."""
    arguments, _ = draw()
    xt, t, time, condition, *flat = (
        a.detach().double() if a.is_floating_point() else a for a in arguments
    )
    w = DiffusionWeights.of(flat)
    found = run("reference")(*arguments)
    norm = lambda x: (x - x.mean()) / (x.var(correction=0) + EPS).sqrt()
    silu = lambda x: x / (1 + (-x).exp())
    for r in range(len(xt)):
        s = silu(time[t[r]] + condition[r // 4])
        x = w.input_weight @ xt[r] + w.input_bias
        for b in w.blocks:
            shift, scale, gate = (b.modulation_weight @ s + b.modulation_bias).chunk(3)
            v = (norm(x) * b.norm_weight + b.norm_bias) * (1 + scale) + shift
            x = x + gate * (b.fc2_weight @ silu(b.fc1_weight @ v + b.fc1_bias) + b.fc2_bias)
        shift, scale = (w.modulation_weight @ s + w.modulation_bias).chunk(2)
        expected = w.output_weight @ (norm(x) * (1 + scale) + shift) + w.output_bias
        torch.testing.assert_close(found[r].double(), expected, rtol=1e-4, atol=1e-4)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "rows, width, repeat, blocks, steps",
    [(12, 16, 4, 2, 7), (12, 24, 1, 2, 40), (3, 7, 3, 1, 1), (10, 16, 2, 0, 7)],
)
def test_kernels_by_the_rule(dtype, rows, width, repeat, blocks, steps):
    """Twice the reference's error in float32; four times in bfloat16, where the largest error of a
    few numbers is a matter of chance: the next test looks at all of them together.
    """
    arguments, upstream = draw(rows, width, repeat, dtype, blocks, steps)
    compare(
        run("triton"),
        run("reference"),
        arguments,
        [upstream],
        factor=2.0 if dtype == torch.float32 else 4.0,
    )


@needs_triton
def test_bfloat16_is_as_close_to_float64_as_the_reference():
    """Relative errors, summed over prediction, gradients and draws: fewer roundings, less error."""
    total = {"triton": 0.0, "reference": 0.0}
    for _ in range(3):
        arguments, upstream = draw(dtype=torch.bfloat16)
        outputs, grads = run_both(run("reference"), [double(a) for a in arguments], [upstream])
        for name in total:
            found = run_both(run(name), [fresh(a) for a in arguments], [upstream])
            total[name] += sum(
                float((f.detach() - e.detach()).norm() / e.detach().norm())
                for f, e in zip((*found[0], *found[1]), (*outputs, *grads), strict=True)
            )
    assert total["triton"] <= total["reference"]


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_gradient_wanted(dtype):
    """The same prediction, and nothing kept."""
    arguments, _ = draw(dtype=dtype)
    expected = run("triton")(*arguments)
    with torch.no_grad(), poisoned():
        assert torch.equal(run("triton")(*arguments), expected)
    xt, t, time, condition, *flat = (a.detach() for a in arguments)
    kept = [len(_operator(xt, t, time, condition, flat, EPS, keep)) for keep in (False, True)]
    assert kept == [1, 1 + 3 + 2 * 6 + 3]
    with pytest.raises(RuntimeError, match="keep=False"):
        _operator(xt, t, time, condition, [w.requires_grad_() for w in flat], EPS, False)[
            0
        ].sum().backward()


@needs_triton
@pytest.mark.parametrize("rows, repeat", [(24, 4), (9, 1)])
def test_time_and_condition(rows, repeat):
    """SiLU of their sum: many rows of one timestep, timesteps without rows, rows in order."""
    from heptapod_fast.kernels import diffusion_mlp as kernels

    time, condition = normal(5, 600, dtype=torch.bfloat16), normal(rows // repeat, 600)
    t = torch.tensor([0, 4, 4, 1] * 6, device=DEVICE)[:rows]
    t[7:] = 4
    condition = condition.detach().bfloat16().requires_grad_()
    upstream = torch.randn(rows, 600, device=DEVICE).bfloat16()

    def exact(time, condition):
        return F.silu(F.embedding(t, time) + condition.repeat_interleave(repeat, 0))

    def gradients(time, condition):
        out = exact(time, condition)
        return out, *torch.autograd.grad(out, (time, condition), upstream.to(out.dtype))

    with poisoned():
        found = (
            kernels.silu_sum(time.detach(), t, condition.detach()),
            *kernels.silu_sum_backward(upstream, time.detach(), t, condition.detach()),
        )
    plain = gradients(time, condition)
    true = gradients(*(a.detach().double().requires_grad_() for a in (time, condition)))
    for f, p, e in zip(found, plain, true, strict=True):
        assert_within_rule(f, p, e)
    assert not found[1][2:4].any()


@needs_triton
def test_products_of_pieces_are_float32s():
    """The first and the last layer: no worse than float32, though their factors are bfloat16."""
    from heptapod_fast.kernels import diffusion_mlp as kernels

    x = torch.randn(64, device=DEVICE) * 10.0 ** torch.arange(-8, 8, 0.25, device=DEVICE)
    assert torch.equal(sum(piece.double() for piece in kernels.split(x)), x.double())
    a, b = torch.randn(30, 5, device=DEVICE), torch.randn(5, 17, device=DEVICE)
    exact = a.double() @ b.double()
    found = kernels.mm_rounded(a, b, torch.bfloat16)
    assert found.dtype == torch.bfloat16
    assert float((found.double() - exact.bfloat16().double()).abs().max()) <= 2**-8 * 8
    differing = (found != exact.bfloat16()).float().mean()
    assert float(differing) < 0.01  # another rounding only where the exact value is near a tie
    v, weight, bias = normal(30, 24), torch.randn(6, 24, device=DEVICE), normal(6).detach()
    v = v.detach().bfloat16()
    exact = v.double() @ weight.double().t() + bias
    torch.testing.assert_close(
        kernels._output(v, weight, bias).double(), exact, rtol=1e-6, atol=1e-5
    )
    grad, xt = torch.randn(30, 6, device=DEVICE), torch.randn(30, 3, device=DEVICE)
    for found, exact in zip(
        (*kernels._output_backward(grad, v), *kernels._input_backward(v, xt)),
        (
            grad.double().t() @ v.double(),
            grad.double().sum(0),
            v.double().t() @ xt.double(),
            v.double().sum(0),
        ),
        strict=True,
    ):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-5)


@needs_triton
def test_a_product_can_be_written_into_a_slice():
    """What the backward pass relies on: torch.mm writes rows with a stride, and nothing else."""
    a, b = (torch.randn(9, 8, device=DEVICE).bfloat16() for _ in range(2))
    slots = torch.full((9, 48), 7.0, device=DEVICE, dtype=torch.bfloat16)
    out = slots[:, 16:25]
    written = torch.mm(a, b.t(), out=out)
    assert written.data_ptr() == out.data_ptr() and torch.equal(out, torch.mm(a, b.t()))
    assert bool((slots[:, :16] == 7).all()) and bool((slots[:, 25:] == 7).all())


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operator(dtype):
    arguments, upstream = draw(width=8, dtype=dtype, blocks=1)
    xt, t, time, condition, *flat = arguments
    check_operator(_operator, xt, t, time, condition, flat, EPS, True)
    xt, t, time, condition, *flat = (a.detach() for a in arguments)
    check_operator(_operator, xt, t, time, condition, flat, EPS, False)
    saved = _operator(xt, t, time, condition, flat, EPS, True)[1:]
    check_operator(_backward_operator, upstream, xt, t, time, condition, flat, saved)
    check_compiles(run("triton"), arguments, [upstream])


@needs_triton
def test_outputs_share_no_memory():
    arguments, upstream = draw(width=8)
    xt, t, time, condition, *flat = (a.detach() for a in arguments)
    saved = _operator(xt, t, time, condition, flat, EPS, True)
    found = _backward_operator(upstream, xt, t, time, condition, flat, saved[1:])
    every = [a.untyped_storage().data_ptr() for a in (*arguments, *saved, *found)]
    assert len(set(every)) == len(every)


@needs_triton
def test_no_rows():
    arguments, _ = draw(rows=0)
    run("triton")(*arguments).sum().backward()
    assert all(not a.grad.any() for a in arguments[2:])


def test_refusals():
    arguments, _ = draw()
    xt, t, time, condition, *flat = arguments
    call = run("auto")
    with pytest.raises(ValueError, match=r"time \(T, F\)"):
        call(xt, t, time[:, :8], condition, *flat)
    with pytest.raises(ValueError, match="one dtype"):
        call(xt, t, time.bfloat16(), condition, *flat)
    with pytest.raises(ValueError, match=r"got \(12,\), 12 and 5"):
        call(xt, t, time, normal(5, 16), *flat)
    with pytest.raises(ValueError, match=r"got \(8,\), 12 and 3"):
        call(xt, t[:8], time, condition, *flat)
    with pytest.raises(ValueError, match=r"an input weight \(F, C\).* F = 16, got \(12, 2\)"):
        call(xt[:, :2], t, time, condition, *flat)
    with pytest.raises(ValueError, match="dtype of its weights"):
        call(xt.bfloat16(), t, time, condition, *flat)
