"""Classes by number and name."""

import pytest

from heptapod_fast.classes import as_text, chosen, numbered

NAMES = ("ant", "10", "2", "bee, honey")


@pytest.mark.parametrize(
    "text, expected",
    [
        ("0", [0]),
        ("2,0", [2, 0]),
        ("ant", [0]),
        ("ant, 1", [0, 1]),
        ("2", [2]),  # a number is a label
        ("name:2,name:10", [2, 1]),
        ("bee, honey", [3]),
        ("name:ant", [0]),
    ],
)
def test_numbers_and_names(text, expected):
    assert chosen(text, NAMES) == expected


@pytest.mark.parametrize("text", ["4", "-1", "cat", "", "0,", "name:cat", "1.0"])
def test_what_is_no_class_is_refused_with_those_there_are(text):
    with pytest.raises(ValueError, match="--classes .*has 4 .*0 ant, 1 10, 2 2"):
        chosen(text, NAMES)


def test_long_lists_are_cut():
    names = [f"c{number}" for number in range(1000)]
    assert numbered(names) == "0 c0, 1 c1, 2 c2, 3 c3, 4 c4, 5 c5, ..., 999 c999"
    assert numbered(names[:8]) == ", ".join(f"{k} c{k}" for k in range(8))


def test_bytes_that_are_no_text():
    assert as_text("caf\udce9") == r"caf\xe9"
    assert as_text("größe") == "größe"
