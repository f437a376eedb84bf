"""What the backward pass of adaln adds up over all rows, in the order of its kernel."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Sums(NamedTuple):
    """Of these gradients the sums over rows, (F,) float32 each; 0 where there is no such gradient.

    In the order in which the backward pass writes them, as rows of a (6, F) tensor.
    """

    gate: Tensor
    branch_bias: Tensor
    weight: Tensor
    bias: Tensor
    shift: Tensor
    scale: Tensor
