"""Draws: distributions, independence, and that they belong to a sample and not to its batch."""

import math

import pytest
import torch

from heptapod_fast.rng import Rng

INDEX = torch.arange(50_000)
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
        ],
    ),
]


def correlation(a, b):
    return float(torch.corrcoef(torch.stack((a.flatten().double(), b.flatten().double())))[0, 1])


def test_uniform_moments_and_bins():
    u = Rng(0).uniform("u", INDEX, 4)
    assert u.dtype == torch.float32
    for power in (1, 2, 3):
        assert float(u.double().pow(power).mean()) == pytest.approx(1 / (power + 1), abs=0.003)
    counts = torch.histc(u, 20, 0, 1).double()
    assert float(((counts - 10_000) ** 2 / 10_000).sum()) < 50  # 19 degrees of freedom, p = 1e-4


@pytest.mark.parametrize("word", [0, 2**32 - 1])
def test_uniform_never_reaches_its_ends(word, monkeypatch):
    monkeypatch.setattr(
        Rng,
        "bits",
        lambda self, stream, index, count, slot=0: torch.full((*index.shape, count), word),
    )
    u = Rng(0).uniform("u", torch.arange(2), 3)
    assert 0 < float(u.min()) and float(u.max()) < 1
    assert torch.isfinite(Rng(0).normal("n", torch.arange(2), 3)).all()


def test_normal_moments():
    z = Rng(0).normal("n", INDEX, 5).double()
    assert z.shape == (50_000, 5)
    for power, moment in ((1, 0), (2, 1), (3, 0), (4, 3)):
        assert float(z.pow(power).mean()) == pytest.approx(moment, abs=0.05)
    assert float((z > 1.96).double().mean()) == pytest.approx(0.025, abs=0.001)
    assert abs(correlation(z[:, 0], z[:, 1])) < 0.02
    assert abs(correlation(z[:, 0] ** 2, z[:, 1] ** 2)) < 0.02


def test_streams_slots_steps_seeds_and_indices_are_independent():
    base = Rng(0).uniform("a", INDEX, 1)
    others = [
        Rng(0).uniform("b", INDEX, 1),
        Rng(0).uniform("a", INDEX, 1, slot=1),
        Rng(0).at(1).uniform("a", INDEX, 1),
        Rng(1).uniform("a", INDEX, 1),
        Rng(0).uniform("a", INDEX + 1, 1),
        Rng(0).uniform("a", INDEX, 2)[:, 1:],
        Rng(0).uniform("a", INDEX + 2**32, 1),
    ]
    for other in others:
        assert abs(correlation(base, other)) < 0.02


def test_seed_stream_and_step_cannot_be_confused():
    keys = {
        Rng(seed, step).key(stream)
        for seed in (0, 1, 11)
        for step in (0, 1, 11)
        for stream in ("a", "b", "a.1")
    }
    assert len(keys) == 27


@pytest.mark.parametrize(
    "draw",
    [
        lambda r, i: r.bits("s", i, 5),
        lambda r, i: r.uniform("s", i, 5),
        lambda r, i: r.normal("s", i, 5),
        lambda r, i: r.integers("s", i, 5, 7),
        lambda r, i: r.permutation("s", i, 9),
    ],
)
def test_draws_do_not_depend_on_the_batch(draw):
    index = torch.tensor([9, 4, 2**40, 0, 77])
    together = draw(Rng(2), index)
    for row, i in enumerate(index):
        assert torch.equal(draw(Rng(2), i[None])[0], together[row])


def test_fewer_draws_are_a_prefix_of_more():
    for name in ("bits", "uniform"):
        draw = getattr(Rng(2), name)
        assert torch.equal(draw("s", INDEX[:9], 3), draw("s", INDEX[:9], 11)[:, :3])


def test_slot_tensor_equals_slots_one_by_one():
    slots = torch.tensor([3, 0, 8])
    both = Rng(2).normal("s", INDEX[:4, None], 5, slots)
    for column, slot in enumerate(slots.tolist()):
        assert torch.equal(both[:, column], Rng(2).normal("s", INDEX[:4], 5, slot))


@pytest.mark.parametrize("high", [2, 7, 1000])
def test_integers_are_uniform(high):
    counts = Rng(0).integers("i", INDEX, 2, high).flatten().bincount(minlength=high).double()
    expected = 100_000 / high
    statistic = float(((counts - expected) ** 2 / expected).sum())
    assert len(counts) == high
    assert statistic < high - 1 + 4 * math.sqrt(2 * high) + 8


def test_permutations_are_uniform():
    order = Rng(0).permutation("p", INDEX[:24_000], 4)
    code = (order * torch.tensor([64, 16, 4, 1])).sum(1)
    counts = code.unique(return_counts=True)[1].double()
    assert len(counts) == 24
    assert float(((counts - 1000) ** 2 / 1000).sum()) < 58  # 23 degrees of freedom, p = 1e-4


@pytest.mark.parametrize("device", DEVICES)
def test_device_and_dtype(device):
    index = INDEX[:6].to(device)
    assert Rng(0).bits("s", index, 3).dtype == torch.int64
    for draw in (Rng(0).uniform("s", index, 3), Rng(0).normal("s", index, 3)):
        assert draw.device.type == device and draw.dtype == torch.float32
    on_cpu = Rng(0).uniform("s", INDEX[:6], 3)
    assert torch.equal(Rng(0).uniform("s", index, 3).cpu(), on_cpu)
