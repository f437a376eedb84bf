"""Systems of the papers, one class each.

`SYSTEMS` is the only place that knows their names; a new system is a class and an entry here
(docs/add-a-system.md).
"""

from __future__ import annotations

from typing import Any

import torch

from heptapod_fast.config import Config, reading
from heptapod_fast.ops.dispatch import AUTO, Operators
from heptapod_fast.systems.autoregressive import RandomOrder, RasterOrder
from heptapod_fast.systems.base import Loss, Phase, System
from heptapod_fast.systems.heptapod import Heptapod
from heptapod_fast.systems.llamagen import LlamaGen, NextPatch
from heptapod_fast.systems.sar import Sar
from heptapod_fast.tokenizers import TokenSpec

SYSTEMS: dict[str, type[System]] = {
    "heptapod": Heptapod,
    "1d-raster": RasterOrder,
    "1d-random": RandomOrder,
    "llamagen": LlamaGen,
    "npp": NextPatch,
    "sar": Sar,
}
DEFAULT = "heptapod"


def settings_registry() -> reading.Registry:
    """{system: its class of settings}."""
    return {name: system.Settings for name, system in SYSTEMS.items()}


def draft(size: str, system: str = DEFAULT, **flags: Any) -> Config:
    """A configuration from flags by name, not resolved yet (`Config.resolve`).

    Raises:
        ValueError: no such system, or a flag that it does not have.
    """
    return reading.from_flags(settings_registry(), size, system, flags)


def configure(size: str, system: str = DEFAULT, **flags: Any) -> Config:
    """A resolved configuration: configure("tiny", density=4, batch=32).

    Raises:
        ValueError: a setting that cannot be, or that contradicts another; names the flag.
    """
    return draft(size, system, **flags).resolve()


def read_config(text: str) -> Config:
    """The configuration in a config.json; ValueError if this version cannot read it."""
    return reading.from_json(settings_registry(), text)


def build_system(
    config: Config,
    num_classes: int,
    device: str | torch.device = "cpu",
    operators: Operators = AUTO,
    fill: bool = True,
) -> System:
    """The system that a resolved configuration describes.

    Args:
        config: resolved.
        num_classes: labels are 0..num_classes-1.
        device: where its parameters are; meta too.
        operators: which implementation each operation is called with.
        fill: initialise the parameters from the seed; False leaves them to be loaded.
    """
    with torch.device(device):
        system = SYSTEMS[config.system](config.model, config.spec, num_classes, operators)
    if fill:
        system.initialise(config.recipe.seed)
    return system


__all__ = [
    "DEFAULT",
    "SYSTEMS",
    "Heptapod",
    "LlamaGen",
    "Loss",
    "NextPatch",
    "Phase",
    "RandomOrder",
    "RasterOrder",
    "Sar",
    "System",
    "TokenSpec",
    "build_system",
    "configure",
    "draft",
    "read_config",
]
