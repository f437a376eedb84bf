"""From flags and from config.json to a `Config`.

The registry of systems is an argument: the classes of settings are theirs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from heptapod_fast.config.config import GROUPS, VERSION, Config
from heptapod_fast.config.settings import flag
from heptapod_fast.config.system import SystemSettings

Registry = Mapping[str, type[SystemSettings]]


def settings_class(system: str, registry: Registry) -> type[SystemSettings]:
    """ValueError lists the systems there are."""
    if system not in registry:
        raise ValueError(f"--system {system}: expected one of {', '.join(registry)}")
    return registry[system]


def from_flags(registry: Registry, size: str, system: str, flags: Mapping[str, Any]) -> Config:
    """A configuration, not resolved yet, from the flags that were given.

    Args:
        registry: {system: its class of settings}.
        size, system: as on the command line.
        flags: {setting: value}; None stands for "not given".

    Raises:
        ValueError: no such system, or a flag that it does not have; says which systems do.
    """
    model = settings_class(system, registry)
    classes = GROUPS | {"model": model}
    given = {name: value for name, value in flags.items() if value is not None}
    groups: dict[str, Any] = {}
    for group, settings in classes.items():
        groups[group] = settings(
            **{name: given.pop(name) for name in settings.names() if name in given}
        )
    for name, value in given.items():
        raise ValueError(foreign(registry, system, name, value))
    return Config(size=size, system=system, **groups)


def foreign(registry: Registry, system: str, name: str, value: Any) -> str:
    """What to say of a setting that a system does not have."""
    others = [other for other, settings in registry.items() if name in settings.names()]
    if not others:
        return f"{flag(name)}: no system has such a setting"
    return (
        f"{flag(name)} {value} belongs to --system {', '.join(others)}; --system {system} has no "
        "such setting: leave it out, or choose another --system"
    )


# --------------------------------------------------------------------------------- config.json


def from_json(registry: Registry, text: str) -> Config:
    """Inverse of `Config.to_json`, also of what earlier versions wrote.

    Raises:
        ValueError: a newer version, or settings that this version does not know.
    """
    plain = json.loads(text)
    if not isinstance(plain, dict):
        raise ValueError(f"expected an object of settings, found {type(plain).__name__}")
    version = plain.pop("version", 1)
    if version == 1:
        plain = from_version_1(registry, plain)
    elif version != VERSION:
        raise ValueError(
            f"it has version {version!r}, this heptapod_fast reads 1 to {VERSION}: update it"
        )
    model = settings_class(str(plain.get("system")), registry)
    classes = GROUPS | {"model": model}
    absent = [name for name in ("size", "system", *classes) if name not in plain]
    if absent:
        raise ValueError(f"it does not say {', '.join(absent)}: restore it from a copy")
    groups: dict[str, Any] = {}
    for name, settings in classes.items():
        groups[name] = settings.from_plain(plain.pop(name))
        groups[name].check()
    unknown = sorted(set(plain) - {"size", "system"})
    if unknown:
        raise ValueError(f"groups that this version does not know: {', '.join(unknown)}")
    return Config(size=plain["size"], system=plain["system"], **groups)


def from_version_1(registry: Registry, flat: dict[str, Any]) -> dict[str, Any]:
    """Version 1 had all settings of all systems in one object; those of others were null.

    Raises:
        ValueError: a setting that version 1 did not have.
    """
    size = flat.pop("size")
    system = flat.pop("system")
    classes = GROUPS | {"model": settings_class(system, registry)}
    plain: dict[str, Any] = {"size": size, "system": system}
    for group, settings in classes.items():
        plain[group] = {name: flat.pop(name) for name in settings.names() if name in flat}
    left = {name: value for name, value in flat.items() if value is not None}
    # What is left belongs to other systems and was null.
    known = {name for settings in registry.values() for name in settings.names()}
    unknown = sorted(set(flat) - known) + sorted(set(left) & known)
    if unknown:
        raise ValueError(f"settings that this version does not know: {', '.join(unknown)}")
    return plain


# Both lists name directories that exist: they never change.
# What version 1 counted as "may change on resuming": its directories' names are made of the rest.
_FREE_IN_VERSION_1 = frozenset(
    "out images checkpoint_every keep_checkpoints sample_every log_every device precision kernels "
    "attention adamw_ema micro_batch max_broken max_skips minutes allow_data_change cache_mode "
    "tokenizer_weights".split()
)
_NAMES_IN_VERSION_1 = frozenset(
    "size system data tokenizer tokenizer_weights image_size patch_size codes num_classes "
    "logogram_count flip max_broken decoder allow_upscale depth width heads head head_depth window "
    "density steps loss_weight diffusion_blocks diffusion_width diffusion_repeat diffusion_loss "
    "dropout embedding_std images batch micro_batch lr_per_256 lr_schedule warmup weight_decay "
    "beta1 beta2 clip ema seed out checkpoint_every keep_checkpoints sample_every log_every "
    "minutes max_skips allow_data_change cache_mode device precision kernels attention "
    "adamw_ema".split()
)


def run_dir_of_version_1(config: Config) -> str:
    """The directory that version 1 would have named, so that the same command finds its run."""
    flat: dict[str, Any] = {"size": config.size, "system": config.system}
    for group in config.groups.values():
        flat |= vars(group)
    identity = {name: flat.get(name) for name in _NAMES_IN_VERSION_1 - _FREE_IN_VERSION_1}
    text = json.dumps(identity, sort_keys=True)
    return f"runs/{config.name()}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
