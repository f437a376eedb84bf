"""What kl16 and vq16 have in common as tokenizers: loading, chunks of a batch, identity.

Tensor names: B images, C channels, H x W the token grid.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from heptapod_fast.tokenizers import weights as files
from heptapod_fast.tokenizers.autoencoder import build, file_key
from heptapod_fast.tokenizers.base import FIXED_PATCH, Description, Tokenizer, token_spec

DTYPES = (torch.float32, torch.bfloat16)
# Pixels worked on at once. Activations take about 2 KB per pixel: 8 images of 256 pixels and 1 GB
# on a CPU, 64 images and 9 GB on an accelerator.
CHUNK_PIXELS = {"cpu": 2**19}
CHUNK_PIXELS_ELSEWHERE = 2**22


class _ExactFloat32:
    """While any thread is inside: float32 means float32 (no TF32, no bf16 products), and algorithms
    repeat their bits. PyTorch's switches are the process's, so that the first thread to enter sets
    them and the last one to leave puts them back."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before = ExitStack()  # what puts PyTorch's switches back

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._before = ExitStack()
                self._before.callback(
                    torch.set_float32_matmul_precision, torch.get_float32_matmul_precision()
                )
                torch.set_float32_matmul_precision("highest")
                self._before.enter_context(
                    torch.backends.cudnn.flags(
                        enabled=True, benchmark=False, deterministic=True, allow_tf32=False
                    )
                )
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._before.close()


_exact_float32 = _ExactFloat32()


class Pretrained(Tokenizer):
    """A convolutional tokenizer with published weights.

    The weights and the tokens are float32 by default, on every device: tokens are data, and codes
    that depend on the hardware would make caches differ. With dtype bfloat16 the convolutions run
    in bf16 where the hardware is fast at it; latents then move by a few per cent of their spread,
    and close calls choose other codes. Normalisation, the layers around the latent, and the search
    for codes stay in float32 or better. No call records gradients; what is returned may be used in
    training.

    Results do not depend on `chunk_pixels` or on the other images of a batch beyond the rounding of
    float32 convolutions, whose libraries choose algorithms by the batch.

    Args:
        weights: the tensors of the published file by its names (`weights.read_state`).
        image_size: side of the images in pixels, a multiple of 16.
        dtype: of the convolutions, float32 or bfloat16.
        source: the file that the weights are from, for `describe` and errors.

    Attributes:
        dtype: as given.
        weights_sha256: `weights.digest` of the weights in float32.
        chunk_pixels: pixels that go through the network at once (at least one image); None for a
            value that follows from the device.

    Raises:
        ValueError: sizes that do not divide, another dtype, or weights of another architecture.
    """

    patch_size = FIXED_PATCH

    def __init__(
        self,
        weights: dict[str, Tensor],
        image_size: int = 256,
        dtype: torch.dtype = torch.float32,
        source: str | Path | None = None,
    ) -> None:
        self.spec = token_spec(self.name, image_size)
        if dtype not in DTYPES:
            raise ValueError(
                f"{self.name}: dtype must be torch.float32 or torch.bfloat16, found {dtype}"
            )
        weights = files.check(self.name, weights, source)
        self.image_size = image_size
        self.dtype = dtype
        self.source = None if source is None else Path(source).absolute()
        self.weights_sha256 = files.digest(weights)
        self.chunk_pixels: int | None = None
        self.network = build(self.name, weights, dtype)

    @classmethod
    def load(
        cls, path: str | Path, image_size: int = 256, dtype: torch.dtype = torch.float32
    ) -> Pretrained:
        """From a published file or a copy of it (`weights.read_state`).

        Raises:
            FileNotFoundError, ValueError: the file, the size or the dtype are not usable.
        """
        token_spec(cls.name, image_size)  # before hundreds of megabytes are read
        return cls(files.read_state(cls.name, path), image_size, dtype, path)

    def to(self, device: torch.device | str) -> Pretrained:
        """Moves the network and returns the tokenizer."""
        super().to(device)
        self.network.to(self.device)
        return self

    def state(self) -> dict[str, Tensor]:
        """The weights by the published file's names, float32.

        Raises:
            ValueError: the tokenizer runs in bf16 and has only rounded weights.
        """
        if self.dtype != torch.float32:
            raise ValueError(
                f"{self.name}: a tokenizer in {self.dtype} holds rounded weights; "
                "load it in float32 to save it"
            )
        return {file_key(self.name, key): value for key, value in self.network.state_dict().items()}

    def settings(self) -> dict[str, int]:
        """image_size in pixels."""
        return {"image_size": self.image_size}

    @classmethod
    def restore(cls, settings: dict[str, int], state: dict[str, Tensor]) -> Pretrained:
        """The inverse of `settings` and `state`."""
        return cls(state, settings["image_size"])

    @property
    def fingerprint(self) -> str:
        """sha256 (64 hexadecimal digits) over name, settings and weights; the same for every file
        format, device and dtype."""
        identity = [self.name, self.settings(), self.weights_sha256]
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    def describe(self) -> Description:
        """What a run or a cache records instead of a copy of the weights; goes into JSON."""
        return {
            "tokenizer": self.name,
            "image_size": self.image_size,
            "weights": None if self.source is None else str(self.source),
            "weights_sha256": self.weights_sha256,
            "fingerprint": self.fingerprint,
            "dtype": str(self.dtype).removeprefix("torch."),
            **self.constants,
        }

    def _in_chunks(
        self, work: Callable[[Tensor], Tensor], inputs_B: Tensor, shape: tuple[int, ...]
    ) -> Tensor:
        """`work` on a few images at a time.

        inputs_B: (B, ...); work: (b, ...) -> (b, *shape) float32. Returns (B, *shape) float32.
        """
        pixels = self.chunk_pixels or CHUNK_PIXELS.get(self.device.type, CHUNK_PIXELS_ELSEWHERE)
        count = max(1, pixels // self.image_size**2)
        results = torch.empty(len(inputs_B), *shape, dtype=torch.float32, device=self.device)
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False), _exact_float32:
            for start in range(0, len(inputs_B), count):
                results[start : start + count] = work(inputs_B[start : start + count])
        return results

    def _encoded(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> what `quant_conv` gives, (B, C, H / 16, W / 16) float32."""
        grid = self.spec.grid
        channels = self.network.quant_conv.out_channels
        shape = (channels, grid, grid)
        return self._in_chunks(self.network.encode, self.check_images(images), shape)

    def _decoded(self, latents_BCHW: Tensor) -> Tensor:
        """(B, C, H / 16, W / 16) -> (B, 3, H, W) float32, not clipped."""
        return self._in_chunks(
            self.network.decode, latents_BCHW, (3, self.image_size, self.image_size)
        )
