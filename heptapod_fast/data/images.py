"""A folder of image files as an `ImageSource`, decoded once into memory with Pillow."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from heptapod_fast.data.sources import check_ids

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm")
PREPROCESSING = "adm-crop-1/box-halve,bicubic,centre/rgb,white-under-transparency,no-exif-rotation"
MAX_UPSCALE = 1.25
Progress = Callable[[int, int], None]

logger = logging.getLogger(__name__)


class ImageFolder:
    """Images of a folder: one class per subfolder, or one class for a flat folder.

    Classes are the subfolders in sorted order; files are searched below them at any depth. Files
    and folders whose name starts with a dot, and files that are no images by their extension, are
    ignored. All images are decoded at construction: RGB (grey, palette, CMYK and 16-bit files are
    converted, transparency lies over white), no EXIF rotation, first frame of an animation, then
    `centre_crop`.

    Args:
        folder: the folder.
        image_size: side of the decoded images, in pixels.
        max_broken: how many unreadable files may be left out before it is an error.
        workers: decoding threads; default the number of CPU cores.
        progress: called as progress(files done, files in all) while decoding.
        allow_upscale: enlarge small images by any factor; else by 1.25 at most, with a warning.

    Attributes:
        broken: (path, reason) of every file left out.

    Raises:
        FileNotFoundError: the folder is missing or holds no images, or one of its classes none.
        ValueError: mixed layout, images too small, too many broken files, not enough memory.
    """

    def __init__(self, folder: str | Path, image_size: int, max_broken: int = 0,
                 workers: int | None = None, progress: Progress | None = None,
                 allow_upscale: bool = False) -> None:
        if image_size < 1:
            raise ValueError(f"expected an --image-size of 1 or more, found {image_size}")
        self.folder, self.image_size = Path(folder), image_size
        self.name = self.folder.resolve().name or str(self.folder)
        self.class_names, files = find_images(self.folder)
        check_memory(len(files) * 3 * image_size**2, image_size, self.folder)
        with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
            sizes = list(pool.map(_read_size, (path for path, _ in files)))
            self._refuse_broken(files, sizes, max_broken)
            self._refuse_small(files, sizes, allow_upscale)
            found = self._decode(pool, files, sizes, progress)
        self.broken = self._refuse_broken(files, found, max_broken)
        kept = [k for k, reason in enumerate(found) if not isinstance(reason, str)]
        if not kept:
            raise FileNotFoundError(f"{folder}: none of its {len(files)} images could be read "
                                    f"(first: {self.broken[0][1]}): choose another --data")
        if self.broken:
            logger.warning("%s: left out %d unreadable files, first %s (%s)", folder,
                           len(self.broken), *self.broken[0])
            for row, k in enumerate(kept):  # in place: a copy could need twice the memory
                if row != k:
                    self._pixels[row] = self._pixels[k]
        self._pixels = self._pixels[:len(kept)]
        files = [files[k] for k in kept]
        self.labels = torch.tensor([label for _, label in files], dtype=torch.int64)
        counts = self.labels.bincount(minlength=len(self.class_names)).tolist()
        bare = [name for name, n in zip(self.class_names, counts, strict=True) if n == 0]
        if bare:
            raise FileNotFoundError(f"{folder}: no readable image is left in {len(bare)} class "
                                    "folders of --data; mend or remove them"
                                    + _listing(bare, len(bare), 20))
        self.fingerprint = self._fingerprint(files)

    def __len__(self) -> int:
        return len(self.labels)

    def images(self, ids: Tensor) -> Tensor:
        """(B,) int64 -> (B, 3, H, W) uint8; IndexError for an id outside the set."""
        return self._pixels[check_ids(ids, len(self), self.name)]

    def _decode(self, pool: ThreadPoolExecutor, files: list[tuple[Path, int]], sizes: list,
                progress: Progress | None) -> list[str | None]:
        """Fills the pixels; returns for every file None or the reason why it cannot be read."""
        side = self.image_size
        self._pixels = torch.empty(len(files), 3, side, side, dtype=torch.uint8)
        pixels = self._pixels.numpy()

        def one(k: int) -> str | None:
            if isinstance(sizes[k], str):
                return sizes[k]
            pixels_or_reason = _read(files[k][0], partial(_pixels, size=side))
            if isinstance(pixels_or_reason, str):
                return pixels_or_reason
            pixels[k] = pixels_or_reason
            return None

        reasons = []
        for reason in pool.map(one, range(len(files))):
            reasons.append(reason)
            if progress is not None:
                progress(len(reasons), len(files))
        return reasons

    def _refuse_broken(self, files: list[tuple[Path, int]], found: list,
                       max_broken: int) -> list[tuple[Path, str]]:
        """`found` holds a string, the reason, for every broken file; returns the broken files."""
        broken = [(path, reason) for (path, _), reason in zip(files, found, strict=True)
                  if isinstance(reason, str)]
        if len(broken) > max_broken:
            raise ValueError(
                f"{self.folder}: {len(broken)} of {len(files)} image files cannot be read, "
                f"--max-broken allows {max_broken}; mend or remove them, or raise --max-broken"
                + _listing((f"{path}: {reason}" for path, reason in broken), len(broken), 20))
        return broken

    def _refuse_small(self, files: list[tuple[Path, int]], sizes: list, allow: bool) -> None:
        """Warns of images that have to be enlarged; refuses them beyond `MAX_UPSCALE`."""
        small = [(min(size), path, size) for (path, _), size in zip(files, sizes, strict=True)
                 if not isinstance(size, str) and min(size) < self.image_size]
        too_small = [entry for entry in small if entry[0] * MAX_UPSCALE < self.image_size]
        if too_small and not allow:
            smallest = min(too_small)[0]
            lines = (f"{path}: {size[0]} x {size[1]} pixels" for _, path, size in too_small)
            raise ValueError(
                f"{self.folder}: {len(too_small)} of {len(files)} images are too small for "
                f"--image-size {self.image_size} (the shorter side may be enlarged by "
                f"{MAX_UPSCALE} at most); lower --image-size to {int(smallest * MAX_UPSCALE)} or "
                "less, or pass --allow-upscale" + _listing(lines, len(too_small), 10))
        if small:
            _, path, size = min(small)
            logger.warning("%s: %d of %d images are smaller than --image-size %d and are enlarged; "
                           "the smallest is %s (%d x %d pixels)", self.folder, len(small),
                           len(files), self.image_size, path, *size)

    def _fingerprint(self, files: list[tuple[Path, int]]) -> str:
        """Of names, labels and decoded pixels: a picture repainted in place is another set."""
        digest = hashlib.sha256(f"{PREPROCESSING}/{self.image_size}\n".encode())
        for path, label in files:
            digest.update(os.fsencode(path.relative_to(self.folder).as_posix()))
            digest.update(f"\0{label}\n".encode())
        digest.update(self._pixels.numpy())
        return digest.hexdigest()


def find_images(folder: Path) -> tuple[tuple[str, ...], list[tuple[Path, int]]]:
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
        raise ValueError(f"{folder}: found images at its top level (such as {flat[0].name}) and in "
                         f"subfolders (such as {full.name}); --data needs one folder per class, or "
                         "one flat folder")
    if flat:
        return (folder.resolve().name,), [(path, 0) for path in flat]
    if not any(paths for _, paths in classes):
        kinds = " ".join(extension[1:] for extension in EXTENSIONS)
        raise FileNotFoundError(f"{folder}: found no images ({kinds}) in it or in its subfolders; "
                                "check --data")
    bare = [entry.name for entry, paths in classes if not paths]
    if bare:
        raise FileNotFoundError(f"{folder}: {len(bare)} class folders of --data hold no images; "
                                "fill or remove them" + _listing(bare, len(bare), 20))
    return (tuple(entry.name for entry, _ in classes),
            [(path, label) for label, (_, paths) in enumerate(classes) for path in paths])


def _walk(folder: Path) -> list[Path]:
    """Image files below a folder at any depth; links are followed, each real folder once."""
    paths, seen = [], set()
    for base, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(base)
        # Pruned in place, which is how os.walk is told not to descend.
        folders[:] = [] if real in seen else sorted(n for n in folders if not n.startswith("."))
        if real not in seen:
            paths += [Path(base, name) for name in names if _is_image(name)]
        seen.add(real)
    return sorted(paths)


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")


def _listing(lines: Iterable[str], count: int, most: int) -> str:
    shown = [line for line, _ in zip(lines, range(most), strict=False)]
    rest = [f"... and {count - most} more"] if count > most else []
    return "".join(f"\n  {line}" for line in shown + rest)


def _read(path: Path, read: Callable[[Image.Image], object]) -> object:
    """read(image), or a string, the reason why the file cannot be read."""
    try:
        if path.stat().st_size == 0:
            return "the file is empty (0 bytes)"
        with Image.open(path) as image:
            return read(image)
    except UnidentifiedImageError:
        return "not an image that Pillow knows"
    except Image.DecompressionBombError as error:
        return f"too many pixels: {error}"
    # Decoders answer damaged files with many kinds of exception; none may end a run of thousands.
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _read_size(path: Path) -> tuple[int, int] | str:
    return _read(path, lambda image: image.size)


def _pixels(image: Image.Image, size: int) -> np.ndarray:
    """(3, size, size) uint8."""
    return np.asarray(centre_crop(to_rgb(image), size)).transpose(2, 0, 1)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any image that Pillow opens -> mode RGB, 8 bits; transparency lies over white.

    Raises:
        ValueError: pixels without an agreed range (32-bit integers above 65535, floating point).
    """
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range; convert the file to 8 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow's own conversion clips these at 255 instead of scaling them.
        deep = np.asarray(image).astype(np.int64)
        if deep.min() < 0 or deep.max() > 65535:
            raise ValueError(f"integer pixels of {deep.min()}..{deep.max()} have no agreed range; "
                             "convert the file to 8 or 16 bits")
        image = Image.fromarray(((deep + 128) // 257).astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """The preprocessing of ADM (Dhariwal and Nichol 2021, guided-diffusion's `image_datasets.py`).

    Halves the image with a box filter while its shorter side is at least 2 * size, resizes it
    bicubically so that the shorter side is size, and cuts out the centre, size x size.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)),
                         Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def available_memory() -> int | None:
    """Bytes that can be had without swapping, the container's limit included; None if unknown."""
    found = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    except OSError:
        pass
    try:
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            used = int((group / "memory.current").read_text())
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            # Cached file pages count as used but make room when asked.
            cached = int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0))
            found.append(int(limit) - used + cached)
    except (OSError, ValueError):
        pass
    return min(found) if found else None


def check_memory(need: int, image_size: int, folder: Path) -> None:
    """Raises ValueError when `need` bytes of decoded images do not fit into memory."""
    free = available_memory()
    if free is not None and need > 0.9 * free:
        raise ValueError(f"{folder}: decoded at --image-size {image_size} the images take "
                         f"{need / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are available; lower "
                         "--image-size or use fewer images")
