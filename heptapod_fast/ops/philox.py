"""philox: counter-based random bits, the same ones wherever they are made.

    words(i, b) = Philox4x32-10(counter = (b, slot_i, low(index_i), high(index_i)), key)

The generator of cuRAND and of `triton.language.philox` (Salmon, Moraes, Dror, Shaw, "Parallel
random numbers: as easy as 1, 2, 3", SC 2011). Integers only, so every implementation agrees bit
for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from heptapod_fast.ops import dispatch, library

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF


def philox4x32(counter: tuple[Tensor, ...], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-10 in int64 arithmetic.

    counter: four int64 tensors with values in [0, 2**32), broadcastable to one shape; key: two
    integers below 2**32. Returns four int64 tensors of that shape with values in [0, 2**32).
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = key
    for _ in range(10):
        # The product wraps modulo 2**64; the arithmetic shift plus the mask give its upper word.
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK,
        )
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


def philox(index: Tensor, slot: Tensor, blocks: int, key: tuple[int, int], *,
           implementation: str = "auto") -> Tensor:
    """index: (...) int64; slot: int64 of the same shape, its low 32 bits count; key: two integers
    below 2**32. Returns (..., 4 * blocks) int64 in [0, 2**32): block b of an item in places
    4b..4b+3. Raises ValueError on other dtypes or unequal shapes or devices."""
    if index.dtype != torch.int64 or slot.dtype != torch.int64:
        raise ValueError(f"philox takes int64 index and slot, got {index.dtype} and {slot.dtype}")
    if index.shape != slot.shape or index.device != slot.device:
        raise ValueError(f"philox takes index and slot of one shape and device, got "
                         f"{tuple(index.shape)} on {index.device} and {tuple(slot.shape)} on "
                         f"{slot.device}")
    if not 0 <= blocks < 2**32:
        raise ValueError(f"philox counts blocks in 32 bits, got {blocks}")
    chosen = dispatch.choose("philox", index.device, index.dtype, implementation)
    if chosen.implementation == "reference":
        return reference(index, slot, blocks, key)
    return torch.ops.heptapod_fast.philox.default(index.contiguous(), slot.contiguous(), blocks,
                                                  key[0], key[1])


def reference(index: Tensor, slot: Tensor, blocks: int, key: tuple[int, int]) -> Tensor:
    """`philox` in plain PyTorch, on any device."""
    block = torch.arange(blocks, device=index.device)
    words = philox4x32(
        (block, (slot & _MASK)[..., None], (index & _MASK)[..., None],
         ((index >> 32) & _MASK)[..., None]),
        key,
    )
    return torch.stack(words, dim=-1).flatten(-2)


dispatch.register("philox", "cuda", library.check("cuda"))
dispatch.register("philox", "cpu", library.check("cpu"))
dispatch.register("philox", "reference", lambda device, dtype: None)

if library.available("cpu"):
    @torch.library.register_fake("heptapod_fast::philox")
    def _fake(index: Tensor, slot: Tensor, blocks: int, key0: int, key1: int) -> Tensor:
        return index.new_empty((*index.shape, 4 * blocks))
