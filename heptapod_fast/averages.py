"""Moving averages of the weights: which ones a run keeps, their names, and averages of other
lengths made of them afterwards.

An average is either exponential, with a decay that is given, or a power function of time (Karras et
al., "Analyzing and Improving the Training Dynamics of Diffusion Models", 2024, section 3), whose
reach grows with the run:

    average after step t = sum over s of w(s) weights(s),   w(s) proportional to s^gamma

Its length is the standard deviation of w relative to t: 0.05 is the last few percent of a run. Two
of them, kept with snapshots along the way, are enough to make one of nearly any length after the
run: the combination of snapshots whose w is closest to the wanted one (section 3.2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

POST_HOC = "post-hoc"
LENGTHS = (0.05, 0.1)  # of the averages that are kept for it, as in the paper
LONGEST = 0.25  # gamma 0.72; the mean of all steps, gamma 0, would have 0.2887
# What rounding to half precision adds to `mismatch` for a share of 1: it is 1.4e-4 of the weights,
# which are taken to move by 3% of their size over an average's length.
ROUNDING = 1.4e-4 / 0.03


@dataclass(frozen=True)
class Average:
    """One moving average of a run.

    name: on disk and on the command line. decay: of an exponential one. gamma: of a power function.
    """

    name: str
    decay: float = 0.0
    gamma: float | None = None

    def decay_at(self, step: int) -> float:
        """Share of the average that stays in optimizer step 1, 2, ...

        min(decay, (1 + step) / (10 + step)): short runs sample well, long ones are not touched. Of
        a power function (1 - 1 / step)^(gamma + 1), so that the first step takes the weights.
        """
        if self.gamma is None:
            return min(self.decay, (1 + step) / (10 + step))
        return (1 - 1 / step) ** (self.gamma + 1)


@dataclass(frozen=True)
class Profile:
    """w of a power-function average: s^gamma over the steps s up to `step`."""

    step: float
    gamma: float


def averages_of(ema: Sequence[float | str]) -> list[Average]:
    """The averages of --ema: a decay each, and two for `post-hoc`."""
    found = []
    for entry in ema:
        if entry == POST_HOC:
            found += [Average(power_name(length), gamma=gamma_of(length)) for length in LENGTHS]
        else:
            found.append(Average(f"ema-{entry}", decay=float(entry)))
    return found


def power_name(length: float) -> str:
    """Name of a power-function average."""
    return f"power-{length:g}"


def length_of(gamma: float) -> float:
    """Standard deviation of s^gamma on (0, 1)."""
    return math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))


def gamma_of(length: float) -> float:
    """Inverse of `length_of`, for lengths above 0, to `LONGEST`.

    Raises:
        ValueError: another length.
    """
    if not 0 < length <= LONGEST:
        raise ValueError(f"an average of length {length:g}: expected more than 0, to {LONGEST}")
    # (gamma + 2)^2 (gamma + 3) = (gamma + 1) / length^2; lengths in question have one root above 0.
    inverse = length**-2
    roots = np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse])
    return float(max(root.real for root in roots if abs(root.imag) < 1e-9 * abs(root)))


def shares(kept: Sequence[Profile], wanted: Profile) -> list[float]:
    """How much of each kept average, one or more, goes into the wanted one: least squares between
    the functions of time, and a sum of 1."""
    # Time relative to the wanted average's: overlaps of a million steps would be tiny.
    kept = [Profile(profile.step / wanted.step, profile.gamma) for profile in kept]
    wanted = Profile(1.0, wanted.gamma)
    count = len(kept)
    # Minimise |sum c_i w_i - w|^2 with sum c_i = 1, by a Lagrange multiplier.
    system = np.zeros((count + 1, count + 1))
    target = np.zeros(count + 1)
    for i, one in enumerate(kept):
        for j, other in enumerate(kept):
            system[i, j] = overlap(one, other)
        system[i, count] = system[count, i] = 1.0
        target[i] = overlap(one, wanted)
    target[count] = 1.0
    solution = np.linalg.lstsq(system, target, rcond=1e-12)[0]
    return solution[:count].tolist()


def mismatch(kept: Sequence[Profile], parts: Sequence[float], wanted: Profile) -> float:
    """How far the function of time that `shares` makes is from the wanted one: the norm of the
    difference over its own norm."""
    own = overlap(wanted, wanted)
    squared = own
    for part, profile in zip(parts, kept, strict=True):
        squared -= 2 * part * overlap(profile, wanted)
        for other_part, other in zip(parts, kept, strict=True):
            squared += part * other_part * overlap(profile, other)
    return math.sqrt(max(squared, 0.0) / own)


def rounding(parts: Sequence[float]) -> float:
    """The same for what rounded snapshots add: shares of opposite signs multiply it."""
    return ROUNDING * math.sqrt(sum(part**2 for part in parts))


def overlap(one: Profile, other: Profile) -> float:
    """Integral of the product of both, each of integral 1."""
    until = min(one.step, other.step)
    # In logarithms: step^gamma overflows.
    log = (one.gamma + other.gamma + 1) * math.log(until)
    log -= (one.gamma + 1) * math.log(one.step) + (other.gamma + 1) * math.log(other.step)
    weight = (one.gamma + 1) * (other.gamma + 1) / (one.gamma + other.gamma + 1)
    return weight * math.exp(log)
