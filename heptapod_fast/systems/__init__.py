"""Systems of the papers, one class each; only `build_system` knows their names."""

from __future__ import annotations

import torch

from heptapod_fast.config import Config
from heptapod_fast.systems.autoregressive import NextToken
from heptapod_fast.systems.base import Loss, System
from heptapod_fast.systems.heptapod import Heptapod
from heptapod_fast.tokenizers.base import TokenSpec

SYSTEMS: dict[str, type[System]] = {
    "heptapod": Heptapod,
    "1d-raster": NextToken,
    "1d-random": NextToken,
}


def build_system(
    config: Config,
    spec: TokenSpec,
    num_classes: int,
    device: str | torch.device = "cpu",
    attention: str = "auto",
    fill: bool = True,
) -> System:
    """The system that a resolved config describes, on `device` (meta too).

    attention: `implementation` of `ops.attention`. fill: initialise the
    parameters from config.seed; False leaves them to be loaded.
    """
    with torch.device(device):
        system = SYSTEMS[config.system](config, spec, num_classes, attention)
    if fill:
        system.initialise(config.seed)
    return system


__all__ = ["SYSTEMS", "Heptapod", "Loss", "NextToken", "System", "build_system"]
