"""Bits per token: of a system that says what it was asked, in numbers worked out by hand."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from heptapod_fast.data import Logograms
from heptapod_fast.evaluation import MetricContext, make_metrics
from heptapod_fast.evaluation.likelihood import exchanged
from heptapod_fast.tokenizers import PatchVQ, to_unit

SIDE = 24
LOGOGRAMS = Logograms(SIDE, 300)
TOKENIZER = PatchVQ.fit(LOGOGRAMS, SIDE, 4, codes=16)


class Raster:
    """Finds the codes of each image's first row alone likely: 2 bits each, any other 5."""

    num_classes = 5

    def __init__(self):
        self.asked = []

    def check_likelihood(self):
        """It has one."""

    def log_likelihood(self, tokens, classes, rng, index=None):
        self.asked.append((tokens, classes, index))
        return -math.log(2) * (6 * 2 + 30 * 5 + index.double() % 2)


def context(system, **more):
    return MetricContext(
        LOGOGRAMS, tokenizer=TOKENIZER, system=system, image_size=SIDE, count=100, **more
    )


def test_bits_of_fresh_logograms_and_of_exchanged_tokens():
    system = Raster()
    (metric,) = make_metrics(["likelihood"], context(system))
    found = metric.compute()
    assert found["bits_per_token"] == pytest.approx((12 + 150 + 0.5) / 36)
    assert found["bits_per_token_error"] == pytest.approx(0.5 / 36 / 10, rel=0.02)
    assert found["likelihood_of"] == "fresh logograms" and found["likelihood_images"] == 100
    plain, shuffled = (torch.cat([asked[0] for asked in system.asked[i::2]]) for i in (0, 1))
    fresh = Logograms(SIDE, 100, LOGOGRAMS.seed + 1, 5)
    assert torch.equal(plain, TOKENIZER.encode(to_unit(fresh.images(torch.arange(100)))))
    assert torch.equal(torch.cat([asked[1] for asked in system.asked[::2]]), fresh.labels)
    assert torch.equal(torch.cat([asked[2] for asked in system.asked[::2]]), torch.arange(100))
    assert not torch.equal(shuffled, plain)
    assert torch.equal(shuffled.sort(1).values, plain.sort(1).values)


def test_every_image_is_exchanged_in_an_order_of_its_own():
    tokens = torch.arange(36).expand(100, -1)
    whole = exchanged(tokens, torch.arange(100))
    assert len(whole.unique(dim=0)) == 100
    assert torch.equal(exchanged(tokens[64:], torch.arange(64, 100)), whole[64:])


def test_another_system_is_scored_once_it_is_named():
    first, second = Raster(), Raster()
    (metric,) = make_metrics(["likelihood"], context(first))
    metric.restart(second)
    metric.compute()
    assert second.asked and not first.asked


def test_what_cannot_be_scored_is_refused(tmp_path):
    images = np.zeros((2, SIDE, SIDE, 3), np.uint8)
    np.savez(tmp_path / "bare.npz", arr_0=images)
    np.savez(tmp_path / "other.npz", arr_0=images, labels=np.array([0, 5]))
    np.savez(tmp_path / "below.npz", arr_0=images, labels=np.array([-1, 0]))
    for name, text in (
        ("bare", "does not say its images' classes"),
        ("other", "has classes 0 to 5, the run 0 to 4"),
        ("below", "has classes -1 to 0"),
    ):
        reference = str(tmp_path / f"{name}.npz")
        with pytest.raises(ValueError, match=text):
            make_metrics(["likelihood"], context(Raster(), reference=reference))
    vectors = SimpleNamespace(spec=SimpleNamespace(kind="continuous"))
    with pytest.raises(ValueError, match="needs discrete tokens"):
        make_metrics(["likelihood"], MetricContext(tokenizer=vectors, system=Raster()))
