"""Pairs: which signs are alike, drawn where and how, against a drawing pixel by pixel."""

import math

import pytest
import torch

from heptapod_fast.data.pairs import OFFSET, RELATIONS, SIGNS, SIZE, STROKE, Pairs, draw_signs
from heptapod_fast.rng import Rng

IDS = torch.arange(400)


def test_the_class_says_which_signs_are_alike():
    pairs = Pairs(24, 400)
    for signs, label in zip(pairs.signs(IDS).tolist(), pairs.labels.tolist(), strict=True):
        top_left, top_right, low_left, low_right = signs
        different = len(set(signs))
        if pairs.class_names[label] == "rows":
            assert top_left == top_right and low_left == low_right and different == 2
        elif pairs.class_names[label] == "columns":
            assert top_left == low_left and top_right == low_right and different == 2
        elif pairs.class_names[label] == "diagonals":
            assert top_left == low_right and top_right == low_left and different == 2
        else:
            assert different == {"all": 1, "none": 4}[pairs.class_names[label]]


def test_every_quarter_alone_is_the_same_in_every_class():
    """What the whole set rests on: a neighbourhood does not show the class."""
    pairs = Pairs(24, 20_000)
    signs = pairs.signs(torch.arange(20_000))
    for label in range(5):
        for quarter in range(4):
            counts = signs[pairs.labels == label, quarter].bincount(minlength=len(SIGNS))
            share = counts.double() / counts.sum()
            # 4,000 draws of 8 kinds: five deviations of a share.
            assert float((share - 1 / 8).abs().max()) < 5 * math.sqrt(1 / 8 * 7 / 8 / 4000)


def plain(sign, size, offset, stroke, side):
    """Ink of one sign by loops over pixels and lines."""
    found = torch.zeros(side, side, dtype=torch.float64)
    for row in range(side):
        for column in range(side):
            x = (column + 0.5) * 2 / side - 1
            y = (row + 0.5) * 2 / side - 1
            for (x0, y0), (x1, y1) in list(SIGNS.values())[sign]:
                ax, ay = size * x0 + offset[0], size * y0 + offset[1]
                bx, by = size * x1 + offset[0], size * y1 + offset[1]
                dx, dy = bx - ax, by - ay
                share = ((x - ax) * dx + (y - ay) * dy) / (dx * dx + dy * dy)
                share = min(1.0, max(0.0, share))
                apart = math.hypot(x - ax - share * dx, y - ay - share * dy)
                ink = math.exp(-(apart**2) / (2 * stroke**2))
                found[row, column] = max(float(found[row, column]), ink)
    return found


def test_signs_by_loops():
    signs = torch.arange(len(SIGNS))
    unit = Rng(2).uniform("test", signs, 4).double()
    size, offset, stroke = (
        0.6 + 0.2 * unit[:, 0],
        0.3 * unit[:, 1:3] - 0.15,
        0.1 + 0.05 * unit[:, 3],
    )
    found = draw_signs(signs, size, offset, stroke, 9)
    for sign in range(len(SIGNS)):
        expected = plain(sign, float(size[sign]), offset[sign].tolist(), float(stroke[sign]), 9)
        torch.testing.assert_close(found[sign], expected, rtol=1e-9, atol=1e-9)


def test_an_image_is_four_quarters():
    pairs = Pairs(24, 50, seed=3)
    ids = torch.tensor([7, 31])
    unit = Rng(3).uniform("pairs.form", ids, 16).double().view(2, 4, 4)
    images = pairs.images(ids)
    assert images.shape == (2, 3, 24, 24) and images.dtype == torch.uint8
    assert torch.equal(images[:, 0], images[:, 1]) and torch.equal(images[:, 0], images[:, 2])
    for image in range(2):
        for quarter, (row, column) in enumerate(((0, 0), (0, 12), (12, 0), (12, 12))):
            draw = unit[image, quarter]
            expected = plain(
                int(pairs.signs(ids)[image, quarter]),
                float(SIZE[0] + (SIZE[1] - SIZE[0]) * draw[0]),
                (OFFSET[0] + (OFFSET[1] - OFFSET[0]) * draw[1:3]).tolist(),
                float(STROKE[0] + (STROKE[1] - STROKE[0]) * draw[3]),
                12,
            )
            part = images[image, 0, row : row + 12, column : column + 12].double()
            assert float((part - 255 * expected).abs().max()) < 0.5001


def test_images_depend_on_seed_and_id_alone():
    pairs = Pairs(24, 400)
    some = torch.tensor([399, 3, 3, 250])
    assert torch.equal(pairs.images(some), pairs.images(IDS)[some])
    assert not torch.equal(pairs.images(some), Pairs(24, 400, seed=1).images(some))
    assert pairs.labels.tolist() == [i % 5 for i in range(400)]
    assert pairs.class_names == tuple(RELATIONS)


def test_the_fingerprint_names_what_makes_the_images():
    prints = {
        Pairs(*settings).fingerprint
        for settings in ((24, 10), (26, 10), (24, 11), (24, 10, 1), (24, 10, 0, 4))
    }
    assert len(prints) == 5 and all(len(found) == 64 for found in prints)
    assert Pairs(24, 10).fingerprint == Pairs(24, 10).fingerprint


def test_fresh_ones_are_others_of_the_same_kind():
    pairs = Pairs(24, 10, seed=4, num_classes=3)
    fresh = pairs.fresh(20)
    assert len(fresh) == 20 and fresh.image_size == 24 and fresh.class_names == pairs.class_names
    ids = torch.arange(10)
    assert not torch.equal(fresh.images(ids), pairs.images(ids))


@pytest.mark.parametrize(
    "settings, named",
    [
        ((22, 10), "--image-size 22: pairs need an even number of pixels, at least 24"),
        ((25, 10), "--image-size 25"),
        ((24, 0), "count=0"),
        ((24, 10, 0, 6), "1..5 classes, found --num-classes 6"),
        ((24, 10, 0, 0), "--num-classes 0"),
    ],
)
def test_settings_out_of_range(settings, named):
    with pytest.raises(ValueError, match=named):
        Pairs(*settings)
    with pytest.raises(IndexError, match=r"pairs: expected image ids in 0\.\.9"):
        Pairs(24, 10).images(torch.tensor([10]))
