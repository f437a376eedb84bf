"""Flow matching: the definition, and the kernels against the reference."""

import pytest
import torch

from heptapod_fast.ops.diffusion_loss import WIDEST
from heptapod_fast.ops.dispatch import Unavailable
from heptapod_fast.ops.flow_loss import (
    _backward_operator,
    _inputs_operator,
    _operator,
    flow_inputs,
    flow_loss,
)
from heptapod_fast.ops.philox import Draws
from heptapod_fast.rng import Rng
from tests.numerics import DEVICE, check_compiles, check_operator, compare, needs_triton

SHAPES = [(1, 3, 1), (5, 16, 4), (33, 20, 1), (33, 3, 4), (3, 7, 5), (2, 5, 40), (2, 130, 4)]


def problem(tokens, channels, repeat, dtype=torch.float32):
    """prediction, x0, draws, upstream gradient."""
    index = 2**40 + 3 * torch.arange(tokens, device=DEVICE)
    slot = 7 * torch.arange(tokens, device=DEVICE).flip(0)
    draws = Draws(index, slot, repeat, (0xDEADBEEF, 17), (123456, 0xFFFFFFFF))
    x0 = torch.randn(tokens, channels, device=DEVICE)
    prediction = torch.randn(tokens * repeat, channels, device=DEVICE).to(dtype).requires_grad_()
    return prediction, x0, draws, torch.randn(tokens, device=DEVICE)


def test_definition():
    rng, index, slot = Rng(3), torch.tensor([5, 2**40, 0]), torch.tensor([0, 9, 2])
    draws = Draws(index, slot, 4, rng.key("time"), rng.key("noise"))
    x0, prediction = torch.randn(3, 5), torch.randn(12, 5)
    xt, time = flow_inputs(x0, draws)
    loss = flow_loss(prediction, x0, draws)
    for m in range(3):
        errors = []
        for k in range(4):
            where = dict(index=index[m], slot=int(slot[m]) * 4 + k)
            t = rng.uniform("time", count=1, **where)[0]
            noise = rng.normal("noise", count=5, **where)
            assert time[4 * m + k] == t
            torch.testing.assert_close(xt[4 * m + k], (1 - t) * x0[m] + t * noise)
            errors.append((prediction[4 * m + k] - (noise - x0[m])).square().mean())
        torch.testing.assert_close(loss[m], torch.stack(errors).mean())


def test_velocity_is_the_slope_of_the_path():
    """x_t + (s - t) v is x_s: from any time the velocity leads to the data and to the noise."""
    _, x0, draws, _ = problem(9, 4, 1)
    xt, time = flow_inputs(x0, draws, "reference")
    noise = draws.noise(4)
    velocity = (noise - x0).requires_grad_()
    torch.testing.assert_close(xt - time[:, None] * velocity, x0, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(xt + (1 - time)[:, None] * velocity, noise, rtol=1e-4, atol=1e-5)
    assert float(flow_loss(velocity.detach(), x0, draws, "reference").max()) == 0
    assert 0 < float(time.min()) and float(time.max()) < 1 and float(time.std()) > 0.1


@needs_triton
@pytest.mark.parametrize("tokens, channels, repeat", SHAPES)
def test_inputs_kernel(tokens, channels, repeat):
    _, x0, draws, _ = problem(tokens, channels, repeat)
    compare(
        lambda x0: flow_inputs(x0, draws, "triton"),
        lambda x0: flow_inputs(x0, draws, "reference"),
        (x0,),
    )
    assert torch.equal(flow_inputs(x0, draws, "triton")[1], flow_inputs(x0, draws, "reference")[1])


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens, channels, repeat", SHAPES)
def test_kernel_by_the_rule(tokens, channels, repeat, dtype):
    prediction, x0, draws, upstream = problem(tokens, channels, repeat, dtype)

    def run(implementation):
        return lambda p: flow_loss(p, x0, draws, implementation)

    def exact(p):
        noise = draws.noise(channels, torch.float64)
        velocity = noise - x0.double().repeat_interleave(repeat, dim=0)
        return (p - velocity).square().mean(-1).view(-1, repeat).mean(1)

    compare(run("triton"), run("reference"), (prediction,), [upstream], exact=exact)


@needs_triton
@pytest.mark.parametrize("repeat", [1, 4])
def test_draws_do_not_depend_on_the_batch(repeat):
    prediction, x0, draws, upstream = problem(9, 16, repeat)
    chosen = torch.tensor([7, 2], device=DEVICE)
    rows = (chosen[:, None] * repeat + torch.arange(repeat, device=DEVICE)).flatten()
    few = draws._replace(index_M=draws.index_M[chosen], slot_M=draws.slot_M[chosen])
    guess = prediction.detach()[rows].requires_grad_()
    for found, whole in zip(
        flow_inputs(x0[chosen], few, "triton"), flow_inputs(x0, draws, "triton"), strict=True
    ):
        assert torch.equal(found, whole[rows])
    loss = flow_loss(prediction, x0, draws, "triton")
    alone = flow_loss(guess, x0[chosen], few, "triton")
    assert torch.equal(alone, loss[chosen])
    (whole,) = torch.autograd.grad(loss, prediction, upstream)
    assert torch.equal(torch.autograd.grad(alone, guess, upstream[chosen])[0], whole[rows])


@needs_triton
def test_operators():
    prediction, x0, draws, upstream = problem(5, 6, 2)
    key = list(draws.noise_key)
    check_operator(_inputs_operator, x0, draws.index_M, draws.slot_M, 2, [1, 2, *key])
    arguments = (x0, draws.index_M, draws.slot_M, 2, key)
    check_operator(_operator, prediction, *arguments)
    check_operator(_backward_operator, upstream, prediction.detach(), *arguments)
    check_compiles(
        lambda p: (flow_loss(p, x0, draws, "triton"), flow_inputs(x0, draws, "triton")[0]),
        (prediction,),
        [upstream, None],
    )


@needs_triton
@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_no_tokens_and_no_gradient_for_x0(implementation):
    for tokens in (0, 2):
        prediction, x0, draws, _ = problem(tokens, 6, 2)
        x0.requires_grad_()
        xt, time = flow_inputs(x0, draws, implementation)
        assert xt.shape == (2 * tokens, 6) and time.shape == (2 * tokens,)
        assert xt.dtype == time.dtype == torch.float32 and not xt.requires_grad
        loss = flow_loss(prediction, x0, draws, implementation)
        loss.sum().backward()
        assert loss.shape == (tokens,) and prediction.grad.shape == prediction.shape
        assert x0.grad is None


def test_refusals():
    prediction, x0, draws, _ = problem(3, 4, 2)
    with pytest.raises(ValueError, match=r"prediction of shape \(6, 4\)"):
        flow_loss(prediction[:3], x0, draws)
    with pytest.raises(ValueError, match=r"int64 index and slot of shape \(3,\)"):
        flow_inputs(x0, draws._replace(index_M=draws.index_M.int()))
    with pytest.raises(ValueError, match="repeat = 0"):
        flow_loss(prediction, x0, draws._replace(repeat=0))


@needs_triton
def test_more_channels_than_a_tile_go_to_the_reference():
    _, x0, draws, _ = problem(1, WIDEST + 1, 1)
    with pytest.raises(Unavailable, match=f"kernels take {WIDEST}"):
        flow_inputs(x0, draws, "triton")
