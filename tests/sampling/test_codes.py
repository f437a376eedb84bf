"""Drawing codes: frequencies, and what temperature, top-k and top-p leave."""

import pytest
import torch

from heptapod_fast.rng import Rng
from heptapod_fast.sampling import SampleOptions, sample_codes
from heptapod_fast.sampling.codes import restrict

LOGITS = torch.tensor([0.3, -1.0, 2.0, 1.5, -0.2, 0.9])


def draw(options, count=40_000):
    uniform = Rng(0).uniform("u", torch.arange(count), 1)[:, 0]
    return sample_codes(LOGITS.expand(count, -1), uniform, options)


def frequencies(codes):
    return codes.bincount(minlength=len(LOGITS)).double() / len(codes)


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
