"""The learning rate and the decay of the averages, over the images trained on."""

import pytest

from heptapod_fast.systems import Phase
from heptapod_fast.train.schedule import (
    learning_rate,
    leaves_no_peak,
    warmup_images,
)
from tests.running import start_here


def rates(recipe, phase, images):
    """{images: rate of the step that ends there}."""
    return {at: learning_rate(recipe, at, phase) for at in images}


def test_rate_rises_linearly_then_stays(make_config):
    config = make_config(images=1000, warmup=0.1, lr_per_256=0.32, lr_schedule="constant")
    peak = 0.32 * 8 / 256
    points = {0: 0.0, 50: peak / 2, 99: 0.99 * peak, 100: peak, 101: peak, 1000: peak}
    assert rates(config.recipe, Phase(0, 1000), points) == pytest.approx(points)


def test_cosine_ends_at_one_percent_and_stays_there(make_config):
    config = make_config(images=1100, warmup=1 / 11, lr_per_256=0.32, lr_schedule="cosine")
    peak = 0.01
    points = {100: peak, 600: peak * 0.505, 1100: peak * 0.01, 1200: peak * 0.01}
    assert rates(config.recipe, Phase(0, 1100), points) == pytest.approx(points)


def test_no_warmup_starts_at_the_peak(make_config):
    config = make_config(warmup=0.0, lr_schedule="constant")
    phase = Phase(0, config.recipe.images)
    assert learning_rate(config.recipe, 8, phase) == config.recipe.learning_rate


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_every_phase_has_a_schedule_of_its_own(make_config, schedule):
    recipe = make_config(images=1000, warmup=0.1, lr_schedule=schedule).recipe
    second = Phase(400, 1000)
    alone = Phase(0, 600)
    for done in (10, 60, 61, 300, 600):
        expected = learning_rate(recipe, done, alone)
        assert learning_rate(recipe, 400 + done, second) == expected


def test_the_share_of_the_warmup_is_that_of_the_only_phase(make_config):
    recipe = make_config(images=1000, warmup=0.123).recipe
    phase = Phase(0, 1000)
    at = warmup_images(recipe, phase)
    before = at - 1
    assert at == 123
    assert learning_rate(recipe, before, phase) < recipe.learning_rate
    assert learning_rate(recipe, at, phase) == pytest.approx(recipe.learning_rate)


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("cosine", 0, False),
        ("cosine", 99, False),
        ("cosine", 100, True),
        ("constant", 99, False),
        ("constant", 1000, True),
        ("trapezoid", 79, False),
        ("trapezoid", 80, True),
        ("trapezoid", 0, False),
    ],
)
def test_a_warmup_that_leaves_no_peak(make_config, schedule, warmup, expected):
    """A trapezoid falls over the last fifth of its phase."""
    recipe = make_config(images=1000, lr_schedule=schedule, warmup_images=warmup).recipe
    phase = Phase(900, 1000)
    assert leaves_no_peak(recipe, phase) is expected


def test_a_run_says_that_its_full_rate_is_not_reached(tmp_path):
    said = []
    start_here(tmp_path / "all", said.append, images=16, warmup_images=16)
    assert any("the full rate is not reached" in line for line in said)
    said.clear()
    start_here(tmp_path / "half", said.append, images=16, warmup_images=8)
    assert not any("the full rate is not reached" in line for line in said)
