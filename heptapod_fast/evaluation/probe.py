"""Linear probes: what a linear classifier reads off a network's frozen hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from heptapod_fast.data.embedded import EmbeddedImages
from heptapod_fast.evaluation.context import MetricContext
from heptapod_fast.evaluation.image_sets import ImageSet, TrainingImages, chosen_at_random
from heptapod_fast.evaluation.likelihood import images_of
from heptapod_fast.evaluation.observing import batches_of, observe
from heptapod_fast.rng import Rng
from heptapod_fast.systems.base import System
from heptapod_fast.tokenizers.base import to_unit

IMAGES, PER_CLASS = 4096, 20  # that a probe is trained on: so many, or so many of each class
TEST_SHARE = 4  # as many images again, divided by this, that it is tested on
STEPS = 100
PENALTY = 1e-4
PIXELS = 24  # side that images are averaged to, where the probe reads the images themselves


class Probe:
    """Accuracy of linear classifiers of the images' classes, layer by layer: see `Metric`.

    The network reads whole images and is not told their classes (`observing.without_class`), for
    which it would else be asked in return. Features are a layer's outputs, averaged over the tokens
    (`Layer.pooled`); what stands behind the backbone is shown all tokens but one. The classifier is
    a logistic regression on standardised features.

    Images are the training images; it is tested on those of --reference, else on fresh ones of
    embedded sets, or, of other data, on a fifth of the images that is kept from the classifiers,
    which the network was trained on.

    `compute` returns:
        probe_accuracy: of the best layer; probe_layer: which one it is.
        probe_accuracy_pixels: of the images themselves, what needs no network.
        probe_accuracies: {layer: accuracy}; probe_images: trained on, and tested on.

    Raises:
        ValueError: images of one class, or without classes; a system that does not answer `look`.
    """

    needs_samples = False

    def __init__(self, context: MetricContext, names: Sequence[str] = ("probe",)) -> None:
        if context.system is None or context.tokenizer is None:
            raise ValueError("--metrics probe needs a run and its tokenizer")
        context.system.check_answers("look", "--metrics probe")
        self._system = context.system
        self._tokenizer = context.tokenizer
        self._context = context
        self._train, self._test = _sets(context)

    def update(self, pixels: Tensor, labels: Tensor) -> None:
        """See `Metric.update`: samples are not what is looked at."""

    def restart(self, system: System) -> None:
        """See `Metric.restart`."""
        self._system = system

    def compute(self) -> dict[str, Any]:
        """See `Metric.compute`."""
        trained_on, its_labels = self._features(self._train, "reading images for the probes")
        tested_on, test_labels = self._features(self._test, "reading images to test them")
        classes = self._system.num_classes
        accuracies = {}
        for name, features in trained_on.items():
            accuracies[name] = probe_accuracy(
                features, its_labels, tested_on[name], test_labels, classes
            )
        of_pixels = accuracies.pop("pixels")
        best = max(accuracies, key=lambda name: accuracies[name])
        return {
            "probe_accuracy": accuracies[best],
            "probe_layer": best,
            "probe_accuracy_pixels": of_pixels,
            "probe_accuracies": accuracies,
            "probe_images": {"trained on": len(its_labels), "tested on": len(test_labels)},
            "probe_tested_on": self._test.name,
        }

    def _features(self, images: ImageSet, what: str) -> tuple[dict[str, Tensor], Tensor]:
        """({layer: (images, D)}, labels), on the CPU; the images themselves as layer "pixels"."""
        progress = self._context.progress(what)
        found: dict[str, list[Tensor]] = {"pixels": []}
        labels = []
        seen = self._system.num_tokens - 1
        batches = batches_of(images, self._system, self._tokenizer, progress, has_class=False)
        for pixels, label_B, batch in batches:
            found["pixels"].append(_small(pixels))
            for layer in observe(self._system, batch, Rng(0), seen):
                found.setdefault(layer.name, []).append(layer.pooled().cpu())
            labels.append(label_B)
        return {name: torch.cat(parts) for name, parts in found.items()}, torch.cat(labels)


def _sets(context: MetricContext) -> tuple[ImageSet, ImageSet]:
    """Images that classifiers are trained on, and others that they are tested on."""
    source = context.source
    if source is None:
        raise ValueError(
            "--metrics probe reads training images, and the run has none beside its tokens"
        )
    classes = len(source.class_names)
    if classes < 2:
        raise ValueError(
            "--metrics probe asks for the classes of images, and these are of one class: there is "
            "nothing to tell apart"
        )
    wanted = max(IMAGES, PER_CLASS * classes)
    if context.reference is not None:
        test = images_of(context, "probe")
        return TrainingImages(source, most=wanted), test
    if isinstance(source, EmbeddedImages):
        fresh = source.fresh(wanted // TEST_SHARE)
        name = f"fresh {source.name}"
        return TrainingImages(source, most=wanted), TrainingImages(fresh, name=name)
    if len(source) < 2 * (TEST_SHARE + 1):
        raise ValueError(
            f"--metrics probe: of {len(source)} training images none can be kept for a test; give "
            "some, with their classes, with --reference"
        )
    part = TEST_SHARE + 1
    chosen = TrainingImages(source, most=wanted * part // TEST_SHARE)
    is_kept = torch.zeros(len(chosen), dtype=torch.bool)
    is_kept[chosen_at_random(len(chosen), len(chosen) // part)] = True
    train = chosen.part(~is_kept, "the training images")
    return train, chosen.part(is_kept, "training images that the classifiers have not seen")


def _small(pixels: Tensor) -> Tensor:
    """(B, 3, H, W) uint8 -> (B, P) float32, P at most 3 * PIXELS^2."""
    images = to_unit(pixels)
    if images.shape[-1] > PIXELS:
        images = F.interpolate(images, size=(PIXELS, PIXELS), mode="area")
    return images.flatten(1)


def probe_accuracy(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, classes: int
) -> float:
    """Share of (n, D) test features whose class a logistic regression on (m, D) finds."""
    mean = train.mean(0)
    # A feature that never changes has nothing to say, and no scale.
    deviation = train.std(0)
    scale = torch.where(deviation > 1e-6, 1 / deviation.clamp(min=1e-6), 0.0)
    features, tested = ((x - mean) * scale for x in (train, test))
    weight = torch.zeros(classes, features.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        logits = F.linear(features, weight, bias)
        total = F.cross_entropy(logits, train_labels) + PENALTY * weight.square().sum()
        total.backward()
        return total

    with torch.enable_grad():
        optimizer.step(loss)
    with torch.no_grad():
        guess = F.linear(tested, weight, bias).argmax(1)
    return float((guess == test_labels).float().mean())
