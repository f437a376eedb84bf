"""MAR's KL-16 VAE: continuous tokens of 16 channels, one for 16 x 16 pixels.

    moments = quant_conv(encoder(image));  mean, log-variance = its halves, the latter in [-30, 20]
    token   = 0.2325 (mean + std noise)    image = decoder(post_quant_conv(token / 0.2325))

(mar:models/vae.py:399-484, mar:engine_mar.py:57-65,159). 0.2325 is one over the spread of posterior
samples over ImageNet.

Tensor names: B images, C = 16 channels, H x W the token grid, N = H * W tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from heptapod_fast.rng import Rng
from heptapod_fast.tokenizers.base import StoredArray, TokenSpec
from heptapod_fast.tokenizers.pretrained import Pretrained

SCALE = 0.2325
LOG_VARIANCE = (-30.0, 20.0)
STREAM = "kl16.posterior"


def posterior_tokens(
    mean_BCHW: Tensor,
    std_BCHW: Tensor | None = None,
    rng: Rng | None = None,
    index: Tensor | None = None,
) -> Tensor:
    """Tokens from the posterior's moments, as encoded or as read from a cache.

    Args:
        mean_BCHW: (B, 16, H, W) unscaled mean, any float dtype.
        std_BCHW: (B, 16, H, W) unscaled standard deviation; needed with `rng`.
        rng: draws a sample (stream "kl16.posterior"); None gives the mean.
        index: (B,) int64 global sample indices that key the draw, default 0..B-1. A draw depends on
            (seed, step, index) and the place in the grid, on nothing else.

    Returns:
        (B, N, 16) float32, scaled by 0.2325.

    Raises:
        ValueError: `rng` without `std_BCHW`, or an index of another shape.
    """
    mean_BNC = mean_BCHW.float().flatten(2).transpose(1, 2)
    if rng is None:
        return (mean_BNC * SCALE).contiguous()
    if std_BCHW is None:
        raise ValueError("kl16: a sample of the posterior needs its standard deviation")
    batch, count, channels = mean_BNC.shape
    if index is None:
        index = torch.arange(batch)
    if index.shape != (batch,) or index.is_floating_point():
        raise ValueError(
            f"kl16: expected index ({batch},) of integers, found {index.dtype} {tuple(index.shape)}"
        )
    noise = rng.normal(STREAM, index.to(mean_BCHW.device).long(), count * channels)
    noise_BNC = noise.view(batch, count, channels)
    std_BNC = std_BCHW.float().flatten(2).transpose(1, 2)
    return ((mean_BNC + std_BNC * noise_BNC) * SCALE).contiguous()


class KL16(Pretrained):
    """Continuous tokens (B, N, 16) float32 of about unit variance; see `Pretrained` for arguments,
    dtypes and chunks.

    `encode` gives the posterior's mean; MAR trains on a fresh sample for every visit of an image,
    which `rng` asks for.
    """

    name = "kl16"
    constants = {"scale": SCALE}

    def encode_moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) float in [-1, 1] -> unscaled mean and standard deviation, each
        (B, 16, H / 16, W / 16) float32: what caches store.

        Raises:
            ValueError: images of another shape or dtype.
        """
        mean_BCHW, log_variance_BCHW = self._encoded(images).chunk(2, dim=1)
        return mean_BCHW.contiguous(), log_variance_BCHW.clamp(*LOG_VARIANCE).mul_(0.5).exp_()

    def encode(self, images: Tensor, rng: Rng | None = None, index: Tensor | None = None) -> Tensor:
        """(B, 3, H, W) float in [-1, 1] -> (B, N, 16) float32.

        With `rng` a sample of the posterior, keyed by `index`, (B,) int64 global sample indices
        (default 0..B-1, so that the next batch needs another index or `rng.at(step)`); else its
        mean. See `posterior_tokens`.

        Raises:
            ValueError: images or index of another shape or dtype.
        """
        return posterior_tokens(*self.encode_moments(images), rng, index)

    def decode(self, tokens: Tensor) -> Tensor:
        """(B, N, 16) float -> (B, 3, H, W) float32, not clipped.

        Raises:
            ValueError: tokens of another shape, or integers.
        """
        tokens_BNC = self.check_tokens(tokens)
        if not tokens_BNC.is_floating_point():
            raise ValueError(f"kl16: expected float tokens, found {tokens_BNC.dtype}")
        latents_BNC = tokens_BNC.detach().float() / SCALE
        grid = self.spec.grid
        return self._decoded(latents_BNC.transpose(1, 2).unflatten(2, (grid, grid)))

    @classmethod
    def stored_arrays(cls, spec: TokenSpec) -> dict[str, StoredArray]:
        """The unscaled moments of the posterior, from which every visit of an image draws anew."""
        shape = (spec.channels, spec.grid, spec.grid)
        return {
            "mean": StoredArray("float16", shape, varies=True),
            "std": StoredArray("float16", shape, varies=True, is_deviation=True),
        }

    def to_stored(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) float in [-1, 1] -> mean and std, each (B, 16, H / 16, W / 16) float32."""
        mean_BCHW, std_BCHW = self.encode_moments(images)
        return {"mean": mean_BCHW, "std": std_BCHW}

    @classmethod
    def from_stored(
        cls,
        spec: TokenSpec,
        stored: dict[str, Tensor],
        rng: Rng | None = None,
        index: Tensor | None = None,
    ) -> Tensor:
        """Stored moments -> (B, N, 16) float32: a sample of the posterior with `rng`, keyed by
        `index`, else its mean (`posterior_tokens`)."""
        return posterior_tokens(stored["mean"], stored["std"], rng, index)
