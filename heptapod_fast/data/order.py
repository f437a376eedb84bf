"""The order of training as a closed form: global sample index -> image id.

Sample g belongs to epoch g // n and reads entry g % n of that epoch's permutation. Nothing is
advanced and nothing has to be saved: resuming, or splitting the batch among more ranks, asks for
the same indices and gets the same images.
"""

from __future__ import annotations

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
    epochs, ids = index // num_images, torch.empty_like(index)
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
        self.seed, self.count = seed, sum(sizes)
        if self.count < 1:
            raise ValueError("expected a set of at least 1 image, found none: check --data")
        self._window, self._sizes = window, np.asarray(sizes, dtype=np.int64)
        self._firsts = np.cumsum(self._sizes) - self._sizes
        self._epoch: tuple[int, list[np.ndarray], np.ndarray] | None = None

    def ids(self, index: Tensor) -> Tensor:
        """As `sample_ids`: (B,) int64 global sample indices -> (B,) int64 image ids."""
        index = index.detach().to("cpu").long().numpy()
        if index.size and index.min() < 0:
            raise ValueError(f"expected global sample indices of 0 or more, found {index.min()}")
        epochs, ids = index // self.count, np.empty_like(index)
        for epoch in np.unique(epochs):
            rows = epochs == epoch
            windows, starts = self._windows(int(epoch))
            places = index[rows] % self.count
            numbers = np.searchsorted(starts, places, side="right") - 1
            found = np.empty_like(places)
            for number in np.unique(numbers):
                here = numbers == number
                found[here] = self._in_window(windows[number], int(epoch), int(number),
                                              places[here] - starts[number])
            ids[rows] = found
        return torch.from_numpy(ids)

    def shards_at(self, index: int) -> tuple[tuple[int, ...], int]:
        """Shards of the window that holds a global sample index, and the first index behind it."""
        epoch, place = divmod(index, self.count)
        windows, starts = self._windows(epoch)
        number = int(np.searchsorted(starts, place, side="right")) - 1
        last = number + 1 == len(windows)
        end = self.count if last else int(starts[number + 1])
        return tuple(windows[number].tolist()), epoch * self.count + end

    def _windows(self, epoch: int) -> tuple[list[np.ndarray], np.ndarray]:
        """The shards of every window, and the place in the epoch at which each begins."""
        if self._epoch is None or self._epoch[0] != epoch:
            order = np.arange(len(self._sizes))
            if len(order) > self._window:
                order = _permutation(len(order), self.seed, epoch, _SHARDS).numpy()
            windows = [order[k:k + self._window] for k in range(0, len(order), self._window)]
            windows = [shards for shards in windows if self._sizes[shards].sum()]
            sizes = np.array([self._sizes[shards].sum() for shards in windows])
            self._epoch = epoch, windows, np.cumsum(sizes) - sizes
        return self._epoch[1:]

    def _in_window(self, shards: np.ndarray, epoch: int, number: int,
                   places: np.ndarray) -> np.ndarray:
        ends = np.cumsum(self._sizes[shards])
        local = _permutation(int(ends[-1]), self.seed, epoch, number).numpy()[places]
        which = np.searchsorted(ends, local, side="right")
        return self._firsts[shards[which]] + local - (ends - self._sizes[shards])[which]
