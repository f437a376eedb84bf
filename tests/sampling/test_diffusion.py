"""Drawing vectors: respaced timesteps, and diffusion of a known distribution."""

import math

import pytest
import torch

from heptapod_fast import ops
from heptapod_fast.rng import Rng
from heptapod_fast.sampling import Denoiser, SampleOptions, respaced


def test_respacing_is_upstreams():
    times = respaced(100).tolist()
    assert times[:7] == [0, 10, 20, 30, 40, 50, 61] and times[-2:] == [989, 999]
    assert set(b - a for a, b in zip(times, times[1:])) == {10, 11}
    assert respaced(1).tolist() == [999] and respaced(2).tolist() == [0, 999]


@pytest.mark.parametrize("steps", [2, 3, 10, 50, 250, 999, 1000])
def test_respaced_times_are_distinct_and_reach_both_ends(steps):
    times = respaced(steps)
    assert len(times.unique()) == steps and times[0] == 0 and times[-1] == 999
    assert torch.equal(times, times.sort().values)


class Gaussian:
    """Stands in for the diffusion MLP where every channel is N(mean, deviation^2): eps is the exact
    conditional mean, and v makes every reverse step as wide as the true posterior."""

    channels = 2

    def __init__(self, mean, deviation, steps):
        self.mean, self.variance = mean, deviation**2
        abar = (1 - ops.cosine_betas()).cumprod(0)
        after = [float(abar[t]) for t in respaced(steps).tolist()]
        self.schedule = list(zip(after, [1.0, *after[:-1]]))

    def predict(self, x, step):
        abar, before = self.schedule[step]
        total = abar * self.variance + 1 - abar
        eps = math.sqrt(1 - abar) * (x - math.sqrt(abar) * self.mean) / total
        return torch.cat((eps, torch.full_like(eps, self.share(abar, before, total))), dim=1)

    def share(self, abar, before, total):
        """v of a reverse step whose variance is that of q(x_{t-1} | x_t)."""
        if before == 1.0:
            return 0.0
        beta = 1 - abar / before
        smallest = beta * (1 - before) / (1 - abar)
        true = smallest + (beta * math.sqrt(before) / (1 - abar)) ** 2 * (
            self.variance * (1 - abar) / total
        )
        # log(beta / smallest) and log(true / smallest) without cancellation
        widest = -math.log1p(-(abar - before) / (abar - 1))
        return 2 * math.log(true / smallest) / widest - 1


def vectors(network, steps, count=20_000, limit=0.0, **options):
    index = torch.arange(count)
    denoiser = Denoiser(
        network.predict,
        Rng(0),
        index,
        torch.zeros_like(index),
        SampleOptions(diffusion_steps=steps, **options),
        limit,
    )
    return denoiser.sample(network.channels)


@pytest.mark.parametrize("steps", [10, 100])
@pytest.mark.parametrize("mean, deviation", [(0.0, 1.0), (1.5, 0.5), (-0.7, 2.0)])
def test_ddpm_recovers_a_gaussian(mean, deviation, steps):
    """With exact reverse steps the marginals are exact, however few steps there are."""
    x = vectors(Gaussian(mean, deviation, steps), steps)
    assert x.shape == (20_000, 2) and x.dtype == torch.float32
    assert float(x.mean()) == pytest.approx(mean, abs=0.03 * deviation)
    assert float(x.std()) == pytest.approx(deviation, rel=0.02)
    assert float(((x - mean) / deviation).pow(4).mean()) == pytest.approx(3, abs=0.2)
    assert abs(float(torch.corrcoef(x.t())[0, 1])) < 0.03


@pytest.mark.parametrize("steps", [2, 3, 5, 10, 100, 1000])
def test_ddim_is_its_recursion_in_float64(steps):
    network = Gaussian(1.5, 0.5, steps)
    x = Rng(0).normal("sample.start", torch.arange(50), 2, 0).double()
    for step in reversed(range(steps)):
        abar, before = network.schedule[step]
        eps = network.predict(x, step).chunk(2, dim=1)[0]
        x0 = (x - math.sqrt(1 - abar) * eps) / math.sqrt(abar)
        x = math.sqrt(before) * x0 + math.sqrt(1 - before) * eps
    out = vectors(network, steps, count=50, diffusion_sampler="ddim")
    torch.testing.assert_close(out.double(), x, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("mean, deviation", [(0.0, 1.0), (1.5, 0.5)])
def test_ddim_recovers_a_gaussian(mean, deviation):
    x = vectors(Gaussian(mean, deviation, 250), 250, diffusion_sampler="ddim")
    assert float(x.mean()) == pytest.approx(mean, abs=0.03 * deviation)
    assert float(x.std()) == pytest.approx(deviation, rel=0.03)


@pytest.mark.parametrize("steps", [1, 2, 10, 11, 25])
def test_ddpm_is_its_recursion_in_float64(steps):
    """With the noise of every step from its own place among those that are drawn together."""
    network, index = Gaussian(1.5, 0.5, steps), torch.arange(50)
    noises = [
        Rng(0).normal(f"sample.noises.{group}", index, 20, 0).double().view(50, 10, 2)
        for group in range(3)
    ]
    x = Rng(0).normal("sample.start", index, 2, 0).double()
    for step in reversed(range(steps)):
        abar, before = network.schedule[step]
        eps, v = network.predict(x, step).chunk(2, dim=1)
        x0 = (x - math.sqrt(1 - abar) * eps) / math.sqrt(abar)
        beta = 1 - abar / before
        x = (math.sqrt(before) * beta * x0 + math.sqrt(1 - beta) * (1 - before) * x) / (1 - abar)
        if step:
            smallest = beta * (1 - before) / (1 - abar)
            share = (v + 1) / 2
            variance = (share * math.log(beta) + (1 - share) * math.log(smallest)).exp()
            x = x + 0.8 * variance.sqrt() * noises[step // 10][:, step % 10]
    out = vectors(network, steps, count=50, temperature=0.8)
    torch.testing.assert_close(out.double(), x, rtol=2e-3, atol=2e-3)


def test_temperature_of_the_diffusion_samplers():
    network = Gaussian(0.0, 1.0, 20)
    widths = [float(vectors(network, 20, 4000, temperature=t).std()) for t in (0.0, 0.9, 1.0)]
    assert widths[0] < widths[1] < widths[2]
    frozen = vectors(network, 20, 4, temperature=0.0, diffusion_sampler="ddim")
    torch.testing.assert_close(frozen, torch.zeros(4, 2))


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_vectors_belong_to_index_slot_and_step(sampler):
    options = SampleOptions(diffusion_steps=5, diffusion_sampler=sampler)
    network, index, slot = Gaussian(0.0, 1.0, 5), torch.tensor([4, 4, 7]), torch.tensor([0, 1, 0])

    def run(rng, rows):
        return Denoiser(network.predict, rng, index[rows], slot[rows], options).sample(2)

    x = run(Rng(0), [0, 1, 2])
    assert len(x.unique(dim=0)) == 3
    torch.testing.assert_close(run(Rng(0), [2, 1]), x[[2, 1]])
    assert not torch.equal(run(Rng(0).at(1), [0]), x[:1])


class EqualStarts(Rng):
    """Every row starts with the same noise."""

    def normal(self, stream, index, count, slot=0):
        if stream == "sample.start":
            return torch.ones(*index.shape, count)
        return super().normal(stream, index, count, slot)


def test_the_noise_of_every_step_belongs_to_index_and_slot():
    """Else positions that are drawn in one step would share it, and only starts tell them apart."""
    index = torch.tensor([4, 4, 7, 4])
    slot = torch.tensor([0, 1, 0, 0])
    network = Gaussian(0.0, 1.0, 5)
    options = SampleOptions(diffusion_steps=5)
    x = Denoiser(network.predict, EqualStarts(0), index, slot, options).sample(2)
    assert len(x.unique(dim=0)) == 3
    torch.testing.assert_close(x[3], x[0])


def wild(x, step):
    """A diffusion network with noise of the wrong sign."""
    return torch.cat((-x, torch.zeros_like(x)), dim=-1)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_tokens_of_a_known_range_stay_in_it_whatever_the_network_says(sampler):
    options = SampleOptions(diffusion_steps=20, diffusion_sampler=sampler)
    rows = torch.arange(50)

    def largest(limit):
        return float(Denoiser(wild, Rng(0), rows, rows, options, limit).sample(4).abs().max())

    assert largest(0.5) <= 0.5 + 1e-6
    assert largest(0.0) > 10
