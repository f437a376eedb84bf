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

_WORD = 0xFFFFFFFF


class DropoutMask(NamedTuple):
    """A dropout mask, described, for R rows in order: P sequences of R / P rows each.

    key_P2: (P, 2) int64 below 2**32, one key per sequence; counter_N: (N,) int64, row r of all rows
    counts as counter_N[r % N]. For whole sequences N = R / P; for packed rows P = N = R.
    """

    key_P2: Tensor
    counter_N: Tensor
    p: float

    @staticmethod
    def of(key_P2: Tensor | None, counter_N: Tensor | None, p: float) -> DropoutMask | None:
        """The inverse of `parts`."""
        return None if key_P2 is None else DropoutMask(key_P2, counter_N, p)

    @staticmethod
    def parts(mask: DropoutMask | None) -> tuple[Tensor | None, Tensor | None, float]:
        """What operators take: keys, counters, p; without a mask None, None, 0."""
        return (None, None, 0.0) if mask is None else (*mask.arrays(), mask.p)

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
        keys, counters = self.key_P2, self.counter_N
        if not 0 <= self.p < 1:
            raise ValueError(f"{operation} drops with 0 <= p < 1, got {self.p}")
        if (
            keys.shape[1:] != (2,)
            or counters.dim() != 1
            or keys.dtype != torch.int64
            or counters.dtype != torch.int64
            or not len(keys)
            or not len(counters)
            or rows % len(keys)
            or rows % len(counters)
        ):
            raise ValueError(
                f"{operation} takes an int64 mask of keys (P, 2) and counters (N,), P "
                f"and N dividing {rows} rows; got {keys.dtype} {tuple(keys.shape)} "
                f"and {counters.dtype} {tuple(counters.shape)}"
            )

    def tensors(self) -> dict[str, Tensor]:
        """By the names that errors call them."""
        return {"mask.key_P2": self.key_P2, "mask.counter_N": self.counter_N}

    def arrays(self) -> tuple[Tensor, Tensor]:
        """Keys and counters as kernels read them, contiguous (a table of keys gives views)."""
        return self.key_P2.contiguous(), self.counter_N.contiguous()


def keep_mask(key0: Tensor, key1: Tensor, counter: Tensor, width: int, p: float) -> Tensor:
    """keys and counter: int64, broadcastable to the leading shape of x -> boolean (..., width)."""
    columns = torch.arange(width, device=counter.device)
    element = (counter[..., None] * width + columns) & _WORD
    hashed = _mix(_mix(element ^ key0[..., None]) ^ key1[..., None])
    return hashed >= round(p * 2**32)


def _mix(x: Tensor) -> Tensor:
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _WORD
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _WORD
    return x ^ (x >> 16)
