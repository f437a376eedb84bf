"""Registers the operations with PyTorch: `torch.ops.heptapod_fast.NAME`.

An operator here is what the kernels compute: one opaque call for torch.compile and CUDA graphs,
with a fake implementation for tracing. It runs on CUDA tensors, and on CPU tensors in Triton's
interpreter. Those of the compiled library (csrc/) get theirs here too. The plain-PyTorch reference
is no operator: torch.compile sees through it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

_library = torch.library.Library("heptapod_fast", "FRAGMENT")

Context = Any  # autograd's: takes attributes, saves tensors
Inputs = tuple[Any, ...]
Gradient = Tensor | list[Tensor] | None
Gradients = tuple[Gradient, ...]  # one for every argument of an operator


def operator(
    schema: str, kernel: Callable, fake: Callable, strided: tuple[str, ...] = ()
) -> OpOverload:
    """Defines heptapod_fast::NAME from "NAME(Tensor x, ...) -> ..." and returns its overload.

    kernel: runs it, on contiguous tensors; imports Triton when it is called, not before. fake:
    allocates the outputs. strided: arguments of any strides whose last dimension is contiguous.
    """
    name = schema.split("(", 1)[0]
    _library.define(schema, tags=(torch.Tag.needs_fixed_stride_order,))
    overload = getattr(torch.ops.heptapod_fast, name).default
    kernel = _contiguous(
        [argument.name in strided for argument in overload._schema.arguments], kernel
    )
    _library.impl(name, kernel, "CPU")
    _library.impl(name, _on_its_device(kernel), "CUDA")
    torch.library.register_fake(f"heptapod_fast::{name}", fake, lib=_library)
    return overload


def compiled(name: str, fake: Callable) -> OpOverload:
    """heptapod_fast::NAME of the compiled library, which is loaded. fake: allocates the outputs."""
    torch.library.register_fake(f"heptapod_fast::{name}", fake, lib=_library)
    return getattr(torch.ops.heptapod_fast, name).default


def _contiguous(strided: list[bool], kernel: Callable) -> Callable:
    """torch.compile keeps the order of strides, not the strides: a tensor that was contiguous when
    it was traced may come as a part of a larger one."""

    def packed(x, any_strides):
        if isinstance(x, list):
            return [packed(each, any_strides) for each in x]
        if not torch.is_tensor(x) or x.is_contiguous() or any_strides and x.stride(-1) == 1:
            return x
        return x.contiguous()

    @functools.wraps(kernel)
    def called(*arguments):
        return kernel(*map(packed, arguments, strided))

    return called


def _on_its_device(kernel: Callable) -> Callable:
    """Triton launches on the current device, which need not be the tensors'."""

    @functools.wraps(kernel)
    def guarded(*arguments):
        device = next(a.device for a in arguments if isinstance(a, torch.Tensor))
        if device.index == torch.cuda.current_device():
            return kernel(*arguments)
        with torch.cuda.device(device):
            return kernel(*arguments)

    return guarded


def differentiable(op: OpOverload, backward: Callable, setup_context: Callable) -> None:
    """Gives an operator its gradient; see torch.library.register_autograd."""
    torch.library.register_autograd(op._name, backward, setup_context=setup_context, lib=_library)


def once(backward_op: OpOverload, operation: str) -> None:
    """The gradient of a gradient is an error that says so, where PyTorch would pass over it."""

    def refuse(ctx: Context, *grads: Gradient) -> None:
        raise second_derivative(operation)

    torch.library.register_autograd(backward_op._name, refuse, lib=_library)


def second_derivative(operation: str) -> RuntimeError:
    """What is raised where the gradient of a gradient is asked for and only the reference has
    one."""
    return RuntimeError(
        f"{operation}: this implementation is differentiable once; take "
        "implementation='reference' for second derivatives"
    )
