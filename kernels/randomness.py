"""Inline functions for kernels that make random numbers again instead of reading them.

`keep` is the mask of `heptapod_fast.ops.dropout`, `philox_words` the generator of
`heptapod_fast.ops.philox`: integers, equal bit for bit to the references.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def row_keys(key_ptr, counter_ptr, row, rows_per_key, counters):
    """(key0, key1, counter) of a flat row; key (P, 2) int64, counter (N,) int64."""
    at = key_ptr + 2 * (row // rows_per_key)
    key0 = tl.load(at).to(tl.uint32)
    key1 = tl.load(at + 1).to(tl.uint32)
    return key0, key1, tl.load(counter_ptr + row % counters)


@triton.jit
def keep(key0, key1, counter, column, width, THRESHOLD: tl.constexpr):
    """Where dropout keeps an element; THRESHOLD = round(p * 2**32)."""
    element = (counter * width + column).to(tl.uint32)
    hashed = _mix(_mix(element ^ key0) ^ key1)
    return hashed.to(tl.int64) >= THRESHOLD


@triton.jit
def philox_words(index, slot, block, key0, key1):
    """Four uint32 tensors: Philox4x32-10 of counter (block, slot, index low, index high).

    index, slot: int64; block: int32 or int64; all broadcast to one shape by the caller. key0, key1:
    uint32 scalars.
    """
    c0 = block.to(tl.uint32)
    c1 = slot.to(tl.uint32)
    c2 = index.to(tl.uint32)
    c3 = (index >> 32).to(tl.uint32)
    k0 = key0
    k1 = key1
    for _ in tl.static_range(10):
        high0 = tl.umulhi(c0, 0xD2511F53)
        high1 = tl.umulhi(c2, 0xCD9E8D57)
        low0 = c0 * 0xD2511F53
        low1 = c2 * 0xCD9E8D57
        c0 = high1 ^ c1 ^ k0
        c2 = high0 ^ c3 ^ k1
        c1 = low1
        c3 = low0
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3
