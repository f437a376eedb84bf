"""Keys and values of the elements a causal Transformer has already seen."""

from __future__ import annotations

import torch
from torch import Tensor

from heptapod_fast.ops.masks import Ends


class KVCache:
    """One (B, length, 2, H, E) buffer of keys and values per layer, allocated at first use.

    A forward pass hands `layer(i)` to its i-th block, which adds its elements; `advance` then moves
    the write position on, for all layers at once. Where that is stands in a tensor, and attention
    reads whole buffers, of which `Ends` say what counts: no shape and no number of the host depends
    on how much is in the cache, so that a pass can be recorded and replayed (sampling/replay.py).

    Attributes:
        filled: elements that are in it.
    """

    def __init__(self, depth: int, length: int, device: torch.device | str = "cpu"):
        self.length = length
        self.filled = 0
        self._filled_1 = torch.zeros(1, dtype=torch.int64, device=device)
        self._layers = [LayerCache(self) for _ in range(depth)]

    def layer(self, number: int) -> LayerCache:
        """The part of the cache that belongs to one block."""
        return self._layers[number]

    def place(self, filled: int) -> None:
        """Go on behind so many elements."""
        self.filled = filled
        self._filled_1.fill_(filled)

    def advance(self, count: int) -> None:
        """To be called once after all layers have added their elements: the first `count` of
        them stay, the others are overwritten by those that come next."""
        self.place(self.filled + count)

    def slots(self, count: int) -> Tensor:
        """(count,) int64: where elements that are added now will lie."""
        return self._filled_1 + torch.arange(count, device=self._filled_1.device)

    def causal(self, batch: int, count: int) -> Ends:
        """Who sees whom of `count` elements that are added now: those before it, and itself."""
        return Ends((self.slots(count) + 1).expand(batch, -1))

    def all_seen(self, batch: int, queries: int, count: int | None = None) -> Ends:
        """Queries that see all elements, with `count` that are added now (default: the queries)."""
        count = queries if count is None else count
        return Ends((self._filled_1 + count).expand(batch, queries))


class LayerCache:
    """The keys and values of one layer."""

    def __init__(self, cache: KVCache):
        self._cache = cache
        self._buffer: Tensor | None = None

    def append(self, kv_BM2HE: Tensor) -> Tensor:
        """Store M new elements; returns the whole buffer, (B, length, 2, H, E), in which nothing
        counts behind them.

        Raises:
            ValueError: elements of another kind than before, or more than fit in an empty cache.
            IndexError: more than there is room for; on a GPU an assertion of the device.
        """
        length = self._cache.length
        if kv_BM2HE.shape[1] > length:
            raise ValueError(f"KV cache of {length} elements cannot take {kv_BM2HE.shape[1]}")
        if self._buffer is None:
            # Zeros: what does not count is multiplied by shares of 0, and 0 times NaN is NaN.
            self._buffer = kv_BM2HE.new_zeros((len(kv_BM2HE), length, *kv_BM2HE.shape[2:]))
        buffer = self._buffer
        expected = (len(buffer), *buffer.shape[2:])
        if (len(kv_BM2HE), *kv_BM2HE.shape[2:]) != expected or buffer.dtype != kv_BM2HE.dtype:
            raise ValueError(
                f"KV cache of {buffer.dtype} {tuple(buffer.shape)} cannot take "
                f"{kv_BM2HE.dtype} {tuple(kv_BM2HE.shape)}"
            )
        return buffer.index_copy_(1, self._cache.slots(kv_BM2HE.shape[1]), kv_BM2HE)
