"""The interface of every tokenizer, the shapes of tokens, and the maps between pixels and [-1, 1].

Tensor names: B images, N tokens (row-major over the grid), C channels of a continuous token.
"""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from heptapod_fast.rng import Rng
from heptapod_fast.storage import readable

NAMES = ("kl16", "vq16", "patch", "patch-vq")
DEFAULT_CODES = 128
FIXED_PATCH = 16  # pixels: the area of one token of kl16 and vq16
NO_CODE = 2**16 - 1  # what a cache holds where there is no image; no code may be equal to it
# What a cache and a run record of a tokenizer; goes into JSON.
Description: TypeAlias = dict[str, str | int | float | None]


@dataclass(frozen=True)
class TokenSpec:
    """What a model has to know of a tokenizer.

    Attributes:
        name: the tokenizer's name.
        kind: discrete (codes) or continuous (vectors).
        grid: side of the token grid.
        channels: C, length of a continuous token; 0 for discrete ones.
        vocabulary: V, number of codes; 0 for continuous ones.
        limit: continuous tokens lie in [-limit, limit]; 0 where no limit is known.
    """

    name: str
    kind: Literal["discrete", "continuous"]
    grid: int
    channels: int
    vocabulary: int
    limit: float = 0.0

    @property
    def num_tokens(self) -> int:
        """N, tokens per image."""
        return self.grid**2


@dataclass(frozen=True)
class StoredArray:
    """One array of a cache of tokens, and what must be true of its values.

    Attributes:
        dtype: float16, or uint16 for codes.
        shape: of one view of one image.
        varies: an image whose values are all the same is damage: no encoder gives that.
        is_deviation: values below zero are damage.
    """

    dtype: Literal["float16", "uint16"]
    shape: tuple[int, ...]
    varies: bool = False
    is_deviation: bool = False


def token_spec(
    name: str, image_size: int, patch_size: int | None = None, codes: int | None = None
) -> TokenSpec:
    """What a tokenizer's tokens look like; needs no weights.

    Args:
        name: kl16, vq16, patch or patch-vq.
        image_size: side of the images in pixels.
        patch_size: side of the area of one token in pixels; kl16 and vq16: 16, or None.
        codes: size of patch-vq's codebook, default 128; no meaning for the others.

    Raises:
        ValueError: unknown name, sizes that do not divide, or a setting the tokenizer has not.
    """
    if name not in NAMES:
        raise ValueError(f"unknown --tokenizer {name!r}: choose one of {', '.join(NAMES)}")
    is_fixed = name in ("kl16", "vq16")
    if is_fixed and patch_size not in (None, FIXED_PATCH):
        raise ValueError(
            f"--tokenizer {name} has a fixed patch size of {FIXED_PATCH}, found --patch-size "
            f"{patch_size}: leave --patch-size out, or use patch or patch-vq"
        )
    if is_fixed:
        patch_size = FIXED_PATCH
    if patch_size is None:
        raise ValueError(f"--tokenizer {name} needs --patch-size (4 is usual up to 32 pixels)")
    if codes is not None and name != "patch-vq":
        raise ValueError(
            f"--codes {codes} has no meaning for --tokenizer {name}; only patch-vq "
            "has a codebook of a chosen size"
        )
    codes = DEFAULT_CODES if codes is None else codes
    if name == "patch-vq" and codes < 2:
        raise ValueError(f"--codes must be 2 or more, found {codes}")
    grid = _grid(image_size, patch_size, is_fixed)
    if name == "kl16":
        return TokenSpec(name, "continuous", grid, 16, 0)
    if name == "vq16":
        return TokenSpec(name, "discrete", grid, 0, 16384)
    if name == "patch":
        return TokenSpec(name, "continuous", grid, 3 * patch_size**2, 0, limit=1.0)
    return TokenSpec(name, "discrete", grid, 0, codes)


def _grid(image_size: int, patch_size: int, is_fixed: bool) -> int:
    """Patches per side, or ValueError with the nearest sizes that divide."""
    if image_size < 1 or patch_size < 1:
        raise ValueError(
            f"--image-size and --patch-size must be 1 or more, found {image_size} and {patch_size}"
        )
    grid, rest = divmod(image_size, patch_size)
    if rest == 0:
        return grid
    sizes = [str(s * patch_size) for s in (grid, grid + 1) if s > 0]
    divisors = [p for p in range(1, image_size + 1) if image_size % p == 0]
    below = [p for p in divisors if p < patch_size]
    above = [p for p in divisors if p > patch_size]
    patches = " or ".join(str(p) for p in below[-1:] + above[:1])
    advice = "another --tokenizer" if is_fixed else f"--patch-size {patches}"
    raise ValueError(
        f"--image-size {image_size} is not a multiple of the patch size {patch_size} "
        f"(--patch-size): use --image-size {' or '.join(sizes)}, or {advice}"
    )


def to_unit(images: Tensor) -> Tensor:
    """uint8 in 0..255 -> float32 in [-1, 1], the same shape."""
    return images.float().mul_(2.0 / 255.0).sub_(1.0)


def to_uint8(images: Tensor) -> Tensor:
    """Float in [-1, 1] -> uint8, rounded to the nearest; values outside are clipped. Inverse of
    `to_unit` on its values."""
    return ((images.float() + 1.0) * 127.5).clamp_(0.0, 255.0).round_().to(torch.uint8)


class Tokenizer(ABC):
    """Images (B, 3, H, W) in [-1, 1] <-> tokens: (B, N) int64 codes, or (B, N, C) float32.

    Tokens are in row-major order over the grid. A tokenizer is frozen: it is fitted or loaded, then
    only used.

    What a cache stores of it (`stored_arrays`, `from_stored`, `has_codebook`) is asked of the
    class, so that a cache is read without weights. Here: codes of discrete tokenizers, and the
    tokens themselves of continuous ones, as a map with the channels first.

    Attributes:
        name: on the command line and in files.
        has_codebook: it is fitted on the data, and its codebook travels with caches and runs.
        constants: of `describe`, what belongs to this version: {what it is called: value}.
        spec: shape and kind of the tokens.
        image_size, patch_size: sides in pixels of an image and of the area of one token.
        device: where tokens are made; `to` moves it.
    """

    name: ClassVar[str]
    has_codebook: ClassVar[bool] = False
    constants: ClassVar[Mapping[str, float]] = {}
    spec: TokenSpec
    image_size: int
    patch_size: int
    device: torch.device = torch.device("cpu")

    @abstractmethod
    def encode(self, images: Tensor, rng: Rng | None = None, index: Tensor | None = None) -> Tensor:
        """(B, 3, H, W) float in [-1, 1] -> tokens on `device`. `rng` asks tokenizers with a
        posterior for a sample instead of its mean, keyed by `index`, (B,) global sample indices
        (default 0..B-1); the others ignore both.

        Raises:
            ValueError: images of another shape.
        """

    @abstractmethod
    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens -> (B, 3, H, W) float32, about in [-1, 1], not clipped.

        Raises:
            ValueError: tokens of another shape.
        """

    def vectors(self, tokens: Tensor) -> Tensor:
        """Tokens as vectors that can be compared: (B, N, C) float32, of codes their entries in the
        codebook.

        Raises:
            ValueError: tokens of another shape.
        """
        found = self.check_tokens(tokens)
        if self.spec.kind == "discrete":
            return self.code_vectors()[found].float()
        return found.float()

    def code_vectors(self) -> Tensor:
        """(V, C): the codebook of discrete tokens."""
        raise NotImplementedError(f"{self.spec.name} has codes and does not show its codebook")

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """The fitted tensors; empty when there are none."""

    @abstractmethod
    def settings(self) -> dict[str, int]:
        """What makes the tokenizer again, together with `state`."""

    @classmethod
    @abstractmethod
    def restore(cls, settings: dict[str, int], state: dict[str, Tensor]) -> Tokenizer:
        """The inverse of `settings` and `state`."""

    @classmethod
    def stored_arrays(cls, spec: TokenSpec) -> dict[str, StoredArray]:
        """What a cache stores, by the name of the array.

        Raises:
            ValueError: more codes than 16 bits can tell apart.
        """
        if spec.kind == "continuous":
            return {"mean": StoredArray("float16", (spec.channels, spec.grid, spec.grid))}
        if spec.vocabulary > NO_CODE:
            raise ValueError(
                f"a cache holds codes of up to {NO_CODE - 1}, {spec.name} has "
                f"{spec.vocabulary} (--codes)"
            )
        return {"codes": StoredArray("uint16", (spec.num_tokens,))}

    def to_stored(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) float in [-1, 1] -> for every stored array (B, *shape), float32 or int64."""
        tokens = self.encode(images)
        if self.spec.kind == "discrete":
            return {"codes": tokens}
        grid = self.spec.grid
        return {"mean": tokens.transpose(1, 2).unflatten(2, (grid, grid))}

    @classmethod
    def from_stored(
        cls,
        spec: TokenSpec,
        stored: dict[str, Tensor],
        rng: Rng | None = None,
        index: Tensor | None = None,
    ) -> Tensor:
        """Stored rows (B, *shape) of every array -> tokens, (B, N) int64 or (B, N, C) float32.

        `rng` asks tokenizers with a posterior for a sample instead of its mean, keyed by `index`,
        (B,) global sample indices; the others ignore both.
        """
        if spec.kind == "discrete":
            # int16 holds the same bits as uint16: the mask makes its negative numbers codes again.
            return stored["codes"].long() & NO_CODE
        return stored["mean"].flatten(2).transpose(1, 2).to(torch.float32).contiguous()

    def to(self, device: torch.device | str) -> Tokenizer:
        """Moves the tokenizer and returns it."""
        self.device = torch.device(device)
        return self

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file with the name and settings in its metadata, at once or not at
        all; `load_tokenizer` reads it."""
        from safetensors.torch import save_file

        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        # One entry: safetensors writes several in random order, and equal files should be equal.
        metadata = {"tokenizer": json.dumps([self.spec.name, self.settings()])}
        tensors = {key: value.cpu().contiguous() for key, value in self.state().items()}
        try:
            save_file(tensors, partial, metadata=metadata)
            readable(partial)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    def describe(self) -> Description:
        """What a cache records of the tokenizer."""
        return {
            "tokenizer": self.spec.name,
            **self.settings(),
            "fingerprint": self.fingerprint,
            **self.constants,
        }

    @property
    def fingerprint(self) -> str:
        """sha256 (64 hexadecimal digits) over name, settings and state."""
        digest = hashlib.sha256(
            json.dumps([self.spec.name, self.settings()], sort_keys=True).encode()
        )
        for key, value in sorted(self.state().items()):
            digest.update(f"\n{key}/{value.dtype}/{tuple(value.shape)}\n".encode())
            digest.update(value.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def check_images(self, images: Tensor) -> Tensor:
        """Returns the images on `device`; ValueError for a shape other than (B, 3, H, W)."""
        side = self.image_size
        if images.ndim != 4 or images.shape[1:] != (3, side, side):
            raise ValueError(
                f"{self.spec.name}: expected images (B, 3, {side}, {side}), found "
                f"{tuple(images.shape)}: check --image-size"
            )
        if not images.is_floating_point():
            raise ValueError(
                f"{self.spec.name}: expected float images in [-1, 1], found "
                f"{images.dtype}: use to_unit"
            )
        return images.to(self.device)

    def check_tokens(self, tokens: Tensor) -> Tensor:
        """Returns the tokens on `device`; ValueError for another shape."""
        spec = self.spec
        shape: tuple[int, ...] = (spec.num_tokens,)
        if spec.kind == "continuous":
            shape = (spec.num_tokens, spec.channels)
        if tokens.shape[1:] != shape:
            wanted = ", ".join(str(n) for n in ("B", *shape))
            raise ValueError(
                f"{spec.name}: expected tokens ({wanted}), found {tuple(tokens.shape)}"
            )
        return tokens.to(self.device)


def read_header(path: Path, name: str) -> tuple[dict[str, int], dict[str, Tensor]]:
    """Settings and tensors of a file written by `Tokenizer.save`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no safetensors file, or one of another tokenizer than `name`.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; check --tokenizer-weights")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except SafetensorError as error:
        raise ValueError(
            f"{path}: not a readable safetensors file ({error}); check --tokenizer-weights"
        ) from error
    found, settings = saved_as(metadata)
    if found != name or settings is None:
        raise ValueError(
            f"{path}: expected a saved {name} tokenizer, found "
            f"{found or 'another file'}: check --tokenizer and --tokenizer-weights"
        )
    return settings, tensors


def saved_as(metadata: dict[str, str]) -> tuple[str | None, dict[str, int] | None]:
    """Name and settings that `Tokenizer.save` wrote into a file; None where they are not."""
    stored = metadata.get("tokenizer")
    if stored is None:
        return None, None
    try:
        name, settings = json.loads(stored)
    except (TypeError, ValueError):  # an earlier version wrote the name alone
        return stored, None
    return str(name), settings if isinstance(settings, dict) else None
