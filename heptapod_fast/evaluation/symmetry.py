"""Quality of logogram samples, read from their angular spectrum; no pretrained network is needed.

The radius of the ring as a function of the angle is radius + amplitude * cos(fold * angle - phase):
its Fourier transform has one line, at the fold. Tensor names: B samples, A angles, R radii, P
pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from heptapod_fast.data.logograms import Logograms
from heptapod_fast.data.sources import ImageSource
from heptapod_fast.evaluation.context import MetricContext
from heptapod_fast.systems.base import System
from heptapod_fast.tokenizers.base import Tokenizer, to_uint8, to_unit

ANGLES = 96
RADII = 64
MAX_WAVES = 12
COPY_SAMPLES = 2000
COPY_SIDE = 64
EQUAL = 0.5 / 255.0
_BLOCK = 4096


def read_symmetry(images: Tensor) -> tuple[Tensor, Tensor]:
    """The symmetry of logograms, white ink on black.

    The image is resampled to polar coordinates around its centre; the mean radius at every angle,
    weighted by the squared ink (which keeps faint haze from counting), is Fourier transformed, and
    the strongest of the wave numbers 1..12 is the fold. Angles without ink count little.

    Args:
        images: (B, 3, H, W) float in [-1, 1].

    Returns:
        fold: (B,) int64 in 1..12. A form that is no logogram gets whichever wave is strongest.
        turn: (B,) float32 in [0, 2 pi): fold times the angle of a crest, in radians (the y axis
            points down). Uniform if the phases are.
    """
    ink_BHW = images.float().mean(dim=1).add(1.0).mul(0.5).clamp(0.0, 1.0).square()
    device = images.device
    angle_A = (torch.arange(ANGLES, device=device) + 0.5) * (2.0 * math.pi / ANGLES)
    radius_R = torch.linspace(0.1, 1.0, RADII, device=device)
    grid = torch.stack((angle_A.cos()[:, None] * radius_R, angle_A.sin()[:, None] * radius_R), -1)
    ink_BAR = F.grid_sample(
        ink_BHW[:, None],
        grid.expand(len(images), -1, -1, -1),
        padding_mode="border",
        align_corners=False,
    )[:, 0]
    mass_BA = ink_BAR.sum(dim=-1)
    mean_BA = (ink_BAR * radius_R).sum(dim=-1) / (mass_BA + 1e-6)
    weight_BA = mass_BA / (mass_BA.mean(dim=1, keepdim=True) + 1e-6)
    centre_B1 = (weight_BA * mean_BA).mean(dim=1, keepdim=True)
    wave_BA = (mean_BA - centre_B1) * weight_BA.clamp(max=1.0)
    spectrum = torch.fft.rfft(wave_BA, dim=1)[:, 1 : MAX_WAVES + 1]
    fold = spectrum.abs().argmax(dim=1) + 1
    line = spectrum.gather(1, fold[:, None] - 1)[:, 0]
    # The first angle is half a step past zero, which turns the line by half a step times the fold.
    turn = fold * (math.pi / ANGLES) - line.angle()
    return fold, turn.remainder(2.0 * math.pi)


def rayleigh_p(angles: Tensor) -> float:
    """p-value of the Rayleigh test that angles (n,) in radians are uniform on the circle, with the
    approximation of Zar, Biostatistical Analysis, eq. 27.4. 1.0 for no angles."""
    n = len(angles)
    if n == 0:
        return 1.0
    angles = angles.double()
    resultant = math.hypot(float(angles.cos().sum()), float(angles.sin().sum()))
    exponent = math.sqrt(1 + 4 * n + 4 * (n * n - resultant * resultant)) - (1 + 2 * n)
    return min(1.0, math.exp(exponent))


def combine_p(values: list[float]) -> float:
    """Fisher's method: the p-value of several independent tests; 1.0 for none."""
    half = -sum(math.log(max(value, 1e-300)) for value in values)
    if half <= 0:  # no values, or all of them 1
        return 1.0
    # Upper tail of chi^2 with 2 k degrees of freedom at 2 * half, a finite sum; in logarithms, as
    # the terms of a very small p-value overflow.
    logs = [k * math.log(half) - math.lgamma(k + 1) for k in range(len(values))]
    top = max(logs)
    return min(1.0, math.exp(top - half) * sum(math.exp(value - top) for value in logs))


def nearest_distance(
    images: Tensor, source: ImageSource, tokenizer: Tokenizer | None = None
) -> Tensor:
    """Distance of each image to the nearest one of a source.

    Distances are root mean squares over the pixels of the grey images, in units of the [-1, 1]
    range (0 = a copy, 2 = white against black); below a quarter of an 8-bit step, where rounding
    rules, they are 0. Images above 64 px are area averaged to 64 px.
    Products against blocks of 4096 source images: no large matrix is made.

    Args:
        images: (B, 3, H, W) float in [-1, 1].
        source: what they are compared with.
        tokenizer: if given, the source's images go through it first.

    Returns:
        (B,) float32 on the CPU.
    """
    query_BP = _grey(images)
    best_B = torch.full((len(images),), torch.inf, device=images.device)
    for start in range(0, len(source), _BLOCK):
        ids = torch.arange(start, min(start + _BLOCK, len(source)))
        real = through(tokenizer, to_unit(source.images(ids)))
        block_KP = _grey(real.to(images.device))
        half_K = 0.5 * block_KP.square().sum(dim=1)
        best_B = torch.minimum(
            best_B, torch.addmm(half_K, query_BP, block_KP.T, alpha=-1.0).amin(dim=1)
        )
    square_B = (2.0 * best_B + query_BP.square().sum(dim=1)).clamp(min=0.0)
    distance_B = (square_B / query_BP.shape[1]).sqrt().cpu()
    return torch.where(distance_B < EQUAL, 0.0, distance_B)


def through(tokenizer: Tokenizer | None, images: Tensor) -> Tensor:
    """Images encoded, decoded and rounded as samples are, on the CPU; unchanged without a
    tokenizer."""
    if tokenizer is None:
        return images
    with torch.no_grad():
        return to_unit(to_uint8(tokenizer.decode(tokenizer.encode(images)))).cpu()


def _grey(images: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, P) float32."""
    grey = images.float().mean(dim=1, keepdim=True)
    if grey.shape[-1] > COPY_SIDE:
        grey = F.interpolate(grey, size=(COPY_SIDE, COPY_SIDE), mode="area")
    return grey.flatten(1)


class SymmetryAccuracy:
    """Are samples of logograms right, varied and new?

    `compute` returns:
        symmetry_accuracy: share of samples whose fold is their class's; below it one number per
            class, `symmetry_accuracy/NAME`, for classes that were sampled.
        phase_uniformity_p: p-value of the hypothesis that phases are uniform (Rayleigh tests per
            class on the samples with the right fold, combined by Fisher's method). Small means
            that the orientation has collapsed.
        copy_distance: median distance of samples to their nearest training image
            (`nearest_distance`).
        copy_distance_ratio: the same divided by that of fresh logograms of the same classes that
            were never trained on. About 1 is new; near 0 is copied.
        copy_share: share of samples at most as far from a training image as the nearest hundredth
            of the fresh ones.
        copy_share_fresh: the same share of the fresh ones themselves, what copy_share should be:
            0.01, more where codes make many images equal.

    The copies are measured on up to 2000 samples, spread evenly. With the samples' tokenizer in the
    context, fresh and training images go through it first: otherwise its error hides copies.

    Raises:
        ValueError: the context's source is not a set of logograms.
    """

    needs_samples = True

    def __init__(self, context: MetricContext, names: Sequence[str] = ("symmetry",)) -> None:
        if not isinstance(context.source, Logograms):
            found = "none" if context.source is None else context.source.name
            raise ValueError(
                f"--metrics symmetry reads logograms, found {found}: use --data "
                "logograms or leave symmetry out"
            )
        self.source = context.source
        self.tokenizer = context.tokenizer
        self._images: list[Tensor] = []
        self._labels: list[Tensor] = []
        self._folds: list[Tensor] = []
        self._turns: list[Tensor] = []

    def restart(self, system: System) -> None:
        """See `Metric.restart`."""
        for kept in (self._images, self._labels, self._folds, self._turns):
            kept.clear()

    def update(self, pixels: Tensor, labels: Tensor) -> None:
        """(B, 3, H, W) uint8 and (B,) int64 classes; ValueError for others."""
        side = self.source.image_size
        is_right = pixels.shape[1:] == (3, side, side) and labels.shape == pixels.shape[:1]
        if not is_right or pixels.dtype != torch.uint8:
            raise ValueError(
                f"symmetry: expected uint8 images (B, 3, {side}, {side}) and labels (B,), "
                f"found {pixels.dtype} {tuple(pixels.shape)} and {tuple(labels.shape)}"
            )
        images = to_unit(pixels)
        fold, turn = read_symmetry(images)
        self._folds.append(fold.cpu())
        self._turns.append(turn.cpu())
        self._labels.append(labels.long().cpu())
        self._images.append(images.float().mean(dim=1, keepdim=True).half().cpu())

    def compute(self) -> dict[str, float]:
        """The numbers listed above; ValueError without samples."""
        if sum(len(labels) for labels in self._labels) == 0:
            raise ValueError("symmetry: no samples to measure; raise --count")
        labels = torch.cat(self._labels)
        folds = torch.cat(self._folds)
        turns = torch.cat(self._turns)
        right = torch.cat(self._folds) == labels + 2
        result = {"symmetry_accuracy": right.double().mean().item()}
        p_values = []
        for label in labels.unique().tolist():
            mine = labels == label
            result[f"symmetry_accuracy/{self.source.class_names[label]}"] = (
                (folds[mine] == label + 2).double().mean().item()
            )
            if (mine & right).any():
                p_values.append(rayleigh_p(turns[mine & right]))
        result["phase_uniformity_p"] = combine_p(p_values)
        return result | self._copies(labels)

    def _copies(self, labels: Tensor) -> dict[str, float]:
        count = min(len(labels), COPY_SAMPLES)
        rows = torch.arange(count) * len(labels) // count
        samples = torch.cat(self._images)[rows].float().expand(-1, 3, -1, -1)
        classes = len(self.source.class_names)
        # Class of logogram i is i mod classes: these ids give one fresh image per sample's class.
        ids = labels[rows] + classes * torch.arange(count)
        fresh = self.source.fresh(classes * count)
        real = through(self.tokenizer, to_unit(fresh.images(ids)))
        both = nearest_distance(torch.cat((samples, real)), self.source, self.tokenizer)
        ours, theirs = both.chunk(2)
        near = theirs.quantile(0.01)
        return {
            "copy_distance": ours.median().item(),
            "copy_distance_ratio": (ours.median() / theirs.median().clamp(min=1e-6)).item(),
            "copy_share": (ours <= near).double().mean().item(),
            "copy_share_fresh": (theirs <= near).double().mean().item(),
        }
