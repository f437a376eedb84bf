"""How likely a model finds images: bits per token, of discrete tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from heptapod_fast.data.embedded import EmbeddedImages
from heptapod_fast.evaluation.context import MetricContext
from heptapod_fast.evaluation.image_sets import ImageSet, TrainingImages, open_images_at
from heptapod_fast.rng import Rng
from heptapod_fast.systems.base import System
from heptapod_fast.tokenizers.base import Tokenizer, to_unit

BATCH = 64


class Likelihood:
    """Bits that a token costs, given the class: see `Metric`. Samples are not looked at.

    The images are those of --reference; without it fresh ones of embedded sets, or for other data
    the training images. Every image is scored in one order (`System.log_likelihood`): exactly where
    the system has but one order, else an unbiased estimate of a bound, -log p(x) <= E over orders
    of -log p(x | order).

    `compute` returns:
        bits_per_token: the mean; bits_per_token_error: its standard error.
        bits_per_token_shuffled: of the same tokens with their places exchanged within each image,
            what a model without any sense of place would not tell from the images.

    Raises:
        ValueError: vectors for tokens, a system that cannot say, images without classes.
    """

    needs_samples = False

    def __init__(self, context: MetricContext, names: Sequence[str]):
        if context.system is None or context.tokenizer is None:
            raise ValueError("--metrics likelihood needs a run and its tokenizer")
        if context.tokenizer.spec.kind != "discrete":
            raise ValueError(
                "--metrics likelihood needs discrete tokens: a diffusion model of continuous ones "
                "gives samples and no densities"
            )
        context.system.check_likelihood()
        self._system = context.system
        self._context = context
        self._tokenizer: Tokenizer = context.tokenizer
        self._images = images_of(context)

    def update(self, pixels: Tensor, labels: Tensor) -> None:
        """Never called, see `Metric.update`: samples are not what is scored."""

    def restart(self, system: System) -> None:
        """See `Metric.restart`."""
        self._system = system

    def compute(self) -> dict[str, Any]:
        """See `Metric.compute`."""
        labels = self._images.labels
        assert labels is not None  # `images_of` saw to it
        progress = self._context.progress("likelihood")
        found: dict[str, list[Tensor]] = {"": [], "_shuffled": []}
        first = 0
        for pixels in self._images.batches():
            for part in pixels.split(BATCH):
                index = torch.arange(first, first + len(part))
                tokens = self._tokenizer.encode(to_unit(part).to(self._tokenizer.device))
                for name, these in (("", tokens), ("_shuffled", exchanged(tokens, index))):
                    found[name].append(self._bits(these, labels[index], index))
                first += len(part)
                progress(first, len(self._images))
        results: dict[str, Any] = {}
        for name, parts in found.items():
            bits = torch.cat(parts)
            results[f"bits_per_token{name}"] = float(bits.mean())
            if not name:
                deviation = float(bits.std()) if len(bits) > 1 else 0.0
                results["bits_per_token_error"] = deviation / len(bits) ** 0.5
        results["likelihood_of"] = self._images.name
        results["likelihood_images"] = len(self._images)
        return results

    def _bits(self, tokens: Tensor, labels: Tensor, index: Tensor) -> Tensor:
        nats = self._system.log_likelihood(tokens, labels, Rng(0), index)
        return -nats.double().cpu() / (tokens.shape[1] * math.log(2))


def exchanged(tokens_BN: Tensor, index_B: Tensor) -> Tensor:
    """Each image's tokens in an order of its own, by its number."""
    index_B = index_B.to(tokens_BN.device)
    return tokens_BN.gather(1, Rng(1).permutation("exchanged", index_B, tokens_BN.shape[1]))


def _check_labels(found: ImageSet, labels: Tensor, context: MetricContext, metric: str) -> None:
    """ValueError for a single image, and for classes that the run does not have."""
    if len(found) < 2:
        raise ValueError(f"--metrics {metric}: {found.name} has one image; expected two at least")
    assert context.system is not None  # metrics of systems see to it
    classes = context.system.num_classes
    if int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise ValueError(
            f"--metrics {metric}: {found.name} has classes {int(labels.min())} to "
            f"{int(labels.max())}, the run 0 to {classes - 1}"
        )


def images_of(context: MetricContext, metric: str = "likelihood") -> ImageSet:
    """What is scored, for the metric of that name, which messages say."""
    source = context.source
    if context.reference is not None:
        found = open_images_at(context.reference, context.image_size, "--reference")
        if found.labels is None or not len(found):
            raise ValueError(
                f"--metrics {metric}: --reference {context.reference} does not say its images' "
                "classes: expected labels beside arr_0, or names such as 000001-class3.png"
            )
        _check_labels(found, found.labels, context, metric)
        return found
    if isinstance(source, EmbeddedImages):
        return TrainingImages(source.fresh(context.count), name=f"fresh {source.name}")
    if source is None:
        raise ValueError(
            f"--metrics {metric}: the run has no images beside its tokens: name some, with "
            "their classes, with --reference"
        )
    return TrainingImages(source, most=context.count)
