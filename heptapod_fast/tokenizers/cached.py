"""What a cache of tokens stores, and how tokens are made from it without the tokenizer's weights.

    kl16               mean, std   (C, H, W)   unscaled moments; tokens are drawn from them
    patch              mean        (C, H, W)   the tokens themselves
    vq16, patch-vq     codes       (N,)

Tensor names: B images, N tokens, C channels, H x W the token grid.
"""

from __future__ import annotations

import torch
from torch import Tensor

from heptapod_fast.rng import Rng
from heptapod_fast.tokenizers.base import Tokenizer, TokenSpec
from heptapod_fast.tokenizers.kl16 import KL16, posterior_tokens

FLOATS, CODES = "float16", "uint16"
NO_CODE = 2**16 - 1


def stored_arrays(spec: TokenSpec) -> dict[str, tuple[str, tuple[int, ...]]]:
    """name -> (dtype, shape of one view of one image) of what a tokenizer's cache stores.

    Raises:
        ValueError: more codes than 16 bits can tell apart.
    """
    if spec.kind == "discrete":
        if spec.vocabulary > NO_CODE:
            raise ValueError(
                f"a cache holds codes of up to {NO_CODE - 1}, {spec.name} has "
                f"{spec.vocabulary} (--codes)"
            )
        return {"codes": (CODES, (spec.num_tokens,))}
    shape = (spec.channels, spec.grid, spec.grid)
    names = ("mean", "std") if spec.name == "kl16" else ("mean",)
    return {name: (FLOATS, shape) for name in names}


def to_stored(tokenizer: Tokenizer, images: Tensor) -> dict[str, Tensor]:
    """(B, 3, H, W) float in [-1, 1] -> for every stored array (B, ...) float32 or int64."""
    if isinstance(tokenizer, KL16):
        return dict(zip(("mean", "std"), tokenizer.encode_moments(images), strict=True))
    tokens = tokenizer.encode(images)
    if tokenizer.spec.kind == "discrete":
        return {"codes": tokens}
    grid = tokenizer.spec.grid
    return {"mean": tokens.transpose(1, 2).unflatten(2, (grid, grid))}


def from_stored(
    spec: TokenSpec, stored: dict[str, Tensor], rng: Rng | None = None, index: Tensor | None = None
) -> Tensor:
    """Stored rows -> tokens, (B, N) int64 or (B, N, C) float32.

    With `rng` kl16 draws a sample of the posterior, keyed by `index`, (B,) global sample indices;
    else it gives the mean (see `posterior_tokens`).
    """
    if spec.kind == "discrete":
        return stored["codes"].long() & NO_CODE  # int16 holds the same bits
    if spec.name == "kl16":
        return posterior_tokens(stored["mean"], stored["std"], rng, index)
    return stored["mean"].flatten(2).transpose(1, 2).to(torch.float32).contiguous()
