"""Moving averages: their decays, and averages of other lengths made of two."""

import math

import numpy as np
import pytest

from heptapod_fast.averages import (
    LENGTHS,
    LONGEST,
    Average,
    Profile,
    averages_of,
    gamma_of,
    length_of,
    mismatch,
    overlap,
    rounding,
    shares,
)


def test_an_exponential_average_ramps():
    average = Average("ema-0.9999", decay=0.9999)
    assert [average.decay_at(step) for step in (1, 8)] == [2 / 11, 9 / 18]
    assert average.decay_at(10**6) == 0.9999
    assert Average("ema-0.5", decay=0.5).decay_at(100) == 0.5


def test_the_averages_of_a_recipe():
    found = averages_of((0.9999, "post-hoc", 0.0))
    assert [average.name for average in found] == [
        "ema-0.9999",
        "power-0.05",
        "power-0.1",
        "ema-0.0",
    ]
    assert [average.gamma is None for average in found] == [True, False, False, True]
    assert [average.decay for average in found] == [0.9999, 0.0, 0.0, 0.0]


def share_of_each_step(average, steps):
    """What each step's weights add to the average after the last one."""
    share = np.zeros(steps)
    for step in range(1, steps + 1):
        decay = average.decay_at(step)
        share *= decay
        share[step - 1] = 1 - decay
    return share


@pytest.mark.parametrize("length", [0.03, 0.05, 0.1, 0.2, LONGEST])
def test_a_length_is_a_standard_deviation(length):
    """Of the steps that are in the average, relative to the last one."""
    gamma = gamma_of(length)
    assert length_of(gamma) == pytest.approx(length)
    steps = 4000
    share = share_of_each_step(Average("", gamma=gamma), steps)
    assert share.sum() == pytest.approx(1.0)
    time = np.arange(1, steps + 1) / steps
    mean = float(share @ time)
    deviation = math.sqrt(float(share @ (time - mean) ** 2))
    assert deviation == pytest.approx(length, rel=0.01)
    assert mean == pytest.approx((gamma + 1) / (gamma + 2), rel=0.01)


def test_the_papers_exponents():
    assert gamma_of(0.05) == pytest.approx(16.97, abs=0.01)
    assert gamma_of(0.1) == pytest.approx(6.94, abs=0.01)


@pytest.mark.parametrize("length", [0.0, -0.1, 0.26, 1.0])
def test_other_lengths_are_refused(length):
    with pytest.raises(ValueError, match="expected more than 0, to 0.25"):
        gamma_of(length)


def test_overlaps_are_integrals():
    one, other = Profile(30, 2.5), Profile(50, 7.0)
    time = (np.arange(300_000) + 0.5) * 50 / 300_000

    def density(profile):
        inside = time <= profile.step
        return (
            inside * (profile.gamma + 1) * time**profile.gamma / profile.step ** (profile.gamma + 1)
        )

    for a, b in ((one, other), (one, one), (other, other)):
        expected = float((density(a) * density(b)).mean()) * 50
        assert overlap(a, b) == pytest.approx(expected, rel=1e-4) == overlap(b, a)


def kept_averages(walk, snapshots):
    """Profiles and values of the averages that a run keeps."""
    profiles, values = [], []
    running = [(average, np.zeros(walk.shape[1])) for average in averages_of(("post-hoc",))]
    for step, weights in enumerate(walk, 1):
        for average, value in running:
            decay = average.decay_at(step)
            value *= decay
            value += (1 - decay) * weights
        if step % (len(walk) // snapshots) == 0:
            for average, value in running:
                profiles.append(Profile(step, average.gamma))
                values.append(value.copy())
    return profiles, np.stack(values)


@pytest.mark.parametrize("length, close", [(0.03, 0.02), (0.07, 0.01), (0.15, 0.01), (0.2, 0.03)])
def test_averages_of_other_lengths_are_made_of_two(length, close):
    """Of a random walk, against the average that is kept from the start."""
    walk = np.random.default_rng(1).normal(size=(1600, 200)).cumsum(0)
    profiles, values = kept_averages(walk, snapshots=16)
    wanted = Profile(1600, gamma_of(length))
    parts = shares(profiles, wanted)
    assert sum(parts) == pytest.approx(1.0)
    expected = share_of_each_step(Average("", gamma=wanted.gamma), 1600) @ walk
    error = np.linalg.norm(np.array(parts) @ values - expected)
    assert error < close * np.linalg.norm(expected - walk[-1])
    assert mismatch(profiles, parts, wanted) < 0.15


def test_only_relative_time_counts():
    def parts(unit):
        kept = [Profile(unit * n, gamma_of(length)) for n in range(1, 33) for length in LENGTHS]
        return shares(kept, Profile(32 * unit, gamma_of(0.15)))

    assert parts(30_000) == pytest.approx(parts(1), rel=1e-6, abs=1e-9)


def test_what_is_kept_is_itself():
    profiles = [Profile(step, gamma_of(length)) for step in (50, 100) for length in LENGTHS]
    for number, profile in enumerate(profiles):
        expected = np.eye(4)[number]
        parts = shares(profiles, profile)
        assert parts == pytest.approx(expected, abs=1e-3)
        assert mismatch(profiles, parts, profile) < 1e-3


@pytest.mark.parametrize("snapshots, length, can_be", [(32, 0.02, True), (256, 0.003, False)])
def test_rounded_snapshots_are_not_blown_up(snapshots, length, can_be):
    """Shares in the hundreds would multiply what half precision rounds."""
    steps = range(1, snapshots + 1)
    profiles = [Profile(step, gamma_of(length)) for step in steps for length in LENGTHS]
    wanted = Profile(snapshots, gamma_of(length))
    parts = shares(profiles, wanted)
    assert mismatch(profiles, parts, wanted) < 0.15
    assert (mismatch(profiles, parts, wanted) + rounding(parts) < 0.15) is can_be


def test_without_snapshots_another_length_cannot_be_had():
    profiles = [Profile(100, gamma_of(length)) for length in LENGTHS]
    wanted = Profile(100, gamma_of(0.25))
    assert mismatch(profiles, shares(profiles, wanted), wanted) > 0.15
