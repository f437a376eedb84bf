"""Keys and values of the elements a causal Transformer has already seen."""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """One (B, length, H, E) buffer of keys and one of values per layer, allocated at first use.

    A forward pass calls `append` once per layer; `advance` then moves the write position on.
    """

    def __init__(self, depth: int, length: int):
        self.length, self.filled = length, 0
        self._buffers: list[tuple[Tensor, Tensor] | None] = [None] * depth

    def append(self, layer: int, k_BMHE: Tensor, v_BMHE: Tensor) -> tuple[Tensor, Tensor]:
        """Store M new elements of one layer; returns keys and values of all elements so far.

        Raises ValueError when the cache is full.
        """
        end = self.filled + k_BMHE.shape[1]
        if end > self.length:
            raise ValueError(f"KV cache of {self.length} elements cannot take {end}")
        if self._buffers[layer] is None:
            shape = (k_BMHE.shape[0], self.length, *k_BMHE.shape[2:])
            self._buffers[layer] = (torch.empty(shape, dtype=k_BMHE.dtype, device=k_BMHE.device),
                                    torch.empty(shape, dtype=v_BMHE.dtype, device=v_BMHE.device))
        keys, values = self._buffers[layer]
        keys[:, self.filled:end] = k_BMHE
        values[:, self.filled:end] = v_BMHE
        return keys[:, :end], values[:, :end]

    def advance(self, count: int) -> None:
        """To be called once after all layers have appended `count` elements."""
        self.filled += count
