"""The parameters of the diffusion MLP (ops/diffusion_mlp.py), named."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class BlockWeights(NamedTuple):
    """One residual block: vectors (W,), products (W, W), modulation (3 W, W) and (3 W,)."""

    norm_weight: Tensor
    norm_bias: Tensor
    fc1_weight: Tensor
    fc1_bias: Tensor
    fc2_weight: Tensor
    fc2_bias: Tensor
    modulation_weight: Tensor
    modulation_bias: Tensor


class DiffusionWeights(NamedTuple):
    """All parameters, float32: input (W, C), modulation (2 W, W), output (2 C, W), and biases."""

    input_weight: Tensor
    input_bias: Tensor
    modulation_weight: Tensor
    modulation_bias: Tensor
    output_weight: Tensor
    output_bias: Tensor
    blocks: tuple[BlockWeights, ...]

    def flat(self) -> list[Tensor]:
        """The parameters in one list, those of the blocks last."""
        return [*self[:-1], *(tensor for block in self.blocks for tensor in block)]

    @classmethod
    def of(cls, flat: list[Tensor]) -> DiffusionWeights:
        """The inverse of `flat`."""
        own, per_block = len(cls._fields) - 1, len(BlockWeights._fields)
        return cls(
            *flat[:own],
            tuple(BlockWeights(*flat[i : i + per_block]) for i in range(own, len(flat), per_block)),
        )
