"""Tokenizers: images to grids of tokens and back, behind one interface (`base.Tokenizer`).

kl16       continuous, MAR's KL-16 VAE              published weights
vq16       discrete, LlamaGen's VQ-16               published weights
patch      continuous, raw RGB patches              no weights
patch-vq   discrete, k-means codebook over patches  fitted on the data in seconds
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from heptapod_fast.tokenizers.base import (
    DEFAULT_CODES,
    NAMES,
    NO_CODE,
    Description,
    StoredArray,
    Tokenizer,
    TokenSpec,
    read_header,
    to_uint8,
    to_unit,
    token_spec,
)
from heptapod_fast.tokenizers.kl16 import KL16
from heptapod_fast.tokenizers.patch import Patch
from heptapod_fast.tokenizers.patch_vq import PatchVQ
from heptapod_fast.tokenizers.pretrained import Pretrained
from heptapod_fast.tokenizers.vq16 import VQ16
from heptapod_fast.tokenizers.weights import hint

__all__ = [
    "DEFAULT_CODES",
    "Description",
    "FITTED",
    "KL16",
    "NAMES",
    "NO_CODE",
    "PRETRAINED",
    "Patch",
    "PatchVQ",
    "Pretrained",
    "StoredArray",
    "TOKENIZERS",
    "TokenSpec",
    "Tokenizer",
    "VQ16",
    "convert_weights",
    "hint",
    "load_tokenizer",
    "to_uint8",
    "to_unit",
    "token_spec",
]

# By what they need: published weights, a codebook fitted on the data, nothing.
PRETRAINED: dict[str, type[Pretrained]] = {"kl16": KL16, "vq16": VQ16}
FITTED: dict[str, type[PatchVQ]] = {"patch-vq": PatchVQ}
TOKENIZERS: dict[str, type[Tokenizer]] = {**PRETRAINED, "patch": Patch, **FITTED}


def load_tokenizer(
    name: str,
    weights: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    **settings: int | None,
) -> Tokenizer:
    """A tokenizer that is ready to use, on the CPU.

    Args:
        name: kl16, vq16, patch or patch-vq.
        weights: kl16, vq16: the published file (`kl16.ckpt`, `vq_ds16_c2i.pt`) or a safetensors
            copy of it; patch, patch-vq: a file written by `Tokenizer.save`. Only patch needs none.
        dtype: kl16, vq16: what the convolutions run in, float32 or bfloat16 (see `Pretrained`);
            the others work in float32.
        settings: image_size and patch_size (kl16, vq16: default 256, and 16 or None; patch: needed;
            with a file written by `save`, checked against it), and codes (patch-vq, checked).

    Raises:
        FileNotFoundError: the weights do not exist.
        ValueError: unknown or missing tokenizer, settings that are missing or contradict the file,
            or a file that is damaged or of another tokenizer.
    """
    if name not in TOKENIZERS:
        raise ValueError(f"unknown --tokenizer {name!r}: choose one of {', '.join(NAMES)}")
    if name in PRETRAINED:
        return _load_pretrained(name, weights, dtype, settings)
    if weights is not None:
        return _load_saved(name, Path(weights), settings)
    if name in FITTED:
        raise ValueError(
            f"--tokenizer {name} needs --tokenizer-weights, a fitted codebook; "
            f"{FITTED[name].__name__}.fit makes one from images in seconds"
        )
    return _patch_of(settings)


def _load_pretrained(
    name: str, weights: str | Path | None, dtype: torch.dtype, settings: dict[str, int | None]
) -> Pretrained:
    """kl16 or vq16 from a published file."""
    unknown = sorted(settings.keys() - {"image_size", "patch_size"})
    if unknown:
        raise ValueError(f"--tokenizer {name} takes image_size and patch_size: unknown {unknown}")
    image_size = settings.get("image_size")
    if image_size is None:
        image_size = 256
    if not isinstance(image_size, int):
        raise ValueError(f"--image-size {image_size!r}: expected a whole number of pixels")
    token_spec(name, image_size, settings.get("patch_size"))
    if weights is None:
        raise ValueError(hint(name))
    return PRETRAINED[name].load(weights, image_size, dtype)


def _load_saved(name: str, weights: Path, settings: dict[str, int | None]) -> Tokenizer:
    """From a file that `Tokenizer.save` wrote; settings that are given must be those in it."""
    stored, tensors = read_header(weights, name)
    for key, value in settings.items():
        if value is not None and stored.get(key) != value:
            flag = "--" + key.replace("_", "-")
            raise ValueError(
                f"{weights}: the tokenizer in it has {key} {stored.get(key)}, asked "
                f"for {flag} {value}: change {flag} or --tokenizer-weights"
            )
    return TOKENIZERS[name].restore(stored, tensors)


def _patch_of(settings: dict[str, Any]) -> Patch:
    """patch, which has nothing but its sizes."""
    missing = {"image_size", "patch_size"} - settings.keys()
    unknown = settings.keys() - {"image_size", "patch_size"}
    if missing or unknown:
        raise ValueError(
            f"--tokenizer patch takes image_size and patch_size: missing "
            f"{sorted(missing)}, unknown {sorted(unknown)}"
        )
    return Patch(**settings)


def convert_weights(name: str, source: str | Path, target: str | Path) -> str:
    """Checks the published weights of kl16 or vq16 and writes them as a safetensors file (float32,
    the published names): it loads as the original does and can hold nothing but numbers.

    Args:
        name: kl16 or vq16.
        source: the published file.
        target: the new file; its folder is made, and it appears at once or not at all.

    Returns:
        `Pretrained.weights_sha256`, the same for both files.

    Raises:
        FileNotFoundError, ValueError: as `load_tokenizer`; also for a tokenizer without published
            weights.
    """
    if name not in PRETRAINED:
        raise ValueError(
            f"--tokenizer {name} has no published weights: choose one of {', '.join(PRETRAINED)}"
        )
    tokenizer = _load_pretrained(name, source, torch.float32, {})
    tokenizer.save(target)
    return tokenizer.weights_sha256
