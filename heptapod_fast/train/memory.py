"""How much memory training takes on a rank: an estimate by counting."""

from __future__ import annotations

from typing import NamedTuple

from heptapod_fast.averages import averages_of
from heptapod_fast.config import Config
from heptapod_fast.systems import System, build_system


class MemoryEstimate(NamedTuple):
    """Bytes. fixed: weights, gradients and optimizer. per_parameter: bytes of these per parameter.
    activations: what one micro-batch keeps for its backward pass."""

    fixed: int
    per_parameter: int
    activations: float

    @property
    def total(self) -> float:
        """Both."""
        return self.fixed + self.activations


def estimate(config: Config, system: System, micro_batch: int) -> MemoryEstimate:
    """Of a resolved configuration and its system, on whatever device."""
    is_mixed = config.run.precision != "fp32"
    per_parameter = bytes_per_parameter(len(averages_of(config.recipe.ema)), is_mixed)
    count = sum(parameter.numel() for parameter in system.parameters())
    largest = max(system.saved_values(phase) for phase in system.phases(config.recipe.images))
    bytes_per_value = 2 if is_mixed else 4
    activations = micro_batch * largest * bytes_per_value
    return MemoryEstimate(per_parameter * count, per_parameter, activations)


def bytes_per_parameter(averages: int, is_mixed: bool) -> int:
    """Weight, gradient, two moments, averages, and a bf16 copy in mixed precision."""
    weight = gradient = average = 4
    moments = 2 * 4
    copy = 2 if is_mixed else 0
    return weight + gradient + moments + average * averages + copy


def bytes_of_run(config: Config, classes: int, world_size: int) -> int:
    """Bytes of training a resolved configuration on one of `world_size` ranks."""
    system = build_system(config, classes, "meta", fill=False)
    micro_batch = config.split_batch(world_size).micro_batch
    return int(estimate(config, system, micro_batch).total)
