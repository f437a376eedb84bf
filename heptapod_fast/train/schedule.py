"""What changes with the images trained on: the learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterator

from heptapod_fast.config import RecipeSettings
from heptapod_fast.systems import Phase

FALLING_SHARE = 0.2
LOWEST_RATE = 1e-5


def warmup_images(recipe: RecipeSettings, phase: Phase) -> int:
    """Images of the linear warm-up of a phase; no more than the phase has."""
    length = phase.end - phase.first
    if recipe.warmup_images is not None:
        return min(recipe.warmup_images, length)
    return round(recipe.warmup * length)


def leaves_no_peak(recipe: RecipeSettings, phase: Phase) -> bool:
    """Whether the warm-up of a phase lasts until its end, or until its rate falls."""
    length = phase.end - phase.first
    share = 1 - FALLING_SHARE if recipe.lr_schedule == "trapezoid" else 1.0
    warmup = warmup_images(recipe, phase)
    return warmup >= share * length


def peaks_not_reached(recipe: RecipeSettings, phases: list[Phase]) -> Iterator[str]:
    """A line for each phase that its warm-up takes up."""
    for phase in phases:
        if leaves_no_peak(recipe, phase):
            whose = f" of phase {phase.name}" if phase.name else ""
            yield (
                f"the warm-up takes what there is{whose}, the full rate is not reached: shorten it "
                "with --warmup-images, or train on more --images"
            )


def learning_rate(recipe: RecipeSettings, images: int, phase: Phase) -> float:
    """Rate of the step that ends at `images`: linear from 0, then as `lr_schedule` says, over the
    images of the phase."""
    length = phase.end - phase.first
    done = images - phase.first
    warmup = warmup_images(recipe, phase)
    if done < warmup:
        return recipe.learning_rate * done / warmup
    if recipe.lr_schedule == "constant":
        return recipe.learning_rate
    if recipe.lr_schedule == "trapezoid":
        return _trapezoid(recipe.learning_rate, done / length)
    progress = min(1.0, (done - warmup) / max(length - warmup, 1))
    falling = 0.5 * (1 + math.cos(math.pi * progress))
    return recipe.learning_rate * (0.01 + 0.99 * falling)


def _trapezoid(rate: float, progress: float) -> float:
    """Constant, and over the last fifth linear down to 1e-5, which it never rises to
    (npp: train_c2i.py:60-101). progress: share of the phase that is done."""
    last = min(LOWEST_RATE, rate)
    left = max(0.0, 1.0 - progress)
    if left >= FALLING_SHARE:
        return rate
    return last + (rate - last) * left / FALLING_SHARE
