"""A group of settings: rules beside fields, choices, and what may change."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

import pytest

from heptapod_fast.config import Settings
from heptapod_fast.config.config import GROUPS
from heptapod_fast.config.settings import (
    at_least,
    between,
    choices_of,
    distinct_shares,
    fits,
    more_than,
    names_among,
    setting,
    share,
)
from heptapod_fast.systems import SYSTEMS, configure

ALL_GROUPS = [*GROUPS.values(), *(system.Settings for system in SYSTEMS.values())]


@dataclass(frozen=True, kw_only=True)
class Weather(Settings):
    """A group made up for these tests."""

    sky: Literal["clear", "grey"] = setting("How it looks.")
    degrees: float | None = setting("Celsius.", default=20.0, rule=at_least(-273))
    winds: tuple[float, ...] = setting("Shares.", default=(), rule=distinct_shares())
    station: str | None = setting("Who measured.", may_change=True)
    days: int = setting("How many.", default=1, rule=at_least(1), may_change=True)
    is_holiday: bool = setting("Whether nobody works.", default=False, may_change=True)


@pytest.mark.parametrize(
    "rule, good, bad",
    [
        (at_least(2), (2, 3), (1, -5)),
        (between(1, 3), (1, 2, 3), (0, 4)),
        (more_than(0), (0.001, 5), (0, -1)),
        (share(), (0.0, 0.999), (-0.1, 1.0)),
        (distinct_shares(), ((), (0.5,), (0.5, 0.6)), ((0.5, 0.5), (1.0,), (-0.1,))),
        (names_among(("a", "b")), ("", "a", "a,b"), ("c", "a,,b", "a,c", "a,a")),
    ],
)
def test_rules(rule, good, bad):
    assert all(rule.holds(value) for value in good)
    assert not any(rule.holds(value) for value in bad)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"sky": "green"}, "--sky green: expected one of clear, grey"),
        ({"degrees": -300.0}, "--degrees -300.0: expected at least -273"),
        ({"degrees": float("nan")}, "--degrees nan: expected a finite number"),
        ({"winds": (float("inf"),)}, "--winds .*expected a finite number"),
        ({"winds": (0.5, 0.5)}, "--winds 0.5 0.5: expected different numbers"),
        ({"days": "8"}, "--days '8': expected a whole number"),
        ({"days": 1e4}, "--days 10000.0: expected a whole number"),
        ({"days": True}, "--days True: expected a whole number"),
        ({"degrees": "warm"}, "--degrees 'warm': expected a number"),
        ({"winds": 0.5}, "--winds 0.5: expected a tuple, each part a number"),
        ({"winds": ("a",)}, "--winds .*: expected a tuple, each part a number"),
        ({"station": 3}, "--station 3: expected a text"),
        ({"is_holiday": 1}, "--is-holiday 1: expected True or False"),
    ],
)
def test_a_value_that_cannot_be_is_refused_naming_the_flag(values, message):
    with pytest.raises(ValueError, match=message):
        Weather(**values).check()


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(batch="8"), "--batch '8': expected a whole number"),
        (dict(images=1e4), "--images 10000.0: expected a whole number"),
        (dict(ema=0.9), "--ema 0.9: expected a tuple"),
        (dict(ema=(0.5, 0.5)), "--ema 0.5 0.5: expected different numbers"),
        (dict(ema_snapshots=16), "--ema-snapshots 16: snapshots are kept for --ema post-hoc alone"),
        (dict(ema=(0.5, "soon")), "--ema .*: expected a tuple, each part a number or post-hoc"),
        (dict(width="wide"), "--width 'wide': expected a whole number"),
        (dict(patch_size="4"), "--patch-size '4': expected a whole number"),
        (dict(log="wandb,wandb"), "--log wandb,wandb: expected different names"),
    ],
)
def test_a_configuration_from_python_is_checked_as_flags_are(settings, message):
    with pytest.raises(ValueError, match=message):
        configure("tiny", **settings)


def test_a_whole_number_is_a_number():
    Weather(sky="grey", degrees=20, winds=(0,), station="mine", days=2, is_holiday=True).check()


def test_what_nobody_gave_is_filled_in():
    defaults = Weather(sky="grey", station="the tower")
    filled = Weather(station="mine").filled(defaults)
    assert filled == Weather(sky="grey", station="mine")


def test_identity_leaves_out_what_may_change():
    assert set(Weather().identity()) == {"sky", "degrees", "winds"}


def test_differences_say_what_may_change():
    now = Weather(sky="grey", station="mine")
    before = Weather(sky="clear", station="theirs")
    assert list(now.differences(before)) == [
        ("sky", "grey", "clear", False),
        ("station", "mine", "theirs", True),
    ]


def test_tuples_survive_json():
    assert Weather.from_plain({"sky": "grey", "winds": [0.1, 0.2]}).winds == (0.1, 0.2)


def test_settings_that_nobody_knows_or_nobody_says_are_refused():
    with pytest.raises(ValueError, match="does not know: rain"):
        Weather.from_plain({"sky": "grey", "rain": 1})
    for missing in ({}, {"sky": None}):
        with pytest.raises(ValueError, match="does not say sky: restore it"):
            Weather.from_plain(missing)


@dataclass(frozen=True, kw_only=True)
class LaterWeather(Weather):
    """The group of a later version, with two more settings."""

    haze: float = setting("Kilometres one can see.", before=50.0)
    moon: bool = setting("Whether it shines.", before=False)


def test_a_setting_that_came_later_does_not_change_runs_that_exist():
    """They are read with what they had, and keep the name made of their settings."""
    earlier = Weather(sky="grey", station="A")
    plain = dataclasses.asdict(earlier)
    read = LaterWeather.from_plain(plain)
    assert (read.haze, read.moon) == (50.0, False)
    assert read.identity() == earlier.identity()
    assert (
        list(read.differences(LaterWeather(sky="grey", station="A", haze=50.0, moon=False))) == []
    )


def test_a_setting_that_came_later_makes_another_run_where_it_is_used():
    found = LaterWeather(sky="grey", haze=2.0, moon=False).identity()
    assert found["haze"] == 2.0
    assert "moon" not in found


@pytest.mark.parametrize("group", ALL_GROUPS, ids=lambda group: group.__name__)
def test_every_setting_says_what_it_is(group):
    for field in dataclasses.fields(group):
        name = field.name
        assert field.metadata["help"].endswith((".", ")")), name


@pytest.mark.parametrize("group", ALL_GROUPS, ids=lambda group: group.__name__)
def test_every_number_has_a_rule_or_a_choice(group):
    for field in dataclasses.fields(group):
        name = field.name
        is_number = any(word in str(field.type) for word in ("int", "float"))
        assert not is_number or field.metadata["rule"] is not None, name
        is_choice = str(field.type).startswith("Literal")  # words among numbers have a rule
        assert not is_choice or choices_of(group, name), name


def test_no_two_groups_of_a_system_share_a_name():
    for system in SYSTEMS.values():
        names = [name for group in (*GROUPS.values(), system.Settings) for name in group.names()]
        assert len(names) == len(set(names))
        assert not {"size", "system", "version"} & set(names)


def test_a_pair_has_two_numbers():
    assert fits((1.0, 3), tuple[float, float])
    assert not fits((1.0,), tuple[float, float])
    assert not fits((1.0, 2.0, 3.0), tuple[float, float])
    assert fits((1.0, 2.0, 3.0), tuple[float, ...])
    assert fits((), tuple[float, ...])


def test_words_may_stand_among_numbers():
    kind = tuple[float | Literal["late"], ...]
    assert fits((1.0, "late", 3), kind)
    assert not fits(("later",), kind)
    assert not fits("late", kind)
