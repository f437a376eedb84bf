"""Discrete tokens from a k-means codebook over raw RGB patches, fitted on the data in seconds.

Tensor names: M distinct patches, V codes, E = 3 * p * p values of a patch.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from heptapod_fast.rng import Rng
from heptapod_fast.tokenizers.base import DEFAULT_CODES, Tokenizer, TokenSpec, to_unit, token_spec
from heptapod_fast.tokenizers.patch import patchify, unpatchify

logger = logging.getLogger(__name__)
FIT_PATCHES = 200_000
SEED_PATCHES_PER_CODE = 32
ITERATIONS = 30
TOLERANCE = 1e-3
UNUSED = 3.0
_BLOCK = 2**22  # entries of one block of the distance matrix, 16 MB in float32


class Images(Protocol):
    """What fitting asks of a set of images."""

    def __len__(self) -> int:
        """Number of images."""
        ...

    def images(self, ids: Tensor) -> Tensor:
        """(B,) int64 -> (B, 3, H, W) uint8."""
        ...


class PatchVQ(Tokenizer):
    """Codes of the nearest codebook patch.

    Args:
        codebook: (V, 3 * p * p) float, patches in [-1, 1] in `patchify`'s channel order.
        image_size, patch_size: sides in pixels.

    Raises:
        ValueError: sizes that do not divide, or a codebook of another shape or not finite.
    """

    name = "patch-vq"
    has_codebook = True

    def __init__(self, codebook: Tensor, image_size: int, patch_size: int) -> None:
        codes = codebook.shape[0] if codebook.ndim == 2 else 0
        if codes < 2 or codebook.shape[1] != 3 * patch_size**2 or not codebook.isfinite().all():
            raise ValueError(
                f"patch-vq: expected a finite codebook (V, {3 * patch_size**2}) for "
                f"--patch-size {patch_size}, found {tuple(codebook.shape)}"
            )
        self.spec = token_spec(self.name, image_size, patch_size, codes)
        self.image_size = image_size
        self.patch_size = patch_size
        self.codebook_VE = codebook.float().contiguous()
        self.device = codebook.device

    @classmethod
    def fit(
        cls,
        images: Tensor | Images,
        image_size: int,
        patch_size: int,
        codes: int = DEFAULT_CODES,
        seed: int = 0,
        progress: Callable[[int, int], None] | None = None,
    ) -> PatchVQ:
        """Fits the codebook by k-means++ and Lloyd's iterations; deterministic for a seed.

        About 200,000 patches of randomly chosen images are used, all of them if there are fewer.
        Equal patches are merged and counted, so that large plain areas cost nothing.

        Args:
            images: (n, 3, H, W) uint8, or a source of them (data/sources.py).
            image_size, patch_size: sides in pixels.
            codes: size V of the codebook.
            seed: seed of the choice of images and of k-means++.
            progress: called as progress(iterations done, iterations at most).

        Raises:
            ValueError: sizes that do not divide or do not match the images.

        Images with fewer distinct patches than codes are coded without loss; the codes left over
        lie outside [-1, 1], so that no patch is ever nearest to them.
        """
        spec = token_spec(cls.name, image_size, patch_size, codes)
        chosen = _choose_images(images, cls.images_to_fit(spec), seed)
        if chosen.dtype != torch.uint8 or chosen.shape[1:] != (3, image_size, image_size):
            raise ValueError(
                f"patch-vq: expected uint8 images (n, 3, {image_size}, {image_size}), "
                f"found {chosen.dtype} {tuple(chosen.shape)}: check --image-size"
            )
        patches_ME, counts_M = _distinct(patchify(chosen, patch_size).flatten(0, 1))
        if len(patches_ME) <= codes:
            logger.warning(
                "WARNING: the images have %d distinct patches; %d of --codes %d are never used",
                len(patches_ME),
                codes - len(patches_ME),
                codes,
            )
            spare_VE = torch.full((codes - len(patches_ME), patches_ME.shape[1]), UNUSED)
            return cls(torch.cat((to_unit(patches_ME), spare_VE)), image_size, patch_size)
        points_ME = to_unit(patches_ME)
        codebook_VE = _seed_codes(points_ME, codes, seed)
        codebook_VE = _lloyd(points_ME, counts_M, codebook_VE, progress)
        return cls(codebook_VE, image_size, patch_size)

    @staticmethod
    def images_to_fit(spec: TokenSpec) -> int:
        """How many images `fit` looks at, if there are as many."""
        return math.ceil(FIT_PATCHES / spec.num_tokens)

    def encode(self, images: Tensor, rng: Rng | None = None, index: Tensor | None = None) -> Tensor:
        """(B, 3, H, W) -> (B, N) int64, the nearest code of every patch; `rng` is ignored."""
        tokens_BNE = patchify(self.check_images(images), self.patch_size).float()
        nearest, _ = _nearest(tokens_BNE.flatten(0, 1), self.codebook_VE)
        return nearest.view(tokens_BNE.shape[:2])

    def decode(self, tokens: Tensor) -> Tensor:
        """(B, N) int64 in 0..V-1 -> (B, 3, H, W) float32."""
        codes_BN = self.check_tokens(tokens)
        return unpatchify(self.codebook_VE[codes_BN], self.patch_size)

    def code_vectors(self) -> Tensor:
        """See Tokenizer.code_vectors: patches."""
        return self.codebook_VE

    def to(self, device: torch.device | str) -> PatchVQ:
        """Moves the codebook and returns the tokenizer."""
        super().to(device)
        self.codebook_VE = self.codebook_VE.to(self.device)
        return self

    def state(self) -> dict[str, Tensor]:
        """`codebook` (V, 3 * p * p) float32."""
        return {"codebook": self.codebook_VE}

    def settings(self) -> dict[str, int]:
        """image_size and patch_size in pixels, codes."""
        return {
            "image_size": self.image_size,
            "patch_size": self.patch_size,
            "codes": self.spec.vocabulary,
        }

    @classmethod
    def restore(cls, settings: dict[str, int], state: dict[str, Tensor]) -> PatchVQ:
        """The inverse of `settings` and `state`."""
        return cls(state["codebook"], settings["image_size"], settings["patch_size"])


def _choose_images(images: Tensor | Images, most: int, seed: int) -> Tensor:
    """(m, 3, H, W) uint8: all images, or a random `most` of them."""
    count = len(images)
    ids = torch.arange(count)
    if count > most:
        ids = Rng(seed).bits("patch_vq.images", ids, 1)[:, 0].argsort(stable=True)[:most]
        ids = ids.sort().values
    if isinstance(images, Tensor):
        return images[ids]
    return images.images(ids)


def _distinct(patches_PE: Tensor) -> tuple[Tensor, Tensor]:
    """(P, E) uint8 -> the distinct rows (M, E) uint8 and how often each occurs, (M,) float32."""
    rows = np.ascontiguousarray(patches_PE.numpy())
    # Rows are told apart by a random 64-bit linear hash, which is far faster than sorting them.
    words = np.asarray(np.random.Philox(key=0).random_raw(rows.shape[1]))
    factors = words | np.uint64(1)
    hashes = np.zeros(len(rows), dtype=np.uint64)
    for column, factor in enumerate(factors):
        hashes += rows[:, column] * factor
    _, first, counts = np.unique(hashes, return_index=True, return_counts=True)
    return torch.from_numpy(rows[first]), torch.from_numpy(counts).float()


def _seed_codes(points_ME: Tensor, codes: int, seed: int) -> Tensor:
    """k-means++ (Arthur and Vassilvitskii 2007) on a random part of the distinct patches."""
    rng = Rng(seed)
    order = rng.bits("patch_vq.part", torch.arange(len(points_ME)), 1)[:, 0].argsort(stable=True)
    part_ME = points_ME[order[: SEED_PATCHES_PER_CODE * codes]]
    squares_M = part_ME.square().sum(dim=1)
    draws = rng.uniform("patch_vq.seed", torch.arange(codes), 1)[:, 0].double()
    chosen = [int(draws[0] * len(part_ME))]
    distance_M = torch.full_like(squares_M, torch.inf)
    for k in range(1, codes):
        last = chosen[-1]
        to_last_M = squares_M + squares_M[last] - 2.0 * (part_ME @ part_ME[last])
        distance_M = torch.minimum(distance_M, to_last_M.clamp_(min=0.0))
        distance_M[last] = 0.0  # rounding must not let a patch be chosen twice
        total_M = distance_M.double().cumsum(dim=0)
        target = draws[k] * total_M[-1]
        chosen.append(min(int(torch.searchsorted(total_M, target, right=True)), len(part_ME) - 1))
    return part_ME[chosen]


def _nearest(points_ME: Tensor, codebook_VE: Tensor) -> tuple[Tensor, Tensor]:
    """Index of the nearest code (M,) int64 and the squared distance to it (M,) float32.

    By the matrix product |c|^2 - 2 x.c, in blocks: the (M, V) matrix is never whole in memory.
    """
    half_V = 0.5 * codebook_VE.square().sum(dim=1)
    transposed_EV = codebook_VE.T.contiguous()
    index = torch.empty(len(points_ME), dtype=torch.int64, device=points_ME.device)
    square = torch.empty(len(points_ME), device=points_ME.device)
    rows = max(1, _BLOCK // len(codebook_VE))
    for start in range(0, len(points_ME), rows):
        block = slice(start, start + rows)
        best, index[block] = torch.addmm(half_V, points_ME[block], transposed_EV, alpha=-1.0).min(
            dim=1
        )
        square[block] = (2.0 * best + points_ME[block].square().sum(dim=1)).clamp_(min=0.0)
    return index, square


def _lloyd(
    points_ME: Tensor,
    counts_M: Tensor,
    codebook_VE: Tensor,
    progress: Callable[[int, int], None] | None,
) -> Tensor:
    """Lloyd's iterations on counted points, until the error falls by less than 0.1 % or 30 times.

    A code without points moves to the point with the largest counted error.
    """
    codes = len(codebook_VE)
    last = None
    weighted_ME = torch.cat((points_ME * counts_M[:, None], counts_M[:, None]), dim=1)
    for step in range(ITERATIONS):
        index_M, square_M = _nearest(points_ME, codebook_VE)
        error_M = square_M * counts_M
        error = float(error_M.double().sum())
        sums_VE = torch.zeros(codes, weighted_ME.shape[1]).index_add_(0, index_M, weighted_ME)
        size_V = sums_VE[:, -1]
        codebook_VE = sums_VE[:, :-1] / size_V.clamp(min=1.0)[:, None]
        empty = (size_V == 0).nonzero()[:, 0]
        if len(empty):
            codebook_VE[empty] = points_ME[error_M.topk(len(empty)).indices]
        if progress is not None:
            progress(step + 1, ITERATIONS)
        if last is not None and not len(empty) and last - error <= TOLERANCE * last:
            break
        last = error
    return codebook_VE
