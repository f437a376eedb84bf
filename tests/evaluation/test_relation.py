"""The reader of pairs: exact on them, and honest on what is none."""

import itertools
import math

import pytest
import torch

from heptapod_fast.data import Logograms
from heptapod_fast.data.pairs import RELATIONS, Pairs
from heptapod_fast.evaluation import MetricContext, make_metrics
from heptapod_fast.evaluation.relation import read_signs, relations
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
    pairs = Pairs(24, 2000)
    tokenizer = PatchVQ.fit(pairs, 24, 4, codes=128)
    images = tokenizer.decode(tokenizer.encode(to_unit(pairs.images(IDS))))
    sign, _ = read_signs(to_unit(to_uint8(images)))
    assert torch.equal(sign, pairs.signs(IDS))


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
