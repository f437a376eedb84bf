"""What changes with the images trained on: the learning rate and the decay of the averages."""

from __future__ import annotations

import math

from heptapod_fast.config import RecipeSettings
from heptapod_fast.systems import Phase


def warmup_images(recipe: RecipeSettings, phase: Phase) -> int:
    """Images of the linear warm-up of a phase."""
    return round(recipe.warmup * (phase.end - phase.first))


def learning_rate(recipe: RecipeSettings, images: int, phase: Phase) -> float:
    """Rate of the step that ends at `images`: linear from 0, then constant or half a cosine, over
    the images of the phase."""
    length = phase.end - phase.first
    done = images - phase.first
    warmup = warmup_images(recipe, phase)
    if done < warmup:
        return recipe.learning_rate * done / warmup
    if recipe.lr_schedule == "constant":
        return recipe.learning_rate
    progress = min(1.0, (done - warmup) / max(length - warmup, 1))
    falling = 0.5 * (1 + math.cos(math.pi * progress))
    return recipe.learning_rate * (0.01 + 0.99 * falling)


def ema_decay(decay: float, step: int) -> float:
    """min(decay, (1 + step) / (10 + step)): short runs sample well, long ones are not touched."""
    return min(decay, (1 + step) / (10 + step))
