"""What is trained on: images or tokens, and how the ones become the others."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from heptapod_fast.config.settings import (
    Settings,
    at_least,
    between,
    flag,
    last_part,
    setting,
)
from heptapod_fast.data.cache.format import GROUP, Cache, open_cache, refuse_other
from heptapod_fast.tokenizers import DEFAULT_CODES, FITTED, PRETRAINED, TokenSpec, token_spec

EMBEDDED_IMAGES = ("logograms", "pairs")
EMBEDDED = (*EMBEDDED_IMAGES, "synthetic")
LOGOGRAM_COUNT = 50_000
SYNTHETIC_CLASSES = 1000


def is_cache(data: str | None) -> bool:
    """Whether --data names a cache of tokens: by its name, or by what lies in it."""
    if data is None or data in EMBEDDED:
        return False
    return data.rstrip("/").endswith(".zarr") or (Path(data) / GROUP).is_file()


@dataclass(frozen=True, kw_only=True)
class DataSettings(Settings):
    """Data and tokens."""

    data: str | None = setting(
        "logograms | pairs | synthetic | IMAGE_FOLDER (class = subfolder; flat = one class) | "
        "ARCHIVE.tar or .zip of one, or ARCHIVE.tar/FOLDER | CACHE.zarr (from tools/cache.py; it "
        "decides tokenizer, image size and flip)."
    )
    tokenizer: Literal["kl16", "vq16", "patch", "patch-vq"] = setting(
        "Token kind: kl16 and patch are continuous, vq16 and patch-vq discrete."
    )
    tokenizer_weights: str | None = setting(
        "Weights of the tokenizer; for patch-vq a codebook fitted earlier (default: fit one).",
        # What the weights are, checkpoints know.
        may_change=True,
    )
    image_size: int = setting("Side of the training images in pixels.", rule=between(1, 2**14))
    patch_size: int = setting(
        "Side of a patch in pixels (patch, patch-vq; kl16 and vq16 are fixed at 16).",
        rule=at_least(1),
    )
    codes: int | None = setting("Size of the patch-vq codebook.", rule=between(1, 2**20))
    num_classes: int | None = setting(
        "Number of classes; default: what the data has (synthetic: 1000).", rule=at_least(1)
    )
    logogram_count: int | None = setting(
        "Size of the training set of logograms or pairs.", rule=at_least(1)
    )
    flip: bool = setting(
        "Random horizontal flips; on only where larger sizes meet kl16 or vq16 at 256 px (letters "
        "would be mirrored). With a cache: draw one of its views."
    )
    max_broken: int = setting(
        "Unreadable images that may be left out before the run is refused.",
        default=0,
        rule=at_least(0),
        may_change=True,
    )
    decoder: Literal["pillow", "dali"] = setting("Reads the images of a folder.", default="pillow")
    allow_upscale: bool = setting(
        "Enlarge images that are far smaller than --image-size instead of refusing them.",
        default=False,
    )
    cache_mode: Literal["auto", "gpu", "ram", "stream"] = setting(
        "Where a cache is while it is read: on the GPU, in shared memory, or streamed from disk; "
        "auto takes the first that fits. All give the same batches.",
        default="auto",
        may_change=True,
    )

    @property
    def is_cache(self) -> bool:
        """Whether `data` is a cache of tokens."""
        return is_cache(self.data)

    @property
    def kind(self) -> str:
        """What `data` is: a cache, images, or the name of embedded data."""
        if self.is_cache:
            return "cache"
        return self.data if self.data in EMBEDDED else "images"

    @property
    def spec(self) -> TokenSpec:
        """Shape and kind of the tokens."""
        return token_spec(self.tokenizer, self.image_size, self.patch_size, self.codes)

    def portable(self) -> DataSettings:
        """See `Settings.portable`. Which weights a tokenizer has is recorded beside the settings,
        with their hash."""
        data = self.data
        if data not in (None, "", *EMBEDDED):
            name = last_part(data)
            data = f"./{name}" if name in EMBEDDED else name
        return replace(self, data=data, tokenizer_weights=None)

    def resolve(self, defaults: DataSettings) -> DataSettings:
        """Every setting that was not given, from the cache, the size's defaults, or the others.

        Raises:
            ValueError: a setting that contradicts another; names the flag.
            FileNotFoundError, CacheError: a cache that cannot be opened.
        """
        self.check()
        settings = self
        if settings.data not in (None, "", *EMBEDDED):
            # One run, however its data is spelt. A folder that is named like embedded data keeps
            # "./" in front, which tells it from that.
            path = os.path.normpath(settings.data)
            settings = replace(settings, data=f"./{path}" if path in EMBEDDED else path)
        if settings.is_cache:
            settings = settings._following_cache()
        recipe_flips = defaults.flip
        settings = settings.filled(defaults.without("flip"))
        settings = settings._with_token_sizes()
        settings = settings._with_counts()
        return settings._with_flip(recipe_flips)

    def _following_cache(self) -> DataSettings:
        """What a cache was made with is not asked again; whether it fits is checked in the end."""
        follows = ["tokenizer", "image_size", "patch_size", "flip"]
        if self.tokenizer is None or self.tokenizer in FITTED:
            follows.append("codes")
        missing = [name for name in follows if getattr(self, name) is None]
        if not missing:
            return self
        cache = open_cache(str(self.data))
        refuse_other(cache, vars(self))
        about = made_with(cache)
        return self.changed({name: about.get(name) for name in missing})

    def _with_token_sizes(self) -> DataSettings:
        """patch_size and codes; refuses sizes that do not divide, with the nearest that do."""
        patch_size = self.patch_size
        codes = self.codes
        if patch_size is None:
            is_large = self.tokenizer in PRETRAINED or self.image_size >= 128
            patch_size = 16 if is_large else 4
        if codes is None and self.tokenizer in FITTED:
            codes = DEFAULT_CODES
        if self.tokenizer not in PRETRAINED and self.tokenizer not in FITTED:
            why = f"given, but --tokenizer {self.tokenizer} has no weights"
            self.refuse(("tokenizer_weights",), why)
        token_spec(self.tokenizer, self.image_size, patch_size, codes)
        return replace(self, patch_size=patch_size, codes=codes)

    def _with_counts(self) -> DataSettings:
        """logogram_count, and the classes of synthetic tokens."""
        count = self.logogram_count
        classes = self.num_classes
        if self.data not in EMBEDDED_IMAGES:
            self.refuse(("logogram_count",), f"needs --data {' or '.join(EMBEDDED_IMAGES)}")
        elif count is None:
            count = LOGOGRAM_COUNT
        if self.data == "synthetic" and classes is None:
            classes = SYNTHETIC_CLASSES
        return replace(self, logogram_count=count, num_classes=classes)

    def _with_flip(self, recipe_flips: bool) -> DataSettings:
        """flip. recipe_flips: whether the size's recipe mirrors photographs at 256 px."""
        if self.data == "synthetic":
            if self.flip:
                raise ValueError("--flip: synthetic tokens have no images to mirror")
            return replace(self, flip=False)
        if self.flip is not None:
            return self
        is_photographs = self.tokenizer in PRETRAINED and self.image_size == 256
        return replace(self, flip=recipe_flips and is_photographs)


def made_with(cache: Cache) -> dict[str, Any]:
    """The settings that a cache was made with, by name."""
    return cache.manifest["tokenizer"] | {"flip": cache.views > 1}


def refuse_missing_data(settings: DataSettings) -> None:
    """ValueError without --data, naming the commands that make a cache."""
    if not settings.data:
        raise ValueError(
            f"{flag('data')} is missing: name a cache of tokens, which python tools/cache.py "
            f"--data IMAGE_FOLDER --tokenizer {settings.tokenizer} --out CACHE.zarr makes, or a "
            "folder of images (one subfolder per class) or a .tar or .zip of one, or use --data "
            "logograms with --tokenizer patch-vq or patch, or --data synthetic to measure speed"
        )
