"""Which tokens --keep says are given, and the pictures of a completion."""

import pytest
import torch
from PIL import Image

from heptapod_fast.sampling.completion import KEEPS, area_of, beside_each_other, known_tokens
from heptapod_fast.tokenizers import token_spec

SPEC = token_spec("patch", 16, 4)  # 4 x 4 tokens of 4 x 4 pixels

SHOWN = {
    "left-half": "##.. ##.. ##.. ##..",
    "right-half": "..## ..## ..## ..##",
    "top-half": "#### #### .... ....",
    "bottom-half": ".... .... #### ####",
    "centre": ".... .##. .##. ....",
    "border": "#### #..# #..# ####",
}


def shown(known):
    rows = known.view(4, 4).tolist()
    return " ".join("".join("#" if token else "." for token in row) for row in rows)


def mask(path, size, white):
    """A picture that is white at these (row, column)s."""
    image = Image.new("L", size)
    for row, column in white:
        image.putpixel((column, row), 255)
    image.save(path)
    return str(path)


def test_named_parts():
    assert set(SHOWN) == set(KEEPS)
    assert {keep: shown(known_tokens(keep, SPEC, 16)) for keep in KEEPS} == SHOWN


def test_a_grid_of_odd_size_has_a_middle():
    known = known_tokens("centre", token_spec("patch", 12, 4), 12).view(3, 3)
    assert bool(known.all()) is False and bool(known.any())


def test_a_mask_has_a_pixel_for_each_token_or_for_each_pixel(tmp_path):
    small = mask(tmp_path / "tokens.png", (4, 4), [(0, 1), (3, 3)])
    assert shown(known_tokens(small, SPEC, 16)) == ".#.. .... .... ...#"
    area = [(row, column) for row in range(4, 8) for column in range(8, 12)]
    half = [(row, column) for row in range(12, 16) for column in range(3)]
    large = mask(tmp_path / "pixels.png", (16, 16), area + half)
    assert shown(known_tokens(large, SPEC, 16)) == ".... ..#. .... ...."


@pytest.mark.parametrize(
    "keep, text",
    [
        ("half", "no such file; expected left-half"),
        ("wrong.png", "has 5 x 4 pixels; expected .* of 4 x 4 pixels .* or 16 x 16"),
        ("all.png", "gives 16 of the 16 tokens"),
        ("none.png", "gives 0 of the 16 tokens"),
        ("text.png", "not an image"),
    ],
)
def test_masks_that_do_not_fit(tmp_path, monkeypatch, keep, text):
    monkeypatch.chdir(tmp_path)
    mask("wrong.png", (5, 4), [(0, 0)])
    mask("all.png", (4, 4), [(row, column) for row in range(4) for column in range(4)])
    mask("none.png", (4, 4), [])
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match=text):
        known_tokens(keep, SPEC, 16)


def test_the_pictures_beside_each_other():
    known = torch.tensor([True, False, False, False])
    area = area_of(known, 4)
    assert area.tolist() == [[True, True, False, False]] * 2 + [[False] * 4] * 2
    originals = torch.full((2, 3, 4, 4), 7, dtype=torch.uint8)
    completed = torch.full((2, 3, 4, 4), 9, dtype=torch.uint8)
    given, drawn, original = beside_each_other(originals, completed, area)[3:]
    assert torch.equal(drawn, completed[1]) and torch.equal(original, originals[1])
    assert bool((given[:, area] == 7).all()) and bool((given[:, ~area] == 128).all())
