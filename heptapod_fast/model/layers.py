"""Layers whose parameters are float32 masters and whose products follow the activations' dtype.

Each takes the `Operators` of the run: which implementation an operation is called with is decided
once, at the start, and handed down.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heptapod_fast import ops
from heptapod_fast.ops.dispatch import AUTO, Operators

EPS = 1e-6
RMS_EPS = 1e-5  # llamagen:autoregressive/models/gpt.py, ModelArgs.norm_eps


OneKind = TypeVar("OneKind", bound=nn.Module)


class Modules(nn.ModuleList, Generic[OneKind]):
    """nn.ModuleList of modules of one kind, which a type checker knows of."""

    if TYPE_CHECKING:

        def __iter__(self) -> Iterator[OneKind]: ...

        def __getitem__(self, index: int) -> OneKind: ...  # type: ignore[override]


class Linear(nn.Linear):
    """nn.Linear whose weights follow the dtype of its input.

    init: how a system fills it: "xavier", "normal" (0.02) or "zero"; see `model.initial`.
    """

    def __init__(self, inputs: int, outputs: int, init: str = "xavier", bias: bool = True):
        super().__init__(inputs, outputs, bias)
        self.init = init

    def reset_parameters(self) -> None:
        """Nothing: the system fills its parameters in one place."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs)."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)

    def product(self, x: Tensor) -> Tensor:
        """Without the bias, for an operation that adds it on its way."""
        return F.linear(x, self.weight.to(x.dtype))


class Embedding(nn.Embedding):
    """nn.Embedding that the system fills."""

    def reset_parameters(self) -> None:
        """Nothing: the system fills its parameters in one place."""


class LayerNorm(nn.LayerNorm):
    """LayerNorm through the operation of the same name."""

    def __init__(self, width: int, eps: float = EPS, operators: Operators = AUTO):
        super().__init__(width, eps=eps)
        self.operators = operators

    def reset_parameters(self) -> None:
        """Nothing: the system fills its parameters in one place."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> the same shape and dtype."""
        return ops.layer_norm(
            x, self.weight, self.bias, self.eps, implementation=self.operators["layer_norm"]
        )

    def after(
        self, x: Tensor, branch: Tensor, bias: Tensor | None, mask: ops.DropoutMask | None
    ) -> tuple[Tensor, Tensor]:
        """(x + dropout(branch + bias), its norm), in one pass over memory."""
        return ops.add_layer_norm(
            x,
            branch,
            bias,
            self.weight,
            self.bias,
            mask,
            self.eps,
            implementation=self.operators["layer_norm"],
        )


class RMSNorm(nn.Module):
    """RMSNorm through the operation of the same name."""

    def __init__(self, width: int, eps: float = RMS_EPS, operators: Operators = AUTO):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps
        self.operators = operators

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> the same shape and dtype."""
        how = self.operators["rms_norm"]
        return ops.rms_norm(x, self.weight, self.eps, implementation=how)

    def after(
        self, x: Tensor, branch: Tensor, bias: Tensor | None, mask: ops.DropoutMask | None
    ) -> tuple[Tensor, Tensor]:
        """As `LayerNorm.after`; ValueError for a bias, which no network with this norm has."""
        if bias is not None:
            raise ValueError("RMSNorm stands behind products without a bias")
        how = self.operators["rms_norm"]
        return ops.add_rms_norm(x, branch, self.weight, mask, self.eps, implementation=how)
