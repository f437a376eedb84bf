"""Sources of training batches: tokens and labels for global sample indices.

Tensor names: B samples, N tokens per image, C channels of a continuous token.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from heptapod_fast.data.order import sample_ids
from heptapod_fast.data.sources import ImageSource
from heptapod_fast.rng import Rng
from heptapod_fast.tokenizers import Tokenizer, TokenSpec, to_unit

ENCODE_BATCH = 256
POOL = 4096  # sequences of synthetic tokens
POOL_VALUES = 2**22  # at most in all of them: 16 MB in float32


@dataclass
class Batch:
    """One batch of training samples, all tensors on one device.

    Attributes:
        tokens: (B, N) int64 codes or (B, N, C) float32.
        labels: (B,) int64.
        index: (B,) int64, the global sample indices that key all randomness of these samples.
    """

    tokens: Tensor
    labels: Tensor
    index: Tensor

    @classmethod
    def zeros(cls, spec: TokenSpec, size: int, device: torch.device) -> Batch:
        """A batch of so many sequences whose numbers are all 0."""
        shape: tuple[int, ...] = (size, spec.num_tokens)
        dtype = torch.int64
        if spec.kind == "continuous":
            shape = (*shape, spec.channels)
            dtype = torch.float32
        tokens = torch.zeros(shape, dtype=dtype, device=device)
        labels = torch.zeros(size, dtype=torch.int64, device=device)
        return cls(tokens, labels, torch.zeros_like(labels))

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device; copies do not block where the memory allows it."""
        return Batch(
            self.tokens.to(device, non_blocking=True),
            self.labels.to(device, non_blocking=True),
            self.index.to(device, non_blocking=True),
        )

    def __len__(self) -> int:
        return len(self.index)


@runtime_checkable
class TokenSource(Protocol):
    """What the training loop reads.

    Attributes:
        num_images: images per epoch.
        num_classes: labels are in 0..num_classes-1.
        class_names: one name per class.
        fingerprint: sha256 (64 hexadecimal digits) over all that defines the tokens.
    """

    num_images: int
    num_classes: int
    class_names: tuple[str, ...]
    fingerprint: str

    def batch(self, index: Tensor) -> Batch:
        """index: (B,) int64 global sample indices, 0 or more -> the batch; a pure function."""
        ...

    def check(self) -> None:
        """Raises if a batch given since the last call held no data; may wait for the device."""
        ...


class TokenizedImages:
    """An `ImageSource` seen through a tokenizer.

    Discrete tokenizers encode every image once at construction (and its mirror image with `flip`);
    the codes stay on `device` as int16 or int32. Continuous ones encode per batch from
    `source.images`, which keeps 8-bit pixels at most; where they have a posterior, every visit of
    an image draws a sample of its own (mar:engine_mar.py:57-65).

    Args:
        source: the images; its image_size must be the tokenizer's.
        tokenizer: moved to `device`.
        seed: seed of the order (`sample_ids`) and of the flips (stream "flip").
        flip: mirror every sample left to right with probability 1/2.
        device: where batches are returned.
        progress: called as progress(images done, images in all) while encoding.

    Raises:
        ValueError: image sizes of source and tokenizer differ.
    """

    def __init__(
        self,
        source: ImageSource,
        tokenizer: Tokenizer,
        seed: int,
        flip: bool = False,
        device: torch.device | str = "cpu",
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        if source.image_size != tokenizer.image_size:
            raise ValueError(
                f"{source.name} has images of {source.image_size} pixels, the "
                f"tokenizer {tokenizer.spec.name} takes {tokenizer.image_size}: "
                "change --image-size or --tokenizer-weights"
            )
        self.source = source
        self.tokenizer = tokenizer.to(device)
        self.seed = seed
        self.flip = flip
        self.device = torch.device(device)
        self.num_images = len(source)
        self.class_names = source.class_names
        self.num_classes = len(source.class_names)
        identity = f"{source.fingerprint}/{tokenizer.fingerprint}/flip={int(flip)}"
        self.fingerprint = hashlib.sha256(identity.encode()).hexdigest()
        self._codes: Tensor | None = None
        if tokenizer.spec.kind == "discrete":
            self._codes = self._encode_all(progress)

    def batch(self, index: Tensor) -> Batch:
        """(B,) int64 global sample indices -> the batch on `device`; a pure function."""
        index = index.detach().to("cpu").long()
        ids = sample_ids(index, self.num_images, self.seed)
        mirrored = torch.zeros_like(index)
        if self.flip:
            mirrored = Rng(self.seed).bits("flip", index, 1)[:, 0] & 1
        if self._codes is None:
            images = self.source.images(ids)
            images = torch.where(mirrored.bool()[:, None, None, None], images.flip(-1), images)
            tokens = self._encode(images, Rng(self.seed), index)
        else:
            rows = (mirrored * self.num_images + ids).to(self.device, non_blocking=True)
            tokens = self._codes.index_select(0, rows).long()
        labels = self.source.labels[ids]
        return Batch(tokens, labels, index).to(self.device)

    def check(self) -> None:
        """Nothing to find: files that cannot be read are found when they are."""

    def _encode(
        self, images: Tensor, rng: Rng | None = None, index: Tensor | None = None
    ) -> Tensor:
        images = to_unit(images.to(self.device, non_blocking=True))
        with torch.no_grad():
            return self.tokenizer.encode(images, rng, index)

    def _encode_all(self, progress: Callable[[int, int], None] | None) -> Tensor:
        """(views * n, N) codes: all images, then all mirror images."""
        spec = self.tokenizer.spec
        count = self.num_images
        compact = torch.int16 if spec.vocabulary <= 2**15 else torch.int32
        views = 2 if self.flip else 1
        codes = torch.empty(views * count, spec.num_tokens, dtype=compact, device=self.device)
        for start in range(0, count, ENCODE_BATCH):
            stop = min(start + ENCODE_BATCH, count)
            images = self.source.images(torch.arange(start, stop))
            codes[start:stop] = self._encode(images).to(compact)
            if self.flip:
                codes[count + start : count + stop] = self._encode(images.flip(-1)).to(compact)
            if progress is not None:
                progress(stop, count)
        return codes


class SyntheticTokens:
    """Random tokens of a tokenizer's shape, for measuring speed.

    Tokens (uniform codes, or standard normal channels) come from a fixed pool of up to 4096
    sequences (4 million values), so that they cost one row gather; which sequence a sample gets,
    and its label, are pure functions of (seed, index).

    Args:
        tokenizer_spec: shape and kind of the tokens.
        num_classes: labels are uniform on 0..num_classes-1.
        seed: seed of pool, rows and labels.
        num_images: length of an epoch as shown in logs; default ImageNet's.
        device: where batches are returned.
    """

    def __init__(
        self,
        tokenizer_spec: TokenSpec,
        num_classes: int,
        seed: int,
        num_images: int = 1_281_167,
        device: torch.device | str = "cpu",
    ) -> None:
        if num_classes < 1 or num_images < 1:
            raise ValueError(
                f"synthetic data needs at least 1 class and 1 image, found "
                f"{num_classes} and {num_images}"
            )
        spec = tokenizer_spec
        self.device = torch.device(device)
        self.num_images = num_images
        self.num_classes = num_classes
        self._rng = Rng(seed)
        self.class_names = tuple(str(c) for c in range(num_classes))
        self.fingerprint = hashlib.sha256(
            f"synthetic-1/{spec}/{num_classes}/{seed}/{num_images}".encode()
        ).hexdigest()
        values = spec.num_tokens * max(1, spec.channels)
        rows = torch.arange(max(1, min(POOL, POOL_VALUES // values)))
        if spec.kind == "discrete":
            pool = self._rng.integers("synthetic.pool", rows, spec.num_tokens, spec.vocabulary)
        else:
            pool = self._rng.normal("synthetic.pool", rows, spec.num_tokens * spec.channels)
            pool = pool.unflatten(-1, (spec.num_tokens, spec.channels))
        self._pool = pool.to(self.device)

    def batch(self, index: Tensor) -> Batch:
        """(B,) int64 global sample indices -> the batch on `device`; a pure function."""
        index = index.to(self.device, non_blocking=True).long()
        row, label = self._rng.bits("synthetic.sample", index, 2).unbind(-1)
        return Batch(self._pool[row % len(self._pool)], label % self.num_classes, index)

    def check(self) -> None:
        """Nothing to find."""
