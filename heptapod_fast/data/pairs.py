"""Pairs: a procedural, class-conditional image set whose class no quarter of an image shows.

Every image has four signs, one in each quarter, out of eight kinds. The class says which of them
are alike: those of a row, of a column, of a diagonal, all, or none. So each quarter by itself looks
the same in every class; what stands in it is decided by another quarter. Whether a
generated image keeps to its class can be read off it without a network (`evaluation.relation`).

    ink(p) = max over the sign's lines of exp(-d(p, line)^2 / (2 stroke^2))

in units of half a quarter's side. Size is uniform on 0.62..0.78, the offset from the middle of the
quarter on -0.15..0.15 both ways, stroke on 0.1..0.14, each drawn for every sign. White on black,
all three channels equal.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from heptapod_fast.data.sources import check_ids
from heptapod_fast.rng import Rng

SIZE = (0.62, 0.78)
OFFSET = (-0.15, 0.15)
STROKE = (0.1, 0.14)
LEAST_SIDE = 24  # below, strokes are thinner than pixels
QUARTERS = 4  # top left, top right, bottom left, bottom right
DRAWS = 4  # size, two offsets and stroke of a sign

Point = tuple[float, float]


def _through(*points: Point) -> list[tuple[Point, Point]]:
    """Lines from each point to the next."""
    return list(zip(points[:-1], points[1:], strict=True))


# What a sign is made of, in units of its size; x to the right, y down.
SIGNS: dict[str, list[tuple[Point, Point]]] = {
    "cross": [((-1, 0), (1, 0)), ((0, -1), (0, 1))],
    "saltire": [((-1, -1), (1, 1)), ((-1, 1), (1, -1))],
    "square": _through((-1, -1), (1, -1), (1, 1), (-1, 1), (-1, -1)),
    "triangle": _through((-1, 1), (0, -1), (1, 1), (-1, 1)),
    "rails": [((-1, -0.6), (1, -0.6)), ((-1, 0.6), (1, 0.6))],
    "pillars": [((-0.6, -1), (-0.6, 1)), ((0.6, -1), (0.6, 1))],
    "hook": _through((-1, -1), (-1, 1), (1, 1)),
    "bolt": _through((-1, -1), (1, -1), (-1, 1), (1, 1)),
}
# Which quarters are alike: those with the same letter.
RELATIONS = {"rows": "aabb", "columns": "abab", "diagonals": "abba", "all": "aaaa", "none": "abcd"}
_MOST_LINES = max(len(lines) for lines in SIGNS.values())


def _line_table() -> Tensor:
    """(signs, lines, 2 ends, 2) float64; a sign of fewer lines has its first one several times."""
    rows = []
    for lines in SIGNS.values():
        filled = lines + [lines[0]] * (_MOST_LINES - len(lines))
        rows.append(filled)
    return torch.tensor(rows, dtype=torch.float64)


def draw_signs(
    sign_M: Tensor, size_M: Tensor, offset_M2: Tensor, stroke_M: Tensor, side: int
) -> Tensor:
    """(M, side, side) float64 ink, 0 to 1, of one quarter each; x comes first in an offset."""
    axis = (torch.arange(side).double() + 0.5) * (2.0 / side) - 1.0
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    point_P2 = torch.stack((x.flatten(), y.flatten()), dim=-1)
    lines_ML22 = _line_table()[sign_M] * size_M[:, None, None, None] + offset_M2[:, None, None]
    start_ML2, end_ML2 = lines_ML22.unbind(2)
    along_ML2 = end_ML2 - start_ML2
    # The nearest point of a line is as far along it as the pixel's projection, within its ends.
    to_pixel_MLP2 = point_P2 - start_ML2[:, :, None]
    length_ML1 = along_ML2.square().sum(-1, keepdim=True)
    share_MLP = (to_pixel_MLP2 @ along_ML2[..., None])[..., 0] / length_ML1
    nearest_MLP2 = share_MLP.clamp(0.0, 1.0)[..., None] * along_ML2[:, :, None]
    square_MP = (to_pixel_MLP2 - nearest_MLP2).square().sum(-1).amin(1)
    ink_MP = (-0.5 * square_MP / stroke_M[:, None].square()).exp()
    return ink_MP.view(-1, side, side)


class Pairs:
    """Pairs as an `ImageSource`; image i is a pure function of (seed, i) and of the settings.

    Images are drawn when they are asked for. The class of image i is i mod num_classes.

    Args:
        image_size: side in pixels, even, 24 or more.
        count: number of images.
        seed: other seeds give other images of the same distribution.
        num_classes: the first of `RELATIONS`; default all.

    Raises:
        ValueError: a setting is out of range; the message names its flag.
    """

    name = "pairs"

    def __init__(
        self, image_size: int, count: int, seed: int = 0, num_classes: int | None = None
    ) -> None:
        num_classes = len(RELATIONS) if num_classes is None else num_classes
        if not 1 <= num_classes <= len(RELATIONS):
            raise ValueError(
                f"pairs have 1..{len(RELATIONS)} classes, found --num-classes {num_classes}"
            )
        if image_size < LEAST_SIDE or image_size % 2:
            raise ValueError(
                f"--image-size {image_size}: pairs need an even number of pixels, at least "
                f"{LEAST_SIDE}, to show four signs"
            )
        if count < 1:
            raise ValueError(f"pairs need at least 1 image, found count={count}")
        self.image_size = image_size
        self.seed = seed
        self._count = count
        self.class_names = tuple(RELATIONS)[:num_classes]
        self.labels = torch.arange(count) % num_classes
        letters = [[ord(letter) - ord("a") for letter in word] for word in RELATIONS.values()]
        self._letter_C4 = torch.tensor(letters)
        recipe = f"pairs-1/{image_size}/{count}/{seed}/{num_classes}/{SIZE}/{OFFSET}/{STROKE}"
        recipe += f"/{SIGNS}"
        self.fingerprint = hashlib.sha256(recipe.encode()).hexdigest()

    def __len__(self) -> int:
        return self._count

    def fresh(self, count: int) -> Pairs:
        """So many other images of the same distribution."""
        return Pairs(self.image_size, count, self.seed + 1, len(self.class_names))

    def signs(self, ids: Tensor) -> Tensor:
        """(B,) int64 -> (B, 4) int64: what stands in each quarter, in the order of `SIGNS`."""
        ids = check_ids(ids, self._count, self.name)
        # Four different signs, of which letter a is the first, b the second and so on.
        different_BS = Rng(self.seed).permutation("pairs.signs", ids, len(SIGNS))
        return different_BS.gather(1, self._letter_C4[self.labels[ids]])

    def images(self, ids: Tensor) -> Tensor:
        """(B,) int64 -> (B, 3, H, W) uint8; IndexError for an id outside the set."""
        ids = check_ids(ids, self._count, self.name)
        side = self.image_size
        out = torch.empty(len(ids), 3, side, side, dtype=torch.uint8)
        # Blocks of about a million pixels keep the intermediates small.
        block = max(1, 2**18 // side**2)
        for start in range(0, len(ids), block):
            grey = self._render(ids[start : start + block])
            out[start : start + block] = grey[:, None]
        return out

    def _render(self, ids: Tensor) -> Tensor:
        """(B,) -> (B, H, W) uint8."""
        batch = len(ids)
        unit = Rng(self.seed).uniform("pairs.form", ids, DRAWS * QUARTERS).double()
        unit_MK = unit.view(batch * QUARTERS, DRAWS)

        def between(bounds: tuple[float, float], unit_M: Tensor) -> Tensor:
            low, high = bounds
            return low + (high - low) * unit_M

        half = self.image_size // 2
        ink_MHW = draw_signs(
            self.signs(ids).flatten(),
            between(SIZE, unit_MK[:, 0]),
            between(OFFSET, unit_MK[:, 1:3]),
            between(STROKE, unit_MK[:, 3]),
            half,
        )
        # Quarters in two rows of two: (B, row, column, y, x) -> (B, row, y, column, x).
        quarters = ink_MHW.view(batch, 2, 2, half, half).transpose(2, 3)
        return (255.0 * quarters.reshape(batch, 2 * half, 2 * half)).round().to(torch.uint8)
