"""FID, sFID, KID, Inception Score, precision and recall by torch-fidelity's own functions.

The protocol: samples are rounded to uint8 first; FID and sFID compare mean and covariance of
features with those of the reference, as they are stored in an ADM file or computed of its images;
KID takes 100 subsets of at most 1,000; the Inception Score ten parts of the shuffled samples;
precision and recall the third nearest neighbour (Kynkaanniemi et al. 2019), on the pooled features
as ADM does; rFID compares the reference's images with themselves, once through the run's tokenizer:
what its error alone costs, a floor under the FID of samples. What is needed of samples and
reference is kept as features, at most 20 KiB an image.
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
from heptapod_fast.evaluation.symmetry import through
from heptapod_fast.systems.base import System
from heptapod_fast.tokenizers.base import to_uint8, to_unit

FEW = 2048  # samples below which FID's covariance has no full rank
KID_SUBSETS = 100
KID_SUBSET_SIZE = 1000
PARTS = 10  # of the Inception Score
NEIGHBOUR = 3
SEED = 2020  # of KID's subsets and the Inception Score's parts, torch-fidelity's default
ROWS = 1024  # of covariances at a time
# Of distances at a time, to all images: of 50,000, looking for neighbours among 512 takes 0.5 GB.
DISTANCE_ROWS = 512
ENCODE_BATCH = 64  # images that the tokenizer gets at a time
OF_IMAGES = ("kid", "precision", "recall", "rfid")  # which no statistics of a reference will do for

Statistics = tuple[np.ndarray, np.ndarray]


class Fidelity:
    """Samples against a reference; see `Metric`.

    Args:
        names: of fid, sfid, kid, is, precision, recall, rfid.
        extractor: the network of features; by default the one that the context names.

    Attributes:
        needs_samples: see `Metric`; of rfid alone not.

    Raises:
        ValueError: no reference, one without what a metric needs, or no weights; says what to give.
    """

    def __init__(
        self, context: MetricContext, names: Sequence[str], extractor: Extractor | None = None
    ):
        load_torch_fidelity()  # what is missing is said before anything is sampled
        self._names = tuple(names)
        self.needs_samples = set(names) != {"rfid"}
        self._context = context
        if "rfid" in names and context.tokenizer is None:
            raise ValueError(
                "--metrics rfid puts images through the run's tokenizer, and this run has none"
            )
        self._extractor = extractor or extractor_of(context)
        self._reference: ImageSet | None = None
        if set(names) != {"is"}:
            self._reference = reference_of(context)
            self._check_reference(self._reference)
        self._real: Kept | None = None  # the reference's features, once they were needed
        self._floor: float | None = None  # rFID, which no sample changes
        self._samples = self._no_samples()

    def restart(self, system: System) -> None:
        """See `Metric.restart`."""
        self._samples = self._no_samples()

    def _no_samples(self) -> Kept:
        return Kept(self._extractor, self._wanted(of_samples=True), self._context.count)

    def _wanted(self, of_samples: bool) -> set[str]:
        """Which features are kept."""
        wanted = set()
        if set(self._names) & {"fid", "kid", "precision", "recall"}:
            wanted.add("pooled")
        if "rfid" in self._names and not of_samples:
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
        lacking = [n for n in self._names if n in OF_IMAGES]
        if lacking:
            raise ValueError(
                f"--metrics {', '.join(lacking)}: --reference {reference.name} has statistics "
                "alone, and these look at its images one by one: give an .npz with arr_0, or a "
                "folder"
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
        if self.needs_samples and count < 2:
            raise ValueError(f"{', '.join(self._names)}: of {count} samples there is no spread")
        found: dict[str, Any] = {}
        if self._reference is not None and self._real is None:
            self._real = self._features_of_reference(self._reference)
        real = self._real
        if "rfid" in self._names:
            assert real is not None
            found |= self._reconstructions(real)
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
        if self.needs_samples and count < FEW:
            found["warning"] = (
                f"{count:,} samples: below {FEW:,} FID has a bias that depends on their number; "
                "published numbers are of 50,000"
            )
        return found

    def _features_of_reference(self, reference: ImageSet) -> Kept:
        """Of its images, as far as they are needed: not where its statistics will do."""
        wanted = self._wanted(of_samples=False)
        if not set(self._names) & set(OF_IMAGES):
            if self._published(reference, is_spatial=False) is not None:
                wanted.discard("pooled")
        if self._published(reference, is_spatial=True) is not None:
            wanted.discard("spatial")
        real = Kept(self._extractor, wanted, len(reference))
        if not wanted:
            return real
        progress = self._context.progress("features of the reference")
        for pixels in reference.batches():
            real.add(pixels)
            progress(real.count, len(reference))
        return real

    def _reconstructions(self, real: Kept) -> dict[str, Any]:
        """rFID: of the reference's images as the tokenizer gives them back, against the same images
        as they are, whatever statistics the reference has with it."""
        reference = self._reference
        tokenizer = self._context.tokenizer
        assert reference is not None and tokenizer is not None  # refused without
        if self._floor is None:
            again = Kept(self._extractor, {"pooled"}, len(reference))
            progress = self._context.progress("the reference through the tokenizer")
            for pixels in reference.batches():
                for part in pixels.split(ENCODE_BATCH):
                    again.add(to_uint8(through(tokenizer, to_unit(part))))
                progress(again.count, len(reference))
            one, other = (mean_and_covariance(kept.of("pooled")) for kept in (again, real))
            self._floor = frechet_distance(one, other)
        return {"rfid": self._floor, "rfid_images": len(reference)}

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
    """Features of images, batch by batch, as far as they are wanted, each in one tensor: parts
    that are put together at the end need twice the memory.

    Args:
        room: images that are expected. More are taken too.
    """

    def __init__(self, extractor: Extractor, wanted: set[str], room: int):
        self._extractor = extractor
        self._wanted = wanted
        self._room = max(room, 1)
        self._features: dict[str, Tensor] = {}
        self.count = 0

    def add(self, pixels: Tensor) -> None:
        """(b, 3, H, W) uint8."""
        for part in pixels.split(64):
            features = self._extractor(part)
            end = self.count + len(part)
            for name in self._wanted:
                values = getattr(features, name)
                self._with_room(name, end, values)[self.count : end] = values
            self.count = end

    def _with_room(self, name: str, rows: int, like: Tensor) -> Tensor:
        """The tensor of a feature, of twice the length where it was too short."""
        while self._room < rows:
            self._room *= 2
        found = self._features.get(name)
        if found is None or len(found) < rows:
            # Memory that nothing was written to is not taken yet.
            longer = like.new_empty(self._room, *like.shape[1:])
            if found is not None:
                longer[: self.count] = found[: self.count]
            self._features[name] = found = longer
        return found

    def of(self, name: str) -> Tensor:
        """(count, ...) float32."""
        return self._features[name][: self.count]


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
        prc_batch_size=DISTANCE_ROWS,
        save_cpu_ram=True,
        verbose=False,
    )
    return {
        "precision": found[library.KEY_METRIC_PRECISION],
        "recall": found[library.KEY_METRIC_RECALL],
    }
