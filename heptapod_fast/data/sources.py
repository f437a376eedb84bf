"""What every set of images offers, whatever it is read or made from."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class ImageSource(Protocol):
    """A fixed, labelled set of square images, read by image id.

    An id is a position in 0..len-1. The same id always gives the same pixels, so that the order of
    training, caches and evaluation can be described by ids alone.

    Attributes:
        name: short name for messages and logs.
        image_size: height and width of every image, in pixels.
        class_names: one name per class; a label is a position in this tuple.
        labels: (n,) int64 on the CPU, values in 0..len(class_names)-1.
        fingerprint: 64 hexadecimal digits (sha256) over all that defines the pixels and labels.
            Checkpoints and caches store it and refuse another set.
    """

    name: str
    image_size: int
    class_names: tuple[str, ...]
    labels: Tensor
    fingerprint: str

    def __len__(self) -> int:
        """Number of images."""
        ...

    def images(self, ids: Tensor) -> Tensor:
        """ids: (B,) int64 in 0..len-1, repeats allowed -> (B, 3, H, W) uint8, RGB, on the CPU.

        Raises:
            IndexError: an id is outside 0..len-1.
        """
        ...


def check_ids(ids: Tensor, count: int, name: str) -> Tensor:
    """Returns ids as a (B,) int64 CPU tensor.

    Raises:
        IndexError: an id is outside 0..count-1; the message names the source.
    """
    ids = ids.detach().to("cpu").long()
    if ids.ndim != 1:
        raise IndexError(f"{name}: expected image ids of shape (B,), found {tuple(ids.shape)}")
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= count):
        raise IndexError(
            f"{name}: expected image ids in 0..{count - 1}, "
            f"found {int(ids.min())}..{int(ids.max())}"
        )
    return ids
