"""Which class an image belongs to, from where it lies."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from heptapod_fast.data.entries import Entry, by_parts

# Folders of these names hold parts of a set, not classes.
_SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing", "dev"}
# class_number.jpg, as in the flat folders that guided-diffusion reads, n01440764_123.JPEG.
_PREFIXED = re.compile(r"([^/]*[^/_])_+[0-9]+\.[^./]+")
_NUMBERED = re.compile(r"[0-9]+$")
LABEL = ".cls"  # the ending of a label's file, in sets that webdataset has written
_SHOWN = 5


class LayoutError(ValueError):
    """Images that lie in a way that says nothing sure of their classes."""


def refuse_splits(root: str, folders: Sequence[str]) -> None:
    """LayoutError where the folders of a root are parts of a set: train and val are no classes."""
    if all(name.lower() in _SPLITS for name in folders):
        listed = ", ".join(folders)
        raise LayoutError(
            f"{root}: its folders ({listed}) are named like the parts of a set, not like classes: "
            f"name one of them, --data {root}/{folders[0]} (rename them if they are classes)"
        )


def hint_of_flat(images: Sequence[Entry]) -> str:
    """What to say of a flat folder whose file names are plainly made of classes; else empty."""
    found = Counter(
        match[1] for image in images if (match := _PREFIXED.fullmatch(image.inner)) is not None
    )
    is_plain = len(found) > 1 and found.total() == len(images) and min(found.values()) > 1
    if not is_plain:
        return ""
    shown = ", ".join(f"{name}_*" for name in sorted(found)[:_SHOWN])
    return (
        f"a flat folder is one class, but its file names begin in {len(found)} ways ({shown}, ...)"
        ": to train on classes, move the files of each into a folder of its own"
    )


def hint_of_one(name: str, images: Sequence[Entry]) -> str:
    """What to say where everything lies in the folders of a single folder; else empty."""
    inner = {parts[1] for image in images if len(parts := by_parts(image)) > 2}
    is_plain = len(inner) > 1 and all(image.inner.count("/") > 1 for image in images)
    if not is_plain:
        return ""
    return (
        f"one class, {name}, whose images all lie in {len(inner)} folders inside of it: if those "
        f"are the classes, name the folder {name} with --data"
    )


@dataclass(frozen=True)
class Labelled:
    """Images with labels of their own.

    Attributes:
        images: in their order. labels: one for each. class_names: one for each label.
        others: files that are neither images nor labels.
    """

    images: list[Entry]
    labels: list[int]
    class_names: tuple[str, ...]
    others: list[Entry]


def refuse_shards(
    root: str, names: Sequence[str], images: Sequence[Entry], others: Sequence[Entry]
) -> None:
    """LayoutError where archives that are read as classes are plainly shards of a set without
    labels: numbered, with a text or a record beside every image (webdataset, img2dataset)."""
    beside = {_key(entry) for entry in others if entry.inner.endswith((".json", ".txt"))}
    are_numbered = len(names) > 1 and all(_NUMBERED.search(name) for name in names)
    if are_numbered and all(_key(image) in beside for image in images):
        raise LayoutError(
            f"{root}: {len(names)} archives ({names[0]}, {names[1]}, ...) look like shards of one "
            f"set, and there are no labels ({LABEL} files) in them: to train on classes, add the "
            "labels or unpack them into one folder per class; without classes, into one folder"
        )


def labels_beside(root: str, images: Sequence[Entry], others: Sequence[Entry]) -> Labelled | None:
    """Labels from the files KEY.cls beside KEY.jpg, in which webdataset keeps them; numbers are
    sorted as numbers. None where there are no such files. Of KEY.jpg and KEY.mask.png, which is
    something else of the same sample, the first one is the image.

    Raises:
        LayoutError: images without a label, or labels that are no short texts.
    """
    by_key = {_key(entry): entry for entry in others if entry.inner.endswith(LABEL)}
    if not by_key:
        return None
    pictures = [image for image in images if image.inner.rsplit("/", 1)[-1].count(".") == 1]
    beside = [image for image in images if image.inner.rsplit("/", 1)[-1].count(".") > 1]
    others = [entry for entry in [*others, *beside] if not entry.inner.endswith(LABEL)]
    images = pictures or list(images)
    bare = [str(image) for image in images if _key(image) not in by_key]
    if bare:
        raise LayoutError(
            f"{root}: {len(by_key)} labels ({LABEL} files) for {len(images)} images: {bare[0]} has "
            "none; add the labels, or remove them all and sort images into one folder per class"
        )
    texts = [_read_label(by_key[_key(image)]) for image in images]
    are_numbers = all(text.isdecimal() for text in texts)
    names = sorted(set(texts), key=int) if are_numbers else sorted(set(texts))
    number = {name: label for label, name in enumerate(names)}
    labels = [number[text] for text in texts]
    return Labelled(images, labels, tuple(names), others)


def _key(entry: Entry) -> str:
    """What the files of one sample have in common: the path up to the first dot of the name."""
    folder, _, name = entry.inner.rpartition("/")
    return f"{folder}/{name.split('.', 1)[0]}"


def _read_label(entry: Entry) -> str:
    with entry.open() as stream:
        raw = stream.read(257)
    try:
        text = raw.decode().strip()
    except UnicodeDecodeError:
        text = ""
    if not text or len(raw) > 256:
        raise LayoutError(f"{entry}: expected a label, a number or a short text")
    # 007 and 7 are one label.
    return str(int(text)) if text.isdecimal() else text


def hint_of_numbers(names: Sequence[str]) -> str:
    """What to say where folders named by numbers do not have these numbers as labels."""
    if not all(name.isdecimal() for name in names):
        return ""
    wrong = [(label, name) for label, name in enumerate(names) if int(name) != label]
    if not wrong:
        return ""
    label, name = wrong[0]
    return (
        f"class folders are numbers, and sorted as text: label {label} is folder {name}; "
        "--classes of tools/sample.py also takes the names, as name:" + name
    )


def kinds(entries: Sequence[Entry]) -> str:
    """Files by their endings: "3 .txt, 1 without an ending"."""
    counts = Counter(_ending(entry.inner) for entry in entries)
    return ", ".join(f"{count} {ending}" for ending, count in counts.most_common(2 * _SHOWN))


def _ending(inner: str) -> str:
    name = inner.rsplit("/", 1)[-1]
    _, dot, ending = name.rpartition(".")
    return f".{ending.lower()}" if dot else "without an ending"
