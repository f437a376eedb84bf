"""What follows from the settings given, and which settings contradict each other.

Works on a dictionary of the fields of `Config`; every refusal is a ValueError that names the flag.
"""

from __future__ import annotations

import dataclasses
import math
import os
from typing import get_args, get_type_hints

from heptapod_fast.config import CONTINUOUS, PRESETS, Config, Preset, flag, is_cache
from heptapod_fast.tokenizers.base import DEFAULT_CODES, token_spec

_HEAD_FLAGS = ("head", "head_depth", "window", "density", "steps", "loss_weight")
_DIFFUSION_FLAGS = ("diffusion_blocks", "diffusion_width", "diffusion_repeat", "diffusion_loss")


def resolve(config: Config) -> Config:
    """`config` with every None replaced by what follows from the size and the other settings."""
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(Config)}
    _refuse_unknown(values)
    _refuse_absurd(values)
    _refuse_foreign(values)
    preset = PRESETS[config.size]
    if values["data"] not in (None, "", "logograms", "synthetic"):
        values["data"] = os.path.normpath(values["data"])  # one run, however its data is spelt
    if is_cache(values["data"]):
        _follow_cache(values)
    for name, default in preset.defaults.items():
        if values[name] is None:
            values[name] = default
    _resolve_tokens(values)
    _resolve_model(values, preset)
    _resolve_recipe(values)
    return dataclasses.replace(config, **values)


def _refuse(values: dict, names: tuple[str, ...], why: str) -> None:
    for name in names:
        if values[name] is not None:
            raise ValueError(f"{flag(name)} {values[name]} {why}")


def _refuse_unknown(values: dict) -> None:
    """Names that are not among the choices of their setting."""
    for name, hint in get_type_hints(Config).items():
        choices = [
            c for part in (hint, *get_args(hint)) for c in get_args(part) if isinstance(c, str)
        ]
        if choices and values[name] is not None and values[name] not in choices:
            raise ValueError(f"{flag(name)} {values[name]}: expected one of {', '.join(choices)}")


def _refuse_foreign(values: dict) -> None:
    """Flags that mean nothing for the chosen system."""
    if values["system"] != "heptapod":
        _refuse(
            values, _HEAD_FLAGS, f"belongs to the 2D head; --system {values['system']} has none"
        )


def _follow_cache(values: dict) -> None:
    """What a cache was made with is not asked again; whether it fits is checked when it is used."""
    follows = ("tokenizer", "image_size", "patch_size", "codes", "flip")
    if values["tokenizer"] in ("kl16", "vq16", "patch"):
        follows = tuple(name for name in follows if name != "codes")
    if all(values[name] is not None for name in follows):
        return
    from heptapod_fast.data.cache_format import open_cache, refuse_other

    cache = open_cache(values["data"])
    refuse_other(cache, values)
    about = cache.manifest["tokenizer"] | {"flip": cache.views == 2}
    for name in follows:
        if values[name] is None:
            values[name] = about.get(name)


def _resolve_tokens(values: dict) -> None:
    tokenizer = values["tokenizer"]
    if values["tokenizer"] in ("kl16", "vq16"):
        values["patch_size"] = 16 if values["patch_size"] is None else values["patch_size"]
    elif values["patch_size"] is None:
        values["patch_size"] = 16 if values["image_size"] >= 128 else 4
    if tokenizer == "patch-vq":
        values["codes"] = DEFAULT_CODES if values["codes"] is None else values["codes"]
    else:
        _refuse(
            values, ("codes",), f"sets the codebook of patch-vq, not of --tokenizer {tokenizer}"
        )
    if tokenizer == "patch":
        _refuse(values, ("tokenizer_weights",), "given, but --tokenizer patch has no weights")
    if tokenizer not in CONTINUOUS:
        _refuse(values, _DIFFUSION_FLAGS, f"needs continuous tokens; {tokenizer} is discrete")
    if values["data"] != "logograms":
        _refuse(values, ("logogram_count",), "needs --data logograms")
    elif values["logogram_count"] is None:
        values["logogram_count"] = 50_000
    if values["data"] == "synthetic" and values["num_classes"] is None:
        values["num_classes"] = 1000
    if values["flip"] is None:
        values["flip"] = (
            tokenizer in ("kl16", "vq16")
            and values["image_size"] == 256
            and values["size"] != "tiny"
            and values["data"] != "synthetic"
        )
    elif values["flip"] and values["data"] == "synthetic":
        raise ValueError("--flip: synthetic tokens have no images to mirror")
    for name in ("image_size", "patch_size", "num_classes", "logogram_count"):
        if values[name] is not None and values[name] < 1:
            raise ValueError(f"{flag(name)} {values[name]}: expected at least 1")
    # Refuses sizes that do not divide, with the nearest that do.
    token_spec(tokenizer, values["image_size"], values["patch_size"], values["codes"])


def _resolve_model(values: dict, preset: Preset) -> None:
    total = 2 * preset.depth
    grid = values["image_size"] // values["patch_size"]
    if values["system"] == "heptapod":
        if values["head_depth"] is None:
            values["head_depth"] = preset.depth
        if values["depth"] is None:
            values["depth"] = total - values["head_depth"]
        if values["depth"] < 1 or values["head_depth"] < 1:
            raise ValueError(
                f"--head-depth {values['head_depth']}: expected 1 to {total - 1}, so that the "
                f"backbone keeps a block (or give --depth too)"
            )
        _resolve_head(values, grid)
    else:
        # Same parameters as Heptapod's backbone and head together.
        values["depth"] = total if values["depth"] is None else values["depth"]
        values["density"] = None
    for name in ("width", "heads"):
        values[name] = getattr(preset, name) if values[name] is None else values[name]
    for name in ("depth", "width", "heads"):
        if values[name] < 1:
            raise ValueError(f"{flag(name)} {values[name]}: expected at least 1")
    if values["width"] % values["heads"]:
        raise ValueError(
            f"--width {values['width']} is not a multiple of --heads {values['heads']}"
        )
    if values["tokenizer"] in CONTINUOUS:
        for name in ("diffusion_blocks", "diffusion_width"):
            values[name] = getattr(preset, name) if values[name] is None else values[name]
        if values["diffusion_repeat"] is None:
            values["diffusion_repeat"] = 4
        for name in ("diffusion_blocks", "diffusion_width", "diffusion_repeat"):
            if values[name] < 1:
                raise ValueError(f"{flag(name)} {values[name]}: expected at least 1")
        values["diffusion_loss"] = values["diffusion_loss"] or "mse+vb"
    if values["embedding_std"] <= 0:
        raise ValueError(f"--embedding-std {values['embedding_std']}: expected more than 0")
    if not 0.0 <= values["dropout"] < 1.0:
        raise ValueError(f"--dropout {values['dropout']}: expected 0 <= P < 1")


def _resolve_head(values: dict, grid: int) -> None:
    tokens = grid * grid
    if values["head"] is None:
        values["head"] = "local" if values["window"] not in (None, tokens) else "global"
    if values["head"] == "global":
        if values["window"] not in (None, tokens):
            raise ValueError(
                f"--window {values['window']} contradicts --head global, whose window "
                f"is the whole grid of {tokens} tokens; use --head local"
            )
        values["window"] = tokens
    else:
        sides = [s for s in range(1, grid) if grid % s == 0]
        windows = [s * s for s in sides]
        if not windows:
            raise ValueError(f"--head local: a {grid}x{grid} grid has no smaller windows")
        if values["window"] is None:
            values["window"] = min(windows, key=lambda w: abs(math.log(w / (tokens / 4))))
        if values["window"] not in windows:
            raise ValueError(
                f"--window {values['window']}: a {grid}x{grid} grid divides into "
                f"windows of {', '.join(map(str, windows))} tokens"
            )
    if not 1 <= values["density"] <= tokens:
        raise ValueError(
            f"--density {values['density']}: expected 1 to {tokens} steps per sequence"
        )
    values["steps"] = values["steps"] or "antithetic"
    values["loss_weight"] = values["loss_weight"] or "position"


# What no machine can do; larger values would hang before they fail.
_LIMITS = {
    "image_size": 2**14,
    "depth": 2**10,
    "head_depth": 2**10,
    "width": 2**16,
    "batch": 2**22,
    "codes": 2**20,
    "diffusion_blocks": 2**10,
    "diffusion_width": 2**16,
}


def _refuse_absurd(values: dict) -> None:
    """Numbers that are not finite, or beyond every machine."""
    for name, value in values.items():
        numbers = value if isinstance(value, tuple) else (value,)
        if any(isinstance(n, float) and not math.isfinite(n) for n in numbers):
            raise ValueError(f"{flag(name)} {value}: expected a finite number")
        if name in _LIMITS and value is not None and value > _LIMITS[name]:
            raise ValueError(f"{flag(name)} {value}: expected at most {_LIMITS[name]:,}")


def _resolve_recipe(values: dict) -> None:
    for name in (
        "images",
        "batch",
        "micro_batch",
        "checkpoint_every",
        "keep_checkpoints",
        "log_every",
    ):
        if values[name] is not None and values[name] < 1:
            raise ValueError(f"{flag(name)} {values[name]}: expected at least 1")
    for name in ("sample_every", "max_skips", "max_broken"):
        if values[name] < 0:
            raise ValueError(f"{flag(name)} {values[name]}: expected 0 or more")
    for name in ("beta1", "beta2"):
        if not 0.0 <= values[name] < 1.0:
            raise ValueError(f"{flag(name)} {values[name]}: expected 0 <= B < 1")
    if values["batch"] > values["images"]:
        raise ValueError(
            f"--batch {values['batch']} is more than --images {values['images']}: "
            "a run has at least one step"
        )
    if values["minutes"] is not None and not values["minutes"] > 0:
        raise ValueError(f"--minutes {values['minutes']}: expected more than 0")
    if not 0.0 <= values["warmup"] < 1.0:
        raise ValueError(f"--warmup {values['warmup']}: expected a share 0 <= W < 1 of the images")
    if values["clip"] < 0 or values["lr_per_256"] <= 0 or values["weight_decay"] < 0:
        raise ValueError("--clip and --weight-decay: expected 0 or more; --lr-per-256: more than 0")
    if not all(0.0 <= d < 1.0 for d in values["ema"]):
        raise ValueError(f"--ema {values['ema']}: expected decays 0 <= D < 1")
    if len(set(values["ema"])) != len(values["ema"]):
        raise ValueError(f"--ema {values['ema']}: a decay is named twice")
    if not 0 <= values["seed"] < 2**63:
        raise ValueError(f"--seed {values['seed']}: expected 0 to 2**63 - 1")


def share_of_batch(config: Config, world_size: int) -> tuple[int, int]:
    """(sequences per rank, micro-batches per step) of a resolved config.

    Raises ValueError naming --batch or --micro-batch when they do not divide, or when antithetic
    pairs would be split.
    """
    batch, micro = config.batch, config.micro_batch
    if batch % world_size:
        raise ValueError(
            f"--batch {batch} does not divide over {world_size} ranks: the nearest "
            f"are {batch // world_size * world_size} and "
            f"{-(-batch // world_size) * world_size}"
        )
    share = batch // world_size
    divisors = [d for d in range(1, share + 1) if share % d == 0]
    pairs = config.steps == "antithetic"
    if micro is None:
        fitting = [
            d for d in divisors if d <= PRESETS[config.size].micro_batch and not (pairs and d % 2)
        ]
        micro = max(fitting, default=share)
    if share % micro:
        nearest = sorted(sorted(divisors, key=lambda d: abs(d - micro))[:2])
        raise ValueError(
            f"--micro-batch {micro} does not divide the {share} sequences of a rank: "
            f"the nearest are {' and '.join(map(str, nearest))}"
        )
    if pairs and micro % 2:
        raise ValueError(
            f"a micro-batch of {micro} is odd, but --steps antithetic works on pairs: "
            "use an even --micro-batch (and an even --batch per rank), or "
            "--steps uniform"
        )
    return share, share // micro
