"""Tokenizers: images to grids of tokens and back, behind one interface (`base.Tokenizer`).

    patch      continuous, raw RGB patches              no weights
    patch-vq   discrete, k-means codebook over patches  fitted on the data in seconds

`token_spec` also describes the 16-fold convolutional tokenizers `kl16` and `vq16`, whose encoders
are not part of this version, so that models can be sized and timed for them.
"""

from __future__ import annotations

from pathlib import Path

from heptapod_fast.tokenizers.base import (
    DEFAULT_CODES,
    NAMES,
    Tokenizer,
    TokenSpec,
    read_header,
    to_uint8,
    to_unit,
    token_spec,
)
from heptapod_fast.tokenizers.patch import Patch
from heptapod_fast.tokenizers.patch_vq import PatchVQ

__all__ = ["DEFAULT_CODES", "NAMES", "Patch", "PatchVQ", "TokenSpec", "Tokenizer",
           "load_tokenizer", "to_uint8", "to_unit", "token_spec"]

_LOADED = {"patch": Patch, "patch-vq": PatchVQ}


def load_tokenizer(name: str, weights: str | Path | None = None, **settings: int) -> Tokenizer:
    """A tokenizer that is ready to use.

    Args:
        name: patch or patch-vq.
        weights: a file written by `Tokenizer.save`; needed by patch-vq.
        settings: image_size and patch_size (patch; with weights, checked against the file), and
            codes (patch-vq, checked against the file).

    Raises:
        FileNotFoundError: the weights do not exist.
        ValueError: unknown or missing tokenizer, settings that are missing or contradict the file,
            or a file of another tokenizer.
    """
    if name in ("kl16", "vq16"):
        raise ValueError(f"the encoder and decoder of --tokenizer {name} are not part of this "
                         f"version: use one of {', '.join(_LOADED)}, or --data synthetic to "
                         "measure speed")
    if name not in _LOADED:
        raise ValueError(f"unknown --tokenizer {name!r}: choose one of {', '.join(_LOADED)}")
    if weights is None:
        if name == "patch-vq":
            raise ValueError("--tokenizer patch-vq needs --tokenizer-weights, a fitted codebook; "
                             "PatchVQ.fit makes one from images in seconds")
        missing = {"image_size", "patch_size"} - settings.keys()
        unknown = settings.keys() - {"image_size", "patch_size"}
        if missing or unknown:
            raise ValueError(f"--tokenizer {name} takes image_size and patch_size: missing "
                             f"{sorted(missing)}, unknown {sorted(unknown)}")
        return Patch(**settings)
    weights = Path(weights)
    stored, tensors = read_header(weights, name)
    for key, value in settings.items():
        if value is not None and stored.get(key) != value:
            flag = "--" + key.replace("_", "-")
            raise ValueError(f"{weights}: the tokenizer in it has {key} {stored.get(key)}, asked "
                             f"for {flag} {value}: change {flag} or --tokenizer-weights")
    return _LOADED[name].restore(stored, tensors)
