"""What every operation asks of its tensors, in one wording."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """x, in float32 if it was less precise."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def check_rows(operation: str, **tensors: Tensor | None) -> None:
    """ValueError unless all tensors are on the device of the first, which holds floating-point rows
    (..., D). None stands for an argument that was left out."""
    (name, first), *others = ((n, t) for n, t in tensors.items() if t is not None)
    if not torch.is_tensor(first) or first.dim() == 0 or not first.is_floating_point():
        what = (
            f"{first.dtype} {tuple(first.shape)}"
            if torch.is_tensor(first)
            else type(first).__name__
        )
        raise ValueError(
            f"{operation} takes {name} as rows (..., D) of float32 or bfloat16 (the "
            f"reference: any floating dtype), got {what}"
        )
    for other, tensor in others:
        if not torch.is_tensor(tensor) or tensor.device != first.device:
            where = tensor.device if torch.is_tensor(tensor) else type(tensor).__name__
            raise ValueError(
                f"{operation} takes its tensors on one device: {name} is on "
                f"{first.device}, {other} on {where}"
            )
