"""A case: one operation at one shape, the candidates that do it, and what it must cost at least."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

FORWARD, BACKWARD, BOTH = "forward", "backward", "forward and backward"

Call = Callable[[], object]


class Missing(RuntimeError):
    """A peer is not installed, or cannot run here; str(error) says what to install."""


@dataclass(frozen=True, eq=False)
class Case:
    """One operation at one shape.

    Attributes:
        operation: its name ("layer_norm").
        name: what tells the cases of an operation apart ("backward, B, 32896 x 768").
        inputs: makes one set of inputs on the device, random data, shared by all contenders.
        contenders: {"ours": f, "eager": f, "compiled": f, ...}. f(inputs) does what should not be
            timed (a forward pass, an allocation) and returns the call to be timed. It, or the first
            call, raises `Missing` where the peer is not there.
        bytes: what any implementation must at least read and write.
        flops: what it must at least compute, 2 per multiply-add.
        images: how many images a call is about; 0 if it is about none.
        gate, aim: the ratio against a peer, or the share of copy bandwidth, that it has to reach
            and should reach: ">= 1.2x best peer, 75% of copy bandwidth".
    """

    operation: str
    name: str
    inputs: Callable[[], Any]
    contenders: Mapping[str, Callable[[Any], Call]]
    bytes: float = 0.0
    flops: float = 0.0
    images: int = 0
    gate: str = ""
    aim: str = ""


def fastest(device: str) -> str:
    """What "ours" asks for: on CUDA the kernel by name, because a fallback is no measurement."""
    return "triton" if device == "cuda" else "auto"


class compiled:
    """torch.compile of a function for static shapes, at its first call.

    Not before, because cases are also listed where nothing runs, and the compiler takes seconds to
    import.
    """

    def __init__(self, function: Callable):
        self.function = function
        self.ready: Callable | None = None

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        if self.ready is None:
            # A backward pass that is repeated must not give its saved tensors away.
            torch._functorch.config.donated_buffer = False
            self.ready = torch.compile(self.function, dynamic=False)
        return self.ready(*arguments, **named)


def timed(functions: Mapping[str, Callable], direction: str) -> dict[str, Callable[[Any], Call]]:
    """Contenders of a case whose inputs are (arguments, gradients of the outputs).

    functions: {name: function of the arguments that returns a tensor or several}.
    direction: FORWARD, BACKWARD (the backward pass alone), or BOTH.
    """
    return {
        name: functools.partial(one_pass, function, direction)
        for name, function in functions.items()
    }


def one_pass(function: Callable, direction: str, made: tuple) -> Call:
    """The call to be timed; see `timed`."""
    arguments, upstream = made
    if direction == FORWARD:
        return functools.partial(function, *arguments)
    wanted = [x for x in arguments if torch.is_tensor(x) and x.requires_grad]
    forward = functools.partial(outputs_of, function, arguments)
    if direction == BOTH:
        return lambda: torch.autograd.grad(forward(), wanted, upstream)
    outputs = forward()
    return lambda: torch.autograd.grad(outputs, wanted, upstream, retain_graph=True)


def outputs_of(function: Callable, arguments: tuple) -> tuple[torch.Tensor, ...]:
    """What a function returns, as a tuple."""
    found = function(*arguments)
    return (found,) if torch.is_tensor(found) else tuple(found)
