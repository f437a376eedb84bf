"""Files of a folder of images: which there are, of which class, and which cannot be used."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from pathlib import Path

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm")
PREPROCESSING = "adm-crop-1/box-halve,bicubic,centre/rgb,white-under-transparency,no-exif-rotation"
MAX_UPSCALE = 1.25
Files = list[tuple[Path, int]]

logger = logging.getLogger(__name__)


def find_images(folder: Path) -> tuple[tuple[str, ...], Files]:
    """Class names, and (path, label) of every image file, sorted by class and relative path.

    Raises:
        FileNotFoundError: no such folder, no images in it, or a class folder without images.
        ValueError: images both in the folder itself and in subfolders, or not a folder.
    """
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: no such folder; check --data")
    if not folder.is_dir():
        raise ValueError(f"{folder}: expected a folder of images, found a file; check --data")
    entries = sorted(e for e in folder.iterdir() if not e.name.startswith("."))
    flat = [entry for entry in entries if entry.is_file() and _is_image(entry.name)]
    classes = [(entry, _walk(entry)) for entry in entries if entry.is_dir()]
    if flat and any(paths for _, paths in classes):
        full = next(entry for entry, paths in classes if paths)
        raise ValueError(
            f"{folder}: found images at its top level (such as {flat[0].name}) and in "
            f"subfolders (such as {full.name}); --data needs one folder per class, or "
            "one flat folder"
        )
    if flat:
        return (folder.resolve().name,), [(path, 0) for path in flat]
    if not any(paths for _, paths in classes):
        kinds = " ".join(extension[1:] for extension in EXTENSIONS)
        raise FileNotFoundError(
            f"{folder}: found no images ({kinds}) in it or in its subfolders; check --data"
        )
    bare = [entry.name for entry, paths in classes if not paths]
    if bare:
        raise FileNotFoundError(
            f"{folder}: {len(bare)} class folders of --data hold no images; "
            "fill or remove them" + listing(bare, len(bare), 20)
        )
    names = tuple(entry.name for entry, _ in classes)
    files = [(path, label) for label, (_, paths) in enumerate(classes) for path in paths]
    return names, files


def _walk(folder: Path) -> list[Path]:
    """Image files below a folder at any depth; links are followed, each real folder once."""
    paths = []
    seen = set()
    for base, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(base)
        # The list is changed in place, which is how os.walk is told where not to descend.
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths += [Path(base, name) for name in names if _is_image(name)]
    return sorted(paths)


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")


def listing(lines: Iterable[str], count: int, most: int) -> str:
    """Lines for the end of an error, `most` of them."""
    shown = [line for line, _ in zip(lines, range(most), strict=False)]
    rest = [f"... and {count - most} more"] if count > most else []
    return "".join(f"\n  {line}" for line in shown + rest)


def refuse_broken(
    folder: Path, files: Files, found: list, max_broken: int
) -> list[tuple[Path, str]]:
    """`found` holds a string, the reason, for every broken file; returns the broken files."""
    broken = [
        (path, reason)
        for (path, _), reason in zip(files, found, strict=True)
        if isinstance(reason, str)
    ]
    if len(broken) > max_broken:
        raise ValueError(
            f"{folder}: {len(broken)} of {len(files)} image files cannot be read, "
            f"--max-broken allows {max_broken}; mend or remove them, or raise --max-broken"
            + listing((f"{path}: {reason}" for path, reason in broken), len(broken), 20)
        )
    return broken


def refuse_small(folder: Path, files: Files, sizes: list, image_size: int, allow: bool) -> None:
    """Warns of images that have to be enlarged; refuses them beyond `MAX_UPSCALE`.

    `sizes` holds (width, height), or a string for files that cannot be read.
    """
    small = [
        (min(size), path, size)
        for (path, _), size in zip(files, sizes, strict=True)
        if not isinstance(size, str) and min(size) < image_size
    ]
    too_small = [entry for entry in small if entry[0] * MAX_UPSCALE < image_size]
    if too_small and not allow:
        smallest = min(too_small)[0]
        lines = (f"{path}: {size[0]} x {size[1]} pixels" for _, path, size in too_small)
        raise ValueError(
            f"{folder}: {len(too_small)} of {len(files)} images are too small for "
            f"--image-size {image_size} (the shorter side may be enlarged by "
            f"{MAX_UPSCALE} at most); lower --image-size to {int(smallest * MAX_UPSCALE)} or "
            "less, or pass --allow-upscale" + listing(lines, len(too_small), 10)
        )
    if small:
        _, path, size = min(small)
        logger.warning(
            "%s: %d of %d images are smaller than --image-size %d and are enlarged; "
            "the smallest is %s (%d x %d pixels)",
            folder,
            len(small),
            len(files),
            image_size,
            path,
            *size,
        )
