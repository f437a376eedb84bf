"""How it is trained. Everything is counted in images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from heptapod_fast.averages import POST_HOC
from heptapod_fast.config.settings import (
    Settings,
    at_least,
    between,
    decided,
    distinct_shares,
    more_than,
    setting,
    share,
)


@dataclass(frozen=True, kw_only=True)
class RecipeSettings(Settings):
    """The recipe, counted in images."""

    images: int = setting(
        "Images to train on in total.",
        rule=at_least(1),
        # Another total reshapes the schedule from here on.
        may_change=True,
    )
    batch: int = setting("Global batch size.", rule=between(1, 2**22))
    micro_batch: int | None = setting(
        "Sequences per forward pass and rank (gradient accumulation); default: what divides the "
        "rank's share and fits.",
        rule=at_least(1),
        may_change=True,
    )
    lr_per_256: float = setting("Learning rate per 256 images of batch.", rule=more_than(0))
    lr_schedule: Literal["constant", "cosine", "trapezoid"] = setting(
        "After the warm-up: constant; half a cosine down to 1% at the end; or constant, and over "
        "the last fifth linearly down to 1e-5 (trapezoid). Systems that train in phases begin anew "
        "in each."
    )
    warmup: float = setting(
        "Share of the images (of a phase) over which the rate rises linearly from 0.", rule=share()
    )
    warmup_images: int | None = setting(
        "The same as a number of images, instead of --warmup.", rule=at_least(0), before=None
    )
    weight_decay: float = setting(
        "Decoupled weight decay of the parameters that decay.", rule=at_least(0)
    )
    beta1: float = setting("AdamW's first decay rate.", rule=share())
    beta2: float = setting("AdamW's second decay rate.", rule=share())
    clip: float = setting("Largest norm of the gradient; 0 turns clipping off.", rule=at_least(0))
    ema: tuple[float | Literal["post-hoc"], ...] = setting(
        "Decays of the moving averages of the weights, each min(decay, (1 + step) / (10 + step)); "
        "post-hoc keeps snapshots of two more, of which averages of other lengths are made after "
        "the run (--ema 0.15 of sample, evaluate and export).",
        rule=distinct_shares(),
    )
    ema_snapshots: int = setting(
        "Snapshots that post-hoc keeps, evenly over the images: 4 bytes per parameter each.",
        default=32,
        rule=between(8, 512),
        before=32,
    )
    skip_spikes: float = setting(
        "Skip a step whose gradient's norm is more than so many standard deviations above the mean "
        "of the last 128 (6, say); 0: only steps whose gradient is not finite are skipped.",
        default=0.0,
        rule=at_least(0),
        may_change=True,
    )
    seed: int = setting("Seed of everything that is random.", default=0, rule=between(0, 2**63 - 1))

    @property
    def learning_rate(self) -> float:
        """Peak rate: lr_per_256 * batch / 256."""
        return self.lr_per_256 * self.batch / 256

    def resolve(self, defaults: RecipeSettings) -> RecipeSettings:
        """Every setting that was not given, from the size's defaults.

        Raises:
            ValueError: a setting that cannot be, or that contradicts another; names the flag.
        """
        self.check()
        if self.warmup is not None and self.warmup_images is None:
            defaults = defaults.without("warmup_images")
        is_given = self.warmup is not None and self.warmup != defaults.warmup
        if is_given and self.warmup_images is not None:
            raise ValueError(
                f"--warmup {self.warmup} and --warmup-images {self.warmup_images}: give one of them"
            )
        settings = self.filled(defaults)
        if settings.batch > settings.images:
            raise ValueError(
                f"--batch {settings.batch} is more than --images {settings.images}: a run has at "
                "least one step"
            )
        is_plain = POST_HOC not in decided(settings.ema, "ema")
        if is_plain and settings.ema_snapshots != defaults.ema_snapshots:
            raise ValueError(
                f"--ema-snapshots {settings.ema_snapshots}: snapshots are kept for --ema "
                f"{POST_HOC} alone"
            )
        return settings
