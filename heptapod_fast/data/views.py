"""The views of an image that a cache keeps: the image alone, its mirror image, or ten crops."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

ViewKind = Literal["plain", "flip", "ten-crop"]
CROP_RANGES = (1.1, 1.05)  # of LlamaGen's published codes
_CROPS = 5  # the corners and the centre; and all of them mirrored


@dataclass(frozen=True)
class Views:
    """Which views there are, in their order.

    plain: the centre crop. flip: that, and its mirror image. ten-crop: for every range r the centre
    crop of side int(r * S), and of it the corners top left, top right, bottom left and bottom
    right, and the centre, each S x S; then the same five of its mirror image
    (llamagen:autoregressive/train/extract_codes_c2i.py, with torchvision's TenCrop).

    Attributes:
        kind: one of the above.
        crop_ranges: for ten-crop.
    """

    kind: ViewKind = "plain"
    crop_ranges: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.kind != "ten-crop":
            return
        ranges = self.crop_ranges
        are_fit = bool(ranges) and all(1 <= r <= 2 for r in ranges)
        if not are_fit or len(set(ranges)) < len(ranges):
            raise ValueError(
                f"--crop-ranges {' '.join(map(str, ranges))}: expected different numbers of 1 to "
                "2, how much larger than the image the crop is that the ten are cut out of"
            )

    @property
    def count(self) -> int:
        """V."""
        if self.kind == "ten-crop":
            return 2 * _CROPS * len(self.crop_ranges)
        return 2 if self.kind == "flip" else 1

    @property
    def has_plain(self) -> bool:
        """Whether view 0 is the image as it is."""
        return self.kind != "ten-crop"

    def sides(self, image_size: int) -> tuple[int, ...]:
        """Sides of the centre crops that the views are cut out of."""
        if self.kind != "ten-crop":
            return (image_size,)
        return tuple(int(image_size * r) for r in self.crop_ranges)

    def cut(self, crops: Sequence[Tensor], image_size: int) -> Iterator[Tensor]:
        """The views (n, 3, S, S) one after the other; crops: (n, 3, side, side) for each side."""
        if self.kind == "ten-crop":
            for crop in crops:
                yield from _five(crop, image_size)
                yield from _five(crop.flip(-1), image_size)
            return
        yield crops[0]
        if self.kind == "flip":
            yield crops[0].flip(-1)

    def describe(self) -> dict[str, Any]:
        """For a manifest, beside the number of views; empty where the number says it all."""
        if self.kind != "ten-crop":
            return {}
        return {"augmentation": {"kind": self.kind, "crop_ranges": list(self.crop_ranges)}}

    @classmethod
    def described(cls, manifest: dict[str, Any]) -> Views:
        """The views of a cache, from its manifest. Raises where there are no such views."""
        about = manifest.get("augmentation")
        if about is not None:
            return cls(about["kind"], tuple(about["crop_ranges"]))
        return cls("flip" if manifest["views"] == 2 else "plain")

    def __str__(self) -> str:
        if self.kind != "ten-crop":
            return self.kind
        return f"{self.kind} at {' and '.join(f'{r:g}' for r in self.crop_ranges)}"


def _five(crop: Tensor, size: int) -> Iterator[Tensor]:
    """The corners and the centre of (n, 3, side, side)."""
    last = crop.shape[-1] - size
    # Python rounds halves to even, as torchvision does.
    middle = round(last / 2)
    for top, left in ((0, 0), (0, last), (last, 0), (last, last), (middle, middle)):
        yield crop[..., top : top + size, left : left + size]
