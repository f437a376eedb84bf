"""global_norm: the 2-norm of a list of tensors together, for gradient clipping.

    norm = sqrt(sum over all elements of x^2)

Squares and sums in float64 (squares of float32 are exact there), rounded once at the end: no
overflow below the largest float32, and the order of the sums, hence the sharding, does not show in
more than a rounding of the result. Infinities and NaN come out as such. Kernels sum chunks of
tensors, then the chunks, in an order that depends on the shapes alone: the same bits every time.
Bytes: each element is read once.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from heptapod_fast.ops import dispatch, library, sharded

DTYPES = (torch.float32, torch.bfloat16)


def global_norm(grads: Sequence[Tensor], implementation: str = "auto") -> Tensor:
    """The norm of all `grads`: 0-dim float32 on their device; the host does not wait for it.

    grads: floating-point tensors on one device, of any shapes and dtypes; the kernels take float32
    and bfloat16, in any mixture. DTensors count as the full tensors that they stand for: their
    norm needs one message of 8 bytes per mesh dimension that shards, and every rank of the mesh has
    to take part. implementation: "auto", "cuda", "cpu" or "reference". Raises ValueError on an
    empty list and on anything else, saying what is supported.
    """
    grads = [grads] if torch.is_tensor(grads) else list(grads)
    if not grads:
        raise ValueError("global_norm needs at least one gradient")
    for i, grad in enumerate(grads):
        if not torch.is_tensor(grad) or not grad.is_floating_point():
            what = grad.dtype if torch.is_tensor(grad) else type(grad).__name__
            raise ValueError(f"global_norm takes floating-point tensors; number {i} is {what}")
        if grad.device != grads[0].device:
            raise ValueError(
                f"global_norm takes tensors of one device; number 0 is on "
                f"{grads[0].device}, number {i} on {grad.device}"
            )
    with torch.no_grad():
        kind = sharded.dtensor_class()
        if kind is not None and any(isinstance(grad, kind) for grad in grads):
            return _sharded_sum(grads, implementation).sqrt().float()
        if _select(grads, implementation) == "reference":
            return _reference(grads).float()
        return torch.ops.heptapod_fast.global_norm.default([g.contiguous() for g in grads])


def _reference(grads: Sequence[Tensor]) -> Tensor:
    """The definition, in float64."""
    norms = torch._foreach_norm(list(grads), 2, dtype=torch.float64)
    return torch.linalg.vector_norm(torch.stack(norms))


def _select(grads: Sequence[Tensor], implementation: str) -> str:
    """Which implementation runs: decided by the first dtype that kernels do not know, if any."""
    dtype = next((g.dtype for g in grads if g.dtype not in DTYPES), grads[0].dtype)
    return dispatch.select("global_norm", grads[0].device, dtype, implementation)


def _sharded_sum(grads: Sequence[Tensor], implementation: str) -> Tensor:
    """Sum of squares over the full tensors: 0-dim float64, the same on all ranks of the meshes."""
    groups: dict[tuple, list[Tensor]] = {}
    for i, grad in enumerate(grads):
        part = sharded.local(grad, "global_norm", f"number {i}")
        groups.setdefault(sharded.shards(grad), []).append(part)
    sums = []
    for (mesh, dimensions), parts in groups.items():
        if _select(parts, implementation) == "reference":
            value = _reference(parts).square()
        else:
            value = torch.ops.heptapod_fast.sum_of_squares.default([p.contiguous() for p in parts])
        for dimension in dimensions:
            torch.distributed.all_reduce(value, group=mesh.get_group(dimension))
        sums.append(value)
    return functools.reduce(torch.add, sums)


def _check(device_type: str) -> dispatch.Check:
    """`library.check`, and the dtypes that the kernels know."""
    usable = library.check(device_type)

    def check(device: torch.device, dtype: torch.dtype) -> str | None:
        if dtype not in DTYPES:
            return f"takes {' and '.join(str(d) for d in DTYPES)}, these are {dtype}"
        return usable(device, dtype)

    return check


dispatch.register("global_norm", "cuda", _check("cuda"))
dispatch.register("global_norm", "cpu", _check("cpu"))
dispatch.register("global_norm", "reference", lambda device, dtype: None)

if library.available("cpu"):

    @torch.library.register_fake("heptapod_fast::global_norm")
    def _fake(tensors: list[Tensor]) -> Tensor:
        return tensors[0].new_empty((), dtype=torch.float32)

    @torch.library.register_fake("heptapod_fast::sum_of_squares")
    def _fake_sum(tensors: list[Tensor]) -> Tensor:
        return tensors[0].new_empty((), dtype=torch.float64)
