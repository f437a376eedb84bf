"""Logograms: a procedural, class-conditional image set that needs no files.

Every image is a ring whose radius waves around its centre; class c is the number of waves, c + 2
(its rotational symmetry). Local texture says nothing about the class and the global form decides,
so the quality of a generative model can be read from its samples without a pretrained network
(`heptapod_fast.evaluation.symmetry`).

    ink(r, theta) = exp(-d^2 / (2 stroke^2))
    d             = r - (radius + amplitude * cos(fold * (theta - phase)))

in units of half the image side, with pixel centres at (i + 0.5) / side * 2 - 1 and the y axis
pointing down; the Gaussian stroke is its own antialiasing. The ink is white on black, all three
channels equal. Radius is uniform on 0.5..0.7, amplitude on 0.05..0.15, stroke on 0.08..0.13, phase
over one wave, the same at every size.
"""

from __future__ import annotations

import hashlib
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from heptapod_fast.data.sources import ImageSource, check_ids
from heptapod_fast.rng import Rng

# Ranges in units of half the image side.
RADIUS = (0.5, 0.7)
AMPLITUDE = (0.05, 0.15)
STROKE = (0.08, 0.13)
PIXELS_PER_WAVE = 6.0
STROKES_PER_WAVE = 2.5
FORMATS = {"jpeg": ".jpg", "png": ".png", "webp": ".webp"}


def logogram_classes(image_size: int) -> int:
    """Number of classes that a resolution can show.

    On the smallest ring one wave must be at least 6 pixels long, or it is not resolved, and at
    least 2.5 of the widest strokes long, or the stroke fills its valleys. The second bound does not
    depend on the size and caps the set at 8 classes (2-fold to 9-fold). Gives 3 classes at 16 px,
    5 at 24 px, 7 at 32 px and 8 from 35 px on.

    Raises:
        ValueError: image_size is below 12 px, where not even two classes can be told apart.
    """
    by_pixels = math.pi * RADIUS[0] * image_size / PIXELS_PER_WAVE
    by_stroke = 2.0 * math.pi * RADIUS[0] / (STROKES_PER_WAVE * STROKE[1])
    classes = math.floor(min(by_pixels, by_stroke)) - 1
    if classes < 2:
        raise ValueError(
            f"logograms need an image size of at least 12 pixels to show two classes, "
            f"found {image_size}: raise --image-size"
        )
    return classes


class Logograms:
    """Logograms as an `ImageSource`; image i is a pure function of (seed, i) and of the settings.

    Images are rendered when they are asked for, nothing is stored. The class of image i is
    i mod num_classes, so the set is balanced to within one image.

    Args:
        image_size: side in pixels, 12 or more.
        count: number of images.
        seed: other seeds give other images of the same distribution.
        num_classes: the first classes of the set; default `logogram_classes(image_size)`, which
            is also the most.

    Raises:
        ValueError: a setting is out of range; the message names its flag.
    """

    name = "logograms"

    def __init__(
        self, image_size: int, count: int, seed: int = 0, num_classes: int | None = None
    ) -> None:
        most = logogram_classes(image_size)
        num_classes = most if num_classes is None else num_classes
        if not 1 <= num_classes <= most:
            raise ValueError(
                f"logograms of {image_size} pixels can show 1..{most} classes, found "
                f"num_classes={num_classes}: use fewer (--num-classes) or raise --image-size"
            )
        if count < 1:
            raise ValueError(f"logograms need at least 1 image, found count={count}")
        self.image_size = image_size
        self.seed = seed
        self._count = count
        self.class_names = tuple(f"{c + 2}-fold" for c in range(num_classes))
        self.labels = torch.arange(count) % num_classes
        recipe = (
            f"logograms-1/{image_size}/{count}/{seed}/{num_classes}/{RADIUS}/{AMPLITUDE}/{STROKE}"
        )
        self.fingerprint = hashlib.sha256(recipe.encode()).hexdigest()
        # Float64 keeps the rounded pixels independent of the batch they are rendered in and of the
        # vector width of the machine: float32 would now and then round to the other side.
        axis = (torch.arange(image_size).double() + 0.5) * (2.0 / image_size) - 1.0
        y, x = torch.meshgrid(axis, axis, indexing="ij")
        self._distance_P = torch.hypot(x, y).flatten()
        folds = torch.arange(num_classes) + 2
        angle_CP = folds[:, None] * torch.atan2(y, x).flatten()
        self._waves_C2P = torch.stack((angle_CP.cos(), angle_CP.sin()), dim=1)

    def __len__(self) -> int:
        return self._count

    def fresh(self, count: int) -> Logograms:
        """So many other images of the same distribution."""
        return Logograms(self.image_size, count, self.seed + 1, len(self.class_names))

    def parameters(self, ids: Tensor) -> dict[str, Tensor]:
        """ids: (B,) int64 -> `fold` (B,) int64 and `radius`, `amplitude`, `stroke` (B,) float64 in
        units of half the image, `phase` (B,) float64 in radians, 0 <= phase < 2 pi / fold."""
        ids = check_ids(ids, self._count, self.name)
        unit = Rng(self.seed).uniform("logograms.form", ids, 4).double()
        fold = self.labels[ids] + 2

        def between(bounds: tuple[float, float], unit_B: Tensor) -> Tensor:
            low, high = bounds
            return low + (high - low) * unit_B

        return {
            "fold": fold,
            "radius": between(RADIUS, unit[:, 0]),
            "amplitude": between(AMPLITUDE, unit[:, 1]),
            "stroke": between(STROKE, unit[:, 2]),
            "phase": unit[:, 3] * (2.0 * math.pi) / fold,
        }

    def images(self, ids: Tensor) -> Tensor:
        """(B,) int64 -> (B, 3, H, W) uint8; IndexError for an id outside the set."""
        ids = check_ids(ids, self._count, self.name)
        side = self.image_size
        out = torch.empty(len(ids), 3, side, side, dtype=torch.uint8)
        # Blocks of about a million pixels keep the intermediates inside the caches.
        block = max(1, 2**20 // side**2)
        for start in range(0, len(ids), block):
            grey = self._render(ids[start : start + block])
            out[start : start + block] = grey.view(-1, 1, side, side)
        return out

    def _render(self, ids: Tensor) -> Tensor:
        """(B,) -> (B, P) uint8, P pixels in row-major order."""
        form = self.parameters(ids)
        # cos(fold (theta - phase)) by the angle sum: the cosines of the pixels are tabulated.
        angle_B = form["fold"] * form["phase"]
        cos_B = form["amplitude"] * angle_B.cos()
        sin_B = form["amplitude"] * angle_B.sin()
        waves_B2P = self._waves_C2P[form["fold"] - 2]
        offset_BP = self._distance_P - form["radius"][:, None]
        offset_BP.sub_(waves_B2P[:, 0] * cos_B[:, None]).sub_(waves_B2P[:, 1] * sin_B[:, None])
        ink_BP = offset_BP.square_().mul_((-0.5 / form["stroke"].square())[:, None]).exp_()
        return ink_BP.mul_(255.0).round_().to(torch.uint8)


def write_folder(
    source: ImageSource, folder: str | Path, format: str = "jpeg", quality: int = 95
) -> int:
    """Writes every image of a source as FOLDER/CLASS NAME/ID.EXTENSION; returns their number.

    Makes a set of files out of an embedded one, for whatever reads folders of images. `quality`
    serves jpeg and webp.

    Raises:
        ValueError: unknown format, or the folder exists and is not empty.
    """
    from PIL import Image

    folder = Path(folder)
    if format not in FORMATS:
        raise ValueError(f"unknown image format {format!r}: choose one of {', '.join(FORMATS)}")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: name a new folder")
    for name in source.class_names:
        (folder / name).mkdir(parents=True, exist_ok=True)
    labels = source.labels.tolist()
    options = {} if format == "png" else {"quality": quality}

    def write(item: tuple[int, Tensor]) -> None:
        image_id, image = item
        path = folder / source.class_names[labels[image_id]] / f"{image_id:07d}{FORMATS[format]}"
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path, format=format, **options)

    with ThreadPoolExecutor() as pool:
        for ids in torch.arange(len(source)).split(1024):
            list(pool.map(write, zip(ids.tolist(), source.images(ids), strict=True)))
    return len(source)
