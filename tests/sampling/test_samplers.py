"""Samplers of single tokens: frequencies, restrictions, and diffusion of a known distribution."""

import math

import pytest
import torch

from heptapod_fast import ops
from heptapod_fast.rng import Rng
from heptapod_fast.sampling.samplers import (
    SampleOptions,
    respaced,
    restrict,
    sample_codes,
    sample_vectors,
)

LOGITS = torch.tensor([0.3, -1.0, 2.0, 1.5, -0.2, 0.9])


def draw(options, count=40_000):
    uniform = Rng(0).uniform("u", torch.arange(count), 1)[:, 0]
    return sample_codes(LOGITS.expand(count, -1), uniform, options)


def frequencies(codes):
    return codes.bincount(minlength=len(LOGITS)).double() / len(codes)


# -------------------------------------------------------------------------------------------- codes


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_frequencies_are_the_probabilities(temperature):
    codes, chance = draw(SampleOptions(temperature=temperature))
    expected = (LOGITS / temperature).softmax(0)
    torch.testing.assert_close(frequencies(codes).float(), expected, atol=0.01, rtol=0.0)
    torch.testing.assert_close(chance, expected[codes])


def test_code_is_the_first_whose_cumulative_probability_passes():
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log().expand(6, -1)
    uniform = torch.tensor([1e-6, 0.0999, 0.1001, 0.5999, 0.6001, 1 - 2**-24])
    assert sample_codes(logits, uniform, SampleOptions())[0].tolist() == [0, 0, 1, 2, 3, 3]
    # Reaching it exactly is not passing it.
    assert sample_codes(torch.zeros(1, 4), torch.tensor([0.5]), SampleOptions())[0].tolist() == [2]


def test_temperature_zero_takes_the_likeliest():
    codes, chance = draw(SampleOptions(temperature=0.0), 9)
    assert (codes == 2).all()
    torch.testing.assert_close(chance, LOGITS.softmax(0)[2].expand(9))


@pytest.mark.parametrize("k, kept", [(1, {2}), (3, {2, 3, 5}), (6, set(range(6)))])
def test_top_k(k, kept):
    codes, _ = draw(SampleOptions(top_k=k))
    assert set(codes.tolist()) == kept
    weights = LOGITS.softmax(0) * torch.tensor([float(v in kept) for v in range(6)])
    torch.testing.assert_close(
        frequencies(codes).float(), weights / weights.sum(), atol=0.01, rtol=0.0
    )


@pytest.mark.parametrize(
    "p, kept",
    [
        (0.01, [2]),
        (0.42, [2]),
        (0.5, [2, 3]),
        (0.7, [2, 3]),
        (0.75, [2, 3, 5]),
        (0.999, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_top_p_keeps_the_code_that_crosses(p, kept):
    assert LOGITS.softmax(0)[[2, 3, 5]].cumsum(0).tolist() == pytest.approx(
        [0.44, 0.71, 0.85], abs=0.01
    )
    left = restrict(LOGITS[None], SampleOptions(top_p=p))[0]
    assert left.isfinite().nonzero().flatten().tolist() == kept


def test_restrictions_combine_and_no_draw_leaves_them():
    options = SampleOptions(top_k=3, top_p=0.8)
    last = torch.tensor([1 - 2**-24])
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0, -1.0]])
    assert restrict(logits, options).isfinite().sum() == 2
    assert sample_codes(logits, last, options)[0].tolist() == [1]


# ---------------------------------------------------------------------------------------- diffusion


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
        times = respaced(steps).tolist()
        before = dict(zip(times, [1.0, *(float(abar[t]) for t in times)]))
        self.schedule = {t: (float(abar[t]), before[t]) for t in times}

    def condition(self, z):
        return torch.zeros(len(z), 1)

    def embed_time(self, dtype):
        return torch.arange(1000.0)[:, None]

    def run(self, x, y):
        abar, before = self.schedule[int(y[0, 0])]
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


def vectors(network, steps, count=20_000, **options):
    index = torch.arange(count)
    return sample_vectors(
        network,
        torch.zeros(count, 3),
        Rng(0),
        index,
        torch.zeros_like(index),
        SampleOptions(diffusion_steps=steps, **options),
    )


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
    for t in reversed(respaced(steps).tolist()):
        abar, before = network.schedule[t]
        eps = network.run(x, torch.tensor([[float(t)]])).chunk(2, dim=1)[0]
        x0 = (x - math.sqrt(1 - abar) * eps) / math.sqrt(abar)
        x = math.sqrt(before) * x0 + math.sqrt(1 - before) * eps
    out = vectors(network, steps, count=50, diffusion_sampler="ddim")
    torch.testing.assert_close(out.double(), x, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("mean, deviation", [(0.0, 1.0), (1.5, 0.5)])
def test_ddim_recovers_a_gaussian(mean, deviation):
    x = vectors(Gaussian(mean, deviation, 250), 250, diffusion_sampler="ddim")
    assert float(x.mean()) == pytest.approx(mean, abs=0.03 * deviation)
    assert float(x.std()) == pytest.approx(deviation, rel=0.03)


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
    run = lambda rng, rows: sample_vectors(
        network, torch.zeros(len(rows), 3), rng, index[rows], slot[rows], options
    )
    x = run(Rng(0), [0, 1, 2])
    assert len(x.unique(dim=0)) == 3
    torch.testing.assert_close(run(Rng(0), [2, 1]), x[[2, 1]])
    assert not torch.equal(run(Rng(0).at(1), [0]), x[:1])


# ------------------------------------------------------------------------------------------ options


@pytest.mark.parametrize(
    "vocabulary, settings, message",
    [
        (11, dict(positions_per_step=0), "--positions-per-step 0"),
        (11, dict(positions_per_step=17), "--positions-per-step 17"),
        (11, dict(temperature=-1.0), "--temperature"),
        (11, dict(top_p=0.0), "--top-p"),
        (11, dict(top_p=1.1), "--top-p"),
        (11, dict(top_k=12), "--top-k 12"),
        (11, dict(top_k=-1), "--top-k -1"),
        (0, dict(top_k=3), "--top-k"),
        (0, dict(top_p=0.5), "--top-p"),
        (0, dict(position_order="confidence"), "--position-order confidence"),
        (0, dict(diffusion_steps=0), "--diffusion-steps 0"),
        (0, dict(diffusion_steps=1001), "--diffusion-steps 1001"),
        (11, dict(guidance=2.0), "--guidance 2.0"),
        (11, dict(position_order="likely"), "--position-order likely"),
        (11, dict(position_schedule="linear"), "--position-schedule linear"),
        (0, dict(diffusion_sampler="heun"), "--diffusion-sampler heun"),
    ],
)
def test_bad_options_name_the_flag(vocabulary, settings, message):
    with pytest.raises(ValueError) as error:
        SampleOptions(**settings).check(16, vocabulary)
    assert message in str(error.value)


def test_good_options_pass():
    SampleOptions().check(16, 0)
    SampleOptions(
        top_k=11,
        top_p=0.5,
        temperature=0.0,
        position_order="confidence",
        positions_per_step=16,
        position_schedule="cosine",
    ).check(16, 11)


class WildNet:
    """A diffusion network with noise of the wrong sign; remembers the dtype it ran in."""

    channels = 4

    def condition(self, z):
        self.dtype = z.dtype
        return z

    def embed_time(self, dtype):
        return torch.zeros(1000, 6, dtype=dtype)

    def run(self, x, y):
        return torch.cat((-x, torch.zeros_like(x)), dim=-1)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_tokens_of_a_known_range_stay_in_it_whatever_the_network_says(sampler):
    options = SampleOptions(diffusion_steps=20, diffusion_sampler=sampler)
    rows = torch.arange(50)

    def draw(limit):
        return sample_vectors(WildNet(), torch.zeros(50, 6), Rng(0), rows, rows, options, limit)

    assert draw(0.5).abs().max() <= 0.5 + 1e-6
    assert draw(0.0).abs().max() > 10


def test_the_network_samples_in_float32_whatever_it_was_trained_in():
    net, rows = WildNet(), torch.arange(2)
    sample_vectors(
        net,
        torch.zeros(2, 6, dtype=torch.bfloat16),
        Rng(0),
        rows,
        rows,
        SampleOptions(diffusion_steps=2),
        1.0,
    )
    assert net.dtype == torch.float32
