"""Settings of a run, in groups, each with its rules beside its fields."""

from heptapod_fast.config.config import BatchSplit, Config
from heptapod_fast.config.data import DataSettings, is_cache
from heptapod_fast.config.recipe import RecipeSettings
from heptapod_fast.config.run import RunSettings
from heptapod_fast.config.settings import Settings, decided, flag
from heptapod_fast.config.system import AttentionUse, Size, SystemSettings

__all__ = [
    "AttentionUse",
    "BatchSplit",
    "Config",
    "DataSettings",
    "RecipeSettings",
    "RunSettings",
    "Settings",
    "Size",
    "SystemSettings",
    "flag",
    "decided",
    "is_cache",
]
