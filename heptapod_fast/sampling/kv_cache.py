"""Keys and values of the elements a causal Transformer has already seen."""

from __future__ import annotations

from torch import Tensor


class KVCache:
    """One (B, length, 2, H, E) buffer of keys and values per layer, allocated at first use.

    A forward pass calls `append` once per layer; `advance` then moves the write position on.
    """

    def __init__(self, depth: int, length: int):
        self.length, self.filled = length, 0
        self._buffers: list[Tensor | None] = [None] * depth

    def append(self, layer: int, kv_BM2HE: Tensor) -> Tensor:
        """Store M new elements of one layer; returns keys and values of all elements so far.

        Raises ValueError when the cache is full, or the elements are of another kind than before.
        """
        end = self.filled + kv_BM2HE.shape[1]
        if end > self.length:
            raise ValueError(f"KV cache of {self.length} elements cannot take {end}")
        if self._buffers[layer] is None:
            shape = (kv_BM2HE.shape[0], self.length, *kv_BM2HE.shape[2:])
            self._buffers[layer] = kv_BM2HE.new_empty(shape)
        buffer = self._buffers[layer]
        if (buffer.shape[0], *buffer.shape[2:]) != (
            kv_BM2HE.shape[0],
            *kv_BM2HE.shape[2:],
        ) or buffer.dtype != kv_BM2HE.dtype:
            raise ValueError(
                f"KV cache of {buffer.dtype} {tuple(buffer.shape)} cannot take "
                f"{kv_BM2HE.dtype} {tuple(kv_BM2HE.shape)}"
            )
        buffer[:, self.filled : end] = kv_BM2HE
        return buffer[:, :end]

    def advance(self, count: int) -> None:
        """To be called once after all layers have appended `count` elements."""
        self.filled += count
