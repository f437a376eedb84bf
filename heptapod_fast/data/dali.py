"""NVIDIA DALI as a `Decoder`: the pixels of `PillowDecoder` to within rounding.

DALI decodes JPEG and PNG files, JPEG on a GPU if asked to; on the CPU bit for bit as Pillow does
(both use libjpeg-turbo). Its resize has no box filter, and other borders, so that `centre_crop` is
done here with filters equal to Pillow's. Pillow and DALI are imported where they are used.

Each worker has a pipeline of its own that decodes one file at a time. In DALI 2.4.0 a file that
cannot be decoded fails its whole batch, and within tens of such batches the process ends with a
segmentation fault; batches of one file have stood thousands.

Everything else stays with Pillow, inside the same call: other formats, palettes, transparency,
CMYK, depths other than 8 bits, animations, JPEGs whose markers do not lead to their last byte,
images above `MOST_PIXELS`, images more than twice as high as wide, any file that DALI refuses, and
on a CPU images that need no resizing.
The file alone, and the size asked for, decide which of the two it is.
"""

from __future__ import annotations

import io
import logging
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from heptapod_fast.data.entries import Readable
from heptapod_fast.data.files import PREPROCESSING
from heptapod_fast.data.pixels import crop_pixels, decode_with_pillow, read

if TYPE_CHECKING:
    from PIL import Image
    from PIL.ImageFile import ImageFile

# One file in each worker is held decoded: 50 MB.
MOST_PIXELS = 2**24
# JPEG markers: the start of a scan, and the end of the image.
_SCAN = 0xDA
_END = 0xD9
# Inside the data of a scan 0xFF stands before 0 or a restart marker.
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7]", re.DOTALL)
INSTALL = 'pip install "heptapod_fast[dali]"'

logger = logging.getLogger(__name__)


class DaliDecoder:
    """Decodes with DALI, and with Pillow what DALI cannot decode equally (see the module).

    Args:
        device: "cpu", or a CUDA device, which then decodes JPEG and resizes.
        workers: CPU threads; default: one for each core, on a GPU 16 at most, because each has
            its buffers there.

    Raises:
        ImportError: DALI is not installed.
        ValueError: no such device, or a version of DALI that does not fit.
    """

    def __init__(self, device: str | torch.device = "cpu", workers: int | None = None) -> None:
        self.device = _check_device(device)
        cores = os.cpu_count() or 1
        workers = workers or (cores if self.device.type == "cpu" else min(cores, 16))
        self._pool = ThreadPoolExecutor(workers)
        self._pipelines: SimpleQueue[Any] = SimpleQueue()
        for _ in range(workers):
            version, pipeline = _build(self.device)
            self._pipelines.put(pipeline)
        self._probe = _picture()
        try:
            self._finish(_run(pipeline, self._probe), np.empty((3, 8, 8), np.uint8))
        except Exception as error:
            raise ValueError(
                f"DALI {version} cannot decode on {self.device}: {_first(error)}; "
                f"renew it ({INSTALL}) or decode with Pillow"
            ) from error
        self.preprocessing = f"{PREPROCESSING}/dali-{version}-{self.device.type}"

    def decode(self, files: Sequence[Readable], out: np.ndarray) -> list[str | None]:
        """See `Decoder.decode`. RuntimeError if DALI stops working altogether."""
        return list(self._pool.map(self._decode, files, out))

    def _decode(self, file: Readable, row: np.ndarray) -> str | None:
        data = _load(file, row, self.device.type == "cpu")
        if not isinstance(data, np.ndarray):
            return data
        pipeline = self._pipelines.get()
        try:
            try:
                image = _run(pipeline, data)
            except Exception as error:
                reason = decode_with_pillow(file, row)
                if reason is None:
                    self._check_alive(pipeline, error)
                    logger.warning("%s: Pillow has read it, DALI cannot: %s", file, _first(error))
                return reason
            self._finish(image, row)
            return None
        finally:
            self._pipelines.put(pipeline)

    def _finish(self, image: Tensor, row: np.ndarray) -> None:
        if self.device.type == "cpu":
            _crop_on_cpu(image, row)
        else:
            row[...] = crop(image, row.shape[-1]).cpu().numpy()

    def _check_alive(self, pipeline: Any, error: Exception) -> None:
        # A file that only Pillow reads is one thing, a GPU that has failed for good is another.
        try:
            _run(pipeline, self._probe)
        except Exception:
            raise RuntimeError(
                f"DALI has stopped decoding on {self.device}, even good files fail: {_first(error)}"
            ) from error


def _check_device(device: str | torch.device) -> torch.device:
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"DALI decodes on cpu or cuda, not on {device}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"DALI was asked to decode on {device}, there are "
            f"{torch.cuda.device_count()} CUDA devices here: choose device='cpu'"
        )
    return device


def _build(device: torch.device) -> tuple[str, Any]:
    """(DALI's version, a pipeline of one encoded file `files` -> RGB, (h, w, 3) uint8)."""
    try:
        import nvidia.dali
        from nvidia.dali import fn, types
    except (ImportError, OSError) as error:
        raise ImportError(
            f"decoding with DALI was asked for and DALI cannot be imported "
            f"({error}): {INSTALL}, or decode with Pillow"
        ) from error
    version = nvidia.dali.__version__
    # Fancy upsampling and the slow IDCT are what Pillow decodes with.
    options: dict[str, Any] = {"jpeg_fancy_upsampling": True, "use_fast_idct": False}
    number = None
    if device.type == "cuda":
        # The hardware decoder takes a share of the files, and rounds differently: every file's
        # pixels would depend on chance.
        options |= {"device": "mixed", "hw_decoder_load": 0.0}
        number = device.index or 0
    try:
        # Only the dynamic executor survives a file that cannot be decoded; the rest of the line
        # keeps the work on this pipeline's own thread.
        pipeline = nvidia.dali.Pipeline(
            batch_size=1,
            num_threads=1,
            device_id=number,
            exec_dynamic=True,
            exec_async=False,
            exec_pipelined=False,
            prefetch_queue_depth=1,
        )
        with pipeline:
            files = fn.external_source(name="files", dtype=types.UINT8, ndim=1, no_copy=True)
            pipeline.set_outputs(
                fn.decoders.image(files, output_type=types.RGB, adjust_orientation=False, **options)
            )
        pipeline.build()
    except Exception as error:
        raise ValueError(
            f"DALI {version} does not fit, expected what version 2.4 offers "
            f"({_first(error)}): {INSTALL}, or decode with Pillow"
        ) from error
    return version, pipeline


def _run(pipeline: Any, data: np.ndarray) -> Tensor:
    """The bytes of a file -> (h, w, 3) uint8."""
    (images,) = pipeline.run(files=[data])
    return torch.from_dlpack(images[0])


def _first(error: Exception) -> str:
    """The type and the first lines of an error; DALI appends a stack trace."""
    return f"{type(error).__name__}: {str(error).strip().split('Stacktrace')[0][:300].strip()}"


def _picture() -> np.ndarray:
    """A small JPEG file."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), "white").save(buffer, "JPEG")
    return np.frombuffer(buffer.getvalue(), np.uint8)


def _load(file: Readable, row: np.ndarray, on_cpu: bool) -> np.ndarray | str | None:
    """The file's bytes if it is one for DALI; else Pillow fills the row: None, or why it cannot."""
    size = row.shape[-1]

    def use(image: ImageFile) -> np.ndarray | None:
        is_faster_with_pillow = on_cpu and _fits(image, size)
        if _suits(image, size) and not is_faster_with_pillow:
            assert image.fp is not None  # an image that was opened from a file has one
            image.fp.seek(0)
            data = image.fp.read()
            if _is_for_dali(data, image.format):
                return np.frombuffer(data, np.uint8)
        row[...] = crop_pixels(image, size)
        return None

    return read(file, use)


def _is_for_dali(data: bytes, format: str | None) -> bool:
    """Whether DALI reads the bytes of a PNG or JPEG file as Pillow does."""
    if format == "PNG":
        return data[24] == 8  # its depth in bits, which Pillow's mode does not tell
    return _is_whole(data)


def _is_whole(data: bytes) -> bool:
    """Whether the markers of a JPEG lead from its first byte to its last.

    Decoders differ in what they make of cut files and of markers in the wrong place.
    """
    at = 2
    while data[at : at + 1] == b"\xff" and at + 4 <= len(data):
        marker = data[at + 1]
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == _SCAN:
            found = _MARKER.search(data, at)
            if found is None:
                return False
            at = found.start()
            if data[at + 1] == _END:
                return at + 2 == len(data)
    return False


def _fits(image: Image.Image, size: int) -> bool:
    """Whether nothing is to be resized: Pillow is faster then, and on a CPU the pixels are equal
    whoever decodes them."""
    return min(image.size) == size


def _suits(image: Image.Image, size: int) -> bool:
    """Whether DALI's pixels equal Pillow's; only the header of the file has been read."""
    if image.mode not in ("L", "RGB") or image.has_transparency_data:
        return False
    if image.width * image.height > MOST_PIXELS:
        return False
    # Pillow 13 resizes these down the columns first, Pillow 12 and what is below along the rows.
    if any(height > 2 * width for width, height in sizes(image.width, image.height, size)[:-1]):
        return False
    if image.format == "JPEG":
        return image.info.get("adobe_transform") != 0  # not YCbCr
    return image.format == "PNG" and not getattr(image, "is_animated", False)


@lru_cache(maxsize=4096)
def sizes(width: int, height: int, size: int) -> tuple[tuple[int, int], ...]:
    """(width, height) of an image in `centre_crop`: as it is, halved ..., resized."""
    found = [(width, height)]
    while min(width, height) >= 2 * size:
        width = width // 2
        height = height // 2
        found.append((width, height))
    scale = size / min(width, height)
    found.append((round(width * scale), round(height * scale)))
    return tuple(found)


def _crop_on_cpu(image: Tensor, row: np.ndarray) -> None:
    """(h, w, 3) uint8 -> row, (3, size, size): `centre_crop`, the bicubic resize by PyTorch."""
    from PIL import Image

    size = row.shape[-1]
    *steps, (width, height) = sizes(image.shape[1], image.shape[0], size)
    if len(steps) > 1:
        halved = Image.fromarray(image.numpy())
        for step in steps[1:]:
            halved = halved.resize(step, Image.Resampling.BOX)
        image = torch.from_numpy(np.array(halved))
    image = image.permute(2, 0, 1)
    if steps[-1] != (width, height):
        # On uint8 this is a port of Pillow's: integer weights, rounding between the passes.
        image = F.interpolate(image[None], (height, width), mode="bicubic", antialias=True)[0]
    left = (width - size) // 2
    top = (height - size) // 2
    row[...] = image[:, top : top + size, left : left + size]


def crop(image: Tensor, size: int) -> Tensor:
    """`centre_crop` on any device: (h, w, 3) uint8 -> (3, size, size) uint8, Pillow's filters
    written out as weights; rows first, rounded and clipped to 8 bits after each pass."""
    image = image.permute(2, 0, 1)
    steps = sizes(image.shape[2], image.shape[1], size)
    for (width, height), (w, h) in zip(steps[:-2], steps[1:-1], strict=True):
        image = _resample(image, 2, width, w, 0, w, True)
        image = _resample(image, 1, height, h, 0, h, True)
    (width, height), (w, h) = steps[-2:]
    image = _resample(image, 2, width, w, (w - size) // 2, size, False)
    return _resample(image, 1, height, h, (h - size) // 2, size, False)


def _resample(image: Tensor, axis: int, *window: Any) -> Tensor:
    """One pass along an axis of (3, h, w) uint8; `window` as for `_taps`."""
    index, weight = _taps(*window, image.device)
    if axis == 1:
        weight = weight[..., None]
    # Products and sums, no matrices: TF32 and autocast, whatever is set, do not reach them.
    picked = image.index_select(axis, index.flatten()).unflatten(axis, index.shape)
    return (picked * weight).sum(axis + 1).add_(0.5).clamp_(0, 255).byte()


@lru_cache(maxsize=1024)
def _taps(
    old: int, new: int, first: int, count: int, box: bool, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Pillow's filter for `old` -> `new` pixels, outputs first..first+count-1: which pixels each
    one reads, (count, taps) int64, and their weights, float32. Box, or bicubic with a = -1/2."""
    scale = old / new
    stretch = max(scale, 1.0)
    support = (0.5 if box else 2.0) * stretch
    centre = (first + np.arange(count) + 0.5) * scale
    low = np.maximum(centre - support + 0.5, 0).astype(np.int64)
    high = np.minimum(centre + support + 0.5, old).astype(np.int64)
    index = low[:, None] + np.arange((high - low).max())
    x = (index - centre[:, None] + 0.5) / stretch
    if box:
        weight = ((x > -0.5) & (x <= 0.5)).astype(np.float64)
    else:
        x = np.abs(x)
        weight = np.where(
            x < 1,
            (1.5 * x - 2.5) * x * x + 1,
            np.where(x < 2, ((-0.5 * x + 2.5) * x - 4) * x + 2, 0),
        )
    weight *= index < high[:, None]
    weight /= weight.sum(1, keepdims=True)
    return (
        torch.from_numpy(np.minimum(index, old - 1)).to(device),
        torch.from_numpy(weight).float().to(device),
    )
