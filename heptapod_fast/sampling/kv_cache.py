"""Keys and values of the elements a causal Transformer has already seen."""

from __future__ import annotations

from torch import Tensor


class KVCache:
    """One (B, length, 2, H, E) buffer of keys and values per layer, allocated at first use.

    A forward pass hands `layer(i)` to its i-th block, which appends its elements; `advance` then
    moves the write position on, for all layers at once.
    """

    def __init__(self, depth: int, length: int):
        self.length = length
        self.filled = 0
        self._layers = [LayerCache(self) for _ in range(depth)]

    def layer(self, number: int) -> LayerCache:
        """The part of the cache that belongs to one block."""
        return self._layers[number]

    def advance(self, count: int) -> None:
        """To be called once after all layers have appended their elements: the first `count` of
        them stay, the others are overwritten by those that come next."""
        self.filled += count


class LayerCache:
    """The keys and values of one layer."""

    def __init__(self, cache: KVCache):
        self._cache = cache
        self._buffer: Tensor | None = None

    def append(self, kv_BM2HE: Tensor) -> Tensor:
        """Store M new elements; returns keys and values of all elements so far.

        Raises:
            ValueError: the cache is full, or the elements are of another kind than before.
        """
        first = self._cache.filled
        length = self._cache.length
        end = first + kv_BM2HE.shape[1]
        if end > length:
            raise ValueError(f"KV cache of {length} elements cannot take {end}")
        if self._buffer is None:
            self._buffer = kv_BM2HE.new_empty((len(kv_BM2HE), length, *kv_BM2HE.shape[2:]))
        buffer = self._buffer
        expected = (len(buffer), *buffer.shape[2:])
        if (len(kv_BM2HE), *kv_BM2HE.shape[2:]) != expected or buffer.dtype != kv_BM2HE.dtype:
            raise ValueError(
                f"KV cache of {buffer.dtype} {tuple(buffer.shape)} cannot take "
                f"{kv_BM2HE.dtype} {tuple(kv_BM2HE.shape)}"
            )
        buffer[:, first:end] = kv_BM2HE
        return buffer[:, :end]
