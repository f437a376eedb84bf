"""The reader of pairs: exact on them, and honest on what is none."""

import itertools
import math

import pytest
import torch

from heptapod_fast.data import Logograms
from heptapod_fast.data.pairs import RELATIONS, Pairs
from heptapod_fast.evaluation import MetricContext, make_metrics
from heptapod_fast.evaluation.relation import chances, read_signs, relations
from heptapod_fast.tokenizers import PatchVQ, to_uint8, to_unit

IDS = torch.arange(500)


@pytest.mark.parametrize("side", [24, 32, 64])
def test_signs_are_read_without_an_error(side):
    pairs = Pairs(side, 500, seed=side)
    sign, clarity = read_signs(to_unit(pairs.images(IDS)))
    assert torch.equal(sign, pairs.signs(IDS))
    assert float(clarity.min()) > 0.85 and float(clarity.max()) <= 1.0001
    assert torch.equal(relations(sign), pairs.labels)


def test_they_are_read_behind_a_tokenizer_too():
    pairs = Pairs(32, 2000)
    tokenizer = PatchVQ.fit(pairs, 32, 4, codes=128)
    images = tokenizer.decode(tokenizer.encode(to_unit(pairs.images(IDS))))
    found = metric(pairs)
    found.update(to_uint8(images), pairs.labels[: len(images)])
    numbers = found.compute()
    assert numbers["sign_clarity"] == numbers["relation_accuracy"] == 1


def test_relations_of_all_kinds_of_four_signs():
    """Every one of the fifteen ways in which four can be alike."""
    for signs in itertools.product(range(4), repeat=4):
        alike = [a == b for a, b in itertools.combinations(signs, 2)]
        expected = -1
        for number, letters in enumerate(RELATIONS.values()):
            if alike == [a == b for a, b in itertools.combinations(letters, 2)]:
                expected = number
        assert relations(torch.tensor([signs])).tolist() == [expected]


def metric(source):
    (found,) = make_metrics(["relation"], MetricContext(source))
    return found


def test_numbers_of_right_and_wrong_samples():
    pairs = Pairs(24, 500)
    images, labels = pairs.images(IDS), pairs.labels
    exact = metric(pairs)
    for part in IDS.split(200):
        exact.update(images[part], labels[part])
    found = exact.compute()
    assert found["relation_accuracy"] == found["sign_clarity"] == 1
    assert found["sign_evenness"] > 0.99
    # Half of them under another class.
    wrong = metric(pairs)
    given = torch.where(IDS < 250, labels, (labels + 1) % 5)
    wrong.update(images, given)
    found = wrong.compute()
    assert found["relation_accuracy"] == 0.5
    for number, name in enumerate(pairs.class_names):
        expected = float((labels == given)[given == number].double().mean())
        assert found[f"relation_accuracy/{name}"] == expected


def test_chance_is_that_of_all_ways_to_draw_four_signs():
    """All 4,096 of them."""
    draws = torch.tensor(list(itertools.product(range(8), repeat=4)))
    count = relations(draws).add(1).bincount(minlength=6)[1:]
    assert chances() == [int(found) / len(draws) for found in count]


def test_chance_counts_clear_samples_alone():
    pairs = Pairs(24, 500)
    images = pairs.images(IDS[:4])
    images[2:, :, :12, :12] = 0  # one quarter of two of them shows nothing
    found = metric(pairs)
    found.update(images, torch.tensor([3, 4, 3, 4]))
    numbers = found.compute()
    every, none = 8 / 4096, 8 * 7 * 6 * 5 / 4096
    assert numbers["relation_by_chance"] == pytest.approx((every + none) / 4)
    assert numbers["sign_clarity"] == 14 / 16


def test_a_blurred_sign_is_not_clear():
    """Between the sign itself, and what could as well be another."""
    pairs = Pairs(32, 500)
    images = pairs.images(IDS[:100]).float()
    for width, is_clear in ((3, True), (9, False)):
        blurred = torch.nn.functional.avg_pool2d(images, width, 1, width // 2)
        found = metric(pairs)
        found.update(blurred.round().to(torch.uint8), pairs.labels[:100])
        share = found.compute()["sign_clarity"]
        assert share > 0.95 if is_clear else share < 0.5


def test_one_sign_everywhere_is_not_even():
    pairs = Pairs(24, 500)
    ids = IDS[(pairs.labels == 3) & (pairs.signs(IDS)[:, 0] == 2)]
    assert len(ids) > 3
    found = metric(pairs)
    found.update(pairs.images(ids), torch.full_like(ids, 3))
    numbers = found.compute()
    assert numbers["sign_evenness"] == pytest.approx(0, abs=1e-6)
    assert numbers["relation_accuracy"] == 1


def test_two_signs_half_each_have_a_bit_of_three():
    pairs = Pairs(24, 500)
    signs = pairs.signs(IDS)
    chosen = [IDS[(pairs.labels == 3) & (signs[:, 0] == sign)][:5] for sign in (1, 6)]
    found = metric(pairs)
    found.update(pairs.images(torch.cat(chosen)), torch.full((10,), 3))
    assert found.compute()["sign_evenness"] == pytest.approx(math.log(2) / math.log(8))


def test_noise_shows_no_sign():
    pairs = Pairs(24, 500)
    found = metric(pairs)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (100, 3, 24, 24), dtype=torch.uint8, generator=generator)
    found.update(noise, IDS[:100] % 5)
    numbers = found.compute()
    assert numbers["sign_clarity"] == 0 and numbers["relation_accuracy"] == 0
    found.restart(None)
    with pytest.raises(ValueError, match="no samples to measure"):
        found.compute()
    black = torch.zeros(2, 3, 24, 24, dtype=torch.uint8)
    found.update(black, torch.tensor([3, 3]))
    numbers = found.compute()
    # Four times the same nothing is not "all alike".
    assert numbers["sign_clarity"] == 0 and numbers["relation_accuracy"] == 0


def test_what_is_no_pair_is_refused():
    with pytest.raises(ValueError, match="reads pairs, found logograms"):
        metric(Logograms(24, 10))
    with pytest.raises(ValueError, match="found none"):
        metric(None)
    pairs = metric(Pairs(24, 10))
    for images, labels in (
        (torch.zeros(2, 3, 24, 24), torch.zeros(2).long()),
        (torch.zeros(2, 3, 26, 26, dtype=torch.uint8), torch.zeros(2).long()),
        (torch.zeros(2, 3, 24, 24, dtype=torch.uint8), torch.zeros(3).long()),
    ):
        with pytest.raises(ValueError, match="relation: expected uint8 images"):
            pairs.update(images, labels)
