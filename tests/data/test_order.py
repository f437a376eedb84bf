"""The order of training: every epoch a permutation, whatever the batches."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heptapod_fast.data import sample_ids
from heptapod_fast.data.order import WindowedOrder


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 300), epoch=st.integers(0, 10_000), seed=st.integers(-3, 2**40))
def test_every_epoch_is_a_permutation(n, epoch, seed):
    ids = sample_ids(torch.arange(epoch * n, (epoch + 1) * n), n, seed)
    assert ids.dtype == torch.int64
    assert torch.equal(ids.sort().values, torch.arange(n))


@settings(max_examples=50, deadline=None)
@given(
    n=st.integers(1, 50),
    start=st.integers(0, 500),
    length=st.integers(0, 200),
    seed=st.integers(0, 5),
)
def test_batches_may_cross_epochs(n, start, length, seed):
    index = torch.arange(start, start + length)
    together = sample_ids(index, n, seed)
    alone = [int(sample_ids(g[None], n, seed)) for g in index]
    assert together.tolist() == alone
    shuffled = torch.randperm(length, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(sample_ids(index[shuffled], n, seed), together[shuffled])


def test_epochs_and_seeds_differ():
    n = 200
    orders = [
        tuple(sample_ids(torch.arange(e * n, (e + 1) * n), n, seed).tolist())
        for e in range(4)
        for seed in range(4)
    ]
    assert len(set(orders)) == 16
    # No epoch of one seed may be another epoch of the next seed, nor the images' own order.
    assert tuple(range(n)) not in orders


def test_the_order_is_pinned():
    # A change of these numbers would silently change every training run.
    assert sample_ids(torch.arange(12), 6, 0).tolist() == [0, 2, 1, 5, 4, 3, 5, 3, 2, 4, 1, 0]


def test_first_place_is_uniform():
    n = 8
    first = torch.cat([sample_ids(torch.tensor([e * n]), n, 3) for e in range(4000)])
    counts = first.bincount(minlength=n)
    # 500 expected, standard deviation 21.
    assert 400 < counts.min() and counts.max() < 600


def test_refusals():
    with pytest.raises(ValueError, match="--data"):
        sample_ids(torch.arange(3), 0, 0)
    with pytest.raises(ValueError, match="found -1"):
        sample_ids(torch.tensor([-1, 2]), 4, 0)


sizes = st.lists(st.integers(0, 20), min_size=1, max_size=12).filter(lambda found: sum(found) > 0)


@settings(max_examples=100, deadline=None)
@given(sizes=sizes, window=st.integers(1, 5), epoch=st.integers(0, 1000), seed=st.integers(0, 9))
def test_windows_of_shards(sizes, window, epoch, seed):
    order, count = WindowedOrder(sizes, seed, window), sum(sizes)
    index = torch.arange(epoch * count, (epoch + 1) * count)
    ids = order.ids(index)
    assert torch.equal(ids.sort().values, torch.arange(count))
    # Whatever a sample is asked for with, and by whom.
    other = WindowedOrder(sizes, seed, window)
    mixed = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(other.ids(index[mixed]), ids[mixed])
    # Between two borders nothing but the shards of that window is used, all of it.
    shard_of = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    at, seen = epoch * count, []
    while at < (epoch + 1) * count:
        shards, end = order.shards_at(at)
        assert len(shards) <= window and order.shards_at(end - 1) == (shards, end)
        part = ids[at - epoch * count : end - epoch * count]
        assert set(shard_of[part].tolist()) == {s for s in shards if sizes[s]}
        seen, at = seen + list(shards), end
    assert len(set(seen)) == len(seen) and at == (epoch + 1) * count


def test_one_window_is_the_plain_order():
    index = torch.arange(0, 500)
    assert torch.equal(WindowedOrder([40, 40, 17], 5, 8).ids(index), sample_ids(index, 97, 5))


def test_windows_are_shuffled_anew_in_every_epoch():
    order = WindowedOrder([10] * 20, 0, 2)
    first = [order.shards_at(epoch * 200)[0] for epoch in range(50)]
    assert len(set(first)) > 40
    within = {
        tuple((order.ids(torch.arange(e * 200, e * 200 + 20)) % 10).tolist()) for e in range(50)
    }
    assert len(within) == 50


def test_windows_of_nothing():
    with pytest.raises(ValueError, match="at least 1 image"):
        WindowedOrder([0, 0], 0, 2)
    with pytest.raises(ValueError, match="0 or more, found -1"):
        WindowedOrder([3], 0, 2).ids(torch.tensor([-1]))
