"""FID, sFID, KID, Inception Score, precision and recall by torch-fidelity's own functions.

The protocol: samples are rounded to uint8 first; FID and sFID compare mean and covariance of
features with those of the reference, as they are stored in an ADM file or computed of its images;
KID takes 100 subsets of at most 1,000; the Inception Score ten parts of the shuffled samples;
precision and recall the third nearest neighbour (Kynkaanniemi et al. 2019), on the pooled features
as ADM does. What is needed of samples and reference is kept as features, at most 20 KiB an image.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from heptapod_fast.evaluation.context import MetricContext
from heptapod_fast.evaluation.extractors import (
    INCEPTION_URL,
    Extractor,
    Inception,
    load_torch_fidelity,
)
from heptapod_fast.evaluation.image_sets import ImageSet, TrainingImages, open_images_at
from heptapod_fast.evaluation.small import small_extractor
from heptapod_fast.systems.base import System

FEW = 2048  # samples below which FID's covariance has no full rank
KID_SUBSETS = 100
KID_SUBSET_SIZE = 1000
PARTS = 10  # of the Inception Score
NEIGHBOUR = 3
SEED = 2020  # of KID's subsets and the Inception Score's parts, torch-fidelity's default
ROWS = 1024  # of distances or covariances at a time

Statistics = tuple[np.ndarray, np.ndarray]


class Fidelity:
    """Samples against a reference; see `Metric`.

    Args:
        names: of fid, sfid, kid, is, precision, recall.

    Raises:
        ValueError: no reference, one without what a metric needs, or no weights; says what to give.
    """

    needs_samples = True

    def __init__(self, context: MetricContext, names: Sequence[str]):
        load_torch_fidelity()  # what is missing is said before anything is sampled
        self._names = tuple(names)
        self._context = context
        self._extractor = extractor_of(context)
        self._reference: ImageSet | None = None
        if set(names) != {"is"}:
            self._reference = reference_of(context)
            self._check_reference(self._reference)
        self._real: Kept | None = None  # the reference's features, once they were needed
        self._samples = Kept(self._extractor, self._wanted(of_samples=True))

    def restart(self, system: System) -> None:
        """See `Metric.restart`."""
        self._samples = Kept(self._extractor, self._wanted(of_samples=True))

    def _wanted(self, of_samples: bool) -> set[str]:
        """Which features are kept."""
        wanted = set()
        if set(self._names) & {"fid", "kid", "precision", "recall"}:
            wanted.add("pooled")
        if "sfid" in self._names:
            wanted.add("spatial")
        if "is" in self._names and of_samples:
            wanted.add("logits")
        return wanted

    def _check_reference(self, reference: ImageSet) -> None:
        if len(reference):
            return
        if not self._extractor.knows_statistics:
            raise ValueError(
                f"--reference {reference.name} has statistics of Inception's features, which those "
                f"of --extractor {self._extractor.name} cannot be compared with: give images"
            )
        lacking = [n for n in self._names if n in ("kid", "precision", "recall")]
        if lacking:
            raise ValueError(
                f"--metrics {', '.join(lacking)}: --reference {reference.name} has statistics "
                "alone, and these compare images one by one: give an .npz with arr_0, or a folder"
            )
        for name, is_spatial in (("fid", False), ("sfid", True)):
            if name in self._names and reference.statistics(is_spatial) is None:
                raise ValueError(
                    f"--metrics {name}: --reference {reference.name} has neither images nor "
                    f"{'mu_s and sigma_s' if is_spatial else 'mu and sigma'}"
                )

    def update(self, pixels: Tensor, labels: Tensor) -> None:
        """See `Metric.update`."""
        self._samples.add(pixels)

    def compute(self) -> dict[str, Any]:
        """See `Metric.compute`."""
        count = self._samples.count
        if count < 2:
            raise ValueError(f"{', '.join(self._names)}: of {count} samples there is no spread")
        found: dict[str, Any] = {}
        if self._reference is not None and self._real is None:
            self._real = self._features_of_reference(self._reference)
        real = self._real
        for name, is_spatial in (("fid", False), ("sfid", True)):
            if name in self._names:
                found[name] = self._frechet(real, is_spatial)
        if "is" in self._names:
            found |= inception_score(self._samples.of("logits"))
        if "kid" in self._names:
            assert real is not None
            found |= kernel_distance(self._samples.of("pooled"), real.of("pooled"))
        if set(self._names) & {"precision", "recall"}:
            assert real is not None
            both = precision_recall(self._samples.of("pooled"), real.of("pooled"))
            found |= {name: both[name] for name in self._names if name in both}
        found |= {"extractor": self._extractor.name, "extractor_sha256": self._extractor.sha256}
        if self._reference is not None:
            found["reference"] = self._reference.name
            found["reference_sha256"] = self._reference.sha256
            found["reference_images"] = len(self._reference) or "statistics alone"
            if self._published(self._reference, is_spatial=False) is not None:
                found["reference_statistics"] = "as published"
        if count < FEW:
            found["warning"] = (
                f"{count:,} samples: below {FEW:,} FID has a bias that depends on their number; "
                "published numbers are of 50,000"
            )
        return found

    def _features_of_reference(self, reference: ImageSet) -> Kept:
        """Of its images, as far as they are needed: not where its statistics will do."""
        wanted = self._wanted(of_samples=False)
        if not set(self._names) & {"kid", "precision", "recall"}:
            if self._published(reference, is_spatial=False) is not None:
                wanted.discard("pooled")
        if self._published(reference, is_spatial=True) is not None:
            wanted.discard("spatial")
        real = Kept(self._extractor, wanted)
        if not wanted:
            return real
        progress = self._context.progress("features of the reference")
        for pixels in reference.batches():
            real.add(pixels)
            progress(real.count, len(reference))
        return real

    def _published(self, reference: ImageSet, is_spatial: bool) -> Statistics | None:
        if not self._extractor.knows_statistics:
            return None
        return reference.statistics(is_spatial)

    def _frechet(self, real: Kept | None, is_spatial: bool) -> float:
        assert real is not None and self._reference is not None
        kind = "spatial" if is_spatial else "pooled"
        of_real = self._published(self._reference, is_spatial)
        if of_real is None:
            of_real = mean_and_covariance(real.of(kind))
        of_samples = mean_and_covariance(self._samples.of(kind))
        if len(of_real[0]) != len(of_samples[0]):
            raise ValueError(
                f"--reference {self._reference.name} has statistics of {len(of_real[0])} features, "
                f"the extractor makes {len(of_samples[0])}"
            )
        return frechet_distance(of_samples, of_real)


class Kept:
    """Features of images, batch by batch, as far as they are wanted."""

    def __init__(self, extractor: Extractor, wanted: set[str]):
        self._extractor = extractor
        self._parts: dict[str, list[Tensor]] = {name: [] for name in wanted}
        self.count = 0

    def add(self, pixels: Tensor) -> None:
        """(b, 3, H, W) uint8."""
        for part in pixels.split(64):
            features = self._extractor(part)
            for name, parts in self._parts.items():
                parts.append(getattr(features, name))
        self.count += len(pixels)

    def of(self, name: str) -> Tensor:
        """(count, ...) float32."""
        parts = self._parts[name]
        if len(parts) > 1:
            self._parts[name] = [torch.cat(parts)]
        return self._parts[name][0]


def extractor_of(context: MetricContext) -> Extractor:
    """The network that was asked for."""
    if context.extractor == "small":
        if context.source is None or context.folder is None:
            raise ValueError(
                "--extractor small is trained on the run's images, and this run has none beside "
                "its tokens: give Inception's weights with --inception FILE"
            )
        progress = context.progress("training the small extractor", "steps")
        return small_extractor(context.source, Path(context.folder), context.device, progress)
    if context.inception is None:
        raise ValueError(
            f"--inception is missing: the file of {INCEPTION_URL}; or --extractor small, a "
            "classifier of the run's images, whose numbers compare runs with each other alone"
        )
    return Inception(context.inception, context.device, context.inception_sha256)


def reference_of(context: MetricContext) -> ImageSet:
    """What the samples are compared with."""
    if context.reference is not None:
        return open_images_at(context.reference, context.image_size, "--reference")
    if context.source is None:
        raise ValueError(
            "--reference is missing, and the run has no images beside its tokens: give a folder of "
            "pictures, or an .npz with images or statistics, as ADM's"
        )
    return TrainingImages(context.source)


# --------------------------------------------------------------------------------------- numbers


def mean_and_covariance(features: Tensor) -> Statistics:
    """(N, F) float32 -> mean (F,) float32, covariance (F, F) float64, as torch-fidelity takes them
    (np.mean, np.cov), in parts: np.cov would copy all features twice in float64."""
    found = features.numpy()
    total = np.zeros(found.shape[1])
    for first in range(0, len(found), ROWS):
        total += found[first : first + ROWS].sum(axis=0, dtype=np.float64)
    centre = total / len(found)
    products = np.zeros((found.shape[1], found.shape[1]))
    for first in range(0, len(found), ROWS):
        part = found[first : first + ROWS] - centre
        products += part.T @ part
    return np.mean(found, axis=0), products / (len(found) - 1)


def frechet_distance(one: Statistics, other: Statistics) -> float:
    """Of two Gaussians, by torch-fidelity."""
    load_torch_fidelity()
    library = importlib.import_module("torch_fidelity.metric_fid")
    kind = np.result_type(one[0], other[0])
    first, second = (
        {"mu": mu.astype(kind), "sigma": sigma.astype(np.float64)} for mu, sigma in (one, other)
    )
    found = library.fid_statistics_to_metric(first, second, verbose=False)
    return float(found[library.KEY_METRIC_FID])


def inception_score(logits: Tensor) -> dict[str, float]:
    """Of (N, K) logits, by torch-fidelity: mean and deviation of ten parts."""
    load_torch_fidelity()
    library = importlib.import_module("torch_fidelity.metric_isc")
    count = len(logits)
    parts = min(PARTS, count)
    # Its own shuffle; and part by part, for it makes three float64 copies of what it is given.
    shuffled = torch.from_numpy(np.random.RandomState(SEED).permutation(count))
    scores = []
    for part in range(parts):
        these = shuffled[part * count // parts : (part + 1) * count // parts]
        found = library.isc_features_to_metric(logits[these], splits=1, shuffle=False)
        scores.append(found[library.KEY_METRIC_ISC_MEAN])
    return {
        "inception_score": float(np.mean(scores)),
        "inception_score_deviation": float(np.std(scores)),
    }


def kernel_distance(samples: Tensor, real: Tensor) -> dict[str, float]:
    """KID of two sets of features, by torch-fidelity: mean and deviation over subsets."""
    load_torch_fidelity()
    library = importlib.import_module("torch_fidelity.metric_kid")
    size = min(KID_SUBSET_SIZE, len(samples), len(real))
    found = library.kid_features_to_metric(
        samples,
        real,
        kid_subsets=KID_SUBSETS,
        kid_subset_size=size,
        rng_seed=SEED,
        verbose=False,
    )
    return {
        "kid": found[library.KEY_METRIC_KID_MEAN],
        "kid_deviation": found[library.KEY_METRIC_KID_STD],
        "kid_subset_size": size,
    }


def precision_recall(samples: Tensor, real: Tensor) -> dict[str, float]:
    """Of two sets of features, by torch-fidelity."""
    if min(len(samples), len(real)) <= NEIGHBOUR:
        raise ValueError(
            f"precision and recall look at the neighbour number {NEIGHBOUR} of every image; there "
            f"are {len(samples)} samples and {len(real)} images of the reference"
        )
    load_torch_fidelity()
    library = importlib.import_module("torch_fidelity.metric_prc")
    found = library.prc_features_to_metric(
        samples,
        real,
        prc_neighborhood=NEIGHBOUR,
        prc_batch_size=ROWS,
        save_cpu_ram=True,
        verbose=False,
    )
    return {
        "precision": found[library.KEY_METRIC_PRECISION],
        "recall": found[library.KEY_METRIC_RECALL],
    }
