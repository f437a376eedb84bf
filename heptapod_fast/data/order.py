"""The order of training as a closed form: global sample index -> image id.

Sample g belongs to epoch g // n and reads entry g % n of that epoch's permutation. Nothing is
advanced and nothing has to be saved: resuming, or splitting the batch among more ranks, asks for
the same indices and gets the same images.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

_WORD = 2**64
_SHARDS = 2**32  # the part of an epoch that orders its shards; windows count from 0


# Eight permutations: shards and windows of the latest epochs, of a set and of one beside it.
@lru_cache(maxsize=8)
def _permutation(count: int, seed: int, epoch: int, part: int = 0) -> Tensor:
    """`part` tells several permutations of one epoch apart."""
    # Raw Philox output is fixed for good; Generator.permutation may change between numpy versions.
    # The sort is stable, so that even equal words have one order.
    key = (seed % _WORD) + _WORD * (epoch % _WORD)
    words = np.random.Philox(key=key, counter=part << 192).random_raw(count)
    return torch.from_numpy(np.argsort(words, kind="stable"))


def sample_ids(index: Tensor, num_images: int, seed: int) -> Tensor:
    """Image ids of global sample indices; every epoch is a permutation of all images.

    Args:
        index: (B,) int64, 0 or more, in any order; it may span several epochs.
        num_images: images in the set.
        seed: the order's seed.

    Returns:
        (B,) int64 on the CPU, values in 0..num_images-1.

    Raises:
        ValueError: num_images is below 1 or an index is negative.
    """
    if num_images < 1:
        raise ValueError(f"expected a set of at least 1 image, found {num_images}: check --data")
    index = index.detach().to("cpu").long()
    if index.numel() and int(index.min()) < 0:
        raise ValueError(f"expected global sample indices of 0 or more, found {int(index.min())}")
    epochs = index // num_images
    ids = torch.empty_like(index)
    for epoch in epochs.unique().tolist():
        rows = epochs == epoch
        ids[rows] = _permutation(num_images, seed, epoch)[index[rows] % num_images]
    return ids


class WindowedOrder:
    """An order for sets in shards, of which few are in use at a time.

    Every epoch goes through all shards in an order of its own, `window` at a time, and through the
    images of these shards in random order. Shards should hold a random part of the set each. A set
    of up to `window` shards has one window, and the order of `sample_ids`.

    Args:
        sizes: images of every shard; ids count through them.
        seed: the order's seed.
        window: shards in use at a time.
    """

    def __init__(self, sizes: Sequence[int], seed: int, window: int) -> None:
        self.seed = seed
        self.count = sum(sizes)
        if self.count < 1:
            raise ValueError("expected a set of at least 1 image, found none: check --data")
        self._window = window
        self._sizes = np.asarray(sizes, dtype=np.int64)
        self._firsts = np.cumsum(self._sizes) - self._sizes
        self._epoch = lru_cache(maxsize=2)(self._windows)
        self._ids = lru_cache(maxsize=3)(self._in_window)

    def ids(self, index: Tensor) -> Tensor:
        """As `sample_ids`: (B,) int64 global sample indices -> (B,) int64 image ids."""
        wanted = index.detach().to("cpu").long().numpy()
        if not wanted.size:
            return torch.empty(0, dtype=torch.int64)
        at = int(wanted.min())
        last = int(wanted.max())
        if at < 0:
            raise ValueError(f"expected global sample indices of 0 or more, found {at}")
        epoch, number, first, end = self._find(at)
        if last < end:  # all in one window, as most batches are
            return torch.from_numpy(self._ids(epoch, number)[wanted - first])
        found = np.empty_like(wanted)
        while True:
            epoch, number, first, end = self._find(at)
            ids = self._ids(epoch, number)
            here = (wanted >= first) & (wanted < end)
            found[here] = ids[wanted[here] - first]
            if last < end:
                return torch.from_numpy(found)
            at = int(wanted[wanted >= end].min())  # the next window that some sample is in

    def shards_at(self, index: int) -> tuple[tuple[int, ...], int]:
        """Shards of the window that holds a global sample index, and the first index behind it."""
        epoch, number, _, end = self._find(index)
        return tuple(self._epoch(epoch)[0][number].tolist()), end

    def _find(self, index: int) -> tuple[int, int, int, int]:
        """Epoch and window of a global sample index, first index of the window and the one behind
        its last."""
        epoch, place = divmod(index, self.count)
        _, borders = self._epoch(epoch)
        number = bisect_right(borders, place) - 1
        base = epoch * self.count
        return epoch, number, base + borders[number], base + borders[number + 1]

    def _windows(self, epoch: int) -> tuple[list[np.ndarray], list[int]]:
        """The shards of every window, and the places in the epoch between windows."""
        order = np.arange(len(self._sizes))
        if len(order) > self._window:
            order = _permutation(len(order), self.seed, epoch, _SHARDS).numpy()
        windows = [order[k : k + self._window] for k in range(0, len(order), self._window)]
        # Shards of broken images alone hold none.
        windows = [shards for shards in windows if self._sizes[shards].sum()]
        images = [self._sizes[shards].sum() for shards in windows]
        return windows, [0, *np.cumsum(images).tolist()]

    def _in_window(self, epoch: int, number: int) -> np.ndarray:
        """Image ids of a window in their order."""
        shards = self._epoch(epoch)[0][number]
        ids = np.concatenate([np.arange(self._sizes[s]) + self._firsts[s] for s in shards])
        return ids[_permutation(len(ids), self.seed, epoch, number).numpy()]
