"""Classes by number and by name, as users meet them."""

from __future__ import annotations

import os
from collections.abc import Sequence

_SHOWN = 6  # classes at the start of a list that is not shown whole
_BY_NAME = "name:"


def as_text(name: str) -> str:
    """A name of a file system as text that can be printed: bytes that are no UTF-8 are escaped."""
    return os.fsencode(name).decode(errors="backslashreplace")


def numbered(names: Sequence[str]) -> str:
    """Which class is which number: "0 ant, 1 bee, 2 cat". Of many the first ones and the last."""
    pairs = [f"{label} {name}" for label, name in enumerate(names)]
    if len(pairs) > _SHOWN + 2:
        pairs = [*pairs[:_SHOWN], "...", pairs[-1]]
    return ", ".join(pairs)


def chosen(text: str, names: Sequence[str]) -> list[int]:
    """The classes of --classes, separated by commas: numbers, names, or "name:10" where a name is
    a number.

    Raises:
        ValueError: a class that there is not; says which there are.
    """
    label_of = {name: label for label, name in enumerate(names)}
    if text in label_of and not text.isdecimal():
        return [label_of[text]]  # a name with commas in it
    found = []
    for word in (part.strip() for part in text.split(",")):
        label = _label(word, label_of)
        if label is None:
            raise ValueError(
                f"--classes {text}: {word!r} is no class of this run, which has {len(names)} "
                f"(0 to {len(names) - 1}): {numbered(names)}"
            )
        found.append(label)
    return found


def _label(word: str, label_of: dict[str, int]) -> int | None:
    if word.startswith(_BY_NAME):
        return label_of.get(word.removeprefix(_BY_NAME))
    if word.isdecimal():
        label = int(word)
        return label if label < len(label_of) else None
    return label_of.get(word)
