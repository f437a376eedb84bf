"""Counter-based dropout of one forward pass, cut up so that each block is handed its own masks.

A forward pass has numbered sites; every site of every sequence has a key made of the global sample
index, so that neither ranks nor micro-batches change a mask (ops/dropout_mask.py). Suffixes:
P sequences, N elements of each, R packed rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from heptapod_fast.ops import DropoutMask
from heptapod_fast.rng import Rng

Masks = tuple[DropoutMask | None, ...]


@dataclass(frozen=True)
class Dropout:
    """The masks of all sites of one forward pass.

    key_PS2: (P, sites, 2) int64 below 2**32; None where nothing is dropped. counter_N: which
    element of its sequence a row is, (N,) for whole sequences and (R,) for packed rows. p: share of
    the values that are dropped.
    """

    key_PS2: Tensor | None = None
    counter_N: Tensor | None = None
    p: float = 0.0

    @classmethod
    def draw(
        cls,
        p: float,
        stream: str,
        index_P: Tensor,
        slot_P: Tensor | int,
        sites: int,
        length: int,
        rng: Rng,
    ) -> Dropout:
        """Masks for P sequences of `length` elements; NO_DROPOUT if p is 0.

        index_P: global sample indices. slot_P: tells several sequences of one sample apart.
        """
        if p == 0.0:
            return NO_DROPOUT
        bits = rng.bits(f"dropout.{stream}", index_P, 2 * sites, slot_P)
        return cls(bits.unflatten(-1, (-1, 2)), torch.arange(length, device=index_P.device), p)

    def sites(self, first: int, count: int) -> Masks:
        """The masks of `count` sites from `first` on; None each where nothing is dropped."""
        if self.key_PS2 is None or self.counter_N is None:
            return (None,) * count
        return tuple(
            DropoutMask(self.key_PS2[:, site], self.counter_N, self.p)
            for site in range(first, first + count)
        )

    def last(self, count: int) -> Dropout:
        """The last `count` sites alone, counted from 0."""
        if self.key_PS2 is None:
            return self
        return Dropout(self.key_PS2[:, -count:], self.counter_N, self.p)

    def packed(self, sequence_R: Tensor, element_R: Tensor) -> Dropout:
        """The same masks for packed rows: row r is element element_R[r] of sequence_R[r]."""
        if self.key_PS2 is None:
            return self
        return Dropout(self.key_PS2[sequence_R], element_R, self.p)


NO_DROPOUT = Dropout()


def drop_labels(label_B: Tensor, index_B: Tensor, rate: float, null_class: int, rng: Rng) -> Tensor:
    """Labels, of which the share `rate` is the null class; a sample's own draw decides."""
    if rate == 0:
        return label_B
    is_dropped_B = rng.uniform("label", index_B, 1)[:, 0] < rate
    return torch.where(is_dropped_B, null_class, label_B)
