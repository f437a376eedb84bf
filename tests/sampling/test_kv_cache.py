"""The key-value cache by itself; with a backbone it is tested in tests/model."""

import pytest
import torch

from heptapod_fast.sampling import KVCache


def test_elements_come_back_in_order_for_every_layer():
    cache, x = KVCache(2, 5), torch.randn(3, 5, 2, 2, 4)
    for start, stop in ((0, 2), (2, 3), (3, 5)):
        for layer in range(2):
            found = cache.layer(layer).append((layer + 1) * x[:, start:stop])
            assert torch.equal(found, (layer + 1) * x[:, :stop])
        cache.advance(stop - start)


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
