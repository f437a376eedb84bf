"""The order of training: every epoch a permutation, whatever the batches."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heptapod_fast.data import sample_ids


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 300), epoch=st.integers(0, 10_000), seed=st.integers(-3, 2**40))
def test_every_epoch_is_a_permutation(n, epoch, seed):
    ids = sample_ids(torch.arange(epoch * n, (epoch + 1) * n), n, seed)
    assert ids.dtype == torch.int64
    assert torch.equal(ids.sort().values, torch.arange(n))


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 50), start=st.integers(0, 500), length=st.integers(0, 200),
       seed=st.integers(0, 5))
def test_batches_may_cross_epochs(n, start, length, seed):
    index = torch.arange(start, start + length)
    together = sample_ids(index, n, seed)
    alone = [int(sample_ids(g[None], n, seed)) for g in index]
    assert together.tolist() == alone
    shuffled = torch.randperm(length, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(sample_ids(index[shuffled], n, seed), together[shuffled])


def test_epochs_and_seeds_differ():
    n = 200
    orders = [tuple(sample_ids(torch.arange(e * n, (e + 1) * n), n, seed).tolist())
              for e in range(4) for seed in range(4)]
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
