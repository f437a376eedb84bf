"""The diffusion loss against an implementation of its own, from the definitions, in float64; then
the kernels against the reference."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from heptapod_fast.ops import STEPS, add_noise, cosine_betas, schedule_tables
from heptapod_fast.ops.diffusion_loss import (
    WIDEST,
    _backward_operator,
    _inputs_operator,
    _operator,
    diffusion_inputs,
    diffusion_loss,
    discretised_log_likelihood,
    row_losses,
)
from heptapod_fast.ops.diffusion_schedule import TABLES
from heptapod_fast.ops.dispatch import Unavailable
from heptapod_fast.ops.philox import Draws
from heptapod_fast.rng import Rng
from tests.numerics import DEVICE, check_compiles, check_operator, compare, needs_triton

TABLE = schedule_tables(cosine_betas())
TABLE64 = schedule_tables(cosine_betas(), torch.float64).to(DEVICE)


def schedule():
    """beta and abar of the 1000 steps, in Python floats, with abar[-1] = 1 at the end."""
    level = lambda u: math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    betas = [min(1 - level((t + 1) / 1000) / level(t / 1000), 0.999) for t in range(1000)]
    abar, product = [], 1.0
    for beta in betas:
        product *= 1 - beta
        abar.append(product)
    return betas, [*abar, 1.0]


BETA, ABAR = schedule()


def posterior(x0, xt, t):
    """Mean and variance of q(x_{t-1} | x_t, x_0) by Bayes' rule: prior
    N(sqrt(abar_{t-1}) x0, 1 - abar_{t-1}), likelihood N(x_t; sqrt(alpha_t) x_{t-1}, beta_t)."""
    alpha, before = 1 - BETA[t], ABAR[t - 1]
    precision = alpha / BETA[t] + 1 / (1 - before)
    mean = (math.sqrt(alpha) / BETA[t] * xt + math.sqrt(before) / (1 - before) * x0) / precision
    return mean, 1 / precision


def exact_bound(eps, v, x0, xt, t):
    """Bits per channel of one row, float64."""
    x0_hat = (xt - math.sqrt(1 - ABAR[t]) * eps) / math.sqrt(ABAR[t])
    share = (v + 1) / 2
    smallest = posterior(x0, xt, max(t, 1))[1]
    deviation = (share * math.log(BETA[t]) + (1 - share) * math.log(smallest)).exp().sqrt()
    if t > 0:
        mean, variance = posterior(x0, xt, t)
        truth, guess = Normal(mean, math.sqrt(variance)), posterior(x0_hat, xt, t)[0]
        return kl_divergence(truth, Normal(guess, deviation)).mean() / math.log(2)
    cdf = lambda x: 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    upper, lower = (cdf((x0 - x0_hat + edge) / deviation) for edge in (1 / 255, -1 / 255))
    upper = upper.where(x0 <= 0.999, torch.ones(()))
    lower = lower.where(x0 >= -0.999, torch.zeros(()))
    return -(upper - lower).clamp(min=1e-12).log().mean() / math.log(2)


def rows(times, channels=5, seed=0, error=0.3):
    """x0, noise, xt, t and a prediction that is off by `error` (float32)."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randn(len(times), channels, generator=generator)
    x0, noise, t = draw(), draw(), torch.tensor(times)
    xt = add_noise(x0, noise, t, TABLE)
    return x0, noise, xt, t, torch.cat((noise + error * draw(), draw()), dim=1)


def test_schedule_constants_of_upstream():
    betas = cosine_betas()
    abar = (1 - betas).cumprod(0)
    assert len(betas) == STEPS == 1000 and betas.dtype == torch.float64
    assert float(betas[0]) == pytest.approx(4.128e-5, rel=1e-3)
    assert float(abar[999]) == pytest.approx(2.4288e-9, rel=1e-4)
    assert float(abar[998]) == pytest.approx(2.4288e-6, rel=1e-4)
    assert (betas == 0.999).nonzero().flatten().tolist() == [999]


def test_tables_are_their_definitions():
    for t in (0, 1, 2, 10, 500, 998, 999):
        row = dict(zip(TABLES, TABLE[:, t].tolist()))
        assert row["sqrt_abar"] == pytest.approx(math.sqrt(ABAR[t]), rel=1e-6)
        assert row["sqrt_one_minus_abar"] == pytest.approx(math.sqrt(1 - ABAR[t]), rel=1e-6)
        assert row["sqrt_recip_abar"] == pytest.approx(1 / math.sqrt(ABAR[t]), rel=1e-6)
        assert row["sqrt_recip_minus_one"] == pytest.approx(math.sqrt(1 / ABAR[t] - 1), rel=1e-6)
        assert row["log_beta"] == pytest.approx(math.log(BETA[t]), rel=1e-6)
        if t:
            assert row["log_posterior"] == pytest.approx(math.log(posterior(0, 0, t)[1]), rel=1e-6)
            assert row["mean_x0"] == pytest.approx(posterior(1, 0, t)[0], rel=1e-6)
            assert row["mean_xt"] == pytest.approx(posterior(0, 1, t)[0], rel=1e-6)
    assert TABLE[7, 0] == TABLE[7, 1] and TABLE[4, 0] == 1 and TABLE[5, 0] == 0


def test_noising():
    x0, noise, xt, t, _ = rows([0, 300, 999])
    for r, step in enumerate(t.tolist()):
        expected = math.sqrt(ABAR[step]) * x0[r] + math.sqrt(1 - ABAR[step]) * noise[r]
        torch.testing.assert_close(xt[r], expected)


@pytest.mark.parametrize("error", [0.3, 0.0])
def test_loss_equals_the_definition(error):
    times = [0, 0, 0, 1, 2, 10, 100, 500, 900, 990, 998, 999]
    x0, noise, xt, t, prediction = rows(times, error=error)
    loss = row_losses(prediction, x0, xt, noise, t, TABLE)
    assert loss.dtype == torch.float32
    for r, step in enumerate(times):
        eps, v = prediction[r].double().chunk(2)
        expected = (noise[r].double() - eps).square().mean() + exact_bound(
            eps, v, x0[r].double(), xt[r].double(), step
        )
        # The bound at t = 999 subtracts numbers 20,000 times its root.
        torch.testing.assert_close(loss[r].double(), expected, rtol=2e-3, atol=2e-4)


def test_first_step_is_a_likelihood_of_256_levels():
    """Over all levels the probabilities sum to 1, and they follow the exact normal distribution."""
    levels = torch.arange(256).float() / 127.5 - 1
    for mean, deviation in ((0.1, 0.05), (0.9, 0.3), (-1.2, 0.4)):
        log_p = discretised_log_likelihood(
            levels, torch.tensor(mean), torch.tensor(deviation).log()
        )
        assert float(log_p.double().exp().sum()) == pytest.approx(1, abs=1e-3)
        truth = Normal(mean, deviation)
        inner = slice(1, 255)
        exact = truth.cdf(levels[inner] + 1 / 255) - truth.cdf(levels[inner] - 1 / 255)
        torch.testing.assert_close(log_p[inner].exp(), exact, atol=3e-4, rtol=0.0)


def test_bound_trains_the_variance_alone():
    x0, noise, xt, t, prediction = rows([0, 5, 999])
    prediction.requires_grad_()
    row_losses(prediction, x0, xt, noise, t, TABLE).sum().backward()
    eps_grad, v_grad = prediction.grad.chunk(2, dim=1)
    eps = prediction.detach()[:, :5]
    torch.testing.assert_close(eps_grad, 2 * (eps - noise) / 5)
    assert (v_grad != 0).all()


def test_variance_gradient_is_that_of_the_definition():
    times = [0, 1, 300, 700]
    x0, noise, xt, t, prediction = rows(times)
    prediction.requires_grad_()
    row_losses(prediction, x0, xt, noise, t, TABLE).sum().backward()
    for r, step in enumerate(times):
        eps, v = prediction[r].detach().double().chunk(2)
        v.requires_grad_()
        exact_bound(eps, v, x0[r].double(), xt[r].double(), step).backward()
        torch.testing.assert_close(prediction.grad[r, 5:].double(), v.grad, rtol=1e-3, atol=1e-5)


def test_without_the_bound_it_is_the_plain_mse():
    x0, noise, xt, t, prediction = rows([0, 5, 999])
    prediction.requires_grad_()
    loss = row_losses(prediction, x0, xt, noise, t, TABLE, bound=False)
    torch.testing.assert_close(loss, (noise - prediction[:, :5]).square().mean(1))
    loss.sum().backward()
    assert (prediction.grad[:, 5:] == 0).all()


def test_bf16_predictions_are_scored_in_float32():
    x0, noise, xt, t, prediction = rows([0, 5, 999])
    prediction = prediction.bfloat16()
    loss = row_losses(prediction, x0, xt, noise, t, TABLE)
    assert torch.equal(loss, row_losses(prediction.float(), x0, xt, noise, t, TABLE))


def of_zeros(times, samples, v=0.0):
    """MSE and VB, averaged over samples, of eps_hat = 0 and the given v; standard normal data."""
    x0, noise, xt, t, prediction = rows(sorted(times * samples), channels=16, error=0.0)
    zeros = torch.zeros_like(prediction)
    zeros[:, 16:] = v
    mse = row_losses(zeros, x0, xt, noise, t, TABLE, bound=False).view(len(times), samples)
    both = row_losses(zeros, x0, xt, noise, t, TABLE).view(len(times), samples)
    return mse.double().mean(1), (both - mse).double().mean(1)


def test_loss_at_the_start_is_upstreams():
    mse, bound = of_zeros(list(range(999)), 50)
    _, last_bound = of_zeros([999], 4000)
    assert float(mse.mean()) == pytest.approx(1.00, abs=0.01)
    assert float(last_bound) / 1000 == pytest.approx(0.72, abs=0.01)
    assert float(bound.sum() + last_bound) / 1000 == pytest.approx(0.73, abs=0.02)


@pytest.mark.parametrize(
    "t, constant",
    [
        (1, 0.81),
        (10, 0.10),
        (100, 0.014),
        (500, 0.0045),
        (900, 0.015),
        (990, 0.17),
        (998, 2.16),
        (999, 720.6),
    ],
)
def test_bound_in_units_of_the_mse_is_upstreams(t, constant):
    """With the variance at the posterior's (v = -1), where nothing but the mean is wrong."""
    mse, bound = of_zeros([t], 4000, v=-1.0)
    assert float(bound / mse) == pytest.approx(constant, rel=0.03)


# From here on tensors are on DEVICE, and the kernels are there.


def draws_of(tokens, repeat, first=2**40):
    """Tokens whose indices and slots are not their places; one key above 2**31, one below."""
    index = first + 3 * torch.arange(tokens, device=DEVICE)
    slot = 7 * torch.arange(tokens, device=DEVICE).flip(0)
    return Draws(index, slot, repeat, (0xDEADBEEF, 17), (123456, 0xFFFFFFFF))


def part(draws, chosen):
    return draws._replace(index_M=draws.index_M[chosen], slot_M=draws.slot_M[chosen])


def problem(tokens, channels, repeat, dtype=torch.float32, times=(0, 999)):
    """prediction, x0, xt, t, draws, upstream gradient; the first rows have the given times."""
    table, draws = TABLE.to(DEVICE), draws_of(tokens, repeat)
    x0 = torch.randn(tokens, channels, device=DEVICE)
    _, t = diffusion_inputs(x0, draws, table, "reference")
    t[: len(times)] = torch.tensor(times, device=DEVICE)[: len(t)]
    noise = draws.noise(channels)
    xt = add_noise(x0.repeat_interleave(repeat, dim=0), noise, t, table)
    guess = torch.cat((noise + 0.3 * torch.randn_like(noise), torch.randn_like(noise)), dim=1)
    upstream = torch.randn(tokens, device=DEVICE)
    return guess.to(dtype).requires_grad_(), x0, xt, t, draws, upstream


def exact_losses(prediction, x0, t, draws, bound=True):
    """The reference where tables, noise and x_t are float64 too."""
    x0 = x0.double().repeat_interleave(draws.repeat, dim=0)
    noise = draws.noise(x0.shape[1], torch.float64)
    xt = add_noise(x0, noise, t, TABLE64)
    loss = row_losses(prediction.double(), x0, xt, noise, t, TABLE64, bound)
    return loss.view(-1, draws.repeat).mean(1)


def test_inputs_are_the_draws_of_rng():
    rng, index, slot = Rng(3), torch.tensor([5, 2**40, 0]), torch.tensor([0, 9, 2])
    draws = Draws(index, slot, 4, rng.key("diffusion.time"), rng.key("diffusion.noise"))
    x0 = torch.randn(3, 5)
    xt, t = diffusion_inputs(x0, draws, TABLE)
    slots = slot[:, None] * 4 + torch.arange(4)
    times = rng.integers("diffusion.time", index[:, None], 1, STEPS, slots)[..., 0]
    noise = rng.normal("diffusion.noise", index[:, None], 5, slots)
    assert torch.equal(t, times.flatten()) and len(t.unique()) > 9
    assert torch.equal(xt, add_noise(x0.repeat_interleave(4, dim=0), noise.flatten(0, 1), t, TABLE))


def test_loss_is_the_mean_over_repeats_of_fresh_rows():
    x0, draws, table = torch.randn(3, 5, device=DEVICE), draws_of(3, 4), TABLE.to(DEVICE)
    xt, t = diffusion_inputs(x0, draws, table)
    prediction = torch.randn(12, 10, device=DEVICE)
    loss = diffusion_loss(prediction, x0, xt, t, draws, table, implementation="reference")
    each = row_losses(prediction, x0.repeat_interleave(4, dim=0), xt, draws.noise(5), t, table)
    torch.testing.assert_close(loss, each.view(3, 4).mean(1))


@needs_triton
@pytest.mark.parametrize(
    "tokens, channels, repeat", [(1, 3, 1), (5, 16, 4), (33, 20, 1), (3, 7, 5)]
)
def test_inputs_kernel(tokens, channels, repeat):
    x0, draws = torch.randn(tokens, channels, device=DEVICE), draws_of(tokens, repeat)
    table = TABLE.to(DEVICE)
    times = {}

    def run(implementation):
        def function(x0):
            xt, times[implementation] = diffusion_inputs(x0, draws, table, implementation)
            return xt

        return function

    compare(run("triton"), run("reference"), (x0,))
    assert torch.equal(times["triton"], times["reference"])


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "tokens, channels, repeat, bound",
    [
        (1, 16, 1, True),
        (5, 3, 4, True),
        (33, 16, 4, True),
        (33, 20, 1, True),
        (2, 5, 40, True),
        (5, 16, 3, False),
        (33, 3, 4, False),
        (2, 130, 4, True),
    ],
)
def test_kernel_by_the_rule(tokens, channels, repeat, bound, dtype):
    prediction, x0, xt, t, draws, upstream = problem(tokens, channels, repeat, dtype)
    table = TABLE.to(DEVICE)

    def run(implementation):
        return lambda p: diffusion_loss(p, x0, xt, t, draws, table, bound, implementation)

    compare(
        run("triton"),
        run("reference"),
        (prediction,),
        [upstream],
        exact=lambda p: exact_losses(p, x0, t, draws, bound).to(p.dtype),
    )


@needs_triton
@pytest.mark.parametrize("times", [[0] * 4, [1] * 4, [10, 100, 500, 900], [990, 998, 999, 999]])
def test_every_time_by_itself(times):
    """The rule looks at the largest error of all rows; here rows of like size are among themselves,
    and every element of the gradient counts."""
    prediction, x0, xt, t, draws, _ = problem(4, 16, 1, times=times)
    one = torch.ones(4, device=DEVICE)
    loss = diffusion_loss(prediction, x0, xt, t, draws, TABLE.to(DEVICE), True, "triton")
    exact = prediction.detach().double().requires_grad_()
    expected = exact_losses(exact, x0, t, draws)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(
        torch.autograd.grad(loss, prediction, one)[0].double(),
        torch.autograd.grad(expected, exact, one.double())[0],
        rtol=2e-4,
        atol=1e-6,
    )


@needs_triton
def test_likelihood_of_the_first_step_at_its_edges():
    """x0 below, inside and above [-0.999, 0.999], predictions from right to hopeless."""
    x0 = torch.tensor([-3.0, -1.0, -0.9995, -0.9985, -0.2, 0.0, 0.9985, 0.9995, 1.0, 3.0])
    error = torch.tensor([-40.0, -6.0, -2.0, -0.5, 0.0, 0.5, 2.0, 6.0, 40.0])
    x0 = x0.to(DEVICE).repeat(len(error), 1)
    _, _, _, _, draws, _ = problem(len(error), x0.shape[1], 1)
    noise, t = draws.noise(x0.shape[1]), torch.zeros(len(error), dtype=torch.int64, device=DEVICE)
    xt = add_noise(x0, noise, t, TABLE.to(DEVICE))
    for v in (-1.0, 0.4, 3.0):
        guess = torch.cat((noise + error.to(DEVICE)[:, None], torch.full_like(noise, v)), dim=1)
        guess.requires_grad_()
        loss = diffusion_loss(guess, x0, xt, t, draws, TABLE.to(DEVICE), True, "triton")
        exact = guess.detach().double().requires_grad_()
        expected = exact_losses(exact, x0, t, draws)
        torch.testing.assert_close(loss.double(), expected, rtol=2e-5, atol=1e-5)
        loss.sum().backward()
        expected.sum().backward()
        torch.testing.assert_close(guess.grad.double(), exact.grad, rtol=2e-3, atol=2e-5)
        hopeless = guess.grad[0, 13:17]
        assert float(loss.detach()[0]) > 20 and bool((hopeless == 0).all()), "floor of 1e-12"


@needs_triton
@pytest.mark.parametrize("v", [-400.0, -60.0, 60.0, 400.0])
def test_extreme_variances_at_the_first_step_give_numbers(v):
    """What the other branch makes of them must not come through, nor 0 times infinity."""
    prediction, x0, xt, t, draws, _ = problem(4, 5, 1, times=[0, 0, 0, 0])
    prediction = torch.cat((prediction.detach()[:, :5], torch.full_like(x0, v)), 1).requires_grad_()
    loss = diffusion_loss(prediction, x0, xt, t, draws, TABLE.to(DEVICE), True, "triton")
    loss.sum().backward()
    assert bool(loss.isfinite().all()) and bool(prediction.grad.isfinite().all())


@needs_triton
@pytest.mark.parametrize("repeat", [1, 4])
def test_draws_do_not_depend_on_the_batch(repeat):
    prediction, x0, xt, t, draws, upstream = problem(9, 16, repeat, times=())
    table, chosen = TABLE.to(DEVICE), torch.tensor([7, 2], device=DEVICE)
    rows = (chosen[:, None] * repeat + torch.arange(repeat, device=DEVICE)).flatten()
    few, guess = part(draws, chosen), prediction.detach()[rows].requires_grad_()
    xt_all, t_all = diffusion_inputs(x0, draws, table, "triton")
    xt_few, t_few = diffusion_inputs(x0[chosen], few, table, "triton")
    assert torch.equal(xt_few, xt_all[rows]) and torch.equal(t_few, t_all[rows])
    loss = diffusion_loss(prediction, x0, xt, t, draws, table, True, "triton")
    alone = diffusion_loss(guess, x0[chosen], xt[rows], t[rows], few, table, True, "triton")
    assert torch.equal(alone, loss[chosen])
    (whole,) = torch.autograd.grad(loss, prediction, upstream)
    assert torch.equal(torch.autograd.grad(alone, guess, upstream[chosen])[0], whole[rows])


@needs_triton
def test_operators():
    prediction, x0, xt, t, draws, upstream = problem(5, 6, 2)
    table, key = TABLE.to(DEVICE), list(draws.noise_key)
    check_operator(_inputs_operator, x0, draws.index_M, draws.slot_M, table, 2, [1, 2, *key])
    arguments = (x0, t, table, draws.index_M, draws.slot_M, 2, key, True)
    check_operator(_operator, prediction, *arguments)
    check_operator(_backward_operator, upstream, prediction.detach(), *arguments)
    check_compiles(
        lambda p: diffusion_loss(
            p, x0, *diffusion_inputs(x0, draws, table, "triton"), draws, table, True, "triton"
        ),
        (prediction,),
        [upstream],
    )


@needs_triton
@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_no_tokens_and_no_gradient_for_x0(implementation):
    table = TABLE.to(DEVICE)
    for tokens in (0, 2):
        prediction, x0, _, _, draws, _ = problem(tokens, 6, 2)
        x0.requires_grad_()
        xt, t = diffusion_inputs(x0, draws, table, implementation)
        assert xt.shape == (2 * tokens, 6) and t.dtype == torch.int64 and not xt.requires_grad
        loss = diffusion_loss(prediction, x0, xt, t, draws, table, True, implementation)
        loss.sum().backward()
        assert loss.shape == (tokens,) and prediction.grad.shape == prediction.shape
        assert x0.grad is None


def test_refusals():
    prediction, x0, xt, t, draws, _ = problem(3, 4, 2)
    table = TABLE.to(DEVICE)
    with pytest.raises(ValueError, match=r"prediction \(6, 8\), x_t \(6, 4\)"):
        diffusion_loss(prediction[:4], x0, xt, t, draws, table)
    with pytest.raises(ValueError, match="int64 t"):
        diffusion_loss(prediction, x0, xt, t.float(), draws, table)
    with pytest.raises(ValueError, match=r"int64 index and slot of shape \(2,\)"):
        diffusion_inputs(x0[:2], draws, table)
    with pytest.raises(ValueError, match=r"x0 of shape \(M, C\)"):
        diffusion_inputs(x0[0], draws, table)
    with pytest.raises(ValueError, match="repeat = 0"):
        diffusion_inputs(x0, draws._replace(repeat=0), table)
    with pytest.raises(ValueError, match=r"tables of shape \(8, T\)"):
        diffusion_inputs(x0, draws, table.double())


@needs_triton
def test_more_channels_than_a_tile_go_to_the_reference():
    x0, draws = torch.zeros(1, WIDEST + 1, device=DEVICE), draws_of(1, 1)
    with pytest.raises(Unavailable, match=f"kernels take {WIDEST}"):
        diffusion_inputs(x0, draws, TABLE.to(DEVICE), "triton")
