"""How parameters start, as a pure function of (seed, name of the parameter)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from heptapod_fast.model.layers import Linear
from heptapod_fast.rng import Rng

STD = 0.02  # of linear layers that ask for "normal" (mar:models/mar.py:107-129)


def normal(parameter: Tensor, name: str, rng: Rng, std: float) -> Tensor:
    """N(0, std), drawn row by row from the stream "init.NAME"."""
    rows, columns = _rows_and_columns(parameter)
    return std * rng.normal(f"init.{name}", rows, columns).view_as(parameter)


def xavier(parameter: Tensor, name: str, rng: Rng) -> Tensor:
    """Uniform on +-sqrt(6 / (inputs + outputs)) for a weight (outputs, inputs)."""
    rows, columns = _rows_and_columns(parameter)
    bound = math.sqrt(6 / (len(rows) + columns))
    return bound * (2 * rng.uniform(f"init.{name}", rows, columns) - 1)


def _rows_and_columns(parameter: Tensor) -> tuple[Tensor, int]:
    """The rows of a parameter as counters, and the length of a row."""
    columns = parameter.shape[-1]
    return torch.arange(parameter.numel() // columns, device=parameter.device), columns


def of_mar(
    module: nn.Module,
    leaf: str,
    parameter: Tensor,
    name: str,
    rng: Rng,
    *,
    embedding_std: float,
    learned_tokens: frozenset[str],
) -> Tensor | None:
    """MAR's start (mar:models/mar.py:107-129, models/diffloss.py:194-215).

    Linear weights as their `init` says, biases 0, LayerNorm 1 and 0, embeddings and learned tokens
    N(0, embedding_std), upstream 0.02.

    Args:
        module, leaf, parameter: the parameter, its module, and its name there.
        name: its full name, which keys the draw.
        learned_tokens: leaves that are learned tokens, parameters without a module of their own.

    Returns:
        A tensor like the parameter; None for a kind of module that MAR does not have.
    """
    if isinstance(module, Linear):
        if leaf == "bias" or module.init == "zero":
            return torch.zeros_like(parameter)
        if module.init == "xavier":
            return xavier(parameter, name, rng)
        return normal(parameter, name, rng, STD)
    if isinstance(module, nn.LayerNorm):
        return torch.ones_like(parameter) if leaf == "weight" else torch.zeros_like(parameter)
    if isinstance(module, nn.Embedding) or leaf in learned_tokens:
        return normal(parameter, name, rng, embedding_std)
    return None
