"""Quality of samples of pairs: read by templates, no pretrained network is needed.

Tensor names: M quarters, P pixels of one, K templates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import product
from typing import Any

import torch
from torch import Tensor

from heptapod_fast.data.pairs import (
    OFFSET,
    QUARTERS,
    RELATIONS,
    SIGNS,
    SIZE,
    STROKE,
    Pairs,
    draw_signs,
)
from heptapod_fast.evaluation.context import MetricContext
from heptapod_fast.systems.base import System
from heptapod_fast.tokenizers.base import to_unit

SIZES = 3
OFFSETS = 5
CLEAR = 0.8  # correlation with a template from which a quarter shows a sign


@lru_cache
def _templates(side: int) -> tuple[Tensor, Tensor]:
    """(K, P) float32, each without its mean and of length 1; (K,) int64, their signs."""
    sizes = torch.linspace(*SIZE, SIZES).tolist()
    offsets = torch.linspace(*OFFSET, OFFSETS).tolist()
    stroke = sum(STROKE) / 2
    signs = range(len(SIGNS))
    rows = torch.tensor(list(product(signs, sizes, offsets, offsets)), dtype=torch.float64)
    sign_K = rows[:, 0].long()
    strokes = torch.full_like(rows[:, 0], stroke)
    ink = draw_signs(sign_K, rows[:, 1], rows[:, 2:], strokes, side)
    return _normalised(ink.flatten(1).float()), sign_K


def _normalised(x_MP: Tensor) -> Tensor:
    centred = x_MP - x_MP.mean(1, keepdim=True)
    return centred / centred.norm(dim=1, keepdim=True).clamp(min=1e-6)


def read_signs(images: Tensor) -> tuple[Tensor, Tensor]:
    """The signs of pairs.

    Args:
        images: (B, 3, H, W) float in [-1, 1].

    Returns:
        sign: (B, 4) int64, in the order of `SIGNS`: whichever is the likest.
        clarity: (B, 4) float32, the correlation with it, 1 for the same picture.
    """
    grey_BHW = images.float().mean(1)
    half = grey_BHW.shape[-1] // 2
    quarters = grey_BHW.unflatten(2, (2, half)).unflatten(1, (2, half)).transpose(2, 3)
    x_MP = _normalised(quarters.reshape(len(images) * QUARTERS, half * half).cpu())
    template_KP, sign_K = _templates(half)
    best_M, number_M = (x_MP @ template_KP.T).max(1)
    return sign_K[number_M].view(-1, QUARTERS), best_M.view(-1, QUARTERS)


def relations(sign_B4: Tensor) -> Tensor:
    """(B,) int64: which of `RELATIONS` the signs keep, -1 for another one."""
    alike_B44 = sign_B4[:, :, None] == sign_B4[:, None]
    found_B = torch.full_like(sign_B4[:, 0], -1)
    for number, letters in enumerate(RELATIONS.values()):
        wanted_44 = torch.tensor([[a == b for b in letters] for a in letters])
        found_B[(alike_B44 == wanted_44).all(2).all(1)] = number
    return found_B


def chances() -> list[float]:
    """How often four signs that are drawn one by one keep each of `RELATIONS`."""
    found = []
    for letters in RELATIONS.values():
        kinds = len(set(letters))
        # Each kind is any sign that those before it are not.
        ways = math.prod(len(SIGNS) - taken for taken in range(kinds))
        found.append(ways / len(SIGNS) ** QUARTERS)
    return found


class RelationAccuracy:
    """Do samples of pairs keep the relation of their class, and are their parts what they should
    be? See `Metric`.

    `compute` returns:
        relation_accuracy: share of samples whose four signs are alike as their class says; below it
            a number for each class that was sampled, `relation_accuracy/NAME`. A sample with a
            quarter that shows no sign keeps none.
        relation_by_chance: what it would be if the signs of the same clear quarters were drawn
            one by one.
        sign_clarity: share of quarters that show a sign at all, whichever: what can be learned from
            a neighbourhood.
        sign_evenness: entropy of the kinds of signs, divided by its maximum: 1 where all are as
            frequent.

    Raises:
        ValueError: the context's source is not a set of pairs.
    """

    needs_samples = True

    def __init__(self, context: MetricContext, names: Sequence[str] = ("relation",)) -> None:
        if not isinstance(context.source, Pairs):
            found = "none" if context.source is None else context.source.name
            raise ValueError(
                f"--metrics relation reads pairs, found {found}: use --data pairs or leave "
                "relation out"
            )
        self.source = context.source
        self._signs: list[Tensor] = []
        self._clarity: list[Tensor] = []
        self._labels: list[Tensor] = []

    def restart(self, system: System) -> None:
        """See `Metric.restart`."""
        for kept in (self._signs, self._clarity, self._labels):
            kept.clear()

    def update(self, pixels: Tensor, labels: Tensor) -> None:
        """(B, 3, H, W) uint8 and (B,) int64 classes; ValueError for others."""
        side = self.source.image_size
        is_right = pixels.shape[1:] == (3, side, side) and labels.shape == pixels.shape[:1]
        if not is_right or pixels.dtype != torch.uint8:
            raise ValueError(
                f"relation: expected uint8 images (B, 3, {side}, {side}) and labels (B,), found "
                f"{pixels.dtype} {tuple(pixels.shape)} and {tuple(labels.shape)}"
            )
        sign, clarity = read_signs(to_unit(pixels))
        self._signs.append(sign)
        self._clarity.append(clarity)
        self._labels.append(labels.long().cpu())

    def compute(self) -> dict[str, Any]:
        """See `Metric.compute`."""
        if not sum(len(labels) for labels in self._labels):
            raise ValueError("relation: no samples to measure; raise --count")
        labels = torch.cat(self._labels)
        signs = torch.cat(self._signs)
        is_clear = torch.cat(self._clarity) >= CLEAR
        are_clear = is_clear.all(1)
        is_right = ((relations(signs) == labels) & are_clear).double()
        by_chance = are_clear * torch.tensor(chances(), dtype=torch.float64)[labels]
        found = {
            "relation_accuracy": float(is_right.mean()),
            "relation_by_chance": float(by_chance.mean()),
        }
        for label in labels.unique().tolist():
            name = self.source.class_names[label]
            found[f"relation_accuracy/{name}"] = float(is_right[labels == label].mean())
        found["sign_clarity"] = float(is_clear.double().mean())
        share = signs.flatten().bincount(minlength=len(SIGNS)).double() / signs.numel()
        entropy = -(share * share.clamp(min=1e-12).log()).sum()
        found["sign_evenness"] = float(entropy / torch.tensor(float(len(SIGNS))).log())
        return found
