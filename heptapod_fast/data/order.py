"""The order of training as a closed form: global sample index -> image id.

Sample g belongs to epoch g // n and reads entry g % n of that epoch's permutation. Nothing is
advanced and nothing has to be saved: resuming, or splitting the batch among more ranks, asks for
the same indices and gets the same images.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

_WORD = 2**64


# Four permutations: the two latest epochs of a training set and of one more set beside it.
@lru_cache(maxsize=4)
def _permutation(num_images: int, seed: int, epoch: int) -> Tensor:
    # Raw Philox output is fixed for good; Generator.permutation may change between numpy versions.
    # The sort is stable, so that even equal words have one order.
    words = np.random.Philox(key=(seed % _WORD) + _WORD * (epoch % _WORD)).random_raw(num_images)
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
