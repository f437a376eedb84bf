"""The diffusion loss against an implementation of its own, from the definitions, in float64."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from heptapod_fast.ops import STEPS, add_noise, cosine_betas, diffusion_loss, schedule_tables
from heptapod_fast.ops.diffusion_loss import TABLES, discretised_log_likelihood

TABLE = schedule_tables(cosine_betas())


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
    loss = diffusion_loss(prediction, x0, xt, noise, t, TABLE)
    assert loss.dtype == torch.float32
    for r, step in enumerate(times):
        eps, v = prediction[r].double().chunk(2)
        expected = (noise[r].double() - eps).square().mean() + exact_bound(
            eps, v, x0[r].double(), xt[r].double(), step)
        # The bound at t = 999 subtracts numbers 20,000 times its root.
        torch.testing.assert_close(loss[r].double(), expected, rtol=2e-3, atol=2e-4)


def test_first_step_is_a_likelihood_of_256_levels():
    """Over all levels the probabilities sum to 1, and they follow the exact normal distribution."""
    levels = torch.arange(256).float() / 127.5 - 1
    for mean, deviation in ((0.1, 0.05), (0.9, 0.3), (-1.2, 0.4)):
        log_p = discretised_log_likelihood(levels, torch.tensor(mean),
                                           torch.tensor(deviation).log())
        assert float(log_p.double().exp().sum()) == pytest.approx(1, abs=1e-3)
        truth = Normal(mean, deviation)
        inner = slice(1, 255)
        exact = truth.cdf(levels[inner] + 1 / 255) - truth.cdf(levels[inner] - 1 / 255)
        torch.testing.assert_close(log_p[inner].exp(), exact, atol=3e-4, rtol=0.0)


def test_bound_trains_the_variance_alone():
    x0, noise, xt, t, prediction = rows([0, 5, 999])
    prediction.requires_grad_()
    diffusion_loss(prediction, x0, xt, noise, t, TABLE).sum().backward()
    eps_grad, v_grad = prediction.grad.chunk(2, dim=1)
    eps = prediction.detach()[:, :5]
    torch.testing.assert_close(eps_grad, 2 * (eps - noise) / 5)
    assert (v_grad != 0).all()


def test_variance_gradient_is_that_of_the_definition():
    times = [0, 1, 300, 700]
    x0, noise, xt, t, prediction = rows(times)
    prediction.requires_grad_()
    diffusion_loss(prediction, x0, xt, noise, t, TABLE).sum().backward()
    for r, step in enumerate(times):
        eps, v = prediction[r].detach().double().chunk(2)
        v.requires_grad_()
        exact_bound(eps, v, x0[r].double(), xt[r].double(), step).backward()
        torch.testing.assert_close(prediction.grad[r, 5:].double(), v.grad, rtol=1e-3, atol=1e-5)


def test_without_the_bound_it_is_the_plain_mse():
    x0, noise, xt, t, prediction = rows([0, 5, 999])
    prediction.requires_grad_()
    loss = diffusion_loss(prediction, x0, xt, noise, t, TABLE, bound=False)
    torch.testing.assert_close(loss, (noise - prediction[:, :5]).square().mean(1))
    loss.sum().backward()
    assert (prediction.grad[:, 5:] == 0).all()


def test_bf16_predictions_are_scored_in_float32():
    x0, noise, xt, t, prediction = rows([0, 5, 999])
    prediction = prediction.bfloat16()
    loss = diffusion_loss(prediction, x0, xt, noise, t, TABLE)
    assert torch.equal(loss, diffusion_loss(prediction.float(), x0, xt, noise, t, TABLE))


def of_zeros(times, samples, v=0.0):
    """MSE and VB, averaged over samples, of eps_hat = 0 and the given v; standard normal data."""
    x0, noise, xt, t, prediction = rows(sorted(times * samples), channels=16, error=0.0)
    zeros = torch.zeros_like(prediction)
    zeros[:, 16:] = v
    mse = diffusion_loss(zeros, x0, xt, noise, t, TABLE, bound=False).view(len(times), samples)
    both = diffusion_loss(zeros, x0, xt, noise, t, TABLE).view(len(times), samples)
    return mse.double().mean(1), (both - mse).double().mean(1)


def test_loss_at_the_start_is_upstreams():
    mse, bound = of_zeros(list(range(999)), 50)
    _, last_bound = of_zeros([999], 4000)
    assert float(mse.mean()) == pytest.approx(1.00, abs=0.01)
    assert float(last_bound) / 1000 == pytest.approx(0.72, abs=0.01)
    assert float(bound.sum() + last_bound) / 1000 == pytest.approx(0.73, abs=0.02)


@pytest.mark.parametrize("t, constant", [(1, 0.81), (10, 0.10), (100, 0.014), (500, 0.0045),
                                         (900, 0.015), (990, 0.17), (998, 2.16), (999, 720.6)])
def test_bound_in_units_of_the_mse_is_upstreams(t, constant):
    """With the variance at the posterior's (v = -1), where nothing but the mean is wrong."""
    mse, bound = of_zeros([t], 4000, v=-1.0)
    assert float(bound / mse) == pytest.approx(constant, rel=0.03)
