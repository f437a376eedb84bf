"""A small classifier of a run's own images, as features where there is no Inception.

Its numbers compare samples of runs on the same data with each other, and with nothing else. It is
trained once for a data set, in about a minute, and kept in the run directory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heptapod_fast.data.sources import ImageSource
from heptapod_fast.evaluation.extractors import Features, place_by_place

FILE = "extractor-small.safetensors"
SIDE = 32  # images are brought to this size
STEPS = 600
BATCH = 64
HELD_OUT = 512  # images that its accuracy is taken of
LEARNING_RATE = 2e-3


class SmallNetwork(nn.Module):
    """Four convolutions, each but the first of half the size before: 64 features, and classes."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, after, 3, stride, 1)
            for before, after, stride in ((3, 16, 1), (16, 32, 2), (32, 64, 2), (64, 64, 2))
        )
        self.norms = nn.ModuleList(nn.GroupNorm(4, size) for size in (16, 32, 64, 64))
        self.classes = nn.Linear(64, num_classes)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, 3, H, W) uint8 -> features (B, 64), the map that they are the mean of, logits."""
        x = pixels.float().div(127.5).sub(1.0)
        if x.shape[-1] != SIDE:
            x = F.interpolate(x, size=(SIDE, SIDE), mode="bilinear", antialias=True)
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = F.relu(norm(convolution(x)))
        pooled = x.mean((2, 3))
        return pooled, x, self.classes(pooled)


class Small:
    """The trained classifier, as `Extractor`."""

    name = "small"
    knows_statistics = False

    def __init__(self, network: SmallNetwork, sha256: str, accuracy: float, device: torch.device):
        self.sha256 = sha256
        self.accuracy = accuracy
        self._device = device
        self._network = network.to(device).eval()

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Features:
        """See `Extractor`."""
        pooled, before, logits = self._network(pixels.to(self._device))
        return Features(pooled.cpu(), place_by_place(before).cpu(), logits.cpu())


def small_extractor(
    source: ImageSource,
    folder: Path,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
) -> Small:
    """The classifier of these images: read from the folder, or trained and kept there.

    Raises:
        ValueError: images of one class, of which there is nothing to tell apart.
    """
    classes = len(source.class_names)
    if classes < 2:
        raise ValueError(
            "--extractor small is a classifier of the run's images, and these are of one class: "
            "give Inception's weights with --inception FILE"
        )
    path = folder / FILE
    about = {"data": source.fingerprint, "steps": str(STEPS), "classes": str(classes)}
    network = SmallNetwork(classes)
    kept = _read(path, about, network)
    if kept is None:
        accuracy = _train(network, source, device, progress)
        _write(path, network, about | {"accuracy": f"{accuracy:.4f}"})
        kept = accuracy
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return Small(network, sha256, kept, device)


def _train(
    network: SmallNetwork,
    source: ImageSource,
    device: torch.device,
    progress: Callable[[int, int], None] | None,
) -> float:
    """Its accuracy on images that it was not trained on; all of them where there are few."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() > 1:
                spread = (2.0 / parameter[0].numel()) ** 0.5
                parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))
        for layer in (*network.convolutions, network.classes):
            layer.bias.zero_()
    network.to(device).train()
    order = torch.randperm(len(source), generator=generator)
    held_out = order[: min(HELD_OUT, len(order) // 4)]
    trained_on = order[len(held_out) :]
    optimizer = torch.optim.AdamW(network.parameters(), LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for step in range(STEPS):
        ids = trained_on[torch.randint(len(trained_on), (BATCH,), generator=generator)]
        *_, logits = network(source.images(ids).to(device))
        loss = F.cross_entropy(logits, source.labels[ids].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if progress is not None:
            progress(step + 1, STEPS)
    network.eval()
    looked_at = held_out if len(held_out) else trained_on[:HELD_OUT]
    with torch.no_grad():
        *_, logits = network(source.images(looked_at).to(device))
    right = logits.argmax(1).cpu() == source.labels[looked_at]
    return float(right.float().mean())


def _write(path: Path, network: SmallNetwork, about: dict[str, str]) -> None:
    from safetensors.torch import save_file

    unfinished = path.with_name(f".{path.name}.unfinished")
    tensors = {name: value.cpu().contiguous() for name, value in network.state_dict().items()}
    save_file(tensors, unfinished, metadata={"about": json.dumps(about)})
    unfinished.replace(path)


def _read(path: Path, about: dict[str, str], network: SmallNetwork) -> float | None:
    """Fill the network from a file of the same data; its accuracy, None without such a file."""
    from safetensors import safe_open

    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            found = json.loads(file.metadata()["about"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception:  # a damaged file: another one is trained in its place
        return None
    if any(found.get(name) != value for name, value in about.items()):
        return None
    network.load_state_dict(tensors)
    return float(found["accuracy"])
