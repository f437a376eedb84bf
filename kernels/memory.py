"""Loads and stores with the conversions that kernels share: float32 inside, one rounding out."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_float32(
    at,  # tile of pointers
    inside,  # booleans, broadcastable to the tile
):
    """Values as float32, 0 where not inside.

    bfloat16 is for memory: kernels compute in float32 and round once, when they store.
    """
    return tl.load(at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store_rounded(
    at,  # tile of pointers
    value,  # tile of float32
    inside,  # booleans, broadcastable to the tile
):
    """Rounds values to the dtype of the memory; writes nothing where not inside."""
    tl.store(at, value.to(at.dtype.element_ty), mask=inside)
