"""The images of a set, in a folder or an archive: which there are, of which class, and which cannot
be used."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from heptapod_fast.classes import as_text
from heptapod_fast.data.archive import (
    compressed_tar,
    expand,
    is_archive,
    is_compressed,
    list_archive,
    split,
)
from heptapod_fast.data.entries import Contents, Entry, by_parts, list_folder
from heptapod_fast.data.layout import (
    LABEL,
    hint_of_flat,
    hint_of_numbers,
    hint_of_one,
    kinds,
    labels_beside,
    refuse_shards,
    refuse_splits,
)

# What Pillow can open among the formats that pictures are kept in. Pillow may be built without
# some of them (`image_endings`).
ENDINGS = (
    ".jpg .jpeg .jpe .jfif .png .apng .bmp .dib .webp .gif .tif .tiff .ppm .pgm .pbm .pnm .tga "
    ".avif .jp2 .j2k"
).split()
PREPROCESSING = "adm-crop-1/box-halve,bicubic,centre/rgb,white-under-transparency,no-exif-rotation"
MAX_UPSCALE = 1.25
_CACHE_GROUP = "zarr.json"  # of data/cache/format.py, which builds on this file
Files = list[tuple[Entry, int]]
Progress = Callable[[int, int], None]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageFiles:
    """The images of a set.

    Attributes:
        root: the folder, the archive, or a folder in an archive.
        name: of the root, short.
        class_names: one per class; text that can be printed, whatever the folders are called.
        files: (file, label) of every image, sorted by class and path.
        notes: what a user should know of how they were found.
    """

    root: Path
    name: str
    class_names: tuple[str, ...]
    files: Files
    notes: list[str] = field(default_factory=list)


def image_endings() -> tuple[str, ...]:
    """Endings of files that are taken for images: `ENDINGS`, as far as this Pillow reads them."""
    from PIL import Image

    there = Image.registered_extensions()
    return tuple(ending for ending in ENDINGS if ending in there)


def find_images(root: Path, progress: Progress | None = None) -> ImageFiles:
    """The images of a folder or an archive, by class.

    One class per folder of the root, files searched below it at any depth; or one class, for images
    that lie in the root itself. Where every image has a label in a file beside it (webdataset),
    these count. Where there are no images but archives, each stands for the folder of its name.

    Args:
        progress: called as progress(megabytes passed, megabytes in all) while an archive's contents
            are read.

    Raises:
        FileNotFoundError: no such folder, no images in it, or a class folder without images.
        ValueError: images both in the folder itself and in subfolders, a layout that is plainly
            another, not a folder and not an archive, or an archive that cannot be read.
        OSError: a folder that cannot be listed.
    """
    contents, name = _contents(root, progress)
    endings = image_endings()
    images, others = _sorted_out(contents, endings)
    notes = []
    if not images:
        archives = _archives(root, contents)
        contents = _unpacked(root, contents, archives, progress)
        images, others = _sorted_out(contents, endings)
        if archives:
            notes.append(f"{len(archives)} archives, each read as the folder of its name")
    if not images:
        raise _no_images(root, others, endings)
    labelled = labels_beside(str(root), images, others)
    if labelled is not None:
        class_names = labelled.class_names
        labels = labelled.labels
        images = labelled.images
        others = labelled.others
        notes.append(f"labels from the {LABEL} files beside the images")
    else:
        if notes:
            refuse_shards(str(root), sorted(contents.folders), images, others)
        class_names, labels, hints = _classes_of_folders(root, name, contents, images)
        notes += hints
    if others:
        notes.append(f"left aside, for they are no images that can be read: {kinds(others)}")
    files = list(zip(images, labels, strict=True))
    return ImageFiles(root, as_text(name), _readable_names(root, class_names), files, notes)


def _contents(root: Path, progress: Progress | None) -> tuple[Contents, str]:
    """Everything in a root, and its name."""
    if root.is_dir():
        return list_folder(root), root.resolve().name
    in_archive = split(root)
    if in_archive is not None:
        archive, folder = in_archive
        name = folder.rsplit("/", 1)[-1] if folder else archive.stem
        return list_archive(archive, folder, progress), name
    if not root.exists():
        raise FileNotFoundError(f"{root}: no such folder or archive; check --data")
    raise ValueError(
        f"{root}: expected a folder of images, or a .tar or .zip of one, found a file; check --data"
    )


def _sorted_out(contents: Contents, endings: tuple[str, ...]) -> tuple[list[Entry], list[Entry]]:
    """(images, other files), both sorted."""
    images: list[Entry] = []
    others: list[Entry] = []
    for entry in sorted(contents.files, key=by_parts):
        if entry.inner.lower().endswith(endings):
            images.append(entry)
        else:
            others.append(entry)
    return images, others


def _archives(root: Path, contents: Contents) -> list[Entry]:
    """The archives in the root itself, of which each stands for a folder.

    Raises:
        ArchiveError: one of them is compressed, and its images would be missing.
        ValueError: two of them stand for one folder.
    """
    in_root = sorted((e for e in contents.files if "/" not in e.inner), key=by_parts)
    packed = [entry for entry in in_root if is_compressed(entry.inner)]
    if packed:
        raise compressed_tar(str(packed[0]))
    archives = [entry for entry in in_root if is_archive(entry.inner)]
    by_stem: dict[str, str] = {}
    for entry in archives:
        stem = entry.inner.rsplit(".", 1)[0]
        other = by_stem.setdefault(stem, entry.inner)
        if other != entry.inner or stem in contents.folders:
            also = other if other != entry.inner else f"the folder {stem}"
            raise ValueError(f"{root}: {entry.inner} and {also} are one class; remove one of them")
    return archives


def _unpacked(
    root: Path, contents: Contents, archives: list[Entry], progress: Progress | None
) -> Contents:
    """The contents, archives replaced by what they hold."""
    replaced = {entry.inner for entry in archives}
    files = [entry for entry in contents.files if entry.inner not in replaced]
    folders = set(contents.folders)
    total = sum(entry.size() for entry in archives)
    done = 0
    for archive in archives:
        files += expand(archive)
        folders.add(archive.inner.rsplit(".", 1)[0])
        done += archive.size()
        if progress is not None:
            progress(done // 2**20, total // 2**20)
    return Contents(files, folders)


def _no_images(root: Path, others: list[Entry], endings: Sequence[str]) -> FileNotFoundError:
    caches = [
        by_parts(entry)[:-1] for entry in others if entry.inner.rsplit("/", 1)[-1] == _CACHE_GROUP
    ]
    if caches:
        return _a_cache(root, min(caches, key=len))
    there = f"; there are {kinds(others)}" if others else ""
    wanted = " ".join(ending[1:] for ending in endings)
    return FileNotFoundError(
        f"{root}: found no images ({wanted}) in it or in its subfolders{there}; check --data"
    )


def _a_cache(root: Path, inside: Sequence[str]) -> FileNotFoundError:
    """inside: the folders that lead to a cache of tokens."""
    name = "/".join(inside)
    what = f"{root} holds a cache of tokens" + (f", {name}" if name else "")
    if root.is_dir():
        return FileNotFoundError(f"{what}: name that with --data")
    return FileNotFoundError(f"{what}: unpack it, a cache is read as a folder")


def _classes_of_folders(
    root: Path, name: str, contents: Contents, images: list[Entry]
) -> tuple[tuple[str, ...], list[int], list[str]]:
    """(class names, a label for each of the sorted images, notes)."""
    flat = [image for image in images if "/" not in image.inner]
    if flat and len(flat) < len(images):
        nested = next(image for image in images if "/" in image.inner)
        raise ValueError(
            f"{root}: found images at its top level (such as {flat[0].inner}) and in "
            f"subfolders (such as {by_parts(nested)[0]}); --data needs one folder per class, or "
            "one flat folder"
        )
    if flat:
        return (name,), [0] * len(images), _said(hint_of_flat(images))
    folders = [by_parts(image)[0] for image in images]
    class_names = tuple(sorted(contents.folders))
    bare = sorted(contents.folders - set(folders))
    if bare:
        raise FileNotFoundError(
            f"{root}: {len(bare)} class folders of --data hold no images; "
            "fill or remove them" + listing(bare, len(bare), 20)
        )
    refuse_splits(str(root), class_names)
    number = {folder: label for label, folder in enumerate(class_names)}
    notes = _said(hint_of_numbers(class_names))
    if len(class_names) == 1:
        notes += _said(hint_of_one(class_names[0], images))
    return class_names, [number[folder] for folder in folders], notes


def _said(hint: str) -> list[str]:
    return [hint] if hint else []


def _readable_names(root: Path, names: Sequence[str]) -> tuple[str, ...]:
    """Class names as text that can be printed."""
    readable = tuple(as_text(name) for name in names)
    if len(set(readable)) < len(readable):
        raise ValueError(f"{root}: two class folders have names that read alike; rename one")
    return readable


def listing(lines: Iterable[str], count: int, most: int) -> str:
    """Lines for the end of an error, `most` of them."""
    shown = [line for line, _ in zip(lines, range(most), strict=False)]
    rest = [f"... and {count - most} more"] if count > most else []
    return "".join(f"\n  {line}" for line in shown + rest)


def refuse_broken(
    folder: Path, files: Files, found: Sequence[object], max_broken: int
) -> list[tuple[Entry, str]]:
    """`found` holds a string, the reason, for every broken file; returns the broken files."""
    broken = [
        (file, reason)
        for (file, _), reason in zip(files, found, strict=True)
        if isinstance(reason, str)
    ]
    if len(broken) > max_broken:
        raise ValueError(
            f"{folder}: {len(broken)} of {len(files)} image files cannot be read, "
            f"--max-broken allows {max_broken}; mend or remove them, or raise --max-broken"
            + listing((f"{file}: {reason}" for file, reason in broken), len(broken), 20)
        )
    return broken


def refuse_small(
    folder: Path, files: Files, sizes: list, image_size: int, allow: bool, crop_range: float = 1.0
) -> None:
    """Warns of images that have to be enlarged; refuses them beyond `MAX_UPSCALE`.

    sizes: (width, height), or a string for files that cannot be read. crop_range: how much larger
    than image_size the crop is that is cut out first.
    """
    side = int(image_size * crop_range)
    small = [
        (min(size), str(file), size)
        for (file, _), size in zip(files, sizes, strict=True)
        if not isinstance(size, str) and min(size) < side
    ]
    why = f"--image-size {image_size}"
    if side != image_size:
        why += f", of which --crop-ranges {crop_range:g} makes {side} pixels"
    too_small = [entry for entry in small if entry[0] * MAX_UPSCALE < side]
    if too_small and not allow:
        smallest = min(too_small)[0]
        lines = (f"{path}: {size[0]} x {size[1]} pixels" for _, path, size in too_small)
        raise ValueError(
            f"{folder}: {len(too_small)} of {len(files)} images are too small for "
            f"{why} (the shorter side may be enlarged by "
            f"{MAX_UPSCALE} at most); lower --image-size to "
            f"{int(smallest * MAX_UPSCALE / crop_range)} or "
            "less, or pass --allow-upscale" + listing(lines, len(too_small), 10)
        )
    if small:
        _, path, size = min(small)
        logger.warning(
            "%s: %d of %d images are smaller than %s and are enlarged; "
            "the smallest is %s (%d x %d pixels)",
            folder,
            len(small),
            len(files),
            why,
            path,
            *size,
        )
