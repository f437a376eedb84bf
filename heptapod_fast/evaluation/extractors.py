"""Networks that turn images into features, which FID and its relatives compare."""

from __future__ import annotations

import hashlib
import importlib
import tempfile
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from heptapod_fast.storage import read_numbers, write_numbers

# torch-fidelity's conversion of the TensorFlow graph that published numbers are made with; the file
# is named by the beginning of its hash.
INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth"
)
INCEPTION_SHA256 = "6726825d"
SPATIAL_CHANNELS = 7


class Features(NamedTuple):
    """Of a batch of B images, float32.

    pooled: (B, F). spatial: (B, S), some channels of a layer before pooling, place by place.
    logits: (B, K) of classes.
    """

    pooled: Tensor
    spatial: Tensor
    logits: Tensor


class Extractor(Protocol):
    """A network for features.

    Attributes:
        name: as results say it.
        sha256: of its weights.
        knows_statistics: whether published statistics are of its features.
    """

    name: str
    sha256: str
    knows_statistics: bool

    def __call__(self, pixels: Tensor) -> Features:
        """pixels: (B, 3, H, W) uint8."""
        ...


class Inception:
    """torch-fidelity's Inception v3, whose resizing and weights are TensorFlow's of 2015.

    pooled is pool_3 (2,048), logits are those without the bias, which the Inception Score is made
    of, and spatial the first 7 channels of the 17 x 17 map that ADM takes for sFID
    (adm:evaluations/evaluator.py, mixed_6/conv:0).

    Args:
        path: the weights, .pth or .safetensors.
        sha256: how their hash must begin; by default that of the published file.

    Raises:
        ValueError: no such file, one with another hash, or one that is not these weights.
    """

    name = "inception-v3-compat"
    knows_statistics = True

    def __init__(self, path: str, device: torch.device, sha256: str | None = None):
        self.sha256 = _checked_hash(path, sha256)
        self._device = device
        load_torch_fidelity()
        module = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
        try:
            # The class would execute what it is given; it is given a file that is made here.
            with tempfile.TemporaryDirectory() as folder:
                again = Path(folder, "weights.pth")
                write_numbers(_read_tensors(path), again)
                self._network: Any = module.FeatureExtractorInceptionV3(
                    self.name,
                    ["2048", "logits_unbiased"],
                    feature_extractor_weights_path=str(again),
                )
        except RuntimeError as error:
            raise ValueError(
                f"--inception {path}: not the weights of torch-fidelity's Inception: {error}"
            ) from None
        self._network.to(device)
        self._map_BCHW = torch.empty(0)
        self._network.Mixed_6d.branch1x1.register_forward_hook(self._keep)

    def _keep(self, module: Any, inputs: Any, output: Tensor) -> None:
        self._map_BCHW = output

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Features:
        """See `Extractor`."""
        pooled, logits = self._network(pixels.to(self._device))
        spatial = place_by_place(self._map_BCHW)
        self._map_BCHW = torch.empty(0)
        return Features(pooled.cpu(), spatial.cpu(), logits.cpu())


def place_by_place(map_BCHW: Tensor) -> Tensor:
    """The first channels of every place of a map, (B, H * W * channels)."""
    return map_BCHW[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1).float()


def _checked_hash(path: str, expected: str | None) -> str:
    if not Path(path).is_file():
        raise ValueError(
            f"--inception {path}: no such file. Published numbers are made with {INCEPTION_URL}; "
            "where nothing can be downloaded, --extractor small compares runs with each other"
        )
    found = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    wanted = INCEPTION_SHA256 if expected is None else expected.lower()
    if not wanted:
        raise ValueError("--inception-sha256 is empty: expected how the hash of the file begins")
    if not found.startswith(wanted):
        raise ValueError(
            f"--inception {path} has the SHA-256 {found}, expected {wanted}...: another file, or a "
            "broken one. Numbers of other weights cannot be compared; if you mean this file, say "
            f"--inception-sha256 {found[:16]}"
        )
    return found


def _read_tensors(path: str) -> object:
    from safetensors.torch import load_file

    read = load_file if path.endswith(".safetensors") else read_numbers
    expected = "expected tensors saved by PyTorch, or .safetensors"
    try:
        found = read(Path(path))
    except Exception as error:  # whatever stands in the file
        raise ValueError(f"--inception {path}: {expected}: {error}") from None
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise ValueError(f"--inception {path}: {expected} by their names")
    return found


def load_torch_fidelity() -> Any:
    """The package, or a ValueError that says how to get it.

    It imports torchvision, and uses none of its operators. They are compiled for CUDA in the
    package index and do not load beside a CPU build of torch; torchvision then fails over its
    descriptions of two of them. So these are declared here, and nothing is behind them.
    """
    try:
        importlib.import_module("torchvision")
    except ImportError:
        pass  # said below
    except RuntimeError as error:
        if "operator torchvision::nms does not exist" not in str(error):
            raise
        schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        for operator in ("nms", "qnms"):
            torch.library.define(f"torchvision::{operator}", schema)
    try:
        return importlib.import_module("torch_fidelity")
    except ImportError as error:
        raise ValueError(
            f"fid, sfid, kid, is, precision, recall and rfid need torch-fidelity ({error}): "
            "pip install 'heptapod_fast[eval]'"
        ) from None
