"""What operations on lists of parameters need to know of `torch.distributed.tensor.DTensor`.

A DTensor cannot exist before its module was imported, so this one never imports it: plain tensors
cost one look into `sys.modules`, and builds of PyTorch without distributed work as they are.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def dtensor_class() -> type | None:
    """The class DTensor, or None where nobody has imported it."""
    if torch.compiler.is_compiling():  # compiled callers pass plain tensors
        return None
    return getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)


def layout(tensor: Tensor) -> tuple | None:
    """(mesh, placements) of a DTensor, None of any other tensor."""
    kind = dtensor_class()
    if kind is None or not isinstance(tensor, kind):
        return None
    distributed: Any = tensor
    return distributed.device_mesh, tuple(distributed.placements)


def local(tensor: Tensor, operation: str, name: str) -> Tensor:
    """This rank's part of a DTensor, sharing its memory; other tensors as they are.

    Raises ValueError where a mesh dimension holds partial sums: no part of it is the tensor's.
    """
    found = layout(tensor)
    if found is None:
        return tensor
    if any(placement.is_partial() for placement in found[1]):
        raise ValueError(
            f"{operation} takes sharded and replicated tensors; {name} holds partial "
            f"sums, {found[1]}: reduce it first (redistribute)"
        )
    distributed: Any = tensor
    with torch.no_grad():
        return distributed.to_local()


def whole(tensor: Tensor) -> Tensor:
    """The full tensor that a DTensor stands for; other tensors as they are. Collective call."""
    kind = dtensor_class()
    if kind is None or not isinstance(tensor, kind):
        return tensor
    distributed: Any = tensor
    return distributed.full_tensor()


def local_lists(lists: Mapping[str, Sequence[Tensor]], operation: str) -> dict[str, list[Tensor]]:
    """Lists of tensors that belong together place by place -> their local parts.

    Raises ValueError unless the tensors at one place have the same mesh, placements and global
    shape as that of the first list.
    """
    first, leader = next(iter(lists.items()))
    for name, tensors in lists.items():
        for i, (tensor, like) in enumerate(zip(tensors, leader)):
            if layout(tensor) != layout(like) or tensor.shape != like.shape:
                raise ValueError(
                    f"{operation} takes {name} with the mesh, placements and shapes of the {first};"
                    f" {name}[{i}] is {describe(tensor)}, {first}[{i}] is {describe(like)}"
                )
    return {
        name: [local(tensor, operation, f"{name}[{i}]") for i, tensor in enumerate(tensors)]
        for name, tensors in lists.items()
    }


def describe(tensor: Tensor) -> str:
    """One phrase for error messages."""
    found = layout(tensor)
    if found is None:
        return f"{tuple(tensor.shape)}, not distributed"
    return f"{tuple(tensor.shape)}, {found[1]} over {found[0]}"


def shards(tensor: Tensor) -> tuple:
    """(mesh, its dimensions over which a tensor's elements are spread); (None, ()) if none."""
    found = layout(tensor)
    if found is None:
        return None, ()
    mesh, placements = found
    spread = tuple(i for i, placement in enumerate(placements) if not placement.is_replicate())
    return (mesh, spread) if spread else (None, ())
