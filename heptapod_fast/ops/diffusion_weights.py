"""The parameters of the diffusion MLP (ops/diffusion_mlp.py), named."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

Shape = tuple[int, ...]


class BlockWeights(NamedTuple):
    """One residual block."""

    norm_weight: Tensor  # (F,)
    norm_bias: Tensor  # (F,)
    fc1_weight: Tensor  # (F, F)
    fc1_bias: Tensor  # (F,)
    fc2_weight: Tensor  # (F, F)
    fc2_bias: Tensor  # (F,)
    modulation_weight: Tensor  # (3 F, F): shift, scale, gate
    modulation_bias: Tensor  # (3 F,)


class DiffusionWeights(NamedTuple):
    """All parameters, float32."""

    input_weight: Tensor  # (F, C)
    input_bias: Tensor  # (F,)
    modulation_weight: Tensor  # (2 F, F): shift, scale of the last layer
    modulation_bias: Tensor  # (2 F,)
    output_weight: Tensor  # (2 C, F)
    output_bias: Tensor  # (2 C,)
    blocks: tuple[BlockWeights, ...]

    def flat(self) -> list[Tensor]:
        """The parameters in one list, those of the blocks last."""
        return [*self[:-1], *(tensor for block in self.blocks for tensor in block)]

    @classmethod
    def of(cls, flat: list[Tensor]) -> DiffusionWeights:
        """The inverse of `flat`."""
        own = len(cls._fields) - 1
        per_block = len(BlockWeights._fields)
        starts = range(own, len(flat), per_block)
        blocks = tuple(BlockWeights(*flat[start : start + per_block]) for start in starts)
        named = dict(zip(cls._fields, flat[:own], strict=False))
        return cls(**named, blocks=blocks)

    def named(self) -> dict[str, Tensor]:
        """{"input_weight": ..., "blocks[0].norm_weight": ...} in the order of `flat`."""
        found = {name: getattr(self, name) for name in self._fields[:-1]}
        for i, block in enumerate(self.blocks):
            found |= {f"blocks[{i}].{name}": tensor for name, tensor in block._asdict().items()}
        return found

    def shapes(self, width: int) -> dict[str, Shape]:
        """By the names of `named` what every parameter must have, given F and the output's rows;
        without input_weight and output_weight, which decide C."""
        vector = (width,)
        square = (width, width)
        found: dict[str, Shape] = dict(
            input_bias=vector,
            modulation_weight=(2 * width, width),
            modulation_bias=(2 * width,),
            output_bias=self.output_weight.shape[:1],
        )
        block: dict[str, Shape] = dict(
            norm_weight=vector,
            norm_bias=vector,
            fc1_weight=square,
            fc1_bias=vector,
            fc2_weight=square,
            fc2_bias=vector,
            modulation_weight=(3 * width, width),
            modulation_bias=(3 * width,),
        )
        for i in range(len(self.blocks)):
            found |= {f"blocks[{i}].{name}": shape for name, shape in block.items()}
        return found
