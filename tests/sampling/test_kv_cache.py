"""The key-value cache by itself; with a backbone it is tested in tests/model."""

import pytest
import torch

from heptapod_fast.sampling import KVCache


def test_elements_come_back_in_order_for_every_layer():
    cache, x = KVCache(2, 5), torch.randn(3, 5, 2, 2, 4)
    for start, stop in ((0, 2), (2, 3), (3, 5)):
        assert cache.filled == start
        assert cache.slots(stop - start).tolist() == list(range(start, stop))
        for layer in range(2):
            found = cache.layer(layer).append((layer + 1) * x[:, start:stop])
            assert found.shape == x.shape  # whatever is in it: no shape depends on that
            assert torch.equal(found[:, :stop], (layer + 1) * x[:, :stop])
            assert not found[:, stop:].any()
        cache.advance(stop - start)


def test_who_sees_how_much():
    cache = KVCache(1, 9)
    cache.place(3)
    assert cache.causal(2, 3).ends_BN.tolist() == [[4, 5, 6]] * 2
    assert cache.all_seen(2, 3).ends_BN.tolist() == [[6, 6, 6]] * 2
    assert cache.all_seen(1, 2, 5).ends_BN.tolist() == [[8, 8]]


def test_what_was_dropped_is_overwritten():
    cache, x = KVCache(1, 4), torch.randn(1, 5, 2, 1, 2)
    cache.layer(0).append(x[:, :3])
    cache.advance(1)
    found = cache.layer(0).append(x[:, 3:])
    assert torch.equal(found[:, :3], x[:, [0, 3, 4]])


def test_dtype_follows_the_keys():
    layer = KVCache(1, 2).layer(0)
    assert layer.append(torch.zeros(1, 1, 2, 1, 2).bfloat16()).dtype == torch.bfloat16


def test_a_full_cache_refuses_and_so_does_one_of_another_kind():
    cache = KVCache(1, 2)
    cache.layer(0).append(torch.zeros(3, 1, 2, 1, 2))
    for other in (torch.zeros(1, 1, 2, 1, 2), torch.zeros(3, 1, 2, 1, 2).bfloat16()):
        with pytest.raises(ValueError, match="cannot take torch"):
            cache.layer(0).append(other)
    with pytest.raises(ValueError, match="cannot take 3"):
        cache.layer(0).append(torch.zeros(1, 3, 2, 1, 2))
    cache.advance(2)
    with pytest.raises(IndexError):
        cache.layer(0).append(torch.zeros(3, 1, 2, 1, 2))
