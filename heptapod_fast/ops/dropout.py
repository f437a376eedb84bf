"""dropout: x * keep / (1 - p), with a mask that is a function of (key, row counter, column).

    id   = counter * D + column                                  (modulo 2**32)
    u    = mix(mix(id ^ key0) ^ key1)                            32 bits
    keep = u >= p * 2**32

`mix` is the "lowbias32" integer hash (two multiplications, three shifts): cheap enough to be
computed again in the backward pass and inside neighbouring kernels, so that no mask is ever
stored. Keys come from Philox and the global sample index, so that neither ranks nor micro-batches
change the mask.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from heptapod_fast.ops import dispatch

_MASK = 0xFFFFFFFF


def keep_mask(key0: Tensor, key1: Tensor, counter: Tensor, width: int, p: float) -> Tensor:
    """keys and counter: int64, broadcastable to the leading shape of x -> boolean (..., width)."""
    columns = torch.arange(width, device=counter.device)
    element = (counter[..., None] * width + columns) & _MASK
    hashed = _mix(_mix(element ^ key0[..., None]) ^ key1[..., None])
    return hashed >= round(p * 2**32)


def _mix(x: Tensor) -> Tensor:
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, key0, key1, counter, p, apply):
        ctx.save_for_backward(key0, key1, counter)
        ctx.p, ctx.run = p, apply
        return apply(x, key0, key1, counter, p)

    @staticmethod
    def backward(ctx, grad):
        return ctx.run(grad.contiguous(), *ctx.saved_tensors, ctx.p), *(None,) * 5


def _reference(x: Tensor, key0: Tensor, key1: Tensor, counter: Tensor, p: float) -> Tensor:
    keep = keep_mask(key0, key1, counter, x.shape[-1], p)
    return torch.where(keep, x * (1.0 / (1.0 - p)), torch.zeros((), dtype=x.dtype, device=x.device))


def dropout(x: Tensor, key0: Tensor, key1: Tensor, counter: Tensor, p: float,
            implementation: str = "auto") -> Tensor:
    """x (..., D); keys int64 below 2**32, of shape (x.shape[0], 1, ...) or (x.shape[0],) for
    two-dimensional x; counter int64, of shape x.shape[1:-1], or (x.shape[0],) for two-dimensional
    x.

    implementation: "auto", "triton" or "reference". p = 0 returns x itself.
    """
    if p == 0.0:
        return x
    apply = _reference
    if dispatch.choose("dropout", x.device, x.dtype, implementation).implementation == "triton":
        from heptapod_fast.kernels.dropout import dropout as apply
    # Kernels read keys and counters as plain arrays; a table of keys gives strided views.
    return _Dropout.apply(x.contiguous(), key0.contiguous(), key1.contiguous(),
                          counter.contiguous(), p, apply)


def _triton_usable(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return f"runs on cuda tensors, these are on {device.type}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if importlib.util.find_spec("heptapod_fast.kernels") is None:
        return "the kernels are not installed: pip install --no-build-isolation -e ."
    return None


dispatch.register("dropout", "triton", _triton_usable)
dispatch.register("dropout", "reference", lambda device, dtype: None)
