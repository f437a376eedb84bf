"""Dropout masks, described: a mask is a function of (key, row counter, column).

    id   = counter * D + column                                  (modulo 2**32)
    u    = mix(mix(id ^ key0) ^ key1)                            32 bits
    keep = u >= p * 2**32

`mix` is the "lowbias32" integer hash (two multiplications, three shifts): cheap enough to be
computed again in the backward pass and inside neighbouring kernels, so that no mask is ever
stored. Keys come from Philox and the global sample index, so that neither ranks nor micro-batches
change the mask.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from heptapod_fast.ops.checks import refusal

_WORD = 0xFFFFFFFF
_LOWEST = -(2**31)


class DropoutMask(NamedTuple):
    """A dropout mask, described, for R rows in order: P sequences of R / P rows each.

    Row r of all rows has key r // (R / P) and counts as counter_N[r % N]. For whole sequences
    N = R / P; for packed rows P = N = R.
    """

    key_P2: Tensor  # (P, 2) int64 below 2**32, one key per sequence
    counter_N: Tensor  # (N,) int64
    p: float  # the share that is dropped, 0 <= p < 1

    @staticmethod
    def of(key_P2: Tensor | None, counter_N: Tensor | None, p: float) -> DropoutMask | None:
        """The inverse of `parts`."""
        if key_P2 is None or counter_N is None:
            return None
        return DropoutMask(key_P2, counter_N, p)

    @staticmethod
    def parts(mask: DropoutMask | None) -> tuple[Tensor | None, Tensor | None, float]:
        """What operators take: keys, counters, p; without a mask None, None, 0."""
        return (None, None, 0.0) if mask is None else (*mask.arrays(), mask.p)

    @staticmethod
    def named(mask: DropoutMask | None) -> dict[str, Tensor]:
        """Its tensors by the names that errors call them; none without a mask."""
        return {} if mask is None else mask.tensors()

    @staticmethod
    def checked(mask: DropoutMask | None, operation: str, x: Tensor) -> DropoutMask | None:
        """The mask for the rows of x (..., D), None if it drops nothing; ValueError as `check`."""
        if mask is None or mask.p == 0.0:
            return None
        mask.check(operation, x.numel() // max(1, x.shape[-1]))
        return mask

    def threshold(self) -> int:
        """Hashes below it are dropped."""
        return round(self.p * 2**32)

    def keep(self, rows: int, width: int) -> Tensor:
        """(rows, width) boolean, True where an element survives."""
        key_R2 = self.key_P2.repeat_interleave(rows // len(self.key_P2), dim=0)
        counter_R = self.counter_N.repeat(rows // len(self.counter_N))
        return keep_mask(key_R2[:, 0], key_R2[:, 1], counter_R, width, self.p)

    def apply(self, x: Tensor) -> Tensor:
        """The reference: x (..., D) -> the same, masked and scaled."""
        keep = self.keep(x.numel() // max(1, x.shape[-1]), x.shape[-1]).view(x.shape)
        return torch.where(keep, x * (1.0 / (1.0 - self.p)), x.new_zeros(()))

    def check(self, operation: str, rows: int) -> None:
        """ValueError unless the mask describes so many rows."""
        if not 0 <= self.p < 1:
            raise ValueError(f"{operation} drops with 0 <= p < 1, got {self.p}")
        keys = self.key_P2
        counters = self.counter_N
        integers = keys.dtype == counters.dtype == torch.int64
        shaped = keys.shape[1:] == (2,) and counters.dim() == 1
        if not integers or not shaped or not _divides(keys, rows) or not _divides(counters, rows):
            wanted = f"an int64 mask of keys (P, 2) and counters (N,), P and N dividing {rows} rows"
            raise refusal(operation, wanted, keys, counters)

    def tensors(self) -> dict[str, Tensor]:
        """By the names that errors call them."""
        return {"mask.key_P2": self.key_P2, "mask.counter_N": self.counter_N}

    def arrays(self) -> tuple[Tensor, Tensor]:
        """Keys and counters as kernels read them, contiguous (a table of keys gives views)."""
        return self.key_P2.contiguous(), self.counter_N.contiguous()


def _divides(x: Tensor, rows: int) -> bool:
    """Whether the rows are a multiple of the length of x."""
    return len(x) > 0 and rows % len(x) == 0


def keep_mask(key0: Tensor, key1: Tensor, counter: Tensor, width: int, p: float) -> Tensor:
    """keys and counter: int64, broadcastable to the leading shape of x -> boolean (..., width).

    Words of 32 bits are held as int32, half of the memory of int64: sums and products keep the low
    32 bits either way.
    """
    columns = torch.arange(width, dtype=torch.int32, device=counter.device)
    word = _as_int32(counter * width)[..., None] + columns
    word = _mix(word ^ _as_int32(key0)[..., None])
    word = _mix(word.bitwise_xor_(_as_int32(key1)[..., None]))
    threshold = round(p * 2**32)
    if threshold > _WORD:  # p is 1 but for a rounding
        return torch.zeros_like(word, dtype=torch.bool)
    # With the highest bit turned over, int32 are in the order of the words.
    return word.bitwise_xor_(_LOWEST) >= threshold + _LOWEST


def _as_int32(x: Tensor) -> Tensor:
    """The low 32 bits of int64."""
    low = x & _WORD
    return torch.where(low > 2**31 - 1, low - 2**32, low).to(torch.int32)


def _mix(x: Tensor) -> Tensor:
    """The hash, in place. A shift of a negative int32 brings ones in, which the masks take out."""
    x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))
    x.mul_(0x7FEB352D)
    x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF))
    x.mul_(0x846CA68B - 2**32)
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))
