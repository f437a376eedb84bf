"""Raw RGB patches as continuous tokens: nothing is learned and nothing is lost."""

from __future__ import annotations

from torch import Tensor

from heptapod_fast.rng import Rng
from heptapod_fast.tokenizers.base import Tokenizer, token_spec


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """(B, 3, H, W) -> (B, N, 3 * p * p), any dtype.

    Tokens are in row-major order over the grid; within a token the channels are ordered colour
    (R, G, B), then row, then column, as in a convolution's weight and MAR's `patchify`.
    """
    batch, colours, height, width = images.shape
    p = patch_size
    rows = height // p
    columns = width // p
    cut = images.reshape(batch, colours, rows, p, columns, p)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, colours * p * p)


def unpatchify(tokens: Tensor, patch_size: int) -> Tensor:
    """(B, N, 3 * p * p), N a square -> (B, 3, H, W); the inverse of `patchify`."""
    batch, count, _ = tokens.shape
    p = patch_size
    grid = round(count**0.5)
    cut = tokens.reshape(batch, grid, grid, 3, p, p)
    return cut.permute(0, 3, 1, 4, 2, 5).reshape(batch, 3, grid * p, grid * p)


class Patch(Tokenizer):
    """Continuous tokens of 3 * p * p raw pixel values in [-1, 1]; decode is the exact inverse of
    encode and does not clip.

    Raises:
        ValueError: patch_size does not divide image_size.
    """

    name = "patch"

    def __init__(self, image_size: int, patch_size: int) -> None:
        self.spec = token_spec(self.name, image_size, patch_size)
        self.image_size = image_size
        self.patch_size = patch_size

    def encode(self, images: Tensor, rng: Rng | None = None, index: Tensor | None = None) -> Tensor:
        """(B, 3, H, W) -> (B, N, 3 * p * p) float32; `rng` is ignored."""
        return patchify(self.check_images(images), self.patch_size).float()

    def decode(self, tokens: Tensor) -> Tensor:
        """(B, N, 3 * p * p) -> (B, 3, H, W) float32."""
        return unpatchify(self.check_tokens(tokens), self.patch_size).float()

    def state(self) -> dict[str, Tensor]:
        """Empty: nothing is fitted."""
        return {}

    def settings(self) -> dict[str, int]:
        """image_size and patch_size in pixels."""
        return {"image_size": self.image_size, "patch_size": self.patch_size}

    @classmethod
    def restore(cls, settings: dict[str, int], state: dict[str, Tensor]) -> Patch:
        """The inverse of `settings`; `state` is empty."""
        return cls(**settings)
